"""Memory that kernels work in: huge pages where the system has them, kept for its next use.

A first touch of fresh memory costs several times the arithmetic that it feeds, so what a large buffer leaves behind is
handed out again, joined with its neighbours.
"""

import mmap
import weakref
from bisect import bisect
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HUGE_PAGE = 2 << 20
SMALL, PAGE, REGION = 1 << 18, 1 << 10, 1 << 23  # floats: torch allocates below SMALL; a region at least


def fresh(floats: int) -> Tensor:
    """Uninitialised float32, in huge pages where the system has them (they spare a first pass page faults)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(floats)
    pages = mmap.mmap(-1, 4 * floats + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(pages, dtype=torch.float32, count=floats, offset=begin)


class _Region:
    """Fresh memory of which parts are lent; `free` holds the others as (begin, end), ascending and apart."""

    def __init__(self, floats: int) -> None:
        self.memory: NDArray[np.float32] = fresh(floats).numpy()
        self.free = [(0, floats)]
        self.returned: list[tuple[int, int]] = []  # by finalizers, which may run in the midst of anything

    def lend(self, floats: int) -> Tensor | None:
        """A part from the smallest gap that holds it."""
        self._settle()
        fitting = [gap for gap in self.free if gap[1] - gap[0] >= floats]
        if not fitting:
            return None
        begin, end = gap = min(fitting, key=lambda gap: gap[1] - gap[0])
        at = self.free.index(gap)
        self.free[at : at + 1] = [(begin + floats, end)] if begin + floats < end else []
        part = self.memory[begin : begin + floats]
        weakref.finalize(part, self.returned.append, (begin, begin + floats)).atexit = False
        return torch.from_numpy(part)

    def _settle(self) -> None:
        while self.returned:
            self._take_back(*self.returned.pop())

    def _take_back(self, begin: int, end: int) -> None:
        at = bisect(self.free, (begin, end))
        before, after = self.free[:at], self.free[at:]
        if before and before[-1][1] == begin:
            begin = before.pop()[0]
        if after and after[0][0] == end:
            end = after.pop(0)[1]
        self.free = [*before, (begin, end), *after]

    @property
    def unused(self) -> bool:
        self._settle()
        return self.free == [(0, self.memory.size)]


_regions: list[_Region] = []


def pooled(floats: int) -> Tensor:
    """Uninitialised float32; when the tensor and all its views are gone, its memory waits for the next call."""
    if floats < SMALL:
        return torch.empty(floats)
    whole = -(-floats // PAGE) * PAGE
    for region in _regions:
        part = region.lend(whole)
        if part is not None:
            return part[:floats]
    release()
    _regions.append(_Region(max(whole, REGION)))
    part = _regions[-1].lend(whole)
    assert part is not None
    return part[:floats]


def release() -> None:
    """Give memory that nobody uses back to the system."""
    _regions[:] = [region for region in _regions if not region.unused]
