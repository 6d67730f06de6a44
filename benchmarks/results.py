"""Results as JSON: one file a backend, written whole after every case, read back by --compare, pictures and tests."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1
KEY = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*")
SECTIONS = ("machine", "settings", "ceilings", "results", "refused", "skipped", "model")
ENTRY = ("seconds", "low", "high", "runs", "flops", "bytes", "floor", "of_floor", "read_fraction")  # all numbers
FOLDER = Path(__file__).resolve().parent / "results"


def new(machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A file without results. The sections:

    machine (facts), settings (of the run), ceilings (name -> threads -> bytes/s or FLOP/s), results (key of a case ->
    entry, times in seconds), refused (key -> how its results are wrong), skipped (key -> why it was not run), model
    (end to end).
    """
    return {"schema": SCHEMA, **{name: {} for name in SECTIONS}, "machine": machine, "settings": settings}


LOCAL = "local-"  # begins the names of files, and of their pictures, that are not committed


def default_path(backend: str, quick: bool = False) -> Path:
    """Where results go unless a file is named: `benchmarks/results` in a source checkout, else the current folder."""
    name = f"{backend}-quick" if quick else backend
    checkout = FOLDER.parent.parent / "pyproject.toml"
    return FOLDER / f"{LOCAL}{name}.json" if checkout.exists() else Path(f"twotower-bench-{name}.json")


def save(path: Path, data: dict[str, Any]) -> None:
    """Replaces the file in one step, so that whoever reads it, or is interrupted, has all of it or what was before."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """Reads and checks a file; FileNotFoundError or ValueError, naming it, where it is missing or of no such schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    try:
        validate(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return data


def validate(data: Any) -> None:
    """ValueError, naming the place, where `data` is not a results file of this schema."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"not benchmark results of schema {SCHEMA}, got {found!r}")
    for section in SECTIONS:
        if not isinstance(data.get(section), dict):
            raise ValueError(f"section {section!r} must be an object")
    for name, values in data["ceilings"].items():
        if not isinstance(values, dict) or not all(_positive(v) for v in values.values()):
            raise ValueError(f"ceiling {name!r} must hold a positive number for each count of threads")
    for key, entry in data["results"].items():
        _check_entry(key, entry)


def _check_entry(key: str, entry: Any) -> None:
    if not KEY.fullmatch(key):
        raise ValueError(f"result {key!r}: a key may hold letters, digits and _ . - between slashes")
    if not isinstance(entry, dict):
        raise ValueError(f"result {key!r} must be an object")
    for name in ENTRY:
        if not _number(entry.get(name)):
            raise ValueError(f"result {key!r}: {name!r} must be a number, got {entry.get(name)!r}")
    if not 0 < entry["low"] <= entry["seconds"] <= entry["high"]:
        raise ValueError(f"result {key!r}: low, seconds and high must be positive and in this order")
    for peer, timing in entry.get("peers", {}).items():
        for name in ("seconds", "low", "high", "ratio", "ratio_low", "ratio_high"):
            if not _positive(timing.get(name)):
                raise ValueError(f"result {key!r}, peer {peer!r}: {name!r} must be positive")


def lookup(data: dict[str, Any], path: str) -> Any:
    """What stands at `path`: keys joined by "/", which keys may hold themselves.

    The longest key that fits is taken first. ValueError where nothing is there.
    """
    for found in _resolve(data, path):
        return found
    raise ValueError(f"the results hold nothing at {path!r}")


def _resolve(node: Any, path: str):
    if not path:
        yield node
    elif isinstance(node, dict):
        for key in sorted(node, key=len, reverse=True):
            if path == key:
                yield node[key]
            elif path.startswith(f"{key}/"):
                yield from _resolve(node[key], path[len(key) + 1 :])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number that JSON knows")
