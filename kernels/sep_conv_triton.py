"""Triton functions of a separable block between two batch norms; `_node_triton` launches them.

    y = W d(relu(normalise(x)))        d: depthwise K x K of stride S and dilation D (K = 1: none), W: pointwise

Forward a program makes BN channels of y at BP pixels: depthwise results of BC channels at a time are the product's
operand and never reach memory; sums for the batch norm behind are of what was written, as its type rounds it, around
the program's own mean. Backward dy = al * g + be * (y - center) + ga is formed on load, depthwise results are computed
again, and only the gradient behind the depthwise convolution is written, for `gather` to read with a halo.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def number(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def offset(at):
    return tl.load(at).to(tl.int64)


@triton.jit
def chosen(pointers, i):
    """Of a tuple of pointers the one with number i; where i is negative, the first."""
    found = pointers[0]
    for j in tl.static_range(1, len(pointers)):
        if i == j:
            found = pointers[j]
    return found


@triton.jit
def pixels(tile, P, Q, W, BP: tl.constexpr):
    """A tile of all images' pixels, whose planes have Q of them, W in a row: image, place in the plane, row, column,
    and whether it is there."""
    p = tile * BP + tl.arange(0, BP)
    q = p % Q
    return (p // Q).to(tl.int64), q, q // W, q % W, p < P


@triton.jit
def normal(coefs, T, first, c, known):
    """Center, scale and bias of channels of a batch norm that begins at `first`; negative: the identity."""
    there = known & (c + first >= c)  # the interpreter has no & of a mask and a scalar
    center = tl.load(coefs + first + c, there, 0.0).to(tl.float32)
    scale = tl.load(coefs + T + first + c, there, 1.0).to(tl.float32)
    bias = tl.load(coefs + 2 * T + first + c, there, 0.0).to(tl.float32)
    return center[:, None], scale[:, None], bias[:, None]


@triton.jit
def relu(v):
    return tl.where(v <= 0, 0.0, v)  # NaN stays


@triton.jit
def depthwise(xs, raw, weights, coefs, T, block, c, C, b, row, column, there):
    """(BC, BP) of d(relu(normalise(x))); `block` points to the block's row of the plan."""
    edge, H, W = number(block), number(block + 1), number(block + 2)
    S, K, D, origin = number(block + 3), number(block + 4), number(block + 5), number(block + 6)
    x = chosen(xs, edge)
    if edge < 0:
        x = raw
    x += offset(block + 9) + b * offset(block + 10)
    known = c < C
    center, scale, bias = normal(coefs, T, number(block + 14), c, known)
    planes = c[:, None] * number(block + 11)
    at = weights + offset(block + 12) + c * (K * K)
    total = tl.zeros([c.shape[0], row.shape[0]], tl.float32)
    for t in tl.range(0, K * K, num_stages=1):
        r, s = row * S + (origin + t // K * D), column * S + (origin + t % K * D)
        inside = known[:, None] & (there & (r >= 0) & (r < H) & (s >= 0) & (s < W))[None, :]
        v = tl.load(x[None, :] + planes + (r * W + s)[None, :], inside, 0.0).to(tl.float32)
        w = tl.load(at + t, known & (c + K > c + 1), 1.0).to(tl.float32)
        total += w[:, None] * tl.where(inside, relu((v - center) * scale + bias), 0.0)
    return total


@triton.jit
def put_sums(parts, y, T, first, c, C, there, n):
    """Of each channel the sum of y at `n` pixels that are there, and of the squares around its mean."""
    y = tl.where(there[None, :], y, 0.0)
    total = tl.sum(y, 1)
    d = tl.where(there[None, :], y - (total / n)[:, None], 0.0)
    tl.store(parts + first + c, total, c < C)
    tl.store(parts + T + first + c, tl.sum(d * d, 1), c < C)


@triton.jit
def block_fwd(
    xs, raw, weights, coefs, parts, block, n0, T, P, Q, Wo,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b, q, row, column, there = pixels(tile, P, Q, Wo, BP)
    C, N = number(block + 7), number(block + 8)
    m = n0 + tl.arange(0, BN)
    pointwise = weights + offset(block + 13) + m[:, None] * C
    acc = tl.zeros([BN, BP], tl.float32)
    for c0 in tl.range(0, C, BC, num_stages=1):
        c = c0 + tl.arange(0, BC)
        d = depthwise(xs, raw, weights, coefs, T, block, c, C, b, row, column, there)
        w = tl.load(pointwise + c[None, :], (m < N)[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
        acc = tl.dot(w, d, acc, input_precision="ieee")
    y = acc.to(raw.dtype.element_ty)
    to = raw + offset(block + 15) + (b * offset(block + 16) + q)[None, :] + m[:, None] * Q
    tl.store(to, y, (m < N)[:, None] & there[None, :])
    n = tl.minimum(P - tile * BP, BP)
    put_sums(parts + tile.to(tl.int64) * 2 * T, y.to(tl.float32), T, number(block + 17), m, N, there, n)


@triton.jit
def result_gradient(g, g_image, g_channel, raw, at, y_image, grads, coefs, T, first, c, known, b, q, Q, there):
    """(channels, BP) of al * g + be * (y - center) + ga, the gradient for a raw result; y begins at raw + at."""
    inside = known[:, None] & there[None, :]
    al = tl.load(grads + first + c, known, 0.0).to(tl.float32)[:, None]
    be = tl.load(grads + T + first + c, known, 0.0).to(tl.float32)[:, None]
    ga = tl.load(grads + 2 * T + first + c, known, 0.0).to(tl.float32)[:, None]
    center = tl.load(coefs + first + c, known, 0.0).to(tl.float32)[:, None]
    d = tl.load(g + (b * g_image + q)[None, :] + c[:, None] * g_channel, inside, 0.0).to(tl.float32)
    y = tl.load(raw + at + (b * y_image + q)[None, :] + c[:, None] * Q, inside, 0.0).to(tl.float32)
    return tl.where(inside, al * d + be * (y - center) + ga, 0.0)


@triton.jit
def _dy(g, g_image, g_channel, raw, grads, coefs, T, block, m, N, b, q, Q, there, INNER: tl.constexpr):
    g += offset(block + 18) if INNER else offset(block + 18) * g_channel
    at, image = offset(block + 15), offset(block + 16)
    return result_gradient(
        g, image if INNER else g_image, Q if INNER else g_channel, raw, at, image, grads, coefs, T,
        number(block + 17), m, m < N, b, q, Q, there,
    )  # fmt: skip


@triton.jit
def block_bwd_depthwise(
    g, g_image, g_channel, raw, weights, coefs, grads, work, block, c0, T, P, Q, Wo,
    INNER: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The gradient behind the depthwise convolution: W' dy, at BP pixels of BC channels, into `work`."""
    b, q, _row, _column, there = pixels(tl.program_id(0), P, Q, Wo, BP)
    C, N = number(block + 7), number(block + 8)
    c = c0 + tl.arange(0, BC)
    acc = tl.zeros([BC, BP], tl.float32)
    for n0 in tl.range(0, N, BN, num_stages=1):
        m = n0 + tl.arange(0, BN)
        dy = _dy(g, g_image, g_channel, raw, grads, coefs, T, block, m, N, b, q, Q, there, INNER)
        at = weights + offset(block + 13) + m[None, :] * C + c[:, None]
        w = tl.load(at, (c < C)[:, None] & (m < N)[None, :], 0.0).to(tl.float32)
        acc = tl.dot(w, dy, acc, input_precision="ieee")
    to = work + offset(block + 19) + (b * (C * Q) + q)[None, :] + c[:, None] * Q
    tl.store(to, acc, (c < C)[:, None] & there[None, :])


@triton.jit
def block_bwd_pointwise(
    xs, g, g_image, g_channel, raw, weights, coefs, grads, parts, block, n0, c0, n_shares, n_weights, T, P, Q,
    Wo, INNER: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """This program's share of dW = dy d', from every n_shares-th tile of pixels."""
    C, N = number(block + 7), number(block + 8)
    m, c = n0 + tl.arange(0, BN), c0 + tl.arange(0, BC)
    acc = tl.zeros([BN, BC], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(P, BP), n_shares, num_stages=1):
        b, q, row, column, there = pixels(tile, P, Q, Wo, BP)
        dy = _dy(g, g_image, g_channel, raw, grads, coefs, T, block, m, N, b, q, Q, there, INNER)
        d = depthwise(xs, raw, weights, coefs, T, block, c, C, b, row, column, there)
        acc = tl.dot(dy, tl.trans(d), acc, input_precision="ieee")
    to = parts + tl.program_id(0) * n_weights + offset(block + 21) + m[:, None] * C + c[None, :]
    tl.store(to, acc, (m < N)[:, None] & (c < C)[None, :])


@triton.jit
def through_depthwise(work, weights, parts, block, c, C, b, row, column, there, activation, Q, Ho, Wo,
                      WEIGHTS: tl.constexpr):  # fmt: skip
    """What a block sends back to its activations at these pixels; into `parts` this tile's share of the depthwise
    weights' gradient, a dot with the activations for every tap."""
    S, K, D, origin = number(block + 3), number(block + 4), number(block + 5), number(block + 6)
    known = c < C
    d_at = work + offset(block + 19) + (b * (C * Q))[None, :] + c[:, None] * Q
    w_at, part_at = offset(block + 12) + c * (K * K), offset(block + 20) + c * (K * K)
    total = tl.zeros([c.shape[0], row.shape[0]], tl.float32)
    for t in tl.range(0, K * K, num_stages=1):
        r, s = row - (origin + t // K * D), column - (origin + t % K * D)
        reached = there & (r >= 0) & (s >= 0) & (r % S == 0) & (s % S == 0) & (r // S < Ho) & (s // S < Wo)
        inside = known[:, None] & reached[None, :]
        d = tl.load(d_at + (r // S * Wo + s // S)[None, :], inside, 0.0).to(tl.float32)
        w = tl.load(weights + w_at + t, known & (c + K > c + 1), 1.0).to(tl.float32)
        total += w[:, None] * d
        if WEIGHTS:
            tl.store(parts + part_at + t, tl.sum(d * activation, 1), known & (c + K > c + 1))
    return total
