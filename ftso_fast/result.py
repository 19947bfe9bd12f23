"""What a search found, how it went, and how far its answer can be trusted."""

import json
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from .config import SearchConfig
from .data import DataReport
from .genotype import Genotype, derive_topology, margins
from .supernet import BETA_SPREAD

SCHEMA = "ftso.search/1"
CELLS = ("normal", "reduce")
Topology = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Betas:
    """One cell type's 14 edge parameters: drawn, as the search left them, and the last gradient that moved them.

    Flat, node 2 from (0, 1), node 3 from (0, 1, 2), ...
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    gradient: tuple[float, ...]

    @property
    def topology(self) -> Topology:
        """Per node its two strongest predecessors, stronger first."""
        return derive_topology(self.after)

    @property
    def changed(self) -> tuple[int, ...]:
        """The nodes (2..5) whose two inputs are not those that the random start would have given."""
        pairs = zip(derive_topology(self.before), self.topology, strict=True)
        return tuple(node for node, (a, b) in enumerate(pairs, 2) if set(a) != set(b))


@dataclass(frozen=True)
class Rounding:
    """What a precision below float32 did to the first architecture step's beta gradients.

    gradient_error: largest difference from float32's, as a part of the largest of those. sign_flips: betas, of all,
    that the step would have moved the other way.
    """

    gradient_error: float
    sign_flips: int


@dataclass(frozen=True)
class SearchResult:
    """The outcome of `search`. Printed, it says in a few lines what was found and how far to trust it.

    betas: by cell type ("normal", "reduce"). seconds: wall time by part and in total. peak_bytes: the largest
    resident memory of the process so far. isa: the instruction set of the cpu kernels, None on the reference
    path. rounding: what `precision` cost, None in float32. kernel_calls: compiled kernels that ran, with how
    often. losses: (architecture, weight) cross entropies in nats, on the search's own training batches: no
    accuracy of the found network, which is not trained here.
    """

    genotype: Genotype
    betas: dict[str, Betas]
    mode: str
    replace: str
    k: int
    seed: int
    backend: str
    isa: str | None
    precision: str
    rounding: Rounding | None
    iterations: int
    weight_steps: int
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    seconds: dict[str, float]
    peak_bytes: int
    kernel_calls: dict[str, int]
    data: DataReport
    config: SearchConfig

    @property
    def topology(self) -> dict[str, Topology]:
        """Per cell type and node, the kept predecessors (0, 1: the cell's inputs; 2..5: nodes)."""
        return {cell: self.betas[cell].topology for cell in CELLS}

    @property
    def margins(self) -> dict[str, tuple[float | None, ...]]:
        """Per node, kept over dropped: (second - third strongest beta) in units of the betas' learning rate.

        One iteration of Adam moves a beta by about one unit, so a margin above 2 per iteration could not have
        been turned by the gradient. None where a node has two inputs only and keeps both.
        """
        found = {cell: margins(self.betas[cell].after) for cell in CELLS}
        return {cell: tuple(None if m is None else m / self.config.arch_lr for m in row) for cell, row in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `ftso search --json`; betas and gradients also as exact hexadecimal floats."""
        return {
            "schema": SCHEMA,
            "genotype": self.genotype.to_dict(),
            "mode": self.mode,
            "replace": self.replace,
            "k": self.k,
            "seed": self.seed,
            "backend": self.backend,
            "isa": self.isa,
            "precision": self.precision,
            "rounding": None if self.rounding is None else asdict(self.rounding),
            "iterations": self.iterations,
            "weight_steps": self.weight_steps,
            "losses": {"architecture": self.losses[0], "weights": self.losses[1]},
            "seconds": self.seconds,
            "margins": self.margins,
            "margins_hex": {cell: [None if m is None else m.hex() for m in row] for cell, row in self.margins.items()},
            "topology": self.topology,
            "changed_from_start": {cell: self.betas[cell].changed for cell in CELLS},
            "betas": {
                cell: {
                    name: {"values": row, "hex": [value.hex() for value in row]}
                    for name, row in asdict(self.betas[cell]).items()
                }
                for cell in CELLS
            },
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
        self.genotype.draw(path, f"{self.mode}, seed {self.seed}")

    def _repr_svg_(self) -> str:
        return self.genotype._repr_svg_()

    def __str__(self) -> str:
        ran = f"{self.backend}/{self.isa}" if self.isa else self.backend
        lines = [
            f"Topology found in {self.iterations} iteration{'s' * (self.iterations > 1)}, "
            f"{self.seconds['total']:.2f} s on {ran} (seed {self.seed}, k {self.k}); every edge is {self.replace}.",
            f"Data: {self.data.source}, {_images(self.data)}, {self.data.classes} classes; {self.data.split}; "
            f"augmentation: {self.data.augmentation}.",
        ]
        for cell in CELLS:
            nodes = []
            for node, (kept, margin) in enumerate(zip(self.topology[cell], self.margins[cell], strict=True), 2):
                trust = "" if margin is None else f" (margin {margin:.1f})"
                nodes.append(f"{node} <- {', '.join(map(str, kept))}{trust}")
            lines.append(f"  {cell:6}  {'   '.join(nodes)}")
        if self.rounding is not None:
            lines.append(
                f"Precision {self.precision}: the first beta gradient differs from float32's by "
                f"{self.rounding.gradient_error:.2%} of its largest value, {self.rounding.sign_flips} of "
                f"{sum(len(b.after) for b in self.betas.values())} signs flipped."
            )
        lines += [self._trust(), repr(self.genotype)]
        return "\n".join(lines)

    def _trust(self) -> str:
        changed = sum(len(self.betas[cell].changed) for cell in CELLS)
        free = 2 * (len(self.topology["normal"]) - 1)
        text = (
            f"Margins are in units of the learning rate. The search changed {changed} of {free} free nodes "
            "from its random start"
        )
        if self.iterations * self.config.arch_lr < 5 * BETA_SPREAD:
            text += (
                f": {self.iterations} step{'s' * (self.iterations > 1)} of about {self.config.arch_lr:g} cannot "
                f"outweigh a start drawn with deviation {BETA_SPREAD:g}, so this answer is mostly its seed; "
                "compare seeds, or search an epoch (mode 1ep)"
            )
        return text + "."


def _images(data: DataReport) -> str:
    shape = "x".join(map(str, data.shape))
    return f"{data.images} images of {shape}" if data.images is not None else f"images of {shape}"
