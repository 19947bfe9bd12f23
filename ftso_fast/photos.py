"""The augmentation of photographs, as ImageNet's networks are trained and tested with it.

Training: a crop of 8 to 100 % of the area and 3/4 to 4/3 of aspect, resized to `size`; a flip; brightness, contrast,
saturation and hue changed by up to 0.4, 0.4, 0.4, 0.2, in a drawn order. Testing: the shorter side resized to
size/0.875, the middle of it. Source: DARTS and PC-DARTS, train_imagenet.py; torchvision's transforms of those names.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .augment import draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's channel means and deviations on 0..1."""
_STREAM = 48
"""Added to a stream's number; each of the following draws adds one more multiple of it."""
_DRAWS = 40
_GREY = torch.tensor([0.2989, 0.587, 0.114])


def augmented(
    images: NDArray[np.uint8], size: int, seed: int, stream: int, epoch: int, index: NDArray[np.int64]
) -> Tensor:  # fmt: skip
    """uint8 B,H,W,3 -> float32 B,3,size,size, normalised."""
    bits = np.stack([draws(seed, stream + _STREAM * (i + 1), epoch, index) for i in range(_DRAWS)], 1)
    uniform = (bits >> np.uint64(11)).astype(np.float64) / (1 << 53)
    return torch.stack([_photo(image, size, iter(u.tolist())) for image, u in zip(images, uniform, strict=True)])


def untouched(images: NDArray[np.uint8], size: int) -> Tensor:
    """uint8 B,H,W,3 -> float32 B,3,size,size: resized, cut to the middle, normalised."""
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(torch.float32) / 255
    height, width = x.shape[2:]
    shorter = round(size / 0.875)
    scale = shorter / min(height, width)
    large = max(shorter, round(height * scale)), max(shorter, round(width * scale))
    x = _resized(x, *large)
    top, left = (large[0] - size) // 2, (large[1] - size) // 2
    return _normalised(x[:, :, top : top + size, left : left + size])


def _photo(image: NDArray[np.uint8], size: int, uniform: Iterator[float]) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(torch.float32) / 255
    top, left, height, width = window(x.shape[1], x.shape[2], uniform)
    x = _resized(x[None, :, top : top + height, left : left + width], size, size)[0]
    if next(uniform) < 0.5:
        x = x.flip(2)
    brightness, contrast, saturation = (0.6 + 0.8 * next(uniform) for _ in range(3))
    turn = 0.4 * next(uniform) - 0.2
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: (t * brightness).clamp(0, 1),
        lambda t: _blend(t, _grey(t).mean(), contrast),
        lambda t: _blend(t, _grey(t), saturation),
        lambda t: _turned(t, turn),
    ]
    for change in sorted(changes, key=lambda _: next(uniform)):
        x = change(x)
    return _normalised(x[None])[0]


def window(height: int, width: int, uniform: Iterator[float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a drawn crop; the middle where ten draws do not fit."""
    found = None
    for _ in range(10):
        area = height * width * (0.08 + 0.92 * next(uniform))
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * next(uniform))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if found is None and 0 < w <= width and 0 < h <= height:
            found = h, w
    down, right = next(uniform), next(uniform)
    if found:
        h, w = found
        return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)


def _normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def _grey(x: Tensor) -> Tensor:
    return torch.tensordot(_GREY, x, 1)[None]


def _blend(x: Tensor, other: Tensor, share: float) -> Tensor:
    return (share * x + (1 - share) * other).clamp(0, 1)


def _turned(x: Tensor, turn: float) -> Tensor:
    """The hue turned by `turn` of the circle; value and saturation stay."""
    value, least = x.amax(0), x.amin(0)
    span = value - least
    safe = torch.where(span > 0, span, 1.0)
    r, g, b = (value - x) / safe
    hue = torch.where(x[0] == value, b - g, torch.where(x[1] == value, 2 + r - b, 4 + g - r)) / 6 + turn
    sextant = (torch.stack([hue * 6 + shift for shift in (5.0, 3.0, 1.0)])) % 6
    return value - span * torch.minimum(sextant, 4 - sextant).clamp(0, 1)
