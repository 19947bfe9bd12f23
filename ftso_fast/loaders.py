"""The user's data sets, loaders and iterables: what they say of themselves, and passes over them."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from .augment import BOTH, draws
from .batch import NAMES, Batch, Finish, label_array
from .errors import DataError, UsageError

__all__ = [
    "Alternating",
    "IndexedLoader",
    "Pass",
    "length_of",
    "listed_classes",
    "listed_labels",
    "pair_of",
    "refuse_custom_sampling",
]

_SHUFFLE_OF_WORKERS = 32
"""Added to a stream's number for the seed that torch hands to the loader's workers."""


def refuse_custom_sampling(loader: DataLoader[Any]) -> None:
    """UsageError unless the loader is the plain kind that can be rebuilt over two halves."""
    sampler = loader.sampler
    plain = type(sampler) in (SequentialSampler, RandomSampler) and type(loader.batch_sampler) is BatchSampler
    if plain and isinstance(sampler, RandomSampler):
        plain = not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    if not plain:
        raise UsageError(
            "the data loader has its own sampler, batch_sampler or no batch_size, which cannot be kept "
            "when it is split into two halves: pass a tuple of two loaders (weights, architecture)."
        )


def listed_labels(data: Any) -> NDArray[np.int64] | None:
    """The labels of all images (N) if the data set lists them: `targets`, `labels`, TensorDataset, Subset."""
    if isinstance(data, Subset):
        inner = listed_labels(data.dataset)
        return None if inner is None else inner[np.asarray(data.indices, np.int64)]
    values = [getattr(data, "targets", None), getattr(data, "labels", None)]
    if isinstance(data, TensorDataset):
        values += data.tensors[1:2]
    for value in values:
        if value is None:
            continue
        try:
            labels = label_array(value, "")
        except DataError:  # names, boxes, one-hot rows: not a list of class numbers
            continue
        if len(labels) == len(data):
            return labels
    return None


def listed_classes(data: Any) -> int | None:
    """How many classes a data set names in `classes`."""
    if isinstance(data, Subset):
        return listed_classes(data.dataset)
    classes = getattr(data, "classes", None)
    if isinstance(classes, int):
        return classes
    return len(classes) if isinstance(classes, Sized) and not isinstance(classes, str) else None


class IndexedLoader:
    """A DataLoader over a map data set that reads given batches of indices and says which they were.

    Workers, collate_fn, pinning and the rest are those of `like`, if one is given.
    """

    def __init__(self, data: Any, like: DataLoader[Any] | None) -> None:
        self._cuts = _Cuts()
        self._generator = torch.Generator()
        own = like is None or like.collate_fn is default_collate
        options: dict[str, Any] = {}
        if like is not None:
            options = {
                name: getattr(like, name)
                for name in (
                    *("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"),
                    *("prefetch_factor", "persistent_workers"),
                )
            }
        self._loader: DataLoader[Any] = DataLoader(
            _Indexed(data),  # type: ignore[arg-type]
            batch_sampler=self._cuts,
            collate_fn=_Collate(None if own or like is None else like.collate_fn),
            generator=self._generator,
            **options,
        )

    def read(
        self, cuts: list[NDArray[np.int64]], seed: int, stream: int, epoch: int
    ) -> Iterator[tuple[NDArray[np.int64], object]]:
        """One pass: (indices, collated batch, or a DataError that the collation met) for each of the cuts."""
        self._cuts.batches = [cut.tolist() for cut in cuts]
        # The workers' own seeds come from here and not from torch's global generator: a pass repeats exactly.
        base = draws(seed, stream + _SHUFFLE_OF_WORKERS, epoch, np.zeros(1, np.int64))
        self._generator.manual_seed(int(base[0]) >> 1)
        yield from self._loader


class _Cuts:
    batches: list[list[int]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Indexed:
    """A data set whose items carry their index."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[int, object]:
        return index, self._data[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, object]]:
        many = getattr(self._data, "__getitems__", None)
        items = many(indices) if many else [self._data[i] for i in indices]
        return list(zip(indices, items, strict=True))


class _Collate:
    """The user's collate_fn, or a default that also takes PIL images; the indices stay beside the batch."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, pairs: list[tuple[int, Any]]) -> tuple[NDArray[np.int64], object]:
        indices, items = zip(*pairs, strict=True)
        collate = self._collate or _stack
        return np.array(indices, np.int64), collate(list(items))


def _stack(items: list[Any]) -> object:
    """(images, labels) of a list of (image, label); images are tensors, arrays or PIL images of one shape.

    An error is returned as a value: raised in a worker, it would reach the user with a traceback inside.
    """
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            length = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            return DataError(
                f"an item of the data set is a {type(item).__name__}{length}, expected a pair (image, "
                "label): return pairs, or pass a DataLoader whose collate_fn makes them."
            )
    images: list[Any] = [item[0] if isinstance(item[0], torch.Tensor) else np.asarray(item[0]) for item in items]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        return DataError(
            f"images of different shapes, {shapes[0]} and {shapes[1]}: resize or convert them to one shape."
        )
    labels = default_collate([item[1] for item in items])
    if all(isinstance(image, torch.Tensor) for image in images):
        return torch.stack(images), labels
    stacked = np.stack([np.asarray(image) for image in images])
    if stacked.dtype != np.uint8 and stacked.dtype.kind != "f":
        return stacked, labels  # refused later, with its type
    return torch.from_numpy(stacked), labels  # a tensor crosses from a worker in shared memory


def pair_of(item: object, where: str) -> tuple[object, object]:
    """The images and labels of a batch."""
    if isinstance(item, DataError):
        raise DataError(f"{where}: {item}")
    if not isinstance(item, tuple | list) or len(item) != 2:
        length = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise DataError(f"{where}: expected a pair (images, labels), got a {type(item).__name__}{length}: yield pairs.")
    return item[0], item[1]


class Pass:
    """One pass over a user's iterable: finished batches; a trailing batch of one image is left out."""

    def __init__(self, source: Iterable[object], finish: Finish, stream: int, epoch: int) -> None:
        self._items = iter(source)
        self._finish, self._stream, self._epoch = finish, stream, epoch
        self._number = self._images = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        where = f"{NAMES[self._stream]} {self._number}"
        images, labels = pair_of(next(self._items), where)
        try:
            count = len(images)  # type: ignore[arg-type]
        except TypeError:  # no sequence of images: refused below
            count = 0
        if count == 1 and self._number and next(self._items, None) is None:
            raise StopIteration
        index = np.arange(self._images, self._images + max(count, 1))
        batch = self._finish((images, labels, index), self._stream, self._epoch, self._number)
        self._number += 1
        self._images += count
        return batch


class Alternating:
    """One iterable of batches that feeds both steps: whoever asks gets the next batch, read only then."""

    def __init__(self, data: Iterable[object], finish: Finish, source: str) -> None:
        self._data, self._finish = data, finish
        self._epoch = 0
        self._batches = Pass(data, finish, BOTH, 0)
        first = next(self._batches, None)
        if first is None:
            raise DataError(f"{source}: is empty: give at least one batch (images, labels).")
        self.first = first
        self._waiting = [first]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._waiting.pop() if self._waiting else next(self._batches)

    def start(self, epoch: int) -> Iterator[Batch]:
        """Begin an epoch: from the start if the iterable is not an iterator, else where it is."""
        if epoch != self._epoch and not isinstance(self._data, Iterator):
            self._batches, self._waiting = Pass(self._data, self._finish, BOTH, epoch), []
        self._epoch = epoch
        return self


def length_of(data: object) -> int | None:
    """How many batches one pass yields, if the object says so."""
    try:
        length = len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset) and data.batch_size:
        return length - (not data.drop_last and len(data.sampler) % data.batch_size == 1)  # type: ignore[arg-type]
    return length
