"""Every mistake in a user's data in one sentence."""

from itertools import islice

import numpy as np
import pytest
import torch
from handed import FLOATS, Listed, N, Photos, X, Y, batches, floats, ready, refused
from torch.utils.data import (
    DataLoader,
    Dataset,
    Subset,
)

from ftso_fast.data import ended_early
from ftso_fast.errors import DataError, UsageError

# Python 3.12 warns of any fork beside threads, and torch's loader forks its workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


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
