"""The operations, one by one: `testing.BENCHMARKS` on one arm.

Separable convolutions also as inference has them: batch norm folded into the weights, for the peers as well.
"""

import sys
from collections.abc import Callable

import torch
from ftso_fast.kernels import testing
from ftso_fast.kernels.cases import SEPARABLE
from measure import OPERATION, Calls, Found, repeat, sample
from torch import Tensor

from ftso_fast import kernels

BATCH = 96
"""Of the networks that are trained and tested; a search's are larger."""
BUDGET = 0.2
"""Seconds that a case's two calls are repeated for, but for the least and the most number of times of `repeat`."""


def directions(case: testing.Case) -> tuple[str, ...]:
    """Which calls of a case are timed."""
    evaluation = case.op in SEPARABLE and case.B == BATCH
    return ("forward", "forward+backward", *(("inference",) if evaluation else ()))


def operation_calls(arm: str, case: testing.Case, tensors: tuple[Tensor, ...]) -> Calls:
    """The calls of an operation; they return the output, and behind it the inputs' gradients. To the arm
    channels_last the gradient of its output comes in that format too."""
    operation = testing.OPERATIONS[case.op]
    function: Callable[..., Tensor] = operation.function
    folded: Callable[..., Tensor] = kernels.folded_conv
    layout = torch.contiguous_format
    if arm == "channels_last":
        layout = torch.channels_last
        tensors = tuple(t.to(memory_format=layout) if t.dim() == 4 else t for t in tensors)
    elif arm == "compile":
        torch.compiler.reset()
        function = torch.compile(operation.reference, dynamic=False)
        folded = torch.compile(sys.modules["ftso_fast.kernels.folded_conv"].reference, dynamic=False)
    leaves = [t.detach().requires_grad_() for t in tensors]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [operation.call(function, case, tensors)]

    example = forward()[0]
    grad = torch.randn(example.shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)

    def both() -> list[Tensor]:
        out = operation.call(function, case, leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    @torch.no_grad()
    def inference() -> list[Tensor]:
        biases = [torch.linspace(-1, 1, w.shape[0]) for w in tensors[2::2]]
        return [folded(tensors[0], tensors[1:], biases, case.strides[0], 2 if case.op == "dil_conv" else 1)]

    return {"forward": forward, "forward+backward": both, "inference": inference}


def operations(arm: str, found: Found) -> None:
    for case in testing.BENCHMARKS:
        every = operation_calls(arm, case, testing.OPERATIONS[case.op].inputs(case, 0))
        calls = {direction: every[direction] for direction in directions(case)}
        for name, call in calls.items():
            first, *rest = sample(call()).values()
            values = {"output": first} | {f"gradient {i}": g for i, g in enumerate(rest)}
            found.gate(f"{case} {name}", values, OPERATION)
        found.seconds |= {f"{case} {name}": s for name, s in repeat(calls, budget=BUDGET, most=50).items()}
