"""The network in which NAS-Bench-201 trained its architectures: 16, 32 and 64 channels, cells of six edges.

Source: Dong & Yang, NAS-Bench-201, 2020, section 2.1.
"""

from collections.abc import Callable

from torch import Tensor, nn

from .errors import UsageError
from .nats import EDGES, Architecture
from .nats_net import Residual
from .network import trained_norm
from .operations import ReLUConvBN, Zero

_OPS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda C: Zero(1),
    "skip_connect": lambda C: nn.Identity(),
    "nor_conv_1x1": lambda C: ReLUConvBN(C, C, True),
    "nor_conv_3x3": lambda C: nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, padding=1, bias=False), trained_norm(C)),
    "avg_pool_3x3": lambda C: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
}


class TrainedNatsCell(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): every node is the sum of all earlier ones, each through its operator."""

    def __init__(self, architecture: Architecture, C: int) -> None:
        super().__init__()
        self.ops = nn.ModuleList(_OPS[name](C) for name in architecture.operators)

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for (state, node), op in zip(EDGES, self.ops, strict=True):
            term = op(states[state])
            if node == len(states):
                states.append(term)
            else:
                states[node] = states[node] + term
        return states[-1]


class NatsNetwork(nn.Module):
    """Images (B, 3, H, W), H and W divisible by 4, to logits (B, classes).

    Weights are drawn from torch's global generator. Raises UsageError for numbers out of range.
    """

    def __init__(self, architecture: Architecture, classes: int = 10, channels: int = 16, cells: int = 5) -> None:
        super().__init__()
        if not isinstance(architecture, Architecture):
            raise UsageError(f"architecture: expected an Architecture, got {type(architecture).__name__}")
        for name, value, least in (("classes", classes, 2), ("channels", channels, 1), ("cells", cells, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False), trained_norm(channels)]
        C = channels
        for stage in range(3):
            if stage:
                parts.append(Residual(C, 2 * C, running=True))
                C *= 2
            parts += [TrainedNatsCell(architecture, C) for _ in range(cells)]
        self.architecture = architecture
        self.parts = nn.Sequential(*parts, trained_norm(C), nn.ReLU())
        self.classifier = nn.Linear(C, classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % 4 or images.shape[3] % 4:
            raise UsageError(
                f"images: expected shape (B, 3, H, W) with H and W divisible by 4, got {tuple(images.shape)}"
            )
        x: Tensor = self.parts(images)
        return self.classifier(x.mean((2, 3)))
