"""The results of NAS-Bench-201's architectures, read from a table that the user has: never shipped, never unpickled.

The table is CSV, plain or gzipped, a row an architecture: `index`, `arch` (the benchmark's text), and accuracies in
percent as columns `cifar10_test`, `cifar100_test`, `imagenet16_test` and, where known, the same with `_valid`.
"""

import csv
import gzip
import hashlib
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError, UsageError
from .nats import Architecture, architectures

DATASETS = ("cifar10", "cifar100", "imagenet16")
MAX_BYTES = 64 << 20
"""The most that a table may hold, unpacked."""
SPACE = 5**6


@dataclass(frozen=True)
class Entry:
    """One row. test, valid: by data set, percent; valid may be empty."""

    index: int
    architecture: Architecture
    test: dict[str, float]
    valid: dict[str, float]


@dataclass(frozen=True)
class Table:
    """sha256: of the file, as it lies there."""

    path: str
    sha256: str
    entries: tuple[Entry, ...]

    def get(self, wanted: Architecture) -> Entry | None:
        """Its row; a user's table need not have all."""
        return next((e for e in self.entries if e.architecture == wanted), None)

    def find(self, wanted: "str | int | Architecture") -> Entry:
        """By the benchmark's number, text, or value. Raises UsageError."""
        if isinstance(wanted, str) and wanted.strip().isdecimal() and len(wanted) < 10:
            wanted = int(wanted)
        if isinstance(wanted, int):
            found = next((e for e in self.entries if e.index == wanted), None)
        else:
            wanted = wanted if isinstance(wanted, Architecture) else Architecture.from_text(wanted)
            found = self.get(wanted)
        if found is None:
            raise UsageError(f"architecture: expected one of the table's {len(self.entries):,}, got {wanted}")
        return found

    def rank(self, entry: Entry, dataset: str) -> int:
        """1 for the best test accuracy."""
        return 1 + sum(other.test[dataset] > entry.test[dataset] for other in self.entries)

    def best(self, dataset: str) -> Entry:
        """The highest test accuracy; no search could know it."""
        return max(self.entries, key=lambda e: e.test[dataset])


def read_table(path: str | Path) -> Table:
    """Read and check a table; raises DataError with the file, the row and what was expected."""
    text, digest = _text(Path(path))
    reader = csv.DictReader(io.StringIO(text))
    wanted = ["index", "arch", *(f"{d}_test" for d in DATASETS)]
    try:
        columns = reader.fieldnames or ()
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV table ({error}).") from None
    if missing := [name for name in wanted if name not in columns]:
        raise DataError(f"{path}: has no column {', '.join(missing)}: expected {', '.join(wanted)}.")
    entries: list[Entry] = []
    known = {a: a for a in architectures()}
    seen: set[int] = set()
    try:
        for row in reader:
            if len(entries) == SPACE:
                raise DataError(f"{path}: has more rows than the {SPACE:,} architectures of the space.")
            entry = _entry(row, known, f"{path}: row {len(entries) + 1}")
            if entry.index in seen:
                raise DataError(f"{path}: row {len(entries) + 1}: index {entry.index} is there twice.")
            seen.add(entry.index)
            entries.append(entry)
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV table ({error}).") from None
    if not entries or len({e.architecture for e in entries}) != len(entries):
        raise DataError(f"{path}: expected each architecture once, got {len(entries)} rows with some twice or none.")
    return Table(str(path), digest, tuple(entries))


def _text(path: Path) -> tuple[str, str]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        digest = hashlib.sha256(raw).hexdigest()
        if raw[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(raw)) as packed:
                raw = packed.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    if len(raw) > MAX_BYTES:
        raise DataError(f"{path}: holds more than {MAX_BYTES:,} bytes, the limit for a table.")
    try:
        return raw.decode("utf-8-sig"), digest
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no UTF-8 text: expected a CSV table, plain or gzipped.") from None


def _entry(row: dict[str, str], known: dict[Architecture, Architecture], where: str) -> Entry:
    try:
        index, architecture = int(row["index"]), Architecture.from_text(row["arch"] or "")
        test = {d: _percent(row[f"{d}_test"]) for d in DATASETS}
        valid = {d: _percent(row[f"{d}_valid"]) for d in DATASETS if row.get(f"{d}_valid")}
    except UsageError as error:
        raise DataError(f"{where}: {error}") from None
    except (ValueError, TypeError):
        raise DataError(f"{where}: expected a whole index and accuracies from 0 to 100, got {_short(row)}.") from None
    return Entry(index, known[architecture], test, valid)


def _percent(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not 0 <= value <= 100:
        raise ValueError
    return value


def _short(row: dict[str, str]) -> str:
    return ", ".join(f"{key}={str(value)[:16]!r}" for key, value in list(row.items())[:5])


def spearman(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where all are equal, which orders nothing."""
    x, y = _ranks(a), _ranks(b)
    n = len(a)
    mean = (n + 1) / 2
    top = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    size = math.sqrt(sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y))
    return top / size if size else 0.0


def _ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, i = [0.0] * len(values), 0
    while i < len(order):
        j = i
        while j + 1 < len(order) and values[order[j + 1]] == values[order[i]]:
            j += 1
        for position in order[i : j + 1]:
            ranks[position] = (i + j) / 2 + 1
        i = j + 1
    return ranks
