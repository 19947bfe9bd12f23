"""Genotype values, its two dialects, hostile texts, and the derivation from edge strengths."""

import json
import math
import random
import time
from contextlib import suppress
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftso_fast.errors import UsageError
from ftso_fast.genotype import PRIMITIVES, REPLACEMENTS, Genotype, derive_topology, margins
from ftso_fast.space import DARTS

DARTS_V2 = (
    "DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), "
    "('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), "
    "('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
PC_DARTS = (
    "PC_DARTS_cifar = Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), "
    "('dil_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), "
    "('dil_conv_3x3', 1)], normal_concat=range(2, 6), reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), "
    "('sep_conv_5x5', 1), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0), ('sep_conv_3x3', 3), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))"
)
ONE = [("skip_connect", 0), ("skip_connect", 1)]
ONE_TEXT = f"Genotype({ONE}, [2], {ONE}, [2])"


@st.composite
def cells(draw):
    n_nodes = draw(st.integers(1, 8))
    edges = [
        (draw(st.sampled_from(PRIMITIVES)), draw(st.integers(0, node + 1))) for node in range(n_nodes) for _ in (0, 1)
    ]
    concat = draw(st.lists(st.integers(2, n_nodes + 1), min_size=1, unique=True))
    return edges, concat


genotypes = st.builds(lambda normal, reduce: Genotype(*normal, *reduce), cells(), cells())


def test_operators_are_those_of_darts_in_its_order():
    names = "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5"
    assert " ".join(PRIMITIVES) == names
    assert list(REPLACEMENTS) == names.split()[1:]


def test_space_has_fourteen_edges():
    assert (DARTS.n_nodes, DARTS.n_edges, DARTS.operators) == (4, 14, ("skip_connect",))
    assert DARTS.replacements == REPLACEMENTS


def test_published_texts():
    v2, pc = Genotype.from_text(DARTS_V2), Genotype.from_text(PC_DARTS)
    assert v2.normal[7] == ("dil_conv_3x3", 2)
    assert v2.nodes("reduce")[1] == (("skip_connect", 2), ("max_pool_3x3", 1))
    assert pc.reduce[5] == ("sep_conv_3x3", 3)
    assert pc.normal_concat == pc.reduce_concat == (2, 3, 4, 5)
    assert f"DARTS_V2 = {v2!r}" == DARTS_V2
    assert f"PC_DARTS_cifar = {pc!r}" == PC_DARTS.replace("range(2, 6)", "[2, 3, 4, 5]")


@given(genotypes)
def test_round_trips(genotype):
    for again in (
        Genotype.from_text(repr(genotype)),
        Genotype.read(repr(genotype).encode()),
        Genotype.from_json(genotype.to_json()),
        Genotype.read("\n " + genotype.to_json()),
        Genotype.from_dict(genotype.to_dict()),
    ):
        assert again == genotype
        assert hash(again) == hash(genotype)
    assert json.loads(genotype.to_json()) == {"schema": "ftso.genotype/1", **genotype.to_dict()}


def test_equality_does_not_depend_on_the_kind_of_sequence():
    edges = [("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("none", 2), ("skip_connect", 0)]
    a = Genotype(edges, range(2, 4), tuple(edges), [2, 3])
    b = Genotype([list(edge) for edge in edges], (np.int64(2), 3), tuple(edges), range(2, 4))
    assert a == b
    assert len({a, b}) == 1
    assert repr(a) == repr(b)
    assert json.loads(b.to_json())["normal_concat"] == [2, 3]


def test_order_of_a_pair_is_part_of_the_value():
    assert Genotype(ONE, [2], ONE, [2]) != Genotype(ONE[::-1], [2], ONE, [2])


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        Genotype(ONE, [2], ONE, [2]).normal = ()


@pytest.mark.parametrize(
    "text",
    [
        ONE_TEXT,
        f"  X={ONE_TEXT}\n\n",
        f"# found by é\n{ONE_TEXT}  # best\n",
        "\ufeff" + ONE_TEXT,
        ONE_TEXT.replace(", [2", ",\r\n\t[2"),
        ONE_TEXT.replace("[2]", "range(2,3)"),
        ONE_TEXT.replace("[", "(").replace("]", ",)"),
        ONE_TEXT.replace("'", '"'),
        ONE_TEXT.replace(", [2])", ", reduce_concat=(2,))"),
        f"# caf\u00e9\n{ONE_TEXT}".encode("latin-1"),
    ],
)
def test_accepted_spellings(text):
    assert Genotype.from_text(text) == Genotype.read(text) == Genotype(ONE, [2], ONE, [2])


FIELDS = "normal=[...], normal_concat=[...], reduce=[...], reduce_concat=[...]"
FORM = f"genotype text: expected Genotype({FIELDS}), got "
LITERALS = "genotype text: expected strings, integers, lists, tuples and range(a, b), got "
TEXT_ERRORS = {
    "": FORM + "another statement or several",
    "1": FORM + "another statement or several",
    "DARTS = DARTS_V2": FORM + "another statement or several",
    "A = B = " + ONE_TEXT: FORM + "another statement or several",
    "A[0] = " + ONE_TEXT: FORM + "another statement or several",
    ONE_TEXT + "\n" + ONE_TEXT: FORM + "another statement or several",
    ONE_TEXT.replace("Genotype", "Genotypes"): FORM + "another statement or several",
    "Genotype()": FORM + "the arguments []",
    ONE_TEXT.replace(", [2])", ")"): FORM + "the arguments ['normal', 'normal_concat', 'reduce']",
    ONE_TEXT.replace(", [2])", ", other=[2])"): FORM + "the arguments ['normal', 'normal_concat', 'reduce', 'other']",
    ONE_TEXT.replace(", [2])", ", normal=[2])"): FORM + "the arguments ['normal', 'normal_concat', 'reduce', 'normal']",
    ONE_TEXT.replace(", [2])", ", [2], [2])"): FORM
    + "the arguments ['normal', 'normal_concat', 'reduce', 'reduce_concat']",
    "__import__('os').system('x')": FORM + "the character '.'",
    "Genotype(**{})": FORM + "the character '*'",
    "Genotype(normal=[\x00])": FORM + "the character '\\x00'",
    "Genotype(\ud800)": FORM + "the character '\\ud800'",
    "Genotype(é)": FORM + "the character '\\xe9'",
    ONE_TEXT.replace("1", "-1"): FORM + "the character '-'",
    ONE_TEXT.replace("[2]", "[f(2)]"): LITERALS + "Call",
    ONE_TEXT.replace("[2]", "[True]"): LITERALS + "Constant",
    ONE_TEXT.replace("[2]", "[b'2']"): LITERALS + "Constant",
    ONE_TEXT.replace("[2]", "[None]"): LITERALS + "Constant",
    ONE_TEXT.replace("[2]", "range(2, x)"): LITERALS + "Call",
    ONE_TEXT.replace("[2]", "range(2, 3, step=1)"): LITERALS + "Call",
    ONE_TEXT.replace("[2]", "list(range(2, 3))"): LITERALS + "Call",
    ONE_TEXT.replace("[2]", "[[[2]]]"): LITERALS + "List",
    ONE_TEXT.replace("[2]", "[x for x in (2, 3)]"): LITERALS + "ListComp",
    ONE_TEXT.replace("0", "f''"): LITERALS + "JoinedStr",
}


@pytest.mark.parametrize(("text", "message"), TEXT_ERRORS.items())
def test_text_errors(text, message):
    with pytest.raises(UsageError) as caught:
        Genotype.from_text(text)
    assert str(caught.value) == message


HOSTILE = {
    "code": "Genotype(__import__('os').system('x'))",
    "call": "Genotype(normal=exec('x'), normal_concat=[2], reduce=[], reduce_concat=[2])",
    "brackets": "[" * 60_000,
    "balanced": "(" * 30_000 + ")" * 30_000,
    "calls": "f(" * 20_000 + ")" * 20_000,
    "subscripts": "a" + "[0]" * 20_000,
    "applied": "a" + "()" * 30_000,
    "negations": "not " * 16_000 + "x",
    "awaits": "await " * 10_000 + "x",
    "lambdas": "lambda" + " x=lambda" * 7_000,
    "conditions": "x if x else " * 5_000 + "x",
    "minus": "-" * 60_000 + "1",
    "dots": "a" + ".a" * 30_000,
    "sums": "1" + "+1" * 30_000,
    "powers": "9**9**9**9",
    "digits": "9" * 60_000,
    "megabyte": "Genotype(" + "0," * 500_000 + ")",
    "megabyte of spaces": " " * 1_000_000 + ONE_TEXT,
    "long list": ONE_TEXT.replace("[2]", "[" + "2," * 20_000 + "]"),
    "long range": ONE_TEXT.replace("[2]", "range(0, 1000000000)"),
    "huge range": ONE_TEXT.replace("[2]", f"range(0, {10**30})"),
    "huge state": ONE_TEXT.replace("1", "9" * 4000),
    "bytes": b"\xff\xfe\x00" * 100,
    "json nesting": '{"a":' * 10_000,
    "json brackets": '{"schema": "ftso.genotype/1", "normal":' + "[" * 60_000,
    "json digits": '{"schema": "ftso.genotype/1", "normal":' + "9" * 60_000 + "}",
    "json megabyte": '{"schema": "' + "x" * 1_000_000 + '"}',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_texts_are_refused_quickly(text):
    started = time.perf_counter()
    for read in (Genotype.read, Genotype.from_text, Genotype.from_json):
        with pytest.raises(UsageError) as caught:
            read(text)
        assert "\n" not in str(caught.value)
        assert ": expected " in str(caught.value)
        assert len(str(caught.value)) < 400
    assert time.perf_counter() - started < 5


@given(st.text(max_size=80) | st.binary(max_size=80))
def test_random_texts_raise_usage_errors_only(text):
    with pytest.raises(UsageError):
        Genotype.read(text)


@given(st.integers(0, len(ONE_TEXT) - 1), st.characters(codec="utf-8"))
def test_altered_texts_raise_usage_errors_only(place, character):
    with suppress(UsageError):
        Genotype.read(ONE_TEXT[:place] + character + ONE_TEXT[place + 1 :])


OPERATORS = ", ".join([*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7"])
LIST = "expected a list or tuple of "
FIRST = "input of node 0 in normal[1]: expected a state from 0 to 1, got "
VALUE_ERRORS = [
    ({"normal": []}, "normal: expected a positive even number of edges (two per node), got 0"),
    ({"reduce": ONE[:1]}, "reduce: expected a positive even number of edges (two per node), got 1"),
    ({"normal": None}, f"normal: {LIST}at most 128 entries, got None"),
    ({"normal": "sep"}, f"normal: {LIST}at most 128 entries, got 'sep'"),
    ({"normal": set(ONE)}, f"normal: {LIST}at most 128 entries, got {{"),
    ({"normal": ONE * 65}, f"normal: {LIST}at most 128 entries, got [("),
    ({"normal": [ONE[0], ("none",)]}, f"normal[1]: {LIST}2 entries, got ('none',)"),
    ({"normal": [ONE[0], ("none", 0, 0)]}, f"normal[1]: {LIST}2 entries, got ('none', 0, 0)"),
    ({"normal": [ONE[0], "ab"]}, f"normal[1]: {LIST}2 entries, got 'ab'"),
    ({"normal": [ONE[0], ("sep", 0)]}, f"operator of normal[1]: expected one of {OPERATORS}, got 'sep'"),
    ({"normal": [ONE[0], (0, "none")]}, f"operator of normal[1]: expected one of {OPERATORS}, got 0"),
    ({"normal": [ONE[0], ("none", 2)]}, f"{FIRST}2"),
    ({"normal": [ONE[0], ("none", -1)]}, f"{FIRST}-1"),
    ({"normal": [ONE[0], ("none", 1.0)]}, f"{FIRST}1.0"),
    ({"normal": [ONE[0], ("none", True)]}, f"{FIRST}True"),
    ({"normal": [ONE[0], ("none", np.zeros(2, int))]}, f"{FIRST}array([0, 0])"),
    (
        {"reduce": [*ONE, ONE[0], ("none", 3)]},
        "input of node 1 in reduce[3]: expected a state from 0 to 2, got 3",
    ),
    (
        {"reduce": [*ONE * 2, ("none", 4), ONE[0]]},
        "input of node 2 in reduce[4]: expected a state from 0 to 3, got 4",
    ),
    ({"normal_concat": []}, "normal_concat: expected one or more different nodes, got []"),
    ({"reduce_concat": [2, 2]}, "reduce_concat: expected one or more different nodes, got [2, 2]"),
    ({"normal_concat": [1]}, "entry of normal_concat: expected a state from 2 to 2, got 1"),
    ({"normal_concat": [3]}, "entry of normal_concat: expected a state from 2 to 2, got 3"),
    ({"normal_concat": range(10**9)}, f"normal_concat: {LIST}at most 64 entries, got range("),
]


@pytest.mark.parametrize(("change", "message"), VALUE_ERRORS)
def test_value_errors(change, message):
    fields = {"normal": ONE, "normal_concat": [2], "reduce": ONE, "reduce_concat": [2], **change}
    with pytest.raises(UsageError) as caught:
        Genotype(**fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_sixty_four_nodes_are_accepted():
    genotype = Genotype.from_topology([(n, n + 1) for n in range(64)], [(0, 1)] * 64, "none")
    assert Genotype.from_text(repr(genotype)) == genotype


JSON_ERRORS = [
    ("[]", "genotype JSON: expected an object with schema 'ftso.genotype/1', got another value"),
    ("{}", "genotype JSON: expected an object with schema 'ftso.genotype/1', got another value"),
    ('{"schema": "ftso.genotype/2"}',
     "genotype JSON: expected an object with schema 'ftso.genotype/1', got another value"),
    ("{", "genotype JSON: expected an object with schema 'ftso.genotype/1', got unreadable text (Expecting "),
    ('{"schema": "ftso.genotype/1"}',
     "genotype object: expected the keys normal, normal_concat, reduce, reduce_concat, got {}"),
    ('{"schema": "ftso.genotype/1", "normal": {"none": 0, "skip_connect": 1}, "normal_concat": [2], '
     '"reduce": [["none", 0], ["none", 1]], "reduce_concat": [2]}',
     "normal: expected a list or tuple of at most 128 entries, got {"),
    ('{"schema": "ftso.genotype/1", "normal": [["none", 0], ["none", NaN]], "normal_concat": [2], '
     '"reduce": [["none", 0], ["none", 1]], "reduce_concat": [2]}',
     "input of node 0 in normal[1]: expected a state from 0 to 1, got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), JSON_ERRORS)
def test_json_errors(text, message):
    with pytest.raises(UsageError) as caught:
        Genotype.from_json(text)
    assert str(caught.value).startswith(message)


def test_dict_with_an_additional_key_is_refused():
    fields = Genotype(ONE, [2], ONE, [2]).to_dict()
    with pytest.raises(UsageError, match=r"^genotype object: expected the keys normal, "):
        Genotype.from_dict({**fields, "schema": "ftso.genotype/1"})
    with pytest.raises(UsageError, match=r"got None$"):
        Genotype.from_dict(None)


def test_text_of_another_type_is_refused():
    with pytest.raises(UsageError, match=r"^genotype: expected a text of at most 65536 characters, got None$"):
        Genotype.read(None)


def test_unknown_cell_is_refused():
    with pytest.raises(UsageError, match=r"^cell: expected 'normal' or 'reduce', got 'both'$"):
        Genotype(ONE, [2], ONE, [2]).nodes("both")


def test_topology_is_in_descending_strength():
    betas = [0.1, 0.2, 0.3, 0.1, 0.2, -1.0, -2.0, -3.0, -1.5, 5.0, 1.0, 4.0, 2.0, 9.0]
    assert derive_topology(betas) == ((1, 0), (0, 2), (0, 3), (4, 0))
    assert margins(betas) == (None, pytest.approx(0.1), pytest.approx(0.5), pytest.approx(1.0))


def test_ties_go_to_the_lower_state():
    assert derive_topology([0.0] * 14) == ((0, 1),) * 4
    assert derive_topology([0.0, -0.0, 1, 2, 2], n_nodes=2) == ((0, 1), (1, 2))
    assert derive_topology([0, 1, 2, 1, 1], n_nodes=2) == ((1, 0), (0, 1))
    assert margins([0, 1, 2, 1, 1], n_nodes=2) == (None, 0.0)


@given(st.lists(st.floats(-5, 5), min_size=14, max_size=14))
def test_topology_agrees_with_the_softmax(betas):
    topology, gaps, start = derive_topology(betas), margins(betas), 0
    for node in range(4):
        group = betas[start : start + node + 2]
        weights = [math.exp(beta) for beta in group]
        kept, dropped = topology[node], set(range(node + 2)) - set(topology[node])
        assert len(set(kept)) == 2
        assert weights[kept[0]] >= weights[kept[1]] >= max((weights[j] for j in dropped), default=0.0)
        assert gaps[node] == (group[kept[1]] - max(group[j] for j in dropped) if dropped else None)
        start += node + 2


def test_topology_reads_arrays():
    betas = np.random.default_rng(0).normal(size=14)
    assert derive_topology(betas) == derive_topology(list(betas)) == derive_topology(betas.astype(np.float64))


@pytest.mark.parametrize("derive", [derive_topology, margins])
@pytest.mark.parametrize(
    ("betas", "n_nodes", "message"),
    [
        ([0.0] * 13, 4, "betas: expected 14 numbers for 4 nodes, got 13"),
        ([0.0] * 15, 4, "betas: expected 14 numbers for 4 nodes, got 15"),
        ([], 4, "betas: expected 14 numbers for 4 nodes, got 0"),
        ([0.0] * 7 + [math.nan] + [0.0] * 6, 4, "betas[7]: expected a finite number, got nan"),
        ([0.0] * 13 + [math.inf], 4, "betas[13]: expected a finite number, got inf"),
        ([-math.inf] + [0.0] * 13, 4, "betas[0]: expected a finite number, got -inf"),
        ([None] * 14, 4, "betas: expected 14 numbers, got [None, "),
        ([10**400] * 14, 4, "betas: expected 14 numbers, got [1000"),
        (None, 4, "betas: expected 14 numbers, got None"),
        (1.0, 4, "betas: expected 14 numbers, got 1.0"),
        ([], 0, "n_nodes: expected an integer from 1 to 64, got 0"),
        ([], 65, "n_nodes: expected an integer from 1 to 64, got 65"),
        ([], 4.0, "n_nodes: expected an integer from 1 to 64, got 4.0"),
    ],
)
def test_derivation_errors(derive, betas, n_nodes, message):
    with pytest.raises(UsageError) as caught:
        derive(betas, n_nodes)
    assert str(caught.value).startswith(message)


def test_genotype_from_a_topology():
    normal = derive_topology([random.Random(1).random() for _ in range(14)])
    genotype = Genotype.from_topology(normal, [(0, 1), [2, 1]], "sep_conv_3x3")
    assert genotype.normal == tuple(("sep_conv_3x3", j) for pair in normal for j in pair)
    assert genotype.reduce == (
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 2),
        ("sep_conv_3x3", 1),
    )
    assert (genotype.normal_concat, genotype.reduce_concat) == ((2, 3, 4, 5), (2, 3))


@pytest.mark.parametrize(
    ("normal", "op", "message"),
    [
        ([(0, 1), (0,)], "none", f"topology of normal, node 1: {LIST}2 entries, got (0,)"),
        ([(0, 1), (0, 1, 2)], "none", f"topology of normal, node 1: {LIST}2 entries, got (0, 1, 2)"),
        ([0], "none", "topology of normal, node 0: expected a list or tuple of 2 entries, got 0"),
        (None, "none", "topology of normal: expected a list or tuple of at most 64 entries, got None"),
        ([], "none", "normal: expected a positive even number of edges (two per node), got 0"),
        ([(0, 2)], "none", "input of node 0 in normal[1]: expected a state from 0 to 1, got 2"),
        ([(0, 1)], "conv", "operator of normal[0]: expected one of none, "),
    ],
)  # fmt: skip
def test_topology_errors(normal, op, message):
    with pytest.raises(UsageError) as caught:
        Genotype.from_topology(normal, [(0, 1)], op)
    assert str(caught.value).startswith(message)
