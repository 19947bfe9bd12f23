"""Registration of an operation's first derivative for torch, where the operation takes lists of tensors.

torch.library.register_autograd takes lists apart and puts them together again as trees, several times a call, which
costs a small mixed edge a quarter of its time; here tensors travel side by side.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def side_by_side(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from argument
        else:
            yield argument


def register_autograd(
    library: torch.library.Library, name: str, save: Callable[..., None], backward: Callable[..., Iterable[Any]]
) -> None:
    """`save(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs; the latter returns a gradient, or a list of
    them, for the schema's arguments from the first one on; the others have none. Outputs must be tensors, not lists."""
    op = getattr(getattr(torch.ops, library.ns), name).default

    def run(keys: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, arguments: tuple[Any, ...], *flat: Any) -> Any:
            output = run(keys, arguments)
            save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            found = list(side_by_side(backward(ctx, *grads)))
            return None, None, *found, *[None] * (len(ctx.needs_input_grad) - 2 - len(found))

    def autograd(keys: Any, *arguments: Any) -> Any:
        flat = list(side_by_side(arguments))
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in flat):
            return Derivative.apply(keys, arguments, *flat)
        return run(keys, arguments)

    library.impl(name, autograd, "Autograd", with_keyset=True)
