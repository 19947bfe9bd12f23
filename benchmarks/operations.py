"""The operations, one by one: `testing.BENCHMARKS` on one arm."""

from collections.abc import Callable

import torch
from ftso_fast.kernels import testing
from measure import OPERATION, Calls, Found, repeat, sample
from torch import Tensor

BUDGET = 0.2
"""Seconds that a case's two calls are repeated for, but for the least and the most number of times of `repeat`."""


def operation_calls(arm: str, case: testing.Case, tensors: tuple[Tensor, ...]) -> Calls:
    """The two timed calls of an operation; they return the output, and behind it the inputs' gradients. To the arm
    channels_last the gradient of its output comes in that format too."""
    operation = testing.OPERATIONS[case.op]
    function: Callable[..., Tensor] = operation.function
    layout = torch.contiguous_format
    if arm == "channels_last":
        layout = torch.channels_last
        tensors = tuple(t.to(memory_format=layout) if t.dim() == 4 else t for t in tensors)
    elif arm == "compile":
        torch.compiler.reset()
        function = torch.compile(operation.reference, dynamic=False)
    leaves = [t.detach().requires_grad_() for t in tensors]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [operation.call(function, case, tensors)]

    example = forward()[0]
    grad = torch.randn(example.shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)

    def both() -> list[Tensor]:
        out = operation.call(function, case, leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return {"forward": forward, "forward+backward": both}


def operations(arm: str, found: Found) -> None:
    for case in testing.BENCHMARKS:
        calls = operation_calls(arm, case, testing.OPERATIONS[case.op].inputs(case, 0))
        for name, call in calls.items():
            first, *rest = sample(call()).values()
            values = {"output": first} | {f"gradient {i}": g for i, g in enumerate(rest)}
            found.gate(f"{case} {name}", values, OPERATION)
        found.seconds |= {f"{case} {name}": s for name, s in repeat(calls, budget=BUDGET, most=50).items()}
