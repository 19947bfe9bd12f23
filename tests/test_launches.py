"""Launches and bytes of a search's steps on a GPU, counted by dispatch, against eager PyTorch's; docs/launches.md."""

import launches
import pytest
import torch
from launches import Count
from torch._subclasses.fake_tensor import FakeTensorMode

from ftso_fast.config import SearchConfig


@pytest.fixture(scope="module")
def counted():
    return {name: launches.steps(name == "ours", 256, SearchConfig()) for name in ("ours", "eager")}


def share(counted, step, what):
    return counted["ours"][step][what] / counted["eager"][step][what]


def test_launches_of_an_architecture_step(counted):
    assert share(counted, "architecture", 0) <= 1 / 20


def test_launches_of_a_weight_step(counted):
    assert share(counted, "weights", 0) <= 1 / 20


@pytest.mark.parametrize("step", ["architecture", "weights"])
def test_bytes(counted, step):
    assert share(counted, step, 1) <= 1 / 4


def test_the_page_shows_what_is_counted(counted):
    assert launches.page(counted) == launches.PAGE.read_text()


def test_what_counts_as_a_launch():
    with FakeTensorMode(), Count() as count:
        x = torch.empty(4, 4)
        x.view(16)[2:].t()
        torch._foreach_add([x] * 130, [x] * 130)
        x.zero_().clone()
    assert count.launches == {"_foreach_add": 3, "zero_": 1, "clone": 1}
    assert count.bytes == 64 * (2 + 130 + 1 + 2) - 64


def test_our_kernels_are_counted_where_they_start(counted):
    """Of a weight step nothing else is left."""
    assert not counted["ours"]["weights"][2].launches
    assert counted["ours"]["architecture"][0] - sum(counted["ours"]["architecture"][2].launches.values()) == 43
