"""Memory that kernels work in: huge pages where the system has them, kept for its next use.

A first touch of fresh memory costs several times the arithmetic that it feeds, so what a large buffer leaves behind is
handed out again. At most as much waits unused as is in use, apart from what the last user gave back.
"""

import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
SMALL = 1 << 18  # floats: below this, torch's allocator


def fresh(floats: int) -> Tensor:
    """Uninitialised float32, in huge pages where the system has them (they spare a first pass page faults)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(floats)
    pages = mmap.mmap(-1, 4 * floats + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(pages, dtype=torch.float32, count=floats, offset=begin)


_free: list[np.ndarray] = []
_in_use = 0


def pooled(floats: int) -> Tensor:
    """Uninitialised float32; when the tensor and all its views are gone, its memory waits for the next call."""
    global _in_use
    if floats < SMALL:
        return torch.empty(floats)
    fitting = [i for i, block in enumerate(_free) if floats <= block.size <= floats + floats // 4]
    if fitting:
        block = _free.pop(min(fitting, key=lambda i: _free[i].size))
    else:
        while _free and sum(b.size for b in _free) > _in_use:
            _free.pop(0)
        block = fresh(floats).numpy()
    _in_use += block.size
    view = block[:floats]
    weakref.finalize(view, _give_back, block)
    return torch.from_numpy(view)


def _give_back(block: np.ndarray) -> None:
    global _in_use
    _in_use -= block.size
    _free.append(block)


def release() -> None:
    """Give waiting memory back to the system."""
    _free.clear()
