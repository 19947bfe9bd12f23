"""What a genotype is worth: its network trained from scratch by a recipe, and tested."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from . import checkpoint, kernels
from .errors import DataError, UsageError
from .evaluation import EvaluationResult
from .genotype import Genotype
from .image_set import SIZE, ImageSet, image_set
from .network import Network
from .ranks import ranks
from .recipes import Recipe, recipe_named
from .run import Progress
from .search import chosen_backend, peak_bytes
from .training import Tally, Training, measured, told

Callback = Callable[[Mapping[str, Any]], None]
SCHEMA = "ftso.training/1"


def evaluate(
    genotype: Genotype,
    train: Any,
    test: Any = None,
    recipe: str | Recipe = "cifar600",
    *,
    seed: int = 0,
    validation: float | None = None,
    fraction: float | None = None,
    classes: int | None = None,
    backend: str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: str | None = None,
    workers: int = 0,
    shards: int | None = None,
    checkpoint_every: int | None = None,
    keep: int = 3,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
    **changes: Any,
) -> EvaluationResult:
    """Train the network of `genotype` from scratch by `recipe`, test it after every epoch, and report.

    train, test: what `image_set.image_set` takes: a file or folder, a tuple (X, y) of arrays, a map data set, a
    DataLoader over one. test None: the test split of the file `train`, or, with validation=0.1, that share of every
    class of `train`, which then is not trained on. fraction: that share of every class of what is trained on.
    recipe: a name of `recipes.RECIPES` or a Recipe; changes: fields of it that are to differ, which the result states.

    seed: decides everything random. out: a folder for checkpoints, events.jsonl (a line an epoch), result.json and
    curve.svg. resume="auto": go on from the newest checkpoint in it that verifies, byte for byte as if there had been
    no interruption at the same number of threads, or begin. checkpoint_every: also after so many steps; keep: so many
    stay. workers: threads that prepare batches ahead; bytes are the same. shards: each batch is cut into so many parts
    with batch norm of their own (see `training`); under torchrun, whose processes share them out, as many as there are
    processes. callbacks: each is called with every event. progress: called with (steps done, steps in all).

    Ctrl-C and SIGTERM end it behind the step at hand, with a checkpoint where there is `out`; several processes end at
    once, and the checkpoint before counts. Raises UsageError,
    DataError, NumericalError (a loss or gradient is not finite). Source: FTSO, section 4 and Table 4; DARTS, train.py.
    """
    chosen = recipe_named(recipe).changed(**changes)
    if resume not in (None, "auto"):
        raise UsageError(f"resume: expected 'auto' or None, got {resume!r}")
    if resume and out is None:
        raise UsageError("resume: expected a folder `out` to resume from, got none")
    for name, value, least in (("workers", workers, 0), ("keep", keep, 1), ("checkpoint_every", checkpoint_every, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UsageError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    start = time.perf_counter()
    with chosen_backend(backend), ranks() as here:
        parts = here.world if shards is None else shards
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1 or parts % here.world:
            raise UsageError(f"shards: expected a multiple of the {here.world} processes, got {parts!r}")
        data = _sets(train, test, validation, fraction, classes, seed)
        torch.manual_seed(seed)
        net = Network(
            genotype,
            chosen.channels,
            chosen.cells,
            data[0].classes,
            chosen.stem,
            auxiliary=chosen.auxiliary_weight > 0,
            in_channels=data[0].shape[0],
        )
        run = _Run(Training(net, chosen, seed, parts, here), data, out, checkpoint_every, keep, tuple(callbacks))
        if resume:
            run.resume()
        else:
            run.refuse_used()
        with _stoppable(here.world == 1) as stop:
            run.all(workers, progress, stop)
        result = run.result(backend_of(), time.perf_counter() - start)
        run.finish(result)
        return result


def backend_of() -> str:
    """What computes the network: the backend, with its instruction set."""
    name = kernels.requested() or next(b for b in ("cpu", "reference") if kernels.backends()[b] is None)
    return f"cpu/{kernels.isa()}" if name == "cpu" else name


def _sets(
    train: Any, test: Any, validation: float | None, fraction: float | None, classes: int | None, seed: int
) -> tuple[ImageSet, ImageSet, str]:
    """What is trained on, what is tested on, and what to call the latter."""
    known = image_set(train, classes=classes)
    if test is not None and validation is not None:
        raise UsageError("validation: expected none where `test` is given, got both: leave one of them out")
    if validation is not None:
        known, held = known.split(validation, seed)
        split = f"validation: {validation:g} of the training images, stratified, seed {seed}"
    else:
        if test is None and not isinstance(train, str | Path):
            raise UsageError("test: expected images to test on, or validation=0.1 for a share of `train`, got neither")
        held = image_set(train if test is None else test, split="test", classes=known.classes)
        split = "the file's own test images" if test is None else held.source
    if held.shape != known.shape:
        raise DataError(f"test: images of shape {held.shape}, but those of training have {known.shape}")
    return (known if fraction is None else known.fraction(fraction, seed)), held, split


class _Run:
    """A training under way: its epochs, what is recorded of them, and its checkpoints."""

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
        named = {"genotype": self.training.net.genotype.to_dict(), "recipe": asdict(self.training.recipe)}
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
            state = {"of": self.of_what(), "events": self.events, "tally": tally, "schema_of_state": SCHEMA}
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


@contextmanager
def _stoppable(alone: bool) -> Iterator[list[int]]:
    """Within the block Ctrl-C and SIGTERM are noted in the list, if this process is alone; a second stops at once."""
    noted: list[int] = []
    if not alone or threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        if noted:
            sys.exit(128 + number)
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
