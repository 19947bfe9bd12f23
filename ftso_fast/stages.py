"""The super-networks of one search, one after the other, each set up and searched."""

import time
from dataclasses import replace as changed

import torch

from . import kernels
from .data import DataReport
from .genotype import PRIMITIVES
from .on_cpu import CpuRun
from .phase import Phase, Rounding
from .plan import Plan, only_warm_up
from .ranks import ALONE, Ranks
from .run import Progress, Run, Stream
from .space import CELLS, SearchSpace, Topology
from .supernet import SuperNet


def search_stages(
    plan: Plan,
    report: DataReport,
    stream: Stream,
    progress: Progress | None,
    start: float,
    first: SuperNet | None = None,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
) -> tuple[list[Phase], Rounding | None]:
    """Every super-network's search in turn; `start` is when the first one's setup began. first: a super-network that
    stands ready for the first of them."""
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
        if first is not None and not phases:
            net = first
        else:
            net, state = network(plan, report, space, topology, state)
        run = _run(net, plan, device, ranks)
        if plan.early_stop:
            from .early_stop import EarlyStop

            run.early_stop = EarlyStop(plan.config.arch_weight_decay)
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


def _run(net: SuperNet, plan: Plan, device: torch.device | None, ranks: Ranks) -> Run:
    if plan.shards > 1:
        from .sharded import ShardedRun

        return ShardedRun(net, plan.config, plan.shards, ranks)
    if device is None or device.type == "cpu":
        return (CpuRun if net.skip_only else Run)(net, plan.config, plan.order)
    from .on_device import DeviceRun

    return DeviceRun(net.on(device), plan.config, plan.order, device, replayed=True)


def network(
    plan: Plan,
    report: DataReport,
    space: SearchSpace,
    topology: dict[str, Topology] | None = None,
    state: torch.Tensor | None = None,
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
        if plan.beta_init == "zeros":
            level(net)
        return net, torch.get_rng_state()


def level(net: SuperNet) -> None:
    """Every edge starts alike: all betas are zero."""
    with torch.no_grad():
        for betas in net.betas():
            betas.zero_()
