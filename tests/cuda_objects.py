"""What nvcc made of the CUDA kernels: registers, spills, shared memory, programs that fit a multiprocessor.

`python tests/cuda_objects.py` prints it as the budget, `tests/cuda_budget.json`, that a test holds the kernels to.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

BUDGET = Path(__file__).with_name("cuda_budget.json")
CHANNELS = (16, 32, 64, 128)
# of a multiprocessor: bytes of shared memory, threads
MACHINES = {"sm_80": (164, 2048), "sm_86": (100, 1536), "sm_90": (228, 2048), "sm_100": (228, 2048)}
THREADS, REGISTERS, RESERVED = 256, 65536, 1024


def built() -> Path | None:
    """The installed module, which is not imported."""
    spec = importlib.util.find_spec("ftso_fast._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def cuobjdump() -> str | None:
    """NVIDIA's tool, on the PATH or from triton."""
    spec = importlib.util.find_spec("triton")
    beside = [Path(p) / "backends" / "nvidia" / "bin" for p in (spec.submodule_search_locations or [])] if spec else []
    return shutil.which("cuobjdump") or next((t for d in beside if (t := shutil.which("cuobjdump", path=d))), None)


def nvcc_version() -> str | None:
    """As "13.0"."""
    if not shutil.which("nvcc"):
        return None
    return re.search(r"release ([\d.]+)", _said("nvcc", "--version"))[1]


def resources() -> dict[str, dict[str, dict[str, int]]]:
    """By architecture and kernel. Needs the module and cuobjdump."""
    from ftso_fast import _cuda

    shared = {C: _cuda.cell_shared_bytes(C) for C in CHANNELS}
    found: dict[str, dict[str, dict[str, int]]] = {}
    arch = kernel = ""
    for line in _said("c++filt", text=_said(cuobjdump(), "-res-usage", built())).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function .*?(\w+(?:<\d+>)?)\(", line):
            kernel = match[1]
        elif "REG:" in line and arch in MACHINES:
            used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            name, channels = re.match(r"(\w+)(?:<(\d+)>)?", kernel).groups()
            bytes_shared = shared[int(channels)][name] if channels else used["SHARED"]
            found.setdefault(arch, {})[kernel] = {
                "registers": used["REG"],
                "spilled": used["STACK"] + used["LOCAL"],
                "shared": bytes_shared,
                "blocks": _blocks(arch, used["REG"], bytes_shared),
            }
    return found


def _blocks(arch: str, registers: int, shared: int) -> int:
    """How many programs a multiprocessor holds at once, on paper."""
    memory, threads = MACHINES[arch]
    by_registers = REGISTERS // ((registers + 7) // 8 * 8 * THREADS)
    return min(by_registers, memory * 1024 // (shared + RESERVED), threads // THREADS)


def opcodes() -> dict[str, set[str]]:
    """By architecture, the instructions of our kernels."""
    found: dict[str, set[str]] = {}
    arch, ours = "", False
    for line in _said(cuobjdump(), "-sass", built()).splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        elif "Function :" in line:
            ours = "ftso" in line
        elif ours and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line)):
            found.setdefault(arch, set()).add(match[1])
    return found


def _said(*command: object, text: str | None = None) -> str:
    done = subprocess.run([str(c) for c in command], input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    print(json.dumps({"nvcc": nvcc_version(), "kernels": resources()}, indent=1, sort_keys=True))
