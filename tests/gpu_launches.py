"""What an operation launches on a GPU, counted while Triton's interpreter runs it: kernels, and finishing kernels."""

from contextlib import contextmanager

import torch
from ftso_fast.kernels import testing

FINISH = ("add_up", "finish_")
CASES = {
    "skip_cell": testing.Case("skip_cell", 1, 4, 2, 2, 4),
    "relu_conv_bn": testing.Case("relu_conv_bn", 1, 2, 2, 2, operators=("relu_conv_bn",)),
    "factorized_reduce": testing.Case("factorized_reduce", 1, 2, 2, 2, operators=("factorized_reduce",), strides=(2,)),
    "dil_conv": testing.Case("dil_conv", 1, 2, 2, 2, operators=("dil_conv_3x3",)),
    "sep_conv": testing.Case("sep_conv", 1, 2, 2, 2, operators=("sep_conv_3x3",)),
    "partial_mix, all operators": testing.Case("partial_mix", 1, 8, 2, 2, 4, testing.ALL, (1, 1)),
    "partial_mix, pools": testing.Case("partial_mix", 1, 4, 2, 2, 4, testing.ALL[:3], (1, 1)),
}


@contextmanager
def counting():
    """Within the block the names of kernels that are launched go into the list."""
    from triton.runtime.interpreter import GridExecutor

    names, real = [], GridExecutor.__call__

    def launch(self, *arguments, **constants):
        names.append(self.fn.__name__)
        return real(self, *arguments, **constants)

    GridExecutor.__call__ = launch
    try:
        yield names
    finally:
        GridExecutor.__call__ = real


def launches():
    """By operation: the kernels of forward and of backward, all gradients wanted, and how many of them only finish sums
    of the launch before. What torch itself launches, the weights' concatenation and ones, is not among them."""
    found = {}
    for name, case in CASES.items():
        operation = testing.OPERATIONS[case.op]
        leaves = [t.requires_grad_() for t in operation.inputs(case, 0)]
        with counting() as forward:
            out = operation.call(operation.function, case, leaves)
        with counting() as backward:
            torch.autograd.grad(out, leaves, torch.ones_like(out), materialize_grads=True)
        found[name] = {
            direction: [len(names) - finishing, finishing]
            for direction, names in (("forward", forward), ("backward", backward))
            for finishing in [sum(n.startswith(FINISH) for n in names)]
        }
    return found
