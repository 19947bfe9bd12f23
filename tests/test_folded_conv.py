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
    monkeypatch.setattr(_memory, "pooled", lambda n: torch.full((n,), float("nan")))
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
