"""A cell's nodes and what reads them (`cell_step`) on Triton kernels: the launchers.

They serve the nodes of a reduction cell too (`reduce_step_triton`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._cell_triton import bwd, fwd
from ._last_cell_triton import LARGEST, Head, pool
from ._launch import interpreted, launch, moved, power_of_two
from .aot import AotCase, case
from .cell_step import Behind, Gradients, Outputs, Product, Raw
from .reduce_step import Paths


class _Inputs(NamedTuple):
    """What the nodes read: two raw tensors, or what a reduction cell's paths left. like: of the nodes' size."""

    raw: tuple[Raw, Raw] | None
    paths: Paths | None
    channels: int
    q: int
    like: Tensor

    def arguments(self, missing: Tensor) -> list[Tensor]:
        x0, x1 = self.raw or (Raw(missing, missing, missing),) * 2
        f, pooled = self.paths or (Raw(missing, missing, missing), missing)
        return [*x0, *x1, *f, pooled]

    def strides(self) -> tuple[int, int]:
        return (self.raw[0].z.stride(0), self.raw[1].z.stride(0)) if self.raw else (0, 0)

    def tensors(self) -> list[Tensor]:
        return [x.z for x in self.raw] if self.raw else [self.paths.f.z, self.paths.pooled] if self.paths else []


def _normal(x0: Raw, x1: Raw) -> _Inputs:
    return _Inputs((x0, x1), None, x0.z.shape[1], 0, x0.z)


def _reduced(paths: Paths) -> _Inputs:
    q = paths.f.z.shape[1] // 8
    return _Inputs(None, paths, q + paths.pooled.shape[1] // 2, q, paths.f.z)


class Tile(NamedTuple):
    """Pixels of a tile; of one that sums weight gradients, and the rows of weights that it does so for; warps."""

    pixels: int
    pixels_weights: int
    rows_weights: int
    warps: int


def tile(channels: int, backward: bool, strided: bool = False, half: bool = False) -> Tile:
    """As many pixels as leave nodes and products in registers on every GPU that `aot` compiles for, with a strided
    reader and in half precision too; the interpreter has no registers and slow programs."""
    if interpreted():
        return Tile(256, 256, 64, 4)
    many = channels >= 64 or (backward and (channels == 32 or (half and not strided)))
    return Tile(max(16, min(64, 1024 // channels)), 16, 16, 8 if many else 4)


def pooled_pixels(channels: int) -> int:
    """As many of the last cell, which writes none and so needs few registers; of 256 channels 32 would spill."""
    return max(32 if channels <= 128 else 16, tile(channels, False).pixels)


def weight_parts(pixels: int, rows: int) -> int:
    """How many parts the weight gradients are summed in: enough programs for a large GPU."""
    return 1 if interpreted() else max(1, min(pixels // 256, 256 // -(-rows // 16)))


def forward(
    x0: Raw, x1: Raw, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None = None, head: Head | None = None
) -> Outputs:
    """`cell_step.forward_reference`; head: behind the last cell, whose mean is then not written."""
    return _forward("cell", _normal(x0, x1), edges, k, w, w_strided, head)


def nodes_forward(
    paths: Paths, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None = None, head: Head | None = None
) -> Outputs:
    """`reduce_step.nodes_reference`; head as above."""
    return _forward("nodes", _reduced(paths), edges, k, w, w_strided, head)


def _forward(
    stage: str, inputs: _Inputs, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None, head: Head | None
) -> Outputs:
    B, _, H, W = inputs.like.shape
    C, HW = inputs.channels, H * W
    constants = {"C": C, "K": k, "Q": inputs.q}
    if w is None:
        own = tile(C, False)
        mean = edges.new_empty(0 if head else B, 4 * C)
        rest = [edges] * 7 if head is None else list(head)
        classes = 0 if head is None else len(head.bias)
        launch(
            f"{stage}_pool_fwd", pool, (B,),
            [*inputs.arguments(edges), edges, mean, *rest, W, HW, *inputs.strides(), classes],
            {**constants, "P": min(pooled_pixels(C), power_of_two(HW, 16)),
             "CLASSES": classes and power_of_two(classes, 2)},
            own.warps, moved(*inputs.tensors(), mean, *(head or ())),
        )  # fmt: skip
        return Outputs(None, None, mean)
    N, S = w.shape[0], 0 if w_strided is None else w_strided.shape[0] // 2
    own = tile(C, False)
    z = inputs.like.new_empty(B, N, H, W)
    z_strided = inputs.like.new_empty(B, 2 * S, H // 2, W // 2)
    n = _tiles(B, HW, own.pixels, bool(S))
    sums, sums_strided = edges.new_empty(n, 2, N), edges.new_empty(n // 4 if S else 0, 2, 2 * S)
    launch(
        f"{stage}_fwd", fwd, (n,),
        [*inputs.arguments(edges), edges, w, w if w_strided is None else w_strided, z, z_strided if S else z, sums,
         sums_strided if S else sums, B, W, HW, *inputs.strides(), N, S],
        {**constants, "ROWS": power_of_two(N, 16), "STRIDED_ROWS": power_of_two(S, 16) if S else 0, "P": own.pixels},
        own.warps, moved(*inputs.tensors(), z, z_strided, sums, sums_strided),
    )  # fmt: skip
    return Outputs(Product(z, sums), Product(z_strided, sums_strided) if S else None, None)


def _tiles(B: int, HW: int, pixels: int, strided: bool) -> int:
    return 4 * triton.cdiv(B * HW // 4, pixels) if strided else triton.cdiv(B * HW, pixels)


def backward(
    x0: Raw, x1: Raw, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None = None,
    d: Behind | None = None, d_strided: Behind | None = None, d_pooled: Tensor | None = None,
    g0: Tensor | None = None, g1: Tensor | None = None, dw: Tensor | None = None, dw_strided: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """`cell_step.backward_reference`; sums of a gradient that is not wanted are not written."""
    readers = _Readers(w, w_strided, d, d_strided, d_pooled, dw, dw_strided)
    return _backward("cell", _normal(x0, x1), edges, k, readers, (g0, g1), None)


def nodes_backward(
    paths: Paths, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None, d: Behind | None,
    d_strided: Behind | None, d_mean: Tensor | None, g_f: Tensor, g_pooled: Tensor, dw: Tensor | None = None,
    dw_strided: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """`reduce_step.nodes_backward_reference`."""
    readers = _Readers(w, w_strided, d, d_strided, d_mean, dw, dw_strided)
    return _backward("nodes", _reduced(paths), edges, k, readers, (None, None), (g_f, g_pooled))


class _Readers(NamedTuple):
    w: Tensor | None
    w_strided: Tensor | None
    d: Behind | None
    d_strided: Behind | None
    d_pooled: Tensor | None
    dw: Tensor | None
    dw_strided: Tensor | None


def _backward(
    stage: str, inputs: _Inputs, edges: Tensor, k: int, r: _Readers, g: tuple[Tensor | None, Tensor | None],
    g_paths: tuple[Tensor, Tensor] | None,
) -> Gradients:  # fmt: skip
    B, _, H, W = inputs.like.shape
    C, HW = inputs.channels, H * W
    N, S = 0 if r.w is None else r.w.shape[0], 0 if r.w_strided is None else r.w_strided.shape[0] // 2
    own = tile(C, True, bool(S), inputs.like.itemsize == 2)
    n = _tiles(B, HW, own.pixels, bool(S))
    sums = edges.new_empty(n, 2, 2 * C if inputs.raw else 8 * inputs.q)
    dots = edges.new_empty(n, 14)
    parts = 1 if r.dw is None else r.dw.shape[0]
    blocks = 0 if r.dw is None else triton.cdiv(N, own.rows_weights) + 2 * triton.cdiv(S, own.rows_weights)
    some, wanted = edges, [t for t in (*g, *(g_paths or ())) if t is not None]
    w, w_strided = (some if t is None else t for t in (r.w, r.w_strided))
    d, d_strided = (_coefficients(t, some) for t in (r.d, r.d_strided))
    read_again = moved(*inputs.tensors()) * blocks + moved(*(t for t in (*d[:2], *d_strided[:2]) if blocks))
    launch(
        f"{stage}_bwd" if r.w is not None else f"{stage}_pool_bwd", bwd, (n + blocks * parts,),
        [*inputs.arguments(some), edges, w, w_strided, *d, *d_strided, some if r.d_pooled is None else r.d_pooled,
         *(some if t is None else t for t in g), *(g_paths or (some, some)), sums, dots,
         *(some if t is None else t for t in (r.dw, r.dw_strided)), n, parts, B, W, HW, *inputs.strides(),
         *(0 if t is None else t.stride(0) for t in g), N, S],
        {"C": C, "K": k, "Q": inputs.q, "STRIDED": S > 0, "POOLED": r.w is None, "NEED0": g[0] is not None,
         "NEED1": g[1] is not None, "WEIGHTS": blocks > 0, "P": own.pixels,
         "P_WEIGHTS": own.pixels_weights, "ROWS": own.rows_weights},
        own.warps, moved(*inputs.tensors(), *d[:2], *d_strided[:2], *wanted, sums, dots) + read_again
        + moved(*(t for t in (r.dw, r.dw_strided) if t is not None)),
    )  # fmt: skip
    return Gradients(sums, dots)


def _coefficients(d: Behind | None, missing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g, z and the rows al, be, ga as one (3, N), which they are where `finish` wrote them."""
    if d is None:
        return missing, missing, missing
    together = d.al._base
    if together is None or together.shape != (3, len(d.al)) or together.storage_offset() != d.al.storage_offset():
        together = torch.stack(d[2:])
    return d.g, d.z, together


STAGES = {
    "C16": (16, 0, 48, 0),
    "C16-strided": (16, 0, 32, 16),
    "C32": (32, 0, 96, 0),
    "C32-strided": (32, 0, 64, 32),
    "C32-nodes": (32, 8, 64, 0),
    "C64": (64, 0, 64, 0),
    "C64-nodes": (64, 16, 128, 0),
    "C64-last": (64, 0, 0, 0),
}
"""Channels, Q, N and S of the stages of the search's own network: 16 channels, 8 cells, k = 4."""

_HALF = ("C16", "C16-strided", "C32-nodes")
"""Normal cells and a reduction cell that are compiled in half precision too, which no search runs in."""

_FLOATS = (
    *("scale0", "shift0", "scale1", "shift1", "f_scale", "f_shift", "edges", "mean", "w", "w_strided", "sums"),
    *("sums_strided", "coefficients", "coefficients_strided", "d_mean", "bias", "d_bias", "loss", "dots", "dw"),
    "dw_strided",
)
_TENSORS = ("z0", "z1", "f", "pooled", "z", "z_strided", "g", "g_strided", "g0", "g1", "g_f", "g_pooled")
_INTEGERS = ("HW", "image0", "image1", "g_image0", "g_image1", "N", "S")


def aot_cases() -> Iterator[AotCase]:
    """Every kernel at every stage of the search's own network, and at some in half precision."""
    halves = [(name, dtype) for name in _HALF for dtype in ("bf16", "fp16")]
    for name, dtype in [*((name, "fp32") for name in STAGES), *halves]:
        C, Q, N, S = STAGES[name]
        types = dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_TENSORS, f"*{dtype}") | {"labels": "*i64"}
        shape = {"C": C, "K": 4, "Q": Q}
        own = tile(C, False)
        rows = {"ROWS": power_of_two(N, 16), "STRIDED_ROWS": power_of_two(S, 16) if S else 0}
        if N:
            forwards = [(f"fwd/{name}-{dtype}", fwd, {**shape, **rows, "P": own.pixels})]
        else:
            pooled = shape | {"P": pooled_pixels(C)}
            classes = {"": 16, "-largest": LARGEST // C}
            forwards = [(f"pool/{name}{of}-{dtype}", pool, {**pooled, "CLASSES": n}) for of, n in classes.items()]
        for which, kernel, constants in forwards:
            yield case(which, kernel, types, constants, own.warps, _INTEGERS)
        own = tile(C, True, S > 0, dtype != "fp32")
        constants = {**shape, "STRIDED": S > 0, "POOLED": N == 0, "NEED0": True, "NEED1": True, "WEIGHTS": N > 0}
        constants |= {"P": own.pixels, "P_WEIGHTS": own.pixels_weights, "ROWS": own.rows_weights}
        yield case(f"bwd/{name}-{dtype}", bwd, types, constants, own.warps, _INTEGERS)
