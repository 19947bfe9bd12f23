"""Memory that kernels work in: huge pages where they pay, kept for its next use.

A first touch of fresh memory costs several times the arithmetic that it feeds, so what a large buffer leaves behind is
handed out again, joined with its neighbours. They all lie in one range of addresses as long as the machine's memory is
large, most of which nobody ever touches: a gap too small for one buffer then is a part of one for the next.
"""

import math
import mmap
import os
import threading
import weakref
from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._backend import core, requested

HUGE_PAGE = 2 << 20
SMALL, PAGE, REGION = 1 << 18, 1 << 10, 1 << 23  # floats: torch allocates below SMALL; a region at least
PATIENCE = 1e-3  # seconds: a huge page takes a quarter of that; where a host is asked for it, 4 to 10 times that
MAPS = hasattr(mmap, "MADV_HUGEPAGE")  # Linux: a range of addresses costs no memory until it is touched


def _pages(floats: int) -> tuple[mmap.mmap, int]:
    """Untouched pages, huge ones where the system has them, and where among their bytes the first of these begins.
    Raises OSError."""
    pages = mmap.mmap(-1, 4 * floats + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge ones
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages, -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % HUGE_PAGE


def fresh(floats: int, brief: bool) -> tuple[Tensor, bool]:
    """Uninitialised float32, and whether all of it is meant to lie in huge pages.

    Kernels run 7 % faster in huge pages, and a machine of its own hands them over in a third of the time of small ones.
    But a virtual machine may give its host back what it does not use, which it does in huge pages alone: the first
    touch of one then takes thirty times as long. So for brief use the system hands pages over at once, and small ones
    as soon as the huge ones take their time.
    """
    if not MAPS:
        return torch.empty(floats), True
    pages, begin = _pages(floats)
    memory = torch.frombuffer(pages, dtype=torch.float32, count=floats, offset=begin)
    huge = not brief or core().populate(memory.data_ptr(), 4 * floats, PATIENCE, torch.get_num_threads())
    return memory, huge


class _Region:
    """Memory of which parts are lent; `free` holds the others as (begin, end), ascending and apart."""

    def __init__(self, floats: int) -> None:
        self.pages: mmap.mmap | None = None
        self.memory: NDArray[np.float32]
        if MAPS:
            self.pages, self.begin = _pages(floats)
            self.memory = np.frombuffer(self.pages, np.float32, floats, self.begin)
        else:
            self.memory = torch.empty(floats).numpy()
        self.free = [(0, floats)]
        self.returned: list[tuple[int, int]] = []  # by finalizers, which may run in the midst of anything

    def lend(self, floats: int, shape: Sequence[int]) -> Tensor | None:
        """So many, from the smallest gap that holds them, the first of them as a tensor."""
        self._settle()
        fitting = [gap for gap in self.free if gap[1] - gap[0] >= floats]
        if not fitting:
            return None
        begin, end = gap = min(fitting, key=lambda gap: gap[1] - gap[0])
        at = self.free.index(gap)
        self.free[at : at + 1] = [(begin + floats, end)] if begin + floats < end else []
        part = self.memory[begin : begin + math.prod(shape)].reshape(shape)
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

    def release(self) -> bool:
        """Gaps go back to the system; whether nothing is lent."""
        self._settle()
        for begin, end in self.free:
            first, last = -(-4 * begin // HUGE_PAGE) * HUGE_PAGE, 4 * end // HUGE_PAGE * HUGE_PAGE
            if self.pages is not None and first < last:
                self.pages.madvise(mmap.MADV_DONTNEED, self.begin + first, last - first)
        return self.free == [(0, self.memory.size)]


_regions: list[_Region] = []
_lending = threading.RLock()  # batches are prepared beside the kernels


def _region(floats: int) -> _Region:
    """For so many floats at least: as many as the machine has memory for, or fewer where the system refuses that."""
    wanted = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 if MAPS else REGION
    while wanted > max(floats, REGION):
        with suppress(OSError):
            return _Region(wanted)
        wanted //= 2
    return _Region(max(floats, REGION))


def pooled(*shape: int) -> Tensor:
    """Uninitialised float32; when the tensor and all its views are gone, its memory waits for the next call. It is no
    view itself: torch lets nobody change views in place that an operation returns."""
    floats = math.prod(shape)
    if floats < SMALL:
        return torch.empty(shape)
    whole = -(-floats // PAGE) * PAGE
    with _lending:
        for region in _regions:
            part = region.lend(whole, shape)
            if part is not None:
                return part
        release()
        _regions.append(_region(whole))
        part = _regions[-1].lend(whole, shape)
    assert part is not None
    return part


def room(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised, of x's type and on its device; where kernels of the CPU run, from the memory that they keep."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or requested() == "reference":
        return x.new_empty(shape)
    return pooled(*shape)


def release() -> None:
    """Give memory that nobody uses back to the system."""
    with _lending:
        _regions[:] = [region for region in _regions if not region.release()]
