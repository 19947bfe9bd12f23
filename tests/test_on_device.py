"""A search's steps as a GPU takes them: here on the cpu, the graphs' capture with a stand-in."""

from contextlib import contextmanager

import pytest
import torch

import ftso_fast
from ftso_fast import SuperNet, kernels
from ftso_fast.batch import Batch
from ftso_fast.on_device import WARM_UP, DeviceRun, Replayed
from ftso_fast.run import Run

CONFIG = ftso_fast.SearchConfig(cells=3, channels=4, batch_size=4)


def batches(n):
    g = torch.Generator().manual_seed(0)
    return [Batch(torch.randn(4, 3, 8, 8, generator=g).double(), torch.randint(3, (4,), generator=g)) for _ in range(n)]


def pairs(n):
    return [(batch.images, batch.labels) for batch in batches(n)]


def runs(**changes):
    """The plain one and ours, in float64."""
    config = ftso_fast.SearchConfig(**{"cells": 3, "channels": 4, "batch_size": 4} | changes)
    for kind in (Run, DeviceRun):
        torch.manual_seed(1)
        net = SuperNet(3, 4, 3, 4).double()
        device = torch.device("cpu")
        yield Run(net, config) if kind is Run else DeviceRun(net.on(device), config, 1, device, replayed=False)


@pytest.mark.parametrize("clip", [None, 1e-4], ids=["arch-free", "arch-clipped"])
def test_the_steps_are_those_of_the_plain_search(clip):
    plain, ours = runs(arch_grad_clip=clip)
    for number, batch in enumerate(batches(6)):
        for run in (plain, ours):
            run.architecture_step(batch)
            run.weight_step(batch, 0.1 / (number + 1))
    for a, b in zip([*plain.arch, *plain.weights], [*ours.arch, *ours.weights], strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert ours.losses[1] == pytest.approx(plain.losses[1], rel=1e-6)
    assert (ours.adam.steps, plain.adam.steps) == (6, 6)
    moved = [(a.detach() - b).abs().max() for a, b in zip(plain.arch, plain.before, strict=True)]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("step", ["architecture_step", "weight_step"])
def test_what_is_not_finite_is_refused(step):
    _, ours = runs()
    batch = Batch(torch.full((4, 3, 8, 8), torch.nan).double(), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ftso_fast.NumericalError, match="is not finite"):
        getattr(ours, step)(batch, *([0.1] if step == "weight_step" else []))


def test_edge_weights_in_few_launches_are_the_same():
    net = SuperNet(3, 4, 3, 4)
    for betas in net.betas():
        betas.detach().normal_()
    together = net._edges_together()
    for betas, weights in zip(net.betas(), together, strict=True):
        assert torch.equal(weights, net.edge_weights(betas))
        grad = torch.randn(14, dtype=torch.float64)
        found, wanted = (
            torch.autograd.grad(w, betas, grad, retain_graph=True)[0] for w in (weights, net.edge_weights(betas))
        )
        assert (found - wanted).abs().max() < 1e-15


def test_a_step_is_captured_once_after_its_warm_up(monkeypatch):
    """A stand-in for CUDA: what is captured is kept, and a replay does it again on the same tensors."""
    seen = []

    class Graph:
        def replay(self):
            seen.append("replay")
            for out, new in zip(step.results, work(*step.inputs), strict=True):
                out.copy_(new)

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def captures(graph):
        seen.append("capture")
        yield

    @contextmanager
    def on(stream):
        yield

    cuda = {"CUDAGraph": Graph, "graph": captures, "Stream": Stream, "stream": on, "current_stream": Stream}
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def work(x):
        return [x * 2]

    step = Replayed(work)
    for i in range(5):
        (out,) = step(torch.full((3,), float(i)))
        assert out.tolist() == [2.0 * i] * 3
    assert seen == ["capture", *["replay"] * (5 - WARM_UP)]


@pytest.mark.parametrize(
    ("device", "said"), [("cuda", "finds no GPU"), ("tpu", "expected cpu or cuda"), ("mps", "expected")]
)
def test_a_device_that_is_not_there_is_a_sentence(device, said):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ftso_fast.UsageError, match=f"device: .*{said}"):
        ftso_fast.search(pairs(4), device=device)


def test_on_the_cpu_by_name_is_the_plain_search():
    found = [ftso_fast.search(pairs(4), "2it", config=CONFIG, device=device) for device in (None, "cpu")]
    assert found[0].betas == found[1].betas
    assert found[0].backend == ("cpu" if kernels.backends()["cpu"] is None else "reference")
