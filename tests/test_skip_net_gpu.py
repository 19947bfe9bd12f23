"""The skip-only network's path to a GPU, without one: what it plans, whom it asks, what it leaves alone."""

import sys
from subprocess import run

import pytest
import torch
from ftso_fast.kernels import NetSpec, _backend, _launch
from ftso_fast.kernels.skip_net import weight_shapes
from torch._subclasses.fake_tensor import FakeTensorMode

from ftso_fast import SuperNet, kernels


@pytest.mark.parametrize("spec", [NetSpec(16, 3, 4), NetSpec(16, 8, 4), NetSpec(32, 5, 1), NetSpec(16, 20, 8)], ids=str)
def test_every_weight_lies_once_in_the_flat_copy(spec):
    """All but the stem's batch norm and the classifier; rows of one stage lie together, in the readers' order."""
    from ftso_fast.kernels._net_plan import plan

    shapes = weight_shapes(3, 10, spec)
    found = plan(3, spec)
    assert sorted(found.order) == [0, *range(3, len(shapes) - 2)]
    sizes = [torch.Size(shapes[i]).numel() for i in found.order]
    assert sum(sizes) == found.size
    starts = dict(zip(found.order, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    paths = [cell.paths for cell in found.cells if cell.paths is not None]
    for rows in (found.stem, *found.tensors, *paths):
        assert rows.at == starts[rows.of[0]]
        assert rows.height * rows.columns == sum(torch.Size(shapes[i]).numel() for i in rows.of)
        assert all(torch.Size(shapes[i][1:]).numel() == rows.columns for i in rows.of)
    readers = [cell.sources for cell in found.cells]
    assert {tensor for pair in readers for tensor, _ in pair} == set(range(len(found.tensors)))


def on_fake_gpu(net):
    """A torch without CUDA makes fake tensors there, and moves none."""
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(p, device="cuda"))
    for name in ("betas_normal", "betas_reduce"):
        setattr(net, name, torch.empty_like(getattr(net, name), device="cuda").requires_grad_())
    indices = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (40, 28))
    net._table = (*indices, torch.empty(1, dtype=torch.float64, device="cuda"))
    return net


def test_tensors_on_a_gpu_go_to_triton_by_themselves(monkeypatch):
    """Where the CUDA module was not built. As far as shapes: autograd's engine wants a real device."""
    started = []
    absent = _backend._absent
    monkeypatch.setattr(_backend, "_absent", lambda name: "not built" if name == "cuda" else absent(name))
    monkeypatch.setattr(_launch, "run", lambda kernel, grid, arguments, constants, warps: started.append(arguments))
    with FakeTensorMode(), torch.no_grad():
        net = on_fake_gpu(SuperNet(10, 16, 5, 4))
        logits = net(torch.empty(8, 3, 16, 16, device="cuda"))
    assert (logits.shape, logits.device.type) == ((8, 10), "cuda")
    assert len(started) > 10
    assert all(t.device.type == "cuda" for arguments in started for t in arguments if isinstance(t, torch.Tensor))


def test_what_the_kernels_cannot_the_reference_does():
    table = {name: name for name in ("triton", "cpu", "reference")}
    with FakeTensorMode():
        images = torch.empty(2, 3, 8, 8, device="cuda")
        for channels, wanted in ((16, "triton"), (12, "reference")):
            cannot = kernels.cannot(images, NetSpec(channels, 3, 4))
            assert kernels.choose("super-network", table, images, cannot) == wanted


class Module:
    """The CUDA module on a GPU of compute capability 7.5."""

    def cell_unfit(self, device):
        return "no kernel image is available"


def test_a_gpu_that_the_cuda_module_was_not_built_for_is_tritons(monkeypatch):
    table = {name: name for name in kernels.BACKENDS}
    with FakeTensorMode():
        images = torch.empty(2, 3, 8, 8, device="cuda:1")
        edges, spec = torch.empty(14, device="cuda:1"), NetSpec(16, 3, 4)
    monkeypatch.setattr(_backend, "_absent", lambda name: None)
    monkeypatch.setattr(_backend, "cuda_module", Module)
    assert kernels.choose("super-network", table, images) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    said = (
        r"expected a GPU that its kernels were built for, "
        r"got compute capability 7\.5 \(no kernel image is available\)"
    )
    _backend._unfit.cache_clear()
    try:
        assert kernels.choose("super-network", table, images) == "triton"
        with pytest.raises(kernels.BackendError, match=f"backend 'cuda': {said}"), kernels.use_backend("cuda"):
            pass
        monkeypatch.setenv("FTSO_BACKEND", "cuda")
        with pytest.raises(kernels.BackendError, match=f"super-network: backend 'cuda' was asked for .*{said}"):
            kernels.choose("super-network", table, images)
        with pytest.raises(ValueError, match=f"skip_net: the cuda backend cannot: {said}"):
            kernels.skip_net(images, edges, edges, [], spec, backend="cuda")
    finally:
        _backend._unfit.cache_clear()


def test_a_search_on_the_cpu_leaves_the_gpus_modules_alone():
    code = (
        "import sys, torch, ftso_fast; from ftso_fast import SearchConfig, search;"
        "data = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))] * 4;"
        "search(data, config=SearchConfig(cells=3, channels=16, batch_size=4));"
        "wrong = {m for m in sys.modules if m.split('.')[0] == 'triton' or m.startswith('ftso_fast') and "
        "('triton' in m or 'cuda' in m or m.endswith(('net_gpu', 'step_gpu', 'on_device')))}; assert not wrong, wrong"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
