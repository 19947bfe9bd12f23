"""FTSO's algorithms 1 and 2 and the two methods that it builds on: super-network after super-network, to a genotype."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch

from . import kernels
from .config import SearchConfig
from .data import DataReport, prepare
from .errors import UsageError
from .genotype import PRIMITIVES
from .phase import Phase, Rounding
from .plan import Plan, only_warm_up, settle
from .result import SearchResult
from .run import Progress, Run, Stream
from .space import CELLS, DARTS, SearchSpace, Topology
from .supernet import SuperNet


def search(
    data: Any,
    mode: str = "1it",
    *,
    method: str = "ftso",
    operators: str | None = None,
    replace: str | None = None,
    order: int = 1,
    beta_only: bool = False,
    space: SearchSpace = DARTS,
    k: int | None = None,
    classes: int | None = None,
    seed: int = 0,
    backend: str | None = None,
    device: str | None = None,
    precision: str = "float32",
    config: SearchConfig | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find a cell for `data`: which two inputs each of its nodes reads, and by which operators.

    data: a DataLoader or Dataset over a map data set, a tuple (X, y) of arrays, a tuple of two loaders (weights,
    architecture), any iterable of (images, labels) batches, or the path of an npz file or of CIFAR-10's binary
    folder; `ftso_fast.data.prepare` has the details. Images are B,C,H,W with 1 or 3 channels, H and W divisible
    by 4. mode: 'Nit' or 'Nep', iterations or epochs; an iteration is one architecture step and one weight step.

    method: 'ftso' finds the topology with the set `operators` on every edge ('skip', 'max_pool', 'sep3', '3op',
    '4op'; default: the space's own, 'skip') and then puts `replace` (default: sep_conv_3x3) on every kept edge. With a
    mode of two lengths, '1ep+18ep', the second searches operators instead: a fresh super-network on the kept edges
    with all eight operators. 'pc-darts' and 'darts' find both at once, among all eight operators, 'darts' without
    edge weights; order=2: along DARTS' second-order gradient. beta_only: edges are ranked by their betas alone
    rather than by beta times the largest alpha (without none). Ties go to the lower state and the earlier operator.

    k: 1/k of the channels are processed (default: the method's; 1: DARTS). classes: found in the data where not given.
    seed: decides everything random. backend: one of `kernels.BACKENDS`, which then runs or raises; None: the fastest
    that can. device: "cpu" (the default) or "cuda", where a step is a CUDA graph after its first two. precision: one
    of `kernels.PRECISIONS`; other than float32 it needs the cpu backend and a skip-only topology search, is for long
    searches (one iteration follows the gradient's sign only), and the result says what it did to
    the first gradient. config: default: the method's own, its warm-up cut to end before a short search does.
    progress: called with (iterations done, iterations in all or None).

    The architecture step comes first and takes one batch of the architecture half; then the weight step, one of
    the weight half, under the new architecture. The last weight step is left out unless `config.final_weight_step`:
    it cannot change the answer. Same input, seed and backend: same bytes.

    Raises UsageError (mode, method, operators and the like), DataError (see `prepare`; also data that end before
    the mode does), NumericalError (a loss or gradient is not finite). Source: FTSO, algorithms 1 and 2, Table 4;
    PC-DARTS and its order of steps; DARTS.
    """
    plan = settle(
        mode,
        method=method,
        operators=operators,
        replace=replace,
        order=order,
        beta_only=beta_only,
        space=space,
        k=k,
        seed=seed,
        precision=precision,
        config=config,
    )
    where = _device(device)
    start = time.perf_counter()
    with _backend(backend):
        prepared = prepare(data, classes=classes, seed=seed, batch_size=plan.config.batch_size)
        phases, rounding = _phases(plan, prepared.report, Stream(prepared), progress, start, where)
        isa = kernels.isa() if any(phase.backend == "cpu" for phase in phases) else None
    seconds = sum((Counter(phase.seconds) for phase in phases), Counter[str]())
    return SearchResult(
        topology_search=phases[0],
        operator_search=phases[1] if len(phases) > 1 else None,
        method=plan.method.name,
        mode=plan.mode,
        operators=plan.operators,
        replace=plan.replace,
        order=plan.order,
        beta_only=plan.beta_only,
        k=plan.k,
        seed=seed,
        isa=isa,
        precision=precision,
        rounding=rounding,
        seconds={**seconds, "total": time.perf_counter() - start},
        peak_bytes=_peak_bytes(),
        data=prepared.report,
        config=plan.config,
    )


def _phases(
    plan: Plan, report: DataReport, stream: Stream, progress: Progress | None, start: float, device: torch.device
) -> tuple[list[Phase], Rounding | None]:
    """Every super-network's search in turn; `start` is when the first one's setup began."""
    lengths = [length.iterations(stream.iterations_per_epoch) for length in plan.phases]
    total = None if None in lengths else sum(filter(None, lengths))
    phases: list[Phase] = []
    rounding: Rounding | None = None
    topology: dict[str, Topology] | None = None
    state: torch.Tensor | None = None
    done = 0

    def shown(now: int, _: int | None) -> None:
        if progress:
            progress(done + now, total)

    for length in plan.phases:
        space = plan.space if topology is None else changed(plan.space, operators=PRIMITIVES)
        net, state = _network(plan, report, space, topology, state)
        run = _run(net, plan, device)
        run.seconds["setup"] = time.perf_counter() - start
        done += run.all(stream, length, shown)
        if not run.adam.steps:
            raise only_warm_up(length, plan.config)
        phase = run.phase(str(length), plan.beta_only)
        phases.append(phase)
        rounding = rounding or run.rounding
        if topology is None:
            topology = {cell: phase.topology(cell) for cell in CELLS}
        start = time.perf_counter()
        if len(phases) < len(plan.phases):
            kernels.release_memory()  # the next super-network works in memory of another size
    return phases, rounding


def _network(
    plan: Plan, report: DataReport, space: SearchSpace, topology: dict[str, Topology] | None, state: torch.Tensor | None
) -> tuple[SuperNet, torch.Tensor]:
    """A fresh super-network and the state of its random numbers: the next network's go on where they ended."""
    with torch.random.fork_rng(devices=[]):
        if state is None:
            torch.manual_seed(plan.seed)
        else:
            torch.set_rng_state(state)
        net = SuperNet(
            report.classes,
            plan.config.channels,
            plan.config.cells,
            plan.k,
            report.shape[0],
            space,
            topology,
            plan.method.weighted_edges,
        )
        net.precision = plan.precision
        return net, torch.get_rng_state()


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
    except (RuntimeError, TypeError):
        raise UsageError(f"device: expected cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {name!r} was asked for, and torch finds no GPU here")
    return device


def _run(net: SuperNet, plan: Plan, device: torch.device) -> Run:
    if device.type == "cpu":
        return Run(net, plan.config, plan.order)
    from .on_device import DeviceRun

    return DeviceRun(net.on(device), plan.config, plan.order, device, replayed=True)


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    try:
        with kernels.use_backend(name):
            if kernels.requested() != "reference" and kernels.backends()["cpu"] is None:
                kernels.isa()  # FTSO_ISA is judged before any work is done
            yield
    except kernels.BackendError as error:
        raise UsageError(str(error)) from None


def _peak_bytes() -> int:
    """Largest resident memory; on Linux not from getrusage, which hands a large parent's peak on to its children."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
