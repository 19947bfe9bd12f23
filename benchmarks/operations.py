"""The operations, one by one: `testing.BENCHMARKS` on one arm."""

from collections.abc import Callable

import torch
from ftso_fast.kernels import testing
from measure import OPERATION, Calls, Found, repeat, sample
from torch import Tensor


def operation_calls(arm: str, case: testing.Case, tensors: tuple[Tensor, ...]) -> Calls:
    """The two timed calls of an operation; they return the output, and behind it the inputs' gradients."""
    operation = testing.OPERATIONS[case.op]
    function: Callable[..., Tensor] = operation.function
    if arm == "channels_last":
        tensors = tuple(t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors)
    elif arm == "compile":
        torch.compiler.reset()
        function = torch.compile(operation.reference, dynamic=False)
    leaves = [t.detach().requires_grad_() for t in tensors]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [function(*tensors, case.k)]

    example = forward()[0]
    grad = torch.empty_like(example).copy_(torch.randn(example.shape, generator=torch.Generator().manual_seed(1)))

    def both() -> list[Tensor]:
        out = function(*leaves, case.k)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return {"forward": forward, "forward+backward": both}


def operations(arm: str, found: Found) -> None:
    for case in testing.BENCHMARKS:
        tensors = testing.OPERATIONS[case.op].inputs(case)
        if arm.startswith("cpu"):
            testing.check(case, tensors)
        calls = operation_calls(arm, case, tensors)
        for name, call in calls.items():
            found.gate(f"{case} {name}", sample(call()), OPERATION)
        found.seconds |= {f"{case} {name}": s for name, s in repeat(calls, budget=1.0).items()}
