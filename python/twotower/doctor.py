"""Looks at an installation: versions, processor, devices; runs every op against its reference. A report for bugs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from twotower_ext._C import BuildInfo
    from twotower_ext.registry import OpRow

REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "tqdm")
BUILD_HINT = (
    "build it with `pip install -e .` in the source folder (a C++ compiler is needed, and nvcc for CUDA kernels)"
)
Tell = Callable[[str], None]


def examine(tell: Tell) -> dict[str, Any]:
    """What there is, as plain data; `tell` hears a line a fact and a line an op as they are found.

    The report holds python, system, packages, build, gpus, torch_cuda, and of every op, device and dtype the error (of
    what the tolerance allows) or what went wrong; "problems" are sentences, none where all is well.
    """
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {package: _installed(package) for package in REQUIRED},
        "ops": {},
        "problems": [],
    }
    _line(tell, "python", f"{report['python']} on {platform.system()} {platform.machine()}")
    for package, version in report["packages"].items():
        _line(tell, package, version or "not installed")
        if version is None:
            report["problems"].append(f"{package} is not installed; install it with `pip install {package}`")
    if report["packages"]["torch"] is None:  # without it, the ops have nothing to be compared with
        return report
    try:
        import twotower_ext
        from twotower_ext import registry

        build = report["build"] = twotower_ext.build_info()
    except (ImportError, OSError) as error:
        _line(tell, "twotower-ext", "not usable")
        advice = "" if "pip install" in str(error) else f"; {BUILD_HINT}"
        report["problems"].append(f"the compiled library cannot be used: {error}{advice}")
        return report

    _line(tell, "twotower-ext", f"{build['version']}, built by {build['compiler']}")
    if build["version"] != twotower_ext.__version__:
        report["problems"].append(
            f"the compiled library is version {build['version']}, its Python files are "
            f"{twotower_ext.__version__}; {BUILD_HINT}"
        )
    devices = _look_at_devices(tell, build, report)
    tell("ops")
    for row in registry.OPS.values():
        found = report["ops"][row.name] = _self_test(row, devices)
        report["problems"] += _tell_op(tell, row.name, found)
    return report


def _look_at_devices(tell: Tell, build: BuildInfo, report: dict[str, Any]) -> list[str]:
    """Adds GPUs to the report; returns the devices whose kernels can be tested."""
    import torch

    features = ", ".join(build["cpu_features"]) or "baseline"
    _line(tell, "processor", f"{features}; kernels for {build['cpu_isa']}; {build['threads']} threads")
    count = torch.cuda.device_count()
    if build["cuda"]:
        kernels = f"CUDA {build['cuda_version']} for {', '.join(build['architectures'])}"
    else:
        kernels = "not built; with nvcc on PATH, a rebuild adds them" if count else "not built"
    _line(tell, "CUDA kernels", kernels)
    report["torch_cuda"] = torch.version.cuda
    _line(tell, "torch CUDA", str(torch.version.cuda or "not built"))
    report["gpus"] = []
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        gpu = {
            "name": found.name, "architecture": f"sm_{found.major}{found.minor}",
            "memory_gib": round(found.total_memory / 2**30, 1), "driver": _driver(),
        }  # fmt: skip
        report["gpus"].append(gpu)
        _line(
            tell, f"cuda:{index}",
            f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']:.0f} GiB, driver {gpu['driver'] or 'unknown'}",
        )  # fmt: skip
    return ["cpu", *(f"cuda:{index}" for index in range(count if build["cuda"] else 0))]


def _driver() -> str | None:
    """The NVIDIA driver's version, where nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _self_test(row: OpRow, devices: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """device -> dtype -> of_tolerance (1: all that is allowed) and failure (None: none)."""
    import torch

    from twotower_ext.registry import CPU_DTYPES, CUDA_DTYPES

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for device in devices if row.cuda else ["cpu"]:
        dtypes = CPU_DTYPES if device == "cpu" else CUDA_DTYPES
        found[device] = {str(d).removeprefix("torch."): _run_samples(row, device, d) for d in dtypes}
        if device != "cpu":
            torch.cuda.synchronize(device)
    return found


def _run_samples(row: OpRow, device: str, dtype: torch.dtype) -> dict[str, Any]:
    from twotower_ext import registry

    worst = 0.0
    try:
        for sample in row.samples(device, dtype):
            actual = row.op(*sample.args, **sample.kwargs)
            expected = row.reference(*sample.args, **sample.kwargs)
            if difference := registry.compare(actual, expected, row.tolerance[dtype]):
                return {"of_tolerance": None, "failure": f"{sample.name}: {difference}"}
            worst = max(worst, registry.share_of_tolerance(actual, expected, row.tolerance[dtype]))
    except Exception as error:  # whatever an op raises is the finding
        return {"of_tolerance": None, "failure": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {"of_tolerance": round(worst, 4), "failure": None}


def _tell_op(tell: Tell, name: str, found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Says how an op did; returns the problems."""
    outcomes = [(device, dtype, o) for device, dtypes in found.items() for dtype, o in dtypes.items()]
    failures = [f"{dtype} on {device}: {o['failure']}" for device, dtype, o in outcomes if o["failure"]]
    if failures:
        tell(f"  FAIL  {name:<22}{'; '.join(failures)}")
    else:
        share = max(o["of_tolerance"] for _, _, o in outcomes)
        tell(f"  ok    {name:<22}{', '.join(found['cpu'])} on {', '.join(found)}, error {share:.0%} of what is allowed")
    return [f"{name}, {failure}" for failure in failures]


def _installed(package: str) -> str | None:
    """The version of an importable package, None where there is none."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _line(tell: Tell, name: str, value: str) -> None:
    tell(f"{name:<14}{value}")
