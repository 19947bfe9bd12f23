"""Triton kernels of a reduction cell's `paths` (`reduce_step`), and their launchers; its nodes: `cell_step_triton`.

A program is a tile of output pixels and one of the two inputs. Backward, those behind them sum weight gradients.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._launch import interpreted, launch, moved, power_of_two
from ._tile_triton import behind, normalised, place, put_sums, relu
from .aot import AotCase, case
from .cell_step import Behind, Product, Raw


@triton.jit
def _row(r, i, side: tl.constexpr, Q: tl.constexpr):
    """The channel of f of row r of one input and one parity: node after node, q/2 each."""
    return i * 4 * Q + r // (Q // 2) * Q + side * (Q // 2) + r % (Q // 2)


@triton.jit
def _weight(w, r, i, side: tl.constexpr, c, Q: tl.constexpr):
    """Where w[node, i, side, o, c] lies for row r."""
    return w + ((r // (Q // 2) * 4 + i * 2 + side) * (Q // 2) + r % (Q // 2)) * Q + c


@triton.jit
def _bypass(z, scale, shift, c, at, there, HW, W, Q: tl.constexpr, C: tl.constexpr):
    """The four pixels of each window of the bypassed channels, normalised: (0,0), (0,1), (1,0), (1,1)."""
    known = (c >= Q) & (c < C)
    return (
        normalised(z, scale, shift, c, known, at, there, HW),
        normalised(z, scale, shift, c, known, at + 1, there, HW),
        normalised(z, scale, shift, c, known, at + W, there, HW),
        normalised(z, scale, shift, c, known, at + W + 1, there, HW),
    )


@triton.jit
def _product(
    z, scale, shift, w, f, sums, tile, i, side: tl.constexpr, b, at, out, there, HW, hw, Q: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, P], tl.float32)
    for first in tl.range(0, Q, 16, num_stages=1):
        c = first + tl.arange(0, 16)
        x = tl.where((c < Q)[:, None], relu(normalised(z, scale, shift, c, c < Q, at, there, HW)), 0.0)
        mask = (r < 2 * Q)[:, None] & (c < Q)[None, :]
        part = tl.load(_weight(w, r[:, None], i, side, c[None, :], Q), mask, 0.0).to(tl.float32)
        acc = tl.dot(part, x, acc, input_precision="ieee")
    acc = tl.where(there[None, :], acc, 0.0)
    row = _row(r, i, side, Q)
    where = f + (row[:, None] * hw + (b * (8 * Q * hw) + out)[None, :])
    tl.store(where, acc.to(f.dtype.element_ty), (r < 2 * Q)[:, None] & there[None, :])
    put_sums(sums, tile, 8 * Q, row, r < 2 * Q, acc, acc * acc)


@triton.jit
def fwd(
    z0, scale0, shift0, z1, scale1, shift1, w, f, pooled, sums, B, W, HW, image0, image1,
    C: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    tile, i = tl.program_id(0) // 2, tl.program_id(0) % 2
    if i == 0:
        _fwd(z0, scale0, shift0, w, f, pooled, sums, tile, 0, B, W, HW, image0, C, Q, ROWS, P)
    else:
        _fwd(z1, scale1, shift1, w, f, pooled, sums, tile, 1, B, W, HW, image1, C, Q, ROWS, P)


@triton.jit
def _fwd(
    z, scale, shift, w, f, pooled, sums, tile, i: tl.constexpr, B, W, HW, image, C: tl.constexpr, Q: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    b, at, there = place(4 * tile, B, W, HW, True, P)
    hw, b = HW // 4, b.to(tl.int64)
    out = (tile * P + tl.arange(0, P)) % hw
    at += b * image
    _product(z, scale, shift, w, f, sums, tile, i, 0, b, at, out, there, HW, hw, Q, ROWS, P)
    _product(z, scale, shift, w, f, sums, tile, i, 1, b, at + W + 1, out, there, HW, hw, Q, ROWS, P)
    if Q < C:
        c = tl.arange(0, C)
        x00, x01, x10, x11 = _bypass(z, scale, shift, c, at, there, HW, W, Q, C)
        highest = tl.maximum(
            tl.maximum(x00, x01, propagate_nan=tl.PropagateNan.ALL),
            tl.maximum(x10, x11, propagate_nan=tl.PropagateNan.ALL),
            propagate_nan=tl.PropagateNan.ALL,
        )
        where = pooled + ((i * (C - Q) + c - Q)[:, None] * hw + (b * (2 * (C - Q) * hw) + out)[None, :])
        tl.store(where, highest.to(pooled.dtype.element_ty), (c >= Q)[:, None] & there[None, :])


@triton.jit
def _pull(
    w, g_f, f, coefficients, i: tl.constexpr, side: tl.constexpr, c, b, out, there, hw, Q: tl.constexpr,
    PART: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """w' df for channels c of one input, from one parity."""
    acc = tl.zeros([PART, P], tl.float32)
    for first in tl.range(0, 2 * Q, 16, num_stages=1):
        r = first + tl.arange(0, 16)
        known = r < 2 * Q
        df = behind(g_f, f, coefficients, _row(r, i, side, Q), known, 8 * Q, b * (8 * Q * hw) + out, there, hw)
        mask = (c < Q)[:, None] & known[None, :]
        part = tl.load(_weight(w, r[None, :], i, side, c[:, None], Q), mask, 0.0).to(tl.float32)
        acc = tl.dot(part, df, acc, input_precision="ieee")
    return acc


@triton.jit
def _tile_backward(
    tile, z, scale, shift, w, g_f, f, coefficients, d_pooled, g, sums, i: tl.constexpr, B, W, HW, image, g_image,
    C: tl.constexpr, Q: tl.constexpr, PART: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    b, at, there = place(4 * tile, B, W, HW, True, P)
    hw, b = HW // 4, b.to(tl.int64)
    out = (tile * P + tl.arange(0, P)) % hw
    into = at + b * g_image
    at += b * image
    for first in tl.static_range(0, Q, PART):
        c = first + tl.arange(0, PART)
        known = c < Q
        even = normalised(z, scale, shift, c, known, at, there, HW)
        odd = normalised(z, scale, shift, c, known, at + W + 1, there, HW)
        g_even = tl.where(even > 0, _pull(w, g_f, f, coefficients, i, 0, c, b, out, there, hw, Q, PART, P), 0.0)
        g_odd = tl.where(odd > 0, _pull(w, g_f, f, coefficients, i, 1, c, b, out, there, hw, Q, PART, P), 0.0)
        where, mask = g + (c[:, None] * HW + into[None, :]), known[:, None] & there[None, :]
        tl.store(where, g_even.to(g.dtype.element_ty), mask)
        tl.store(where + 1, tl.zeros([PART, P], g.dtype.element_ty), mask)
        tl.store(where + W, tl.zeros([PART, P], g.dtype.element_ty), mask)
        tl.store(where + W + 1, g_odd.to(g.dtype.element_ty), mask)
        put_sums(sums, tile, 2 * C, i * C + c, known, g_even + g_odd, g_even * even + g_odd * odd)
    if Q < C:
        c = tl.arange(0, C)
        x00, x01, x10, x11 = _bypass(z, scale, shift, c, at, there, HW, W, Q, C)
        highest = tl.maximum(tl.maximum(x00, x01), tl.maximum(x10, x11))
        mask = (c >= Q)[:, None] & there[None, :]
        down = d_pooled + ((i * (C - Q) + c - Q)[:, None] * hw + (b * (2 * (C - Q) * hw) + out)[None, :])
        left = tl.load(down, mask, 0.0).to(tl.float32)
        total, weighed = left, left * highest
        where = g + (c[:, None] * HW + into[None, :])
        tl.store(where, tl.where(x00 == highest, left, 0.0).to(g.dtype.element_ty), mask)
        left = tl.where(x00 == highest, 0.0, left)
        tl.store(where + 1, tl.where(x01 == highest, left, 0.0).to(g.dtype.element_ty), mask)
        left = tl.where(x01 == highest, 0.0, left)
        tl.store(where + W, tl.where(x10 == highest, left, 0.0).to(g.dtype.element_ty), mask)
        left = tl.where(x10 == highest, 0.0, left)
        tl.store(where + W + 1, tl.where(x11 == highest, left, 0.0).to(g.dtype.element_ty), mask)
        put_sums(sums, tile, 2 * C, i * C + c, c >= Q, total, weighed)


@triton.jit
def _weights_backward(
    part, parts, z, scale, shift, g_f, f, coefficients, dw, i: tl.constexpr, side: tl.constexpr, first_row, first, B, W,
    HW, image, Q: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """16 rows and 16 channels of one part of dw, of one input and one parity."""
    r, c = first_row + tl.arange(0, 16), first + tl.arange(0, 16)
    acc = tl.zeros([16, 16], tl.float32)
    hw = HW // 4
    for tile in tl.range(part, tl.cdiv(B * hw, P), parts, num_stages=1):
        b, at, there = place(4 * tile + 3 * side, B, W, HW, True, P)
        b = b.to(tl.int64)
        offsets = b * (8 * Q * hw) + (tile * P + tl.arange(0, P)) % hw
        df = behind(g_f, f, coefficients, _row(r, i, side, Q), r < 2 * Q, 8 * Q, offsets, there, hw)
        a = tl.where((c < Q)[:, None], relu(normalised(z, scale, shift, c, c < Q, at + b * image, there, HW)), 0.0)
        acc = tl.dot(df, tl.trans(a), acc, input_precision="ieee")
    mask = (r < 2 * Q)[:, None] & (c < Q)[None, :]
    tl.store(_weight(dw + part.to(tl.int64) * 8 * Q * Q, r[:, None], i, side, c[None, :], Q), acc, mask)


@triton.jit
def bwd(
    z0, scale0, shift0, z1, scale1, shift1, w, g_f, f, coefficients, d_pooled, g0, g1, sums, dw, tiles, parts,
    B, W, HW, image0, image1, g_image0, g_image1,
    C: tl.constexpr, Q: tl.constexpr, NEED0: tl.constexpr, NEED1: tl.constexpr, WEIGHTS: tl.constexpr,
    P: tl.constexpr, P_WEIGHTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < 2 * tiles:
        if program % 2 == 0:
            if NEED0:
                _tile_backward(
                    program // 2, z0, scale0, shift0, w, g_f, f, coefficients, d_pooled, g0, sums, 0, B, W, HW, image0,
                    g_image0, C, Q, 16, P,
                )  # fmt: skip
        elif NEED1:
            _tile_backward(
                program // 2, z1, scale1, shift1, w, g_f, f, coefficients, d_pooled, g1, sums, 1, B, W, HW, image1,
                g_image1, C, Q, 16, P,
            )  # fmt: skip
    elif WEIGHTS:
        part, block = (program - 2 * tiles) % parts, (program - 2 * tiles) // parts
        which, block = block % 4, block // 4
        columns = tl.cdiv(Q, 16)
        row, first = block // columns * 16, block % columns * 16
        if which == 0:
            _weights_backward(part, parts, z0, scale0, shift0, g_f, f, coefficients, dw, 0, 0, row, first, B, W, HW,
                              image0, Q, P_WEIGHTS)  # fmt: skip
        elif which == 1:
            _weights_backward(part, parts, z0, scale0, shift0, g_f, f, coefficients, dw, 0, 1, row, first, B, W, HW,
                              image0, Q, P_WEIGHTS)  # fmt: skip
        elif which == 2:
            _weights_backward(part, parts, z1, scale1, shift1, g_f, f, coefficients, dw, 1, 0, row, first, B, W, HW,
                              image1, Q, P_WEIGHTS)  # fmt: skip
        else:
            _weights_backward(part, parts, z1, scale1, shift1, g_f, f, coefficients, dw, 1, 1, row, first, B, W, HW,
                              image1, Q, P_WEIGHTS)  # fmt: skip


def _pixels() -> tuple[int, int]:
    """Of a tile, and of one that sums weight gradients."""
    return (256, 256) if interpreted() else (32, 32)


def _warps(channels: int) -> int:
    """Backward; four spill on some GPU."""
    return 8 if channels >= 64 else 4


def paths(x0: Raw, x1: Raw, w: Tensor, q: int) -> tuple[Product, Tensor]:
    """`reduce_step.paths_reference`."""
    B, C, H, W = x0.z.shape
    f, pooled = (x0.z.new_empty(B, n, H // 2, W // 2) for n in (8 * q, 2 * (C - q)))
    pixels, _ = _pixels()
    tiles = triton.cdiv(B * H * W // 4, pixels)
    sums = w.new_empty(tiles, 2, 8 * q)
    launch(
        "paths_fwd", fwd, (2 * tiles,),
        [*x0, *x1, w, f, pooled, sums, B, W, H * W, x0.z.stride(0), x1.z.stride(0)],
        {"C": C, "Q": q, "ROWS": power_of_two(2 * q, 16), "P": pixels}, 4, moved(x0.z, x1.z, f, pooled, sums),
    )  # fmt: skip
    return Product(f, sums), pooled


def paths_backward(
    x0: Raw, x1: Raw, w: Tensor, q: int, d: Behind, coefficients: Tensor, d_pooled: Tensor, g0: Tensor | None,
    g1: Tensor | None, dw: Tensor | None,
) -> Tensor:  # fmt: skip
    """`reduce_step.paths_backward_reference`; coefficients: d's, (3, 8q). Sums that nobody wants are not written."""
    B, C, H, W = x0.z.shape
    pixels, pixels_weights = _pixels()
    tiles = triton.cdiv(B * H * W // 4, pixels)
    sums = w.new_empty(tiles, 2, 2 * C)
    parts, blocks = 1, 0
    if dw is not None:
        parts, blocks = dw.shape[0], 4 * triton.cdiv(2 * q, 16) * triton.cdiv(q, 16)
    launch(
        "paths_bwd", bwd, (2 * tiles + blocks * parts,),
        [*x0, *x1, w, d.g, d.z, coefficients, d_pooled, *(w if g is None else g for g in (g0, g1)), sums,
         w if dw is None else dw, tiles, parts, B, W, H * W, x0.z.stride(0), x1.z.stride(0),
         *(0 if g is None else g.stride(0) for g in (g0, g1))],
        {"C": C, "Q": q, "NEED0": g0 is not None, "NEED1": g1 is not None, "WEIGHTS": blocks > 0, "P": pixels,
         "P_WEIGHTS": pixels_weights},
        _warps(C), moved(x0.z, x1.z, d.g, d.z, d_pooled, sums, *(g for g in (g0, g1, dw) if g is not None))
        + (moved(d.g, d.z) * triton.cdiv(q, 16) + moved(x0.z, x1.z) // 2 * triton.cdiv(2 * q, 16) if blocks else 0),
    )  # fmt: skip
    return sums


_FLOATS = ("scale0", "shift0", "scale1", "shift1", "w", "coefficients", "sums", "dw")
_TENSORS = ("z0", "z1", "g_f", "f", "pooled", "d_pooled", "g0", "g1")
_INTEGERS = ("HW", "image0", "image1", "g_image0", "g_image1")


def aot_cases() -> Iterator[AotCase]:
    """Both kernels at the reduction cells of the search's own network, at the first in half precision too."""
    pixels, pixels_weights = _pixels()
    for C, dtype in ((32, "fp32"), (64, "fp32"), (32, "bf16"), (32, "fp16")):
        types = dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_TENSORS, f"*{dtype}")
        constants = {"C": C, "Q": C // 4, "ROWS": C // 2, "P": pixels}
        yield case(f"fwd/C{C}-{dtype}", fwd, types, constants, 4, _INTEGERS)
        constants = {"C": C, "Q": C // 4, "NEED0": True, "NEED1": True, "WEIGHTS": True, "P": pixels}
        constants |= {"P_WEIGHTS": pixels_weights}
        yield case(f"bwd/C{C}-{dtype}", bwd, types, constants, _warps(C), _INTEGERS)
