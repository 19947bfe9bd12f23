"""The session's measurements: the machine's rates, every arm in processes of its own, one row for each comparison."""

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import cache
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import arm as arms
import measure
import stages
import torch
import training as trainings
from ftso_fast.kernels import testing
from torch.utils.flop_counter import FlopCounterMode

from ftso_fast import kernels

HERE = Path(__file__).parent
LONG = os.environ.get("FTSO_BENCH") == "long"
THREADS = (1, 2) if LONG else (torch.get_num_threads(),)
PEERS = ("eager", "channels_last", "compile") if LONG else ("eager", "channels_last")
MEMORY = ("kept", "default") if LONG else ("kept",)
"""The short form has the setting that makes the peers faster."""
OURS = f"cpu/{kernels.isa()}"
COLD = ("first iteration", "search 1it", "PC-DARTS first iteration", "first training step")
"""Timed once in a process, as the first thing that it does after import, with the memory that it takes."""

LONGEST = 600
LARGE = {"PC-DARTS": "PC-DARTS' network", "training": "the network that is trained", "inference": "its inference"}
"""Seconds after which torch.compile of these works is left out, and the results say so."""

_told = [0.0]


def clock() -> float:
    """The timer of pytest-benchmark here: it tells the seconds that the arms' processes took."""
    return _told[0]


def replay(benchmark: Any, seconds: list[float]) -> None:
    """Tell pytest-benchmark what was measured."""
    left = iter(seconds)

    def one() -> None:
        _told[0] += next(left)

    benchmark.pedantic(one, rounds=len(seconds))


def _best(call: Any, n: int) -> float:
    call()
    return min(measure.seconds_of(call) for _ in range(n))


def _product(n: int, repeats: int) -> float:
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), repeats) / 1e9


@cache
def rates(threads: int) -> dict[str, float]:
    """Of the machine: GFLOP/s of multiply-adds on registers and of torch.mm, the best of three sizes; GB/s of copy_,
    read and written."""
    assert torch.get_num_threads() == threads
    seconds = _best(lambda: testing.fma_peak(10**7, threads), 10)
    peak = testing.fma_peak(10**7, threads) / seconds / 1e9
    product = max(_product(1024, 20), _product(2048, 8), _product(4096, 3))
    a = torch.ones(2**26)
    b = torch.empty_like(a)
    copied = 2 * 4 * a.numel() / _best(lambda: b.copy_(a), 10) / 1e9
    return {"FMA peak": peak, "torch.mm": product, "copy_": copied}


@cache
def flops() -> dict[str, float]:
    """Floating point operations of each piece, counted on two images of the reference: all of them are per image."""
    found = _flops_of_steps(arms.CIFAR10, arms.DARTS)
    total = found["iteration"]
    return found | {"iteration, batch 64": total * 64 / arms.BATCH, "search 1it": found["architecture step"]}


@cache
def network_flops() -> dict[str, float]:
    """The same of a step of training, and of inference."""
    n = 2
    with measure.running("eager"), FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        trainings.Training("eager", n).step()
    found = counter.get_total_flops() * trainings.BATCH / n
    inference = 2 * trainings.GENOTYPE.macs() * trainings.BATCH
    return {"training step": found, "first training step": found, "network inference": inference}


@cache
def pc_darts_flops() -> dict[str, float]:
    """The same of PC-DARTS' search."""
    return {f"PC-DARTS {name}": n for name, n in _flops_of_steps(arms.PC_DARTS, arms.ALL_OPERATORS).items()}


def _flops_of_steps(config: arms.SearchConfig, space: arms.SearchSpace) -> dict[str, float]:
    n, found = 2, {}
    with measure.running("eager"):
        for name, step in arms.Iteration("eager", arms.batches("eager", n), config, space).steps.items():
            with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
                step()
            found[name] = counter.get_total_flops() * config.batch_size / n
    total = sum(found.values())
    return found | {"iteration": total, "first iteration": total}


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """As many as forward for each of the two gradients; torch's own count of the weights' forgets the groups."""
    wanted = next(r for r in rest[::-1] if isinstance(r, list) and r and isinstance(r[0], bool))
    return 2 * prod(grad) * prod(weight[1:]) * sum(wanted[:2])


GROUPED = {torch.ops.aten.convolution_backward: _convolution_backward}


@cache
def bounds() -> dict[str, float]:
    """The arithmetic that a step is held against: the reference's, and in a weight step the stem once more, whose
    output is cheaper computed again than kept."""
    stem = 2 * 9 * 3 * 3 * arms.CIFAR10.channels * 32 * 32 * arms.BATCH
    return {"architecture step": flops()["architecture step"], "weight step": flops()["weight step"] + stem}


def processes(work: str, arm: str, threads: int) -> int:
    """How many processes an arm runs in; what is timed from cold is timed once in each."""
    if arm.startswith("cpu"):
        return {"search": 3, "iteration": 2}.get(work, 1)
    return 3 if work == "search" and LONG and threads == max(THREADS) else 1


class Lab:
    """`compare` measures one piece of a work on one arm and on its peers, and keeps a row of it."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self.folder = tempfile.TemporaryDirectory()
        self.sections: dict[str, dict[str, Any]] = {"rates": {}, "rows": {}, "stages": {}, "whole": {}}
        self.warnings = [f"load average {self.load:.2f} at start: the cores were not idle"] if self.load > 0.5 else []
        if (os.cpu_count() or 1) > 1:
            before, found = torch.get_num_threads(), []
            for n in (1, 2):
                torch.set_num_threads(n)
                found.append(_product(1024, 10))
            torch.set_num_threads(before)
            if found[1] < 1.6 * found[0]:
                self.warnings.append(f"two threads multiply only {found[1] / found[0]:.2f} times as fast as one")
        self.measured = cache(self._measured)
        self.in_time: dict[str, bool] = {}

    def rates(self, threads: int) -> dict[str, float]:
        return self.sections["rates"].setdefault(f"{threads} threads", rates(threads))

    def run(self, *command: Any, memory: str = "default", longest: float | None = None) -> str:
        """A command's output, or subprocess.TimeoutExpired after `longest` seconds. One compilation serves every thread
        count; the cache that keeps it begins empty."""
        inductor = {"TORCHINDUCTOR_CACHE_DIR": self.folder.name, "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
        call = [str(part) for part in command]
        begun, others = time.perf_counter(), _busy_with_others()
        environment = os.environ | inductor | measure.MEMORY[memory]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=longest)
        assert done.returncode == 0, f"{' '.join(call)}\n{done.stderr}"
        others, wall = _busy_with_others() - others, time.perf_counter() - begun
        if others > 0.1 * wall + 0.5:
            what = " ".join(Path(part).name for part in call[1:5])
            self.warnings.append(f"other processes took {others:.1f} s of the cores in the {wall:.1f} s of {what}")
        return done.stdout

    def _values(self, work: str) -> Path:
        """The file with what the reference computes for a work."""
        path = Path(self.folder.name, f"{work}.json")
        if not path.exists():
            path.write_text(json.dumps(self.measured(work, "eager", MEMORY[-1], max(THREADS))["values"]))
        return path

    def _measured(self, work: str, arm: str, memory: str, threads: int) -> dict[str, Any]:
        """One arm in processes of its own; each agrees with the reference before its stopwatch starts."""
        reference = (arm, memory, threads) == ("eager", MEMORY[-1], max(THREADS))
        values = [] if reference else [self._values({"epoch": "iteration"}.get(work, work))]
        found: dict[str, Any] = {}
        for _ in range(processes(work, arm, threads)):
            command = (sys.executable, HERE / "arm.py", work, arm, threads, *values)
            longest = LONGEST if arm == "compile" and work in LARGE else None
            output = self.run(*command, memory=memory, longest=longest)
            one = json.loads(output.splitlines()[-1])
            seconds = found.get("seconds", {})
            found = one | {"seconds": {piece: seconds.get(piece, []) + s for piece, s in one["seconds"].items()}}
        return found

    def compiles(self, work: str, threads: int) -> bool:
        """Whether torch.compile is a peer in this work: not in a search from cold, nor where it takes too long."""
        if work not in LARGE:
            return work != "search"
        if work not in self.in_time:
            try:
                self.measured(work, "compile", "default", threads)
                self.in_time[work] = True
            except subprocess.TimeoutExpired:
                self.warnings.append(f"torch.compile needs more than {LONGEST} s for {LARGE[work]}: left out")
                self.in_time[work] = False
        return self.in_time[work]

    def peers(self, work: str, piece: str, memory: str, threads: int) -> dict[str, dict[str, Any]]:
        """What every peer took that has this piece; `first s`: torch.compile's first iteration, which compiles."""
        found = {}
        for arm in PEERS:
            if arm == "compile" and not self.compiles(work, threads):
                continue
            told = self.measured(work, arm, memory, threads)
            if piece not in told["seconds"] or (arm == "compile" and piece in COLD):
                continue
            seconds = told["seconds"][piece]
            found[arm] = {"ms": 1e3 * median(seconds), "n": len(seconds)}
            found[arm] |= {"peak MB": told["peak MB"]} if piece in COLD else {}
            found[arm] |= {"saved MB": told["saved MB"]} if piece in COLD and told.get("saved MB") else {}
            if arm == "compile" and (cold := [first for first in COLD if first in told["seconds"]]):
                found[arm]["first s"] = told["seconds"][cold[0]][0]
        return found

    def compare(self, benchmark: Any, work: str, piece: str, arm: str, threads: int, amount: float, unit: str) -> None:
        """`amount`: bytes or floating point operations of one call; `unit`: GB/s or GFLOP/s."""
        limits = self.rates(threads)
        everyone = {memory: self.peers(work, piece, memory, threads) for memory in MEMORY}
        best = min(p["ms"] for there in everyone.values() for p in there.values())
        for memory, there in everyone.items():
            told = self.measured(work, arm, memory, threads)
            seconds = told["seconds"][piece]
            if memory == MEMORY[-1]:
                replay(benchmark, seconds)
            ms, rate = 1e3 * median(seconds), amount / median(seconds) / 1e9
            opponent = min(there, key=lambda a, there=there: there[a]["ms"])
            row = {"piece": piece, "arm": arm, "threads": threads, "memory": memory, "date": now()}
            row |= {"ms": ms, "n": len(seconds), "rate": rate, "unit": unit, "peers": there, "opponent": opponent}
            row |= {"ratio": there[opponent]["ms"] / ms, "of best": best / ms}
            row |= {"peak MB": told["peak MB"]} if piece in COLD else {}
            row |= {"saved MB": told["saved MB"]} if piece in COLD and "saved MB" in told else {}
            row |= {"memory held": True} if work == "search" else {}
            if unit == "GB/s":
                row["of copy_"] = rate / limits["copy_"]
            else:
                row |= {"of torch.mm": rate / limits["torch.mm"], "of FMA peak": rate / limits["FMA peak"]}
            if piece in bounds():
                bound = bounds()[piece] / 1e9
                row |= {"bound GFLOP": bound, "over bound": ms / (1e3 * bound / limits["torch.mm"])}
            self.sections["rows"][f"{piece} {arm} {threads} {memory}"] = row
            benchmark.extra_info[memory] = row

    def stages(self, benchmark: Any, step: str, threads: int) -> None:
        traced = self.measured("iteration", OURS, "kept", threads)["traced"][step]
        replay(benchmark, [run["seconds"] for run in traced])
        found = stages.summary(traced) | {"least barriers": stages.least_barriers()[step], "date": now()}
        peak = self.rates(threads)["FMA peak"]
        self.sections["stages"][f"{step}, {threads} threads"] = found | {"arm": OURS, "FMA peak": peak}

    def header(self) -> dict[str, Any]:
        cpuinfo = Path("/proc/cpuinfo")
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")] if cpuinfo.exists() else []
        cpu = models[0].split(":")[1].strip() if models else platform.processor()
        machine = {"cpu": cpu, "cores": os.cpu_count(), "isa": kernels.isa(), "torch": torch.__version__}
        machine["sources"] = _digest()
        form = "long" if LONG else "short"
        return {"date": now(), "machine": machine, "form": form, "load": round(self.load, 2), "warnings": self.warnings}

    def document(self) -> dict[str, Any]:
        return self.header() | self.sections


def _busy_with_others() -> float:
    """Seconds that the cores have worked for others than this process and its children; 0 where nobody tells."""
    stat, own = Path("/proc/stat"), os.times()
    if not stat.exists():
        return 0.0
    ticks = [int(n) for n in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - sum(own[:4])


def now() -> str:
    return datetime.datetime.now().isoformat(" ", "minutes")


def _digest() -> str:
    """Of the sources that decide what is measured."""
    root = HERE.parent
    files = [p for folder in ("csrc", "kernels", "ftso_fast") for p in sorted((root / folder).iterdir())]
    sources = [root / "CMakeLists.txt", *(p for p in files if p.suffix in (".cpp", ".h", ".py"))]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]
