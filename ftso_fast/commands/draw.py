"""ftso draw."""

import argparse
from pathlib import Path
from typing import Any

from ..draw import draw_genotype
from ..published import PUBLISHED
from .console import genotype_named


def add(commands: Any) -> None:
    draw = commands.add_parser("draw", help="draw a genotype as SVG")
    draw.add_argument("genotype", help=f"DARTS text, its JSON, a file of either, or {', '.join(PUBLISHED)}")
    draw.add_argument("--out", metavar="FILE.svg", help="where to write (default: stdout)")
    draw.add_argument("--title", help="a line above the cells")
    draw.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    svg = draw_genotype(genotype_named(args.genotype), args.title)
    if args.out:
        Path(args.out).write_text(svg, encoding="utf-8")
    else:
        print(svg)
