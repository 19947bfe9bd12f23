"""The complexity analysis of FTSO's section 3: its formulas, beside counts of the networks that it speaks of.

The paper's n counts a cell's states, its two inputs and its output among them: m = n - 3 nodes. p operators are
vanilla k x k convolutions with bias on C channels of H x W pixels, a FLOP is a multiply-add. Source: FTSO, section 3.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from .genotype import PRIMITIVES
from .space import DARTS

STATES, OPERATORS, KERNEL, CHANNELS = 7, 8, 5, 512
"""The paper's example."""


def edges(n: int) -> int:
    """n(n-3)/2: node j of m = n - 3 reads j + 1 states."""
    return n * (n - 3) // 2


def darts_operations(n: int, p: int) -> int:
    """p n(n-3)/2: all operators on all edges."""
    return p * edges(n)


def topology_operations(n: int) -> int:
    """n(n-3)/2: one skip connection on every edge."""
    return edges(n)


def operator_operations(n: int, p: int) -> int:
    """2(n-3)p: all operators on the two edges that each node has kept."""
    return 2 * (n - 3) * p


def darts_flops(n: int, p: int, k: int, C: int, H: int, W: int) -> int:
    """p n(n-3)/2 HWC (k^2 C + 1), of one cell."""
    return darts_operations(n, p) * H * W * C * (k * k * C + 1)


def darts_params(n: int, p: int, k: int, C: int) -> int:
    """p n(n-3)/2 (k^2 C + 1) C, of one cell."""
    return darts_operations(n, p) * (k * k * C + 1) * C


def topology_flops(n: int, C: int, H: int, W: int) -> int:
    """n(n-3)/2 HWC: one product for each value on each edge."""
    return edges(n) * H * W * C


def topology_params(n: int) -> int:
    """n(n-3)/2: the betas."""
    return edges(n)


def flop_ratio(p: int, k: int, C: int) -> Fraction:
    """1 / (p (k^2 C + 1)), topology search over DARTS."""
    return Fraction(1, p * (k * k * C + 1))


def param_ratio(p: int, k: int, C: int) -> Fraction:
    """1 / (p (k^2 C + 1) C)."""
    return Fraction(1, p * (k * k * C + 1) * C)


@dataclass(frozen=True)
class Counts:
    """A network's trainable numbers without betas and alphas, and the multiply-adds of its convolutions and linear
    layers on one image."""

    params: int
    macs: int


def measured(operators: tuple[str, ...], k: int) -> Counts:
    """Counts of the real super-network for CIFAR-10 (16 channels, 8 cells, 1/k of the channels processed) with these
    operators on every edge: torch's own counter runs over it, on tensors without values."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from . import kernels
    from .supernet import SuperNet

    with torch.random.fork_rng(devices=[]), torch.device("meta"), kernels.use_backend("reference"), torch.no_grad():
        net = SuperNet(10, k=k, space=replace(DARTS, operators=operators))
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 32, 32))
    return Counts(sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2)


@dataclass(frozen=True)
class Section3:
    """The paper's example, and by k the skip-only super-network beside that of all eight operators."""

    operations: dict[str, int]
    param_ratio: float
    flop_ratio: float
    skip: dict[int, Counts]
    eight: dict[int, Counts]

    def to_dict(self) -> dict[str, object]:
        """The JSON document of `ftso reproduce section3 --json`."""
        networks = {
            f"k={k}": {
                "skip_connect": vars(self.skip[k]),
                "all_operators": vars(self.eight[k]),
                "param_ratio": self.skip[k].params / self.eight[k].params,
                "mac_ratio": self.skip[k].macs / self.eight[k].macs,
            }
            for k in self.skip
        }
        return {
            "schema": "ftso.section3/1",
            "operations": self.operations,
            "formula": {"param_ratio": self.param_ratio, "flop_ratio": self.flop_ratio},
            "measured": networks,
        }

    def __str__(self) -> str:
        n = self.operations
        lines = [
            f"Section 3's example: n = {STATES} states, p = {OPERATORS} operators, {KERNEL}x{KERNEL} convolutions of "
            f"{CHANNELS} channels.",
            "",
            f"operations of a cell   DARTS, p n(n-3)/2        {n['darts']:4}",
            f"                       topology, n(n-3)/2       {n['topology']:4}",
            f"                       operators, 2(n-3)p       {n['operators']:4}",
            "",
            "topology search over DARTS                    parameters        FLOPs",
            f"  the formulas                               {self.param_ratio:11.4e}  {self.flop_ratio:11.4e}",
        ]
        for k in self.skip:
            a, b = self.skip[k], self.eight[k]
            lines += [
                f"  measured, k = {k}: skip only                {a.params:11,}  {a.macs:11,}",
                f"                   all eight operators      {b.params:11,}  {b.macs:11,}",
                f"                   ratio                    {a.params / b.params:11.3f}  {a.macs / b.macs:11.3f}",
            ]
        return "\n".join([*lines, "", _WHY])


_WHY = (
    "Why they differ: the formulas count one cell's edges, with vanilla 5x5 convolutions of 512 channels for every\n"
    "operator. The real super-networks (16 channels, 8 cells, 32x32 images, 10 classes) have separable convolutions,\n"
    "pools and skip connections, and both contain the stem, the 1x1 convolutions before each cell, FactorizedReduce\n"
    'on edges of stride 2, and the classifier. The paper\'s "by 5.3e7 and 1e5" are such factors, not differences;\n'
    f"the first is {float(1 / param_ratio(OPERATORS, KERNEL, CHANNELS)):.4g}."
)


def section3() -> Section3:
    """The paper's example and the counts of the networks as this package builds them."""
    return Section3(
        operations={
            "darts": darts_operations(STATES, OPERATORS),
            "topology": topology_operations(STATES),
            "operators": operator_operations(STATES, OPERATORS),
        },
        param_ratio=float(param_ratio(OPERATORS, KERNEL, CHANNELS)),
        flop_ratio=float(flop_ratio(OPERATORS, KERNEL, CHANNELS)),
        skip={k: measured(("skip_connect",), k) for k in (4, 1)},
        eight={k: measured(PRIMITIVES, k) for k in (4, 1)},
    )
