"""The mixed node as an operation of torch: schema, fake, autograd, and the calls of the compiled `Node`.

`partial_mix.py` says what it computes. Operators are numbers, their places in `operators.OPERATORS`; `affine` is empty
or holds weight and bias of every batch norm. The second output is what forward leaves for backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _memory
from ._autograd import Operation
from ._checks import check_divisor, check_halves, check_states, check_tensor, check_tensors
from ._native import NAMES, NodeCall, NodeGradients, planes, run_backward, run_forward, whole_lines
from .operators import EPS, MOMENTUM, OPERATORS

STRIDES = {"relu_conv_bn": 1, "factorized_reduce": 2}
"""Operators that stand alone only, each at one stride."""

_LIB = torch.library.Library("ftso_fast", "FRAGMENT")
ARGUMENTS = (
    "Tensor[] inputs, Tensor edge_weights, Tensor operator_weights, Tensor[] weights, Tensor[] affine, "
    "int[] operators, int[] strides, int k"
)
_LIB.define(f"partial_mix({ARGUMENTS}) -> (Tensor, Tensor)")
_LIB.define(
    f"partial_mix_bwd(Tensor grad, Tensor saved, {ARGUMENTS}, bool[] needs, bool needs_weights) "
    "-> (Tensor[], Tensor, Tensor, Tensor[], Tensor[])"
)


_right: set[tuple[Any, ...]] = set()
"""What calls were like in which nothing was wrong: others like them are right too."""


def checked(op: str, call: NodeCall, backend: str, dtypes: Sequence[torch.dtype]) -> NodeCall:
    """What a call of the registered operation must be, whoever calls it: kernel and fake ask the same."""
    like = backend, call.like
    if like not in _right:
        _check(op, call, backend, dtypes)
        if call.like is not None:
            _right.add(like)
    return call


def _check(op: str, call: NodeCall, backend: str, dtypes: Sequence[torch.dtype]) -> None:
    check_states(op, call.inputs, call.strides)
    x, operators = call.inputs[0], call.operators
    if x.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: inputs: the {backend} backend expected {expected}, got {x.dtype}")
    check_divisor(op, call.k, x.shape[1])
    if not operators or any(len(set(own)) != len(own) for own in call.edges):
        raise ValueError(f"{op}: operators: expected different numbers, at least one, got {tuple(operators)}")
    for i, o in enumerate(operators):
        if not 0 <= o < len(NAMES):
            raise ValueError(f"{op}: operators[{i}]: expected a number from 0 to {len(NAMES) - 1}, got {o}")
        alone = len(call.inputs) == len(operators) == call.k == 1
        if NAMES[o] in STRIDES and not (alone and call.strides[0] == STRIDES[NAMES[o]]):
            raise ValueError(
                f"{op}: operators[{i}]: expected {NAMES[o]} alone, at k 1 and stride {STRIDES[NAMES[o]]}, "
                f"got operators {tuple(operators)}, k {call.k}, strides {tuple(call.strides)}"
            )
    names = [NAMES[o] for o in operators]
    check_halves(op, call.inputs, call.strides, names, call.k)
    C, C_out = x.shape[1] // call.k, call.channels_out
    if not C_out or ("skip_connect" in names and 2 in call.strides and C_out % 2):
        raise ValueError(f"{op}: weights: expected them to give channels, for halves an even number, got {C_out}")
    check_tensor(f"{op}: edge_weights", call.edge_weights, (len(call.inputs),), x)
    check_tensor(f"{op}: operator_weights", call.operator_weights, (len(call.inputs), len(call.edges[0])), x)
    pairs = [(s, o) for s, own in zip(call.strides, call.edges, strict=True) for o in own]
    shapes = [shape for s, o in pairs for shape in OPERATORS[NAMES[o]].shapes(C, C_out, s)]
    check_tensors(f"{op}: weights", call.weights, shapes, x)
    if call.affine:
        check_tensors(f"{op}: affine", call.affine, [(c,) for c in call.norms for _ in "wb"], x)


def _checked(op: str, call: NodeCall) -> NodeCall:
    return checked(op, call, "cpu", (torch.float32,))


def _checked_backward(grad: Tensor, saved: Tensor, *arguments: Any) -> tuple[NodeCall, Sequence[bool], bool]:
    op = "partial_mix_bwd"
    *rest, needs, needs_weights = arguments
    call = _checked(op, NodeCall(*rest))
    check_tensor(f"{op}: grad", grad, call.shape, call.inputs[0])
    check_tensor(f"{op}: saved", saved, (call.saved_floats,), call.inputs[0])
    if len(needs) != len(call.inputs):
        raise ValueError(f"{op}: needs: expected {len(call.inputs)} flags, got {len(needs)}")
    return call, needs, needs_weights


def _fwd_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    return forward(_checked("partial_mix", NodeCall(*arguments)))


def forward(call: NodeCall) -> tuple[Tensor, Tensor]:
    """The node, and what its backward pass needs."""
    node, saved = _memory.pooled(*call.shape), _memory.pooled(call.saved_floats)
    run_forward(call.ready(), node, saved)
    return node, saved


def _bwd_cpu(grad: Tensor, saved: Tensor, *arguments: Any) -> tuple[Any, ...]:
    return backward(*_checked_backward(grad, saved, *arguments), grad, saved)


def backward(
    call: NodeCall, needs: Sequence[bool], needs_weights: bool, grad: Tensor, saved: Tensor
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of inputs, edge weights, operator weights, weights and affine; empty where nobody needs them."""
    call = call.ready()
    places = NodeGradients(
        [_memory.pooled(*x.shape) if n else None for x, n in zip(call.inputs, needs, strict=True)],
        [],
        torch.empty_like(call.edge_weights),
        torch.empty_like(call.operator_weights),
        [torch.empty_like(w) for w in call.weights] if needs_weights else [],
        [torch.empty_like(a) for a in call.affine],
    )
    run_backward(call, planes(grad), saved.contiguous(), places)
    found = [grad.new_empty(0) if d is None else d for d in places.inputs]
    d_weights = places.weights or [grad.new_empty(0) for _ in call.weights]
    return found, places.edge_weights, places.operator_weights, d_weights, places.affine


@torch.no_grad()
def follow(running: Sequence[Tensor], saved: Tensor, node: Tensor) -> None:
    """Move running means and variances, two for each batch norm, by what forward left of a node at k = 1."""
    n, begin = node[:, 0].numel(), 0
    for mean, variance in zip(running[::2], running[1::2], strict=True):
        C = len(mean)
        begin += whole_lines(n * C)
        high_mean, low_mean, high, low = saved[begin : begin + 4 * C].double().view(4, C)
        begin += whole_lines(4 * C)
        mean.lerp_((high_mean + low_mean).to(mean.dtype), MOMENTUM)
        unbiased = ((high + low) ** -2 - EPS) * (n / max(n - 1, 1))
        variance.lerp_(unbiased.to(variance.dtype), MOMENTUM)


def _fwd_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _checked("partial_mix", NodeCall(*arguments))
    return call.inputs[0].new_empty(call.shape), call.inputs[0].new_empty(call.saved_floats)


def _bwd_fake(grad: Tensor, saved: Tensor, *arguments: Any) -> tuple[Any, ...]:
    return empty_gradients(*_checked_backward(grad, saved, *arguments))


def empty_gradients(call: NodeCall, needs: Sequence[bool], needs_weights: bool) -> tuple[Any, ...]:
    """The shapes of `backward`."""
    return (
        [x.new_empty(x.shape if need else (0,)) for x, need in zip(call.inputs, needs, strict=True)],
        call.edge_weights.new_empty(call.edge_weights.shape),
        call.operator_weights.new_empty(call.operator_weights.shape),
        [w.new_empty(w.shape if needs_weights else (0,)) for w in call.weights],
        [a.new_empty(a.shape) for a in call.affine],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, edges, operator_weights, weights, affine, ctx.operators, ctx.strides, ctx.k = inputs
    ctx.set_materialize_grads(False)
    ctx.sizes = len(states), len(weights)
    ctx.needs = [x.requires_grad for x in states]
    ctx.needs_weights = any(t.requires_grad for t in (*weights, *affine))
    ctx.save_for_backward(output[1], edges, operator_weights, *states, *weights, *affine)


def _derive(ctx: Any, bwd: Callable[..., Any], grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    saved, edges, operator_weights, *rest = ctx.saved_tensors
    n, m = ctx.sizes
    states, weights, affine = rest[:n], rest[n : n + m], rest[n + m :]
    if grad is None:
        return [None] * n, None, None, [None] * m, [None] * len(affine)
    d_states, d_edges, d_operators, d_weights, d_affine = bwd(
        grad, saved, states, edges, operator_weights, weights, affine, ctx.operators, ctx.strides, ctx.k, ctx.needs,
        ctx.needs_weights,
    )  # fmt: skip
    given = [d if need else None for d, need in zip(d_states, ctx.needs, strict=True)]
    d_weights = d_weights if ctx.needs_weights else [None] * m
    return given, d_edges, d_operators, d_weights, d_affine


OP = Operation(_LIB, "partial_mix", (_fwd_cpu, _bwd_cpu), (_fwd_fake, _bwd_fake), _save, _derive)
