"""Labelled images by index: what a network is trained and tested on, in counter-based batches."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from . import photos
from .augment import augment, cut_out, draws, normalised, order
from .batch import Batch, Shape, check_labels, check_size, label_array, nhwc, tensor_of
from .errors import DataError, UsageError
from .folders import Pictures
from .readers import Images, read_images

TRAINING, FRACTION = 4, 5
"""Streams of random numbers, behind those of the search in `augment`."""
SIZE = 224
"""Of photographs, in pixels, once they are cropped."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, H, W, C) of bytes, or floats that are taken as they come; labels (N); index: which of them are used.

    Shuffles and augmentation depend on an image's place in `x`, not on the part of it that is used.
    """

    x: NDArray[Any] | Pictures
    labels_of_all: NDArray[np.int64]
    index: NDArray[np.int64]
    source: str
    classes: int
    classes_from: str

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.labels_of_all[self.index]

    @property
    def shape(self) -> Shape:
        """Channels, height, width."""
        _, H, W, C = self.x.shape
        return C, H, W

    def part(self, index: NDArray[np.int64]) -> "ImageSet":
        """Some of its images, by their number within it."""
        return replace(self, index=self.index[index])

    def fraction(self, share: float, seed: int = 0) -> "ImageSet":
        """A share of every class, at least an image of each; smaller shares of a seed lie within larger ones.

        Raises UsageError unless 0 < share <= 1."""
        if isinstance(share, bool) or not isinstance(share, float | int) or not 0 < share <= 1:
            raise UsageError(f"fraction: expected a number above 0 and at most 1, got {share!r}")
        taken = [own[: max(1, round(share * len(own)))] for own in self._shuffled(seed)]
        return self.part(np.sort(np.concatenate(taken)))

    def split(self, share: float, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """(the others, a share of every class): disjoint, stratified. Raises UsageError unless 0 < share < 1."""
        if isinstance(share, bool) or not isinstance(share, float | int) or not 0 < share < 1:
            raise UsageError(f"validation: expected a share between 0 and 1, got {share!r}")
        taken = [own[: max(1, round(share * len(own)))] for own in self._shuffled(seed) if len(own) > 1]
        chosen = np.sort(np.concatenate([*taken, np.empty(0, np.int64)])).astype(np.int64)
        return self.part(np.setdiff1d(np.arange(len(self)), chosen)), self.part(chosen)

    def _shuffled(self, seed: int) -> list[NDArray[np.int64]]:
        labels, drawn = self.labels, draws(seed, FRACTION, 0, self.index)
        by_class = np.lexsort((drawn, labels))
        return np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)

    def n_batches(self, batch_size: int, parts: int = 1) -> int:
        """Batches of an epoch; a last smaller one counts where every part of it has two images."""
        whole, rest = divmod(len(self), batch_size)
        return whole + (rest >= 2 * parts)

    def training_batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        augmentation: str = "cifar",
        cutout: int = 0,
        first: int = 0,
        part: tuple[int, int] = (0, 1),
        workers: int = 0,
    ) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """The i-th of n contiguous parts of each batch of an epoch, from batch number `first` on; and their images'
        places in `x`, which key what is random. augmentation, cutout: as `recipes.Recipe` has them. workers: threads
        that prepare batches ahead; the bytes are the same."""
        shuffled = self.index[order(len(self), seed, TRAINING, epoch)]
        i, n = part
        cuts = [shuffled[b * batch_size : (b + 1) * batch_size] for b in range(first, self.n_batches(batch_size, n))]
        cuts = [np.array_split(cut, n)[i] for cut in cuts]

        def batch(index: NDArray[np.int64]) -> tuple[NDArray[np.int64], Batch]:
            images, key = self.x[index], (seed, TRAINING, epoch, index)
            if images.dtype != np.uint8:
                pixels = _floats(images)
            elif augmentation == "cifar":
                pixels = augment(images, *key)
            else:
                pixels = photos.augmented(images, SIZE, *key)
            return index, self._checked(cut_out(pixels, cutout, *key) if cutout else pixels, index)

        yield from _ahead(batch, cuts, workers)

    def test_batches(self, batch_size: int, augmentation: str = "cifar") -> Iterator[Batch]:
        """Every image once, in order, normalised as in training."""
        for first in range(0, len(self), batch_size):
            index = self.index[first : first + batch_size]
            images = self.x[index]
            if images.dtype != np.uint8:
                pixels = _floats(images)
            elif augmentation == "cifar":
                pixels = normalised(images.transpose(0, 3, 1, 2))
            else:
                pixels = photos.untouched(images, SIZE)
            yield self._checked(pixels, index)

    def _checked(self, pixels: torch.Tensor, index: NDArray[np.int64]) -> Batch:
        if not all(torch.isfinite(end) for end in torch.aminmax(pixels)):
            raise DataError(f"{self.source}: images hold NaN or infinity: clean the data or check the normalisation.")
        return Batch(pixels, torch.from_numpy(self.labels_of_all[index]))


def _floats(images: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32))


def _ahead(make: Any, cuts: list[NDArray[np.int64]], workers: int) -> Iterator[Any]:
    """make(cut) for each of the cuts, in order; `workers` threads are at most two each ahead."""
    if not workers:
        yield from map(make, cuts)
        return
    waiting = list[Future[Any]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for cut in cuts:
                waiting.append(pool.submit(make, cut))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def image_set(data: object, *, split: str = "train", classes: int | None = None) -> ImageSet:
    """Images and labels of a file or folder (see `readers.read_images`; its `split`), of a tuple (X, y) of arrays, of a
    map data set or a DataLoader over one, which is read whole; an ImageSet is returned as it is.

    classes: found in the data where not given. UsageError for other objects, DataError for what is wrong inside.
    """
    if isinstance(data, ImageSet):
        return data
    if isinstance(data, str | Path):
        data = read_images(data, split="test" if split == "test" else "train")
    named, source = None, "arrays"
    if isinstance(data, Images):
        named, source, data = data.classes, data.name, (data.x, data.y)
    elif isinstance(data, DataLoader):
        data, source = data.dataset, "data loader"
    if not isinstance(data, tuple) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        source = source if source != "arrays" else "data set"
        items = [data[i] for i in range(len(data))]
        if not items or any(not isinstance(item, tuple | list) or len(item) != 2 for item in items):
            raise DataError(f"{source}: expected pairs (image, label), at least one")
        data = _stacked([item[0] for item in items], source), [int(item[1]) for item in items]
    if not isinstance(data, tuple) or len(data) != 2 or isinstance(data[0], str):
        raise UsageError(
            f"images of type {type(data).__name__} are not accepted: pass a file or folder name or 'digits', a tuple "
            "(X, y) of arrays, a map data set or a DataLoader over one."
        )
    x: Any = data[0]
    if isinstance(x, Pictures):
        check_size(np.empty((0, *x.shape[1:]), np.uint8), source)
    else:
        x = nhwc(tensor_of(x, source).cpu().numpy(), source)
    labels = label_array(data[1], source)
    if len(x) != len(labels) or not len(x):
        raise DataError(f"{source}: {len(x)} images and {len(labels)} labels: give one label an image, at least one.")
    found = len(named) if named is not None else int(labels.max()) + 1
    origin = "data set" if named is not None else "labels"
    if classes is not None:
        found, origin = classes, "classes="
    if found < 2:
        raise DataError(f"{source}: {found} class: a network tells at least 2 apart: check the labels.")
    check_labels(labels, found, source)
    return ImageSet(x, labels, np.arange(len(x)), source, found, origin)


def _stacked(images: list[Any], source: str) -> NDArray[Any]:
    arrays = [np.asarray(image) for image in images]
    if len(shapes := {a.shape for a in arrays}) > 1:
        raise DataError(f"{source}: images of different shapes, {sorted(shapes)[:2]}: resize them to one shape.")
    return np.stack(arrays)
