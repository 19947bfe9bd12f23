"""What the Triton kernels of the skip-only network share: where a tile's pixels lie, what is formed on load, products.

A tile is [channels, pixels]; nodes stand in it before their shuffle (v_j, x_j = P v_j), and the weights' columns are
loaded in that order instead. A product's inner dimension is cut into pieces of 16: more would not fit the registers.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def place(tile, B, W, HW, STRIDED: tl.constexpr, P: tl.constexpr):
    """(image, offset in its plane, whether it is there) of the pixels of a tile; STRIDED: tile % 4 is the parity of the
    rows, then of the columns, of all its pixels, and p their index on the halved plane."""
    if STRIDED:
        p = tile // 4 * P + tl.arange(0, P)
        hw, w = HW // 4, W // 2
        b, at = p // hw, (p % hw // w * 2 + tile % 4 // 2) * W + p % w * 2 + tile % 2
    else:
        p = tile * P + tl.arange(0, P)
        hw = HW
        b, at = p // HW, p % HW
    return b, at, p < B * hw


@triton.jit
def normalised(z, scale, shift, c, known, at, there, HW):
    """x of a raw tensor: channels c where known; at: the pixels' offsets with their images'."""
    mask = known[:, None] & there[None, :]
    raw = tl.load(z + c[:, None] * HW + at[None, :], mask, 0.0).to(tl.float32)
    s, h = tl.load(scale + c, known, 0.0).to(tl.float32), tl.load(shift + c, known, 0.0).to(tl.float32)
    return raw * s[:, None] + h[:, None]


@triton.jit
def behind(g, z, coefficients, n, known, N, at, there, HW):
    """dz = al * g + be * z + ga of channels n, zero where nothing is; coefficients: (3, N)."""
    mask = known[:, None] & there[None, :]
    offsets = n[:, None] * HW + at[None, :]
    al, be = (
        tl.load(coefficients + n, known, 0.0).to(tl.float32),
        tl.load(coefficients + N + n, known, 0.0).to(tl.float32),
    )
    ga = tl.load(coefficients + 2 * N + n, known, 0.0).to(tl.float32)
    grad, raw = tl.load(g + offsets, mask, 0.0).to(tl.float32), tl.load(z + offsets, mask, 0.0).to(tl.float32)
    return tl.where(mask, al[:, None] * grad + be[:, None] * raw + ga[:, None], 0.0)


@triton.jit
def relu(x):
    """NaN passes."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def shuffled(x, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """P x."""
    if K > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, (K, C // K, P)), (1, 0, 2)), (C, P))
    return x


@triton.jit
def unshuffled(x, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """P' x."""
    if K > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, (C // K, K, P)), (1, 0, 2)), (C, P))
    return x


@triton.jit
def to(c, C: tl.constexpr, K: tl.constexpr):
    """Where the shuffle brings channel c."""
    return c % (C // K) * K + c // (C // K)


@triton.jit
def halves(x, C: tl.constexpr, P: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (2, C // 2, P)), (1, 2, 0)))


@triton.jit
def _times(w, n, known, first: tl.constexpr, a, acc, PART: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    c = to(first + tl.arange(0, PART), C, K)
    part = tl.load(w + n[:, None] * (4 * C) + c[None, :], known[:, None], 0.0).to(tl.float32)
    return tl.dot(part, a, acc, input_precision="ieee")


@triton.jit
def times(w, n, known, a, acc, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """acc + w a of one node; w: rows n of (N, 4C) from the node's first column on; a: the node before its shuffle."""
    if C == 16:
        acc = _times(w, n, known, 0, a, acc, 16, C, K)
    elif C == 32:
        a0, a1 = halves(a, 32, P)
        acc = _times(w, n, known, 0, a0, acc, 16, C, K)
        acc = _times(w, n, known, 16, a1, acc, 16, C, K)
    else:
        QUARTER: tl.constexpr = C // 4
        lower, upper = halves(a, C, P)
        a0, a1 = halves(lower, C // 2, P)
        acc = _times(w, n, known, 0, a0, acc, QUARTER, C, K)
        acc = _times(w, n, known, QUARTER, a1, acc, QUARTER, C, K)
        a2, a3 = halves(upper, C // 2, P)
        acc = _times(w, n, known, 2 * QUARTER, a2, acc, QUARTER, C, K)
        acc = _times(w, n, known, 3 * QUARTER, a3, acc, QUARTER, C, K)
    return acc


@triton.jit
def times_transposed(w, n, known, dz, acc, C: tl.constexpr, K: tl.constexpr):
    """acc + w' dz of one node, before its shuffle; w, n as above, 16 rows."""
    c = to(tl.arange(0, C), C, K)
    part = tl.load(w + n[None, :] * (4 * C) + c[:, None], known[None, :], 0.0).to(tl.float32)
    return tl.dot(part, dz, acc, input_precision="ieee")


@triton.jit
def put_sums(sums, part, channels, c, known, first, second):
    """One part of (parts, 2, channels): the sums over the tile's pixels."""
    at = sums + part * 2 * channels + c
    tl.store(at, tl.sum(first, 1), known)
    tl.store(at + channels, tl.sum(second, 1), known)
