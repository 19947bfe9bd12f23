"""How a found network is trained: the evaluation columns of the paper's Table 4, as frozen data. No torch import."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .errors import UsageError
from .size import Stem


@dataclass(frozen=True)
class Recipe:
    """One way to train a network; the defaults are DARTS' and PC-DARTS' for CIFAR-10, 600 epochs.

    schedule: "cosine" falls to 0 over the epochs, "linear" too, more slowly in the last five (PC-DARTS' ImageNet run);
    the first `warmup_epochs` rise to `lr` in equal steps. auxiliary_weight: of the auxiliary head's loss; 0: there is
    no head. drop_path: the probability at the end, which grows with the epochs from 0. cutout: the side of the square,
    in pixels. augmentation: "cifar" crops with 4 pixels of padding and flips; "imagenet" crops at random places and
    sizes, flips and changes colours.

    Raises UsageError for a value that is out of range.
    """

    name: str = "cifar600"
    stem: Stem = "cifar"
    channels: int = 36
    cells: int = 20
    epochs: int = 600
    batch_size: int = 96
    lr: float = 0.025
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup_epochs: int = 0
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float = 5.0
    auxiliary_weight: float = 0.4
    drop_path: float = 0.3
    cutout: int = 16
    label_smoothing: float = 0.0
    augmentation: Literal["cifar", "imagenet"] = "cifar"

    def __post_init__(self) -> None:
        whole = {"channels": 2, "cells": 1, "epochs": 1, "batch_size": 2, "warmup_epochs": 0, "cutout": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"recipe.{name}: expected a whole number of at least {least}, got {value!r}")
        for name in ("lr", "momentum", "weight_decay", "grad_clip", "auxiliary_weight", "drop_path", "label_smoothing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value < math.inf:
                raise UsageError(f"recipe.{name}: expected a finite number of at least 0, got {value!r}")
        for name in ("momentum", "drop_path", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise UsageError(f"recipe.{name}: expected less than 1, got {getattr(self, name)!r}")
        kinds = ("cifar", "imagenet")
        for name, names in (("stem", kinds), ("schedule", ("cosine", "linear")), ("augmentation", kinds)):
            if getattr(self, name) not in names:
                raise UsageError(f"recipe.{name}: expected {' or '.join(names)}, got {getattr(self, name)!r}")

    def rate(self, epoch: int) -> float:
        """The learning rate of `epoch`, counted from 0."""
        rising = min(1.0, (epoch + 1) / self.warmup_epochs) if self.warmup_epochs else 1.0
        if self.schedule == "cosine":
            return rising * self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        left, steep = self.epochs - epoch, self.epochs - 5
        if steep <= 0:
            return rising * self.lr * left / self.epochs
        return rising * self.lr * ((left - 5) / steep if left > 5 else left / (5 * steep))

    def dropped(self, epoch: int) -> float:
        """The probability that drop path silences an operator for an image, in `epoch`."""
        return self.drop_path * epoch / self.epochs

    def changed(self, **fields_of: Any) -> Recipe:
        """The recipe with some fields changed. Raises UsageError for a field that there is not."""
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(fields_of) - known):
            raise UsageError(f"recipe: expected fields among {', '.join(sorted(known))}, got {', '.join(unknown)}")
        return replace(self, **fields_of)

    def deviations(self) -> list[str]:
        """In words, what differs from the recipe of this name."""
        own = RECIPES[self.name]
        pairs = [(field.name, getattr(own, field.name), getattr(self, field.name)) for field in fields(self)]
        return [f"{name} {mine} in place of {its}" for name, its, mine in pairs if its != mine]


CIFAR600 = Recipe()
CIFAR1200 = Recipe("cifar1200", epochs=1200)
IMAGENET250 = Recipe(
    "imagenet250",
    stem="imagenet",
    channels=48,
    cells=14,
    epochs=250,
    batch_size=1024,
    lr=0.5,
    schedule="linear",
    warmup_epochs=5,
    weight_decay=3e-5,
    drop_path=0.0,
    cutout=0,
    label_smoothing=0.1,
    augmentation="imagenet",
)
SMOKE = Recipe(
    "smoke", channels=16, cells=5, epochs=12, batch_size=64, lr=0.1, warmup_epochs=1, auxiliary_weight=0.0,
    drop_path=0.0, cutout=0,
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in (CIFAR600, CIFAR1200, IMAGENET250, SMOKE)}
"""Table 4's evaluation columns; what it leaves open is PC-DARTS'. smoke is nobody's: minutes on two cores."""


def recipe_named(name: str | Recipe) -> Recipe:
    """The recipe itself, or that of the name. Raises UsageError."""
    if isinstance(name, Recipe):
        if name.name not in RECIPES:
            raise UsageError(f"recipe.name: expected one of {', '.join(RECIPES)}, got {name.name!r}")
        return name
    if name not in RECIPES:
        raise UsageError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]
