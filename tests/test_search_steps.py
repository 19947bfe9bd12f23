"""The steps of a search: what each computes, on which batch, at which rate, how often."""

import dataclasses
import math

import pytest
import torch
from searching import SMALL, Run, answer, arrays, batches, small
from torch.utils._python_dispatch import TorchDispatchMode

from ftso_fast import CIFAR10, IMAGENET, PRESETS, SearchConfig, SuperNet, UsageError, kernels, search
from ftso_fast.config import Mode
from ftso_fast.data import Batch
from ftso_fast.on_cpu import CpuRun

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def steps(monkeypatch):
    """Every step taken: its kind, the first pixel of its batch, and the learning rate of the weights."""
    taken = []

    def record(name, kind):
        step = getattr(Run, name)

        def recorded(run, batch, *lr):
            taken.append((kind, float(batch.images[0, 0, 0, 0]), *lr))
            return step(run, batch, *lr)

        monkeypatch.setattr(Run, name, recorded)

    record("architecture_step", "architecture")
    record("weight_step", "weight")
    return taken


# -- what the steps do


def test_the_last_weight_step_cannot_change_the_answer():
    assert SMALL.weight_lr == 0.025
    assert SMALL.final_weight_step is False
    for mode in ("1it", "3it", "1ep"):
        without, complete = small(mode=mode), small(mode=mode, final_weight_step=True)
        assert complete.weight_steps == complete.iterations == without.weight_steps + 1
        assert answer(complete) == answer(without)
        assert without.to_dict()["config"]["final_weight_step"] is False


def test_the_first_weight_step_of_two_changes_the_answer(monkeypatch):
    usual = small(mode="2it")
    assert usual.weight_steps == 1
    monkeypatch.setattr(Run, "weight_step", lambda run, batch, lr: run.losses[1].append(math.nan))
    without = small(mode="2it")
    for cell in ("normal", "reduce"):
        assert without.betas[cell].before == usual.betas[cell].before
        assert without.betas[cell].gradient != usual.betas[cell].gradient
        assert without.betas[cell].after != usual.betas[cell].after


def test_the_rate_of_the_weights_matters_from_the_second_iteration_on():
    assert answer(small(mode="1it", weight_lr=0.0)) == answer(small(mode="1it"))
    assert answer(small(mode="2it", weight_lr=0.0)) != answer(small(mode="2it"))


class Gradients(TorchDispatchMode):
    """Counts the backward operations and what they were asked to compute."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.norms, self.products, self.softmaxes = [], [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name == "aten::convolution_backward":
            self.convolutions.append(tuple(args[-1]))
        elif name == "aten::native_batch_norm_backward":
            self.norms.append(tuple(args[-1]))
        elif name == "aten::mm":  # of the classifier: one product for its input, one for its weight
            self.products += 1
        elif name == "aten::_softmax_backward_data":  # of the edge weights
            self.softmaxes += 1
        return function(*args, **(kwargs or {}))


def counted(step, *args):
    """On the reference path, where the dispatcher sees every operation."""
    with kernels.use_backend("reference"), Gradients() as found:
        step(*args)
    return found


def a_run(cells=8):
    torch.manual_seed(0)
    net = SuperNet(4, 8, cells)
    batch = Batch(torch.randn(4, 3, 16, 16), torch.arange(4))
    return CpuRun(net, SMALL), batch, sum(isinstance(m, torch.nn.Conv2d) for m in net.modules())


def test_an_architecture_step_computes_no_weight_gradient():
    run, batch, _ = a_run()
    before = [w.detach().clone() for w in run.weights]
    found = counted(run.architecture_step, batch)
    assert len(found.convolutions) > 40
    assert not any(weight or bias for _, weight, bias in found.convolutions)
    assert not any(weight or bias for _, weight, bias in found.norms)
    assert found.products == 1
    assert found.softmaxes == 8
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(run.weights, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(run.net.betas(), run.before, strict=True))


def test_a_weight_step_computes_no_beta_gradient():
    run, batch, n_convolutions = a_run()
    before = [w.detach().clone() for w in run.weights]
    found = counted(run.weight_step, batch, 0.025)
    assert len(found.convolutions) == n_convolutions
    assert all(weight for _, weight, _ in found.convolutions)
    assert found.products == 2
    assert found.softmaxes == 0
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(run.net.betas(), run.before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(run.weights, before, strict=True))


def test_the_counter_sees_gradients_that_nobody_needs():
    run, batch, n_convolutions = a_run()
    with kernels.use_backend("reference"):
        loss = torch.nn.functional.cross_entropy(run.net(batch.images), batch.labels)
    found = counted(torch.autograd.grad, loss, [*run.weights, *run.net.betas()])
    assert sum(weight for _, weight, _ in found.convolutions) == n_convolutions
    assert found.products == 2
    assert found.softmaxes == 8


def stages(step, *args):
    """The kernels that ran in a step."""
    before = kernels.calls()
    step(*args)
    return {name.split("/")[0] for name, n in kernels.calls().items() if n != before.get(name, 0)}


def test_the_compiled_network_is_asked_for_what_a_step_needs(wrap_net):
    asked = []

    def loss_and_gradient(net, *arguments):
        asked.append(tuple(d_betas != 0 for d_betas in arguments[4:6]))  # if not, the weights' gradients
        return net.loss_and_gradient(*arguments)

    wrap_net(loss_and_gradient=loss_and_gradient)
    run, batch, _ = a_run()
    assert "stem_bwd" not in stages(run.architecture_step, batch)  # the stem has weights only
    assert "stem_bwd" in stages(run.weight_step, batch, 0.025)
    assert asked == [(True, True), (False, False)]


def test_a_step_moves_by_its_rate():
    run, batch, _ = a_run(4)
    run.architecture_step(batch)
    for betas, before, g in zip(run.net.betas(), run.before, run.gradient, strict=True):
        clear = g.abs() > 1e-5
        assert clear.sum() >= 7
        assert ((betas - before) / SMALL.arch_lr + g.sign())[clear].abs().max() < 2e-3


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_gradients_are_clipped(limit):
    runs = []
    for clip in (limit, None):
        run, batch, _ = a_run(4)
        run.config = dataclasses.replace(SMALL, arch_grad_clip=clip, grad_clip=clip, weight_decay=0.0)
        before = [w.detach().clone() for w in run.weights]
        run.sgd.weight_decay = 0.0
        run.architecture_step(batch)
        run.weight_step(batch, 1.0)
        moved = torch.cat([(a.detach() - b).flatten() for a, b in zip(run.weights, before, strict=True)]).norm()
        runs.append((float(torch.cat(run.gradient).norm()), float(moved)))
    (clipped_betas, clipped_weights), (betas, weights) = runs
    assert clipped_betas == pytest.approx(min(limit, betas), rel=1e-2)
    assert clipped_weights == pytest.approx(min(limit, weights), rel=1e-2)
    assert betas > 2e-3


# -- which batch goes where


def test_batches_of_one_iterable_alternate_and_the_first_is_the_architectures(steps):
    small(iter(batches(6)), "3it", final_weight_step=True)
    assert [(kind, first) for kind, first, *_ in steps] == [
        ("architecture", 0),
        ("weight", 1),
        ("architecture", 2),
        ("weight", 3),
        ("architecture", 4),
        ("weight", 5),
    ]


def test_a_tuple_of_loaders_is_weights_then_architecture(steps):
    weights, architecture = batches(6)[:3], batches(6)[3:]
    small((weights, architecture), "2it")
    assert [(kind, first) for kind, first, *_ in steps] == [("architecture", 3), ("weight", 0), ("architecture", 4)]


def test_the_architecture_half_goes_on_when_an_epoch_ends(steps):
    small((batches(5)[:2], batches(5)[2:]), "2ep", final_weight_step=True)
    assert [first for kind, first, *_ in steps if kind == "weight"] == [0, 1, 0, 1]
    assert [first for kind, first, *_ in steps if kind == "architecture"] == [2, 3, 4, 2]


@pytest.mark.parametrize(("mode", "iterations"), [("1it", 1), ("5it", 5), ("1ep", 3), ("2ep", 6)])
def test_number_of_steps(mode, iterations):
    """40 images: 20 a half, and a last batch of 4."""
    seen = []
    result = small(arrays(40), mode, progress=lambda *counts: seen.append(counts))
    assert (result.iterations, result.weight_steps) == (iterations, iterations - 1)
    assert result.mode == mode
    assert [len(losses) for losses in result.losses] == [iterations, iterations - 1]
    assert all(0.1 < loss < 10 for losses in result.losses for loss in losses)
    assert seen == [(i + 1, iterations) for i in range(iterations)]


def test_an_epoch_of_unknown_length(steps):
    """A generator ends the epoch; a list begins again."""
    result = small((b for b in batches(6)), "1ep")
    assert result.iterations == 3
    steps.clear()

    class Unsized:
        def __iter__(self):
            return iter(batches(4))

    seen = []
    result = small(Unsized(), "2ep", progress=lambda *counts: seen.append(counts))
    assert (result.iterations, result.weight_steps) == (4, 4)  # the end shows only after the step
    assert [first for _, first, *_ in steps] == [0, 1, 2, 3] * 2
    assert seen == [(i + 1, None) for i in range(4)]


@pytest.mark.parametrize(
    ("mode", "schedule", "rates"),
    [
        ("1it", "cosine", [1]),
        ("2it", "cosine", [1, 1]),
        ("1ep", "cosine", [1, 1]),
        ("2ep", "cosine", [1, 1, 0.5, 0.5]),
        ("4ep", "cosine", [1] * 2 + [0.5 + 0.5**1.5] * 2 + [0.5] * 2 + [0.5 - 0.5**1.5] * 2),
        ("4it", "cosine", [1, 1, 0.5, 0.5]),
        ("2ep", "constant", [1, 1, 1, 1]),
    ],
)
def test_schedule(steps, mode, schedule, rates):
    small(mode=mode, weight_schedule=schedule, final_weight_step=True)
    found = [step[2] for step in steps if step[0] == "weight"]
    assert found == pytest.approx([0.025 * rate for rate in rates], rel=1e-12)


def test_warm_up(steps):
    result = small(mode="3ep", warmup_epochs=2, final_weight_step=True)
    assert [kind for kind, *_ in steps] == ["weight"] * 4 + ["architecture", "weight"] * 2
    assert (result.iterations, result.weight_steps) == (2, 6)


@pytest.mark.parametrize("mode", ["1ep", "2ep", "1it", "4it"])
def test_a_search_that_ends_in_its_warm_up_is_refused(mode):
    with pytest.raises(UsageError, match=rf"mode: {mode} ends within the 2 warm-up epochs"):
        small(mode=mode, warmup_epochs=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "it",
        "0it",
        "01it",
        "-1it",
        "1.5it",
        "1 it",
        "1IT",
        "1it\n",
        "1it+",
        "+1it",
        "1it+1ep+1it",
        "99999999it",
        None,
        1,
    ],
)
def test_bad_mode(text):
    with pytest.raises(
        UsageError, match=r"mode: expected 'Nit' or 'Nep', such as '1it' or '50ep', or .* '1ep\+18ep', got "
    ):
        small(mode=text)


def test_modes():
    assert Mode.parse("1it") == (Mode(1, "it"),)
    assert Mode.parse("1ep+18ep") == (Mode(1, "ep"), Mode(18, "ep"))
    assert [str(mode) for mode in Mode.parse("50ep+2it")] == ["50ep", "2it"]
    assert [Mode(3, unit).iterations(5) for unit in ("it", "ep")] == [3, 15]
    assert [Mode(3, unit).iterations(None) for unit in ("it", "ep")] == [3, None]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cells", 2),
        ("channels", 0),
        ("batch_size", 1),
        ("batch_size", True),
        ("warmup_epochs", -1),
        ("warmup_epochs", 0.5),
        ("weight_lr", -0.1),
        ("weight_lr", math.nan),
        ("weight_lr_min", 0.03),
        ("momentum", "0.9"),
        ("arch_lr", 0.0),
        ("arch_lr", math.inf),
        ("grad_clip", 0.0),
        ("arch_grad_clip", -1.0),
        ("arch_betas", (0.5, 1.0)),
        ("arch_betas", (0.5,)),
        ("weight_schedule", "linear"),
    ],
)
def test_bad_config(field, value):
    with pytest.raises(UsageError, match=rf"config\.{field}: expected"):
        SearchConfig(**{field: value})


def test_presets_are_table_4s():
    assert dataclasses.asdict(CIFAR10) == {
        "cells": 8,
        "channels": 16,
        "batch_size": 256,
        "weight_lr": 0.025,
        "weight_lr_min": 0.0,
        "weight_schedule": "cosine",
        "momentum": 0.9,
        "weight_decay": 3e-4,
        "grad_clip": 5.0,
        "arch_lr": 6e-4,
        "arch_betas": (0.5, 0.999),
        "arch_eps": 1e-8,
        "arch_weight_decay": 1e-3,
        "arch_grad_clip": None,
        "warmup_epochs": 0,
        "final_weight_step": False,
        "nesterov": False,
        "weights_first": False,
    }
    assert (IMAGENET.weight_lr, IMAGENET.arch_lr) == (0.5, 6e-3)
    assert PRESETS["cifar10-batch64"].batch_size == 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        CIFAR10.arch_lr = 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replace": "conv"}, "replace: expected one of max_pool_3x3, .* got 'conv'"),
        ({"replace": "none"}, "replace: expected one of max_pool_3x3, .* got 'none'"),
        ({"backend": "gpu"}, "backend: expected one of cuda, triton, cpu, reference, got 'gpu'"),
        ({"k": 3}, "k: expected a divisor of the 16 channels"),
        ({"k": 32}, "k: expected a divisor of the 16 channels"),
        ({"seed": 0.5}, r"seed: expected a whole number, got 0\.5"),
        ({"classes": "ten"}, "classes='ten' is not a whole number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        search(arrays(), **options)
