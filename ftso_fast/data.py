"""Any object that holds labelled images -> the two streams of batches of a search. Knows no model."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .augment import ARCHITECTURE, WEIGHTS, halves, order
from .batch import NAMES, Batch, Finish, Raw, Shape, check_labels, label_array, nhwc
from .errors import DataError, UsageError
from .image_set import ImageSet
from .loaders import (
    Alternating,
    IndexedLoader,
    Pass,
    length_of,
    listed_classes,
    listed_labels,
    pair_of,
    refuse_custom_sampling,
)
from .readers import Images, read_images

__all__ = ["Batch", "DataReport", "SearchData", "ended_early", "prepare"]

AHEAD = 1 << 24
"""Bytes of batches that a half prepares at a time."""

ACCEPTED = (
    "a file name or 'digits', an ImageSet, a DataLoader, a map data set, a tuple (X, y) of arrays, a tuple of two "
    "loaders (weights, architecture), or an iterable of (images, labels) batches"
)


@dataclass(frozen=True)
class DataReport:
    """What was done with the data; None where it cannot be known without reading everything."""

    source: str
    images: int | None
    weight_images: int | None
    architecture_images: int | None
    batch_size: int | None
    classes: int
    classes_from: str
    split: str
    augmentation: str
    shape: Shape


class SearchData:
    """The batches of a search: an iteration draws the next architecture batch, then the next weight batch."""

    def __init__(
        self,
        report: DataReport,
        iterations_per_epoch: int | None,
        weights: Callable[[int], Iterator[Batch]],
        architecture: Callable[[], Iterator[Batch]],
    ) -> None:
        self.report = report
        self.iterations_per_epoch = iterations_per_epoch
        self._weights = weights
        self._architecture = architecture

    def weight_batches(self, epoch: int) -> Iterator[Batch]:
        """One pass over the weight half. Call it at the start of an epoch, before that epoch's first draw."""
        return self._weights(epoch)

    def architecture_batches(self) -> Iterator[Batch]:
        """Pass after pass over the architecture half, each in a new order; get it once for a whole search.

        Endless, except that a plain iterable of batches ends both iterators at once: then the next
        `weight_batches` starts the iterable again, if it can be, and this iterator goes on.
        """
        return self._architecture()


def ended_early(needed: int, got: int) -> DataError:
    """The error of a search whose data end before its last iteration."""
    return DataError(
        f"the data ended after {got} of {needed} iterations: give more batches or search fewer iterations "
        "(an iteration takes one architecture batch and one weight batch)."
    )


def prepare(data: object, *, classes: int | None, seed: int, batch_size: int = 256) -> SearchData:
    """Look at `data` once (its first batch at most) and return its batches.

    `batch_size` is for arrays, files and data sets; loaders and iterables keep theirs. A map data set is
    split into two disjoint seeded halves; its last batch is kept, whatever `drop_last` says, unless it is one
    image.
    UsageError for an object that is not one of ACCEPTED, DataError for what is wrong inside it.
    """
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int)):
        raise UsageError(f"classes={classes!r} is not a whole number: pass the number of classes, or None to find it.")
    if classes is not None and classes < 2:
        raise DataError(f"classes={classes}: a search needs at least 2 classes: check the labels.")
    finish = Finish(seed, classes)
    if isinstance(data, str | Path):
        data = read_images(data)
    if isinstance(data, ImageSet):
        return _from_arrays(data.x[data.index], data.labels, data.source, data.classes, False, finish, batch_size)
    if isinstance(data, Images):
        known = None if data.classes is None else len(data.classes)
        return _from_arrays(data.x, data.y, data.name, known, data.official_order, finish, batch_size)
    if isinstance(data, tuple):
        return _from_tuple(data, finish, batch_size)
    if isinstance(data, DataLoader) and type(data).__iter__ is DataLoader.__iter__:
        if isinstance(data.dataset, IterableDataset):
            return _from_iterable(data, "data loader over an iterable data set", finish)
        refuse_custom_sampling(data)
        return _from_map(data.dataset, "data loader", finish, data.batch_size or 1, data)
    if _is_array(data):
        raise UsageError("the data are one array without labels: pass a tuple (X, y).")
    if _is_map(data):
        return _from_map(data, "data set", finish, batch_size, None)
    if isinstance(data, Iterable) and not isinstance(data, bytes | dict | set):
        return _from_iterable(data, "data loader" if isinstance(data, DataLoader) else "batches", finish)
    raise UsageError(f"data of type {type(data).__name__} are not accepted: pass {ACCEPTED}.")


def _is_array(data: object) -> bool:
    return isinstance(data, np.ndarray | torch.Tensor) or (hasattr(data, "__array__") and hasattr(data, "shape"))


def _is_map(data: object) -> bool:
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "__iter__")


def _report(
    finish: Finish, source: str, split: str, batch_size: int, weights: int | None, architecture: int | None
) -> DataReport:
    """The report, once the first batch has been seen."""
    assert finish.shape is not None
    assert finish.classes is not None
    return DataReport(
        source=source,
        images=None if weights is None or architecture is None else weights + architecture,
        weight_images=weights,
        architecture_images=architecture,
        batch_size=batch_size,
        classes=finish.classes,
        classes_from=finish.classes_from,
        split=split,
        augmentation=finish.augmentation,
        shape=finish.shape,
    )


def _endless(source: str, one_pass: Callable[[int], Iterator[Batch]]) -> tuple[Batch, Callable[[], Iterator[Batch]]]:
    """The first batch; and pass after pass, that batch included, until one yields nothing."""
    opened = one_pass(0)
    first = next(opened, None)
    if first is None:
        raise DataError(f"{source}: no batch to be had: give at least one batch (images, labels).")
    waiting = [chain([first], opened)]

    def passes() -> Iterator[Batch]:
        current: Iterator[Batch] = waiting.pop() if waiting else one_pass(0)
        for epoch in count(1):
            empty = True
            for batch in current:
                empty = False
                yield batch
            if empty:
                return
            current = one_pass(epoch)

    return first, passes


def _in_groups(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The same batches, made `size` at a time behind the first: what makes one behind a search step has to come from
    memory, code and all, and takes several times as long as the next."""
    group = deque(islice(batches, 1))
    while group:
        yield group.popleft()
        if not group:
            group.extend(islice(batches, size))


def _from_halves(
    finish: Finish,
    parts: tuple[NDArray[np.int64], NDArray[np.int64]],
    source: str,
    split: str,
    batch_size: int,
    read: Callable[[int, int, list[NDArray[np.int64]]], Iterator[Raw]],
    ahead: int = 1,
) -> SearchData:
    """Map data: `read(stream, epoch, indices of each batch)` yields the raw batches of a pass over a half; `ahead`: how
    many of them are finished at a time."""
    if batch_size < 2:
        raise DataError(
            f"batch_size={batch_size}: a batch needs at least 2 images (batch norm takes statistics over "
            "it): raise the batch size."
        )

    def one_pass(stream: int, epoch: int) -> Iterator[Batch]:
        half = parts[stream == ARCHITECTURE]
        shuffled = half[order(len(half), finish.seed, stream, epoch)]
        cuts = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
        raws = read(stream, epoch, [cut for cut in cuts if len(cut) > 1])
        return _in_groups((finish(raw, stream, epoch, number) for number, raw in enumerate(raws)), ahead)

    _, architecture = _endless(source, lambda epoch: one_pass(ARCHITECTURE, epoch))
    images = len(parts[0])
    iterations = -(-images // batch_size) - (images % batch_size == 1)
    report = _report(finish, source, split, batch_size, images, len(parts[1]))
    return SearchData(report, iterations, lambda epoch: one_pass(WEIGHTS, epoch), architecture)


def _split(
    labels: NDArray[np.int64] | None, images: int, seed: int, official: bool
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], str]:
    """The indices of the two halves, and what to call them."""
    if images < 4:
        raise DataError(f"the data hold {images} images: a search needs at least 4, 2 in each half.")
    if official:
        middle = images - images // 2
        return (np.arange(middle), np.arange(middle, images)), "official order"
    if labels is None:
        said = f"seeded halves, not stratified: the data set lists no labels; seed {seed}"
        return halves(np.zeros(images, np.int64), seed), said
    return halves(labels, seed), f"stratified halves, seed {seed}"


def _from_arrays(
    x: Any, y: object, source: str, named: int | None, official: bool, finish: Finish, batch_size: int
) -> SearchData:
    """Images N,H,W,C or N,C,H,W or N,H,W, uint8 or floating; labels N; `named`: the number of class names."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    images, labels = np.asarray(x), label_array(y, source)
    found = len(images) if images.ndim else 0
    if found != len(labels):
        raise DataError(f"{source}: {found} images but {len(labels)} labels: give one label an image.")
    parts, split = _split(labels, found, finish.seed, official)
    images = nhwc(images, source)
    finish.know(named, "data set")
    finish.know(int(labels.max()) + 1, "labels")
    check_labels(labels, finish.classes or 0, source)

    def read(stream: int, epoch: int, cuts: list[NDArray[np.int64]]) -> Iterator[Raw]:
        for index in cuts:
            some = images[index]
            yield some if some.dtype == np.uint8 else some.transpose(0, 3, 1, 2), labels[index], index

    ahead = max(1, AHEAD // (4 * batch_size * math.prod(images.shape[1:])))
    return _from_halves(finish, parts, source, split, batch_size, read, ahead)


def _from_map(data: Any, source: str, finish: Finish, batch_size: int, like: DataLoader[Any] | None) -> SearchData:
    """A map data set, read through the workers and the collate_fn of the loader `like` if one is given."""
    try:
        images = len(data)
    except (TypeError, NotImplementedError):
        raise UsageError(
            f"the data set {type(data).__name__} has no length: define __len__, or pass an iterable of batches."
        ) from None
    labels = listed_labels(data)
    parts, split = _split(labels, images, finish.seed, False)
    finish.know(listed_classes(data), "data set")
    finish.know(None if labels is None else int(labels.max()) + 1, "labels")
    loaders = {stream: IndexedLoader(data, like) for stream in (WEIGHTS, ARCHITECTURE)}

    def read(stream: int, epoch: int, cuts: list[NDArray[np.int64]]) -> Iterator[Raw]:
        for number, (index, item) in enumerate(loaders[stream].read(cuts, finish.seed, stream, epoch)):
            yield *pair_of(item, f"{NAMES[stream]} {number}"), index

    return _from_halves(finish, parts, source, split, batch_size, read)


def _from_iterable(data: Iterable[object], source: str, finish: Finish) -> SearchData:
    """One iterable of batches for both steps."""
    shared = Alternating(data, finish, source)
    iterations = (length_of(data) or 0) // 2 or None
    report = _report(finish, source, "alternating batches", len(shared.first.labels), None, None)
    return SearchData(report, iterations, shared.start, lambda: shared)


def _from_tuple(data: tuple[Any, ...], finish: Finish, batch_size: int) -> SearchData:
    """(X, y) or (weights, architecture)."""
    if len(data) != 2:
        raise UsageError(
            f"a tuple of {len(data)} is not accepted: pass (X, y) or (weights, architecture), or batches as a list."
        )
    if _is_array(data[0]):
        return _from_arrays(data[0], data[1], "arrays", None, False, finish, batch_size)
    for each in data:
        if not isinstance(each, Iterable) or isinstance(each, str | bytes | dict | set | tuple) or _is_array(each):
            raise UsageError(
                f"a tuple with a {type(each).__name__} is not accepted: pass (X, y) arrays, or two loaders "
                "or lists of batches (weights, architecture); wrap a data set in a DataLoader."
            )
        if length_of(each) == 0:
            raise DataError("two loaders: one of them is empty: give at least one batch (images, labels).")
    return _from_two(data[0], data[1], finish)


def _from_two(weights: Iterable[object], architecture: Iterable[object], finish: Finish) -> SearchData:
    """Two iterables of batches; the architecture's is started again whenever it ends."""
    sets = [getattr(each, "dataset", None) for each in (weights, architecture)]
    named = [classes for classes in map(listed_classes, sets) if classes is not None]
    finish.know(max(named, default=None), "data set")
    labels = [found for found in map(listed_labels, sets) if found is not None and len(found)]
    finish.know(max(int(found.max()) for found in labels) + 1 if len(labels) == 2 else None, "labels")
    first, batches = _endless("two loaders", lambda epoch: Pass(architecture, finish, ARCHITECTURE, epoch))
    size = getattr(weights, "batch_size", None) or len(first.labels)
    counts = (len(each) if isinstance(each, Sized) else None for each in sets)
    report = _report(finish, "two loaders", "given", size, *counts)
    return SearchData(report, length_of(weights), lambda epoch: Pass(weights, finish, WEIGHTS, epoch), batches)
