"""Partial sums to sums: the rows of `[parts, n]`, added up in a fixed order in float64."""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, moved
from .aot import AotCase, case

ROWS, COLUMNS = 64, 16


@triton.jit
def add_up(parts, out, n_parts, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in tl.range(0, n_parts, ROWS, num_stages=1):
        row = first + tl.arange(0, ROWS)
        there = (row < n_parts)[:, None] & (column < n)[None, :]
        part = tl.load(parts + row.to(tl.int64)[:, None] * n + column[None, :], there, 0.0).to(tl.float32)
        total += part.to(tl.float64)
    sums = tl.sum(total, 0)
    if out.dtype.element_ty != tl.float64:
        sums = sums.to(tl.float32)  # the interpreter has no way from float64 to bfloat16
    tl.store(out + column, sums.to(out.dtype.element_ty), column < n)


def sum_rows(parts: Tensor, out: Tensor) -> None:
    """out: as many contiguous values as a row of `parts` (float32) has."""
    n = out.numel()
    block = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    launch("sum_rows", add_up, (triton.cdiv(n, COLUMNS),), [parts, out, len(parts), n], block, 4, moved(parts, out))


def aot_cases() -> Iterator[AotCase]:
    block = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    for dtype in ("fp64", "fp32", "bf16", "fp16"):
        yield case(f"add_up-{dtype}", add_up, {"parts": "*fp32", "out": f"*{dtype}"}, block, 4)
