"""ftso stability."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..space import OPERATOR_SETS
from .console import preset, progress_bar


def add(commands: Any) -> None:
    stability = commands.add_parser("stability", help="how much of a search's answer another seed would give again")
    stability.add_argument(
        "--data", default="digits", metavar="digits|FILE.npz|DIR", help="as for search (default: digits)"
    )
    stability.add_argument("--mode", default="1it", metavar="Nit|Nep", help="iterations or epochs (default: 1it)")
    stability.add_argument("--seeds", type=int, default=64, help="searches, with seeds from --seed on (default: 64)")
    stability.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    stability.add_argument(
        "--levels",
        type=int,
        default=4,
        help="the crossed design has levels^3 searches; 0: without (default: 4)",
    )
    stability.add_argument("--no-zeros", action="store_true", help="without the searches from equal edges")
    stability.add_argument("--operators", metavar="SET", help=f"one of {', '.join(OPERATOR_SETS)} (default: skip)")
    stability.add_argument("--k", type=int, help="process 1/k of the channels (default: 4)")
    stability.add_argument("--preset", help="Table 4's settings, as for search")
    stability.add_argument("--backend", help="cpu or reference (default: the fastest that can)")
    stability.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    stability.add_argument("--out", metavar="DIR", help="also write stability.json and stability.svg there")
    stability.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..draw_stability import draw_stability
    from ..many import study
    from ..ranks import ranks

    if args.levels < 0:
        raise UsageError(f"levels: expected a number from 0, got {args.levels}")
    with ranks() as own, progress_bar("searches") as progress:
        found = study(
            args.data,
            args.mode,
            seeds=args.seeds,
            levels=args.levels or None,
            zeros=not args.no_zeros,
            seed=args.seed,
            operators=args.operators,
            k=args.k,
            backend=args.backend,
            config=preset(args.preset),
            progress=progress,
        )
    if own.rank:
        return
    document = json.dumps(found.to_dict())
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stability.json").write_text(document + "\n")
        drawn = [s for s in (found.random, found.zeros) if s is not None]
        (folder / "stability.svg").write_text(draw_stability(drawn), encoding="utf-8")
        print(f"wrote {folder / 'stability.svg'} and stability.json", file=sys.stderr)
    print(document if args.json else found)
