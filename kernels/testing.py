"""What tests and benchmarks share: one comparison, one table of tolerances, one proof of what ran.

The cases stand in `cases.py`; a new operation is one entry in its `OPERATIONS`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _backend
from .cases import BENCHMARKS, CASES, OPERATIONS, VIEWS, Case, Operation

__all__ = [
    "BENCHMARKS",
    "CASES",
    "OPERATIONS",
    "TOLERANCE",
    "Case",
    "Operation",
    "arm",
    "check",
    "errors",
    "fma_peak",
    "values_and_gradients",
]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""The skip cell: largest difference to the float64 reference, as a part of the reference's largest value."""

BESIDE, FLOOR, DRAWS = 2.0, 1e-6, 8
"""Operations with batch norms: their errors are at most BESIDE times those of the float32 reference, or FLOOR."""


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


def values_and_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], case: Case) -> list[Tensor]:
    """The output and the gradient of every tensor, under a fixed output gradient that has no symmetry and lies in
    memory as the case's states do."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = OPERATIONS[case.op].call(function, case, leaves)
    weights = torch.arange(out.numel(), dtype=torch.float64).mul_(0.7548776662466927).frac_().sub_(0.4)
    grad = VIEWS[case.view](weights.to(out.dtype).view(out.shape))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)]


def errors(case: Case, tensors: Sequence[Tensor], function: Callable[..., Tensor] | None = None) -> list[float]:
    """How far `function`, else the chosen backend, is from the float64 reference on these very tensors: the largest
    difference of the values and of each gradient, as a part of the reference's largest value."""
    operation = OPERATIONS[case.op]
    got = values_and_gradients(function or operation.function, tensors, case)
    want = values_and_gradients(operation.reference, [t.double() for t in tensors], case)
    return [_error(g, w) for g, w in zip(got, want, strict=True)]


def _error(got: Tensor, want: Tensor) -> float:
    """Of two tensors; where all is zero, as what `none` is given, nothing else will do."""
    difference, largest = float((got - want).abs().max()), float(want.abs().max())
    return difference / largest if largest else 0.0 if difference == 0 else float("inf")


def check(case: Case, tensors: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
    """Assert that the chosen backend agrees with the reference on the case; returns the tensors compared on.

    The skip cell is held to TOLERANCE. Behind batch norms gradients are sums that nearly cancel, and how many of one
    tensor's digits that costs is luck, for float32 PyTorch as well: so an operation with batch norms errs, by the
    worst of each kind of tensor over the same DRAWS draws (one where `tensors` are given), at most BESIDE times as
    much as the float32 reference, or by FLOOR. Kinds: output, states, edge weights, operator weights, convolutions,
    batch norms.
    """
    drawn = [tensors] if tensors is not None else [OPERATIONS[case.op].inputs(case, i) for i in range(DRAWS)]
    if case.op == "skip_cell":
        drawn = drawn[:1]
    found = _worst(case, drawn, None)
    if case.op == "skip_cell":
        limits = dict.fromkeys(found, TOLERANCE[drawn[0][0].dtype])
    else:
        reference = _worst(case, drawn, OPERATIONS[case.op].reference)
        limits = {kind: max(BESIDE * e, FLOOR) for kind, e in reference.items()}
    assert all(found[kind] <= limits[kind] for kind in found), (
        f"{case}: errors of output and gradients {found}, allowed {limits}"
    )
    return drawn[0]


def _worst(case: Case, drawn: Sequence[Sequence[Tensor]], function: Callable[..., Tensor] | None) -> dict[str, float]:
    """The largest error of each kind of tensor over the draws; NaN where there is one."""
    kinds = ["output"] + ["states" if i < len(case.strides) else f"{t.dim()}d" for i, t in enumerate(drawn[0])]
    found: dict[str, float] = {}
    for tensors in drawn:
        for kind, e in zip(kinds, errors(case, tensors, function), strict=True):
            before = found.get(kind, 0.0)
            found[kind] = e if e != e or e > before else before
    return found
