"""From any user's object to batches: what is accepted, how it is split, and every mistake in one sentence."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from ftso_fast.augment import ARCHITECTURE, BOTH, WEIGHTS, augment, halves, order
from ftso_fast.data import ended_early, prepare
from ftso_fast.errors import DataError, UsageError
from ftso_fast.readers import Images

# Python 3.12 warns of any fork beside threads, and torch's loader forks its workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

N = 22
X = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
Y = np.arange(N) % 3
FLOATS = np.random.default_rng(1).standard_normal((N, 3, 8, 8)).astype(np.float32)
FLOATS[:, 0, 0, 0] = np.arange(N)


def ids(batch):
    """Which of FLOATS are in a batch."""
    return batch.images[:, 0, 0, 0].to(torch.int64).tolist()


def ready(data, classes=None, seed=0, batch_size=4):
    return prepare(data, classes=classes, seed=seed, batch_size=batch_size)


def refused(error, call, *words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message, message


def batches(count, size=4, floats=True, start=0):
    """`count` ready-made batches; their images are numbered from `start`."""
    for k in range(count):
        index = (start + k * size + np.arange(size)) % N
        images = torch.from_numpy(FLOATS[index] if floats else X[index])
        yield images, torch.from_numpy(Y[index])


def pairs_equal(one, two):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(one, two, strict=True)
    )


class Photos(Dataset):
    """A map data set of uint8 H,W,C arrays that lists no labels."""

    def __init__(self, labels=Y, images=X):
        self.y, self.images = labels, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        assert type(i) is int
        return self.images[i], int(self.y[i])


class Listed(Photos):
    @property
    def targets(self):
        return self.y.tolist()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(torch.from_numpy(FLOATS), Y.tolist(), strict=True))


def floats():
    return TensorDataset(torch.from_numpy(FLOATS), torch.from_numpy(Y))


# Arrays


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


# Data sets and loaders


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


# Iterables of batches


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


# Mistakes


def test_a_batch_of_one():
    for count in (1, 4):
        refused(DataError, lambda n=count: ready(list(batches(n, size=1))), "batch 0", "at least 2 images")
    middle = [*batches(2), *batches(1, size=1), *batches(2)]
    refused(DataError, lambda: list(ready(middle).weight_batches(0)), "batch 2", "at least 2 images")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value):
    bad = FLOATS.copy()
    bad[:, 2, 7, 7] = value
    refused(DataError, lambda: ready((bad, Y)), "architecture batch 0", "NaN or infinity")
    late = [*batches(3), (torch.from_numpy(bad[:4]), torch.from_numpy(Y[:4]))]
    refused(DataError, lambda: list(ready(late).weight_batches(0)), "batch 3", "NaN or infinity")


def test_infinities_that_cancel_and_large_values():
    bad = FLOATS.copy()
    bad[:, 0, 1, 1], bad[:, 0, 1, 2] = np.inf, -np.inf
    refused(DataError, lambda: ready((bad, Y)), "NaN or infinity")
    large = np.full_like(FLOATS, 3e38)
    assert next(ready((large, Y)).weight_batches(0)).images.max() > 2e38
    refused(DataError, lambda: ready((np.full(FLOATS.shape, 1e300), Y)), "NaN or infinity")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(4, 3, 8, 6), ["(4, 3, 8, 6)", "divisible by 4", "resize or pad"]),
        (torch.zeros(4, 3, 10, 8), ["divisible by 4"]),
        (torch.zeros(4, 3, 0, 8), ["divisible by 4"]),
        (torch.zeros(4, 4, 8, 8), ["(4, 4, 8, 8)", "1 or 3 channels"]),
        (torch.zeros(4, 8, 8, 3), ["(4, 8, 8, 3)", "permute"]),
        (torch.zeros(3, 8, 8), ["(3, 8, 8)", "B,C,H,W"]),
        (torch.zeros(4), ["(4,)"]),
        (torch.tensor(1.0), ["()"]),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int64), ["torch.int64", "uint8"]),
        (torch.zeros(4, 3, 8, 8, dtype=torch.complex64), ["torch.complex64"]),
        (np.zeros((4, 8, 8, 3), np.uint16), ["uint16", "convert"]),
        (np.zeros((4, 8, 8, 3), bool), ["bool"]),
        (np.array([np.zeros(3), np.zeros(4), None, 1], object), ["several shapes"]),
        (None, ["images are"]),
        ("pictures", ["images are"]),
        (torch.zeros(4, 9, 9, 3, dtype=torch.uint8), ["divisible by 4"]),
        (torch.zeros(4, 4, 8, 8, dtype=torch.uint8), ["RGB"]),
    ],
)
def test_wrong_images(images, words):
    labels = torch.tensor([0, 1, 2, 0])
    refused(DataError, lambda: ready([(images, labels)]), "batch 0", *words)
    with pytest.raises(DataError, match="batch 1"):
        list(ready([next(batches(1)), (images, labels)]).weight_batches(0))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 1, -1, 2]), ["label -1", "negative"]),
        (torch.tensor([0.0, 1.5, 1.0, 2.0]), ["label 1.5", "whole"]),
        (np.array([0.0, np.nan, 1.0, 2.0]), ["label nan", "whole"]),
        (torch.tensor([0, 1, 2]), ["4 images but 3 labels"]),
        (torch.eye(4), ["(4, 4)", "argmax"]),
        (torch.tensor(1), ["()"]),
        (["cat", "dog", "cat", "cow"], ["whole class numbers"]),
        ([[0], [1, 2], [3], [4]], ["whole class numbers"]),
        (None, ["whole class numbers"]),
    ],
)
def test_wrong_labels(labels, words):
    images = torch.zeros(4, 3, 8, 8)
    refused(DataError, lambda: ready([(images, labels)]), "batch 0", *words)
    with pytest.raises(DataError):
        ready((images, labels))


def test_a_label_out_of_range_names_classes():
    late = [*batches(3), (torch.zeros(4, 3, 8, 8), torch.tensor([0, 5, 1, 2]))]
    found = ready(late)
    assert found.report.classes == 3
    refused(DataError, lambda: list(found.weight_batches(0)), "batch 3", "label 5", "0..2", "classes=6")
    assert len(list(ready(late, classes=6).weight_batches(0))) == 4
    refused(DataError, lambda: ready((X, Y), classes=2), "label 2", "0..1", "classes=3")
    named = type("D", (Listed,), {"classes": ["a", "b"]})()
    refused(DataError, lambda: list(ready(named).weight_batches(0)), "label 2", "classes=3")


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_too_few_classes(classes):
    refused(DataError, lambda: ready((X, Y), classes=classes), "at least 2")


def test_data_of_one_class():
    zeros = np.zeros(N, np.int64)
    one = type("D", (Listed,), {"classes": ["a"]})()
    for data in ((X, zeros), one, [(torch.zeros(4, 3, 8, 8), torch.zeros(4))]):
        refused(DataError, lambda data=data: ready(data), "1 class", "at least 2")


@pytest.mark.parametrize("classes", [2.0, "10", True])
def test_classes_that_are_no_number(classes):
    refused(UsageError, lambda: ready((X, Y), classes=classes), "classes=")


def test_an_absurd_label_is_not_believed():
    y = Y.copy()
    y[3] = 2**40
    refused(DataError, lambda: ready((X, y)), str(2**40), "classes=")


def test_batches_of_another_shape():
    other = [*batches(2), (torch.zeros(4, 3, 12, 12), torch.tensor([0, 1, 2, 0]))]
    refused(DataError, lambda: list(ready(other).weight_batches(0)), "batch 2", "(3, 12, 12)", "(3, 8, 8)")


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_several_shapes_in_a_data_set(workers):
    class Ragged(Listed):
        def __getitem__(self, i):
            return np.zeros((8, 8 + 4 * (i % 2), 3), np.uint8), int(self.y[i])

    loader = DataLoader(Ragged(), batch_size=8, num_workers=workers)
    refused(DataError, lambda: ready(loader), "architecture batch 0", "(8, 8, 3)", "(8, 12, 3)", "resize")


@pytest.mark.parametrize(
    "item", [{"image": X[0], "label": 0}, X[0], (X[0], 1, 2), 7], ids=["dict", "no label", "triple", "number"]
)
def test_items_and_batches_that_are_no_pairs(item):
    class Own(Photos):
        def __getitem__(self, i):
            return item

    refused(DataError, lambda: ready(Own(), classes=3), "architecture batch 0", "pair (image, label)")
    refused(DataError, lambda: ready([item]), "batch 0", "pair (images, labels)")


@pytest.mark.parametrize(
    "data",
    [
        [],
        iter(()),
        ([], list(batches(2))),
        (list(batches(2)), []),
        (list(batches(2)), iter(())),
        (X[:0], Y[:0]),
        Photos(images=X[:0]),
        DataLoader(Subset(Listed(), [])),
    ],
)
def test_too_little_data(data):
    with pytest.raises(DataError, match=r"is empty|at least 4|no batch"):
        ready(data)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_than_four_images(n):
    for data in ((X[:n], Y[:n]), Subset(Listed(), range(n))):
        refused(DataError, lambda data=data: ready(data), f"{n} images", "at least 4")


def test_arrays_of_unequal_length():
    refused(DataError, lambda: ready((X, Y[:-1])), "22 images but 21 labels")
    refused(DataError, lambda: ready((np.uint8(3), Y)), "0 images but 22 labels")


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        X,
        torch.from_numpy(X),
        {"x": X, "y": Y},
        b"file.npz",
        (X, Y, Y),
        (X,),
        (),
        (Listed(), Listed()),
        ((X, Y), (X, Y)),
        ("a", "b"),
        object(),
        lambda: batches(3),
    ],
)
def test_other_objects_are_refused_with_what_is_accepted(data):
    refused(UsageError, lambda: ready(data), "pass")


def test_a_data_set_without_a_length():
    class Endless(Dataset):
        def __getitem__(self, i):
            return X[0], 0

    refused(UsageError, lambda: ready(Endless()), "Endless", "__len__")


class Broken(Listed):
    def __getitem__(self, i):
        raise LookupError("disk on fire")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_sets_own_exception_comes_through(workers):
    with pytest.raises(LookupError, match="disk on fire"):
        ready(DataLoader(Broken(), batch_size=4, num_workers=workers))


def test_a_loaders_own_exception_comes_through():
    def breaking():
        yield from batches(2)
        raise LookupError("disk on fire")

    found = ready(breaking())
    drawn = found.weight_batches(0)
    assert len(list(islice(drawn, 2))) == 2
    with pytest.raises(LookupError, match="disk on fire"):
        next(drawn)

    class NoIter:
        def __iter__(self):
            raise PermissionError("no")

    with pytest.raises(PermissionError):
        ready(NoIter())


def test_a_subclassed_loader_with_its_own_iteration_is_an_iterable():
    class Own(DataLoader):
        def __iter__(self):
            return batches(4)

    found = ready(Own(floats(), batch_size=4))
    assert (found.report.source, found.report.split) == ("data loader", "alternating batches")


def test_ended_early():
    error = ended_early(50, 7)
    assert isinstance(error, DataError)
    assert "7 of 50" in str(error)
