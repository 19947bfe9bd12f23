"""The compiled mixed node: plans, pointers and sizes. What may be asked of it is checked before, in partial_mix.py."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

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


class NodeCall(NamedTuple):
    """What a node is asked for; operators are numbers of `NAMES`."""

    inputs: Sequence[Tensor]
    edge_weights: Tensor
    operator_weights: Tensor
    weights: Sequence[Tensor]
    affine: Sequence[Tensor]
    operators: Sequence[int]
    strides: Sequence[int]
    k: int

    def ready(self) -> "NodeCall":
        """The same with memory laid out as the core reads it."""
        return self._replace(
            inputs=[planes(x) for x in self.inputs],
            edge_weights=self.edge_weights.contiguous(),
            operator_weights=self.operator_weights.contiguous(),
            weights=[w.contiguous() for w in self.weights],
            affine=[a.contiguous() for a in self.affine],
        )

    @property
    def plan(self) -> Any:
        B, C = self.inputs[0].shape[:2]
        sizes = tuple((x.shape[2], x.shape[3], s) for x, s in zip(self.inputs, self.strides, strict=True))
        N = channels_out(self.inputs, self.weights, self.operators, self.k)
        return _plan(B, C, N, self.k, tuple(self.operators), sizes)

    @property
    def pointers(self) -> tuple[Any, ...]:
        weights, affine = ([t.data_ptr() for t in tensors] for tensors in (self.weights, self.affine))
        return (
            [view(x) for x in self.inputs],
            self.edge_weights.data_ptr(),
            self.operator_weights.data_ptr(),
            weights,
            affine,
        )


def planes(x: Tensor) -> Tensor:
    """x itself where the pixels of its planes are contiguous, else a copy."""
    H, W = x.shape[2:]
    rows = (W == 1 or x.stride(3) == 1) and (H == 1 or x.stride(2) == W)
    return x if rows else x.contiguous()


def view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def run_forward(call: NodeCall, node: Tensor, saved: Tensor) -> None:
    """Write the node and what its backward pass needs."""
    call.plan.forward(*call.pointers, view(node), saved.data_ptr(), torch.get_num_threads())


class NodeGradients(NamedTuple):
    """Where a node's gradients go: those of inputs where wanted, added to what is there where `add` says so (empty:
    nowhere); weights: empty where nobody wants them."""

    inputs: Sequence[Tensor | None]
    add: Sequence[bool]
    edge_weights: Tensor
    operator_weights: Tensor
    weights: Sequence[Tensor]
    affine: Sequence[Tensor]


def run_backward(call: NodeCall, grad: Tensor, saved: Tensor, gradients: NodeGradients) -> None:
    """Write the gradients under the node's gradient `grad`, whose planes are contiguous."""
    plan = call.plan
    work = pooled(plan.work_floats())
    plan.backward(
        *call.pointers,
        view(grad),
        saved.data_ptr(),
        work.data_ptr(),
        [(0, 0, 0) if d is None else view(d) for d in gradients.inputs],
        gradients.edge_weights.data_ptr(),
        gradients.operator_weights.data_ptr(),
        [d.data_ptr() for d in gradients.weights],
        [d.data_ptr() for d in gradients.affine],
        list(gradients.add),
        torch.get_num_threads(),
    )
