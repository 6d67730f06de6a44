"""A libFuzzer target for the loader, by atheris: `make fuzz-checkpoint TIME=600`.

The first byte of an input says what the rest is: the config, the index of shards, or the file of weights of a
checkpoint that is otherwise in order. Whatever it holds, the loader may raise TypeError, ValueError or OSError, and has
to name the checkpoint. tests/corpus/checkpoint holds where to begin; its files are tests too (tests/test_harden.py).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "checkpoint"
CORPUS = Path(__file__).parent / "corpus" / "checkpoint"
FILES = ("config.json", "model.safetensors.index.json", "model.safetensors")


def attempt(data: bytes) -> str | None:
    """How the loader refused the checkpoint; None: it took it. Any other exception is a finding."""
    import twotower

    which, content = FILES[data[0] % len(FILES)] if data else FILES[0], data[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in GOLDEN.iterdir():
            if path.name != which and not (path.name == FILES[2] and which == FILES[1]):
                (folder / path.name).symlink_to(path)
        (folder / which).write_bytes(content)
        try:
            twotower.load(folder, progress=False)
        except (TypeError, ValueError, OSError) as error:
            if name not in str(error):
                raise AssertionError(f"does not name the checkpoint: {error}") from error
            return str(error).replace(name, "")
    return None


def seeds() -> dict[str, bytes]:
    """What the corpus begins with: each file whole, cut, and with other JSON in it."""
    config = (GOLDEN / FILES[0]).read_bytes()
    weights = (GOLDEN / FILES[2]).read_bytes()
    end = 8 + int.from_bytes(weights[:8], "little")
    index = b'{"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}'
    small = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    small = len(small).to_bytes(8, "little") + small + bytes(24)
    return {
        "config": b"\0" + config, "config-cut": b"\0" + config[:99], "config-list": b"\0[1, 2]",
        "config-empty": b"\0", "index": b"\1" + index, "index-null": b"\1null",
        "index-up": b"\1" + index.replace(b"model-00001", b"../../etc"), "weights-header": b"\2" + weights[:end],
        "weights-small": b"\2" + small, "weights-cut": b"\2" + weights[:7],
        "weights-huge": b"\2" + b"\xff" * 8 + b"{}",
    }  # fmt: skip


def _target(data: bytes) -> None:
    attempt(data)


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["twotower", "twotower.config", "twotower.weights"]):
        import twotower.config
        import twotower.weights  # noqa: F401

    atheris.Setup(sys.argv, _target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
