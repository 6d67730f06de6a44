"""Loading: the same model from any layout and into any dtype, and every damaged checkpoint refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import twotower
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SOME = "context_tower.layers.0.mixer.in_proj.weight"
OTHER = "denoiser_tower.layers.3.mixer.k_proj.weight"


@pytest.fixture(scope="module")
def tensors(golden):
    return load_file(golden.checkpoint / "model.safetensors")


@pytest.fixture
def directory(golden, tmp_path):
    """An own copy of the checkpoint's config; tests put the tensors beside it."""
    shutil.copy(golden.checkpoint / "config.json", tmp_path / "config.json")
    return tmp_path


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


def assert_same_parameters(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


def test_every_tensor_lands_in_its_place(golden, tensors):
    model = twotower.load(golden.checkpoint)
    views = model.checkpoint_views()
    assert views.keys() == tensors.keys()
    for name, view in views.items():
        torch.testing.assert_close(view, tensors[name], rtol=0, atol=0)
    assert not model.training


def test_one_file_and_many_shards_load_alike(golden, directory, tensors):
    expected = twotower.load(golden.checkpoint)
    save_sharded(directory, tensors)
    assert_same_parameters(twotower.load(directory), expected)
    assert_same_parameters(twotower.load(str(directory), "cpu", progress=False), expected)
    # The index wins over a single file, which need not even be one.
    (directory / "model.safetensors").write_text("not safetensors")
    (directory / "unlisted.safetensors").write_text("not safetensors")
    assert_same_parameters(twotower.load(directory), expected)


def test_shards_in_a_folder_below(golden, directory, tensors):
    (directory / "weights").mkdir()
    save_file(tensors, directory / "weights" / "all.safetensors")
    write_index(directory, dict.fromkeys(tensors, "weights/all.safetensors"))
    assert_same_parameters(twotower.load(directory), twotower.load(golden.checkpoint))


def test_dtypes(golden, directory, tensors):
    save_single(directory, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    stored = twotower.load(directory)
    assert stored.dtype == stored.context.embeddings.dtype == torch.bfloat16
    assert stored.context.layers[0].A_log.dtype == torch.float32
    assert_same_parameters(twotower.load(directory, dtype=torch.bfloat16), stored)

    wide = twotower.load(directory, dtype=torch.float64)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    single = twotower.load(golden.checkpoint, dtype=torch.float32)
    torch.testing.assert_close(wide.denoiser.head, single.denoiser.head.bfloat16().double(), rtol=0, atol=0)
    half = twotower.load(golden.checkpoint, dtype=torch.float16)
    torch.testing.assert_close(half.context.layers[1].up, single.context.layers[1].up.half(), rtol=0, atol=0)
    torch.testing.assert_close(half.context.layers[1].gate, single.context.layers[1].gate, rtol=0, atol=0)


def test_progress_bar(golden, capfd):
    twotower.load(golden.checkpoint, progress=True)
    shown = capfd.readouterr()
    assert "loading" in shown.err
    assert "100%" in shown.err
    assert not shown.out
    twotower.load(golden.checkpoint, progress=False)
    twotower.load(golden.checkpoint)  # stderr is no terminal here
    assert capfd.readouterr() == ("", "")


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
    (directory / "config.json").write_text(json.dumps(raw | {"vocab_size": 1 << 40}))
    with pytest.raises(ValueError, match=r"'context_tower.embeddings.weight' must have shape \(1099511627776, 48\)"):
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
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such directory"):
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


def test_files_may_be_links_into_a_download_cache(tmp_path, golden, tensors):
    blobs, directory = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    directory.mkdir()
    save_file(tensors, blobs / "1a2b")
    shutil.copy(golden.checkpoint / "config.json", blobs / "3c4d")
    (directory / "config.json").symlink_to(blobs / "3c4d")
    (directory / "all.safetensors").symlink_to(blobs / "1a2b")
    write_index(directory, dict.fromkeys(tensors, "all.safetensors"))
    assert twotower.load(directory).config == twotower.load(golden.checkpoint).config


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": 5}, TypeError, "path must be a path, got int"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype or None, got 'bfloat16'"),
        ({"time_dtype": 1}, TypeError, "time_dtype must be a torch.dtype or None, got 1"),
        ({"dtype": torch.int8}, ValueError, r"dtype must be one of .*, got torch\.int8"),
        (
            {"time_dtype": torch.float16},
            ValueError,
            r"time_dtype must be None, float32 or bfloat16, got torch\.float16",
        ),
        ({"device": 0}, TypeError, "context_device must be a string or torch.device, got int"),
        ({"device": "gpu"}, ValueError, "context_device must name a device such as 'cpu' or 'cuda:0', got 'gpu'"),
        ({"device": "meta"}, ValueError, "context_device must be a CPU or CUDA device, got meta"),
        ({"denoiser_device": "cuda:99"}, ValueError, r"denoiser_device must be a device of this machine, got cuda:99"),
        ({"device": "cpu", "context_device": "cuda:99"}, ValueError, "context_device must be a device of this machine"),
    ],
)
def test_bad_arguments(golden, arguments, error, message):
    with pytest.raises(error, match=message):
        twotower.load(**{"path": golden.checkpoint, **arguments})


def test_loading_takes_one_tensor_at_a_time(golden, monkeypatch):
    """Context tower first, then the denoiser, each tensor read exactly once, all checked before any is read."""
    order = []
    original = twotower.weights._File.tensor
    monkeypatch.setattr(twotower.weights._File, "tensor", lambda file, name: order.append(name) or original(file, name))
    model = twotower.load(golden.checkpoint)
    assert order == list(model.checkpoint_views())
    towers = [name.split("_")[0] for name in order]
    assert towers.index("denoiser") > max(i for i, tower in enumerate(towers) if tower == "context")
    with safe_open(golden.checkpoint / "model.safetensors", "pt") as file:
        assert sorted(order) == sorted(file.keys())
