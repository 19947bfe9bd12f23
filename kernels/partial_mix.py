"""The partial-channel mixed node: every edge into one node, every candidate operator on each, in one operation.

An edge i reads its state x_i (B, C, H, W) at stride s_i. Its first C/k channels go through the operators o, weighted
by alpha_io; the others bypass them (max-pooled 2x2 at stride 2); a channel shuffle P mixes both; beta_i weighs the
edge:

    node = sum_i beta_i P( cat( sum_o alpha_io o(x_i[:C/k]), x_i[C/k:] ) )      in  B x C x H/s x W/s

Weights come flat: edge after edge, operator after operator, in the order of `operators.OPERATORS[o].shapes`. Source:
PC-DARTS, section 3.1, equations 2 and 3; at k = 1 the mixed operation of DARTS, equation 2.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .operators import OPERATORS
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

    inputs: E states (B, C, H, W), those of stride 1 half as high and wide as those of stride 2; edge_weights: (E,);
    operator_weights: (E, len(operators)); weights: flat, see the module; operators: names of `OPERATORS`; strides: 1
    or 2 for each edge; k: a divisor of C. Returns (B, C, H', W').
    """
    return reference(inputs, edge_weights, operator_weights, weights, operators, strides, k)
