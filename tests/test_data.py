"""Arrays to batches: how they are split, shuffled, augmented and reported."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
import torch
from handed import FLOATS, Listed, N, X, Y, ids, pairs_equal, ready
from torch.utils.data import (
    DataLoader,
)

from ftso_fast.augment import ARCHITECTURE, WEIGHTS, augment, halves, order
from ftso_fast.data import _in_groups, prepare
from ftso_fast.readers import Images

# Python 3.12 warns of any fork beside threads, and torch's loader forks its workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def test_arrays_are_split_shuffled_and_augmented():
    found = ready((X, Y))
    weights, architecture = halves(Y, 0)
    for stream, half, drawn in (
        (WEIGHTS, weights, list(found.weight_batches(3))),
        (ARCHITECTURE, architecture, list(islice(found.architecture_batches(), 3))),
    ):
        epoch = 3 if stream == WEIGHTS else 0
        index = half[order(len(half), 0, stream, epoch)]
        expected = augment(X[index], 0, stream, epoch, index)
        assert torch.equal(torch.cat([b.images for b in drawn]), expected)
        assert torch.cat([b.labels for b in drawn]).tolist() == Y[index].tolist()
        assert [len(b.labels) for b in drawn] == [4, 4, 3]
        assert all(b.images.dtype == torch.float32 and b.labels.dtype == torch.int64 for b in drawn)


def test_the_report():
    report = ready((X, Y)).report
    assert json.loads(json.dumps(dataclasses.asdict(report))) == {
        "source": "arrays",
        "images": N,
        "weight_images": 11,
        "architecture_images": 11,
        "batch_size": 4,
        "classes": 3,
        "classes_from": "labels",
        "split": "stratified halves, seed 0",
        "augmentation": "crop 4, flip, normalise",
        "shape": [3, 8, 8],
    }


@pytest.mark.parametrize(
    "x",
    [
        X.transpose(0, 3, 1, 2),
        np.ascontiguousarray(X.transpose(0, 3, 1, 2)),
        np.asfortranarray(X),
        np.repeat(X, 2, axis=0)[::2],
        torch.from_numpy(X),
        torch.from_numpy(X).permute(0, 3, 1, 2),
    ],
    ids=["view", "NCHW", "fortran", "strided", "torch", "torch NCHW"],
)
@pytest.mark.parametrize("y", [Y.tolist(), torch.from_numpy(Y), Y.astype(np.float32), Y.astype(">i2")])
def test_layouts_and_label_types_give_the_same_batches(x, y):
    assert pairs_equal(ready((x, y)).weight_batches(0), ready((X, Y)).weight_batches(0))


def test_grey_images_have_one_channel():
    found = ready((X[..., 0], Y))
    assert found.report.shape == (1, 8, 8)
    same = ready((X[..., :1], Y))
    assert pairs_equal(found.weight_batches(0), same.weight_batches(0))


@pytest.mark.parametrize(
    "x",
    [
        FLOATS,
        FLOATS.transpose(0, 2, 3, 1),
        FLOATS.astype(np.float64),
        FLOATS.astype(">f4"),
        torch.from_numpy(FLOATS).requires_grad_(),
    ],
)
def test_float_arrays_are_taken_as_they_come(x):
    found = ready((x, Y))
    assert found.report.augmentation == "none: float images are taken as they come"
    for batch in found.weight_batches(0):
        assert torch.equal(batch.images, torch.from_numpy(FLOATS[ids(batch)]))
        assert batch.images.is_contiguous()
        assert not batch.images.requires_grad
        assert batch.labels.tolist() == Y[ids(batch)].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    x = torch.from_numpy(FLOATS).to(dtype)
    batch = next(ready((x, Y)).weight_batches(0))
    assert torch.equal(batch.images, x[ids(batch)].float())


def test_a_read_only_array_and_its_owner_are_left_alone():
    x, f = X.copy(), FLOATS.copy()
    x.flags.writeable = f.flags.writeable = False
    for images in (x, f):
        list(ready((images, Y)).weight_batches(0))
    assert np.array_equal(x, X)
    assert np.array_equal(f, FLOATS)


def test_class_sorted_data_end_evenly_in_both_halves_and_in_every_batch():
    y = np.repeat(np.arange(4), 64)
    found = ready((np.zeros((256, 8, 8, 3), np.uint8), y), batch_size=64)
    assert found.report.classes == 4
    for drawn in (found.weight_batches(0), islice(found.architecture_batches(), 2)):
        labels = [b.labels for b in drawn]
        assert torch.bincount(torch.cat(labels)).tolist() == [32] * 4
        assert all(torch.bincount(each, minlength=4).min() >= 6 for each in labels)


def test_halves_are_disjoint_and_every_epoch_is_a_whole_new_pass():
    found = ready((FLOATS, Y))
    passes = [[i for b in found.weight_batches(epoch) for i in ids(b)] for epoch in range(3)]
    drawn = [i for b in islice(found.architecture_batches(), 6) for i in ids(b)]
    architecture, again = drawn[:11], drawn[11:]
    assert all(sorted(p) == sorted(passes[0]) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert sorted(again) == sorted(architecture)
    assert again != architecture
    assert sorted(passes[0] + architecture) == list(range(N))


@pytest.mark.parametrize("data", [(X, Y), (FLOATS, Y), Listed()], ids=["bytes", "floats", "data set"])
def test_the_same_seed_gives_the_same_batches_in_any_order_of_epochs(data):
    one, two = ready(data), ready(data)
    second = list(two.weight_batches(1))
    list(islice(two.architecture_batches(), 5))
    first = list(two.weight_batches(0))
    assert pairs_equal(one.weight_batches(0), first)
    assert pairs_equal(one.weight_batches(1), second)
    assert pairs_equal(islice(one.architecture_batches(), 9), islice(two.architecture_batches(), 9))
    other = ready(data, seed=1)
    assert other.report.split.endswith("seed 1")
    assert not pairs_equal(other.weight_batches(0), one.weight_batches(0))


def test_nothing_touches_the_global_generators():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = ready(DataLoader(Listed(), batch_size=4, shuffle=True))
    list(found.weight_batches(0))
    list(islice(found.architecture_batches(), 5))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"), [(22, 5, [5, 5]), (22, 4, [4, 4, 3]), (20, 5, [5, 5]), (4, 256, [2])]
)
def test_the_last_batch_is_kept_unless_it_is_one_image(n, batch_size, sizes):
    found = ready((X[:n], Y[:n]), batch_size=batch_size)
    assert [len(b.labels) for b in found.weight_batches(0)] == sizes
    assert found.iterations_per_epoch == len(sizes)
    drawn = [len(b.labels) for b in islice(found.architecture_batches(), 2 * len(sizes))]
    assert drawn == 2 * sizes


def test_an_images_object_and_its_official_order():
    images = Images(X, Y.astype(np.int64), ("a", "b", "c", "d"), True, "here")
    report = ready(images).report
    assert (report.source, report.split, report.classes) == ("here", "official order", 4)
    assert report.classes_from == "data set"
    first = ready(Images(FLOATS, Y.astype(np.int64), None, True, "here"))  # type: ignore[arg-type]
    assert sorted(i for b in first.weight_batches(0) for i in ids(b)) == list(range(11))
    assert sorted(i for b in islice(first.architecture_batches(), 3) for i in ids(b)) == list(range(11, 22))


@pytest.mark.parametrize("size", [1, 3, 50])
def test_batches_are_made_in_groups_behind_the_first(size):
    made, seen = [], []
    for batch in _in_groups((made.append(i) or i for i in range(8)), size):
        seen.append((batch, len(made)))
    groups = [1, *(min(1 + size * (1 + (i - 1) // size), 8) for i in range(1, 8))]
    assert seen == list(enumerate(groups))


def test_batches_made_together_are_those_made_alone(monkeypatch):
    together = list(prepare((X, Y), classes=None, seed=0, batch_size=4).weight_batches(0))
    monkeypatch.setattr("ftso_fast.data.AHEAD", 0)
    alone = list(prepare((X, Y), classes=None, seed=0, batch_size=4).weight_batches(0))
    assert len(alone) == 3
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
