"""Training from scratch as a whole: interrupted anywhere it goes on byte for byte, alone and in processes; refusals."""

import json
import os
import random
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from processes import ranks_of, start, torchrun

from ftso_fast import DataError, NumericalError, UsageError, evaluate
from ftso_fast.checkpoint import steps
from ftso_fast.commands.evaluate import CHANGES
from ftso_fast.published import PUBLISHED

GENOTYPE = PUBLISHED["DARTS_V2"]
SMALL = {"recipe": "smoke", "channels": 2, "cells": 3, "epochs": 3, "batch_size": 16, "drop_path": 0.3, "cutout": 4}
OPTIONS = [f"--{name.replace('_', '-')}={SMALL[name]}" for name in CHANGES if name in SMALL]
RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8), np.arange(70) % 3
STEPS = 4 * 3


def trained(out=None, **more):
    return evaluate(GENOTYPE, (X[:60], Y[:60]), (X[60:], Y[60:]), **SMALL | {"out": out, "shards": 2} | more)


def weights(folder):
    """The last checkpoint's bytes, and what was found in every epoch, but for the seconds."""
    (step, path), *_ = steps(folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in event.items() if k not in ("seconds", "waited")} for event in events]
    return step, (path / "weights.safetensors").read_bytes(), timeless


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run that keeps every step."""
    folder = tmp_path_factory.mktemp("whole")
    result = trained(folder, checkpoint_every=1, keep=1000)
    return folder, result


def test_what_it_finds(whole):
    folder, result = whole
    assert [step for step, _ in steps(folder)] == list(range(STEPS, 0, -1))
    assert len(result.events) == 3
    accuracies = [event["eval_accuracy"] for event in result.events]
    assert (result.eval_accuracy_last, result.eval_accuracy_best) == (accuracies[-1], max(accuracies))
    assert result.train_images == 60
    assert result.test_images == 10
    assert result.params == GENOTYPE.params(channels=2, cells=3, classes=3)
    assert set(result.deviations) >= {"epochs 3 in place of 12", "cutout 4 in place of 0"}
    told = json.loads((folder / "result.json").read_text())
    assert told["schema"] == "ftso.evaluation/1"
    assert told["eval_accuracy_last"] == result.eval_accuracy_last
    assert "eval accuracy: last" in str(result)
    assert "chosen on the images that it is tested on" in str(result)
    assert (folder / "curve.svg").read_text().startswith("<svg")
    assert 0 <= result.waiting < 1
    assert result.images_per_second > 0


def test_from_any_step_it_ends_the_same(whole, tmp_path):
    folder, _ = whole
    want = weights(folder)
    for step, path in steps(folder):
        other = tmp_path / str(step)
        other.mkdir()
        shutil.copytree(path, other / path.name)
        result = trained(other, resume="auto", workers=step % 3, keep=2)
        assert weights(other) == want, f"from step {step}"
        assert len(result.events) == 3


def test_a_damaged_checkpoint_is_passed_over_and_told(whole, tmp_path):
    folder, _ = whole
    for step, path in steps(folder)[:2]:
        shutil.copytree(path, tmp_path / path.name)
        if step == steps(folder)[0][0]:
            (tmp_path / path.name / "state.json").write_text("{}")
    result = trained(tmp_path, resume="auto")
    assert weights(tmp_path) == weights(folder)
    assert "is not what was written" in str(result)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, x_train=X[:60], y_train=Y[:60], x_test=X[60:], y_test=Y[60:])
    return path


def command(archive, out, *more):
    fixed = ["--recipe", "smoke", "--shards", "2", "--resume", "auto", "--checkpoint-every", "2", "--threads", "1"]
    return ["evaluate", "DARTS_V2", "--data", str(archive), "--out", str(out), *OPTIONS, *fixed, *more]


def test_killed_at_random_it_ends_the_same(archive, tmp_path, run):
    """Long form: FTSO_KILLS=50."""
    rng, ended = random.Random(0), 0
    kills = int(os.environ.get("FTSO_KILLS", "2"))
    assert run(*command(archive, tmp_path / "0", "--epochs=6"))[0] == 0
    for n in range(1, kills + 1):
        out = tmp_path / str(n)
        while True:
            process = start(["ftso_fast", *command(archive, out, f"--workers={n % 3}", "--epochs=6")])
            if not (out / "killed").exists():
                while not steps(out) and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.random() * 0.5)
                process.kill()
                (out / "killed").touch()
            _, errors = process.communicate(timeout=120)
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, errors
            ended += 1
        assert weights(out) == weights(tmp_path / "0")
    assert ended >= kills / 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_a_checkpoint(archive, tmp_path, number, code):
    process = start(["ftso_fast", *command(archive, tmp_path / "run", "--epochs=2000", "--checkpoint-every=100000")])
    while not steps(tmp_path / "run") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert steps(tmp_path / "run")
    assert "Traceback" not in errors


def test_two_processes_end_as_one_does(archive, tmp_path, run):
    """Byte for byte: a sum of two does not depend on their order. One of two is lost, and both start again."""
    assert run(*command(archive, tmp_path / "one", "--epochs=4"))[0] == 0
    two = torchrun(["ftso_fast", *command(archive, tmp_path / "two", "--epochs=4")])
    while not steps(tmp_path / "two") and two.poll() is None:
        time.sleep(0.01)
    os.kill(ranks_of(two)[-1], signal.SIGKILL)
    _, errors = two.communicate(timeout=240)
    assert two.returncode == 0, errors
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    told = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (told["processes"], told["shards"]) == (2, 2)


def test_test_images_and_shares(archive):
    own = evaluate(GENOTYPE, str(archive), **SMALL)
    assert own.tested_on == "the file's own test images"
    assert own.test_images == 10
    held = evaluate(GENOTYPE, (X, Y), validation=0.2, fraction=0.5, **SMALL)
    assert (held.train_images, held.test_images) == (28, 15)
    assert held.tested_on.startswith("validation: 0.2 of the training images")


def test_events_reach_callbacks():
    events = []
    result = trained(callbacks=[events.append])
    assert [event["epoch"] for event in events] == [0, 1, 2]
    assert events == list(result.events)


def test_tensorboard_gets_every_epoch(monkeypatch, archive, run, tmp_path):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, *row):
            written.append(row)

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    code, out, _ = run(*command(archive, tmp_path / "run", "--tensorboard", tmp_path / "tb", "--json"))
    assert code == 0
    folder, *rows = written
    assert folder == str(tmp_path / "tb")
    events = json.loads(out)["events"]
    assert [row for row in rows if row[0] == "eval_accuracy"] == [
        ("eval_accuracy", event["eval_accuracy"], event["step"]) for event in events
    ]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(*command(archive, tmp_path / "other", "--tensorboard", tmp_path / "tb"))[0] == 2


def test_folders_of_other_runs(whole):
    folder, _ = whole
    with pytest.raises(UsageError, match=r"out: .* holds the checkpoints of a run: give resume='auto'"):
        trained(folder)
    with pytest.raises(UsageError, match=r"resume: .* belongs to another run: recipe, seed differ"):
        trained(folder, resume="auto", seed=1, lr=0.3)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"recipe": "x"}, UsageError, "recipe: expected one of cifar600"),
        ({"resume": "yes", "out": "x"}, UsageError, "resume: expected 'auto' or None, got 'yes'"),
        ({"resume": "auto"}, UsageError, "resume: expected a folder `out`"),
        ({"workers": -1}, UsageError, "workers: expected a whole number of at least 0, got -1"),
        ({"keep": 0}, UsageError, "keep: expected a whole number of at least 1, got 0"),
        ({"checkpoint_every": True}, UsageError, "checkpoint_every: .* got True"),
        ({"shards": 0}, UsageError, "shards: expected a multiple of the 1 processes, got 0"),
        ({"validation": 0.1}, UsageError, "validation: expected none where `test` is given"),
        ({"batch_size": 64, "shards": 32}, DataError, "arrays: 60 images are no batch of 64 in 32 parts"),
        ({"epoch": 3}, UsageError, "recipe: expected fields among"),
        ({"backend": "tpu"}, UsageError, "backend"),
        ({"precision": "fp8"}, UsageError, "precision: expected float32 or bf16, got 'fp8'"),
        ({"precision": "bf16", "backend": "cpu"}, UsageError, "backend: expected reference for bf16"),
        ({"lr": 1e30}, NumericalError, "training: the (loss|gradient) of step"),
    ],
)
def test_refusals(more, error, message):
    with pytest.raises(error, match=message):
        trained(**more)


def test_bfloat16_says_what_it_costs():
    result = trained(precision="bf16")
    assert (result.precision, result.backend) == ("bf16", "reference")
    assert abs(result.bf16_cost) < 1
    assert "trained in bfloat16; tested in it too, the last accuracy would lose" in str(result)
    plain = trained(backend="reference")
    assert plain.bf16_cost is None
    assert plain.events[0]["train_loss"] != result.events[0]["train_loss"]
    assert plain.events[0]["train_loss"] == pytest.approx(result.events[0]["train_loss"], rel=0.1)


def test_nothing_to_test_on():
    with pytest.raises(UsageError, match=r"test: expected images to test on, or validation=0\.1"):
        evaluate(GENOTYPE, (X, Y), **SMALL)
    with pytest.raises(DataError, match=r"test: images of shape \(3, 4, 4\), but those of training have \(3, 8, 8\)"):
        evaluate(GENOTYPE, (X, Y), (X[:, :4, :4], Y), **SMALL)
