"""The skip-only super-network on a GPU: the chain of stages of `skip_net`, NCHW, between images and the mean over them.

Stages are Triton kernels (`stem_step`, `cell_step`, `reduce_step`); a normal cell's may come from another backend with
the same functions. A tensor is a raw product: the rows of all its readers, each of which normalises its own channels on
load and writes its own channels of the gradient. Kept for backward: raw tensors and their statistics.
"""

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cell_step_triton, finish_triton, reduce_step_triton, stem_step_triton
from ._backend import first_derivatives_only
from ._last_cell_triton import Head
from ._net_plan import Cell, Plan, Rows, plan
from .cell_step import Behind, Outputs, Product, Raw
from .finish_triton import Norm, Slice, finish, finish_backward
from .reduce_step import Paths
from .skip_net import NetSpec
from .stem_step import Stem


class Kept(NamedTuple):
    """What forward leaves for backward. tensors: z and its statistics; paths: by cell f, its statistics, pooled."""

    stem: Stem
    norm: Norm
    tensors: list[tuple[Tensor, Norm]]
    paths: dict[int, tuple[Tensor, Norm, Tensor]]

    def source(self, cell: Cell, i: int) -> Raw:
        tensor, first = cell.sources[i]
        z, norm = self.tensors[tensor]
        scale, shift = norm.rows.narrow(1, first, cell.channels).unbind(0)
        return Raw(z.narrow(1, first, cell.channels), scale, shift)


def _pixels(z: Tensor) -> int:
    """Of a channel, in the whole batch."""
    return z.numel() // z.shape[1]


def _paths(kept: Kept, i: int) -> Paths:
    f, norm, pooled = kept.paths[i]
    return Paths(Raw(f, *norm.rows.unbind(0)), pooled)


def forward(
    p: Plan, images: Tensor, edges: Sequence[Tensor], flat: Tensor, gamma: Tensor, beta: Tensor, k: int, backend: str,
    head: Head | None = None,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """The last cell's mean over the image (B, 4C), and what backward needs. flat: the weights in `Plan.order`. head:
    the classifier and its gradients, instead of the mean."""
    step = importlib.import_module(f"{__package__}.cell_step_{backend}")
    stem = stem_step_triton.convolution(images, p.stem.within(flat))
    norm, _ = finish(stem, affine=(gamma, beta))
    kept = Kept(Stem(stem.z, *norm.rows.unbind(0)), norm, [], {})
    product = stem_step_triton.products(kept.stem, p.tensors[0].within(flat))
    kept.tensors.append((product.z, finish(product)[0]))
    pooled = images.new_empty(0)
    for i, cell in enumerate(p.cells):
        x0, x1 = kept.source(cell, 0), kept.source(cell, 1)
        w, w_strided = (None if t is None else p.tensors[t].within(flat) for t in (cell.product, cell.strided))
        if cell.paths is None:
            behind = {"head": head} if w is None and head is not None else {}
            normal: Any = cell_step_triton if behind else step  # the head is Triton's
            found: Outputs = normal.forward(x0, x1, edges[0], k, w, w_strided, **behind)
        else:
            q = cell.channels // k
            f, bypass = reduce_step_triton.paths(x0, x1, cell.paths.within(flat).view(4, 2, 2, q // 2, q), q)
            kept.paths[i] = (f.z, finish(f)[0], bypass)
            found = cell_step_triton.nodes_forward(
                _paths(kept, i), edges[1], k, w, w_strided, head if w is None else None
            )
        if found.z is None:
            assert found.pooled is not None
            pooled = found.pooled
        else:
            kept.tensors.extend(_finished(found.z, found.strided))
    return pooled, kept


def _finished(z: Product, strided: Product | None) -> list[tuple[Tensor, Norm]]:
    first, second = finish(z, strided)
    return [(z.z, first)] + ([(strided.z, second)] if strided is not None and second is not None else [])


class Partial:
    """Room for the parts of every weight gradient, in the order of the flat weights, and their sum.

    more: what follows the flat weights, as (parts, numbers) of each.
    """

    def __init__(self, p: Plan, images: Tensor, pixels: Sequence[int], more: Sequence[tuple[int, int]]) -> None:
        parts = {p.stem.at: cell_step_triton.weight_parts(_pixels(images), p.stem.height)}
        for rows, n in zip(p.tensors, pixels, strict=True):
            parts[rows.at] = cell_step_triton.weight_parts(n, rows.height)
        paths = [cell.paths for cell in p.cells if cell.paths is not None]
        for cell in p.cells:
            if cell.paths is not None:
                parts[cell.paths.at] = cell_step_triton.weight_parts(pixels[cell.sources[0][0]] // 4, 64)
            if cell.strided is not None and cell.product is not None:
                parts[p.tensors[cell.strided].at] = parts[p.tensors[cell.product].at]
        sizes = [(parts[r.at], r.height * r.columns) for r in sorted((p.stem, *p.tensors, *paths), key=lambda r: r.at)]
        self.sizes = (*sizes, *more)
        starts = [0]
        for n, length in self.sizes:
            starts.append(starts[-1] + n * length)
        self.memory = images.new_empty(starts[-1])
        self.starts = dict(zip(sorted(parts), zip(starts, (n for n, _ in sizes), strict=False), strict=True))
        self.more = [
            self.memory.narrow(0, at, n * length).view(n, length)
            for at, (n, length) in zip(starts[len(sizes) :], more, strict=False)
        ]
        self.table = _table(self.sizes, images.device)

    def of(self, rows: Rows) -> Tensor:
        at, parts = self.starts[rows.at]
        memory = self.memory.narrow(0, at, parts * rows.height * rows.columns)
        return memory.view(parts, rows.height, rows.columns)

    def total(self) -> tuple[Tensor, Tensor]:
        """All sums, one after the other, and the squares of them, to be added up."""
        out = self.memory.new_empty(sum(length for _, length in self.sizes))
        return out, finish_triton.add_parts(self.memory, self.table, out)


@lru_cache(maxsize=16)
def _table(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return finish_triton.add_up_table(sizes, device)


class Backward:
    """One backward pass: the gradients of the tensors as their readers write them."""

    def __init__(
        self, p: Plan, kept: Kept, images: Tensor, edges: Sequence[Tensor], flat: Tensor, k: int, backend: str,
        arch: bool, partial: Partial | None,
    ) -> None:  # fmt: skip
        self.p, self.kept, self.images, self.edges, self.flat, self.k = p, kept, images, edges, flat, k
        self.step: Any = importlib.import_module(f"{__package__}.cell_step_{backend}")
        self.partial = partial
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}
        self.totals = flat.new_zeros(2, 14, dtype=torch.float64) if arch else None

    def cells(self, d_pooled: Tensor) -> None:
        """All of them, last first."""
        for i in reversed(range(len(self.p.cells))):
            self.cell(i, d_pooled)

    def gradient(self, tensor: int) -> tuple[Tensor, Tensor]:
        """Room for a tensor's gradient, and for its coefficients (3, N)."""
        if tensor not in self.gradients:
            z = self.kept.tensors[tensor][0]
            self.gradients[tensor] = torch.empty_like(z), self.flat.new_empty(3, z.shape[1])
        return self.gradients[tensor]

    def into(self, cell: Cell, i: int) -> tuple[Tensor, Slice] | tuple[None, None]:
        """Where an input's gradient goes; nowhere without weights where only the stem would read it."""
        tensor, first = cell.sources[i]
        if not tensor and self.partial is None:
            return None, None
        (g, coefficients), norm = self.gradient(tensor), self.kept.tensors[tensor][1]
        mean, scale, rows = (
            t.narrow(-1, first, cell.channels) for t in (norm.mean, norm.rows.select(0, 0), coefficients)
        )
        return g.narrow(1, first, cell.channels), Slice(mean, scale, rows, _pixels(g))

    def behind(self, tensor: int | None) -> Behind | None:
        if tensor is None:
            return None
        (g, coefficients), (z, _) = self.gradients.pop(tensor), self.kept.tensors[tensor]
        return Behind(g, z, *coefficients.unbind(0))

    def cell(self, i: int, d_pooled: Tensor) -> None:
        cell, partial = self.p.cells[i], self.partial
        rows = [None if t is None else self.p.tensors[t] for t in (cell.product, cell.strided)]
        w, w_strided = (None if r is None else r.within(self.flat) for r in rows)
        dw, dw_strided = (None if r is None or partial is None else partial.of(r) for r in rows)
        d, d_strided = self.behind(cell.product), self.behind(cell.strided)
        d_mean = d_pooled if w is None else None
        x0, x1 = self.kept.source(cell, 0), self.kept.source(cell, 1)
        (g0, slice0), (g1, slice1) = self.into(cell, 0), self.into(cell, 1)
        edges = self.edges[cell.reduction]
        total = None if self.totals is None else self.totals.select(0, int(cell.reduction))
        if cell.paths is None:
            found = self.step.backward(
                x0, x1, edges, self.k, w, w_strided, d, d_strided, d_mean, g0, g1, dw, dw_strided
            )
            finish_backward(found.sums, (slice0, slice1), found.dots if total is not None else None, total)
            return
        paths, norm = _paths(self.kept, i), self.kept.paths[i][1]
        g_f, g_pooled = torch.empty_like(paths.f.z), torch.empty_like(paths.pooled)
        found = cell_step_triton.nodes_backward(
            paths, edges, self.k, w, w_strided, d, d_strided, d_mean, g_f, g_pooled, dw, dw_strided
        )
        coefficients = self.flat.new_empty(3, g_f.shape[1])
        own = Slice(norm.mean, norm.rows.select(0, 0), coefficients, _pixels(g_f))
        finish_backward(found.sums, (own,), found.dots if total is not None else None, total)
        if g0 is None and g1 is None:
            return
        q = cell.channels // self.k
        d_f = Behind(g_f, paths.f.z, *coefficients.unbind(0))
        sums = reduce_step_triton.paths_backward(
            x0, x1, cell.paths.within(self.flat), q, d_f, coefficients, g_pooled, g0, g1,
            None if partial is None else partial.of(cell.paths),
        )  # fmt: skip
        finish_backward(sums, (slice0, slice1))

    def stem(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The totals of the partial gradients, of which gamma's and beta's are the first behind the flat weights."""
        assert self.partial is not None
        kept, rows = self.kept, self.p.tensors[0]
        (g, coefficients), (z, _) = self.gradients.pop(0), kept.tensors[0]
        g_stem = torch.empty_like(kept.stem.z)
        d = Behind(g, z, *coefficients.unbind(0))
        dw = self.partial.of(rows)
        sums = stem_step_triton.products_backward(kept.stem, rows.within(self.flat), d, coefficients, g_stem, dw)
        coefficients = finish_triton.finish_affine_backward(
            sums, kept.norm, gamma, _pixels(g_stem), *self.partial.more[:2]
        )
        d = Behind(g_stem, kept.stem.z, *coefficients.unbind(0))
        stem_step_triton.convolution_backward(self.images, d, coefficients, self.partial.of(self.p.stem))
        return self.partial.total()


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, normal: Tensor, reduce: Tensor, spec: NetSpec, backend: str, *weights: Tensor
    ) -> Tensor:
        p = plan(images.shape[1], spec)
        flat = torch.cat([weights[i].reshape(-1) for i in p.order])
        images, edges = images.contiguous(), (normal.contiguous(), reduce.contiguous())
        pooled, kept = forward(p, images, edges, flat, weights[1], weights[2], spec.k, backend)
        ctx.save_for_backward(images, *edges, weights[1])
        ctx.rest = p, kept, flat, spec.k, backend, [w.shape for w in weights]
        ctx.needs = any(ctx.needs_input_grad[1:3]), any(ctx.needs_input_grad[5:])
        return pooled

    @staticmethod
    def backward(ctx: Any, d_pooled: Tensor) -> tuple[Tensor | None, ...]:
        normal, reduce, *weights = _ChainBackward.apply(ctx.rest, ctx.needs, d_pooled, *ctx.saved_tensors)
        return None, normal, reduce, None, None, *weights


class _ChainBackward(torch.autograd.Function):
    """The backward pass as an operation of its own, so that a second derivative meets a sentence."""

    @staticmethod
    def forward(
        ctx: Any, rest: tuple[Any, ...], needs: tuple[bool, bool], d_pooled: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        p, kept, flat, k, backend, shapes = rest
        ctx.backend = backend
        images, *edges, gamma = tensors
        more = [(1, len(gamma))] * 2
        partial = Partial(p, images, [_pixels(z) for z, _ in kept.tensors], more) if needs[1] else None
        run = Backward(p, kept, images, edges, flat, k, backend, needs[0], partial)
        run.cells(d_pooled.contiguous())
        found: list[Tensor | None] = [None] * len(shapes)
        if needs[1]:
            order = (*p.order, 1, 2)
            pieces = run.stem(gamma)[0].split([shapes[i].numel() for i in order])
            for i, piece in zip(order, pieces, strict=True):
                found[i] = piece.view(shapes[i])
        normal, reduce = (None, None) if run.totals is None else run.totals.float().unbind(0)
        return normal, reduce, *found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        first_derivatives_only("skip_net", ctx.backend)(ctx, *grads)


def pooled(
    images: Tensor, normal: Tensor, reduce: Tensor, weights: Sequence[Tensor], spec: NetSpec, backend: str
) -> Tensor:
    """Of the last cell the mean over the image (B, 4C), differentiable once by edges and weights. weights: those of
    `skip_net` without the classifier's; backend: who computes a normal cell, "triton" or "cuda"."""
    return _Chain.apply(images, normal, reduce, spec, backend, *weights)
