"""What every arm's process measures with: the memory settings, the gate before the stopwatch, the stopwatch."""

import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ftso_fast.kernels import testing
from torch import Tensor

MEMORY = {
    "default": {},
    "kept": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "99999999999",
        "MALLOC_TOP_PAD_": "268435456",
    },
}
"""Environments: glibc as it is, which unmaps every large tensor, and glibc told to keep its memory."""

OPERATION = {"output": 5e-5, "gradient": 2e-3}
NETWORK = {"loss": 2e-6, "betas": 1e-2, "alphas": 1e-2, "weight": 5e-2}
"""Largest difference between two float32 arms, as a part of the largest value, by the first word of a value's name:
losses, the gradient of a cell's betas or alphas, a tensor's update. ReLU and max-pool masks that flip, not rounding,
set all but the first; an operation's gradients by such masks too, and by weights before a batch norm, whose gradients
are what is left of sums that cancel. The tests hold operations against float64."""

LEAST = 3 if os.environ.get("FTSO_BENCH") == "long" else 1
"""How often at least a call is repeated whose repetitions take longer than the time meant for them."""

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


def claim_memory() -> None:
    """Have the next 2 GB that are touched belong to the machine already, as on one that is no guest of another, and
    half a GB of huge pages: one kind is not found where the other was given back. The process' peak memory begins anew.

    A guest that reports its free pages loses them to its host within seconds, and a first touch then waits for the
    host: 1.9 s for a GB where this was measured, else 0.13 (huge pages) to 0.7 s. Without this, what is timed from cold
    would tell how long the machine had idled. Not in a process of its own: while this one waited for it, the host would
    take from this one.
    """
    held = []
    for size, pages in ((2 << 30, "MADV_NOHUGEPAGE"), (1 << 29, "MADV_HUGEPAGE")):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # a system without huge pages
            memory.madvise(getattr(mmap, pages))
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
        held.append(memory)
    for memory in held:
        memory.close()
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def running(arm: str) -> Iterator[None]:
    """Within the block operations run on `arm`; for "cpu/<isa>" it is proven that exactly its kernels ran."""
    backend, _, isa = arm.partition("/")
    with testing.arm("cpu" if backend == "cpu" else "reference", isa or None):
        yield


def prepared(net: Any, arm: str) -> Any:
    """The network as `arm` runs it."""
    if arm == "channels_last":
        return net.to(memory_format=torch.channels_last)
    if arm == "compile":
        net.compile(dynamic=False)
    return net


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeat(calls: Calls, budget: float = 2.0, least: int = LEAST, most: int = 20) -> dict[str, list[float]]:
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
