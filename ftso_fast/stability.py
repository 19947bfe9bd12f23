"""How much of a search's answer another seed would give again: agreement, consensus, and what decided."""

import json
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from .crossed import Split, Trial
from .genotype import N_INPUTS, Genotype
from .phase import Row
from .space import CELLS, Topology

SCHEMA = "ftso.stability/1"


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
