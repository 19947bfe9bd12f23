"""Searches whose batches are cut into shards: against plain averages, over processes, and after one of them is lost."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import every_isa
from processes import ranks_of, torchrun
from searching import SMALL, arrays, document, small
from torch.nn import functional as F

from ftso_fast import DataError, UsageError, search
from ftso_fast.data import Batch
from ftso_fast.ranks import Ranks
from ftso_fast.run import Run
from ftso_fast.sharded import ShardedRun
from ftso_fast.supernet import SuperNet

pytestmark = pytest.mark.usefixtures("one_thread")
VOLATILE = ("seconds", "peak_bytes", "kernel_calls")


def drawn(n=7):
    torch.manual_seed(0)
    net = SuperNet(10, 8, 3, 4)
    return net, Batch(torch.randn(n, 3, 8, 8), torch.arange(n) % 10)


@pytest.mark.parametrize("which", ["arch", "weights"])
@every_isa
def test_gradients_are_averages_over_the_images(which, isa):
    net, batch = drawn()
    run = ShardedRun(net, SMALL, 3, Ranks())
    loss, grads = run.gradient_of(batch, getattr(run, which))
    net.double()
    double, want, total = getattr(Run(net, SMALL), which), None, 0.0
    for part in (slice(0, 3), slice(3, 5), slice(5, 7)):
        own = F.cross_entropy(net(batch.images[part].double()), batch.labels[part], reduction="sum")
        found = torch.autograd.grad(own, double)
        want = found if want is None else [a + b for a, b in zip(want, found, strict=True)]
        total += float(own.detach())
    assert float(loss) == pytest.approx(total / 7, rel=1e-5)
    for got, exact in zip(grads, want, strict=True):
        torch.testing.assert_close(got.double(), exact / 7, rtol=0, atol=2e-4 * float(exact.abs().max()) + 1e-7)


def test_one_shard_is_the_plain_search():
    assert document(small(mode="2it", shards=1)) == document(small(mode="2it"))
    two = small(mode="2it", shards=2)
    assert two.betas != small(mode="2it").betas
    assert (two.shards, "cut into 2 shards" in str(two)) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 0}, "shards: expected a multiple of the 1 processes, got 0"),
        ({"shards": True}, "shards: expected a multiple"),
        ({"shards": 2.0}, "shards: expected a multiple"),
        ({"shards": 2, "seeds": 3}, "seeds: processes share out whole searches, got shards=2 too"),
        ({"shards": 2, "method": "darts", "order": 2}, "order: needs whole batches, and they are cut into 2 shards"),
        (
            {"shards": 2, "method": "darts", "mode": "2ep", "early_stop": True},
            "early_stop: needs whole batches, and they are cut into 2 shards",
        ),
    ],
)
def test_wrong_shards(options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        search(arrays(), **options)


def test_more_shards_than_images():
    with pytest.raises(DataError, match=r"^shards: a batch of \d+ images cannot be cut into 1000 parts"):
        small(shards=1000)


# -- processes


@pytest.fixture
def images(tmp_path):
    x, y = arrays()
    np.savez(tmp_path / "images.npz", x_train=x, y_train=y)
    return str(tmp_path / "images.npz")


def command(images, out, *more):
    return ["search", "--data", images, "--threads", "1", "--out", str(out), *more]


def two(*arguments):
    return torchrun(["ftso_fast", *command(*arguments)])


def done(process):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return out


def found(out):
    fields = json.loads((out / "result.json").read_text())
    for name in VOLATILE:
        del fields[name]
    return fields


@pytest.mark.parametrize(
    ("options", "shards"),
    [(["--mode=3it"], 2), (["--mode=1it+1it", "--shards=6"], 6), (["--mode=2it", "--method=pc-darts"], 2)],
)
def test_processes_find_what_one_finds(images, tmp_path, run, options, shards):
    """Byte for byte; the first process alone prints and writes."""
    assert run(*command(images, tmp_path / "one", *options, f"--shards={shards}"))[0] == 0
    printed = done(two(images, tmp_path / "two", *options))
    assert printed.count("Genotype(") == 1
    assert found(tmp_path / "two") == found(tmp_path / "one")
    assert found(tmp_path / "two")["shards"] == shards


def test_a_lost_process_costs_no_answer(images, tmp_path, run):
    mode = "--mode=100it"
    assert run(*command(images, tmp_path / "one", mode, "--shards=2"))[0] == 0
    robbed = two(images, tmp_path / "two", mode)
    while len(ranks_of(robbed)) < 2 and robbed.poll() is None:
        time.sleep(0.01)
    time.sleep(1)
    first = set(ranks_of(robbed))
    os.kill(max(first), signal.SIGKILL)
    while set(ranks_of(robbed)) <= first:
        assert robbed.poll() is None, "nothing began again"
        time.sleep(0.01)
    done(robbed)
    assert found(tmp_path / "two") == found(tmp_path / "one")
