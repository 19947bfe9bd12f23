"""The super-network of NAS-Bench-201: 16, 32 and 64 channels, cells of six edges with five operators each.

    x_j = sum_{i<j} sum_o softmax(alpha_ij)_o op_ij,o(x_i),      output x_3

Batch norm has no affine part and no memory. The convolutions have no bias here: batch norm takes it away again, to the
last digit of what is computed. Source: NAS-Bench-201 and its search code's settings; FTSO, section 4.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels
from .errors import UsageError
from .operations import batch_norm
from .space import NATS_BENCH, Topology
from .supernet import start, without_gradient

NONE, SKIP, CONV1, CONV3, POOL = range(len(NATS_BENCH.operators))


class NatsCell(nn.Module):
    """(B, C, H, W), operator weights (6, 5) -> (B, C, H, W).

    Per edge a 1x1 and a 3x3 convolution of its own. Edges that read the same state compute side by side: their
    convolutions are one of more output channels, their average pool is the same.
    """

    def __init__(self, C: int) -> None:
        super().__init__()
        n = NATS_BENCH.n_edges
        self.conv_1x1 = nn.ModuleList(nn.Conv2d(C, C, 1, bias=False) for _ in range(n))
        self.conv_3x3 = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(n))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        full = NATS_BENCH.full
        number = {edge: i for i, edge in enumerate((s, j) for j, states in enumerate(full, 1) for s in states)}
        sums: list[Tensor | None] = [x, *([None] * len(full))]
        for source in range(len(full)):
            state = sums[source]
            assert state is not None
            readers = range(source + 1, len(full) + 1)
            edges = [number[source, j] for j in readers]
            convolved = []
            for own, operator in ((self.conv_1x1, CONV1), (self.conv_3x3, CONV3)):
                kernel = torch.cat([own[e].weight for e in edges])  # type: ignore[misc]
                # batch norm's scale is the operator's weight: no pass over the images for it alone
                scale = weights[edges, operator].repeat_interleave(state.shape[1])
                affine = [scale, torch.zeros_like(scale)]
                if operator == CONV1:
                    y = kernels.relu_conv_bn(state, kernel, affine)
                else:
                    z = F.conv2d(state.relu(), kernel, padding=1)
                    y = F.batch_norm(z, None, None, affine[0], affine[1], training=True)
                convolved.append(y.chunk(len(edges), 1))
            pooled = F.avg_pool2d(state, 3, 1, 1, count_include_pad=False)
            for j, e, one, three in zip(readers, edges, *convolved, strict=True):
                term = one + three + weights[e, SKIP] * state + weights[e, POOL] * pooled
                before = sums[j]
                sums[j] = term if before is None else before + term
        out = sums[-1]
        assert out is not None
        return out


class Residual(nn.Module):
    """ResNet's basic block between stages, halving the image: (B, c_in, H, W) -> (B, c_out, H/2, W/2)."""

    def __init__(self, c_in: int, c_out: int, running: bool = False) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False),
            batch_norm(c_out, True, running),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            batch_norm(c_out, True, running),
        )
        self.side = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.side(x)


class NatsNet(nn.Module):
    """Images (B, in_channels, H, W), H and W divisible by 4, to logits (B, classes).

    `arch`, (6, 5), float64, 1e-3 times a standard normal draw, stands outside `parameters()`. Random numbers come from
    torch's global generator: weights, then arch.
    """

    precision = "float32"

    def __init__(self, classes: int, channels: int = 16, cells: int = 5, in_channels: int = 3) -> None:
        super().__init__()
        for name, value in (("classes", classes), ("channels", channels), ("cells", cells)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: expected a positive whole number, got {value!r}")
        self.space = NATS_BENCH
        self.topology: dict[str, Topology] = {"cell": NATS_BENCH.full}
        self.in_channels, C = in_channels, channels
        self.stem = nn.Sequential(nn.Conv2d(in_channels, C, 3, padding=1, bias=False), batch_norm(C, affine=True))
        parts: list[nn.Module] = []
        for stage in range(3):
            if stage:
                parts.append(Residual(C, 2 * C))
                C *= 2
            parts += [NatsCell(C) for _ in range(cells)]
        self.cells = nn.ModuleList(parts)
        self.last = nn.Sequential(batch_norm(C, affine=True), nn.ReLU())
        self.classifier = nn.Linear(C, classes)
        self.arch = start(NATS_BENCH.n_edges, len(NATS_BENCH.operators))

    def betas(self) -> tuple[Tensor, ...]:
        """None: every node keeps all its edges."""
        return ()

    def arch_parameters(self) -> list[Tensor]:
        return [self.arch]

    def weights(self) -> list[Tensor]:
        return list(self.parameters())

    def forward(self, images: Tensor) -> Tensor:
        return self.computed(images, self.arch.softmax(1).to(images.dtype))

    def skip_only(self, images: Tensor, betas: Tensor) -> Tensor:
        """Logits where every edge is the skip connection weighed by `betas` (6,), under a softmax for each node: what
        FTSO's topology search would be here. Each node is then the cell's input, so the betas have no gradient."""
        edges = torch.cat([part.softmax(0) for part in betas.split([len(states) for states in NATS_BENCH.full])])
        table = F.one_hot(torch.tensor(SKIP), len(NATS_BENCH.operators))
        return self.computed(images, edges.to(images.dtype)[:, None] * table)

    def computed(self, images: Tensor, weights: Tensor) -> Tensor:
        """Logits under the operator weights (6, 5) themselves."""
        if images.dim() != 4 or images.shape[1] != self.in_channels or images.shape[2] % 4 or images.shape[3] % 4:
            raise UsageError(
                f"images: expected shape (B, {self.in_channels}, H, W) with H and W divisible by 4, "
                f"got {tuple(images.shape)}"
            )
        x = self.stem(images)
        for part in self.cells:
            x = part(x, weights) if isinstance(part, NatsCell) else part(x)
        return self.classifier(self.last(x).mean((2, 3)))

    @contextmanager
    def only_arch(self) -> Iterator[None]:
        """Within the block weights ask for no gradient."""
        yield from without_gradient(self.weights())

    @contextmanager
    def only_weights(self) -> Iterator[None]:
        """Within the block the architecture asks for no gradient."""
        yield from without_gradient([self.arch])
