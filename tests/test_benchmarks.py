"""What the benchmarks say of the machine and of the chain of launches, without a stopwatch."""

import copy
import subprocess
from dataclasses import replace

import lab
import operations_table
import pytest
import stages
import tables
import torch
from arm import ALL_OPERATORS, PC_DARTS, Iteration, batches, traced
from conftest import every_isa
from ftso_fast.kernels import testing
from measure import assert_equal, running
from operations import directions, operation_calls
from torch.utils.flop_counter import FlopCounterMode
from training import Training, inferring

from ftso_fast import CIFAR10, kernels

STEPS = ("architecture step", "weight step")


@pytest.mark.parametrize("threads", [1, 2, 3])
@every_isa
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


# -- the operations


@pytest.mark.parametrize("op", ["sep_conv", "dil_conv", "partial_mix", "skip_cell"])
@pytest.mark.parametrize("arm", ["eager", "channels_last", "cpu"])
def test_arms_compute_the_same_operation(op, arm):
    """The timed calls themselves, in small; the peer channels_last gets everything in its format."""
    case = next(c for c in testing.OPERATIONS[op].cases if not c.affine and not c.view and c.C_out == 0)
    tensors = testing.OPERATIONS[op].inputs(case, 0)
    with running("eager"):
        want = operation_calls("eager", case, tensors)["forward+backward"]()
    with running(arm):
        calls = operation_calls(arm, case, tensors)
        found, alone = calls["forward+backward"](), calls["forward"]()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(alone, found[:1])
    if arm == "channels_last" and op in ("sep_conv", "dil_conv"):  # a shuffle leaves another format
        assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", ["sep_conv", "dil_conv"])
def test_arms_infer_the_same(op):
    case = next(c for c in testing.OPERATIONS[op].cases if not c.affine and not c.view and c.C_out == 0)
    tensors = testing.OPERATIONS[op].inputs(case, 0)
    found = {}
    for arm in ("eager", "channels_last", "cpu"):
        with running(arm):
            found[arm] = operation_calls(arm, case, tensors)["inference"]()
    torch.testing.assert_close(found["cpu"], found["eager"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["channels_last"], found["eager"], rtol=1e-4, atol=1e-5)
    timed = [case for case in testing.BENCHMARKS if case.op == op and "inference" in directions(case)]
    assert {(c.C, c.H) for c in timed} == {(36, 32), (72, 16), (144, 8)}


def test_every_case_is_a_row_of_the_page():
    calls = [f"{case} {direction}" for case in testing.BENCHMARKS for direction in directions(case)]
    assert all(operations_table.parsed(call) for call in calls)
    assert operations_table.parsed("PC-DARTS iteration") is None
    assert operations_table.parsed("sep_conv_3x3-96x36x32x16 forward+backward") == {
        "operator": "sep_conv_3x3",
        "direction": "forward+backward",
        "B": 96,
        "C": 36,
        "H": 32,
        "W": 16,
    }
    sizes = {case.B for case in testing.BENCHMARKS if case.op in ("sep_conv", "dil_conv")}
    assert sizes == set(operations_table.SIZES.values())


def pair(operator, B, value, direction="forward+backward"):
    return {"operator": operator, "B": B, "direction": direction} | {m: {"ratio": value} for m in ("kept", "default")}


def test_medians_are_over_the_sizes_of_an_operator():
    rows = [pair("sep_conv_3x3", 96, r) for r in (9.0, 0.8, 0.5)] + [pair("dil_conv_5x5", 256, 3.0)]
    rows += [pair("sep_conv_3x3", 96, 50.0, "forward"), pair("partial_mix", 96, 50.0)]
    lines = operations_table.medians(rows, "evaluation")
    assert [c.strip() for c in lines[2].split("|")[1:-1]] == ["sep_conv_3x3", "**0.80**", "**0.80**", "1.5"]
    assert len(lines) == 3
    partial = operations_table.medians(rows, "partial-channel")
    assert [c.strip() for c in partial[2].split("|")[1:-1]] == ["all operators", "3.00", "3.00", "2.5"]


def test_groups_count_in_both_directions():
    """torch's own counter takes a depthwise convolution's weight gradient for that of a full one."""
    x, w = torch.ones(2, 6, 8, 8, requires_grad=True), torch.ones(6, 1, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=lab.GROUPED) as counter:
        torch.nn.functional.conv2d(x, w, padding=1, groups=6).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 6 * 8 * 8) * 9


@pytest.fixture(scope="module")
def small_pc_darts():
    found = {}
    for name in ("eager", "channels_last", "cpu"):
        with running(name):
            state = Iteration(name, batches(name, 4), replace(PC_DARTS, cells=3), ALL_OPERATORS)
            state.both()
        found[name] = state.values()
    return found


@pytest.mark.parametrize("arm", ["channels_last", "cpu"])
def test_arms_take_the_same_pc_darts_iteration(small_pc_darts, arm):
    want, found = small_pc_darts["eager"], small_pc_darts[arm]
    assert {name.split()[0] for name in want} == {"weight", "betas", "alphas", "loss"}
    assert_equal(found, want, {"loss": 1e-5, "betas": 0.1, "alphas": 0.1, "weight": 0.5}, arm)


def test_a_compilation_that_takes_too_long_is_left_out_and_told():
    laboratory, tries = lab.Lab.__new__(lab.Lab), []

    def measured(*what):
        tries.append(what)
        raise subprocess.TimeoutExpired("arm.py", lab.LONGEST)

    laboratory.measured, laboratory.warnings, laboratory.in_time = measured, [], {}
    assert [laboratory.compiles("PC-DARTS", n) for n in (2, 1)] == [False, False]
    assert len(tries) == len(laboratory.warnings) == 1
    assert laboratory.compiles("iteration", 1)
    assert not laboratory.compiles("search", 1)


# -- the network that is trained


@pytest.mark.parametrize("arm", ["channels_last", "cpu"])
def test_arms_take_the_same_training_step(arm):
    found, saved = {}, {}
    for name in ("eager", arm):
        with running(name):
            state = Training(name, batch=4, channels=4, cells=5)
            state.step()
            found[name], saved[name] = state, state.saved_mb()
    assert found[arm].losses == pytest.approx(found["eager"].losses, rel=1e-4)
    pairs = zip(*(state.sgd.velocity for state in found.values()), strict=True)
    worst = max(float((a - b).norm() / (a.norm() + 1e-6)) for a, b in pairs)
    assert worst < 0.3  # masks flip
    assert saved[arm] < (0.55 if arm == "cpu" else 1.1) * saved["eager"]


def test_arms_infer_with_the_same_network():
    found = {}
    for arm in ("eager", "channels_last", "cpu"):
        with running(arm), torch.no_grad():
            net, images = inferring(arm, batch=4, channels=4, cells=5)
            found[arm] = net(images)
            norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            assert len(norms) > 50 if arm == "cpu" else len(norms) <= 2  # a peer's are folded but for two halvings
    for arm in ("channels_last", "cpu"):
        torch.testing.assert_close(found[arm], found["eager"], rtol=1e-3, atol=1e-3)


def test_the_networks_section_of_the_page():
    def row(ms, peak):
        peers = {"eager": {"ms": 9.0, "n": 3, "peak MB": 200.0, "saved MB": 100.0}}
        own = {"threads": 2, "ms": ms, "n": 4, "rate": 5.0, "unit": "GFLOP/s", "peers": peers, "opponent": "eager"}
        return own | {"ratio": 9 / ms, "peak MB": peak, "saved MB": 40.0}

    pieces = {"training step": 3.0, "first training step": 4.0, "network inference": 10.0}
    rows = {f"{p} cpu/x 2 {m}": row(ms, 80.0) for p, ms in pieces.items() for m in ("kept", "default")}
    found = {"machine": {"isa": "x"}, "rows": rows, "date": "d", "form": "long", "load": 0, "warnings": ["w"]}
    page = operations_table.network(found, "stem")
    assert "3.00 eager 9.00 (3)" in page
    assert "**0.90** eager 9.00 (3)" in page
    assert "80 MB; eager 200 MB: 40% of the smallest" in page
    assert "Kept for backward: 40 MB; eager 100 MB: 40% of the smallest" in page
    assert "WARNING: w" in page
