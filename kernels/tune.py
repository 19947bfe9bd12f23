"""Search for better blocks of the Triton kernels on this machine's GPU.

`python -m ftso_fast.kernels.tune --out FILE` times every candidate on the benchmarks' cases, each only after it has
agreed with the reference, and writes the fastest; FTSO_TUNING=FILE then uses them. One kernel's blocks are changed at a
time, all others stay as they are.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch

from . import _tuning, testing
from ._backend import use_backend

SIZES = [{"SIZE": size, "num_warps": warps} for size, warps in product((256, 512, 1024, 2048), (2, 4, 8))]
TILES = [
    {"BN": bn, "BC": bc, "BP": bp, "num_warps": warps}
    for bn, bc, bp, warps in product((16, 32, 64), (8, 16, 32), (32, 64, 128), (4, 8))
]
Candidates = Mapping[str, Sequence[_tuning.Block]]
CANDIDATES: Candidates = {"skip_cell_fwd": SIZES, "skip_cell_bwd": SIZES, "node": TILES}


def cases_of(kernel: str) -> Iterator[tuple[str, testing.Case]]:
    """(size class, case): what a kernel's blocks are timed on, the first benchmark of each class."""
    seen = set()
    for case in testing.BENCHMARKS:
        if (case.op == "skip_cell") != kernel.startswith("skip_cell"):
            continue
        if kernel == "node":
            size_class = _tuning.width_class(case.C // case.k, case.C_out or case.C // case.k)
        else:
            size_class = _tuning.plane_class(case.H * case.W, torch.float32)
        if size_class not in seen:
            seen.add(size_class)
            yield size_class, case


def milliseconds(call: Callable[[], object]) -> float:
    """The median of 20 calls on the GPU."""
    for _ in range(3):
        call()
    found = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return sorted(found)[len(found) // 2]


def search(
    device: str, candidates: Candidates = CANDIDATES,
    cases: Callable[[str], Iterator[tuple[str, testing.Case]]] = cases_of,
    clock: Callable[[Callable[[], object]], float] = milliseconds,
) -> dict[str, dict[str, _tuning.Block]]:  # fmt: skip
    """By kernel, by size class, the fastest block; candidates that fail, or disagree with the reference, are out."""
    best: dict[str, dict[str, _tuning.Block]] = {}
    for kernel, blocks in candidates.items():
        for size_class, case in cases(kernel):
            operation = testing.OPERATIONS[case.op]
            tensors = [t.to(device) for t in operation.inputs(case, 0)]
            times: list[tuple[float, int, _tuning.Block]] = []
            for block in blocks:
                with _tuning.override(kernel, size_class, block), use_backend("triton"):
                    try:
                        testing.check(case, tensors)
                        spent = clock(lambda: testing.values_and_gradients(operation.function, tensors, case))  # noqa: B023
                    except Exception as error:  # too much shared memory, registers, or a wrong result
                        print(f"{kernel} {size_class} {block}: {type(error).__name__}", file=sys.stderr)
                        continue
                times.append((spent, len(times), block))
                print(f"{kernel} {size_class} {block}: {spent:.3f} ms", file=sys.stderr)
            if times:
                best.setdefault(kernel, {})[size_class] = min(times)[2]
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description="search for better blocks of the Triton kernels on this GPU")
    parser.add_argument("--out", required=True, help="the file to write, for FTSO_TUNING")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: torch sees no GPU", file=sys.stderr)
        return 2
    found = {_tuning.architecture(torch.device("cuda")): search("cuda")}
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
