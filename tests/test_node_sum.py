"""A node of the trained network: running statistics, dropped images, wrong calls. Values: `test_operations.py`."""

import pytest
import torch
from ftso_fast.kernels import node_sum
from ftso_fast.kernels.node_sum import reference
from ftso_fast.kernels.operators import OPERATORS, n_batch_norms

from ftso_fast import kernels

OPS, STRIDES = ("sep_conv_3x3", "skip_connect", "dil_conv_5x5"), (2, 2, 1)


def drawn(B=4, C=6, H=8, W=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(B, C, H // (1 if s == 2 else 2), W // (1 if s == 2 else 2), generator=g) for s in STRIDES]
    shapes = [shape for op, s in zip(OPS, STRIDES, strict=True) for shape in OPERATORS[op].shapes(C, C, s)]
    weights = [torch.randn(shape, generator=g) / 3 for shape in shapes]
    n = sum(n_batch_norms(op, s) for op, s in zip(OPS, STRIDES, strict=True))
    affine = [torch.rand(C, generator=g) + 0.5 for _ in range(2 * n)]
    running = [torch.rand(C, generator=g) + 0.5 for _ in range(2 * n)]
    return inputs, weights, affine, running


def test_running_statistics_are_batch_norms(isa):
    inputs, weights, affine, running = drawn()
    moved = [r.double() for r in running]
    image_weights = torch.tensor([[0.0, 2, 2, 0]] * 3)
    doubles = [[t.double() for t in tensors] for tensors in (inputs, weights, affine)]
    reference(doubles[0], OPS, STRIDES, doubles[1], doubles[2], moved, image_weights.double())
    node_sum(inputs, OPS, STRIDES, weights, affine, running, image_weights)
    for got, want in zip(running, moved, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", ["sep_conv", "dil_conv", "relu_conv_bn", "factorized_reduce"])
def test_operators_alone_move_them_too(isa, op):
    g = torch.Generator().manual_seed(1)
    name = {"sep_conv": "sep_conv_5x5", "dil_conv": "dil_conv_3x3"}.get(op, op)
    stride = 2 if op == "factorized_reduce" else 1
    x = torch.randn(3, 4, 6, 10, generator=g)
    weights = [torch.randn(shape, generator=g) for shape in OPERATORS[name].shapes(4, 6, stride)]
    channels = [4, 6] if op == "sep_conv" else [6]
    running = [torch.rand(c, generator=g) for c in channels for _ in "mv"]
    moved = [r.double() for r in running]
    more = {"running": running}
    if op.endswith("conv"):
        getattr(kernels, op)(x, weights, (), stride, **more)
    else:
        getattr(kernels, op)(x, *weights, **more)
    apply = OPERATORS[name].reference
    apply(x.double(), [w.double() for w in weights], (), stride, moved)
    for got, want in zip(running, moved, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


def test_a_dropped_image_gets_nothing_and_gives_nothing():
    inputs, weights, affine, _ = drawn()
    image_weights = torch.ones(3, 4)
    image_weights[:, 2] = 0
    leaves = [x.requires_grad_() for x in inputs]
    out = node_sum(leaves, OPS, STRIDES, weights, affine, (), image_weights)
    assert not out[2].any()
    (grad,) = torch.autograd.grad(out[2].square().sum(), leaves[:1])
    assert not grad.any()
    whole = node_sum(leaves, OPS, STRIDES, weights, affine, (), torch.ones(3, 4))
    assert torch.equal(whole, node_sum(leaves, OPS, STRIDES, weights, affine))


WRONG = [
    (lambda a: a.update(operators=OPS[:2]), ValueError, r"operators: expected one for each of the 3 inputs, got 2"),
    (
        lambda a: a.update(operators=("max_pool_3x3", *OPS[1:])),
        ValueError,
        r"operators\[0\]: expected skip_connect, a sep",
    ),
    (lambda a: a.update(operators=("conv", *OPS[1:])), ValueError, r"operators"),
    (lambda a: a.update(strides=(2, 2, 3)), ValueError, r"strides\[2\]: expected 1 or 2, got 3"),
    (lambda a: a.update(weights=a["weights"][:-1]), ValueError, r"weights: expected"),
    (lambda a: a.update(affine=a["affine"][:3]), ValueError, r"affine: expected"),
    (lambda a: a.update(running=a["running"][1:]), ValueError, r"running: expected"),
    (lambda a: a.update(image_weights=torch.ones(3, 5)), ValueError, r"image_weights: expected shape \(3, 4\)"),
    (lambda a: a.update(image_weights=torch.ones(3, 4).double()), TypeError, r"image_weights: expected torch.float32"),
    (lambda a: a.update(inputs=[]), ValueError, r"inputs: expected at least one state, got none"),
    (
        lambda a: a["inputs"].__setitem__(2, torch.ones(4, 6, 5, 6)),
        ValueError,
        r"inputs\[2\]: expected a state that gives",
    ),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_calls(backend, change, error, message):
    inputs, weights, affine, running = drawn()
    arguments = {"inputs": inputs, "operators": OPS, "strides": STRIDES, "weights": weights, "affine": affine}
    arguments |= {"running": running, "image_weights": None}
    change(arguments)
    with kernels.use_backend(backend), pytest.raises(error, match=f"^node_sum: {message}"):
        node_sum(**arguments)
