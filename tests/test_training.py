"""A training step against PyTorch's own optimizer, shards against their average written out, dropped paths, testing."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ftso_fast import Network, NumericalError, kernels
from ftso_fast.augment import draws
from ftso_fast.image_set import image_set
from ftso_fast.published import PUBLISHED
from ftso_fast.recipes import Recipe
from ftso_fast.training import Training, measured

RECIPE = Recipe("smoke", channels=4, cells=3, epochs=4, batch_size=24, lr=0.05, drop_path=0.0, cutout=0)
N = 56


def data(seed=0):
    rng = np.random.default_rng(seed)
    return image_set((rng.integers(0, 256, (N, 16, 16, 3), dtype=np.uint8), np.arange(N) % 4))


def training(recipe=RECIPE, shards=1, auxiliary=False):
    torch.manual_seed(1)
    net = Network(PUBLISHED["PDARTS"], recipe.channels, recipe.cells, 4, auxiliary=auxiliary)
    return Training(net, recipe, seed=3, shards=shards)


def batches(run, images, part=(0, 1), epoch=0):
    recipe = run.recipe
    return images.training_batches(seed=3, epoch=epoch, batch_size=recipe.batch_size, part=part)


def test_steps_are_torchs():
    run, images = training(), data()
    net = copy.deepcopy(run.net)
    sgd = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=3e-4)
    with kernels.use_backend("reference"):
        assert list(run.epoch(images, 0)) == [1, 2, 3]
        for _, batch in batches(run, images):
            sgd.zero_grad()
            F.cross_entropy(net(batch.images), batch.labels).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            sgd.step()
    for (name, got), want in zip(run.net.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)
    assert run.tally.images == N
    assert run.tally.seconds > 0
    assert 0 <= run.tally.waited < run.tally.seconds


def test_kernels_take_the_same_steps():
    found = []
    for backend in ("cpu", "reference"):
        run = training()
        with kernels.use_backend(backend):
            list(run.epoch(data(), 0))
        found.append(run)
    assert found[0].tally.loss == pytest.approx(found[1].tally.loss, rel=1e-3)
    for got, want in zip(*(run.weights for run in found), strict=True):
        assert float((got - want).detach().norm()) <= 2e-2 * float(want.detach().norm()) + 1e-4


def test_shards_have_batch_norms_of_their_own():
    """Their gradients' average, and that of the running statistics, written out for one step."""
    recipe = RECIPE.changed(batch_size=N)
    run, images = training(recipe, shards=2), data()
    start = copy.deepcopy(run.net)
    grads, buffers = [], []
    for shard in range(2):
        own = copy.deepcopy(start).train()
        ((_, batch),) = batches(run, images, (shard, 2))
        F.cross_entropy(own(batch.images), batch.labels).backward()
        grads.append([p.grad for p in own.parameters()])
        buffers.append([b for b in own.buffers() if b.is_floating_point()])
    assert list(run.epoch(images, 0)) == [1]
    for b, one, two in zip(run.running, *buffers, strict=True):
        assert torch.equal(b, (one + two) / 2)
    means = [(a + b) / 2 for a, b in zip(*grads, strict=True)]
    scale = min(1.0, 5.0 / (float(torch.stack([g.norm() for g in means]).norm()) + 1e-6))
    for w, before, g in zip(run.weights, start.parameters(), means, strict=True):
        torch.testing.assert_close(w, before - 0.05 * (scale * g + 3e-4 * before), rtol=1e-5, atol=1e-7)


def test_the_auxiliary_head_adds_to_the_loss():
    recipe = RECIPE.changed(auxiliary_weight=0.7, label_smoothing=0.1)
    run, images = training(recipe, auxiliary=True), image_set((np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 4))
    ((index, batch),) = images.training_batches(seed=0, epoch=0, batch_size=8)
    other = copy.deepcopy(run.net).train()
    loss, logits = run._loss(index, batch, 0)
    want, auxiliary = other(batch.images)
    assert torch.equal(logits, want)

    def smoothed(z):
        share = 0.9 * F.one_hot(batch.labels, 4) + 0.1 / 4
        return -(share * z.log_softmax(1)).sum(1).mean()

    torch.testing.assert_close(loss, smoothed(want) + 0.7 * smoothed(auxiliary))


def test_dropped_paths_depend_on_image_operator_and_epoch_only():
    run = training(RECIPE.changed(drop_path=0.4))
    assert run.drop_path(np.arange(5), 0) is None
    index = np.array([7, 3, 9])
    found = run.drop_path(index, 2)
    assert found.shape == (run.net.n_drop_paths, 3)
    assert torch.equal(found[:, [1]], run.drop_path(index[[1]], 2))
    assert not torch.equal(found, run.drop_path(index, 3))
    many = run.drop_path(np.arange(4000), 2)
    assert sorted(many.unique().tolist()) == pytest.approx([0, 1.25])
    assert float((many == 0).double().mean()) == pytest.approx(0.2, abs=0.01)
    bits = draws(3, 6, 2, np.array([7 * run.net.n_drop_paths + 1]))
    assert (found[1, 0] == 0) == (int(bits[0]) / 2**64 < 0.2)


def test_a_loss_that_is_not_finite_ends_it():
    run = training()
    run.net.classifier.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError, match=r"training: the loss of step 0 \(epoch 0\) is not finite"):
        list(run.epoch(data(), 0))


def test_measured_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    g = np.random.default_rng(0)
    x = g.standard_normal((7, 3, 4, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 2, 1, 0, 1])
    z = x.mean((2, 3))
    found = measured(Fixed(), image_set((x, labels)), 3)
    assert found["accuracy"] == pytest.approx((z.argmax(1) == labels).mean())
    assert found["top5"] == 1
    log = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert found["loss"] == pytest.approx(-log[np.arange(7), labels].mean(), rel=1e-5)
