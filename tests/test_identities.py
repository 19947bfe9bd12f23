"""What must hold for the kernels whatever the numbers are, with no reference beside them."""

import pytest
import torch
from ftso_fast.kernels import NetSpec, channel_shuffle, skip_net, testing
from networks import NODES, batch_of, gradients, net_of
from torch.nn import functional as F

from ftso_fast import kernels

ORDERS = [(16, 4, 2), (32, 4, 5), (64, 4, 3), (128, 4, 7), (256, 4, 4), (16, 2, 4), (32, 2, 5), (64, 2, 6)]
"""(C, k, order of the channel shuffle)."""
FIRST_EDGES = (0, 2, 5, 9)  # of the nodes: from input 0, then from input 1, then from the nodes before


def only(*edges):
    weights = torch.zeros(14)
    weights[list(edges)] = 1
    return weights


@pytest.mark.parametrize(("C", "k", "order"), ORDERS)
def test_one_edge_again_and_again_returns_the_input(C, k, order, isa, one_thread):
    """After as many applications as the shuffle's order and not before, whatever node and input the edge joins."""
    start = torch.randn(2, C, 3, 5, generator=torch.Generator().manual_seed(C + k))
    for node, first in enumerate(FIRST_EDGES):
        for origin in (0, 1):
            inputs = [torch.zeros_like(start), torch.zeros_like(start)]
            inputs[origin], found = start, 0
            while found == 0 or not torch.equal(inputs[origin], start):
                with testing.arm("cpu", isa):
                    inputs[origin] = kernels.skip_cell(*inputs, only(first + origin), k).chunk(4, 1)[node]
                found += 1
                assert found <= order
            assert found == order


@pytest.mark.parametrize("cells", [3, 4])
@pytest.mark.parametrize(("C", "k", "order"), ORDERS)
def test_nodes_in_a_row_shuffle_again_and_again(C, k, order, cells, isa, one_thread):
    """In the compiled network, whose last cell (a reduction cell of three, a normal one of four) feeds each node to
    the next alone and whose classifier shows the nodes: equal ones are as far apart as the shuffle's order."""
    spec = NetSpec(C // 4, cells, k)
    weights = list(net_of(0, classes=4 * C, channels=C // 4, layers=cells, k=k).float().parameters())
    weights[-2:] = torch.eye(4 * C), torch.zeros(4 * C)
    row = only(0, *(first + 2 + i for i, first in enumerate(FIRST_EDGES[1:])))
    images = batch_of(0, (2, 3, 8, 8), 1)[0].float()
    with testing.arm("cpu", isa), torch.no_grad():
        nodes = skip_net(images, row, row, weights, spec).view(2, 4, C, 1, 1).unbind(1)
    for i in range(4):
        assert nodes[i].unique().numel() == 2 * C
        for j in range(i):
            assert torch.equal(nodes[i], nodes[j]) == ((i - j) % order == 0)
            if i == j + 1:
                assert torch.equal(nodes[i], channel_shuffle(nodes[j], k))


def test_beta_gradients_sum_to_zero_per_node(isa):
    """They go through a softmax."""
    net = net_of(1, classes=10).float()
    images, labels = batch_of(1, (4, 3, 16, 16), 10)
    with testing.arm("cpu", isa):
        _, *found = gradients(net, images.float(), labels, net.betas())
    for g in found:
        for a, b in NODES:
            assert abs(float(g[a:b].sum())) < 1e-12 * float(g[a:b].abs().max())
            assert g[a:b].abs().max() > 1e-6


@pytest.fixture(params=[(3, 16, 4), (4, 8, 2), (5, 6, 1), (8, 16, 4)], ids=lambda p: "cells{}-C{}-k{}".format(*p))
def passed(request, isa, wrap_net):
    """One forward and backward pass for everything: compiled network, arguments, logits and the gradients of logits,
    normal edges, reduction edges and weights."""
    cells, channels, k = request.param
    net = net_of(2, classes=10, channels=channels, layers=cells, k=k).float()
    images, labels = batch_of(2, (5, 3, 16, 16), 10)
    edges = [net.edge_weights(b).detach().float().requires_grad_() for b in net.betas()]
    weights = list(net.parameters())
    ran = []
    wrap_net(backward=lambda core, *args: ran.append(core) or core.backward(*args))
    with testing.arm("cpu", isa):
        logits = skip_net(images.float(), *edges, weights, net.spec)
        loss = F.cross_entropy(logits, labels)
        d_logits, *found = torch.autograd.grad(loss, [logits, *edges, *weights])
    return net, ran[0], edges, logits.detach(), d_logits, found[:2], found[2:]


def test_sums_of_batch_norm_are_the_edges_dots(passed):
    """With S_i the sum of gradient times value of a normal cell's input i, taken for its batch norm, and d_ij the
    gradient of the weight b_ij of the edge from it to node j: sum over cells of S_i = sum over j of b_ij d_ij. With
    three cells only the first is normal."""
    net, core, (edges, _), _, _, (d_edges, _), _ = passed
    for i in (0, 1):
        from_input = [first + i for first in FIRST_EDGES]
        terms = edges.detach()[from_input].double() * d_edges[from_input].double()
        sums = [
            sum(core.input_sums(n, i)[cell.preprocess1[1].out_channels :])
            for n, cell in enumerate(net.cells)
            if not cell.reduction
        ]
        assert abs(sum(sums) - float(terms.sum())) < 1e-5 * max(float(terms.abs().max()), max(map(abs, sums)))
        assert terms.abs().max() > 1e-5


def test_scaling_a_cell_changes_nothing_behind_a_batch_norm(passed):
    """The weights of the edges from the inputs scale a cell's output, which the next ReLU, convolution and batch norm
    undo (all but its eps): sum over them of b d = 0, but for the last cell, whose mean the classifier reads: there it
    is the sum of the logits' gradient times the logits without their bias."""
    net, _, edges, logits, d_logits, d_edges, _ = passed
    last = float((d_logits * (logits - net.classifier.bias.detach())).double().sum())
    from_inputs = [first + i for first in FIRST_EDGES for i in (0, 1)]
    for reduction in (False, True):
        terms = (edges[reduction].detach() * d_edges[reduction])[from_inputs].double()
        expected = last if net.cells[-1].reduction == reduction else 0.0
        assert abs(float(terms.sum()) - expected) < 1e-3 * float(terms.abs().sum())


def test_weights_before_a_batch_norm_are_orthogonal_to_their_gradients(passed):
    """Row by row: a longer row changes nothing behind the batch norm (all but its eps)."""
    net, *_, found = passed
    checked = 0
    for (name, w), g in zip(net.named_parameters(), found, strict=True):
        if w.dim() == 4:
            rows, slopes = w.detach().flatten(1).double(), g.flatten(1).double()
            dots, lengths = (rows * slopes).sum(1).abs(), rows.norm(dim=1) * slopes.norm(dim=1)
            assert (lengths > 0).all(), name
            assert (dots < 1e-3 * lengths).all(), name
            checked += len(rows)
    assert checked > 100
