"""Triton kernels of the skip cell, NCHW, and their launchers.

A program takes one cycle of the channel shuffle P, for a block of pixels, and walks along it: what a node needs of the
channels before stands in registers, so that a channel's pixels come from memory once. Nodes 2, 3 and 4 reach back one,
two and three channels; a walk begins that much earlier. Backward it goes the other way round, and the sums of the 14
edges are partial, `[programs, 14]`, added up in a fixed order by `sum_rows`.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._launch import launch, moved
from ._native import planes
from ._sums_triton import sum_rows
from .aot import AotCase, case, short_name

N_EDGES = 14


@triton.jit
def _place(B, HW, IMAGES: tl.constexpr, PIXELS: tl.constexpr):
    """This program's first image, its images from there on, its pixels, and which of them are there: a row an image."""
    blocks = tl.cdiv(HW, PIXELS)
    first = tl.program_id(0) // blocks * IMAGES
    b = tl.arange(0, IMAGES)
    p = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    return first.to(tl.int64), b[:, None], p[None, :], (first + b < B)[:, None] & (p < HW)[None, :]


@triton.jit
def _before(c, C, K: tl.constexpr):
    """The channel that the shuffle brings to c."""
    return c % K * (C // K) + c // K


@triton.jit
def _behind(c, C, K: tl.constexpr):
    """Where the shuffle brings channel c."""
    return c % (C // K) * K + c // (C // K)


@triton.jit
def _weight(weights, edge):
    return tl.load(weights + edge).to(tl.float32)


@triton.jit
def fwd(
    x0, x1, weights, out, cycles, B, C, HW, x0_image, x0_channel, x1_image, x1_channel,
    K: tl.constexpr, IMAGES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    first, b, p, there = _place(B, HW, IMAGES, PIXELS)
    c = tl.load(cycles + 2 * tl.program_id(1)).to(tl.int32)
    steps = tl.load(cycles + 2 * tl.program_id(1) + 1).to(tl.int32)
    w02, w12 = _weight(weights, 0), _weight(weights, 1)
    w03, w13, w23 = _weight(weights, 2), _weight(weights, 3), _weight(weights, 4)
    w04, w14, w24, w34 = _weight(weights, 5), _weight(weights, 6), _weight(weights, 7), _weight(weights, 8)
    w05, w15, w25 = _weight(weights, 9), _weight(weights, 10), _weight(weights, 11)
    w35, w45 = _weight(weights, 12), _weight(weights, 13)
    x0 += first * x0_image + (b * x0_image + p)
    x1 += first * x1_image + (b * x1_image + p)
    out += first * (4 * C * HW) + (b * (4 * C * HW) + p)
    if K == 1:
        u = tl.load(x0 + c * x0_channel, there, 0.0).to(tl.float32)
        v = tl.load(x1 + c * x1_channel, there, 0.0).to(tl.float32)
        x2 = w02 * u + w12 * v
        x3 = w03 * u + w13 * v + w23 * x2
        x4 = w04 * u + w14 * v + w24 * x2 + w34 * x3
        x5 = w05 * u + w15 * v + w25 * x2 + w35 * x3 + w45 * x4
        tl.store(out + c * HW, x2.to(out.dtype.element_ty), there)
        tl.store(out + (C + c) * HW, x3.to(out.dtype.element_ty), there)
        tl.store(out + (2 * C + c) * HW, x4.to(out.dtype.element_ty), there)
        tl.store(out + (3 * C + c) * HW, x5.to(out.dtype.element_ty), there)
    else:
        c = _before(_before(_before(_before(c, C, K), C, K), C, K), C, K)
        x2 = tl.zeros([IMAGES, PIXELS], tl.float32)
        x3 = tl.zeros([IMAGES, PIXELS], tl.float32)
        x4 = tl.zeros([IMAGES, PIXELS], tl.float32)
        for step in tl.range(0, steps + 3, num_stages=1):
            u = tl.load(x0 + c * x0_channel, there, 0.0).to(tl.float32)
            v = tl.load(x1 + c * x1_channel, there, 0.0).to(tl.float32)
            x5 = w05 * u + w15 * v + w25 * x2 + w35 * x3 + w45 * x4
            x4 = w04 * u + w14 * v + w24 * x2 + w34 * x3
            x3 = w03 * u + w13 * v + w23 * x2
            x2 = w02 * u + w12 * v
            c = _behind(c, C, K)
            if step >= 3:
                tl.store(out + c * HW, x2.to(out.dtype.element_ty), there)
                tl.store(out + (C + c) * HW, x3.to(out.dtype.element_ty), there)
                tl.store(out + (2 * C + c) * HW, x4.to(out.dtype.element_ty), there)
                tl.store(out + (3 * C + c) * HW, x5.to(out.dtype.element_ty), there)


@triton.jit
def bwd(
    grad, x0, x1, weights, g0, g1, parts, cycles, B, C, HW, x0_image, x0_channel, x1_image, x1_channel, g_image,
    K: tl.constexpr, NEEDS_0: tl.constexpr, NEEDS_1: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Lower case d: what arrives from node j at channel c, the gradient of the node's channel behind c. u, v: the
    inputs at c, and at its first, second and third predecessor."""
    WARM: tl.constexpr = 0 if K == 1 else 4
    first, b, p, there = _place(B, HW, IMAGES, PIXELS)
    c = tl.load(cycles + 2 * tl.program_id(1)).to(tl.int32)
    steps = tl.load(cycles + 2 * tl.program_id(1) + 1).to(tl.int32)
    w02, w12 = _weight(weights, 0), _weight(weights, 1)
    w03, w13, w23 = _weight(weights, 2), _weight(weights, 3), _weight(weights, 4)
    w04, w14, w24, w34 = _weight(weights, 5), _weight(weights, 6), _weight(weights, 7), _weight(weights, 8)
    w05, w15, w25 = _weight(weights, 9), _weight(weights, 10), _weight(weights, 11)
    w35, w45 = _weight(weights, 12), _weight(weights, 13)
    x0 += first * x0_image + (b * x0_image + p)
    x1 += first * x1_image + (b * x1_image + p)
    grad += first * g_image + (b * g_image + p)
    g0 += first * (C * HW) + (b * (C * HW) + p)
    g1 += first * (C * HW) + (b * (C * HW) + p)
    none = tl.zeros([IMAGES, PIXELS], tl.float32)
    d2, d3, d4, d5, x2, x3, x4 = none, none, none, none, none, none, none
    u, v, u_1, v_1, u_2, v_2, u_3, v_3, x2_1, x2_2, x3_1 = (
        none, none, none, none, none, none, none, none, none, none, none,
    )  # fmt: skip
    s02, s12, s03, s13, s23, s04, s14 = none, none, none, none, none, none, none
    s24, s34, s05, s15, s25, s35, s45 = none, none, none, none, none, none, none
    for _ in tl.static_range(WARM):
        c = _behind(c, C, K)
    for step in tl.range(0, steps + WARM, num_stages=1):
        at = grad + c * HW
        if K == 1:
            d5 = tl.load(at + 3 * C * HW, there, 0.0).to(tl.float32)
            d4 = tl.load(at + 2 * C * HW, there, 0.0).to(tl.float32) + w45 * d5
            d3 = tl.load(at + C * HW, there, 0.0).to(tl.float32) + w34 * d4 + w35 * d5
            d2 = tl.load(at, there, 0.0).to(tl.float32) + w23 * d3 + w24 * d4 + w25 * d5
            if NEEDS_WEIGHTS:
                u = tl.load(x0 + c * x0_channel, there, 0.0).to(tl.float32)
                v = tl.load(x1 + c * x1_channel, there, 0.0).to(tl.float32)
                x2 = w02 * u + w12 * v
                x3 = w03 * u + w13 * v + w23 * x2
                x4 = w04 * u + w14 * v + w24 * x2 + w34 * x3
        elif NEEDS_WEIGHTS:
            u, u_1, u_2, v, v_1, v_2, x2, x2_1, x3 = u_1, u_2, u_3, v_1, v_2, v_3, x2_1, x2_2, x3_1
            far = _before(_before(_before(c, C, K), C, K), C, K)
            u_3 = tl.load(x0 + far * x0_channel, there, 0.0).to(tl.float32)
            v_3 = tl.load(x1 + far * x1_channel, there, 0.0).to(tl.float32)
            x2_2 = w02 * u_3 + w12 * v_3
            x3_1 = w03 * u_2 + w13 * v_2 + w23 * x2_2
            x4 = w04 * u_1 + w14 * v_1 + w24 * x2_1 + w34 * x3_1
        if step >= WARM:
            if NEEDS_0:
                g = w02 * d2 + w03 * d3 + w04 * d4 + w05 * d5
                tl.store(g0 + c * HW, g.to(g0.dtype.element_ty), there)
            if NEEDS_1:
                g = w12 * d2 + w13 * d3 + w14 * d4 + w15 * d5
                tl.store(g1 + c * HW, g.to(g1.dtype.element_ty), there)
            if NEEDS_WEIGHTS:
                s02, s12 = s02 + d2 * u, s12 + d2 * v
                s03, s13, s23 = s03 + d3 * u, s13 + d3 * v, s23 + d3 * x2
                s04, s14, s24, s34 = s04 + d4 * u, s14 + d4 * v, s24 + d4 * x2, s34 + d4 * x3
                s05, s15, s25 = s05 + d5 * u, s15 + d5 * v, s25 + d5 * x2
                s35, s45 = s35 + d5 * x3, s45 + d5 * x4
        if K != 1:
            e3, e4, e5 = d3, d4, d5
            d2 = tl.load(at, there, 0.0).to(tl.float32) + w23 * e3 + w24 * e4 + w25 * e5
            d3 = tl.load(at + C * HW, there, 0.0).to(tl.float32) + w34 * e4 + w35 * e5
            d4 = tl.load(at + 2 * C * HW, there, 0.0).to(tl.float32) + w45 * e5
            d5 = tl.load(at + 3 * C * HW, there, 0.0).to(tl.float32)
            c = _before(c, C, K)
    if NEEDS_WEIGHTS:
        parts += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 14
        sums = (s02, s12, s03, s13, s23, s04, s14, s24, s34, s05, s15, s25, s35, s45)
        for i in tl.static_range(14):
            tl.store(parts + i, tl.sum(sums[i]))


@cache
def cycles_of(C: int, k: int, device: torch.device) -> Tensor:
    """(n, 2): the first channel and the length of every cycle of the shuffle."""
    left, found = set(range(C)), []
    while left:
        first = c = min(left)
        n = len(left)
        while c in left:
            left.remove(c)
            c = c % (C // k) * k + c // (C // k)
        found.append((first, n - len(left)))
    return torch.tensor(found, dtype=torch.int32, device=device)


def _block(kernel: str, HW: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, int], int]:
    """The images and pixels of a program, and its warps."""
    block = _tuning.block(kernel, _tuning.plane_class(HW, dtype), device)
    return _tuning.planes_in(HW, block["SIZE"]), block["num_warps"]


def _grid(x: Tensor, k: int, kernel: str) -> tuple[Tensor, tuple[int, int], dict[str, int], int]:
    B, C, H, W = x.shape
    cycles, (block, warps) = cycles_of(C, k, x.device), _block(kernel, H * W, x.dtype, x.device)
    blocks = triton.cdiv(B, block["IMAGES"]) * triton.cdiv(H * W, block["PIXELS"])
    return cycles, (blocks, len(cycles)), block, warps


def _sizes(x0: Tensor, x1: Tensor) -> tuple[int, ...]:
    B, C, H, W = x0.shape
    return B, C, H * W, x0.stride(0), x0.stride(1), x1.stride(0), x1.stride(1)


def skip_cell_fwd(x0: Tensor, x1: Tensor, weights: Tensor, k: int) -> Tensor:
    B, C, H, W = x0.shape
    out = x0.new_empty((B, 4 * C, H, W))
    if out.numel():
        x0, x1, weights = planes(x0), planes(x1), weights.contiguous()
        cycles, grid, block, warps = _grid(x0, k, "skip_cell_fwd")
        launch(
            "skip_cell_fwd", fwd, grid, [x0, x1, weights, out, cycles, *_sizes(x0, x1)], {"K": k, **block}, warps,
            moved(x0, x1, out),
        )  # fmt: skip
    return out


def skip_cell_bwd(
    grad: Tensor, x0: Tensor, x1: Tensor, weights: Tensor, k: int, needs: Sequence[bool], outs: Sequence[Tensor]
) -> None:
    """outs: where the gradients go, those that `needs` names."""
    if not x0.numel():
        outs[2].zero_()
        return
    grad, x0, x1, weights = planes(grad), planes(x0), planes(x1), weights.contiguous()
    if grad.stride(1) != grad.shape[2] * grad.shape[3]:
        grad = grad.contiguous()
    cycles, grid, block, warps = _grid(x0, k, "skip_cell_bwd")
    parts = x0.new_empty((grid[0] * grid[1], N_EDGES) if needs[2] else (0,), dtype=torch.float32)
    flags = dict(zip(("NEEDS_0", "NEEDS_1", "NEEDS_WEIGHTS"), needs, strict=True))
    launch(
        "skip_cell_bwd", bwd, grid,
        [grad, x0, x1, weights, *outs[:2], parts, cycles, *_sizes(x0, x1), grad.stride(0)],
        {"K": k, **flags, **block}, warps, moved(grad, x0, x1, *outs[:2], parts),
    )  # fmt: skip
    if needs[2]:
        sum_rows(parts, outs[2])


_INTEGERS = ("C", "HW", "x0_image", "x0_channel", "x1_image", "x1_channel", "g_image")


def aot_cases() -> Iterator[AotCase]:
    """Planes of the search with k of 1 and 4, whatever the channels are, which no constant names."""
    flags = {"NEEDS_0": True, "NEEDS_1": True, "NEEDS_WEIGHTS": True}
    for dtype, HWs, ks in ((torch.float32, (1024, 64), (1, 4)), (torch.bfloat16, (1024, 64), (4,)),
                           (torch.float16, (1024,), (1, 4))):  # fmt: skip
        short = short_name(dtype)
        types = dict.fromkeys(("x0", "x1", "weights", "out", "grad", "g0", "g1"), f"*{short}")
        types |= {"cycles": "*i32", "parts": "*fp32"}
        for direction, function, more in (("fwd", fwd, {}), ("bwd", bwd, flags)):
            for HW, k in product(HWs, ks):
                block, warps = _block(f"skip_cell_{direction}", HW, dtype, torch.device("cpu"))
                block |= more | {"K": k}
                yield case(f"{direction}-{short}-{HW}-k{k}", function, types, block, warps, _INTEGERS)
