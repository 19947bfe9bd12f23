"""How much memory a training step will take, found by going through it with tensors that hold nothing.

    4 times the parameters (weights, gradients, velocities, the step's directions)
    + what autograd keeps of the forward pass + images + what the backward pass works in

The last is taken to be FLOATING times the largest activation: gradients of a cell's output, of its inputs and within
a node, and on the reference backend what oneDNN copies and the allocator leaves between tensors. Held against measured
peaks by a test.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from . import kernels
from .genotype import Genotype
from .network import Network, backend_of_networks
from .recipes import Recipe

FLOATING = {"cpu": 4, "reference": 10}


@dataclass(frozen=True)
class Footprint:
    """Bytes over what Python and PyTorch take by themselves: kept for backward, and at the peak."""

    kept: int
    peak: int


def footprint(
    genotype: Genotype, recipe: Recipe, size: int = 32, classes: int = 10, backend: str | None = None
) -> Footprint:  # fmt: skip
    """Of a step by `recipe` on images of size x size, one shard; `backend` as for `evaluate`."""
    kept: dict[int, int] = {}
    largest = 0

    def keep(t: Tensor) -> Tensor:
        nonlocal largest
        storage: Any = t.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        if t.dim() == 4:
            largest = max(largest, t.numel() * t.element_size())
        return t

    with FakeTensorMode(), kernels.use_backend(backend):
        net = Network(
            genotype, recipe.channels, recipe.cells, classes, recipe.stem, auxiliary=recipe.auxiliary_weight > 0
        )
        images = torch.empty(recipe.batch_size, 3, size, size)
        dropped = torch.empty(net.n_drop_paths, recipe.batch_size) if recipe.drop_path else None
        own = [*net.parameters(), *net.buffers()]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            held = net(images, dropped)
        for t in (*own, images):
            kept.pop(t.untyped_storage()._cdata, None)
        del held
        weights = 4 * sum(t.numel() for t in own)
        total = sum(kept.values())
        floating = FLOATING[backend_of_networks()] * largest
        return Footprint(total, total + 4 * weights + 4 * images.numel() + floating)
