"""The stages of `cell_step` on the CUDA kernels of csrc/cell_step.cuh: float32, 16, 32, 64 or 128 channels.

Each is one launch on the current stream into memory that torch allocates; nothing is copied and nobody waits, so that
a CUDA graph can capture it. Partial sums come one part a tile of pixels.
"""

import torch
from torch import Tensor

from ._backend import cuda_module as module
from ._backend import launched
from .cell_step import Behind, Gradients, Outputs, Product, Raw

CHANNELS = (16, 32, 64, 128)


def forward(x0: Raw, x1: Raw, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None = None) -> Outputs:
    """`cell_step.forward_reference`; the sums come in float32."""
    B, C, H, W = _check("forward", x0, x1, edges, k, w, w_strided)
    new = x0.z.new_empty
    launch = (B, C, H, W, k), _at(edges), _raw(x0), _raw(x1)
    if w is None:
        pooled = new(B, 4 * C)
        launched("cell_pool_fwd", "cuda", _bytes(x0.z, x1.z, pooled))
        module().cell_step_fwd(*launch, _product(None, None), _product(None, None), _at(pooled), *_where(x0.z))
        return Outputs(None, None, pooled)
    z, strided = Product(new(B, len(w), H, W), new(_parts(B, C, H * W), 2, len(w))), None
    if w_strided is not None:
        sums = new(_parts(B, C, H // 2 * (W // 2)), 2, len(w_strided))
        strided = Product(new(B, len(w_strided), H // 2, W // 2), sums)
    launched("cell_fwd", "cuda", _bytes(x0.z, x1.z, w, w_strided, *z, *(strided or ())))
    module().cell_step_fwd(*launch, _product(w, z), _product(w_strided, strided), 0, *_where(x0.z))
    return Outputs(z, strided, None)


def backward(
    x0: Raw,
    x1: Raw,
    edges: Tensor,
    k: int,
    w: Tensor | None,
    w_strided: Tensor | None = None,
    d: Behind | None = None,
    d_strided: Behind | None = None,
    d_pooled: Tensor | None = None,
    g0: Tensor | None = None,
    g1: Tensor | None = None,
    dw: Tensor | None = None,
    dw_strided: Tensor | None = None,
) -> Gradients:
    """`cell_step.backward_reference`; sums and dots come in float32, every part of dw and dw_strided is written."""
    B, C, H, W = _check("backward", x0, x1, edges, k, w, w_strided)
    for name, weights, behind in (("d", w, d), ("d_strided", w_strided, d_strided)):
        if (weights is None) != (behind is None):
            raise ValueError(f"cell_step: {name}: expected one where there are weights, got {_kind(behind)}")
        if behind is not None and not (behind.g.is_contiguous() and behind.z.is_contiguous()):
            raise ValueError(f"cell_step: {name}: expected contiguous g and z, got strides {behind.g.stride()}")
    if (w is None) != (d_pooled is not None):
        raise ValueError(f"cell_step: d_pooled: expected it in place of all other readers, got {_kind(d_pooled)}")
    for name, g, x in (("g0", g0, x0), ("g1", g1, x1)):
        if g is not None and g.stride() != x.z.stride():
            raise ValueError(f"cell_step: {name}: expected strides {x.z.stride()} as its input, got {g.stride()}")
    parts = _parts(B, C, H * W, backward=True)
    sums, dots = x0.z.new_empty(parts, 2, 2 * C), x0.z.new_empty(parts, 14)
    read = [x0.z, x1.z, w, w_strided, d_pooled, *(t for b in (d, d_strided) if b is not None for t in b[:2])]
    moved = _bytes(*read, g0, g1, dw, dw_strided, sums, dots)
    launched("cell_bwd" if w is not None else "cell_pool_bwd", "cuda", moved)
    module().cell_step_bwd(
        (B, C, H, W, k),
        _at(edges),
        _raw(x0),
        _raw(x1),
        _behind(w, d, dw),
        _behind(w_strided, d_strided, dw_strided),
        *(_at(t) for t in (d_pooled, g0, g1, sums, dots)),
        *_where(x0.z),
    )
    return Gradients(sums, dots)


def _bytes(*tensors: Tensor | None) -> int:
    """What a launch reads and writes, once each."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _kind(x: object) -> str:
    return "none" if x is None else "one"


def _parts(B: int, C: int, pixels: int, backward: bool = False) -> int:
    return int(module().cell_parts(B, C, pixels, backward))


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _raw(x: Raw) -> tuple[int, int, int, int]:
    return _at(x.z), x.z.stride(0), _at(x.scale), _at(x.shift)


def _product(w: Tensor | None, made: Product | None) -> tuple[int, int, int, int]:
    if w is None or made is None:
        return 0, 0, 0, 0
    return _at(w), _at(made.z), _at(made.sums), len(w)


def _behind(w: Tensor | None, d: Behind | None, dw: Tensor | None) -> tuple[list[int], int, int, int]:
    if w is None or d is None:
        return [0] * 7, 0, 0, 0
    part, parts = (dw.stride(0), len(dw)) if dw is not None else (0, 0)
    return [_at(t) for t in (w, *d, dw)], part, len(w), parts


def _where(x: Tensor) -> tuple[int, int]:
    """The device and its current stream."""
    return x.device.index or 0, torch.cuda.current_stream(x.device).cuda_stream


def _check(
    stage: str, x0: Raw, x1: Raw, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None
) -> tuple[int, int, int, int]:
    """Refuses what a kernel would read past; returns the shape of the inputs."""
    B, C, H, W = x0.z.shape
    if C not in CHANNELS or C % k:
        raise ValueError(f"cell_step {stage}: x0: the cuda backend expected {CHANNELS} channels, got {C} with k {k}")
    for name, x in (("x0", x0), ("x1", x1)):
        if x.z.shape != x0.z.shape or x.z.stride()[1:] != (H * W, W, 1):
            raise ValueError(
                f"cell_step {stage}: {name}: expected {tuple(x0.z.shape)}, planes contiguous, "
                f"got {tuple(x.z.shape)} with strides {x.z.stride()}"
            )
    if edges.shape != (14,) or not edges.is_contiguous():
        raise ValueError(f"cell_step {stage}: edges: expected 14 contiguous numbers, got {tuple(edges.shape)}")
    weights = [(name, t) for name, t in (("w", w), ("w_strided", w_strided)) if t is not None]
    for name, t in weights:
        if t.dim() != 2 or t.shape[1] != 4 * C or not t.is_contiguous() or _at(t) % 16:
            raise ValueError(
                f"cell_step {stage}: {name}: expected (N, {4 * C}), contiguous and aligned to 16 bytes, "
                f"got {tuple(t.shape)} with strides {t.stride()}"
            )
    if w_strided is not None and (w is None or H % 2 or W % 2 or len(w_strided) % 2):
        raise ValueError(
            f"cell_step {stage}: w_strided: expected 2S rows beside w, on even H and W, got {tuple(w_strided.shape)} "
            f"on {H} x {W}"
        )
    for name, t in [("x0.z", x0.z), ("x1.z", x1.z), ("edges", edges), *weights]:
        if t.dtype != torch.float32 or t.device != x0.z.device:
            raise TypeError(
                f"cell_step {stage}: {name}: expected float32 on {x0.z.device}, got {t.dtype} on {t.device}"
            )
    return B, C, H, W
