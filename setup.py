"""Builds the native module through CMake + ninja; everything declarative is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from find_nvcc import find_nvcc  # noqa: E402

sys.path.pop(0)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        args = [
            "-G", "Ninja",
            # Cached by an earlier build, whose environment may be gone (pip's isolated ones are) or different.
            "-UCMAKE_MAKE_PROGRAM", "-UORTHRUS_CUDA_ARCHS",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DORTHRUS_CUDA={os.environ.get('ORTHRUS_CUDA') or 'AUTO'}",
            f"-DORTHRUS_PDL_DELAY_NS={os.environ.get('ORTHRUS_PDL_DELAY_NS') or '0'}",
        ]  # fmt: skip
        if archs := os.environ.get("ORTHRUS_CUDA_ARCHS"):
            args.append(f"-DORTHRUS_CUDA_ARCHS={archs}")
        if (nvcc := find_nvcc()) and os.environ.get("ORTHRUS_CUDA") != "OFF":
            args.append(f"-DCMAKE_CUDA_COMPILER={os.path.realpath(nvcc)}")
        # CMake does not look for compilers or their flags again, nor does it accept a folder that was moved.
        given = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")]
        configured, key = build / "configured", repr([str(ROOT), given, nvcc])
        if not configured.exists() or configured.read_text() != key:
            args.append("--fresh")
        configured.unlink(missing_ok=True)
        subprocess.run(["cmake", *args, str(ROOT)], cwd=build, check=True)
        configured.write_text(key)
        subprocess.run(["cmake", "--build", "."], cwd=build, check=True)
        subprocess.run(["cmake", "--install", ".", "--prefix", str(out.parent)], cwd=build, check=True)


for kept in (ROOT / "build").glob("lib*/"):  # left by an earlier wheel, with modules that may no longer exist
    shutil.rmtree(kept, ignore_errors=True)
setup(ext_modules=[Extension("orthrus_rt._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
