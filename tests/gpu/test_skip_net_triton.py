"""The whole skip-only network on Triton kernels against the plain path: logits, betas' and weights' gradients."""

import pytest
import torch
from ftso_fast.kernels import _last_cell_triton, weight_step_gpu
from gpu_networks import agrees, on
from gpu_stages import error
from networks import batch_of

from ftso_fast import SearchConfig, SuperNet, kernels
from ftso_fast.batch import Batch
from ftso_fast.on_device import DeviceRun

SHAPES = [(3, 16, 4, 3, 2, 8, 8), (5, 16, 2, 1, 4, 8, 12), (3, 16, 1, 3, 3, 8, 8), (8, 16, 8, 3, 4, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_gradient(shape, device, verified):
    ran = agrees(shape, device)
    assert {"cell_fwd/triton", "paths_bwd/triton", "nodes_bwd/triton", "finish_weights/triton"} <= ran
    assert all(name.endswith("/triton") for name in ran)
    verified("skip_net", "triton")


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return SuperNet(3, 16, 3, 4), torch.randn(2, 3, 4, 4), torch.tensor([0, 2])


def test_an_architecture_step_computes_no_weight_gradients(small, device):
    net, images, _ = on(device, small[0]), small[1].to(device), small[2]
    with net.only_arch(), kernels.trace() as launches:
        arch = torch.autograd.grad(net(images).sin().sum(), net.betas())
    assert not [launch.stage for launch in launches if launch.stage in ("stem_products_bwd", "finish_weights")]
    everything = torch.autograd.grad(net(images).sin().sum(), net.betas())
    assert all(torch.equal(a, b) for a, b in zip(arch, everything, strict=True))


def test_backward_again_and_twice(small, device):
    net, images = on(device, small[0]), small[1].to(device)
    loss = net(images).sin().sum()
    first = torch.autograd.grad(loss, net.betas(), retain_graph=True)
    second = torch.autograd.grad(loss, net.betas(), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (grad,) = torch.autograd.grad(loss, net.betas_normal, create_graph=True)
    with pytest.raises(RuntimeError, match="skip_net: the triton backend has first derivatives only"):
        torch.autograd.grad(grad.sum(), net.betas_normal)


@pytest.mark.parametrize(
    ("cells", "clip", "largest"),
    [(3, None, _last_cell_triton.LARGEST), (4, 0.05, _last_cell_triton.LARGEST), (3, 0.05, 255), (4, None, 255)],
    ids=["3-free-within", "4-clipped-within", "3-clipped-torch", "4-free-torch"],
)
def test_weight_steps_without_autograd(cells, clip, largest, device, monkeypatch):
    """Two of them, momentum and decay included: the last cell is a reduction cell, then a normal one. Both move the
    weights as the plain path does, whose own float32 error these networks keep small. A classifier of 4 x 64 is in the
    last cell's kernel, or too large for it."""
    asked = []
    monkeypatch.setattr(_last_cell_triton, "LARGEST", largest)
    monkeypatch.setattr(weight_step_gpu, "classify", lambda *a: asked.append(_last_cell_triton.classify(*a)))
    config = SearchConfig(cells=cells, channels=16, grad_clip=clip, weight_decay=0.1, momentum=0.7)
    images, labels = batch_of(5, (4, 3, 8, 8), 3)
    batch = Batch(images.float().to(device), labels.to(device))
    found = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(2)
        net = SuperNet(3, 16, cells, 4).on(torch.device(device))
        run = DeviceRun(net, config, 1, torch.device(device), replayed=False)
        before = kernels.calls()
        with kernels.use_backend(backend):
            for rate in (0.1, 0.05):
                run.weight_step(batch, rate)
        ran = {name for name, n in kernels.calls().items() if n != before.get(name, 0)}
        assert ("update_weights/triton" in ran) == (backend == "triton")
        assert len(asked) == (2 if backend == "triton" and largest == 255 else 0)
        found[backend] = [torch.tensor(run.losses[1]), *(w.detach().cpu() for w in run.weights)]
    errors = [error(a, b) for a, b in zip(found["triton"], found["reference"], strict=True)]
    assert max(errors) <= 1e-4
    torch.manual_seed(2)
    start = SuperNet(3, 16, cells, 4)
    assert all(error(w, s.detach()) > 1e-4 for w, s in zip(found["triton"][1:], start.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"channels": 12, "k": 4}, "expected 16, 32, 64, 128 or 256 channels, got 12"),
        ({"channels": 24, "k": 3}, "expected 16, 32, 64, 128 or 256 channels, got 24"),
        ({"channels": 16, "layers": 2}, "expected at least 3 cells, got 2"),
    ],
    ids=str,
)
def test_what_it_cannot_it_says_in_a_sentence(sizes, reason, device):
    net = on(device, SuperNet(3, **{"layers": 3} | sizes))
    with pytest.raises(
        kernels.BackendError, match=f"super-network: backend 'triton' was asked for and cannot .*{reason}"
    ):
        net(torch.zeros(2, 3, 8, 8, device=device))
