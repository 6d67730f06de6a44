"""Every damaged, incomplete or lying checkpoint is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import twotower
from checkpoint_files import INDEX, save_sharded, save_single, write_index
from safetensors.torch import load_file, save_file

SOME = "context_tower.layers.0.mixer.in_proj.weight"
OTHER = "denoiser_tower.layers.3.mixer.k_proj.weight"


@pytest.mark.parametrize("save", [save_single, save_sharded])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SOME), f"lacks '{SOME}', which config.json calls for"),
        (lambda t: t.pop("scale_shift_tables.7"), "lacks 'scale_shift_tables.7', which config.json calls for"),
        (lambda t: t.update(surplus=torch.ones(1)), "holds 'surplus', which config.json does not call for"),
        (
            lambda t: t.update({SOME: t[SOME].T.contiguous()}),
            rf"'{SOME}' must have shape \(200, 48\), got \(48, 200\)",
        ),
        (
            lambda t: t.update({"context_tower.layers.0.mixer.conv1d.weight": torch.ones(128, 4)}),
            r"'context_tower\.layers\.0\.mixer\.conv1d\.weight' must have shape \(128, 1, 4\), got \(128, 4\)",
        ),
        (lambda t: t.update({OTHER: t[OTHER].int()}), f"'{OTHER}' must be one of F64, F32, BF16, F16, got I32"),
        (lambda t: t.update({OTHER: t[OTHER].to(torch.float8_e4m3fn)}), f"'{OTHER}' must be one of .*, got F8_E4M3"),
    ],
)
def test_wrong_tensors(directory, tensors, save, change, message):
    tensors = dict(tensors)
    change(tensors)
    save(directory, tensors)
    with pytest.raises(ValueError, match=rf"safetensors.*: {message}"):
        twotower.load(directory)


def test_config_bigger_than_the_data(directory, tensors):
    save_single(directory, tensors)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"n_routed_experts": 4096}))
    with pytest.raises(ValueError, match=r"lacks 'context_tower.layers.1.mixer.experts.16.up_proj.weight', .* and \d+"):
        twotower.load(directory)
    (directory / "config.json").write_text(json.dumps(raw | {"vocab_size": 2**31 - 1}))
    with pytest.raises(ValueError, match=r"'context_tower.embeddings.weight' must have shape \(2147483647, 48\)"):
        twotower.load(directory)
    (directory / "config.json").write_text(json.dumps(raw | {"use_bias": True}))
    with pytest.raises(ValueError, match=r"config\.json: config field 'use_bias' must be false"):
        twotower.load(directory)


def test_damaged_files(directory, tensors):
    save_single(directory, tensors)
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    broken = {
        "cut in the data": whole[:-1],
        "cut in the header": whole[: 8 + header // 2],
        "cut in the length": whole[:5],
        "empty": b"",
        "longer than it says": whole + b"\0",
        "header length beyond the file": (1 << 40).to_bytes(8, "little") + whole[8:],
        "header is no JSON": whole[:8] + b"x" * header + whole[8 + header :],
        "tensors overlap": whole[:8]
        + whole[8 : 8 + header].replace(b'"data_offsets":[0,', b'"data_offsets":[1,')
        + b"",
    }
    for damage, content in broken.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
            twotower.load(directory)
        assert damage
    path.unlink()
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        twotower.load(directory)


def test_missing_files(directory, tensors):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such directory"):
        twotower.load(directory / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json: not a directory"):
        twotower.load(directory / "config.json")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        twotower.load(directory)
    save_sharded(directory, tensors)
    (directory / "model-00003-of-00007.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00007\.safetensors: no such file"):
        twotower.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        twotower.load(directory)


def test_truncated_shard(directory, tensors):
    save_sharded(directory, tensors)
    shard = directory / "model-00002-of-00007.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-00007\.safetensors: not a complete safetensors file"):
        twotower.load(directory)


def test_repeated_name_in_a_header(directory, tensors):
    """Twice the same entry: which one is read would be up to the reader."""
    save_single(directory, tensors)
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    entry = json.dumps({SOME: json.loads(whole[8 : 8 + length])[SOME]}).encode()
    header = entry[:-1] + b"," + whole[9 : 8 + length]
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    with pytest.raises(ValueError, match=rf"model\.safetensors: not valid JSON: key '{SOME}' appears twice"):
        twotower.load(directory)


def test_file_that_shrinks_while_it_is_read(directory, tensors, monkeypatch):
    save_single(directory, tensors)
    path = directory / "model.safetensors"
    original = twotower.weights._fill
    monkeypatch.setattr(twotower.weights, "_fill", lambda *args: os.truncate(path, 100_000) or original(*args))
    with pytest.raises(ValueError, match=r"model\.safetensors: '.*' cannot be read: the file has become shorter"):
        twotower.load(directory)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("x" * 5000, "x: cannot be read: File name too long"),
        ("x" * 5000 + "/a.safetensors", r"x/a\.safetensors: cannot be read: File name too long"),
        ("loop", "loop: cannot be read: Too many levels of symbolic links"),
        ("loop/a.safetensors", r"loop/a\.safetensors: cannot be read: Too many levels of symbolic links"),
        ("a\0b", "a\0b: cannot be read: embedded null byte"),
        ("a\0b/c", "a\0b/c: cannot be read: .*null"),
        ("\ud800", "cannot be read: .* surrogates not allowed"),
        ("config.json/a", r"config\.json/a: cannot be read: Not a directory"),
    ],
    ids=["long", "long folder", "loop", "looping folder", "null", "null in folder", "surrogate", "file as folder"],
)
def test_shard_names_that_no_file_can_have(directory, tensors, shard, message):
    (directory / "loop").symlink_to("loop")
    write_index(directory, dict.fromkeys(tensors, shard))
    with pytest.raises(ValueError, match=message):
        twotower.load(directory)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00007.safetensors"])
def test_unreadable_files(directory, tensors, monkeypatch, name):
    save_sharded(directory, tensors)
    original = open

    def denied(path, *args, **options):  # what root, who may read everything, never sees
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(ValueError, match=f"{name}: cannot be read: Permission denied"):
        twotower.load(directory)


def test_unreachable_directories(tmp_path):
    for path, reason in (("x" * 5000, "File name too long"), ("a\0b", "embedded null byte")):
        with pytest.raises(ValueError, match=f"cannot be read: {reason}"):
            twotower.load(tmp_path / path)


def test_index_that_is_a_link_to_nowhere(directory, tensors):
    """The single file beside it may be older."""
    save_single(directory, tensors)
    (directory / INDEX).symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"index\.json: no such file"):
        twotower.load(directory)


def test_index_that_does_not_tell_the_truth(directory, tensors):
    weight_map = save_sharded(directory, tensors)
    home = weight_map[SOME]
    away = next(file for file in weight_map.values() if file != home)

    write_index(directory, weight_map | {SOME: away})
    with pytest.raises(ValueError, match=f"says that {away} holds '{SOME}', but it does not"):
        twotower.load(directory)
    write_index(directory, {name: file for name, file in weight_map.items() if name != SOME})
    with pytest.raises(ValueError, match=f"{home}: holds '{SOME}', which {INDEX} does not list"):
        twotower.load(directory)

    held = load_file(directory / away)
    save_file(held | {SOME: tensors[SOME]}, directory / away)
    write_index(directory, weight_map)
    with pytest.raises(ValueError, match=f"{away}: holds '{SOME}', which overlaps with the one in {home}"):
        twotower.load(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "'weight_map' must map tensor names to file names"),
        ('{"weight_map": ["a"]}', "'weight_map' must map tensor names to file names"),
        ('{"weight_map": {"a": 1}}', "'weight_map' must map tensor names to file names"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "not valid JSON: key 'a' appears twice"),
        ('{"weight_map": {"a": ""}}', "shard '' must lie inside the directory"),
    ],
)
def test_malformed_index(directory, content, message):
    (directory / INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"index\.json: {message}"):
        twotower.load(directory)


@pytest.mark.parametrize("kind", ["parent", "absolute", "nested", "linked folder"])
def test_index_entry_that_leaves_the_directory(tmp_path, golden, tensors, kind):
    directory, outside = tmp_path / "checkpoint", tmp_path / "outside"
    directory.mkdir()
    outside.mkdir()
    shutil.copy(golden.checkpoint / "config.json", directory)
    save_file(tensors, outside / "all.safetensors")
    (directory / "folder").symlink_to(outside)
    entry = {
        "parent": "../outside/all.safetensors",
        "absolute": str(outside / "all.safetensors"),
        "nested": "a/../../outside/all.safetensors",
        "linked folder": "folder/all.safetensors",
    }[kind]
    write_index(directory, dict.fromkeys(tensors, entry))
    with pytest.raises(ValueError, match=rf"index\.json: shard '{entry}' must lie inside the directory"):
        twotower.load(directory)
