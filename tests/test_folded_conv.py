"""Separable blocks with folded batch norms: values, what they equal in training mode's place, wrong calls."""

from itertools import pairwise, product

import pytest
import torch
from ftso_fast.kernels import _memory, fold_batch_norm, folded_conv, testing
from ftso_fast.kernels.folded_conv import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ftso_fast import kernels

FORMS = {"relu_conv_bn": (0, 1, 1), "dil_conv": (1, 1, 2), "separable": (1, 1, 1), "sep_conv": (1, 2, 1)}


def drawn(form, B, C, M, N, H, W, K, seed=0):
    """x, weights, biases of a form, with channels C, M between two blocks, N behind."""
    depthwise, blocks, _ = FORMS[form]
    g = torch.Generator().manual_seed(seed)
    channels = [C, M, N] if blocks == 2 else [C, N]
    weights, biases = [], []
    for before, behind in pairwise(channels):
        weights += [torch.randn(before, 1, K, K, generator=g)] if depthwise else []
        weights.append(torch.randn(behind, before, 1, 1, generator=g))
        biases.append(torch.randn(behind, generator=g))
    return torch.randn(B, C, H, W, generator=g), weights, biases


def error(form, x, weights, biases, stride):
    dilation = FORMS[form][2]
    want = reference(x.double(), [w.double() for w in weights], [b.double() for b in biases], stride, dilation)
    with torch.no_grad():
        got = folded_conv(x, weights, biases, stride, dilation)
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("form", "stride"), list(product(FORMS, (1, 2))), ids=str)
def test_every_form(form, stride, isa, verified):
    """Inputs are channels in the midst of NaN."""
    x, weights, biases = drawn(form, 3, 5, 6, 17, 9, 11, 5)
    with testing.arm("cpu", isa):
        assert error(form, testing.VIEWS["second"](x), weights, biases, stride) < 2e-6
    verified("folded_conv", "cpu", ways=["forward"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_meets_a_sentence(dtype, refuses):
    x, weights, biases = drawn("dil_conv", 2, 4, 4, 4, 8, 8, 3)
    tensors = x.to(dtype), [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    with kernels.use_backend("cpu"), pytest.raises(kernels.BackendError, match=f"expected float32, got {dtype}"):
        folded_conv(*tensors, dilation=2)
    refuses("folded_conv", "cpu", dtype)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    B=st.integers(1, 40),
    channels=st.tuples(*[st.integers(1, 13)] * 3),
    size=st.tuples(*[st.sampled_from([1, 2, 7, 8, 9, 14, 17, 28, 33])] * 2),
    K=st.sampled_from([3, 5]),
    stride=st.sampled_from([1, 2]),
    view=st.booleans(),
)
def test_any_shape_on_every_instruction_set(form, B, channels, size, K, stride, view):
    x, weights, biases = drawn(form, B, *channels, *size, K)
    if view:  # channels of a wider tensor
        x = torch.cat((x, x), 1).view(B, 2, *x.shape[1:])[:, 1]
    for name in kernels.available_isas():
        with testing.arm("cpu", name):
            assert error(form, x, weights, biases, stride) < 2e-6


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    B=st.integers(1, 20),
    size=st.tuples(*[st.sampled_from([2, 7, 8, 17, 32])] * 2),
    stride=st.sampled_from([1, 2]),
    where=st.sampled_from(["itself", "slices", "new"]),
)
def test_added_to_what_is_there(form, B, size, stride, where):
    """`plus` may be `out`, or another tensor; both channels of wider ones, in the midst of NaN."""
    x, weights, biases = drawn(form, B, 5, 6, 9, *size, 3)
    for name in kernels.available_isas():
        with testing.arm("cpu", name), torch.no_grad():
            want = folded_conv(x, weights, biases, stride, FORMS[form][2])
            plus = testing.VIEWS["second"](torch.randn(want.shape))
            want = want + plus
            room = torch.full((B, 2, *want.shape[1:]), float("nan"))
            out = {"itself": plus, "slices": room[:, 1], "new": None}[where]
            found = folded_conv(x, weights, biases, stride, FORMS[form][2], plus=plus, out=out)
            assert out is None or found is out
            torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
            assert room[:, 0].isnan().all(), "written beside it"


def test_pixels_are_picked_from_rows_that_lie_apart(isa, monkeypatch):
    """Without a copy: what a FactorizedReduce reads one pixel down and right."""
    x, weights, biases = drawn("relu_conv_bn", 3, 5, 6, 9, 12, 16, 1)
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda t: pytest.fail("copied") if t.dim() == 4 and len(t) == 3 else t
    )
    with testing.arm("cpu", isa):
        assert error("relu_conv_bn", x[:, :, 1:, 1:], weights, biases, 2) < 2e-6


def test_the_reference_adds_and_writes_too():
    x, weights, biases = drawn("sep_conv", 2, 4, 4, 4, 8, 8, 3)
    plus, out = torch.randn(2, 4, 8, 8), torch.empty(2, 4, 8, 8)
    with kernels.use_backend("reference"), torch.no_grad():
        assert folded_conv(x, weights, biases, plus=plus, out=out) is out
        assert torch.equal(out, reference(x, weights, biases, 1, 1) + plus)


def test_the_comparison_can_fail():
    x, weights, biases = drawn("sep_conv", 2, 4, 4, 4, 8, 8, 3)
    turned = [w.flip(2) if w.shape[1] == 1 else w for w in weights]
    with torch.no_grad():
        got = folded_conv(x, turned, biases)
    assert float((got - reference(x, weights, biases, 1, 1)).abs().max()) > 1e-2


def test_same_bytes_on_any_number_of_threads(isa):
    x, weights, biases = drawn("sep_conv", 37, 8, 8, 8, 14, 14, 5)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with testing.arm("cpu", isa), torch.no_grad():
                found.append(folded_conv(x, weights, biases))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nothing_is_left_unwritten(monkeypatch):
    monkeypatch.setattr(_memory, "pooled", lambda *shape: torch.full(shape, float("nan")))
    for form in FORMS:
        x, weights, biases = drawn(form, 3, 5, 6, 7, 9, 11, 3)
        with testing.arm("cpu", None), torch.no_grad():
            assert folded_conv(x, weights, biases, 2, FORMS[form][2]).isfinite().all()


@pytest.mark.parametrize("affine", [False, True])
def test_folding_equals_a_batch_norm_with_running_statistics(affine):
    x, weights, _ = drawn("dil_conv", 3, 4, 4, 6, 8, 8, 3)
    mean, variance = torch.randn(6), torch.rand(6) + 0.1
    both = (torch.rand(6) + 0.5, torch.randn(6)) if affine else ()
    raw = F.conv2d(F.conv2d(x.relu(), weights[0], padding=2, dilation=2, groups=4), weights[1])
    want = F.batch_norm(raw, mean, variance, *(both or (None, None)))
    pointwise, bias = fold_batch_norm(weights[1], mean, variance, both)
    with torch.no_grad():
        torch.testing.assert_close(folded_conv(x, [weights[0], pointwise], [bias], dilation=2), want)


def test_opcheck():
    x, weights, biases = drawn("sep_conv", 2, 4, 4, 4, 8, 8, 3)
    torch.library.opcheck(torch.ops.ftso_fast.folded_conv.default, (x, weights, biases, 1, 1))
    into = torch.ops.ftso_fast.folded_conv_into.default
    torch.library.opcheck(into, (x, weights, biases, 1, 1, torch.randn_like(x), torch.empty_like(x)))


def test_a_gradient_is_refused(refuses):
    x, weights, biases = drawn("dil_conv", 2, 4, 4, 4, 8, 8, 3)
    with pytest.raises(RuntimeError, match=r"expected no gradient"):
        folded_conv(x.requires_grad_(), weights, biases, dilation=2)
    refuses("folded_conv", "cpu", ways=["backward"])


X, (D, P), (BIAS,) = drawn("dil_conv", 2, 4, 4, 4, 8, 8, 3)
WRONG = {
    "x: expected shape": (X[0], [D, P], [BIAS]),
    "x: expected a floating type": (X.long(), [D, P], [BIAS]),
    "weights, biases: expected 1 and 1": (X, [D], [BIAS, BIAS]),
    r"weights\[0\]: expected shape \(4, 1, 3, 3\)": (X, [D[:3], P], [BIAS]),
    r"weights\[1\]: expected shape \(4, 4, 1, 1\)": (X, [D, P[:, :3]], [BIAS]),
    r"biases\[0\]: expected shape \(4,\)": (X, [D, P], [BIAS[:3]]),
    r"weights\[1\]: expected torch.float32 on cpu, got torch.float64": (X, [D, P.double()], [BIAS]),
    "stride: expected 1 or 2, got 3": (X, [D, P], [BIAS], 3),
    "dilation: expected 1 or 2, got True": (X, [D, P], [BIAS], 1, True),
    "dilation: expected 1 for 1 weights, got 2": (X, [P], [BIAS], 1, 2),
}


# a flag where a number belongs: torch makes it one before the operation sees it
CALLS = [(name, call) for name, call in (("public", folded_conv), ("torch.ops", torch.ops.ftso_fast.folded_conv))]
WRONG_CALLS = [(s, name, call) for s in WRONG for name, call in CALLS if name == "public" or "True" not in s]


@pytest.mark.parametrize(("sentence", "name", "call"), WRONG_CALLS, ids=[f"{s}-{name}" for s, name, _ in WRONG_CALLS])
def test_wrong_calls_meet_a_sentence_before_a_kernel(sentence, name, call):
    before = kernels.calls()
    arguments = (*WRONG[sentence], *(1, 1)[len(WRONG[sentence]) - 3 :])
    with pytest.raises((ValueError, TypeError), match=f"folded_conv: {sentence}"):
        call(*arguments)
    assert kernels.calls() == before


WIDE = torch.cat((X, X), 1)
NOT_THERE = {
    r"out: expected shape \(2, 4, 8, 8\), got \(2, 4, 4, 8\)": (X, {"out": X[:, :, :4]}),
    "plus: expected torch.float32 on cpu, got torch.float64": (X, {"plus": X.double()}),
    r"out: expected planes without gaps, got strides \(512, 128, 16, 2\)": (
        X,
        {"out": torch.zeros(2, 4, 8, 16)[..., ::2]},
    ),
    "out: expected memory of its own, got some of x's": (X, {"out": X}),
    "out: expected memory of its own, got some of": (WIDE[:, :4], {"out": WIDE[:, 1:5]}),
    "out: expected memory of its": (WIDE[:, :4], {"out": WIDE.view(-1)[200:712].view(2, 4, 8, 8)}),  # other strides
}


@pytest.mark.parametrize("sentence", NOT_THERE)
def test_where_it_cannot_go(sentence):
    x, given = NOT_THERE[sentence]
    before = kernels.calls()
    with pytest.raises((ValueError, TypeError), match=f"folded_conv: {sentence}"), torch.no_grad():
        folded_conv(x, [D, P], [BIAS], **given)
    assert kernels.calls() == before
