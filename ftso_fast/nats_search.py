"""Operator search on NAS-Bench-201: every edge is kept, and the gradient chooses among five operators.

FTSO's topology stage is left out there: with the skip connection alone every node of such a cell is the cell's input,
so its edge weights have no gradient at all (`NatsNet.skip_only`). What remains is DARTS with FTSO's settings. No
procedure that the paper describes leads to the architecture of its Table 2, index 5721.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .config import NATS_DARTS, NATS_FTSO, Mode, SearchConfig
from .data import DataReport, prepare
from .errors import UsageError
from .nats import Architecture
from .nats_net import NatsNet
from .phase import Phase, strongest
from .plan import only_warm_up
from .run import Progress, Run, Stream
from .search import chosen_backend
from .space import NATS_BENCH

METHODS = {"ftso": NATS_FTSO, "darts": NATS_DARTS}


@dataclass(frozen=True)
class NatsResult:
    """The outcome of `search_nats`; its accuracies stand in the benchmark's table, nothing is trained here.

    channels, cells: of the super-network. margins: by edge, the chosen operator's alpha over the next, in units of
    the architecture's learning rate. changed: on how many of the six edges the start would have chosen otherwise.
    """

    architecture: Architecture
    start: Architecture
    phase: Phase
    method: str
    order: int
    mode: str
    seed: int
    channels: int
    cells: int
    seconds: dict[str, float]
    data: DataReport
    config: SearchConfig

    @property
    def changed(self) -> int:
        return sum(a != b for a, b in zip(self.architecture.operators, self.start.operators, strict=True))

    @property
    def margins(self) -> tuple[float, ...]:
        rows = self.phase.alphas["cell"].after
        return tuple((_chosen(row, self.method)[1] or 0.0) / self.config.arch_lr for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `ftso nb201 --data ... --json`."""
        return {
            "schema": "ftso.nats/1",
            "architecture": str(self.architecture),
            "start": str(self.start),
            "changed_from_start": self.changed,
            "margins": self.margins,
            "alphas": asdict(self.phase.alphas["cell"]),
            "losses": {"architecture": self.phase.losses[0], "weights": self.phase.losses[1]},
            "iterations": self.phase.iterations,
            **{
                name: getattr(self, name)
                for name in ("method", "order", "mode", "seed", "channels", "cells", "seconds")
            },
            "data": asdict(self.data),
            "config": asdict(self.config),
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        order = ", second order" if self.order == 2 else ""
        n = self.phase.iterations
        return (
            f"{self.method}{order} on NAS-Bench-201: {n} iteration{'s' * (n > 1)} of batch {self.data.batch_size} "
            f"({self.data.source}, seed {self.seed}; super-network of {self.channels} channels, {self.cells} cells a "
            f"stage), {self.seconds['total']:.1f} s. {self.changed} of 6 operators changed from the random start; "
            f"margins {', '.join(f'{m:.1f}' for m in self.margins)} learning rates.\n{self.architecture}"
        )


def _chosen(row: Sequence[float], method: str) -> tuple[str, float | None]:
    """FTSO never chooses none (algorithm 2, where it is read so); NAS-Bench-201's DARTS may."""
    if method == "ftso":
        return strongest(row, NATS_BENCH.operators)
    best = max(range(len(row)), key=row.__getitem__)
    return NATS_BENCH.operators[best], row[best] - max(a for o, a in enumerate(row) if o != best)


def _architecture(rows: Sequence[Sequence[float]], method: str) -> Architecture:
    return Architecture(tuple(_chosen(row, method)[0] for row in rows))


def search_nats(
    data: Any,
    mode: str = "10it",
    *,
    method: str = "ftso",
    order: int = 1,
    seed: int = 0,
    classes: int | None = None,
    channels: int = 16,
    cells: int = 5,
    backend: str | None = None,
    config: SearchConfig | None = None,
    progress: Progress | None = None,
) -> NatsResult:
    """Find the operators of a NAS-Bench-201 cell for `data` (as `search` takes it).

    method: 'ftso' (architecture step first; FTSO's settings; `none` is not chosen) or 'darts' (NAS-Bench-201's
    settings and order of steps), whose order=2 follows the second-order gradient. channels, cells: of the
    super-network, three stages of `cells` cells; the benchmark's own has 16 and 5. Same input, seed and backend: same
    bytes. Raises UsageError, DataError, NumericalError.
    """
    lengths = Mode.parse(mode)
    if len(lengths) > 1:
        raise UsageError(f"mode: expected one length on NAS-Bench-201, whose topology is kept, got {mode!r}")
    if method not in METHODS:
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if isinstance(order, bool) or order not in (1, 2) or (order == 2 and method != "darts"):
        raise UsageError(f"order: expected 1, or 2 for method 'darts', got {order!r} for {method!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed: expected a whole number, got {seed!r}")
    config = config or METHODS[method]
    began = time.perf_counter()
    with chosen_backend(backend):
        prepared = prepare(data, classes=classes, seed=seed, batch_size=config.batch_size)
        report = prepared.report
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = NatsNet(report.classes, channels, cells, report.shape[0])
        run = Run(net, config, order)
        run.all(Stream(prepared), lengths[0], progress)
    if not run.adam.steps:
        raise only_warm_up(lengths[0], config)
    phase = run.phase(str(lengths[0]), False)
    alphas = phase.alphas["cell"]
    return NatsResult(
        architecture=_architecture(alphas.after, method),
        start=_architecture(alphas.before, method),
        phase=phase,
        method=method,
        order=order,
        mode=str(lengths[0]),
        seed=seed,
        channels=channels,
        cells=cells,
        seconds={**run.seconds, "total": time.perf_counter() - began},
        data=report,
        config=config,
    )
