"""Files -> uint8 arrays: scikit-learn's digits, .npz, CIFAR-10's binary files, pictures. Nothing is ever unpickled."""

import io
import lzma
import math
import tokenize
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .batch import check_labels, label_array, nhwc
from .errors import DataError, UsageError
from .folders import Found, Pictures, has_pictures, in_folder, in_zip

__all__ = ["Images", "read_images"]

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MAX_BYTES = 8 << 30
"""The largest array that is read from an archive (8 GiB)."""
_HEADER = 16384
"""Enough for any .npy header: numpy itself refuses more than 10,000 characters."""
_RECORD = 1 + 3 * 32 * 32
_DIGITS_TRAIN = 1437
_NOT_READABLE = (
    *(
        OSError,
        EOFError,
        ValueError,
        KeyError,
        RuntimeError,
        SyntaxError,
        MemoryError,
        OverflowError,
        TypeError,
    ),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError),
)


@dataclass(frozen=True)
class Images:
    """x uint8 N,H,W,C (C in {1, 3}); y int64 N, all >= 0; `classes`: their names, if the file has them.

    `official_order` says that the first half is meant for the weights and the second for the architecture.
    """

    x: "NDArray[np.uint8] | Pictures"
    y: NDArray[np.int64]
    classes: tuple[str, ...] | None
    official_order: bool
    name: str


def read_images(source: str | Path, *, split: Literal["train", "test"] = "train") -> Images:
    """Read "digits", an .npz file, a folder with CIFAR-10's binary files, or pictures by class in a folder or a zip
    (see `folders`); ./digits is a path.

    UsageError for another split; DataError, with the file and the remedy, for anything that cannot be read.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split={split!r} is unknown: use 'train' or 'test'.")
    if source == "digits":
        return _digits(split)
    path = Path(source)
    try:
        if path.is_dir():
            pictures = has_pictures(path)
            return _pictures(path, in_folder(path, split)) if pictures else _cifar10(path, split)
        if path.is_file():
            zipped = path.suffix.lower() == ".zip" and zipfile.is_zipfile(path)
            return _pictures(path, in_zip(path, split)) if zipped else _npz(path, split)
    except (OSError, ValueError) as error:
        if isinstance(error, (DataError, UsageError)):
            raise
        raise DataError(f"{path}: cannot be opened ({error}): check the path and its permissions.") from None
    raise DataError(
        f"{path}: no such file or folder: give 'digits', an .npz file, a folder of CIFAR-10's .bin files, or pictures."
    )


def _pictures(path: Path, found: Found) -> Images:
    pictures, labels, classes = found
    return Images(pictures, labels, classes, False, path.name)


def _digits(split: str) -> Images:
    """scikit-learn's 1,797 grey 8x8 digits as 3x32x32, the smoke set; train: the first 1,437."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits: scikit-learn is not installed: run pip install scikit-learn.") from None
    digits = load_digits()
    part = slice(None, _DIGITS_TRAIN) if split == "train" else slice(_DIGITS_TRAIN, None)
    grey = np.rint(digits.images[part] * (255 / 16)).astype(np.uint8)
    big = grey.repeat(4, axis=1).repeat(4, axis=2)
    x = np.ascontiguousarray(np.broadcast_to(big[..., None], (*big.shape, 3)))
    return Images(x, digits.target[part].astype(np.int64), tuple("0123456789"), False, "digits")


def _npz(path: Path, split: str) -> Images:
    """x_train y_train [x_test y_test classes]: uint8 images N,H,W,C or N,C,H,W or N,H,W; integer labels N."""
    try:
        archive = zipfile.ZipFile(path)
    except _NOT_READABLE:
        raise DataError(
            f"{path}: is not an .npz archive, or a truncated one: write it again with numpy.savez."
        ) from None
    with archive:
        names = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}
        wanted = (f"x_{split}", f"y_{split}")
        if missing := [key for key in wanted if key not in names]:
            raise DataError(
                f"{path}: has no {' and no '.join(missing)} (found: "
                f"{', '.join(sorted(names)[:8]) or 'nothing'}): "
                "save it with keys x_train and y_train, and optionally x_test, y_test and classes."
            )
        x, y = (_member(path, archive, names[key], key, kinds) for key, kinds in zip(wanted, ("u1", "iu"), strict=True))
        classes = None
        if "classes" in names:
            strings = _member(path, archive, names["classes"], "classes", "US")
            classes = tuple(s.decode("utf-8", "replace") if isinstance(s, bytes) else str(s) for s in strings.ravel())
    images = nhwc(x, f"{path}: {wanted[0]}").astype(np.uint8, copy=False)
    labels = label_array(y, f"{path}: {wanted[1]}")
    if len(images) != len(labels):
        raise DataError(
            f"{path}: {wanted[0]} has {len(images)} images but {wanted[1]} has {len(labels)} labels: give "
            "one label an image."
        )
    if classes is not None:
        check_labels(labels, len(classes), f"{path}: {wanted[1]} with {len(classes)} names in classes")
    return Images(images, labels, classes, False, path.name)


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str, kinds: str) -> NDArray[np.generic]:
    """One array; its type (`kinds`) and size are judged from its header before memory is taken."""

    def refuse(cause: str) -> NoReturn:
        raise DataError(f"{path}: {key} {cause}.") from None

    try:
        if info.compress_size > path.stat().st_size:  # before 3.11.8 zipfile allocated what an entry claims
            raise EOFError
        with archive.open(info) as stream:
            head = io.BytesIO(stream.read(_HEADER))
        version = npy.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header written by Python 2 is read all the same
            shape, fortran, dtype = read_header(head)
        if dtype.hasobject:
            refuse("holds Python objects, which are never unpickled: save it as a plain array")
        if not (dtype == np.uint8 if kinds == "u1" else dtype.kind in kinds):
            expected = {"u1": "uint8 images (0..255)", "iu": "integer labels", "US": "the names as text"}[kinds]
            refuse(f"is of type {dtype}, expected {expected}: convert it with astype and save it again")
        size = math.prod(shape) * dtype.itemsize
        if size > MAX_BYTES:
            refuse(f"has shape {shape}, {size:,} bytes, more than the limit of {MAX_BYTES:,}: give fewer images")
        if size != info.file_size - head.tell():
            refuse(
                f"says shape {shape}, {size:,} bytes, but the file holds {info.file_size - head.tell():,}: "
                "write it again with numpy.savez"
            )
        with archive.open(info) as stream:
            stream.read(head.tell())
            data = stream.read(size)
            if len(data) != size or stream.read(1):  # reading to the end is what checks the CRC
                raise EOFError
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except DataError:
        raise
    except _NOT_READABLE:
        refuse("cannot be read (truncated or damaged): write the file again with numpy.savez")


def _cifar10(folder: Path, split: str) -> Images:
    """data_batch_1.bin .. data_batch_5.bin or test_batch.bin: records of a label and three 32x32 planes."""
    inside = folder / "cifar-10-batches-bin"
    root = inside if inside.is_dir() else folder
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        python = [root / "data_batch_1", folder / "cifar-10-batches-py" / "data_batch_1"]
        if any(p.is_file() for p in python):
            raise DataError(
                f"{root}: holds CIFAR-10's python version, which is pickled and never read: download the "
                "binary version (cifar-10-binary.tar.gz)."
            )
        raise DataError(
            f"{root}: has no {missing[0]}: give the folder of CIFAR-10's binary version (cifar-10-binary.tar.gz)."
        )
    planes, labels = [], []
    for name in names:
        size = (root / name).stat().st_size
        if size % _RECORD or not size:
            raise DataError(
                f"{root / name}: {size:,} bytes are not a whole number of {_RECORD}-byte records: download it again."
            )
        records = np.memmap(root / name, np.uint8, mode="r").reshape(-1, _RECORD)
        if records[:, 0].max() >= len(CIFAR10):
            raise DataError(
                f"{root / name}: label {records[:, 0].max()} is not one of CIFAR-10's 10: download it again."
            )
        labels.append(records[:, 0])
        planes.append(records[:, 1:])
    x = np.concatenate(planes).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(x, np.concatenate(labels).astype(np.int64), CIFAR10, True, root.name)
