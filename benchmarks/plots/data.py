"""What the pictures read from a result file."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

FORWARDS = {
    "denoise": "denoiser forward",
    "denoise-commit": "denoise step: forward, head, commit",
    "ar": "autoregressive step",
    "prefill64": "prefill of 64 tokens",
    "prefill2048": "prefill of 2,048 tokens",
}


class Case(NamedTuple):
    """A measured case: the op, what is particular to the case, and its entry in the file."""

    op: str
    variant: str
    entry: dict[str, Any]

    @property
    def label(self) -> str:
        """`block_attention 16 rows context 4096` of the variant `rows16-context4096`."""
        words = re.sub(r"rows(\d+)", r"\1 rows", re.sub(r"[_/-]", " ", self.variant))
        words = re.sub(r"([a-z])(\d)", r"\1 \2", re.sub(r"\b1 rows", "1 row", words))
        return f"{self.op} {words}".rstrip()


def groups(result: dict[str, Any]) -> dict[tuple[str, str], list[Case]]:
    """The cases by shape and dtype, as `op/shape/dtype/variant` names them, in the file's order."""
    found: dict[tuple[str, str], list[Case]] = {}
    for key, entry in result["results"].items():
        group, case = _case(key, entry)
        found.setdefault(group, []).append(case)
    return found


def absent(result: dict[str, Any], shape: str, dtype: str) -> list[str]:
    """The cases of this shape and dtype that have no time, and why."""
    found = []
    for why, reasons in (("refused, its results are wrong", result["refused"]), ("not run", result["skipped"])):
        for key, reason in reasons.items():
            group, case = _case(key, {})
            if group == (shape, dtype) and case.op != "model":
                found.append(f"{case.label}: {why}: {reason}")
    return found


def _case(key: str, entry: dict[str, Any]) -> tuple[tuple[str, str], Case]:
    op, shape, dtype, variant = (*key.split("/", 3), "", "", "")[:4]
    return (shape, dtype), Case(op, variant, entry)


def ceiling(result: dict[str, Any], name: str) -> float | None:
    """A ceiling at the threads of the run, in bytes/s or FLOP/s; None where it was not measured."""
    values = result["ceilings"].get(name, {})
    return values.get("1" if result["settings"].get("backend") == "cuda" else str(result["settings"].get("threads")))


def forwards(result: dict[str, Any]) -> dict[tuple[str, str], list[Case]]:
    """The timed forwards of models by shape and dtype."""
    found: dict[tuple[str, str], list[Case]] = {}
    for (shape, dtype), entries in models(result).items():
        timed = [Case(FORWARDS.get(name, name), "", entry) for name, entry in entries.items() if "peers" in entry]
        if timed:
            found[shape, dtype] = timed
    return found


def models(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """What the file knows of models: by shape and dtype, the entries by name ("denoise", "batch", …)."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for key, entry in result["model"].items():
        shape, dtype, name = (*key.split("/", 2), "", "")[:3]
        found.setdefault((shape, dtype), {})[name] = entry
    return found


def block(result: dict[str, Any], shape: str) -> int:
    """Tokens of a block."""
    return result["settings"].get("dimensions", {}).get(shape, {}).get("block", 16)


def device(result: dict[str, Any]) -> str:
    """One line that says what was measured on, as far as the file knows it."""
    machine, settings = result["machine"], result["settings"]
    cuda = settings.get("backend") == "cuda"
    facts = [str(machine[name]) for name in (("gpu",) if cuda else ("cpu",)) if machine.get(name)]
    if not cuda and settings.get("threads"):
        facts.append(f"{settings['threads']} threads" if settings["threads"] != 1 else "1 thread")
    if not cuda and settings.get("isa"):
        facts.append(f"kernels {settings['isa']}")
    facts += [f"{name} {machine[name]}" for name in ("torch", "commit") if machine.get(name)]
    return ", ".join(facts)


def seconds(value: float) -> str:
    """Three digits in the unit that suits: `12.3 ms`."""
    factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if value * f >= 0.9995), (1e6, "µs"))
    return f"{three_digits(value * factor)} {unit}"


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def rate(value: float, unit: str) -> str:
    """`21.4 GB/s`, `790 TFLOP/s`."""
    factor, prefix = next(((f, p) for f, p in ((1e12, "T"), (1e9, "G")) if value >= 0.9995 * f), (1e6, "M"))
    return f"{three_digits(value / factor)} {prefix}{unit}"
