"""ftso selfcheck."""

import argparse
import sys
from typing import Any

from ..errors import UsageError


def add(commands: Any) -> None:
    check = commands.add_parser("selfcheck", help="hold every kernel of this machine against the reference")
    check.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    check.add_argument("--op", action="append", default=[], metavar="NAME", help="only this operation (repeatable)")
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A line for each operation and backend on stdout, each disagreement on stderr; 1 where there was one."""
    from ..kernels import selfcheck, testing

    if unknown := [name for name in args.op if name not in testing.OPERATIONS]:
        raise UsageError(f"op: expected one of {', '.join(testing.OPERATIONS)}, got {unknown[0]!r}")
    if reason := selfcheck.why_not(args.device):
        raise UsageError(f"device: {args.device!r} cannot be checked: {reason}")
    rows = failed = 0
    print(f"{'operation':18} {'backend':10} {'agree':>5} {'differ':>6}")
    for row in selfcheck.selfcheck(args.device, args.op):
        print(f"{row.operation:18} {row.backend:10} {row.agreed:5} {len(row.failed):6}", flush=True)
        for sentence in row.failed:
            print(f"ftso: {sentence}", file=sys.stderr)
        rows, failed = rows + 1, failed + len(row.failed)
    if not rows:
        raise UsageError(f"device: no compiled backend can run on {args.device!r}: see `ftso info`")
    return 1 if failed else 0
