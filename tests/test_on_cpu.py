"""A search's steps on the cpu backend, which take no autograd, against the plain ones, which do."""

import dataclasses
import importlib
from functools import partial

import pytest
import torch
from ftso_fast.kernels._backend import core

from ftso_fast import NumericalError, SearchConfig, SuperNet, kernels
from ftso_fast.batch import Batch
from ftso_fast.on_cpu import CpuRun
from ftso_fast.optimizer import Adam
from ftso_fast.run import Run

skip_net = importlib.import_module("ftso_fast.kernels.skip_net")
CONFIG = SearchConfig(cells=4, channels=8, batch_size=6, weight_decay=0.01)
SPEC = kernels.NetSpec(8, 4, 4)


def batches(n):
    g = torch.Generator().manual_seed(0)
    return [Batch(torch.randn(6, 3, 8, 8, generator=g), torch.randint(4, (6,), generator=g)) for _ in range(n)]


def a_run(kind=CpuRun, **changes):
    torch.manual_seed(1)
    return kind(SuperNet(4, 8, 4), dataclasses.replace(CONFIG, **changes))


def steps(run, n=3):
    for number, batch in enumerate(batches(n)):
        run.architecture_step(batch)
        run.weight_step(batch, 0.05 / (number + 1))
    return run


@pytest.mark.parametrize(
    "changes",
    [{}, {"nesterov": True}, {"grad_clip": None, "momentum": 0.0}, {"grad_clip": 0.01, "arch_grad_clip": 1e-3}],
    ids=["as a rule", "nesterov", "free", "clipped"],
)
def test_steps_are_those_with_autograd(changes):
    ours, plain = steps(a_run(**changes)), steps(a_run(Run, **changes))
    for name in ("arch", "gradient", "weights"):
        for a, b in zip(getattr(ours, name), getattr(plain, name), strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    assert ours.losses[1] == pytest.approx(plain.losses[1], rel=1e-5)
    assert (ours.adam.steps, len(ours.sgd.velocity)) == (3, len(plain.sgd.velocity))
    assert all((a.detach() != b).any() for a, b in zip(ours.weights, a_run().weights, strict=True))


def test_a_first_step_is_to_rounding_that_with_autograd():
    """One step: no rounding has crossed a ReLU yet."""
    ours, plain = steps(a_run(), 1), steps(a_run(Run), 1)
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    for a, b in zip(ours.gradient, plain.gradient, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_loss_and_its_gradient_at_the_logits():
    g = torch.Generator().manual_seed(2)
    for scale in (1.0, 100.0):
        logits = (scale * torch.randn(7, 5, generator=g)).requires_grad_()
        labels = torch.randint(5, (7,), generator=g)
        wanted = torch.nn.functional.cross_entropy(logits.double(), labels)
        (gradient,) = torch.autograd.grad(wanted, logits)
        found = torch.full((7, 5), torch.nan)
        loss = core().cross_entropy(7, 5, logits.data_ptr(), labels.data_ptr(), found.data_ptr())
        assert loss == pytest.approx(wanted.item(), rel=1e-12)
        assert (found - gradient).abs().max() < 1e-7


def test_edge_weights_and_their_gradient():
    net = SuperNet(4, 8, 4)
    g = torch.Generator().manual_seed(3)
    for scale in (1.0, 1000.0):
        betas = (scale * torch.randn(14, generator=g, dtype=torch.float64)).requires_grad_()
        d_edges = torch.randn(14, generator=g)
        wanted = net.edge_weights(betas)
        (gradient,) = torch.autograd.grad(wanted, betas, d_edges.double())
        edges, found = torch.full((14,), torch.nan), torch.full((14,), torch.nan, dtype=torch.float64)
        core().edge_weights(betas.data_ptr(), edges.data_ptr())
        core().edge_weights_bwd(betas.data_ptr(), d_edges.data_ptr(), found.data_ptr())
        assert torch.equal(edges, wanted.detach().float())
        assert (found - gradient).abs().max() <= 1e-12 * gradient.abs().max()


def test_adam_is_the_plain_one():
    g = torch.Generator().manual_seed(4)
    ours = [torch.randn(14, generator=g, dtype=torch.float64) for _ in range(2)]
    moments = [torch.zeros_like(t) for t in ours], [torch.zeros_like(t) for t in ours]
    plain = Adam([t.clone() for t in ours], 0.06, (0.5, 0.999), 1e-8, 0.01)
    weights = SuperNet(4, 8, 4).weights()
    step = kernels.SearchStep(ours, moments, weights, kernels.zeros_in_one_piece(weights), SPEC)
    for number in range(1, 9):
        gradient = [torch.randn(14, generator=g, dtype=torch.float64) for _ in ours]
        plain.step(gradient)
        step.move_betas(gradient, 0.06, (0.5, 0.999), 1e-8, 0.01, number)
        for a, b in zip(ours, plain.tensors, strict=True):
            assert (a - b).abs().max() <= 1e-14
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        step.move_betas(gradient, 0.06, (0.5, 0.999), 1e-8, 0.01, 0)
    with pytest.raises(ValueError, match=r"gradient\[1\]: expected contiguous torch.float64 of shape .14,."):
        step.move_betas([ours[0], ours[1][:13]], 0.06, (0.5, 0.999), 1e-8, 0.01, 1)


def test_results_do_not_depend_on_the_number_of_threads():
    found = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(steps(a_run()))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert other.losses == found[0].losses
        for a, b in zip([*other.arch, *other.weights], [*found[0].arch, *found[0].weights], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("step", ["architecture_step", "weight_step"])
def test_what_is_not_finite_moves_nothing(step):
    run = a_run()
    with torch.no_grad():
        run.weights[-1][0] = torch.nan
    before = [t.detach().clone() for t in (*run.arch, *run.weights)]
    with pytest.raises(NumericalError, match="is not finite"):
        getattr(run, step)(*batches(1), *([0.1] if step == "weight_step" else []))
    for a, b in zip((*run.arch, *run.weights), before, strict=True):
        assert torch.equal(a.detach().nan_to_num(), b.nan_to_num())


def ran(run):
    """The kernels that a search's steps started."""
    before = kernels.calls()
    steps(run, 1)
    return {name for name, n in kernels.calls().items() if n != before.get(name, 0)}


def test_what_the_backend_does_not_take_goes_the_plain_way():
    assert ran(a_run())
    with kernels.use_backend("reference"):
        assert not ran(a_run())
    run = a_run()
    run.weights[0].data = run.weights[0].data.to(memory_format=torch.channels_last)
    plain = steps(a_run(), 1)
    assert ran(run)
    assert torch.allclose(run.weights[0], plain.weights[0], rtol=1e-4, atol=1e-6)


def test_weights_that_moved_house_are_found_again():
    ours, plain = a_run(), a_run(Run)
    for run in (ours, plain):
        steps(run, 1)
        run.weights[-1].data = run.weights[-1].data.clone()
    before = ours.step
    assert not before.in_place()
    with pytest.raises(ValueError, match="weights: expected them where they were checked"):
        before.gradient_by_weights(*dataclasses.astuple(batches(1)[0]))
    steps(ours, 1), steps(plain, 1)
    assert ours.step is not before
    assert ours.losses[1] == pytest.approx(plain.losses[1], rel=1e-5)


def test_both_passes_are_told():
    run = a_run()
    with kernels.trace() as launches:
        run.architecture_step(batches(1)[0])
    stages = [launch.stage for launch in launches]
    assert [stages.index(s) for s in ("stem_covariance", "stem_fwd")] == [0, 1]
    assert sum(s.endswith("_bwd") for s in stages) == sum(s.endswith("_fwd") for s in stages) - 1


def test_nobody_else_gets_the_memory_of_a_pass_under_way(wrap_net):
    free = []

    def loss_and_gradient(net, *arguments):
        free.append(len(skip_net._free))
        return net.loss_and_gradient(*arguments)

    wrap_net(loss_and_gradient=loss_and_gradient)
    steps(a_run(), 1)
    assert free == [0, 0]
    assert len(skip_net._free) == 1


def test_a_gradient_that_is_not_the_last_pass_is_measured_by_itself():
    run, (batch,) = a_run(), batches(1)
    _, grads = run.architecture_gradient(batch)
    assert run.size_of(grads) == pytest.approx(Run.size_of(run, grads), rel=1e-12)
    others = [2 * g for g in grads]
    assert run.size_of(others) == pytest.approx(2 * run.size_of(grads), rel=1e-12)


def state(**changes):
    weights = SuperNet(4, 8, 4).weights()
    pairs = [[torch.zeros(14, dtype=torch.float64)] * 2 for _ in range(3)]
    given = {"betas": pairs[0], "first": pairs[1], "second": pairs[2], "weights": weights}
    given |= {"velocity": [torch.zeros_like(w) for w in weights]} | changes
    moments = given.pop("first"), given.pop("second")
    return kernels.SearchStep(given["betas"], moments, given["weights"], given["velocity"], SPEC)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": torch.full((6,), 4)}, r"labels\[0\]: expected 0 to 3, got 4"),
        ({"labels": torch.full((6,), -1)}, r"labels\[0\]: expected 0 to 3, got -1"),
        ({"labels": torch.zeros(6)}, "labels: expected contiguous torch.int64 of shape .6,. on the cpu, got"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels: expected contiguous torch.int64 of shape .6,."),
        ({"images": torch.zeros(6, 3, 8, 6)}, "images: expected shape .B, 1 or 3, H, W."),
        ({"images": torch.zeros(6, 1, 8, 8)}, "images: expected 3 channels, got 1"),
        ({"images": torch.zeros(6, 3, 8, 8, dtype=torch.float64)}, "images: expected float32 on the cpu"),
        ({"precision": "half"}, "precision: expected one of float32, bf16_backward, bf16, got 'half'"),
    ],
)
def test_a_bad_batch_meets_a_sentence(changes, sentence):
    (batch,) = batches(1)
    given, step = {"images": batch.images, "labels": batch.labels} | changes, state()
    for gradient in (partial(step.gradient_by_betas, into=step.moments[0]), step.gradient_by_weights):
        with pytest.raises((ValueError, TypeError), match=sentence):
            gradient(**given)
    with pytest.raises(ValueError, match="into: expected 2 tensors, got 1"):
        step.gradient_by_betas(**given, into=step.betas[:1])


BETAS = [torch.zeros(14, dtype=torch.float64)] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"betas": [BETAS[0], BETAS[0].float()]}, r"betas\[1\]: expected contiguous torch.float64"),
        ({"betas": [BETAS[0][:13], BETAS[0]]}, r"betas\[0\]: expected contiguous torch.float64 of shape .14,."),
        ({"betas": BETAS[:1]}, "betas: expected two tensors, got 1"),
        ({"first": BETAS[:1]}, "first: expected 2 tensors, got 1"),
        ({"second": [BETAS[0], torch.zeros(28, dtype=torch.float64)[::2]]}, r"second\[1\]: expected contiguous"),
        ({"weights": []}, "weights: expected .* tensors, got 0"),
        ({"weights": [torch.zeros(24, 3, 3, 3)] * 35}, "weights: expected .* tensors, got 35"),
        ({"velocity": []}, "velocity: expected .* tensors, got 0"),
        (
            {"velocity": [w.double() for w in SuperNet(4, 8, 4).weights()]},
            r"velocity\[0\]: expected contiguous torch.f",
        ),
    ],
)
def test_what_cannot_be_searched_meets_a_sentence(changes, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        state(**changes)
