"""Triton kernels that finish sums between two stages: parts are added in float64, in one order (`cell_step.statistics`,
`cell_step.coefficients`, and `stem_step` with its affine batch norm).
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import interpreted, launch, moved
from .aot import AotCase, case
from .cell_step import EPS, Product

_PARTS, _CHANNELS, _OUTPUTS = (16, 128, 32768) if interpreted() else (512, 4, 1024)


@triton.jit
def _total(sums, row, rows, c, known, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Over the parts of (parts, rows, channels)."""
    acc = tl.zeros([PARTS, CHANNELS], tl.float64)
    for first in tl.range(0, parts, PARTS, num_stages=1):
        p = first + tl.arange(0, PARTS)
        at = (p[:, None] * rows + row) * channels + c[None, :]
        acc += tl.load(sums + at, (p < parts)[:, None] & known[None, :], 0.0).to(tl.float64)
    return tl.sum(acc, 0)


@triton.jit
def _statistics(block, sums, mean, norm, gamma, beta, parts, channels, n, eps, AFFINE: tl.constexpr,
                PARTS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    known = c < channels
    m = _total(sums, 0, 2, c, known, parts, channels, PARTS, CHANNELS) / n
    variance = _total(sums, 1, 2, c, known, parts, channels, PARTS, CHANNELS) / n - m * m
    r = 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + eps)
    tl.store(mean + c, m, known)
    scale, shift = r, -m * r
    if AFFINE:
        tl.store(norm + 2 * channels + c, r.to(tl.float32), known)
        tl.store(norm + 3 * channels + c, shift.to(tl.float32), known)
        scale = tl.load(gamma + c, known, 0.0).to(tl.float64) * r
        shift = tl.load(beta + c, known, 0.0).to(tl.float64) - m * scale
    tl.store(norm + c, scale.to(tl.float32), known)
    tl.store(norm + channels + c, shift.to(tl.float32), known)


@triton.jit
def statistics(
    sums0, mean0, norm0, gamma, beta, parts0, channels0, n0, sums1, mean1, norm1, parts1, channels1, n1, eps,
    AFFINE: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of one tensor, and of a second one that the same stage wrote."""
    block, blocks = tl.program_id(0), tl.cdiv(channels0, CHANNELS)
    if block < blocks:
        _statistics(block, sums0, mean0, norm0, gamma, beta, parts0, channels0, n0, eps, AFFINE, PARTS, CHANNELS)
    else:
        _statistics(block - blocks, sums1, mean1, norm1, gamma, beta, parts1, channels1, n1, eps, False, PARTS,
                    CHANNELS)  # fmt: skip


@triton.jit
def _coefficients(
    c, known, column, sums, mean, scale, into, length, parts, channels, n, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    s = _total(sums, 0, 2, column, known, parts, channels, PARTS, CHANNELS) / n
    q = _total(sums, 1, 2, column, known, parts, channels, PARTS, CHANNELS) / n
    r, m = tl.load(scale + c, known, 0.0).to(tl.float64), tl.load(mean + c, known, 0.0).to(tl.float64)
    tl.store(into + c, r.to(tl.float32), known)
    tl.store(into + length + c, (-r * r * q).to(tl.float32), known)
    tl.store(into + 2 * length + c, (-r * s + r * r * m * q).to(tl.float32), known)


@triton.jit
def coefficients(
    sums, parts, channels, first, mean0, scale0, into0, length0, n0, mean1, scale1, into1, length1, n1, dots, total,
    parts_dots,
    SLICES: tl.constexpr, NEED0: tl.constexpr, NEED1: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`first` channels a slice: into0 of rows of length0, then into1; dots are added to total."""
    block, blocks = tl.program_id(0), tl.cdiv(first, CHANNELS)
    c = block % blocks * CHANNELS + tl.arange(0, CHANNELS)
    if block >= SLICES * blocks:
        e = (block - SLICES * blocks) * CHANNELS + tl.arange(0, CHANNELS)
        before = tl.load(total + e, e < 14, 0.0).to(tl.float64)
        tl.store(total + e, before + _total(dots, 0, 1, e, e < 14, parts_dots, 14, PARTS, CHANNELS), e < 14)
    elif block < blocks:
        if NEED0:
            _coefficients(c, c < first, c, sums, mean0, scale0, into0, length0, parts, channels, n0, PARTS, CHANNELS)
    elif NEED1:
        _coefficients(c, c < first, first + c, sums, mean1, scale1, into1, length1, parts, channels, n1, PARTS,
                      CHANNELS)  # fmt: skip


@triton.jit
def affine_coefficients(
    sums, parts, channels, mean, r, gamma, into, d_gamma, d_beta, n, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < channels
    s = _total(sums, 0, 2, c, known, parts, channels, PARTS, CHANNELS)
    q = _total(sums, 1, 2, c, known, parts, channels, PARTS, CHANNELS)
    tl.store(d_gamma + c, q.to(tl.float32), known)
    tl.store(d_beta + c, s.to(tl.float32), known)
    scale = tl.load(gamma + c, known, 0.0).to(tl.float64)
    std, m = tl.load(r + c, known, 0.0).to(tl.float64), tl.load(mean + c, known, 0.0).to(tl.float64)
    tl.store(into + c, (scale * std).to(tl.float32), known)
    tl.store(into + channels + c, (-scale * std * std * q / n).to(tl.float32), known)
    tl.store(into + 2 * channels + c, (scale * (-std * s + std * std * m * q) / n).to(tl.float32), known)


@triton.jit
def add_up(partial, table, out, squares, OUTPUTS: tl.constexpr):
    """Each row of the table (first, parts, length, out, offset) is a block of outputs of one tensor's parts."""
    row = table + tl.program_id(0) * 5
    first, parts, length = tl.load(row).to(tl.int64), tl.load(row + 1).to(tl.int64), tl.load(row + 2).to(tl.int64)
    i = tl.load(row + 4).to(tl.int64) + tl.arange(0, OUTPUTS)
    acc = tl.zeros([OUTPUTS], tl.float64)
    for p in tl.range(0, parts, num_stages=1):
        acc += tl.load(partial + first + p * length + i, i < length, 0.0).to(tl.float64)
    tl.store(out + tl.load(row + 3).to(tl.int64) + i, acc.to(tl.float32), i < length)
    tl.store(squares + tl.program_id(0), tl.sum(acc * acc, 0))


class Norm(NamedTuple):
    """What a raw tensor's sums were finished to. mean (N,) float64; rows (2 or 4, N): scale, shift, r, unit."""

    mean: Tensor
    rows: Tensor


def finish(
    product: Product, second: Product | None = None, affine: tuple[Tensor, Tensor] | None = None
) -> tuple[Norm, Norm | None]:
    """The statistics of a raw tensor, and of a second one from the same stage. affine: gamma, beta of the first."""
    both = [p for p in (product, second) if p is not None]
    found = []
    arguments: list[Any] = []
    for p in both:
        N = p.z.shape[1]
        norm = Norm(p.sums.new_empty(N, dtype=torch.float64), p.sums.new_empty(4 if affine else 2, N))
        found.append(norm)
        gammas = [] if found[1:] else list(affine or (p.sums, p.sums))
        arguments += [p.sums, *norm, *gammas, len(p.sums), N, p.z.numel() // N]
    if second is None:
        arguments += [product.sums, *found[0], 0, 0, 1]
    blocks = sum(triton.cdiv(p.z.shape[1], _CHANNELS) for p in both)
    launch(
        "finish_fwd", statistics, (blocks,), [*arguments, EPS],
        {"AFFINE": affine is not None, "PARTS": _PARTS, "CHANNELS": _CHANNELS}, 4,
        moved(*(p.sums for p in both), *(t for norm in found for t in norm)),
    )  # fmt: skip
    return found[0], found[1] if second is not None else None


class Slice(NamedTuple):
    """Channels of a raw tensor whose gradient's sums are finished. coefficients: columns of its (3, N)."""

    mean: Tensor
    scale: Tensor
    coefficients: Tensor
    pixels: int


def finish_backward(
    sums: Tensor, slices: Sequence[Slice | None], dots: Tensor | None = None, total: Tensor | None = None
) -> None:
    """The coefficients of one or two slices, whose channels are those of `sums` in order (None: not wanted), and the
    edges' dots, which are added to `total` (14,) float64."""
    channels = sums.shape[2]
    known = [s for s in slices if s is not None]
    arguments: list[Any] = []
    for s in (*slices, None)[:2]:
        arguments += [sums] * 3 + [0, 1] if s is None else [*s[:3], s.coefficients.stride(0), s.pixels]
    first = channels // len(slices)
    blocks = len(slices) * triton.cdiv(first, _CHANNELS) + (0 if dots is None else triton.cdiv(14, _CHANNELS))
    launch(
        "finish_bwd", coefficients, (blocks,),
        [sums, len(sums), channels, first, *arguments, sums if dots is None else dots,
         sums if total is None else total, 0 if dots is None else len(dots)],
        {"SLICES": len(slices), "NEED0": slices[0] is not None, "NEED1": slices[-1] is not None, "PARTS": _PARTS,
         "CHANNELS": _CHANNELS},
        4, moved(sums, *(t for s in known for t in s[:3]), *(t for t in (dots, total) if t is not None)),
    )  # fmt: skip


def finish_affine_backward(
    sums: Tensor, norm: Norm, gamma: Tensor, pixels: int, d_gamma: Tensor, d_beta: Tensor
) -> Tensor:
    """The stem's coefficients (3, S); the gradients of gamma and beta go to d_gamma and d_beta."""
    found = sums.new_empty(3, len(gamma))
    launch(
        "finish_bwd", affine_coefficients, (triton.cdiv(len(gamma), _CHANNELS),),
        [sums, len(sums), len(gamma), norm.mean, norm.rows.select(0, 2), gamma, found, d_gamma, d_beta, pixels],
        {"PARTS": _PARTS, "CHANNELS": _CHANNELS}, 4, moved(sums, found, d_gamma, d_beta),
    )  # fmt: skip
    return found


def add_up_table(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """For `add_parts`: tensors of (parts, numbers) lie one after the other."""
    rows, first, out = [], 0, 0
    for n, length in sizes:
        rows += [(first, n, length, out, offset) for offset in range(0, length, _OUTPUTS)]
        first, out = first + n * length, out + length
    return torch.tensor(rows, dtype=torch.int64, device=device)


def add_parts(partial: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """The sums over every tensor's parts, one tensor after the other; returns each row's sum of their squares."""
    squares = out.new_empty(len(table), dtype=torch.float64)
    launch(
        "finish_weights",
        add_up,
        (len(table),),
        [partial, table, out, squares],
        {"OUTPUTS": _OUTPUTS},
        4,
        moved(partial, out),
    )
    return squares


_FLOATS = (
    *("sums", "sums0", "sums1", "norm0", "norm1", "gamma", "beta", "scale0", "into0", "scale1", "into1", "dots"),
    *("r", "into", "d_gamma", "d_beta", "partial", "out"),
)
_DOUBLES = ("mean", "mean0", "mean1", "total", "squares")


def aot_cases() -> Iterator[AotCase]:
    """Every kernel."""
    own = {"PARTS": _PARTS, "CHANNELS": _CHANNELS}
    types = dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_DOUBLES, "*fp64") | {"table": "*i64", "eps": "fp32"}
    for kernel, constants in (
        (statistics, {"AFFINE": True, **own}),
        (coefficients, {"SLICES": 2, "NEED0": True, "NEED1": True, **own}),
        (affine_coefficients, own),
        (add_up, {"OUTPUTS": _OUTPUTS}),
    ):
        yield case(kernel.__name__, kernel, types, constants, 4)
