"""A cell's four nodes in Triton kernels, forward and backward: v_2..v_5 in registers, before their shuffle.

In a normal cell Q = 0 and an input is one raw tensor. In a reduction cell x_i of node j is f_ij, raw, in the first Q
channels, and the pooled bypass of input i in the others (`reduce_step`).
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._tile_triton import normalised, put_sums, relu, shuffled, times


@triton.jit
def edge(edges, e: tl.constexpr):
    return tl.load(edges + e).to(tl.float32)


@triton.jit
def state(
    z, scale, shift, pooled, i: tl.constexpr, b, image, at, there, HW, C: tl.constexpr, Q: tl.constexpr, P: tl.constexpr
):
    """x_i, or where Q > 0 the pooled bypass with zeros in the first Q channels."""
    c = tl.arange(0, C)
    if Q == 0:
        x = normalised(z, scale, shift, c, c < C, b * image + at, there, HW)
    elif Q == C:
        x = tl.zeros([C, P], tl.float32)
    else:
        where = pooled + ((i * (C - Q) + c - Q)[:, None] * HW + (b * (2 * (C - Q) * HW) + at)[None, :])
        x = tl.load(where, (c >= Q)[:, None] & there[None, :], 0.0).to(tl.float32)
    return x


@triton.jit
def _of(x, f, scale, shift, path: tl.constexpr, b, at, there, HW, C: tl.constexpr, Q: tl.constexpr):
    """x_i as one node sees it."""
    if Q > 0:
        c = tl.arange(0, C)
        f, scale, shift = f + path * Q * HW, scale + path * Q, shift + path * Q
        x += normalised(f, scale, shift, c, c < Q, b * (8 * Q * HW) + at, there, HW)
    return x


@triton.jit
def nodes(edges, x0, x1, f, scale, shift, b, at, there, HW, C: tl.constexpr, K: tl.constexpr, Q: tl.constexpr,
           P: tl.constexpr):  # fmt: skip
    """v_2..v_5, the nodes before their shuffle."""
    v2 = edge(edges, 0) * _of(x0, f, scale, shift, 0, b, at, there, HW, C, Q)
    v2 += edge(edges, 1) * _of(x1, f, scale, shift, 4, b, at, there, HW, C, Q)
    x2 = shuffled(v2, C, K, P)
    v3 = edge(edges, 2) * _of(x0, f, scale, shift, 1, b, at, there, HW, C, Q)
    v3 += edge(edges, 3) * _of(x1, f, scale, shift, 5, b, at, there, HW, C, Q) + edge(edges, 4) * x2
    x3 = shuffled(v3, C, K, P)
    v4 = edge(edges, 5) * _of(x0, f, scale, shift, 2, b, at, there, HW, C, Q)
    v4 += edge(edges, 6) * _of(x1, f, scale, shift, 6, b, at, there, HW, C, Q)
    v4 += edge(edges, 7) * x2 + edge(edges, 8) * x3
    x4 = shuffled(v4, C, K, P)
    v5 = edge(edges, 9) * _of(x0, f, scale, shift, 3, b, at, there, HW, C, Q)
    v5 += edge(edges, 10) * _of(x1, f, scale, shift, 7, b, at, there, HW, C, Q)
    v5 += edge(edges, 11) * x2 + edge(edges, 12) * x3 + edge(edges, 13) * x4
    return v2, v3, v4, v5


@triton.jit
def read(w, n, known, v2, v3, v4, v5, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr):
    """w a."""
    acc = tl.zeros([ROWS, P], tl.float32)
    acc = times(w, n, known, relu(v2), acc, C, K, P)
    acc = times(w + C, n, known, relu(v3), acc, C, K, P)
    acc = times(w + 2 * C, n, known, relu(v4), acc, C, K, P)
    return times(w + 3 * C, n, known, relu(v5), acc, C, K, P)


@triton.jit
def put_dot(dots, e: tl.constexpr, u, x):
    tl.store(dots + e, tl.sum(tl.sum(u * x, 1), 0))


@triton.jit
def _path(g, sums, tile, path: tl.constexpr, u, x, c, b, at, there, HW, Q: tl.constexpr):
    """The gradient of f_ij and its sums."""
    where = g + ((path * Q + c)[:, None] * HW + (b * (8 * Q * HW) + at)[None, :])
    tl.store(where, u.to(g.dtype.element_ty), (c < Q)[:, None] & there[None, :])
    put_sums(sums, tile, 8 * Q, path * Q + c, c < Q, u, u * x)


@triton.jit
def node_backward(
    edges, dots, e: tl.constexpr, j: tl.constexpr, u, x0, x1, gradient0, gradient1, f, f_scale, f_shift, g_f, sums,
    tile, b, at, there, HW, C: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Of node 2 + j the two edges from the inputs."""
    c = tl.arange(0, C)
    own0 = _of(x0, f, f_scale, f_shift, j, b, at, there, HW, C, Q)
    own1 = _of(x1, f, f_scale, f_shift, 4 + j, b, at, there, HW, C, Q)
    put_dot(dots, e, u, own0)
    put_dot(dots, e + 1, u, own1)
    u0, u1 = edge(edges, e) * u, edge(edges, e + 1) * u
    if Q > 0:
        _path(g_f, sums, tile, j, u0, own0, c, b, at, there, HW, Q)
        _path(g_f, sums, tile, 4 + j, u1, own1, c, b, at, there, HW, Q)
    return gradient0 + u0, gradient1 + u1
