"""An operation of torch with its first derivative, where it takes lists of tensors.

torch.library.register_autograd takes lists apart and puts them together again as trees, several times a call, and each
way through the dispatcher takes two dozen tensors from Python and gives them back to it: a small mixed edge would pay a
third of its time. Here tensors travel side by side; where nothing stands between, a call goes to its kernel at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._backend import first_derivatives_only

Kernel = Callable[..., Any]
PLAIN = {Tensor, torch.nn.Parameter}


def side_by_side(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from argument
        else:
            yield argument


def only_autograd_between(arguments: Iterable[Any]) -> bool:
    """Whether the dispatcher would lead a call with these from here to the cpu's kernel by way of autograd alone: no
    mode, no transform, no subclass of tensors, and nobody who records calls."""
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled():
        return False
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    if not tensors or not {type(t) for t in tensors} <= PLAIN:
        return False
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return _leads_to_cpu(torch._C._dispatch_keys(tensors[0]).raw_repr(), included.raw_repr(), excluded.raw_repr())


@cache
def _leads_to_cpu(of_tensor: int, included: int, excluded: int) -> bool:
    """The part of the answer that the dispatcher's sets of keys give, as numbers."""
    keys_of = torch._C.DispatchKeySet.from_raw_repr
    keys = (keys_of(of_tensor) | keys_of(included)) - keys_of(excluded)
    below = keys & torch._C._after_autograd_keyset
    for passes_on in (torch._C.DispatchKey.ADInplaceOrView, torch._C.DispatchKey.BackendSelect):
        below = below.remove(passes_on)
    first, then = keys.highestPriorityTypeId(), below.highestPriorityTypeId()
    return bool(first == torch._C.DispatchKey.AutogradCPU and then == torch._C.DispatchKey.CPU)


class Operation:
    """The operations `name` and `name`_bwd, which `library` has defined, and whose outputs are tensors, not lists.

    kernels, fakes: of both; backend: whose kernels they are, on devices `keys`. save(ctx, inputs, output) keeps what
    derive(ctx, bwd, *grads) needs, where bwd is `name`_bwd; it returns a gradient, or a list of them, for the schema's
    arguments from the first one on; the others have none. A call is one of torch.ops.
    """

    def __init__(
        self, library: torch.library.Library, name: str, kernels: tuple[Kernel, Kernel], fakes: tuple[Kernel, Kernel],
        save: Callable[..., None], derive: Callable[..., Iterable[Any]], backend: str = "cpu",
        keys: Sequence[str] = ("CPU",),
    ) -> None:  # fmt: skip
        kernel, kernel_bwd = kernels
        names = name, f"{name}_bwd"
        for each, own, fake in zip(names, kernels, fakes, strict=True):
            for key in keys:
                library.impl(each, own, key)
            torch.library.register_fake(f"{library.ns}::{each}", fake, lib=library)
        self.op, op_bwd = (getattr(getattr(torch.ops, library.ns), each).default for each in names)
        op = self.op

        def run(keys: Any, arguments: tuple[Any, ...]) -> Any:
            if keys is None:
                return kernel(*arguments)
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
                at_once = len(keys) == 1 and not torch.is_grad_enabled() and only_autograd_between(grads)
                found = list(side_by_side(derive(ctx, kernel_bwd if at_once else op_bwd, *grads)))
                return None, None, *found, *[None] * (len(ctx.needs_input_grad) - 2 - len(found))

        apply_alone = super(torch.autograd.Function, Derivative).apply  # without what is done for transforms

        def autograd(keys: Any, *arguments: Any) -> Any:
            flat = list(side_by_side(arguments))
            if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in flat):
                return (apply_alone if keys is None else Derivative.apply)(keys, arguments, *flat)
            return run(keys, arguments)

        library.impl(name, autograd, "Autograd", with_keyset=True)
        refuse = first_derivatives_only(name.removesuffix(f"_{backend}"), backend)
        torch.library.register_autograd(f"{library.ns}::{names[1]}", refuse, lib=library)
        self._autograd, self._alone = autograd, len(keys) == 1

    def __call__(self, *arguments: Any) -> Any:
        if self._alone and only_autograd_between(side_by_side(arguments)):
            return self._autograd(None, *arguments)
        return self.op(*arguments)
