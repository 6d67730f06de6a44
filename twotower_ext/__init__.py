"""Hand-written kernels for two-tower diffusion language models, as PyTorch ops on CPU and CUDA.

`twotower_ext.ops` holds the functions, `twotower_ext.reference` the slow and obvious torch version of each,
`twotower_ext.registry` one row per op that tests, benchmarks and documentation walk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower_ext import _library as _library  # loads the compiled ops before anything uses them
from twotower_ext import ops, reference
from twotower_ext._version import __version__

if TYPE_CHECKING:
    from twotower_ext._C import BuildInfo


def build_info() -> BuildInfo:
    """Facts about the compiled library: version, compiler, CUDA, architectures, CPU features, threads."""
    from twotower_ext import _C

    return _C.build_info()


__all__ = ["__version__", "build_info", "ops", "reference"]
