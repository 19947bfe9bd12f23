"""Builds of the CUDA kernels' own text for the CPU: programs under the sanitizers, and a module in _cuda's place."""

import enum
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
BUILDS = ("plain", "asan", "tsan")
FAULT = 3  # `kFault` of csrc/emu/cuda_emu.h
STOPPED = 77  # the exit status of a program that a sanitizer stops
SANITIZERS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"],
    "tsan": ["-fsanitize=thread", "-g1"],
}


class Policy(enum.Enum):
    """Who goes on: `Policy` of csrc/emu/cuda_emu.h."""

    ASCENDING, DESCENDING, FIRST_AHEAD, LAST_AHEAD, RANDOM = range(5)


class Order(enum.Enum):
    """Which block comes next: `Order` of csrc/emu/cuda_emu.h."""

    ASCENDING, DESCENDING, SHUFFLED = range(3)


POLICIES, ORDERS = tuple(Policy), tuple(Order)


def flags() -> list[str]:
    """Multiply-adds are one operation on a GPU, and here where the processor has it."""
    fma = ["-mfma"] if platform.machine() == "x86_64" and "fma" in Path("/proc/cpuinfo").read_text() else []
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    return ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=fast", *fma, *warnings, f"-I{CSRC}", f"-I{CSRC / 'emu'}"]


def compile_all(folder: Path, jobs: list[list[str]]) -> None:
    """The compiler's runs, side by side."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    running = [
        subprocess.Popen([*compiler.split(), *job], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for job in jobs
    ]
    for job in running:
        said = job.communicate()[0].decode()
        assert job.returncode == 0, said


_built = tempfile.TemporaryDirectory(prefix="ftso_emulated_")  # for the whole run; gone with the process


def _folder(name: str) -> Path:
    folder = Path(_built.name) / name
    folder.mkdir()
    return folder


@cache
def known_bad(build: str) -> Path:
    return _program(build, ROOT / "tests" / "emu" / "known_bad.cu", [])


@cache
def cell_program(build: str) -> Path:
    source = ROOT / "tests" / "emu" / "cell_step.cpp"
    return _program(build, source, [CSRC / "cell_step.cu"])


def _program(build: str, main: Path, kernels: list[Path]) -> Path:
    folder = _folder(f"{main.stem}_{build}")
    sanitizer = SANITIZERS[build]
    texts = [[*flags(), *sanitizer, "-x", "c++", "-c", str(t), "-o", f"{t.name}.o"] for t in (main, *kernels)]
    compile_all(folder, [[*flags(), "-c", str(CSRC / "emu" / "cuda_emu.cpp"), "-o", "cuda_emu.o"], *texts])
    compile_all(folder, [[*sanitizer, *(f"{t.name}.o" for t in (main, *kernels)), "cuda_emu.o", "-o", main.stem]])
    return folder / main.stem


@cache
def module_path() -> Path:
    """bindings.cpp, launchers and kernels of _cuda on the emulator: the module _cuda_emulated."""
    folder = _folder("module")
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-DFTSO_MODULE=_cuda_emulated"]
    sources = [CSRC / "cuda_bindings.cpp", CSRC / "cell_step.cu", CSRC / "emu" / "cuda_emu.cpp"]
    sources += [CSRC / "emu" / "control.cpp"]
    compile_all(folder, [[*flags(), *python, "-x", "c++", "-c", str(s), "-o", f"{s.name}.o"] for s in sources])
    target = f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    compile_all(folder, [["-shared", *(f"{s.name}.o" for s in sources), "-o", target]])
    return folder / target


def run(program: Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a program of ours. Where addresses are spread too widely for TSan, it starts again without that."""
    command = [str(program), *map(str, arguments)]
    stop = f"halt_on_error=1:exitcode={STOPPED}"
    environment = os.environ | {"TSAN_OPTIONS": stop, "ASAN_OPTIONS": f"{stop}:detect_leaks=0", "UBSAN_OPTIONS": stop}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    if "unexpected memory mapping" in done.stderr:
        command = ["setarch", platform.machine(), "-R", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    return done
