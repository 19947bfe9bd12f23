"""Memory that kernels work in: lent, joined with its neighbours, lent again, given back to the system."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ftso_fast.kernels import _memory

N = 1 << 20
LARGE = 8 << 20


@pytest.fixture(autouse=True)
def no_regions(monkeypatch):
    monkeypatch.setattr(_memory, "_regions", [])


def test_small_buffers_are_torchs():
    assert _memory.pooled(_memory.SMALL - 1).numel() == _memory.SMALL - 1
    assert not _memory._regions


def test_neighbours_that_nobody_uses_become_one_buffer():
    buffers = [_memory.pooled(N).fill_(i) for i in range(4)]
    at = [b.data_ptr() for b in buffers]
    view, buffers[1], buffers[2] = buffers[2][5:], None, None
    assert _memory.pooled(2 * N).data_ptr() not in at, "a view still uses the half of it"
    del view
    between = _memory.pooled(2 * N)
    assert between.data_ptr() == at[1]
    assert buffers[0].unique().tolist() == [0]
    assert buffers[3].unique().tolist() == [3]


def test_the_smallest_gap_that_fits_is_taken():
    sizes = (2 * N, N, N + N // 2, N)
    buffers = [_memory.pooled(n) for n in sizes]
    at = [b.data_ptr() for b in buffers]
    buffers[0] = buffers[2] = None
    assert _memory.pooled(N + N // 4).data_ptr() == at[2]


def test_threads_are_lent_memory_apart():
    """Who prepares batches works beside the kernels: no two hold the same memory at a time."""
    held, twice = set(), []

    def work(_):
        for _ in range(300):
            part = _memory.pooled(N)
            at = part.data_ptr()
            if at in held:
                twice.append(at)
            held.add(at)
            time.sleep(0)  # the others run
            held.discard(at)
            del part

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert not twice
    assert len(_memory._regions) == 1


def test_what_was_given_back_is_untouched_memory():
    lent, kept = _memory.pooled(2 * N).fill_(1), _memory.pooled(N).fill_(2)
    at = lent.data_ptr()
    del lent
    _memory.release()
    again = _memory.pooled(2 * N)
    assert again.data_ptr() == at
    assert not _memory.MAPS or not again.any()
    assert kept.unique().tolist() == [2]
    del again, kept
    _memory.release()
    assert not _memory._regions


def test_where_the_system_refuses_a_large_range_smaller_ones_serve(monkeypatch):
    real, asked = _memory._pages, []

    def pages(floats):
        asked.append(floats)
        if floats > 2 * _memory.REGION:
            raise OSError("refused")
        return real(floats)

    monkeypatch.setattr(_memory, "_pages", pages)
    monkeypatch.setattr(_memory, "MAPS", True)
    buffers = [_memory.pooled(_memory.REGION).fill_(i) for i in range(5)]
    assert [b.unique().tolist() for b in buffers] == [[float(i)] for i in range(5)]
    assert len(_memory._regions) > 1
    assert min(asked) >= _memory.REGION


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc/self/smaps_rollup")
def test_pages_for_brief_use_are_there_before_they_are_touched_and_huge_as_long_as_that_is_quick(monkeypatch):
    def bytes_of(kind):
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))

    def taken(brief, kind="Rss:"):
        before = bytes_of(kind)
        memory, huge = _memory.fresh(LARGE + 5, brief)
        kept.append(memory)
        return bytes_of(kind) - before, huge

    kept = []
    got, huge = taken(brief=False)
    assert (got < LARGE, huge) == (True, True), "untouched"
    monkeypatch.setattr(_memory, "PATIENCE", 0.0)
    got, huge = taken(brief=True, kind="AnonHugePages:")
    assert (got <= 16 << 20, huge) == (True, False), "the few that were under way"
    monkeypatch.setattr(_memory, "PATIENCE", 1e3)
    got, huge = taken(brief=True)
    if not huge:
        pytest.skip("this system hands pages over only where they are touched (Linux before 5.14)")
    assert got > 3.9 * LARGE
    before = bytes_of("Rss:")
    for memory in kept:
        assert memory.fill_(1).sum() == memory.numel()
    assert bytes_of("Rss:") - before < 4.5 * LARGE, "only what was untouched comes in"


def test_without_ranges_that_cost_nothing_torch_allocates(monkeypatch):
    monkeypatch.setattr(_memory, "MAPS", False)
    buffers = [_memory.pooled(_memory.REGION // 2).fill_(i) for i in range(3)]
    assert [region.memory.size for region in _memory._regions] == [_memory.REGION] * 2
    assert torch.stack(buffers).sum() == 3 * (_memory.REGION // 2)
