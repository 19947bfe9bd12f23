"""A node of the network that is trained: each of its edges goes through one operator, and all are added up.

    node = sum_i m_i o_i(x_i)

m_i (B) is what drop path leaves of each image: 0 or 1/(1 - p); identities pass whole. With G the node's gradient, the
one for what operator i gives is m_i G. Results of operators never reach memory: what batch norms normalise is kept, and
normalised where it is added up. Source: DARTS, the cell of NetworkCIFAR.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _node
from ._autograd import Operation
from ._backend import choose
from ._checks import check_halves, check_list, check_operators, check_states, check_tensor, check_tensors
from ._native import NAMES, NodeCall
from .operators import OPERATORS, n_batch_norms

WITHOUT_NORMS = ("none", "max_pool_3x3", "avg_pool_3x3")
"""Operators that are not for it: pools of a trained network have no batch norm."""
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def reference(
    inputs: Sequence[Tensor],
    operators: Sequence[str],
    strides: Sequence[int],
    weights: Sequence[Tensor],
    affine: Sequence[Tensor] = (),
    running: Sequence[Tensor] = (),
    image_weights: Tensor | None = None,
) -> Tensor:
    """The definition, in any floating type."""
    left, scales, moved = iter(weights), iter(affine), iter(running)
    node: Tensor | None = None
    for i, (x, name, stride) in enumerate(zip(inputs, operators, strides, strict=True)):
        apply, C = OPERATORS[name].reference, x.shape[1]
        assert apply is not None
        mine = [next(left) for _ in OPERATORS[name].shapes(C, C, stride)]
        n = 2 * n_batch_norms(name, stride)
        term = apply(x, mine, _next(scales, n), stride, _next(moved, n))
        if image_weights is not None and n:
            term = term * image_weights[i].view(-1, 1, 1, 1)
        node = term if node is None else node + term
    assert node is not None
    return node


def _next(tensors: Iterator[Tensor], n: int) -> list[Tensor]:
    return [t for _, t in zip(range(n), tensors, strict=False)]


def node_sum(
    inputs: Sequence[Tensor],
    operators: Sequence[str],
    strides: Sequence[int],
    weights: Sequence[Tensor],
    affine: Sequence[Tensor] = (),
    running: Sequence[Tensor] = (),
    image_weights: Tensor | None = None,
) -> Tensor:
    """E states (B, C, H, W), those of stride 1 half as high and wide as those of stride 2 -> (B, C, H', W').

    operators: a name for each edge, skip_connect or a separable or dilated convolution; strides: 1 or 2 for each;
    weights: flat, edge after edge, as `operators.OPERATORS[o].shapes(C, C, stride)`; affine: empty, or weight and bias
    of every batch norm; running: empty, or running mean and variance of each, which are moved; image_weights: (E, B)
    m of the module, or None. The cpu backend takes float32 and has first derivatives only.

    Raises ValueError or TypeError naming the argument, what was expected and what came; BackendError when a backend
    asked for by name cannot run.
    """
    op = "node_sum"
    for what, tensors in (("weights", weights), ("affine", affine), ("running", running)):
        check_list(f"{op}: {what}", tensors)
    check_states(op, inputs, strides)
    if len(operators) != len(inputs):
        raise ValueError(f"{op}: operators: expected one for each of the {len(inputs)} inputs, got {len(operators)}")
    for i, (x, name, stride) in enumerate(zip(inputs, operators, strides, strict=True)):
        check_operators(op, [name])
        if name in WITHOUT_NORMS:
            raise ValueError(f"{op}: operators[{i}]: expected skip_connect, a sep_conv or a dil_conv, got {name!r}")
        check_halves(op, [x], [stride], [name], 1)
    if running:
        C, strided = inputs[0].shape[1], list(zip(operators, strides, strict=True))
        n = sum(n_batch_norms(name, stride) for name, stride in strided)
        check_tensors(f"{op}: running", running, [(C,)] * (2 * n), inputs[0])
    table = {"cpu": _cpu, "reference": _reference}
    return choose(op, table, inputs[0])(inputs, operators, strides, weights, affine, running, image_weights)


def _checked(call: NodeCall, backend: str, dtypes: Sequence[torch.dtype]) -> NodeCall:
    """What a call must be, whoever makes it."""
    op, x = "node_sum", call.inputs[0]
    if "skip_connect" in (NAMES[o] for o in call.operators) and 2 in call.strides and x.shape[1] % 2:
        raise ValueError(f"{op}: inputs: expected an even number of channels for halves, got {x.shape[1]}")
    if call.image_weights is not None:
        check_tensor(f"{op}: image_weights", call.image_weights, (len(call.inputs), x.shape[0]), x)
    return _node.checked(op, call, backend, dtypes)


def _call(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], affine: Sequence[Tensor], image_weights: Tensor | None,
    operators: Sequence[int], strides: Sequence[int],
) -> NodeCall:  # fmt: skip
    ones = inputs[0].new_ones(len(inputs))
    return NodeCall(
        inputs, ones, ones.view(-1, 1), weights, affine, operators, strides, 1, each=True, image_weights=image_weights
    )


def _reference(
    inputs: Sequence[Tensor], operators: Sequence[str], strides: Sequence[int], weights: Sequence[Tensor],
    affine: Sequence[Tensor], running: Sequence[Tensor], image_weights: Tensor | None,
) -> Tensor:  # fmt: skip
    numbers = [NAMES.index(name) for name in operators]
    _checked(_call(inputs, weights, affine, image_weights, numbers, strides), "reference", FLOATING)
    return reference(inputs, operators, strides, weights, affine, running, image_weights)


def _cpu(
    inputs: Sequence[Tensor], operators: Sequence[str], strides: Sequence[int], weights: Sequence[Tensor],
    affine: Sequence[Tensor], running: Sequence[Tensor], image_weights: Tensor | None,
) -> Tensor:  # fmt: skip
    numbers = [NAMES.index(name) for name in operators]
    node, saved = OP(list(inputs), list(weights), list(affine), image_weights, numbers, list(strides))
    if running:
        _node.follow(running, saved, node)
    return node


_LIB = torch.library.Library("ftso_fast", "FRAGMENT")
_ARGUMENTS = "Tensor[] inputs, Tensor[] weights, Tensor[] affine, Tensor? image_weights, int[] operators, int[] strides"
_LIB.define(f"node_sum({_ARGUMENTS}) -> (Tensor, Tensor)")
_LIB.define(
    f"node_sum_bwd(Tensor grad, Tensor saved, {_ARGUMENTS}, bool[] needs, bool needs_weights) "
    "-> (Tensor[], Tensor[], Tensor[])"
)


def _cpu_call(*arguments: Any) -> NodeCall:
    return _checked(_call(*arguments), "cpu", (torch.float32,))


def _checked_backward(grad: Tensor, saved: Tensor, *arguments: Any) -> tuple[NodeCall, Sequence[bool], bool]:
    op = "node_sum_bwd"
    *rest, needs, needs_weights = arguments
    call = _cpu_call(*rest)
    check_tensor(f"{op}: grad", grad, call.shape, call.inputs[0])
    check_tensor(f"{op}: saved", saved, (call.saved_floats,), call.inputs[0])
    if len(needs) != len(call.inputs):
        raise ValueError(f"{op}: needs: expected {len(call.inputs)} flags, got {len(needs)}")
    return call, needs, needs_weights


def _fwd_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _node.forward(_cpu_call(*arguments))


def _bwd_cpu(grad: Tensor, saved: Tensor, *arguments: Any) -> tuple[Any, ...]:
    d_inputs, _, _, d_weights, d_affine = _node.backward(*_checked_backward(grad, saved, *arguments), grad, saved)
    return d_inputs, d_weights, d_affine


def _fwd_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _cpu_call(*arguments)
    return call.inputs[0].new_empty(call.shape), call.inputs[0].new_empty(call.saved_floats)


def _bwd_fake(grad: Tensor, saved: Tensor, *arguments: Any) -> tuple[Any, ...]:
    d_inputs, _, _, d_weights, d_affine = _node.empty_gradients(*_checked_backward(grad, saved, *arguments))
    return d_inputs, d_weights, d_affine


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, weights, affine, image_weights, ctx.operators, ctx.strides = inputs
    ctx.set_materialize_grads(False)
    ctx.sizes = len(states), len(weights), len(affine)
    ctx.needs = [x.requires_grad for x in states]
    ctx.needs_weights = any(t.requires_grad for t in (*weights, *affine))
    ctx.save_for_backward(output[1], image_weights, *states, *weights, *affine)


def _derive(ctx: Any, bwd: Callable[..., Any], grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    saved, image_weights, *rest = ctx.saved_tensors
    n, m, a = ctx.sizes
    if grad is None:
        return [None] * n, [None] * m, [None] * a
    d_states, d_weights, d_affine = bwd(
        grad, saved, rest[:n], rest[n : n + m], rest[n + m :], image_weights, ctx.operators, ctx.strides, ctx.needs,
        ctx.needs_weights,
    )  # fmt: skip
    given = [d if need else None for d, need in zip(d_states, ctx.needs, strict=True)]
    return given, d_weights if ctx.needs_weights else [None] * m, d_affine


OP = Operation(_LIB, "node_sum", (_fwd_cpu, _bwd_cpu), (_fwd_fake, _bwd_fake), _save, _derive)
