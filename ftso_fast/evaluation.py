"""What an evaluation found: the value, its JSON and text, its curve. No torch import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .genotype import Genotype
from .recipes import Recipe
from .svg import INK, MUTED, SANS, label, text

SCHEMA = "ftso.evaluation/1"
_WIDTH, _HEIGHT, _LEFT, _TOP = 640, 320, 56, 40


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracies are shares of `test_images` whose class was the likeliest, by the network after the last epoch and
    after the best one; the best is chosen on the very images that it is reported on, and so flatters.

    bf16_cost: what the last accuracy loses where it is tested in bfloat16, if it was trained so.
    waiting: share of the steps' seconds in which the next batch was waited for. events: one an epoch.
    """

    genotype: Genotype
    recipe: Recipe
    deviations: tuple[str, ...]
    seed: int
    eval_accuracy_last: float
    eval_accuracy_best: float
    eval_top5_last: float
    eval_top5_best: float
    best_epoch: int
    tested_on: str
    train_images: int
    test_images: int
    data: str
    params: int
    macs: int
    seconds: float
    images_per_second: float
    waiting: float
    peak_bytes: int
    backend: str
    precision: str
    bf16_cost: float | None
    threads: int
    shards: int
    processes: int
    skipped_checkpoints: tuple[str, ...]
    events: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        own = asdict(self) | {"genotype": self.genotype.to_dict()}
        return {"schema": SCHEMA, **own}

    def to_json(self) -> str:
        """One line of JSON that begins with the schema's name and version."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        named = f"recipe {self.recipe.name}" + (f" but {', '.join(self.deviations)}" if self.deviations else "")
        lines = [
            repr(self.genotype),
            f"{named}; seed {self.seed}; {self.params:,} parameters, {self.macs:,} multiply-adds",
            f"trained on {self.train_images:,} images of {self.data}",
            f"tested on {self.test_images:,} images: {self.tested_on}",
            f"eval accuracy: last {self.eval_accuracy_last:.2%}, best {self.eval_accuracy_best:.2%} (epoch "
            f"{self.best_epoch + 1} of {self.recipe.epochs}, chosen on the images that it is tested on); top 5: last "
            f"{self.eval_top5_last:.2%}, best {self.eval_top5_best:.2%}",
            f"{self.seconds:.0f} s on {self.backend}, {self.threads} threads"
            + (f", {self.processes} processes" if self.processes > 1 else "")
            + f": {self.images_per_second:.0f} images a second in training, {self.waiting:.1%} of it waiting for data; "
            f"peak memory {self.peak_bytes / 1e6:,.0f} MB",
        ]
        if self.bf16_cost is not None:
            lines.append(f"trained in bfloat16; tested in it too, the last accuracy would lose {self.bf16_cost:.2%}")
        lines += [f"a checkpoint was passed over: {why}" for why in self.skipped_checkpoints]
        return "\n".join(lines)

    def draw(self, path: str | PathLike[str]) -> None:
        """Write the accuracies over the epochs to `path` as SVG; raises OSError where that cannot be written."""
        Path(path).write_text(curve(self.events, f"{self.recipe.name}, seed {self.seed}"), encoding="utf-8")


def curve(events: tuple[Mapping[str, Any], ...], title: str) -> str:
    """Accuracies in training and in testing over the epochs, as SVG."""
    inner_w, inner_h = _WIDTH - _LEFT - 130, _HEIGHT - _TOP - 44
    epochs = max(len(events), 2)

    def at(epoch: int, share: float) -> str:
        return f"{_LEFT + inner_w * epoch / (epochs - 1):.1f},{_TOP + inner_h * (1 - share):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {SANS}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        label(_LEFT, 24, f'font-size="14" fill="{INK}"', text(title)),
    ]
    for tenth in range(0, 11, 2):
        y = _TOP + inner_h * (1 - tenth / 10)
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{inner_w}" stroke="#d9dee3"/>')
        parts.append(label(_LEFT - 8, y + 4, f'font-size="11" text-anchor="end" fill="{MUTED}"', f"{10 * tenth} %"))
    for epoch in sorted({0, len(events) // 2, len(events) - 1}):
        x = _LEFT + inner_w * epoch / (epochs - 1)
        parts.append(
            label(x, _TOP + inner_h + 18, f'font-size="11" text-anchor="middle" fill="{MUTED}"', str(epoch + 1))
        )
    parts.append(
        label(_LEFT + inner_w / 2, _HEIGHT - 8, f'font-size="11" text-anchor="middle" fill="{MUTED}"', "epoch")
    )
    for name, colour, dash in (("eval_accuracy", "#1f6feb", ""), ("train_accuracy", "#b35900", "5 3")):
        points = " ".join(at(epoch, float(event[name])) for epoch, event in enumerate(events))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        y = _TOP + inner_h * (1 - float(events[-1][name])) if events else _TOP
        shown = f"{'tested' if name.startswith('eval') else 'trained'} {float(events[-1][name]):.1%}" if events else ""
        parts.append(
            label(
                _LEFT + inner_w + 8,
                y + (4 if name.startswith("eval") else 18),
                f'font-size="12" fill="{colour}"',
                shown,
            )
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
