"""Triton kernels of the stem (`stem_step`), and their launchers. A program is one tile; backward, the programs behind
those of the tiles sum weight gradients.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import interpreted, launch, moved, power_of_two
from ._tile_triton import behind, normalised, place, put_sums, relu
from .aot import AotCase, case
from .cell_step import Behind, Product
from .stem_step import Stem


@triton.jit
def _patch(images, tap, TAPS, b, at, there, H, W, HW):
    """[taps, pixels]: pixel (row + y - 1, column + x - 1) of a channel, zero outside; tap = channel * 9 + y * 3 + x."""
    row, column = at // W, at % W
    y, x = (tap % 9 // 3 - 1)[:, None] + row[None, :], (tap % 3 - 1)[:, None] + column[None, :]
    inside = (tap < TAPS)[:, None] & there[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    offsets = (tap // 9)[:, None] * HW + (b * (TAPS // 9 * HW))[None, :] + y * W + x
    return tl.load(images + offsets, inside, 0.0).to(tl.float32)


@triton.jit
def convolve(
    images, w, z, sums, B, H, W, HW, S, TAPS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b, at, there = place(tile, B, W, HW, False, P)
    b = b.to(tl.int64)
    s = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, P], tl.float32)
    for first in tl.range(0, TAPS, 16, num_stages=1):
        tap = first + tl.arange(0, 16)
        mask = (s < S)[:, None] & (tap < TAPS)[None, :]
        part = tl.load(w + s[:, None] * TAPS + tap[None, :], mask, 0.0).to(tl.float32)
        acc = tl.dot(part, _patch(images, tap, TAPS, b, at, there, H, W, HW), acc, input_precision="ieee")
    where = z + (s[:, None] * HW + (b * (S * HW) + at)[None, :])
    tl.store(where, acc.to(z.dtype.element_ty), (s < S)[:, None] & there[None, :])
    put_sums(sums, tile, S, s, s < S, acc, acc * acc)


@triton.jit
def _activations(z, scale, shift, s, S, b, at, there, HW):
    x = normalised(z, scale, shift, s, s < S, b * (S * HW) + at, there, HW)
    return tl.where((s < S)[:, None], relu(x), 0.0)


@triton.jit
def multiply(z, scale, shift, w, out, sums, B, W, HW, S, N, ROWS: tl.constexpr, P: tl.constexpr):
    tile = tl.program_id(0)
    b, at, there = place(tile, B, W, HW, False, P)
    b = b.to(tl.int64)
    n = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, P], tl.float32)
    for first in tl.range(0, S, 16, num_stages=1):
        s = first + tl.arange(0, 16)
        part = tl.load(w + n[:, None] * S + s[None, :], (n < N)[:, None] & (s < S)[None, :], 0.0).to(tl.float32)
        acc = tl.dot(part, _activations(z, scale, shift, s, S, b, at, there, HW), acc, input_precision="ieee")
    acc = tl.where(there[None, :], acc, 0.0)
    where = out + (n[:, None] * HW + (b * (N * HW) + at)[None, :])
    tl.store(where, acc.to(out.dtype.element_ty), (n < N)[:, None] & there[None, :])
    put_sums(sums, tile, N, n, n < N, acc, acc * acc)


@triton.jit
def multiply_bwd(
    z, scale, shift, r, unit, w, g_out, out, coefficients, g, sums, dw, tiles, parts, B, W, HW, S, N,
    COLUMNS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    s = tl.arange(0, COLUMNS)
    known = s < S
    if program < tiles:
        b, at, there = place(program, B, W, HW, False, P)
        b = b.to(tl.int64)
        d = tl.zeros([COLUMNS, P], tl.float32)
        for first in tl.range(0, N, 16, num_stages=1):
            n = first + tl.arange(0, 16)
            dz = behind(g_out, out, coefficients, n, n < N, N, b * (N * HW) + at, there, HW)
            mask = known[:, None] & (n < N)[None, :]
            part = tl.load(w + n[None, :] * S + s[:, None], mask, 0.0).to(tl.float32)
            d = tl.dot(part, dz, d, input_precision="ieee")
        offsets = b * (S * HW) + at
        d = tl.where(normalised(z, scale, shift, s, known, offsets, there, HW) > 0, d, 0.0)
        mask = known[:, None] & there[None, :]
        tl.store(g + (s[:, None] * HW + offsets[None, :]), d.to(g.dtype.element_ty), mask)
        put_sums(sums, program, S, s, known, d, d * normalised(z, r, unit, s, known, offsets, there, HW))
    else:
        part, block = (program - tiles) % parts, (program - tiles) // parts
        n = block * 16 + tl.arange(0, 16)
        acc = tl.zeros([16, COLUMNS], tl.float32)
        for tile in tl.range(part, tl.cdiv(B * HW, P), parts, num_stages=1):
            b, at, there = place(tile, B, W, HW, False, P)
            b = b.to(tl.int64)
            dz = behind(g_out, out, coefficients, n, n < N, N, b * (N * HW) + at, there, HW)
            a = _activations(z, scale, shift, s, S, b, at, there, HW)
            acc = tl.dot(dz, tl.trans(a), acc, input_precision="ieee")
        where = dw + part.to(tl.int64) * N * S + (n[:, None] * S + s[None, :])
        tl.store(where, acc, (n < N)[:, None] & known[None, :])


@triton.jit
def convolve_bwd(
    images, g, z, coefficients, dw, parts, B, H, W, HW, S, TAPS: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    s, tap = block * 16 + tl.arange(0, 16), tl.arange(0, COLUMNS)
    acc = tl.zeros([16, COLUMNS], tl.float32)
    for tile in tl.range(part, tl.cdiv(B * HW, P), parts, num_stages=1):
        b, at, there = place(tile, B, W, HW, False, P)
        b = b.to(tl.int64)
        dz = behind(g, z, coefficients, s, s < S, S, b * (S * HW) + at, there, HW)
        patch = _patch(images, tap, TAPS, b, at, there, H, W, HW)
        acc = tl.dot(dz, tl.trans(patch), acc, input_precision="ieee")
    where = dw + part.to(tl.int64) * S * TAPS + (s[:, None] * TAPS + tap[None, :])
    tl.store(where, acc, (s < S)[:, None] & (tap < TAPS)[None, :])


def _pixels() -> int:
    return 256 if interpreted() else 32


def convolution(images: Tensor, w: Tensor) -> Product:
    """`stem_step.convolution_reference`."""
    B, channels, H, W = images.shape
    S, pixels = w.shape[0], _pixels()
    tiles = triton.cdiv(B * H * W, pixels)
    z, sums = images.new_empty(B, S, H, W), w.new_empty(tiles, 2, S)
    launch(
        "stem_convolution_fwd", convolve, (tiles,), [images, w, z, sums, B, H, W, H * W, S],
        {"TAPS": 9 * channels, "ROWS": power_of_two(S, 16), "P": pixels}, 4, moved(images, z, sums),
    )  # fmt: skip
    return Product(z, sums)


def products(stem: Stem, w: Tensor) -> Product:
    """`stem_step.products_reference`."""
    B, S, H, W = stem.z.shape
    N, pixels = w.shape[0], _pixels()
    tiles = triton.cdiv(B * H * W, pixels)
    z, sums = stem.z.new_empty(B, N, H, W), w.new_empty(tiles, 2, N)
    launch(
        "stem_products_fwd", multiply, (tiles,), [*stem[:3], w, z, sums, B, W, H * W, S, N],
        {"ROWS": power_of_two(N, 16), "P": pixels}, 4, moved(stem.z, z, sums),
    )  # fmt: skip
    return Product(z, sums)


def products_backward(stem: Stem, w: Tensor, d: Behind, coefficients: Tensor, g: Tensor, dw: Tensor) -> Tensor:
    """`stem_step.products_backward_reference`; coefficients: d's, (3, N)."""
    B, S, H, W = stem.z.shape
    N, pixels, parts = w.shape[0], _pixels(), dw.shape[0]
    tiles, blocks = triton.cdiv(B * H * W, pixels), triton.cdiv(N, 16)
    sums = w.new_empty(tiles, 2, S)
    launch(
        "stem_products_bwd", multiply_bwd, (tiles + blocks * parts,),
        [*stem, w, d.g, d.z, coefficients, g, sums, dw, tiles, parts, B, W, H * W, S, N],
        {"COLUMNS": power_of_two(S, 16), "P": pixels}, 4,
        moved(stem.z) * (1 + blocks) + 2 * moved(d.g, d.z) + moved(g, sums, dw),
    )  # fmt: skip
    return sums


def convolution_backward(images: Tensor, d: Behind, coefficients: Tensor, dw: Tensor) -> None:
    """`stem_step.convolution_backward_reference`; coefficients: d's, (3, S)."""
    B, channels, H, W = images.shape
    S, parts = dw.shape[1], dw.shape[0]
    blocks = triton.cdiv(S, 16)
    launch(
        "stem_convolution_bwd", convolve_bwd, (blocks * parts,),
        [images, d.g, d.z, coefficients, dw, parts, B, H, W, H * W, S],
        {"TAPS": 9 * channels, "COLUMNS": power_of_two(9 * channels, 16), "P": _pixels()}, 4,
        moved(images) * blocks + moved(d.g, d.z, dw),
    )  # fmt: skip


_FLOATS = ("w", "sums", "scale", "shift", "r", "unit", "coefficients", "dw")
_TENSORS = ("images", "z", "out", "g_out", "g")


def aot_cases() -> Iterator[AotCase]:
    """Every kernel at 16 channels, colour."""
    own: dict[str, Any] = {"P": _pixels()}
    kernels = (
        (convolve, {"TAPS": 27, "ROWS": 64}),
        (multiply, {"ROWS": 64}),
        (multiply_bwd, {"COLUMNS": 64}),
        (convolve_bwd, {"TAPS": 27, "COLUMNS": 32}),
    )
    for dtype, (kernel, constants) in product(("fp32", "bf16", "fp16"), kernels):
        types = dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_TENSORS, f"*{dtype}")
        yield case(f"{kernel.__name__}/C16-{dtype}", kernel, types, constants | own, 4, ("HW", "S", "N"))
