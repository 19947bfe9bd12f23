"""ftso reproduce."""

import argparse
import json
from typing import Any

from ..errors import UsageError
from .console import progress_bar
from .nb201 import add_search

SEARCHES = (("ftso", 1), ("darts", 1), ("darts", 2))


def add(commands: Any) -> None:
    reproduce = commands.add_parser("reproduce", help="the paper's figures beside what this package counts or measures")
    what = reproduce.add_subparsers(dest="what", required=True, metavar="WHAT")
    section3 = what.add_parser("section3", help="the complexity formulas beside counts of the real super-networks")
    section3.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    section3.set_defaults(run=run_section3)
    table2 = what.add_parser(
        "table2", help="NAS-Bench-201: the paper's rows looked up, and searches scored beside them"
    )
    table2.add_argument("--table", required=True, metavar="FILE.csv[.gz]", help="the benchmark's results, as for nb201")
    table2.add_argument("--data", metavar="digits|FILE.npz|DIR", help="also search on these images (default: do not)")
    table2.add_argument("--seeds", type=int, default=3, help="searches of each kind, and random draws (default: 3)")
    add_search(table2)
    table2.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    table2.set_defaults(run=run_table2)


def run_section3(args: argparse.Namespace) -> None:
    from ..section3 import section3

    found = section3()
    print(json.dumps(found.to_dict()) if args.json else found)


def run_table2(args: argparse.Namespace) -> None:
    from ..nats_table import read_table
    from ..table2 import table2

    if args.seeds < 1:
        raise UsageError(f"seeds: expected a positive number, got {args.seeds}")
    table = read_table(args.table)
    found = table2(table, _searched(args) if args.data else (), args.seeds)
    print(json.dumps(found.to_dict()) if args.json else found)


def _searched(args: argparse.Namespace) -> list[Any]:
    from ..nats_search import search_nats
    from ..readers import read_images

    images, results = read_images(args.data), []
    for method, order in SEARCHES:
        for seed in range(args.seeds):
            with progress_bar(f"{method}, order {order}, seed {seed}") as progress:
                results.append(
                    search_nats(
                        images,
                        args.mode,
                        method=method,
                        order=order,
                        seed=seed,
                        channels=args.channels,
                        cells=args.cells,
                        progress=progress,
                    )
                )
    return results
