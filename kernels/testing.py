"""What tests and benchmarks share: one comparison, one table of tolerances, one proof of what ran.

The cases stand in `cases.py`; a new operation is one entry in its `OPERATIONS`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _backend
from .cases import ALL, BENCHMARKS, CASES, OPERATIONS, Case, Operation
from .draws import VIEWS

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
    "fma_peak",
    "values_and_gradients",
    "worst",
]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""The skip cell: largest difference to the float64 reference, as a part of the reference's largest value."""

BESIDE, FLOOR, DRAWS = 2.0, 1e-6, 8
"""Operations with batch norms: over DRAWS draws their errors are at most BESIDE times those of the float32 reference,
or FLOOR."""

ONE_DRAW = 8.0
"""In place of BESIDE for gradients that are sums over all pixels, where there is one draw only: a batch norm leaves
such sums near zero, and how many digits are left of one is luck, in float32 PyTorch too."""


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
            own = {isa, _backend.OTHERS.get(isa)}
            assert {name.split("/")[1] for name in ran} <= own, f"asked for {isa}, ran {ran}"


def values_and_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], case: Case) -> list[Tensor]:
    """The output and the gradient of every tensor, under a fixed output gradient that has no symmetry and lies in
    memory as the case's states do."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = OPERATIONS[case.op].call(function, case, leaves)
    weights = torch.arange(out.numel(), dtype=torch.float64).mul_(0.7548776662466927).frac_().sub_(0.4)
    grad = VIEWS[case.view](weights.to(out.device, out.dtype).view(out.shape))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)]


def error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """The largest difference, as a part of the largest wanted value, or of `floor` where that is more. Where all is
    zero, as what `none` is given, nothing else will do."""
    largest = float(want.abs().max())
    return _part(float((got - want).abs().max()), max(largest, floor) if largest else 0.0)


def _part(difference: float, scale: float) -> float:
    return difference / scale if scale else 0.0 if difference == 0 else float("inf")


def check(case: Case, tensors: Sequence[Tensor] | None = None, device: str = "cpu") -> Sequence[Tensor]:
    """Assert that the chosen backend agrees with the reference on the case; returns the tensors compared on.

    The skip cell is held to TOLERANCE. An operation with batch norms is judged beside the float32 reference, by the
    `worst` of each kind of tensor over the same draws: at most BESIDE times its error. Where DRAWS draws say otherwise,
    four times as many decide: bad luck does not outlast them, a mistake does. On `tensors` alone, one draw, sums are
    held to ONE_DRAW.
    """
    operation = OPERATIONS[case.op]
    if tensors is not None or case.op == "skip_cell":
        drawn = [_on(device, operation.inputs(case, 0)) if tensors is None else tensors]
        found, limits = _judged(case, drawn)
    else:
        for draws in (DRAWS, 4 * DRAWS):
            drawn = [_on(device, operation.inputs(case, i)) for i in range(draws)]
            found, limits = _judged(case, drawn)
            if all(found[kind] <= limits[kind] for kind in found):
                break
    assert all(found[kind] <= limits[kind] for kind in found), (
        f"{case}: errors of output and gradients {found}, allowed {limits}"
    )
    return drawn[0]


def _judged(case: Case, drawn: Sequence[Sequence[Tensor]]) -> tuple[dict[str, float], dict[str, float]]:
    """The errors of the chosen backend, and what they may be."""
    wanted = exact(case, drawn)
    found = worst(case, drawn, None, wanted)
    if case.op == "skip_cell":
        return found, dict.fromkeys(found, TOLERANCE[drawn[0][0].dtype])
    reference = worst(case, drawn, OPERATIONS[case.op].reference, wanted)
    sums = BESIDE if len(drawn) > 1 else ONE_DRAW
    beside = {kind: BESIDE if kind in ("output", "states") else sums for kind in reference}
    return found, {kind: max(beside[kind] * e, FLOOR) for kind, e in reference.items()}


def _on(device: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors if device == "cpu" else [t.to(device) for t in tensors]


def exact(case: Case, drawn: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Of each draw what the reference says in float64: value and gradients."""
    reference = OPERATIONS[case.op].reference
    return [values_and_gradients(reference, [t.double() for t in tensors], case) for tensors in drawn]


def worst(
    case: Case, drawn: Sequence[Sequence[Tensor]], function: Callable[..., Tensor] | None, wanted: list[list[Tensor]]
) -> dict[str, float]:
    """How far `function`, else the chosen backend, is from what is `exact` on these very tensors, by kind of tensor:
    the output, the states' gradients, and the others by their dimensions (edges or batch norms, operators,
    convolutions). An error is a tensor's largest difference over all draws, as a part of the largest value that the
    reference gave it; NaN where there is one. Of one draw alone, sums that cancel to less than a tenth of the largest
    gradient are judged at that tenth.
    """
    operation = OPERATIONS[case.op]
    kinds = ["output"] + ["states" if i < len(case.strides) else f"{t.dim()}d" for i, t in enumerate(drawn[0])]
    differences, scales = [0.0] * len(kinds), [0.0] * len(kinds)
    for tensors, want in zip(drawn, wanted, strict=True):
        got = values_and_gradients(function or operation.function, tensors, case)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            difference = float((g - w).abs().max())
            differences[i] = difference if difference != difference or difference > differences[i] else differences[i]
            scales[i] = max(scales[i], float(w.abs().max()))
    floor = 0.1 * max(scales[1:]) if len(drawn) == 1 and case.op != "skip_cell" else 0.0
    found: dict[str, float] = {}
    for kind, difference, scale in zip(kinds, differences, scales, strict=True):
        e = _part(difference, scale if kind in ("output", "states") or not scale else max(scale, floor))
        before = found.get(kind, 0.0)
        found[kind] = e if e != e or e > before else before
    return found
