"""The skip cell's Triton kernels against float64: values and every gradient, NaN around them and in fresh memory."""

import pytest
import torch
from ftso_fast.kernels import _tuning, skip_cell_triton, testing
from ftso_fast.kernels.skip_cell import reference

from ftso_fast import kernels

OPERATION = testing.OPERATIONS["skip_cell"]
CASES = [case for case in OPERATION.cases if case.B * case.C * case.H * case.W <= 7000]
HALF = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""A unit in the last place: the interpreter cuts off where a GPU rounds."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_float64_reference(case, verified, device):
    testing.check(case, [t.to(device) for t in OPERATION.inputs(case, 0)])
    verified("skip_cell", "triton")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("shape", "k"), [((2, 12, 5, 4), 4), ((2, 4, 4, 4), 1)], ids=str)
def test_half_precision_is_added_up_in_float32(shape, k, dtype, verified, device):
    """Only what is written is rounded: no value is off by more than its last place, or two of a sum's."""
    g = torch.Generator().manual_seed(1)
    x0, x1 = (torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for _ in range(2))
    weights = (torch.rand(14, generator=g) + 0.1).to(device, dtype).requires_grad_()
    out = kernels.skip_cell(x0, x1, weights, k)
    grad = torch.randn(out.shape, generator=g).to(device, dtype)
    found = [out, *torch.autograd.grad(out, (x0, x1, weights), grad)]
    exact = [t.detach().double().requires_grad_() for t in (x0, x1, weights)]
    want = reference(*exact, k)
    for got, right in zip(found, [want, *torch.autograd.grad(want, exact, grad.double())], strict=True):
        assert got.dtype == dtype
        slack = 1e-5 * right.abs().max()
        assert ((got.double() - right).abs() <= HALF[dtype] * right.abs() + slack).all()
    verified("skip_cell", "triton", dtype)


@pytest.mark.parametrize("k", [1, 4])
def test_reads_nothing_around_its_inputs(k, memory_of_nan, device):
    """Inputs are channels and images of larger tensors full of NaN; the output begins as NaN."""
    shape = (3, 4, 3, 5)
    g = torch.Generator().manual_seed(2)
    x0, x1 = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    weights = torch.rand(14, generator=g).to(device)
    around = [testing.VIEWS["last"](x0), testing.VIEWS["images"](x1), weights]
    leaves = [t.detach().requires_grad_() for t in around]
    out = kernels.skip_cell(*leaves, k)
    grad = testing.VIEWS["first"](torch.randn(out.shape, generator=g).to(device))
    exact = [t.double().requires_grad_() for t in (x0, x1, weights)]
    want = reference(*exact, k)
    gradients = torch.autograd.grad(want, exact, grad.double())
    for got, right in zip((out, *torch.autograd.grad(out, leaves, grad)), (want, *gradients), strict=True):
        assert testing.error(got.detach(), right.detach()) < 1e-6


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_only_the_gradients_that_are_wanted(needs, device):
    case = testing.Case("skip_cell", 2, 6, 3, 3, 2)
    tensors = [t.to(device).requires_grad_(bool(n)) for t, n in zip(OPERATION.inputs(case, 0), needs, strict=True)]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    wanted = needs.index(1)
    got, right = (
        torch.autograd.grad(f(*t, 2).square().sum(), t[wanted])[0]
        for f, t in ((kernels.skip_cell, tensors), (reference, exact))
    )
    assert testing.error(got, right) < 1e-6


@pytest.mark.parametrize("block", [{"IMAGES": 2, "PIXELS": 16}, {"IMAGES": 1, "PIXELS": 8}], ids=str)
def test_several_blocks_to_a_plane_and_several_planes_to_a_block(block, monkeypatch, device):
    monkeypatch.setattr(_tuning, "planes_in", lambda HW, size: block)
    case = testing.Case("skip_cell", 3, 4, 3, 5, 2)
    testing.check(case, [t.to(device) for t in OPERATION.inputs(case, 0)])


def test_a_wrong_step_of_the_shuffle_is_noticed(monkeypatch, device):
    """The seeded bug: cycles that begin at the right channels and are one channel too long or too short."""
    real = skip_cell_triton.cycles_of
    case = testing.Case("skip_cell", 1, 8, 2, 2, 4)
    for off in (-1, 1):
        changed = real(8, 4, torch.device(device)).clone()
        changed[-1, 1] += off
        monkeypatch.setattr(skip_cell_triton, "cycles_of", lambda C, k, device, table=changed: table)
        with pytest.raises(AssertionError):
            testing.check(case, [t.to(device) for t in OPERATION.inputs(case, 0)])


def test_equal_calls_give_equal_bytes(device):
    case = testing.Case("skip_cell", 3, 8, 5, 3, 4)
    tensors = [t.to(device) for t in OPERATION.inputs(case, 0)]
    first, second = (testing.values_and_gradients(kernels.skip_cell, tensors, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
