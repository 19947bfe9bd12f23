"""A cell of mixed nodes in one operation: equal to its nodes one by one, threads, memory, wrong calls."""

import pytest
import torch
from ftso_fast.kernels import _memory, mixed_cell, mixed_weights, partial_mix, testing
from ftso_fast.kernels.mixed_cell import reference, strides_of

from ftso_fast import kernels

EIGHT = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
         "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")  # fmt: skip
FULL = tuple(tuple(range(j + 2)) for j in range(4))
PRUNED = ((0, 1), (0, 2), (1, 3), (2, 4))
ONE_INPUT = ((1,), (1, 2), (2,))  # state 0 has no reader
CASES = [
    (FULL, EIGHT, False, 4, 16, 8),
    (FULL, EIGHT, True, 4, 16, 8),
    (FULL, ("max_pool_3x3",), True, 4, 16, 8),
    (FULL, ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"), True, 2, 8, 12),
    (PRUNED, EIGHT, True, 1, 6, 8),
    (PRUNED, EIGHT, False, 2, 12, 9),
    (ONE_INPUT, EIGHT, True, 4, 16, 6),
]


def drawn(inputs, operators, reduction, k, C, size, B=3, seed=0):
    """x0, x1, edge weights, operator weights, weights."""
    g = torch.Generator().manual_seed(seed)
    edges = [s for own in strides_of(inputs, reduction) for s in own]
    shapes = [s for edge in mixed_weights(C, k, operators, edges) for own in edge for s in own]
    x0, x1 = (torch.randn(B, C, size, size, generator=g) for _ in range(2))
    alphas = torch.rand(len(edges), len(operators), generator=g) + 0.1
    weights = [torch.randn(s, generator=g) / s[1] ** 0.5 for s in shapes]
    return [x0, x1, torch.rand(len(edges), generator=g) + 0.1, alphas, *weights]


def values(call, tensors, dtype=torch.float32):
    """The output and every gradient under a fixed output gradient, itself a part of a wider tensor."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = call(*leaves[:4], leaves[4:])
    grad = torch.arange(2 * out.numel(), dtype=torch.float64).mul(0.7548776662466927).frac().sub(0.4).to(dtype)
    wide = grad.view(out.shape[0], 2 * out.shape[1], *out.shape[2:])[:, 1::2]
    found = torch.autograd.grad(out, leaves, wide, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if d is None else d for t, d in zip(leaves, found, strict=True))]


def of(case, function=mixed_cell):
    inputs, operators, reduction, k, *_ = case
    return lambda x0, x1, edges, alphas, weights: function(
        x0, x1, edges, alphas, weights, operators, inputs, reduction, k
    )


def node_by_node(x0, x1, edges, alphas, weights, operators, inputs, reduction, k):
    """The same from `partial_mix`."""
    states, edge, weight = [x0, x1], 0, 0
    for own, strides in zip(inputs, strides_of(inputs, reduction), strict=True):
        n = sum(len(o) for e in mixed_weights(x0.shape[1], k, operators, strides) for o in e)
        rows = slice(edge, edge + len(own))
        mine = weights[weight : weight + n]
        states.append(partial_mix([states[i] for i in own], edges[rows], alphas[rows], mine, operators, strides, k))
        edge, weight = edge + len(own), weight + n
    return torch.cat(states[2:], 1)


def relative(got, want):
    """The largest relative error; masks that rounding turns, rare in cells as small as these, would show in it."""
    return max(float((g - w).norm() / w.norm().clamp_min(1e-12)) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_equals_its_nodes_and_the_reference(case, isa, verified):
    tensors = drawn(*case)
    want = values(of(case, reference), tensors, torch.float64)
    with testing.arm("cpu", isa):
        got = values(of(case), tensors)
        nodes = values(of(case, node_by_node), tensors)
    assert all(a.shape == b.shape for a, b in zip(got, want, strict=True))
    # one node after another is the same arithmetic but for the order in which a state's gradients are added up
    assert torch.equal(got[0], nodes[0])
    assert relative(got, nodes) < 1e-4
    plain = relative(values(of(case, reference), tensors), want)
    assert relative(got, want) < max(4 * plain, 1e-5)
    verified("mixed_cell", "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_meets_a_sentence(dtype, refuses):
    x0, x1, edges, alphas, *weights = (t.to(dtype) for t in drawn(*CASES[0]))
    with kernels.use_backend("cpu"), pytest.raises(kernels.BackendError, match=f"expected float32, got {dtype}"):
        of(CASES[0])(x0, x1, edges, alphas, weights)
    refuses("mixed_cell", "cpu", dtype)


def test_the_comparison_can_fail():
    case = CASES[0]
    tensors = drawn(*case)
    want = values(of(case, reference), tensors, torch.float64)
    tensors[3] = tensors[3].flip(1)
    with testing.arm("cpu", None):
        assert relative(values(of(case), tensors), want) > 1e-2


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_no_memory_is_left_unwritten(case, monkeypatch):
    tensors = drawn(*case)
    with testing.arm("cpu", None):
        want = values(of(case), tensors)
    monkeypatch.setattr(_memory, "pooled", lambda *shape: torch.full(shape, float("nan")))
    with testing.arm("cpu", None):
        got = values(of(case), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_same_bytes_on_any_number_of_threads_and_again(isa):
    case = CASES[1]
    tensors, threads, found = drawn(*case, B=19), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            with testing.arm("cpu", isa):
                found.append(values(of(case), tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_needs_no_gradient_gets_none():
    case = CASES[0]
    leaves = drawn(*case)
    for t in leaves[2:4]:
        t.requires_grad_()
    with testing.arm("cpu", None):
        mixed_cell(*leaves[:4], leaves[4:], case[1], case[0], case[2], case[3]).sum().backward()
    assert [t.grad is not None for t in leaves] == [False, False, True, True, *[False] * (len(leaves) - 4)]


def test_opcheck():
    inputs, operators, reduction, k, *_ = case = CASES[4]
    x0, x1, edges, alphas, *weights = (t.requires_grad_() for t in drawn(*case, B=2))
    flat, counts = [i for own in inputs for i in own], [len(own) for own in inputs]
    chosen = [EIGHT.index(o) for o in operators]
    arguments = (x0, x1, edges, alphas, weights, chosen, flat, counts, reduction, k)
    torch.library.opcheck(torch.ops.ftso_fast.mixed_cell.default, arguments)


def test_a_second_derivative_meets_a_sentence():
    case = CASES[0]
    leaves = [t.requires_grad_() for t in drawn(*case)]
    with testing.arm("cpu", None):
        out = mixed_cell(*leaves[:4], leaves[4:], case[1], case[0], case[2], case[3])
        first = torch.autograd.grad(out.square().sum(), leaves[2], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


def wrong(**changes):
    inputs, operators, reduction, k, *_ = CASES[1]
    x0, x1, edges, alphas, *weights = drawn(*CASES[1])
    given = {"x0": x0, "x1": x1, "edge_weights": edges, "operator_weights": alphas, "weights": weights}
    given |= {"operators": operators, "inputs": inputs, "reduction": reduction, "k": k} | changes
    return given


@pytest.mark.parametrize(
    ("sentence", "changes"),
    [
        ("x1: expected shape", {"x1": torch.zeros(3, 16, 4, 8)}),
        (r"x0: expected shape \(B, C, H, W\)", {"x0": torch.zeros(3, 16, 8), "x1": torch.zeros(3, 16, 8)}),
        ("expected an even height and width", {"x0": torch.zeros(3, 16, 7, 7), "x1": torch.zeros(3, 16, 7, 7)}),
        ("inputs: expected at least one node", {"inputs": ()}),
        (r"inputs\[0\]: expected states from 0 to 1", {"inputs": ((0, 2),)}),
        (r"inputs\[0\]: expected different states", {"inputs": ((1, 1),)}),
        (r"edge_weights: expected shape \(14,\)", {"edge_weights": torch.ones(13)}),
        (r"operator_weights: expected shape \(14, 8\)", {"operator_weights": torch.ones(14, 7)}),
        (r"operators\[0\]: expected one of none, .*, got 'relu_conv_bn'", {"operators": ("relu_conv_bn",)}),
        ("k: expected a divisor of the 16 channels, got 3", {"k": 3}),
        ("weights: expected 200 tensors|weights: expected [0-9]+ tensors, got 0", {"weights": []}),
    ],
)
def test_wrong_calls_meet_a_sentence_before_a_kernel(sentence, changes):
    before = kernels.calls()
    with pytest.raises((ValueError, TypeError), match=f"mixed_cell: .*({sentence})"):
        mixed_cell(**wrong(**changes))
    assert kernels.calls() == before


RAW = [
    (5, [99], "operators: expected numbers from 0 to 9"),
    (5, [-1], "operators: expected numbers from 0 to 9"),
    (7, [2, 3, 4, 6], "counts: expected positive numbers that sum to the 14 inputs"),
    (7, [0, 5, 4, 5], "counts: expected positive numbers"),
    (6, [0, 9, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4], r"inputs\[0\]: expected states from 0 to 1"),
    (0, torch.zeros(3, 16, 9, 8), "x1: expected shape"),
    (2, torch.zeros(14, dtype=torch.float64), "expected torch.float32"),
    (4, [], "weights: expected"),
]


@pytest.mark.parametrize(("at", "value", "sentence"), RAW)
def test_the_operation_by_itself_refuses_as_well(at, value, sentence):
    x0, x1, edges, alphas, *weights = drawn(*CASES[1])
    flat, counts = [i for own in FULL for i in own], [len(own) for own in FULL]
    arguments = [x0, x1, edges, alphas, weights, list(range(8)), flat, counts, True, 4]
    arguments[at] = value
    before = kernels.calls()
    with pytest.raises((ValueError, TypeError), match=sentence):
        torch.ops.ftso_fast.mixed_cell(*arguments)
    assert kernels.calls() == before


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_backward_operation_refuses_what_does_not_fit(which):
    x0, x1, edges, alphas, *weights = drawn(*CASES[1])
    flat, counts = [i for own in FULL for i in own], [len(own) for own in FULL]
    arguments = [x0, x1, edges, alphas, weights, list(range(8)), flat, counts, True, 4]
    out, saved = torch.ops.ftso_fast.mixed_cell(*arguments)
    given = [torch.zeros_like(out), out, saved]
    given[which] = given[which][:-1]
    before = kernels.calls()
    with pytest.raises(ValueError, match=r"mixed_cell_bwd: .*: expected torch.float32 of shape"):
        torch.ops.ftso_fast.mixed_cell_bwd(*given, *arguments, [True, True], True)
    assert kernels.calls() == before
