"""The partial-channel mixed node: every edge into one node, every candidate operator on each, in one operation.

An edge i reads its state x_i (B, C, H, W) at stride s_i. Its first C/k channels go through the operators o, weighted
by alpha_io; the others bypass them (max-pooled 2x2 at stride 2); a channel shuffle P mixes both; beta_i weighs the
edge:

    node = sum_i beta_i P( cat( sum_o alpha_io o(x_i[:C/k]), x_i[C/k:] ) )      in  B x C x H/s x W/s

With G the node's gradient on the processed channels, x_hat an operator's normalised result, Q pixels in all,

    dL/dalpha_io = beta_i <G, o(x_i)>     dL/dbeta_i = sum_o alpha_io <G, o(x_i)> + <rest of G, bypass_i>
    dL/draw_io   = beta_i alpha_io / deviation * (G - mean G - x_hat <G, x_hat> / Q)

so the batch norms' sums are the weights' gradients, and no operator's gradient is ever formed by itself. Weights come
flat: edge after edge, operator after operator, in the order of `operators.OPERATORS[o].shapes`. Source: PC-DARTS,
section 3.1, equations 2 and 3; at k = 1 the mixed operation of DARTS, equation 2.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import choose
from ._memory import pooled
from ._node import NAMES, NodeCall, NodeGradients, planes, run_backward, run_forward, saved_floats, shape_of
from .operators import OPERATORS, n_batch_norms
from .skip_cell import channel_shuffle


def mixed_weights(
    C: int, k: int, operators: Sequence[str], strides: Sequence[int]
) -> list[list[list[tuple[int, ...]]]]:
    """The shapes of a node's weights: by edge, by operator."""
    return [[OPERATORS[o].shapes(C // k, C // k, stride) for o in operators] for stride in strides]


def reference(
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    operators: Sequence[str],
    strides: Sequence[int],
    k: int,
) -> Tensor:
    """The definition, in any floating type, differentiable as often as wanted."""
    left: Iterator[Tensor] = iter(weights)
    C = inputs[0].shape[1]
    node: Tensor | None = None
    for i, (x, stride, shapes) in enumerate(zip(inputs, strides, mixed_weights(C, k, operators, strides), strict=True)):
        processed, bypass = x[:, : C // k], x[:, C // k :]
        total: Tensor | None = None
        for o, (name, own) in enumerate(zip(operators, shapes, strict=True)):
            mine = [next(left) for _ in own]
            apply = OPERATORS[name].reference
            if apply is not None:
                term = operator_weights[i, o] * apply(processed, mine, (), stride)
                total = term if total is None else total + term
        if total is None:
            total = torch.zeros_like(processed[:, :, ::stride, ::stride])
        if k > 1:
            total = torch.cat((total, bypass if stride == 1 else F.max_pool2d(bypass, 2)), 1)
        edge = edge_weights[i] * channel_shuffle(total, k)
        node = edge if node is None else node + edge
    assert node is not None
    return node


def partial_mix(
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    operators: Sequence[str],
    strides: Sequence[int],
    k: int = 4,
) -> Tensor:
    """The mixed node of the module's equation.

    inputs: E states (B, C, H, W), those of stride 1 half as high and wide as those of stride 2 (rounded up; at k > 1 a
    stride of 2 needs even sizes); edge_weights: (E,); operator_weights: (E, len(operators)); weights: flat, see the
    module; operators: among DARTS' eight; strides: 1 or 2 for each edge; k: a divisor of C. Returns (B, C, H', W').
    The cpu backend takes float32 and has first derivatives only; the reference takes any floating type.

    Raises ValueError or TypeError naming the argument, what was expected and what came; BackendError when a backend
    asked for by name cannot run.
    """
    check(inputs, edge_weights, operator_weights, weights, operators, strides, k)
    run = choose("partial_mix", {"cpu": _cpu, "reference": reference}, inputs[0])
    return run(inputs, edge_weights, operator_weights, weights, operators, strides, k)


def one_operator(
    op: str, name: str, x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], stride: int
) -> Tensor:
    """Operator `name` on a state of its own, for the operation `op`: a node of one edge and one operator at k = 1."""
    _check_states(op, [x], [stride])
    C_out = weights[-1].shape[0] * (2 if name == "factorized_reduce" else 1) if weights and weights[-1].dim() else 0
    if name == "factorized_reduce" and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"{op}: x: expected an even height and width, got {tuple(x.shape)}")
    _check_tensors(op, "weights", weights, OPERATORS[name].shapes(x.shape[1], C_out, stride), x)
    if affine:
        C = x.shape[1]
        channels = [C_out] * n_batch_norms(name, stride) if not name.startswith("sep") else [C, C_out]
        _check_tensors(op, "affine", affine, [(c,) for c in channels for _ in range(2)], x)
    table: dict[str, Callable[..., Tensor]] = {"cpu": _cpu_one, "reference": _reference_one}
    return choose(op, table, x)(name, x, weights, affine, stride)


def _reference_one(name: str, x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], stride: int) -> Tensor:
    apply = OPERATORS[name].reference
    assert apply is not None
    return apply(x, weights, affine, stride)


def _cpu_one(name: str, x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], stride: int) -> Tensor:
    ones = torch.ones(2)
    node, _ = torch.ops.ftso_fast.partial_mix(
        [x], ones[:1], ones[1:].view(1, 1), list(weights), list(affine), [NAMES.index(name)], [stride], 1
    )
    return node


def _cpu(
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    operators: Sequence[str],
    strides: Sequence[int],
    k: int,
) -> Tensor:
    chosen = [NAMES.index(o) for o in operators]
    node, _ = torch.ops.ftso_fast.partial_mix(
        list(inputs), edge_weights, operator_weights, list(weights), [], chosen, list(strides), k
    )
    return node


# -- what no kernel may see


def _check_states(op: str, inputs: Sequence[Tensor], strides: Sequence[int]) -> None:
    if not inputs:
        raise ValueError(f"{op}: inputs: expected at least one state, got none")
    if len(strides) != len(inputs):
        raise ValueError(f"{op}: strides: expected one for each of the {len(inputs)} inputs, got {len(strides)}")
    for i, stride in enumerate(strides):
        if isinstance(stride, bool) or stride not in (1, 2):
            raise ValueError(f"{op}: strides[{i}]: expected 1 or 2, got {stride!r}")
    first, size = inputs[0], None
    for i, (x, s) in enumerate(zip(inputs, strides, strict=True)):
        what = f"{op}: " + (f"inputs[{i}]" if len(inputs) > 1 else "x")
        if x.dim() != 4:
            raise ValueError(f"{what}: expected shape (B, C, H, W), got {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{what}: expected no empty dimension, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{what}: expected a floating type, got {x.dtype}")
        if x.dtype != first.dtype or x.device != first.device:
            raise TypeError(f"{what}: expected {first.dtype} on {first.device}, got {x.dtype} on {x.device}")
        here = (*x.shape[:2], -(-x.shape[2] // s), -(-x.shape[3] // s))
        size = size or here
        if here != size:
            raise ValueError(f"{what}: expected a state that gives {size} at stride {s}, got {tuple(x.shape)}")


def _check_tensors(
    op: str, what: str, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], like: Tensor
) -> None:
    if len(tensors) != len(shapes):
        raise ValueError(f"{op}: {what}: expected {len(shapes)} tensors, got {len(tensors)}")
    for i, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {what}[{i}]: expected shape {shape}, got {tuple(t.shape)}")
        if t.dtype != like.dtype or t.device != like.device:
            raise TypeError(f"{op}: {what}[{i}]: expected {like.dtype} on {like.device}, got {t.dtype} on {t.device}")


def check(
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    operator_weights: Tensor,
    weights: Sequence[Tensor],
    operators: Sequence[str],
    strides: Sequence[int],
    k: int,
    op: str = "partial_mix",
) -> None:
    """Refuses what no kernel may see, in the name of the operation `op`."""
    _check_states(op, inputs, strides)
    x = inputs[0]
    known = NAMES[:8]
    for i, name in enumerate(operators):
        if name not in known:
            raise ValueError(f"{op}: operators[{i}]: expected one of {', '.join(known)}, got {name!r}")
    if not operators or len(set(operators)) != len(operators):
        raise ValueError(f"{op}: operators: expected different names, at least one, got {tuple(operators)}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or x.shape[1] % k:
        raise ValueError(f"{op}: k: expected a divisor of the {x.shape[1]} channels, got {k!r}")
    for i, (state, stride) in enumerate(zip(inputs, strides, strict=True)):
        halved = k > 1 or "skip_connect" in operators
        if stride == 2 and halved and (state.shape[2] % 2 or state.shape[3] % 2):
            raise ValueError(
                f"{op}: inputs[{i}]: expected an even height and width at stride 2, got {tuple(state.shape)}"
            )
    if "skip_connect" in operators and 2 in strides and x.shape[1] // k % 2:
        raise ValueError(f"{op}: k: expected an even number of processed channels for a skip connection at stride 2")
    _check_tensors(op, "edge_weights", [edge_weights], [(len(inputs),)], x)
    _check_tensors(op, "operator_weights", [operator_weights], [(len(inputs), len(operators))], x)
    shapes = [s for edge in mixed_weights(x.shape[1], k, operators, strides) for own in edge for s in own]
    _check_tensors(op, "weights", weights, shapes, x)


# -- the operation of torch


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


def _require_float32(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"partial_mix: inputs: the cpu backend expected float32, got {x.dtype}")


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
    _require_float32(inputs[0])
    shape, floats = _sizes(inputs, weights, operators, strides, k)
    node, saved = pooled(prod(shape)).view(shape), pooled(floats)
    call = NodeCall(inputs, edge_weights, operator_weights, weights, affine, operators, strides, k)
    run_forward(call.ready(), node, saved)
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
    _require_float32(inputs[0])
    d_inputs = [pooled(x.numel()).view(x.shape) if n else None for x, n in zip(inputs, needs, strict=True)]
    d_weights = [torch.empty(w.shape) for w in weights] if needs_weights else []
    d_affine = [torch.empty(a.shape) for a in affine]
    d_edges, d_operators = torch.empty(edge_weights.shape), torch.empty(operator_weights.shape)
    call = NodeCall(inputs, edge_weights, operator_weights, weights, affine, operators, strides, k)
    gradients = NodeGradients(d_inputs, [], d_edges, d_operators, d_weights, d_affine)
    run_backward(call.ready(), planes(grad), saved, gradients)
    found = [grad.new_empty(0) if d is None else d for d in d_inputs]
    return found, d_edges, d_operators, d_weights or [grad.new_empty(0) for _ in weights], d_affine


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
    shape, floats = _sizes(inputs, weights, operators, strides, k)
    return inputs[0].new_empty(shape), inputs[0].new_empty(floats)


def _sizes(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], operators: Sequence[int], strides: Sequence[int], k: int
) -> tuple[tuple[int, int, int, int], int]:
    """The node's shape, and how many floats are saved for its backward pass."""
    B, N, H, W = shape = shape_of(inputs, weights, operators, strides, k)
    return shape, saved_floats(B, inputs[0].shape[1] // k, N // k, H, W, operators, strides)


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


def no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "partial_mix: the cpu backend has first derivatives only; for second ones run it within "
        "`with ftso_fast.kernels.use_backend('reference'):`"
    )


_LIB.impl("partial_mix", _fwd_cpu, "CPU")
_LIB.impl("partial_mix_bwd", _bwd_cpu, "CPU")
torch.library.register_fake("ftso_fast::partial_mix", _fwd_fake, lib=_LIB)
torch.library.register_fake("ftso_fast::partial_mix_bwd", _bwd_fake, lib=_LIB)
torch.library.register_autograd("ftso_fast::partial_mix", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("ftso_fast::partial_mix_bwd", no_double_backward, lib=_LIB)
