"""Fixtures, and the guard that a whole run has tested every instruction set that the machine has.

What tests show by `verified` and `refuses` is written to the file that FTSO_VERIFIED names, for docs/verification.md.
"""

import importlib
import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest

# before torch is imported: two workers with two threads each share two cores, and a thread that waits should not spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from ftso_fast.kernels import _backend

from ftso_fast import kernels
from ftso_fast.cli import main

# a test's own `python -c` must import the installed package, not the source folder that it happens to run in
os.environ["PYTHONSAFEPATH"] = "1"

# the name `kernels.skip_net` is the function
skip_net_module = importlib.import_module("ftso_fast.kernels.skip_net")

VERIFIED = Path(__file__).resolve().parent.parent / "docs" / "verified.json"
_isas_run: set[str] = set()
_shown: dict[str, int] = {}


def machine_isas() -> list[str]:
    """What the machine has, read from the system and not from the core, which could be wrong about it."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return ["scalar"]
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split())
    found = ["scalar"]
    if {"avx2", "fma"} <= flags:
        found.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            found.append("avx512")
            if "avx512_bf16" in flags:
                found.append("avx512bf16")
                if {"amx_tile", "amx_bf16"} <= flags:
                    found.append("amx")
    return found


every_isa = pytest.mark.parametrize("isa", machine_isas(), indirect=True)
"""For tests of what all instruction sets have a text of their own for."""


@pytest.fixture(params=[name for name in machine_isas() if name not in _backend.OTHERS])
def isa(request):
    """Each instruction set of this machine in turn, forced; the kernels themselves say which one ran."""
    before = kernels.calls()
    with kernels.use_isa(request.param):
        yield request.param
    ran = {name.split("/")[1] for name, n in kernels.calls().items() if n != before.get(name, 0)}
    assert ran <= {request.param, _backend.OTHERS.get(request.param)}, f"asked for {request.param}, ran {ran}"
    _isas_run.update(ran)


def _recorder(request, *more):
    """Names what a test shows; the cpu's instruction sets other than the machine's own count for nothing here, but
    where that one has no text of its own its stand-in does."""
    fastest = kernels.available_isas()[0]
    counted = {fastest} if every_isa.mark in request.node.iter_markers() else {fastest, _backend.OTHERS.get(fastest)}

    def show(op, backend, dtype=torch.float32, ways=("forward", "backward")):
        if backend == "cpu" and kernels.isa() not in counted:
            return
        for way in ways:
            name = " ".join((op, backend, way, str(dtype).removeprefix("torch."), *more))
            request.node.user_properties.append(("verified", name))

    return show


@pytest.fixture
def verified(request):
    """verified(operation, backend, dtype, ways): where this test passes they agree with float64."""
    return _recorder(request)


@pytest.fixture
def refuses(request):
    """refuses(operation, backend, dtype, ways): where this test passes they are refused in a sentence."""
    return _recorder(request, "refused")


@pytest.fixture
def one_thread():
    """For images too small to share: idle threads that spin make tests slow where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Run one command in this process: (exit code, stdout, stderr)."""

    def command(*argv):
        code = main(list(map(str, argv)))
        return (code, *capsys.readouterr())

    threads = torch.get_num_threads()
    yield command
    torch.set_num_threads(threads)  # `--threads` is for the process


@pytest.fixture
def wrap_net(monkeypatch):
    """wrap_net(forward=f, backward=g): the compiled network with f(net, *arguments) in place of its own method."""

    def wrap(**methods):
        class Wrapped:
            def __init__(self, *spec):
                self.net = real.SkipNet(*spec)

            def __getattr__(self, name):
                if name in methods:
                    return lambda *arguments: methods[name](self.net, *arguments)
                return getattr(self.net, name)

        monkeypatch.setattr(skip_net_module, "core", lambda: SimpleNamespace(SkipNet=Wrapped))
        kernels.release_memory()

    real = skip_net_module.core()
    yield wrap
    kernels.release_memory()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker of pytest-xdist has ended: what it ran counts for the whole."""
    _isas_run.update(getattr(node, "workeroutput", {}).get("isas", ()))


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "verified":
                _shown[value] = _shown.get(value, 0) + 1


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["isas"] = sorted(_isas_run)
        return
    if path := os.environ.get("FTSO_VERIFIED"):
        Path(path).write_text(json.dumps(_shown))
    whole = config.args_source != config.ArgsSource.ARGS and not config.option.keyword and not config.option.lf
    if not whole or exitstatus != 0:
        return
    if missed := set(machine_isas()) - _isas_run:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nFAILED: this machine has {', '.join(sorted(missed))}, and no kernel test ran it")
    documented = json.loads(VERIFIED.read_text())["tests"]
    if changed := sorted(name for name, n in _shown.items() if documented.get(name) != n):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nFAILED: docs/verified.json is out of date: {', '.join(changed)}")


def pytest_report_header():
    return f"data: {'CIFAR-10 from FTSO_DATA' if cifar() else 'digits (FTSO_DATA names no CIFAR-10)'}"


def cifar() -> str | None:
    folder = os.environ.get("FTSO_DATA")
    path = Path(folder) / "cifar10_10k2k.npz" if folder else None
    return str(path) if path and path.exists() else None


@pytest.fixture(scope="session")
def images_path():
    """Real images for `--data`: CIFAR-10 where FTSO_DATA has it, else digits."""
    return cifar() or "digits"
