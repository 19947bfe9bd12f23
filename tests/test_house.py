"""The rules of the house: who may import whom, what the sources may contain, how the kernels are built."""

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import operations_table
import pytest
import tables
from conftest import machine_isas
from ftso_fast.kernels import _backend

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "ftso_fast").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
CMAKE = (ROOT / "CMakeLists.txt").read_text()
TORCH_FREE = {
    "genotype",
    "space",
    "config",
    "errors",
    "svg",
    "draw",
    "phase",
    "stability",
    "crossed",
    "text_stability",
    "draw_stability",
    "nats",
    "published",
    "recipes",
    "evaluation",
    "size",
}


def imports(path):
    """Every imported module of a file, wherever the import stands: "torch.nn", ".errors", "ftso_fast._C"."""
    return imports_of(path.read_text())


def imports_of(text):
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from . import x` and `from package import x` may both name a module
            joint = "" if module.endswith(".") else "."
            deep = module in (".", "..", "ftso_fast")
            found.update(f"{module}{joint}{alias.name}" if deep else module for alias in node.names)
    return found


def test_the_lists_of_files_are_not_empty():
    assert {p.stem for p in PACKAGE} > {*TORCH_FREE, "search", "cli"}
    assert {p.stem for p in KERNELS} >= {"_backend", "skip_cell", "testing"}
    assert {p.name for p in NATIVE} >= {"bindings.cpp", "ftso.h", "isa.cpp", "skip_cell.cpp"}


def test_imports_are_found_wherever_they_stand():
    text = (
        "import a.b\nfrom . import c\nfrom .d import e\ndef f():\n    from ftso_fast import g\n    from ..h import i\n"
    )
    assert imports_of(text) == {"a.b", ".c", ".d", "ftso_fast.g", "..h"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_know_nothing_of_the_package_above(path):
    above = {name for name in imports(path) if name.startswith(("ftso_fast", ".."))}
    assert above <= {"ftso_fast._C"}


def test_only_the_chooser_sees_the_compiled_core():
    """Everybody else asks it: `ftso_fast` through `kernels`, operations through `core()`."""
    assert [p.name for p in (*PACKAGE, *KERNELS) if any("_C" in name for name in imports(p))] == ["_backend.py"]


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_these_files_need_no_torch(name):
    found = imports(ROOT / "ftso_fast" / f"{name}.py")
    assert not {module for module in found if module.split(".")[0] in ("torch", "ftso_fast", "numpy")}
    assert {module.lstrip(".") for module in found if module.startswith(".")} <= TORCH_FREE


@pytest.mark.parametrize("path", [*PACKAGE, *KERNELS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_is_evaluated_or_unpickled(path):
    tree = ast.parse(path.read_text())
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr == "load":
            assert ast.unparse(node) not in ("torch.load", "np.load", "numpy.load"), f"line {node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"line {node.lineno}"


# -- the native side


def includes(path):
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_bindings_see_python_and_nobody_sees_torch():
    seeing = {path.name for path in NATIVE for name in includes(path) if re.match(r'[<"](pybind11/|Python)', name)}
    assert seeing == {"bindings.cpp", "cuda_bindings.cpp"}
    for path in NATIVE:
        assert not [name for name in includes(path) if re.match(r'[<"](torch|ATen|c10|caffe2)/', name)], path.name


def kernel_texts():
    """The files that CMake compiles once per instruction set, and every header of ours that they reach."""
    waiting = [ROOT / name for name in re.search(r"set\(FTSO_KERNELS\s+([^)]+)\)", CMAKE)[1].split()]
    assert ROOT / "csrc" / "skip_cell.cpp" in waiting
    found = []
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.append(path)
            waiting += [path.parent / name[1:] for name in includes(path) if name[0] == '"']
    return found


@pytest.mark.parametrize("path", kernel_texts(), ids=lambda p: p.name)
def test_kernels_include_no_std_headers(path):
    """C headers and intrinsics end in .h; what does not, or is C's under a C++ name, is the std library."""
    assert not [name for name in includes(path) if name[0] == "<" and not name.endswith(".h")]
    assert "std::" not in re.sub(r"//.*", "", path.read_text())


def test_every_native_file_is_built_and_every_built_file_is_there():
    """But for the emulator, which tests build."""
    built = set(re.findall(r"csrc/\w+\.(?:cpp|cu)\b", CMAKE))
    there = {path for path in NATIVE if path.suffix in (".cpp", ".cu")}
    assert built == {f"csrc/{path.name}" for path in there if path.parent.name == "csrc"}


def test_one_list_of_instruction_sets():
    named = re.search(r"set\(FTSO_ISAS (scalar [^)]+)\)", CMAKE)[1].split()
    assert sorted(_backend.ISAS) == sorted(named)
    assert dict(re.findall(r"set\(FTSO_OTHERS_(\w+) (\w+)\)", CMAKE)) == _backend.OTHERS
    assert set(machine_isas()) <= set(named)


def tool(name):
    """The path of a program, also of one that is installed beside this Python."""
    return shutil.which(name, path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))


def call(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def objects(isa, folder):
    """The kernels' object files for one instruction set: the installed ones where the build is still there and newer
    than its sources, else built here; -O1 leaves more functions standing than -O3 would."""
    kept = sorted(ROOT.glob(f"build/temp.*/CMakeFiles/ftso_{isa}.dir/csrc/*.o"))
    changed = max(path.stat().st_mtime for path in (*kernel_texts(), ROOT / "CMakeLists.txt"))
    if kept and min(path.stat().st_mtime for path in kept) > changed:
        return kept
    options = [
        "-DFTSO_CUDA=OFF",
        "-DCMAKE_BUILD_TYPE=None",
        "-DCMAKE_CXX_FLAGS=-O1",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
    ]
    call(tool("cmake"), "-G", "Ninja", *options, "-S", ROOT, "-B", folder)
    call(tool("cmake"), "--build", folder, "--target", f"ftso_{isa}")
    return sorted(folder.glob(f"CMakeFiles/ftso_{isa}.dir/**/*.o"))


def compiler():
    return (os.environ.get("CXX") or tool("c++") or tool("g++") or tool("clang++")).split()


def symbols(path):
    """(letter, name) of every symbol in an object file."""
    return re.findall(r"^[0-9a-f ]+ (\w) (.+)$", call("nm", "-C", path), re.MULTILINE)


def shared(table, isa):
    """The symbols that the linker could give to, or take from, code that was compiled for another machine."""
    return [name for letter, name in table if letter in "TDBRGSCWVuvw" and f"ftso::{isa}::" not in name]


X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.mark.parametrize("isa", _backend.ISAS if X86 else ("scalar",))
def test_kernels_leave_the_linker_no_choice(isa, tmp_path):
    """A weak or global name outside the namespace of its instruction set could become everybody's."""
    found = objects(isa, tmp_path)
    net = re.search(r'list\(FILTER FTSO_NET_KERNELS INCLUDE REGEX "([^"]+)"\)', CMAKE)[1]
    texts = [path.name for path in kernel_texts() if path.suffix == ".cpp"]
    assert len(found) == sum(isa not in _backend.OTHERS or bool(re.search(net, name)) for name in texts)
    for path in found:
        assert not shared(symbols(path), isa), path.name
    assert any(f"ftso::{isa}::" in name for path in found for _, name in symbols(path))


def test_a_shared_symbol_would_be_seen(tmp_path):
    source = tmp_path / "weak.cpp"
    source.write_text(
        "inline __attribute__((noinline)) int weak(int x) { return x; }\n"
        "namespace ftso { int wide() { return weak(1); } }\n"
        "namespace ftso::avx2 { int narrow() { return wide(); } }\n"
    )
    call(*compiler(), "-std=c++17", "-O1", "-c", source, "-o", tmp_path / "weak.o")
    assert sorted(shared(symbols(tmp_path / "weak.o"), "avx2")) == ["ftso::wide()", "weak(int)"]


# -- the published figures


def test_readme_shows_the_newest_results():
    call(sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check")


def test_the_page_of_operations_shows_the_newest_results():
    assert operations_table.page() == operations_table.PAGE.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_results_are_their_own_text(path):
    assert tables.text(json.loads(path.read_text())) + "\n" == path.with_suffix(".md").read_text()


# -- the price of an import


def test_import_is_cheap():
    code = "import sys, ftso_fast; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "ftso_fast.search" in loaded
    heavy = {
        "torch._dynamo",
        "torch._inductor",
        "triton",
        "ftso_fast._cuda",
        "sklearn",
        "scipy",
        "rich",
        "sympy",
        "torchvision",
        "PIL",
    }
    assert not loaded & heavy
