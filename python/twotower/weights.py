"""Strict loading of a checkpoint: `config.json` beside one safetensors file, or an index and its shards."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from tqdm import tqdm

from twotower.config import Config, Shape, naming, parse_json, read_bytes, read_json
from twotower.towers import DTYPES, TwoTowerModel

_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    context_device: str | torch.device | None = None,
    denoiser_device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    time_dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> TwoTowerModel:
    """Loads the model of a checkpoint directory, tower by tower, tensor by tensor, straight to its device and
    dtype.

    path: directory with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its
        shards (the index wins where both are there).
    device: where both towers go, "cpu" when None; context_device and denoiser_device override it tower by
    tower. dtype: float32, bfloat16, float16 or float64; None keeps the dtype in which the embeddings are
        stored. Recurrence and router parameters become float32 (float64 in a float64 model) in any case.
    time_dtype: torch.bfloat16 reproduces the publisher's rounding of the time features; None is float32.
    progress: a progress bar on stderr; None shows it only on a terminal.

    All names, shapes and dtypes are checked before any memory is taken; reading then needs no more than one
    tensor beside the model. Raises FileNotFoundError for a
    missing directory or file, TypeError for an argument or config field of the wrong type, and ValueError for
    an unreadable or damaged file, an index that leaves the directory or does not tell the truth, and missing, extra,
    repeated or mis-shaped tensors, each by name.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"load: path must be a path, got {type(path).__name__}")
    for name, value in (("dtype", dtype), ("time_dtype", time_dtype)):
        if value is not None and not isinstance(value, torch.dtype):
            raise TypeError(f"load: {name} must be a torch.dtype or None, got {value!r}")
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"load: progress must be a bool or None, got {progress!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"load: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    context_at = _usable_device("context_device", context_device if context_device is not None else device)
    denoiser_at = _usable_device("denoiser_device", denoiser_device if denoiser_device is not None else device)
    directory = Path(path)
    with naming(directory, "directory"):
        mode = os.stat(directory).st_mode
    if not stat.S_ISDIR(mode):
        raise FileNotFoundError(f"{directory}: not a directory")

    config = Config.from_json(directory / "config.json")
    source, files = _open_checkpoint(directory)
    _check_tensors(source, files, config.parameter_shapes())
    if dtype is None:
        dtype = _STORED_DTYPES[files["context_tower.embeddings.weight"].stored_dtype("context_tower.embeddings.weight")]

    model = TwoTowerModel(
        config, context_device=context_at, denoiser_device=denoiser_at, dtype=dtype, time_dtype=time_dtype
    )
    _fill(model, files, progress)
    return model.eval()


def save(model: TwoTowerModel, path: str | os.PathLike[str]) -> None:
    """Writes `config.json` and `model.safetensors` as `load` reads them, in the published layout: bfloat16, router
    corrections float32. Each file is replaced whole or not at all; the directory is made where it is missing.

    Raises TypeError for arguments of the wrong type, ValueError for a directory of shards, which would go first in
    `load`, and for files that cannot be written.
    """
    if not isinstance(model, TwoTowerModel):
        raise TypeError(f"save: model must be a TwoTowerModel, got {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"save: path must be a path, got {type(path).__name__}")
    directory = Path(path)
    if os.path.lexists(directory / INDEX):
        raise ValueError(f"save: {directory} holds {INDEX}, which `load` would read; choose another directory")
    with naming(directory, "directory", "made"):
        directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: view.to("cpu", torch.float32 if name.endswith("correction_bias") else torch.bfloat16).contiguous()
        for name, view in model.checkpoint_views().items()
    }
    replace_file(
        directory / "config.json", lambda new: new.write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    )
    replace_file(directory / SINGLE, lambda new: new.write_bytes(serialize(tensors)))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `path` and moves it there, so that readers never see half of it."""
    new = path.with_name(f".{path.name}.new")
    try:
        with naming(path, "folder", "written"):
            write(new)
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


class _File:
    """A safetensors file; everything wrong with it becomes a ValueError that names it.

    Tensors are read, not mapped: pages of a mapped file would count as memory until it is closed.
    """

    def __init__(self, path: Path):
        self.path = path
        length = int.from_bytes(read_bytes(path, 0, 8), "little")
        try:
            with safe_open(path, "pt"):  # checks header, offsets and size
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a complete safetensors file: {error}") from None
        self._entries = parse_json(path, read_bytes(path, 8, length))
        self._entries.pop("__metadata__", None)
        self._data = 8 + length
        self.names = self._entries.keys()

    def shape(self, name: str) -> Shape:
        return tuple(self._entries[name]["shape"])

    def stored_dtype(self, name: str) -> str:
        return str(self._entries[name]["dtype"])

    def tensor(self, name: str) -> torch.Tensor:
        begin, end = self._entries[name]["data_offsets"]
        content = read_bytes(self.path, self._data + begin, end - begin)
        if len(content) != end - begin:
            raise ValueError(f"{self.path}: {name!r} cannot be read: the file has become shorter")
        return torch.frombuffer(content, dtype=_STORED_DTYPES[self.stored_dtype(name)]).view(self.shape(name))


def _usable_device(name: str, device: Any) -> torch.device:
    if device is None:
        return torch.device("cpu")
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"load: {name} must be a string or torch.device, got {type(device).__name__}")
    try:
        usable = torch.device(device)
    except RuntimeError:
        raise ValueError(f"load: {name} must name a device such as 'cpu' or 'cuda:0', got {device!r}") from None
    if usable.type == "cuda":
        count = torch.cuda.device_count()
        index = usable.index if usable.index is not None else 0
        if index >= count:
            raise ValueError(f"load: {name} must be a device of this machine, got {device} of {count} CUDA devices")
        return torch.device("cuda", index)
    if usable.type != "cpu":
        raise ValueError(f"load: {name} must be a CPU or CUDA device, got {device}")
    return torch.device("cpu")


def _open_checkpoint(directory: Path) -> tuple[Path, dict[str, _File]]:
    """(the file that lists the tensors, tensor name -> file that holds it)."""
    index = directory / INDEX
    if os.path.lexists(index):  # a link that leads nowhere is an error
        return index, _open_shards(directory, index)
    single = _File(directory / SINGLE)
    return single.path, dict.fromkeys(single.names, single)


def _open_shards(directory: Path, index: Path) -> dict[str, _File]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: 'weight_map' must map tensor names to file names")
    root = directory.resolve()
    shards: dict[str, _File] = {}
    for shard in sorted(set(weight_map.values())):
        # The file itself may be a link (download caches link every file); the folder it lies in may not lead outside.
        path = directory / shard
        with naming(path, "file"):
            folder = Path(os.path.realpath((root / shard).parent))
        if Path(shard).name in ("", "..") or not folder.is_relative_to(root):
            raise ValueError(f"{index}: shard {shard!r} must lie inside the directory")
        shards[shard] = _File(path)

    for name, shard in weight_map.items():
        if name not in shards[shard].names:
            raise ValueError(f"{index}: says that {shard} holds {name!r}, but it does not")
    for shard, file in shards.items():
        for name in sorted(file.names):
            if name not in weight_map:
                raise ValueError(f"{file.path}: holds {name!r}, which {INDEX} does not list")
            if weight_map[name] != shard:
                raise ValueError(f"{file.path}: holds {name!r}, which overlaps with the one in {weight_map[name]}")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _check_tensors(source: Path, files: Mapping[str, _File], shapes: Mapping[str, Shape]) -> None:
    if missing := [name for name in shapes if name not in files]:
        raise ValueError(f"{source}: lacks {_listed(missing)}, which config.json calls for")
    if extra := sorted(name for name in files if name not in shapes):
        raise ValueError(f"{source}: holds {_listed(extra)}, which config.json does not call for")
    for name, expected in shapes.items():
        file = files[name]
        if file.shape(name) != expected:
            raise ValueError(f"{file.path}: {name!r} must have shape {expected}, got {file.shape(name)}")
        if file.stored_dtype(name) not in _STORED_DTYPES:
            raise ValueError(
                f"{file.path}: {name!r} must be one of {', '.join(_STORED_DTYPES)}, got {file.stored_dtype(name)}"
            )


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    rest = len(listed) - 8
    return ", ".join(map(repr, listed[:8])) + (f" and {rest} more" if rest > 0 else "")


@torch.no_grad()
def _fill(model: TwoTowerModel, files: Mapping[str, _File], progress: bool | None) -> None:
    views = model.checkpoint_views()
    total = sum(math.prod(view.shape) * view.element_size() for view in views.values())
    if sys.stderr is None:  # as in a daemon
        progress = False
    disabled = None if progress is None else not progress
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=disabled) as bar:
        for name, view in views.items():
            view.copy_(files[name].tensor(name))
            bar.update(math.prod(view.shape) * view.element_size())
