"""Loads the compiled torch face, which registers every op with torch's dispatcher."""

from __future__ import annotations

from pathlib import Path

import torch

OLDEST_TORCH = (2, 11)

_path = Path(__file__).parent / "_torch.so"

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    raise ImportError(f"twotower_ext needs torch >= 2.11, found {torch.__version__}")
if not _path.exists():
    raise ImportError(
        f"twotower_ext is not built: {_path.name} is missing beside {__file__}. Run `pip install .` in the source "
        "folder; if that is done already, Python found the source folder first: start it elsewhere, or install "
        "with `pip install -e .`"
    )
torch.ops.load_library(str(_path))
