"""Convolutions, reductions, pools and mixed nodes in Triton against float64: values and every gradient."""

import pytest
import torch
from ftso_fast.kernels import _node_plan, _tuning, operators, pools_triton, sep_conv_triton, testing

from ftso_fast import kernels

OPERATORS = tuple(operators.OPERATORS)[:8]
CASES = [
    case
    for op, limit in (("relu_conv_bn", 700), ("factorized_reduce", 700), ("partial_mix", 1100))
    for case in testing.OPERATIONS[op].cases
    if case.B * case.C * case.H * case.W * len(case.strides) <= limit
]
CASES += [
    testing.Case("sep_conv", 2, 5, 7, 7, operators=("sep_conv_3x3",)),
    testing.Case("sep_conv", 2, 3, 6, 5, operators=("sep_conv_5x5",), strides=(2,), C_out=4, affine=True),
    testing.Case("dil_conv", 3, 4, 5, 9, operators=("dil_conv_3x3",), strides=(2,), C_out=18, view="last"),
    testing.Case("dil_conv", 2, 20, 4, 3, operators=("dil_conv_5x5",), affine=True, view="second"),
    testing.Case("partial_mix", 2, 8, 6, 4, 4, OPERATORS, (2, 1)),
    testing.Case("partial_mix", 1, 6, 5, 7, 3, (*OPERATORS[:4], "dil_conv_3x3"), (1, 1, 1), view="images"),
]
MIXED = testing.Case("partial_mix", 2, 4, 4, 6, 2, ("max_pool_3x3", "skip_connect", "sep_conv_3x3"), (2, 1))
DILATED = testing.Case("dil_conv", 2, 3, 5, 4, operators=("dil_conv_3x3",), strides=(2,), C_out=4, affine=True)
REDUCE = testing.Case("factorized_reduce", 2, 3, 4, 6, operators=("factorized_reduce",), strides=(2,), C_out=4)
SMALL = {"BN": 16, "BC": 16, "BP": 16, "num_warps": 4}


def drawn(case, device, dtype=torch.float32):
    """As the case has them in memory; NaN lies around views."""
    tensors = testing.OPERATIONS[case.op].inputs(case, 0)
    return [t.to(device) if dtype == t.dtype else t.to(device, dtype) for t in tensors]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_float64_reference(case, device, verified):
    testing.check(case, drawn(case, device))
    verified(case.op, "triton")


@pytest.mark.parametrize(
    "case",
    [
        testing.Case("sep_conv", 2, 3, 5, 6, operators=("sep_conv_3x3",), strides=(2,), affine=True),
        testing.Case("partial_mix", 2, 4, 6, 6, 2, ("max_pool_3x3", "avg_pool_3x3", "skip_connect"), (2, 1)),
        testing.Case("relu_conv_bn", 3, 5, 3, 5, operators=("relu_conv_bn",), C_out=18),
    ],
    ids=str,
)
def test_several_tiles_and_fresh_memory_full_of_nan(case, device, memory_of_nan, monkeypatch):
    monkeypatch.setattr(_tuning, "block", lambda *of: dict(SMALL))
    testing.check(case, drawn(case, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], REDUCE, *CASES[-6:-4], DILATED, MIXED], ids=str)
def test_half_precision_is_added_up_in_float32(case, dtype, device, verified):
    """Beside the float64 reference on the same rounded numbers: what is written is rounded, and little else."""
    tensors = drawn(case, device, dtype)
    operation = testing.OPERATIONS[case.op]
    got = testing.values_and_gradients(operation.function, tensors, case)
    want = testing.values_and_gradients(operation.reference, [t.double() for t in tensors], case)
    largest = max(float(w.abs().max()) for w in want[1:])
    assert all(t.dtype == dtype for t in got)
    for g, w in zip(got, want, strict=True):
        assert testing.error(g.double(), w, 0.1 * largest) < (0.06 if dtype == torch.bfloat16 else 0.008)
    verified(case.op, "triton", dtype)


def test_a_mean_far_above_the_deviation_loses_no_more_digits_than_torch(device):
    case = testing.Case("relu_conv_bn", 4, 3, 5, 5, operators=("relu_conv_bn",))
    x, w = drawn(case, device)
    testing.check(case, [x * 1e-3 + 100, w.abs()])


def test_nan_stays(device):
    case = testing.Case("partial_mix", 1, 4, 4, 4, 2, ("max_pool_3x3",), (2,))
    x, *rest = drawn(case, device)
    x[0, 3, 1, 1] = float("nan")
    out = testing.OPERATIONS[case.op].call(kernels.partial_mix, case, [x, *rest])
    want = testing.OPERATIONS[case.op].call(testing.OPERATIONS[case.op].reference, case, [x, *rest])
    assert torch.equal(out.isnan(), want.isnan())
    assert out.isnan().any()


def test_equal_calls_give_equal_bytes(device):
    case = MIXED
    tensors = drawn(case, device)
    first, second = (testing.values_and_gradients(kernels.partial_mix, tensors, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_states_gradient(device):
    case = testing.Case("dil_conv", 1, 4, 5, 4, operators=("dil_conv_3x3",))
    x, *weights = drawn(case, device)
    x.requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    got, want = (torch.autograd.grad(f(x, weights, (), 1), x, grad)[0] for f in (kernels.dil_conv, operators.dil_conv))
    assert testing.error(got, want) < 1e-5


# -- seeded bugs: each of these would pass if the comparison above could not fail


@pytest.fixture
def memory_of_zeros(monkeypatch):
    """A mistake may leave memory unwritten: that it holds zeros is the hardest case to notice, and always the same."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)


def change_block(name, by):
    """A plan whose blocks have one number changed."""

    def block_row(plan, b, real=_node_plan.Plan._block_row):
        return real(plan, b | {name: b[name] + by})

    return block_row


@pytest.mark.parametrize(("name", "by"), [("origin", 1), ("D", 1), ("K", -2)], ids=str)
@pytest.mark.usefixtures("memory_of_zeros")
def test_a_wrong_halo_or_place_is_noticed(name, by, device, monkeypatch):
    monkeypatch.setattr(_node_plan.Plan, "_block_row", change_block(name, by))
    _node_plan._plan.cache_clear()
    case = testing.Case("dil_conv", 1, 4, 5, 4, operators=("dil_conv_5x5",))
    with pytest.raises(AssertionError, match="errors of output and gradients"):
        testing.check(case, drawn(case, device))
    _node_plan._plan.cache_clear()


@pytest.mark.usefixtures("memory_of_zeros")
def test_a_product_that_stops_early_is_noticed(device, monkeypatch):
    real = _node_plan.Plan._block_row
    monkeypatch.setattr(_node_plan.Plan, "_block_row", lambda p, b: [n - (i == 7) for i, n in enumerate(real(p, b))])
    _node_plan._plan.cache_clear()
    case = testing.Case("relu_conv_bn", 1, 4, 5, 4, operators=("relu_conv_bn",))
    with pytest.raises(AssertionError, match="errors of output and gradients"):
        testing.check(case, drawn(case, device))
    _node_plan._plan.cache_clear()


def test_parts_are_not_launched_by_themselves():
    assert not hasattr(sep_conv_triton, "aot_cases")
    assert not hasattr(pools_triton, "aot_cases")
