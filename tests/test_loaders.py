"""Data sets, loaders and ready-made batches to batches: whatever a user has."""

import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch
from handed import FLOATS, Listed, N, Photos, Stream, X, Y, batches, floats, ids, pairs_equal, ready, refused
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

from ftso_fast.augment import BOTH, WEIGHTS, augment, halves, order
from ftso_fast.errors import DataError, UsageError

# Python 3.12 warns of any fork beside threads, and torch's loader forks its workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_of_the_arrays_whatever_its_workers(workers):
    loader = DataLoader(Listed(), batch_size=4, num_workers=workers, shuffle=workers > 0)
    found, arrays = ready(loader, batch_size=99), ready((X, Y))
    assert found.report == dataclasses.replace(arrays.report, source="data loader")
    assert found.iterations_per_epoch == 3
    assert pairs_equal(found.weight_batches(1), arrays.weight_batches(1))
    assert pairs_equal(islice(found.architecture_batches(), 5), islice(arrays.architecture_batches(), 5))


def test_persistent_workers():
    found = ready(DataLoader(Listed(), batch_size=4, num_workers=1, persistent_workers=True))
    arrays = ready((X, Y))
    for epoch in range(3):
        assert pairs_equal(found.weight_batches(epoch), arrays.weight_batches(epoch))


class Noisy(Listed):
    """A user's own random transform."""

    def __getitem__(self, i):
        return torch.rand(3, 8, 8), int(self.y[i])


def test_random_transforms_in_workers_repeat_with_the_seed():
    loader = DataLoader(Noisy(), batch_size=4, num_workers=2)
    one, two = ready(loader), ready(loader)
    list(one.weight_batches(0))
    assert pairs_equal(one.weight_batches(1), two.weight_batches(1))
    assert not pairs_equal(one.weight_batches(1), one.weight_batches(2))


class FakePil:
    """What numpy sees of a PIL image."""

    def __init__(self, array):
        self.__array_interface__ = {**array.__array_interface__, "data": array.tobytes()}


@pytest.mark.parametrize(
    "item",
    [lambda x: x, lambda x: torch.from_numpy(x.transpose(2, 0, 1).copy()), FakePil],
    ids=["array", "tensor", "PIL"],
)
def test_a_data_set_may_yield_arrays_tensors_or_pil_images(item):
    class Own:
        def __len__(self):
            return N

        def __getitem__(self, i):
            return item(X[i]), np.int64(Y[i])

    found = ready(Own(), classes=3)
    assert found.report.source == "data set"
    assert found.report.split == "seeded halves, not stratified: the data set lists no labels; seed 0"
    assert found.report.augmentation == "crop 4, flip, normalise"
    weights, _ = halves(np.zeros(N, np.int64), 0)
    index = weights[order(11, 0, WEIGHTS, 0)]
    drawn = torch.cat([b.images for b in found.weight_batches(0)])
    assert torch.equal(drawn, augment(X[index], 0, WEIGHTS, 0, index))


def test_the_users_collate_fn_is_kept():
    calls = []

    def collate(items):
        calls.append(len(items))
        return torch.stack([torch.from_numpy(x).float() + 1 for x, _ in items]).permute(0, 3, 1, 2), [
            y for _, y in items
        ]

    found = ready(DataLoader(Listed(), batch_size=4, collate_fn=collate))
    drawn = list(found.weight_batches(0))
    assert calls == [4, 4, 4, 3]
    assert found.report.augmentation.startswith("none")
    assert all(float(b.images.min()) >= 1 for b in drawn)


def test_a_collate_fn_that_leaves_images_out():
    def collate(items):
        return torch.from_numpy(np.stack([x for x, _ in items[:-1]])), torch.tensor([y for _, y in items[:-1]])

    found = ready(DataLoader(Listed(), batch_size=4, collate_fn=collate), classes=3)
    assert [len(b.labels) for b in found.weight_batches(0)] == [3, 3, 2]


def test_getitems_is_used():
    class Many(Listed):
        def __getitems__(self, indices):
            return [(X[i], int(self.y[i])) for i in indices]

        def __getitem__(self, i):
            raise AssertionError

    assert pairs_equal(ready(Many()).weight_batches(0), ready((X, Y)).weight_batches(0))


LABELLED = {
    "targets": type("D", (Photos,), {"targets": Y.tolist()})(),
    "labels": type("D", (Photos,), {"labels": torch.from_numpy(Y)})(),
    "tensors": floats(),
    "subset": Subset(Listed(), range(N)),
    "subset of subset": Subset(Subset(floats(), list(range(N))), np.arange(N)[::-1].tolist()),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_listed_labels_stratify(kind):
    found = ready(LABELLED[kind])
    assert found.report.split == "stratified halves, seed 0"
    assert (found.report.classes, found.report.classes_from) == (3, "labels")
    counts = torch.bincount(torch.cat([b.labels for b in found.weight_batches(0)]))
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("labels", [["cat", "dog", "cow"], Y[:5].tolist(), np.eye(3)[Y], None, lambda: 3])
def test_attributes_that_are_not_a_list_of_labels_are_not_taken_for_one(labels):
    data = type("D", (Photos,), {"labels": labels})()
    assert ready(data).report.split.startswith("seeded halves, not stratified")


def test_class_sorted_data_set_without_listed_labels_is_shuffled():
    data = Photos(labels=np.repeat([0, 1], N // 2))
    found = ready(data, classes=2)
    assert set(torch.cat([b.labels for b in found.weight_batches(0)]).tolist()) == {0, 1}


def test_where_the_number_of_classes_comes_from():
    named = type("D", (Listed,), {"classes": ["a", "b", "c", "d", "e"]})()
    more = type("D", (Listed,), {"classes": 6})()
    for data, classes, expected in (
        (named, None, (5, "data set")),
        (Subset(named, range(10)), None, (5, "data set")),
        (named, 7, (7, "classes=")),
        (Listed(), None, (3, "labels")),
        ((X, Y), 9, (9, "classes=")),
        (Photos(), None, (3, "first batch")),
        (list(batches(3)), None, (3, "first batch")),
        ((DataLoader(floats(), 4), DataLoader(floats(), 4)), None, (3, "labels")),
        ((DataLoader(named, 4), DataLoader(Photos(), 4)), None, (5, "data set")),
        ((list(batches(2)), list(batches(2))), None, (3, "first batch")),
        ((DataLoader(named, 4), DataLoader(more, 4)), None, (6, "data set")),
    ):
        report = ready(data, classes=classes).report
        assert (report.classes, report.classes_from) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": WeightedRandomSampler([1.0] * N, N)},
        {"sampler": list(range(N))},
        {"sampler": RandomSampler(range(N), replacement=True)},
        {"sampler": RandomSampler(range(N), num_samples=5)},
        {"batch_sampler": BatchSampler(RandomSampler(range(N)), 4, False)},
        {"batch_size": None},
    ],
)
def test_custom_sampling_is_refused_with_the_remedy(options):
    if "batch_sampler" not in options:
        options = {"batch_size": 4, **options}
    else:
        options = {"batch_sampler": type("Own", (BatchSampler,), {})(RandomSampler(range(N)), 4, False)}
    loader = DataLoader(floats(), **options)
    refused(UsageError, lambda: ready(loader), "sampler", "tuple of two loaders")


def test_a_loader_of_single_images():
    refused(DataError, lambda: ready(DataLoader(floats(), batch_size=1)), "at least 2 images")
    refused(DataError, lambda: ready((X, Y), batch_size=1), "at least 2 images")


class Counted:
    """An iterable that knows how many batches have been read from it, in all its passes."""

    def __init__(self, count, **options):
        self.count, self.options, self.read, self.passes = count, options, 0, 0

    def __iter__(self):
        self.passes += 1
        for batch in batches(self.count, **self.options):
            self.read += 1
            yield batch


def test_batches_alternate_and_are_read_only_when_asked_for():
    source = Counted(6)
    found = ready(source)
    assert source.read == 1
    architecture, weights = found.architecture_batches(), found.weight_batches(0)
    assert source.read == 1
    drawn = [next(architecture)]
    assert source.read == 1
    for k in range(5):
        drawn.append(next(architecture if k % 2 else weights))
        assert source.read == k + 2
    assert [ids(b)[0] for b in drawn] == [0, 4, 8, 12, 16, 20]
    assert next(architecture, None) is None
    assert next(weights, None) is None
    assert source.passes == 1
    assert found.iterations_per_epoch is None
    report = found.report
    assert (report.source, report.split, report.batch_size, report.images) == (
        "batches",
        "alternating batches",
        4,
        None,
    )


def test_an_iterable_is_started_again_in_the_next_epoch():
    source = Counted(3)
    found = ready(source)
    architecture = found.architecture_batches()
    firsts = []
    for epoch in range(3):
        weights = found.weight_batches(epoch)
        while (batch := next(architecture, None)) is not None:
            firsts.append(ids(batch)[0])
            if (batch := next(weights, None)) is not None:
                firsts.append(ids(batch)[0])
    assert firsts == [0, 4, 8] * 3


def test_a_generator_goes_on_in_the_next_epoch_and_then_ends():
    found = ready(batches(3))
    assert ids(next(found.architecture_batches()))[0] == 0
    assert [ids(b)[0] for b in found.weight_batches(1)] == [4, 8]
    assert list(found.weight_batches(2)) == []
    resumed = ready(batches(3))
    assert [ids(b)[0] for b in resumed.weight_batches(5)] == [0, 4, 8]


def test_a_list_of_batches_knows_its_length():
    assert ready(list(batches(7))).iterations_per_epoch == 3
    assert ready(list(batches(1))).iterations_per_epoch is None


def test_byte_batches_are_augmented_by_a_running_count():
    found = ready(Counted(4, floats=False))
    assert found.report.augmentation == "crop 4, flip, normalise"
    assert found.report.shape == (3, 8, 8)
    drawn = torch.cat([b.images for b in found.weight_batches(0)])
    assert torch.equal(drawn, augment(X[:16], 0, BOTH, 0, np.arange(16)))
    again = torch.cat([b.images for b in found.weight_batches(1)])
    assert torch.equal(again, augment(X[:16], 0, BOTH, 1, np.arange(16)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_over_an_iterable_data_set_alternates(workers):
    found = ready(DataLoader(Stream(), batch_size=4, num_workers=workers))
    assert found.report.source == "data loader over an iterable data set"
    architecture, weights = found.architecture_batches(), found.weight_batches(0)
    drawn = [ids(next(it))[0] for _ in range(3) for it in (architecture, weights)]
    assert drawn == [0, 4, 8, 12, 16, 20]


def test_two_loaders():
    weights, architecture = Counted(3), Counted(2, start=8)
    found = ready((weights, architecture))
    assert (found.report.source, found.report.split) == ("two loaders", "given")
    assert found.iterations_per_epoch is None
    assert (weights.read, architecture.read) == (0, 1)
    assert [ids(b)[0] for b in islice(found.architecture_batches(), 5)] == [8, 12, 8, 12, 8]
    for epoch in range(2):
        assert [ids(b)[0] for b in found.weight_batches(epoch)] == [0, 4, 8]
    assert [ids(b)[0] for b in islice(found.architecture_batches(), 3)] == [8, 12, 8]


def test_two_torch_loaders_keep_their_samplers_and_are_counted():
    data = floats()
    weights = DataLoader(Subset(data, range(13)), batch_size=4, sampler=[3, 1, 4, 1, 5, 9])
    architecture = DataLoader(Subset(data, range(13, N)), batch_size=3)
    found = ready((weights, architecture))
    report = found.report
    assert (report.images, report.weight_images, report.architecture_images) == (22, 13, 9)
    assert (report.batch_size, found.iterations_per_epoch) == (4, 2)
    assert [ids(b) for b in found.weight_batches(0)] == [[3, 1, 4, 1], [5, 9]]


def test_two_generators_end():
    found = ready((batches(3), batches(2)))
    assert len(list(found.architecture_batches())) == 2
    assert len(list(found.weight_batches(0))) == 3
    assert list(found.weight_batches(1)) == []


def test_a_trailing_batch_of_one_is_left_out_and_not_counted():
    loader = DataLoader(Subset(floats(), range(13)), batch_size=4)
    found = ready((loader, loader))
    assert found.iterations_per_epoch == 3
    assert [len(b.labels) for b in found.weight_batches(0)] == [4, 4, 4]
    assert [len(b.labels) for b in islice(found.architecture_batches(), 5)] == [4] * 5
    dropped = DataLoader(Subset(floats(), range(13)), batch_size=4, drop_last=True)
    assert ready((dropped, dropped)).iterations_per_epoch == 3
    assert len(list(ready([*batches(3), *batches(1, size=1)]).weight_batches(0))) == 3


def test_batches_that_need_a_gradient_or_cannot_be_written():
    images = FLOATS[:4].copy()
    images.flags.writeable = False
    labels = Y[:4].copy()
    labels.flags.writeable = False
    found = ready([(torch.from_numpy(FLOATS[:4]).requires_grad_(), Y[:4]), (images, labels)])
    one, two = found.weight_batches(0)
    assert not one.images.requires_grad
    assert torch.equal(one.images, two.images)
    two.images.zero_()
    two.labels.zero_()
    assert np.array_equal(images, FLOATS[:4])
    assert labels.tolist() == [0, 1, 2, 0]
