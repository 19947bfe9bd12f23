"""The `ftso` command: one door for all of `commands`. Results go to stdout, progress to stderr.

Exit codes: 0 ok, 1 run failed, 2 usage, 3 bad data, 4 out of memory, 5 numerical failure, 130 after Ctrl-C, 143 after
SIGTERM.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from .commands import draw, evaluate, export, info, nb201, plan, reproduce, search, selfcheck, stability
from .errors import DataError, NumericalError, UsageError

COMMANDS = (
    search,
    plan,
    evaluate,
    export,
    stability,
    nb201,
    draw,
    reproduce,
    selfcheck,
    info,
)  # in the order of the help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ftso",
        description="Find a convolutional cell architecture: first the topology, then the operator.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
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
        return int(args.run(args) or 0)
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


def _fail(code: int, message: object) -> int:
    print(f"ftso: {message}", file=sys.stderr)
    return code
