"""What is timed, and one arm of it in a process of its own: an allocator's settings are read at process start.

`python benchmarks/peer.py WORK ARM THREADS` prints one JSON document: {piece: {"seconds": [...], "values": {...}}}
and the peak memory over import. WORK: operations, iteration, search (from cold), flops. ARM: "cpu/<isa>" (the
package's kernels), "eager", "channels_last" or "compile" (the package's reference, which is plain PyTorch).
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ftso_fast.kernels import testing
from torch import Tensor

from ftso_fast import CIFAR10, SuperNet, search
from ftso_fast.batch import Batch
from ftso_fast.search import _Run

MEMORY = {
    "default": {},
    "kept": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "99999999999",
        "MALLOC_TOP_PAD_": "268435456",
    },
}
"""Environments: glibc as it is, which unmaps every large tensor, and glibc told to keep its memory."""

BATCH, CLASSES = CIFAR10.batch_size, 10


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


def rounds(once: float, budget: float = 2.0, least: int = 3, most: int = 30) -> int:
    """How often to time something that takes `once` seconds."""
    return int(min(max(budget / once, least), most))


def repeat(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of every call, taken in turn; the first turn is not counted."""

    def turn() -> list[float]:
        return [seconds_of(call) for call in calls.values()]

    turn()
    turns = [turn()]
    turns += [turn() for _ in range(rounds(sum(turns[0])) - 1)]
    return dict(zip(calls, map(list, zip(*turns, strict=True)), strict=True))


def sample(tensors: Iterable[Tensor], n: int = 256) -> dict[str, list[float]]:
    """About `n` evenly spaced values of each tensor, in logical order."""
    flat = (t.detach().flatten() for t in tensors)
    return {str(i): t[:: max(1, t.numel() // n)].double().tolist() for i, t in enumerate(flat)}


def operation_calls(arm: str, case: testing.Case, tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], list[Tensor]]]:
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
        return [function(*tensors, case.k)]

    example = forward()[0]
    grad = torch.empty_like(example).copy_(torch.randn(example.shape, generator=torch.Generator().manual_seed(1)))

    def both() -> list[Tensor]:
        out = function(*leaves, case.k)
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
    """A search under way on fixed batches; its steps are the search's own, optimizers included."""

    def __init__(self, arm: str, n: int = BATCH) -> None:
        torch.manual_seed(0)
        net = prepared(SuperNet(CLASSES, CIFAR10.channels, CIFAR10.cells, k=4), arm)
        for betas in net.betas():
            betas.data.normal_(0, 0.3)
        self.run, self.data = _Run(net, CIFAR10), batches(arm, n)
        self.steps = {"architecture step": self.architecture, "weight step": self.weights}

    def architecture(self) -> None:
        self.run.architecture_step(self.data[0])

    def weights(self) -> None:
        self.run.weight_step(self.data[1], CIFAR10.weight_lr)

    def both(self) -> None:
        self.architecture()
        self.weights()

    def first(self) -> dict[str, list[float]]:
        """Run the first iteration: its losses, beta gradients, and the direction in which every weight then went."""
        self.both()
        directions = self.run.sgd.velocity or []
        found = {f"weight {name}": values for name, values in sample(directions).items()}
        found |= {f"betas {name}": values for name, values in sample(self.run.gradient).items()}
        return found | {"loss": [row[0] for row in self.run.losses]}


def operations(arm: str) -> dict[str, Any]:
    found = {}
    for case in testing.BENCHMARKS:
        calls = operation_calls(arm, case, testing.OPERATIONS[case.op].inputs(case))
        values = {name: sample(call()) for name, call in calls.items()}
        for name, seconds in repeat(calls).items():
            found[f"{case} {name}"] = {"seconds": seconds, "values": values[name]}
    return found


def iteration(arm: str) -> dict[str, Any]:
    state = Iteration(arm)
    values = state.first()
    seconds = repeat(state.steps)
    seconds["iteration"] = [sum(pair) for pair in zip(*seconds.values(), strict=True)]
    return {name: {"seconds": s, "values": values} for name, s in seconds.items()}


def fresh_search(arm: str) -> dict[str, Any]:
    """The first search of this process, one iteration, batches in memory."""
    module = sys.modules[_Run.__module__]
    module.SuperNet = lambda *args: prepared(SuperNet(*args), arm)  # type: ignore[attr-defined]
    data = [(batch.images, batch.labels) for batch in batches(arm)]
    backend = "cpu" if arm.startswith("cpu") else "reference"
    results = []
    seconds = seconds_of(lambda: results.append(search(data, "1it", classes=CLASSES, backend=backend)))
    (result,) = results
    values = {f"betas {cell}": list(betas.gradient) for cell, betas in result.betas.items()}
    return {"search 1it": {"seconds": [seconds], "values": values | {"loss": list(result.losses[0])}}}


def flops(arm: str, n: int = 2) -> dict[str, Any]:
    """Floating point operations of each step, counted on a small batch: all of them are per image."""
    from torch.utils.flop_counter import FlopCounterMode

    found = {}
    for name, step in Iteration(arm, n).steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        found[name] = counter.get_total_flops() * BATCH // n
    return found | {"iteration": sum(found.values()), "search 1it": found["architecture step"]}


WORKS = {"operations": operations, "iteration": iteration, "search": fresh_search, "flops": flops}


def _peak_mb() -> float:
    """Largest resident memory; on Linux not from getrusage, which hands a large parent's peak on to its children."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    work, arm_name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    imported = _peak_mb()
    with running(arm_name):
        pieces = WORKS[work](arm_name)
    print(json.dumps({"pieces": pieces, "peak_mb": _peak_mb() - imported}))
