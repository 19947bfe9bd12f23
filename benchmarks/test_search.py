"""The hot loop: a search iteration and its steps, warm and from cold; where a step's time goes; whole searches."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import arm as arms
import lab as laboratory
import numpy as np
import pytest
from lab import LONG, OURS, THREADS
from measure import seconds_of

pytestmark = pytest.mark.benchmark(timer=laboratory.clock)
STEPS = ("architecture step", "weight step")
WARM = ("iteration", "iteration, batch 64")
long_form = pytest.mark.skipif(not LONG, reason="FTSO_BENCH=long only")


@pytest.mark.parametrize("piece", [*STEPS, *WARM, "first iteration"])
def test_iteration(benchmark, lab, threads, piece):
    lab.compare(benchmark, "iteration", piece, OURS, threads, laboratory.flops()[piece], "GFLOP/s")


@long_form
@pytest.mark.parametrize("piece", [f"PC-DARTS {piece}" for piece in (*STEPS, "iteration", "first iteration")])
def test_pc_darts(benchmark, lab, threads, piece):
    lab.compare(benchmark, "PC-DARTS", piece, OURS, threads, laboratory.pc_darts_flops()[piece], "GFLOP/s")


def test_fresh_search(benchmark, lab, threads):
    lab.compare(benchmark, "search", "search 1it", OURS, threads, laboratory.flops()["search 1it"], "GFLOP/s")


@pytest.mark.parametrize("step", STEPS)
def test_stages(benchmark, lab, threads, step):
    lab.stages(benchmark, step, threads)


@long_form
@pytest.mark.parametrize("threads", [max(THREADS)], indirect=True, ids=lambda n: f"{n}threads")
def test_epoch(benchmark, lab, threads):
    """One epoch against as many warm iterations of the same process."""
    told = lab.measured("epoch", OURS, "default", threads)
    replay = told["seconds"]["search 1ep"]
    laboratory.replay(benchmark, replay)
    warm = told["seconds"]["iteration beside 1ep"]
    found = {"threads": threads, "s": replay[0], "n": 1, "iteration ms": 1e3 * median(warm), "iterations n": len(warm)}
    found |= {"ratio": replay[0] / (told["iterations"] * median(warm)), "date": laboratory.now()}
    lab.sections["whole"]["search 1ep"] = found | {n: told[n] for n in ("iterations", "data seconds", "images")}


@long_form
@pytest.mark.parametrize("threads", [max(THREADS)], indirect=True, ids=lambda n: f"{n}threads")
def test_shell(benchmark, lab, threads, tmp_path):
    """`ftso search --mode 1it` on CIFAR-10's binary files, from the shell, beside what `import torch` takes."""
    x, y, source = arms.cifar_like()
    records = np.concatenate([y[:, None].astype(np.uint8), x.transpose(0, 3, 1, 2).reshape(len(x), -1)], 1)
    for i, part in enumerate(np.split(records, 5), 1):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(part.tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[:10_000].tobytes())
    ftso = Path(sys.executable).with_name("ftso")
    command = [ftso, "search", "--data", tmp_path, "--mode", "1it", "--threads", threads, "--json"]
    seconds, inside, imports = [], [], []
    for _ in range(4):
        seconds.append(seconds_of(lambda: inside.append(json.loads(lab.run(*command))["seconds"]["total"])))
        imports.append(seconds_of(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)))
    seconds, inside, imports = (times[1:] for times in (seconds, inside, imports))  # the first reads from the disk
    laboratory.replay(benchmark, seconds)
    found = {"threads": threads, "s": median(seconds), "n": len(seconds), "images": source, "date": laboratory.now()}
    lab.sections["whole"]["shell 1it"] = found | {"search s": median(inside), "import torch s": median(imports)}
