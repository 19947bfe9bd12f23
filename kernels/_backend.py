"""The only place that chooses who computes an operation.

A backend that was asked for by name (`use_backend`, or the variable FTSO_BACKEND) runs or raises; left alone, the
first of `BACKENDS` that can take the call does. `backends()` tells which of them this machine has.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch  # before _C: the core then shares the OpenMP runtime, and so the threads, that torch brought

BACKENDS = ("cpu", "reference")  # fastest first
ISAS = ("avx512bf16", "avx512", "avx2", "scalar")  # fastest first

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

    Process-wide, not per thread. Raises BackendError for an unknown name, and for "cpu" without the core.
    """
    global _forced
    if name is not None and _known(name, "backend") == "cpu":
        core()
    before = _forced
    _forced = name if name is not None else _forced
    try:
        yield
    finally:
        _forced = before


def _why_not(backend: str, x: torch.Tensor) -> str | None:
    if backend == "reference":
        return None
    if _C is None:
        return _missing
    if x.device.type != "cpu":
        return f"expected tensors on the cpu, got {x.device}"
    if x.dtype != torch.float32:
        return f"expected float32, got {x.dtype}"
    return None


def choose(
    op: str, table: Mapping[str, Callable[..., Any]], x: torch.Tensor, cpu_cannot: str | None = None
) -> Callable[..., Any]:
    """The function of `table` (backend name -> function) that computes `op` on tensors like `x`.

    cpu_cannot: why this call is not for the cpu backend, if it is not. Raises BackendError when the backend asked for
    by name cannot.
    """
    name = requested()
    if cpu_cannot and name != "cpu":
        return table["reference"]
    if name is not None:
        reason = _why_not(name, x) or (cpu_cannot if name == "cpu" else None)
        if reason:
            raise BackendError(f"{op}: backend {name!r} was asked for and cannot run: {reason}")
        return table[name]
    return next(table[b] for b in BACKENDS if b in table and _why_not(b, x) is None)


def backends() -> dict[str, str | None]:
    """Every backend: None where it can run on this machine, else the reason why not."""
    return {"cpu": _missing, "reference": None}


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
    """How often each kernel ran in this process, as "skip_cell_fwd/avx512"; the kernels name themselves."""
    return dict(core().calls()) if _C is not None else {}


def first_derivatives_only(op: str) -> Callable[..., None]:
    """The backward of a backward operation of the cpu backend: a sentence."""

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(
            f"{op}: the cpu backend has first derivatives only; for second ones run it within "
            "`with ftso_fast.kernels.use_backend('reference'):`"
        )

    return refuse


class Launch(NamedTuple):
    """A stage that the cpu backend launched: seconds it took, floating point operations of its products (padding
    included), bytes of images and activations that it must read and write at least once."""

    stage: str
    isa: str
    seconds: float
    flops: float
    bytes: float


_traced: list[Launch] | None = None


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
