"""The emulator that runs CUDA kernels on the CPU: kernels with one known mistake each, and the same without.

A mistake counts as caught where the run is stopped by who is named here; without it every build and schedule must be
content. What plain runs cannot see is said too: a race between blocks gives the right sum when they run in turn.
"""

import subprocess

import pytest
from emulation import BUILDS, FAULT, ORDERS, POLICIES, STOPPED, Order, Policy, known_bad, run

GOOD = ["missing_barrier", "overwritten", "halo", "shared_overrun", "block_race", "static_array", "exchanges"]
GOOD += ["divergent_barrier", "left_early", "absent_lane", "small_launch"]

CAUGHT = [
    ("missing_barrier", "plain", None),
    ("missing_barrier", "tsan", "data race"),
    ("overwritten", "plain", None),
    ("overwritten", "tsan", "data race"),
    ("static_array", "tsan", "data race"),
    ("halo", "asan", "heap-buffer-overflow"),
    ("shared_overrun", "asan", "index 8 out of bounds"),
    ("shared_overrun", "plain", None),
    ("block_race", "tsan", "data race"),
    ("divergent_barrier", "plain", "barriers diverge"),
    ("left_early", "plain", "another has left the kernel"),
    ("absent_lane", "plain", "waits for lanes that do not come"),
    ("small_launch", "plain", "less shared memory than the kernel uses"),
    ("exchanges", "plain", None),
]


@pytest.fixture(scope="module", params=BUILDS)
def build(request):
    return request.param, known_bad(request.param)


@pytest.mark.parametrize("kernel", GOOD)
def test_a_right_kernel_passes_on_every_schedule(build, kernel):
    name, program = build
    for policy in POLICIES if name == "plain" else (Policy.RANDOM,):
        for order in ORDERS if name == "plain" else (Order.SHUFFLED,):
            done = run(program, kernel, "good", policy.value, order.value)
            assert done.returncode == 0, (policy, order, done.stdout, done.stderr)


@pytest.mark.parametrize(("kernel", "by", "sentence"), CAUGHT, ids=lambda p: str(p))
def test_a_mistake_is_caught(kernel, by, sentence):
    """sentence None: the result is wrong on some schedule."""
    program = known_bad(by)
    if sentence is None:
        assert 1 in {run(program, kernel, "bad", policy.value, 0).returncode for policy in POLICIES}
        return
    for policy in (Policy.ASCENDING, Policy.LAST_AHEAD):
        done = run(program, kernel, "bad", policy.value, 0)
        assert done.returncode == (FAULT if by == "plain" else STOPPED), done.stderr
        assert sentence in done.stderr
        assert "known_bad.cu:" in done.stderr or kernel == "small_launch"


def test_what_a_plain_run_cannot_see():
    """Threads in turn hide a missing barrier on most schedules, and blocks in turn a race between them on all."""
    program = known_bad("plain")
    assert all(run(program, "block_race", "bad", p.value, o.value).returncode == 0 for p in POLICIES for o in ORDERS)
    wrong = {p for p in POLICIES if run(program, "missing_barrier", "bad", p.value, 0).returncode == 1}
    assert wrong
    assert wrong != set(POLICIES)


def test_a_name_that_is_no_kernel():
    assert run(known_bad("plain"), "none", "good", 0, 0).returncode == 2


def test_sanitizers_see_kernels_only():
    """The scheduler is in no instrumented file: it would report its own switches of stacks."""
    program = known_bad("tsan")
    symbols = subprocess.run(["nm", "-u", program.parent / "cuda_emu.o"], capture_output=True, text=True, check=True)
    called = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert not {name for name in called if name.startswith(("__tsan_read", "__tsan_write", "__tsan_func"))}
