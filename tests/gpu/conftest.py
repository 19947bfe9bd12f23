"""Triton kernels, run by its interpreter on tensors of the cpu, or on a GPU where there is one.

The variable TRITON_INTERPRET must be set before triton is imported, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/gpu`. `tests/test_gpu.py` starts it; without the variable and a GPU nothing is
collected here.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftso_fast import kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
collect_ignore_glob = [] if DEVICE == "cpu" or torch.cuda.is_available() else ["test_*.py"]


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
    # large blocks: a program costs the same, however many pixels it has
    os.environ.setdefault("FTSO_TUNING", str(Path(__file__).with_name("interpreted.json")))


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
def memory_of_nan(monkeypatch):
    """Fresh memory that kernels are given begins as NaN."""
    real = torch.Tensor.new_empty

    def new_empty(*arguments, **options):
        made = real(*arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
