"""Many searches in one process: they share reading, the network's modules and the kernels' memory."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch

from . import kernels
from .config import SearchConfig
from .crossed import Split, Trial, split
from .data import DataReport, prepare
from .errors import UsageError
from .phase import Phase
from .plan import Plan, settle
from .ranks import Ranks, ranks
from .readers import read_images
from .run import Progress, Stream
from .search import chosen_backend
from .space import CELLS, DARTS, Topology
from .stability import Stability, Study
from .stages import level, network, search_stages
from .supernet import SuperNet

MOST = 100_000


class _Bench:
    """Data read once, and one network that is drawn anew for every search."""

    def __init__(self, data: Any, plan: Plan, classes: int | None) -> None:
        self.data, self.plan, self.classes = _read(data), plan, classes
        self.net: SuperNet | None = None
        self.report: DataReport | None = None
        self.seconds: Counter[str] = Counter()
        self.last: list[Phase] = []

    def trial(self, seed: int, data_seed: int, arch_seed: int, progress: Progress | None) -> Trial:
        """One search: weights and what follows them by `seed`, images and architecture's start by the others."""
        start = time.perf_counter()
        plan = changed(self.plan, seed=seed)
        data = prepare(self.data, classes=self.classes, seed=data_seed, batch_size=plan.config.batch_size)
        self.report = self.report or data.report
        first = self._drawn(plan, arch_seed, data.report) if len(plan.phases) == 1 else None
        phases, _ = search_stages(plan, data.report, Stream(data), progress, start, first)
        self.seconds += sum((Counter(phase.seconds) for phase in phases), Counter[str]())
        self.last = phases
        return _trial(plan, phases)

    def _drawn(self, plan: Plan, arch_seed: int, report: DataReport) -> SuperNet:
        net = self.net = self.net or network(plan, report, plan.space)[0]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(arch_seed)
            net.restart()
            if arch_seed != plan.seed:
                kept = [t.clone() for t in net.arch_parameters()]
                torch.manual_seed(plan.seed)
                net.restart()
                for t, k in zip(net.arch_parameters(), kept, strict=True):
                    t.copy_(k)
        if plan.beta_init == "zeros":
            level(net)
        return net


def _read(data: Any) -> Any:
    """What can be searched again and again."""
    if isinstance(data, str | Path):
        return read_images(data)
    for each in data if isinstance(data, tuple) else (data,):
        if isinstance(each, Iterator):
            raise UsageError(
                f"seeds: expected data that can be read once for each search, got a {type(each).__name__}, which ends: "
                "pass arrays, a data set, a loader or a list of batches"
            )
    return data


def _trial(plan: Plan, phases: list[Phase]) -> Trial:
    found, last = phases[0], phases[-1]
    kept = {cell: found.topology(cell) for cell in CELLS}
    operators: dict[str, tuple[tuple[str, ...], ...]] = {}
    for cell in CELLS if plan.replace is None else ():
        ascending = tuple(tuple(sorted(pair)) for pair in kept[cell])
        names = [choice.operator for choice in last.choices(cell, ascending)]
        operators[cell] = tuple(zip(names[::2], names[1::2], strict=True))
    return Trial(
        plan.seed,
        {cell: _ascending(found.topology(cell, before=True)) for cell in CELLS},
        {cell: _ascending(kept[cell]) for cell in CELLS},
        operators,
        {cell: tuple(found.scores(cell, before=True)) for cell in CELLS},
        {cell: tuple(found.scores(cell)) for cell in CELLS},
    )


def _ascending(topology: Topology) -> Topology:
    return tuple(tuple(sorted(pair)) for pair in topology)


def search_seeds(data: Any, plan: Plan, seeds: int, classes: int | None, progress: Progress | None) -> Stability:
    """`plan` with `seeds` seeds from its own on. Raises UsageError and what `search` raises."""
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not 2 <= seeds <= MOST:
        raise UsageError(f"seeds: expected a whole number from 2 to {MOST:,}, got {seeds!r}")
    start = time.perf_counter()
    with ranks() as own:
        bench = _Bench(data, plan, classes)
        every = range(plan.seed, plan.seed + seeds)
        trials = _all(own, bench, [(s, s, s) for s in every], progress)
    report, phase = bench.report, bench.last[0]
    assert report is not None
    return Stability(
        trials=tuple(trials),
        mode=plan.mode,
        method=plan.method.name,
        operators=plan.operators,
        replace=plan.replace,
        k=plan.k,
        beta_init=plan.beta_init,
        arch_lr=plan.config.arch_lr,
        batch_size=report.batch_size,
        iterations=phase.iterations,
        backend=phase.backend,
        isa=kernels.isa() if phase.backend == "cpu" else None,
        processes=own.world,
        seconds={**bench.seconds, "total": time.perf_counter() - start},
        source=report.source,
    )


def _all(own: Ranks, bench: _Bench, seeds: list[tuple[int, int, int]], progress: Progress | None) -> list[Trial]:
    """The trials of (weights, data, architecture) seeds in their order, whoever computed them."""
    mine = [json.dumps(asdict(trial)) for trial in _some(bench, seeds[own.rank :: own.world], progress)]
    if not mine:
        raise UsageError(f"seeds: expected at least one for each of {own.world} processes, got {len(seeds)}")
    texts = own.gather(mine)
    shares = [len(seeds[rank :: own.world]) for rank in range(own.world)]
    starts = [sum(shares[:rank]) for rank in range(own.world)]
    order = (starts[i % own.world] + i // own.world for i in range(len(seeds)))
    return [Trial.from_dict(json.loads(texts[i])) for i in order]


def _some(bench: _Bench, seeds: list[tuple[int, int, int]], progress: Progress | None) -> Iterable[Trial]:
    for i, each in enumerate(seeds):

        def shown(done: int, total: int | None, i: int = i) -> None:
            if progress:
                progress(i * (total or 0) + done, None if total is None else len(seeds) * total)

        yield bench.trial(*each, shown)


def search_crossed(data: Any, plan: Plan, levels: int, classes: int | None, progress: Progress | None) -> Split:
    """The crossed design of `levels` starts of betas, of weights and of data. Raises UsageError."""
    if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 16:
        raise UsageError(f"levels: expected a whole number from 2 to 16, got {levels!r}")
    if len(plan.phases) > 1 or not plan.method.weighted_edges:
        raise UsageError("levels: expected a method with betas and one length: the split is that of a topology search")
    design = [(b, w, d) for b in range(levels) for w in range(levels) for d in range(levels)]
    with ranks() as own:
        seeds = [(plan.seed + w, plan.seed + d, plan.seed + b) for b, w, d in design]
        trials = _all(own, _Bench(data, plan, classes), seeds, progress)
    return split(dict(zip(design, trials, strict=True)), levels)


def study(
    data: Any,
    mode: str = "1it",
    *,
    seeds: int = 64,
    levels: int | None = 4,
    zeros: bool = True,
    seed: int = 0,
    operators: str | None = None,
    k: int | None = None,
    classes: int | None = None,
    backend: str | None = None,
    config: SearchConfig | None = None,
    progress: Progress | None = None,
) -> Study:
    """How stable FTSO's topology search is: `seeds` searches from random starts; as many from equal edges (`zeros`);
    and the crossed design of `levels`^3 (None: without). The other arguments are `search`'s. Raises what it raises."""
    plan = settle(
        mode,
        method="ftso",
        operators=operators,
        replace=None,
        order=1,
        beta_only=False,
        space=DARTS,
        k=k,
        seed=seed,
        precision="float32",
        config=config,
    )
    data = _read(data)
    with chosen_backend(backend):
        found = search_seeds(data, plan, seeds, classes, progress)
        level_start = search_seeds(data, changed(plan, beta_init="zeros"), seeds, classes, progress) if zeros else None
        crossed = None if levels is None else search_crossed(data, plan, levels, classes, progress)
    return Study(found, level_start, crossed)
