"""Architectures of NAS-Bench-201 (the topology space of NATS-Bench): the value, its text, its size, its equals.

A cell has its input, state 0, and three nodes, states 1 to 3; each node sums all earlier states through an operator
of its own, and node 3 is the output. Edges are numbered 0->1, 0->2, 1->2, 0->3, 1->3, 2->3. Source: Dong & Yang,
NAS-Bench-201, 2020.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

from .errors import UsageError
from .space import NATS_BENCH

OPERATORS = NATS_BENCH.operators
EDGES = tuple((state, node) for node, states in enumerate(NATS_BENCH.full, 1) for state in states)
_FORM = "'|OP~0|+|OP~0|OP~1|+|OP~0|OP~1|OP~2|'"
_STAGES, _CELLS = (16, 32, 64), 5
_KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}


@dataclass(frozen=True)
class Architecture:
    """The operators of a cell's six edges; `str` is NAS-Bench-201's text. Raises UsageError for anything else."""

    operators: tuple[str, ...]

    def __post_init__(self) -> None:
        legal = isinstance(self.operators, tuple) and len(self.operators) == len(EDGES)
        if not legal or not set(self.operators) <= set(OPERATORS):
            raise UsageError(f"architecture: expected six of {', '.join(OPERATORS)}, got {self.operators!r}")

    @classmethod
    def from_text(cls, text: str) -> "Architecture":
        """Read '|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...'; nothing is evaluated. Raises UsageError."""
        if not isinstance(text, str) or len(text) > 256:
            raise UsageError(f"architecture: expected a text of the form {_FORM}, got {str(text)[:40]!r}")
        found: list[str] = []
        nodes = text.strip().split("+")
        for number, node in enumerate(nodes):
            edges = re.findall(r"([a-z0-9_]+)~([0-9])\|", node)
            if node != "|" + "".join(f"{op}~{state}|" for op, state in edges):
                raise UsageError(f"architecture: expected the form {_FORM}, got {node[:60]!r} for node {number + 1}")
            if [int(state) for _, state in edges] != list(range(number + 1)):
                raise UsageError(f"architecture: expected node {number + 1} to read 0 to {number}, got {node[:60]!r}")
            found += [op for op, _ in edges]
        return cls(tuple(found))

    def __str__(self) -> str:
        rest = iter(self.operators)
        return "+".join("|" + "".join(f"{next(rest)}~{state}|" for state in states) for states in NATS_BENCH.full)

    @property
    def isomorphism(self) -> str:
        """Equal for cells that the benchmark counts as one: skip connections are followed, an edge that is none or
        reads one is '#', sums are unordered. 6,466 differ."""
        rest = iter(self.operators)
        states = ["0"]
        for sources in NATS_BENCH.full:
            terms = []
            for source in sources:
                operator, read = next(rest), states[source]
                zero = operator == "none" or read == "#"
                terms.append("#" if zero else read if operator == "skip_connect" else f"({read})@{operator}")
            states.append("+".join(sorted(terms)))
        return states[-1]

    @property
    def function(self) -> tuple[str, ...]:
        """The terms of the sum that the cell computes, equal for equal functions: zeros are dropped too. 4,930 differ;
        empty: the cell is zero."""
        rest = iter(self.operators)
        states: list[tuple[str, ...]] = [("x",)]
        for sources in NATS_BENCH.full:
            terms: list[str] = []
            for source in sources:
                operator, read = next(rest), states[source]
                if operator != "none" and read:
                    terms += read if operator == "skip_connect" else [f"{operator}({'+'.join(read)})"]
            states.append(tuple(sorted(terms)))
        return states[-1]

    def params(self, classes: int = 10) -> int:
        """Trainable numbers of the network that the benchmark trained: 16 to 64 channels, 15 cells."""
        own = sum(_CELLS * sum(k * k * C * C + 2 * C for k in self._kernels()) for C in _STAGES)
        stem = 3 * _STAGES[0] * 9 + 2 * _STAGES[0]
        between = sum(a * b * 9 + 2 * b + b * b * 9 + 2 * b + a * b for a, b in pairwise(_STAGES))
        return own + stem + between + 2 * _STAGES[-1] + (_STAGES[-1] + 1) * classes

    def macs(self, size: int = 32, classes: int = 10) -> int:
        """Multiply-adds of its convolutions and linear layer on one image of size x size."""
        sides = [size >> i for i in range(len(_STAGES))]
        own = sum(_CELLS * k * k * C * C * n * n for k in self._kernels() for C, n in zip(_STAGES, sides, strict=True))
        between = sum(
            n * n * (a * b * 9 + b * b * 9 + a * b) for a, b, n in zip(_STAGES, _STAGES[1:], sides[1:], strict=False)
        )
        return own + 3 * _STAGES[0] * 9 * size * size + between + _STAGES[-1] * classes

    def _kernels(self) -> list[int]:
        return [_KERNELS[op] for op in self.operators if op in _KERNELS]


def architectures() -> Iterator[Architecture]:
    """All 15,625, in the order of their operators (not the benchmark's numbers, which only its table knows)."""
    return map(Architecture, product(OPERATORS, repeat=len(EDGES)))
