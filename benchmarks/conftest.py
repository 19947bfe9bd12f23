"""What every benchmark shares: the machine's rates, the peers' processes, the gate of equality, and the table."""

import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from ftso_fast import kernels

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # importlib mode: the tests import peer too
peer = importlib.import_module("peer")
LONG = os.environ.get("FTSO_BENCH") == "long"
THREADS = (1, 2) if LONG else (torch.get_num_threads(),)
PEERS = ("eager", "channels_last", "compile") if LONG else ("eager", "channels_last")
LAB = pytest.StashKey["Lab"]()
COLUMNS = ("work", "arm", "threads", "memory", "ms", "n", "rate", "of rate", "of conv", "opponent")
COLUMNS += ("its ms", "ratio", "of best")
NOTES = """\
memory: glibc as it is, or told to keep it (MALLOC_MMAP_MAX_=0 ...). of rate: GB/s as a part of copy_, GFLOP/s of
torch.mm, which is no limit where its library leaves AVX-512 unused (above 100% is then possible); of conv: of a 1x1
convolution by oneDNN. opponent: the fastest peer with the same memory setting; ratio: its time over ours; of best: the
same for the fastest peer of any setting. GFLOP are those of the reference (torch.utils.flop_counter); perf.md's 31.8
for the weight step has 0.7 more, the stem computed twice. search 1it: first call in a fresh process, import excluded,
batches in memory, without torch.compile, which compiles for longer than any peer runs."""


@pytest.fixture(params=THREADS, ids=lambda n: f"{n}threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lab(request):
    request.config.stash[LAB] = Lab()
    return request.config.stash[LAB]


def _best(call, n: int) -> float:
    call()
    return min(peer.seconds_of(call) for _ in range(n))


def _product(n: int, repeats: int) -> float:
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), repeats)


@cache
def rates(threads: int) -> dict[str, float]:
    """Of the machine: GFLOP/s of torch.mm and of a 1x1 convolution, GB/s of copy_, read and written."""
    assert torch.get_num_threads() == threads
    a = torch.ones(2**26)
    b = torch.empty_like(a)
    copied = 2 * 4 * a.numel() / _best(lambda: b.copy_(a), 10)
    product = max(_product(1024, 20), _product(2048, 8), _product(4096, 3))
    x, w = (torch.randn(*s).to(memory_format=torch.channels_last) for s in ((16, 256, 32, 32), (256, 256, 1, 1)))
    with torch.no_grad():
        convolved = 2 * x.numel() * 256 / _best(lambda: torch.conv2d(x, w), 20)
    return {"GFLOP/s": product / 1e9, "GB/s": copied / 1e9, "conv": convolved / 1e9}


@cache
def measured(work: str, arm: str, memory: str, threads: int) -> dict[str, Any]:
    """One arm in processes of its own (see peer.py): per piece of the work its seconds, values and peak memory."""
    processes = 3 if work == "search" and (LONG or arm.startswith("cpu")) else 1
    command = [sys.executable, str(HERE / "peer.py"), work, arm, str(threads)]
    found: dict[str, Any] = {}
    for _ in range(processes):
        done = subprocess.run(command, env=os.environ | peer.MEMORY[memory], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command[1:])}\n{done.stderr}"
        document = json.loads(done.stdout.splitlines()[-1])
        if work == "flops":
            return document["pieces"]
        for piece, result in document["pieces"].items():
            kept = found.setdefault(piece, result | {"seconds": [], "peak_mb": document["peak_mb"]})
            kept["seconds"] += result["seconds"]
            assert kept["values"] == result["values"], f"{arm}: {piece}: other values in another process"
    return found


def assert_equal(got: dict[str, list[float]], want: dict[str, list[float]], tolerance: dict[str, float], what: str):
    """`tolerance`: first word of a value's name -> largest difference, as a part of the largest wanted value."""
    assert got.keys() == want.keys()
    for name, right in want.items():
        scale = max(map(abs, right))
        error = max(abs(g - w) for g, w in zip(got[name], right, strict=True)) / scale
        limit = tolerance.get(name.split()[0], tolerance.get(""))
        assert error <= limit, f"{what}: {name}: differs by {error:.1e} of the largest value, allowed {limit:.0e}"


def its_eager(row: dict[str, Any]) -> float:
    """The eager peer's time over ours: about 1 where ours is the reference, unless something disturbed one of them."""
    return row["peers"]["eager"]["ms"] / row["ms"]


class Lab:
    """The session's measurements: `gate` before a timing, `record` after it."""

    measured = staticmethod(measured)

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self.rows: list[dict[str, Any]] = []
        self.used: dict[int, dict[str, float]] = {}
        self.warnings = [f"load average {self.load:.2f} at start: the cores were not idle"] if self.load > 0.5 else []
        if (os.cpu_count() or 1) > 1:
            before, found = torch.get_num_threads(), []
            for n in (1, 2):
                torch.set_num_threads(n)
                found.append(_product(1024, 10))
            torch.set_num_threads(before)
            if found[1] < 1.6 * found[0]:
                self.warnings.append(f"two threads multiply only {found[1] / found[0]:.2f} times as fast as one")

    def peers(self, work: str, threads: int) -> dict[tuple[str, str], dict[str, Any]]:
        arms = [arm for arm in PEERS if (work, arm) != ("search", "compile")]
        return {(a, m): measured(work, a, m, threads) for m in peer.MEMORY for a in arms}

    def kept(self, work: str, arm: str, threads: int) -> dict[str, Any]:
        """Our own arm with its memory kept; the reference is the eager peer."""
        return measured(work, "eager" if arm == "reference" else arm, "kept", threads)

    def gate(self, work, piece, arm, threads, values, tolerance) -> None:
        """Every arm that the row compares has computed the same; else there is no timing."""
        want = measured(work, "eager", "default", threads)[piece]["values"]
        others = {" ".join(name): result for name, result in self.peers(work, threads).items()}
        others[f"{arm} kept"] = self.kept(work, arm, threads)
        for name, got in {arm: values, **{n: r[piece]["values"] for n, r in others.items()}}.items():
            assert_equal(got, want, tolerance, f"{piece}, {name} against the reference")

    def record(self, benchmark, work, piece, arm, threads, amount: float, unit: str, peak_mb=None) -> None:
        """`amount`: bytes or floating point operations of one call; `unit`: GB/s or GFLOP/s."""
        if benchmark.stats is None:  # --benchmark-disable
            return
        limits = self.used.setdefault(threads, rates(threads))
        peers = {name: result[piece] for name, result in self.peers(work, threads).items()}
        best = min(median(p["seconds"]) for p in peers.values())
        own = {"default": {"seconds": benchmark.stats.stats.data, "peak_mb": peak_mb}}
        own["kept"] = self.kept(work, arm, threads)[piece]
        for memory, result in own.items():
            seconds, n = median(result["seconds"]), len(result["seconds"])
            there = {a: p for (a, m), p in peers.items() if m == memory}
            opponent = min(there, key=lambda a: median(there[a]["seconds"]))
            its = median(there[opponent]["seconds"])
            rate = amount / seconds / 1e9
            row = {"work": piece, "arm": arm, "threads": threads, "memory": memory, "ms": seconds * 1e3, "n": n}
            row |= {"rate": rate, "unit": unit, "of rate": rate / limits[unit], "opponent": opponent}
            row["of conv"] = rate / limits["conv"] if unit == "GFLOP/s" else None
            row |= {"its ms": its * 1e3, "ratio": its / seconds, "of best": best / seconds}
            row["peers"] = {a: {"ms": median(p["seconds"]) * 1e3, "n": len(p["seconds"])} for a, p in there.items()}
            if work != "operations":
                row["peak MB over import"] = {a: p["peak_mb"] for a, p in {arm: result, **there}.items()}
            if (arm, memory) == ("reference", "default") and not 0.6 < its_eager(row) < 1.7:
                self.warnings.append(f"{piece}: eager took {its_eager(row):.1f} times as long in the peer's process")
            self.rows.append(row)
            benchmark.extra_info[memory] = row

    def header(self) -> dict[str, Any]:
        cpuinfo = Path("/proc/cpuinfo")
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")] if cpuinfo.exists() else []
        cpu = models[0].split(":")[1].strip() if models else platform.processor()
        found = {"date": datetime.datetime.now().isoformat(" ", "minutes"), "cpu": cpu, "cores": os.cpu_count()}
        found |= {"threads": THREADS, "torch": torch.__version__, "isa": kernels.isa(), "load": round(self.load, 2)}
        return found | {"rates": self.used}

    def table(self) -> list[str]:
        """A Markdown table, its columns aligned."""
        cells = [list(COLUMNS)]
        for row in self.rows:
            shown = {"ms": f"{row['ms']:.2f}", "rate": f"{row['rate']:.1f} {row['unit']}"}
            shown |= {"of rate": f"{row['of rate']:.0%}", "its ms": f"{row['its ms']:.2f}"}
            shown["of conv"] = "" if row["of conv"] is None else f"{row['of conv']:.0%}"
            shown |= {"ratio": f"{row['ratio']:.2f}", "of best": f"{row['of best']:.2f}"}
            cells.append([str(shown.get(name, row[name])) for name in COLUMNS])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * w for w in widths])
        return [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in cells]

    def text(self) -> str:
        head = self.header()
        rates_used = head.pop("rates")
        lines = [", ".join(f"{name} {value}" for name, value in head.items())]
        for n, found in rates_used.items():
            of = {"torch.mm": "GFLOP/s", "1x1 convolution": "conv", "copy_": "GB/s"}
            shown = (f"{name} {found[key]:.0f} {'GB/s' if key == 'GB/s' else 'GFLOP/s'}" for name, key in of.items())
            lines.append(f"rates, {n} threads: {', '.join(shown)}")
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        return "\n".join([*lines, "", *self.table(), "", NOTES])


def pytest_terminal_summary(terminalreporter, config):
    lab = config.stash.get(LAB, None)
    if lab is None or not lab.rows:
        return
    terminalreporter.section("ftso_fast against its peers")
    terminalreporter.write_line(lab.text())
    if out := os.environ.get("FTSO_BENCH_OUT"):
        document = lab.header() | {"warnings": lab.warnings, "rows": lab.rows}
        Path(out).with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        Path(out).with_suffix(".md").write_text(lab.text() + "\n")
