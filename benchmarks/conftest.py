"""Fixtures of the benchmarks, and the summary behind them."""

import json
import os
import re
from pathlib import Path

import lab as laboratory
import pytest
import tables
import torch

LAB = pytest.StashKey[laboratory.Lab]()


@pytest.fixture(params=laboratory.THREADS, ids=lambda n: f"{n}threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lab(request):
    request.config.stash[LAB] = laboratory.Lab()
    return request.config.stash[LAB]


def pytest_terminal_summary(terminalreporter, config):
    lab = config.stash.get(LAB, None)
    if lab is None or not any(lab.sections.values()):
        return
    terminalreporter.section("ftso_fast against its peers")
    terminalreporter.write_line(tables.text(lab.document()))
    if out := os.environ.get("FTSO_BENCH_OUT"):
        path = Path(out).with_suffix(".json")
        if Path(out).is_dir():
            head = lab.header()
            cpu = re.sub("[^a-z0-9]+", "-", head["machine"]["cpu"].lower()).strip("-")
            path = Path(out) / f"{cpu}-{head['date'].split()[0]}.json"
        document = lab.document()
        if path.exists():
            document = tables.joined(document, json.loads(path.read_text()))
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(tables.text(document) + "\n")
