"""NAS-Bench-201: architectures, the table, the super-network against a plain one, searches, and the paper's rows."""

import csv
import dataclasses
import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from searching import arrays
from torch import nn
from torch.nn import functional as F

from ftso_fast import DataError, UsageError, kernels, search
from ftso_fast.config import NATS_DARTS, NATS_FTSO
from ftso_fast.nats import EDGES, OPERATORS, Architecture, architectures
from ftso_fast.nats_net import CONV1, CONV3, NONE, POOL, SKIP, NatsCell, NatsNet
from ftso_fast.nats_search import search_nats
from ftso_fast.nats_table import DATASETS, read_table, spearman
from ftso_fast.space import NATS_BENCH
from ftso_fast.table2 import find_rows, table2

pytestmark = pytest.mark.usefixtures("one_thread")

FTSO = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_1x1~0|nor_conv_3x3~1|nor_conv_3x3~2|"
SMALL = {"channels": 4, "cells": 1}


def real_table():
    path = Path(os.environ.get("FTSO_DATA", "")) / "nb201.csv.gz"
    if not os.environ.get("FTSO_DATA") or not path.exists():
        pytest.skip("FTSO_DATA names no folder with nb201.csv.gz")
    return str(path)


# -- the value


def test_all_texts_round_trip():
    every = list(architectures())
    assert len(set(every)) == len({str(a) for a in every}) == 15_625
    assert all(Architecture.from_text(str(a)) == a for a in every)


def test_isomorphism_classes():
    every = list(architectures())
    assert len({a.isomorphism for a in every}) == 6_466
    assert len({a.function for a in every}) == 4_930


def test_equal_classes_compute_the_same():
    """Among architectures without convolutions, equal functions give equal outputs, and the finer classes too."""
    x = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = {}
    for a in architectures():
        if {"nor_conv_1x1", "nor_conv_3x3"} & set(a.operators):
            continue
        out = plain_cell(x, a.operators, None)
        for key in (a.function, a.isomorphism):
            torch.testing.assert_close(outputs.setdefault(key, out), out)
        assert bool(out.any()) == bool(a.function)


def plain_cell(x, operators, convolutions):
    """One cell with a fixed operator on each edge, or a function of (edge, operator, input)."""
    states = [x, *(torch.zeros_like(x) for _ in range(3))]
    for e, (source, node) in enumerate(EDGES):
        s = states[source]
        term = {
            "none": lambda s, e: torch.zeros_like(s),
            "skip_connect": lambda s, e: s,
            "avg_pool_3x3": lambda s, e: F.avg_pool2d(s, 3, 1, 1, count_include_pad=False),
            "nor_conv_1x1": lambda s, e: normalised(F.conv2d(s.relu(), convolutions[0][e])),
            "nor_conv_3x3": lambda s, e: normalised(F.conv2d(s.relu(), convolutions[1][e], padding=1)),
        }
        if isinstance(operators, tuple):
            states[node] = states[node] + term[operators[e]](s, e)
        else:
            states[node] = states[node] + sum(
                w * term[name](s, e) for w, name in zip(operators[e], OPERATORS, strict=True)
            )
    return states[-1]


def normalised(z):
    return F.batch_norm(z, None, None, training=True)


BAD = [
    ("", "form"),
    ("|nor_conv_3x3~0|", "six of"),
    (FTSO + "+|none~0|none~1|none~2|none~3|", "six of"),
    (FTSO.replace("~2", "~1"), "read 0 to 2"),
    (FTSO.replace("nor_conv_1x1", "sep_conv_3x3"), "six of"),
    (FTSO[1:], "form"),
    (FTSO.replace("|+|", "+"), "form"),
    ("|" * 300, "form"),
    ("__import__('os')", "form"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_other_texts_are_refused(text, words):
    with pytest.raises(UsageError, match=f"architecture: expected .*{words}"):
        Architecture.from_text(text)


@pytest.mark.parametrize("operators", [(), ("none",) * 5, ("none",) * 7, ("sep_conv_3x3",) * 6, ["none"] * 6])
def test_other_values_are_refused(operators):
    with pytest.raises(UsageError, match="architecture: expected six of"):
        Architecture(operators)


def test_the_space():
    assert (NATS_BENCH.n_edges, NATS_BENCH.full) == (6, ((0,), (0, 1), (0, 1, 2)))
    with pytest.raises(UsageError, match="space: 'nats-bench' keeps its topology"):
        search(arrays(), space=NATS_BENCH)


def test_sizes():
    a = Architecture.from_text(FTSO)
    assert (a.params(), a.macs()) == (1_316_506, 188_662_400)
    assert Architecture(("nor_conv_3x3",) * 6).params() == 1_531_546
    assert Architecture(("skip_connect",) * 6).macs() == 7_783_040


# -- the table


def test_the_real_table():
    table = read_table(real_table())
    assert len(table.entries) == 15_625
    with gzip.open(real_table(), "rt") as file:
        for entry, row in zip(table.entries, csv.DictReader(file), strict=True):
            assert str(entry.architecture) == row["arch"]
            assert entry.architecture.params() == int(row["params"])
            assert entry.architecture.macs() + 10 == int(row["macs"])  # the table counts the classifier's bias
    found = {f.row: f for f in find_rows(table)}
    assert [f.entry.index for f in found.values()] == [1835, 3521, 4771, 561, 2057, 1728, 5721]
    assert all(f.off < 0.012 < 0.04 < f.next_off for f in found.values())
    assert table.rank(table.find(5721), "cifar10") == 45


def text_of(rows, header=None):
    header = header or ["index", "arch", *(f"{d}_{s}" for d in DATASETS for s in ("test", "valid"))]
    return "\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n"


def rows(n):
    return [[i, a, i % 90, i % 80, i % 70, 3, 2, 1] for i, a in zip(range(n), architectures(), strict=False)]


def written(tmp_path, text, packed=False):
    path = tmp_path / "table.csv"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return str(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_users_own_table(tmp_path, packed):
    table = read_table(written(tmp_path, text_of(rows(100)), packed))
    assert len(table.entries) == 100
    assert table.find("17") == table.find(17) == table.find(str(table.entries[17].architecture)) == table.entries[17]
    assert table.best("cifar10").index == 89
    assert table.rank(table.entries[88], "cifar10") == 2
    with pytest.raises(UsageError, match="architecture: expected one of the table's 100, got 100"):
        table.find(100)
    with pytest.raises(UsageError, match="architecture: expected one of the table's 100, got"):
        table.find(FTSO)


BROKEN = {
    "row 6: expected a whole index": text_of([*rows(5), ["x", *rows(6)[5][1:]]]),
    "row 1: expected a whole index and accuracies from 0 to 100": text_of([[0, rows(1)[0][1], 101, 1, 1, 1, 1, 1]]),
    "row 1: expected a whole index and accuracies": text_of([[0, rows(1)[0][1], "nan", 1, 1, 1, 1, 1]]),
    "row 1: architecture: expected": text_of([[0, "|sep~0|", 1, 1, 1, 1, 1, 1]]),
    "index 0 is there twice": text_of([rows(1)[0], rows(1)[0]]),
    "each architecture once": text_of([rows(1)[0], [1, *rows(1)[0][1:]]]),
    "got 0 rows": text_of([]),
    "has no column index": "a,b\n1,2\n",
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_tables(tmp_path, words):
    with pytest.raises(DataError, match=words):
        read_table(written(tmp_path, BROKEN[words]))


def test_files_that_are_no_table(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "missing.csv")
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(b"index" * 1000)[:40])
    with pytest.raises(DataError, match="cannot be read"):
        read_table(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no UTF-8 text"):
        read_table(path)
    monkeypatch.setattr("ftso_fast.nats_table.MAX_BYTES", 5000)
    path.write_bytes(gzip.compress(b"0" * 10_000))
    with pytest.raises(DataError, match="more than 5,000 bytes"):
        read_table(path)


def test_spearman():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [2, 2, 2]) == 0
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


# -- the super-network


def net_of(seed=0, **sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NatsNet(3, **{**SMALL, **sizes}).double()
        with torch.no_grad():
            net.arch.normal_(0, 1)
            for p in net.parameters():
                if p.dim() == 1:
                    p.normal_(1, 0.3)
    return net


def batch_of(seed=1, B=4, size=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, size, size, generator=g, dtype=torch.float64), torch.arange(B) % 3


def test_the_cell_is_the_sum_of_its_edges():
    torch.manual_seed(0)
    cell, x = NatsCell(4).double(), torch.randn(3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 5, dtype=torch.float64).softmax(1).requires_grad_()
    convolutions = [m.weight for m in cell.conv_1x1], [m.weight for m in cell.conv_3x3]
    wanted, found = plain_cell(x, weights, convolutions), cell(x, weights)
    torch.testing.assert_close(found, wanted)
    upstream, inputs = torch.randn_like(found), [x, weights, *convolutions[0], *convolutions[1]]
    a, b = (torch.autograd.grad(out, inputs, upstream) for out in (found, wanted))
    torch.testing.assert_close(a, b)
    for e, name in enumerate(Architecture.from_text(FTSO).operators):
        weights.data[e] = torch.eye(5)[OPERATORS.index(name)]
    torch.testing.assert_close(cell(x, weights), plain_cell(x, Architecture.from_text(FTSO).operators, convolutions))
    assert [OPERATORS[i] for i in (NONE, SKIP, CONV1, CONV3, POOL)] == list(OPERATORS)


def test_a_bias_would_change_nothing():
    """NAS-Bench-201's search puts a bias before batch norms without affine part; outputs do not see it."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    conv = nn.Conv2d(6, 6, 3, padding=1).double()
    torch.testing.assert_close(normalised(conv(x)), normalised(F.conv2d(x, conv.weight, padding=1)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float32_on_both_backends(backend):
    net, (images, labels) = net_of(channels=8), batch_of()
    inputs = [net.arch, *net.weights()]
    wanted = torch.autograd.grad(F.cross_entropy(net(images), labels), inputs)
    net = net.float()
    net.arch = net.arch.detach().requires_grad_()
    with kernels.use_backend(backend):
        found = torch.autograd.grad(F.cross_entropy(net(images.float()), labels), [net.arch, *net.weights()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-4 * max(1.0, float(b.abs().max())))


def test_gradients_are_derivatives():
    net, (images, labels) = net_of(), batch_of()
    g = torch.autograd.grad(F.cross_entropy(net(images), labels), net.arch)[0]
    d = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ends = []
    with torch.no_grad():
        for h in (1e-6, -1e-6):
            net.arch += h * d
            ends.append(F.cross_entropy(net(images), labels).item())
            net.arch -= h * d
    assert (g * d).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_skip_only_search_has_no_gradient():
    """Each node is the cell's input, whatever the betas: where its sums are exact, so is the zero."""
    net, (images, labels) = net_of().float(), batch_of()
    betas = torch.tensor([0.3, 0, 0, 0, 0, math.log(2)], dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(net.skip_only(images.float(), betas), labels)
    assert torch.autograd.grad(loss, betas)[0].eq(0).all()
    net, other = net.double(), torch.randn(6, dtype=torch.float64).mul_(1e-3).requires_grad_()
    torch.testing.assert_close(net.skip_only(images, other), net.skip_only(images, betas))
    loss = F.cross_entropy(net.skip_only(images, other), labels)
    assert torch.autograd.grad(loss, other)[0].abs().max() < 1e-15
    as_operators = F.one_hot(torch.full((6,), SKIP), 5) * torch.tensor([1, 0.5, 0.5, 0.25, 0.25, 0.5])[:, None]
    torch.testing.assert_close(net.computed(images, as_operators.double()), net.skip_only(images, betas))


@pytest.mark.parametrize("sizes", [{"channels": 0}, {"cells": 0}, {"classes": True}, {"channels": 2.0}])
def test_sizes_of_the_network(sizes):
    with pytest.raises(UsageError, match="expected a positive whole number"):
        NatsNet(**{"classes": 3, **SMALL, **sizes})


def test_images_of_the_network():
    for shape in ((2, 1, 8, 8), (2, 3, 6, 8), (3, 8, 8)):
        with pytest.raises(UsageError, match="images: expected shape"):
            net_of()(torch.zeros(shape, dtype=torch.float64))


# -- searching


def searched(mode="3it", **options):
    config = options.pop("config", None) or {"ftso": NATS_FTSO, "darts": NATS_DARTS}[options.get("method", "ftso")]
    return search_nats(arrays(), mode, config=dataclasses.replace(config, batch_size=8), **SMALL, **options)


@pytest.mark.parametrize("options", [{}, {"method": "darts"}, {"method": "darts", "order": 2}])
def test_searches(options):
    a, b = (searched(seed=3, **options) for _ in range(2))
    assert (a.architecture, a.phase.alphas, a.phase.losses) == (b.architecture, b.phase.alphas, b.phase.losses)
    assert a.phase.iterations == 3
    rows = a.phase.alphas["cell"].after
    allowed = OPERATORS[1:] if a.method == "ftso" else OPERATORS
    for row, name in zip(rows, a.architecture.operators, strict=True):
        assert row[OPERATORS.index(name)] == max(row[OPERATORS.index(o)] for o in allowed)
    assert all(m >= 0 for m in a.margins)
    fields = json.loads(a.to_json())
    assert fields["architecture"] == str(a.architecture) == str(a).splitlines()[-1]


def test_the_first_step_is_adams():
    found = searched("1it").phase.alphas["cell"]
    for before, after, gradient in zip(found.before, found.after, found.gradient, strict=True):
        for x, y, g in zip(before, after, gradient, strict=True):
            assert y - x == pytest.approx(-6e-4 * math.copysign(1, g + 1e-3 * x), rel=1e-2)


def test_the_order_of_steps():
    """NAS-Bench-201 moves the weights first; its last weight step then counts, and ours is left out."""
    ftso, darts = searched("2it"), searched("2it", method="darts")
    assert (ftso.phase.weight_steps, darts.phase.weight_steps) == (1, 2)
    after = searched("1it", config=dataclasses.replace(NATS_FTSO, weights_first=True))
    first = searched("1it")
    assert after.phase.losses[0] != first.phase.losses[0]
    assert (after.phase.weight_steps, first.phase.weight_steps) == (1, 0)


BAD_SEARCHES = [
    ({"method": "pc-darts"}, "method: expected one of ftso, darts"),
    ({"order": 2}, "order: expected 1, or 2 for method 'darts'"),
    ({"mode": "1it+1it"}, "mode: expected one length"),
    ({"seed": "1"}, "seed: expected a whole number"),
]


@pytest.mark.parametrize(("options", "words"), BAD_SEARCHES)
def test_bad_searches(options, words):
    with pytest.raises(UsageError, match=words):
        search_nats(arrays(), **options)


# -- Table 2 and the command


def test_table_2_scores_searches():
    table = read_table(real_table())
    results = [searched("1it", seed=s, method=m) for m in ("ftso", "darts") for s in range(2)]
    found = table2(table, results, seeds=2)
    groups = {g.name: g for g in found.groups}
    ours = groups["ftso, searched"]
    assert [e.architecture for e in ours.entries] == [r.architecture for r in results[:2]]
    assert ours.mean("cifar10") == pytest.approx(
        sum(table.find(r.architecture).test["cifar10"] for r in results[:2]) / 2
    )
    assert groups["best on cifar10"].mean("cifar10") == pytest.approx(94.37, abs=0.01)
    assert groups["mean of the table"].mean("cifar10") == pytest.approx(87.06, abs=0.01)
    assert found.proxies["parameters"]["cifar10"] == pytest.approx(0.753, abs=1e-3)
    text = str(found)
    assert "No procedure that the paper describes leads to its row, index 5721" in text
    assert all(row in text for row in ("1835", "3521", "4771", "561", "2057", "1728", "5721"))
    assert json.loads(json.dumps(found.to_dict()))["rows"]["FTSO"]["index"] == 5721


def test_look_up_by_the_command(run, tmp_path):
    path = written(tmp_path, text_of(rows(100)))
    code, out, _ = run("nb201", 7, "--table", path)
    assert code == 0
    assert out.startswith(str(list(rows(8))[7][1]))
    assert "index 7 of 100; test: cifar10 7.00 % (rank 85)" in out
    code, out, _ = run("nb201", FTSO, "--json")
    assert json.loads(out)["params"] == 1_316_506
    assert run("nb201", "7")[0] == 2
    assert run("nb201")[0] == 2
    assert run("nb201", FTSO, "--data", "digits")[0] == 2
    assert run("nb201", "nonsense")[0] == 2
    assert run("nb201", 7, "--table", tmp_path / "missing")[0] == 3
    assert run("reproduce", "table2", "--table", path, "--seeds", 0)[0] == 2


def test_search_by_the_command(run, tmp_path):
    import numpy as np

    x, y = arrays(32)
    np.savez(tmp_path / "images.npz", x_train=x, y_train=y)
    path = written(tmp_path, text_of(rows(15_625)), packed=True)
    options = ["--data", tmp_path / "images.npz", "--mode", "1it", "--channels", 4, "--cells", 1]
    code, out, _ = run("nb201", *options, "--table", path, "--json")
    assert code == 0
    fields = json.loads(out)
    assert fields["score"]["test"]["cifar10"] == fields["score"]["index"] % 90
    code, out, err = run("nb201", *options)
    assert code == 0
    assert "give --table" in err
    others = [row for row in rows(15_625) if str(row[1]) != fields["architecture"]]
    partial = written(tmp_path, text_of(others))
    code, out, err = run("nb201", *options, "--table", partial)
    assert (code, fields["architecture"] in out, "index" in out) == (0, True, False)
    assert f"{partial}: none of its 15,624 rows is of what was found" in err
    code, out, err = run("nb201", *options, "--table", partial, "--json")
    assert (code, json.loads(out)["score"]) == (0, None)
    assert "none of its 15,624 rows" in err
    path = written(tmp_path, text_of(rows(15_625)), packed=True)
    code, out, _ = run("reproduce", "table2", "--table", path, "--seeds", 1, *options, "--json")
    assert code == 0
    groups = json.loads(out)["groups"]
    assert {"ftso, searched", "darts 1st order, searched", "darts 2nd order, searched"} <= set(groups)
