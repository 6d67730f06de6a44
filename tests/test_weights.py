"""Loading: the same model from any layout and into any dtype, in the memory that it needs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import twotower
from checkpoint_files import save_sharded, save_single, write_index
from safetensors import safe_open
from safetensors.torch import save_file
from twotower import Config


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


def test_no_bar_without_stderr(golden, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as in a daemon
    for progress in (None, True, False):
        assert twotower.load(golden.checkpoint, progress=progress).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": 5}, TypeError, "path must be a path, got int"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype or None, got 'bfloat16'"),
        ({"time_dtype": 1}, TypeError, "time_dtype must be a torch.dtype or None, got 1"),
        ({"progress": 5}, TypeError, "progress must be a bool or None, got 5"),
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


PEAK_OF_LOADING = """
import sys, torch, twotower

def peak():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024

twotower.load(sys.argv[1])  # what is allocated once: libraries, threads
before = peak()
model = twotower.load(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def big_checkpoint(golden, tmp_path_factory):
    """198 MiB of float32 in seven shards: (directory, shape of every tensor)."""
    directory = tmp_path_factory.mktemp("big")
    raw = json.loads((golden.checkpoint / "config.json").read_text())
    raw |= {"vocab_size": 24 << 10, "hidden_size": 512, "hybrid_override_pattern": "M", "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(raw))
    shapes = Config.from_dict(raw).parameter_shapes()
    save_sharded(directory, {name: torch.rand(shape) for name, shape in shapes.items()})
    yield directory, shapes
    shutil.rmtree(directory)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_memory_of_the_model_and_one_tensor(golden, big_checkpoint, dtype):
    """Mapped files count as memory too, as do tensors kept longer than needed."""
    directory, shapes = big_checkpoint
    command = [sys.executable, "-c", PEAK_OF_LOADING, golden.checkpoint, directory, dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sizes = [math.prod(shape) for shape in shapes.values()]
    stays = sum(sizes) * getattr(torch, dtype).itemsize
    assert 0.9 * stays < int(done.stdout) < stays + 4 * max(sizes) + (16 << 20)
