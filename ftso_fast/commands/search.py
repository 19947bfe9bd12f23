"""ftso search."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..config import METHODS, PRESETS
from ..genotype import REPLACEMENTS
from ..space import OPERATOR_SETS
from .console import preset, progress_bar, use_threads


def add(commands: Any) -> None:
    search = commands.add_parser("search", help="search a cell on images and print the genotype")
    search.add_argument(
        "--data",
        required=True,
        metavar="digits|FILE.npz|DIR",
        help="scikit-learn's digits (a smoke set), an npz file with x_train and y_train, CIFAR-10's binary folder, or "
        "pictures by class in a folder or zip",
    )
    search.add_argument("--fraction", type=float, metavar="SHARE", help="search on this share of every class")
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
    search.add_argument("--early-stop", action="store_true", help="pc-darts and darts: DARTS-ES, by the curvature")
    search.add_argument(
        "--beta-init", default="random", help="random, or zeros: all edges start alike, not as in the paper"
    )
    search.add_argument("--k", type=int, help="process 1/k of the channels (default: 4; darts: 1)")
    search.add_argument(
        "--replace",
        metavar="OP",
        help=f"operator of every kept edge, ftso: {', '.join(REPLACEMENTS)} (default: sep_conv_3x3)",
    )
    search.add_argument("--classes", type=int, help="number of classes (default: found in the data)")
    search.add_argument("--preset", help=f"Table 4's settings: {', '.join(PRESETS)} (default: the method's own)")
    search.add_argument(
        "--backend", help="cuda, triton, cpu or reference; runs or fails (default: the fastest that can)"
    )
    search.add_argument("--device", help="cpu or cuda (default: cpu)")
    search.add_argument(
        "--precision",
        default="float32",
        help="float32, bf16_backward or bf16 (default: float32; others print their cost)",
    )
    search.add_argument(
        "--shards", type=int, help="parts of a batch with batch norm of their own (default: torchrun's processes, or 1)"
    )
    search.add_argument("--threads", type=int, help="threads to use (default: torch's choice)")
    search.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    search.add_argument("--out", metavar="DIR", help="also write result.json, genotype.json and cells.svg there")
    search.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..image_set import ImageSet, image_set
    from ..ranks import ranks
    from ..readers import Images, read_images
    from ..search import search

    config = preset(args.preset)
    use_threads(args.threads)
    data: Images | ImageSet = read_images(args.data)
    if args.fraction is not None:
        data = image_set(data).fraction(args.fraction, args.seed)
    with ranks() as here, progress_bar("search") as progress:
        result = search(
            data,
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
            device=args.device,
            beta_init=args.beta_init,
            early_stop=args.early_stop,
            precision=args.precision,
            shards=args.shards,
            config=config,
            progress=progress,
        )
    if here.rank:
        return
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(result.to_json() + "\n")
        (folder / "genotype.json").write_text(result.genotype.to_json() + "\n")
        result.draw(folder / "cells.svg")
        print(f"wrote {folder / 'cells.svg'}, genotype.json and result.json", file=sys.stderr)
    print(result.to_json() if args.json else result)
