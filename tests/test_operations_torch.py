"""Operations in torch: opcheck, compiled graphs, derivatives of the reference, no second ones on the cpu."""

import pytest
import torch
from ftso_fast.kernels import _autograd, _node, testing
from torch.utils._python_dispatch import TorchDispatchMode

from ftso_fast import kernels

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {str(case): case for case in testing.CASES if case.op != "skip_cell"}
SMALL = [
    "partial_mix-2x4x7x7-k1-ops1-s212",
    "partial_mix-2x6x7x11-k2-ops701-s11",
    "partial_mix-2x12x10x6-k2-ops340-s21" if "partial_mix-2x12x10x6-k2-ops340-s21" in CASES else
    "partial_mix-2x12x10x6-k2-ops350-s21",
    "partial_mix-2x4x4x6-k2-ops0-s21",
]  # fmt: skip


def raw(case, requires_grad=True):
    """The arguments of torch.ops.ftso_fast.partial_mix."""
    tensors = [t.detach().requires_grad_(requires_grad) for t in testing.OPERATIONS[case.op].inputs(case, 0)]
    n = len(case.strides)
    if case.op == "partial_mix":
        states, edges, weights, affine = tensors[:n], tensors[n : n + 2], tensors[n + 2 :], []
    else:
        states, edges = tensors[:1], [torch.ones(1), torch.ones(1, 1)]
        weights, affine = ([t for t in tensors[1:] if t.dim() == d] for d in (4, 1))
    operators = [_node.NAMES.index(o) for o in case.operators]
    return (states, *edges, weights, affine, operators, list(case.strides), case.k)


@pytest.mark.parametrize(
    "name",
    [*SMALL, "partial_mix-2x6x14x14-k1-s21", "sep_conv_3x3-3x8x9x9-s2-affine", "dil_conv_5x5-2x5x7x7",
     "relu_conv_bn-3x8x9x9-to12-affine", "factorized_reduce-3x8x14x6-s2-to16-affine"],
)  # fmt: skip
def test_opcheck(name):
    args = raw(CASES[name])
    torch.library.opcheck(torch.ops.ftso_fast.partial_mix.default, args)
    args = raw(CASES[name], requires_grad=False)
    node, saved = torch.ops.ftso_fast.partial_mix(*args)
    n = len(args[0])
    for needs, needs_weights in (([True] * n, True), ([False] * (n - 1) + [True], False)):
        backward = (torch.randn_like(node), saved, *args, needs, needs_weights)
        torch.library.opcheck(torch.ops.ftso_fast.partial_mix_bwd.default, backward)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name", ["partial_mix-2x16x8x8-k4-s11", "sep_conv_3x3-3x8x9x9-s2-affine", "factorized_reduce-2x6x8x8-s2"]
)
def test_compiled_whole_graph_is_equal(name):
    case = CASES[name]
    operation = testing.OPERATIONS[case.op]
    tensors = operation.inputs(case, 0)
    torch.compiler.reset()
    compiled = torch.compile(operation.function, fullgraph=True, backend="aot_eager")
    eager = testing.values_and_gradients(operation.function, tensors, case)
    with testing.arm("cpu", kernels.isa()):
        found = testing.values_and_gradients(compiled, tensors, case)
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))


REFERENCES = [
    testing.Case("sep_conv", 2, 2, 4, 3, operators=("sep_conv_3x3",), strides=(2,), affine=True),
    testing.Case("dil_conv", 2, 2, 4, 3, operators=("dil_conv_5x5",), C_out=3),
    testing.Case("relu_conv_bn", 2, 2, 3, 3, operators=("relu_conv_bn",), affine=True),
    testing.Case("factorized_reduce", 2, 2, 4, 4, operators=("factorized_reduce",), strides=(2,)),
    testing.Case("partial_mix", 2, 4, 4, 4, 2, ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"), (2, 1)),
    testing.Case("partial_mix", 2, 2, 4, 4, 1, ("skip_connect", "sep_conv_3x3", "dil_conv_3x3"), (2,)),
]


@pytest.mark.parametrize("case", REFERENCES, ids=str)
def test_reference_has_first_and_second_derivatives(case):
    operation = testing.OPERATIONS[case.op]
    tensors = [t.double().requires_grad_() for t in operation.inputs(case, 0)]

    def call(*args):
        return operation.call(operation.reference, case, args)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("name", ["partial_mix-2x16x8x8-k4-s11", "sep_conv_3x3-2x5x7x7", "relu_conv_bn-2x5x7x7"])
def test_second_derivative_on_cpu_says_where_it_is(name):
    case = CASES[name]
    operation = testing.OPERATIONS[case.op]
    leaves = [t.requires_grad_() for t in operation.inputs(case, 0)]
    out = operation.call(operation.function, case, leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*use_backend\('reference'\)"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def test_what_was_saved_may_not_be_changed():
    case = CASES["relu_conv_bn-2x5x7x7"]
    x, weight = testing.OPERATIONS[case.op].inputs(case, 0)
    x.requires_grad_()
    out = kernels.relu_conv_bn(x, weight.requires_grad_())
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["sep_conv_3x3-2x5x7x7", "partial_mix-2x16x8x8-k4-s11"])
def test_gradients_of_any_layout(name):
    """out.sum() hands back one number, expanded."""
    case = CASES[name]
    operation = testing.OPERATIONS[case.op]
    leaves = [t.requires_grad_() for t in operation.inputs(case, 0)]
    out = operation.call(operation.function, case, leaves)
    found = torch.autograd.grad(out.sum(), leaves, retain_graph=True, materialize_grads=True)
    wanted = torch.autograd.grad(out, leaves, torch.ones_like(out), materialize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Watching(TorchDispatchMode):
    """Names of the operations that reach a mode."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A subclass that stands between."""


@pytest.mark.parametrize(
    ("name", "op"),
    [("partial_mix-2x16x8x8-k4-s11", "partial_mix"), ("sep_conv_3x3-3x8x9x9-s2-affine", "partial_mix")],
)
def test_calls_that_nobody_watches_take_a_short_way_to_the_same_bytes(name, op):
    case, wanted = CASES[name], {f"ftso_fast::{op}", f"ftso_fast::{op}_bwd"}
    function, tensors = testing.OPERATIONS[case.op].function, testing.OPERATIONS[case.op].inputs(case, 0)
    with testing.arm("cpu", kernels.isa()):
        assert _autograd.only_autograd_between(tensors)
        short = testing.values_and_gradients(function, tensors, case)
        with Watching() as mode:
            assert not _autograd.only_autograd_between(tensors)
            watched = testing.values_and_gradients(function, tensors, case)
        assert wanted <= {name.split(".")[0] for name in mode.seen}
        with torch.autograd.profiler.profile() as profile:
            profiled = testing.values_and_gradients(function, tensors, case)
        assert wanted <= {event.name for event in profile.function_events}
    for other in (watched, profiled):
        assert all(torch.equal(a, b) for a, b in zip(short, other, strict=True))


def test_what_stands_between_is_seen():
    x = torch.ones(3)
    assert _autograd.only_autograd_between([x, None, 3, torch.nn.Parameter(x)])
    assert not _autograd.only_autograd_between([3])
    assert not _autograd.only_autograd_between([x, x.as_subclass(Own)])
    assert not _autograd.only_autograd_between([torch.ones(3, device="meta")])
    with torch.inference_mode():
        assert not _autograd.only_autograd_between([torch.ones(3)])
    with torch.autocast("cpu", torch.bfloat16):
        assert not _autograd.only_autograd_between([x])
    with torch.overrides.BaseTorchFunctionMode():
        assert not _autograd.only_autograd_between([x])
    seen = []
    torch.func.vmap(lambda row: seen.append(_autograd.only_autograd_between([x])) or row)(torch.ones(2, 3))
    torch.func.grad(lambda row: seen.append(_autograd.only_autograd_between([row])) or row.sum())(x)
    assert seen == [False, False]


@pytest.mark.parametrize(
    ("change", "sentence"), [(lambda t: t[:1], "expected shape"), (lambda t: t.double(), r"expected torch\.float32")]
)
def test_a_weight_whose_data_changed_after_forward_is_refused(change, sentence):
    arguments = raw(CASES["partial_mix-2x16x8x8-k4-s11"])
    last = arguments[3][-1]
    kept = last.data
    with testing.arm("cpu", kernels.isa()):
        for _ in range(2):  # what a call that was right was like is not checked again; this one is like none
            _node.OP(*arguments)[0].sum().backward()
        out, _ = _node.OP(*arguments)
        last.data = change(kept)
        with pytest.raises((ValueError, TypeError), match=rf"^partial_mix_bwd: weights\[.*{sentence}"):
            out.sum().backward()
        last.data = kept
        _node.OP(*arguments)[0].sum().backward()
