"""ftso reproduce."""

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    reproduce = commands.add_parser("reproduce", help="the paper's figures beside what this package counts or measures")
    what = reproduce.add_subparsers(dest="what", required=True, metavar="WHAT")
    section3 = what.add_parser("section3", help="the complexity formulas beside counts of the real super-networks")
    section3.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    section3.set_defaults(run=run_section3)


def run_section3(args: argparse.Namespace) -> None:
    from ..section3 import section3

    found = section3()
    print(json.dumps(found.to_dict()) if args.json else found)
