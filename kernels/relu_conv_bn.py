"""What stands before a cell: ReLU, 1x1 convolution and batch norm, and its form of stride 2."""

from collections.abc import Sequence

from torch import Tensor

from .partial_mix import one_operator


def relu_conv_bn(
    x: Tensor, weight: Tensor, affine: Sequence[Tensor] = (), running: Sequence[Tensor] = ()
) -> Tensor:  # fmt: skip
    """(B, C, H, W) -> (B, C_out, H, W). weight: (C_out, C, 1, 1); affine: empty, or weight and bias; running: empty,
    or running mean and variance, which are moved. Source: DARTS, ReLUConvBN.
    """
    return one_operator("relu_conv_bn", "relu_conv_bn", x, (weight,), affine, 1, running)


def factorized_reduce(
    x: Tensor, weight_1: Tensor, weight_2: Tensor, affine: Sequence[Tensor] = (), running: Sequence[Tensor] = ()
) -> Tensor:
    """(B, C, H, W), H and W even -> (B, C_out, H/2, W/2). weights: (C_out/2, C, 1, 1); affine: empty, or weight and
    bias; running: empty, or running mean and variance, which are moved. Source: DARTS, FactorizedReduce."""
    return one_operator("factorized_reduce", "factorized_reduce", x, (weight_1, weight_2), affine, 2, running)
