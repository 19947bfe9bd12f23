"""ftso plan."""

import argparse
import json
from typing import Any

from ..errors import UsageError
from ..recipes import RECIPES, recipe_named
from .console import genotype_named


def add(commands: Any) -> None:
    plan = commands.add_parser("plan", help="what training a network will take, before it is trained")
    plan.add_argument("genotype", metavar="GENOTYPE", help="its text, JSON, a file of it, or a published name")
    plan.add_argument("--recipe", default="cifar600", help=f"one of {', '.join(RECIPES)} (default: cifar600)")
    plan.add_argument("--images", type=int, default=50_000, help="to train on (default: 50000)")
    plan.add_argument("--classes", type=int, default=10, help="(default: 10)")
    plan.add_argument("--batch-size", type=int, help="in place of the recipe's")
    plan.add_argument("--backend", help="cpu or reference (default: the fastest that can)")
    plan.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..footprint import footprint
    from ..search import chosen_backend

    recipe = recipe_named(args.recipe)
    if args.batch_size is not None:
        recipe = recipe.changed(batch_size=args.batch_size)
    if args.images < recipe.batch_size:
        raise UsageError(f"images: expected at least a batch of {recipe.batch_size}, got {args.images}")
    genotype = genotype_named(args.genotype)
    size = 32 if recipe.stem == "cifar" else 224
    network: dict[str, Any] = {"channels": recipe.channels, "cells": recipe.cells, "classes": args.classes}
    network["stem"] = recipe.stem
    params, macs = genotype.params(**network), genotype.macs(**network)
    with chosen_backend(args.backend):
        taken = footprint(genotype, recipe, size, args.classes, args.backend)
    steps = recipe.epochs * -(-args.images // recipe.batch_size)
    told = {"params": params, "macs": macs, "steps": steps, "peak_bytes": taken.peak, "kept_bytes": taken.kept}
    if args.json:
        print(json.dumps({"schema": "ftso.plan/1", "genotype": genotype.to_dict(), "recipe": recipe.name, **told}))
        return
    work = 3 * 2 * macs * recipe.batch_size * steps
    print(
        f"{params:,} parameters, {macs:,} multiply-adds an image of {size}x{size}\n"
        f"recipe {recipe.name}: {recipe.epochs} epochs of {args.images:,} images in batches of {recipe.batch_size}: "
        f"{steps:,} steps, about {work / 1e15:,.1f} PFLOP in all\n"
        f"memory of a step: about {taken.peak / 1e6:,.0f} MB over what Python and PyTorch take by themselves, of which "
        f"{taken.kept / 1e6:,.0f} MB are kept for the backward pass"
    )
