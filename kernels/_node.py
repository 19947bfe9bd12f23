"""The mixed node as an operation of torch: schema, fake, autograd, and the calls of the compiled `Node`.

`partial_mix.py` says what it computes. Operators are numbers, their places in `operators.OPERATORS`; `affine` is empty
or holds weight and bias of every batch norm. The second output is what forward leaves for backward.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _memory
from ._backend import core
from ._checks import check_divisor, check_halves, check_states, check_tensor, check_tensors
from .operators import OPERATORS, n_batch_norms

NAMES = tuple(OPERATORS)
STRIDES = {"relu_conv_bn": 1, "factorized_reduce": 2}
"""Operators that stand alone only, each at one stride."""

_LIB = torch.library.Library("ftso_fast", "FRAGMENT")
_ARGUMENTS = (
    "Tensor[] inputs, Tensor edge_weights, Tensor operator_weights, Tensor[] weights, Tensor[] affine, "
    "int[] operators, int[] strides, int k"
)
_LIB.define(f"partial_mix({_ARGUMENTS}) -> (Tensor, Tensor)")
_LIB.define(
    f"partial_mix_bwd(Tensor grad, Tensor saved, {_ARGUMENTS}, bool[] needs, bool needs_weights) "
    "-> (Tensor[], Tensor, Tensor, Tensor[], Tensor[])"
)


def _alone(inputs: Sequence[Tensor], operators: Sequence[int], k: int) -> bool:
    """An operator that stands alone may have any number of channels behind it."""
    return len(inputs) == len(operators) == k == 1


def _c_out(inputs: Sequence[Tensor], weights: Sequence[Tensor], operators: Sequence[int], k: int) -> int:
    """The channels behind an operator: C/k, but free where one stands alone and its last weight tells."""
    if weights and _alone(inputs, operators, k):
        halves = NAMES[operators[0]] in ("factorized_reduce", "skip_connect")
        return (weights[-1].shape[0] if weights[-1].dim() else 0) * (2 if halves else 1)
    return inputs[0].shape[1] // k


def shape_of(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], operators: Sequence[int], strides: Sequence[int], k: int
) -> tuple[int, int, int, int]:
    B, _, H, W = inputs[0].shape
    s = strides[0]
    return B, _c_out(inputs, weights, operators, k) * k, (H + s - 1) // s, (W + s - 1) // s


def _norms(C: int, C_out: int, operators: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The channels of every batch norm, in the order of `Node`'s."""
    found = []
    for stride in strides:
        for o in operators:
            narrow = "pool" in NAMES[o]
            norms = n_batch_norms(NAMES[o], stride)
            found += [C, C_out] if norms == 2 else [C if narrow else C_out] * norms
    return found


def saved_floats(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], operators: Sequence[int], strides: Sequence[int], k: int
) -> int:
    """As `Node::saved_floats` counts them: raw planes and statistics of every batch norm, in whole vectors."""
    B, N, H, W = shape_of(inputs, weights, operators, strides, k)
    norms = _norms(inputs[0].shape[1] // k, N // k, operators, strides)
    return sum((B * c * H * W + 15) // 16 * 16 + (4 * c + 15) // 16 * 16 for c in norms)


def _check(
    op: str,
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    affine: Sequence[Tensor],
    operators: Sequence[int],
    strides: Sequence[int],
    k: int,
) -> None:
    """What a call of the registered operation must be, whoever calls it: kernel and fake ask the same."""
    check_states(op, inputs, strides)
    x = inputs[0]
    if x.dtype != torch.float32:
        raise TypeError(f"{op}: inputs: the cpu backend expected float32, got {x.dtype}")
    check_divisor(op, k, x.shape[1])
    if not operators or len(set(operators)) != len(operators):
        raise ValueError(f"{op}: operators: expected different numbers, at least one, got {tuple(operators)}")
    for i, o in enumerate(operators):
        if not 0 <= o < len(NAMES):
            raise ValueError(f"{op}: operators[{i}]: expected a number from 0 to {len(NAMES) - 1}, got {o}")
        if NAMES[o] in STRIDES and not (_alone(inputs, operators, k) and strides[0] == STRIDES[NAMES[o]]):
            raise ValueError(
                f"{op}: operators[{i}]: expected {NAMES[o]} alone, at k 1 and stride {STRIDES[NAMES[o]]}, "
                f"got operators {tuple(operators)}, k {k}, strides {tuple(strides)}"
            )
    names = [NAMES[o] for o in operators]
    check_halves(op, inputs, strides, names, k)
    C, C_out = x.shape[1] // k, _c_out(inputs, weights, operators, k)
    if not C_out or ("skip_connect" in names and 2 in strides and C_out % 2):
        raise ValueError(f"{op}: weights: expected them to give channels, for halves an even number, got {C_out}")
    check_tensor(f"{op}: edge_weights", edge_weights, (len(inputs),), x)
    check_tensor(f"{op}: operator_weights", operator_weights, (len(inputs), len(operators)), x)
    shapes = [shape for s in strides for name in names for shape in OPERATORS[name].shapes(C, C_out, s)]
    check_tensors(f"{op}: weights", weights, shapes, x)
    if affine:
        check_tensors(f"{op}: affine", affine, [(c,) for c in _norms(C, C_out, operators, strides) for _ in "wb"], x)


def _check_backward(
    op: str,
    grad: Tensor,
    saved: Tensor,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    operators: Sequence[int],
    strides: Sequence[int],
    k: int,
    needs: Sequence[bool],
) -> None:
    check_tensor(f"{op}: grad", grad, shape_of(inputs, weights, operators, strides, k), inputs[0])
    check_tensor(f"{op}: saved", saved, (saved_floats(inputs, weights, operators, strides, k),), inputs[0])
    if len(needs) != len(inputs):
        raise ValueError(f"{op}: needs: expected {len(inputs)} flags, got {len(needs)}")


@cache
def _plan(B: int, C: int, N: int, k: int, operators: tuple[int, ...], inputs: tuple[tuple[int, int, int], ...]) -> Any:
    return core().Node(B, C, N, k, list(operators), list(inputs))


def _node(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], operators: Sequence[int], strides: Sequence[int], k: int
) -> Any:
    B, C = inputs[0].shape[:2]
    sizes = tuple((x.shape[2], x.shape[3], s) for x, s in zip(inputs, strides, strict=True))
    return _plan(B, C, _c_out(inputs, weights, operators, k), k, tuple(operators), sizes)


def _planes(x: Tensor) -> Tensor:
    """x itself where the pixels of its planes are contiguous, else a copy."""
    H, W = x.shape[2:]
    rows = (W == 1 or x.stride(3) == 1) and (H == 1 or x.stride(2) == W)
    return x if rows else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _fwd_cpu(
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    affine: Sequence[Tensor],
    operators: Sequence[int],
    strides: Sequence[int],
    k: int,
) -> tuple[Tensor, Tensor]:
    _check("partial_mix", inputs, edge_weights, operator_weights, weights, affine, operators, strides, k)
    plan = _node(inputs, weights, operators, strides, k)
    shape = shape_of(inputs, weights, operators, strides, k)
    node = _memory.pooled(shape[0] * shape[1] * shape[2] * shape[3]).view(shape)
    saved = _memory.pooled(saved_floats(inputs, weights, operators, strides, k))
    assert saved.numel() == plan.saved_floats()
    inputs = [_planes(x) for x in inputs]
    small = [t.contiguous() for t in (edge_weights, operator_weights, *weights, *affine)]
    at = [t.data_ptr() for t in small]
    split = 2 + len(weights)
    threads = torch.get_num_threads()
    plan.forward(
        [_view(x) for x in inputs], at[0], at[1], at[2:split], at[split:], _view(node), saved.data_ptr(), threads
    )
    return node, saved


def _bwd_cpu(
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
    needs: Sequence[bool],
    needs_weights: bool,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
    op = "partial_mix_bwd"
    _check(op, inputs, edge_weights, operator_weights, weights, affine, operators, strides, k)
    _check_backward(op, grad, saved, inputs, weights, operators, strides, k, needs)
    plan = _node(inputs, weights, operators, strides, k)
    d_inputs = [
        _memory.pooled(x.numel()).view(x.shape) if need else x.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    ]
    d_weights = [torch.empty(w.shape) if needs_weights else w.new_empty(0) for w in weights]
    d_affine = [torch.empty_like(a) for a in affine]
    d_edges, d_operators = torch.empty(edge_weights.shape), torch.empty(operator_weights.shape)
    work = _memory.pooled(plan.work_floats())
    grad, saved, inputs = _planes(grad), saved.contiguous(), [_planes(x) for x in inputs]
    small = [t.contiguous() for t in (edge_weights, operator_weights, *weights, *affine)]
    at = [t.data_ptr() for t in small]
    split = 2 + len(weights)
    plan.backward(
        [_view(x) for x in inputs],
        at[0],
        at[1],
        at[2:split],
        at[split:],
        _view(grad),
        saved.data_ptr(),
        work.data_ptr(),
        [_view(d) if need else (0, 0, 0) for d, need in zip(d_inputs, needs, strict=True)],
        d_edges.data_ptr(),
        d_operators.data_ptr(),
        [d.data_ptr() for d in d_weights] if needs_weights else [],
        [d.data_ptr() for d in d_affine],
        torch.get_num_threads(),
    )
    return d_inputs, d_edges, d_operators, d_weights, d_affine


def _fwd_fake(
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    affine: Sequence[Tensor],
    operators: Sequence[int],
    strides: Sequence[int],
    k: int,
) -> tuple[Tensor, Tensor]:
    _check("partial_mix", inputs, edge_weights, operator_weights, weights, affine, operators, strides, k)
    x = inputs[0]
    node = x.new_empty(shape_of(inputs, weights, operators, strides, k))
    return node, x.new_empty(saved_floats(inputs, weights, operators, strides, k))


def _bwd_fake(
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
    needs: Sequence[bool],
    needs_weights: bool,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
    op = "partial_mix_bwd"
    _check(op, inputs, edge_weights, operator_weights, weights, affine, operators, strides, k)
    _check_backward(op, grad, saved, inputs, weights, operators, strides, k, needs)
    d_inputs = [x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True)]
    d_weights = [w.new_empty(w.shape if needs_weights else (0,)) for w in weights]
    d_affine = [a.new_empty(a.shape) for a in affine]
    return (
        d_inputs,
        edge_weights.new_empty(edge_weights.shape),
        operator_weights.new_empty(operator_weights.shape),
        d_weights,
        d_affine,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, edges, operator_weights, weights, affine, ctx.operators, ctx.strides, ctx.k = inputs
    ctx.set_materialize_grads(False)
    ctx.sizes = len(states), len(weights)
    ctx.needs = [x.requires_grad for x in states]
    ctx.needs_weights = any(t.requires_grad for t in (*weights, *affine))
    ctx.save_for_backward(output[1], edges, operator_weights, *states, *weights, *affine)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    saved, edges, operator_weights, *rest = ctx.saved_tensors
    n, m = ctx.sizes
    states, weights, affine = rest[:n], rest[n : n + m], rest[n + m :]
    if grad is None:
        return [None] * n, None, None, [None] * m, [None] * len(affine), None, None, None
    d_states, d_edges, d_operators, d_weights, d_affine = torch.ops.ftso_fast.partial_mix_bwd(
        grad, saved, states, edges, operator_weights, weights, affine, ctx.operators, ctx.strides, ctx.k, ctx.needs,
        ctx.needs_weights,
    )  # fmt: skip
    given = [d if need else None for d, need in zip(d_states, ctx.needs, strict=True)]
    d_weights = d_weights if ctx.needs_weights else [None] * m
    return given, d_edges, d_operators, d_weights, d_affine, None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "partial_mix: the cpu backend has first derivatives only; for second ones run it within "
        "`with ftso_fast.kernels.use_backend('reference'):`"
    )


_LIB.impl("partial_mix", _fwd_cpu, "CPU")
_LIB.impl("partial_mix_bwd", _bwd_cpu, "CPU")
torch.library.register_fake("ftso_fast::partial_mix", _fwd_fake, lib=_LIB)
torch.library.register_fake("ftso_fast::partial_mix_bwd", _bwd_fake, lib=_LIB)
torch.library.register_autograd("ftso_fast::partial_mix", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("ftso_fast::partial_mix_bwd", _no_double_backward, lib=_LIB)
