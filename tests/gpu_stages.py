"""Inputs of the stages of the skip-only network on a GPU, and how far a result is from the float64 reference."""

from typing import NamedTuple

import torch
from ftso_fast.kernels.cell_step import Behind, Raw

NAN = float("nan")
ALLOWED = 1e-5


class Cell(NamedTuple):
    """N rows of weights, S of each strided half; N = 0: the last cell."""

    B: int
    C: int
    H: int
    W: int
    k: int
    N: int
    S: int

    def __str__(self):
        return f"{self.B}x{self.C}x{self.H}x{self.W}-k{self.k}-N{self.N}-S{self.S}"


class Draw:
    """Random tensors on a device, in a type, from one seed."""

    def __init__(self, seed, device, dtype=torch.float32):
        self.g = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.g).to(self.device, dtype)

    def positive(self, *shape):
        return torch.rand(shape, generator=self.g).to(self.device) + 0.5

    def raw(self, B, C, H, W):
        """Channels and images of a larger tensor full of NaN."""
        return Raw(within(self.normal(B, C, H, W, dtype=self.dtype)), self.positive(C), self.normal(C))

    def behind(self, z):
        return Behind(self.normal(*z.shape, dtype=self.dtype), z, *self.normal(3, z.shape[1]))

    def weights(self, rows, columns):
        return self.normal(rows, columns) / columns**0.5 if rows else None


def within(t):
    """A copy of t among channels and images that nobody may touch."""
    room = t.new_full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), NAN)
    room[:, 1:-2] = t
    return room[:, 1:-2]


def room_for(*shape, device, dtype=torch.float32):
    """Channels of a larger tensor of NaN."""
    return within(torch.full(shape, NAN, device=device, dtype=dtype))


def untouched(view):
    """Whether the channels around a `room_for` are as they were."""
    whole = view._base
    return bool(whole[:, 0].isnan().all() and whole[:, -2:].isnan().all())


def wide(value):
    """The same in float64, a named tuple or a tensor."""
    if value is None or isinstance(value, torch.Tensor):
        return None if value is None else value.double()
    return type(value)(*(wide(t) for t in value))


def whole(parts):
    """Of sums in parts their sum."""
    return parts.double().sum(0)


def error(found, wanted):
    """Relative to the largest; infinite where NaN is."""
    if not wanted.numel():
        return 0.0
    largest = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    return float(largest.nan_to_num(float("inf")))
