"""Builds the three binaries of twotower_ext with CMake. Facts about the project are in pyproject.toml.

Environment: MAX_JOBS (parallel compile steps), CMAKE_ARGS (extra CMake arguments, for instance
-DTWOTOWER_CUDA=OFF), TORCH_ROOT (the torch package's folder, if it is not in this Python's site-packages).
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = 77
GIB_PER_JOB = 1.5  # peak memory of the largest compile step


def torch_root() -> Path:
    """The folder of the installed torch package, found without importing it.

    pip's isolated build environments hide site-packages from `import` but not from `sysconfig`.
    """
    folders = [os.environ.get("TORCH_ROOT"), *(Path(sysconfig.get_path(k), "torch") for k in ("purelib", "platlib"))]
    folders += [Path(entry, "torch") for entry in sys.path if entry]
    for folder in filter(None, folders):
        version_file = Path(folder, "version.py")
        if not version_file.exists():
            continue
        found = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
        if found and tuple(map(int, found.groups())) < OLDEST_TORCH:
            sys.exit(f"twotower-ext needs torch >= 2.11, found {'.'.join(found.groups())} in {folder}")
        return Path(folder)
    sys.exit(
        "twotower-ext: torch >= 2.11 must be installed first (pip install torch); "
        "set TORCH_ROOT to its package folder if it is not in this Python's site-packages"
    )


def pybind11_folder() -> str:
    try:
        import pybind11
    except ImportError:
        sys.exit("twotower-ext: the build needs pybind11 (pip install pybind11)")
    return pybind11.get_cmake_dir()


def tool(name: str, folder: str) -> str | None:
    """The program of the Python package `name`, whose bin folder is its attribute `folder`; else that on PATH.

    The package comes first: it is what the build requires, also in an environment that is not activated.
    """
    try:
        return str(Path(getattr(importlib.import_module(name), folder), name))
    except ImportError:
        return shutil.which(name)


def free_gib() -> float:
    """Memory that can be had without swapping, file caches included."""
    try:
        kib = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        kib = None
    if kib:
        return int(kib.group(1)) / 2**20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30


def jobs() -> int:
    """MAX_JOBS, or as many compile steps as processors and free memory allow."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, int(free_gib() / GIB_PER_JOB)))


class CMakeBuild(build_ext):
    """Builds all binaries into the folder setuptools expects `_C` in."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        source = Path(__file__).parent.resolve()
        # One folder a Python, kept between builds: a second build compiles what changed. What pip's isolated
        # environments put elsewhere each time (ninja, pybind11) is passed each time.
        build = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        if cmake is None:
            sys.exit("twotower-ext: the build needs cmake >= 3.24 (pip install cmake)")
        configure = [
            cmake, "-S", str(source), "-B", str(build),
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            f"-DTWOTOWER_OUTPUT={output}", f"-DTORCH_ROOT={torch_root()}",
            f"-Dpybind11_DIR={pybind11_folder()}", f"-DPython_EXECUTABLE={sys.executable}",
            # The folder remembers settings: those of an earlier build's CMAKE_ARGS are taken back here.
            "-DTWOTOWER_CUDA=AUTO", "-DTWOTOWER_CUTLASS=OFF", "-DCUTLASS_ROOT=", "-DCMAKE_BUILD_TYPE=Release",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        environment = {**os.environ, "NINJA_STATUS": "[%f/%t, %es] "}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build), "-j", str(jobs())], check=True, env=environment)

    def copy_extensions_to_source(self) -> None:
        """Editable installs load from the source folder: all three binaries go there, not `_C` alone."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")[:-1])
            for binary in built.glob("*.so"):
                self.copy_file(str(binary), str(Path(__file__).parent / built.relative_to(self.build_lib)))


if __name__ == "__main__":
    if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        sys.exit(f"twotower-ext: the build needs setuptools >= {OLDEST_SETUPTOOLS}, found {setuptools.__version__}")
    setup(ext_modules=[Extension("twotower_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
