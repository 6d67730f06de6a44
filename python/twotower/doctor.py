"""Looks at an installation: versions, processor, devices; then runs every op against its reference."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from twotower_ext._C import BuildInfo
    from twotower_ext.registry import OpRow

REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "tqdm")
TESTED_DTYPES = ("float32", "bfloat16")
BUILD_HINT = (
    "build it with `pip install -e .` in the source folder (a C++ compiler is needed, and nvcc for CUDA kernels)"
)


def examine() -> list[str]:
    """Prints what there is, a line a fact and a line an op; returns the problems found, a line each."""
    _print("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    versions = {package: _installed(package) for package in REQUIRED}
    for package, version in versions.items():
        _print(package, version or "not installed")
    missing = [package for package, version in versions.items() if version is None]
    problems = [f"{package} is not installed; install it with `pip install {package}`" for package in missing]
    if "torch" in missing:  # without it, twotower_ext cannot say anything
        return problems
    try:
        import twotower_ext
        from twotower_ext import registry

        build = twotower_ext.build_info()
    except (ImportError, OSError) as error:
        _print("twotower-ext", "not usable")
        advice = "" if "pip install" in str(error) else f"; {BUILD_HINT}"
        return [*problems, f"the compiled library cannot be used: {error}{advice}"]

    _print("twotower-ext", f"{build['version']}, built by {build['compiler']}")
    if build["version"] != twotower_ext.__version__:
        problems.append(
            f"the compiled library is version {build['version']}, its Python files are "
            f"{twotower_ext.__version__}; {BUILD_HINT}"
        )
    devices = _print_devices(build)
    print("ops")
    for row in registry.OPS.values():
        problems += _self_test(row, devices)
    return problems


def _print_devices(build: BuildInfo) -> list[str]:
    """Prints processor and GPUs; returns the devices whose kernels can be tested."""
    import torch

    _print("processor", f"{', '.join(build['cpu_features']) or 'baseline'}; {build['threads']} threads")
    count = torch.cuda.device_count()
    if build["cuda"]:
        kernels = f"CUDA {build['cuda_version']} for {', '.join(build['architectures'])}"
    else:
        kernels = "not built; with nvcc on PATH, a rebuild adds them" if count else "not built"
    _print("CUDA kernels", kernels)
    _print("torch CUDA", str(torch.version.cuda or "not built"))
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        _print(f"cuda:{index}", f"{found.name}, sm_{found.major}{found.minor}, {memory}")
    if not build["cuda"]:
        return ["cpu"]
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def _self_test(row: OpRow, devices: list[str]) -> list[str]:
    """Runs an op's samples; prints one line and returns the problems."""
    import torch

    own_devices = devices if row.cuda else ["cpu"]
    failures = [
        f"{name} on {device}: {failure}"
        for device in own_devices
        for name in TESTED_DTYPES
        if (failure := _failure(row, device, getattr(torch, name)))
    ]
    passed = f"{', '.join(TESTED_DTYPES)} on {', '.join(own_devices)}"
    print(f"  {'FAIL' if failures else 'ok':<6}{row.name:<22}{'; '.join(failures) or passed}", flush=True)
    return [f"{row.name}, {failure}" for failure in failures]


def _failure(row: OpRow, device: str, dtype: torch.dtype) -> str | None:
    """How the first failing sample failed."""
    from twotower_ext import registry

    try:
        for sample in row.samples(device, dtype):
            actual = row.op(*sample.args, **sample.kwargs)
            expected = row.reference(*sample.args, **sample.kwargs)
            if difference := registry.compare(actual, expected, row.tolerance[dtype]):
                return f"{sample.name}: {difference}"
    except Exception as error:  # whatever an op raises is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _installed(package: str) -> str | None:
    """The version of an importable package, None where there is none."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _print(name: str, value: str) -> None:
    print(f"{name:<14}{value}")
