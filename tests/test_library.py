"""The compiled binaries: what they depend on and what they export."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import twotower_ext

ROOT = Path(__file__).parent.parent
PACKAGE = Path(twotower_ext.__file__).parent
CORE, TORCH_FACE = PACKAGE / "libtwotower.so", PACKAGE / "_torch.so"
PYTHON_FACE = next(PACKAGE.glob("_C*.so"))
TORCH_2_11 = set((Path(__file__).parent / "torch_2_11_symbols.txt").read_text().split())


def symbols(path: Path, *flags: str) -> set[str]:
    text = subprocess.run(["nm", "-D", *flags, path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines()}


def needed(path: Path) -> list[str]:
    text = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


def test_the_core_knows_neither_torch_nor_python():
    assert not [n for n in needed(CORE) if "torch" in n or "c10" in n or "python" in n]
    undefined = symbols(CORE, "--undefined-only")
    assert not [s for s in undefined if s.startswith(("Py", "_Py", "aoti_torch", "torch_")) or "at6Tensor" in s]


def test_the_torch_face_links_the_cpu_library_of_torch_only():
    torch_libraries = [n for n in needed(TORCH_FACE) if "torch" in n or "c10" in n]
    assert torch_libraries == ["libtorch_cpu.so"]
    assert not [n for n in needed(TORCH_FACE) + needed(CORE) if "cudart" in n or "libcuda" in n]


def test_the_torch_face_uses_what_torch_2_11_has():
    """One binary for every torch >= 2.11: each torch symbol it needs is in that version's stable C interface."""
    undefined = {s for s in symbols(TORCH_FACE, "--undefined-only") if re.match(r"(aoti_)?torch_", s)}
    assert undefined
    assert undefined <= TORCH_2_11
    mangled = {s for s in symbols(TORCH_FACE, "--undefined-only") if re.match(r"_ZNK?(2at|3c10|5torch)", s)}
    assert not mangled


def test_the_core_hides_the_cuda_runtime():
    assert not [s for s in symbols(CORE, "--defined-only") if s.startswith("cuda")]


def test_build_info():
    facts = twotower_ext.build_info()
    assert facts["version"] == twotower_ext.__version__
    assert isinstance(facts["cuda"], bool)
    assert facts["threads"] >= 1
    assert facts["cpu_isa"] == os.environ.get("TWOTOWER_ISA", facts["cpu_isas"][-1])
    if facts["cuda"]:
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", facts["cuda_version"])
        assert {"sm_80", "compute_80"} <= set(facts["architectures"])
    else:
        assert facts["cuda_version"] is None
        assert facts["architectures"] == []
    assert facts["cutlass_version"] is None or re.fullmatch(r"\d+\.\d+\.\d+", facts["cutlass_version"])
    assert bool(facts["kernels"]) == (facts["cuda"] and torch.cuda.is_available())


def test_build_info_needs_no_torch():
    """The pybind11 face and the core load in a process that never imports torch."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(PYTHON_FACE)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert module.build_info()['version']; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    not twotower_ext.build_info()["cuda"], reason="built without CUDA: there is no machine code to read"
)
def test_the_kernel_is_compiled_for_every_architecture():
    """Every architecture that build_info names has its code in the library's fat binary."""
    (tool,) = [f for f in metadata.files("nvidia-cuda-cuobjdump") or [] if f.name == "cuobjdump"]
    command = [tool.locate(), "--list-elf", "--list-ptx", CORE]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    for architecture in twotower_ext.build_info()["architectures"]:
        assert architecture.replace("compute_", "sm_") in listing.stdout


def test_kernels_of_an_instruction_set_share_no_code():
    """A weak symbol (a shared template, an inline function) could be linked in its AVX-512 copy for every processor."""
    objects = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/twotower_cpu_*/**/*.o"))
    assert len(objects) >= 8
    for path in objects:
        text = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        shared = {name for _, kind, name in re.findall(r"^(\w* *)([WwVvu]) (\S+)$", text, re.MULTILINE)}
        # The exception handler's address, the same for all: data, not code.
        assert shared <= {"DW.ref.__gxx_personality_v0"}, f"{path.name}: {shared}"


WALK = """
import sys, twotower_ext
from twotower_ext.registry import CPU_DTYPES, OPS, compare
assert twotower_ext.build_info()["cpu_isa"] == sys.argv[1]
for row in OPS.values():
    for dtype in CPU_DTYPES:
        for sample in row.samples("cpu", dtype):
            expected = row.reference(*sample.args, **sample.kwargs)
            wrong = compare(row.op(*sample.args, **sample.kwargs), expected, row.tolerance[dtype])
            assert wrong is None, f"{row.name}, {sample.name}, {dtype}: {wrong}"
"""


@pytest.mark.parametrize("isa", twotower_ext.build_info()["cpu_isas"])
def test_every_instruction_set_computes_the_same(isa):
    """Every registry sample against its reference; `make test-isa` runs all op tests this way."""
    environment = {**os.environ, "TWOTOWER_ISA": isa}
    subprocess.run([sys.executable, "-c", WALK, isa], check=True, env=environment, timeout=300)


def test_an_unknown_instruction_set_is_refused():
    code = "import torch; from twotower_ext import ops; ops.rms_norm(torch.ones(1, 1, 4), torch.ones(4))"
    environment = {**os.environ, "TWOTOWER_ISA": "v9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"ValueError: twotower: TWOTOWER_ISA must be one .*v2.*, got 'v9'", done.stderr)


def test_a_forked_process_computes():
    """Worker threads do not survive a fork, neither ours nor torch's: the child gets its own."""
    code = (
        "import os, torch\n"
        "from twotower_ext import ops\n"
        "x, w = torch.randn(64, 16, 1024), torch.ones(1024)\n"
        "y = ops.rms_norm(x, w)[0]\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if all(map(torch.equal, ops.rms_norm(x, w)[0], y)) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_threads_may_call_at_once():
    from concurrent.futures import ThreadPoolExecutor

    x, w = torch.randn(64, 16, 512), torch.ones(512)
    expected = twotower_ext.ops.rms_norm(x, w)[0]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: twotower_ext.ops.rms_norm(x, w)[0], range(64)))
    assert all(torch.equal(r, expected) for r in results)
