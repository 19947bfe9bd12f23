"""Settings of a search as frozen data: the paper's Table 4, and what its text or PC-DARTS adds."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from .errors import UsageError


@dataclass(frozen=True)
class SearchConfig:
    """One search configuration; the defaults are the paper's for CIFAR-10.

    cells, channels: of the super-network (6 normal + 2 reduction cells, 16 channels).
    batch_size: for data that come without one; the paper names none, 256 is PC-DARTS'.
    weight_lr, weight_schedule: SGD with momentum on the weights; "cosine" falls to weight_lr_min over the epochs,
    set once an epoch (a search within one epoch keeps the first rate).
    grad_clip, arch_grad_clip: largest 2-norm of the weights' and the architecture's gradient; None: not clipped.
    arch_*: Adam on the betas and alphas.
    warmup_epochs: epochs before the first architecture step.
    nesterov: SGD looks ahead along its momentum. weights_first: an iteration's weight step comes before its
    architecture step, as in NAS-Bench-201's searches.
    final_weight_step: the weight step after the last architecture step cannot change the answer; off by default.

    Raises UsageError for a value that is out of range.
    """

    cells: int = 8
    channels: int = 16
    batch_size: int = 256
    weight_lr: float = 0.025
    weight_lr_min: float = 0.0
    weight_schedule: Literal["cosine", "constant"] = "cosine"
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float | None = 5.0
    arch_lr: float = 6e-4
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_eps: float = 1e-8
    arch_weight_decay: float = 1e-3
    arch_grad_clip: float | None = None
    warmup_epochs: int = 0
    final_weight_step: bool = False
    nesterov: bool = False
    weights_first: bool = False

    def __post_init__(self) -> None:
        for name, least in (("cells", 3), ("channels", 1), ("batch_size", 2), ("warmup_epochs", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"config.{name}: expected a whole number of at least {least}, got {value!r}")
        rates = ("weight_lr", "weight_lr_min", "momentum", "weight_decay", "arch_lr", "arch_eps", "arch_weight_decay")
        for name in rates:
            value = getattr(self, name)
            if not isinstance(value, float | int) or not 0 <= value < math.inf:
                raise UsageError(f"config.{name}: expected a finite number of at least 0, got {value!r}")
        if self.arch_lr == 0:
            raise UsageError("config.arch_lr: expected a positive number, got 0, which would search nothing")
        if self.weight_lr_min > self.weight_lr:
            raise UsageError(
                f"config.weight_lr_min: expected at most weight_lr ({self.weight_lr}), got {self.weight_lr_min}"
            )
        for name in ("grad_clip", "arch_grad_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"config.{name}: expected a positive number or None, got {value!r}")
        if len(self.arch_betas) != 2 or not all(0 <= b < 1 for b in self.arch_betas):
            raise UsageError(f"config.arch_betas: expected two numbers in [0, 1), got {self.arch_betas!r}")
        if self.weight_schedule not in ("cosine", "constant"):
            raise UsageError(f"config.weight_schedule: expected 'cosine' or 'constant', got {self.weight_schedule!r}")

    def lr(self, epoch: int, epochs: int) -> float:
        """The weights' learning rate in `epoch` (from 0) of `epochs`."""
        if self.weight_schedule == "constant":
            return self.weight_lr
        fall = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        return self.weight_lr_min + (self.weight_lr - self.weight_lr_min) * fall


CIFAR10 = SearchConfig()
CIFAR10_BATCH64 = SearchConfig(batch_size=64)
IMAGENET = SearchConfig(batch_size=1024, weight_lr=0.5, weight_schedule="constant", arch_lr=6e-3, arch_grad_clip=5.0)
PRESETS = {"cifar10": CIFAR10, "cifar10-batch64": CIFAR10_BATCH64, "imagenet": IMAGENET}
"""Table 4's search columns by name; batch sizes are PC-DARTS' and DARTS'."""


PC_DARTS_CIFAR10 = SearchConfig(weight_lr=0.1, warmup_epochs=15)
DARTS_CIFAR10 = SearchConfig(batch_size=64, weight_lr=0.025, weight_lr_min=0.001, arch_lr=3e-4)
NATS_DARTS = SearchConfig(
    batch_size=64,
    weight_lr_min=0.001,
    weight_decay=5e-4,
    arch_lr=3e-4,
    nesterov=True,
    weights_first=True,
)
"""DARTS as NAS-Bench-201's authors ran it."""
NATS_FTSO = SearchConfig(batch_size=64)
"""FTSO's operator search there: its own settings, with the batch of 64 for the sake of CPUs."""


@dataclass(frozen=True)
class Method:
    """How a method searches: 1/k of the channels processed; weighted_edges: with betas; stages: topology first,
    operators second, or both from one network of all operators."""

    name: str
    config: SearchConfig
    k: int = 4
    weighted_edges: bool = True
    stages: bool = False


METHODS = {
    "ftso": Method("ftso", CIFAR10, stages=True),
    "pc-darts": Method("pc-darts", PC_DARTS_CIFAR10),
    "darts": Method("darts", DARTS_CIFAR10, k=1, weighted_edges=False),
}
"""FTSO and the two methods that it builds on, each with the settings that it was published with for CIFAR-10."""


@dataclass(frozen=True)
class Mode:
    """How long a search lasts: a number of iterations, or of epochs (passes over the weight half)."""

    count: int
    unit: Literal["it", "ep"]

    @classmethod
    def parse(cls, text: str) -> "tuple[Mode, ...]":
        """Read '1it', '50ep', ..., or two of them for topology and operators, '1ep+18ep', as the paper's Table 3
        writes them; raises UsageError."""
        parts = text.split("+") if isinstance(text, str) else []
        found = [re.fullmatch(r"([1-9][0-9]{0,6})(it|ep)", part) for part in parts]
        if not 1 <= len(found) <= 2 or None in found:
            raise UsageError(
                "mode: expected 'Nit' or 'Nep', such as '1it' or '50ep', or topology and operators as in '1ep+18ep', "
                f"got {text!r}"
            )
        return tuple(cls(int(m[1]), "it" if m[2] == "it" else "ep") for m in found if m)

    def iterations(self, per_epoch: int | None) -> int | None:
        """How many iterations that is; None where an epoch's length is not known."""
        return self.count if self.unit == "it" else per_epoch and self.count * per_epoch

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"
