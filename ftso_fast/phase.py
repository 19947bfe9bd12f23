"""What the search of one super-network left behind, and what follows from it: kept edges and chosen operators."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .genotype import N_INPUTS, derive_topology, margins
from .space import CELLS, Topology

Row = tuple[float, ...]


@dataclass(frozen=True)
class Betas:
    """One cell type's edge parameters: drawn, as the search left them, and the last gradient that moved them.

    Flat, node after node over its predecessors: node 2 from (0, 1), node 3 from (0, 1, 2), ...
    """

    before: Row
    after: Row
    gradient: Row


@dataclass(frozen=True)
class Alphas:
    """One cell type's operator parameters, likewise: a row for each edge, a column for each operator."""

    before: tuple[Row, ...]
    after: tuple[Row, ...]
    gradient: tuple[Row, ...]


@dataclass(frozen=True)
class Rounding:
    """What a precision below float32 did to the first architecture step's gradients.

    gradient_error: largest difference from float32's, as a part of the largest of those. sign_flips: parameters, of
    all, that the step would have moved the other way.
    """

    gradient_error: float
    sign_flips: int


class Choice(NamedTuple):
    """An operator that the search chose for the edge from `state`; margin: best minus second best alpha."""

    operator: str
    state: int
    margin: float | None


def edge_scores(
    betas: Sequence[float] | None, alphas: Sequence[Sequence[float]] | None, operators: Sequence[str]
) -> list[float]:
    """Per edge ln(softmax(beta) * max over o != none of softmax(alpha)_o), plus a number that its node shares.

    That is beta + max ln softmax(alpha). Either may be None: edges that are not weighted, operators that are not (one
    of them, or to be left out). Source: PC-DARTS, section 3.2; with alphas alone DARTS, section 2.4; with betas alone
    FTSO, algorithm 1.
    """
    edges = [0.0] * len(alphas or ()) if betas is None else betas
    if alphas is None:
        return list(edges)
    candidates = [o for o, name in enumerate(operators) if name != "none"]
    return [beta + max(row[o] for o in candidates) - _log_sum_exp(row) for beta, row in zip(edges, alphas, strict=True)]


def strongest(row: Sequence[float], operators: Sequence[str]) -> tuple[str, float | None]:
    """The operator of the largest alpha, none excluded, ties to the first; and by how much (None: no other)."""
    candidates = [o for o, name in enumerate(operators) if name != "none"]
    ranked = sorted(candidates, key=lambda o: -row[o])
    return operators[ranked[0]], row[ranked[0]] - row[ranked[1]] if len(ranked) > 1 else None


def _log_sum_exp(row: Sequence[float]) -> float:
    largest = max(row)
    return largest + math.log(sum(math.exp(a - largest) for a in row))


@dataclass(frozen=True)
class Phase:
    """The search of one super-network.

    inputs: by cell type, the states that each of its nodes read. betas, alphas: by cell type; empty where edges were
    not weighted, or where there was one operator. losses: (architecture, weight) cross entropies in nats. beta_only:
    edges are ranked by their betas, whatever their operators. eigenvalues, stopped_at: of DARTS-ES, the dominant one
    after each epoch, and the epoch (from 0) whose architecture was taken back. kernel_calls: compiled kernels that
    ran, how often.
    """

    mode: str
    operators: tuple[str, ...]
    inputs: dict[str, Topology]
    betas: dict[str, Betas]
    alphas: dict[str, Alphas]
    beta_only: bool
    iterations: int
    weight_steps: int
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    seconds: dict[str, float]
    kernel_calls: dict[str, int]
    eigenvalues: tuple[float, ...] = ()
    stopped_at: int | None = None

    @property
    def backend(self) -> str:
        """Who computed: of the kernels that ran the fastest backend's name, "reference" where none did."""
        ran = {name.split("/")[1] for name in self.kernel_calls}
        return next((name for name in ("cuda", "triton") if name in ran), "cpu" if ran else "reference")

    def scores(self, cell: str, before: bool = False) -> list[float]:
        """`edge_scores` of a cell that reads every earlier state, after the search or before it."""
        betas, alphas = self.betas.get(cell), None if self.beta_only else self.alphas.get(cell)
        return edge_scores(
            None if betas is None else betas.before if before else betas.after,
            None if alphas is None else alphas.before if before else alphas.after,
            self.operators,
        )

    def topology(self, cell: str, before: bool = False) -> Topology:
        """Per node the two predecessors of the highest scores, higher first.

        Where all betas started at zero, equal scores go to the edge that the last gradient would raise the most.
        """
        betas = self.betas.get(cell)
        level = betas is not None and not before and not any(betas.before)
        ties = [-g for g in betas.gradient] if betas is not None and level else None
        return derive_topology(self.scores(cell, before), len(self.inputs[cell]), ties)

    def changed(self, cell: str) -> tuple[int, ...]:
        """The nodes (2..5) whose two inputs are not those that the random start would have given."""
        pairs = zip(self.topology(cell, before=True), self.topology(cell), strict=True)
        return tuple(node for node, (a, b) in enumerate(pairs, N_INPUTS) if set(a) != set(b))

    def margins(self, cell: str) -> tuple[float | None, ...]:
        """Per node the second highest score minus the third; None where there are two."""
        return margins(self.scores(cell), len(self.inputs[cell]))

    def choices(self, cell: str, topology: Topology, before: bool = False) -> tuple[Choice, ...]:
        """The strongest operator of every edge of `topology`, in its order; empty where there is one operator."""
        if cell not in self.alphas:
            return ()
        rows = iter(self.alphas[cell].before if before else self.alphas[cell].after)
        found = []
        for states, kept in zip(self.inputs[cell], topology, strict=True):
            row = dict(zip(states, rows, strict=False))
            found += [
                Choice(operator, state, margin)
                for state in kept
                for operator, margin in [strongest(row[state], self.operators)]
            ]
        return tuple(found)

    def operators_changed(self, topology: dict[str, Topology]) -> int:
        """On how many edges of `topology` the random start would have chosen another operator."""
        return sum(
            a.operator != b.operator
            for cell in CELLS
            for a, b in zip(
                self.choices(cell, topology[cell]), self.choices(cell, topology[cell], before=True), strict=True
            )
        )
