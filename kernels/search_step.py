"""A step of the skip-only network's search on the cpu without autograd: loss and gradient, then the weights' move.

The passes are `skip_net`'s. What is around them, a softmax, a loss, an update, takes no time by itself; but behind a
pass each of PyTorch's small operations finds its code and data out of the caches, and hundreds of them took as long as
a stage.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._backend import core
from .skip_net import Lease, NetSpec, check

N_EDGES = 14


@torch.no_grad()
def loss_and_gradient(
    images: Tensor,
    labels: Tensor,
    betas: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: NetSpec,
    precision: str = "float32",
    into: Sequence[Tensor] | None = None,
) -> tuple[float, list[Tensor]]:
    """Mean cross entropy (nats) and its gradient by both `betas`; by the weights instead where `into` can take it.

    images: (B, 1 or 3, H, W) float32; labels: (B,) int64; betas: of normal and reduction cells, (14,) float64;
    weights: as `skip_net` takes them; into: contiguous tensors like the weights. All on the cpu.
    Raises ValueError or TypeError naming the argument, what was expected and what came. Source: FTSO, section 3.2.
    """
    if len(betas) != 2:
        raise ValueError(f"loss_and_gradient: betas: expected two tensors, got {len(betas)}")
    for i, own in enumerate(betas):
        _check("loss_and_gradient", f"betas[{i}]", own, (N_EDGES,), torch.float64)
    edges = normal, reduce = images.new_empty(2, N_EDGES).unbind()
    check(images, normal, reduce, weights, spec, precision, "cpu")
    _check("loss_and_gradient", "labels", labels, (len(images),), torch.int64)
    if into is not None:
        _check_all("loss_and_gradient", "into", into, weights, torch.float32)
    classes = len(weights[-1])
    at = core().first_outside(len(labels), classes, labels.data_ptr())
    if at >= 0:
        raise ValueError(f"loss_and_gradient: labels[{at}]: expected 0 to {classes - 1}, got {labels[at]}")
    for own, row in zip(betas, edges, strict=True):
        core().edge_weights(own.data_ptr(), row.data_ptr())
    by_betas = into is None
    lease = Lease(images, spec, classes, precision, (by_betas, by_betas, not by_betas))
    tensors = (images, *edges, *weights)
    logits = lease.forward(tensors)
    d_logits = torch.empty_like(logits)
    loss = core().cross_entropy(*logits.shape, logits.data_ptr(), labels.data_ptr(), d_logits.data_ptr())
    d_edges = lease.backward(d_logits, tensors, into)
    if into is not None:
        return loss, list(into)
    gradient = [torch.empty_like(own) for own in betas]
    for own, d_row, d in zip(betas, d_edges, gradient, strict=False):
        assert d_row is not None
        core().edge_weights_bwd(own.data_ptr(), d_row.data_ptr(), d.data_ptr())
    return loss, gradient


def move_architecture(
    parameters: Sequence[Tensor],
    gradient: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
    rate: float,
    decays: tuple[float, float],
    eps: float,
    decay: float,
    steps: int,
) -> None:
    """A step of Adam with coupled weight decay on float64 parameters.

    moments: first and second, as the last step left them, zeros before the first; decays: theirs; steps: how many
    there are with this one, at least 1. Raises ValueError naming the argument.
    """
    if steps < 1:
        raise ValueError(f"move_architecture: steps: expected at least 1, got {steps}")
    first, second = moments
    for name, tensors in (("parameters", parameters), ("gradient", gradient), ("first", first), ("second", second)):
        _check_all("move_architecture", name, tensors, parameters, torch.float64)
    for each in zip(parameters, gradient, first, second, strict=True):
        core().adam(each[0].numel(), *(t.data_ptr() for t in each), rate, *decays, eps, decay, steps)


def move_weights(
    weights: Sequence[Tensor],
    velocity: Sequence[Tensor],
    gradient: Sequence[Tensor],
    rate: float,
    limit: float | None,
    momentum: float,
    decay: float,
    nesterov: bool,
) -> float:
    """A step of SGD with momentum and coupled weight decay along the gradient, clipped to the 2-norm `limit`.

    velocity: as the last step left it, zeros before the first. Returns the norm before it was clipped; where that is
    not finite nothing is moved. Raises ValueError naming the argument.
    """
    sizes = [w.numel() for w in weights]
    for name, tensors in (("weights", weights), ("velocity", velocity), ("gradient", gradient)):
        _check_all("move_weights", name, tensors, weights, torch.float32)
    addresses = ([t.data_ptr() for t in tensors] for tensors in (weights, velocity, gradient))
    most = math.inf if limit is None else limit
    return float(core().sgd(sizes, *addresses, rate, momentum, decay, most, nesterov))


def _check(op: str, name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t.dtype != dtype or t.shape != shape or t.device.type != "cpu" or not t.is_contiguous():
        raise ValueError(
            f"{op}: {name}: expected contiguous {dtype} of shape {tuple(shape)} on the cpu, got {t.dtype} of shape "
            f"{tuple(t.shape)} and strides {t.stride()} on {t.device}"
        )


def _check_all(op: str, name: str, tensors: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype) -> None:
    if len(tensors) != len(like):
        raise ValueError(f"{op}: {name}: expected {len(like)} tensors, got {len(tensors)}")
    for i, (t, other) in enumerate(zip(tensors, like, strict=True)):
        _check(op, f"{name}[{i}]", t, other.shape, dtype)
