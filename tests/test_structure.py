"""The architecture, as rules a machine checks: directions of dependency, file sizes, one home for device primitives."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from twotower_ext.registry import OPS

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
CODE = ("csrc", "twotower_ext", "python", "benchmarks", "tests")
LONGEST_FILE = 400
LONGEST_LAUNCHER = 120


def sources(*suffixes: str) -> list[Path]:
    return sorted(p for folder in CODE for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_files_stay_short():
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources(".py", ".cpp", ".h", ".cu", ".cuh")
        if (n := len(p.read_text().splitlines()))
        > (LONGEST_LAUNCHER if p.parent == CSRC / "kernels" and p.suffix == ".cu" else LONGEST_FILE)
    }
    assert not long


# Which folder of csrc may include from which. The root holds what all share: tensor_view, params, dispatch, build_info.
ALLOWED_INCLUDES = {
    "bindings": {"bindings", "ops", "cpu/parallel.h", "root"},
    "ops": {"ops", "root"},
    "cpu": {"cpu", "root"},
    "kernels": {"kernels", "simt", "root"},
    "cutlass": {"cutlass", "kernels", "simt", "root"},
    "simt": {"simt", "cpu/half.h"},
    "emulator": {"emulator", "simt"},
    "root": {"root", "cpu/half.h", "cpu/parallel.h"},
}


in_csrc = pytest.mark.parametrize(
    "path",
    [p for p in sources(".cpp", ".h", ".cu", ".cuh") if p.is_relative_to(CSRC)],
    ids=lambda p: str(p.relative_to(ROOT)),
)


@in_csrc
def test_cpp_includes_point_downward(path: Path):
    folder = path.parent.name if path.parent != CSRC else "root"
    for name in included(path):
        target = (path.parent / name).resolve()
        if not target.exists():
            continue  # a system header, see below
        to = target.parent.name if target.parent != CSRC else "root"
        relative = str(target.relative_to(CSRC)) if target.is_relative_to(CSRC) else target.name
        assert to in ALLOWED_INCLUDES[folder] or relative in ALLOWED_INCLUDES[folder], (
            f"{path.name} includes {relative}"
        )


@in_csrc
def test_only_the_faces_know_torch_and_python(path: Path):
    if path.parent.name == "bindings":
        return
    foreign = [n for n in included(path) if n.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h"))]
    assert not foreign


@pytest.mark.parametrize("path", sources(".cu", ".cuh"), ids=lambda p: p.name)
def test_kernels_use_the_primitives(path: Path):
    """No inline PTX, intrinsics or launch brackets outside csrc/simt; CUTLASS in the one file that is made of it."""
    text = path.read_text()
    if path == CSRC / "kernels" / "cutlass" / "grouped_gemm.cu":
        text = text.replace("<cutlass/", "<")
    for forbidden in (
        "asm",
        "<<<",
        "__syncthreads",
        "__syncwarp",
        "__shfl",
        "__ballot",
        "__activemask",
        "__CUDA_ARCH__",
        "atomicAdd",
        "cooperative_groups",
        "cub/",
        "<cutlass/",
        '"cutlass/',
    ):
        assert not re.search(rf"\b{forbidden}\b" if forbidden.isalpha() else re.escape(forbidden), text), forbidden


def test_parameters_with_tensor_maps_are_read_where_the_launch_put_them():
    """Elsewhere a copy of them has no address that a tile copy can use; the emulator would not notice."""
    texts = {path: path.read_text() for path in sources(".cu", ".cuh") if path.parent.name != "emulated"}
    holders = {
        name
        for text in texts.values()
        for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL)
        if "simt::TensorMap" in body
    }
    assert {"StreamParams", "Operands", "Source"} <= holders
    for path, text in texts.items():
        for parameters in re.findall(r"__global__[^;{]*?\w+\(((?:[^(){}]|\([^()]*\))*)\) \{", text):
            for parameter in parameters.split(","):
                if holders & set(re.findall(r"\w+", parameter)):
                    assert "SIMT_CONSTANT" in parameter, f"{path.name}: {parameter}"


def imported(path: Path) -> set[str]:
    """The modules a Python file imports when it is loaded (imports inside functions are late on purpose)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


# From the model's surface down; a module may import only what stands below it.
MODEL_LAYERS = [
    "cli",
    "doctor",
    "info",
    "continuation",
    "command",
    "display",
    "evaluate",
    "train",
    "pictures",
    "objective",
    "data",
    "decode",
    "weights",
    "towers",
    "layers",
    "state",
    "config",
]


def test_the_model_imports_downward():
    folder = ROOT / "python" / "twotower"
    assert {p.stem for p in folder.glob("*.py")} - {"__init__", "__main__"} <= set(MODEL_LAYERS)
    for rank, layer in enumerate(MODEL_LAYERS):
        for module in imported(folder / f"{layer}.py"):
            below = re.fullmatch(r"twotower\.(\w+)(\.\w+)?", module)
            if below and below.group(1) in MODEL_LAYERS:
                assert MODEL_LAYERS.index(below.group(1)) > rank, f"{layer} imports {module}"


def test_the_kernel_package_knows_no_model():
    for path in (ROOT / "twotower_ext").rglob("*.py"):
        assert not [m for m in imported(path) if m.split(".")[0] == "twotower"], path.name


def test_every_op_has_its_files():
    for row in OPS.values():
        for path in (CSRC / "cpu" / f"{row.stem}.cpp", CSRC / "ops" / f"{row.stem}.cpp"):
            assert path.exists()
        assert f"def {row.name}(" in (ROOT / "twotower_ext" / "ops" / f"{row.stem}.py").read_text()
        if row.cuda:
            assert (CSRC / "kernels" / f"{row.stem}.cu").exists()


def test_the_project_speaks_of_itself_alone():
    """No path of a machine and no leftover marker in what is committed."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    marker = re.compile(r"/(?:home|root|work|Users)/\w|\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".svg"} and path.exists():
            assert not marker.search(path.read_text()), name
