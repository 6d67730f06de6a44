"""The build: what it refuses, and (marked) every way of installing in a fresh environment."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import kernel_resources
import pytest

import twotower_ext

ROOT = Path(__file__).parent.parent
LONGEST_BUILD = 180  # seconds, on two cores


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_torch_is_refused(setup_py, tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text("__version__ = '2.10.1'\n")
    monkeypatch.setenv("TORCH_ROOT", str(tmp_path))
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.11, found 2\.10"):
        setup_py.torch_root()


def test_a_missing_torch_is_named(setup_py, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_ROOT", raising=False)
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda kind: str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SystemExit, match=r"torch >= 2\.11 must be installed first"):
        setup_py.torch_root()


def test_torch_is_found_without_importing_it(setup_py):
    assert (setup_py.torch_root() / "include" / "torch" / "csrc" / "stable" / "library.h").exists()
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_jobs_follow_the_environment_and_free_memory(setup_py, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_py.jobs() == 7
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(setup_py.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(setup_py, "free_gib", lambda: 4.0)
    assert setup_py.jobs() == 2
    monkeypatch.setattr(setup_py, "free_gib", lambda: 0.1)
    assert setup_py.jobs() == 1


def test_free_memory_counts_file_caches(setup_py):
    page = os.sysconf("SC_PAGE_SIZE")
    assert (
        os.sysconf("SC_AVPHYS_PAGES") * page / 2**30 / 2
        < setup_py.free_gib()
        <= os.sysconf("SC_PHYS_PAGES") * page / 2**30
    )


def test_tools_come_from_this_python_first(setup_py, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert Path(setup_py.tool("cmake", "CMAKE_BIN_DIR")).exists()
    assert setup_py.tool("no_such_tool", "BIN_DIR") is None


def configure(setup_py, tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    torch_root = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__path__[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    command = [
        setup_py.tool("cmake", "CMAKE_BIN_DIR"),
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path / "build"),
        f"-DTORCH_ROOT={torch_root}",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_cmake_refuses_an_unknown_cuda_setting(setup_py, tmp_path):
    done = configure(setup_py, tmp_path, "-DTWOTOWER_CUDA=MAYBE")
    assert done.returncode != 0
    assert "TWOTOWER_CUDA must be AUTO, ON or OFF, got MAYBE" in done.stderr


def test_cmake_refuses_a_folder_without_torch(setup_py, tmp_path):
    done = configure(setup_py, tmp_path, "-DTORCH_ROOT=/nowhere")
    assert done.returncode != 0
    assert "TORCH_ROOT must be the folder of an installed torch" in done.stderr


def test_default_builds_have_nothing_of_cutlass():
    """Neither file is compiled unless asked for, and nothing is fetched."""
    settings = (ROOT / "CMakeLists.txt").read_text()
    assert re.search(r"set\(TWOTOWER_CUTLASS OFF CACHE BOOL", settings)
    assert not (ROOT / "csrc" / "kernels" / "grouped_gemm.cu").exists(), "csrc/kernels/*.cu is compiled always"
    fetching = ("FetchContent", "ExternalProject", "DOWNLOAD", "git clone")
    settings += (ROOT / "csrc" / "kernels" / "cutlass" / "cutlass.cmake").read_text()
    assert not [word for word in fetching if word in settings]


def test_cmake_refuses_cutlass_without_cuda(setup_py, tmp_path):
    done = configure(setup_py, tmp_path, "-DTWOTOWER_CUTLASS=ON", "-DTWOTOWER_CUDA=OFF")
    assert done.returncode != 0
    assert "TWOTOWER_CUTLASS=ON needs CUDA kernels" in " ".join(done.stderr.split())


@pytest.mark.skipif(not twotower_ext.build_info()["cuda"], reason="built without CUDA: nvcc is not here")
def test_cmake_refuses_cutlass_without_headers(setup_py, tmp_path):
    done = configure(setup_py, tmp_path, "-DTWOTOWER_CUTLASS=ON", f"-DCUTLASS_ROOT={tmp_path}")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "TWOTOWER_CUTLASS=ON, but the headers of CUTLASS were not found" in message
    assert "pip install --no-deps nvidia-cutlass" in message
    assert f"CUTLASS_ROOT='{tmp_path}'" in message


@pytest.mark.build
def test_the_torch_face_compiles_against_the_oldest_torch(tmp_path: Path):
    """Headers are the same on every system; the smallest wheel of torch 2.11 is that for macOS."""
    download = (
        "pip download torch==2.11.0 --no-deps --quiet --platform macosx_11_0_arm64 --python-version 3.12"
        " --implementation cp --only-binary=:all: --dest"
    )
    subprocess.run([sys.executable, "-m", *download.split(), tmp_path], check=True)
    (wheel,) = tmp_path.glob("torch-2.11.0-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("torch/include/")])
    settings = (ROOT / "CMakeLists.txt").read_text()
    (target,) = re.findall(r"TORCH_TARGET_VERSION=0x[0-9a-f]{16}", settings)
    command = [
        os.environ.get("CXX", "g++"), "-fsyntax-only", "-std=c++20", f"-D{target}", "-DTWOTOWER_LIBRARY=twotower",
        "-isystem", tmp_path / "torch" / "include", ROOT / "csrc" / "bindings" / "torch.cpp",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.build
def test_cutlass_compiles_to_hopper_products(setup_py, tmp_path):
    """Every tile is multiplied by wgmma and copied by TMA, without spills. The headers come from the package index."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, "nvidia-cutlass==4.2.0.0"], check=True)
    options = [f"-DCUTLASS_ROOT={tmp_path / 'site' / 'cutlass_library'}", "-DTWOTOWER_FACES=OFF"]
    done = configure(setup_py, tmp_path, "-DTWOTOWER_CUTLASS=ON", *options)
    assert done.returncode == 0, done.stderr
    assert "CUTLASS 4.2.0" in done.stdout
    build = [setup_py.tool("cmake", "CMAKE_BIN_DIR"), "--build", tmp_path / "build", "--target", "twotower_cutlass"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    (compiled,) = (tmp_path / "build").rglob("grouped_gemm.cu.o")
    text = "".join(kernel_resources.cuobjdump("-sass", "-arch", "sm_90a", compiled))
    kernels = text.split("Function : ")[1:]
    assert len(kernels) == 6
    for width, kernel in zip(sorted([16, 64, 256] * 2), sorted(kernels, key=_product_width), strict=True):
        assert f"HGMMA.64x{width}x16.F32.BF16" in kernel
        assert "UTMALDG" in kernel
        assert "UTMASTG" in kernel
        assert not re.search(r"\b(LDL|STL)\b", kernel)


def _product_width(kernel: str) -> int:
    found = re.search(r"HGMMA\.64x(\d+)x16", kernel)
    assert found
    return int(found.group(1))


USE = (
    "import torch, twotower, twotower_ext; from twotower_ext.registry import OPS; "
    "s = OPS['moe_experts'].samples()[1]; OPS['moe_experts'].op(*s.args, **s.kwargs); "
    "print(twotower_ext.build_info()['cuda'])"
)


@pytest.fixture(scope="module")
def copy_of_the_tree(tmp_path_factory) -> Path:
    """What git tracks, elsewhere: a build must not depend on files nobody committed."""
    target = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.mark.build
@pytest.mark.parametrize(
    ("arguments", "cmake_args"),
    [([], ""), (["--no-build-isolation"], "-DTWOTOWER_CUDA=OFF"), (["-e"], "-DTWOTOWER_CUDA=OFF")],
    ids=["isolated", "not isolated, no CUDA", "editable"],
)
def test_installs(arguments: list[str], cmake_args: str, copy_of_the_tree: Path, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    requirements = ["-r", ROOT / "requirements-dev.txt"] if "--no-build-isolation" in arguments else ["torch==2.13.0"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    environment = {**os.environ, "CMAKE_ARGS": cmake_args}
    started = time.monotonic()
    install = [python, "-m", "pip", "install", "--verbose", *arguments, str(copy_of_the_tree)]
    done = subprocess.run(install, capture_output=True, text=True, env=environment)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[1/" in done.stdout + done.stderr, "one line a compile step"
    used = subprocess.run([python, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    if "OFF" in cmake_args:
        assert used.stdout.strip() == "False"
    assert seconds < LONGEST_BUILD
