"""Writing checkpoints, whole or in shards, for the tests that load them."""

from __future__ import annotations

import json

from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


def save_single(directory, tensors):
    save_file(tensors, directory / "model.safetensors")


def save_sharded(directory, tensors, count=7):
    """Deals the tensors out to `count` files; returns the index, to be falsified and written again."""
    names = sorted(tensors)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {name: files[i % count] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
