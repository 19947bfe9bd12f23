"""The compiled network as an operation: bad calls, reuse of its memory, derivatives that it has and has not."""

from importlib import import_module

import pytest
import torch
from conftest import every_isa
from ftso_fast.kernels import NetSpec, skip_net

from ftso_fast import SuperNet, kernels
from ftso_fast.operations import FactorizedReduce, ReLUConvBN

SPEC = NetSpec(8, 4, 4)
skip_net_module = import_module("ftso_fast.kernels.skip_net")


def arguments(seed=0, B=3, spec=SPEC):
    torch.manual_seed(seed)
    net = SuperNet(5, *spec)
    edges = [net.edge_weights(b).detach().float().requires_grad_() for b in net.betas()]
    return torch.randn(B, 3, 16, 12), *edges, [w.detach().requires_grad_() for w in net.parameters()], spec


def gradients(images, normal, reduce, weights, spec, **options):
    return torch.autograd.grad(skip_net(images, normal, reduce, weights, spec).sin().sum(), [normal, reduce], **options)


def replaced(position, value):
    found = list(arguments())
    found[position] = value
    return found


def weight(i, value):
    weights = list(arguments()[3])
    weights[i] = value
    return replaced(3, weights)


BAD_PRECISION = r"precision: expected one of float32, bf16_backward, bf16, got 'fp8'"
BAD = {
    "precision": (lambda: (*arguments(), "fp8"), ValueError, BAD_PRECISION),
    "images-dims": (lambda: replaced(0, torch.zeros(3, 16, 12)), ValueError, r"images: expected shape \(B, 1 or 3"),
    "images-size": (
        lambda: replaced(0, torch.zeros(3, 3, 16, 10)),
        ValueError,
        r"divisible by 4, got \(3, 3, 16, 1",
    ),
    "images-none": (lambda: replaced(0, torch.zeros(0, 3, 16, 12)), ValueError, "images: expected at least one image"),
    "images-type": (lambda: replaced(0, torch.zeros(3, 3, 16, 12).double()), TypeError, "images: expected float32"),
    "images-grey": (lambda: replaced(0, torch.zeros(3, 1, 16, 12)), ValueError, r"weights\[0\]: expected shape"),
    "images-grad": (lambda: replaced(0, torch.zeros(3, 3, 16, 12).requires_grad_()), ValueError, "no gradient for the"),
    "edges-shape": (lambda: replaced(1, torch.zeros(13)), ValueError, r"edges_normal: expected shape \(14,\)"),
    "edges-type": (lambda: replaced(2, torch.zeros(14).double()), TypeError, "edges_reduce: expected float32"),
    "weights-none": (lambda: replaced(3, []), ValueError, "weights: expected .* tensors, got 0"),
    "weights-few": (lambda: replaced(3, arguments()[3][1:]), ValueError, "weights: expected .* tensors, got"),
    "weight-shape": (lambda: weight(3, torch.zeros(8, 23, 1, 1)), ValueError, r"weights\[3\]: expected shape \(8, 24,"),
    "weight-device": (
        lambda: weight(1, torch.zeros(24, device="meta")),
        TypeError,
        "on the cpu, got .* on meta",
    ),
    "k": (lambda: replaced(4, NetSpec(8, 4, 3)), ValueError, "k: expected a divisor of the 8 channels, got 3"),
    "k-bool": (lambda: replaced(4, NetSpec(8, 4, True)), ValueError, "k: expected a positive whole number, got True"),
    "cells": (lambda: replaced(4, NetSpec(8, 2, 4)), ValueError, "expected at least 3 cells, got 2"),
    "channels": (lambda: replaced(4, NetSpec(260, 4, 4)), ValueError, "expected at most 256 channels, got 260"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_call_is_one_sentence_and_reaches_no_kernel(name):
    make, kind, message = BAD[name]
    args = make()
    before = kernels.calls()
    with pytest.raises(kind, match=f"skip_net: .*{message}"):
        skip_net(*args)
    assert kernels.calls() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_half_precision_meets_a_sentence(backend, dtype, refuses):
    images, normal, reduce, weights, spec = arguments(spec=NetSpec(16, 4, 4))
    before = kernels.calls()
    with pytest.raises(TypeError, match=f"skip_net: images: expected float32 on .*, got {dtype}"):
        skip_net(images.to(dtype), normal, reduce, weights, spec, backend=backend)
    with pytest.raises(TypeError, match=rf"skip_net: weights\[0\]: expected float32 on .*, got {dtype}"):
        skip_net(images, normal, reduce, [w.to(dtype) for w in weights], spec, backend=backend)
    assert kernels.calls() == before
    refuses("skip_net", backend, dtype)


def test_second_backward_pass_computes_again_what_the_first_used_up():
    args = arguments()
    logits = skip_net(*args).sin().sum()
    first = torch.autograd.grad(logits, args[1:3], retain_graph=True)
    second = torch.autograd.grad(logits, args[1:3])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_passes_that_overlap_do_not_share_memory():
    one, two = arguments(0), arguments(1)
    alone = [gradients(*args) for args in (one, two)]
    logits = [skip_net(*args).sin().sum() for args in (one, two)]
    for args, out, wanted in zip((one, two), logits, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, args[1:3]), wanted, strict=True))


@pytest.mark.parametrize("huge", [False, True])
def test_fresh_and_reused_memory_and_its_huge_pages_give_the_same_bytes(huge, monkeypatch):
    asked = []

    def fresh(floats, brief):
        asked.append(brief)
        return torch.full((floats,), torch.nan), huge

    monkeypatch.setattr(skip_net_module, "fresh", fresh)
    kernels.release_memory()
    first = gradients(*arguments())
    for i in range(1, skip_net_module.BRIEF + 2):
        gradients(*arguments(i))
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(*arguments()), strict=True))
    assert asked == ([True] if huge else [True, False])
    kernels.release_memory()


@every_isa
@pytest.mark.parametrize("spec", [NetSpec(16, 4, 4), NetSpec(6, 3, 1)], ids=str)
def test_nothing_hides_a_weight_that_is_no_number(spec, isa):
    """The classifier's reaches one class, any other weight's all of them: a relu hands it on."""
    torch.manual_seed(0)
    net, images = SuperNet(5, *spec), torch.randn(2, 3, 8, 8)
    for name, weight in net.named_parameters():
        last = weight.detach().view(-1)[-1:]
        before = last.clone()
        last.fill_(torch.nan)
        spoiled = {}
        for backend in ("cpu", "reference"):
            with kernels.use_backend(backend), torch.no_grad():
                spoiled[backend] = net(images).isnan()
        last.copy_(before)
        assert torch.equal(spoiled["cpu"], spoiled["reference"]), name
        assert spoiled["cpu"].any(), name


def test_weights_that_are_not_contiguous():
    images, normal, reduce, weights, spec = arguments()
    wanted = skip_net(images, normal, reduce, weights, spec)
    scattered = [torch.stack([w, w], -1)[..., 0] for w in weights]
    assert not any(w.is_contiguous() for w in scattered if w.numel() > 1)
    assert torch.equal(
        skip_net(images.transpose(2, 3).contiguous().transpose(2, 3), normal, reduce, scattered, spec), wanted
    )


def test_second_derivative_is_refused():
    args = arguments()
    (g, _) = gradients(*args, create_graph=True)
    with pytest.raises(RuntimeError, match=r"skip_net: .* first derivatives only.*use_backend\('reference'\)"):
        torch.autograd.grad(g.sum(), args[1], allow_unused=True)


GUARD = 64


def run(arguments, with_weights):
    """One pass of the core by itself, in an arena of NaN with a guard behind it: the core, the arena as forward and as
    backward left it, and the logits and gradients of edges and weights, which begin as NaN too."""
    images, normal, reduce, weights, spec = arguments
    B, channels, H, W = images.shape
    classes, nan = weights[-1].numel(), float("nan")
    core = kernels._backend.core().SkipNet(B, H, W, channels, *spec, classes, 0)
    arena = torch.full((core.arena_floats() + GUARD,), nan)
    logits, edges = torch.full((B, classes), nan), [torch.full((14,), nan) for _ in range(2)]
    grads = [torch.full(w.shape, nan) for w in weights] if with_weights else []
    pointers, shared = [w.data_ptr() for w in weights], (normal.data_ptr(), reduce.data_ptr())
    core.forward(arena.data_ptr(), with_weights, images.data_ptr(), pointers, *shared, logits.data_ptr(), 2)
    left, d_logits = arena.clone(), logits.cos()
    out = (edges[0].data_ptr(), edges[1].data_ptr(), [g.data_ptr() for g in grads])
    core.backward(arena.data_ptr(), images.data_ptr(), pointers, *shared, d_logits.data_ptr(), *out, 2)
    return core, (left, arena), [logits, *edges, *grads]


@pytest.mark.parametrize("cells", range(3, 10))
@pytest.mark.parametrize(("C", "k"), [(8, 4), (16, 1), (48, 8)])
def test_the_arena_holds_either_kind_of_pass(C, k, cells):
    """With NaN behind and in it: nothing is read that was not written, nothing written behind the end, and the bytes
    are those of a pass in the memory that the package takes."""
    images, normal, reduce, weights, spec = arguments(B=2, spec=NetSpec(C, cells, k))
    kernels.release_memory()
    for with_weights in (False, True):
        weights = [w.detach().requires_grad_(with_weights) for w in weights]
        _, arenas, found = run((images, normal, reduce, weights, spec), with_weights)
        assert all(t.isfinite().all() for t in found)
        assert all(arena[-GUARD:].isnan().all() for arena in arenas)
        logits = skip_net(images, normal, reduce, weights, spec)
        wanted = torch.autograd.grad(logits.sin().sum(), [normal, reduce, *(weights if with_weights else [])])
        assert all(torch.equal(a, b) for a, b in zip(found, [logits, *wanted], strict=True))


def raw_and_windows(net, images):
    """Floats of the raw outputs of all convolutions but the stem's, whose size batch norm keeps, and, for each of the
    windows of a reduction cell's inputs, of one pixel and of what is processed of two."""
    sizes = []

    def add_windows(_module, _inputs, output):
        sizes.append(output.numel() // 4 + 2 * output[:, : output.shape[1] // net.cells[0].k].numel() // 4)

    for module in net.cells.modules():
        if isinstance(module, ReLUConvBN | FactorizedReduce):
            module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.numel()))
    for cell in net.cells:
        for module in (cell.preprocess0, cell.preprocess1) if cell.reduction else ():
            module.register_forward_hook(add_windows)
    with kernels.use_backend("reference"), torch.no_grad():
        net(images)
    return sum(sizes)


def padded(n):
    return -(-n // 16) * 16


def saved(spec, pixels):
    """The same from the sizes alone, each cell's inputs, the paths that start at one input, and the maxima of windows
    padded to whole vectors of 16 channels."""
    C, total = spec.channels, 0
    for cell in range(spec.cells):
        reduction = cell in (spec.cells // 3, 2 * spec.cells // 3)
        C *= 1 + reduction
        total += pixels * 2 * padded(C)
        if reduction:
            pixels //= 4
            total += pixels * 2 * (padded(4 * C // spec.k) + padded(C) + 2 * C // spec.k)
    return total


@pytest.mark.parametrize("cells", [3, 4, 5, 8])
@pytest.mark.parametrize(("C", "k"), [(16, 1), (16, 4), (16, 8), (32, 2), (48, 4), (6, 1), (12, 2), (8, 8)])
def test_saved_are_the_raw_outputs_and_their_windows(C, k, cells):
    """What forward leaves for backward: the raw outputs of the 1x1 convolutions (the stem's is computed again) and, of
    what reduction cells read, the maxima of windows, which keep the place of the channels that are not pooled, and the
    two pixels of each window whose other channels are processed. Padding enters only where channels do not fill whole
    vectors. It is all that forward writes into the arena."""
    args = arguments(B=3, spec=NetSpec(C, cells, k))
    core, (left, _), _ = run(args, True)
    wanted = saved(args[-1], args[0][:, 0].numel())
    assert core.saved_floats() == wanted == int(left.isfinite().sum())
    assert (raw_and_windows(SuperNet(5, *args[-1]), args[0]) == wanted) == (C % 16 == 0)
