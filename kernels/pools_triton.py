"""Triton functions of the 3x3 pools, maximum and mean in one pass, raw; `_node_triton` launches them.

Forward keeps which of its nine pixels a maximum came from, a byte each, first in the order of rows; backward a pixel
asks the nine windows that it lies in.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .sep_conv_triton import chosen, number, offset, pixels, put_sums, result_gradient


@triton.jit
def pools_fwd(xs, raw, taps, parts, pool, c0, T, P, Q, Wo, BC: tl.constexpr, BP: tl.constexpr):
    tile = tl.program_id(0)
    b, q, row, column, there = pixels(tile, P, Q, Wo, BP)
    H, W, S, C = number(pool + 1), number(pool + 2), number(pool + 3), number(pool + 6)
    c = c0 + tl.arange(0, BC)
    known = (c < C)[:, None] & there[None, :]
    x = chosen(xs, number(pool)) + (b * offset(pool + 4))[None, :] + c[:, None] * number(pool + 5)
    best = tl.full([BC, BP], float("-inf"), tl.float32)
    tap = tl.zeros([BC, BP], tl.int32)
    total = tl.zeros([BC, BP], tl.float32)
    for t in tl.range(0, 9, num_stages=1):
        r, s = row * S + (t // 3 - 1), column * S + (t % 3 - 1)
        inside = there & (r >= 0) & (r < H) & (s >= 0) & (s < W)
        v = tl.load(x + (r * W + s)[None, :], known & inside[None, :], float("-inf")).to(tl.float32)
        higher = (v > best) | (v != v)  # NaN stays, as in torch
        tap = tl.where(higher, t, tap)
        best = tl.where(higher, v, best)
        total += tl.where(known & inside[None, :], v, 0.0)
    best = tl.where(known, best, 0.0)
    n = tl.minimum(P - tile * BP, BP)
    parts += tile.to(tl.int64) * 2 * T
    at = (b * (C * Q) + q)[None, :] + c[:, None] * Q
    if offset(pool + 7) >= 0:
        y = best.to(raw.dtype.element_ty)
        tl.store(raw + offset(pool + 7) + at, y, known)
        tl.store(taps + offset(pool + 11) + at, tap.to(tl.int8), known)
        put_sums(parts, y.to(tl.float32), T, number(pool + 9), c, C, there, n)
    if offset(pool + 8) >= 0:
        high = tl.minimum(row * S + 2, H) - tl.maximum(row * S - 1, 0)
        wide = tl.minimum(column * S + 2, W) - tl.maximum(column * S - 1, 0)
        y = (total / tl.maximum(high * wide, 1).to(tl.float32)[None, :]).to(raw.dtype.element_ty)
        tl.store(raw + offset(pool + 8) + at, y, known)
        put_sums(parts, y.to(tl.float32), T, number(pool + 10), c, C, there, n)


@triton.jit
def through_pool(
    g, g_image, g_channel, raw, taps, grads, coefs, T, pool, c, C, b, row, column, there, Q, Ho, Wo, MEAN: tl.constexpr,
):  # fmt: skip
    """What one of the pools sends back to these pixels; nothing where it is not among the operators."""
    H, W, S = number(pool + 1), number(pool + 2), number(pool + 3)
    y_at, first = offset(pool + 7 + MEAN), number(pool + 9 + MEAN)
    known = c < C
    total = tl.zeros([c.shape[0], row.shape[0]], tl.float32)
    if y_at >= 0:
        for t in tl.range(0, 9, num_stages=1):
            r, s = row - (t // 3 - 1), column - (t % 3 - 1)
            reached = there & (r >= 0) & (s >= 0) & (r % S == 0) & (s % S == 0) & (r // S < Ho) & (s // S < Wo)
            q = r // S * Wo + s // S
            d = result_gradient(g, g_image, g_channel, raw, y_at, C * Q, grads, coefs, T, first, c, known, b, q, Q,
                                reached)  # fmt: skip
            if MEAN:
                # r and s are the center of the window
                high = tl.minimum(r + 2, H) - tl.maximum(r - 1, 0)
                wide = tl.minimum(s + 2, W) - tl.maximum(s - 1, 0)
                total += d / tl.maximum(high * wide, 1).to(tl.float32)[None, :]
            else:
                at = taps + offset(pool + 11) + (b * (C * Q) + q)[None, :] + c[:, None] * Q
                mine = tl.load(at, known[:, None] & reached[None, :], -1).to(tl.int32) == t
                total += tl.where(mine, d, 0.0)
    return total
