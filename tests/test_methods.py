"""Searches by every method and operator set: valid answers, from the recorded numbers, the same bytes twice."""

import dataclasses
import importlib
import json
import math

import pytest
import torch
from searching import Run, answer, batches, document, small

from ftso_fast import DARTS, OPERATOR_SETS, PRIMITIVES, Genotype

run_module = importlib.import_module("ftso_fast.run")

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = ("normal", "reduce")
SEARCHES = {
    **{name: {"operators": name} for name in OPERATOR_SETS},
    "two stages": {"mode": "1it+2it"},
    "two stages over 4op": {"mode": "2it+1ep", "operators": "4op", "beta_only": True},
    "pc-darts": {"method": "pc-darts", "mode": "1ep"},
    "pc-darts, second order": {"method": "pc-darts", "mode": "1it", "order": 2, "k": 2},
    "darts": {"method": "darts", "mode": "2it"},
    "darts, second order": {"method": "darts", "mode": "2it", "order": 2},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_ends_with_a_valid_genotype_and_the_same_bytes(name):
    options = dict(SEARCHES[name])
    result, again = (small(**options) for _ in range(2))
    assert document(result) == document(again)
    assert Genotype.read(repr(result.genotype)) == result.genotype
    for cell in CELLS:
        edges = getattr(result.genotype, cell)
        assert len(edges) == 8
        for node in range(4):
            (a, i), (b, j) = edges[2 * node : 2 * node + 2]
            assert i != j
            assert max(i, j) < node + 2
            assert {a, b} <= set(PRIMITIVES) - {"none"}
            assert (i, j) == result.topology[cell][node]
    fields = json.loads(result.to_json())
    assert fields["schema"] == "ftso.search/1"
    assert fields["method"] == options.get("method", "ftso")
    assert str(result).splitlines()[-1] == repr(result.genotype)
    assert len(str(result).splitlines()) <= 8


@pytest.mark.parametrize("operators", OPERATOR_SETS)
def test_a_set_of_operators(operators):
    result = small(operators=operators, replace="dil_conv_3x3")
    assert result.operators == operators
    names = OPERATOR_SETS[operators]
    assert result.topology_search.operators == names == tuple(sorted(names, key=PRIMITIVES.index))
    assert {op for op, _ in (*result.genotype.normal, *result.genotype.reduce)} == {"dil_conv_3x3"}
    assert result.to_dict()["operators"] == {"set": operators, "names": names}
    assert set(result.alphas) == (set(CELLS) if len(names) > 1 else set())
    for alphas in result.alphas.values():
        for rows in (alphas.before, alphas.after, alphas.gradient):
            assert (len(rows), {len(row) for row in rows}) == (14, {len(names)})
        assert max(abs(sum(row)) for row in alphas.gradient) < 1e-6
    for cell in CELLS:
        b, a = result.betas[cell], result.alphas.get(cell)
        pairs = [(b, e) for e in range(14)] + ([(a, (e, o)) for e in range(14) for o in range(len(names))] if a else [])
        for row, at in pairs:
            before, after, g = (value(rows, at) for rows in (row.before, row.after, row.gradient))
            if abs(g) > 1e-4:  # the first step of Adam
                assert (after - before) / 6e-4 == pytest.approx(-math.copysign(1, g), abs=2e-2)
    assert f"operators {operators}" in str(result) or operators == "skip"


def value(rows, at):
    return rows[at] if isinstance(at, int) else rows[at[0]][at[1]]


def softmax(row):
    return [math.exp(x) / sum(map(math.exp, row)) for x in row]


@pytest.mark.parametrize("name", ["3op", "4op", "two stages over 4op", "pc-darts", "darts"])
def test_derivation_from_the_recorded_numbers(name):
    """The products written out: softmax(alpha) * softmax(beta), top two by the largest but none's, argmax likewise."""
    result = small(**SEARCHES[name])
    names = result.topology_search.operators
    for cell in CELLS:
        at = 0
        for node in range(4):
            n = node + 2
            betas = softmax(result.betas[cell].after[at : at + n]) if result.betas else [1.0] * n
            rows = [softmax(row) for row in result.alphas[cell].after[at : at + n]]
            at += n
            best = [max(p for p, o in zip(row, names, strict=True) if o != "none") for row in rows]
            strength = [b * (1 if result.beta_only else p) for b, p in zip(betas, best, strict=True)]
            ranked = sorted(range(n), key=lambda i: -strength[i])
            assert result.topology[cell][node] == tuple(ranked[:2])
            if n > 2:
                margin = math.log(strength[ranked[1]] / strength[ranked[2]]) / result.config.arch_lr
                assert result.margins[cell][node] == pytest.approx(margin, abs=1e-9)
            for choice, i in zip(result.choices.get(cell, ())[2 * node :], ranked[:2], strict=False):
                if result.operator_search is None:
                    allowed = sorted(p for p, o in zip(rows[i], names, strict=True) if o != "none")
                    assert rows[i][names.index(choice.operator)] == allowed[-1]
                    assert choice.margin == pytest.approx(math.log(allowed[-1] / allowed[-2]) / 6e-4, abs=1e-9)


def test_operator_search_keeps_the_topology():
    whole, first = small(mode="2it+3it", seed=2), small(mode="2it", seed=2)
    assert whole.topology == first.topology
    assert whole.to_dict()["betas"] == first.to_dict()["betas"]
    second = whole.operator_search
    assert (whole.iterations, second.iterations, whole.weight_steps, second.weight_steps) == (2, 3, 1, 2)
    assert (whole.mode, whole.topology_search.mode, second.mode) == ("2it+3it", "2it", "3it")
    assert whole.replace is None
    assert second.operators == PRIMITIVES
    for cell in CELLS:
        inputs = tuple(tuple(sorted(node)) for node in whole.topology[cell])
        assert second.inputs[cell] == inputs
        assert [len(second.betas[cell].after), len(second.alphas[cell].after)] == [8, 8]
        edges = [(node, state) for node, states in enumerate(inputs) for state in states]
        kept = [(node, state) for node, states in enumerate(whole.topology[cell]) for state in states]
        for (operator, state), edge, choice in zip(
            getattr(whole.genotype, cell), kept, whole.choices[cell], strict=True
        ):
            row = second.alphas[cell].after[edges.index(edge)]
            assert operator == choice.operator == PRIMITIVES[max(range(1, 8), key=lambda o: row[o])]
            assert state == edge[1]
    fields = whole.to_dict()
    assert fields["operator_search"]["iterations"] == 3
    assert [len(fields["choices"][cell]) for cell in CELLS] == [8, 8]
    assert first.to_dict()["operator_search"] is None
    assert first.to_dict()["choices"] == {}


def test_the_second_network_is_a_fresh_one(monkeypatch):
    """Other weights and other parameters than the first's, from the seed alone."""
    nets = []

    begin = Run.__init__

    def recorded(run, net, *rest):
        begin(run, net, *rest)
        nets.append([w.detach().clone() for w in net.weights()] + run.before)

    monkeypatch.setattr(Run, "__init__", recorded)
    small(mode="1it+1it", seed=5)
    small(mode="1it+1it", seed=5)
    one, two, three, four = nets
    assert all(torch.equal(a, b) for a, b in zip(one + two, three + four, strict=True))
    assert one[0].shape == two[0].shape
    assert not torch.equal(one[0], two[0])
    assert not set(two[-1].flatten().tolist()) & set(one[-1].tolist())
    assert torch.cat([t.flatten() for t in two[-4:]]).std() == pytest.approx(1e-3, rel=0.2)


def test_no_batch_is_seen_twice(monkeypatch):
    """The second super-network goes on with the data where the first stopped; progress counts over both."""
    seen, shown = [], []
    for name in ("architecture_step", "weight_step"):
        step = getattr(Run, name)

        def recorded(run, batch, *rest, step=step):
            seen.append(float(batch.images[0, 0, 0, 0]))
            return step(run, batch, *rest)

        monkeypatch.setattr(Run, name, recorded)
    result = small(iter(batches(9)), "2it+2it", progress=lambda *counts: shown.append(counts))
    assert result.operator_search.iterations == 2
    assert seen == [0, 1, 2, 3, 4, 5]
    assert shown == [(i, 4) for i in (1, 2, 3, 4)]


def test_second_order_takes_another_road():
    """And the last weight step is still dead: only its batch is looked at."""
    options = {"method": "darts", "mode": "1it", "weight_lr": 0.1}
    first, second = (small(order=order, **options) for order in (1, 2))
    assert first.alphas["normal"].before == second.alphas["normal"].before
    assert first.alphas["normal"].gradient != second.alphas["normal"].gradient
    assert first.losses[0] != second.losses[0]
    assert (second.order, second.weight_steps) == (2, 0)
    assert answer(small(order=2, final_weight_step=True, **options)) == answer(second)
    assert "second order" in str(second)


def test_second_order_looks_at_the_weight_step_that_follows(monkeypatch):
    """The same training batch, at the same rate."""
    unrolled, stepped = [], []
    gradient, step = run_module.unrolled_gradient, Run.weight_step

    def looked(net, valid, train, sgd, lr):
        unrolled.append((float(valid.images[0, 0, 0, 0]), float(train.images[0, 0, 0, 0]), lr))
        return gradient(net, valid, train, sgd, lr)

    def taken(run, batch, lr):
        stepped.append((float(batch.images[0, 0, 0, 0]), lr))
        return step(run, batch, lr)

    monkeypatch.setattr(run_module, "unrolled_gradient", looked)
    monkeypatch.setattr(Run, "weight_step", taken)
    small((batches(5)[:2], batches(5)[2:]), "2ep", method="darts", order=2, cells=3, channels=4)
    assert [images for *images, _ in unrolled] == [[2, 0], [3, 1], [4, 0], [2, 1]]
    assert [lr for *_, lr in unrolled] == [0.025, 0.025, 0.0125, 0.0125]
    assert stepped == [(train, lr) for _, train, lr in unrolled[:3]]


@pytest.mark.parametrize("method", ["pc-darts", "darts"])
def test_the_last_weight_step_cannot_change_the_answer(method):
    assert answer(small(mode="2it", method=method, final_weight_step=True)) == answer(small(mode="2it", method=method))


def test_a_search_space_of_ones_own():
    space = dataclasses.replace(DARTS, n_nodes=2, operators=("avg_pool_3x3", "none"))
    result = small(space=space, mode="1it+1it")
    assert result.operators == "own"
    assert len(result.genotype.normal) == 4
    assert len(result.alphas["normal"].after) == 5
    assert result.operator_search.operators == PRIMITIVES
