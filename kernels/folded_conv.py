"""Separable blocks for inference: batch norm folded into the pointwise convolution, a whole sep_conv in one pass.

One block is ReLU, depthwise K x K (K = 1: none), pointwise with bias; a second one of stride 1 may follow:

    y = b_2 + W_2 d_2(relu( b_1 + W_1 d_1(relu(x)) ))          d: depthwise convolution, W: pointwise

What lies between the two never reaches memory. With the running statistics of a batch norm behind a pointwise W,

    W' = weight / sqrt(variance + eps) * W            b' = bias - weight * mean / sqrt(variance + eps).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _memory
from ._backend import choose, core
from ._native import planes, view
from .operators import EPS


def fold_batch_norm(
    pointwise: Tensor, mean: Tensor, variance: Tensor, affine: Sequence[Tensor] = (), eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """(pointwise, bias) that give what pointwise (C_out, C, 1, 1) and a batch norm with these statistics (C_out,) give;
    affine: empty, or weight and bias."""
    scale = (variance + eps).rsqrt()
    if affine:
        scale = scale * affine[0]
    bias = -mean * scale
    return pointwise * scale.view(-1, 1, 1, 1), bias + affine[1] if affine else bias


def reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilation: int) -> Tensor:
    """The definition."""
    left = list(weights)
    for i, bias in enumerate(biases):
        x = x.relu()
        s = 1 if i else stride
        if len(weights) > len(biases):
            depthwise = left.pop(0)
            K = depthwise.shape[-1]
            x = F.conv2d(x, depthwise, None, s, dilation * (K // 2), dilation, groups=x.shape[1])
            s = 1
        x = F.conv2d(x, left.pop(0), bias, s)
    return x


def folded_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stride: int = 1,
    dilation: int = 1,
    *,
    plus: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(B, C, H, W) -> (B, C_out, ceil(H/stride), ceil(W/stride)), see the module.

    weights, biases: pointwise, bias (a folded relu_conv_bn); depthwise, pointwise, bias (dil_conv, with dilation 2);
    depthwise, pointwise twice, two biases (sep_conv, dilation 1). plus: of the result's shape, added to it. out: where
    the result goes, planes without gaps; it may be `plus`, and must not overlap x. Without gradients: for inference.

    Raises ValueError or TypeError naming the argument, what was expected and what came; RuntimeError where a gradient
    is asked for.
    """
    check(x, weights, biases, stride, dilation, plus, out)
    given = (x, *weights, *biases, *(t for t in (plus, out) if t is not None))
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise RuntimeError("folded_conv: x, weights, biases: expected no gradient to be asked for: use torch.no_grad()")
    table: dict[str, Callable[..., Tensor]] = {"cpu": _cpu, "reference": _reference}
    return choose("folded_conv", table, x)(x, weights, biases, stride, dilation, plus, out)


def _reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilation: int, plus: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    y = reference(x, weights, biases, stride, dilation)
    y = y if plus is None else y + plus
    return y if out is None else out.copy_(y)


def check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilation: int,
    plus: Tensor | None = None, out: Tensor | None = None,
) -> None:  # fmt: skip
    """Refuses what no kernel may see."""
    op = "folded_conv"
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{op}: x: expected shape (B, C, H, W), none of them 0, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x: expected a floating type, got {x.dtype}")
    for name, value in (("stride", stride), ("dilation", dilation)):
        if isinstance(value, bool) or value not in (1, 2):
            raise ValueError(f"{op}: {name}: expected 1 or 2, got {value!r}")
    counts = len(weights), len(biases)
    if counts not in ((1, 1), (2, 1), (4, 2)):
        raise ValueError(f"{op}: weights, biases: expected 1 and 1, 2 and 1, or 4 and 2 tensors, got {counts}")
    if dilation == 2 and counts != (2, 1):
        raise ValueError(f"{op}: dilation: expected 1 for {counts[0]} weights, got 2")
    C, K, shapes = x.shape[1], 0, list[tuple[int, ...]]()
    for i, w in enumerate(weights):
        shape = tuple(w.shape)
        if len(weights) > 1 and i % 2 == 0:
            K = K or (shape[-1] if len(shape) == 4 and shape[-1] in (3, 5) else 3)
            shapes.append((C, 1, K, K))
        else:
            shapes.append((shape[0] if len(shape) == 4 else 1, C, 1, 1))
            C = shapes[-1][0]
            shapes.append((C,))
    given = [("weights", i, w) for i, w in enumerate(weights)]
    for i, bias in enumerate(biases):
        given.insert((i + 1) * len(weights) // len(biases) + i, ("biases", i, bias))
    labels = [f"{name}[{i}]" for name, i, _ in given]
    tensors = [t for *_, t in given]
    for label, more in (("plus", plus), ("out", out)):
        if more is not None:
            labels.append(label)
            tensors.append(more)
            shapes.append(_shape(x, weights, stride))
    for label, t, shape in zip(labels, tensors, shapes, strict=True):
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {label}: expected shape {shape}, got {tuple(t.shape)}")
        if t.dtype != x.dtype or t.device != x.device:
            raise TypeError(f"{op}: {label}: expected {x.dtype} on {x.device}, got {t.dtype} on {t.device}")
    if out is not None and planes(out) is not out:
        raise ValueError(f"{op}: out: expected planes without gaps, got strides {out.stride()}")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether they may share memory; different channels of the same images do not."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False

    def span(t: Tensor, first: int) -> tuple[int, int]:
        begin = int(t.storage_offset())
        return begin, begin + 1 + sum((n - 1) * s for n, s in zip(t.shape[first:], t.stride()[first:], strict=True))

    (begin, end), (other, other_end) = span(a, 1), span(b, 1)
    if not a.stride(0) == b.stride(0) >= max(end, other_end) - min(begin, other):
        (begin, end), (other, other_end) = span(a, 0), span(b, 0)
    return begin < other_end and other < end


def _cpu(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilation: int, plus: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    if plus is None and out is None:
        found: Tensor = torch.ops.ftso_fast.folded_conv(x, list(weights), list(biases), stride, dilation)
        return found
    out = x.new_empty(_shape(x, weights, stride)) if out is None else out
    torch.ops.ftso_fast.folded_conv_into(x, list(weights), list(biases), stride, dilation, plus, out)
    return out


_LIB = torch.library.Library("ftso_fast", "FRAGMENT")
_ARGUMENTS = "Tensor x, Tensor[] weights, Tensor[] biases, int stride, int dilation"
_LIB.define(f"folded_conv({_ARGUMENTS}) -> Tensor")
_LIB.define(f"folded_conv_into({_ARGUMENTS}, Tensor? plus, Tensor(a!) out) -> ()")


def _shape(x: Tensor, weights: Sequence[Tensor], stride: int) -> tuple[int, int, int, int]:
    B, _, H, W = x.shape
    return B, weights[-1].shape[0], (H + stride - 1) // stride, (W + stride - 1) // stride


def _fwd_cpu(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilation: int) -> Tensor:
    check(x, weights, biases, stride, dilation)
    shape = _shape(x, weights, stride)
    y = _memory.pooled(*shape)
    _into_cpu(x, weights, biases, stride, dilation, None, y)
    return y


def _into_cpu(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilation: int, plus: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    check(x, weights, biases, stride, dilation, plus, out)
    if x.dtype != torch.float32:
        raise TypeError(f"folded_conv: x: the cpu backend expected float32, got {x.dtype}")
    if _overlap(out, x):
        raise ValueError("folded_conv: out: expected memory of its own, got some of x's")
    n, (B, _, H, W) = len(weights), x.shape
    picks = n == 1 and stride == 2 and x.stride(3) == 1 and x.stride(2) >= W  # pixels of rows that may lie apart
    x = x if picks else planes(x)
    plus = None if plus is None else planes(plus)
    small = [t.contiguous() for t in (*weights, *biases)]
    at = [t.data_ptr() for t in small]
    core().folded_conv(
        (B, H, W, x.stride(2) if picks else W),
        [x.shape[1], *(b.shape[0] for b in biases)],
        (1 if n == 1 else weights[0].shape[-1], stride, dilation),
        view(x),
        at[:n],
        at[n:],
        (0, 0, 0) if plus is None else view(plus),
        view(out),
        torch.get_num_threads(),
    )


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilation: int) -> Tensor:
    check(x, weights, biases, stride, dilation)
    return x.new_empty(_shape(x, weights, stride))


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("folded_conv: the cpu backend has no derivatives: it is for inference")


_LIB.impl("folded_conv", _fwd_cpu, "CPU")
_LIB.impl("folded_conv_into", _into_cpu, "CPU")
torch.library.register_fake("ftso_fast::folded_conv", _fake, lib=_LIB)
torch.library.register_fake("ftso_fast::folded_conv_into", check, lib=_LIB)
torch.library.register_autograd("ftso_fast::folded_conv", _no_gradient, lib=_LIB)
