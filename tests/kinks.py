"""The kinks of the super-network: inputs of ReLUs, and runners-up of its max-pooling.

A gradient jumps where one of them turns over, so rounding alone can move it by far more than the rounding error. Here
is how far each is from turning, and the network with some of them turned. Plain PyTorch path only.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch

from ftso_fast import kernels


class Kink(NamedTuple):
    """Adding `change` to element `at` of the output of a module of `places` turns one ReLU or maximum over."""

    place: int
    at: int
    change: float


def places(net):
    """(module, k): the stem and all cells but the last, whose outputs meet a ReLU (k is None), and both inputs of a
    reduction cell, of which 1/k of the channels meet the ReLU of FactorizedReduce and the others are pooled."""
    found = [(module, None) for module in (net.stem, *net.cells[:-1])]
    for cell in net.cells:
        if cell.reduction:
            found += [(cell.preprocess0, cell.k), (cell.preprocess1, cell.k)]
    return found


@contextmanager
def hooked(net, hook):
    """Within the block every place's output passes through hook(number, output), on the plain path."""
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, i=i: hook(i, output))
        for i, (module, _) in enumerate(places(net))
    ]
    try:
        with kernels.use_backend("reference"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def values(net, images):
    """The outputs of the places."""
    found = {}
    with hooked(net, lambda i, output: found.update({i: output})), torch.no_grad():
        net(images)
    return [found[i] for i in range(len(found))]


def turning_changes(x, k):
    """For each element of a place's output the change that takes it as far beyond its kink as it is before it;
    infinite where there is none."""
    if k is None:
        return -2 * x
    changes = torch.full_like(x, torch.inf)
    processed = x.shape[1] // k
    for i in (0, 1):
        pixels = (slice(None), slice(processed), slice(i, None, 2), slice(i, None, 2))
        changes[pixels] = -2 * x[pixels]
    windows = x[:, processed:].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    gaps = 2 * (windows.amax((3, 5), keepdim=True) - windows)
    changes[:, processed:] = gaps.masked_fill(gaps == 0, torch.inf).flatten(4, 5).flatten(2, 3)
    return changes


def near(net, outputs, reach):
    """Kinks that are nearer than `reach`, a tensor for each place that broadcasts to its output."""
    found = []
    for place, ((_, k), x, r) in enumerate(zip(places(net), outputs, reach, strict=True)):
        changes = turning_changes(x, k).flatten()
        close = changes.abs() < 2 * r.expand_as(x).flatten()
        found += [Kink(place, int(i), float(changes[i])) for i in close.nonzero()]
    return found


@contextmanager
def turned(net, kinks):
    """Within the block the network computes with these kinks turned over."""

    def turn(place, output):
        here = [kink for kink in kinks if kink.place == place]
        if not here:
            return output
        changes = torch.zeros(output.numel(), dtype=output.dtype)
        for kink in here:
            changes[kink.at] = kink.change
        return output + changes.view_as(output)

    with hooked(net, turn):
        yield
