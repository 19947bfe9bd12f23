"""Counter-based random numbers, the orders and halves drawn from them, and the augmentation of uint8 images.

A draw is a pure function of (seed, stream, epoch, index of the image): never of the batch that the image is
in, of the number of workers, or of what was drawn before. A resumed search needs no stored generator state.
"""

from functools import cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .kernels import cropped

__all__ = ["ARCHITECTURE", "BOTH", "SPLIT", "WEIGHTS", "augment", "cut_out", "draws", "halves", "normalised", "order"]

SPLIT, WEIGHTS, ARCHITECTURE, BOTH = 0, 1, 2, 3
"""Streams: the split into halves, the weight half, the architecture half, one iterable that feeds both."""
_CROP, _CUTOUT = 16, 32
"""Added to a stream's number for the crops and flips, and for cutout: none depends on the shuffle or on another."""

PAD = 4
MEAN = (0.49139968, 0.48215827, 0.44653124)
STD = (0.24703233, 0.24348505, 0.26158768)
"""CIFAR's channel means and deviations on 0..1 (spec.md 2.1, from PC-DARTS' utils.py)."""

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalise(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draws(seed: int, stream: int, epoch: int, index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each index, N -> N: SplitMix64 seeded by a mix of seed, stream and epoch.

    Written out here because numpy's Generator streams may change between versions (NEP 19), and a search must
    give the same bytes for the same seed. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators" (2014), constants of Vigna's splitmix64.c.
    """
    key = np.zeros(1, np.uint64)
    for word in (seed, stream, epoch):
        key = _finalise((key ^ np.uint64(word & _MASK)) + _GOLDEN)
    return _finalise(key + (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def order(n: int, seed: int, stream: int, epoch: int) -> NDArray[np.int64]:
    """The shuffled order of 0..n-1 in one epoch of a stream."""
    return np.argsort(draws(seed, stream, epoch, np.arange(n)), kind="stable")


def halves(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two disjoint sorted index sets that cover 0..N-1, for labels (N): (weights, architecture).

    Stratified: each class is shuffled and split within one image of even; the odd ones go to alternate sides,
    so the two halves differ by at most one image (the weights get it).
    """
    by_class = np.lexsort((draws(seed, SPLIT, 0, np.arange(len(labels))), labels))
    return np.sort(by_class[0::2]), np.sort(by_class[1::2])


def augment(images: NDArray[np.uint8], seed: int, stream: int, epoch: int, index: NDArray[np.int64]) -> torch.Tensor:
    """uint8 B,H,W,C (C in {1, 3}) -> float32 B,C,H,W: zero-pad by 4, crop back, flip left-right, normalise.

    The top 24 bits of an image's draw choose the crop's row, the next 24 its column, the lowest bit the flip.
    The padding is black *before* normalisation, as torchvision's RandomCrop in PC-DARTS' transform pads.
    One channel is normalised by the mean of the three means and of the three deviations.
    """
    count, height, width, channels = images.shape
    bits = draws(seed, stream + _CROP, epoch, index)
    if (found := cropped(images, bits, PAD, _value_of_every_byte(channels))) is not None:
        return found
    span = np.uint64(2 * PAD + 1)
    rows = (((bits >> np.uint64(40)) * span) >> np.uint64(24)).astype(np.int64)
    columns = ((((bits >> np.uint64(16)) & np.uint64(0xFFFFFF)) * span) >> np.uint64(24)).astype(np.int64)
    flip = (bits & np.uint64(1)).astype(bool)
    padded = np.zeros((count, height + 2 * PAD, width + 2 * PAD, channels), np.uint8)
    padded[:, PAD:-PAD, PAD:-PAD] = images
    windows = sliding_window_view(padded, (height, width), axis=(1, 2))
    crops = np.ascontiguousarray(windows[np.arange(count), rows, columns])
    crops[flip] = crops[flip][..., ::-1]
    return normalised(crops)


@cache
def _value_of_every_byte(channels: int) -> torch.Tensor:
    """What `normalised` makes of each byte in each channel, C,256."""
    every = np.tile(np.arange(256, dtype=np.uint8), channels)
    return normalised(every.reshape(1, channels, 1, 256)).view(channels, 256)


def normalised(
    images: NDArray[np.uint8], mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> torch.Tensor:  # fmt: skip
    """uint8 B,C,H,W -> float32: (x / 255 - mean) / std by channel."""
    scale, shift = _normalisation(images.shape[1], mean, std)
    return torch.from_numpy(np.ascontiguousarray(images)).to(torch.float32).mul_(scale).sub_(shift)


def cut_out(
    images: torch.Tensor, side: int, seed: int, stream: int, epoch: int, index: NDArray[np.int64]
) -> torch.Tensor:  # fmt: skip
    """Zero a square of `side` pixels in each image, in place: B,C,H,W. Its centre is any pixel, so that it may reach
    over the border; an odd side loses a pixel. Source: DeVries & Taylor (2017), as DARTS' Cutout has it."""
    height, width = images.shape[2:]
    bits = draws(seed, stream + _CUTOUT, epoch, index)
    rows = ((bits >> np.uint64(40)) * np.uint64(height)) >> np.uint64(24)
    columns = (((bits >> np.uint64(16)) & np.uint64(0xFFFFFF)) * np.uint64(width)) >> np.uint64(24)
    half = side // 2
    for image, row, column in zip(images, rows.tolist(), columns.tolist(), strict=True):
        image[:, max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 0
    return images


def _normalisation(
    channels: int, means: tuple[float, ...], deviations: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(scale, shift), each C,1,1, with x * scale - shift == (x / 255 - mean) / std."""
    mean, std = np.array(means), np.array(deviations)
    if channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    scale, shift = 1 / (255 * std), mean / std
    return tuple(torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (scale, shift))  # type: ignore[return-value]
