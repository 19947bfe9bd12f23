"""Separable and dilated convolutions of DARTS with their batch norms.

sep_conv: ReLU, depthwise K x K, pointwise, batch norm, twice, the stride in the first half.
dil_conv: the same once, dilation 2. K is 3 or 5, read off the depthwise weight (C, 1, K, K).
"""

from collections.abc import Sequence

from torch import Tensor

from ._checks import check_list
from .partial_mix import one_operator


def sep_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    affine: Sequence[Tensor] = (),
    stride: int = 1,
    running: Sequence[Tensor] = (),
) -> Tensor:
    """(B, C, H, W) -> (B, C_out, ceil(H/stride), ceil(W/stride)).

    weights: depthwise (C, 1, K, K), pointwise (C, C, 1, 1), depthwise (C, 1, K, K), pointwise (C_out, C, 1, 1);
    affine: empty, or weight and bias of each of the two batch norms; running: empty, or running mean and variance of
    each, which are moved. Source: DARTS, SepConv.
    """
    return one_operator("sep_conv", f"sep_conv_{_size('sep_conv', weights)}", x, weights, affine, stride, running)


def dil_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    affine: Sequence[Tensor] = (),
    stride: int = 1,
    running: Sequence[Tensor] = (),
) -> Tensor:
    """(B, C, H, W) -> (B, C_out, ceil(H/stride), ceil(W/stride)).

    weights: depthwise (C, 1, K, K), pointwise (C_out, C, 1, 1); affine: empty, or weight and bias; running: empty, or
    running mean and variance, which are moved. Source: DARTS, DilConv.
    """
    return one_operator("dil_conv", f"dil_conv_{_size('dil_conv', weights)}", x, weights, affine, stride, running)


def _size(op: str, weights: Sequence[Tensor]) -> str:
    check_list(f"{op}: weights", weights)
    first = weights[0] if weights else None
    shape = tuple(first.shape) if isinstance(first, Tensor) else ()
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] not in (3, 5):
        raise ValueError(f"{op}: weights[0]: expected shape (C, 1, K, K) with K 3 or 5, got {shape}")
    return f"{shape[2]}x{shape[2]}"
