"""The super-network over any operators: against the textbook in float64, its sizes, its softmaxes, its arguments."""

import dataclasses
from itertools import pairwise

import pytest
import textbook_mixed
import torch
from networks import batch_of, gradients

from ftso_fast import DARTS, OPERATOR_SETS, PRIMITIVES, SuperNet, UsageError, kernels
from ftso_fast.mixed import MixedCell
from ftso_fast.operations import OPS, MixedOp

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT = {"normal": ((0, 1), (2, 0), (1, 3), (4, 2)), "reduce": ((1, 0), (0, 1), (3, 2), (0, 4))}
ALL = PRIMITIVES


def space_of(operators):
    return dataclasses.replace(DARTS, operators=OPERATOR_SETS.get(operators, operators))


def net_of(seed, operators, spread=0.5, **sizes):
    """A float64 network whose architecture parameters have the spread 0.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SuperNet(**{"classes": 5, "channels": 8, "layers": 3, "space": space_of(operators), **sizes}).double()
        with torch.no_grad():
            for t in net.arch_parameters():
                t.normal_(0, spread)
    return net


def named(net):
    names = ("betas_normal", "betas_reduce", "alphas_normal", "alphas_reduce")
    return {name: getattr(net, name) for name in names if getattr(net, name) is not None}


def largest_error(net, images, labels):
    """Of the loss and every gradient: the largest difference to the textbook relative to the largest value."""
    weights, arch = list(net.parameters()), named(net)
    found = gradients(net, images, labels, [*arch.values(), *weights])
    setting = (net.space.operators, net.topology)
    wanted = textbook_mixed.gradients(images, labels, weights, arch, *setting, layers=len(net.cells), k=net.spec.k)
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


CASES = {
    "all k4": (ALL, {"k": 4}),
    "all k1": (ALL, {"k": 1}),
    "all k2 deep": (ALL, {"k": 2, "layers": 8, "channels": 4}),
    "darts": (ALL, {"k": 1, "weighted_edges": False}),
    "all on a topology": (ALL, {"k": 4, "topology": KEPT, "layers": 5}),
    "skip on a topology": ("skip", {"k": 2, "topology": KEPT}),
    "max_pool": ("max_pool", {"k": 4, "layers": 4}),
    "sep3": ("sep3", {"k": 4}),
    "3op": ("3op", {"k": 2, "layers": 4}),
    "4op": ("4op", {"k": 4, "in_channels": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_textbook_in_float64(case):
    operators, sizes = CASES[case]
    net = net_of(1, operators, **sizes)
    assert isinstance(net.cells[0], MixedCell)
    images, labels = batch_of(1, (3, sizes.get("in_channels", 3), 12, 8), 5)
    assert largest_error(net, images, labels) < 1e-9


def test_nothing_to_search():
    net = net_of(0, "skip", weighted_edges=False)
    assert net.arch_parameters() == []
    assert net(torch.zeros(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 5)


@pytest.mark.parametrize("k", [1, 4])
def test_the_skip_only_network_is_the_same_with_one_operator(k):
    net = net_of(2, "skip", k=k, layers=4)
    assert net.skip_only
    images, _ = batch_of(2, (3, 3, 8, 8), 5)
    wanted = textbook_mixed.logits(
        images, list(net.parameters()), named(net), net.space.operators, net.topology, layers=4, k=k
    )
    assert torch.allclose(net(images), wanted, rtol=1e-10, atol=1e-10)


def same_weights_on_all_edges(net, patch):
    first = {stride: next(e for e in net.cells[1].edges if e.stride == stride) for stride in (1, 2)}
    for edge in net.cells[1].edges:
        patch.setattr(edge, "weights", first[edge.stride].weights)


def columns_swapped(net, patch):
    patch.setattr(net, "alphas", lambda: (net.alphas_normal.roll(1, 1), net.alphas_reduce.roll(1, 1)))


SEEDED_BUGS = {
    "one softmax over all edges": lambda net, p: p.setattr(net, "edge_weights", lambda betas: betas.softmax(0)),
    "the weights of one edge for all": same_weights_on_all_edges,
    "operators in another order": columns_swapped,
    "cells swapped": lambda net, p: p.setattr(net, "alphas", lambda: (net.alphas_reduce, net.alphas_normal)),
}


@pytest.mark.parametrize("bug", SEEDED_BUGS)
def test_the_comparison_sees(bug, monkeypatch):
    net = net_of(0, ALL, k=4)
    images, labels = batch_of(0, (3, 3, 8, 8), 5)
    assert largest_error(net, images, labels) < 1e-9
    SEEDED_BUGS[bug](net, monkeypatch)
    with torch.no_grad():
        weights, arch = list(net.parameters()), named(net)
        sizes = {"layers": 3, "k": 4}
        wanted = textbook_mixed.logits(images, weights, arch, ALL, net.topology, **sizes)
    assert (net(images) - wanted).abs().max() > 1e-3 * wanted.abs().max()


SIZES = {
    ("skip", 4): 102_010,
    ("max_pool", 4): 99_450,
    ("sep3", 4): 147_386,
    ("3op", 4): 102_010,
    ("4op", 4): 149_946,
    (ALL, 4): 299_578,
    ("skip", 1): 140_410,
    ("max_pool", 1): 99_450,
    ("sep3", 1): 624_506,
    ("3op", 1): 140_410,
    ("4op", 1): 665_466,
    (ALL, 1): 1_930_618,
}


@pytest.mark.parametrize(("operators", "k"), SIZES, ids=lambda v: "all" if v is ALL else str(v))
def test_number_of_parameters(operators, k):
    net = SuperNet(10, k=k, space=space_of(operators))
    assert sum(p.numel() for p in net.parameters()) == SIZES[operators, k]


def test_shapes_and_order_of_an_edges_parameters():
    """PC-DARTS' own, operator after operator: none and the pools have none."""
    sep, dil = ([(4, 1, K, K), (4, 4, 1, 1)] for K in (3, 3))
    large = [(4, 1, 5, 5), (4, 4, 1, 1)]
    operators = [*sep, *sep, *large, *large, *dil, *large]
    for stride, skip in ((1, []), (2, [(2, 4, 1, 1)] * 2)):
        edge = MixedOp(16, stride, 4, ALL)
        assert [tuple(p.shape) for p in edge.parameters()] == [*skip, *operators]
        assert all(a is b for a, b in zip(edge.weights(), edge.parameters(), strict=True))
        assert kernels.mixed_weights(16, 4, ALL, [stride]) == [
            [[tuple(p.shape) for p in OPS[name](4, stride, False).parameters()] for name in ALL]
        ]


@pytest.mark.parametrize("name", PRIMITIVES)
@pytest.mark.parametrize("stride", [1, 2])
def test_an_operator_by_itself(name, stride):
    """Values of the modules; with affine batch norms weight and bias follow each pointwise convolution."""
    torch.manual_seed(0)
    plain, affine = (OPS[name](6, stride, own).double() for own in (False, True))
    x = torch.randn(2, 6, 8, 10, dtype=torch.float64)
    wanted = textbook_mixed.operator(name, x, stride, iter(plain.parameters()))
    assert plain(x).shape == (2, 6, 8 // stride, 10 // stride)
    assert torch.allclose(plain(x), wanted, rtol=1e-10, atol=1e-10)
    extra = [p for p in affine.parameters() if p.dim() == 1]
    assert len(extra) == 2 * sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())
    if extra:
        weights = [p for p in affine.parameters() if p.dim() > 1]
        with torch.no_grad():
            for p, own in zip(weights, plain.parameters(), strict=True):
                p.copy_(own)
            extra[-2].uniform_(0.5, 2)
            extra[-1].normal_()
        last = extra[-2].view(1, -1, 1, 1) * wanted + extra[-1].view(1, -1, 1, 1)
        assert torch.allclose(affine(x), last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [1, 4])
def test_a_mixed_edge_by_itself(k):
    torch.manual_seed(0)
    edge = MixedOp(8, 2, k, ALL).double()
    x, alphas = torch.randn(2, 8, 8, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    wanted = textbook_mixed.edge(x, 2, k, ALL, alphas, iter(edge.parameters()))
    assert torch.allclose(edge(x, alphas), wanted, rtol=1e-10, atol=1e-10)


def test_one_softmax_for_each_node_and_each_edge():
    """A number added to all betas of a node, or to all alphas of an edge, changes nothing; gradients sum to zero."""
    for topology, bounds in ((None, (0, 2, 5, 9, 14)), (KEPT, (0, 2, 4, 6, 8))):
        net = net_of(3, "4op", topology=topology)
        images, labels = batch_of(3, (3, 3, 8, 8), 5)
        _, *found = gradients(net, images, labels, net.arch_parameters())
        for g in found[:2]:
            for a, b in pairwise(bounds):
                assert abs(float(g[a:b].sum())) < 1e-13
                assert g[a:b].abs().max() > 1e-6
        for g in found[2:]:
            assert g.shape == (bounds[-1], 4)
            assert g.sum(1).abs().max() < 1e-13
            assert (g.abs().amax(1) > 1e-7).all()
        before = net(images)
        with torch.no_grad():
            net.betas_normal[bounds[1] : bounds[2]] += 1
            net.alphas_reduce[1] -= 2
        assert torch.allclose(net(images), before, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            net.betas_normal[0] += 1
        assert not torch.allclose(net(images), before, rtol=1e-4, atol=1e-6)


def test_architecture_parameters():
    net = SuperNet(10, channels=4, space=space_of("4op"))
    assert [tuple(t.shape) for t in net.arch_parameters()] == [(14,), (14,), (14, 4), (14, 4)]
    ours = {t.data_ptr() for t in net.arch_parameters()}
    assert not ours & {t.data_ptr() for t in (*net.parameters(), *net.buffers())}
    for t in net.arch_parameters():
        assert t.dtype == torch.float64
        assert t.requires_grad
        assert 2e-4 < t.detach().std() < 3e-3
    assert SuperNet(10, channels=4, space=space_of("sep3")).alphas() == ()
    darts = SuperNet(10, channels=4, space=space_of(ALL), weighted_edges=False)
    assert [tuple(t.shape) for t in darts.arch_parameters()] == [(14, 8), (14, 8)]


def test_order_of_the_random_numbers():
    """Weights, alphas_normal, alphas_reduce, betas_normal, betas_reduce, as PC-DARTS draws them."""
    torch.manual_seed(4)
    net = SuperNet(10, channels=4, layers=3, space=space_of("3op"), weighted_edges=False)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    whole = SuperNet(10, channels=4, layers=3, space=space_of("3op"))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.alphas(), whole.alphas(), strict=True))
    torch.set_rng_state(after)
    for betas in whole.betas():
        assert torch.equal(betas, 1e-3 * torch.randn(14, dtype=torch.float64))


def test_one_pass_asks_for_one_kind_of_gradient():
    net = SuperNet(3, channels=4, layers=3, space=space_of("4op"))
    with net.only_arch():
        assert not any(p.requires_grad for p in net.parameters())
        assert all(t.requires_grad for t in net.arch_parameters())
    with net.only_weights():
        assert all(p.requires_grad for p in net.parameters())
        assert not any(t.requires_grad for t in net.arch_parameters())
    assert all(t.requires_grad for t in (*net.parameters(), *net.arch_parameters()))


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ({"normal": KEPT["normal"]}, r"topology: expected the cells normal and reduce, got \['normal'\]"),
        ({**KEPT, "reduce": KEPT["reduce"][:3]}, "topology of reduce: expected two different earlier states"),
        ({**KEPT, "normal": ((0, 2), *KEPT["normal"][1:])}, "topology of normal: expected .* got "),
        ({**KEPT, "normal": ((1, 1), *KEPT["normal"][1:])}, "topology of normal: expected .* got "),
        ({**KEPT, "normal": ((0,), *KEPT["normal"][1:])}, "topology of normal: expected .* got "),
    ],
)
def test_bad_topology(topology, message):
    with pytest.raises(UsageError, match=message):
        SuperNet(10, channels=4, layers=3, topology=topology)


def test_bad_arguments():
    with pytest.raises(UsageError, match=r"operators: expected one or more of none, .* got"):
        MixedOp(8, 1, 4, ("conv",))
    with pytest.raises(UsageError, match=r"operators: expected one or more of none, .* got"):
        MixedOp(8, 1, 4, ())
    with pytest.raises(UsageError, match="k: expected a divisor of the 8 channels, got 3"):
        MixedOp(8, 1, 3, ALL)
    net = SuperNet(10, channels=4, layers=3, space=space_of("3op"))
    net.precision = "bf16"
    with pytest.raises(UsageError, match="precision: expected float32 for any network but the skip-only one, got bf16"):
        net(torch.zeros(2, 3, 8, 8))
