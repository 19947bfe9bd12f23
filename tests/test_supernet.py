"""The super-network against the textbook in float64, its sizes, and its derivatives."""

import importlib
from types import SimpleNamespace

import pytest
import textbook
import torch
from conftest import every_isa
from ftso_fast.kernels import testing
from networks import NODES, batch_of, gradients, net_of
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ftso_fast import SuperNet, UsageError, kernels, supernet
from ftso_fast.operations import FactorizedReduce

# the name `kernels.skip_cell` is the function
skip_cell_module = importlib.import_module("ftso_fast.kernels.skip_cell")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Idle threads that spin make tests slow where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def largest_error(net, images, labels, layers, k):
    """Of the loss and every gradient: the largest difference to the textbook relative to the largest value."""
    weights = list(net.parameters())
    found = gradients(net, images, labels, [*net.betas(), *weights])
    wanted = textbook.gradients(images, labels, weights, *net.betas(), layers=layers, k=k)
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_to_the_textbook_in_float64(k, in_channels):
    net = net_of(k, classes=5, channels=8, layers=8, k=k, in_channels=in_channels)
    images, labels = batch_of(k, (3, in_channels, 16, 20), 5)
    assert largest_error(net, images, labels, 8, k) < 1e-10


@pytest.mark.parametrize("layers", [3, 4, 5])
def test_equal_to_the_textbook_at_other_depths(layers):
    net = net_of(layers, classes=3, channels=4, layers=layers, k=2)
    images, labels = batch_of(layers, (4, 3, 8, 8), 3)
    assert largest_error(net, images, labels, layers, 2) < 1e-10


SIZES = [
    {"k": 1, "in_channels": 3, "channels": 8, "layers": 8, "classes": 5},
    {"k": 2, "in_channels": 1, "channels": 12, "layers": 5, "classes": 2},
    {"k": 4, "in_channels": 3, "channels": 16, "layers": 8, "classes": 10},
    {"k": 4, "in_channels": 1, "channels": 8, "layers": 3, "classes": 7},
    {"k": 8, "in_channels": 3, "channels": 16, "layers": 4, "classes": 3},
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"k{s['k']}-c{s['in_channels']}-C{s['channels']}-L{s['layers']}")
@every_isa
def test_kernels_equal_the_textbook(sizes, isa, verified):
    """Loss and every gradient in float32; the inputs and weights are the same numbers in both."""
    net = net_of(7, **sizes).float()
    images, labels = batch_of(7, (4, sizes["in_channels"], 12, 20), sizes["classes"])
    with testing.arm("cpu", isa):
        assert largest_error(net, images.float(), labels, sizes["layers"], sizes["k"]) < 1e-4
    verified("skip_net", "cpu")


def inverse_shuffle(x, k):
    return kernels.channel_shuffle(x, x.shape[1] // k)


def no_shuffle(x, k):
    return x


def reduce_without_shift(self, x):
    x = self.relu(x)
    return self.bn(torch.cat((self.conv_1(x), self.conv_2(x)), 1))


def one_softmax(self, betas):
    return betas.softmax(0)


def only_one_pixel(x, size):
    return x[:, :, ::size, ::size]


def share_reduce_weights(net, patch):
    for cell in net.cells:
        for module in list(cell.edges)[1:]:
            patch.setattr(module, "forward", cell.edges[0].forward)


SEEDED_BUGS = {
    "inverse shuffle in normal cells": lambda net, p: p.setattr(skip_cell_module, "channel_shuffle", inverse_shuffle),
    "no shuffle in normal cells": lambda net, p: p.setattr(skip_cell_module, "channel_shuffle", no_shuffle),
    "inverse shuffle in reduction cells": lambda net, p: p.setattr(supernet, "channel_shuffle", inverse_shuffle),
    "no shuffle in reduction cells": lambda net, p: p.setattr(supernet, "channel_shuffle", no_shuffle),
    "one FactorizedReduce for all edges": share_reduce_weights,
    "average pooling of the bypass": lambda net, p: p.setattr(supernet, "F", SimpleNamespace(max_pool2d=F.avg_pool2d)),
    "slicing of the bypass": lambda net, p: p.setattr(supernet, "F", SimpleNamespace(max_pool2d=only_one_pixel)),
    "FactorizedReduce without the shift": lambda net, p: p.setattr(FactorizedReduce, "forward", reduce_without_shift),
    "one softmax over all edges": lambda net, p: p.setattr(SuperNet, "edge_weights", one_softmax),
    "no batch norm in the stem": lambda net, p: p.setattr(net.stem[1], "forward", lambda x: x),
}


@pytest.mark.parametrize("bug", SEEDED_BUGS)
def test_the_comparison_sees(bug, monkeypatch):
    net = net_of(0, classes=5, channels=8, layers=8, k=4)
    images, labels = batch_of(0, (3, 3, 16, 16), 5)
    assert largest_error(net, images, labels, 8, 4) < 1e-10
    SEEDED_BUGS[bug](net, monkeypatch)
    assert largest_error(net, images, labels, 8, 4) > 1e-3


def test_the_comparison_sees_swapped_betas():
    net = net_of(0, classes=5, channels=8, layers=8, k=4)
    images, labels = batch_of(0, (3, 3, 16, 16), 5)
    normal, reduce = net.betas()
    wanted = textbook.gradients(images, labels, list(net.parameters()), normal, reduce, layers=8, k=4)
    net.betas_normal, net.betas_reduce = reduce, normal
    found = gradients(net, images, labels, [normal, reduce])
    assert (found[1] - wanted[1]).abs().max() > 1e-3 * wanted[1].abs().max()


@pytest.mark.parametrize(("k", "parameters"), [(4, 102_010), (1, 140_410)])
def test_number_of_parameters(k, parameters):
    assert sum(p.numel() for p in SuperNet(10, k=k).parameters()) == parameters


def test_shapes_and_order_of_the_parameters():
    """PC-DARTS' own: stem; per cell preprocess0, preprocess1, then edge by edge; classifier."""
    found = [tuple(p.shape) for p in SuperNet(10).parameters()]
    wanted = [(48, 3, 3, 3), (48,), (48,)]
    wanted += [(16, 48, 1, 1), (16, 48, 1, 1)]
    wanted += [(16, 48, 1, 1), (16, 64, 1, 1)]
    wanted += [(32, 64, 1, 1), (32, 64, 1, 1), *[(4, 8, 1, 1)] * 16]
    wanted += [(16, 64, 1, 1), (16, 64, 1, 1), (32, 128, 1, 1)]
    wanted += [(32, 128, 1, 1), (32, 128, 1, 1)]
    wanted += [(64, 128, 1, 1), (64, 128, 1, 1), *[(8, 16, 1, 1)] * 16]
    wanted += [(32, 128, 1, 1), (32, 128, 1, 1), (64, 256, 1, 1)]
    wanted += [(64, 256, 1, 1), (64, 256, 1, 1)]
    wanted += [(10, 256), (10,)]
    assert found == wanted


def test_betas_are_no_parameters():
    net = SuperNet(10)
    ours = {b.data_ptr() for b in net.betas()}
    assert not ours & {t.data_ptr() for t in (*net.parameters(), *net.buffers())}
    assert not any("beta" in name for name in net.state_dict())
    for betas in net.betas():
        assert betas.shape == (14,)
        assert betas.dtype == torch.float64
        assert betas.requires_grad
        assert 2e-4 < betas.detach().std() < 3e-3


def test_no_state_but_the_weights():
    """Batch norm keeps no running statistics: evaluation mode changes nothing."""
    net = net_of(3, classes=4, channels=8, layers=4)
    images, _ = batch_of(3, (2, 3, 8, 8), 4)
    first = net(images)
    assert torch.equal(net.eval()(images), first)
    assert not list(net.buffers())


@pytest.mark.parametrize(("k", "macs"), [(4, 20_728_320), (1, 24_660_480)])
def test_multiply_adds(k, macs):
    with kernels.use_backend("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        SuperNet(10, k=k)(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * macs


def test_beta_gradients_sum_to_zero_per_node():
    net = net_of(1, classes=5, channels=8, layers=8, k=4)
    for g in gradients(net, *batch_of(1, (3, 3, 16, 16), 5), net.betas())[1:]:
        for a, b in NODES:
            assert abs(float(g[a:b].sum())) < 1e-12 * float(g.abs().max())
            assert g[a:b].abs().max() > 1e-6


def test_second_derivatives():
    """Hessian-vector products: finite, right by differences, orthogonal to the ones of a node, and null on them."""
    net = net_of(2, classes=5, channels=8, layers=4, k=4)
    images, labels = batch_of(2, (4, 3, 8, 8), 5)
    betas = net.betas()
    first = torch.cat(torch.autograd.grad(F.cross_entropy(net(images), labels), betas, create_graph=True))

    def product(v):
        return torch.cat(torch.autograd.grad(first @ v, betas, retain_graph=True))

    v = torch.randn(28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = product(v)
    size = float(found.abs().max())
    assert size > 1e-5
    for at in (0, 14):
        for a, b in NODES:
            assert abs(float(found[at + a : at + b].sum())) < 1e-10 * size
            ones = torch.zeros(28, dtype=torch.float64)
            ones[at + a : at + b] = 1
            assert product(ones).abs().max() < 1e-10 * size

    def gradient_at(step):
        with torch.no_grad():
            for b, part in zip(betas, v.split(14), strict=True):
                b.add_(part, alpha=step)
        return torch.cat(gradients(net, images, labels, betas)[1:])

    h = 1e-6
    forward = gradient_at(h)
    differences = (forward - gradient_at(-2 * h)) / (2 * h)
    assert (found - differences).abs().max() < 1e-5 * size


def test_weights_have_second_derivatives():
    net = net_of(5, classes=3, channels=4, layers=3, k=2)
    weights = list(net.parameters())
    loss = F.cross_entropy(net(batch_of(5, (3, 3, 8, 8), 3)[0]), torch.tensor([0, 1, 2]))
    first = torch.autograd.grad(loss, weights, create_graph=True)
    mixed = torch.autograd.grad(sum(g.square().sum() for g in first), net.betas())
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in mixed)


@pytest.mark.parametrize(("k", "tiny"), [(1, True), (4, False)])
def test_without_shuffle_edges_between_nodes_hardly_matter(k, tiny):
    """At k = 1 and the small start every node of a normal cell is nearly the same mix of x0 and x1."""
    torch.manual_seed(0)
    net = SuperNet(10, channels=8, k=k).double()
    _, g, _ = gradients(net, *batch_of(4, (4, 3, 16, 16), 10), net.betas())
    inputs = max(float(g[a : a + 2].abs().max()) for a, _ in NODES)
    between = max(float(g[a + 2 : b].abs().max()) for a, b in NODES[1:])
    assert (between < 1e-2 * inputs) == tiny


def test_one_pass_asks_for_one_kind_of_gradient():
    net = SuperNet(3, channels=4, layers=3)
    with net.only_arch():
        assert not any(p.requires_grad for p in net.parameters())
        assert all(b.requires_grad for b in net.betas())
    with net.only_weights():
        assert all(p.requires_grad for p in net.parameters())
        assert not any(b.requires_grad for b in net.betas())
    with pytest.raises(UsageError), net.only_weights():
        net(torch.zeros(1))
    assert all(t.requires_grad for t in (*net.parameters(), *net.betas()))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"k": 3}, r"k: expected a divisor of the 16 channels .* got 3"),
        ({"k": 0}, "k: expected a positive whole number, got 0"),
        ({"k": 2.0}, r"k: expected a positive whole number, got 2\.0"),
        ({"in_channels": 2}, r"in_channels: expected 1 \(grey\) or 3 \(colour\), got 2"),
        ({"classes": 0}, "classes: expected a positive whole number, got 0"),
        ({"classes": True}, "classes: expected a positive whole number, got True"),
        ({"channels": -4}, "channels: expected a positive whole number, got -4"),
        ({"layers": 0}, "layers: expected a positive whole number, got 0"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(UsageError, match=message):
        SuperNet(**{"classes": 10, **sizes})


@pytest.mark.parametrize("shape", [(2, 3, 30, 32), (2, 3, 32, 6), (2, 1, 32, 32), (3, 32, 32)])
def test_bad_images(shape):
    with pytest.raises(UsageError, match=r"images: expected shape \(B, 3, H, W\) with H and W divisible by 4, got"):
        SuperNet(10, channels=4, layers=3)(torch.zeros(shape))
