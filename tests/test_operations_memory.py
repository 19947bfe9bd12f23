"""What operations write, read, keep and leave uncomputed: guards of NaN, threads, pooled memory, unwanted gradients."""

import math

import pytest
import torch
from ftso_fast.kernels import _backend, _memory, _node, testing
from ftso_fast.kernels.cases import dropped_paths

from ftso_fast import kernels

CASES = [case for case in testing.CASES if case.op != "skip_cell"]
POOLS_OF_PAIRS = testing.Case("partial_mix", 33, 4, 8, 8, 2, operators=("max_pool_3x3", "avg_pool_3x3"), strides=(1, 1))
BY_NAME = {str(case): case for case in CASES}
GUARD = 64


def computed(case, tensors=None):
    operation = testing.OPERATIONS[case.op]
    tensors = operation.inputs(case, 0) if tensors is None else tensors
    return testing.values_and_gradients(operation.function, tensors, case)


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


SOME = [
    "partial_mix-2x16x14x28-k4-s2121",
    "partial_mix-2x6x14x14-k1-s21",
    "partial_mix-17x8x6x10-k4-s22-channels_last",
    "sep_conv_5x5-2x12x28x28-second",
    "dil_conv_3x3-2x6x14x14-to10-affine-last",
    "factorized_reduce-3x8x14x6-s2-to16-affine",
    "relu_conv_bn-3x8x9x9-to12-affine",
]


@pytest.mark.parametrize("name", SOME)
def test_same_bytes_on_any_number_of_threads_and_again(name, isa):
    case, threads, found = BY_NAME[name], torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8, 2, 2, 1):
            torch.set_num_threads(n)
            found.append(computed(case))
    finally:
        torch.set_num_threads(threads)
    assert all(equal(other, found[0]) for other in found[1:])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_value_is_written_whatever_memory_held(case, isa, monkeypatch):
    wanted = computed(case)
    monkeypatch.setattr(_memory, "pooled", lambda *shape: torch.full(shape, float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: torch.full(*shape, float("nan")))
    found = computed(case)
    assert all(t.isfinite().all() for t in found)
    assert equal(found, wanted)


@pytest.mark.usefixtures("one_thread")
def test_pooled_memory_and_fresh_memory_give_equal_bytes(monkeypatch):
    """Large enough to be pooled: what earlier calls left there shows nowhere."""
    case = testing.Case("partial_mix", 24, 16, 32, 32, 4, testing.OPERATIONS["partial_mix"].cases[0].operators)
    tensors = testing.OPERATIONS[case.op].inputs(case, 0)
    pooled = [computed(case, tensors) for _ in range(3)]
    sizes = []
    monkeypatch.setattr(_memory, "pooled", lambda *shape: (sizes.append(math.prod(shape)), torch.empty(shape))[1])
    assert all(equal(found, computed(case, tensors)) for found in pooled)
    assert max(sizes) >= _memory.SMALL


def guarded(t, left):
    """A copy between NaN: the buffer, and the address of the copy."""
    buffer = torch.full((t.numel() + 2 * GUARD,), float("nan"))
    if left:
        buffer[GUARD:-GUARD] = t.flatten()
    return buffer, buffer[GUARD:].data_ptr()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", [*(c for c in CASES if not c.view), POOLS_OF_PAIRS], ids=str)
def test_nothing_around_a_buffer_is_read_or_written(case, isa):
    tensors = testing.OPERATIONS[case.op].inputs(case, 0)
    wanted = computed(case, tensors)
    n = len(case.strides)
    mixed = case.op == "partial_mix"
    edges = tensors[n : n + 2] if mixed else (torch.ones(n), torch.ones(n, 1))
    rest = tensors[n + 2 :] if mixed else tensors[n:]
    weights, affine = [t for t in rest if t.dim() == 4], [t for t in rest if t.dim() == 1]
    out, core = wanted[0], _backend.core()
    sizes = [(x.shape[2], x.shape[3], s) for x, s in zip(tensors, case.strides, strict=False)]
    N = (case.C_out or case.C) // case.k
    operators = [_node.NAMES.index(o) for o in case.operators] * (n if mixed else 1)
    plan = core.Node(case.B, case.C, N, case.k, operators, sizes)
    grad = torch.arange(out.numel(), dtype=torch.float64).mul_(0.7548776662466927).frac_().sub_(0.4).float()
    dropped = [dropped_paths(case)] if case.op == "node_sum" and case.affine else []
    originals = (*tensors[:n], *edges, *weights, *affine, grad, *dropped)
    given = [guarded(t, True) for t in originals]
    shapes = [out, *tensors[:n], *edges, *weights, *affine]
    written = [guarded(t, False) for t in shapes]
    saved, work = (guarded(torch.empty(f), False) for f in (plan.saved_floats(), plan.work_floats()))

    def view(buffer, t):
        return buffer[1], t.shape[1] * t.shape[2] * t.shape[3], t.shape[2] * t.shape[3]

    states = [view(b, t) for b, t in zip(given, tensors[:n], strict=False)]
    at = [address for _, address in given[n:]]
    split, end = 2 + len(weights), 2 + len(weights) + len(affine)
    arguments = (states, at[0], at[1], at[-1] if dropped else 0, at[2:split], at[split:end])
    to = [address for _, address in written]
    plan.forward(*arguments, view(written[0], out), saved[1], 2)
    d_states = [view(b, t) for b, t in zip(written[1:], tensors[:n], strict=False)]
    d = to[1 + n :]
    backward = (view(given[n + end], out), saved[1], work[1], d_states, d[0], d[1], d[2:split], d[split:], [], 2)
    plan.backward(*arguments, *backward)
    found = [buffer[GUARD:-GUARD].view(t.shape) for (buffer, _), t in zip(written, shapes, strict=True)]
    if not mixed:
        del found[1 + n : 3 + n]
    assert equal(found, wanted)
    for buffer, _ in (*written, saved, work, *given):
        assert buffer[:GUARD].isnan().all()
        assert buffer[-GUARD:].isnan().all()
    for (buffer, _), t in zip(given, originals, strict=True):
        assert torch.equal(buffer[GUARD:-GUARD], t.flatten()), "an input changed"


@pytest.mark.parametrize("name", ["partial_mix-2x16x14x28-k4-s2121", "partial_mix-2x6x14x14-k1-s21"])
@pytest.mark.parametrize("wanted", ["states", "first state", "last state", "architecture", "weights", "one weight"])
def test_only_what_is_asked_for_is_computed(name, wanted, isa, monkeypatch):
    case = BY_NAME[name]
    tensors = testing.OPERATIONS[case.op].inputs(case, 0)
    n, m = len(case.strides), len(tensors)
    which = {"states": range(n), "first state": [0], "last state": [n - 1], "architecture": [n, n + 1]}
    which |= {"weights": range(n + 2, m), "one weight": [m - 1]}
    asked = [i in which[wanted] for i in range(m)]
    _, *every = computed(case, tensors)
    backward, told = _node.backward, []

    def watched(*args):
        told.append((args, backward(*args)))
        return told[-1][1]

    monkeypatch.setattr(_node, "backward", watched)
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, asked, strict=True)]
    out = testing.OPERATIONS[case.op].call(kernels.partial_mix, case, leaves)
    grad = torch.arange(out.numel(), dtype=torch.float64).mul_(0.7548776662466927).frac_().sub_(0.4)
    out.backward(grad.float().view(out.shape))
    for leaf, need, g in zip(leaves, asked, every, strict=True):
        assert (leaf.grad is not None) == need
        assert leaf.grad is None or torch.equal(leaf.grad, g)
    (((_, needs, needs_weights, *_), (d_states, _, _, d_weights, _)),) = told
    assert list(needs) == [d.numel() > 0 for d in d_states] == asked[:n]
    assert needs_weights == any(asked[n + 2 :]) == all(d.numel() > 0 for d in d_weights)


@pytest.mark.parametrize(
    "name", ["sep_conv_3x3-2x5x7x7", "partial_mix-2x16x8x8-k4-s11", "node_sum-5x4x8x8-ops44-s11-affine"]
)
def test_outputs_in_lent_memory_may_be_changed_in_place(name, monkeypatch):
    monkeypatch.setattr(_memory, "SMALL", 1)
    case = BY_NAME[name]
    operation = testing.OPERATIONS[case.op]
    leaves = [t.requires_grad_() for t in operation.inputs(case, 0)]
    with testing.arm("cpu", kernels.isa()):
        one, other = (operation.call(operation.function, case, leaves) for _ in range(2))
        wanted = torch.autograd.grad(one.relu().sum(), leaves, materialize_grads=True)
        found = torch.autograd.grad(other.relu_().sum(), leaves, materialize_grads=True)
    assert equal(found, wanted)


def test_without_gradients_nothing_is_kept_for_backward():
    case = BY_NAME["sep_conv_3x3-2x5x7x7"]
    tensors = testing.OPERATIONS[case.op].inputs(case, 0)
    out = testing.OPERATIONS[case.op].call(kernels.sep_conv, case, tensors)
    assert out.grad_fn is None
    before = kernels.calls()
    leaves = [t.requires_grad_() for t in tensors]
    out = testing.OPERATIONS[case.op].call(kernels.sep_conv, case, leaves)
    out.sum().detach()
    assert not any(n != before.get(name, 0) for name, n in kernels.calls().items() if "bwd" in name)
