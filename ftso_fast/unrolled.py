"""DARTS' second-order architecture gradient, by first derivatives alone, so that compiled kernels can compute it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Batch
from .optimizer import SGD
from .space import SearchSpace, Topology


class Searchable(Protocol):
    """What a search needs of a super-network; `SuperNet` says what each of these is."""

    precision: str
    space: SearchSpace

    @property
    def topology(self) -> Mapping[str, Topology]: ...
    def betas(self) -> tuple[Tensor, ...]: ...
    def arch_parameters(self) -> list[Tensor]: ...
    def weights(self) -> list[Tensor]: ...
    def only_arch(self) -> AbstractContextManager[None]: ...
    def only_weights(self) -> AbstractContextManager[None]: ...
    def __call__(self, images: Tensor) -> Tensor: ...


def loss_of(net: Searchable, batch: Batch) -> Tensor:
    """The batch's mean cross entropy."""
    return F.cross_entropy(net(batch.images), batch.labels)


def unrolled_gradient(
    net: Searchable, valid: Batch, train: Batch, sgd: SGD, lr: float, radius: float = 0.01
) -> tuple[Tensor, list[Tensor]]:
    """L_val after the weight step that would follow, and its gradient by the architecture parameters a.

        w'(a) = w - lr (momentum v + dL_train(w, a)/dw + decay w)
        dL_val(w'(a), a)/da = dL_val(w', a)/da - lr d2L_train(w, a)/(da dw) g,      g = dL_val(w', a)/dw'
        d2L_train/(da dw) g ~ (dL_train(w + h g, a)/da - dL_train(w - h g, a)/da) / 2h,      h = radius / |g|

    The step is the optimizer's own, momentum included, before its gradient is clipped. h is DARTS' own: so long a
    difference crosses kinks of the ReLU, and is the derivative only where it crosses none (a small `radius`). Weights
    and optimizer are left as they were, to the bit. Source: DARTS, equations 7 and 8.
    """
    weights, arch = net.weights(), net.arch_parameters()
    with net.only_weights():
        gradient = torch.autograd.grad(loss_of(net, train), weights)
    step = [-lr * d for d in sgd.directions(gradient)]
    with _moved(weights, step):
        loss = loss_of(net, valid)
        found = torch.autograd.grad(loss, [*arch, *weights])
    direct, g = list(found[: len(arch)]), found[len(arch) :]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in g])))
    if norm == 0:
        return loss.detach(), direct
    h = radius / norm
    ends = []
    for side in (h, -h):
        with _moved(weights, [side * x for x in g]), net.only_arch():
            ends.append(torch.autograd.grad(loss_of(net, train), arch))
    second = ((up - down) / (2 * h) for up, down in zip(*ends, strict=True))
    return loss.detach(), [d - lr * s for d, s in zip(direct, second, strict=True)]


@contextmanager
def _moved(weights: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the weights are `by` further; afterwards the very bits that they were."""
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, d in zip(weights, by, strict=True):
            w.add_(d)
    try:
        yield
    finally:
        with torch.no_grad():
            for w, k in zip(weights, kept, strict=True):
                w.copy_(k)
