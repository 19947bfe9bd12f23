"""Every Triton kernel compiled ahead of time, for GPUs that need not be there, and held to a committed budget.

`python -m ftso_fast.kernels.aot` compiles the `aot_cases()` of each `*_triton.py` and compares with `aot_budget.json`;
`--write` makes that file anew, `--json FILE` writes what was measured. Exit code 1 where a kernel is over its budget or
not in it. Read off the machine code: registers and spills of a thread, shared memory of a block, barriers, accesses to
global memory by their width in bits. Triton must not have been imported for its interpreter.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

BUDGET = Path(__file__).with_name("aot_budget.json")
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
MORE = ("registers", "spills", "shared", "barriers", "narrow")
"""What may not exceed the budget; `narrow`: accesses below 128 bits."""


class AotCase(NamedTuple):
    """A kernel at one set of types and constants. divisible: the arguments that are multiples of 16, as pointers are
    and as the just-in-time compiler takes integers; "x[1]" is an entry of a tuple."""

    name: str
    function: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    warps: int


def case(
    name: str, function: Any, types: dict[str, Any], constants: dict[str, Any], warps: int, integers: Sequence[str] = ()
) -> AotCase:
    """types: by argument, pointers ("*fp32", or a tuple of them) and numbers; what is neither there nor a constant is
    i32. Pointers are multiples of 16, and so are `integers`. Names that the kernel lacks count for nothing."""
    names = [p.name for p in function.params]
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    divisible: list[str] = []
    for n, kind in signature.items():
        if isinstance(kind, tuple):
            divisible += [f"{n}[{i}]" for i in range(len(kind))]
        elif kind.startswith("*") or n in integers:
            divisible.append(n)
    return AotCase(name, function, signature, constants, tuple(divisible), warps)


def cases() -> Iterator[AotCase]:
    """Of all files of Triton kernels, each name once."""
    for path in sorted(Path(__file__).parent.glob("*_triton.py")):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        for own in getattr(module, "aot_cases", tuple)():  # parts of kernels have none
            yield own._replace(name=f"{path.stem}.{own.name}")


def short_name(dtype: Any) -> str:
    """fp32, bf16, fp16."""
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def _attributes(of: AotCase) -> dict[tuple[int, ...], Any]:
    names, found = list(of.signature), {}
    for name in of.divisible:
        base, _, index = name.partition("[")
        found[(names.index(base), *([int(index[:-1])] if index else []))] = [["tt.divisibility", 16]]
    return found


def compiled(of: AotCase, target: str) -> Any:
    """The compiled kernel: `.asm["ptx"]`, `.asm["cubin"]`, `.asm["amdgcn"]`, `.metadata.shared`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(of.function, of.signature, of.constants, _attributes(of))
    options = {"num_warps": of.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def sass(kernel: Any) -> str:
    """The machine code of a kernel for an NVIDIA GPU, as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        return subprocess.run(
            [_tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True, timeout=60
        ).stdout


def measure(of: AotCase, target: str) -> dict[str, int]:
    """What a kernel needs; "ld128": loads of global memory 128 bits wide, and so on."""
    kernel = compiled(of, target)
    read = _nvidia if TARGETS[target][0] == "cuda" else _amd
    found = read(kernel) | {"shared": int(kernel.metadata.shared)}
    found["narrow"] = sum(n for name, n in found.items() if re.fullmatch(r"(ld|st)(8|16|32|64)", name))
    return dict(sorted(found.items()))


def _nvidia(kernel: Any) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    text = sass(kernel)
    found = {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spills": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "barriers": len(re.findall(r"\bBAR\.", text)),
    }
    for letter, name in (("LDG", "ld"), ("STG", "st")):
        for options in re.findall(rf"\b{letter}((?:\.\w+)*)", text):
            width = next((o for o in options.split(".") if o in ("U8", "S8", "U16", "S16", "64", "128", "256")), "32")
            key = f"{name}{width.lstrip('US')}"
            found[key] = found.get(key, 0) + 1
    return found


def _amd(kernel: Any) -> dict[str, int]:
    text = kernel.asm["amdgcn"]
    found = {
        "registers": int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0]),
        "spills": sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)),
        "barriers": len(re.findall(r"\bs_barrier\b", text)),
    }
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    for way, name in (("load", "ld"), ("store", "st")):
        access = rf"\b(?:global|buffer|flat)_{way}_(?:d16_)?[us]?(dwordx[234]|dword|short|byte)\w*"
        for kind in re.findall(access, text):
            key = f"{name}{widths[kind]}"
            found[key] = found.get(key, 0) + 1
    return found


def over(found: dict[str, int], budget: dict[str, int]) -> list[str]:
    """Why a kernel does not keep to its budget."""
    return [f"{what} {found[what]}, budget {budget.get(what, 0)}" for what in MORE if found[what] > budget.get(what, 0)]


@cache
def _by_name() -> dict[str, AotCase]:
    return {own.name: own for own in cases()}


def _measure(pair: tuple[str, str]) -> dict[str, int]:
    return measure(_by_name()[pair[0]], pair[1])


def in_turns(names: Sequence[str]) -> list[str]:
    """Of those that differ in their type alone, one, which takes turns."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(re.sub("bf16|fp16|fp32", "type", name), []).append(name)
    return [group[i % len(group)] for i, group in enumerate(alike.values())]


def table(targets: Sequence[str], select: str = "", spread: bool = False) -> dict[str, dict[str, dict[str, int]]]:
    """By kernel, by target; `select`: only names that contain it; `spread`: each on one target and with one type,
    which take turns. Compiled in several processes: Triton holds Python's lock for most of the time."""
    names = [name for name in _by_name() if select in name]
    if spread:
        pairs = [(name, targets[i % len(targets)]) for i, name in enumerate(in_turns(names))]
    else:
        pairs = [(name, target) for name in names for target in targets]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        measured = list(pool.map(_measure, pairs, chunksize=4))
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (name, target), values in zip(pairs, measured, strict=True):
        found.setdefault(name, {})[target] = values
    return found


def problems(found: dict[str, Any], budget: dict[str, Any], there: Collection[str]) -> list[str]:
    """A sentence for each kernel over its budget or not in it, and for what is in the budget and no kernel `there`."""
    said = []
    for name, by_target in found.items():
        for target, values in by_target.items():
            if target not in budget.get(name, {}):
                said.append(f"{name} {target}: not in the budget")
                continue
            said += [f"{name} {target}: {why}" for why in over(values, budget[name][target])]
            if values["spills"] and target.startswith("sm"):
                said.append(f"{name} {target}: spills {values['spills']}")
    return said + [f"{name}: in the budget, but there is no such kernel" for name in budget if name not in there]


def main() -> int:
    parser = argparse.ArgumentParser(description="compile all Triton kernels and hold them to their budget")
    parser.add_argument("--write", action="store_true", help="make the budget anew")
    parser.add_argument("--json", help="a file for what was measured")
    parser.add_argument("--select", default="", help="only kernels whose names contain this")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--spread", action="store_true", help="each kernel for one target and one type only, in turns")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        found = table(args.targets, args.select, args.spread)
    if args.json:
        Path(args.json).write_text(dump(found))
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if args.write:
        kept = budget if args.select or args.spread or len(args.targets) < len(TARGETS) else {}
        for name, by_target in found.items():
            kept[name] = kept.get(name, {}) | by_target
        BUDGET.write_text(dump(kept))
        print(f"{len(found)} kernels written to {BUDGET.name}")
        return 0
    said = problems(found, budget, _by_name())
    on = "one each of " if args.spread else ""
    print("\n".join(said) or f"{len(found)} kernels on {on}{len(args.targets)} targets keep to their budget")
    return 1 if said else 0


def dump(budget: dict[str, Any]) -> str:
    """A line for each kernel and target, so that a change shows what it changed."""
    lines = []
    for name in sorted(budget):
        rows = ",\n".join(f"  {json.dumps(t)}: {json.dumps(budget[name][t])}" for t in TARGETS if t in budget[name])
        lines.append(f"{json.dumps(name)}: {{\n{rows}\n}}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
