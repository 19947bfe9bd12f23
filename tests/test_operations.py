"""Convolutions, reductions and mixed nodes on every instruction set: values and every gradient against float64."""

import importlib
import math

import pytest
import torch
from ftso_fast.kernels import _backend, cases, operators, testing
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ftso_fast import kernels

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [case for case in testing.CASES if case.op != "skip_cell"]
mix_module = importlib.import_module("ftso_fast.kernels.partial_mix")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_agrees_with_the_float64_reference(case, isa):
    with testing.arm("cpu", isa):
        testing.check(case)


def test_on_the_whole_no_tensor_errs_more_than_the_float32_references(isa):
    """The geometric mean, over all cases, of our error over its."""
    ratios = {}
    for case in CASES:
        operation = testing.OPERATIONS[case.op]
        drawn = [operation.inputs(case, i) for i in range(2)]
        with testing.arm("cpu", isa):
            wanted = testing.exact(case, drawn)
            ours = testing.worst(case, drawn, None, wanted)
        for kind, e in testing.worst(case, drawn, operation.reference, wanted).items():
            ratios.setdefault(kind, []).append(math.log(max(ours[kind], 1e-8) / max(e, 1e-8)))
    found = {kind: math.exp(sum(logs) / len(logs)) for kind, logs in ratios.items()}
    assert all(ratio < (1.3 if isa == "scalar" else 1) for ratio in found.values()), found  # it has no fused rounding


@pytest.mark.parametrize("case", testing.BENCHMARKS, ids=str)
def test_cases_name_themselves_and_count_their_work(case):
    operation = testing.OPERATIONS[case.op]
    forward, both = operation.bytes_moved(case)
    assert 4 * case.B * case.C * case.H * case.W < forward < both
    assert operation.flops(case)[1] == 3 * operation.flops(case)[0]
    assert [str(c) for c in (*testing.CASES, *testing.BENCHMARKS)].count(str(case)) == 1


@pytest.mark.parametrize("ties", [False, True])
def test_pools_of_8x8_images_side_by_side(isa, ties):
    """Two to a vector, and a single one behind them: 33 images make chunks of two and of three."""
    case = testing.Case("partial_mix", 33, 6, 8, 8, 2, operators=("max_pool_3x3", "avg_pool_3x3"), strides=(1, 1))
    drawn = testing.OPERATIONS[case.op].inputs(case, 0)
    with testing.arm("cpu", isa):
        testing.check(case, [(2 * t).round() / 2 if t.dim() == 4 else t for t in drawn] if ties else None)


# -- seeded bugs: each in the reference, so that the comparison must see it


def shifted_tap(patch):
    real = operators.separable

    def separable(x, weights, affine, stride, dilation, running=()):
        return real(x, (weights[0].roll(1, 3), weights[1]), affine, stride, dilation)

    patch.setattr(operators, "separable", separable)


def other_dilation(patch):
    real = operators.separable
    patch.setattr(operators, "separable", lambda x, w, affine, stride, *rest: real(x, w, affine, stride, 1))


def no_inner_relu(patch):
    real = operators.separable
    calls = []

    def separable(x, weights, affine, stride, dilation, running=()):
        calls.append(None)
        return (
            real(x, weights, affine, stride, dilation) if len(calls) % 2 else real(x - x.min(), weights, affine, 1, 1)
        )

    patch.setattr(operators, "separable", separable)


def swapped_halves(patch):
    real = torch.cat
    patch.setattr(operators.torch, "cat", lambda tensors, dim=0: real(tuple(tensors)[::-1], dim))


def padding_counted(patch):
    real = F.avg_pool2d
    patch.setattr(F, "avg_pool2d", lambda *args, count_include_pad: real(*args))


def no_shuffle(patch):
    patch.setattr(mix_module, "channel_shuffle", lambda x, k: x)


def other_eps(patch):
    patch.setattr(operators, "EPS", 2e-5)


def unbiased(patch):
    real = operators.batch_norm

    def batch_norm(x, affine=(), running=()):
        n = x.numel() / x.shape[1]
        return real(x, affine) * ((n - 1) / n) ** 0.5 if not affine else real(x, affine)

    patch.setattr(operators, "batch_norm", batch_norm)


def affine_dropped(patch):
    real = operators.batch_norm
    patch.setattr(operators, "batch_norm", lambda x, affine=(), running=(): real(x) + 0 * sum(a.sum() for a in affine))


SEEDED_BUGS = [
    (shifted_tap, "sep_conv_3x3-2x5x7x7"),
    (shifted_tap, "dil_conv_5x5-3x8x9x9-s2-affine"),
    (other_dilation, "dil_conv_3x3-2x5x7x7"),
    (no_inner_relu, "sep_conv_5x5-2x5x7x7"),
    (swapped_halves, "factorized_reduce-2x6x8x8-s2"),
    (padding_counted, "partial_mix-2x6x9x5-k3-ops2-rows"),
    (padding_counted, "partial_mix-2x16x8x8-k4-s11"),
    (no_shuffle, "partial_mix-2x12x9x31-k4-ops0123-s111"),
    (other_eps, "relu_conv_bn-2x5x7x7"),
    (unbiased, "relu_conv_bn-2x5x7x7"),
    (affine_dropped, "dil_conv_3x3-3x8x9x9-s2-affine"),
]
BY_NAME = {str(case): case for case in CASES}


@pytest.mark.parametrize(("bug", "name"), SEEDED_BUGS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_the_comparison_can_fail(bug, name, monkeypatch):
    case = BY_NAME[name]
    tensors = testing.OPERATIONS[case.op].inputs(case, 0)
    with testing.arm("cpu", None):
        found = testing.values_and_gradients(testing.OPERATIONS[case.op].function, tensors, case)
        testing.check(case)
        # the reference that `check` compares with is wrong now, and so is the float32 one: it is told what came out
        bug(monkeypatch)
        wrong = testing.values_and_gradients(testing.OPERATIONS[case.op].reference, [t.double() for t in tensors], case)
    monkeypatch.undo()
    assert max(testing.error(g, w) for g, w in zip(found, wrong, strict=True)) > 5 * testing.FLOOR


@pytest.mark.parametrize("operator", range(1, 8))
def test_the_weight_of_none_belongs_to_no_operator(operator, isa):
    """With every weight but that of `none` at zero the processed channels are zero; each other weight counts."""
    case = BY_NAME["partial_mix-2x16x8x8-k4-s11"]
    inputs = list(testing.OPERATIONS[case.op].inputs(case, 0))
    inputs[3] = torch.zeros_like(inputs[3])
    inputs[3][:, 0] = 1
    call = testing.OPERATIONS[case.op].call
    assert not call(kernels.partial_mix, case, inputs)[:, ::4].any()
    inputs[3][0, operator] = 1
    assert call(kernels.partial_mix, case, inputs)[:, ::4].any()


SHAPES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 13, 14, 15, 16, 17, 28, 31, 33, 56])
COMMON = {
    "B": st.sampled_from([2, 3, 5, 9, 17]),
    "H": SHAPES,
    "W": SHAPES,
    "view": st.sampled_from(list(testing.VIEWS)),
    "isa": st.sampled_from([name for name in kernels.available_isas() if name not in _backend.OTHERS]),
    "threads": st.sampled_from([1, 2, 3]),
}


def agrees(case, isa, threads):
    assume(case.B * case.H * case.W // max(case.strides) ** 2 >= 24)  # fewer give batch norms nothing to go by
    operation = testing.OPERATIONS[case.op]
    with testing.arm("cpu", isa):
        tensors = testing.check(case)
        alone = testing.values_and_gradients(operation.function, tensors, case)
        try:
            torch.set_num_threads(threads)
            shared = testing.values_and_gradients(operation.function, tensors, case)
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    **COMMON,
    name=st.sampled_from([*cases.ALL[4:], "relu_conv_bn", "factorized_reduce"]),
    C=st.integers(2, 19),
    C_out=st.integers(0, 21),
    stride=st.sampled_from([1, 2]),
    affine=st.booleans(),
)
def test_any_shape_of_an_operator(name, stride, isa, threads, **sizes):
    op = name[:-4] if name[-1].isdigit() else name
    stride = {"relu_conv_bn": 1, "factorized_reduce": 2}.get(op, stride)
    if op == "factorized_reduce":
        for size in ("C", "C_out", "H", "W"):
            sizes[size] += sizes[size] % 2
    agrees(testing.Case(op, operators=(name,), strides=(stride,), **sizes), isa, threads)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    **COMMON,
    k=st.sampled_from([1, 2, 3, 4]),
    width=st.integers(2, 5),  # one channel's own weight has no gradient behind a batch norm: nothing but rounding
    chosen=st.lists(st.sampled_from(cases.ALL), min_size=1, max_size=8, unique=True),
    strides=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=4),
)
def test_any_mixed_node(k, width, chosen, strides, isa, threads, **sizes):
    if 2 in strides:
        sizes["H"] += sizes["H"] % 2
        sizes["W"] += sizes["W"] % 2
        width += width % 2
    # over fewer pixels some channel of some draw is all but constant, and what is left of its digits is luck
    assume(sizes["B"] * sizes["H"] * sizes["W"] // max(strides) ** 2 >= 96)
    case = testing.Case("partial_mix", C=k * width, k=k, operators=tuple(chosen), strides=tuple(strides), **sizes)
    agrees(case, isa, threads)


def test_a_state_that_several_edges_share(isa):
    """The gradients of its edges add up."""
    case = BY_NAME["partial_mix-2x16x8x8-k4-s11"]
    x, _, *rest = testing.OPERATIONS[case.op].inputs(case, 0)
    call = testing.OPERATIONS[case.op].call
    found = []
    for first, second in ((x.clone(), None), (x.clone(), x.clone())):
        leaves = [t.requires_grad_() for t in (first, second) if t is not None]
        out = call(kernels.partial_mix, case, [leaves[0], leaves[-1], *rest])
        found.append((out, sum(torch.autograd.grad(out.square().sum(), leaves))))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_nan_is_not_hidden(isa):
    """A ReLU passes NaN on, as torch's does: what goes wrong before a cell shows behind it."""
    x, depthwise, pointwise = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 5, 5), torch.randn(4, 4, 1, 1)
    x[0, 0, 0, 0] = float("nan")
    with testing.arm("cpu", isa):
        found = [
            kernels.sep_conv(x, [depthwise, pointwise] * 2),
            kernels.dil_conv(x, [depthwise, pointwise]),
            kernels.relu_conv_bn(x, pointwise),
            kernels.factorized_reduce(x, pointwise, pointwise),
        ]
    assert all(out.isnan().any() for out in found)
