"""The optimizers against torch.optim, whose import the package spares its users."""

import pytest
import torch

from ftso_fast.optimizer import SGD, Adam, clip_norm

SHAPES = ((14,), (3, 4, 1, 1), (1,))


def tensors(dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in SHAPES]


def assert_close(ours, theirs, dtype, ulps=4):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= ulps * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0])
def test_adam(dtype, weight_decay, size):
    ours = tensors(dtype, 0)
    theirs = [t.clone().requires_grad_() for t in ours]
    adam = Adam(ours, 6e-2, (0.5, 0.999), 1e-8, weight_decay)
    peer = torch.optim.Adam(theirs, 6e-2, (0.5, 0.999), 1e-8, weight_decay)
    for step in range(8):
        grads = [size * g for g in tensors(dtype, step + 1)]
        adam.step(grads)
        for t, g in zip(theirs, grads, strict=True):
            t.grad = g.clone()
        peer.step()
        assert_close(ours, theirs, dtype)
    assert adam.steps == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 3e-4, 0.3])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(dtype, weight_decay, momentum, nesterov):
    ours = tensors(dtype, 0)
    theirs = [t.clone().requires_grad_() for t in ours]
    sgd = SGD(ours, momentum, weight_decay, nesterov)
    peer = torch.optim.SGD(theirs, 1.0, momentum, weight_decay=weight_decay, nesterov=nesterov)
    for step in range(8):
        lr = 0.1 / (step + 1)
        grads = tensors(dtype, step + 1)
        sgd.step(grads, lr)
        for t, g in zip(theirs, grads, strict=True):
            t.grad = g.clone()
        peer.param_groups[0]["lr"] = lr
        peer.step()
        assert_close(ours, theirs, dtype)


def test_first_step_of_adam_is_the_rate_times_the_sign():
    (before,) = [torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]
    after, g = before.clone(), before.flip(0) * 1e-3
    Adam([after], 6e-4, (0.5, 0.999), 1e-8, 0.0).step([g])
    clear = g.abs() > 1e-5
    assert clear.sum() > 900
    assert (after - before + 6e-4 * g.sign())[clear].abs().max() < 6e-4 * 2e-3
    assert not torch.equal(after, before)


def test_gradients_are_left_alone():
    ours, grads = tensors(torch.float32, 0), tensors(torch.float32, 1)
    kept = [g.clone() for g in grads]
    Adam(ours, 0.1, (0.5, 0.999), 1e-8, 0.1).step(grads)
    sgd = SGD(ours, 0.9, 0.1)
    sgd.step(grads, 0.1)
    sgd.step(grads, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [0.5, 5.0, 1e3, float("inf")])
def test_clip_norm(dtype, limit):
    ours = tensors(dtype, 0)
    theirs = [t.clone().requires_grad_() for t in ours]
    for t, g in zip(theirs, ours, strict=True):
        t.grad = g.clone()
    norm = clip_norm(ours, limit)
    peer = torch.nn.utils.clip_grad_norm_(theirs, limit)
    assert_close([norm], [peer], dtype)
    assert_close(ours, [t.grad for t in theirs], dtype)
    after = float(sum(g.double().square().sum() for g in ours)) ** 0.5
    assert after <= limit * (1 + 1e-6)
    assert (after < float(norm) * 0.999) == (limit < float(norm))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_shows(bad):
    grads = tensors(torch.float32, 0)
    grads[1][0] = bad
    assert not clip_norm(grads, 5.0).isfinite()
