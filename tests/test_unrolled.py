"""DARTS' second-order gradient against central differences of the loss that it differentiates, in float64."""

import dataclasses

import pytest
import torch
from networks import batch_of
from torch.nn import functional as F

from ftso_fast import DARTS, PRIMITIVES, SuperNet
from ftso_fast.data import Batch
from ftso_fast.optimizer import SGD
from ftso_fast.unrolled import unrolled_gradient

pytestmark = pytest.mark.usefixtures("one_thread")

LR = 0.3  # so large that the second-order term matters


@pytest.fixture(params=["darts", "pc-darts"])
def setting(request):
    """A tiny network with momentum under way, and its two batches."""
    darts = request.param == "darts"
    space = dataclasses.replace(
        DARTS, n_nodes=2, operators=PRIMITIVES if darts else ("none", "avg_pool_3x3", "sep_conv_3x3")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SuperNet(3, 4, 3, 1 if darts else 2, 3, space, None, not darts).double()
        for t in net.arch_parameters():
            t.data.normal_(0, 0.3)
        sgd = SGD(net.weights(), 0.9, 3e-4)
        sgd.velocity = [0.1 * torch.randn_like(w) for w in net.weights()]
    return net, *(Batch(*batch_of(seed, (6, 3, 8, 8), 3)) for seed in (1, 2)), sgd


def unrolled_loss(net, valid, train, sgd):
    """L_val(w - lr (momentum v + dL_train/dw + decay w), a), written out; the network is left as it was."""
    weights = list(net.parameters())
    kept = [w.detach().clone() for w in weights]
    grads = torch.autograd.grad(F.cross_entropy(net(train.images), train.labels), weights)
    with torch.no_grad():
        for w, v, g in zip(weights, sgd.velocity, grads, strict=True):
            w.sub_(LR * (0.9 * v + g + 3e-4 * w))
        loss = float(F.cross_entropy(net(valid.images), valid.labels))
        for w, k in zip(weights, kept, strict=True):
            w.copy_(k)
    return loss


def differences(net, valid, train, sgd, directions, h=1e-6):
    """The derivative of the unrolled loss along each direction of the architecture's space."""
    found = []
    for direction in directions:
        ends = []
        for side in (h, -2 * h, h):
            with torch.no_grad():
                for t, d in zip(net.arch_parameters(), direction, strict=True):
                    t.add_(d, alpha=side)
            ends.append(unrolled_loss(net, valid, train, sgd))
        found.append((ends[0] - ends[1]) / (2 * h))
    return torch.tensor(found)


def along(gradient, directions):
    return torch.tensor(
        [sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True)) for direction in directions]
    )


def directions_of(net, n=12):
    g = torch.Generator().manual_seed(5)
    return [[torch.randn(t.shape, generator=g, dtype=t.dtype) for t in net.arch_parameters()] for _ in range(n)]


def test_central_differences_of_the_unrolled_loss(setting):
    net, valid, train, sgd = setting
    directions = directions_of(net)
    wanted = differences(net, valid, train, sgd, directions)
    size = float(wanted.abs().max())

    def error(gradient):
        return float((along(gradient, directions) - wanted).abs().max()) / size

    loss, exact = unrolled_gradient(net, valid, train, sgd, LR, radius=1e-5)
    assert float(loss) == pytest.approx(unrolled_loss(net, valid, train, sgd), rel=1e-12)
    assert error(exact) < 1e-4
    first = torch.autograd.grad(F.cross_entropy(net(valid.images), valid.labels), net.arch_parameters())
    assert error(first) > 0.2
    without = unrolled_gradient(net, valid, train, SGD(net.weights(), 0.9, 3e-4), LR, radius=1e-5)[1]
    assert error(without) > 1e-2  # momentum left out
    weights = net.weights()
    _, own = arch_gradient(net, train, weights, [w.detach().clone() for w in weights])
    ahead = [w.detach() - LR * d for w, d in zip(weights, sgd.directions(own), strict=True)]
    assert error(arch_gradient(net, valid, weights, ahead)[0]) > 1e-2  # the second derivatives left out


def arch_gradient(net, batch, weights, values):
    """dL/da where the weights have these values; they are put back."""
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, v in zip(weights, values, strict=True):
            w.copy_(v)
    found = torch.autograd.grad(F.cross_entropy(net(batch.images), batch.labels), [*net.arch_parameters(), *weights])
    with torch.no_grad():
        for w, k in zip(weights, kept, strict=True):
            w.copy_(k)
    n = len(net.arch_parameters())
    return found[:n], found[n:]


def test_the_step_of_the_difference_is_darts(setting):
    """h = 0.01 / |g|. So far a step crosses kinks of the ReLU: the method's own number, not the derivative."""
    net, valid, train, sgd = setting
    weights = net.weights()
    now = [w.detach().clone() for w in weights]
    _, own = arch_gradient(net, train, weights, now)
    steps = [0.9 * v + g + 3e-4 * w for v, g, w in zip(sgd.velocity, own, now, strict=True)]
    direct, g = arch_gradient(net, valid, weights, [w - LR * d for w, d in zip(now, steps, strict=True)])
    h = 0.01 / torch.cat([x.flatten() for x in g]).norm()
    up, down = (
        arch_gradient(net, train, weights, [w + side * x for w, x in zip(now, g, strict=True)])[0] for side in (h, -h)
    )
    _, found = unrolled_gradient(net, valid, train, sgd, LR)
    for f, d, u, o in zip(found, direct, up, down, strict=True):
        assert torch.allclose(f, d - LR * (u - o) / (2 * h), rtol=1e-6, atol=1e-8)


def test_at_rate_zero_it_is_the_first_order_gradient(setting):
    net, valid, train, sgd = setting
    _, found = unrolled_gradient(net, valid, train, sgd, 0.0)
    wanted = torch.autograd.grad(F.cross_entropy(net(valid.images), valid.labels), net.arch_parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_nothing_is_left_moved(setting):
    net, valid, train, sgd = setting
    tensors = [*net.weights(), *net.arch_parameters(), *sgd.velocity]
    before = [t.detach().clone() for t in tensors]
    unrolled_gradient(net, valid, train, sgd, LR)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert all(t.requires_grad and t.grad is None for t in (*net.weights(), *net.arch_parameters()))
    broken = Batch(valid.images[:, :1], valid.labels)
    with pytest.raises(ValueError, match="images: expected shape"):
        unrolled_gradient(net, broken, train, sgd, LR)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_directions_are_what_a_step_subtracts(setting):
    net, _, train, sgd = setting
    for own in (sgd, SGD(net.weights(), 0.9, 3e-4)):
        grads = torch.autograd.grad(F.cross_entropy(net(train.images), train.labels), net.weights())
        before = [w.detach().clone() for w in net.weights()]
        directions = own.directions(grads)
        own.step(grads, 0.5)
        for w, b, d in zip(net.weights(), before, directions, strict=True):
            assert torch.allclose(w, b - 0.5 * d, rtol=1e-12, atol=1e-14)
