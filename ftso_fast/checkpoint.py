"""Checkpoints: one directory a step, written whole or not at all, and checked before it is believed.

    step-000123/    weights.safetensors, state.json, manifest.json: size and sha256 of the two

It is written under a name that no loader reads, flushed to the disk and renamed; the loader walks back from the newest
to one that verifies. Nothing is pickled. Source of the rules: a plain torch.save that is killed leaves an unreadable
file more often than not, and neither it nor safetensors notices a flipped bit.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import DataError, UsageError

WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.json", "manifest.json"
SCHEMA = "ftso.checkpoint/1"
MAX_STATE, MAX_MANIFEST, MAX_WEIGHTS = 64 << 20, 1 << 16, 64 << 30
"""The largest files, in bytes, that are read."""
_STEP = re.compile(r"step-([0-9]{6,12})")
_PART = ".part"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved; skipped: newer ones that did not verify, and why."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 3) -> Path:
    """Write `step-<step>` in `folder`, whole or not at all, and remove all but the newest `keep`. Where that step is
    there and verifies, it is left as it is.

    Raises UsageError for a state that JSON cannot hold exactly, OSError where the disk refuses; then what was there
    before is still there.
    """
    from safetensors.torch import save as serialised

    try:
        text = json.dumps({"schema": SCHEMA, "step": step, **state}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"state: expected what JSON can hold, got something else ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"*{_PART}"):
        shutil.rmtree(stale, ignore_errors=True)
    final = folder / f"step-{step:06d}"
    if final.exists():  # written before an interruption: the same, or damaged
        with suppress(DataError):
            read(final)
            return final
        shutil.rmtree(final)
    part = folder / f"{final.name}-{os.getpid()}{_PART}"
    try:
        part.mkdir()
        weights = serialised({name: t.detach().contiguous() for name, t in tensors.items()})
        files = {WEIGHTS: weights, STATE: text.encode()}
        manifest = {name: {"bytes": len(data), "sha256": _sum(data)} for name, data in files.items()}
        files[MANIFEST] = json.dumps({"schema": SCHEMA, "files": manifest}).encode()
        for name, data in files.items():
            _write(part / name, data)
        _flush(part)
        os.rename(part, final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for _, path in steps(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that verifies; None where there is none.

    Raises DataError where there are some and none verifies.
    """
    skipped: list[str] = []
    for step, path in steps(folder):
        try:
            tensors, state = read(path)
        except DataError as error:
            skipped.append(str(error))
            continue
        return Checkpoint(path, step, tensors, state, tuple(skipped))
    if skipped:
        raise DataError(f"{folder}: none of its {len(skipped)} checkpoints verifies; the newest: {skipped[0]}")
    return None


def steps(folder: Path) -> list[tuple[int, Path]]:
    """Number and directory of every checkpoint, the newest first."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of one checkpoint. Raises DataError unless every byte is the one that was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parsed

    manifest = _json(path / MANIFEST, _bytes(path / MANIFEST, MAX_MANIFEST))
    files = manifest.get("files") if manifest.get("schema") == SCHEMA else None
    if not isinstance(files, dict) or set(files) != {WEIGHTS, STATE}:
        raise DataError(f"{path / MANIFEST}: is not the manifest of a checkpoint ({SCHEMA})")
    data = {}
    for name, most in ((WEIGHTS, MAX_WEIGHTS), (STATE, MAX_STATE)):
        told, found = files[name], _bytes(path / name, most)
        if told != {"bytes": len(found), "sha256": _sum(found)}:
            raise DataError(f"{path / name}: is not what was written (its sha256 differs from the manifest's)")
        data[name] = found
    state = _json(path / STATE, data[STATE])
    if state.pop("schema", None) != SCHEMA or path.name != f"step-{state.pop('step', -1):06d}":
        raise DataError(f"{path / STATE}: belongs to another step or version")
    try:
        return parsed(data[WEIGHTS]), state
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path / WEIGHTS}: cannot be read ({error})") from None


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(path: Path, most: int) -> bytes:
    try:
        if path.is_symlink() or path.stat().st_size > most:
            raise DataError(f"{path}: is a link, or larger than {most:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not JSON") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: is not a JSON object")
    return found


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Make the names in a directory last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
