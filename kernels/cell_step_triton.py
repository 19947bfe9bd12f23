"""Triton kernels of a cell's nodes and what reads them (`cell_step`), and their launchers.

They serve the nodes of a reduction cell too (`_nodes_triton`). A program is one tile; where a strided reader follows, a
tile's pixels share their parity. Backward, the programs behind those of the tiles sum weight gradients, some rows of
the weights over some tiles each.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._last_cell_triton import LARGEST, Head, pool
from ._launch import aot_case, interpreted, launch, moved, power_of_two
from ._nodes_triton import edge, node_backward, nodes, put_dot, read, state
from ._tile_triton import behind, place, put_sums, relu, shuffled, times_transposed, to, unshuffled
from .cell_step import Behind, Gradients, Outputs, Product, Raw
from .reduce_step import Paths


@triton.jit
def fwd(
    z0, scale0, shift0, z1, scale1, shift1, f, f_scale, f_shift, pooled, edges, w, w_strided, z, z_strided, sums,
    sums_strided, B, W, HW, image0, image1, N, S,
    C: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, STRIDED_ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b, at, there = place(tile, B, W, HW, STRIDED_ROWS > 0, P)
    b = b.to(tl.int64)
    x0 = state(z0, scale0, shift0, pooled, 0, b, image0, at, there, HW, C, Q, P)
    x1 = state(z1, scale1, shift1, pooled, 1, b, image1, at, there, HW, C, Q, P)
    v2, v3, v4, v5 = nodes(edges, x0, x1, f, f_scale, f_shift, b, at, there, HW, C, K, Q, P)
    n = tl.arange(0, ROWS)
    acc = tl.where(there[None, :], read(w, n, n < N, v2, v3, v4, v5, C, K, ROWS, P), 0.0)
    mask = (n < N)[:, None] & there[None, :]
    tl.store(z + (n[:, None] * HW + (b * (N * HW) + at)[None, :]), acc.to(z.dtype.element_ty), mask)
    put_sums(sums, tile, N, n, n < N, acc, acc * acc)
    if STRIDED_ROWS > 0:
        side = tile % 4
        if side % 3 == 0:
            hw, half = HW // 4, side // 3 * S
            m = tl.arange(0, STRIDED_ROWS)
            own = read(w_strided + half * 4 * C, m, m < S, v2, v3, v4, v5, C, K, STRIDED_ROWS, P)
            own = tl.where(there[None, :], own, 0.0)
            p = tile // 4 * P + tl.arange(0, P)
            where = z_strided + ((half + m)[:, None] * hw + (b * (2 * S * hw) + p % hw)[None, :])
            tl.store(where, own.to(z_strided.dtype.element_ty), (m < S)[:, None] & there[None, :])
            put_sums(sums_strided, tile // 4, 2 * S, half + m, m < S, own, own * own)


@triton.jit
def _pull(w, g, z, coefficients, N, at, there, HW, d2, d3, d4, d5, C: tl.constexpr, K: tl.constexpr):
    """d_j + w_j' dz."""
    for first in tl.range(0, N, 16, num_stages=1):
        n = first + tl.arange(0, 16)
        known = n < N
        dz = behind(g, z, coefficients, n, known, N, at, there, HW)
        d2 = times_transposed(w, n, known, dz, d2, C, K)
        d3 = times_transposed(w + C, n, known, dz, d3, C, K)
        d4 = times_transposed(w + 2 * C, n, known, dz, d4, C, K)
        d5 = times_transposed(w + 3 * C, n, known, dz, d5, C, K)
    return d2, d3, d4, d5


@triton.jit
def _spread(d_pooled, b, there, HW, C: tl.constexpr, K: tl.constexpr):
    """Of the mean over the image."""
    at = d_pooled + (b[None, :] * (4 * C) + to(tl.arange(0, C), C, K)[:, None])
    mask = there[None, :] & (tl.arange(0, C) < C)[:, None]
    d2, d3 = tl.load(at, mask, 0.0).to(tl.float32), tl.load(at + C, mask, 0.0).to(tl.float32)
    d4, d5 = tl.load(at + 2 * C, mask, 0.0).to(tl.float32), tl.load(at + 3 * C, mask, 0.0).to(tl.float32)
    return d2 / HW, d3 / HW, d4 / HW, d5 / HW


@triton.jit
def _tile_backward(
    tile, z0, scale0, shift0, z1, scale1, shift1, f, f_scale, f_shift, pooled, edges, w, w_strided, g, z, coefficients,
    g_strided, z_strided, coefficients_strided, d_mean, g0, g1, g_f, g_pooled, sums, dots, B, W, HW, image0, image1,
    g_image0, g_image1, N, S,
    C: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, STRIDED: tl.constexpr, POOLED: tl.constexpr,
    NEED0: tl.constexpr, NEED1: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    b, at, there = place(tile, B, W, HW, STRIDED, P)
    b = b.to(tl.int64)
    if POOLED:
        d2, d3, d4, d5 = _spread(d_mean, b, there, HW, C, K)
    else:
        d2, d3 = tl.zeros([C, P], tl.float32), tl.zeros([C, P], tl.float32)
        d4, d5 = tl.zeros([C, P], tl.float32), tl.zeros([C, P], tl.float32)
        d2, d3, d4, d5 = _pull(w, g, z, coefficients, N, b * (N * HW) + at, there, HW, d2, d3, d4, d5, C, K)
    if STRIDED:
        side = tile % 4
        hw, half = HW // 4, side // 3 * S
        offsets = b * (2 * S * hw) + (tile // 4 * P + tl.arange(0, P)) % hw
        rows = tl.where(side % 3 == 0, S, 0)  # pixels of mixed parity reach nobody
        for first in tl.range(0, rows, 16, num_stages=1):
            n = first + tl.arange(0, 16)
            known = n < S
            dz = behind(g_strided, z_strided, coefficients_strided, half + n, known, 2 * S, offsets, there, hw)
            base = w_strided + half * 4 * C
            d2 = times_transposed(base, n, known, dz, d2, C, K)
            d3 = times_transposed(base + C, n, known, dz, d3, C, K)
            d4 = times_transposed(base + 2 * C, n, known, dz, d4, C, K)
            d5 = times_transposed(base + 3 * C, n, known, dz, d5, C, K)
    x0 = state(z0, scale0, shift0, pooled, 0, b, image0, at, there, HW, C, Q, P)
    x1 = state(z1, scale1, shift1, pooled, 1, b, image1, at, there, HW, C, Q, P)
    v2, v3, v4, v5 = nodes(edges, x0, x1, f, f_scale, f_shift, b, at, there, HW, C, K, Q, P)
    if not POOLED:
        d2, d3 = tl.where(v2 > 0, d2, 0.0), tl.where(v3 > 0, d3, 0.0)
        d4, d5 = tl.where(v4 > 0, d4, 0.0), tl.where(v5 > 0, d5, 0.0)
    dots += tile * 14
    to0, to1 = tl.zeros([C, P], tl.float32), tl.zeros([C, P], tl.float32)
    x2, x3, x4 = shuffled(v2, C, K, P), shuffled(v3, C, K, P), shuffled(v4, C, K, P)
    to0, to1 = node_backward(edges, dots, 9, 3, d5, x0, x1, to0, to1, f, f_scale, f_shift, g_f, sums, tile, b, at,
                              there, HW, C, Q)  # fmt: skip
    put_dot(dots, 11, d5, x2)
    put_dot(dots, 12, d5, x3)
    put_dot(dots, 13, d5, x4)
    d4 += unshuffled(edge(edges, 13) * d5, C, K, P)
    to0, to1 = node_backward(edges, dots, 5, 2, d4, x0, x1, to0, to1, f, f_scale, f_shift, g_f, sums, tile, b, at,
                              there, HW, C, Q)  # fmt: skip
    put_dot(dots, 7, d4, x2)
    put_dot(dots, 8, d4, x3)
    d3 += unshuffled(edge(edges, 12) * d5 + edge(edges, 8) * d4, C, K, P)
    to0, to1 = node_backward(edges, dots, 2, 1, d3, x0, x1, to0, to1, f, f_scale, f_shift, g_f, sums, tile, b, at,
                              there, HW, C, Q)  # fmt: skip
    put_dot(dots, 4, d3, x2)
    d2 += unshuffled(edge(edges, 11) * d5 + edge(edges, 7) * d4 + edge(edges, 4) * d3, C, K, P)
    to0, to1 = node_backward(edges, dots, 0, 0, d2, x0, x1, to0, to1, f, f_scale, f_shift, g_f, sums, tile, b, at,
                              there, HW, C, Q)  # fmt: skip
    c = tl.arange(0, C)
    if Q == 0:
        if NEED0:
            where = g0 + (c[:, None] * HW + (b * g_image0 + at)[None, :])
            tl.store(where, to0.to(g0.dtype.element_ty), there[None, :] & (c < C)[:, None])
            put_sums(sums, tile, 2 * C, c, c < C, to0, to0 * x0)
        if NEED1:
            where = g1 + (c[:, None] * HW + (b * g_image1 + at)[None, :])
            tl.store(where, to1.to(g1.dtype.element_ty), there[None, :] & (c < C)[:, None])
            put_sums(sums, tile, 2 * C, C + c, c < C, to1, to1 * x1)
    elif Q < C:
        where = g_pooled + ((c - Q)[:, None] * HW + (b * (2 * (C - Q) * HW) + at)[None, :])
        mask = (c >= Q)[:, None] & there[None, :]
        tl.store(where, to0.to(g_pooled.dtype.element_ty), mask)
        tl.store(where + (C - Q) * HW, to1.to(g_pooled.dtype.element_ty), mask)


@triton.jit
def _weights_backward(
    part, parts, first, g, z, coefficients, dw, N, rows, side, z0, scale0, shift0, z1, scale1, shift1, f, f_scale,
    f_shift, pooled, edges, B, W, HW, image0, image1,
    C: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, STRIDED: tl.constexpr, READS_STRIDED: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows first.. (ROWS of them, below `rows`) of one part of dw (parts, N, 4C); READS_STRIDED: of one parity."""
    n = first + tl.arange(0, ROWS)
    known = n < rows
    dw2, dw3 = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    dw4, dw5 = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    tiles = 4 * tl.cdiv(B * HW // 4, P) if STRIDED and not READS_STRIDED else tl.cdiv(B * HW // 4, P)
    if not STRIDED:
        tiles = tl.cdiv(B * HW, P)
    for t in tl.range(part, tiles, parts, num_stages=1):
        tile = 4 * t + side if READS_STRIDED else t
        b, at, there = place(tile, B, W, HW, STRIDED, P)
        b = b.to(tl.int64)
        if READS_STRIDED:
            hw = HW // 4
            offsets = b * (N * hw) + (t * P + tl.arange(0, P)) % hw
            dz = behind(g, z, coefficients, n, known, N, offsets, there, hw)
        else:
            dz = behind(g, z, coefficients, n, known, N, b * (N * HW) + at, there, HW)
        x0 = state(z0, scale0, shift0, pooled, 0, b, image0, at, there, HW, C, Q, P)
        x1 = state(z1, scale1, shift1, pooled, 1, b, image1, at, there, HW, C, Q, P)
        v2, v3, v4, v5 = nodes(edges, x0, x1, f, f_scale, f_shift, b, at, there, HW, C, K, Q, P)
        dw2 = tl.dot(dz, tl.trans(relu(v2)), dw2, input_precision="ieee")
        dw3 = tl.dot(dz, tl.trans(relu(v3)), dw3, input_precision="ieee")
        dw4 = tl.dot(dz, tl.trans(relu(v4)), dw4, input_precision="ieee")
        dw5 = tl.dot(dz, tl.trans(relu(v5)), dw5, input_precision="ieee")
    out = dw + part.to(tl.int64) * N * 4 * C + (n[:, None] * (4 * C) + to(tl.arange(0, C), C, K)[None, :])
    tl.store(out, dw2, known[:, None])
    tl.store(out + C, dw3, known[:, None])
    tl.store(out + 2 * C, dw4, known[:, None])
    tl.store(out + 3 * C, dw5, known[:, None])


@triton.jit
def bwd(
    z0, scale0, shift0, z1, scale1, shift1, f, f_scale, f_shift, pooled, edges, w, w_strided, g, z, coefficients,
    g_strided, z_strided, coefficients_strided, d_mean, g0, g1, g_f, g_pooled, sums, dots, dw, dw_strided,
    tiles, parts, B, W, HW, image0, image1, g_image0, g_image1, N, S,
    C: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, STRIDED: tl.constexpr, POOLED: tl.constexpr,
    NEED0: tl.constexpr, NEED1: tl.constexpr, WEIGHTS: tl.constexpr, P: tl.constexpr, P_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < tiles:
        _tile_backward(
            program, z0, scale0, shift0, z1, scale1, shift1, f, f_scale, f_shift, pooled, edges, w, w_strided, g, z,
            coefficients, g_strided, z_strided, coefficients_strided, d_mean, g0, g1, g_f, g_pooled, sums, dots, B, W,
            HW, image0, image1, g_image0, g_image1, N, S, C, K, Q, STRIDED, POOLED, NEED0, NEED1, P,
        )  # fmt: skip
    elif WEIGHTS:
        part, block = (program - tiles) % parts, (program - tiles) // parts
        blocks = tl.cdiv(N, ROWS)
        if block < blocks:
            _weights_backward(
                part, parts, block * ROWS, g, z, coefficients, dw, N, N, 0, z0, scale0, shift0, z1, scale1, shift1, f,
                f_scale, f_shift, pooled, edges, B, W, HW, image0, image1, C, K, Q, STRIDED, False, P_WEIGHTS, ROWS,
            )  # fmt: skip
        elif STRIDED:
            half = (block - blocks) // tl.cdiv(S, ROWS)
            first = half * S + (block - blocks) % tl.cdiv(S, ROWS) * ROWS
            _weights_backward(
                part, parts, first, g_strided, z_strided, coefficients_strided, dw_strided, 2 * S, half * S + S,
                3 * half, z0, scale0, shift0, z1, scale1, shift1, f, f_scale, f_shift, pooled, edges, B, W, HW,
                image0, image1, C, K, Q, STRIDED, True, P_WEIGHTS, ROWS,
            )  # fmt: skip


# -- launchers


class _Inputs(NamedTuple):
    """What the nodes read: two raw tensors, or what a reduction cell's paths left. like: of the nodes' size."""

    raw: tuple[Raw, Raw] | None
    paths: Paths | None
    channels: int
    q: int
    like: Tensor

    def arguments(self, missing: Tensor) -> list[Tensor]:
        x0, x1 = self.raw or (Raw(missing, missing, missing),) * 2
        f, pooled = self.paths or (Raw(missing, missing, missing), missing)
        return [*x0, *x1, *f, pooled]

    def strides(self) -> tuple[int, int]:
        return (self.raw[0].z.stride(0), self.raw[1].z.stride(0)) if self.raw else (0, 0)

    def tensors(self) -> list[Tensor]:
        return [x.z for x in self.raw] if self.raw else [self.paths.f.z, self.paths.pooled] if self.paths else []


def _normal(x0: Raw, x1: Raw) -> _Inputs:
    return _Inputs((x0, x1), None, x0.z.shape[1], 0, x0.z)


def _reduced(paths: Paths) -> _Inputs:
    q = paths.f.z.shape[1] // 8
    return _Inputs(None, paths, q + paths.pooled.shape[1] // 2, q, paths.f.z)


class Tile(NamedTuple):
    """Pixels of a tile; of one that sums weight gradients, and the rows of weights that it does so for; warps."""

    pixels: int
    pixels_weights: int
    rows_weights: int
    warps: int


def tile(channels: int, backward: bool) -> Tile:
    """As many pixels as leave nodes and products in registers on every GPU that `aot` compiles for; the interpreter has
    no registers and slow programs."""
    if interpreted():
        return Tile(256, 256, 64, 4)
    warps = 8 if channels >= 64 or (backward and channels == 32) else 4
    return Tile(max(16, min(64, 1024 // channels)), 16, 16, warps)


def weight_parts(pixels: int, rows: int) -> int:
    """How many parts the weight gradients are summed in: enough programs for a large GPU."""
    return 1 if interpreted() else max(1, min(pixels // 256, 256 // -(-rows // 16)))


def forward(
    x0: Raw, x1: Raw, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None = None, head: Head | None = None
) -> Outputs:
    """`cell_step.forward_reference`; head: behind the last cell, whose mean is then not written."""
    return _forward("cell", _normal(x0, x1), edges, k, w, w_strided, head)


def nodes_forward(
    paths: Paths, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None = None, head: Head | None = None
) -> Outputs:
    """`reduce_step.nodes_reference`; head as above."""
    return _forward("nodes", _reduced(paths), edges, k, w, w_strided, head)


def _forward(
    stage: str, inputs: _Inputs, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None, head: Head | None
) -> Outputs:
    B, _, H, W = inputs.like.shape
    C, HW = inputs.channels, H * W
    constants = {"C": C, "K": k, "Q": inputs.q}
    if w is None:
        own = tile(C, False)
        mean = edges.new_empty(0 if head else B, 4 * C)
        rest = [edges] * 7 if head is None else list(head)
        classes = 0 if head is None else len(head.bias)
        launch(
            f"{stage}_pool_fwd", pool, (B,),
            [*inputs.arguments(edges), edges, mean, *rest, W, HW, *inputs.strides(), classes],
            {**constants, "P": min(max(32, own.pixels), power_of_two(HW, 16)),
             "CLASSES": classes and power_of_two(classes, 2)},
            own.warps, moved(*inputs.tensors(), mean, *(head or ())),
        )  # fmt: skip
        return Outputs(None, None, mean)
    N, S = w.shape[0], 0 if w_strided is None else w_strided.shape[0] // 2
    own = tile(C, False)
    z = inputs.like.new_empty(B, N, H, W)
    z_strided = inputs.like.new_empty(B, 2 * S, H // 2, W // 2)
    n = _tiles(B, HW, own.pixels, bool(S))
    sums, sums_strided = edges.new_empty(n, 2, N), edges.new_empty(n // 4 if S else 0, 2, 2 * S)
    launch(
        f"{stage}_fwd", fwd, (n,),
        [*inputs.arguments(edges), edges, w, w if w_strided is None else w_strided, z, z_strided if S else z, sums,
         sums_strided if S else sums, B, W, HW, *inputs.strides(), N, S],
        {**constants, "ROWS": power_of_two(N, 16), "STRIDED_ROWS": power_of_two(S, 16) if S else 0, "P": own.pixels},
        own.warps, moved(*inputs.tensors(), z, z_strided, sums, sums_strided),
    )  # fmt: skip
    return Outputs(Product(z, sums), Product(z_strided, sums_strided) if S else None, None)


def _tiles(B: int, HW: int, pixels: int, strided: bool) -> int:
    return 4 * triton.cdiv(B * HW // 4, pixels) if strided else triton.cdiv(B * HW, pixels)


def backward(
    x0: Raw, x1: Raw, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None = None,
    d: Behind | None = None, d_strided: Behind | None = None, d_pooled: Tensor | None = None,
    g0: Tensor | None = None, g1: Tensor | None = None, dw: Tensor | None = None, dw_strided: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """`cell_step.backward_reference`; sums of a gradient that is not wanted are not written."""
    readers = _Readers(w, w_strided, d, d_strided, d_pooled, dw, dw_strided)
    return _backward("cell", _normal(x0, x1), edges, k, readers, (g0, g1), None)


def nodes_backward(
    paths: Paths, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None, d: Behind | None,
    d_strided: Behind | None, d_mean: Tensor | None, g_f: Tensor, g_pooled: Tensor, dw: Tensor | None = None,
    dw_strided: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """`reduce_step.nodes_backward_reference`."""
    readers = _Readers(w, w_strided, d, d_strided, d_mean, dw, dw_strided)
    return _backward("nodes", _reduced(paths), edges, k, readers, (None, None), (g_f, g_pooled))


class _Readers(NamedTuple):
    w: Tensor | None
    w_strided: Tensor | None
    d: Behind | None
    d_strided: Behind | None
    d_pooled: Tensor | None
    dw: Tensor | None
    dw_strided: Tensor | None


def _backward(
    stage: str, inputs: _Inputs, edges: Tensor, k: int, r: _Readers, g: tuple[Tensor | None, Tensor | None],
    g_paths: tuple[Tensor, Tensor] | None,
) -> Gradients:  # fmt: skip
    B, _, H, W = inputs.like.shape
    C, HW = inputs.channels, H * W
    N, S = 0 if r.w is None else r.w.shape[0], 0 if r.w_strided is None else r.w_strided.shape[0] // 2
    own = tile(C, True)
    n = _tiles(B, HW, own.pixels, bool(S))
    sums = edges.new_empty(n, 2, 2 * C if inputs.raw else 8 * inputs.q)
    dots = edges.new_empty(n, 14)
    parts = 1 if r.dw is None else r.dw.shape[0]
    blocks = 0 if r.dw is None else triton.cdiv(N, own.rows_weights) + 2 * triton.cdiv(S, own.rows_weights)
    some, wanted = edges, [t for t in (*g, *(g_paths or ())) if t is not None]
    w, w_strided = (some if t is None else t for t in (r.w, r.w_strided))
    d, d_strided = (_coefficients(t, some) for t in (r.d, r.d_strided))
    read_again = moved(*inputs.tensors()) * blocks + moved(*(t for t in (*d[:2], *d_strided[:2]) if blocks))
    launch(
        f"{stage}_bwd" if r.w is not None else f"{stage}_pool_bwd", bwd, (n + blocks * parts,),
        [*inputs.arguments(some), edges, w, w_strided, *d, *d_strided, some if r.d_pooled is None else r.d_pooled,
         *(some if t is None else t for t in g), *(g_paths or (some, some)), sums, dots,
         *(some if t is None else t for t in (r.dw, r.dw_strided)), n, parts, B, W, HW, *inputs.strides(),
         *(0 if t is None else t.stride(0) for t in g), N, S],
        {"C": C, "K": k, "Q": inputs.q, "STRIDED": S > 0, "POOLED": r.w is None, "NEED0": g[0] is not None,
         "NEED1": g[1] is not None, "WEIGHTS": blocks > 0, "P": own.pixels,
         "P_WEIGHTS": own.pixels_weights, "ROWS": own.rows_weights},
        own.warps, moved(*inputs.tensors(), *d[:2], *d_strided[:2], *wanted, sums, dots) + read_again
        + moved(*(t for t in (r.dw, r.dw_strided) if t is not None)),
    )  # fmt: skip
    return Gradients(sums, dots)


def _coefficients(d: Behind | None, missing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g, z and the rows al, be, ga as one (3, N), which they are where `finish` wrote them."""
    if d is None:
        return missing, missing, missing
    together = d.al._base
    if together is None or together.shape != (3, len(d.al)) or together.storage_offset() != d.al.storage_offset():
        together = torch.stack(d[2:])
    return d.g, d.z, together


STAGES = {
    "C16": (16, 0, 48, 0),
    "C16-strided": (16, 0, 32, 16),
    "C32": (32, 0, 96, 0),
    "C32-strided": (32, 0, 64, 32),
    "C32-nodes": (32, 8, 64, 0),
    "C64": (64, 0, 64, 0),
    "C64-nodes": (64, 16, 128, 0),
    "C64-last": (64, 0, 0, 0),
}
"""Channels, Q, N and S of the stages of the search's own network: 16 channels, 8 cells, k = 4."""

_HALF = ("C16-strided", "C32-nodes")
"""A normal cell's with all readers and a reduction cell's: compiled in half precision too, which no search runs in.
Backward at C16, which is not among them, would spill 8 bytes on sm_90."""

_FLOATS = (
    *("z0", "scale0", "shift0", "z1", "scale1", "shift1", "f", "f_scale", "f_shift", "pooled", "edges", "mean", "w"),
    *("w_strided", "z", "z_strided", "sums", "sums_strided", "g", "coefficients", "g_strided", "coefficients_strided"),
    *("d_mean", "bias", "d_bias", "loss", "g0", "g1", "g_f", "g_pooled", "dots", "dw", "dw_strided"),
)
_TENSORS = ("z0", "z1", "f", "pooled", "z", "z_strided", "g", "g_strided", "g0", "g1", "g_f", "g_pooled")
_DIVISIBLE = (*_FLOATS, "labels", "HW", "image0", "image1", "g_image0", "g_image1", "N", "S")


def aot_cases() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], tuple[str, ...], int]]:
    """Every kernel at every stage of the search's own network, and at some in half precision."""
    halves = [(name, dtype) for name in _HALF for dtype in ("bf16", "fp16")]
    for name, dtype in [*((name, "fp32") for name in STAGES), *halves]:
        C, Q, N, S = STAGES[name]
        shape = {"C": C, "K": 4, "Q": Q}
        own = tile(C, False)
        rows = {"ROWS": power_of_two(N, 16), "STRIDED_ROWS": power_of_two(S, 16) if S else 0}
        if N:
            forwards = [(f"fwd/{name}", fwd, {**shape, **rows, "P": own.pixels})]
        else:
            pooled = shape | {"P": max(32, own.pixels)}
            classes = {"": 16, "-largest": LARGEST // C}
            forwards = [(f"pool/{name}{of}", pool, {**pooled, "CLASSES": n}) for of, n in classes.items()]
        for which, kernel, constants in forwards:
            yield aot_case(which, kernel, constants, _FLOATS, _DIVISIBLE, own.warps, _TENSORS, dtype)
        own = tile(C, True)
        constants = {**shape, "STRIDED": S > 0, "POOLED": N == 0, "NEED0": True, "NEED1": True, "WEIGHTS": N > 0}
        constants |= {"P": own.pixels, "P_WEIGHTS": own.pixels_weights, "ROWS": own.rows_weights}
        yield aot_case(f"bwd/{name}", bwd, constants, _FLOATS, _DIVISIBLE, own.warps, _TENSORS, dtype)
