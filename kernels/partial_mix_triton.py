"""Triton kernels of a mixed node's sum: all edges, all operators, the bypass and the shuffle in one pass, gradients,
and what finishes the sums of batch norms between launches.

Sources are raw results, normalised on load, and states that pass a skip connection; each is weighed by its edge's and
its operator's weight. Processed channel c stands at channel c*k of the node, the g-th bypassed one at c*k + g.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from .aot import AotCase, case
from .sep_conv_triton import chosen, number, offset, pixels


@triton.jit
def _weight(edge_weights, operator_weights, n_operators, edge, op):
    return tl.load(edge_weights + edge).to(tl.float32) * tl.load(operator_weights + edge * n_operators + op).to(
        tl.float32
    )


@triton.jit
def _source(xs, raw, source, c, b, q, Q, inside):
    """The values of a source at (channels, pixels)."""
    x = chosen(xs, number(source + 1))
    if number(source) == 0:
        x = raw
    x += offset(source + 3)
    at = (b * offset(source + 4) + q)[None, :] + c[:, None] * number(source + 5)
    return tl.load(x + at, inside, 0.0).to(tl.float32)


@triton.jit
def _bypassed(xs, edge, edges, c, b, q, row, column, inside):
    """The four pixels under each pixel of the node at stride 2, and where they are; the same one at stride 1."""
    at = edges + edge * 16
    S, W = number(at + 1), number(at + 2)
    corner = (b * offset(at + 3) + row * (S * W) + column * S)[None, :] + c[:, None] * number(at + 4)
    x = chosen(xs, edge)
    v00 = tl.load(x + corner, inside, 0.0).to(tl.float32)
    v01 = tl.load(x + corner + (S - 1), inside, 0.0).to(tl.float32)
    v10 = tl.load(x + corner + (S - 1) * W, inside, 0.0).to(tl.float32)
    v11 = tl.load(x + corner + (S - 1) * (W + 1), inside, 0.0).to(tl.float32)
    return v00, v01, v10, v11


@triton.jit
def _most(v00, v01, v10, v11):
    upper = tl.maximum(v00, v01, propagate_nan=tl.PropagateNan.ALL)
    lower = tl.maximum(v10, v11, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(upper, lower, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def mix_fwd(
    xs, raw, coefs, edge_weights, operator_weights, node, sources, edges, n_sources, n_edges, n_operators, N, T, P, Q,
    Wo, K: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    b, q, row, column, there = pixels(tl.program_id(0), P, Q, Wo, BP)
    tiles = tl.cdiv(N, BC)
    group = tl.program_id(1) // tiles
    c = tl.program_id(1) % tiles * BC + tl.arange(0, BC)
    inside = (c < N)[:, None] & there[None, :]
    total = tl.zeros([BC, BP], tl.float32)
    if group == 0:
        for i in tl.range(0, n_sources, num_stages=1):
            source = sources + i * 16
            edge, idx = number(source + 1), number(source + 6)
            known = (c < N) & (c + idx >= c)
            center = tl.load(coefs + idx + c, known, 0.0).to(tl.float32)
            scale = tl.load(coefs + T + idx + c, known, 1.0).to(tl.float32)
            bias = tl.load(coefs + 2 * T + idx + c, known, 0.0).to(tl.float32)
            v = _source(xs, raw, source, c, b, q, Q, inside)
            w = _weight(edge_weights, operator_weights, n_operators, edge, number(source + 2))
            total += w * ((v - center[:, None]) * scale[:, None] + bias[:, None])
    else:
        for edge in tl.range(0, n_edges, num_stages=1):
            first = number(edges + edge * 16 + 5) + (group - 1) * N
            v00, v01, v10, v11 = _bypassed(xs, edge, edges, first + c, b, q, row, column, inside)
            total += tl.load(edge_weights + edge).to(tl.float32) * _most(v00, v01, v10, v11)
    to = node + (b * (N * K * Q) + q)[None, :] + (c * K + group)[:, None] * Q
    tl.store(to, total.to(node.dtype.element_ty), inside)


@triton.jit
def mix_bwd(
    xs, gxs, g, g_image, g_channel, raw, coefs, edge_weights, parts, sources, edges, n_sources, n_edges, n_parts, needs,
    N, T, P, Q, Wo, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradient on the processed channels, its dots with every source (raw ones around their
    centers), an edge's dots with what bypasses it, and the gradient of that. g_channel: from one channel of the node to
    the next processed one is k times that."""
    b, q, row, column, there = pixels(tl.program_id(0), P, Q, Wo, BP)
    tiles = tl.cdiv(N, BC)
    group = tl.program_id(1) // tiles
    k = tl.num_programs(1) // tiles
    c = tl.program_id(1) % tiles * BC + tl.arange(0, BC)
    inside = (c < N)[:, None] & there[None, :]
    at = (b * g_image + q)[None, :] + (c * k + group)[:, None] * g_channel
    d = tl.load(g + at, inside, 0.0).to(tl.float32)
    parts += tl.program_id(0).to(tl.int64) * n_parts
    if group == 0:
        tl.store(parts + n_sources * N + c, tl.sum(d, 1), c < N)
        for i in tl.range(0, n_sources, num_stages=1):
            source = sources + i * 16
            idx = number(source + 6)
            center = tl.load(coefs + idx + c, (c < N) & (c + idx >= c), 0.0).to(tl.float32)
            v = _source(xs, raw, source, c, b, q, Q, inside) - center[:, None]
            tl.store(parts + i * N + c, tl.sum(tl.where(inside, d * v, 0.0), 1), c < N)
    else:
        bypassing = tl.num_programs(1) - tiles
        for edge in tl.range(0, n_edges, num_stages=1):
            own = edges + edge * 16
            S, H, W, C = number(own + 1), number(own), number(own + 2), number(own + 5)
            channel = C + (group - 1) * N + c
            v00, v01, v10, v11 = _bypassed(xs, edge, edges, channel, b, q, row, column, inside)
            most = _most(v00, v01, v10, v11)
            column_of = (n_sources + 1) * N + edge * bypassing + tl.program_id(1) - tiles
            tl.store(parts + column_of, tl.sum(tl.where(inside, d * most, 0.0)))
            left = (c + ((needs >> edge) & 1) > c)[:, None]
            halved = (c + S > c + 1)[:, None]
            e = tl.load(edge_weights + edge).to(tl.float32) * d
            to = chosen(gxs, edge) + (b * (C * k * H * W) + row * (S * W) + column * S)[None, :]
            to += channel[:, None] * (H * W)
            # the first of four that has the maximum gets the gradient
            is00 = (v00 == most) | (v00 != v00) | (halved == 0)
            is01 = ((v01 == most) | (v01 != v01)) & (is00 == 0)
            is10 = ((v10 == most) | (v10 != v10)) & (is00 == 0) & (is01 == 0)
            is11 = (is00 == 0) & (is01 == 0) & (is10 == 0)
            kind = gxs[0].dtype.element_ty
            tl.store(to, tl.where(is00, e, 0.0).to(kind), inside & left)
            tl.store(to + 1, tl.where(is01, e, 0.0).to(kind), inside & left & halved)
            tl.store(to + W, tl.where(is10, e, 0.0).to(kind), inside & left & halved)
            tl.store(to + W + 1, tl.where(is11, e, 0.0).to(kind), inside & left & halved)


@triton.jit
def finish_fwd(parts, affine, stats, coefs, first, last, n_parts, T, P, BP: tl.constexpr, AFFINE: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Batch norms from `first` to `last`: mean and 1/deviation in float64 from the tiles' sums and their squares around
    the tiles' own means; center, scale and bias of y -> (y - center) * scale + bias."""
    c = first + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = c < last
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for row in tl.range(0, n_parts, ROWS, num_stages=1):
        r = (row + tl.arange(0, ROWS)).to(tl.int64)
        there = (r < n_parts)[:, None] & known[None, :]
        total += tl.load(parts + r[:, None] * (2 * T) + c[None, :], there, 0.0).to(tl.float32).to(tl.float64)
    mean = tl.sum(total, 0) / P
    square = tl.zeros([ROWS, COLUMNS], tl.float64)
    for row in tl.range(0, n_parts, ROWS, num_stages=1):
        r = (row + tl.arange(0, ROWS)).to(tl.int64)
        there = (r < n_parts)[:, None] & known[None, :]
        n = tl.maximum(tl.minimum(P - r * BP, BP), 1).to(tl.float64)[:, None]
        at = parts + r[:, None] * (2 * T) + c[None, :]
        own = tl.load(at, there, 0.0).to(tl.float32).to(tl.float64) / n
        around = tl.load(at + T, there, 0.0).to(tl.float32).to(tl.float64)
        square += tl.where(there, around + n * (own - mean[None, :]) * (own - mean[None, :]), 0.0)
    scale = 1 / tl.sqrt(tl.sum(square, 0) / P + 1e-5)
    tl.store(stats + c, mean, known)
    tl.store(stats + T + c, scale, known)
    gamma, bias = 1.0, 0.0
    if AFFINE:
        gamma = tl.load(affine + c, known, 0.0).to(tl.float32)
        bias = tl.load(affine + T + c, known, 0.0).to(tl.float32)
    # the center is the mean as float32 has it; the bias makes up for what it lacks
    center = mean.to(tl.float32)
    tl.store(coefs + c, center, known)
    tl.store(coefs + T + c, (scale * gamma).to(tl.float32), known)
    tl.store(coefs + 2 * T + c, (bias + (center.to(tl.float64) - mean) * scale * gamma).to(tl.float32), known)


@triton.jit
def _finish_norm(total, dot, weight, c, stats, coefs, affine, grads, d_affine, T, P, known, AFFINE: tl.constexpr):
    """From the sum of a gradient behind `weight` times a batch norm and of its dot with y - center: al, be, ga; returns
    what the weight's gradient sums up."""
    mean = tl.load(stats + c, known, 0.0).to(tl.float64)
    r = tl.load(stats + T + c, known, 0.0).to(tl.float64)
    off = tl.load(coefs + c, known, 0.0).to(tl.float32).to(tl.float64) - mean
    gamma, bias = 1.0, 0.0
    if AFFINE:
        gamma = tl.load(affine + c, known, 0.0).to(tl.float32)
        bias = tl.load(affine + T + c, known, 0.0).to(tl.float32)
    q, rw = r * (dot + off * total), r * weight * gamma
    tl.store(grads + c, rw.to(tl.float32), known)
    tl.store(grads + T + c, (-r * rw * q / P).to(tl.float32), known)
    tl.store(grads + 2 * T + c, (-rw * (total + r * q * off) / P).to(tl.float32), known)
    if AFFINE:
        tl.store(d_affine + c, (weight * q).to(tl.float32), known)
        tl.store(d_affine + T + c, (weight * total).to(tl.float32), known)
    return q * gamma + total * bias


@triton.jit
def finish_inner(sums, stats, coefs, affine, grads, d_affine, ranges, T, T_inner, P,
                 AFFINE: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """The batch norms within separable convolutions, of which `sums` has the two sums: one range of channels each."""
    first, last = number(ranges + 2 * tl.program_id(0)), number(ranges + 2 * tl.program_id(0) + 1)
    for c0 in tl.range(first, last, COLUMNS, num_stages=1):
        c = c0 + tl.arange(0, COLUMNS)
        total = tl.load(sums + c, c < last, 0.0).to(tl.float64)
        dot = tl.load(sums + T_inner + c, c < last, 0.0).to(tl.float64)
        _finish_norm(total, dot, 1.0, c, stats, coefs, affine, grads, d_affine, T, P, c < last, AFFINE)


@triton.jit
def finish_mix(
    sums, edge_weights, operator_weights, d_edges, d_operators, stats, coefs, affine, grads, d_affine, sources, edges,
    n_sources, n_operators, n_bypassing, N, T, P, AFFINE: tl.constexpr, OPERATORS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """An edge: the gradients of its weight and its operators' weights, and what its outer batch norms send back."""
    edge = tl.program_id(0)
    beta = tl.load(edge_weights + edge).to(tl.float32).to(tl.float64)
    row = tl.zeros([OPERATORS], tl.float64)
    total = tl.zeros([COLUMNS], tl.float64)
    for i0 in tl.range(0, n_bypassing, COLUMNS, num_stages=1):
        i = i0 + tl.arange(0, COLUMNS)
        at = sums + (n_sources + 1) * N + edge * n_bypassing + i
        total += tl.load(at, i < n_bypassing, 0.0).to(tl.float64)
    d_beta = tl.sum(total)
    first, last = number(edges + edge * 16 + 6), number(edges + edge * 16 + 7)
    for i in tl.range(first, last, num_stages=1):
        op, idx = number(sources + i * 16 + 2), number(sources + i * 16 + 6)
        alpha = tl.load(operator_weights + edge * n_operators + op).to(tl.float32).to(tl.float64)
        dots = tl.zeros([COLUMNS], tl.float64)
        for c0 in tl.range(0, N, COLUMNS, num_stages=1):
            c = c0 + tl.arange(0, COLUMNS)
            dot = tl.load(sums + i * N + c, c < N, 0.0).to(tl.float64)
            if idx >= 0:
                s = tl.load(sums + n_sources * N + c, c < N, 0.0).to(tl.float64)
                dot = _finish_norm(
                    s, dot, beta * alpha, idx + c, stats, coefs, affine, grads, d_affine, T, P, c < N, AFFINE
                )  # fmt: skip
            dots += dot
        d = tl.sum(dots)
        d_beta += alpha * d
        row = tl.where(tl.arange(0, OPERATORS) == op, beta * d, row)
    kind = d_edges.dtype.element_ty
    tl.store(d_edges + edge, d_beta.to(tl.float32).to(kind))
    o = tl.arange(0, OPERATORS)
    tl.store(d_operators + edge * n_operators + o, row.to(tl.float32).to(kind), o < n_operators)


def aot_cases() -> Iterator[AotCase]:
    """A node of the search, of two edges, on every type that it is run on."""
    f32, f64 = "*fp32", "*fp64"
    for dtype in ("fp32", "bf16", "fp16"):
        kind = f"*{dtype}"
        types: dict[str, Any] = dict.fromkeys(
            ("raw", "edge_weights", "operator_weights", "node", "g", "d_edges", "d_operators"), kind
        )
        types |= {"xs": (kind, kind), "gxs": (kind, kind), "sources": "*i64", "edges": "*i64", "ranges": "*i64"}
        types |= dict.fromkeys(("coefs", "parts", "affine", "grads", "d_affine"), f32)
        types |= dict.fromkeys(("stats", "sums"), f64)
        for function, more in (
            (mix_fwd, {"K": 4, "BC": 8, "BP": 64}),
            (mix_bwd, {"BC": 8, "BP": 64}),
            (finish_mix, {"AFFINE": True, "OPERATORS": 8, "COLUMNS": 16}),
            (finish_fwd, {"AFFINE": True, "BP": 64, "ROWS": 32, "COLUMNS": 16}),
            (finish_inner, {"AFFINE": True, "COLUMNS": 16}),
        ):
            if dtype != "fp32" and function in (finish_fwd, finish_inner):
                continue  # their arguments have no other type
            warps = 8 if function in (mix_fwd, mix_bwd) else 4
            yield case(f"{function.__name__}-{dtype}", function, types, more, warps, ("P", "Q"))
