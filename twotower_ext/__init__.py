"""Hand-written kernels for two-tower diffusion language models, as PyTorch ops on CPU and CUDA.

`twotower_ext.ops` holds the functions, `twotower_ext.reference` the slow and obvious torch version of each,
`twotower_ext.registry` one row per op that tests, benchmarks and documentation walk. `twotower_ext.array` has the ops
for arrays of any library; it alone is there where torch is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twotower_ext._version import __version__

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
else:
    from twotower_ext import _library as _library  # loads the compiled ops before anything uses them
    from twotower_ext import ops, reference

if TYPE_CHECKING:
    from twotower_ext._C import BuildInfo


def build_info() -> BuildInfo:
    """Facts about the compiled library: version, compiler, CUDA, architectures, CPU features, threads."""
    from twotower_ext import _C

    return _C.build_info()


def __getattr__(name: str) -> Any:
    if name in ("ops", "reference"):  # with torch they are imported above
        raise ImportError(f"twotower_ext.{name} needs torch, which is not installed; twotower_ext.array does not")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["__version__", "build_info", "ops", "reference"]
