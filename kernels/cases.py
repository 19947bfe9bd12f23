"""The table of cases that tests and benchmarks share: shapes, how their tensors are drawn, how much work they are.

A new operation is one entry in `OPERATIONS`; tests and benchmarks then run it on every backend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import operators
from .draws import VIEWS, convolutions, generator, state, step_off_kinks
from .node_sum import node_sum
from .node_sum import reference as node_sum_reference
from .operators import OPERATORS, n_batch_norms
from .partial_mix import mixed_weights, partial_mix
from .partial_mix import reference as partial_mix_reference
from .relu_conv_bn import factorized_reduce, relu_conv_bn
from .sep_conv import dil_conv, sep_conv
from .skip_cell import N_EDGES, skip_cell
from .skip_cell import reference as skip_cell_reference

ALL = tuple(OPERATORS)[:8]


@dataclass(frozen=True)
class Case:
    """One call of one operation: `op` on states (B, C, H, W), its operators and the strides of its edges.

    Beside states of stride 2 those of stride 1 are half as high and wide. C_out: 0 where it is C. view: how the states
    and the output's gradient lie in memory, a key of `VIEWS`.
    """

    op: str
    B: int
    C: int
    H: int
    W: int
    k: int = 1
    operators: tuple[str, ...] = ()
    strides: tuple[int, ...] = (1,)
    C_out: int = 0
    affine: bool = False
    view: str = ""

    def __str__(self) -> str:
        alone = self.op not in ("skip_cell", "partial_mix", "node_sum")
        parts = [self.operators[0] if alone else self.op, f"{self.B}x{self.C}x{self.H}x{self.W}"]
        if self.op in ("skip_cell", "partial_mix"):
            parts.append(f"k{self.k}")
        if self.op in ("partial_mix", "node_sum") and self.operators != ALL:
            parts.append("ops" + "".join(str(ALL.index(o)) for o in self.operators))
        if self.strides != (1,):
            parts.append("s" + "".join(map(str, self.strides)))
        parts += [f"to{self.C_out}"] if self.C_out else []
        parts += ["affine"] if self.affine else []
        return "-".join(parts + ([self.view] if self.view else []))

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each state, behind them the output's."""
        halved = -(-self.H // 2), -(-self.W // 2)
        found = [halved if stride < max(self.strides) else (self.H, self.W) for stride in self.strides]
        return [*found, halved if max(self.strides) == 2 else (self.H, self.W)]


@dataclass(frozen=True)
class Operation:
    """`function` dispatches, `reference` defines; `inputs(case, draw)` draws the tensors, and `call(f, case, tensors)`
    calls either on them. Forward, and forward with backward: `bytes_moved` counts the least that they must read and
    write, `flops` the floating point operations of products and depthwise convolutions, 0 where there are none.
    `backends`: those that have kernels of it.
    """

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    call: Callable[[Callable[..., Tensor], Case, Sequence[Tensor]], Tensor]
    inputs: Callable[[Case, int], tuple[Tensor, ...]]
    bytes_moved: Callable[[Case], tuple[int, int]]
    flops: Callable[[Case], tuple[int, int]]
    cases: tuple[Case, ...]
    benchmarks: tuple[Case, ...]
    backends: tuple[str, ...] = ("cpu", "triton")


# -- draws


def _skip_cell_inputs(case: Case, draw: int) -> tuple[Tensor, ...]:
    g = generator(case, draw)
    x0, x1 = (torch.randn(case.B, case.C, case.H, case.W, generator=g) for _ in range(2))
    return x0, x1, torch.rand(N_EDGES, generator=g) + 0.1


def _one_inputs(case: Case, draw: int) -> tuple[Tensor, ...]:
    """x, weights, and behind them weight and bias of every batch norm."""
    g = generator(case, draw)
    (name,), (stride,), C_out = case.operators, case.strides, case.C_out or case.C
    x = state((case.B, case.C, case.H, case.W), g)
    weights = convolutions(OPERATORS[name].shapes(case.C, C_out, stride), g)
    norms = [case.C, C_out] if case.op == "sep_conv" else [C_out]
    affine = [torch.rand(c, generator=g) + shift for c in norms for shift in (0.5, -0.5)] if case.affine else []
    if case.op == "sep_conv":
        step_off_kinks(x, weights, affine, stride)
    return VIEWS[case.view](x), *weights, *affine


def _mix_inputs(case: Case, draw: int) -> tuple[Tensor, ...]:
    """States, edge weights, operator weights, weights."""
    g = generator(case, draw)
    n = len(case.strides)
    states = [state((case.B, case.C, *size), g) for size in case.sizes()[:n]]
    nested = mixed_weights(case.C, case.k, case.operators, case.strides)
    by_edge = [[convolutions(shapes, g) for shapes in edge] for edge in nested]
    for x, stride, edge in zip(states, case.strides, by_edge, strict=True):
        own = [w for name, w in zip(case.operators, edge, strict=True) if name.startswith("sep")]
        processed = x[:, : case.C // case.k]
        while sum(step_off_kinks(processed, w, (), stride) for w in own):  # a step for one may hit another's kink
            pass
    architecture = [torch.rand(*shape, generator=g) + 0.1 for shape in ((n,), (n, len(case.operators)))]
    return *map(VIEWS[case.view], states), *architecture, *(w for edge in by_edge for own in edge for w in own)


def _sum_inputs(case: Case, draw: int) -> tuple[Tensor, ...]:
    """States, weights, and behind them weight and bias of every batch norm."""
    g = generator(case, draw)
    n, C = len(case.strides), case.C
    states = [state((case.B, C, *size), g) for size in case.sizes()[:n]]
    every, affine = list[Tensor](), list[Tensor]()
    for x, name, stride in zip(states, case.operators, case.strides, strict=True):
        weights = convolutions(OPERATORS[name].shapes(C, C, stride), g)
        norms = n_batch_norms(name, stride) if case.affine else 0
        own = [torch.rand(C, generator=g) + shift for _ in range(norms) for shift in (0.5, -0.5)]
        if name.startswith("sep"):
            step_off_kinks(x, weights, own, stride)
        every, affine = [*every, *weights], [*affine, *own]
    return *map(VIEWS[case.view], states), *every, *affine


# -- calls


def _call_skip_cell(function: Callable[..., Tensor], case: Case, tensors: Sequence[Tensor]) -> Tensor:
    return function(*tensors, case.k)


def _call_one(function: Callable[..., Tensor], case: Case, tensors: Sequence[Tensor]) -> Tensor:
    n = 1 + len(OPERATORS[case.operators[0]].shapes(1, 2, case.strides[0]))
    return function(tensors[0], tensors[1:n], tensors[n:], case.strides[0])


def _call_mix(function: Callable[..., Tensor], case: Case, tensors: Sequence[Tensor]) -> Tensor:
    n = len(case.strides)
    return function(tensors[:n], tensors[n], tensors[n + 1], tensors[n + 2 :], case.operators, case.strides, case.k)


def dropped_paths(case: Case) -> Tensor:
    """(E, B): what is left of each image, where a sum's batch norms are affine."""
    left = (torch.rand(len(case.strides), case.B, generator=generator(case, -1)) < 0.7).float() / 0.7
    left[:, 0] = 1 / 0.7
    return left


def _call_sum(function: Callable[..., Tensor], case: Case, tensors: Sequence[Tensor]) -> Tensor:
    edges = list(zip(case.operators, case.strides, strict=True))
    n = len(edges)
    m = n + sum(len(OPERATORS[name].shapes(case.C, case.C, stride)) for name, stride in edges)
    dropped = dropped_paths(case).to(tensors[0].dtype) if case.affine else None
    return function(tensors[:n], case.operators, case.strides, tensors[n:m], tensors[m:], (), dropped)


def _relu_conv_bn(x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], stride: int) -> Tensor:
    return relu_conv_bn(x, weights[0], affine)


def _factorized_reduce(x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], stride: int) -> Tensor:
    return factorized_reduce(x, weights[0], weights[1], affine)


# -- work


def _bytes(case: Case) -> tuple[int, int]:
    """States and output once forward; backward the output's gradient, the states again, and their gradients."""
    *states, out = case.sizes()
    n_outputs, n_states = (4 * case.C, 2) if case.op == "skip_cell" else (case.C_out or case.C, 1)
    x = 4 * n_states * case.B * case.C * sum(h * w for h, w in states)
    y = 4 * case.B * n_outputs * prod(out)
    return x + y, 3 * x + 2 * y


def _flops(case: Case) -> tuple[int, int]:
    """Two for each weight at each pixel of the output; backward twice that, for states' and weights' gradients."""
    C, C_out = case.C // case.k, (case.C_out or case.C) // case.k
    shapes = [s for stride in case.strides for o in case.operators for s in OPERATORS[o].shapes(C, C_out, stride)]
    forward = 2 * case.B * prod(case.sizes()[-1]) * sum(map(prod, shapes))
    return forward, 3 * forward


# -- the table


SEPARABLE = {
    "sep_conv": ("sep_conv_3x3", "sep_conv_5x5"),
    "dil_conv": ("dil_conv_3x3", "dil_conv_5x5"),
}
Options = dict[str, Any]
_SEPARABLE_CASES: tuple[tuple[tuple[int, int, int, int], Options], ...] = (
    ((2, 5, 7, 7), {}),
    ((3, 8, 9, 9), {"strides": (2,), "affine": True}),
    ((2, 6, 14, 14), {"C_out": 10, "affine": True, "view": "last"}),
    ((1, 16, 17, 33), {"strides": (2,), "C_out": 3}),
    ((2, 12, 28, 28), {"view": "second"}),
    ((1, 3, 56, 56), {"view": "first"}),
    ((2, 7, 56, 14), {"strides": (2,), "view": "images"}),
    ((17, 7, 5, 3), {"C_out": 1, "view": "transposed"}),
    ((33, 4, 8, 8), {"view": "channels_last"}),
    ((9, 4, 1, 1), {}),
    ((2, 40, 8, 16), {"strides": (2,), "view": "rows"}),
    ((2, 3, 6, 67), {"affine": True}),
    ((8, 2, 1, 5), {"strides": (2,)}),
)
_MIX_CASES: tuple[tuple[tuple[int, int, int, int, int], Options], ...] = (
    ((2, 16, 8, 8, 4), {"operators": ALL, "strides": (1, 1)}),
    ((2, 16, 14, 28, 4), {"operators": ALL, "strides": (2, 1, 2, 1)}),
    ((3, 8, 7, 9, 2), {"operators": ALL, "strides": (1, 1, 1, 1, 1), "view": "second"}),
    ((2, 8, 32, 32, 2), {"operators": ALL, "strides": (2,), "view": "first"}),
    ((2, 6, 14, 14, 1), {"operators": ALL, "strides": (2, 1)}),
    ((2, 5, 17, 33, 1), {"operators": ALL, "strides": (1, 1), "view": "transposed"}),
    ((17, 8, 6, 10, 4), {"operators": ALL, "strides": (2, 2), "view": "channels_last"}),
    ((1, 16, 56, 56, 8), {"operators": ALL, "strides": (2, 1), "view": "last"}),
    ((2, 12, 9, 31, 4), {"operators": ALL[:4], "strides": (1, 1, 1)}),
    ((2, 4, 7, 7, 1), {"operators": ("max_pool_3x3",), "strides": (2, 1, 2)}),
    ((2, 6, 9, 5, 3), {"operators": ("avg_pool_3x3",), "view": "rows"}),
    ((2, 4, 13, 27, 1), {"operators": ("avg_pool_3x3", "max_pool_3x3"), "strides": (2, 2)}),
    ((2, 8, 6, 34, 4), {"operators": ("skip_connect",), "strides": (2, 1, 1)}),
    ((2, 4, 5, 7, 2), {"operators": ("skip_connect",)}),
    ((2, 4, 4, 6, 2), {"operators": ("none",), "strides": (2, 1)}),
    ((2, 8, 8, 8, 4), {"operators": ("sep_conv_3x3",), "strides": (2, 1), "view": "images"}),
    ((2, 6, 7, 11, 2), {"operators": ("dil_conv_5x5", "none", "max_pool_3x3"), "strides": (1, 1)}),
    ((1, 4, 9, 7, 1), {"operators": ("sep_conv_5x5", "dil_conv_3x3"), "strides": (2, 1)}),
    ((2, 12, 10, 6, 2), {"operators": ("skip_connect", "sep_conv_5x5", "none"), "strides": (2, 1)}),
)
_RELU_CONV_BN_CASES: tuple[tuple[tuple[int, int, int, int], Options], ...] = (
    ((2, 5, 7, 7), {}),
    ((3, 8, 9, 9), {"C_out": 12, "affine": True}),
    ((1, 17, 17, 33), {"C_out": 2, "view": "second"}),
    ((2, 12, 28, 28), {"affine": True, "view": "last"}),
    ((17, 3, 5, 3), {"C_out": 9, "view": "transposed"}),
    ((1, 4, 56, 56), {"view": "first"}),
    ((40, 6, 1, 1), {"C_out": 7}),
)
_REDUCE_CASES: tuple[tuple[tuple[int, int, int, int], Options], ...] = (
    ((2, 6, 8, 8), {}),
    ((3, 8, 14, 6), {"C_out": 16, "affine": True}),
    ((1, 16, 18, 34), {"C_out": 2, "view": "second"}),
    ((2, 12, 28, 28), {"affine": True, "view": "last"}),
    ((17, 3, 6, 2), {"C_out": 10, "view": "transposed"}),
    ((1, 4, 56, 56), {"view": "images"}),
)
_SUM_CASES: tuple[tuple[tuple[int, int, int, int], Options], ...] = (
    ((2, 5, 7, 7), {"operators": ("sep_conv_3x3", "dil_conv_5x5"), "strides": (1, 1)}),
    ((3, 8, 9, 9), {"operators": ("sep_conv_5x5", "sep_conv_3x3"), "strides": (2, 1), "affine": True}),
    ((9, 6, 8, 8), {"operators": ("dil_conv_3x3", "skip_connect"), "strides": (1, 1), "affine": True, "view": "last"}),
    ((5, 4, 8, 8), {"operators": ("sep_conv_3x3", "sep_conv_3x3"), "strides": (1, 1), "affine": True}),
    ((2, 6, 14, 28), {"operators": ("skip_connect", "dil_conv_5x5"), "strides": (2, 2), "affine": True}),
    ((2, 4, 10, 6), {"operators": ("skip_connect", "skip_connect"), "strides": (2, 1), "view": "second"}),
    ((17, 3, 5, 3), {"operators": ("skip_connect",) * 2, "strides": (1, 1), "view": "transposed"}),
    (
        (2, 3, 6, 67),
        {"operators": ("dil_conv_3x3", "sep_conv_5x5", "skip_connect"), "strides": (1, 1, 1), "affine": True},
    ),
    ((1, 16, 17, 33), {"operators": ("sep_conv_3x3",), "strides": (2,), "affine": True}),
)
_EVALUATION = ((96, 36, 32, 32), (96, 72, 16, 16), (96, 144, 8, 8))
_PARTIAL = ((256, 4, 32, 32), (256, 8, 16, 16), (256, 16, 8, 8))
_SKIP_CELL_CASES = (
    (2, 16, 32, 32, 4),
    (2, 32, 16, 16, 4),
    (3, 64, 8, 8, 4),
    (2, 32, 8, 8, 8),
    (2, 16, 8, 8, 2),
    (2, 5, 4, 4, 1),
    (3, 12, 5, 7, 4),
    (1, 6, 3, 3, 2),
    (2, 48, 9, 31, 4),
    (1, 8, 17, 16, 4),
    (1, 4, 1, 1, 4),
    (2, 10, 1, 259, 2),
    (1, 24, 13, 1, 8),
)


def _separable(op: str, function: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Operation:
    names = SEPARABLE[op]
    return Operation(
        function,
        reference,
        _call_one,
        _one_inputs,
        _bytes,
        _flops,
        cases=tuple(Case(op, *s, operators=(name,), **more) for name in names for s, more in _SEPARABLE_CASES),
        benchmarks=tuple(Case(op, *s, operators=(n,)) for n in names for s in (*_EVALUATION, *_PARTIAL)),
    )


OPERATIONS = {
    "skip_cell": Operation(
        skip_cell,
        skip_cell_reference,
        _call_skip_cell,
        _skip_cell_inputs,
        _bytes,
        _flops,
        cases=tuple(Case("skip_cell", *shape) for shape in _SKIP_CELL_CASES),
        benchmarks=tuple(
            Case("skip_cell", *shape) for shape in ((256, 16, 32, 32, 4), (256, 32, 16, 16, 4), (256, 64, 8, 8, 4))
        ),
    ),
    "sep_conv": _separable("sep_conv", sep_conv, operators.sep_conv),
    "dil_conv": _separable("dil_conv", dil_conv, operators.dil_conv),
    "relu_conv_bn": Operation(
        _relu_conv_bn,
        operators.relu_conv_bn,
        _call_one,
        _one_inputs,
        _bytes,
        _flops,
        cases=tuple(Case("relu_conv_bn", *s, operators=("relu_conv_bn",), **more) for s, more in _RELU_CONV_BN_CASES),
        benchmarks=(),
    ),
    "factorized_reduce": Operation(
        _factorized_reduce,
        operators.factorized_reduce,
        _call_one,
        _one_inputs,
        _bytes,
        _flops,
        cases=tuple(
            Case("factorized_reduce", *s, operators=("factorized_reduce",), strides=(2,), **more)
            for s, more in _REDUCE_CASES
        ),
        benchmarks=(),
    ),
    "node_sum": Operation(
        node_sum,
        node_sum_reference,
        _call_sum,
        _sum_inputs,
        _bytes,
        _flops,
        cases=tuple(Case("node_sum", *shape, **more) for shape, more in _SUM_CASES),
        benchmarks=(),
        backends=("cpu",),
    ),
    "partial_mix": Operation(
        partial_mix,
        partial_mix_reference,
        _call_mix,
        _mix_inputs,
        _bytes,
        _flops,
        cases=tuple(Case("partial_mix", *s, **more) for s, more in _MIX_CASES),
        benchmarks=tuple(
            Case("partial_mix", *s, operators=ALL)
            for s in ((64, 16, 32, 32, 4), (64, 32, 16, 16, 4), (64, 64, 8, 8, 4))
        ),
    ),
}
CASES = tuple(case for operation in OPERATIONS.values() for case in operation.cases)
BENCHMARKS = tuple(case for operation in OPERATIONS.values() for case in operation.benchmarks)
