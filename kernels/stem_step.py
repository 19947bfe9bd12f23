"""The stem of the skip-only network in two stages between batch norms: their equations and plain PyTorch.

The first stage, `convolution`, is 3x3 with a border of zeros and sums what it writes. The second, `products`,
normalises that on load with the stem's own affine batch norm, x = z * scale + shift, and multiplies relu(x) by the 1x1
weights of its readers, the first two cells:

    z = w_stem * images                 (B, S, H, W), sums (parts, 2, S)
    products = w relu(x)                (B, N, H, W), sums (parts, 2, N)

Backward, `products` gives g = [x > 0] (w' dz) for x with the sums of g and of g n, n = (z - mean) / std, and dw; with
these `convolution` gives dw_stem = sum over pixels of dz patch'. The finished sums are, beside those of `cell_step`
and with its r, s, q,

    scale = gamma r, shift = beta - mean scale;      dgamma = q, dbeta = s
    al = gamma r, be = -gamma r^2 q / n, ga = gamma (-r s + r^2 mean q) / n .
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from .cell_step import Behind, Product, gradient_sums, with_sums


class Stem(NamedTuple):
    """The raw convolution and its batch norm. z: (B, S, H, W); scale, shift, r, unit (S,): x = z * scale + shift, and
    before gamma and beta n = z * r + unit."""

    z: Tensor
    scale: Tensor
    shift: Tensor
    r: Tensor
    unit: Tensor

    def value(self) -> Tensor:
        """x of the equations."""
        return self.z * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)


def convolution_reference(images: Tensor, w: Tensor) -> Product:
    """w: (S, channels, 3, 3)."""
    return with_sums(F.conv2d(images, w, padding=1))


def products_reference(stem: Stem, w: Tensor) -> Product:
    """w: (N, S)."""
    return with_sums(torch.einsum("ns,bshw->bnhw", w, stem.value().relu()))


def products_backward_reference(stem: Stem, w: Tensor, d: Behind, g: Tensor, dw: Tensor) -> Tensor:
    """Sums (1, 2, S) of g and of g n; g goes to `g`, the weights' gradient to dw (parts, N, S)."""
    x, dz = stem.value(), d.value()
    g.copy_(torch.einsum("ns,bnhw->bshw", w, dz) * (x > 0))
    dw.zero_()[0].copy_(torch.einsum("bnhw,bshw->ns", dz, x.relu()))
    return gradient_sums(g, stem.z * stem.r.view(-1, 1, 1) + stem.unit.view(-1, 1, 1))


def convolution_backward_reference(images: Tensor, d: Behind, dw: Tensor) -> None:
    """dw: (parts, S, channels, 3, 3)."""
    dw.zero_()[0].copy_(conv2d_weight(images, dw.shape[1:], d.value(), padding=1))
