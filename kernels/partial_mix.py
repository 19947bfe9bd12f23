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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _node, _node_gpu
from ._backend import choose
from ._checks import (
    check_dense,
    check_divisor,
    check_halves,
    check_list,
    check_operators,
    check_states,
    check_tensor,
    check_tensors,
)
from ._native import NAMES
from .operators import OPERATORS, n_batch_norms
from .skip_cell import channel_shuffle

Table = dict[str, Callable[..., Tensor]]


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
    _check_node(inputs, operators, strides, k)
    table: Table = {"triton": _triton, "cpu": _cpu, "reference": _reference}
    run = choose("partial_mix", table, inputs[0])
    return run(inputs, edge_weights, operator_weights, weights, operators, strides, k)


def one_operator(
    op: str, name: str, x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], stride: int,
    running: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Operator `name` on a state of its own, for the operation `op`: a node of one edge and one operator at k = 1.

    Its running statistics are moved by the cpu and the reference backend alone."""
    for what, tensors in (("weights", weights), ("affine", affine), ("running", running)):
        check_list(f"{op}: {what}", tensors)
    check_states(op, [x], [stride])
    check_halves(op, [x], [stride], [name], 1)
    check_dense(f"{op}: weights[{len(weights) - 1}]", weights[-1])
    C, last = x.shape[1], weights[-1]
    C_out = (last.shape[0] if last.dim() else 0) * (2 if name == "factorized_reduce" else 1)
    if not C_out:
        raise ValueError(f"{op}: weights[{len(weights) - 1}]: expected output channels, got shape {tuple(last.shape)}")
    check_tensors(f"{op}: weights", weights, OPERATORS[name].shapes(C, C_out, stride), x)
    channels = [C, C_out] if n_batch_norms(name, stride) == 2 else [C_out]
    for what, tensors in (("affine", affine), ("running", running)):
        if tensors:
            check_tensors(f"{op}: {what}", tensors, [(c,) for c in channels for _ in "wb"], x)
    table: Table = {"triton": _triton_one, "cpu": _cpu_one, "reference": _reference_one}
    if running:
        del table["triton"]
    return choose(op, table, x)(name, x, weights, affine, stride, running)


def _reference_one(name: str, x: Tensor, *rest: Any) -> Tensor:
    apply = OPERATORS[name].reference
    assert apply is not None
    return apply(x, *rest)


def _one(
    compiled: Any, name: str, x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], s: int,
    running: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    ones = x.new_ones(2)
    node, saved, *_ = compiled(
        [x], ones[:1], ones[1:].view(1, 1), list(weights), list(affine), [NAMES.index(name)], [s], 1
    )  # fmt: skip
    if running:
        _node.follow(running, saved, node)
    return node


def _mixed(
    compiled: Any, inputs: Sequence[Tensor], edge_weights: Tensor, operator_weights: Tensor, weights: Sequence[Tensor],
    operators: Sequence[str], strides: Sequence[int], k: int,
) -> Tensor:  # fmt: skip
    """The operation checks the rest."""
    chosen = [NAMES.index(o) for o in operators]
    node, *_ = compiled(
        list(inputs), edge_weights, operator_weights, list(weights), [], chosen, list(strides), k
    )  # fmt: skip
    return node


_cpu, _triton = (partial(_mixed, op) for op in (_node.OP, _node_gpu.OP))
_cpu_one, _triton_one = (partial(_one, op) for op in (_node.OP, _node_gpu.OP))


def _reference(
    inputs: Sequence[Tensor], edge_weights: Tensor, operator_weights: Tensor, weights: Sequence[Tensor], *rest: Any
) -> Tensor:
    """What the registered operation checks of its weights, then the definition."""
    op, x, (operators, strides, k) = "partial_mix", inputs[0], rest
    check_tensor(f"{op}: edge_weights", edge_weights, (len(inputs),), x)
    check_tensor(f"{op}: operator_weights", operator_weights, (len(inputs), len(operators)), x)
    shapes = [s for edge in mixed_weights(x.shape[1], k, operators, strides) for own in edge for s in own]
    check_tensors(f"{op}: weights", weights, shapes, x)
    return reference(inputs, edge_weights, operator_weights, weights, operators, strides, k)


def _check_node(inputs: Sequence[Tensor], operators: Sequence[str], strides: Sequence[int], k: int) -> None:
    """What must hold before a backend can be chosen, and what numbers for the operators would no longer tell."""
    op = "partial_mix"
    check_states(op, inputs, strides)
    check_operators(op, operators)
    C = inputs[0].shape[1]
    check_divisor(op, k, C)
    check_halves(op, inputs, strides, operators, k)
    if "skip_connect" in operators and 2 in strides and C // k % 2:
        raise ValueError(
            f"{op}: k: expected an even number of processed channels for a skip connection at stride 2, "
            f"got {C} channels and k {k}"
        )
