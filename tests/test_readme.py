"""The documents tell the truth: their examples run, their table is the registry's, what they name exists."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from twotower import cli

from twotower_ext import _table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
CODE_FOLDERS = ("csrc", "twotower_ext", "python", "benchmarks", "tests", "docs")
FOREIGN = {"tokenizer.json", "version.py"}  # files of a user's checkpoint and of torch
TREE = [
    path.relative_to(ROOT).as_posix()
    for top in (*ROOT.glob("*.*"), *ROOT.glob("[A-Z]*"), *(ROOT / folder for folder in CODE_FOLDERS))
    for path in (top, *(top.rglob("*") if top.is_dir() else ()))
]
FILE = r"\.(?:py|pyi|cpp|h|cu|cuh|md|svg|toml|txt|json)"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def examples() -> list:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    return [
        pytest.param(block, id=f"{name}-{i}")
        for name, text in texts.items()
        for i, block in enumerate(blocks(text, "python"))
    ]


def commands() -> list[str]:
    lines = (line.partition("#")[0].strip() for block in blocks(README, "bash") for line in block.splitlines())
    return [line for line in lines if line.startswith("twotower ")]


@pytest.mark.parametrize("example", examples())
def test_every_example_runs_alone(example: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "jax" in example:  # its threads would be there whenever a later test forks
        subprocess.run([sys.executable, "-c", example], check=True, stdout=subprocess.DEVNULL)
        return
    exec(compile(example, "example", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", commands())
def test_every_command_succeeds(command: str, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


def test_there_is_something_to_run():
    assert len(blocks(README, "python")) >= 7
    assert {line.split()[1] for line in commands()} == {"generate", "info", "doctor"}
    for op in _table.OPS:
        assert f"`{op}`" in README
    for family in ("rms_norm", "ssd_scan", "mamba_block", "moe_experts", "block_attention", "denoise_commit"):
        assert any(f"ops.{family}(" in block for block in blocks(README, "python")), family


def test_the_table_is_the_registrys():
    assert _table.table_in(README)[1] == _table.ops_table(), "run: python -m twotower_ext._table --write README.md"


def test_the_table_says_what_the_registry_says():
    lines = _table.ops_table().splitlines()
    assert len(lines) == 2 + len(_table.OPS)
    for line, row in zip(lines[2:], _table.OPS.values(), strict=True):
        name, summary, cpu, cuda, tested, gradient, _ = line.strip("| ").split(" | ")
        assert (name, summary) == (f"`{row.name}`", row.summary)
        assert cpu.split(", ") == ["float32", "bfloat16", "float16", "float64"]
        assert cuda == ("float32, bfloat16, float16" if row.cuda else "none")
        assert (tested == "–") == (not row.cuda)
        assert gradient == ("yes" if row.differentiable else "no")


def test_writing_the_table_changes_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    path.write_text(f"above\n\n{_table.BEGIN}\nold\n{_table.END}\n\nbelow\n")
    monkeypatch.setattr(sys, "argv", ["_table", "--write", str(path)])
    for _ in range(2):  # the second time there is nothing to change
        _table.main()
        expected = f"above\n\n{_table.BEGIN}\n{_table.ops_table()}\n{_table.END}\n\nbelow\n"
        assert path.read_text() == expected


@pytest.mark.parametrize("text", ["", _table.BEGIN, f"{_table.END} {_table.BEGIN}", f"{_table.BEGIN}{_table.END}" * 2])
def test_a_document_without_its_markers_is_refused(text: str):
    with pytest.raises(ValueError, match="ops:begin"):
        _table.table_in(text)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_readme_names_the_two_commands():
    for target in ("demo", "test"):
        assert re.search(rf"^make {target}\b", "\n".join(blocks(README, "bash")), re.MULTILINE)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_make_target_named_exists(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE))
    assert named <= make_targets()


def anchors(path: Path) -> set[str]:
    """The fragments that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str):
    document = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, fragment = link.partition("#")
        path = (document.parent / target) if target else document
        assert path.exists(), link
        if fragment:
            assert fragment in anchors(path), link


def is_there(named: str) -> bool:
    """Whether a path, from the root or below some folder of the code, exists; <stem> and * stand for anything."""
    pattern = re.sub(r"<\w+>", "*", named).rstrip("/")
    return bool(fnmatch.filter(TREE, pattern) or fnmatch.filter(TREE, f"*/{pattern}"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_named_exists(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    listed = [line.strip().split()[0] for block in blocks(text, "text") for line in block.splitlines() if line.strip()]
    paths = [p for p in quoted + listed if re.fullmatch(rf"[\w./<>*-]+(?:{FILE}|/)", p)]
    assert not [p for p in paths if p not in FOREIGN and not is_there(p)]
    assert paths or name == "CHANGELOG.md"
