"""How tensors of cases are drawn: away from the kinks of ReLU and maximum, and laid out in memory as callers may."""

import zlib
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from . import operators
from .operators import Shape

KINK = 0.05
"""No drawn state is nearer to zero, where ReLU has its kink."""

INNER_KINK = 1e-5
"""No input of a separable convolution's second ReLU is nearer to zero: rounding in float32 does not turn it."""


def _within(t: Tensor, shape: tuple[int, ...], *index: slice) -> Tensor:
    """A copy of t inside a larger tensor of NaN, which nobody may read."""
    view = t.new_full(shape, float("nan"))[index]
    view.copy_(t)
    return view


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda t: t,
    "second": lambda t: _within(t, (t.shape[0], 2 * t.shape[1], *t.shape[2:]), slice(None), slice(0, None, 2)),
    "first": lambda t: _within(t, (t.shape[0], t.shape[1] + 3, *t.shape[2:]), slice(None), slice(t.shape[1])),
    "last": lambda t: _within(t, (t.shape[0], t.shape[1] + 3, *t.shape[2:]), slice(None), slice(3, None)),
    "images": lambda t: _within(t, (3 * t.shape[0], *t.shape[1:]), slice(1, None, 3)),
    "rows": lambda t: _within(t, (*t.shape[:3], t.shape[3] + 2), *[slice(None)] * 3, slice(t.shape[3])),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}


def generator(case: object, draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{case} {draw}".encode()))


def state(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Magnitudes on a grid over KINK..4, each once in a plane, and random signs: no two pixels of a plane are near to
    each other, which a maximum would ask for, and none is near to zero."""
    flat = torch.rand(prod(shape[:2]), prod(shape[2:]), generator=g)
    ranks = torch.empty_like(flat).scatter_(1, flat.argsort(1), torch.arange(1.0, flat.shape[1] + 1).expand_as(flat))
    signs = torch.randint(2, flat.shape, generator=g) * 2 - 1
    return (signs * (KINK + ranks * (4 / (flat.shape[1] + 1)))).view(shape)


def convolutions(shapes: Sequence[Shape], g: torch.Generator) -> list[Tensor]:
    """Convolutions that keep the variance."""
    return [torch.randn(shape, generator=g) / prod(shape[1:]) ** 0.5 for shape in shapes]


def step_off_kinks(x: Tensor, weights: Sequence[Tensor], affine: Sequence[Tensor], stride: int) -> bool:
    """Enlarge pixels a little until a separable convolution's second ReLU is off its kink; whether any was enlarged.

    A little: the batch's statistics, and with them every other input of that ReLU, hardly move."""
    for turn in range(100):
        weights_64, affine_64 = [w.double() for w in weights[:2]], [a.double() for a in affine[:2]]
        inner = operators.separable(x.double(), weights_64, affine_64, stride, 1)
        near = (inner.abs() < INNER_KINK).any(1).nonzero()
        if not len(near):
            return turn > 0
        images, rows, columns = near.unbind(1)
        # another pixel each time, since one may be negative in all channels
        r = (rows * stride + turn % 3 - 1).clamp(0, x.shape[2] - 1)
        c = (columns * stride + turn // 3 % 3 - 1).clamp(0, x.shape[3] - 1)
        x[images, :, r, c] *= 1.01
    raise ValueError("no draw of this case is off its kinks")
