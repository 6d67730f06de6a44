"""What a bug to plant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, once in `file`, becomes `new`, a bug of the kernels `ops`. `tests` may see it, as far as -k selects."""

    name: str
    file: str
    old: str
    new: str
    ops: tuple[str, ...]
    tests: tuple[str, ...]
    select: str


def planted(file: str, ops: str, tests: str, select: str, *bugs: tuple[str, str, str]) -> tuple[Mutation, ...]:
    """Bugs (name, old, new) of one file."""
    files = tuple(f"test_{name}.py" for name in tests.split())
    return tuple(Mutation(name, f"csrc/{file}", old, new, tuple(ops.split()), files, select) for name, old, new in bugs)
