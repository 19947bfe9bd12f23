"""What a search found, how it went, and how far its answer can be trusted."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from .config import METHODS, SearchConfig
from .data import DataReport
from .genotype import N_INPUTS, Genotype
from .phase import Alphas, Betas, Choice, Phase, Rounding
from .space import CELLS, Topology

SCHEMA = "ftso.search/1"


@dataclass(frozen=True)
class SearchResult:
    """The outcome of `search`. Printed, it says in a few lines what was found and how far to trust it.

    topology_search: the only super-network's search, or the first's of two; its betas, alphas, losses, counts and
    backend are also the result's own. operator_search: the second's, or None. operators: the name of the first's set.
    replace: the operator of every edge, None where operators were searched. seconds: wall time by part and in total.
    peak_bytes: the largest resident memory of the process so far. isa: the instruction set of the cpu kernels, None
    on the reference path. shards: the parts of a batch, each with batch norm of its own. rounding: what `precision`
    cost, None in float32. Losses are cross entropies in nats on the search's own training batches: no accuracy of the
    found network, which is not trained here.
    """

    topology_search: Phase
    operator_search: Phase | None
    method: str
    mode: str
    operators: str
    replace: str | None
    order: int
    beta_only: bool
    k: int
    seed: int
    beta_init: str
    isa: str | None
    precision: str
    shards: int
    rounding: Rounding | None
    seconds: dict[str, float]
    peak_bytes: int
    data: DataReport
    config: SearchConfig

    @property
    def genotype(self) -> Genotype:
        """Both cells, every node's edges in the order of their strength."""
        if self.replace is not None:
            return Genotype.from_topology(self.topology["normal"], self.topology["reduce"], self.replace)
        fields: list[Any] = []
        for cell in CELLS:
            edges = [(choice.operator, choice.state) for choice in self.choices[cell]]
            fields += [edges, range(N_INPUTS, N_INPUTS + len(edges) // 2)]
        return Genotype(*fields)

    @property
    def betas(self) -> dict[str, Betas]:
        """By cell type ("normal", "reduce"), the topology search's; empty for DARTS."""
        return self.topology_search.betas

    @property
    def alphas(self) -> dict[str, Alphas]:
        """By cell type, the topology search's; empty where it had one operator."""
        return self.topology_search.alphas

    @property
    def iterations(self) -> int:
        return self.topology_search.iterations

    @property
    def weight_steps(self) -> int:
        return self.topology_search.weight_steps

    @property
    def losses(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.topology_search.losses

    @property
    def backend(self) -> str:
        return self.topology_search.backend

    @property
    def kernel_calls(self) -> dict[str, int]:
        """Compiled kernels that ran, with how often, over the whole search."""
        second = {} if self.operator_search is None else self.operator_search.kernel_calls
        return dict(Counter(self.topology_search.kernel_calls) + Counter(second))

    @property
    def topology(self) -> dict[str, Topology]:
        """Per cell type and node, the kept predecessors (0, 1: the cell's inputs; 2..5: nodes), stronger first."""
        return {cell: self.topology_search.topology(cell) for cell in CELLS}

    @property
    def changed(self) -> dict[str, tuple[int, ...]]:
        """Per cell type, the nodes whose inputs are not those that the random start would have given; with
        beta_init='zeros' the start's are 0 and 1, as ties go."""
        return {cell: self.topology_search.changed(cell) for cell in CELLS}

    @property
    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """Per cell type, the operator of every kept edge and its margin over the next, in units of the architecture's
        learning rate, in the genotype's order; empty where all are `replace`."""
        if self.replace is not None:
            return {}
        topology, phase = self.topology, self.operator_search or self.topology_search
        return {
            cell: tuple(
                c._replace(margin=None if c.margin is None else c.margin / self.config.arch_lr)
                for c in phase.choices(cell, topology[cell])
            )
            for cell in CELLS
        }

    @property
    def margins(self) -> dict[str, tuple[float | None, ...]]:
        """Per node, kept over dropped: (second - third highest score) in units of the architecture's learning rate.

        A score is a beta, or ln(softmax(beta) * largest softmax(alpha) but none's). One iteration of Adam moves a
        parameter by about one unit, so a margin of betas above 2 per iteration could not have been turned by the
        gradient. None where a node has two inputs only and keeps both.
        """
        found = {cell: self.topology_search.margins(cell) for cell in CELLS}
        return {cell: tuple(None if m is None else m / self.config.arch_lr for m in row) for cell, row in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `ftso search --json`; parameters and gradients also as exact hexadecimal floats."""
        return {
            "schema": SCHEMA,
            "genotype": self.genotype.to_dict(),
            "method": self.method,
            "mode": self.mode,
            "operators": {"set": self.operators, "names": self.topology_search.operators},
            "replace": self.replace,
            "order": self.order,
            "beta_only": self.beta_only,
            "k": self.k,
            "seed": self.seed,
            "beta_init": self.beta_init,
            "backend": self.backend,
            "isa": self.isa,
            "precision": self.precision,
            "shards": self.shards,
            "rounding": None if self.rounding is None else asdict(self.rounding),
            "iterations": self.iterations,
            "weight_steps": self.weight_steps,
            "losses": _losses(self.topology_search),
            "seconds": self.seconds,
            "margins": self.margins,
            "margins_hex": {cell: [None if m is None else m.hex() for m in row] for cell, row in self.margins.items()},
            "eigenvalues": self.topology_search.eigenvalues,
            "stopped_at": self.topology_search.stopped_at,
            "topology": self.topology,
            "changed_from_start": self.changed,
            "choices": {cell: [choice._asdict() for choice in row] for cell, row in self.choices.items()},
            "betas": _parameters(self.betas),
            "alphas": _parameters(self.alphas),
            "operator_search": None if self.operator_search is None else _phase(self.operator_search),
            "peak_bytes": self.peak_bytes,
            "kernel_calls": self.kernel_calls,
            "data": asdict(self.data),
            "config": asdict(self.config),
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())

    def draw(self, path: str | PathLike[str]) -> None:
        """Write both found cells to `path` as SVG."""
        by = "" if METHODS[self.method].stages else f"{self.method}, "
        self.genotype.draw(path, f"{by}{self.mode}, seed {self.seed}")

    def _repr_svg_(self) -> str:
        return self.genotype._repr_svg_()

    def __str__(self) -> str:
        from .text import describe

        return describe(self)


def _losses(phase: Phase) -> dict[str, tuple[float, ...]]:
    return {"architecture": phase.losses[0], "weights": phase.losses[1]}


def _parameters(cells: Mapping[str, Betas | Alphas]) -> dict[str, Any]:
    return {
        cell: {name: {"values": rows, "hex": _hex(rows)} for name, rows in asdict(own).items()}
        for cell, own in cells.items()
    }


def _hex(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else [_hex(v) for v in value]


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "mode": phase.mode,
        "operators": phase.operators,
        "backend": phase.backend,
        "iterations": phase.iterations,
        "weight_steps": phase.weight_steps,
        "losses": _losses(phase),
        "betas": _parameters(phase.betas),
        "alphas": _parameters(phase.alphas),
    }
