"""Crop, flip and normalise a batch of bytes in one pass, which the augmentation of a search's images waits for."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._backend import built, core

__all__ = ["cropped"]


def cropped(
    images: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    flips: NDArray[np.bool_],
    pad: int,
    values: Tensor,
) -> Tensor | None:
    """Images (N, H, W, C) with `pad` black pixels around each, cut from row and column (N), 0 to 2 `pad`, mirrored
    where flips (N): float32 (N, C, H, W); None where the core was not built.

    values: what the bytes of each channel become, (C, 256) float32. Raises ValueError naming the argument.
    """
    if not built():
        return None
    n, H, W, C = images.shape
    for name, given, kind in (("rows", rows, np.int64), ("columns", columns, np.int64), ("flips", flips, np.bool_)):
        if given.shape != (n,) or given.dtype != kind:
            raise ValueError(f"cropped: {name}: expected {n} of {np.dtype(kind)}, got {given.shape} of {given.dtype}")
    for name, given in (("rows", rows), ("columns", columns)):
        if n and not 0 <= given.min() <= given.max() <= 2 * pad:
            raise ValueError(f"cropped: {name}: expected 0 to {2 * pad}, got {given.min()} to {given.max()}")
    if images.dtype != np.uint8:
        raise ValueError(f"cropped: images: expected uint8, got {images.dtype}")
    if values.shape != (C, 256) or values.dtype != torch.float32:
        raise ValueError(f"cropped: values: expected float32 of shape {(C, 256)}, got {values.dtype} {values.shape}")
    arrays = [np.ascontiguousarray(a) for a in (images, rows, columns, flips)]
    values, out = values.contiguous(), torch.empty(n, C, H, W)
    addresses = (a.ctypes.data for a in arrays)
    core().crop(n, H, W, C, pad, *addresses, values.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out
