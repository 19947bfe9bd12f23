"""Many searches: the same as one by one, their statistics against counting by hand, and two processes."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from searching import SMALL, arrays, document, small

from ftso_fast import Genotype, UsageError, search
from ftso_fast.cli import main
from ftso_fast.crossed import FACTORS, Trial, split
from ftso_fast.draw_stability import draw_stability
from ftso_fast.many import search_crossed, study
from ftso_fast.plan import settle
from ftso_fast.space import CELLS
from ftso_fast.stability import Stability, agreement

pytestmark = pytest.mark.usefixtures("one_thread")


def many(seeds=4, mode="1it", data=None, **changes):
    options = {k: changes.pop(k) for k in ("seed", "operators", "beta_init", "method", "progress") if k in changes}
    config = dataclasses.replace(SMALL, **changes)
    return search(arrays() if data is None else data, mode, seeds=seeds, config=config, **options)


@pytest.mark.parametrize("mode", ["1it", "3it", "2ep"])
def test_each_search_is_the_one_alone(mode):
    found = many(4, mode, seed=5)
    assert [t.seed for t in found.trials] == [5, 6, 7, 8]
    for t in found.trials:
        alone = small(mode=mode, seed=t.seed)
        assert t.topology == {c: tuple(tuple(sorted(p)) for p in alone.topology[c]) for c in CELLS}
        for cell in CELLS:
            assert t.before[cell] == alone.betas[cell].before
            assert t.after[cell] == alone.betas[cell].after
            changed = {n for n, (a, b) in enumerate(zip(t.start[cell], t.topology[cell], strict=True), 2) if a != b}
            assert changed == set(alone.changed[cell])


@pytest.mark.parametrize(
    ("mode", "options"), [("1it", {"operators": "3op"}), ("1it+1it", {}), ("1it", {"method": "darts"})]
)
def test_other_searches_too(mode, options):
    found = many(2, mode, channels=4, cells=3, **options)
    for t in found.trials:
        alone = small(mode=mode, seed=t.seed, channels=4, cells=3, **options)
        assert t.topology == {c: tuple(tuple(sorted(p)) for p in alone.topology[c]) for c in CELLS}
        if alone.replace is None:
            own = {c: sorted(e[::-1] for e in pair) for c in CELLS for pair in [alone.genotype.nodes(c)[1]]}
            assert {c: sorted(zip(t.topology[c][1], t.operators[c][1], strict=True)) for c in CELLS} == own
    assert isinstance(found.consensus.genotype, Genotype)


def test_zeros_follow_the_raw_gradient():
    """After one step from equal edges the order of a node's edges is that of their gradients, the lowest first."""
    alone = small(seed=3, beta_init="zeros")
    for cell in CELLS:
        betas = alone.betas[cell]
        assert set(betas.before) == {0.0}
        assert all(abs(abs(b) - SMALL.arch_lr) < 1e-6 for b in betas.after)
        at, size = 0, 2
        for kept in alone.topology[cell]:
            gradient = betas.gradient[at : at + size]
            assert list(kept) == sorted(range(size), key=lambda i, g=gradient: g[i])[:2]
            at, size = at + size, size + 1
    weights = small(seed=3).losses
    assert alone.losses != weights
    assert "All edges started alike" in str(alone)
    assert json.loads(alone.to_json())["beta_init"] == "zeros"
    assert document(small(seed=3, beta_init="zeros")) == document(alone)


def test_equal_betas_go_to_the_gradient():
    from ftso_fast.genotype import derive_topology

    assert derive_topology([0] * 5, 2, [0, 0, 1, 3, 2]) == ((0, 1), (1, 2))
    assert derive_topology([0, 0, 5, 0, 0], 2, [0, 1, 1, 3, 4]) == ((1, 0), (0, 2))
    assert derive_topology([0] * 5, 2) == ((0, 1), (0, 1))


def test_zeros_need_betas():
    with pytest.raises(UsageError, match="beta_init: expected 'random' for method 'darts', which has no betas"):
        small(method="darts", beta_init="zeros")
    with pytest.raises(UsageError, match="beta_init: expected one of random, zeros, got 'ones'"):
        small(beta_init="ones")


@pytest.mark.parametrize("values", ["aab", "aabbb", "abc", "aaaa", "ab"])
def test_agreement_is_the_part_of_equal_pairs(values):
    pairs = list(itertools.combinations(values, 2))
    found = agreement(values, 0.5)
    assert found.observed == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    if len(values) == 2:
        assert found.error is None
        return
    leave = []
    for i in range(len(values)):
        rest = values[:i] + values[i + 1 :]
        own = list(itertools.combinations(rest, 2))
        leave.append(sum(a == b for a, b in own) / len(own))
    n = len(values)
    assert found.error == pytest.approx(math.sqrt((n - 1) * np.var(leave)))


def of(topologies):
    """Stability of made-up searches: per search the pair of each of two nodes, the same in both cells."""
    trials = tuple(
        Trial(i, dict.fromkeys(CELLS, ((0, 1), (0, 1))), dict.fromkeys(CELLS, ((0, 1), pair)), {}, {}, {})
        for i, pair in enumerate(topologies)
    )
    fields = {f.name: None for f in dataclasses.fields(Stability)}
    fields |= {"trials": trials, "replace": "sep_conv_3x3", "mode": "1it", "iterations": 1, "seconds": {"total": 1.0}}
    return Stability(**{**fields, "processes": 1, "beta_init": "random", "backend": "reference", "source": "made up"})


def test_statistics_of_made_up_searches():
    found = of([(0, 1), (0, 2), (0, 2), (1, 2)])
    assert found.agreement["normal 3"].observed == pytest.approx(1 / 6)
    assert found.agreement["normal 3"].chance == pytest.approx(1 / 3)
    assert found.agreement["both"].chance == pytest.approx(1 / 9)
    assert found.changed["normal"] == (0.0, 0.75)
    assert found.edges["normal"] == ((1.0, 1.0), (0.75, 0.5, 0.75))
    assert found.topologies["reduce"][0] == (((0, 1), (0, 2)), 2)
    assert found.consensus.genotype.nodes("normal")[1] == (("sep_conv_3x3", 0), ("sep_conv_3x3", 2))
    assert found.consensus.support["normal"] == (1.0, 0.5)
    assert found.consensus.whole == 0.5
    text = str(found)
    assert "normal 3" in text
    assert Genotype.read(text.splitlines()[-1]) == found.consensus.genotype
    assert of([(0, 1), (1, 2)]).consensus.genotype.nodes("normal")[1][0][1] == 0


def test_chance_of_four_nodes():
    chances = {name: a.chance for name, a in many(2).agreement.items()}
    assert chances["normal 5"] == pytest.approx(1 / 10)
    assert chances["reduce"] == pytest.approx(1 / 180)
    assert chances["both"] == pytest.approx(1 / 32400)


def crossed(value):
    """Trials of a crossed design of two levels; the score of node 3's first edge is value(b, w, d)."""
    found = {}
    for at in itertools.product(range(2), repeat=3):
        scores = dict.fromkeys(CELLS, (0.0, 0.0, float(value(*at)), 0.0, 0.0))
        kept = dict.fromkeys(CELLS, ((0, 1), (0, 1) if value(*at) > 0 else (1, 2)))
        found[at] = Trial(0, kept, kept, {}, dict.fromkeys(CELLS, (0.0,) * 5), scores)
    return split(found, 2)


def test_the_split_finds_what_decides():
    for f, factor in enumerate(FACTORS):
        found = crossed(lambda *at, f=f: 2 * at[f] - 1)
        assert found.values == pytest.approx({**dict.fromkeys(FACTORS, 0.0), factor: 1.0, "combinations": 0.0})
        assert found.agreement == {**dict.fromkeys(FACTORS, 1.0), factor: 0.0}
    both = crossed(lambda b, w, d: 3 * b + 4 * w)
    assert both.moves == pytest.approx({"betas": 9 / 25, "weights": 16 / 25, "data": 0.0, "combinations": 0.0})
    apart = crossed(lambda b, w, d: (2 * b - 1) * (2 * w - 1))
    assert apart.values == pytest.approx({**dict.fromkeys(FACTORS, 0.0), "combinations": 1.0})


def test_the_crossed_design_varies_one_thing_at_a_time(monkeypatch):
    """Which numbers a search starts from, and which images it sees: by the levels of the design."""
    many_module = sys.modules["ftso_fast.many"]
    seen = []
    real = many_module.search_stages

    def spy(plan, report, stream, progress, start, first):
        w, b = float(first.weights()[0].detach().sum()), float(first.betas()[0].detach().sum())
        image = next(stream.architecture).images.sum().item()
        seen.append((b, w, image))
        return real(plan, report, stream, progress, start, first)

    monkeypatch.setattr(many_module, "search_stages", spy)
    plan = settle("1it", method="ftso", operators=None, replace=None, order=1, beta_only=False, k=None, seed=4,
                  space=many_module.DARTS, precision="float32", config=SMALL)  # fmt: skip
    found = search_crossed(arrays(), plan, 2, None, None)
    assert found.levels == 2
    assert [len(set(column)) for column in zip(*seen, strict=True)] == [2, 2, 2]
    assert len(set(seen)) == 8
    alone = small(seed=4)
    assert seen[0][0] == pytest.approx(sum(alone.betas["normal"].before))
    for bad in (1, 17, True, 2.0):
        with pytest.raises(UsageError, match="levels: expected a whole number from 2 to 16"):
            search_crossed(arrays(), plan, bad, None, None)


def test_progress_counts_all():
    seen = []
    many(3, "2it", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("seeds", [1, 0, -3, 2.0, True, "4", 10**9])
def test_numbers_of_seeds(seeds):
    with pytest.raises(UsageError, match="seeds: expected a whole number from 2 to 100,000"):
        many(seeds)


def test_data_that_end_are_refused():
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4) % 2) for _ in range(4)]
    with pytest.raises(UsageError, match="seeds: expected data that can be read once for each search, got a generator"):
        many(2, data=(b for b in batches))
    assert len(many(2, data=batches).trials) == 2


def test_the_start_is_no_news_to_the_callers_generator():
    before = torch.random.get_rng_state()
    many(2)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npz"
    x, y = arrays(32)
    np.savez(path, x_train=x, y_train=y)
    return str(path)


def test_the_command(capsys, images, tmp_path):
    out = tmp_path / "out"
    assert main(["stability", "--data", images, "--seeds", "3", "--levels", "2", "--json", "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    fields = json.loads(printed)
    assert fields["schema"] == "ftso.stability/1"
    assert (fields["seeds"], fields["zeros"]["beta_init"], fields["split"]["levels"]) == (3, "zeros", 2)
    assert json.loads((out / "stability.json").read_text()) == fields
    assert str(out / "stability.svg") in err
    root = ET.fromstring((out / "stability.svg").read_text())
    squares = [e for e in root.iter() if e.get("class") == "edge"]
    assert len(squares) == 2 * 2 * 14
    assert main(["stability", "--data", images, "--seeds", "3", "--levels", "0", "--no-zeros"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 searches (1it, 1 iteration, batch 256, images.npz, seeds 0 to 2)")
    assert "crossed design" not in text
    assert main(["stability", "--data", images, "--seeds", "1"]) == 2
    assert main(["stability", "--data", images, "--levels", "-1"]) == 2
    assert main(["stability", "--data", images, "--preset", "mine"]) == 2


def test_text_of_a_study():
    found = study(arrays(), seeds=3, levels=2, config=SMALL)
    text = str(found)
    assert "What decides" in text
    assert "From equal edges (beta_init zeros; not the paper's way" in text
    assert draw_stability([found.random, found.zeros]) == draw_stability([found.random, found.zeros])


def test_two_processes_find_the_same(images, tmp_path):
    """Under torchrun: the seeds are shared out, the first process prints what one process would have."""
    alone = search(images, "1it", seeds=5)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ftso_fast"]
    options = ["stability", "--data", images, "--seeds", "5", "--levels", "2", "--json", "--no-zeros"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, *options], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert fields["processes"] == 2
    assert [Trial.from_dict(t) for t in fields["trials"]] == list(alone.trials)
    assert fields["split"]["levels"] == 2
