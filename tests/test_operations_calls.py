"""Wrong calls of the operations with batch norms: a sentence with operation, argument, expected, got; no kernel."""

import pytest
import torch
from ftso_fast.kernels import cases, testing

from ftso_fast import kernels

ALL = cases.ALL
X, HALF = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 3, 3)
E, O = torch.rand(2), torch.rand(2, 8)  # noqa: E741
W = [torch.randn(s) for edge in kernels.mixed_weights(8, 4, ALL, (2, 1)) for own in edge for s in own]
D, P = torch.randn(8, 1, 3, 3), torch.randn(8, 8, 1, 1)
A = torch.rand(8)


def replaced(things, i, new):
    return [*things[:i], new, *things[i + 1 :]]


MIX = {"inputs": [X, HALF], "edge_weights": E, "operator_weights": O, "weights": W}
MIX |= {"operators": ALL, "strides": (2, 1), "k": 4}
BAD_MIX = {
    "inputs-none": ({"inputs": []}, "inputs: expected at least one state, got none"),
    "inputs-tensor": ({"inputs": X}, "inputs: expected a list of tensors, got Tensor"),
    "inputs-None": ({"inputs": [X, None]}, r"inputs\[1\]: expected a tensor, got NoneType"),
    "inputs-dims": ({"inputs": [X[0], HALF]}, r"inputs\[0\]: expected shape \(B, C, H, W\), got \(8, 6, 6\)"),
    "inputs-empty": ({"inputs": [X[:0], HALF[:0]]}, r"inputs\[0\]: expected no empty dimension"),
    "inputs-type": ({"inputs": [X.int(), HALF]}, r"inputs\[0\]: expected a floating type, got torch\.int32"),
    "inputs-types": ({"inputs": [X, HALF.double()]}, r"inputs\[1\]: expected torch\.float32 .* torch\.float64"),
    "inputs-device": ({"inputs": [X, HALF.to("meta")]}, r"inputs\[1\]: expected torch\.float32 on cpu, got .* meta"),
    "inputs-sparse": ({"inputs": [X.to_sparse(), HALF]}, r"inputs\[0\]: expected a dense tensor, got"),
    "inputs-sizes": ({"inputs": [X, X]}, r"inputs\[1\]: expected a state that gives \(2, 8, 3, 3\) at stride 1"),
    "inputs-batch": ({"inputs": [X, HALF[:1]]}, r"inputs\[1\]: expected a state that gives \(2, 8, 3, 3\)"),
    "inputs-odd": ({"inputs": [X[:, :, 1:], HALF]}, r"inputs\[0\]: expected an even height and width at stride 2"),
    "strides-many": ({"strides": (2, 1, 1)}, "strides: expected one for each of the 2 inputs, got 3"),
    "strides-3": ({"strides": (3, 1)}, r"strides\[0\]: expected 1 or 2, got 3"),
    "strides-0": ({"strides": (2, 0)}, r"strides\[1\]: expected 1 or 2, got 0"),
    "strides-bool": ({"strides": (2, True)}, r"strides\[1\]: expected 1 or 2, got True"),
    "strides-float": ({"strides": (2.0, 1)}, r"strides\[0\]: expected 1 or 2, got 2\.0"),
    "operators-none": ({"operators": ()}, "operators: expected different names, at least one, got"),
    "operators-str": ({"operators": "none"}, "operators: expected different names, at least one, got 'none'"),
    "operators-twice": ({"operators": ("none", "none")}, "operators: expected different names"),
    "operators-unknown": ({"operators": ("conv",)}, r"operators\[0\]: expected one of none, .*, got 'conv'"),
    "operators-other": ({"operators": ("relu_conv_bn",)}, r"operators\[0\]: expected one of none"),
    "operators-number": ({"operators": (0,)}, r"operators\[0\]: expected one of none, .*, got 0"),
    "k-3": ({"k": 3}, "k: expected a divisor of the 8 channels, got 3"),
    "k-0": ({"k": 0}, "k: expected a divisor of the 8 channels, got 0"),
    "k-negative": ({"k": -4}, "k: expected a divisor of the 8 channels, got -4"),
    "k-float": ({"k": 4.0}, r"k: expected a divisor of the 8 channels, got 4\.0"),
    "k-bool": ({"k": True}, "k: expected a divisor of the 8 channels, got True"),
    "k-one-channel": ({"k": 8}, "k: expected an even number of processed channels"),
    "edges-shape": ({"edge_weights": torch.rand(3)}, r"edge_weights: expected shape \(2,\), got \(3,\)"),
    "edges-dims": ({"edge_weights": E[None]}, r"edge_weights: expected shape \(2,\), got \(1, 2\)"),
    "edges-type": ({"edge_weights": E.double()}, r"edge_weights: expected torch\.float32"),
    "edges-None": ({"edge_weights": None}, "edge_weights: "),
    "alphas-shape": ({"operator_weights": O[:, :7]}, r"operator_weights: expected shape \(2, 8\), got \(2, 7\)"),
    "alphas-flat": ({"operator_weights": O[0]}, r"operator_weights: expected shape \(2, 8\), got \(8,\)"),
    "alphas-type": ({"operator_weights": O.half()}, r"operator_weights: expected torch\.float32"),
    "weights-few": ({"weights": W[:-1]}, f"weights: expected {len(W)} tensors, got {len(W) - 1}"),
    "weights-many": ({"weights": [*W, W[0]]}, f"weights: expected {len(W)} tensors, got {len(W) + 1}"),
    "weights-none": ({"weights": []}, f"weights: expected {len(W)} tensors, got 0"),
    "weights-order": ({"weights": W[::-1]}, r"weights\[0\]: expected shape \(1, 2, 1, 1\), got"),
    "weights-shape": ({"weights": replaced(W, 3, W[3][:1])}, r"weights\[3\]: expected shape \(2, 2, 1, 1\)"),
    "weights-type": ({"weights": replaced(W, 3, W[3].double())}, r"weights\[3\]: expected torch\.float32"),
    "weights-device": ({"weights": replaced(W, 3, W[3].to("meta"))}, r"weights\[3\]: expected torch\.float32 on cpu"),
    "weights-None": ({"weights": replaced(W, 3, None)}, r"weights"),
}


def refused(call, message, kinds=(ValueError, TypeError, RuntimeError)):
    before = kernels.calls()
    with pytest.raises(kinds, match=message):
        call()
    assert kernels.calls() == before


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", BAD_MIX)
def test_bad_call_of_a_mixed_node(name, backend):
    change, message = BAD_MIX[name]
    with kernels.use_backend(backend):
        refused(lambda: kernels.partial_mix(**{**MIX, **change}), f"partial_mix.*{message}")


SEP, DIL, RCB, FR = kernels.sep_conv, kernels.dil_conv, kernels.relu_conv_bn, kernels.factorized_reduce
HALF_P = P[:4]
BAD = {
    "sep-no-weights": (SEP, (X, []), r"sep_conv: weights\[0\]: expected shape \(C, 1, K, K\) with K 3 or 5, got \(\)"),
    "sep-tensor": (SEP, (X, D), "sep_conv: weights: expected a list of tensors, got Tensor"),
    "sep-None": (SEP, (X, [None] * 4), r"sep_conv: weights\[0\]: expected shape"),
    "sep-None-last": (SEP, (X, [D, P, D, None]), r"sep_conv: weights\[3\]: expected a tensor, got NoneType"),
    "sep-7x7": (SEP, (X, [torch.randn(8, 1, 7, 7), P, D, P]), r"weights\[0\]: .* got \(8, 1, 7, 7\)"),
    "sep-3x5": (SEP, (X, [torch.randn(8, 1, 3, 5), P, D, P]), r"weights\[0\]: .* got \(8, 1, 3, 5\)"),
    "sep-few": (SEP, (X, [D, P]), "sep_conv: weights: expected 4 tensors, got 2"),
    "sep-mixed": (SEP, (X, [D, P, torch.randn(8, 1, 5, 5), P]), r"weights\[2\]: expected shape \(8, 1, 3, 3\)"),
    "sep-inner": (SEP, (X, [D, HALF_P, D, P]), r"weights\[1\]: expected shape \(8, 8, 1, 1\), got \(4, 8, 1, 1\)"),
    "sep-channels": (SEP, (X[:, :4], [D, P, D, P]), r"weights\[0\]: expected shape \(4, 1, 3, 3\)"),
    "sep-no-output": (SEP, (X, [D, P, D, P[:0]]), r"weights\[3\]: expected output channels, got shape \(0, 8, 1, 1\)"),
    "sep-scalar": (SEP, (X, [D, P, D, torch.tensor(1.0)]), r"weights\[3\]: expected output channels, got shape \(\)"),
    "sep-affine-few": (SEP, (X, [D, P, D, P], [A, A]), "sep_conv: affine: expected 4 tensors, got 2"),
    "sep-affine-shape": (SEP, (X, [D, P, D, P], [A, A, A, A[:4]]), r"affine\[3\]: expected shape \(8,\), got \(4,\)"),
    "sep-affine-type": (SEP, (X, [D, P, D, P], [A, A, A, A.double()]), r"affine\[3\]: expected torch\.float32"),
    "sep-affine-tensor": (SEP, (X, [D, P, D, P], A), "sep_conv: affine: expected a list of tensors, got Tensor"),
    "sep-stride-3": (SEP, (X, [D, P, D, P], (), 3), r"sep_conv: strides\[0\]: expected 1 or 2, got 3"),
    "sep-stride-bool": (SEP, (X, [D, P, D, P], (), True), r"sep_conv: strides\[0\]: expected 1 or 2, got True"),
    "sep-x-dims": (SEP, (X[0], [D, P, D, P]), r"sep_conv: x: expected shape \(B, C, H, W\), got \(8, 6, 6\)"),
    "sep-x-type": (SEP, (X.long(), [D, P, D, P]), r"sep_conv: x: expected a floating type, got torch\.int64"),
    "sep-x-None": (SEP, (None, [D, P, D, P]), "sep_conv: x: expected a tensor, got NoneType"),
    "sep-x-empty": (SEP, (X[:, :, :0], [D, P, D, P]), r"sep_conv: x: expected no empty dimension, got \(2, 8, 0, 6\)"),
    "dil-few": (DIL, (X, [D]), "dil_conv: weights: expected 2 tensors, got 1"),
    "dil-many": (DIL, (X, [D, P, D, P]), "dil_conv: weights: expected 2 tensors, got 4"),
    "dil-type": (DIL, (X, [D.double(), P]), r"dil_conv: weights\[0\]: expected torch\.float32 on cpu"),
    "dil-groups": (DIL, (X, [torch.randn(8, 8, 3, 3), P]), r"dil_conv: weights\[0\]: expected shape \(8, 1, 3, 3\)"),
    "dil-kernel": (DIL, (X, [D, torch.randn(8, 8, 3, 3)]), r"dil_conv: weights\[1\]: expected shape \(8, 8, 1, 1\)"),
    "dil-affine": (DIL, (X, [D, P], [A]), "dil_conv: affine: expected 2 tensors, got 1"),
    "rcb-shape": (RCB, (X, torch.randn(8, 4, 1, 1)), r"relu_conv_bn: weights\[0\]: expected shape \(8, 8, 1, 1\)"),
    "rcb-kernel": (RCB, (X, torch.randn(8, 8, 3, 3)), r"relu_conv_bn: weights\[0\]: expected shape \(8, 8, 1, 1\)"),
    "rcb-None": (RCB, (X, None), r"relu_conv_bn: weights\[0\]: expected a tensor, got NoneType"),
    "rcb-type": (RCB, (X, P.double()), r"relu_conv_bn: weights\[0\]: expected torch\.float32"),
    "rcb-device": (RCB, (X, P.to("meta")), r"relu_conv_bn: weights\[0\]: expected torch\.float32 on cpu"),
    "rcb-affine": (RCB, (X, P[:4], [A, A]), r"relu_conv_bn: affine\[0\]: expected shape \(4,\), got \(8,\)"),
    "fr-odd": (FR, (X[:, :, 1:], HALF_P, HALF_P), "factorized_reduce: x: expected an even height and width"),
    "fr-halves": (FR, (X, P, HALF_P), r"factorized_reduce: weights\[0\]: expected shape \(4, 8, 1, 1\)"),
    "fr-channels": (FR, (X[:, :4], HALF_P, HALF_P), r"factorized_reduce: weights\[0\]: expected shape \(4, 4, 1, 1\)"),
    "fr-None": (FR, (X, HALF_P, None), r"factorized_reduce: weights\[1\]: expected a tensor, got NoneType"),
    "fr-affine": (FR, (X, HALF_P, HALF_P, [A[:4], A[:4]]), r"factorized_reduce: affine\[0\]: expected shape \(8,\)"),
}


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_call_of_an_operation(name, backend):
    operation, args, message = BAD[name]
    with kernels.use_backend(backend):
        refused(lambda: operation(*args), message)


RAW = [[X, HALF], E, O, W, [], list(range(8)), [2, 1], 4]
OPS = torch.ops.ftso_fast
BAD_RAW = {
    "inputs-none": ({0: []}, "inputs: expected at least one state, got none"),
    "inputs-sizes": ({0: [X, X]}, r"inputs\[1\]: expected a state that gives"),
    "inputs-dims": ({0: [X[0], HALF]}, r"inputs\[0\]: expected shape"),
    "inputs-double": ({0: [X.double(), HALF.double()]}, "inputs: the cpu backend expected float32, got torch.float64"),
    "inputs-types": ({0: [X, HALF.double()]}, r"inputs\[1\]: expected torch\.float32"),
    "inputs-empty": ({0: [X[:0], HALF[:0]]}, r"inputs\[0\]: expected no empty dimension"),
    "inputs-odd": ({0: [X[:, :, :, 1:], HALF]}, "expected an even height and width at stride 2"),
    "edges-shape": ({1: E[:1]}, r"edge_weights: expected shape \(2,\), got \(1,\)"),
    "edges-type": ({1: E.double()}, r"edge_weights: expected torch\.float32"),
    "alphas-shape": ({2: O.T.contiguous()}, r"operator_weights: expected shape \(2, 8\), got \(8, 2\)"),
    "weights-few": ({3: W[1:]}, "weights: expected"),
    "weights-none": ({3: []}, "weights: expected"),
    "weights-shape": ({3: replaced(W, 2, W[2][..., :2])}, r"weights\[2\]: expected shape"),
    "weights-scalar": ({3: replaced(W, -1 % len(W), torch.tensor(1.0))}, "weights.*expected shape"),
    "affine-few": ({4: [A[:2]]}, "affine: expected"),
    "operators-none": ({5: []}, "operators: expected different numbers"),
    "operators-twice": ({5: [1, 1]}, "operators: expected different numbers"),
    "operators-10": ({5: [10]}, r"operators\[0\]: expected a number from 0 to 9, got 10"),
    "operators-negative": ({5: [-1]}, r"operators\[0\]: expected a number from 0 to 9, got -1"),
    "operators-mixed": ({5: [8, 1]}, r"operators\[0\]: expected relu_conv_bn alone"),
    "strides-few": ({6: [2]}, "strides: expected one for each of the 2 inputs, got 1"),
    "strides-3": ({6: [3, 1]}, r"strides\[0\]: expected 1 or 2, got 3"),
    "k-0": ({7: 0}, "k: expected a divisor of the 8 channels, got 0"),
    "k-3": ({7: 3}, "k: expected a divisor of the 8 channels, got 3"),
    "k-8": ({7: 8}, "even number"),
}
ONE = torch.ones(1), torch.ones(1, 1)
BAD_ALONE = {
    "reduce-stride": (
        [[X], *ONE, [HALF_P] * 2, [], [9], [1], 1],
        "expected factorized_reduce alone, at k 1 and stride 2",
    ),
    "conv-stride": ([[X], *ONE, [P], [], [8], [2], 1], "expected relu_conv_bn alone, at k 1 and stride 1"),
    "conv-k": ([[X], *ONE, [P], [], [8], [1], 2], "expected relu_conv_bn alone"),
    "no-channels": ([[X], *ONE, [P[:0]], [], [8], [1], 1], "weights: expected them to give channels"),
    "scalar": ([[X], *ONE, [torch.tensor(1.0)], [], [8], [1], 1], "weights: expected them to give channels"),
    "affine": ([[X], *ONE, [P], [A], [8], [1], 1], "affine: expected 2 tensors, got 1"),
    "affine-shape": ([[X], *ONE, [P], [A, A[:2]], [8], [1], 1], r"affine\[1\]: expected shape \(8,\), got \(2,\)"),
    "halves": ([[X], *ONE, [HALF_P, P[:2]], [], [9], [2], 1], r"weights\[0\]: expected shape \(2, 8, 1, 1\)"),
    "odd": ([[X[..., 1:]], *ONE, [HALF_P] * 2, [], [9], [2], 1], "x|inputs.*expected an even height and width"),
}


def on_meta(x):
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    return [on_meta(one) for one in x] if isinstance(x, list) else x


@pytest.mark.parametrize("place", ["cpu", "fake"])
@pytest.mark.parametrize("name", [*BAD_RAW, *BAD_ALONE])
def test_bad_call_of_the_registered_operation(name, place):
    if name in BAD_RAW:
        change, message = BAD_RAW[name]
        args = [change.get(i, value) for i, value in enumerate(RAW)]
    else:
        args, message = BAD_ALONE[name]
    args = args if place == "cpu" else [on_meta(one) for one in args]
    refused(lambda: OPS.partial_mix(*args), f"partial_mix: .*({message})")
    n = len(args[0])
    backward = (X if place == "cpu" else on_meta(X), X.new_empty(4), *args, [True] * n, True)
    refused(lambda: OPS.partial_mix_bwd(*backward), f"partial_mix_bwd: .*({message})")


def test_bad_backward_of_the_registered_operation():
    node, saved = OPS.partial_mix(*RAW)
    good = [node, saved, *RAW, [True, True], True]
    bad = {
        r"grad: expected shape \(2, 8, 3, 3\), got \(2, 8, 6, 6\)": {0: X},
        r"grad: expected torch\.float32": {0: node.double()},
        r"grad: expected shape .* got \(144,\)": {0: node.flatten()},
        rf"saved: expected shape \({len(saved)},\), got \({len(saved) - 1},\)": {1: saved[1:]},
        r"saved: expected shape .* got \(1, ": {1: saved[None]},
        r"saved: expected torch\.float32": {1: saved.double()},
        "needs: expected 2 flags, got 1": {10: [True]},
        "needs: expected 2 flags, got 0": {10: []},
    }
    OPS.partial_mix_bwd(*good)
    for message, change in bad.items():
        args = [change.get(i, value) for i, value in enumerate(good)]
        refused(lambda args=args: OPS.partial_mix_bwd(*args), f"partial_mix_bwd: {message}")
        refused(lambda args=args: OPS.partial_mix_bwd(*map(on_meta, args)), f"partial_mix_bwd: {message}")


def test_saved_floats_may_lie_anywhere():
    node, saved = OPS.partial_mix(*RAW)
    wide = torch.stack((saved, torch.full_like(saved, float("nan"))), 1)
    found = [OPS.partial_mix_bwd(node, s, *RAW, [True, True], True) for s in (saved, wide[:, 0])]
    assert all(torch.equal(a, b) for a, b in zip(found[0][3], found[1][3], strict=True))


def test_backend_asked_for_by_name_never_falls_back():
    x = X.double()
    assert kernels.relu_conv_bn(x, P.double()).dtype == torch.float64  # the automatic choice takes the reference
    with kernels.use_backend("cpu"):
        refused(lambda: kernels.relu_conv_bn(x, P.double()), r"relu_conv_bn: .*expected float32", kernels.BackendError)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", [op for op, operation in testing.OPERATIONS.items() if "cpu" in operation.backends])
def test_half_precision_meets_a_sentence(op, dtype, refuses):
    operation = testing.OPERATIONS[op]
    case = operation.cases[0]
    tensors = [t.to(dtype) for t in operation.inputs(case, 0)]
    with kernels.use_backend("cpu"), pytest.raises(kernels.BackendError, match=f"expected float32, got {dtype}"):
        operation.call(operation.function, case, tensors)
    refuses(op, "cpu", dtype)


def test_reference_runs_no_kernel():
    before = kernels.calls()
    with kernels.use_backend("reference"):
        kernels.sep_conv(X, [D, P, D, P])
        kernels.partial_mix(**MIX)
    assert kernels.calls() == before
