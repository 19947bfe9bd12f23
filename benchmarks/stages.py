"""The launches of a step, and the fewest that its network allows."""

from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import torch
from ftso_fast.kernels import use_backend
from torch.autograd.graph import Node
from torch.nn import functional as F

from ftso_fast import CIFAR10, SuperNet

PASSES = ("forward", "backward")


def of_pass(launch: dict[str, Any]) -> str:
    return PASSES[launch["stage"].endswith("_bwd")]


def named(launches: list[dict[str, Any]]) -> list[str]:
    """The stages' names with their cells: forward the cells come first to last, backward last to first; a reduction
    cell is a launch for its paths and one for its nodes."""
    names, counts = [], {"forward": -1, "backward": CIFAR10.cells}
    opens = ("cell_fwd", "reduce_paths_fwd", "cell_bwd", "reduce_bwd")
    for launch in launches:
        counts[of_pass(launch)] += (launch["stage"] in opens) * (1 if of_pass(launch) == "forward" else -1)
        stem = launch["stage"].startswith("stem")
        names.append(launch["stage"] if stem else f"c{counts[of_pass(launch)]} {launch['stage']}")
    return names


def summary(traced: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions of a step (arm.traced): its stages, what lies outside, barriers in each pass."""
    runs = [run["launches"] for run in traced]
    first = runs[0]
    assert all([x["stage"] for x in run] == [x["stage"] for x in first] for run in runs)
    stages = [
        {"stage": name, "ms": 1e3 * median(run[i]["seconds"] for run in runs)}
        | {"GFLOP": first[i]["flops"] / 1e9, "MB": first[i]["bytes"] / 1e6}
        for i, name in enumerate(named(first))
    ]
    inside = [sum(launch["seconds"] for launch in run) for run in runs]
    outside = [run["seconds"] - seconds for run, seconds in zip(traced, inside, strict=True)]
    launches = {p: sum(of_pass(launch) == p for launch in first) for p in PASSES}
    found = {"ms": 1e3 * median(run["seconds"] for run in traced), "n": len(traced), "launches": launches}
    return found | {"inside ms": 1e3 * median(inside), "outside ms": 1e3 * median(outside), "stages": stages}


@cache
def least_barriers() -> dict[str, dict[str, int]]:
    """Per step and pass the batch norms that must wait for one another: the longest chain of them in the reference.

    A batch norm in training mode needs sums over all that it reads before the first of its outputs can be used, in
    both directions, so no launch can reach across one, and a pass has at least one launch more. The autograd graph
    of the reference is the network; that of a step holds only what its gradients need, so that an architecture step
    ends at the first cell's betas. Backward, a batch norm whose convolution reads the images is no barrier: nothing
    lies beyond but a weight gradient, which is linear in the batch norm's sums and can be corrected by them
    afterwards.
    """
    found = {}
    with use_backend("reference"):
        net = SuperNet(10, CIFAR10.channels, CIFAR10.cells, k=4)
        whole = _graph(net)
        with net.only_arch():
            betas = _graph(net)
        with net.only_weights():
            weights = _graph(net)
    forward = _longest(whole, lambda node: True)
    for step, graph in (("architecture step", betas), ("weight step", weights)):
        found[step] = {"forward": forward, "backward": _longest(graph, _has_more_behind)}
    return found


def _graph(net: SuperNet) -> Node:
    root = F.cross_entropy(net(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1])).grad_fn
    assert root is not None
    return root


def _has_more_behind(batch_norm: Node) -> bool:
    convolution = batch_norm.next_functions[0][0]
    return convolution is not None and not (
        convolution.name().startswith("Convolution") and convolution.next_functions[0][0] is None
    )


def _longest(root: Node, counts: Callable[[Node], bool]) -> int:
    """The most batch norms that `counts` holds for on a path from `root`."""

    @cache
    def below(node: Node) -> int:
        here = node.name().startswith("NativeBatchNorm") and counts(node)
        return here + max((below(n) for n, _ in node.next_functions if n is not None), default=0)

    return below(root)
