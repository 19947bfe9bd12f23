"""Triton kernels, run by its interpreter on tensors of the cpu, or on a GPU where there is one.

The variable TRITON_INTERPRET must be set before triton is imported, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/gpu`. `tests/test_gpu.py` starts it; without the variable and a GPU nothing is
collected here. What passed is written to the file that FTSO_VERIFIED names, for docs/verification.md.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftso_fast import kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
collect_ignore_glob = [] if DEVICE == "cpu" or torch.cuda.is_available() else ["test_*.py"]
_passed: dict[str, int] = {}


def patch_once():
    """Let the interpreter patch Triton's language once a kernel. It does so again at every call of a part of a kernel
    or of tl.sum and the like, wrapper over wrapper, which takes most of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    real, inside = interpreter._patch_lang, []

    def patch(fn):
        if inside:
            return SimpleNamespace(restore=lambda: None)
        scope = real(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        inside.append(fn)
        return SimpleNamespace(restore=lambda: (inside.clear(), scope.restore()))

    interpreter._patch_lang = patch


if DEVICE == "cpu":
    patch_once()


@pytest.fixture(autouse=True)
def triton_backend():
    with kernels.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def verified(request):
    """verified(operation, direction, dtype): what this test shows where it passes."""

    def show(op, direction, dtype):
        name = str(dtype).removeprefix("torch.")
        request.node.user_properties.append(("verified", f"{op} triton {direction} {name}"))

    return show


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "verified":
                _passed[value] = _passed.get(value, 0) + 1


def pytest_sessionfinish():
    if path := os.environ.get("FTSO_VERIFIED"):
        Path(path).write_text(json.dumps(_passed))
