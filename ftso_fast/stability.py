"""How much of a search's answer another seed would give again: agreement, consensus, and what decided."""

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from .genotype import N_INPUTS, Genotype
from .phase import Row
from .space import CELLS, Topology

SCHEMA = "ftso.stability/1"
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
class Agreement:
    """How often two searches agree: observed with its standard error (jackknife; None for two), and by chance."""

    observed: float
    error: float | None
    chance: float


@dataclass(frozen=True)
class Consensus:
    """Per node the most frequent pair. support: by cell type and node, the part of the searches that found it; whole:
    the part that found the whole of it."""

    genotype: Genotype
    support: dict[str, Row]
    whole: float


@dataclass(frozen=True)
class Stability:
    """Many searches that differ in their seeds alone.

    seconds: summed over the searches by part, and the wall time of all, reading and set-up included. processes: how
    many shared the work.
    """

    trials: tuple[Trial, ...]
    mode: str
    method: str
    operators: str
    replace: str | None
    k: int
    beta_init: str
    arch_lr: float
    batch_size: int | None
    iterations: int
    backend: str
    isa: str | None
    processes: int
    seconds: dict[str, float]
    source: str

    @property
    def agreement(self) -> dict[str, Agreement]:
        """By "normal 3" (node 3 of the normal cell) ..., "normal", "reduce" (whole cells) and "both"."""
        found: dict[str, Agreement] = {}
        cells: dict[str, float] = {}
        for cell in CELLS:
            nodes = range(len(self.trials[0].topology[cell]))
            chances = [1 / math.comb(N_INPUTS + n, N_INPUTS) for n in nodes]
            for n in nodes[1:]:
                found[f"{cell} {n + N_INPUTS}"] = agreement([t.topology[cell][n] for t in self.trials], chances[n])
            cells[cell] = math.prod(chances)
        for cell in CELLS:
            found[cell] = agreement([t.topology[cell] for t in self.trials], cells[cell])
        both = [tuple(t.topology[cell] for cell in CELLS) for t in self.trials]
        return found | {"both": agreement(both, math.prod(cells.values()))}

    @property
    def changed(self) -> dict[str, Row]:
        """By cell type and node, the part of the searches whose pair is not the start's."""
        return {
            cell: tuple(
                fmean(t.start[cell][n] != t.topology[cell][n] for t in self.trials)
                for n in range(len(self.trials[0].topology[cell]))
            )
            for cell in CELLS
        }

    @property
    def edges(self) -> dict[str, tuple[Row, ...]]:
        """By cell type, node and predecessor, the part of the searches that kept the edge."""
        return {
            cell: tuple(
                tuple(fmean(state in t.topology[cell][n] for t in self.trials) for state in range(n + N_INPUTS))
                for n in range(len(self.trials[0].topology[cell]))
            )
            for cell in CELLS
        }

    @property
    def topologies(self) -> dict[str, tuple[tuple[Topology, int], ...]]:
        """By cell type, every topology found and how often, the most frequent first."""
        counts = {cell: Counter(t.topology[cell] for t in self.trials) for cell in CELLS}
        return {cell: tuple(sorted(c.items(), key=lambda found: (-found[1], found[0]))) for cell, c in counts.items()}

    @property
    def consensus(self) -> Consensus:
        """Ties go to the lower states and the earlier name."""
        kept: dict[str, list[tuple[int, ...]]] = {cell: [] for cell in CELLS}
        support: dict[str, Row] = {}
        for cell in CELLS:
            for n in range(len(self.trials[0].topology[cell])):
                kept[cell].append(_most([t.topology[cell][n] for t in self.trials]))
            shares = ([t.topology[cell][n] == pair for t in self.trials] for n, pair in enumerate(kept[cell]))
            support[cell] = tuple(map(fmean, shares))
        whole = fmean(all(t.topology[cell] == tuple(kept[cell]) for cell in CELLS) for t in self.trials)
        fields: list[Any] = []
        for cell in CELLS:
            edges = [(self._operator(cell, n, s), s) for n, pair in enumerate(kept[cell]) for s in pair]
            fields += [edges, range(N_INPUTS, N_INPUTS + len(kept[cell]))]
        return Consensus(Genotype(*fields), support, whole)

    def _operator(self, cell: str, n: int, state: int) -> str:
        """The operator found most often for an edge, among the searches that kept it."""
        if self.replace is not None:
            return self.replace
        having = [t for t in self.trials if state in t.topology[cell][n]]
        return str(_most([t.operators[cell][n][t.topology[cell][n].index(state)] for t in having]))

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of these searches, every one of them included."""
        own = asdict(self)
        consensus = self.consensus
        return {
            "schema": SCHEMA,
            **{name: value for name, value in own.items() if name != "trials"},
            "seeds": len(self.trials),
            "agreement": {name: asdict(a) for name, a in self.agreement.items()},
            "changed_from_start": self.changed,
            "edges": self.edges,
            "topologies": self.topologies,
            "consensus": asdict(consensus) | {"genotype": consensus.genotype.to_dict()},
            "trials": own["trials"],
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())

    def draw(self, path: str | PathLike[str]) -> None:
        """Write how often every edge was kept to `path` as SVG."""
        from .draw_stability import draw_stability

        Path(path).write_text(draw_stability([self]), encoding="utf-8", newline="\n")

    def __str__(self) -> str:
        from .text_stability import describe

        return describe(self)


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


@dataclass(frozen=True)
class Study:
    """A search's stability from the paper's random start, from equal edges, and what the first is decided by."""

    random: Stability
    zeros: Stability | None
    split: Split | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `ftso stability --json`."""
        return {
            **self.random.to_dict(),
            "zeros": None if self.zeros is None else self.zeros.to_dict(),
            "split": None if self.split is None else self.split.to_dict(),
        }

    def __str__(self) -> str:
        from .text_stability import describe_study

        return describe_study(self)


def agreement(found: Sequence[Hashable], chance: float) -> Agreement:
    """The part of all pairs that are equal, sum c(c - 1) / n(n - 1) over the counts c of n values."""
    n, counts = len(found), Counter(found)
    equal = sum(c * (c - 1) for c in counts.values())
    observed = equal / (n * (n - 1))
    if n < 3:
        return Agreement(observed, None, chance)
    without = [(equal - 2 * (counts[value] - 1)) / ((n - 1) * (n - 2)) for value in found]
    mean = fmean(without)
    error = math.sqrt((n - 1) / n * sum((a - mean) ** 2 for a in without))
    return Agreement(observed, error, chance)


def _most(values: Sequence[Any]) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


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
