"""Which edges a search keeps and which operators it chooses, from numbers alone: ties, none, a single operator."""

import math

import pytest

from ftso_fast import PRIMITIVES
from ftso_fast.phase import Alphas, Betas, Choice, Phase, edge_scores, strongest

EDGES = 14
FULL = tuple(tuple(range(n)) for n in (2, 3, 4, 5))
OPERATORS = ("none", "max_pool_3x3", "skip_connect")


def softmax(row):
    total = sum(map(math.exp, row))
    return [math.exp(x) / total for x in row]


def phase_of(betas=None, alphas=None, operators=OPERATORS, inputs=FULL, beta_only=False):
    """The phase whose two cells both ended with these parameters, and started from zeros."""

    def both(kind, rows):
        if rows is None:
            return {}
        zeros = tuple(0.0 if isinstance(row, float) else (0.0,) * len(row) for row in rows)
        return dict.fromkeys(("normal", "reduce"), kind(zeros, tuple(rows), zeros))

    cells = dict.fromkeys(("normal", "reduce"), inputs)
    return Phase("1it", operators, cells, both(Betas, betas), both(Alphas, alphas), beta_only, 1, 0, ((), ()), {}, {})


def test_scores_are_the_logarithm_of_the_product():
    betas = [0.3 * math.sin(3 * e) for e in range(EDGES)]
    alphas = [[math.cos(5 * e + o) for o in range(3)] for e in range(EDGES)]
    found = edge_scores(betas, alphas, OPERATORS)
    at = 0
    for n in (2, 3, 4, 5):
        weights = softmax(betas[at : at + n])
        products = [w * max(softmax(alphas[at + i])[1:]) for i, w in enumerate(weights)]
        for i in range(1, n):
            assert found[at + i] - found[at] == pytest.approx(math.log(products[i] / products[0]), abs=1e-12)
        at += n


def test_scores_without_one_of_the_two():
    alphas = [[0.0, 1.0, 2.0]] * 2
    assert edge_scores([0.5, -0.5], None, ("skip_connect",)) == [0.5, -0.5]
    assert edge_scores(None, alphas, OPERATORS) == pytest.approx([math.log(softmax(alphas[0])[2])] * 2)
    assert edge_scores([3.0], [[1000.0, -1000.0, 0.0]], OPERATORS) == [-997.0]  # no overflow


def test_none_is_never_the_largest_and_still_takes_its_share():
    """Edge 2 of node 3 has the largest alpha of all, on none: it loses to both of the others."""
    alphas = [(0.0, 0.0, 0.0)] * EDGES
    alphas[4] = (5.0, 0.0, 0.0)
    found = phase_of([0.0] * EDGES, alphas)
    assert found.topology("normal")[1] == (0, 1)
    alphas[4] = (0.0, 0.0, 5.0)
    assert phase_of([0.0] * EDGES, alphas).topology("normal")[1] == (2, 0)
    assert strongest((9.0, 1.0, 2.0), OPERATORS) == ("skip_connect", 1.0)


def test_ties_go_to_the_lower_state_and_the_earlier_operator():
    found = phase_of([0.0] * EDGES, [(0.0, 0.0, 0.0)] * EDGES)
    assert found.topology("reduce") == ((0, 1),) * 4
    assert found.changed("reduce") == ()
    assert found.margins("reduce") == (None, 0.0, 0.0, 0.0)
    assert (
        found.choices("reduce", ((0, 1),) * 4)
        == (
            Choice("max_pool_3x3", 0, 0.0),
            Choice("max_pool_3x3", 1, 0.0),
        )
        * 4
    )
    assert strongest((1.0, 1.0, 1.0), ("skip_connect", "none", "sep_conv_3x3")) == ("skip_connect", 0.0)


def test_beta_times_alpha_and_beta_alone_may_differ():
    betas = [0.0, 0.0, 0.2, 0.1, 0.0, *[0.0] * 9]
    alphas = [(0.0, 0.0, 0.0)] * 4 + [(0.0, 0.0, 1.0)] + [(0.0, 0.0, 0.0)] * 9
    assert phase_of(betas, alphas).topology("normal")[1] == (2, 0)
    assert phase_of(betas, alphas, beta_only=True).topology("normal")[1] == (0, 1)
    assert phase_of(betas, alphas, beta_only=True).margins("normal")[1] == pytest.approx(0.1)
    assert phase_of(betas, alphas).changed("normal") == (3,)


def test_darts_ranks_edges_by_their_best_operator():
    alphas = [[0.0] * 8 for _ in range(EDGES)]
    alphas[13][7] = alphas[10][4] = 0.5  # node 5: from states 4 and 1
    alphas[13][7] += 0.1
    found = phase_of(None, [tuple(row) for row in alphas], PRIMITIVES)
    assert found.topology("normal") == ((0, 1), (0, 1), (0, 1), (4, 1))
    assert found.choices("normal", found.topology("normal"))[-2:] == (
        Choice("dil_conv_5x5", 4, pytest.approx(0.6)),
        Choice("sep_conv_3x3", 1, pytest.approx(0.5)),
    )


def test_operators_of_kept_edges_stand_in_the_genotypes_order():
    """The parameters' rows are ascending in the state, the kept edges are not."""
    inputs, kept = ((0, 1), (0, 2), (1, 3), (2, 4)), ((1, 0), (2, 0), (1, 3), (4, 2))
    rows = [tuple(float(o == 1 + e % 7) for o in range(8)) for e in range(8)]
    found = phase_of([0.0] * 8, rows, PRIMITIVES, inputs)
    names = [choice.operator for choice in found.choices("normal", kept)]
    order = [1, 0, 3, 2, 4, 5, 7, 6]
    assert names == [PRIMITIVES[1 + e % 7] for e in order]
    assert [choice.state for choice in found.choices("normal", kept)] == [i for node in kept for i in node]
    changed = sum(PRIMITIVES[1 + e % 7] != PRIMITIVES[1] for e in range(8))
    assert found.operators_changed({"normal": kept, "reduce": kept}) == 2 * changed


def test_one_operator_leaves_nothing_to_choose():
    found = phase_of([float(e) for e in range(EDGES)], None, ("sep_conv_3x3",))
    assert found.choices("normal", found.topology("normal")) == ()
    assert found.topology("normal") == ((1, 0), (2, 1), (3, 2), (4, 3))
    assert strongest((0.0, 3.0), ("none", "skip_connect")) == ("skip_connect", None)
