"""ftso draw."""

import argparse
from pathlib import Path
from typing import Any

from ..draw import draw_genotype
from ..genotype import Genotype
from .console import text_or_file


def add(commands: Any) -> None:
    draw = commands.add_parser("draw", help="draw a genotype as SVG")
    draw.add_argument("genotype", help="DARTS text, its JSON, or a file that holds one of them")
    draw.add_argument("--out", metavar="FILE.svg", help="where to write (default: stdout)")
    draw.add_argument("--title", help="a line above the cells")
    draw.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    svg = draw_genotype(Genotype.read(text_or_file(args.genotype)), args.title)
    if args.out:
        Path(args.out).write_text(svg, encoding="utf-8")
    else:
        print(svg)
