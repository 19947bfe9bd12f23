"""ftso evaluate."""

import argparse
import sys
from typing import Any

from ..recipes import RECIPES
from .console import genotype_named, progress_bar, use_threads


def add(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="train a found network from scratch and test it")
    evaluate.add_argument("genotype", metavar="GENOTYPE", help="its text, JSON, a file of it, or a published name")
    evaluate.add_argument(
        "--data", required=True, metavar="digits|FILE.npz|DIR", help="as for search; its training images"
    )
    evaluate.add_argument("--test", metavar="FILE|DIR", help="images to test on (default: the test images of --data)")
    evaluate.add_argument(
        "--validation", type=float, metavar="SHARE", help="test on this share of the training images instead"
    )
    evaluate.add_argument("--fraction", type=float, metavar="SHARE", help="train on this share of every class")
    evaluate.add_argument(
        "--recipe", default="cifar600", help=f"one of {', '.join(RECIPES)} (default: cifar600, which takes days here)"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="decides everything random (default: 0)")
    whole = {"epochs": "passes over the images", "batch-size": "images a step", "channels": "of the first cell"}
    for name, what in (whole | {"cells": "in the network", "cutout": "side of the square, 0: none"}).items():
        evaluate.add_argument(f"--{name}", type=int, help=f"in place of the recipe's: {what}")
    for name, what in (
        ("lr", "learning rate"),
        ("drop-path", "at the end"),
        ("auxiliary-weight", "0: no auxiliary head"),
    ):
        evaluate.add_argument(f"--{name}", type=float, help=f"in place of the recipe's: {what}")
    evaluate.add_argument("--out", metavar="DIR", help="checkpoints, events.jsonl, result.json and curve.svg go there")
    evaluate.add_argument("--tensorboard", metavar="DIR", help="also write TensorBoard's event files there")
    evaluate.add_argument("--resume", metavar="auto", help="go on from the newest checkpoint in --out, or begin")
    evaluate.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="also within an epoch")
    evaluate.add_argument("--workers", type=int, default=0, help="threads that prepare batches ahead (default: 0)")
    evaluate.add_argument(
        "--shards", type=int, help="parts of a batch with batch norm of their own (default: processes)"
    )
    evaluate.add_argument("--backend", help="cpu or reference; runs or fails (default: the fastest that can)")
    evaluate.add_argument("--precision", default="float32", help="float32, or bf16, which says what it costs")
    evaluate.add_argument("--threads", type=int, help="threads to use (default: torch's choice)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    evaluate.set_defaults(run=run)


CHANGES = ("epochs", "batch_size", "channels", "cells", "cutout", "lr", "drop_path", "auxiliary_weight")


def run(args: argparse.Namespace) -> None:
    from ..evaluate import evaluate
    from ..ranks import ranks
    from ..tensorboard import tensorboard

    genotype = genotype_named(args.genotype)
    use_threads(args.threads)
    changes = {name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None}
    with ranks() as here, progress_bar("training") as progress:
        result = evaluate(
            genotype,
            args.data,
            args.test,
            args.recipe,
            seed=args.seed,
            validation=args.validation,
            fraction=args.fraction,
            backend=args.backend,
            precision=args.precision,
            out=args.out,
            resume=args.resume,
            workers=args.workers,
            shards=args.shards,
            checkpoint_every=args.checkpoint_every,
            callbacks=[tensorboard(args.tensorboard)] if args.tensorboard else [],
            progress=progress,
            **changes,
        )
    if here.rank:
        return
    if args.out:
        print(f"wrote {args.out}: result.json, events.jsonl, curve.svg and checkpoints", file=sys.stderr)
    print(result.to_json() if args.json else result)
