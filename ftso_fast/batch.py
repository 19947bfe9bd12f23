"""What one batch is, and the checks that anything from outside passes once on its way to becoming one."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .augment import ARCHITECTURE, BOTH, WEIGHTS, augment
from .errors import DataError

__all__ = ["Batch", "Finish", "check_batch", "check_labels", "label_array", "nhwc", "tensor_of"]

Shape = tuple[int, int, int]
Raw = tuple[object, object, NDArray[np.int64]]
"""Images, labels and the images' indices (N), which key the augmentation."""

NAMES = {WEIGHTS: "weight batch", ARCHITECTURE: "architecture batch", BOTH: "batch"}
"""What a stream's batches are called in messages."""
MOST_CLASSES = 100_000
"""More classes than this are believed only when `classes=` says so: the label is probably wrong."""


@dataclass(frozen=True)
class Batch:
    """One batch as the search uses it: images float32 B,C,H,W; labels int64 B."""

    images: torch.Tensor
    labels: torch.Tensor


def nhwc(images: NDArray[np.generic], where: str) -> NDArray[np.generic]:
    """A view of N,H,W,C, N,C,H,W or N,H,W images as N,H,W,C with C in {1, 3}.

    Decidable because height and width are multiples of 4, never 1 or 3. DataError when it is neither.
    """
    if images.ndim == 3:
        return check_size(images[..., None], where)
    if images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if last and not first:
            return check_size(images, where)
        if first and not last:
            return check_size(images.transpose(0, 2, 3, 1), where)
    raise DataError(
        f"{where}: images of shape {tuple(images.shape)} are not N,H,W,C or N,C,H,W with 1 or 3 channels, "
        "nor N,H,W: convert them to grey or RGB."
    )


def check_size(images: NDArray[np.generic], where: str) -> NDArray[np.generic]:
    """The N,H,W,C images themselves; DataError unless H and W are multiples of 4."""
    _divisible(images.shape[1], images.shape[2], tuple(images.shape), where)
    return images


def _divisible(height: int, width: int, shape: tuple[int, ...], where: str) -> None:
    if height % 4 or width % 4 or not height or not width:
        raise DataError(
            f"{where}: height {height} and width {width} of images of shape {shape} must be divisible by 4 "
            "(two reduction cells halve them): resize or pad the images."
        )


def tensor_of(images: object, where: str) -> torch.Tensor:
    """A tensor, numpy array or anything with `__array__` as a tensor of uint8 or of a floating type."""
    if not isinstance(images, torch.Tensor):
        array = np.asarray(images)
        if array.dtype == np.uint8 or array.dtype.kind == "f":
            native = array.astype(array.dtype.newbyteorder("="), order="C", copy=not array.flags.writeable)
            images = torch.from_numpy(native.astype(np.float64) if native.dtype.itemsize > 8 else native)
        else:
            kind = "a list or of several shapes" if array.dtype.hasobject else f"of type {array.dtype}"
            raise DataError(
                f"{where}: images are {kind}, but must be uint8 (0..255) or floating: resize or convert them."
            )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(
            f"{where}: images are of type {images.dtype}, but must be uint8 (0..255) or floating: convert them."
        )
    return images.detach()


def label_array(labels: object, where: str) -> NDArray[np.int64]:
    """Class numbers as int64 N, of a tensor, array or list; DataError unless they are whole numbers >= 0."""
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu()
        labels = labels.double().numpy() if labels.is_floating_point() else labels.numpy()
    try:
        array = np.asarray(labels)
    except ValueError:  # a ragged list
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: labels must be whole class numbers, not {array.dtype}: number the classes from 0.")
    if array.ndim != 1:
        raise DataError(
            f"{where}: labels of shape {tuple(array.shape)} must be one class number an image: use argmax "
            "for one-hot labels, or ravel them."
        )
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(whole, array):
        wrong = array[whole != array][0]
        raise DataError(f"{where}: label {wrong} is not a whole number: labels are class numbers, so round or map it.")
    if len(whole) and whole.min() < 0:
        raise DataError(f"{where}: label {whole.min()} is negative: number the classes from 0.")
    return whole


def check_labels(labels: NDArray[np.int64], classes: int, where: str) -> None:
    """DataError unless every label is below `classes`."""
    if len(labels) and (found := int(labels.max())) >= classes:
        raise DataError(
            f"{where}: label {found} is outside 0..{classes - 1}: pass classes={found + 1} (or more), or "
            "correct the labels."
        )


def check_batch(batch: Batch, where: str, shape: Shape | None, of_bytes: bool) -> None:
    """DataError unless the batch is fit for the search; `where` names it in the message.

    images float32 B,C,H,W: B >= 2, C in {1, 3}, H and W multiples of 4, all finite, C,H,W equal to `shape` if
    given; labels B. of_bytes: the images were bytes, and so are finite.
    """
    images, labels = batch.images, batch.labels
    size = tuple(images.shape)
    if images.ndim != 4 or size[1] not in (1, 3):
        raise DataError(
            f"{where}: images of shape {size} are not B,C,H,W with 1 or 3 channels: yield batches, and "
            "permute or convert the images."
        )
    _divisible(size[2], size[3], size, where)
    if size[0] != len(labels):
        raise DataError(f"{where}: {size[0]} images but {len(labels)} labels: give one label an image.")
    if size[0] < 2:
        raise DataError(
            f"{where}: a batch needs at least 2 images, got {size[0]} (batch norm takes statistics over the "
            "batch): raise the batch size."
        )
    if shape is not None and size[1:] != shape:
        raise DataError(
            f"{where}: images of shape {size[1:]} follow images of shape {shape}: resize or convert them to one shape."
        )
    # NaN passes through both, and is a tenth of the price of a sum in float64.
    if not of_bytes and images.numel() and not all(torch.isfinite(end) for end in torch.aminmax(images)):
        raise DataError(f"{where}: images hold NaN or infinity: clean the data or check the normalisation.")


@dataclass
class Finish:
    """From raw batches to checked ones; holds what the first batch fixes for all the others."""

    seed: int
    classes: int | None
    classes_from: str = "classes="
    shape: Shape | None = None
    augmentation: str = "none: float images are taken as they come"

    def __call__(self, raw: Raw, stream: int, epoch: int, number: int) -> Batch:
        where = f"{NAMES[stream]} {number}"
        given, numbers, index = raw[0], label_array(raw[1], where), raw[2]
        pixels = given if isinstance(given, np.ndarray) and given.dtype == np.uint8 else None
        if pixels is None:
            images = tensor_of(given, where)
            pixels = images.cpu().numpy() if images.dtype == torch.uint8 else None
        if bytewise := pixels is not None:
            pixels = nhwc(pixels, where).astype(np.uint8, copy=False)
            images = augment(pixels, self.seed, stream, epoch, np.resize(index, len(pixels)))
        else:
            images = images.to(torch.float32)
        batch = Batch(images, torch.from_numpy(numbers))
        check_batch(batch, where, self.shape, bytewise)
        if self.classes is not None:
            check_labels(numbers, self.classes, where)
        if self.shape is None:
            self.shape = (images.shape[1], images.shape[2], images.shape[3])
            if bytewise:
                self.augmentation = "crop 4, flip, normalise"
        if self.classes is None:
            self.know(int(numbers.max()) + 1, "first batch")
        return batch

    def know(self, classes: int | None, origin: str) -> None:
        """Take a number of classes, unless one is known or None is offered."""
        if self.classes is not None or classes is None:
            return
        if classes < 2:
            raise DataError(
                f"the {origin} shows {classes} class: a search needs at least 2: check the labels or pass classes=."
            )
        if classes > MOST_CLASSES and origin != "data set":
            raise DataError(f"label {classes - 1} in the {origin} looks wrong: correct it, or pass classes=.")
        self.classes, self.classes_from = classes, origin
