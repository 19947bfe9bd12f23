"""A training under way, epoch after epoch: what is recorded of it, and its checkpoints."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from . import checkpoint
from .errors import DataError, UsageError
from .evaluation import EvaluationResult
from .image_set import SIZE, ImageSet
from .run import Progress
from .search import peak_bytes
from .training import Tally, Training, measured, told

Callback = Callable[[Mapping[str, Any]], None]


class EvaluationRun:
    """data: what is trained on, what is tested on, what to call the latter. every: steps from checkpoint to checkpoint
    within an epoch; keep: so many stay."""

    def __init__(
        self, training: Training, data: tuple[ImageSet, ImageSet, str], out: str | os.PathLike[str] | None,
        every: int | None, keep: int, callbacks: tuple[Callback, ...],
    ) -> None:  # fmt: skip
        self.training, (self.train, self.test, self.split) = training, data
        self.folder = None if out is None else Path(out)
        self.every, self.keep, self.callbacks = every, keep, callbacks
        self.events: list[dict[str, Any]] = []
        self.skipped: tuple[str, ...] = ()
        self.per_epoch = self.train.n_batches(training.recipe.batch_size, training.shards)
        if not self.per_epoch:
            raise DataError(
                f"{self.train.source}: {len(self.train)} images are no batch of {training.recipe.batch_size} in "
                f"{training.shards} parts: give more images, or a smaller batch"
            )

    @property
    def writes(self) -> bool:
        return self.folder is not None and self.training.ranks.rank == 0

    def of_what(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        data = {"train": self.train.source, "images": len(self.train), "test": self.split}
        named: dict[str, Any] = {"genotype": self.training.net.genotype.to_dict()}
        named |= {"recipe": asdict(self.training.recipe), "precision": "bf16" if self.training.bf16 else "float32"}
        return named | {"seed": self.training.seed, "shards": self.training.shards, "data": data}

    def refuse_used(self) -> None:
        if self.folder and checkpoint.steps(self.folder):
            raise UsageError(
                f"out: {self.folder} holds the checkpoints of a run: give resume='auto' to go on, or another folder"
            )

    def resume(self) -> None:
        assert self.folder is not None
        found = checkpoint.newest(self.folder)
        if found is None:
            return
        own = json.loads(json.dumps(self.of_what()))
        differing = [
            name for name, value in own.items() if found.state.get("of") and found.state["of"].get(name) != value
        ]
        if differing:
            raise UsageError(
                f"resume: {found.path} belongs to another run: {', '.join(differing)} differ: give another folder"
            )
        self.skipped = found.skipped
        self.events = found.state["events"]
        self.training.load(found.tensors, found.step, Tally(**found.state["tally"]))

    def all(self, workers: int, progress: Progress | None, stop: list[int]) -> None:
        """Every epoch that is left."""
        training, total = self.training, self.per_epoch * self.training.recipe.epochs
        if self.writes:
            self._write_events()
        while training.step < total:
            for step in training.epoch(self.train, workers):
                if progress:
                    progress(step, total)
                last = step % self.per_epoch == 0
                if not last and (stop or (self.every and step % self.every == 0)):
                    self.save()
                if stop and not last:
                    break
            else:
                self._epoch_ends()
                self.save()
            if stop:
                raise KeyboardInterrupt if stop[0] == signal.SIGINT else SystemExit(128 + stop[0])

    def _epoch_ends(self) -> None:
        training, tally = self.training, self.training.tally
        epoch = training.step // self.per_epoch - 1
        found = {"loss": 0.0, "accuracy": 0.0, "top5": 0.0}
        if training.ranks.rank == 0:
            found = measured(training.net, self.test, training.recipe.batch_size, training.recipe.augmentation)
        found = told(found, training.ranks)
        event = {
            "epoch": epoch,
            "step": training.step,
            "lr": training.recipe.rate(epoch),
            "train_loss": tally.loss / tally.images,
            "train_accuracy": tally.correct / tally.images,
            **{f"eval_{name}": value for name, value in found.items()},
            "seconds": tally.seconds,
            "waited": tally.waited,
            "images": tally.images,
        }
        self.events.append(event)
        training.tally = Tally()
        if self.writes:
            assert self.folder is not None
            with open(self.folder / "events.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        for callback in self.callbacks:
            callback(event)

    def _write_events(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(event) + "\n" for event in self.events)
        (self.folder / "events.jsonl").write_text(lines, encoding="utf-8")

    def save(self) -> None:
        if self.writes:
            assert self.folder is not None
            tally = asdict(self.training.tally)
            state = {"of": self.of_what(), "events": self.events, "tally": tally}
            checkpoint.save(self.folder, self.training.step, self.training.tensors(), state, self.keep)
        if self.training.ranks.world > 1:
            dist.barrier()

    def result(self, backend: str, seconds: float) -> EvaluationResult:
        training, last = self.training, self.events[-1]
        best = max(self.events, key=lambda event: event["eval_accuracy"])
        size = {"channels": training.recipe.channels, "cells": training.recipe.cells, "classes": self.train.classes}
        network = size | {"stem": training.recipe.stem}
        side = SIZE if training.recipe.augmentation == "imagenet" else self.train.shape[1]
        spent, waited, images = (sum(event[name] for event in self.events) for name in ("seconds", "waited", "images"))
        cost = None
        if training.bf16:
            rounded = measured(training.net, self.test, training.recipe.batch_size, training.recipe.augmentation, True)
            cost = last["eval_accuracy"] - rounded["accuracy"]
        return EvaluationResult(
            genotype=training.net.genotype,
            recipe=training.recipe,
            deviations=tuple(training.recipe.deviations()),
            seed=training.seed,
            eval_accuracy_last=last["eval_accuracy"],
            eval_accuracy_best=best["eval_accuracy"],
            eval_top5_last=last["eval_top5"],
            eval_top5_best=max(event["eval_top5"] for event in self.events),
            best_epoch=best["epoch"],
            tested_on=self.split,
            train_images=len(self.train),
            test_images=len(self.test),
            data=self.train.source,
            params=training.net.genotype.params(**network),
            macs=training.net.genotype.macs(**network, size=side),
            seconds=seconds,
            images_per_second=images / spent if spent else 0.0,
            waiting=waited / spent if spent else 0.0,
            peak_bytes=peak_bytes(),
            backend=backend,
            precision="bf16" if training.bf16 else "float32",
            bf16_cost=cost,
            threads=torch.get_num_threads(),
            shards=training.shards,
            processes=training.ranks.world,
            skipped_checkpoints=self.skipped,
            events=tuple(self.events),
        )

    def finish(self, result: EvaluationResult) -> None:
        if self.writes:
            assert self.folder is not None
            (self.folder / "result.json").write_text(result.to_json() + "\n", encoding="utf-8")
            (self.folder / "genotype.json").write_text(result.genotype.to_json() + "\n", encoding="utf-8")
            result.draw(self.folder / "curve.svg")
