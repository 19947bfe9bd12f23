"""The compiled mixed node: plans, pointers and sizes. What may be asked of it is checked before, in partial_mix.py."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._backend import core
from ._memory import pooled
from .operators import OPERATORS, n_batch_norms

NAMES = tuple(OPERATORS)


def channels_out(inputs: Sequence[Tensor], weights: Sequence[Tensor], operators: Sequence[int], k: int) -> int:
    """The channels behind an operator: C/k, but free where an operator stands alone."""
    if NAMES[operators[0]] in ("relu_conv_bn", "factorized_reduce") or (weights and len(operators) == k == 1):
        return weights[-1].shape[0] * (2 if NAMES[operators[0]] in ("factorized_reduce", "skip_connect") else 1)
    return inputs[0].shape[1] // k


def shape_of(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], operators: Sequence[int], strides: Sequence[int], k: int
) -> tuple[int, int, int, int]:
    B, _, H, W = inputs[0].shape
    s = strides[0]
    return B, channels_out(inputs, weights, operators, k) * k, (H + s - 1) // s, (W + s - 1) // s


def saved_floats(B: int, C: int, N: int, H: int, W: int, operators: Sequence[int], strides: Sequence[int]) -> int:
    """As `Node::saved_floats` counts them: raw planes and statistics of every batch norm, in whole vectors. C channels
    before an operator, N behind it."""
    total = 0
    for stride in strides:
        for o in operators:
            norms = n_batch_norms(NAMES[o], stride)
            narrow = "pool" in NAMES[o]
            for channels in (C, N) if norms == 2 else (C if narrow else N,) * norms:
                total += (B * channels * H * W + 15) // 16 * 16 + (4 * channels + 15) // 16 * 16
    return total


@cache
def _plan(B: int, C: int, N: int, k: int, operators: tuple[int, ...], inputs: tuple[tuple[int, int, int], ...]) -> Any:
    return core().Node(B, C, N, k, list(operators), list(inputs))


def _node(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], operators: Sequence[int], strides: Sequence[int], k: int
) -> Any:
    B, C = inputs[0].shape[:2]
    sizes = tuple((x.shape[2], x.shape[3], s) for x, s in zip(inputs, strides, strict=True))
    return _plan(B, C, channels_out(inputs, weights, operators, k), k, tuple(operators), sizes)


def planes(x: Tensor) -> Tensor:
    """x itself where the pixels of its planes are contiguous, else a copy."""
    H, W = x.shape[2:]
    rows = (W == 1 or x.stride(3) == 1) and (H == 1 or x.stride(2) == W)
    return x if rows else x.contiguous()


def view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def run_forward(
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    affine: Sequence[Tensor],
    operators: Sequence[int],
    strides: Sequence[int],
    k: int,
    node: Tensor,
    saved: Tensor,
) -> None:
    """Write the node and what its backward pass needs. Planes of inputs and node contiguous, all else contiguous."""
    plan = _node(inputs, weights, operators, strides, k)
    assert saved.numel() == plan.saved_floats()
    plan.forward(
        [view(x) for x in inputs],
        edge_weights.data_ptr(),
        operator_weights.data_ptr(),
        [w.data_ptr() for w in weights],
        [a.data_ptr() for a in affine],
        view(node),
        saved.data_ptr(),
        torch.get_num_threads(),
    )


def run_backward(
    grad: Tensor,
    saved: Tensor,
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    affine: Sequence[Tensor],
    operators: Sequence[int],
    strides: Sequence[int],
    k: int,
    d_inputs: Sequence[Tensor | None],
    add: Sequence[bool],
    d_edge_weights: Tensor,
    d_operator_weights: Tensor,
    d_weights: Sequence[Tensor],
    d_affine: Sequence[Tensor],
) -> None:
    """Write the gradients, those of inputs where wanted and added to what is there where `add` says so; d_weights:
    empty where nobody wants them."""
    plan = _node(inputs, weights, operators, strides, k)
    work = pooled(plan.work_floats())
    plan.backward(
        [view(x) for x in inputs],
        edge_weights.data_ptr(),
        operator_weights.data_ptr(),
        [w.data_ptr() for w in weights],
        [a.data_ptr() for a in affine],
        view(grad),
        saved.data_ptr(),
        work.data_ptr(),
        [(0, 0, 0) if d is None else view(d) for d in d_inputs],
        d_edge_weights.data_ptr(),
        d_operator_weights.data_ptr(),
        [d.data_ptr() for d in d_weights],
        [d.data_ptr() for d in d_affine],
        list(add),
        torch.get_num_threads(),
    )
