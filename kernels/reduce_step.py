"""A reduction cell of the skip-only network in two stages between batch norms: their equations and plain PyTorch.

With q = C / k channels processed, edge (input i, node j) has a FactorizedReduce of its own (FTSO section 3.2): halves
of q/2 outputs, from the pixels (even, even) and (odd, odd). The other channels bypass it under a 2x2 maximum. The first
stage, `paths`, reads x_0, x_1 (B, C, H, W), raw tensors normalised on load, and sums f (parts, 2, 8q):

    f_ij = cat(w_ij,even relu(x_i[:q])[::2, ::2], w_ij,odd relu(x_i[:q])[1::2, 1::2])    f (B, 8q, H/2, W/2): i, then j
    pooled_i = max over 2x2 of x_i[q:]                                                   (B, 2(C - q), H/2, W/2): by i

The second stage, `nodes`, is `cell_step` with an input of its own for each edge,

    x_j = P( sum_i b_ij cat(norm(f_ij), pooled_i) + sum_{2<=m<j} b_mj x_m ),

and the same readers. Backward, `nodes` gives the gradients for norm(f), with their sums, and for pooled; `paths` turns
these into g_i for x_i (the first of equal maxima takes the gradient) with their sums (parts, 2, 2C), and into dw.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cell_step import Behind, Gradients, Outputs, Product, Raw, gradient_sums, pulled_back, read, with_sums
from .skip_cell import N_NODES, channel_shuffle


class Paths(NamedTuple):
    """What `nodes` reads. f: raw (B, 8q, H, W); pooled: (B, 2(C - q), H, W), all of one size."""

    f: Raw
    pooled: Tensor


def paths_reference(x0: Raw, x1: Raw, w: Tensor, q: int) -> tuple[Product, Tensor]:
    """f with its sums, and pooled. w: (4, 2, 2, q/2, q): node, input, (even, odd)."""
    f, pooled = _paths(x0.value(), x1.value(), w, q)
    return with_sums(f), pooled


def _paths(x0: Tensor, x1: Tensor, w: Tensor, q: int) -> tuple[Tensor, Tensor]:
    f = []
    for i, x in enumerate((x0, x1)):
        a = x[:, :q].relu()
        sides = a[:, :, ::2, ::2], a[:, :, 1::2, 1::2]
        for node in w:
            f += [torch.einsum("oc,bchw->bohw", node[i, s], side) for s, side in enumerate(sides)]
    bypass = [F.max_pool2d(x[:, q:], 2) if q < x.shape[1] else x[:, q:, ::2, ::2] for x in (x0, x1)]
    return torch.cat(f, 1), torch.cat(bypass, 1)


def paths_backward_reference(
    x0: Raw, x1: Raw, w: Tensor, q: int, d: Behind, d_pooled: Tensor, g0: Tensor | None, g1: Tensor | None,
    dw: Tensor | None,
) -> Tensor:  # fmt: skip
    """The sums of g_0, g_1, which go to g0, g1; dw (parts, 4, 2, 2, q/2, q). None: not wanted."""
    values = [x.value().detach().requires_grad_() for x in (x0, x1)]
    weights = w.detach().requires_grad_()
    with torch.enable_grad():
        f, pooled = _paths(values[0], values[1], weights, q)
    outputs, gradients = ([f, pooled], [d.value(), d_pooled]) if pooled.numel() else ([f], [d.value()])
    found = torch.autograd.grad(outputs, [*values, weights], gradients)
    for room, g in zip((g0, g1), found, strict=False):
        if room is not None:
            room.copy_(g)
    if dw is not None:
        dw.zero_()[0].copy_(found[2])
    return torch.cat([gradient_sums(g, x.detach()) for g, x in zip(found, values, strict=False)], 2)


def nodes_reference(paths: Paths, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None) -> Outputs:
    """The second stage's readers, as `cell_step.forward_reference`."""
    return read(_nodes(paths.f.value(), paths.pooled, edges, k), w, w_strided)


def _nodes(f: Tensor, pooled: Tensor, edges: Tensor, k: int) -> Tensor:
    own = f.unflatten(1, (2, N_NODES, -1))
    bypass = pooled.unflatten(1, (2, -1)) if pooled.shape[1] else pooled.unflatten(1, (2, 0))
    states: list[Tensor] = []
    at = 0
    for j in range(N_NODES):
        total = sum(edges[at + i] * torch.cat((own[:, i, j], bypass[:, i]), 1) for i in range(2))
        for m, x in enumerate(states):
            total = total + edges[at + 2 + m] * x
        at += 2 + j
        states.append(channel_shuffle(torch.as_tensor(total), k))
    return torch.cat(states, 1)


def nodes_backward_reference(
    paths: Paths, edges: Tensor, k: int, w: Tensor | None, w_strided: Tensor | None, d: Behind | None,
    d_strided: Behind | None, d_mean: Tensor | None, g_f: Tensor, g_pooled: Tensor, dw: Tensor | None,
    dw_strided: Tensor | None,
) -> Gradients:  # fmt: skip
    """The gradients for norm(f) and pooled go to g_f and g_pooled; the sums are those of f, (1, 2, 8q)."""
    f, pooled, b = (t.detach().requires_grad_() for t in (paths.f.value(), paths.pooled, edges))
    weights = [t.detach().requires_grad_() for t in (w, w_strided) if t is not None]
    with torch.enable_grad():
        states = _nodes(f, pooled, b, k)
        outputs = read(states, weights[0] if w is not None else None, weights[1] if w_strided is not None else None)
    z, dz = pulled_back(outputs, d, d_strided, d_mean)
    found = torch.autograd.grad(z, [f, pooled, b, *weights], dz)
    g_f.copy_(found[0])
    g_pooled.copy_(found[1])
    for parts, g in zip((dw, dw_strided), found[3:], strict=False):
        if parts is not None:
            parts.zero_()[0].copy_(g)
    return Gradients(gradient_sums(found[0], f.detach()), found[2][None])
