"""Operators of a cell as modules: parameters in the order and shapes of DARTS and PC-DARTS, arithmetic in `kernels`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import kernels
from .errors import UsageError
from .genotype import PRIMITIVES


def batch_norm(channels: int, affine: bool = False) -> nn.BatchNorm2d:
    """Batch norm on the statistics of the batch at hand: the search never leaves training mode."""
    return nn.BatchNorm2d(channels, affine=affine, track_running_stats=False)


class ReLUConvBN(nn.Sequential):
    """ReLU, 1x1 convolution without bias, batch norm: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, affine: bool = False) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), batch_norm(c_out, affine))

    def forward(self, x: Tensor) -> Tensor:
        weights, affine = _parts(self)
        return kernels.relu_conv_bn(x, weights[0], affine)


class FactorizedReduce(nn.Module):
    """Two 1x1 convolutions of stride 2, the second one pixel down and right, side by side; then batch norm.

    (B, c_in, H, W) -> (B, c_out, H/2, W/2); H, W and c_out even. The skip connection at stride 2.
    """

    def __init__(self, c_in: int, c_out: int, affine: bool = False) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = batch_norm(c_out, affine)

    def forward(self, x: Tensor) -> Tensor:
        weights, affine = _parts(self)
        return kernels.factorized_reduce(x, weights[0], weights[1], affine)


def _separable(c_in: int, c_out: int, K: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU, depthwise KxK that keeps the size at stride 1, pointwise, batch norm."""
    padding = dilation * (K // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(c_in, c_in, K, stride, padding, dilation, groups=c_in, bias=False),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        batch_norm(c_out, affine),
    ]


class SepConv(nn.Sequential):
    """Two separable KxK blocks, the stride in the first: (B, C, H, W) -> (B, C, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, C: int, K: int, stride: int, affine: bool = False) -> None:
        super().__init__(*_separable(C, C, K, stride, 1, affine), *_separable(C, C, K, 1, 1, affine))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return kernels.sep_conv(x, *_parts(self), self.stride)


class DilConv(nn.Sequential):
    """One separable KxK block of dilation 2: (B, C, H, W) -> (B, C, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, C: int, K: int, stride: int, affine: bool = False) -> None:
        super().__init__(*_separable(C, C, K, stride, 2, affine))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return kernels.dil_conv(x, *_parts(self), self.stride)


class MaxPool(nn.Sequential):
    """3x3 maximum, padding 1, then batch norm."""

    def __init__(self, C: int, stride: int, affine: bool = False) -> None:
        super().__init__(nn.MaxPool2d(3, stride, 1), batch_norm(C, affine))


class AvgPool(nn.Sequential):
    """3x3 mean over the pixels that are there, padding 1, then batch norm."""

    def __init__(self, C: int, stride: int, affine: bool = False) -> None:
        super().__init__(nn.AvgPool2d(3, stride, 1, count_include_pad=False), batch_norm(C, affine))


class Identity(nn.Module):
    """x itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    """Zeros in the shape of every `stride`-th pixel of x."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


OPS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": MaxPool,
    "avg_pool_3x3": AvgPool,
    "skip_connect": lambda C, stride, affine: Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, 5, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, 3, stride, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, 5, stride, affine),
}
"""Operator name -> module of (C, stride, affine) that keeps the channels; the names are those of PRIMITIVES."""


class MixedOp(nn.Module):
    """One edge: all its candidate operators on the first C/k channels, the others past them, shuffled together.

    (B, C, H, W), operator weights (len(operators),) -> (B, C, H/stride, W/stride): `kernels.partial_mix` of a single
    edge. A cell hands the weights of all edges of a node to one such call instead.
    Raises UsageError for a name that is no operator, for none at all, and where k does not divide C.
    """

    def __init__(self, C: int, stride: int, k: int, operators: Sequence[str]) -> None:
        super().__init__()
        if not operators or not set(operators) <= set(OPS):
            raise UsageError(f"operators: expected one or more of {', '.join(PRIMITIVES)}, got {tuple(operators)!r}")
        if C % k:
            raise UsageError(f"k: expected a divisor of the {C} channels, got {k}")
        self.stride, self.k, self.operators = stride, k, tuple(operators)
        self.ops = nn.ModuleList(OPS[name](C // k, stride, False) for name in operators)
        self._places = [(module, name) for module in self.modules() for name in module._parameters]

    def weights(self) -> list[Tensor]:
        """`parameters()` without its walk through all modules: flat, operator after operator."""
        return present(self._places)

    def forward(self, x: Tensor, operator_weights: Tensor) -> Tensor:
        one, strides = torch.ones_like(operator_weights[:1]), [self.stride]
        return kernels.partial_mix([x], one, operator_weights[None], self.weights(), self.operators, strides, self.k)


def present(places: Sequence[tuple[nn.Module, str]]) -> list[Tensor]:
    """The parameters at (module, name) that are there: `parameters()` without its walk through all modules."""
    found = (module._parameters[name] for module, name in places)
    return [w for w in found if w is not None]


def _parts(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The convolutions' weights, and weight and bias of the affine batch norms; both in order."""
    children = list(module.children())
    weights: list[Tensor] = [m.weight for m in children if isinstance(m, nn.Conv2d)]
    norms = [m for m in children if isinstance(m, nn.BatchNorm2d) and m.affine]
    return weights, [t for m in norms for t in (m.weight, m.bias)]
