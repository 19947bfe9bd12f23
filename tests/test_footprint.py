"""The memory that a step is said to take, against what a process of its own takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftso_fast import kernels
from ftso_fast.footprint import footprint
from ftso_fast.published import PUBLISHED
from ftso_fast.recipes import RECIPES

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STEP = """
import sys
import numpy as np
import torch
from measure import memory_mb
from ftso_fast import Network, kernels
from ftso_fast.image_set import image_set
from ftso_fast.published import PUBLISHED
from ftso_fast.recipes import RECIPES
from ftso_fast.training import Training
name, channels, cells, batch, head, backend = sys.argv[1:]
recipe = RECIPES["cifar600"].changed(
    channels=int(channels), cells=int(cells), batch_size=int(batch), auxiliary_weight=float(head), cutout=0
)
n = 2 * recipe.batch_size
data = image_set((np.zeros((n, 32, 32, 3), np.uint8), np.arange(n) % 10))
torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(3, 3, 3, 3))
before = memory_mb("VmRSS")
with kernels.use_backend(backend):
    net = Network(PUBLISHED[name], recipe.channels, recipe.cells, 10, auxiliary=recipe.auxiliary_weight > 0)
    list(Training(net, recipe, 0, 1).epoch(data, 0))
print(memory_mb("VmHWM") - before)
"""


@pytest.mark.parametrize(
    "case",
    [("DARTS_V2", 16, 5, 64, 0.0, "cpu"), ("NASNet", 20, 5, 48, 0.4, "cpu"), ("PDARTS", 24, 8, 32, 0.4, "cpu"),
     ("PC_DARTS_cifar", 16, 5, 64, 0.4, "reference")],
    ids=lambda case: "-".join(map(str, case)),
)  # fmt: skip
def test_predicted_is_measured(case):
    name, channels, cells, batch, head, backend = case
    done = subprocess.run(
        [sys.executable, "-c", STEP, *map(str, case)],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    measured = 1e6 * float(done.stdout)
    recipe = RECIPES["cifar600"].changed(channels=channels, cells=cells, batch_size=batch, auxiliary_weight=head)
    found = footprint(PUBLISHED[name], recipe, backend=backend)
    assert found.kept < found.peak
    assert found.peak == pytest.approx(measured, rel=0.15)


def test_kernels_keep_less_than_half():
    recipe = RECIPES["cifar600"].changed(channels=8, cells=5, batch_size=16)
    ours, theirs = (footprint(PUBLISHED["PC_DARTS_cifar"], recipe, backend=b) for b in ("cpu", "reference"))
    assert ours.kept < 0.5 * theirs.kept


def test_the_command(run):
    code, out, err = run("plan", "DARTS_V2", "--recipe", "smoke", "--images", "1000", "--batch-size", "20")
    assert (code, err) == (0, "")
    assert "12 epochs of 1,000 images in batches of 20: 600 steps" in out
    assert "memory of a step: about" in out
    code, out, _ = run("plan", "DARTS_V2", "--recipe", "smoke", "--json")
    told = json.loads(out)
    assert told["params"] == PUBLISHED["DARTS_V2"].params(channels=16, cells=5)
    assert told["peak_bytes"] == footprint(PUBLISHED["DARTS_V2"], RECIPES["smoke"]).peak
    assert run("plan", "DARTS_V2", "--images", "3")[0] == 2
    assert run("plan", "DARTS_V2", "--backend", "tpu")[0] == 2
    assert kernels.requested() is None
