"""What is timed, and one arm of it in a process of its own: an allocator's settings are read at process start.

`python benchmarks/arm.py WORK ARM THREADS [VALUES]` prints one JSON document: the seconds of every piece of the work,
the values that the arm computed, and what else the work found out. VALUES is a file with the reference's values: the
arm must agree with them before its stopwatch starts (from cold: before its time is told). WORK: a key of WORKS. ARM:
"cpu/<isa>" (the package's kernels), "eager", "channels_last" or "compile" (its reference, which is plain PyTorch).
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ftso_fast.kernels import testing, trace
from numpy.typing import NDArray
from torch import Tensor

from ftso_fast import CIFAR10, PRESETS, SearchConfig, SuperNet, search
from ftso_fast.batch import Batch
from ftso_fast.run import Run

MEMORY = {
    "default": {},
    "kept": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "99999999999",
        "MALLOC_TOP_PAD_": "268435456",
    },
}
"""Environments: glibc as it is, which unmaps every large tensor, and glibc told to keep its memory."""

OPERATION = {"": 1e-4}
NETWORK = {"loss": 2e-6, "betas": 1e-2, "weight": 5e-2}
"""Largest difference between two float32 arms, as a part of the largest value, by the first word of a value's name:
losses, a beta vector's gradient, a tensor's update. ReLU and max-pool masks that flip, not rounding, set the last two;
an operation's is set by weights before a batch norm, whose gradients are what is left of sums that cancel. Operations
are also held against float64."""

BATCH, CLASSES = CIFAR10.batch_size, 10
Calls = dict[str, Callable[[], Any]]
Values = dict[str, list[float]]


@dataclass
class Found:
    """What a process has to tell; `want`: the reference's values, None where the arm is the reference."""

    want: dict[str, Values] | None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def gate(self, what: str, got: Values, tolerance: dict[str, float]) -> None:
        """Nothing of `what` is timed, or told, unless the arm has computed what the reference has."""
        self.values[what] = got
        if self.want is not None:
            assert_equal(got, self.want[what], tolerance, what)


def assert_equal(got: Values, want: Values, tolerance: dict[str, float], what: str) -> None:
    assert got.keys() == want.keys(), f"{what}: computed {sorted(got)}, the reference {sorted(want)}"
    for name, right in want.items():
        scale = max(map(abs, right)) or 1.0
        errors = [abs(g - w) / scale for g, w in zip(got[name], right, strict=True)]
        limit = tolerance.get(name.split()[0], tolerance.get("", 0.0))
        worst = next((e for e in errors if e != e), max(errors))  # max alone would pass over a NaN
        assert worst <= limit, f"{what}: {name}: differs by {worst:.1e} of the largest value, allowed {limit:.0e}"


@contextmanager
def running(arm: str) -> Iterator[None]:
    """Within the block operations run on `arm`; for "cpu/<isa>" it is proven that exactly its kernels ran."""
    backend, _, isa = arm.partition("/")
    with testing.arm("cpu" if backend == "cpu" else "reference", isa or None):
        yield


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeat(calls: Calls, budget: float = 2.0, least: int = 3, most: int = 20) -> dict[str, list[float]]:
    """Seconds of every call, taken in turn, about `budget` seconds in all. Every call must have run before."""

    def turn() -> list[float]:
        return [seconds_of(call) for call in calls.values()]

    turns = [turn()]
    turns += [turn() for _ in range(int(min(max(budget / sum(turns[0]), least), most)) - 1)]
    return dict(zip(calls, map(list, zip(*turns, strict=True)), strict=True))


def sample(tensors: Iterable[Tensor], n: int = 256) -> Values:
    """About `n` evenly spaced values of each tensor, in logical order."""
    flat = (t.detach().flatten() for t in tensors)
    return {str(i): t[:: max(1, t.numel() // n)].double().tolist() for i, t in enumerate(flat)}


def memory_mb(field: str) -> float:
    """Resident memory of this process, in MB: VmRSS, of now, or VmHWM, its peak so far. On Linux not from getrusage,
    which hands a large parent's peak on to its children."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def operation_calls(arm: str, case: testing.Case, tensors: tuple[Tensor, ...]) -> Calls:
    """The two timed calls of an operation; they return the output, and behind it the inputs' gradients."""
    operation = testing.OPERATIONS[case.op]
    function: Callable[..., Tensor] = operation.function
    if arm == "channels_last":
        tensors = tuple(t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors)
    elif arm == "compile":
        torch.compiler.reset()
        function = torch.compile(operation.reference, dynamic=False)
    leaves = [t.detach().requires_grad_() for t in tensors]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [operation.call(function, case, tensors)]

    example = forward()[0]
    grad = torch.randn(example.shape, generator=torch.Generator().manual_seed(1))
    grad = torch.empty_like(example).copy_(grad + example)  # noise alone leaves an edge's gradient near zero

    def both() -> list[Tensor]:
        out = operation.call(function, case, leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return {"forward": forward, "forward+backward": both}


def prepared(net: SuperNet, arm: str) -> SuperNet:
    """The network as `arm` runs it."""
    if arm == "channels_last":
        return net.to(memory_format=torch.channels_last)
    if arm == "compile":
        net.compile(dynamic=False)
    return net


def batches(arm: str, n: int = BATCH) -> list[Batch]:
    """Two fixed batches of noise, for the architecture and the weight step."""
    g = torch.Generator().manual_seed(2)
    layout = torch.channels_last if arm == "channels_last" else torch.contiguous_format
    draw = [(torch.randn(n, 3, 32, 32, generator=g), torch.randint(CLASSES, (n,), generator=g)) for _ in range(2)]
    return [Batch(images.to(memory_format=layout), labels) for images, labels in draw]


class Iteration:
    """A search under way on fixed batches; its steps are the search's own, optimizers included, and neither computes
    a gradient that it does not use."""

    def __init__(self, arm: str, data: list[Batch], config: SearchConfig = CIFAR10) -> None:
        torch.manual_seed(0)
        net = prepared(SuperNet(CLASSES, config.channels, config.cells, k=4), arm)
        for betas in net.betas():
            betas.data.normal_(0, 0.3)
        self.run, self.data = Run(net, config), data
        self.steps: Calls = {"architecture step": self.architecture, "weight step": self.weights}

    def architecture(self) -> None:
        self.run.architecture_step(self.data[0])

    def weights(self) -> None:
        self.run.weight_step(self.data[1], self.run.config.weight_lr)

    def both(self) -> None:
        self.architecture()
        self.weights()

    def values(self) -> Values:
        """Of the first iteration: its losses, beta gradients, and the direction in which every weight then went."""
        directions = self.run.sgd.velocity or []
        found = {f"weight {name}": values for name, values in sample(directions).items()}
        found |= {f"betas {name}": values for name, values in sample(self.run.gradient).items()}
        return found | {"loss": [row[0] for row in self.run.losses]}


def operations(arm: str, found: Found) -> None:
    for case in testing.BENCHMARKS:
        tensors = testing.OPERATIONS[case.op].inputs(case, 0)
        if arm.startswith("cpu"):
            testing.check(case, tensors)
        calls = operation_calls(arm, case, tensors)
        for name, call in calls.items():
            found.gate(f"{case} {name}", sample(call()), OPERATION)
        found.seconds |= {f"{case} {name}": s for name, s in repeat(calls, budget=1.0).items()}


def iteration(arm: str, found: Found) -> None:
    """A whole iteration from cold, with the memory that it takes over import and data; then warm ones, at 256 images
    and at the preset of 64."""
    data = batches(arm)
    before = memory_mb("VmRSS")
    state = Iteration(arm, data)
    found.seconds["first iteration"] = [seconds_of(state.both)]
    found.more["peak MB"] = memory_mb("VmHWM") - before
    found.gate("iteration", state.values(), NETWORK)
    found.seconds |= _with_sum("iteration", repeat(state.steps))
    if arm.startswith("cpu"):
        found.more["traced"] = {name: traced(step) for name, step in state.steps.items()}
    if arm != "compile":  # which would compile everything once more
        small = PRESETS["cifar10-batch64"]
        state = Iteration(arm, batches(arm, small.batch_size), small)
        state.both()
        found.gate("batch 64", state.values(), NETWORK)
        found.seconds |= _with_sum("iteration, batch 64", repeat(state.steps, budget=1.0), only_sum=True)


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
    module = sys.modules["ftso_fast.search"]
    module.SuperNet = lambda *args: prepared(SuperNet(*args), arm)  # type: ignore[attr-defined]
    data = [(batch.images, batch.labels) for batch in batches(arm)]
    before = memory_mb("VmRSS")
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


WORKS = {"operations": operations, "iteration": iteration, "search": fresh_search, "epoch": epoch}

if __name__ == "__main__":
    work, arm_name, threads, *path = sys.argv[1:]
    torch.set_num_threads(int(threads))
    told = Found(json.loads(Path(path[0]).read_text()) if path else None)
    with running(arm_name):
        WORKS[work](arm_name, told)
    print(json.dumps({"seconds": told.seconds, "values": told.values, **told.more}))
