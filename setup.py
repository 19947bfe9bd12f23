"""Drives CMake + ninja; everything about the C++ core itself stands in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def forget(build: Path) -> None:
    """What CMake found on the machine at an earlier build, such as the ninja of pip's build environment of then, which
    is gone; the objects stay (`cmake --fresh` deletes them)."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for found in build.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(found)


def pybind11_in(build: Path) -> Path:
    """A copy: where pip puts it is new with each installation, and all that includes it would be compiled again."""
    kept, partial = (build / f"{name}-{pybind11.__version__}" for name in ("pybind11", "partial"))
    if not kept.exists():
        shutil.copytree(Path(pybind11.__file__).parent, partial, dirs_exist_ok=True)
        partial.rename(kept)
    return kept / Path(pybind11.get_cmake_dir()).relative_to(Path(pybind11.__file__).parent)


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in compiler):
            sys.exit(
                f"ftso_fast: building the compiled core needs a C++17 compiler, and none of {compiler} was found: "
                "install one (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install), "
                "or set FTSO_CORE=OFF to install without the core, on the slower reference path."
            )
        build = (self.kept() if self.editable_mode else Path(self.build_temp)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        forget(build)
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-Dpybind11_DIR={pybind11_in(build)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFTSO_CUDA={os.environ.get('FTSO_CUDA', 'AUTO').upper()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *configure], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)

    def kept(self) -> Path:
        """Where an installation that is not editable builds too: what has not changed is then not compiled again."""
        return ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def copy_extensions_to_source(self) -> None:
        """Of an editable installation. The CUDA module is built or not, so setuptools does not know of it."""
        super().copy_extensions_to_source()
        for module in Path(self.build_lib, "ftso_fast").glob("_cuda*.so"):
            shutil.copy2(module, ROOT / "ftso_fast")


WITH_CORE = os.environ.get("FTSO_CORE", "ON").upper() != "OFF"
setup(
    packages=["ftso_fast", "ftso_fast.commands", "ftso_fast.kernels"],
    package_dir={"ftso_fast.kernels": "kernels"},
    package_data={"ftso_fast": ["py.typed"], "ftso_fast.kernels": ["*.json"]},
    ext_modules=[Extension("ftso_fast._C", sources=[])] if WITH_CORE else [],
    cmdclass={"build_ext": BuildWithCMake},
)
