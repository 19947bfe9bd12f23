"""Separable and dilated convolutions of DARTS with their batch norms.

sep_conv: ReLU, depthwise K x K, pointwise, batch norm, twice, the stride in the first half.
dil_conv: the same once, dilation 2. K is 3 or 5, read off the depthwise weight (C, 1, K, K).
"""

from collections.abc import Sequence

from torch import Tensor

from . import operators


def sep_conv(x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, C_out, ceil(H/stride), ceil(W/stride)).

    weights: depthwise (C, 1, K, K), pointwise (C, C, 1, 1), depthwise (C, 1, K, K), pointwise (C_out, C, 1, 1);
    affine: empty, or weight and bias of each of the two batch norms. Source: DARTS, SepConv.
    """
    return operators.sep_conv(x, weights, affine, stride)


def dil_conv(x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, C_out, ceil(H/stride), ceil(W/stride)).

    weights: depthwise (C, 1, K, K), pointwise (C_out, C, 1, 1); affine: empty, or weight and bias. Source: DARTS,
    DilConv.
    """
    return operators.dil_conv(x, weights, affine, stride)
