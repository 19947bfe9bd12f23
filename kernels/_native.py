"""The compiled mixed node: plans, pointers and sizes. What may be asked of it is checked before."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _memory
from ._backend import core
from .operators import OPERATORS, n_batch_norms

NAMES = tuple(OPERATORS)


@cache
def _behind(edges: tuple[tuple[int, ...], ...], strides: tuple[int, ...]) -> tuple[bool, ...]:
    """Of every batch norm, whether it lies behind what gives an operator its output channels."""
    found: list[bool] = []
    for stride, operators in zip(strides, edges, strict=True):
        for o in operators:
            norms = n_batch_norms(NAMES[o], stride)
            found += [False, True] if norms == 2 else ["pool" not in NAMES[o]] * norms
    return tuple(found)


def norms_of(C: int, C_out: int, edges: Sequence[Sequence[int]], strides: Sequence[int]) -> list[int]:
    """The channels of every batch norm, in the order of `Node`'s: C before an operator of an edge, C_out behind it."""
    return [C_out if behind else C for behind in _behind(tuple(map(tuple, edges)), tuple(strides))]


def whole_lines(floats: int) -> int:
    """In whole vectors, as the core's plans round up."""
    return (floats + 15) // 16 * 16


def floats_of(B: int, H: int, W: int, norms: Sequence[int]) -> int:
    """As `Node::saved_floats` counts them: raw planes of every batch norm, and behind them its statistics: mean and
    1/deviation, each as two floats that add up to it."""
    return sum(whole_lines(B * c * H * W) + whole_lines(4 * c) for c in norms)


@cache
def _plan(B: int, C: int, N: int, k: int, operators: tuple[int, ...], inputs: tuple[tuple[int, int, int], ...]) -> Any:
    return core().Node(B, C, N, k, list(operators), list(inputs))


class NodeCall(NamedTuple):
    """What a node is asked for; operators are numbers of `NAMES`: all of them on every edge, or, with `each`, one for
    each edge. image_weights: (edges, B), see `Node::Call`."""

    inputs: Sequence[Tensor]
    edge_weights: Tensor
    operator_weights: Tensor
    weights: Sequence[Tensor]
    affine: Sequence[Tensor]
    operators: Sequence[int]
    strides: Sequence[int]
    k: int
    each: bool = False
    image_weights: Tensor | None = None

    def ready(self) -> "NodeCall":
        """The same with memory laid out as the core reads it."""
        return self._replace(
            inputs=[planes(x) for x in self.inputs],
            edge_weights=self.edge_weights.contiguous(),
            operator_weights=self.operator_weights.contiguous(),
            weights=[w.contiguous() for w in self.weights],
            affine=[a.contiguous() for a in self.affine],
            image_weights=None if self.image_weights is None else self.image_weights.contiguous(),
        )

    @property
    def like(self) -> tuple[Any, ...] | None:
        """All that checks look at; None where there is more to say: no tensors, or sizes that are symbols."""
        lists = self.inputs, (self.edge_weights, self.operator_weights), self.weights, self.affine
        try:
            tensors = [[(t.shape, t.dtype, t.device, t.layout) for t in own] for own in lists]
            found = tuple(map(tuple, (*tensors, self.operators, self.strides))), self.k, self.each
            hash(found)
        except (AttributeError, TypeError):
            return None
        return found

    @property
    def edges(self) -> list[Sequence[int]]:
        """Every edge's operators."""
        return [[o] for o in self.operators] if self.each else [self.operators] * len(self.inputs)

    @property
    def channels_out(self) -> int:
        """The channels behind an operator: C/k, but free where one stands alone and its last weight tells."""
        if self.weights and len(self.inputs) == len(self.operators) == self.k == 1:
            halves = NAMES[self.operators[0]] in ("factorized_reduce", "skip_connect")
            return (self.weights[-1].shape[0] if self.weights[-1].dim() else 0) * (2 if halves else 1)
        return self.inputs[0].shape[1] // self.k

    @property
    def norms(self) -> list[int]:
        """The channels of every batch norm."""
        return norms_of(self.inputs[0].shape[1] // self.k, self.channels_out, self.edges, self.strides)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the node."""
        B, _, H, W = self.inputs[0].shape
        s = self.strides[0]
        return B, self.channels_out * self.k, (H + s - 1) // s, (W + s - 1) // s

    @property
    def saved_floats(self) -> int:
        B, _, H, W = self.shape
        return floats_of(B, H, W, self.norms)

    @property
    def plan(self) -> Any:
        B, C = self.inputs[0].shape[:2]
        sizes = tuple((x.shape[2], x.shape[3], s) for x, s in zip(self.inputs, self.strides, strict=True))
        return _plan(B, C, self.channels_out, self.k, tuple(o for own in self.edges for o in own), sizes)

    @property
    def pointers(self) -> tuple[Any, ...]:
        weights, affine = ([t.data_ptr() for t in tensors] for tensors in (self.weights, self.affine))
        return (
            [view(x) for x in self.inputs],
            self.edge_weights.data_ptr(),
            self.operator_weights.data_ptr(),
            0 if self.image_weights is None else self.image_weights.data_ptr(),
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
    plan = call.plan
    assert saved.numel() == plan.saved_floats()
    plan.forward(*call.pointers, view(node), saved.data_ptr(), torch.get_num_threads())


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
    work = _memory.pooled(plan.work_floats())
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
