"""The super-network of every search: PC-DARTS' network over any set of operators (FTSO, section 3.2).

Edge weights: one vector of 14 betas for all normal cells and one for all reduction cells; an edge weighs its
softmax among the edges of its node. Operator weights: one row of alphas for each edge, under a softmax of their own.
Partial channels: an operator sees the first 1/k of the channels, the rest bypasses it, a channel shuffle mixes both
(PC-DARTS, section 3.1). With the skip connection alone an edge of stride 1 then is the shuffle, so a normal cell is
one operation (`kernels.skip_cell`); at stride 2 it is a FactorizedReduce of its own per edge beside a max-pooled
bypass. These modules are the definition; in float32 the compiled chain of `kernels.skip_net` computes the same, on the
cpu and on GPUs. Other sets of operators: `mixed.MixedCell`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels
from .errors import UsageError
from .genotype import N_INPUTS
from .kernels import NetSpec, cannot, channel_shuffle, choose, skip_cell, skip_net
from .mixed import MixedCell
from .operations import FactorizedReduce, ReLUConvBN, batch_norm, places_of, present
from .space import CELLS, DARTS, SearchSpace, Topology

SPREAD = 1e-3
"""Deviation of the architecture parameters' random start."""


class Cell(nn.Module):
    """Four nodes over two inputs; (B, c_prev_prev, ...), (B, c_prev, H, W) -> (B, 4C, H, W), halved in a reduction.

    Parameters, in PC-DARTS' order: preprocess0, preprocess1, then (reduction cell) one FactorizedReduce for each
    of the eight edges that start at an input.
    """

    def __init__(
        self,
        c_prev_prev: int,
        c_prev: int,
        C: int,
        k: int,
        reduction: bool,
        reduction_prev: bool,
        n_nodes: int,
    ) -> None:
        super().__init__()
        self.k, self.n_nodes, self.reduction = k, n_nodes, reduction
        before = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = before(c_prev_prev, C)
        self.preprocess1 = ReLUConvBN(c_prev, C)
        n_strided = 2 * n_nodes if reduction else 0
        self.edges = nn.ModuleList(FactorizedReduce(C // k, C // k) for _ in range(n_strided))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        x0, x1 = self.preprocess0(s0), self.preprocess1(s1)
        return self._reduce(x0, x1, weights) if self.reduction else skip_cell(x0, x1, weights, self.k)

    def _reduce(self, x0: Tensor, x1: Tensor, weights: Tensor) -> Tensor:
        processed = x0.shape[1] // self.k
        inputs = (x0[:, :processed], x1[:, :processed])
        # the bypass of an input is the same on all its edges, so it is pooled once
        bypass = [F.max_pool2d(x[:, processed:], 2) for x in (x0, x1)] if self.k > 1 else []
        states: list[Tensor] = []
        at = 0
        for node in range(self.n_nodes):
            w = weights[at : at + 2 + node]
            at += 2 + node
            total = w[0] * self.edges[2 * node](inputs[0]) + w[1] * self.edges[2 * node + 1](inputs[1])
            if bypass:
                total = torch.cat((total, w[0] * bypass[0] + w[1] * bypass[1]), 1)
            for i, x in enumerate(states, 2):
                total = total + w[i] * x
            states.append(channel_shuffle(total, self.k))
        return torch.cat(states, 1)


class SuperNet(nn.Module):
    """Images (B, in_channels, H, W), H and W divisible by 4, to logits (B, classes).

    Stem, `layers` cells of which those at layers//3 and 2*layers//3 halve the image and double the channels,
    mean over the image, linear classifier. `topology`: the states that each node of a cell reads; None: all earlier
    ones. `weighted_edges`: without, every edge weighs 1 (DARTS) and there are no betas.

    `alphas_normal`, `alphas_reduce` (edges, operators) and `betas_normal`, `betas_reduce` (edges,), float64, 1e-3
    times a standard normal draw, are outside `parameters()`; None where there is nothing to choose: no alphas with
    one operator. Always normalises by the batch's own statistics. Random numbers come from torch's global generator:
    weights, alphas, betas. `precision`: what the cpu backend multiplies in (`kernels.PRECISIONS`); anything but
    "float32" is for the skip-only network there.

    Raises UsageError where k does not divide the channels, a size is not positive, or the topology is none.
    Source: FTSO section 3.2 and Table 4; PC-DARTS, section 3; DARTS, section 2.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 16,
        layers: int = 8,
        k: int = 4,
        in_channels: int = 3,
        space: SearchSpace = DARTS,
        topology: Mapping[str, Topology] | None = None,
        weighted_edges: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(classes, channels, layers, k, in_channels)
        self.space, self.topology = space, _checked(topology, space)
        self.skip_only = space.operators == ("skip_connect",) and topology is None and weighted_edges
        self.spec = NetSpec(channels, layers, k)
        self.in_channels = in_channels
        self.precision = "float32"
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 3 * channels, 3, padding=1, bias=False),
            batch_norm(3 * channels, affine=True),
        )
        c_prev_prev, c_prev, C = 3 * channels, 3 * channels, channels
        self.cells = nn.ModuleList()
        reduction_prev = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C *= 1 + reduction
            self.cells.append(self._cell(c_prev_prev, c_prev, C, reduction, reduction_prev))
            reduction_prev = reduction
            c_prev_prev, c_prev = c_prev, space.n_nodes * C
        self.classifier = nn.Linear(c_prev, classes)
        self._table: tuple[Tensor, Tensor, Tensor] | None = None
        self._places = places_of(self)
        edges = [sum(map(len, self.topology[cell])) for cell in CELLS]
        n = len(space.operators)
        self.alphas_normal, self.alphas_reduce = (start(e, n) if n > 1 else None for e in edges)
        self.betas_normal, self.betas_reduce = (start(e) if weighted_edges else None for e in edges)

    def _cell(self, c_prev_prev: int, c_prev: int, C: int, reduction: bool, reduction_prev: bool) -> nn.Module:
        k, space = self.spec.k, self.space
        if self.skip_only:
            return Cell(c_prev_prev, c_prev, C, k, reduction, reduction_prev, space.n_nodes)
        inputs = self.topology[CELLS[reduction]]
        return MixedCell(c_prev_prev, c_prev, C, k, reduction, reduction_prev, inputs, space.operators)

    def restart(self) -> None:
        """Draw weights, alphas and betas again, in the order in which a new network draws them."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                    module.reset_parameters()
            for drawn in (*self.alphas(), *self.betas()):
                drawn.copy_(start(*drawn.shape))

    def betas(self) -> tuple[Tensor, ...]:
        """The edges' parameters: normal, reduce; empty where edges are not weighted."""
        return tuple(t for t in (self.betas_normal, self.betas_reduce) if t is not None)

    def alphas(self) -> tuple[Tensor, ...]:
        """The operators' parameters: normal, reduce; empty where there is one operator."""
        return tuple(t for t in (self.alphas_normal, self.alphas_reduce) if t is not None)

    def arch_parameters(self) -> list[Tensor]:
        """All that an architecture step moves: betas, then alphas."""
        return [*self.betas(), *self.alphas()]

    def weights(self) -> list[Tensor]:
        """`parameters()` without its walk through all modules, which every step would take twice."""
        return present(self._places)

    def edge_weights(self, betas: Tensor) -> Tensor:
        """Softmax of a flat beta vector over the edges of each node."""
        bounds = [0]
        for node in self.topology["normal"]:
            bounds.append(bounds[-1] + len(node))
        return torch.cat([betas[a:b].softmax(0) for a, b in pairwise(bounds)])

    def _edges_together(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """`edge_weights` of both cells in few launches: a row of a table for each node, -inf behind its edges."""
        betas = self.betas()
        device = betas[0].device
        sizes = [len(node) for cell in CELLS for node in self.topology[cell]]
        widest = max(sizes)
        if self._table is None or self._table[0].device != device:
            at = 0
            rows: list[int] = []
            back: list[int] = []
            for row, size in enumerate(sizes):
                rows += [*range(at, at + size), *[sum(sizes)] * (widest - size)]
                back += range(row * widest, row * widest + size)
                at += size
            self._table = (
                torch.tensor(rows, device=device),
                torch.tensor(back, device=device),
                betas[0].new_full((1,), -torch.inf),
            )
        rows_of, back_from, nothing = self._table
        table = torch.cat([*betas, nothing]).index_select(0, rows_of).view(-1, widest)
        flat = table.softmax(1).view(-1).index_select(0, back_from)
        return flat.to(dtype).split([len(b) for b in betas])

    def on(self, device: torch.device) -> "SuperNet":
        """Move weights and architecture parameters."""
        self.to(device)
        for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"):
            if (t := getattr(self, name)) is not None:
                setattr(self, name, t.detach().to(device).requires_grad_())
        return self

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_channels or images.shape[2] % 4 or images.shape[3] % 4:
            raise UsageError(
                f"images: expected shape (B, {self.in_channels}, H, W) with H and W divisible by 4, "
                f"got {tuple(images.shape)}"
            )
        if not self.skip_only:
            return self._mixed(images)
        table = {name: partial(self._fused, name) for name in ("cuda", "triton", "cpu")}
        reasons = cannot(images, self.spec)
        network = choose("super-network", {**table, "reference": self._textbook}, images, reasons)
        if self.precision != "float32" and network is not table["cpu"]:
            reason = reasons["cpu"] or "it was not chosen"
            raise UsageError(f"precision: {self.precision} needs the cpu backend, which does not run here: {reason}")
        on_cpu = network is table["cpu"] or network == self._textbook
        edges = map(self.edge_weights, self.betas()) if on_cpu else self._edges_together(images.dtype)
        normal, reduce = (e.to(images.dtype) for e in edges)
        return network(images, normal, reduce)

    def kernels_for(self, images: Tensor) -> str:
        """The backend whose chain computes the network on such images; "reference": cell after cell."""
        if not self.skip_only:
            return "reference"
        table: Mapping[str, Any] = dict(zip(kernels.BACKENDS, kernels.BACKENDS, strict=True))
        return str(choose("super-network", table, images, cannot(images, self.spec)))

    def _textbook(self, images: Tensor, normal: Tensor, reduce: Tensor) -> Tensor:
        """The definition, cell after cell; differentiable as often as wanted."""
        return self._chain(images, (normal,), (reduce,))

    def _fused(self, backend: str, images: Tensor, normal: Tensor, reduce: Tensor) -> Tensor:
        """The same by the compiled chain of stages."""
        return skip_net(images, normal, reduce, self.weights(), self.spec, self.precision, backend)

    def _mixed(self, images: Tensor) -> Tensor:
        """Any operators, cell after cell."""
        if self.precision != "float32":
            raise UsageError(f"precision: expected float32 for any network but the skip-only one, got {self.precision}")
        edges: list[Tensor] = [self.edge_weights(b).to(images.dtype) for b in self.betas()]
        operators: list[Tensor] = [a.softmax(1).to(images.dtype) for a in self.alphas()]
        counts = [sum(map(len, self.topology[cell])) for cell in CELLS]
        edges = edges or [images.new_ones(n) for n in counts]
        operators = operators or [images.new_ones(n, 1) for n in counts]
        return self._chain(images, (edges[0], operators[0]), (edges[1], operators[1]))

    def _chain(self, images: Tensor, normal: tuple[Tensor, ...], reduce: tuple[Tensor, ...]) -> Tensor:
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, *(reduce if cell.reduction else normal))
        return self.classifier(s1.mean((2, 3)))

    @contextmanager
    def only_arch(self) -> Iterator[None]:
        """Within the block weights ask for no gradient: an architecture step then computes none."""
        yield from without_gradient(self.weights())

    @contextmanager
    def only_weights(self) -> Iterator[None]:
        """Within the block betas and alphas ask for no gradient: a weight step then computes none."""
        yield from without_gradient(self.arch_parameters())


def _check_sizes(classes: int, channels: int, layers: int, k: int, in_channels: int) -> None:
    for name, value in (("classes", classes), ("channels", channels), ("layers", layers), ("k", k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}: expected a positive whole number, got {value!r}")
    if channels % k:
        raise UsageError(f"k: expected a divisor of the {channels} channels (1/k of them are processed), got {k}")
    if in_channels not in (1, 3):
        raise UsageError(f"in_channels: expected 1 (grey) or 3 (colour), got {in_channels!r}")


def _checked(topology: Mapping[str, Topology] | None, space: SearchSpace) -> dict[str, Topology]:
    """Both cells' predecessors, ascending."""
    if topology is None:
        return dict.fromkeys(CELLS, space.full)
    if set(topology) != set(CELLS):
        raise UsageError(f"topology: expected the cells {' and '.join(CELLS)}, got {sorted(topology)}")
    for cell, nodes in topology.items():
        legal = len(nodes) == space.n_nodes and all(
            len(set(node)) == len(node) == N_INPUTS and set(node) <= set(range(N_INPUTS + n))
            for n, node in enumerate(nodes)
        )
        if not legal:
            raise UsageError(
                f"topology of {cell}: expected two different earlier states for each of {space.n_nodes} nodes, "
                f"got {nodes!r}"
            )
    return {cell: tuple(tuple(sorted(node)) for node in topology[cell]) for cell in CELLS}


def start(*shape: int) -> Tensor:
    return (SPREAD * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def without_gradient(tensors: list[Tensor]) -> Iterator[None]:
    wanted = [t.requires_grad for t in tensors]
    for t in tensors:
        t.requires_grad_(False)
    try:
        yield
    finally:
        for t, flag in zip(tensors, wanted, strict=True):
            t.requires_grad_(flag)
