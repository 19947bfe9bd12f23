"""The network in which a genotype is trained for accuracy.

    stem, `cells` cells of which those at a third and at two thirds halve the image and double the channels,
    global average, linear classifier; in training an auxiliary head behind the second reduction.
    node = op_1(state) + op_2(state)

Batch norm is affine and keeps running statistics; pools have none. Source: DARTS, NetworkCIFAR and NetworkImageNet;
FTSO, Table 4.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from . import kernels
from .errors import UsageError
from .genotype import Edge, Genotype
from .operations import OPS, FactorizedReduce, Fused, Identity, ReLUConvBN, batch_norm, parts, separable
from .size import STEM_MULTIPLIER, Stem, check_network


def _affine(make: Callable[[int, int, bool], nn.Module], C: int, stride: int) -> nn.Module:
    return make(C, stride, True)


TRAINED_OPS: dict[str, Callable[[int, int], nn.Module]] = {
    **{name: partial(_affine, make) for name, make in OPS.items() if name != "none"},
    "max_pool_3x3": lambda C, stride: nn.MaxPool2d(3, stride, 1),
    "avg_pool_3x3": lambda C, stride: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "sep_conv_7x7": lambda C, stride: nn.Sequential(
        *separable(C, C, 7, stride, 1, True), *separable(C, C, 7, 1, 1, True)
    ),
    "conv_7x1_1x7": lambda C, stride: nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), (stride, 1), (3, 0), bias=False),
        trained_norm(C),
    ),
}
"""Operator name -> module of (C, stride) that keeps the channels, as a trained network has it."""


def trained_norm(channels: int) -> nn.BatchNorm2d:
    return batch_norm(channels, affine=True, running=True)


class TrainedCell(nn.Module):
    """Two states -> the concatenation of its nodes: (B, before, H, W), (B, now, H, W) -> (B, n C, H', W').

    halved: the older state is twice as high and wide as the newer one. reduction: H' is H/2, else H.
    """

    def __init__(
        self, nodes: Sequence[tuple[Edge, Edge]], concat: Sequence[int], C: int, before: int, now: int, halved: bool,
        reduction: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.preprocess0 = (FactorizedReduce if halved else ReLUConvBN)(before, C, True)
        self.preprocess1 = ReLUConvBN(now, C, True)
        edges = [edge for node in nodes for edge in node]
        self.names, self.states, self.concat = [op for op, _ in edges], [state for _, state in edges], list(concat)
        self.strides = [2 if reduction and state < 2 else 1 for state in self.states]
        self.ops = nn.ModuleList(TRAINED_OPS[op](C, s) for op, s in zip(self.names, self.strides, strict=True))
        self.n_drop_paths = sum(not isinstance(op, Identity) for op in self.ops)

    def forward(self, s0: Tensor, s1: Tensor, factors: Iterator[Tensor] | None) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        rounded = torch.is_autocast_enabled("cpu")
        differentiated = self.training or rounded or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not differentiated and factors is None and states[0].is_contiguous():
            return self._tested(states)
        ones = states[0].new_ones(1) if factors is None else states[0].new_ones(len(s0))
        for ops, inputs, names, strides in self._nodes(states):
            weights = None if factors is None else [ones if isinstance(op, Identity) else next(factors) for op in ops]
            if self.training and not rounded and all(isinstance(op, Identity | Fused | FactorizedReduce) for op in ops):
                own = [parts(op) for op in ops]
                tensors = [[t for part in own for t in part[i]] for i in range(3)]
                dropped = None if weights is None else torch.stack(weights)
                states.append(kernels.node_sum(inputs, names, strides, *tensors, dropped))
                continue
            terms = [op(x) for op, x in zip(ops, inputs, strict=True)]
            if weights is not None:
                terms = [h * w.view(-1, 1, 1, 1) for h, w in zip(terms, weights, strict=True)]
            states.append(terms[0] + terms[1])
        return torch.cat([states[i] for i in self.concat], 1)

    def _nodes(self, states: list[Tensor]) -> Iterator[tuple[list[nn.Module], list[Tensor], list[str], list[int]]]:
        """Of each node the operators, inputs, operators' names and strides; `states` grows meanwhile."""
        for first in range(0, len(self.states), 2):
            two = slice(first, first + 2)
            yield list(self.ops[two]), [states[i] for i in self.states[two]], self.names[two], self.strides[two]

    def _tested(self, states: list[Tensor]) -> Tensor:
        """Without gradients: each node is written where the concatenation wants it, its second operator adding."""
        places = dict[int, Tensor]()
        room = states[0]
        for ops, inputs, _, strides in self._nodes(states):
            B, C, H, W = inputs[0].shape
            node = B, C, -(-H // strides[0]), -(-W // strides[0])
            if not places:
                room = kernels.room(inputs[0], (B, C * len(self.concat), *node[2:]))
                places = dict(zip(self.concat, room.split(C, 1), strict=True))
            place = places[len(states)] if len(states) in places else kernels.room(inputs[0], node)
            total = None
            pairs = zip(ops, inputs, strict=True)
            for op, x in sorted(pairs, key=lambda pair: isinstance(pair[0], Fused | FactorizedReduce)):
                if isinstance(op, Fused | FactorizedReduce) and kernels.requested() != "reference":
                    op.into(x, place, total)
                    total = place
                else:
                    term = op(x)
                    total = term if total is None else torch.add(total, term, out=place)
            states.append(place)
        return room


class AuxiliaryHead(nn.Sequential):
    """(B, C, H, W), H and W at least 5 -> logits (B, classes): on 8x8 for CIFAR, 14x14 for ImageNet."""

    def __init__(self, C: int, classes: int, stem: Stem) -> None:
        cifar = stem == "cifar"
        super().__init__(
            nn.ReLU(),
            nn.AvgPool2d(5, 3 if cifar else 2, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False),
            trained_norm(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *((trained_norm(768),) if cifar else ()),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(768, classes),
        )


class Network(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes).

    H and W are divisible by 4 behind the stem "cifar", by 32 behind "imagenet". In training with auxiliary=True
    forward returns (logits, auxiliary logits). Weights are drawn from torch's global generator, as PyTorch's own
    modules start. Raises UsageError for what `size.network_size` refuses.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 36,
        cells: int = 20,
        classes: int = 10,
        stem: Stem = "cifar",
        auxiliary: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_network(genotype, channels, cells, classes, stem)
        if in_channels not in (1, 3):
            raise UsageError(f"in_channels: expected 1 or 3, got {in_channels!r}")
        self.genotype, self.in_channels, self.divisor = genotype, in_channels, 4 if stem == "cifar" else 32
        self.sizes = {
            "channels": channels,
            "cells": cells,
            "classes": classes,
            "stem": stem,
            "in_channels": in_channels,
        }
        if stem == "cifar":
            before = now = STEM_MULTIPLIER * channels
            self.stem = nn.Sequential(nn.Conv2d(in_channels, now, 3, padding=1, bias=False), trained_norm(now))
        else:
            before = now = channels
            half = channels // 2
            self.stem0 = nn.Sequential(
                nn.Conv2d(in_channels, half, 3, 2, 1, bias=False),
                trained_norm(half),
                nn.ReLU(),
                nn.Conv2d(half, channels, 3, 2, 1, bias=False),
                trained_norm(channels),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1, bias=False), trained_norm(channels)
            )
        C, halved = channels, stem == "imagenet"
        self.cells = nn.ModuleList()
        self.auxiliary_head: AuxiliaryHead | None = None
        self.auxiliary_at = 2 * cells // 3 if auxiliary else -1
        for i in range(cells):
            reduction = i in (cells // 3, 2 * cells // 3)
            C *= 2 if reduction else 1
            kind = "reduce" if reduction else "normal"
            concat = genotype.reduce_concat if reduction else genotype.normal_concat
            self.cells.append(TrainedCell(genotype.nodes(kind), concat, C, before, now, halved, reduction))
            before, now, halved = now, C * len(concat), reduction
            if i == self.auxiliary_at:
                self.auxiliary_head = AuxiliaryHead(now, classes, stem)
        self.classifier = nn.Linear(now, classes)
        self.n_drop_paths = sum(cell.n_drop_paths for cell in self.cells)  # type: ignore[misc]

    def forward(self, images: Tensor, drop_path: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """drop_path: (n_drop_paths, B): what each image's result of each operator but the identities is multiplied
        with, cell by cell, edge by edge: 0 or 1/(1 - p). None: nothing is dropped."""
        if images.dim() != 4 or images.shape[1] != self.in_channels or any(n % self.divisor for n in images.shape[2:]):
            raise UsageError(
                f"images: expected shape (B, {self.in_channels}, H, W) with H and W divisible by {self.divisor}, "
                f"got {tuple(images.shape)}"
            )
        if drop_path is not None and drop_path.shape != (self.n_drop_paths, len(images)):
            expected = self.n_drop_paths, len(images)
            raise UsageError(f"drop_path: expected shape {expected}, got {tuple(drop_path.shape)}")
        factors = None if drop_path is None else iter(drop_path)
        if self.divisor == 4:
            s0 = s1 = self.stem(images)
        else:
            s0 = self.stem0(images)
            s1 = self.stem1(s0)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, factors)
            if i == self.auxiliary_at and self.training:
                assert self.auxiliary_head is not None
                auxiliary = self.auxiliary_head(s1)
        logits = self.classifier(s1.mean((2, 3)))
        return logits if auxiliary is None else (logits, auxiliary)


def backend_of_networks() -> str:
    """The backend that computes them: the one asked for, or the fastest that can."""
    return kernels.requested() or next(b for b in ("cpu", "reference") if kernels.lacks(b) is None)
