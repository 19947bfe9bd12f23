"""A normal cell of the skip-only network between two batch norms, as one stage: its equations and plain PyTorch.

x0, x1 are raw convolution outputs z (B, C, H, W) that are normalised on load, x = z * scale + shift; b, P and x_2..x_5
are those of `skip_cell`. With a = relu(cat(x_2..x_5)) (B, 4C, H, W) the stage multiplies by the 1x1 weights of every
later reader, stacked, and sums what it writes:

    z = w a                                                     w (N, 4C), z (B, N, H, W)
    zs = cat(w_even a[::2, ::2], w_odd a[1::2, 1::2])           w_strided (2S, 4C): even's rows, then odd's; zs halved
    sums = (sum z, sum z^2) over pixels                         (parts, 2, N), the parts to be added up; likewise zs
    pooled = mean over the image of cat(x_2..x_5)               (B, 4C), instead of all others, in the last cell

The gradient behind a batch norm is formed on load, dz = al * g + be * z + ga with al, be, ga by channel (`backward
coefficients`). With D_j the total gradient of x_j, as in `skip_cell`, G = [a > 0] (w' dz + the strided readers'), or
d_pooled / HW, the stage writes

    g_i = sum_j b_ij P'D_j  (B, C, H, W)                        dL/dx_i, i = 0, 1
    sums = (sum g_i, sum g_i x_i) over pixels                   (parts, 2, 2C): the channels of x0, then of x1
    dots = <P'D_j, x_i>                                         (parts, 14) = dL/db
    dw = sum over pixels dz a'                                  (parts, N, 4C), likewise dw_strided (parts, 2S, 4C)

Between stages the sums are finished in float64. n being the pixels of a channel, r = 1 / sqrt(var + eps), s and q the
sums of g and of g x:

    scale = r, shift = -mean r;       al = r, be = -r^2 q / n, ga = -r s / n + r^2 mean q / n .
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .skip_cell import reference as skip_cell

EPS = 1e-5


class Raw(NamedTuple):
    """What a reader normalises on load. z: (B, C, H, W), channels contiguous planes, images any distance apart (a slice
    of a larger tensor's channels); scale, shift: (C,)."""

    z: Tensor
    scale: Tensor
    shift: Tensor

    def value(self) -> Tensor:
        """x of the equations."""
        return self.z * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)


class Behind(NamedTuple):
    """The gradient behind a batch norm. g, z: (B, N, H, W), contiguous; al, be, ga: (N,)."""

    g: Tensor
    z: Tensor
    al: Tensor
    be: Tensor
    ga: Tensor

    def value(self) -> Tensor:
        """dz of the equations."""
        al, be, ga = (t.view(-1, 1, 1) for t in self[2:])
        return al * self.g + be * self.z + ga


class Product(NamedTuple):
    """A raw product and its sums."""

    z: Tensor
    sums: Tensor


class Outputs(NamedTuple):
    """What the forward stage writes; what nobody reads is None."""

    z: Product | None
    strided: Product | None
    pooled: Tensor | None


class Gradients(NamedTuple):
    """What the backward stage writes besides the gradients that it was given room for."""

    sums: Tensor
    dots: Tensor


def forward_reference(
    x0: Raw, x1: Raw, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None = None
) -> Outputs:
    """The forward stage in any floating type, sums in one part. w None: the last cell."""
    states = skip_cell(x0.value(), x1.value(), edges, k)
    return read(states, w, w_strided)


def read(states: Tensor, w: Tensor | None, w_strided: Tensor | None) -> Outputs:
    """What the readers make of cat(x_2..x_5)."""
    if w is None:
        return Outputs(None, None, states.mean((2, 3)))
    a = states.relu()
    strided = None if w_strided is None else with_sums(_strided(w_strided, a))
    return Outputs(with_sums(_product(w, a)), strided, None)


def with_sums(z: Tensor) -> Product:
    """A product and its sums over the pixels, in float64, one part."""
    wide = z.double()
    return Product(z, torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])[None])


def _product(w: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("nk,bkhw->bnhw", w, a)


def _strided(w: Tensor, a: Tensor) -> Tensor:
    even, odd = w.chunk(2)
    return torch.cat([_product(even, a[:, :, ::2, ::2]), _product(odd, a[:, :, 1::2, 1::2])], 1)


def backward_reference(
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
    """The backward stage in any floating type, by autograd, all parts but the first zero.

    g0, g1 (B, C, H, W, laid out as `Raw.z`), dw (parts, N, 4C), dw_strided (parts, 2S, 4C; a part's rows contiguous,
    parts any distance apart): where the gradients go; None: not wanted.
    """
    values = [x.value().detach().requires_grad_() for x in (x0, x1)]
    b = edges.detach().requires_grad_()
    weights = [t.detach().requires_grad_() for t in (w, w_strided) if t is not None]
    with torch.enable_grad():
        states = skip_cell(values[0], values[1], b, k)
        outputs = read(states, weights[0] if w is not None else None, weights[1] if w_strided is not None else None)
    z, dz = pulled_back(outputs, d, d_strided, d_pooled)
    found = torch.autograd.grad(z, [*values, b, *weights], dz)
    for room, g in zip((g0, g1), found, strict=False):
        if room is not None:
            room.copy_(g)
    for parts, g in zip((dw, dw_strided), found[3:], strict=False):
        if parts is not None:
            parts.zero_()[0].copy_(g)
    sums = [gradient_sums(g, x.detach()) for g, x in zip(found, values, strict=False)]
    return Gradients(torch.cat(sums, 2), found[2][None])


def pulled_back(
    outputs: Outputs, d: Behind | None, d_strided: Behind | None, d_pooled: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that have a gradient, and these gradients."""
    products = [(p.z, g.value()) for p, g in zip(outputs[:2], (d, d_strided), strict=True) if p and g]
    if outputs.pooled is not None and d_pooled is not None:
        products.append((outputs.pooled, d_pooled))
    return [z for z, _ in products], [g for _, g in products]


def gradient_sums(g: Tensor, x: Tensor) -> Tensor:
    """(1, 2, C): the sums of g and of g x over the pixels, in float64."""
    g, x = g.double(), x.double()
    return torch.stack([g.sum((0, 2, 3)), (g * x).sum((0, 2, 3))])[None]


def statistics(sums: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """mean (float64), scale, shift (float32) from (parts, 2, N), as the equations say."""
    total, squares = sums.double().sum(0) / n
    r = (squares - total.square()).clamp(min=0).add(EPS).rsqrt()
    return total, r.float(), (-total * r).float()


def coefficients(sums: Tensor, n: int, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """al, be, ga (float32) from (parts, 2, N), as the equations say."""
    s, q = sums.double().sum(0) / n
    r = scale.double()
    return r.float(), (-r.square() * q).float(), (-r * s + r.square() * mean * q).float()
