"""ftso nb201."""

import argparse
import json
import sys
from typing import Any

from ..errors import UsageError
from ..nats_table import DATASETS, Entry, Table, read_table
from .console import progress_bar


def add(commands: Any) -> None:
    nb201 = commands.add_parser("nb201", help="NAS-Bench-201: look an architecture up, or search one")
    nb201.add_argument("architecture", nargs="?", help="the benchmark's text, or (with --table) its number")
    nb201.add_argument("--table", metavar="FILE.csv[.gz]", help="results: index, arch, cifar10_test, ... as columns")
    nb201.add_argument("--data", metavar="digits|FILE.npz|DIR", help="search on these images instead of looking up")
    add_search(nb201)
    nb201.add_argument("--method", default="ftso", help="ftso or darts (default: ftso)")
    nb201.add_argument("--second-order", action="store_true", help="darts: the unrolled gradient")
    nb201.add_argument("--seed", type=int, default=0, help="decides everything random (default: 0)")
    nb201.add_argument("--backend", help="cpu or reference (default: the fastest that can)")
    nb201.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    nb201.set_defaults(run=run)


def add_search(parser: argparse.ArgumentParser) -> None:
    """The arguments of a search's size."""
    parser.add_argument("--mode", default="10it", metavar="Nit|Nep", help="iterations or epochs (default: 10it)")
    parser.add_argument("--channels", type=int, default=16, help="of the super-network (default: 16)")
    parser.add_argument("--cells", type=int, default=5, help="of each of its three stages (default: 5)")


def run(args: argparse.Namespace) -> None:
    if (args.architecture is None) == (args.data is None):
        raise UsageError("nb201: expected an architecture to look up, or --data to search on, and not both")
    table = read_table(args.table) if args.table else None
    if args.architecture is not None:
        _look_up(args.architecture, table, args.json)
        return
    from ..nats_search import search_nats
    from ..readers import read_images

    with progress_bar("search") as progress:
        result = search_nats(
            read_images(args.data),
            args.mode,
            method=args.method,
            order=2 if args.second_order else 1,
            seed=args.seed,
            channels=args.channels,
            cells=args.cells,
            backend=args.backend,
            progress=progress,
        )
    entry = table.get(result.architecture) if table else None
    if args.json:
        print(json.dumps({**result.to_dict(), "score": _score(entry, table)}))
    else:
        print(result)
        if entry and table:
            print(_described(entry, table))
        elif table is None:
            print("give --table to see its accuracies", file=sys.stderr)
    if table and entry is None:
        print(f"{table.path}: none of its {len(table.entries):,} rows is of what was found", file=sys.stderr)


def _look_up(text: str, table: Table | None, as_json: bool) -> None:
    from ..table2 import architecture_of

    if table is None and text.strip().isdecimal():
        raise UsageError(f"architecture: expected --table with a number, whose order only the table knows, got {text}")
    found, entry = architecture_of(text, table)
    sizes = {"params": found.params(), "macs": found.macs()}
    if as_json:
        own = {"schema": "ftso.nb201/1", "architecture": str(found), "operators": found.operators, **sizes}
        print(json.dumps({**own, "isomorphism": found.isomorphism, "score": _score(entry, table)}))
        return
    print(f"{found}\n{sizes['params']:,} parameters, {sizes['macs']:,} multiply-adds (CIFAR-10)")
    if entry and table:
        print(_described(entry, table))


def _score(entry: Entry | None, table: Table | None) -> dict[str, Any] | None:
    if entry is None or table is None:
        return None
    ranks = {d: table.rank(entry, d) for d in DATASETS}
    return {"index": entry.index, "test": entry.test, "valid": entry.valid, "rank": ranks, "sha256": table.sha256}


def _described(entry: Entry, table: Table) -> str:
    n = len(table.entries)
    parts = (f"{d} {entry.test[d]:.2f} % (rank {table.rank(entry, d):,})" for d in DATASETS)
    return f"index {entry.index} of {n:,}; test: {', '.join(parts)}"
