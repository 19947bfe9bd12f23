"""The skip cell on every backend and instruction set: values, gradients, memory, threads, bad calls."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import machine_isas
from ftso_fast.kernels import _backend, testing
from ftso_fast.kernels.skip_cell import channel_shuffle, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from ftso_fast import kernels

SKIP_CELL_CASES = testing.OPERATIONS["skip_cell"].cases


@pytest.mark.parametrize("case", SKIP_CELL_CASES, ids=str)
def test_cpu_agrees_with_the_float64_reference(case, isa):
    with testing.arm("cpu", isa):
        testing.check(case)


@pytest.mark.parametrize("case", [c for c in SKIP_CELL_CASES if c.C not in (c.k, c.k**2) and c.k > 1], ids=str)
def test_the_comparison_can_fail(case, monkeypatch):
    """The inverse shuffle in the reference: another permutation wherever C is not k*k."""
    module = sys.modules[reference.__module__]
    monkeypatch.setattr(module, "channel_shuffle", lambda x, k: channel_shuffle(x, x.shape[1] // k))
    with pytest.raises(AssertionError, match="errors of output"), testing.arm("cpu", None):
        testing.check(case)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 3),
    k=st.sampled_from([1, 2, 4, 8]),
    width=st.integers(1, 9),
    H=st.integers(1, 40),
    W=st.integers(1, 40),
)
def test_any_shape(B, k, width, H, W):
    case = testing.Case("skip_cell", B, k * width, H, W, k)
    for name in kernels.available_isas():
        with testing.arm("cpu", name):
            testing.check(case)


@pytest.mark.parametrize("case", SKIP_CELL_CASES, ids=str)
def test_every_output_is_written_and_nothing_around_it(case, isa):
    x0, x1, weights = testing.OPERATIONS["skip_cell"].inputs(case, 0)
    grad = torch.randn(case.B, 4 * case.C, case.H, case.W)
    guard = 64
    sizes = {"out": grad.numel(), "g0": x0.numel(), "g1": x1.numel(), "gw": 14}
    buffers = {name: torch.full((n + 2 * guard,), float("nan")) for name, n in sizes.items()}
    # inputs sit between NaNs as well: a read beyond them would show
    inside = [torch.full((t.numel() + 2 * guard,), float("nan")) for t in (x0, x1, weights, grad)]
    for buffer, t in zip(inside, (x0, x1, weights, grad), strict=True):
        buffer[guard:-guard] = t.flatten()
    at = {name: buffer[guard:].data_ptr() for name, buffer in buffers.items()}
    p0, p1, pw, pg = (buffer[guard:].data_ptr() for buffer in inside)
    sizes = (case.B, case.C, case.H * case.W, case.k)
    core = _backend.core()
    core.skip_cell_fwd(*sizes, p0, p1, pw, at["out"], 2)
    core.skip_cell_bwd(*sizes, pg, p0, p1, pw, at["g0"], at["g1"], at["gw"], 2)
    for name, buffer in buffers.items():
        assert buffer[guard:-guard].isfinite().all(), f"{name} holds values that nobody wrote"
        assert buffer[:guard].isnan().all(), f"something wrote before {name}"
        assert buffer[-guard:].isnan().all(), f"something wrote behind {name}"
    for buffer, t in zip(inside, (x0, x1, weights, grad), strict=True):
        assert torch.equal(buffer[guard:-guard], t.flatten()), "an input changed"


def test_same_bytes_on_any_number_of_threads(isa):
    case = testing.Case("skip_cell", 7, 16, 12, 20, 4)
    tensors = testing.OPERATIONS["skip_cell"].inputs(case, 0)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(testing.values_and_gradients(kernels.skip_cell, tensors, case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_asked_for_is_computed(wanted, isa):
    case = testing.Case("skip_cell", 2, 8, 6, 6, 4)
    tensors = testing.OPERATIONS["skip_cell"].inputs(case, 0)
    _, *every = testing.values_and_gradients(kernels.skip_cell, tensors, case)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    out = kernels.skip_cell(*leaves, case.k)
    weights = torch.arange(out.numel(), dtype=torch.float64).mul_(0.7548776662466927).frac_().sub_(0.4)
    out.backward(weights.float().view(out.shape))
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, every[i])
    needs = [i in wanted for i in range(3)]
    found = torch.ops.ftso_fast.skip_cell_bwd(torch.ones_like(out), *tensors, case.k, needs)
    assert [g.numel() > 0 for g in found] == needs


def test_views_that_are_not_contiguous():
    base = torch.randn(2, 8, 6, 10)
    args = (base.transpose(2, 3), base.flip(1).transpose(2, 3), torch.rand(28)[::2])
    with testing.arm("cpu", kernels.isa()):
        testing.check(testing.Case("skip_cell", 2, 8, 10, 6, 4), args)


def test_empty_batch():
    x = torch.randn(0, 8, 4, 4, requires_grad=True)
    out = kernels.skip_cell(x, x, torch.rand(14), 4)
    assert out.shape == (0, 32, 4, 4)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_opcheck():
    for needs in ([True, True, True], [False, True, False]):
        x0, x1, weights = testing.OPERATIONS["skip_cell"].inputs(testing.Case("skip_cell", 2, 8, 5, 6, 4), 0)
        grad = torch.randn(2, 32, 5, 6)
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x0, x1, weights), needs, strict=True)]
        torch.library.opcheck(torch.ops.ftso_fast.skip_cell.default, (*leaves, 4))
        torch.library.opcheck(torch.ops.ftso_fast.skip_cell_bwd.default, (grad, x0, x1, weights, 4, needs))


@pytest.mark.filterwarnings("default")
def test_compiled_whole_graph_is_equal():
    case = testing.Case("skip_cell", 2, 16, 8, 8, 4)
    tensors = testing.OPERATIONS["skip_cell"].inputs(case, 0)
    compiled = torch.compile(kernels.skip_cell, fullgraph=True)
    eager = testing.values_and_gradients(kernels.skip_cell, tensors, case)
    with testing.arm("cpu", kernels.isa()):
        found = testing.values_and_gradients(compiled, tensors, case)
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_reference_has_first_and_second_derivatives(k):
    args = [torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    args.append(torch.rand(14, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda *a: reference(*a, k), args)
    assert torch.autograd.gradgradcheck(lambda *a: reference(*a, k), args)


def test_second_derivative_on_cpu_says_where_it_is():
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    weights = torch.rand(14, requires_grad=True)
    (g,) = torch.autograd.grad(kernels.skip_cell(x, x, weights, 4).square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*use_backend\('reference'\)"):
        torch.autograd.grad(g.sum(), weights)


@pytest.mark.parametrize(
    ("C", "k", "order"),
    [(16, 4, 2), (32, 4, 5), (64, 4, 3), (128, 4, 7), (256, 4, 4), (16, 2, 4), (32, 2, 5), (64, 2, 6)],
)
def test_order_of_the_shuffle(C, k, order):
    start = torch.arange(C, dtype=torch.float32).view(1, C, 1, 1)
    x, found = channel_shuffle(start, k), 1
    while not torch.equal(x, start):
        x, found = channel_shuffle(x, k), found + 1
    assert found == order


def test_shuffle_is_the_index_map_of_the_specification():
    C, k = 24, 4
    x = torch.randn(1, C, 1, 1)
    y = channel_shuffle(x, k)
    for g in range(k):
        for c in range(C // k):
            assert y[0, c * k + g] == x[0, g * (C // k) + c]


X = torch.randn(2, 8, 4, 4)
W = torch.rand(14)
BAD = {
    "x0-type": ((X.long(), X, W, 4), TypeError, r"skip_cell: x0: expected a floating type, got torch\.int64"),
    "x0-dims": (
        (X[0], X, W, 4),
        ValueError,
        r"skip_cell: x0: expected shape \(B, C, H, W\), got \(8, 4, 4\)",
    ),
    "x1-shape": (
        (X, X[:1], W, 4),
        ValueError,
        r"skip_cell: x1: expected the shape of x0, .* got \(1, 8, 4, 4\)",
    ),
    "x1-type": (
        (X, X.double(), W, 4),
        TypeError,
        r"skip_cell: x1: expected the type of x0, .* got torch\.float64",
    ),
    "x1-device": (
        (X, X.to("meta"), W, 4),
        ValueError,
        r"skip_cell: x1: expected the device of x0, cpu, got meta",
    ),
    "weights-shape": (
        (X, X, W[:13], 4),
        ValueError,
        r"skip_cell: weights: expected shape \(14,\), got \(13,\)",
    ),
    "weights-type": ((X, X, W.double(), 4), TypeError, r"skip_cell: weights: expected the type of x0"),
    "weights-dims": (
        (X, X, W[None], 4),
        ValueError,
        r"skip_cell: weights: expected shape \(14,\), got \(1, 14\)",
    ),
    "k-zero": ((X, X, W, 0), ValueError, r"skip_cell: k: expected a divisor of the 8 channels, got 0"),
    "k-negative": ((X, X, W, -4), ValueError, r"skip_cell: k: expected a divisor of the 8 channels, got -4"),
    "k-divides-not": ((X, X, W, 3), ValueError, r"skip_cell: k: expected a divisor of the 8 channels, got 3"),
    "k-float": ((X, X, W, 4.0), ValueError, r"skip_cell: k: expected a divisor of the 8 channels, got 4\.0"),
    "k-bool": ((X, X, W, True), ValueError, r"skip_cell: k: expected a divisor of the 8 channels, got True"),
}


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_call_is_one_sentence_and_reaches_no_kernel(name, backend):
    args, kind, message = BAD[name]
    before = kernels.calls()
    with kernels.use_backend(backend), pytest.raises(kind, match=message):
        kernels.skip_cell(*args)
    assert kernels.calls() == before


@pytest.mark.parametrize("name", [n for n in BAD if n not in ("x1-device", "k-float", "k-bool")])
def test_bad_call_of_the_registered_operation(name):
    args, _, _ = BAD[name]
    before = kernels.calls()
    with pytest.raises((ValueError, TypeError), match="skip_cell"):
        torch.ops.ftso_fast.skip_cell(*args)
    assert kernels.calls() == before


def test_bad_gradient_of_the_registered_operation():
    with pytest.raises(ValueError, match=r"skip_cell_bwd: grad: expected \(2, 32, 4, 4\)"):
        torch.ops.ftso_fast.skip_cell_bwd(X, X, X, W, 4, [True] * 3)
    with pytest.raises(ValueError, match="skip_cell_bwd: needs: expected three flags, got 2"):
        torch.ops.ftso_fast.skip_cell_bwd(torch.randn(2, 32, 4, 4), X, X, W, 4, [True] * 2)


def test_backend_asked_for_by_name_never_falls_back():
    args = (X.double(), X.double(), W.double(), 4)
    assert kernels.skip_cell(*args).dtype == torch.float64  # the automatic choice takes the reference
    with (
        kernels.use_backend("cpu"),
        pytest.raises(kernels.BackendError, match=r"expected float32, got torch\.float64"),
    ):
        kernels.skip_cell(*args)
    unknown = r"backend: expected one of cuda, triton, cpu, reference, got 'gpu'"
    with pytest.raises(kernels.BackendError, match=unknown), kernels.use_backend("gpu"):
        pass
    unknown = r"force_isa: expected one of .* got 'sse9'"
    with pytest.raises(kernels.BackendError, match=unknown), kernels.use_isa("sse9"):
        pass


def test_reference_runs_no_kernel():
    before = kernels.calls()
    with kernels.use_backend("reference"):
        kernels.skip_cell(X, X, W, 4)
    assert kernels.calls() == before


def run(code, *arguments, **env):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_environment_forces_the_instruction_set():
    """In a child for each, which is the first to look at the variable: torch is imported once."""
    code = """
import os, sys, torch
for isa in sys.argv[1:]:
    if not os.fork():
        os.environ["FTSO_ISA"] = isa
        from ftso_fast import kernels
        x = torch.randn(1, 4, 2, 2)
        kernels.skip_cell(x, x, torch.rand(14))
        print(*kernels.calls(), flush=True)
        os._exit(0)
    os.wait()
"""
    ran = [f"skip_cell_fwd/{_backend.OTHERS.get(isa, isa)}" for isa in machine_isas()]
    assert run(code, *machine_isas()).stdout.split() == ran


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FTSO_ISA", "mmx", "FTSO_ISA: expected one of"),
        ("FTSO_BACKEND", "gpu", "FTSO_BACKEND: expected one of cuda, triton, cpu, reference, got 'gpu'"),
    ],
)
def test_environment_with_an_unknown_name(variable, value, message):
    code = (
        "import torch; from ftso_fast import kernels; x = torch.randn(1, 4, 2, 2);"
        "kernels.skip_cell(x, x, torch.rand(14))"
    )
    done = run(code, **{variable: value})
    assert done.returncode == 1
    assert message in done.stderr


def test_threads_are_torchs_own():
    code = """
import os, torch
from ftso_fast import kernels
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
x = torch.randn(64, 16, 32, 32)
x.relu()
before = count()
kernels.skip_cell(x, x, torch.rand(14))
assert count() == before >= 3, (before, count())
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(maps) == 1, maps
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    one = run(code.replace("torch.set_num_threads(3)", "torch.set_num_threads(1)").replace(">= 3", ">= 1"))
    assert one.returncode == 0, one.stderr


def test_forked_child_does_not_hang():
    code = """
import os, signal, torch
from ftso_fast import kernels
x = torch.randn(8, 16, 8, 8)
want = kernels.skip_cell(x, x, torch.ones(14))
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    from ftso_fast.kernels import _backend
    out = torch.empty_like(want)
    w = torch.ones(14)
    _backend.core().skip_cell_fwd(8, 16, 64, 4, x.data_ptr(), x.data_ptr(), w.data_ptr(), out.data_ptr(), 2)
    os._exit(0 if out.numpy().tobytes() == want.numpy().tobytes() else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
