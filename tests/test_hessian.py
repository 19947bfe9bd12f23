"""The Hessian by the architecture: exact against differences and against torch, known null vectors, early stopping."""

import dataclasses
import json

import pytest
import torch
from networks import batch_of, net_of
from searching import arrays, small

from ftso_fast import DARTS, OPERATOR_SETS, NumericalError, UsageError, kernels
from ftso_fast.data import Batch
from ftso_fast.early_stop import EarlyStop
from ftso_fast.hessian import curvature, differences, hessian, largest, null_directions
from ftso_fast.nats_net import NatsNet
from ftso_fast.unrolled import loss_of

pytestmark = pytest.mark.usefixtures("one_thread")


def example(seed=0, k=4, operators="skip", size=8, B=6):
    space = dataclasses.replace(DARTS, operators=OPERATOR_SETS[operators])
    channels, layers = (8, 4) if operators == "skip" else (4, 3)
    net = net_of(seed, classes=4, channels=channels, layers=layers, k=k, space=space)
    return net, Batch(*batch_of(seed + 1, (B, 3, size, size), 4))


@pytest.fixture(scope="module", params=["skip", "3op"])
def known(request):
    """Operators, a network and a batch, and their Hessian."""
    net, batch = example(operators=request.param)
    return request.param, net, batch, hessian(net, batch)


SEEDS = [(seed, k, "skip") for seed in range(3) for k in (4, 1)]


@pytest.mark.parametrize(("seed", "k", "operators"), [*SEEDS, (0, 2, "3op")])
def test_differences_agree_in_float64(seed, k, operators):
    """Done when: within 5 % at a step of 1e-6 or less. They agree far better, and are told to be the Hessian."""
    net, batch = example(seed, k, operators)
    exact = curvature(net, batch)
    for step in (1e-6, 1e-7) if operators == "skip" else (1e-6,):
        with kernels.use_backend("reference"):
            found = curvature(net, batch, step)
        assert found.largest == pytest.approx(exact.largest, rel=1e-3)
        assert exact.is_hessian
        assert found.is_hessian


def test_each_second_derivative_agrees():
    net, batch = example()
    torch.testing.assert_close(differences(net, batch, 1e-6), hessian(net, batch), rtol=1e-3, atol=1e-6)


def test_the_exact_matrix_is_the_second_derivative():
    """torch.func's own Hessian of the loss as a function of one flat vector."""
    net, batch = example()
    betas = net.arch_parameters()
    flat = torch.cat([b.detach() for b in betas])

    def loss(vector):
        normal, reduce = (net.edge_weights(part) for part in vector.split(14))
        return torch.nn.functional.cross_entropy(net._textbook(batch.images, normal, reduce), batch.labels)

    torch.testing.assert_close(loss(flat), loss_of(net, batch))
    wanted = torch.autograd.functional.hessian(loss, flat)
    torch.testing.assert_close(hessian(net, batch), wanted, rtol=1e-9, atol=1e-12)


def test_null_directions(known):
    operators, net, batch, matrix = known
    null = null_directions(net)
    n = sum(t.numel() for t in net.arch_parameters())
    assert null.shape == ((8, 28) if operators == "skip" else (8 + 28, n))
    assert (matrix @ null.T).abs().max() < 1e-12 * matrix.abs().max() * n
    if operators == "skip":
        assert curvature(net, batch).null == 8
        assert curvature(net, batch, 1e-6).null in (0, 8)  # differences know the null space to their rounding only
        assert "8 null directions of 28" in str(curvature(net, batch))


def test_weight_decay_stands_on_the_diagonal():
    net, batch = example()
    plain, decayed = curvature(net, batch), curvature(net, batch, weight_decay=0.25)
    assert decayed.eigenvalues == pytest.approx([v + 0.25 for v in plain.eigenvalues])
    assert decayed.null == plain.null


def test_lanczos_finds_the_largest(known):
    _, net, batch, matrix = known
    wanted = float(torch.linalg.eigvalsh(matrix)[-1])
    assert largest(net, batch) == pytest.approx(wanted, rel=1e-6)
    assert largest(net, batch, steps=60) == pytest.approx(wanted, rel=1e-9)


def test_nats_bench():
    torch.manual_seed(0)
    net = NatsNet(4, 4, 1).double()
    batch = Batch(*batch_of(1, (6, 3, 8, 8), 4))
    matrix = hessian(net, batch)
    assert matrix.shape == (30, 30)
    assert (matrix @ null_directions(net).T).abs().max() < 1e-10
    assert curvature(net, batch, 1e-6).largest == pytest.approx(curvature(net, batch).largest, rel=1e-3)


def test_a_float32_difference_is_not_called_the_eigenvalue():
    net, batch = example()
    net = net.float()
    found = curvature(net, batch, 1e-3)
    assert not found.is_hessian
    assert "step 0.001" in str(found)
    assert "not the Hessian's" in str(found)
    assert "dominant eigenvalue" not in str(found)
    assert json.loads(json.dumps(found.to_dict()))["is_hessian"] is False
    assert not curvature(net.double(), batch, 1e-3).is_hessian
    assert curvature(net.float(), batch).is_hessian


def test_nothing_is_left_behind():
    net, batch = example()
    before = [t.detach().clone() for t in (*net.arch_parameters(), *net.weights())]
    wanted = [t.requires_grad for t in net.weights()]
    curvature(net, batch)
    curvature(net, batch, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (*net.arch_parameters(), *net.weights()), strict=True))
    assert [t.requires_grad for t in net.weights()] == wanted
    assert all(t.grad is None for t in (*net.arch_parameters(), *net.weights()))
    assert kernels.requested() is None or kernels.requested() in kernels.BACKENDS


@pytest.mark.parametrize("step", [0, -1e-6, float("inf"), float("nan")])
def test_steps(step):
    with pytest.raises(UsageError, match="step: expected a positive number or None"):
        curvature(*example(), step)


def test_not_finite():
    net, batch = example()
    with pytest.raises(NumericalError, match="second derivatives are not finite"):
        curvature(net, Batch(batch.images * float("nan"), batch.labels))


# -- DARTS-ES


def told(values):
    stop = EarlyStop(eigenvalues=list(values))
    return stop.back_to()


def test_the_rule():
    """Windows of five: the epoch looked at is two before the last, and compared with the one four before that."""
    flat = [1.0] * 40
    assert all(told(flat[:n]) is None for n in range(1, 40))
    growing = [1.0] * 16 + [10.0] * 10
    stops = [n for n in range(1, 27) if told(growing[:n]) is not None]
    assert stops[0] == 17  # l(14) = 2.8 > 1.3 l(10)
    assert told(growing[:17]) == 10
    early = [1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    assert all(told(early[:n]) is None for n in range(1, 20))
    assert told([1.0] * 14 + [1.2] * 5) is None  # 1.2 is not enough growth


@pytest.mark.parametrize("method", ["pc-darts", "darts"])
def test_a_search_stops_and_goes_back(monkeypatch, method):
    import importlib

    module = importlib.import_module("ftso_fast.early_stop")
    series = iter([1.0] * 13 + [5.0] * 20)
    monkeypatch.setattr(module, "largest", lambda net, batch: next(series))
    options = {"method": method, "channels": 4, "cells": 3, "warmup_epochs": 0, "weight_schedule": "constant"}
    data = arrays(16)
    found = small(data, "24ep", early_stop=True, **options)
    phase = found.topology_search
    assert phase.stopped_at == 10
    assert len(phase.eigenvalues) == 17
    assert phase.eigenvalues[0] == 1.0 + found.config.arch_weight_decay
    shorter = small(data, "11ep", **options).topology_search
    assert {c: a.after for c, a in phase.alphas.items()} == {c: a.after for c, a in shorter.alphas.items()}
    assert "back to the architecture of epoch 11" in str(found)
    assert json.loads(found.to_json())["stopped_at"] == 10


def test_a_search_that_does_not_stop():
    found = small(arrays(16), "1ep", method="darts", early_stop=True, channels=4, cells=3)
    phase = found.topology_search
    assert (len(phase.eigenvalues), phase.stopped_at) == (1, None)
    assert "did not grow enough to stop" in str(found)
    plain = small(arrays(16), "1ep", method="darts", channels=4, cells=3)
    assert plain.alphas == found.alphas
    assert plain.topology_search.eigenvalues == ()


def test_early_stop_is_for_the_baselines():
    with pytest.raises(UsageError, match="early_stop: expected pc-darts or darts, searching epochs"):
        small(early_stop=True, mode="2ep")
    with pytest.raises(UsageError, match="early_stop: expected pc-darts or darts, searching epochs"):
        small(early_stop=True, mode="2it", method="darts")
    with pytest.raises(UsageError, match="early_stop: expected True or False"):
        small(early_stop=1, mode="2ep", method="darts")
