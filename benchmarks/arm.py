"""What is timed, and one arm of it in a process of its own: an allocator's settings are read at process start.

`python benchmarks/arm.py WORK ARM THREADS [VALUES]` prints one JSON document: the seconds of every piece of the work,
the values that the arm computed, and what else the work found out. VALUES is a file with the reference's values: the
arm must agree with them before its stopwatch starts (from cold: before its time is told). WORK: a key of WORKS. ARM:
"cpu/<isa>" (the package's kernels), "eager", "channels_last" or "compile" (its reference, which is plain PyTorch).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ftso_fast.kernels import trace
from measure import (
    NETWORK,
    Calls,
    Found,
    Values,
    claim_memory,
    memory_mb,
    prepared,
    repeat,
    running,
    sample,
    seconds_of,
)
from numpy.typing import NDArray
from operations import operations
from training import inference, training

from ftso_fast import CIFAR10, DARTS, PC_DARTS_CIFAR10, PRESETS, PRIMITIVES, SearchConfig, SearchSpace, SuperNet, search
from ftso_fast.batch import Batch
from ftso_fast.on_cpu import CpuRun
from ftso_fast.run import Run
from ftso_fast.search import earlier_objects_left_alone

BATCH, CLASSES = CIFAR10.batch_size, 10
ALL_OPERATORS = replace(DARTS, operators=PRIMITIVES)
PC_DARTS = replace(PC_DARTS_CIFAR10, batch_size=64)


def batches(arm: str, n: int = BATCH) -> list[Batch]:
    """Two fixed batches of noise, for the architecture and the weight step."""
    g = torch.Generator().manual_seed(2)
    layout = torch.channels_last if arm == "channels_last" else torch.contiguous_format
    draw = [(torch.randn(n, 3, 32, 32, generator=g), torch.randint(CLASSES, (n,), generator=g)) for _ in range(2)]
    return [Batch(images.to(memory_format=layout), labels) for images, labels in draw]


class Iteration:
    """A search under way on fixed batches; its steps are the search's own, optimizers included, and neither computes
    a gradient that it does not use."""

    def __init__(self, arm: str, data: list[Batch], config: SearchConfig = CIFAR10, space: SearchSpace = DARTS) -> None:
        torch.manual_seed(0)
        net = prepared(SuperNet(CLASSES, config.channels, config.cells, k=4, space=space), arm)
        for parameters in net.arch_parameters():
            parameters.data.normal_(0, 0.3)
        self.run, self.data = (CpuRun if net.skip_only else Run)(net, config), data
        self.steps: Calls = {"architecture step": self.architecture, "weight step": self.weights}

    def architecture(self) -> None:
        self.run.architecture_step(self.data[0])

    def weights(self) -> None:
        self.run.weight_step(self.data[1], self.run.config.weight_lr)

    def both(self) -> None:
        self.architecture()
        self.weights()

    def values(self) -> Values:
        """Of the first iteration: its losses, the architecture's gradients, and the direction in which every weight
        then went."""
        directions, n = self.run.sgd.velocity or [], len(self.run.net.betas())
        found = {f"weight {name}": values for name, values in sample(directions).items()}
        found |= {f"betas {name}": values for name, values in sample(self.run.gradient[:n]).items()}
        found |= {f"alphas {name}": values for name, values in sample(self.run.gradient[n:]).items()}
        return found | {"loss": [row[0] for row in self.run.losses]}


def iteration(arm: str, found: Found) -> None:
    """An iteration of the skip-only network, at 256 images and, warm, at the preset of 64."""
    state = _cold_then_warm(arm, found, CIFAR10)
    if arm.startswith("cpu"):
        found.more["traced"] = {name: traced(step) for name, step in state.steps.items()}
    if arm != "compile":  # which would compile everything once more
        small = PRESETS["cifar10-batch64"]
        state = Iteration(arm, batches(arm, small.batch_size), small)
        state.both()
        found.gate("batch 64", state.values(), NETWORK)
        found.seconds |= _with_sum("iteration, batch 64", repeat(state.steps, budget=1.0), only_sum=True)


def pc_darts(arm: str, found: Found) -> None:
    """An iteration of PC-DARTS' search: all eight operators on every edge, 64 images."""
    _cold_then_warm(arm, found, PC_DARTS, ALL_OPERATORS, "PC-DARTS ")


def _cold_then_warm(
    arm: str, found: Found, config: SearchConfig, space: SearchSpace = DARTS, prefix: str = ""
) -> Iteration:
    """A whole iteration from cold, with the memory that it takes over import and data; then warm ones."""
    data = batches(arm, config.batch_size)
    before = memory_mb("VmRSS")
    state = Iteration(arm, data, config, space)
    found.seconds[f"{prefix}first iteration"] = [seconds_of(state.both)]
    found.more["peak MB"] = memory_mb("VmHWM") - before
    found.gate(f"{prefix}iteration", state.values(), NETWORK)
    warm = _with_sum("iteration", repeat(state.steps))
    found.seconds |= {prefix + piece: seconds for piece, seconds in warm.items()}
    return state


def _with_sum(name: str, seconds: dict[str, list[float]], only_sum: bool = False) -> dict[str, list[float]]:
    total = {name: [sum(turn) for turn in zip(*seconds.values(), strict=True)]}
    return total if only_sum else seconds | total


def traced(step: Callable[[], Any], n: int = 10) -> list[dict[str, Any]]:
    """Per repetition the step's seconds and its launches."""
    found = []
    for _ in range(n):
        with trace() as launches:
            seconds = seconds_of(step)
        found.append({"seconds": seconds, "launches": [launch._asdict() for launch in launches]})
    return found


def fresh_search(arm: str, found: Found) -> None:
    """The first search of this process, one iteration, batches in memory."""
    module = sys.modules["ftso_fast.stages"]  # where a search makes its network
    module.SuperNet = lambda *args: prepared(SuperNet(*args), arm)  # type: ignore[attr-defined]
    data = [(batch.images, batch.labels) for batch in batches(arm)]
    before = memory_mb("VmRSS")
    claim_memory()
    start = time.perf_counter()
    result = search(data, "1it", classes=CLASSES, backend="cpu" if arm.startswith("cpu") else "reference")
    found.seconds["search 1it"] = [time.perf_counter() - start]
    found.more["peak MB"] = memory_mb("VmHWM") - before
    values = {f"betas {cell}": list(betas.gradient) for cell, betas in result.betas.items()}
    found.gate("search 1it", values | {"loss": list(result.losses[0])}, NETWORK)


def cifar_like() -> tuple[NDArray[np.uint8], NDArray[np.int64], str]:
    """50,000 images, their labels, and what they are: FTSO_DATA's CIFAR-10 five times over, or noise."""
    folder = os.environ.get("FTSO_DATA")
    path = Path(folder, "cifar10_10k2k.npz") if folder else None
    if path and path.exists():
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x_train"], file["y_train"].astype(np.int64)
        return np.concatenate([x] * 5), np.concatenate([y] * 5), "10,000 images of CIFAR-10, each five times"
    g = np.random.default_rng(0)
    x = g.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    return x, np.arange(50_000) % CLASSES, "random images (FTSO_DATA names no CIFAR-10)"


def epoch(arm: str, found: Found) -> None:
    """A search of one epoch on uint8 images, cropped and flipped as it goes, between two series of warm iterations."""
    x, y, source = cifar_like()
    state = Iteration(arm, batches(arm))
    state.both()
    found.gate("iteration", state.values(), NETWORK)
    warm = [seconds_of(state.both) for _ in range(10)]
    results = []
    seconds = seconds_of(lambda: results.append(search((x, y), "1ep", classes=CLASSES)))
    warm += [seconds_of(state.both) for _ in range(10)]
    (result,) = results
    found.seconds = {"search 1ep": [seconds], "iteration beside 1ep": warm}
    found.more = {"iterations": result.iterations, "data seconds": result.seconds["data"], "images": source}


WORKS = {
    "operations": operations,
    "iteration": iteration,
    "PC-DARTS": pc_darts,
    "search": fresh_search,
    "epoch": epoch,
    "training": training,
    "inference": inference,
}

if __name__ == "__main__":
    work, arm_name, threads, *path = sys.argv[1:]
    torch.set_num_threads(int(threads))
    told = Found(json.loads(Path(path[0]).read_text()) if path else None)
    with running(arm_name), earlier_objects_left_alone():  # as every search runs
        WORKS[work](arm_name, told)
    print(json.dumps({"seconds": told.seconds, "values": told.values, **told.more}))
