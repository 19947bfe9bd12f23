"""Triton kernels of a cell's nodes and what reads them, forward and backward (`cell_step_triton` starts them).

A program is one tile; where a strided reader follows, a tile's pixels share their parity. Backward, the programs behind
those of the tiles sum weight gradients, some rows of the weights over some tiles each.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._nodes_triton import edge, node_backward, nodes, put_dot, read, state
from ._tile_triton import behind, place, put_sums, relu, shuffled, times_transposed, to, unshuffled


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
