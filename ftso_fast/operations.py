"""Operators of a cell as modules: parameters in the order and shapes of DARTS and PC-DARTS, arithmetic in `kernels`.

A search's operators (affine=False) normalise by the batch at hand, always. Those of a network that is trained for
accuracy (affine=True) have weight, bias and running statistics; where it is tested, batch norms are folded into the
convolutions, unless a gradient is asked for or the reference backend is: then they are their plain PyTorch parts, as
they are under autocast.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from . import kernels
from .errors import UsageError
from .genotype import PRIMITIVES


def batch_norm(channels: int, affine: bool = False, running: bool = False) -> nn.BatchNorm2d:
    """Batch norm; without running statistics it is on those of the batch at hand, in evaluation mode too."""
    return nn.BatchNorm2d(channels, affine=affine, track_running_stats=running)


class Fused(nn.Sequential):
    """ReLUs, convolutions and batch norms in a row, computed as one operation; `stride` is the first convolution's."""

    operation: Callable[..., Tensor]

    def __init__(self, *parts: nn.Module, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(*parts)
        self.stride, self.dilation = stride, dilation
        self._folded: tuple[object, list[Tensor], list[Tensor]] = None, [], []

    def forward(self, x: Tensor) -> Tensor:
        if plainly(self, self[-1], x):
            return super().forward(x)
        if tested(self, self[-1]):
            return kernels.folded_conv(x, *self.folded(), self.stride, self.dilation)
        weights, affine, running = parts(self)
        return type(self).operation(x, weights, affine, self.stride, running)

    def into(self, x: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
        """Where it is tested: its result, and `plus` added to it, is written to `out`, which may be `plus`."""
        kernels.folded_conv(x, *self.folded(), self.stride, self.dilation, plus=plus, out=out)

    def folded(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases for `kernels.folded_conv`; made anew once a parameter or a running statistic changes."""
        state = _state(self)
        if self._folded[0] != state:
            weights, biases = list[Tensor](), list[Tensor]()
            for part in self:
                if isinstance(part, nn.Conv2d):
                    weights.append(part.weight.detach())
                elif isinstance(part, nn.BatchNorm2d):
                    weights[-1], bias = fold(weights[-1], part)
                    biases.append(bias)
            self._folded = state, weights, biases
        return self._folded[1:]


def tested(module: nn.Module, norm: nn.Module) -> bool:
    """Whether the running statistics of its batch norms decide."""
    return not module.training and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats


def plainly(module: nn.Module, norm: nn.Module, x: Tensor) -> bool:
    """Whether its parts compute one by one: under autocast; where it is tested, for gradients and on the reference
    backend."""
    if torch.is_autocast_enabled("cpu"):
        return True
    if not tested(module, norm):
        return False
    asked = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in module.parameters()))
    return asked or kernels.requested() == "reference"


@torch.no_grad()
def fold(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Pointwise weights and biases that do what a convolution and a batch norm on its running statistics do."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return kernels.fold_batch_norm(weight, mean, variance, (norm.weight, norm.bias), norm.eps)


def _state(module: nn.Module) -> list[tuple[int, int]]:
    """Differs once a parameter or a buffer of the module's parts does."""
    held = [t for part in module.children() for t in (*part._parameters.values(), *part._buffers.values())]
    return [(t.data_ptr(), t._version) for t in held if t is not None]


class ReLUConvBN(Fused):
    """ReLU, 1x1 convolution without bias, batch norm: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, affine: bool = False) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), batch_norm(c_out, affine, affine))

    @staticmethod
    def operation(x: Tensor, weights: list[Tensor], affine: list[Tensor], _: int, running: list[Tensor]) -> Tensor:
        return kernels.relu_conv_bn(x, weights[0], affine, running)


class FactorizedReduce(nn.Module):
    """Two 1x1 convolutions of stride 2, the second one pixel down and right, side by side; then batch norm.

    (B, c_in, H, W) -> (B, c_out, H/2, W/2); H, W and c_out even. The skip connection at stride 2.
    """

    def __init__(self, c_in: int, c_out: int, affine: bool = False) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = batch_norm(c_out, affine, affine)

    def forward(self, x: Tensor) -> Tensor:
        if plainly(self, self.bn, x):
            x = self.relu(x)
            return self.bn(torch.cat((self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])), 1))
        if not tested(self, self.bn):
            (one, two), affine, running = parts(self)
            return kernels.factorized_reduce(x, one, two, affine, running)
        B, _, H, W = x.shape
        out = kernels.room(x, (B, self.bn.num_features, H // 2, W // 2))
        self.into(x, out)
        return out

    def into(self, x: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
        """As `Fused.into`."""
        weight, bias = fold(torch.cat((self.conv_1.weight, self.conv_2.weight)), self.bn)
        added = (None, None) if plus is None else plus.chunk(2, 1)
        halves = zip((x, x[:, :, 1:, 1:]), weight.chunk(2), bias.chunk(2), out.chunk(2, 1), added, strict=True)
        for half, w, b, at, more in halves:
            kernels.folded_conv(half, [w], [b], 2, plus=more, out=at)


def separable(c_in: int, c_out: int, K: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU, depthwise KxK that keeps the size at stride 1, pointwise, batch norm."""
    padding = dilation * (K // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(c_in, c_in, K, stride, padding, dilation, groups=c_in, bias=False),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        batch_norm(c_out, affine, affine),
    ]


class SepConv(Fused):
    """Two separable KxK blocks, the stride in the first: (B, C, H, W) -> (B, C, ceil(H/stride), ceil(W/stride))."""

    operation = staticmethod(kernels.sep_conv)

    def __init__(self, C: int, K: int, stride: int, affine: bool = False) -> None:
        super().__init__(*separable(C, C, K, stride, 1, affine), *separable(C, C, K, 1, 1, affine), stride=stride)


class DilConv(Fused):
    """One separable KxK block of dilation 2: (B, C, H, W) -> (B, C, ceil(H/stride), ceil(W/stride))."""

    operation = staticmethod(kernels.dil_conv)

    def __init__(self, C: int, K: int, stride: int, affine: bool = False) -> None:
        super().__init__(*separable(C, C, K, stride, 2, affine), stride=stride, dilation=2)


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
        self._places = places_of(self)

    def weights(self) -> list[Tensor]:
        """`parameters()` without its walk through all modules: flat, operator after operator."""
        return present(self._places)

    def forward(self, x: Tensor, operator_weights: Tensor) -> Tensor:
        one, strides = torch.ones_like(operator_weights[:1]), [self.stride]
        return kernels.partial_mix([x], one, operator_weights[None], self.weights(), self.operators, strides, self.k)


Places = list[tuple[dict[str, nn.Parameter | None], str]]


def places_of(net: nn.Module) -> Places:
    """Where the parameters of a module stand."""
    return [(m._parameters, name) for m in net.modules() for name, w in m._parameters.items() if w is not None]


def present(places: Places) -> list[Tensor]:
    """The parameters that stand there: `parameters()` without its walk through all modules."""
    return cast("list[Tensor]", [parameters[name] for parameters, name in places])


def parts(module: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The convolutions' weights; weight and bias of the affine batch norms; means and variances of those that keep
    them, which are about to be moved. All in order."""
    children = list(module.children())
    weights: list[Tensor] = [m.weight for m in children if isinstance(m, nn.Conv2d)]
    norms = [m for m in children if isinstance(m, nn.BatchNorm2d)]
    running = list[Tensor]()
    for norm in norms:
        if norm.track_running_stats:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked += 1
            running += [norm.running_mean, norm.running_var]
    return weights, [t for m in norms if m.affine for t in (m.weight, m.bias)], running
