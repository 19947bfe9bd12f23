"""How the CUDA module is built, what nvcc made of it, and the way of a call to the launcher, without a GPU.

Where there is no nvcc, or the module was not built, the tests that need them print so and have nothing to check.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_objects
import pytest
import torch
from ftso_fast.kernels import cell_step_cuda
from ftso_fast.kernels.cell_step import Behind, Raw
from torch._subclasses.fake_tensor import FakeTensorMode

from ftso_fast import kernels

ROOT = Path(__file__).resolve().parents[1]

# CUDA graphs can capture what asks the runtime for nothing else
ALLOWED = {
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaGetLastError",
    "cudaGetErrorString",
}


def missing(*needed):
    """Why there is nothing to check, in a line of the output; else nothing."""
    have = {"nvcc": shutil.which("nvcc"), "module": cuda_objects.built(), "cuobjdump": cuda_objects.cuobjdump()}
    absent = [name for name in needed if not have[name]]
    if absent:
        print(f"not checked here: there is no {' and no '.join(absent)}")
    return absent


# -- the build


def configured(folder, *options, **environment):
    """What CMake says, and what it would run."""
    cmake = shutil.which("cmake", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    if not cmake:
        print("not checked here: there is no cmake")
        return None
    import pybind11

    command = [cmake, "-S", ROOT, "-B", folder, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    files = [p for p in folder.rglob("*") if p.suffix in (".ninja", ".make") or p.name in ("Makefile", "build.make")]
    return done.returncode, done.stdout + done.stderr, "".join(p.read_text() for p in files)


def test_off_takes_no_cuda_step(tmp_path):
    if found := configured(tmp_path, "-DFTSO_CUDA=OFF"):
        code, said, steps = found
        assert code == 0, said
        assert "CUDA" not in said
        assert "bindings.cpp" in steps
        assert not [word for word in ("nvcc", "cell_step.cu", "_cuda.dir") if word in steps]


def test_without_nvcc_auto_does_without_and_on_says_so(tmp_path):
    """An nvcc that is none stands for its absence."""
    none = {"CUDACXX": str(tmp_path / "no_nvcc")}
    if found := configured(tmp_path / "auto", "-DFTSO_CUDA=AUTO", **none):
        code, said, steps = found
        assert code == 0, said
        assert "the CUDA module is not built" in said
        assert "cell_step.cu" not in steps
        code, said, _ = configured(tmp_path / "on", "-DFTSO_CUDA=ON", **none)
        assert code != 0
        assert "FTSO_CUDA=ON, and there is no nvcc" in said


def test_a_wish_that_is_none(tmp_path):
    if found := configured(tmp_path, "-DFTSO_CUDA=MAYBE"):
        assert found[0] != 0
        assert "expected AUTO, ON or OFF, got MAYBE" in found[1]


@pytest.mark.parametrize("wish", ["", "off", "ON"])
def test_the_variable_reaches_the_build(tmp_path, wish):
    """setup.py, with a cmake that only writes down what it is asked."""
    fake = tmp_path / "cmake"
    fake.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "FTSO_CORE": "ON"}
    environment.pop("FTSO_CUDA", None)
    if wish:
        environment["FTSO_CUDA"] = wish
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-t", str(tmp_path / "t"), "-b", str(tmp_path / "b")],
        capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT,
    )  # fmt: skip
    if "No module named 'setuptools'" in done.stderr:
        print("not checked here: there is no setuptools")
        return
    assert done.returncode == 0, done.stderr
    assert f"-DFTSO_CUDA={wish.upper() or 'AUTO'}" in (tmp_path / "asked").read_text().split()


# -- what nvcc made of it


def test_kernels_keep_to_their_budget():
    """Registers, spills and shared memory no more, programs at once no fewer; by the nvcc that the budget is of."""
    if missing("nvcc", "module", "cuobjdump"):
        return
    budget, found = json.loads(cuda_objects.BUDGET.read_text()), cuda_objects.resources()
    assert set(found) == set(budget["kernels"])
    for arch, kernels_found in found.items():
        allowed = budget["kernels"][arch]
        assert set(kernels_found) == set(allowed)
        for name, used in kernels_found.items():
            assert used["spilled"] == 0, (arch, name)
            assert used["shared"] <= allowed[name]["shared"], (arch, name)
            if cuda_objects.nvcc_version() == budget["nvcc"]:
                assert used["registers"] <= allowed[name]["registers"], (arch, name)
                assert used["blocks"] >= allowed[name]["blocks"], (arch, name)


def test_instructions_are_wide_and_in_order():
    """128 bits at a time, nothing in local memory, and no atomics, whose order nobody knows."""
    if missing("module", "cuobjdump"):
        return
    found = cuda_objects.opcodes()
    assert set(found) >= set(cuda_objects.MACHINES)
    for arch, names in found.items():
        words = {name.split(".")[0] for name in names}
        assert "FFMA" in words or "FFMA2" in words, arch
        assert not words & {"LDL", "STL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG"}, arch
        for wide in ("LDG", "STG", "LDS", "STS"):
            assert any(name.startswith(f"{wide}.") and ".128" in name for name in names), (arch, wide)


def test_the_runtime_is_asked_for_launches_only(tmp_path):
    if missing("nvcc"):
        return
    source, out = ROOT / "csrc" / "cell_step.cu", tmp_path / "cell_step.o"
    command = ["nvcc", "-std=c++17", "-arch=compute_80", "-Werror=all-warnings", "-c", source, "-o", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    unknown = subprocess.run(["nm", "-u", out], capture_output=True, text=True, check=True).stdout.split()
    called = {name for name in unknown if name.startswith("cuda")}
    assert "cudaGetLastError" in called
    assert called <= ALLOWED
    assert not {name for name in unknown if name.startswith(("malloc", "_Znw", "_Zna"))}


def test_the_module_needs_neither_torch_nor_a_driver():
    if missing("module"):
        return
    load = "import importlib.util as u, sys; s = u.spec_from_file_location('_cuda', sys.argv[1]);"
    load += "m = u.module_from_spec(s); s.loader.exec_module(m);"
    load += "print(m.cell_parts(2, 16, 130, True), 'torch' in sys.modules, m.cell_unfit(0))"
    done = subprocess.run(
        [sys.executable, "-c", load, cuda_objects.built()], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split()[:2] == ["4", "False"], done.stderr
    assert torch.cuda.is_available() or done.stdout.split(maxsplit=2)[2].strip() != "None", "a GPU that is not there"
    needed = subprocess.run(["ldd", cuda_objects.built()], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    assert "libtorch" not in needed


# -- the way of a call, on fake tensors


@pytest.fixture
def launches(monkeypatch):
    """What would be launched; addresses are what a tensor is."""
    made = []

    class Recorder:
        def cell_parts(self, B, C, pixels, backward):
            return B * -(-pixels // (2048 // C if backward else 64))

        def __getattr__(self, name):
            return lambda *arguments: made.append((name, arguments))

    monkeypatch.setattr(cell_step_cuda, "module", Recorder)
    monkeypatch.setattr(cell_step_cuda, "_where", lambda x: (x.device.index, 7))
    monkeypatch.setattr(cell_step_cuda, "_at", lambda t: 0 if t is None else 16 * (id(t) % 1000 + 1))
    return made


def fake(*shape):
    return torch.empty(shape, device="cuda")


def test_fake_tensors_reach_the_launcher(launches):
    with FakeTensorMode():
        x, edges = Raw(fake(2, 16, 8, 8), fake(16), fake(16)), fake(14)
        w, strided = fake(48, 64), fake(32, 64)
        made = cell_step_cuda.forward(x, x, edges, 4, w, strided)
        assert (made.z.z.shape, made.z.sums.shape, made.z.z.device.type) == ((2, 48, 8, 8), (2, 2, 48), "cuda")
        assert (made.strided.z.shape, made.strided.sums.shape) == ((2, 32, 4, 4), (2, 2, 32))
        assert cell_step_cuda.forward(x, x, edges, 4, None).pooled.shape == (2, 64)
        d, d_strided = (Behind(p.z, p.z, *(fake(p.z.shape[1]) for _ in range(3))) for p in made[:2])
        found = cell_step_cuda.backward(
            x, x, edges, 4, w, strided, d, d_strided, g0=fake(2, 16, 8, 8), dw=fake(3, 48, 64)
        )
        assert (found.sums.shape, found.dots.shape) == ((2, 2, 32), (2, 14))
    names = [name for name, _ in launches]
    assert names == ["cell_step_fwd"] * 2 + ["cell_step_bwd"]
    assert all(arguments[-2:] == (0, 7) for _, arguments in launches)
    assert launches[2][1][4][1:] == (48 * 64, 48, 3)


BAD = [
    ({"x1": (2, 16, 8, 4)}, "x1: expected (2, 16, 8, 8), planes contiguous, got (2, 16, 8, 4)"),
    ({"x0": (2, 24, 8, 8), "x1": (2, 24, 8, 8)}, "expected (16, 32, 64, 128) channels, got 24"),
    ({"k": 3}, "got 16 with k 3"),
    ({"w": (48, 60)}, "w: expected (N, 64), contiguous and aligned to 16 bytes, got (48, 60)"),
    ({"w_strided": (31, 64)}, "w_strided: expected 2S rows beside w, on even H and W, got (31, 64)"),
    ({"edges": (13,)}, "edges: expected 14 contiguous numbers, got (13,)"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda p: "+".join(p) if isinstance(p, dict) else "")
def test_bad_arguments_meet_a_sentence(launches, change, sentence):
    shapes = {"x0": (2, 16, 8, 8), "x1": (2, 16, 8, 8), "edges": (14,), "w": (48, 64), "w_strided": (32, 64), "k": 4}
    shapes |= change
    with FakeTensorMode():
        made = {name: fake(*shape) for name, shape in shapes.items() if name != "k"}
        x0, x1 = (Raw(made[n], fake(shapes[n][1]), fake(shapes[n][1])) for n in ("x0", "x1"))
        with pytest.raises(ValueError, match=r"cell_step forward: ") as raised:
            cell_step_cuda.forward(x0, x1, made["edges"], shapes["k"], made["w"], made["w_strided"])
    assert sentence in str(raised.value)
    assert not launches


def test_without_the_module_a_call_says_so(monkeypatch):
    monkeypatch.setattr(kernels._backend.importlib.util, "find_spec", lambda name: None)
    x = Raw(torch.zeros(1, 16, 2, 2), torch.ones(16), torch.zeros(16))
    with pytest.raises(kernels.BackendError, match=r"ftso_fast\._cuda is not there"):
        cell_step_cuda.forward(x, x, torch.ones(14), 1, None)
