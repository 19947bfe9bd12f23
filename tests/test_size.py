"""Counts of evaluation networks against figures that papers state or that were counted on the peers' own modules."""

import re

import pytest

from ftso_fast.errors import UsageError
from ftso_fast.genotype import Genotype
from ftso_fast.published import PUBLISHED

IMAGENET = {"channels": 48, "cells": 14, "classes": 1000, "stem": "imagenet"}
TOPOLOGIES = (((0, 1),) * 4, ((0, 1), (1, 2), (2, 3), (3, 4)))


def counts(genotype, **network):
    return genotype.params(**network), genotype.macs(**network)


@pytest.mark.parametrize(
    ("name", "cifar", "cifar100", "imagenet"),
    [
        ("DARTS_V2", (3_349_342, 528_359_040), 3_401_272, (4_718_752, 529_911_552)),
        ("PC_DARTS_cifar", (3_634_678, 556_670_592), 3_686_608, (5_270_560, 571_137_408)),
    ],
)
def test_counts_of_the_peers_own_networks(name, cifar, cifar100, imagenet):
    """Counted on DARTS' and PC-DARTS' modules."""
    genotype = PUBLISHED[name]
    assert counts(genotype) == cifar
    assert genotype.params(classes=100) == cifar100
    assert counts(genotype, **IMAGENET) == imagenet


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=["wide", "deep"])
def test_separable_cells_have_one_size_whatever_their_topology(topology):
    genotype = Genotype.from_topology(topology, topology, "sep_conv_3x3")
    assert counts(genotype) == (4_701_718, 711_665_280)
    assert genotype.params(classes=100) == 4_753_648
    assert counts(genotype, **IMAGENET) == (6_548_320, 712_012_800)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("SNAS", 2.66, 422), ("PDARTS", 3.43, 532), ("PC_DARTS_cifar", 3.63, 557), ("DARTS_V2", 3.35, 528)],
)
def test_counts_that_papers_state(name, params, macs):
    """Millions at CIFAR-10, as precise as they are printed."""
    found = counts(PUBLISHED[name])
    assert (round(found[0] / 1e6, 2), round(found[1] / 1e6)) == (params, macs)


def test_the_auxiliary_head():
    for genotype in PUBLISHED.values():
        assert genotype.macs(auxiliary=True) == genotype.macs()
    v2 = PUBLISHED["DARTS_V2"]
    assert v2.params(auxiliary=True) - v2.params() == 476_426
    assert v2.params(auxiliary=True, **IMAGENET) - v2.params(**IMAGENET) == 1_260_776
    narrow = PUBLISHED["AmoebaNet"]
    assert narrow.params(auxiliary=True) - narrow.params() == 476_426 - 128 * 144


def test_published_genotypes_survive_both_dialects():
    for genotype in PUBLISHED.values():
        assert Genotype.from_text(repr(genotype)) == Genotype.from_json(genotype.to_json()) == genotype


def test_enas_is_the_architecture_of_its_release():
    """Its release writes a node as input, operator, input, operator; a cell's output joins what no node reads."""
    released = (
        "0 2 0 0 0 4 0 1 0 4 1 1 1 0 0 1 0 2 1 1",
        "1 0 1 0 0 3 0 2 1 1 3 1 1 0 0 4 0 3 1 1",
    )
    names = ("sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3", "skip_connect")
    fields = []
    for arc in released:
        numbers = [int(word) for word in arc.split()]
        states, operators = numbers[::2], [names[i] for i in numbers[1::2]]
        fields += [list(zip(operators, states, strict=True)), [s for s in range(2, 7) if s not in states]]
    assert Genotype(*fields) == PUBLISHED["ENAS"]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"stem": "mnist"}, "stem: expected 'cifar' or 'imagenet', got 'mnist'"),
        ({"cells": 0}, "cells: expected a whole number of at least 1, got 0"),
        ({"channels": True}, "channels: expected a whole number of at least 2, got True"),
        ({"channels": 35}, "channels: expected an even number"),
        ({"classes": 1.5}, "classes: expected a whole number of at least 2, got 1.5"),
        ({"size": -1}, "size: expected a whole number of at least 1, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(network, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        PUBLISHED["DARTS_V2"].params(**network)


def test_none_is_no_operator_of_a_network():
    topology = TOPOLOGIES[0]
    with pytest.raises(UsageError, match=r"expected operators of an evaluation network, got 'none'"):
        Genotype.from_topology(topology, topology, "none").params()
