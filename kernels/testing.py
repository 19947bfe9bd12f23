"""What tests and benchmarks share: one comparison, one table of tolerances, one proof of what ran.

The cases stand in `cases.py`; a new operation is one entry in its `OPERATIONS`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _backend
from .cases import ALL, BENCHMARKS, CASES, OPERATIONS, VIEWS, Case, Operation

__all__ = [
    "ALL",
    "BENCHMARKS",
    "CASES",
    "FLOOR",
    "OPERATIONS",
    "TOLERANCE",
    "VIEWS",
    "Case",
    "Operation",
    "arm",
    "check",
    "error",
    "errors",
    "fma_peak",
    "values_and_gradients",
    "worst",
]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""The skip cell: largest difference to the float64 reference, as a part of the reference's largest value."""

BESIDE, SUMS, FLOOR, DRAWS = 2.0, 8.0, 1e-6, 8
"""Operations with batch norms: their errors are at most BESIDE times those of the float32 reference, gradients that are
sums over all pixels SUMS times, or FLOOR."""


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
    grad = VIEWS[case.view](weights.to(out.device, out.dtype).view(out.shape))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)]


def errors(case: Case, tensors: Sequence[Tensor], function: Callable[..., Tensor] | None = None) -> list[float]:
    """How far `function`, else the chosen backend, is from the float64 reference on these very tensors: the largest
    difference of the values and of each gradient, as a part of the reference's largest value."""
    operation = OPERATIONS[case.op]
    got = values_and_gradients(function or operation.function, tensors, case)
    want = values_and_gradients(operation.reference, [t.double() for t in tensors], case)
    largest = max(float(w.abs().max()) for w in want[1:])
    exact = len(want) if case.op == "skip_cell" else 1 + len(case.strides)  # output and states; behind them sums
    floors = [0.0 if i < exact else 0.1 * largest for i in range(len(want))]
    return [error(g, w, floor) for g, w, floor in zip(got, want, floors, strict=True)]


def error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Of two tensors, as a part of the largest wanted value, or of `floor` where that is more: a gradient whose sums
    cancel to less than a tenth of the largest one has fewer digits of its own. Where all is zero, as what `none` is
    given, nothing else will do."""
    difference, largest = float((got - want).abs().max()), float(want.abs().max())
    if largest == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / max(largest, floor)


def check(case: Case, tensors: Sequence[Tensor] | None = None, device: str = "cpu") -> Sequence[Tensor]:
    """Assert that the chosen backend agrees with the reference on the case; returns the tensors compared on.

    The skip cell is held to TOLERANCE. An operation with batch norms is judged beside the float32 reference, by the
    worst of each kind of tensor (`worst`) over the same DRAWS draws, or on `tensors`: output and states by BESIDE.
    The gradients of weights are sums over all pixels which a batch norm leaves near zero: how many digits are left is
    luck, in float32 PyTorch too, and one draw against another has no more than SUMS to say. That they err less than the
    reference's is seen over many cases, and a test takes the mean of all.
    """
    operation = OPERATIONS[case.op]
    drawn = [tensors] if tensors is not None else [_on(device, operation.inputs(case, i)) for i in range(DRAWS)]
    if case.op == "skip_cell":
        drawn = drawn[:1]
    found = worst(case, drawn, None)
    if case.op == "skip_cell":
        limits = dict.fromkeys(found, TOLERANCE[drawn[0][0].dtype])
    else:
        reference = worst(case, drawn, operation.reference)
        beside = {kind: BESIDE if kind in ("output", "states") else SUMS for kind in reference}
        limits = {kind: max(beside[kind] * e, FLOOR) for kind, e in reference.items()}
    assert all(found[kind] <= limits[kind] for kind in found), (
        f"{case}: errors of output and gradients {found}, allowed {limits}"
    )
    return drawn[0]


def _on(device: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors if device == "cpu" else [t.to(device) for t in tensors]


def worst(case: Case, drawn: Sequence[Sequence[Tensor]], function: Callable[..., Tensor] | None) -> dict[str, float]:
    """The largest error of each kind of tensor over the draws, NaN where there is one: the output, the states'
    gradients, and the others by their dimensions (edges or batch norms, operators, convolutions)."""
    kinds = ["output"] + ["states" if i < len(case.strides) else f"{t.dim()}d" for i, t in enumerate(drawn[0])]
    found: dict[str, float] = {}
    for tensors in drawn:
        for kind, e in zip(kinds, errors(case, tensors, function), strict=True):
            before = found.get(kind, 0.0)
            found[kind] = e if e != e or e > before else before
    return found
