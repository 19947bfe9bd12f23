"""Checkpoints: what was written comes back or is refused, whatever happens to the files or to whoever writes them."""

import errno
import os
import random
import shutil

import pytest
import torch

from ftso_fast import DataError, UsageError
from ftso_fast.checkpoint import newest, save, steps

TENSORS = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}
STATE = {"epoch": 3, "events": [{"loss": 0.1 + 0.2}], "name": "\u00e9"}


def same(found, step, tensors=TENSORS, state=STATE):
    assert (found.step, found.state) == (step, state)
    assert found.tensors.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found.tensors[name].dtype == t.dtype
        assert torch.equal(found.tensors[name], t)


def test_what_is_saved_comes_back(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    path = save(tmp_path / "run", 12, TENSORS, STATE)
    assert path.name == "step-000012"
    same(newest(tmp_path / "run"), 12)


def test_a_view_is_saved_by_its_values(tmp_path):
    t = torch.arange(12.0).view(3, 4).t()
    save(tmp_path, 1, {"t": t}, {})
    assert torch.equal(newest(tmp_path).tensors["t"], t)


def test_the_last_are_kept(tmp_path):
    for step in (1, 2, 10, 1000000):
        save(tmp_path, step, TENSORS, STATE, keep=2)
    assert [step for step, _ in steps(tmp_path)] == [1000000, 10]


def test_the_same_step_again_is_left_as_it_is_unless_it_is_damaged(tmp_path):
    path = save(tmp_path, 1, TENSORS, STATE)
    before = (path / "state.json").stat().st_ino
    save(tmp_path, 1, TENSORS, STATE)
    assert (path / "state.json").stat().st_ino == before
    (path / "state.json").write_text("{}")
    save(tmp_path, 1, TENSORS, STATE)
    same(newest(tmp_path), 1)


def test_stale_parts_are_swept(tmp_path):
    (tmp_path / "step-000001-77.part").mkdir()
    save(tmp_path, 2, TENSORS, STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_every_flipped_bit_is_noticed(tmp_path):
    """Long form: FTSO_FLIPS=10000."""
    save(tmp_path, 1, TENSORS, {"older": True})
    path, rng = save(tmp_path, 2, TENSORS, STATE), random.Random(0)
    files = {f: f.read_bytes() for f in sorted(path.iterdir())}
    places = [(f, i) for f, data in files.items() for i in range(len(data))]
    for _ in range(int(os.environ.get("FTSO_FLIPS", "1000"))):
        file, at = rng.choice(places)
        data = bytearray(files[file])
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        found = newest(tmp_path)
        same(found, 1, state={"older": True})
        assert len(found.skipped) == 1
        assert str(path) in found.skipped[0]
        file.write_bytes(files[file])
    same(newest(tmp_path), 2)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
def test_truncated_missing_and_spliced_files(tmp_path, name):
    save(tmp_path, 1, TENSORS, {"older": True})
    path = save(tmp_path, 2, TENSORS, STATE)
    whole = (path / name).read_bytes()
    for n in range(0, len(whole), 7):
        (path / name).write_bytes(whole[:n])
        assert newest(tmp_path).step == 1
    (path / name).unlink()
    assert newest(tmp_path).step == 1
    shutil.copy(tmp_path / "step-000001" / name, path / name)
    assert newest(tmp_path).step == (2 if name.startswith("weights") else 1)  # both hold the same weights


def test_one_step_under_the_name_of_another(tmp_path):
    save(tmp_path, 1, TENSORS, STATE)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000009")
    assert newest(tmp_path).step == 1


def test_links_are_not_followed(tmp_path):
    path = save(tmp_path, 1, TENSORS, STATE)
    elsewhere = tmp_path / "state"
    shutil.move(path / "state.json", elsewhere)
    (path / "state.json").symlink_to(elsewhere)
    with pytest.raises(DataError, match=r"none of its 1 checkpoints verifies; the newest: .*is a link"):
        newest(tmp_path)


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": torch.ones(1)}, {"x": float("inf")}])
def test_a_state_that_json_cannot_hold(tmp_path, state):
    with pytest.raises(UsageError, match="state: expected what JSON can hold"):
        save(tmp_path, 1, TENSORS, state)
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "fault", [Killed(), OSError(errno.EIO, "input/output error"), OSError(errno.ENOSPC, "disk full")]
)
def test_whatever_fails_while_writing_the_one_before_stays(tmp_path, monkeypatch, fault):
    """The n-th open, write, flush, rename or mkdir fails, for every n."""
    import builtins

    from ftso_fast import checkpoint

    n_calls = 0
    for n in range(40):
        folder = tmp_path / str(n)
        save(folder, 1, TENSORS, {"older": True})
        left = [n]

        def failing(real, left=left):
            def call(*args, **more):
                left[0] -= 1
                if left[0] < 0 and left[0] > -2:
                    raise fault
                return real(*args, **more)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "open"):
                patch.setattr(checkpoint.os, name, failing(getattr(os, name)))
            patch.setattr(checkpoint.Path, "mkdir", failing(checkpoint.Path.mkdir))
            patch.setattr(builtins, "open", failing(builtins.open))
            try:
                save(folder, 2, TENSORS, STATE)
            except (Killed, OSError):
                n_calls += 1
        found = newest(folder)
        assert found.step in (1, 2)
        same(found, found.step, state={"older": True} if found.step == 1 else STATE)
        save(folder, 3, TENSORS, STATE)
        assert newest(folder).step == 3
        if left[0] >= 0:
            break
    else:
        raise AssertionError("a save never came through")
    assert n_calls >= 9  # mkdir twice, three files opened and flushed, the folder opened and flushed, ...
