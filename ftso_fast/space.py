"""The search space of the super-networks: how many nodes, which operators, what replaces them."""

from __future__ import annotations

from dataclasses import dataclass

from .genotype import N_INPUTS, PRIMITIVES, REPLACEMENTS

CELLS = ("normal", "reduce")
Topology = tuple[tuple[int, ...], ...]
"""Per node of a cell, the states that it reads (0, 1: the cell's inputs; 2..5: nodes)."""


def _in_order(*operators: str) -> tuple[str, ...]:
    return tuple(name for name in PRIMITIVES if name in operators)


OPERATOR_SETS = {
    "skip": ("skip_connect",),
    "max_pool": ("max_pool_3x3",),
    "sep3": ("sep_conv_3x3",),
    "3op": _in_order("max_pool_3x3", "skip_connect", "none"),
    "4op": _in_order("sep_conv_3x3", "max_pool_3x3", "skip_connect", "none"),
}
"""What the topology search may put on every edge (FTSO, Table 3), in the order of PRIMITIVES."""


@dataclass(frozen=True)
class SearchSpace:
    """One cell search space: `n_nodes` nodes, each reading every earlier state through `operators`, `n_inputs` inputs
    first. `cells`: the cell types; `keeps_all`: no edge is pruned.

    `operators` are those of the topology super-network; `replacements` are those that may stand on the edges
    which the search kept (section 3.3 and Fig. 3e of the FTSO paper).
    """

    name: str
    n_nodes: int = 4
    operators: tuple[str, ...] = ("skip_connect",)
    replacements: tuple[str, ...] = REPLACEMENTS
    n_inputs: int = N_INPUTS
    cells: tuple[str, ...] = CELLS
    keeps_all: bool = False

    @property
    def n_edges(self) -> int:
        """Edges of one cell before pruning: 2 + 3 + ... + (n_nodes + 1), 14 for four nodes."""
        return sum(map(len, self.full))

    @property
    def full(self) -> Topology:
        """Every node reads every earlier state."""
        return tuple(tuple(range(self.n_inputs + node)) for node in range(self.n_nodes))


DARTS = SearchSpace(name="darts")
NATS_BENCH = SearchSpace(
    name="nats-bench",
    n_nodes=3,
    operators=("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"),
    replacements=("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"),
    n_inputs=1,
    cells=("cell",),
    keeps_all=True,
)
"""NAS-Bench-201's topology space: every node keeps all its inputs (FTSO, section 4), so only operators are searched."""
