"""The `ftso` command: parsing and printing only. Results go to stdout, progress to stderr.

Exit codes: 0 ok, 1 run failed, 2 usage, 3 bad data, 4 out of memory, 5 numerical failure, 130 after Ctrl-C.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .config import METHODS, PRESETS
from .errors import DataError, NumericalError, UsageError
from .genotype import REPLACEMENTS, Genotype
from .space import OPERATOR_SETS

if TYPE_CHECKING:
    from .run import Progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ftso",
        description="Find a convolutional cell architecture: first the topology, then the operator.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    search = commands.add_parser("search", help="search a cell on images and print the genotype")
    search.add_argument(
        "--data",
        required=True,
        metavar="digits|FILE.npz|DIR",
        help="scikit-learn's digits (a smoke set), an npz file with x_train and y_train, or CIFAR-10's binary folder",
    )
    search.add_argument(
        "--mode",
        default="1it",
        metavar="Nit|Nep",
        help="iterations or epochs (default: 1it); 1ep+18ep searches the topology, then operators on it",
    )
    search.add_argument("--method", default="ftso", help=f"one of {', '.join(METHODS)} (default: ftso)")
    search.add_argument(
        "--operators",
        metavar="SET",
        help=f"on every edge of ftso's topology search: {', '.join(OPERATOR_SETS)} (default: skip)",
    )
    search.add_argument("--second-order", action="store_true", help="pc-darts and darts: the unrolled gradient")
    search.add_argument("--beta-only", action="store_true", help="rank edges by beta, not by beta times best alpha")
    search.add_argument("--seed", type=int, default=0, help="decides everything random (default: 0)")
    search.add_argument("--k", type=int, help="process 1/k of the channels (default: 4; darts: 1)")
    search.add_argument(
        "--replace",
        metavar="OP",
        help=f"operator of every kept edge, ftso: {', '.join(REPLACEMENTS)} (default: sep_conv_3x3)",
    )
    search.add_argument("--classes", type=int, help="number of classes (default: found in the data)")
    search.add_argument("--preset", help=f"Table 4's settings: {', '.join(PRESETS)} (default: the method's own)")
    search.add_argument("--backend", help="cpu or reference; runs or fails (default: the fastest that can)")
    search.add_argument(
        "--precision",
        default="float32",
        help="float32, bf16_backward or bf16 (default: float32; others print their cost)",
    )
    search.add_argument("--threads", type=int, help="threads to use (default: torch's choice)")
    search.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    search.add_argument("--out", metavar="DIR", help="also write result.json, genotype.json and cells.svg there")

    draw = commands.add_parser("draw", help="draw a genotype as SVG")
    draw.add_argument("genotype", help="DARTS text, its JSON, or a file that holds one of them")
    draw.add_argument("--out", metavar="FILE.svg", help="where to write (default: stdout)")
    draw.add_argument("--title", help="a line above the cells")

    commands.add_parser("info", help="versions, backends, instruction sets, threads")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left: what the interpreter flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its sentence
        return int(stop.code or 0)
    try:
        {"search": _search, "draw": _draw, "info": _info}[args.command](args)
    except UsageError as error:
        return _fail(2, error)
    except DataError as error:
        return _fail(3, error)
    except MemoryError as error:
        return _fail(4, f"out of memory ({error}): use a smaller batch (--preset cifar10-batch64)")
    except NumericalError as error:
        return _fail(5, error)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    return 0


def _fail(code: int, message: object) -> int:
    print(f"ftso: {message}", file=sys.stderr)
    return code


def _search(args: argparse.Namespace) -> None:
    import torch

    from .readers import read_images
    from .search import search

    if args.preset not in (None, *PRESETS):
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {args.preset!r}")
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"threads: expected a positive number, got {args.threads}")
        torch.set_num_threads(args.threads)
    with _bar() as progress:
        result = search(
            read_images(args.data),
            args.mode,
            method=args.method,
            operators=args.operators,
            replace=args.replace,
            order=2 if args.second_order else 1,
            beta_only=args.beta_only,
            k=args.k,
            classes=args.classes,
            seed=args.seed,
            backend=args.backend,
            precision=args.precision,
            config=PRESETS[args.preset] if args.preset else None,
            progress=progress,
        )
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(result.to_json() + "\n")
        (folder / "genotype.json").write_text(result.genotype.to_json() + "\n")
        result.draw(folder / "cells.svg")
        print(f"wrote {folder / 'cells.svg'}, genotype.json and result.json", file=sys.stderr)
    print(result.to_json() if args.json else result)


@contextmanager
def _bar() -> Iterator["Progress | None"]:
    """A progress bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("search", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _draw(args: argparse.Namespace) -> None:
    from .draw import draw_genotype

    svg = draw_genotype(Genotype.read(_text_or_file(args.genotype)), args.title)
    if args.out:
        Path(args.out).write_text(svg, encoding="utf-8")
    else:
        print(svg)


def _text_or_file(argument: str) -> str | bytes:
    if "(" in argument or "{" in argument:
        return argument
    try:
        with open(argument, "rb") as file:
            return file.read(1 << 20)
    except (OSError, ValueError) as error:
        raise DataError(
            f"genotype: {argument!r} is neither a genotype nor a file that can be read "
            f"({getattr(error, 'strerror', None) or error}): give Genotype(...) text, its JSON, or such a file"
        ) from None


def _info(args: argparse.Namespace) -> None:
    import torch

    from . import __version__, kernels

    reasons = kernels.backends()
    try:
        requested = kernels.requested()
        isas = f"{', '.join(kernels.available_isas())}; in use: {kernels.isa()}" if reasons["cpu"] is None else "none"
    except kernels.BackendError as error:
        raise UsageError(str(error)) from None
    automatic = next(name for name, why in reasons.items() if why is None)
    lines = {
        "ftso_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{f"backend {name}": why or "ready" for name, why in reasons.items()},
        "backend in use": f"{requested} (FTSO_BACKEND)" if requested else f"{automatic} (the fastest that can)",
        "instruction sets": isas,
    }
    for name, value in lines.items():
        print(f"{name:18} {value}")
