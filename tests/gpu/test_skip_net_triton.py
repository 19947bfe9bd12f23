"""The whole skip-only network on Triton kernels against the plain path: logits, betas' and weights' gradients."""

import pytest
import torch
from ftso_fast.kernels import _last_cell_triton, weight_step_gpu
from gpu_stages import error
from kinks import near, values
from networks import batch_of, gradients, net_of

from ftso_fast import SearchConfig, SuperNet, kernels
from ftso_fast.batch import Batch
from ftso_fast.on_device import DeviceRun

MARGIN = 2e-6
ALLOWED = 1e-5
"""Or three times what the plain path in float32 is off by, where that is more: these batches are small."""


def example(cells, channels, k, in_channels, B, H, W):
    """A network and a batch of which no ReLU input and no runner-up of the pooling is so near to its kink that float32
    could turn it over; both in float64, rounded to float32."""
    for seed in range(1000):
        net = net_of(seed, classes=3, channels=channels, layers=cells, k=k, in_channels=in_channels).float().double()
        images, labels = batch_of(seed, (B, in_channels, H, W), 3)
        images = images.float().double()
        outputs = values(net, images)
        if not near(net, outputs, [MARGIN * x.square().mean((0, 2, 3), keepdim=True).sqrt() for x in outputs]):
            return net, images, labels
    raise ValueError("no draw is off its kinks")


def on(device, net):
    """In float32 on the device."""
    net = net.float().to(device)
    for name in ("betas_normal", "betas_reduce"):
        setattr(net, name, getattr(net, name).detach().to(device).requires_grad_())
    return net


SHAPES = [(3, 16, 4, 3, 2, 8, 8), (5, 16, 2, 1, 4, 8, 12), (3, 16, 1, 3, 3, 8, 8), (8, 16, 8, 3, 4, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_gradient(shape, device, verified):
    net, images, labels = example(*shape)
    inputs = [*net.betas(), *net.parameters()]
    with kernels.use_backend("reference"):
        wanted = [net(images).detach(), *gradients(net, images, labels, inputs)]
    net, images, labels = on(device, net), images.float().to(device), labels.to(device)
    inputs = [*net.betas(), *net.parameters()]
    names = ["logits", "loss", "normal", "reduce", *(name for name, _ in net.named_parameters())]
    errors = {}
    for backend in ("reference", "triton"):
        before = kernels.calls()
        with kernels.use_backend(backend):
            found = [net(images).detach(), *gradients(net, images, labels, inputs)]
        ran = {name for name, n in kernels.calls().items() if n != before.get(name, 0)}
        errors[backend] = {n: error(a.cpu(), b) for n, a, b in zip(names, found, wanted, strict=True)}
    allowed = max(ALLOWED, 3 * max(errors["reference"].values()))
    assert allowed < 1e-4
    assert not {name: e for name, e in errors["triton"].items() if not e <= allowed}
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


@pytest.mark.parametrize("cells", [3, 4])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["free", "clipped"])
@pytest.mark.parametrize("largest", [_last_cell_triton.LARGEST, 255], ids=["within", "torch"])
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
