"""The only place that chooses who computes an operation.

A backend that was asked for by name (`use_backend`, or the variable FTSO_BACKEND) runs or raises; left alone, the
first of `BACKENDS` that can take the call does. `backends()` tells which of them this machine has. What only GPUs
need, triton and the module _cuda, is imported when a tensor on a GPU comes or the backend is asked for by name.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch  # before _C: the core then shares the OpenMP runtime, and so the threads, that torch brought

BACKENDS = ("cuda", "triton", "cpu", "reference")  # fastest first
ISAS = ("amx", "avx512bf16", "avx512", "avx2", "scalar")  # fastest first
OTHERS = {"amx": "avx512", "avx512bf16": "avx512"}
"""Instruction sets that serve the skip-only network alone, and whose kernels all else runs on."""

_C: ModuleType | None = None
_missing: str | None = None
try:
    from ftso_fast import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _missing = f"the compiled core ftso_fast._C is not there ({error}); install with a C++17 compiler, `pip install .`"
    logging.getLogger("ftso_fast").warning("running on the slower reference path: %s", _missing)

_forced: str | None = None


class BackendError(ValueError):
    """A backend or instruction set was asked for by name and cannot run; the message says why."""


def core() -> Any:
    """The compiled core. Raises BackendError where it was not built."""
    if _C is None:
        raise BackendError(f"backend 'cpu': {_missing}")
    return _C


def built() -> bool:
    """Whether the compiled core is there."""
    return _C is not None


def cuda_module() -> Any:
    """The compiled CUDA kernels. Raises BackendError where they were not built."""
    if reason := _absent("cuda"):
        raise BackendError(f"backend 'cuda': {reason}")
    return importlib.import_module("ftso_fast._cuda")


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of the cpu: TRITON_INTERPRET=1 before the import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_first_call(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of `ftso_fast.kernels.<module>`, which is imported when it is first called."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)(*args, **options)

    return call


def _known(name: str, asked_by: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{asked_by}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def requested() -> str | None:
    """The backend asked for by name, if any: `use_backend` before FTSO_BACKEND."""
    if _forced is not None:
        return _forced
    name = os.environ.get("FTSO_BACKEND")
    return _known(name, "FTSO_BACKEND") if name else None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every operation runs on backend `name` or raises; None leaves the choice as it was.

    Process-wide, not per thread. "triton" takes tensors on a GPU, and on the cpu where TRITON_INTERPRET=1 was set
    before triton was imported. Raises BackendError for an unknown name, and for one that this machine lacks.
    """
    global _forced
    if name is not None and (reason := lacks(_known(name, "backend"))):
        raise BackendError(f"backend {name!r}: {reason}")
    before = _forced
    _forced = name if name is not None else _forced
    try:
        yield
    finally:
        _forced = before


_ON = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",)}  # HIP's devices call themselves cuda


def _why_not(backend: str, x: torch.Tensor) -> str | None:
    if backend == "reference":
        return None
    devices = ("cpu", "cuda") if backend == "triton" == requested() and interpreted() else _ON[backend]
    if x.device.type not in devices:
        return f"expected tensors on {'the cpu' if devices[0] == 'cpu' else 'a GPU'}, got {x.device}"
    if reason := (_missing if backend == "cpu" else _absent(backend)):
        return reason
    if backend == "cpu" and x.dtype != torch.float32:
        return f"expected float32, got {x.dtype}"
    return unfit(x.device) if backend == "cuda" else None


def _absent(backend: str) -> str | None:
    """Why a GPU's backend is not installed; nothing is imported."""
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "triton is not there; `pip install triton`"
    if importlib.util.find_spec("ftso_fast._cuda"):
        return None
    return "the compiled module ftso_fast._cuda is not there; install where nvcc is on the PATH"


def unfit(device: torch.device) -> str | None:
    """Why a GPU cannot run the compiled CUDA kernels; None too where torch sees no GPU, for tensors that are fake."""
    return _unfit(device) if torch.cuda.is_available() else None


@cache
def _unfit(device: torch.device) -> str | None:
    index = torch.cuda.current_device() if device.index is None else device.index
    said = cuda_module().cell_unfit(index)  # of the module's own runtime: what it holds is decided where it is built
    if not said:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"expected a GPU that its kernels were built for, got compute capability {major}.{minor} ({said})"


def choose(
    op: str,
    table: Mapping[str, Callable[..., Any]],
    x: torch.Tensor,
    cannot: Mapping[str, str | None] | None = None,
) -> Callable[..., Any]:
    """The function of `table` (backend name -> function) that computes `op` on tensors like `x`.

    cannot: by backend, why this call is not for it, if it is not. Raises BackendError when the backend asked for by
    name cannot; where a call is only not for the one that could have run, the reference takes it.
    """
    cannot = cannot or {}
    name = requested()
    if name is not None:
        reason = _why_not(name, x) or (cannot.get(name) if name in table else "it has no such kernel")
        if reason:
            raise BackendError(f"{op}: backend {name!r} was asked for and cannot run: {reason}")
        return table[name]
    return next(table[b] for b in BACKENDS if b in table and _why_not(b, x) is None and not cannot.get(b))


def lacks(backend: str) -> str | None:
    """Why this machine cannot run a backend, or None."""
    if backend in ("cpu", "reference"):
        return _missing if backend == "cpu" else None
    if reason := _absent(backend):
        return reason
    if not torch.cuda.is_available():
        if backend == "cuda":
            return "there is no GPU"
        return None if interpreted() else "there is no GPU (with TRITON_INTERPRET=1 it is interpreted)"
    return unfit(torch.device("cuda", torch.cuda.current_device())) if backend == "cuda" else None


def backends() -> dict[str, str | None]:
    """Every backend: None where it can run on this machine, else the reason why not."""
    return {name: lacks(name) for name in BACKENDS}


def isa() -> str:
    """The instruction set that the cpu backend uses: FTSO_ISA, or the fastest that the machine has.

    Raises BackendError when FTSO_ISA names one that is unknown or that the machine lacks.
    """
    try:
        return str(core().isa())
    except ValueError as error:
        raise BackendError(str(error)) from None


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, fastest first."""
    return tuple(core().available_isas())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block the cpu backend runs the kernels compiled for `name`; process-wide."""
    before = isa()
    try:
        core().force_isa(name)
    except ValueError as error:
        raise BackendError(str(error)) from None
    try:
        yield
    finally:
        core().force_isa(before)


def calls() -> dict[str, int]:
    """How often each kernel ran in this process, as "skip_cell_fwd/avx512" or "cell_fwd/triton"; those of the cpu name
    themselves, those of a GPU their launchers."""
    return (dict(core().calls()) if _C is not None else {}) | _launched


def first_derivatives_only(op: str, backend: str = "cpu") -> Callable[..., None]:
    """The backward of a backward operation of a compiled backend: a sentence."""

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(
            f"{op}: the {backend} backend has first derivatives only; for second ones run it within "
            "`with ftso_fast.kernels.use_backend('reference'):`"
        )

    return refuse


class Launch(NamedTuple):
    """A stage that a backend launched: seconds it took (0 on a GPU, which does not wait), floating point operations of
    its products (padding included; 0 on a GPU), bytes of images and activations that it must read and write at least
    once."""

    stage: str
    isa: str
    seconds: float
    flops: float
    bytes: float


_traced: list[Launch] | None = None
_launched: dict[str, int] = {}


@contextmanager
def trace() -> Iterator[list[Launch]]:
    """Within the block every launch of the super-network is appended to the list; process-wide.

    Between one launch and the next the sums of a batch norm are finished: that is why they are apart.
    """
    global _traced
    before, _traced = _traced, []
    try:
        yield _traced
    finally:
        _traced = before


def record(net: Any) -> None:
    """Append the launches of a network's last pass to the list of the innermost `trace`, if there is one."""
    if _traced is not None:
        _traced.extend(Launch(*launch) for launch in net.launches())


def launched(stage: str, backend: str, moved: int) -> None:
    """A kernel on a GPU was started."""
    name = f"{stage}/{backend}"
    _launched[name] = _launched.get(name, 0) + 1
    if _traced is not None:
        _traced.append(Launch(stage, backend, 0.0, 0.0, float(moved)))
