"""`python tests/planted.py memcheck` (or racecheck): runs the kernel with the bug that this sanitizer must find.

A sanitizer that reports nothing of it is not watching. Needs a GPU.
"""

from __future__ import annotations

import sys

import torch
from backends import Backend
from primitives import run

PLANTED = {"memcheck": "planted_bounds", "racecheck": "planted_race"}


def main() -> None:
    doubled = 2 * torch.ones(64, device="cuda")  # torch itself must work under the sanitizer
    assert doubled.sum().item() == 128
    out = torch.zeros(64, dtype=torch.int32)
    run(Backend("cuda"), PLANTED[sys.argv[1]], torch.arange(64, dtype=torch.int32), out)


if __name__ == "__main__":
    main()
