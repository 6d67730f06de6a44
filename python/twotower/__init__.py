"""Nemotron-Labs-TwoTower (arXiv 2606.26493) on the `twotower_ext` kernels: load and generate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twotower.config import Config
    from twotower.decode import GenerateOutput, Step, generate
    from twotower.state import LayerState, State
    from twotower.towers import TwoTowerModel
    from twotower.weights import load, save
    from twotower_ext._version import __version__

_HOMES = {
    "Config": "twotower.config",
    "GenerateOutput": "twotower.decode",
    "LayerState": "twotower.state",
    "State": "twotower.state",
    "Step": "twotower.decode",
    "TwoTowerModel": "twotower.towers",
    "__version__": "twotower_ext._version",
    "generate": "twotower.decode",
    "load": "twotower.weights",
    "save": "twotower.weights",
}

__all__ = [
    "Config",
    "GenerateOutput",
    "LayerState",
    "State",
    "Step",
    "TwoTowerModel",
    "__version__",
    "generate",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `twotower doctor` can speak where the compiled library is missing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
