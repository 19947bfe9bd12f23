"""docs/verification.md: what has been verified how. `python benchmarks/verification.py` makes the page from
docs/verified.json and the budget of compiled kernels; `--run` runs the tests that show it first and writes that file.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from tables import aligned

ROOT = Path(__file__).resolve().parent.parent
PAGE, VERIFIED = ROOT / "docs" / "verification.md", ROOT / "docs" / "verified.json"
BUDGET = ROOT / "kernels" / "aot_budget.json"
GPUS = {"A100": (1.56e12, 19.5e12), "H100": (3.35e12, 67e12)}
"""Bytes a second from memory, float32 operations a second outside tensor cores."""
BARRIERS = {
    "skip_cell": (0, "none"),
    "relu_conv_bn": (1, "the batch norm"),
    "factorized_reduce": (1, "the batch norm"),
    "dil_conv": (1, "the batch norm"),
    "sep_conv": (2, "the inner batch norm, the outer one"),
    "partial_mix, all operators": (2, "batch norms within separable convolutions, those behind operators"),
    "partial_mix, pools": (1, "the pools' batch norms"),
}
"""Where all of a batch must be known before the next number can be: one launch more than barriers is the least."""
NODE = ("_node_triton", "partial_mix_triton")
FILES = dict.fromkeys(("sep_conv", "dil_conv", "relu_conv_bn", "factorized_reduce", "partial_mix"), NODE)
FILES["skip_net"] = ("stem_step_triton", "cell_step_triton", "reduce_step_triton", "finish_triton")
"""The files of an operation's kernels, where that is not `<operation>_triton`."""
HOW = {"cpu": "run", "triton": "interpreted", "cuda": "emulated"}
ABOUT = """\
# What is verified, and how

Made by `benchmarks/verification.py` from the results of tests; do not edit. No GPU was there: no figure on this page
was timed on one.

- **run**: the machine's own instruction set, against float64, values and every gradient, in all cases.
- **interpreted**: Triton's interpreter runs the kernel's own text on the cpu, against float64, values and every
  gradient, odd sizes, NaN around inputs and in fresh memory. It shows neither races between programs nor what a GPU's
  compiler makes of it.
- **compiled**: ahead of time for sm_80, sm_90, sm_100, sm_120 and gfx942, registers, spills, shared memory and barriers
  held to `kernels/aot_budget.json`; in half precision at some sizes only, which the last table names: the search's own
  network runs in float32.
- **emulated**: the CUDA source, compiled for the cpu with our emulation of threads and barriers, against float64,
  values and every gradient.
- **refused**, **none**: a test shows the sentence that such a call meets. `folded_conv` is for inference and has no
  derivative. `skip_net` takes float32 tensors on every backend: its `precision` on the cpu is what products are rounded
  to.

The number is how many tests show it. `mixed_cell`, `node_sum` and `folded_conv` have no kernel for GPUs: on one, the
choice left alone runs their definitions in plain PyTorch.

On a machine with a GPU, `ftso selfcheck --device cuda` runs the same comparisons there."""

LAUNCHES = """\
Between two barriers of a batch norm one launch is enough, in principle. Counted by the interpreter: those that do the
work, and small ones that add up partial sums in a fixed order. Backward, what lies behind a depthwise convolution is
written by one launch and read with a halo by the next: one more than the least for each batch norm. Where there are
several weights torch's own concatenation of them is one more, forward and backward."""


def run() -> dict[str, Any]:
    """Run what shows it; raises where a test fails."""
    found: dict[str, int] = {}
    here = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    environment = here | {"TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((ROOT / "tests").rglob("test_*.py")):
            if not re.search(r"^ +(verified|refuses)\(", path.read_text(), re.MULTILINE):
                continue
            passed = Path(folder) / "passed.json"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
            variables = environment if path.parent.name == "gpu" else here
            subprocess.run(command, cwd=ROOT, check=True, env=variables | {"FTSO_VERIFIED": str(passed)})
            shown = json.loads(passed.read_text())
            assert not set(shown) & set(found), path
            found |= shown
    code = "import sys, json; sys.path.insert(0, 'tests'); import gpu_launches, torch; from ftso_fast import kernels\n"
    code += "with kernels.use_backend('triton'): print(json.dumps(gpu_launches.launches()))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment, capture_output=True)
    from ftso_fast.kernels.selfcheck import selfcheck

    for row in selfcheck("cpu"):
        assert not row.failed, row.failed
        found |= {f"{row.operation} {row.backend} {way} float32": row.agreed for way in ("forward", "backward")}
    return {"tests": dict(sorted(found.items())), "launches": json.loads(said.stdout)}


def _cell(name: str, n: int, budget: dict[str, Any]) -> str:
    op, backend, _, dtype = name.split()
    how = f"{HOW[backend]} ({n})"
    if backend != "triton":
        return how
    short = dtype.replace("bfloat", "bf").replace("float", "fp")
    kernels = [k for k in budget if k.split(".")[0] in FILES.get(op, (f"{op}_triton",))]
    # where no type is named it is float32
    own = [k for k in kernels if short in k or (short == "fp32" and not re.search(r"[bf][pf](16|32)", k))]
    targets = set.intersection(*(set(budget[k]) for k in own)) if own else set()
    return f"{how}, compiled for {len(targets)}" if targets else f"{how}, not compiled ahead of time"


def what_is_verified(verified: dict[str, Any], budget: dict[str, Any]) -> str:
    """Operation and backend down, direction and type across; a number is how many tests show it."""
    tests = verified["tests"]
    rows = sorted({tuple(name.split()[:2]) for name in tests})
    columns = [(way, dtype) for dtype in ("float32", "bfloat16", "float16") for way in ("forward", "backward")]
    table = [["operation", "backend", *(f"{dtype} {way}" for way, dtype in columns)]]
    for op, backend in rows:
        cells = []
        for way, dtype in columns:
            name = f"{op} {backend} {way} {dtype}"
            no = "not tested" if f"{name} refused" not in tests else "none" if dtype == "float32" else "refused"
            cells.append(_cell(name, tests[name], budget) if name in tests else no)
        table.append([op, backend, *cells])
    return "\n".join(aligned(table))


def launches(verified: dict[str, Any]) -> str:
    table = [["operation", "barriers", "least, either way", "forward", "and finishing", "backward", "and finishing"]]
    for name, (n, what) in BARRIERS.items():
        counted = verified["launches"][name]
        table.append([name, what, str(n + 1), *(str(c) for way in ("forward", "backward") for c in counted[way])])
    return "\n".join(aligned(table))


def floors() -> str:
    """On paper, float32: the least bytes, the operations, and the time that either takes at the GPU's full rate."""
    from ftso_fast.kernels import testing

    table = [["operation", "direction", "MB", "GFLOP", *(f"floor {gpu}, us" for gpu in GPUS)]]
    for case in testing.BENCHMARKS:
        operation = testing.OPERATIONS[case.op]
        numbers = zip(("forward", "forward+backward"), operation.bytes_moved(case), operation.flops(case), strict=True)
        for direction, moved, flops in numbers:
            if case.op == "skip_cell":  # 14 multiply-adds a pixel; backward 20, and 14 dots
                flops = 2 * (14 if direction == "forward" else 14 + 20 + 14) * prod((case.B, case.C, case.H, case.W))
            times = [f"{1e6 * max(moved / rate, flops / peak):.1f}" for rate, peak in GPUS.values()]
            table.append([str(case), direction, f"{moved / 1e6:.1f}", f"{flops / 1e9:.2f}", *times])
    return "\n".join(aligned(table))


def compiled(budget: dict[str, Any]) -> str:
    spilling = [
        f"{name} on {target}"
        for name, by_target in sorted(budget.items())
        for target, v in by_target.items()
        if target.startswith("sm") and v["spills"]
    ]
    table = [["kernel", *sorted(next(iter(budget.values())))]]
    for name, by_target in sorted(budget.items()):
        cells = [f"{v['registers']}/{v['spills']}/{v['shared']}/{v['barriers']}" for _, v in sorted(by_target.items())]
        table.append([name, *cells])
    return f"Spills on GPUs of NVIDIA: {', '.join(spilling) or 'none'}.\n\n" + "\n".join(aligned(table))


def page() -> str:
    verified, budget = json.loads(VERIFIED.read_text()), json.loads(BUDGET.read_text())
    parts = [ABOUT, "## Operations", what_is_verified(verified, budget)]
    parts += [
        "## Launches",
        LAUNCHES,
        launches(verified),
    ]
    parts += [
        "## On paper",
        "Every input once and every output once, float32, at the bandwidth and the float32 rate that the makers name "
        "(A100: 1.56\nTB/s, 19.5 TFLOP/s; H100: 3.35 TB/s, 67 TFLOP/s).",
        floors(),
    ]
    parts += ["## Compiled ahead of time", "Registers / spills / bytes of shared memory / barriers.", compiled(budget)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run the tests and write docs/verified.json first")
    if parser.parse_args().run:
        VERIFIED.write_text(json.dumps(run(), indent=1) + "\n")
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
