"""What decides a search's answer: the sums of squares of a crossed design, one search for each combination."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean
from typing import Any

from .genotype import N_INPUTS
from .phase import Row
from .space import CELLS, Topology

FACTORS = ("betas", "weights", "data")
"""What a seed decides: the start of the architecture parameters, that of the weights, and which images come when."""


@dataclass(frozen=True)
class Trial:
    """One of many searches. start, topology: by cell type the kept predecessors, ascending, as the start would have
    had them and as they were found; operators: of those edges, empty where all are `replace`; before, after: scores
    of the edges (betas, where there is one operator)."""

    seed: int
    start: dict[str, Topology]
    topology: dict[str, Topology]
    operators: dict[str, tuple[tuple[str, ...], ...]]
    before: dict[str, Row]
    after: dict[str, Row]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Trial":
        """The trial whose JSON this is."""
        return cls(fields["seed"], *({c: _tuples(v) for c, v in fields[name].items()} for name in _BY_CELL))


_BY_CELL = ("start", "topology", "operators", "before", "after")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Split:
    """What decides the answer: `levels` starts of each of FACTORS, all combined, so levels^3 searches.

    values, moves: by factor the part of the sum of squares that it explains alone, of the betas that were found and
    of how far they moved (each less its node's mean, which the softmax ignores), with what only combinations explain.
    agreement: by factor, how often two searches that differ in it alone keep the same pair, over the free nodes.
    """

    levels: int
    values: dict[str, float]
    moves: dict[str, float]
    agreement: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return asdict(self)


def split(trials: Mapping[tuple[int, int, int], Trial], levels: int) -> Split:
    """The split of `trials`, one for each (betas, weights, data) of the crossed design."""
    free = [(cell, n) for cell in CELLS for n in range(1, len(trials[0, 0, 0].topology[cell]))]
    agreeing = {}
    for f, factor in enumerate(FACTORS):
        pairs = [(a, b) for a, b in product(trials, repeat=2) if a[f] < b[f] and _else(a, f) == _else(b, f)]
        same = (trials[a].topology[c][n] == trials[b].topology[c][n] for a, b in pairs for c, n in free)
        agreeing[factor] = fmean(same)
    ends = {at: _centred(t.after) for at, t in trials.items()}
    starts = {at: _centred(t.before) for at, t in trials.items()}
    moved = {at: [x - y for x, y in zip(ends[at], starts[at], strict=True)] for at in trials}
    return Split(levels, _explained(ends, levels), _explained(moved, levels), agreeing)


def _else(at: tuple[int, int, int], f: int) -> tuple[int, ...]:
    return at[:f] + at[f + 1 :]


def _centred(scores: Mapping[str, Row]) -> list[float]:
    """All scores of a search, each less the mean of its node."""
    found: list[float] = []
    for cell in CELLS:
        at, size = 0, N_INPUTS
        while at < len(scores[cell]):
            group = scores[cell][at : at + size]
            found += [score - fmean(group) for score in group]
            at, size = at + size, size + 1
    return found


def _explained(values: Mapping[tuple[int, int, int], Sequence[float]], levels: int) -> dict[str, float]:
    """By factor sum (mean over it - mean)^2 / sum (value - mean)^2, sums over searches and values; and the rest."""
    rows = list(values.values())
    means = [fmean(column) for column in zip(*rows, strict=True)]
    total = sum((x - m) ** 2 for row in rows for x, m in zip(row, means, strict=True))
    found = {}
    for f, factor in enumerate(FACTORS):
        squares = 0.0
        for level in range(levels):
            own = [row for at, row in values.items() if at[f] == level]
            ms = [fmean(column) for column in zip(*own, strict=True)]
            squares += len(own) * sum((a - b) ** 2 for a, b in zip(ms, means, strict=True))
        found[factor] = squares / total if total else 0.0
    return found | {"combinations": max(0.0, 1 - sum(found.values()))}
