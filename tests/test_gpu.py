"""GPU kernels without a GPU: interpreted in a process of their own, compiled ahead of time in another, and read."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verification
from ftso_fast.kernels import _tuning, aot, testing, tune
from torch._subclasses.fake_tensor import FakeTensorMode

from ftso_fast import kernels

ROOT = Path(__file__).resolve().parent.parent
TRITON = sorted((ROOT / "kernels").glob("*_triton.py"))
skip_cell_module = importlib.import_module("ftso_fast.kernels.skip_cell")
triton_op = torch.ops.ftso_fast.skip_cell_triton
INTERPRETED = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))


def run(arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in variables.items()}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("path", INTERPRETED, ids=lambda p: p.stem)
def test_interpreted(path, tmp_path):
    """Each file of tests/gpu by Triton's interpreter; what it shows is what docs/verified.json says."""
    passed = tmp_path / "passed.json"
    code, said = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", path], TRITON_INTERPRET="1", FTSO_VERIFIED=passed)
    assert code == 0, said[-6000:]
    documented = json.loads(verification.VERIFIED.read_text())["tests"]
    shown = json.loads(passed.read_text())
    assert shown == {name: documented.get(name) for name in shown}


BUDGET = json.loads(aot.BUDGET.read_text())
LONG = os.environ.get("FTSO_AOT") == "long"
"""Every kernel is compiled for every target, which takes minutes; else for one of them, and with one type of
those that it has, in turns."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Exit code, text and measurements of one run of the ahead-of-time compiler over every kernel."""
    folder = tmp_path_factory.mktemp("aot")
    table = folder / "measured.json"
    command = ["-m", "ftso_fast.kernels.aot", "--json", table, *([] if LONG else ["--spread"])]
    code, said = run(command, TRITON_CACHE_DIR=str(folder / "cache"))
    return code, said, json.loads(table.read_text())


def test_every_kernel_keeps_to_its_budget(measured):
    code, said, found = measured
    assert code == 0, said[-6000:]
    assert all(len(by_target) == (len(aot.TARGETS) if LONG else 1) for by_target in found.values())
    assert {target for by_target in found.values() for target in by_target} == set(aot.TARGETS)
    assert all(set(by_target) == set(aot.TARGETS) for by_target in BUDGET.values())
    assert set(found) == set(BUDGET if LONG else aot.in_turns(list(BUDGET)))
    assert {name.split(".")[0] for name in found} == {
        path.stem for path in TRITON if "def aot_cases" in path.read_text()
    }


def test_no_kernel_spills_on_a_gpu_of_nvidia(measured):
    """As compiled here, and as the budget has it for every target."""
    for table in (measured[2], BUDGET):
        assert not {(n, t) for n, by in table.items() for t, v in by.items() if v["spills"] and t.startswith("sm")}


def test_the_skip_cells_forward_reads_and_writes_128_bits_at_a_time(measured):
    """For k = 1 and 4, planes divisible by 16, whatever the number of channels, which is no constant: what is narrower
    are the 14 weights and the cycle of the shuffle; no shared memory, no barrier. As compiled here, and as the budget
    has it for every target."""
    for table in (measured[2], BUDGET):
        forward = {n: by for n, by in table.items() if n.startswith("skip_cell_triton.fwd-")}
        assert {name.rsplit("-", 1)[1] for name in forward if "fp32" in name} == {"k1", "k4"}
        seen = [(n, t, v) for n, by_target in forward.items() for t, v in by_target.items() if t.startswith("sm")]
        assert seen
        for name, target, v in seen:
            narrow = {w: n for w, n in v.items() if w[:2] in ("ld", "st") and w[2:] != "128"}
            assert sum(narrow.values()) <= 14 + 2, (name, target, narrow)
            assert not any(w.startswith("st") for w in narrow), (name, target, narrow)
            assert v["st128"] == 2 * v["ld128"] > 0, (name, target)
            assert v["shared"] == v["barriers"] == v["spills"] == 0, (name, target)


def test_over_the_budget_or_missing_is_said():
    within = {"registers": 10, "spills": 0, "shared": 0, "barriers": 0, "narrow": 1}
    found = {"a": {"sm_80": within | {"registers": 11}}, "b": {"sm_80": within}}
    assert aot.problems(found, {"a": {"sm_80": within}}, found) == [
        "a sm_80: registers 11, budget 10",
        "b sm_80: not in the budget",
    ]
    assert aot.problems({}, {"a": {"sm_80": within}}, {"b"}) == ["a: in the budget, but there is no such kernel"]
    spilled = within | {"spills": 8}
    assert aot.problems({"a": {"sm_80": spilled}}, {"a": {"sm_80": spilled}}, {"a"}) == ["a sm_80: spills 8"]


# -- what the sources must keep to


CONVERTED = ("tl.float32", "tl.float64", "tl.int32", "tl.int64")


def unconverted(text):
    """Lines with a tl.load whose value is not at once made float32 (sums float64, indices int32 or int64)."""
    found = []
    tree = ast.parse(text)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            attribute = parents[node]
            call = parents.get(attribute)
            converted = (
                isinstance(attribute, ast.Attribute)
                and attribute.attr == "to"
                and isinstance(call, ast.Call)
                and ast.unparse(call.args[0]) in CONVERTED
            )
            if not converted:
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", TRITON, ids=lambda p: p.name)
def test_every_load_is_at_once_made_float32(path):
    """The interpreter holds bfloat16 as integers: arithmetic before the conversion would be silently wrong."""
    assert not unconverted(path.read_text())


def test_a_load_without_conversion_is_noticed():
    assert unconverted("x = tl.load(p)\ny = tl.load(p).to(tl.float32)\nz = f(tl.load(p, m, 0.0))") == [1, 3]


@pytest.mark.parametrize("path", TRITON, ids=lambda p: p.name)
def test_nothing_depends_on_the_order_of_programs(path):
    assert "atomic" not in path.read_text()


# -- the path of a call, without a GPU


def test_a_tensor_on_a_gpu_goes_to_triton(monkeypatch):
    """As far as shapes: autograd's engine wants a real device."""
    called = []
    monkeypatch.setitem(skip_cell_module._BACKENDS, "triton", lambda *a: called.append(a) or triton_op(*a))
    with FakeTensorMode():
        x, weights = torch.empty(2, 8, 4, 4, device="cuda"), torch.empty(14, device="cuda")
        for out in (kernels.skip_cell(x, x, weights, 4), torch.ops.ftso_fast.skip_cell(x, x, weights, 4)):
            assert (out.shape, out.device.type) == ((2, 32, 4, 4), "cuda")
        grads = torch.ops.ftso_fast.skip_cell_triton_bwd(out, x, x, weights, 4, [True] * 3)
        assert [g.shape for g in grads] == [x.shape, x.shape, weights.shape]
    assert len(called) == 1


def test_without_its_interpreter_triton_refuses_tensors_on_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(kernels.BackendError, match="there is no GPU"), kernels.use_backend("triton"):
        pass


def test_a_search_on_the_cpu_leaves_triton_alone():
    code = (
        "import sys, torch, ftso_fast; from ftso_fast import kernels;"
        "x = torch.randn(1, 4, 4, 4, requires_grad=True); kernels.skip_cell(x, x, torch.rand(14)).sum().backward();"
        "assert not {m for m in sys.modules if m.split('.')[0] == 'triton' or '_triton' in m and 'ftso' in m}"
    )
    returned, said = run(["-c", code])
    assert returned == 0, said


def test_the_page_of_verification_is_its_generators():
    assert verification.page() == verification.PAGE.read_text()


def test_the_page_covers_every_operation_forward_and_backward():
    shown = json.loads(verification.VERIFIED.read_text())["tests"]
    for op, operation in testing.OPERATIONS.items():
        for backend in operation.backends:
            assert {f"{op} {backend} forward float32", f"{op} {backend} backward float32"} <= set(shown)


def test_every_cell_of_the_page_says_what_a_test_shows():
    """Tested and compiled, or refused; and what is in no table of cases has its row."""
    table = verification.what_is_verified(json.loads(verification.VERIFIED.read_text()), BUDGET)
    assert "not tested" not in table
    assert "not compiled" not in table
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines()}
    chains = {("skip_net", "cpu"), ("skip_net", "triton"), ("mixed_cell", "cpu"), ("folded_conv", "cpu")}
    assert chains | {(step, "triton") for step in ("cell_step", "reduce_step", "stem_step")} <= rows
    assert ("cell_step", "cuda") in rows


def test_a_cell_that_no_test_shows_says_so():
    tests = {"skip_cell triton forward float32": 1, "skip_cell triton backward float16 refused": 1}
    row = verification.what_is_verified({"tests": tests}, {}).splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[3:-1]]
    assert cells == ["interpreted (1), not compiled ahead of time", *["not tested"] * 4, "refused"]


@pytest.mark.parametrize("op", ["mixed_cell", "node_sum", "folded_conv"])
def test_what_has_no_kernel_for_a_gpu_runs_its_definition_there(op, monkeypatch):
    ran = []

    def spy(name, table, x):
        ran.append((table, kernels.choose(name, table, x)))
        return lambda *arguments: x

    monkeypatch.setattr(importlib.import_module(f"ftso_fast.kernels.{op}"), "choose", spy)
    with FakeTensorMode():
        x, w, bias = (torch.empty(*shape, device="cuda") for shape in ((2, 4, 6, 6), (4, 4, 1, 1), (4,)))
        one, row = torch.empty(1, device="cuda"), torch.empty(1, 1, device="cuda")
        {
            "mixed_cell": lambda: kernels.mixed_cell(x, x, one, row, [], ["none"], [[0]]),
            "node_sum": lambda: kernels.node_sum([x], ["skip_connect"], [1], []),
            "folded_conv": lambda: kernels.folded_conv(x, [w], [bias]),
        }[op]()
    ((table, chosen),) = ran
    assert chosen is table["reference"]
    assert not {"cuda", "triton"} & set(table)


# -- blocks


def test_every_block_of_the_table_is_whole():
    for table in json.loads(_tuning.TABLE.read_text()).values():
        for kernel, by_class in table.items():
            names = set(tune.CANDIDATES[kernel][0])
            assert all(set(block) == names for block in by_class.values())


def test_an_own_table_goes_first(tmp_path, monkeypatch):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"default": {"node": {"wide": {"BN": 64, "BC": 16, "BP": 32, "num_warps": 2}}}}))
    monkeypatch.setenv("FTSO_TUNING", str(own))
    cpu = torch.device("cpu")
    assert _tuning.block("node", "wide", cpu)["num_warps"] == 2
    assert _tuning.block("node", "narrow", cpu) == json.loads(_tuning.TABLE.read_text())["default"]["node"]["narrow"]


@pytest.mark.parametrize("HW", [1, 9, 49, 64, 196, 784, 1024, 3136])
def test_little_of_a_block_lies_behind_a_planes_end(HW):
    block = _tuning.planes_in(HW, 1024)
    assert block["IMAGES"] * block["PIXELS"] <= 1024
    assert -(-HW // block["PIXELS"]) * block["PIXELS"] < 2 * HW or HW < 64
