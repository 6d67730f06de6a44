"""What a figure is worth nothing without: processor or GPU, clocks, versions, the library's build and commit."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import twotower_ext
from twotower_ext import _evidence
from twotower_ext.registry import OPS

ROOT = Path(__file__).resolve().parent.parent
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CGROUP = Path("/sys/fs/cgroup")
FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")
GPU_QUERY = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "largest_sm_clock_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
# Of `facts`: what another machine or build would change, so that its timings cannot stand beside these.
IDENTITY = ("cpu", "cores", "gpu", "torch", "library")


def facts(backend: str) -> dict[str, Any]:
    """The machine and the software as JSON values; `backend` "cuda" adds the first GPU."""
    build = dict(twotower_ext.build_info())
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": cores(),
        "caches": caches(),
        "memory": memory()["MemTotal"],
        "clocks": clocks(),
        "busy": busy(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "library": library_digest(),
        "commit": commit(),
        "sources": {op: _evidence.sources(op, ROOT) for op, row in OPS.items() if row.cuda},
        "build": build,
        "environment": {k: v for k, v in sorted(os.environ.items()) if re.match("TWOTOWER_|OMP_|MKL_|KMP_|GOMP_", k)},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return found | (gpu() if backend == "cuda" else {})


def gpu() -> dict[str, Any]:
    """The first GPU: name, architecture, memory, driver and clocks (None where nvidia-smi does not tell them)."""
    properties = torch.cuda.get_device_properties(0)
    line = first_line("nvidia-smi", f"--query-gpu={','.join(GPU_QUERY.values())}", "--format=csv,noheader,nounits")
    told = [text.strip() for text in line.split(",")] if line else []
    if len(told) != len(GPU_QUERY):
        told = [""] * len(GPU_QUERY)
    return {
        "gpu": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "memory_mib": properties.total_memory // 2**20,
        "torch_cuda": torch.version.cuda,
        **{name: text or None for name, text in zip(GPU_QUERY, told, strict=True)},
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two sets of facts are of one machine with one build of the library."""
    return all(a.get(name) == b.get(name) for name in IDENTITY)


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_counts(largest: int) -> list[int]:
    """1, 2, 4 … and `largest`: the thread counts whose ceilings are measured."""
    return sorted({largest, *(2**i for i in range(largest.bit_length()) if 2**i <= largest)})


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Bytes of the caches that the first processor sees: "L1d", "L1i", "L2", "L3"."""
    sizes = {}
    for folder in sorted(CACHES.glob("index*")):
        level, kind, size = (_read(folder / name).strip() for name in ("level", "type", "size"))
        found = re.fullmatch(r"(\d+)([KM]?)", size)
        if found:
            name = f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")
            sizes[name] = int(found.group(1)) * {"": 1, "K": 2**10, "M": 2**20}[found.group(2)]
    return sizes


def memory() -> dict[str, int]:
    """Bytes: "MemTotal", and "MemAvailable", what can be had without swapping; both within a container's limit."""
    found = _system_memory()
    limit, used = (_read(CGROUP / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        found["MemTotal"] = min(found["MemTotal"], int(limit))
        found["MemAvailable"] = min(found["MemAvailable"], max(0, int(limit) - int(used)))
    return found


def _system_memory() -> dict[str, int]:
    told = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    if len(told) == 2:
        return {name: int(kib) * 1024 for name, kib in told.items()}
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "MemTotal": page * os.sysconf("SC_PHYS_PAGES"),
        "MemAvailable": page * os.sysconf("SC_AVPHYS_PAGES"),
    }


def free_memory(device: str) -> int:
    """Bytes that inputs on `device` may take."""
    return torch.cuda.mem_get_info()[0] if device.startswith("cuda") else memory()["MemAvailable"]


def busy(seconds: float = 0.3) -> float | None:
    """The share of all processors' time that went to others while this process slept; None where no one counts it."""
    before = _processor_time()
    time.sleep(seconds)
    after = _processor_time()
    if not before or not after:
        return None
    total, idle = (a - b for a, b in zip(after, before, strict=True))
    return 1 - idle / total if total > 0 else 0.0


def _processor_time() -> tuple[int, int] | None:
    """(all, idle) of all processors since boot, in the system's ticks."""
    found = re.search(r"^cpu +([\d ]+)$", _read("/proc/stat"), re.MULTILINE)
    if not found:
        return None
    ticks = [int(text) for text in found.group(1).split()][:8]  # user nice system idle iowait irq softirq steal
    return sum(ticks), sum(ticks[3:5])


def clocks() -> dict[str, Any]:
    """MHz of the first processor, now and at most, and who sets it; a virtual machine may tell only the first."""
    now = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    largest = _read(FREQUENCY / "cpuinfo_max_freq").strip()
    return {
        "now_mhz": float(now.group(1)) if now else None,
        "largest_mhz": int(largest) / 1000 if largest.isdigit() else None,
        "governor": _read(FREQUENCY / "scaling_governor").strip() or None,
    }


def library_digest() -> str:
    """Of the compiled library: tells builds apart that have the same version."""
    folder = Path(twotower_ext.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.so")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The source's commit, marked where files differ from it; without a history what the variable COMMIT says."""
    described = None
    if (ROOT / ".git").exists():
        described = first_line("git", "describe", "--always", "--dirty", "--abbrev=12")
    return described or os.environ.get("COMMIT")


def first_line(*command: str) -> str | None:
    """The first line a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def _read(path: str | Path) -> str:
    """A small file of the system, empty where it is not there."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def describe(found: dict[str, Any]) -> str:
    """One line: what the timings were taken on."""
    build = found["build"]
    if "gpu" in found:
        return f"{found['gpu']} ({found['architecture']}), torch {found['torch']}, driver {found['driver']}"
    isa = build.get("cpu_isa") or ", ".join(build["cpu_features"])
    return f"{found['cpu']}, {found['cores']} cores, {isa}, torch {found['torch']}, Python {sys.version.split()[0]}"
