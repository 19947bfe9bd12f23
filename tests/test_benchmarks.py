"""What the benchmarks say of the machine and of the chain of launches, without a stopwatch."""

import copy

import pytest
import stages
import tables
from arm import Iteration, batches, traced
from ftso_fast.kernels import testing
from measure import assert_equal

from ftso_fast import CIFAR10, kernels

STEPS = ("architecture step", "weight step")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_multiply_add_is_counted(isa, threads):
    before = kernels.calls().get(f"fma_peak/{isa}", 0)
    once, thrice = (testing.fma_peak(rounds, threads) for rounds in (1000, 3000))
    assert kernels.calls()[f"fma_peak/{isa}"] == before + 2
    assert thrice == 3 * once
    assert once >= threads * 1000 * 2 * 16


@pytest.fixture(scope="module")
def summaries():
    state = Iteration("cpu", batches("cpu", 4))
    return {name: stages.summary(traced(step, 2)) for name, step in state.steps.items()}


@pytest.mark.parametrize("step", STEPS)
def test_no_launch_more_than_the_batch_norms_force(summaries, step):
    least = stages.least_barriers()[step]
    assert least == {"forward": 11, "backward": 9 if step == "architecture step" else 10}
    assert summaries[step]["launches"] == {which: barriers + 1 for which, barriers in least.items()}


@pytest.mark.parametrize("step", STEPS)
def test_stages_are_named_by_their_cells(summaries, step):
    names = [stage["stage"] for stage in summaries[step]["stages"]]
    assert len(set(names)) == len(names)
    assert names[:3] == ["stem_covariance", "stem_fwd", "c0 cell_fwd"]
    cells = [int(name[1]) for name in names if name[0] == "c"]
    once = [0, 1, 2, 2, 3, 4, 5, 5, 6, 7]
    assert cells == once + once[::-1]
    assert len(once) == CIFAR10.cells + 2


def test_a_peer_that_computes_something_else_is_not_timed():
    want = {"loss": [2.0], "betas 0": [1.0, -4.0]}
    assert_equal({"loss": [2.0], "betas 0": [1.0, -4.01]}, want, {"loss": 0, "betas": 1e-2}, "a step")
    with pytest.raises(AssertionError, match=r"a step: betas 0: differs by 2\.5e-02 of the largest value, allowed 1e"):
        assert_equal({"loss": [2.0], "betas 0": [1.1, -4.0]}, want, {"loss": 0, "betas": 1e-2}, "a step")
    with pytest.raises(AssertionError, match="a step: computed"):
        assert_equal({"loss": [2.0]}, want, {"": 1}, "a step")
    with pytest.raises(AssertionError, match="differs by nan"):
        assert_equal({"loss": [1.0, float("nan"), 1.0]}, {"loss": [1.0] * 3}, {"": 1}, "a step")


DOCUMENT = {"date": "2", "machine": {"cpu": "x"}, "form": "long", "load": 0, "warnings": ["b"], "rows": {"r": 1}}


def test_sessions_on_the_same_code_are_joined():
    before = copy.deepcopy(DOCUMENT) | {"date": "1", "warnings": ["a", "b"], "rows": {"r": 0, "s": 2}}
    assert tables.joined(DOCUMENT, before) == DOCUMENT | {"warnings": ["a", "b"], "rows": {"r": 1, "s": 2}}
    assert tables.joined(DOCUMENT, before | {"machine": {"cpu": "y"}}) == DOCUMENT
    assert tables.joined(DOCUMENT, before | {"form": "short"}) == DOCUMENT
