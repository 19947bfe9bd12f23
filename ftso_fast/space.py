"""The search space of the topology super-network: how many nodes, which operators, what replaces them."""

from __future__ import annotations

from dataclasses import dataclass

from .genotype import N_INPUTS, REPLACEMENTS


@dataclass(frozen=True)
class SearchSpace:
    """One cell search space: `n_nodes` nodes, each reading every earlier state through `operators`.

    `operators` are those of the topology super-network; `replacements` are those that may stand on the edges
    which the search kept (section 3.3 and Fig. 3e of the FTSO paper).
    """

    name: str
    n_nodes: int = 4
    operators: tuple[str, ...] = ("skip_connect",)
    replacements: tuple[str, ...] = REPLACEMENTS

    @property
    def n_edges(self) -> int:
        """Edges of one cell before pruning: 2 + 3 + ... + (n_nodes + 1), 14 for four nodes."""
        return sum(range(N_INPUTS, N_INPUTS + self.n_nodes))


DARTS = SearchSpace(name="darts")
