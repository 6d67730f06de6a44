"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import twotower
from screen import Screen
from tokenizers import Tokenizer, models, pre_tokenizers
from twotower import cli, continuation

import twotower_ext
from twotower_ext import registry

SHORT = ("--max-new-tokens", "20", "--device", "cpu")
GENERATE = ("--prompt-ids", "5,6,7", *SHORT)
PLACE = ("--device", "cpu", "--dtype", "bfloat16")


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
    assert cli.main(["generate", checkpoint, "--prompt-ids", "5", *options, *PLACE, "--json"]) == 0
    assert {name: seen[name] for name in given} == given
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["device"], settings["dtype"]) == ("cpu", "bfloat16")


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
        (["--prompt-ids", "5_0"], "must be integers separated by commas, got '5_0'"),
        (["--prompt-ids", "٥"], "must be integers separated by commas, got '٥'"),
        (["--prompt-ids", "5", "--mode", "fast"], "invalid choice: 'fast'"),
        (["--prompt-ids", "5", "--block-size", "0"], "block_size"),
        (["--prompt-ids", "5", "--block-size", "many"], "--block-size: invalid integer value: 'many'"),
        (["--prompt-ids", "5", "--seed", "1_0"], "--seed: invalid integer value: '1_0'"),
        (["--prompt-ids", "5", "--top-p", "0_1"], "--top-p: invalid number value: '0_1'"),
        (["--prompt-ids", "5", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["--prompt-ids", "5", "--temperature", "nan"], "temperature"),
        (["--prompt-ids", "5", "--top-p", "0"], "top_p"),
        (["--prompt-ids", "5", "--eos-token-id", "256"], "eos_token_id"),
        (["--prompt-ids", "5", "--eos-token-id", "never"], "must be an integer or none, got 'never'"),
        (["--prompt-ids", "5", "--device", "abacus"], "--device: must be cpu, cuda or cuda:N, got 'abacus'"),
        (["--prompt-ids", "5", "--device", ""], "--device: must be cpu, cuda or cuda:N, got ''"),
        (["--prompt-ids", "5", "--device", "cpu:3"], "--device: must be cpu, cuda or cuda:N, got 'cpu:3'"),
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
    (tmp_path / "config.json").write_text("{")
    assert_one_line_error(["info", str(tmp_path)], "not valid JSON", capsys)
    (tmp_path / "config.json").write_text('{"\\u001b[2J\\u009b": 1}')
    assert_one_line_error(["info", str(tmp_path)], "config has unknown fields: ␛[2J\ufffd", capsys)


def test_long_paths_are_cut_but_named(tmp_path, capsys):
    long = tmp_path.joinpath(*["directory" * 20] * 8)
    assert_one_line_error(["info", str(long)], f"twotower: error: {tmp_path}", capsys)
    assert_one_line_error(["info", str(long)], "directory: no such file", capsys)


def test_messages_become_one_short_line():
    assert cli.one_line(RuntimeError("CUDA error\n  at line 3\n")) == "CUDA error at line 3"
    assert cli.one_line(RuntimeError("a" * 599 + "b")) == "a" * 599 + "b"
    assert cli.one_line(RuntimeError("a" * 999 + "b")) == "a" * 295 + " ... " + "a" * 299 + "b"
    assert cli.one_line(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "2"], "top_p must be"),
        (["--eos-token-id", "256"], "eos_token_id must be"),
        (["--block-size", "0", "--mode", "ar"], "block_size must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--prompt-ids", "256"], "must be in [0, 256), got 256"),
    ],
)
def test_nothing_is_loaded_for_bad_options(options, message, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(twotower, "load", lambda *_, **__: pytest.fail("loaded the checkpoint"))
    assert_one_line_error(["generate", checkpoint, *GENERATE, *options], message, capsys)


def test_the_gpu_is_the_default_once_it_has_every_kernel(monkeypatch):
    rows = {name: dataclasses.replace(row, cuda=True) for name, row in registry.OPS.items()}
    monkeypatch.setattr(registry, "OPS", rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(twotower_ext, "build_info", lambda: {"cuda": True})
    assert cli._default_device() == "cuda"
    rows["ssd_scan"] = dataclasses.replace(rows["ssd_scan"], cuda=False)
    assert cli._default_device() == "cpu"


# A tokenizer.json that does not work


def write_tokenizer(checkpoint: str, directory: Path, content: str) -> str:
    """A copy of the checkpoint beside a tokenizer.json with this content."""
    shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
    (directory / "tokenizer.json").write_text(content)
    return str(directory)


def test_prompts_a_tokenizer_cannot_encode(checkpoint, tmp_path, capsys):
    without_unknown = Tokenizer(models.WordLevel({"w5": 5}, unk_token="[UNK]")).to_str()
    broken = write_tokenizer(checkpoint, tmp_path, without_unknown)
    assert_one_line_error(["generate", broken, "--prompt", "x", *SHORT], "tokenizer.json: cannot encode", capsys)
    broken = write_tokenizer(checkpoint, tmp_path, "{}")
    assert_one_line_error(["generate", broken, "--prompt", "x", *SHORT], "tokenizer.json: not a tokenizer", capsys)


def test_ids_need_no_working_tokenizer(checkpoint, model, tmp_path, capsys):
    broken = write_tokenizer(checkpoint, tmp_path, "{}")
    assert cli.main(["generate", broken, *GENERATE]) == 0
    stdout, stderr = capsys.readouterr()
    expected = twotower.generate(model, [[5, 6, 7]], max_new_tokens=20).tokens[0]
    assert stdout == " ".join(map(str, expected)) + "\n"
    assert re.match(r"twotower: note: .*tokenizer.json: not a tokenizer: .*; printing token ids\n", stderr)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("failure", [Exception, type("Panic", (BaseException,), {})])
def test_tokens_a_tokenizer_cannot_decode(live, failure, with_tokenizer, monkeypatch, capsys):
    class OnlyDecodesThePrompt:
        encode = from_file = classmethod(lambda cls, text: cls)
        ids = (5, 6, 7)

        @classmethod
        def decode(cls, ids):
            if len(ids) > len(cls.ids):
                raise failure("no such\ntoken")
            return ""

    monkeypatch.setattr(tokenizers, "Tokenizer", OnlyDecodesThePrompt)
    monkeypatch.setattr(continuation, "supports_live", lambda stream: live)
    assert cli.main(["generate", with_tokenizer, "--prompt", "w5 w6 w7", *SHORT]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ("\x1b[?25l\n\x1b[?25h" if live else "")
    message = f"{with_tokenizer}/tokenizer.json: cannot decode token ids: no such token"
    assert stderr == f"twotower: error: {message}\n"


def test_interruption_is_quiet(checkpoint, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(twotower, "load", interrupt)
    assert cli.main(["generate", checkpoint, *GENERATE]) == 130
    assert capsys.readouterr() == ("", "")


def run_in_shell(redirected: str, checkpoint: str) -> tuple[int, str, str]:
    """Runs "twotower ..." with its redirections; of a pipeline, returns the first command's status."""
    command = redirected.replace("twotower", '"$0" -m twotower', 1).replace("MODEL", '"$1"')
    done = subprocess.run(
        ["bash", "-c", f'{command}; exit "${{PIPESTATUS[0]}}"', sys.executable, checkpoint],
        capture_output=True,
        text=True,
        env=subprocess_environment(),
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "status", "stdout", "stderr"),
    [
        ("twotower info MODEL >&-", 0, "", ""),
        ("twotower info MODEL | exec true", 141, "", ""),
        ("twotower --help | exec true", 0, "", ""),
        ("twotower info MODEL >/dev/full", 2, "", "twotower: error: .*No space left on device\n"),
        ("twotower generate MODEL --prompt-ids 5 --max-new-tokens 2 >&-", 0, "", "2 tokens in .*\n"),
        ("twotower generate MODEL --prompt-ids 5 --max-new-tokens 2 2>&-", 0, r"\d+ \d+\n", ""),
        ("twotower generate MODEL --prompt-ids 999 2>&-", 2, "", ""),
        ("twotower generate MODEL --prompt-ids 999 2>&1 | exec true", 2, "", ""),
    ],
)
def test_streams_nobody_reads(command, status, stdout, stderr, checkpoint):
    got = run_in_shell(command, checkpoint)
    assert got[0] == status, got
    assert re.fullmatch(stdout, got[1]), got
    assert re.fullmatch(stderr, got[2]), got


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


@pytest.mark.parametrize("refusal", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"COLUMNS": "8"}, {"LINES": "1"}])
def test_a_terminal_can_refuse_escape_sequences(refusal, checkpoint):
    status, received, stderr = run_in_terminal(["generate", checkpoint, *GENERATE], 80, 24, **refusal)
    assert status == 0, stderr
    assert re.fullmatch(r"(\d+ ?)+\r\n", received)
