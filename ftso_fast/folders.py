"""Pictures in folders by class, or in a zip of such folders: listed at once, decoded when somebody asks for them.

    DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (or DIR/test/...), or DIR/CLASS/*.jpg for training alone

All pictures have one size. A zip is never unpacked. Pillow decodes; it is asked for only here.
"""

import io
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".webp")
MAX_PICTURES, MAX_FILE, MAX_PIXELS, MAX_BYTES = 5_000_000, 64 << 20, 64_000_000, 8 << 30
"""The most pictures, the largest file and picture, and the most bytes that are decoded at once."""
SPLITS = {"train": ("train",), "test": ("val", "test")}


class Pictures:
    """N pictures as an array (N, H, W, 3) of bytes: `pictures[index]` decodes those of an index array.

    Raises DataError for what is no picture, too large, or of another size than the first.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, names: list[str], read: Callable[[str], bytes], source: str) -> None:
        self.names, self._read, self.source = names, read, source
        self.shape = (len(names), *self._decoded(names[0], None).shape)
        self.ndim = 4

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        found = np.empty((len(index), *self.shape[1:]), np.uint8)
        for to, number in zip(found, index, strict=True):
            to[:] = self._decoded(self.names[number], self.shape[1:])
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        size = int(np.prod(self.shape))
        if size > MAX_BYTES:
            raise DataError(
                f"{self.source}: {self.shape} pictures take {size:,} bytes, more than {MAX_BYTES:,}: give fewer"
            )
        return np.asarray(self[np.arange(len(self))], dtype)

    def _decoded(self, name: str, shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise DataError("pictures: Pillow is not installed: run pip install pillow.") from None
        where = f"{self.source}: {name}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(self._read(name))) as picture:
                    if picture.width * picture.height > MAX_PIXELS:
                        raise DataError(f"{where}: {picture.width}x{picture.height} pixels are too many")
                    if shape is not None and (picture.height, picture.width) != shape[:2]:
                        raise DataError(
                            f"{where}: is {picture.width}x{picture.height}, others are {shape[1]}x{shape[0]}: resize "
                            "them to one size"
                        )
                    return np.asarray(picture.convert("RGB"))
        except UnidentifiedImageError:
            raise DataError(f"{where}: is not a picture that can be read") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise DataError(f"{where}: holds too many pixels") from None
        except (OSError, ValueError, SyntaxError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where}: cannot be read (truncated or damaged: {error})") from None


Found = tuple[Pictures, NDArray[np.int64], tuple[str, ...]]
"""Pictures, labels, names of the classes."""


def has_pictures(folder: Path) -> bool:
    """Whether a folder has folders with pictures in them, or such folders one deeper."""
    return any(_is_picture(path.name) for depth in ("*/*", "*/*/*") for path in folder.glob(depth))


def in_folder(folder: Path, split: str) -> Found:
    """The pictures of a folder's split, by class."""

    def read(name: str) -> bytes:
        path = folder / name
        if path.stat().st_size > MAX_FILE:
            raise DataError(f"{path}: is larger than {MAX_FILE:,} bytes")
        return path.read_bytes()

    deep = [p for p in folder.glob("*/*/*") if _is_picture(p.name)]
    paths = deep or [p for p in folder.glob("*/*") if _is_picture(p.name)]
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return _sorted(names, read, str(folder), split)


def in_zip(path: Path, split: str) -> Found:
    """The pictures of a split in a zip of folders, by class."""
    archive, lock = zipfile.ZipFile(path), threading.Lock()
    members = {info.filename: info for info in archive.infolist() if _is_picture(info.filename)}

    def read(name: str) -> bytes:
        info = members[name]
        if info.file_size > MAX_FILE:
            raise DataError(f"{path}: {name} is larger than {MAX_FILE:,} bytes")
        with lock, archive.open(info) as stream:
            data = stream.read(MAX_FILE + 1)
        if len(data) != info.file_size:
            raise DataError(f"{path}: {name} holds {len(data):,} bytes and claims {info.file_size:,}")
        return data

    return _sorted(list(members), read, str(path), split)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _sorted(names: list[str], read: Callable[[str], bytes], source: str, split: str) -> Found:
    """Of the names the split's, in order of class and name."""
    if len(names) > MAX_PICTURES:
        raise DataError(f"{source}: {len(names):,} pictures are more than {MAX_PICTURES:,}: give fewer")
    by_class: dict[str, list[str]] = {}
    splits = [*SPLITS["train"], *SPLITS["test"]]
    split_up = any(part in splits for name in names for part in PurePosixPath(name).parts[:-2])
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or re.search(r"[\x00\\:]", name):
            raise DataError(f"{source}: the name {name!r} leads elsewhere: make the archive anew")
        if len(parts) < 2 or (split_up and not set(parts[:-2]) & set(SPLITS[split])):
            continue
        by_class.setdefault(parts[-2], []).append(name)
    if not split_up and split == "test":
        raise DataError(f"{source}: has no folder val or test with pictures: give --test or --validation")
    if len(by_class) < 2:
        raise DataError(
            f"{source}: holds pictures of {len(by_class)} classes for {split}: lay them out as {split}/CLASS/name.jpg"
        )
    classes = tuple(sorted(by_class))
    labels = np.repeat(np.arange(len(classes)), [len(by_class[name]) for name in classes])
    return Pictures([name for c in classes for name in by_class[c]], read, source), labels, classes
