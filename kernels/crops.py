"""Crop, flip and normalise a batch of bytes in one pass, which the augmentation of a search's images waits for."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._backend import built, core
from ._memory import pooled

__all__ = ["cropped"]


def cropped(images: NDArray[np.uint8], bits: NDArray[np.uint64], pad: int, values: Tensor) -> Tensor | None:
    """Images (N, H, W, C) with `pad` black pixels around each, cut to their size at random places and some of them
    mirrored: float32 (N, C, H, W); None where the core was not built.

    bits: (N,), of which the highest 24 choose the first row of 2 `pad` + 1, the next 24 the first column, the lowest
    whether to mirror; values: what the bytes of each channel become, (C, 256) float32. Raises ValueError naming the
    argument, what was expected and what came.
    """
    if not built():
        return None
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"cropped: images: expected uint8 (N, H, W, C), got {images.dtype} {images.shape}")
    n, H, W, C = images.shape
    if bits.dtype != np.uint64 or bits.shape != (n,):
        raise ValueError(f"cropped: bits: expected uint64 of shape {(n,)}, got {bits.dtype} {bits.shape}")
    if not 0 <= pad < 1 << 20:
        raise ValueError(f"cropped: pad: expected 0 to {(1 << 20) - 1}, got {pad}")
    if values.dtype != torch.float32 or values.shape != (C, 256) or not values.is_contiguous():
        raise ValueError(
            f"cropped: values: expected contiguous float32 of shape {(C, 256)}, got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    images, bits, out = np.ascontiguousarray(images), np.ascontiguousarray(bits), pooled(n, C, H, W)
    addresses = images.ctypes.data, bits.ctypes.data, values.data_ptr(), out.data_ptr()
    core().crop(n, H, W, C, pad, *addresses, torch.get_num_threads())
    return out
