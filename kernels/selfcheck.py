"""The equality tests of `testing`, on a device and every backend that can run there: what the tests do, for a user."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from . import testing
from ._backend import lacks, use_backend

ON = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
"""By device, the backends that have kernels of the table's operations."""


class Checked(NamedTuple):
    """One operation on one backend: how many cases agreed, and what was said of each that did not."""

    operation: str
    backend: str
    agreed: int
    failed: tuple[str, ...]


def why_not(device: str) -> str | None:
    """Why nothing can be checked on a device, if so."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def selfcheck(device: str, operations: Sequence[str] = ()) -> Iterator[Checked]:
    """Values and every gradient of each operation (of all, where none is named) in every case of the table, against
    float64 on the same device. Backends that this machine lacks are left out, and so is the reference by itself."""
    for backend in ON[device][:-1]:
        if lacks(backend) is not None:
            continue
        for name in operations or testing.OPERATIONS:
            if backend not in testing.OPERATIONS[name].backends:
                continue
            agreed, failed = 0, []
            for case in testing.OPERATIONS[name].cases:
                with use_backend(backend):
                    try:
                        testing.check(case, device=device)
                        agreed += 1
                    except Exception as error:  # a kernel may fail in any way; the rest is still worth knowing
                        failed.append(f"{case}: {type(error).__name__}: {error}")
            yield Checked(name, backend, agreed, tuple(failed))
