"""The launches of a mixed node on a GPU: kernels whose programs take different parts, by tables of the plan.

Barriers are the batch norms' sums: behind an operator, and within a separable convolution. Between two of them there is
one launch, but for a block's backward pass: what lies behind its depthwise convolution is written by one launch and
read with a halo by the next.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._launch import launch, moved, power_of_two
from ._native import NodeCall
from ._node_plan import Plan, plan_of
from ._sums_triton import sum_rows
from .aot import AotCase, case
from .partial_mix_triton import finish_fwd, finish_inner, finish_mix, mix_bwd, mix_fwd
from .pools_triton import pools_fwd, through_pool
from .sep_conv_triton import (
    block_bwd_depthwise,
    block_bwd_pointwise,
    block_fwd,
    chosen,
    normal,
    number,
    offset,
    pixels,
    relu,
    through_depthwise,
)

ROWS, COLUMNS, SHARES = 32, 16, 64


@triton.jit
def operators_fwd(
    xs, raw, taps, weights, coefs, parts, jobs, blocks, pools, T, P, Q, Wo,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A job: (0, block, first output channel) or (1, pools, first channel)."""
    job = jobs + tl.program_id(1) * 4
    row, first = number(job + 1), number(job + 2)
    if number(job) == 0:
        block_fwd(xs, raw, weights, coefs, parts, blocks + row * 24, first, T, P, Q, Wo, BN, BC, BP)
    else:
        pools_fwd(xs, raw, taps, parts, pools + row * 16, first, T, P, Q, Wo, BC, BP)


@triton.jit
def blocks_bwd(
    xs, g, g_image, g_channel, raw, weights, coefs, grads, work, parts, jobs, blocks, n_shares, n_weights, T, P, Q, Wo,
    INNER: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A job: (0, block, first channel): behind the depthwise convolution; (1, block, first channel, first output
    channel): of the pointwise weights."""
    job = jobs + tl.program_id(1) * 4
    block, c0 = blocks + number(job + 1) * 24, number(job + 2)
    if number(job) == 0:
        block_bwd_depthwise(g, g_image, g_channel, raw, weights, coefs, grads, work, block, c0, T, P, Q, Wo,
                            INNER, BN, BC, BP)  # fmt: skip
    elif tl.program_id(0) < n_shares:
        block_bwd_pointwise(xs, g, g_image, g_channel, raw, weights, coefs, grads, parts, block, number(job + 3), c0,
                            n_shares, n_weights, T, P, Q, Wo, INNER, BN, BC, BP)  # fmt: skip


@triton.jit
def gather(
    xs, gxs, g, g_image, g_channel, raw, taps, weights, coefs, grads, work, edge_weights, operator_weights, parts_w,
    parts, jobs, targets, blocks, contributions, pools, n_columns, needs, n_operators, B, T, T_inner, Q, Ho, Wo,
    INNER: tl.constexpr, WEIGHTS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A job: (target, first channel): all that its operators send back to these channels of a state, or of what lies
    within a separable convolution, there with the two sums for its batch norm."""
    tile = tl.program_id(0)
    target, c0 = targets + number(jobs + tl.program_id(1) * 4) * 16, number(jobs + tl.program_id(1) * 4 + 1)
    edge, H, W, C = number(target), number(target + 1), number(target + 2), number(target + 6)
    b, p, row, column, there = pixels(tile, B * H * W, H * W, W, BP)
    c = c0 + tl.arange(0, BC)
    inside = (c < C)[:, None] & there[None, :]
    x = chosen(xs, edge)
    if INNER:
        x = raw
    at = (b * offset(target + 4) + p)[None, :] + c[:, None] * number(target + 5)
    x = tl.load(x + offset(target + 3) + at, inside, 0.0).to(tl.float32)
    first = number(target + 7)
    center, scale, bias = normal(coefs, T, first, c, c < C)
    v = (x - center) * scale + bias
    activation = tl.where(inside, relu(v), 0.0)
    total = tl.zeros([BC, BP], tl.float32)
    for i in tl.range(number(target + 8), number(target + 9), num_stages=1):
        block = blocks + number(contributions + i) * 24
        total += through_depthwise(work, weights, parts_w + tile.to(tl.int64) * n_columns, block, c, C, b, row, column,
                                   there, activation, Q, Ho, Wo, WEIGHTS)  # fmt: skip
    total = tl.where(inside & (v > 0), total, 0.0)
    if INNER:
        to = work + offset(target + 12) + (b * (C * Q) + p)[None, :] + c[:, None] * Q
        tl.store(to, total, inside)
        parts += tile.to(tl.int64) * 2 * T_inner + first + c
        tl.store(parts, tl.sum(total, 1), c < C)
        tl.store(parts + T_inner, tl.sum(tl.where(inside, total * (x - center), 0.0), 1), c < C)
    else:
        pool, skip = number(target + 10), number(target + 11)
        if pool >= 0:
            for mean in tl.static_range(2):
                total += through_pool(g, g_image, g_channel, raw, taps, grads, coefs, T, pools + pool * 16, c, C, b,
                                      row, column, there, Q, Ho, Wo, mean)  # fmt: skip
        if skip >= 0:
            w = tl.load(edge_weights + edge).to(tl.float32)
            w *= tl.load(operator_weights + edge * n_operators + skip).to(tl.float32)
            at = (b * g_image + p)[None, :] + c[:, None] * g_channel
            total += w * tl.load(g + at, inside, 0.0).to(tl.float32)
        to = chosen(gxs, edge) + (b * offset(target + 13) + p)[None, :] + c[:, None] * (H * W)
        tl.store(to, total.to(gxs[0].dtype.element_ty), inside & (c + ((needs >> edge) & 1) > c)[:, None])


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else like.new_empty(0)


class _Pass:
    """What both passes of one call share."""

    def __init__(self, call: NodeCall) -> None:
        self.call, self.plan, self.x = call, plan_of(call), call.inputs[0]
        self.T, self.P, self.Q, (self.Ho, self.Wo) = self.plan.T, self.plan.P, self.plan.Q, self.plan.size
        self.xs = tuple(call.inputs)
        self.weights = _flat(call.weights, self.x)
        self.affine = self.x.new_empty(0, dtype=torch.float32)
        if call.affine:
            order = self.plan.order
            ordered = [call.affine[2 * i + j] for j in range(2) for i in order]
            self.affine = torch.cat(ordered).float()
        self.tables: dict[str, Tensor] = self.plan.tables(self.x.device)
        self.block = dict(self.plan.block)
        self.warps = self.block.pop("num_warps")
        self.half = {name: self.block[name] for name in ("BC", "BP")}
        self.tiles = triton.cdiv(self.P, self.block["BP"])

    def empty(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty(n, dtype=dtype)

    def table(self, rows: int, columns: int, wanted: bool) -> Tensor:
        """Room for partial sums, where they are wanted."""
        return self.x.new_empty((rows if wanted else 0, columns), dtype=torch.float32)

    def jobs(self, name: str) -> tuple[Tensor, int]:
        table = self.tables[name]
        return table, table.shape[0] // 4


def node_fwd(call: NodeCall) -> tuple[Tensor, ...]:
    """The node, and what its backward pass needs: raw results, the maxima's places, statistics, coefficients."""
    p = _Pass(call)
    plan = p.plan
    node, raw = p.x.new_empty(call.shape), p.x.new_empty(plan.raw)
    taps, stats, coefs = p.empty(plan.taps, torch.int8), p.empty(2 * p.T, torch.float64), p.empty(3 * p.T)
    parts = p.empty(p.tiles * 2 * p.T)
    for name, first, last in (("first", 0, plan.T_first), ("second", plan.T_first, p.T)):
        jobs, n = p.jobs(name)
        if n:
            launch(
                "node_operators_fwd", operators_fwd, (p.tiles, n),
                [p.xs, raw, taps, p.weights, coefs, parts, jobs, p.tables["blocks"], p.tables["pools"], p.T, p.P, p.Q,
                 p.Wo],
                p.block, p.warps, moved(*p.xs, p.weights, raw, taps, parts),
            )  # fmt: skip
            launch(
                "node_finish_fwd", finish_fwd, (triton.cdiv(last - first, COLUMNS),),
                [parts, p.affine, stats, coefs, first, last, p.tiles, p.T, p.P],
                {"BP": p.block["BP"], "AFFINE": bool(call.affine), "ROWS": ROWS, "COLUMNS": COLUMNS}, 4,
                moved(parts, p.affine, stats, coefs),
            )  # fmt: skip
    N = call.channels_out
    launch(
        "node_mix_fwd", mix_fwd, (p.tiles, call.k * triton.cdiv(N, p.half["BC"])),
        [p.xs, raw, coefs, call.edge_weights, call.operator_weights, node, p.tables["sources"], p.tables["edges"],
         plan.n_sources, len(p.xs), len(call.operators), N, p.T, p.P, p.Q, p.Wo],
        {"K": call.k, **p.half}, p.warps, moved(*p.xs, raw, node),
    )  # fmt: skip
    return node, raw, taps, stats, coefs


def node_bwd(
    call: NodeCall, g: Tensor, raw: Tensor, taps: Tensor, stats: Tensor, coefs: Tensor, needs: Sequence[bool],
    needs_weights: bool,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of inputs (empty where not needed), edge weights, operator weights, weights, affine."""
    p = _Pass(call)
    plan, N, E = p.plan, call.channels_out, len(call.inputs)
    gxs = tuple(p.x.new_empty(x.shape if need else (0,)) for x, need in zip(call.inputs, needs, strict=True))
    bits = sum(1 << i for i, need in enumerate(needs) if need)
    d_edges, d_operators = torch.empty_like(call.edge_weights), torch.empty_like(call.operator_weights)
    grads, d_affine = p.empty(3 * p.T), p.empty(2 * p.T if call.affine else 0)
    work = p.empty(plan.work)

    jobs = triton.cdiv(N, p.half["BC"])
    bypassing = (call.k - 1) * jobs
    columns = (plan.n_sources + 1) * N + E * bypassing
    parts, sums = p.empty(p.tiles * columns).view(p.tiles, columns), p.empty(columns, torch.float64)
    launch(
        "node_mix_bwd", mix_bwd, (p.tiles, call.k * jobs),
        [p.xs, gxs, g, g.stride(0), g.stride(1), raw, coefs, call.edge_weights, parts, p.tables["sources"],
         p.tables["edges"], plan.n_sources, E, columns, bits, N, p.T, p.P, p.Q, p.Wo],
        p.half, p.warps, moved(*p.xs, g, raw, parts),
    )  # fmt: skip
    sum_rows(parts, sums)
    launch(
        "node_finish_mix", finish_mix, (E,),
        [sums, call.edge_weights, call.operator_weights, d_edges, d_operators, stats, coefs, p.affine, grads, d_affine,
         p.tables["sources"], p.tables["edges"], plan.n_sources, len(call.operators), bypassing, N, p.T, p.P],
        {"AFFINE": bool(call.affine), "OPERATORS": power_of_two(len(call.operators)), "COLUMNS": COLUMNS}, 4,
        moved(sums, stats, coefs, grads, d_affine),
    )  # fmt: skip

    shares = min(SHARES, p.tiles)
    shared = p.table(shares, plan.n_pointwise, needs_weights)
    found = {}
    for name, inner in (("outer", False), ("inner", True)):
        jobs_table, n = p.jobs(f"{name}_weights" if needs_weights else name)
        if n and (any(needs) or needs_weights):
            # what lies behind an inner batch norm arrives in `work`, all else at the node
            launch(
                "node_blocks_bwd", blocks_bwd, (p.tiles, n),
                [p.xs, work if inner else g, g.stride(0), call.k * g.stride(1), raw, p.weights, coefs, grads, work,
                 shared, jobs_table, p.tables["blocks"], shares, plan.n_pointwise, p.T, p.P, p.Q, p.Wo],
                {"INNER": inner, **p.block}, p.warps, moved(*p.xs, g, raw, p.weights, work, shared),
            )  # fmt: skip
        targets, n = p.jobs("to_inner" if not inner else "to_states")
        if not n or not (any(needs) or needs_weights):
            continue
        columns = plan.n_depthwise[0 if not inner else 1]
        tiles = triton.cdiv(max(plan.gathered[0 if not inner else 1]), p.half["BP"])
        taken = p.table(tiles, columns, needs_weights)
        own = p.table(tiles, 2 * plan.T_inner, not inner)
        launch(
            "node_gather_bwd", gather, (tiles, n),
            [p.xs, gxs, g, g.stride(0), call.k * g.stride(1), raw, taps, p.weights, coefs, grads, work,
             call.edge_weights, call.operator_weights, taken, own, targets, p.tables["targets"], p.tables["blocks"],
             p.tables["contributions"], p.tables["pools"], columns, bits, len(call.operators), p.x.shape[0], p.T,
             plan.T_inner, p.Q, p.Ho, p.Wo],
            {"INNER": not inner, "WEIGHTS": needs_weights and columns > 0, **p.half}, p.warps,
            moved(*p.xs, *gxs, g, raw, taps, work, taken, own),
        )  # fmt: skip
        if needs_weights and columns:
            found[inner] = p.x.new_empty(columns)
            sum_rows(taken, found[inner])
        if not inner:
            both = p.empty(2 * plan.T_inner, torch.float64)
            sum_rows(own, both)
            launch(
                "node_finish_inner", finish_inner, (p.tables["ranges"].shape[0] // 2,),
                [both, stats, coefs, p.affine, grads, d_affine, p.tables["ranges"], p.T, plan.T_inner, p.P],
                {"AFFINE": bool(call.affine), "COLUMNS": COLUMNS}, 4, moved(both, stats, coefs, grads),
            )  # fmt: skip
    d_weights = [p.x.new_empty(0) for _ in call.weights]
    if needs_weights and call.weights:
        total = p.x.new_empty(plan.n_pointwise)
        sum_rows(shared, total)
        for i, (kind, at) in enumerate(plan.weight_places):
            source = total if kind == "pointwise" else found[kind == "first"]
            d_weights[i] = source[at : at + call.weights[i].numel()].view(call.weights[i].shape)
    return list(gxs), d_edges, d_operators, d_weights, _affine_gradients(call, plan, d_affine)


def _affine_gradients(call: NodeCall, plan: Plan, d_affine: Tensor) -> list[Tensor]:
    found = []
    for i, a in enumerate(call.affine):
        at = plan.firsts[i // 2] + (plan.T if i % 2 else 0)
        found.append(d_affine[at : at + a.numel()].to(a.dtype))
    return found


def aot_cases() -> Iterator[AotCase]:
    """Nodes of two edges, narrow ones as the search has them and wide ones as the networks that it finds."""
    f32 = "*fp32"
    for width, dtype in (("narrow", "fp32"), ("wide", "fp32"), ("narrow", "bf16"), ("narrow", "fp16")):
        kind = f"*{dtype}"
        block = _tuning.block("node", width, torch.device("cpu"))
        warps, half = block.pop("num_warps"), {name: block[name] for name in ("BC", "BP")}
        types: dict[str, Any] = dict.fromkeys(("raw", "weights", "edge_weights", "operator_weights"), kind)
        types |= {"xs": (kind, kind), "gxs": (kind, kind), "taps": "*i8"}
        types |= dict.fromkeys(("coefs", "parts", "parts_w", "grads", "work"), f32)
        types |= dict.fromkeys(("jobs", "blocks", "pools", "targets", "contributions"), "*i64")
        for function, more in ((operators_fwd, block), (blocks_bwd, block), (gather, half | {"WEIGHTS": True})):
            # what runs within separable convolutions differs by little: once is enough
            both = (False, True) if (width, dtype) == ("narrow", "fp32") else (False,)
            for inner in (None,) if function is operators_fwd else both:
                constants = more | ({} if inner is None else {"INNER": inner})
                g = f32 if inner and function is blocks_bwd else kind  # within a separable convolution it is in `work`
                name = f"{function.__name__}{'-inner' if inner else ''}-{width}-{dtype}"
                yield case(name, function, types | {"g": g}, constants, warps, ("P", "Q"))
