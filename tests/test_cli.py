"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import twotower
from safetensors import safe_open
from screen import Screen
from tokenizers import Tokenizer, models, pre_tokenizers
from twotower import cli

import twotower_ext
from twotower_ext import registry

SHORT = ("--max-new-tokens", "20", "--device", "cpu")
GENERATE = ("--prompt-ids", "5,6,7", *SHORT)


@pytest.fixture(scope="module")
def checkpoint(golden) -> str:
    return str(golden.checkpoint)


@pytest.fixture(scope="module")
def with_tokenizer(golden, tmp_path_factory) -> str:
    """The golden checkpoint with a tokenizer whose token i is the word w<i>."""
    directory = tmp_path_factory.mktemp("words") / "checkpoint"
    shutil.copytree(golden.checkpoint, directory)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


@pytest.fixture(scope="module")
def model(checkpoint):
    return twotower.load(checkpoint, progress=False)


def subprocess_environment(**changes: str) -> dict[str, str]:
    """This process's environment, its import path included and without the size of its own terminal."""
    path = os.pathsep.join(str(Path(package.__file__).parent.parent) for package in (twotower_ext, twotower))
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    return kept | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "TERM": "xterm-256color"} | changes


def run_in_terminal(arguments: list[str], columns: int, rows: int, **environment: str) -> tuple[int, str, str]:
    """Runs the command with a pseudo-terminal as stdout: (status, what the terminal got, stderr)."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    terminal, stdout = pty.openpty()
    fcntl.ioctl(stdout, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=subprocess_environment(**environment),
    )
    os.close(stdout)
    received = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # how Linux reports that the other side is closed
            break
        if not chunk:
            break
        received += chunk
    os.close(terminal)
    stderr = process.communicate()[1]
    return process.returncode, received.decode(), stderr


# Output that no terminal reads


@pytest.mark.parametrize("mode", cli.MODES)
def test_ids_are_printed_plainly(mode, model, checkpoint, capsys):
    assert cli.main(["generate", checkpoint, *GENERATE, "--mode", mode, "--eos-token-id", "none"]) == 0
    stdout, stderr = capsys.readouterr()
    expected = twotower.generate(model, [[5, 6, 7]], mode, max_new_tokens=20, eos_token_id=None)
    assert stdout == " ".join(map(str, expected.tokens[0])) + "\n"
    found = re.fullmatch(
        r"20 tokens in [\d.]+ s: [\d.]+ tokens/s, NFE (\d+), ([\d.]+) tokens/NFE", stderr.splitlines()[-1]
    )
    assert found is not None
    assert found.groups() == (str(expected.nfe[0]), f"{20 / expected.nfe[0]:.2f}")


def test_every_setting_reaches_generate(checkpoint, monkeypatch, capsys):
    seen = {}
    output = twotower.GenerateOutput(tokens=[[1]], nfe=[1], seconds=1.0)
    monkeypatch.setattr(twotower, "generate", lambda model, prompts, **settings: seen.update(settings) or output)
    given = {
        "mode": "ar", "max_new_tokens": 7, "block_size": 5, "steps_per_block": 4, "confidence_threshold": 0.5,
        "temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 11, "eos_token_id": 8,
    }  # fmt: skip
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["generate", checkpoint, "--prompt-ids", "5", *options, "--dtype", "bfloat16", "--json"]) == 0
    assert {name: seen[name] for name in given} == given
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["dtype"] == "bfloat16"
    assert settings["device"] == ("cuda" if torch.cuda.is_available() and twotower_ext.build_info()["cuda"] else "cpu")


def test_output_ends_with_the_end_token(model, checkpoint, capsys):
    free = twotower.generate(model, [[5, 6, 7]], max_new_tokens=20, eos_token_id=None).tokens[0]
    end = free[5]
    assert cli.main(["generate", checkpoint, *GENERATE, "--eos-token-id", str(end)]) == 0
    assert capsys.readouterr().out.split() == [str(token) for token in free[: free.index(end) + 1]]


def test_json_is_one_object_and_nothing_else(checkpoint, with_tokenizer, capsys):
    assert cli.main(["generate", checkpoint, *GENERATE, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"mode", "tokens", "nfe", "seconds", "tokens_per_second", "tokens_per_nfe", "settings"} == set(result)
    assert result["tokens_per_nfe"] == len(result["tokens"]) / result["nfe"]
    assert cli.main(["generate", with_tokenizer, "--prompt", "w5 w6 w7", *SHORT, "--json"]) == 0
    with_text = json.loads(capsys.readouterr().out)
    assert with_text["tokens"] == result["tokens"]
    assert with_text["text"] == " ".join(f"w{token}" for token in result["tokens"])


def test_text_in_text_out(model, with_tokenizer, capsys):
    expected = twotower.generate(model, [[5, 6, 7]], max_new_tokens=20).tokens[0]
    for prompt in (["--prompt", "w5 w6 w7"], ["--prompt-ids", "5,6,7"]):
        assert cli.main(["generate", with_tokenizer, *prompt, *SHORT]) == 0
        assert capsys.readouterr().out == " ".join(f"w{token}" for token in expected) + "\n"


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --prompt --prompt-ids is required"),
        (["--prompt", "x", "--prompt-ids", "5"], "not allowed with argument"),
        (["--prompt", "hello"], "tokenizer.json"),
        (["--prompt", ""], "--prompt must not be empty"),
        (["--prompt-ids", ""], "must be integers separated by commas"),
        (["--prompt-ids", "5,x"], "must be integers separated by commas, got '5,x'"),
        (["--prompt-ids", "5,256"], "must be in [0, 256), got 256"),
        (["--prompt-ids", "9" * 30], "must be in [0, 256)"),
        (["--prompt-ids", "5", "--mode", "fast"], "invalid choice: 'fast'"),
        (["--prompt-ids", "5", "--block-size", "0"], "block_size"),
        (["--prompt-ids", "5", "--block-size", "many"], "--block-size"),
        (["--prompt-ids", "5", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["--prompt-ids", "5", "--temperature", "nan"], "temperature"),
        (["--prompt-ids", "5", "--top-p", "0"], "top_p"),
        (["--prompt-ids", "5", "--eos-token-id", "256"], "eos_token_id"),
        (["--prompt-ids", "5", "--eos-token-id", "never"], "must be an integer or none, got 'never'"),
        (["--prompt-ids", "5", "--device", "abacus"], "abacus"),
        (["--prompt-ids", "5", "--device", "cuda:99"], "cuda:99"),
        (["--prompt-ids", "5", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--prompt-ids", "5", "--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options, message, checkpoint, capsys):
    assert_one_line_error(["generate", checkpoint, *options], message, capsys)


def assert_one_line_error(arguments, message, capsys):
    assert cli.main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    lines = [line for line in stderr.splitlines() if not line.startswith("\r") and "loading" not in line]
    assert stdout == ""
    assert len(lines) == 1
    assert lines[0].startswith("twotower: error: ")
    assert message in lines[0]


def test_bad_files_are_one_line_errors(golden, tmp_path, capsys):
    missing = str(tmp_path / "nowhere")
    assert_one_line_error(["generate", missing, *GENERATE], f"{missing}: no such directory", capsys)
    assert_one_line_error(["info", missing], "no such file", capsys)
    assert_one_line_error([], "COMMAND", capsys)

    shutil.copy(golden.checkpoint / "config.json", tmp_path)
    assert_one_line_error(["generate", str(tmp_path), *GENERATE], "model.safetensors", capsys)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    assert_one_line_error(["generate", str(tmp_path), *GENERATE], "model.safetensors", capsys)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert_one_line_error(["generate", str(tmp_path), *GENERATE], "tokenizer.json: not a tokenizer", capsys)
    (tmp_path / "config.json").write_text("{")
    assert_one_line_error(["info", str(tmp_path)], "not valid JSON", capsys)


def test_many_line_messages_become_one():
    assert cli.one_line(RuntimeError("CUDA error\n  at line 3\n")) == "CUDA error at line 3"
    assert len(cli.one_line(RuntimeError("word " * 1000))) <= 600
    assert cli.one_line(MemoryError()) == "MemoryError"


def test_interruption_is_quiet(checkpoint, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(twotower, "load", interrupt)
    assert cli.main(["generate", checkpoint, *GENERATE]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet(checkpoint):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "twotower", "info", checkpoint]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=subprocess_environment(), check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"twotower {twotower.__version__}\n"


# The live display


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_a_terminal_shows_the_block_denoise(mode, model, checkpoint):
    columns, rows = 64, 10
    arguments = ["generate", checkpoint, *GENERATE, "--mode", mode, "--eos-token-id", "none"]
    status, received, stderr = run_in_terminal(arguments, columns, rows)
    assert status == 0, stderr
    expected = twotower.generate(model, [[5, 6, 7]], mode, max_new_tokens=20, eos_token_id=None, record=True)

    screen = Screen(columns, rows)
    frames = screen.frames(received)
    shown = [" ".join(frame).split() for frame in frames]
    evaluations = [words for words in shown if "tokens/s" in words]  # the status line is there
    assert len(evaluations) == len(expected.steps)
    undecided = {"mask_diffusion": 3, "ar": -1}[mode]
    for words, step in zip(evaluations, expected.steps, strict=True):
        block = ["░░░" if token == undecided else str(token) for token in step.block_after]
        cells = words[: words.index("block" if mode == "mask_diffusion" else "token")]
        assert cells == [str(token) for token in expected.tokens[0][: step.start]] + block
    if mode == "mask_diffusion":
        assert "░░░" in evaluations[0]
        assert "\x1b[0;1;32m" in received

    assert " ".join(screen.text()).split() == [str(token) for token in expected.tokens[0]]
    assert screen.cursor_visible
    assert "tokens/NFE" in stderr


@pytest.mark.parametrize("refusal", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_can_refuse_escape_sequences(refusal, checkpoint):
    status, received, stderr = run_in_terminal(["generate", checkpoint, *GENERATE], 80, 24, **refusal)
    assert status == 0, stderr
    assert re.fullmatch(r"(\d+ ?)+\r\n", received)


# info and doctor


def test_info_counts_what_the_file_holds(golden, model, tmp_path, capsys):
    shutil.copy(golden.checkpoint / "config.json", tmp_path)  # no weights beside it
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    with safe_open(golden.checkpoint / "model.safetensors", "pt") as file:
        names = file.keys()
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
    towers = {
        "context_tower": ("context_tower.", "context_lm_head."),
        "denoiser_tower": ("denoiser_tower.", "lm_head."),
    }
    for tower, prefixes in towers.items():
        own = {name: size for name, size in sizes.items() if name.startswith(prefixes)}
        experts = sum(size for name, size in own.items() if ".experts." in name)
        assert facts["parameters"][tower] == sum(own.values())
        assert facts["active_parameters_per_token"][tower] == sum(own.values()) - experts * 10 // 16
    assert facts["parameters"]["total"] == sum(sizes.values())
    assert facts["layers"] == {"mamba": 3, "attention": 2, "moe": 3}
    assert facts["weight_bytes"]["float32"] == sum(parameter.nbytes for parameter in model.parameters())

    def state_bytes(length):
        _, state = model.prefill([[5] * length])
        tensors = (tensor for layer in state.layers for tensor in (layer.conv, layer.ssm, layer.k, layer.v))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    held = facts["state_bytes"]["float32"]
    assert [state_bytes(n) for n in (1, 9)] == [held["per_row"] + n * held["per_token"] for n in (1, 9)]

    assert cli.main(["info", str(tmp_path / "config.json")]) == 0
    table = capsys.readouterr().out
    assert f"{sum(sizes.values()):,}" in table
    assert "MEM*EME*" in table


def test_doctor_finds_nothing_wrong(capsys):
    assert cli.main(["doctor"]) == 0
    stdout, stderr = capsys.readouterr()
    assert re.findall(r"^  ok +(\w+) +float32, bfloat16 on ", stdout, re.MULTILINE) == list(registry.OPS)
    assert stderr == ""
    assert torch.__version__.split("+")[0] in stdout


@pytest.mark.parametrize("fault", ["wrong numbers", "exception"])
def test_doctor_names_a_broken_op(fault, monkeypatch, capsys):
    class Broken(registry.OpRow):
        @property
        def op(self):
            if fault == "exception":
                raise RuntimeError("no such\nkernel")
            return lambda *args, **kwargs: super(Broken, self).op(*args, **kwargs) + 1

    row = registry.OPS["gated_group_rms_norm"]
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    monkeypatch.setitem(registry.OPS, row.name, Broken(**values))
    assert cli.main(["doctor"]) == 1
    stdout, stderr = capsys.readouterr()
    reason = {"wrong numbers": "largest difference", "exception": "RuntimeError: no such kernel"}[fault]
    assert re.search(rf"^  FAIL +{row.name} .*{reason}", stdout, re.MULTILINE)
    assert len(re.findall("^  ok ", stdout, re.MULTILINE)) == len(registry.OPS) - 1
    errors = stderr.splitlines()
    assert errors
    assert all(re.match(rf"twotower: error: {row.name}, .*{reason}", line) for line in errors)


def test_doctor_says_how_to_build_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "twotower_ext", None)
    assert cli.main(["doctor"]) == 1
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert "pip install -e ." in stderr
