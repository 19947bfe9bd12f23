"""Triton kernels at the ends of a weight step: the edges' softmax before it, and what moves the weights after it."""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, moved
from .aot import AotCase, case

_SIZE = 1024


@triton.jit
def edge_weights(normal, reduce, edges):
    """A row for each node of both cells, the softmax of its betas; edges: (2, 14)."""
    row, c = tl.arange(0, 8)[:, None], tl.arange(0, 8)[None, :]
    node = row % 4
    known, at = c < 2 + node, node * (node + 3) // 2 + c
    betas = tl.load(normal + at, known & (row < 4), 0.0).to(tl.float64)
    betas += tl.load(reduce + at, known & (row >= 4), 0.0).to(tl.float64)
    betas = tl.where(known, betas, -float("inf"))
    grown = tl.exp(betas - tl.max(betas, 1)[:, None])
    weights = grown / tl.sum(grown, 1)[:, None]
    tl.store(edges + row // 4 * 14 + at, weights.to(tl.float32), known)


@triton.jit
def update(
    flat, velocity, gradient, squares, rate, report, n, rows, limit, momentum, decay, CLIP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """v = momentum v + (clipped gradient + decay w), w -= rate v; report: the loss, which lies behind the n gradients,
    and their norm before it was clipped, from its `rows` squares."""
    acc = tl.zeros([SIZE], tl.float64)
    for first in tl.range(0, rows, SIZE, num_stages=1):
        r = first + tl.arange(0, SIZE)
        acc += tl.load(squares + r, r < rows, 0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(acc, 0))
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    g = tl.load(gradient + i, i < n, 0.0).to(tl.float32)
    if CLIP:
        scale = limit / (norm + 1e-6)
        g *= tl.where(scale > 1, 1.0, scale).to(tl.float32)
    w = tl.load(flat + i, i < n, 0.0).to(tl.float32)
    v = momentum * tl.load(velocity + i, i < n, 0.0).to(tl.float32) + (g + decay * w)
    tl.store(velocity + i, v, i < n)
    tl.store(flat + i, w - tl.load(rate).to(tl.float32) * v, i < n)
    if tl.program_id(0) == 0:
        tl.store(report, tl.load(gradient + n).to(tl.float32))
        tl.store(report + 1, norm.to(tl.float32))


def edges_of(normal: Tensor, reduce: Tensor) -> Tensor:
    """(2, 14) float32: the softmaxed betas of the normal and the reduction cells."""
    edges = normal.new_empty(2, 14, dtype=torch.float32)
    launch("edge_weights", edge_weights, (1,), [normal, reduce, edges], {}, 1, moved(normal, reduce, edges))
    return edges


def move(
    flat: Tensor, velocity: Tensor, gradient: Tensor, squares: Tensor, rate: Tensor, limit: float | None,
    momentum: float, decay: float,
) -> Tensor:  # fmt: skip
    """One step of SGD as `update` has it; limit None: not clipped. Returns the report (2,)."""
    report, n = flat.new_empty(2), len(flat)
    launch(
        "update_weights", update, (triton.cdiv(n, _SIZE),),
        [flat, velocity, gradient, squares, rate, report, n, len(squares), limit or 0.0, momentum, decay],
        {"CLIP": limit is not None, "SIZE": _SIZE}, 4, 2 * moved(flat, velocity) + moved(gradient, squares),
    )  # fmt: skip
    return report


def aot_cases() -> Iterator[AotCase]:
    """Both kernels."""
    types = dict.fromkeys(("edges", "flat", "velocity", "gradient", "rate", "report"), "*fp32")
    types |= dict.fromkeys(("normal", "reduce", "squares"), "*fp64")
    types |= dict.fromkeys(("limit", "momentum", "decay"), "fp32")
    for kernel, constants, warps in ((edge_weights, {}, 1), (update, {"CLIP": True, "SIZE": _SIZE}, 4)):
        yield case(kernel.__name__, kernel, types, constants, warps)
