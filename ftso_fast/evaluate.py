"""What a genotype is worth: its network trained from scratch by a recipe, and tested."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import kernels
from .errors import DataError, UsageError
from .evaluation import EvaluationResult
from .evaluation_run import Callback, EvaluationRun
from .genotype import Genotype
from .image_set import ImageSet, image_set
from .network import Network, backend_of_networks
from .ranks import ranks
from .recipes import Recipe, recipe_named
from .run import Progress
from .search import chosen_backend
from .training import Training


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
    precision: str = "float32",
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

    seed: decides everything random. backend: "cpu" or "reference", which then runs or raises. precision="bf16" computes
    convolutions and products in bfloat16 by PyTorch's autocast, on the reference backend; tests are in float32, and the
    result says what bfloat16 would have cost in the last. out: a folder for checkpoints, events.jsonl (a line an
    epoch), result.json and curve.svg. resume="auto": go on from the newest checkpoint in it that verifies, byte for
    byte as if there had been no interruption at the same number of threads, or begin. checkpoint_every: also after so
    many steps; keep: so many stay. workers: threads that prepare batches ahead; bytes are the same. shards: each batch
    is cut into so many parts with batch norm of their own (see `training`); under torchrun, whose processes share them
    out, as many as there are processes. callbacks: each is called with every event. progress: called with (steps done,
    steps in all).

    Ctrl-C and SIGTERM end it behind the step at hand, with a checkpoint where there is `out`; several processes end at
    once, and the checkpoint before counts. Raises UsageError, DataError, NumericalError (a loss or gradient is not
    finite). Source: FTSO, section 4 and Table 4; DARTS, train.py.
    """
    chosen = recipe_named(recipe).changed(**changes)
    if resume not in (None, "auto"):
        raise UsageError(f"resume: expected 'auto' or None, got {resume!r}")
    if resume and out is None:
        raise UsageError("resume: expected a folder `out` to resume from, got none")
    for name, value, least in (("workers", workers, 0), ("keep", keep, 1), ("checkpoint_every", checkpoint_every, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UsageError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if precision not in ("float32", "bf16"):
        raise UsageError(f"precision: expected float32 or bf16, got {precision!r}")
    if precision == "bf16" and backend not in (None, "reference"):
        raise UsageError(f"backend: expected reference for bf16, which no kernel computes, got {backend!r}")
    start = time.perf_counter()
    with chosen_backend("reference" if precision == "bf16" else backend), ranks() as here:
        parts = here.shards(shards)
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
        run = EvaluationRun(
            Training(net, chosen, seed, parts, here, precision == "bf16"),
            data,
            out,
            checkpoint_every,
            keep,
            tuple(callbacks),
        )
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
    name = backend_of_networks()
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
