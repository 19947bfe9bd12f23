"""The last cell in a Triton kernel: the mean of its nodes over the image, and where wanted the classifier behind it,
the batch's mean cross entropy and its gradients. An image is a program.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ._launch import power_of_two
from ._nodes_triton import nodes, state
from ._tile_triton import to


class Head(NamedTuple):
    """The classifier, and where the gradients of the batch's mean cross entropy go. labels: (B,); w, bias; d_mean:
    (B, 4C); dw, d_bias, loss: a part for each image."""

    labels: Tensor
    w: Tensor
    bias: Tensor
    d_mean: Tensor
    dw: Tensor
    d_bias: Tensor
    loss: Tensor


LARGEST = 4096
"""Of a classifier in `pool`, its classes, as a power of two, times the channels of a node: with twice as many,
registers spill on GPUs that `aot` compiles for."""


def fits(classes: int, channels: int) -> bool:
    """Whether `pool` takes the classifier; a larger one is `classify`'s."""
    return power_of_two(classes, 2) * channels <= LARGEST


def classify(mean: Tensor, head: Head) -> None:
    """What `pool` makes of the mean over the image (B, 4C), by torch; the whole batch is one part."""
    logs = torch.addmm(head.bias, mean, head.w.t()).log_softmax(1)
    head.loss.copy_(F.nll_loss(logs, head.labels))
    hot = torch.zeros_like(logs).scatter_(1, head.labels[:, None], 1.0)
    d = (logs.exp() - hot) / len(mean)
    torch.mm(d, head.w, out=head.d_mean)
    torch.mm(d.t(), mean, out=head.dw.view_as(head.w))
    torch.sum(d, 0, keepdim=True, out=head.d_bias)


@triton.jit
def _rows(at, known):
    return tl.load(at, known[:, None], 0.0).to(tl.float32)


@triton.jit
def pool(
    z0, scale0, shift0, z1, scale1, shift1, f, f_scale, f_shift, pooled, edges, mean, labels, w, bias, d_mean, dw,
    d_bias, loss, W, HW, image0, image1, classes,
    C: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The last cell: an image a program. CLASSES > 0: and the classifier, cross entropy and their gradients."""
    image = tl.program_id(0)
    s2, s3 = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    s4, s5 = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for first in tl.range(0, HW, P, num_stages=1):
        at = first + tl.arange(0, P)
        there = at < HW
        b = tl.zeros([P], tl.int64) + image
        x0 = state(z0, scale0, shift0, pooled, 0, b, image0, at, there, HW, C, Q, P)
        x1 = state(z1, scale1, shift1, pooled, 1, b, image1, at, there, HW, C, Q, P)
        v2, v3, v4, v5 = nodes(edges, x0, x1, f, f_scale, f_shift, b, at, there, HW, C, K, Q, P)
        s2 += tl.sum(tl.where(there[None, :], v2, 0.0), 1)
        s3 += tl.sum(tl.where(there[None, :], v3, 0.0), 1)
        s4 += tl.sum(tl.where(there[None, :], v4, 0.0), 1)
        s5 += tl.sum(tl.where(there[None, :], v5, 0.0), 1)
    s2, s3, s4, s5 = s2 / HW, s3 / HW, s4 / HW, s5 / HW
    column = to(tl.arange(0, C), C, K)
    if CLASSES == 0:
        out = mean + image * 4 * C + column
        tl.store(out, s2)
        tl.store(out + C, s3)
        tl.store(out + 2 * C, s4)
        tl.store(out + 3 * C, s5)
    else:
        n = tl.arange(0, CLASSES)
        known = n < classes
        at = n[:, None] * (4 * C) + column[None, :]
        w2, w3 = _rows(w + at, known), _rows(w + C + at, known)
        w4, w5 = _rows(w + 2 * C + at, known), _rows(w + 3 * C + at, known)
        logits = tl.sum(w2 * s2[None, :] + w3 * s3[None, :] + w4 * s4[None, :] + w5 * s5[None, :], 1)
        logits = tl.where(known, logits + tl.load(bias + n, known, 0.0).to(tl.float32), -float("inf"))
        logits -= tl.max(logits, 0)
        total = tl.sum(tl.exp(logits), 0)
        hot = n == tl.load(labels + image).to(tl.int32)
        tl.store(loss + image, (tl.log(total) - tl.sum(tl.where(hot, logits, 0.0), 0)) / tl.num_programs(0))
        d = (tl.exp(logits) / total - hot.to(tl.float32)) / tl.num_programs(0)
        out = d_mean + image * 4 * C + column
        tl.store(out, tl.sum(d[:, None] * w2, 0))
        tl.store(out + C, tl.sum(d[:, None] * w3, 0))
        tl.store(out + 2 * C, tl.sum(d[:, None] * w4, 0))
        tl.store(out + 3 * C, tl.sum(d[:, None] * w5, 0))
        tl.store(d_bias + image * classes + n, d, known)
        dw += image * classes * 4 * C
        tl.store(dw + at, d[:, None] * s2[None, :], known[:, None])
        tl.store(dw + C + at, d[:, None] * s3[None, :], known[:, None])
        tl.store(dw + 2 * C + at, d[:, None] * s4[None, :], known[:, None])
        tl.store(dw + 3 * C + at, d[:, None] * s5[None, :], known[:, None])
