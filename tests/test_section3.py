"""Section 3's numbers, its formulas against counting by hand, and the counts of real networks against their modules."""

import json
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from ftso_fast import DARTS, OPERATOR_SETS, PRIMITIVES, SearchSpace, SuperNet, kernels
from ftso_fast import section3 as s3
from ftso_fast.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
measured = cache(s3.measured)


@pytest.fixture(autouse=True)
def each_network_once(monkeypatch):
    monkeypatch.setattr(s3, "measured", measured)


def test_the_papers_numbers():
    assert s3.darts_operations(7, 8) == 112
    assert s3.topology_operations(7) == 14
    assert s3.operator_operations(7, 8) == 64
    assert s3.param_ratio(8, 5, 512) == Fraction(1, 52_432_896)
    assert s3.flop_ratio(8, 5, 512) == Fraction(1, 102_408)


@pytest.mark.parametrize("m", range(1, 12))
def test_edges_are_those_of_the_search_space(m):
    space = SearchSpace("test", n_nodes=m)
    assert s3.edges(m + 3) == space.n_edges == sum(j + 1 for j in range(1, m + 1))
    assert s3.operator_operations(m + 3, 5) == sum(2 * 5 for _ in space.full)


def test_a_convolution_has_what_the_formulas_say():
    k, C, size, p, n = 3, 6, 5, 2, 5
    layer = torch.nn.Conv2d(C, C, k, padding=1)
    own = sum(w.numel() for w in layer.parameters())
    assert s3.darts_params(n, p, k, C) == own * p * s3.edges(n)
    products = size * size * (C * C * k * k + C)
    assert s3.darts_flops(n, p, k, C, size, size) == products * p * s3.edges(n)
    flops = Fraction(s3.topology_flops(n, C, size, size), s3.darts_flops(n, p, k, C, size, size))
    params = Fraction(s3.topology_params(n), s3.darts_params(n, p, k, C))
    assert (flops, params) == (s3.flop_ratio(p, k, C), s3.param_ratio(p, k, C))


COUNTS = {
    (4, "skip"): (102_010, 20_728_320),
    (4, "max_pool"): (99_450, 20_466_176),
    (4, "sep3"): (147_386, 28_523_008),
    (4, "4op"): (149_946, 28_785_152),
    (4, "all"): (299_578, 56_596_992),
    (1, "skip"): (140_410, 24_660_480),
    (1, "sep3"): (624_506, 96_733_696),
    (1, "all"): (1_930_618, 300_255_744),
}


@pytest.mark.parametrize(("k", "name"), COUNTS)
def test_counts_are_those_of_pc_darts_network(k, name):
    operators = PRIMITIVES if name == "all" else OPERATOR_SETS[name]
    assert s3.measured(operators, k) == s3.Counts(*COUNTS[k, name])


def test_counts_are_those_of_a_forward_pass(monkeypatch):
    """The counter sees every product that the reference path computes: it is counted again, call by call."""
    seen = []

    def counting(real):
        def counted(x, weight, *rest, **named):
            out = real(x, weight, *rest, **named)
            seen.append(out.numel() * weight[0].numel())
            return out

        return counted

    for name in ("conv2d", "linear"):
        monkeypatch.setattr(F, name, counting(getattr(F, name)))
    net = SuperNet(10, space=SearchSpace("test", operators=DARTS.operators))
    with kernels.use_backend("reference"), torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert sum(seen) == 20_728_320
    assert len(seen) == sum(w.dim() > 1 for w in net.parameters())


def test_text_and_json(capsys):
    assert main(["reproduce", "section3"]) == 0
    out = capsys.readouterr().out
    for figure in ("112", "14", "64", "1.9072e-08", "9.7649e-06", "102,010", "299,578", "0.341", "0.366", "0.073"):
        assert figure in out
    assert main(["reproduce", "section3", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["schema"] == "ftso.section3/1"
    assert fields["measured"]["k=4"]["param_ratio"] == pytest.approx(0.3405, abs=1e-4)
    assert fields["measured"]["k=1"]["mac_ratio"] == pytest.approx(0.0821, abs=1e-4)


def test_something_to_reproduce_is_asked_for(capsys):
    assert main(["reproduce"]) == 2
    assert main(["reproduce", "section4"]) == 2
    assert "invalid choice: 'section4'" in capsys.readouterr().err
