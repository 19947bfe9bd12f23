"""The cases that tests and benchmarks share: one list of shapes, one table of tolerances, one comparison.

A new operation is one entry in `OPERATIONS`; tests and benchmarks then run it on every backend.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _backend
from .skip_cell import N_EDGES, reference, skip_cell

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest difference to the float64 reference, as a part of the reference's largest value."""


@dataclass(frozen=True)
class Case:
    """One shape of one operation: inputs (B, C, H, W) and k."""

    op: str
    B: int
    C: int
    H: int
    W: int
    k: int

    def __str__(self) -> str:
        return f"{self.op}-{self.B}x{self.C}x{self.H}x{self.W}-k{self.k}"


@dataclass(frozen=True)
class Operation:
    """`function` dispatches, `reference` defines; `inputs` draws the tensors, `bytes_moved` counts the least
    that forward, and forward with backward, must read and write."""

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[Case], tuple[Tensor, ...]]
    bytes_moved: Callable[[Case], tuple[int, int]]
    cases: tuple[Case, ...]
    benchmarks: tuple[Case, ...]


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(hash((case.B, case.C, case.H, case.W, case.k)) & 0x7FFFFFFF)


def _skip_cell_inputs(case: Case) -> tuple[Tensor, ...]:
    g = _generator(case)
    x0, x1 = (torch.randn(case.B, case.C, case.H, case.W, generator=g) for _ in range(2))
    return x0, x1, torch.rand(N_EDGES, generator=g) + 0.1


def _skip_cell_bytes(case: Case) -> tuple[int, int]:
    plane = 4 * case.B * case.C * case.H * case.W
    return 6 * plane, 6 * plane + 8 * plane


OPERATIONS = {
    "skip_cell": Operation(
        skip_cell,
        reference,
        _skip_cell_inputs,
        _skip_cell_bytes,
        cases=tuple(
            Case("skip_cell", *shape)
            for shape in (
                (2, 16, 32, 32, 4),
                (2, 32, 16, 16, 4),
                (3, 64, 8, 8, 4),
                (2, 32, 8, 8, 8),
                (2, 16, 8, 8, 2),
                (2, 5, 4, 4, 1),
                (3, 12, 5, 7, 4),
                (1, 6, 3, 3, 2),
                (2, 48, 9, 31, 4),
                (1, 8, 17, 16, 4),
                (1, 4, 1, 1, 4),
                (2, 10, 1, 259, 2),
                (1, 24, 13, 1, 8),
            )
        ),
        benchmarks=tuple(
            Case("skip_cell", *shape) for shape in ((256, 16, 32, 32, 4), (256, 32, 16, 16, 4), (256, 64, 8, 8, 4))
        ),
    )
}
CASES = tuple(case for operation in OPERATIONS.values() for case in operation.cases)
BENCHMARKS = tuple(case for operation in OPERATIONS.values() for case in operation.benchmarks)


def fma_peak(rounds: int, threads: int) -> float:
    """Run `rounds` rounds of multiply-adds on registers, on each of `threads` threads at once, with the instruction
    set in use; returns how many floating point operations those were. What a benchmark times is the machine's limit.
    """
    return float(_backend.core().fma_peak(rounds, threads))


@contextmanager
def arm(backend: str, isa: str | None) -> Iterator[None]:
    """Run operations on one backend and, for "cpu", one instruction set, and prove that exactly that one ran."""
    with _backend.use_backend(backend):
        if isa is None:
            yield
            return
        with _backend.use_isa(isa):
            before = _backend.calls()
            yield
            ran = {name for name, n in _backend.calls().items() if n != before.get(name, 0)}
            assert ran, f"no {isa} kernel ran"
            assert all(name.endswith(f"/{isa}") for name in ran), f"asked for {isa}, ran {ran}"


def values_and_gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], k: int) -> list[Tensor]:
    """The output and the gradient of every input, under a fixed output gradient that has no symmetry."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, k)
    weights = torch.arange(out.numel(), dtype=torch.float64).mul_(0.7548776662466927).frac_().sub_(0.4)
    grads = torch.autograd.grad(out, leaves, weights.to(out.dtype).view(out.shape))
    return [out.detach(), *grads]


def errors(case: Case, tensors: tuple[Tensor, ...]) -> list[float]:
    """How far the chosen backend is from the float64 reference on these very tensors: the largest difference of
    the values and of each gradient, as a part of the reference's largest value."""
    operation = OPERATIONS[case.op]
    got = values_and_gradients(operation.function, tensors, case.k)
    want = values_and_gradients(operation.reference, tuple(t.double() for t in tensors), case.k)
    return [float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]


def check(case: Case, tensors: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """Assert that the chosen backend agrees with the reference on the case; returns the tensors compared on."""
    tensors = OPERATIONS[case.op].inputs(case) if tensors is None else tensors
    found = errors(case, tensors)
    limit = TOLERANCE[tensors[0].dtype]
    assert all(e <= limit for e in found), f"{case}: errors of output and gradients {found}, allowed {limit}"
    return tensors
