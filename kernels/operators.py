"""The operators of a cell as plain PyTorch: the definition that every compiled kernel must agree with.

Batch norm is on the statistics of the batch (biased variance, eps 1e-5), affine where `affine` holds its weight and
bias, two tensors for each batch norm of the operator; `running`, where not empty, holds as many, its running mean and
variance, which move a tenth of the way to the batch's mean and unbiased variance. Convolutions have no bias. x is
(B, C, H, W); at stride 2 the result is (B, C_out, ceil(H/2), ceil(W/2)). Source: DARTS and PC-DARTS, operations; FTSO,
section 3.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EPS, MOMENTUM = 1e-5, 0.1
Shape = tuple[int, ...]


def batch_norm(x: Tensor, affine: Sequence[Tensor] = (), running: Sequence[Tensor] = ()) -> Tensor:
    """Batch norm on the batch's own statistics; `affine` is empty or (weight, bias), `running` or (mean, variance)."""
    weight, bias = affine or (None, None)
    mean, variance = running or (None, None)
    return F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=MOMENTUM, eps=EPS)


def relu_conv_bn(
    x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 1, running: Sequence[Tensor] = ()
) -> Tensor:
    """ReLU, 1x1 convolution (C_out, C, 1, 1), batch norm."""
    return batch_norm(F.conv2d(x.relu(), weights[0], stride=stride), affine, running)


def factorized_reduce(
    x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 2, running: Sequence[Tensor] = ()
) -> Tensor:
    """ReLU, two 1x1 convolutions of stride 2, the second one pixel down and right, side by side; batch norm."""
    x = x.relu()
    # Not by conv2d's stride: oneDNN's gradient of such weights writes past its memory where channels lie last and are
    # few (oneDNN issue 6035).
    even, odd = x[:, :, ::stride, ::stride], x[:, :, 1::stride, 1::stride]
    return batch_norm(torch.cat((F.conv2d(even, weights[0]), F.conv2d(odd, weights[1])), 1), affine, running)


def skip_connect(
    x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 1, running: Sequence[Tensor] = ()
) -> Tensor:
    """The identity; at stride 2 a FactorizedReduce."""
    return x if stride == 1 else factorized_reduce(x, weights, affine, stride, running)


def max_pool(
    x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 1, running: Sequence[Tensor] = ()
) -> Tensor:
    """3x3 maximum, padding 1, batch norm."""
    return batch_norm(F.max_pool2d(x, 3, stride, 1), affine, running)


def avg_pool(
    x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 1, running: Sequence[Tensor] = ()
) -> Tensor:
    """3x3 mean over the pixels that are there, padding 1, batch norm."""
    return batch_norm(F.avg_pool2d(x, 3, stride, 1, count_include_pad=False), affine, running)


def separable(
    x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], stride: int, dilation: int,
    running: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """ReLU, depthwise convolution (C, 1, K, K) that keeps the size at stride 1, pointwise convolution, batch norm."""
    depthwise, pointwise = weights
    C, _, K, _ = depthwise.shape
    x = F.conv2d(x.relu(), depthwise, None, stride, dilation * (K // 2), dilation, groups=C)
    return batch_norm(F.conv2d(x, pointwise), affine, running)


def sep_conv(
    x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 1, running: Sequence[Tensor] = ()
) -> Tensor:
    """Two separable blocks, the stride in the first: weights are (depthwise, pointwise) twice."""
    x = separable(x, weights[:2], affine[:2], stride, 1, running[:2])
    return separable(x, weights[2:], affine[2:], 1, 1, running[2:])


def dil_conv(
    x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor] = (), stride: int = 1, running: Sequence[Tensor] = ()
) -> Tensor:
    """One separable block of dilation 2."""
    return separable(x, weights, affine, stride, 2, running)


def _none(C: int, C_out: int, stride: int) -> list[Shape]:
    return []


def _skip(C: int, C_out: int, stride: int) -> list[Shape]:
    return [] if stride == 1 else [(C_out // 2, C, 1, 1)] * 2


def _sep(K: int) -> Callable[[int, int, int], list[Shape]]:
    return lambda C, C_out, stride: [(C, 1, K, K), (C, C, 1, 1), (C, 1, K, K), (C_out, C, 1, 1)]


def _dil(K: int) -> Callable[[int, int, int], list[Shape]]:
    return lambda C, C_out, stride: [(C, 1, K, K), (C_out, C, 1, 1)]


@dataclass(frozen=True)
class Operator:
    """`reference(x, weights, affine, stride, running)`; `shapes(C, C_out, stride)` of its weights in the order of the
    modules' parameters. None for a reference: the operator gives zeros."""

    reference: Callable[..., Tensor] | None
    shapes: Callable[[int, int, int], list[Shape]]


OPERATORS = {
    "none": Operator(None, _none),
    "max_pool_3x3": Operator(max_pool, _none),
    "avg_pool_3x3": Operator(avg_pool, _none),
    "skip_connect": Operator(skip_connect, _skip),
    "sep_conv_3x3": Operator(sep_conv, _sep(3)),
    "sep_conv_5x5": Operator(sep_conv, _sep(5)),
    "dil_conv_3x3": Operator(dil_conv, _dil(3)),
    "dil_conv_5x5": Operator(dil_conv, _dil(5)),
    "relu_conv_bn": Operator(relu_conv_bn, lambda C, C_out, stride: [(C_out, C, 1, 1)]),
    "factorized_reduce": Operator(factorized_reduce, lambda C, C_out, stride: [(C_out // 2, C, 1, 1)] * 2),
}
"""The eight candidates in the order of DARTS' PRIMITIVES, then what stands before a cell."""


def n_batch_norms(operator: str, stride: int) -> int:
    """How many batch norms an operator holds."""
    if operator == "none" or (operator == "skip_connect" and stride == 1):
        return 0
    return 2 if operator.startswith("sep") else 1
