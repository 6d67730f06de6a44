"""What the compiled kernels use of a multiprocessor, and which instructions they are made of.

`python tests/kernel_resources.py` prints the table of docs/kernel-resources.md; --write puts it there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "twotower_ext" / "libtwotower.so"
DOCUMENT = ROOT / "docs" / "kernel-resources.md"
BEGIN, END = "<!-- resources:begin -->", "<!-- resources:end -->"
# Kernels of implementation="cutlass", which only builds with TWOTOWER_CUTLASS=ON have: no table is about them.
OPTIONAL = re.compile(r"N7cutlass|7kernels7grouped|\bcutlass::|\bkernels::grouped::")
DTYPES = {"__nv_bfloat16": "bf16", "__half": "f16", "float": "f32"}


@dataclass(frozen=True)
class Usage:
    """Registers a thread; bytes of stack and local memory a thread, of static shared memory a block, of parameters."""

    registers: int
    stack: int
    shared: int
    local: int
    constant: int


def tool(package: str) -> Path:
    """The program of an nvidia-cuda-… package."""
    (found,) = [f for f in metadata.files(f"nvidia-cuda-{package}") or [] if f.name == package]
    return Path(str(found.locate()))


def cuobjdump(*arguments: str | Path) -> Iterator[str]:
    """The lines that cuobjdump prints; it needs nvdisasm on PATH."""
    path = f"{tool('nvdisasm').parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [tool("cuobjdump"), *arguments]
    environment = {**os.environ, "PATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}")


def usages(library: Path = LIBRARY) -> dict[str, dict[str, Usage]]:
    """kernel -> architecture -> usage, both in the library's order; kernels by their readable names."""
    found: dict[str, dict[str, Usage]] = {}
    architecture = kernel = ""
    for line in cuobjdump("--dump-resource-usage", library):
        if matched := re.match(r"arch = (\w+)", line):
            architecture = matched.group(1)
        elif matched := re.match(r" *Function (\w+):", line):
            kernel = matched.group(1)
        elif matched := re.match(r" *REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) .*CONSTANT\[0\]:(\d+)", line):
            found.setdefault(kernel, {})[architecture] = Usage(*map(int, matched.groups()))
    return {name: found[mangled] for mangled, name in readable(found).items()}


def readable(mangled: dict[str, object] | list[str]) -> dict[str, str]:
    """mangled -> short name such as `rms_norm_kernel<bf16, 8, 256>`; ValueError where two are called the same."""
    names = [name for name in mangled if not OPTIONAL.search(name)]
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    short = {m: shorten(demangled) for m, demangled in zip(names, text.splitlines(), strict=True)} if names else {}
    if len(set(short.values())) < len(short):
        twice = sorted(name for name in short.values() if list(short.values()).count(name) > 1)
        raise ValueError(f"kernels of one name: {', '.join(dict.fromkeys(twice))}")
    return short


def shorten(demangled: str) -> str:
    """A kernel's name without return type, parameters, namespaces and the name of its traits, which tells nothing."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    if name.endswith(")"):
        depth = 0
        for i in range(len(name) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(name[i], 0)
            if depth == 0:
                name = name[:i]
                break
    name = re.sub(r"\b\w+::", "", name)
    for long, short in DTYPES.items():
        name = re.sub(rf"\b{long}\b", short, name)
    name = re.sub(r"<(\w+Traits)<((?:[^<>]|<[^<>]*>)*)>", r"<\2", name)
    return re.sub(r"\s+>", ">", name)


@cache
def code(architecture: str, library: Path = LIBRARY) -> dict[str, list[str]]:
    """kernel -> the instructions of its machine code, with modifiers and operands, in order."""
    found: dict[str, list[str]] = {}
    kernel = ""
    for line in cuobjdump("-sass", "-arch", architecture, library):
        if matched := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*)", line):
            found[kernel].append(matched.group(1))
        elif matched := re.match(r"\s*Function : (\w+)", line):
            kernel = matched.group(1)
            found[kernel] = []
    return {name: found[mangled] for mangled, name in readable(found).items()}


def instructions(architecture: str, library: Path = LIBRARY) -> dict[str, frozenset[str]]:
    """kernel -> the instructions of its machine code, with their modifiers: `LDGSTS.E.BYPASS.128`."""
    return {kernel: frozenset(i.split()[0] for i in found) for kernel, found in code(architecture, library).items()}


def architectures(found: dict[str, dict[str, Usage]]) -> list[str]:
    return sorted({a for usage in found.values() for a in usage}, key=lambda a: int(re.sub(r"\D", "", a)))


def table(found: dict[str, dict[str, Usage]], cuda: str) -> str:
    """Markdown: a row a kernel, registers and static shared memory an architecture."""
    named = architectures(found)
    header = f"| kernel | {' | '.join(named)} |"
    lines = [f"Compiled by CUDA {cuda}: registers a thread, bytes of static shared memory a block.", "", header]
    lines.append("|---" * (1 + len(named)) + "|")
    for kernel in sorted(found):
        cells = [f"{u.registers}, {u.shared}" if (u := found[kernel].get(a)) else "–" for a in named]
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_in(text: str) -> tuple[str, str, str]:
    """(what comes before the table, the table, what comes after it); ValueError where a marker is not there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the document must hold {BEGIN} and then {END}, once each")
    before, rest = text.split(BEGIN)
    inner, after = rest.split(END)
    return f"{before}{BEGIN}\n", inner.strip(), f"\n{END}{after}"


def cuda_in(table: str) -> str:
    """The CUDA version that a table was made with."""
    matched = re.search(r"Compiled by CUDA ([\d.]+):", table)
    if not matched:
        raise ValueError("the table does not say which CUDA it was compiled by")
    return matched.group(1)


def kernels_in(table: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def main() -> None:
    from twotower_ext import build_info

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.relative_to(ROOT)}")
    write = parser.parse_args().write
    if not build_info()["cuda"]:
        parser.exit(2, "the package is built without CUDA: there are no kernels to read\n")
    made = table(usages(), build_info()["cuda_version"])
    if not write:
        print(made)
        return
    before, _, after = table_in(DOCUMENT.read_text(encoding="utf-8"))
    DOCUMENT.write_text(before + made + after, encoding="utf-8")


if __name__ == "__main__":
    main()
