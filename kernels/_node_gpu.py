"""The mixed node as an operation of torch on GPUs: schema, fake, autograd. Its kernels are imported when called.

As `_node.py` has it for the cpu; the outputs behind the node are what forward leaves for backward: raw results in the
type of the states, the places of maxima, and of the batch norms statistics in float64 and coefficients in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._autograd import Operation
from ._backend import on_first_call
from ._checks import check_tensor
from ._native import NodeCall, planes
from ._node import ARGUMENTS, checked
from ._node_plan import plan_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIB = torch.library.Library("ftso_fast", "FRAGMENT")
_LIB.define(f"partial_mix_triton({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIB.define(
    f"partial_mix_triton_bwd(Tensor grad, Tensor raw, Tensor taps, Tensor stats, Tensor coefs, {ARGUMENTS}, "
    "bool[] needs, bool needs_weights) -> (Tensor[], Tensor, Tensor, Tensor[], Tensor[])"
)


def _fwd(*arguments: Any) -> Any:
    call = checked("partial_mix", NodeCall(*arguments), "triton", DTYPES)
    with torch.cuda.device_of(call.inputs[0]):  # Triton launches on the current device
        return on_first_call("_node_triton", "node_fwd")(call.ready())


def _fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = checked("partial_mix", NodeCall(*arguments), "triton", DTYPES)
    x, plan = call.inputs[0], plan_of(call)
    return (
        x.new_empty(call.shape),
        x.new_empty(plan.raw),
        x.new_empty(plan.taps, dtype=torch.int8),
        x.new_empty(2 * plan.T, dtype=torch.float64),
        x.new_empty(3 * plan.T, dtype=torch.float32),
    )


def _checked_backward(grad: Tensor, *arguments: Any) -> tuple[NodeCall, Sequence[Tensor], Sequence[bool], bool]:
    op = "partial_mix_bwd"
    saved, (needs, needs_weights) = arguments[:4], arguments[-2:]
    call = checked(op, NodeCall(*arguments[4:-2]), "triton", DTYPES)
    check_tensor(f"{op}: grad", grad, call.shape, call.inputs[0])
    if len(needs) != len(call.inputs):
        raise ValueError(f"{op}: needs: expected {len(call.inputs)} flags, got {len(needs)}")
    plan = plan_of(call.ready())
    expected = plan.raw, plan.taps, 2 * plan.T, 3 * plan.T
    for name, t, n in zip(("raw", "taps", "stats", "coefs"), saved, expected, strict=True):
        if t.shape != (n,):
            raise ValueError(f"{op}: {name}: expected what forward left, of shape {(n,)}, got {tuple(t.shape)}")
    return call, saved, needs, needs_weights


def _bwd(grad: Tensor, *arguments: Any) -> Any:
    call, saved, needs, needs_weights = _checked_backward(grad, *arguments)
    run = on_first_call("_node_triton", "node_bwd")
    with torch.cuda.device_of(grad):
        return run(call.ready(), planes(grad), *(t.contiguous() for t in saved), needs, needs_weights)


def _bwd_fake(grad: Tensor, *arguments: Any) -> tuple[Any, ...]:
    call, _, needs, needs_weights = _checked_backward(grad, *arguments)
    return (
        [x.new_empty(x.shape if need else (0,)) for x, need in zip(call.inputs, needs, strict=True)],
        call.edge_weights.new_empty(call.edge_weights.shape),
        call.operator_weights.new_empty(call.operator_weights.shape),
        [w.new_empty(w.shape if needs_weights else (0,)) for w in call.weights],
        [a.new_empty(a.shape) for a in call.affine],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, edges, operator_weights, weights, affine, ctx.operators, ctx.strides, ctx.k = inputs
    ctx.set_materialize_grads(False)
    ctx.sizes = len(states), len(weights)
    ctx.needs = [x.requires_grad for x in states]
    ctx.needs_weights = any(t.requires_grad for t in (*weights, *affine))
    ctx.save_for_backward(*output[1:], edges, operator_weights, *states, *weights, *affine)


def _derive(ctx: Any, bwd: Callable[..., Any], grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    *saved, edges, operator_weights = ctx.saved_tensors[:6]
    rest, (n, m) = ctx.saved_tensors[6:], ctx.sizes
    states, weights, affine = rest[:n], rest[n : n + m], rest[n + m :]
    if grad is None:
        return [None] * n, None, None, [None] * m, [None] * len(affine)
    d_states, d_edges, d_operators, d_weights, d_affine = bwd(
        grad, *saved, states, edges, operator_weights, weights, affine, ctx.operators, ctx.strides, ctx.k, ctx.needs,
        ctx.needs_weights,
    )  # fmt: skip
    given = [d if need else None for d, need in zip(d_states, ctx.needs, strict=True)]
    return given, d_edges, d_operators, d_weights if ctx.needs_weights else [None] * m, d_affine


OP = Operation(
    _LIB, "partial_mix_triton", (_fwd, _bwd), (_fwd_fake, _bwd_fake), _save, _derive, "triton", ("CPU", "CUDA")
)  # on the cpu: interpreted
