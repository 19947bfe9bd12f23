"""The cell's CUDA kernels, run on the CPU by the emulator, through launchers, bindings and adapter as on a GPU.

Values and every gradient against the float64 reference, inputs in the midst of NaN, outputs on memory full of NaN; the
same bytes on every schedule.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
from typing import NamedTuple

import emulation
import pytest
import torch
from ftso_fast.kernels import cell_step, cell_step_cuda
from ftso_fast.kernels.cell_step import Behind, Raw

NAN = float("nan")
ALLOWED = 3e-6  # of the largest value; sums over pixels the like, of the sum of their terms' sizes


class Case(NamedTuple):
    """`rows`, `strided`: of w and of w_strided; both 0: the last cell. `parts`: of the weight gradients."""

    B: int
    C: int
    H: int
    W: int
    k: int
    rows: int
    strided: int = 0
    parts: int = 2

    def __str__(self):
        return f"{self.B}x{self.C}x{self.H}x{self.W}-k{self.k}-{self.rows}+{self.strided}"


CASES = [
    Case(2, 16, 8, 8, 4, 32),
    Case(1, 16, 12, 12, 1, 48, parts=1),
    Case(2, 16, 5, 7, 2, 33, parts=5),
    Case(3, 16, 3, 3, 8, 5, parts=3),
    Case(2, 16, 6, 10, 4, 64, 32),
    Case(1, 16, 2, 6, 4, 17, 6, parts=1),
    Case(1, 16, 16, 20, 2, 32, 32, parts=3),
    Case(3, 16, 5, 5, 4, 0),
    Case(1, 16, 12, 13, 1, 0),
    Case(2, 32, 8, 8, 4, 64),
    Case(1, 32, 7, 11, 8, 70, parts=2),
    Case(2, 32, 6, 6, 2, 128, 64, parts=1),
    Case(2, 32, 7, 10, 1, 0),
    Case(2, 64, 4, 4, 4, 128, 2, parts=1),
    Case(1, 64, 9, 9, 1, 131, parts=4),
    Case(1, 64, 4, 6, 8, 30, 130, parts=1),
    Case(1, 64, 8, 9, 2, 0),
    Case(1, 128, 5, 8, 4, 260, parts=1),
    Case(1, 128, 2, 6, 8, 10, 12, parts=2),
    Case(1, 128, 5, 7, 2, 0),
]


@pytest.fixture(scope="module")
def emulated():
    path = emulation.module_path()
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    schedule = ctypes.CDLL(str(path)).ftso_emu_schedule
    yield module, lambda policy, order: schedule(policy.value, order.value, 7)
    schedule(0, 0, 1)


@pytest.fixture
def schedule(emulated, monkeypatch):
    """The adapter on the emulator: its module, and no stream. Memory that torch hands out is full of NaN."""
    module, schedule = emulated
    monkeypatch.setattr(cell_step_cuda, "module", lambda: module)
    monkeypatch.setattr(cell_step_cuda, "_where", lambda x: (0, 0))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new memory is then filled, with NaN
    yield schedule
    torch.use_deterministic_algorithms(before)


def raw(case, generator):
    """A slice of channels, or of images, in the midst of NaN."""
    around = torch.full((case.B, case.C + 3, case.H, case.W), NAN)
    z = around[:, 1 : case.C + 1] if case.B > 1 or case.H * case.W % 4 else around[:, :-3]
    z.copy_(torch.randn(z.shape, generator=generator))
    scale = torch.rand(case.C, generator=generator) + 0.5
    return Raw(z, scale, 0.3 * torch.randn(case.C, generator=generator))


def behind(shape, generator):
    def draw(*size):
        return torch.randn(size, generator=generator)

    N = shape[1]
    return Behind(draw(*shape), draw(*shape), draw(N), 0.2 * draw(N), 0.1 * draw(N))


def inputs(case):
    """What forward takes, and what backward takes besides."""
    g = torch.Generator().manual_seed(sum(case))
    x = raw(case, g), raw(case, g)
    edges = torch.cat([torch.randn(n, generator=g).softmax(0) for n in (2, 3, 4, 5)])
    B, C, H, W, k = case[:5]

    def weights(rows):
        return torch.randn(rows, 4 * C, generator=g) / (4 * C) ** 0.5 if rows else None

    given = (*x, edges, k, weights(case.rows), weights(case.strided))
    if not case.rows:
        return given, {"d_pooled": torch.randn(B, 4 * C, generator=g)}
    d = {"d": behind((B, case.rows, H, W), g)}
    return given, d | ({"d_strided": behind((B, case.strided, H // 2, W // 2), g)} if case.strided else {})


def wide(x):
    """The same numbers in float64."""
    if isinstance(x, torch.Tensor):
        return x.double()
    return type(x)(*map(wide, x)) if isinstance(x, Raw | Behind) else x


def rooms(case, given, dtype=None):
    """Where gradients go, full of NaN: those of inputs laid out as the inputs, parts some floats apart."""
    made = {}
    for name, x in (("g0", given[0]), ("g1", given[1])):
        made[name] = torch.full_like(x.z._base, NAN, dtype=dtype).as_strided(
            x.z.shape, x.z.stride(), x.z.storage_offset()
        )
    for name, rows in (("dw", case.rows), ("dw_strided", case.strided)):
        if rows:
            room = torch.full((case.parts, rows * 4 * case.C + 5), NAN, dtype=dtype or torch.float32)
            made[name] = room[:, : rows * 4 * case.C].unflatten(1, (rows, 4 * case.C))
    return made


def near(got, want, scale=None, allowed=ALLOWED):
    assert got.shape == want.shape
    largest = float(want.abs().max()) if scale is None else scale
    assert float((got.double() - want).abs().max()) <= allowed * largest, (got, want)


def total(parts):
    return parts.double().sum(0)


def forward(case, given):
    made = cell_step_cuda.forward(*given)
    return [t for product in made[:2] if product for t in product] + ([made.pooled] if made.pooled is not None else [])


def test_whether_a_device_can_run_it_reaches_python(emulated):
    assert emulated[0].cell_unfit(0) is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, schedule, verified):
    given, _ = inputs(case)
    made, want = cell_step_cuda.forward(*given), cell_step.forward_reference(*map(wide, given))
    assert [m is None for m in made] == [w is None for w in want]
    if want.pooled is not None:
        near(made.pooled, want.pooled)
    for m, w in zip(made[:2], want[:2], strict=True):
        if m is None:
            continue
        near(m.z, w.z)
        near(total(m.sums)[0], w.z.sum((0, 2, 3)), float(w.z.abs().sum((0, 2, 3)).max()))
        near(total(m.sums)[1], total(w.sums)[1])
    verified("cell_step", "cuda", ways=["forward"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, schedule, verified):
    given, gradients = inputs(case)
    found, want = rooms(case, given), rooms(case, given, torch.float64)
    made = cell_step_cuda.backward(*given, **gradients, **found)
    right = cell_step.backward_reference(*map(wide, given), **{n: wide(g) for n, g in gradients.items()}, **want)
    for name in ("g0", "g1"):
        near(found[name], want[name])
        assert found[name]._base.isnan().sum() == given[0].z._base.isnan().sum(), "written beside the gradient"
    for name in set(found) - {"g0", "g1"}:
        near(total(found[name]), total(want[name]), allowed=1e-5)
        assert int(found[name]._base.isnan().sum()) == 5 * case.parts
    x = [r.value().double() for r in given[:2]]
    sizes = torch.cat([(want[n] * v).abs().sum((0, 2, 3)) for n, v in zip(("g0", "g1"), x, strict=True)])
    near(total(made.sums)[1], total(right.sums)[1], float(sizes.max()))
    sizes = torch.cat([want[n].abs().sum((0, 2, 3)) for n in ("g0", "g1")])
    near(total(made.sums)[0], total(right.sums)[0], float(sizes.max()))
    near(total(made.dots), total(right.dots), allowed=1e-5)
    verified("cell_step", "cuda", ways=["backward"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_meets_a_sentence(dtype, refuses):
    given, gradients = inputs(CASES[0])
    half = [r._replace(z=r.z.to(dtype)) for r in given[:2]]
    with pytest.raises(TypeError, match=f"cell_step forward: x0.z: expected float32 on cpu, got {dtype}"):
        cell_step_cuda.forward(*half, *given[2:])
    with pytest.raises(TypeError, match=f"cell_step backward: x0.z: expected float32 on cpu, got {dtype}"):
        cell_step_cuda.backward(*half, *given[2:], **gradients)
    refuses("cell_step", "cuda", dtype)


@pytest.mark.parametrize("case", [CASES[4], CASES[9], CASES[16]], ids=str)
def test_every_schedule_gives_the_same_bytes(case, schedule):
    given, gradients = inputs(case)

    def everything():
        found = rooms(case, given)
        return [*forward(case, given), *cell_step_cuda.backward(*given, **gradients, **found), *found.values()]

    first = everything()
    for policy, order in zip(emulation.POLICIES[1:], [*emulation.ORDERS[1:]] * 2, strict=True):
        schedule(policy, order)
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True)), policy
    schedule(emulation.Policy.ASCENDING, emulation.Order.ASCENDING)


@pytest.mark.parametrize("build", emulation.BUILDS)
def test_sanitizers_find_nothing(build):
    """Stand-alone: accesses and undefined behaviour, or races, in every stage; FTSO_EMULATION=long: at more sizes."""
    form = "long" if os.environ.get("FTSO_EMULATION") == "long" else "short"
    schedules = [(p, o) for p in emulation.POLICIES for o in emulation.ORDERS]
    plain = emulation.run(emulation.cell_program("plain"), 0, 0, form)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    for policy, order in schedules if build == "plain" or form == "long" else schedules[-1:]:
        done = emulation.run(emulation.cell_program(build), policy.value, order.value, form, timeout=3000)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == plain.stdout, (policy, order)


def test_the_whole_network(verified):
    """The driver of the stages with these kernels for its normal cells, beside Triton's, against float64."""
    if not importlib.util.find_spec("triton"):
        print("not checked here: there is no triton")
        return
    script = emulation.ROOT / "tests" / "emu" / "chain_cuda.py"
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(emulation.ROOT / "tests")
    command = [sys.executable, str(script), str(emulation.module_path())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=emulation.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    verified("skip_net", "cuda")
