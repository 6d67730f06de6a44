"""Every measured number in the documents is that of a result file; and the machinery that checks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_sample import sample
from twotower_ext.benchmarks import markers, results

DOCUMENTS = {path.relative_to(markers.ROOT).as_posix(): path for path in markers.documents()}
ENTRY = "results/moe_experts/real/bfloat16/T16"
DATA = {
    "seconds": 0.0123456,
    "fraction": 0.7349,
    "ratio": 5.2501,
    "exact_half": 2.5,
    "rate": 41.27e9,
    "flops": 3.1e11,
    "tiny": 0.0004,
    "large": 1234567.8,
    "negative": -0.051,
    "count": 69,
    "a/b": {"c": 1.0},
    "a": {"b/c": 2.0, "d": 3.0},
    "text": "fast",
    "flag": True,
    "zero": 0,
}


@pytest.fixture
def source(tmp_path: Path) -> markers.Results:
    """A folder with cpu.json (a sample of the suite's results) and small.json (`DATA`, among its notes)."""
    folder = tmp_path / "results"
    results.save(folder / "cpu.json", sample())
    results.save(folder / "small.json", results.new({}, DATA))
    return markers.Results(folder)


def mark(text: str, path: str, file: str = "small.json") -> str:
    return f"{text} <!-- bench:{file}#{'settings/' if file == 'small.json' else ''}{path} -->"


# The documents.


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_marked_number_is_that_of_its_result(name: str):
    problems = markers.review(DOCUMENTS[name].name, DOCUMENTS[name].read_text(encoding="utf-8"), source=COMMITTED)
    assert not problems, "after a new measurement: python -m twotower_ext.benchmarks.markers --write"


COMMITTED = markers.Results(results.FOLDER)


def test_the_documents_that_make_claims_are_among_them():
    assert {"README.md", "CHANGELOG.md"} <= DOCUMENTS.keys()
    assert set(markers.STRICT) >= {"README.md", "CHANGELOG.md", "performance.md"}


@pytest.mark.parametrize("claim", ["It is 5.1× faster.", mark("5.1×", "of_floor", "missing.json")])
def test_the_readme_with_another_claim_fails(claim: str):
    text = DOCUMENTS["README.md"].read_text(encoding="utf-8")
    assert markers.review("README.md", f"{text}\n{claim}\n", COMMITTED)


# The machinery: right numbers pass, wrong ones do not.


@pytest.mark.parametrize(
    "marked",
    [
        mark("12.3 ms", "seconds"),
        mark("12 ms", "seconds"),
        mark("12.35 ms", "seconds"),
        mark("12,346 µs", "seconds"),
        mark("12346 us", "seconds"),
        mark("0.0123 s", "seconds"),
        mark("73 %", "fraction"),
        mark("73.5%", "fraction"),
        mark("0.73", "fraction"),
        mark("5.3×", "ratio"),
        mark("5 ×", "ratio"),
        mark("5.25 times", "ratio"),
        mark("2×", "exact_half"),
        mark("3×", "exact_half"),
        mark("41.3 GB/s", "rate"),
        mark("0.041 TB/s", "rate"),
        mark("38.4 GiB/s", "rate"),
        mark("310 GFLOP/s", "flops"),
        mark("0.31 TFLOP/s", "flops"),
        mark("1,234,568 tokens/s", "large"),
        mark("1.2 MB", "large"),
        mark("−5 %", "negative"),
        mark("-5.1 %", "negative"),
        mark("69", "count"),
        mark("**5.3×**", "ratio"),
        mark("5.3\u202f×", "ratio"),
        mark("27.6", "count / settings/exact_half"),
        mark("1", "a/b/c"),  # the longest key first
        mark("3", "a/d"),
        mark("0", "zero"),
    ],
)
def test_a_right_number_passes(marked: str, source):
    assert markers.check(f"It takes {marked}, or so.\n", source) == []
    assert markers.unmarked(f"It takes {marked}, or so.\n") == []


def test_numbers_of_a_real_file(source):
    entry = sample()["results"]["moe_experts/real/bfloat16/T16"]
    speed = entry["bytes"] / entry["seconds"] / 1e9
    text = f"""\
        | op | share of the floor | speed | against the loop |
        | --- | --- | --- | --- |
        | `moe_experts` | {mark(f"{100 * entry['of_floor']:.1f} %", f"{ENTRY}/of_floor", "cpu.json")} \
        | {mark(f"{speed:.1f} GB/s", f"{ENTRY}/bytes / {ENTRY}/seconds", "cpu.json")} \
        | {mark("2.6×", f"{ENTRY}/peers/expert loop/ratio", "cpu.json")} |
        """
    assert markers.check(text, source) == [] == markers.unmarked(text)
    assert len([q for q in markers.quantities(text) if q.file]) == 3
    for right, wrong in (("2.6×", "2.7×"), (f"{speed:.1f} GB", f"{speed + 0.1:.1f} GB")):
        assert len(markers.check(text.replace(right, wrong), source)) == 1


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        (mark("12.4 ms", "seconds"), "line 2: 12.4 ms must be 12.3, by small.json#settings/seconds"),
        (mark("12.3 µs", "seconds"), "must be 12,345.6"),
        (mark("74 %", "fraction"), "must be 73"),
        (mark("0.7349×", "ratio"), "must be 5.2501"),
        (mark("5.2×", "ratio"), "must be 5.3"),
        (mark("5.3", "nothing/here"), "nothing/here"),
        (mark("5.3", "results", "cpu.json"), "must be a number, got {"),
        (mark("5.3", "text"), 'must be a number, got "fast"'),
        (mark("1", "flag"), "must be a number, got true"),
        (mark("5.3×", "ratio", "gone.json"), "gone.json"),
        (mark("5.3×", "ratio / settings/zero"), "is zero"),
        (mark("0 %", "tiny"), "no digit left"),
        (mark("5.3 widgets", "ratio"), "must follow a number and its unit"),
        ("5.3×\n<!-- bench:small.json#settings/ratio -->", "must follow a number and its unit"),
        ("fast <!-- bench:small.json#settings/ratio -->", "must follow a number and its unit"),
        ("5.3× <!-- bench:small.json settings/ratio -->", "must follow a number and its unit"),
        ("5.3× <!-- bench: -->", "must follow a number and its unit"),
    ],
)
def test_a_wrong_number_or_marker_fails(marked: str, message: str, source):
    (problem,) = markers.check(f"above\nIt takes {marked}, or so.\n", source)
    assert message in problem
    assert problem.startswith("line 2") or "\n" in marked


@pytest.mark.parametrize(
    "claim",
    [
        "5.1×", "5.1 × faster", "3x faster", "1.5 times", "12 ms", "12\nms", "300 µs", "80 ns", "0.4 s", "2 seconds",
        "41 GB/s", "41 GiB/s", "310 GFLOP/s", "0.3 TFLOPS", "70 %", "70%", "12 tokens/s", "2.43 times", "98.6 %",
        "1,200 MB/s", "**5.1×**", "(4.9× to 5.1×)",
    ],
)  # fmt: skip
def test_a_performance_number_without_its_marker_fails(claim: str):
    number = claim.strip("*(")[:3].strip().rstrip("×x%")
    assert any(number in problem for problem in markers.unmarked(f"It is {claim}.")), claim
    assert markers.review("README.md", f"It is {claim}.", COMMITTED)
    assert markers.review("benchmarking.md", f"It is {claim}.", COMMITTED) == []  # explains, claims nothing


@pytest.mark.parametrize("text", ["3 to 5 ms", "3–5 ms", "3-5×", "3 and 5 %", "3 … 5 GB/s"])
def test_both_ends_of_a_range_need_their_markers(text: str):
    assert len(markers.unmarked(text)) == 2
    assert len(markers.unmarked(f"{text} <!-- bench:small.json#x -->")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "16 × 131,072 logits, 16×128 and 4 x 4",
        "`5.1×` and `12 ms` are code, ``as `5 ms` is``",
        "```text\n5.1× 12 ms\n```",
        "~~~\n5.1×\n~~~",
        "- a list:\n\n  ```bash\n  sleep 5 s\n  ```",
        "<!-- 5.1× -->",
        "2.42 times its generation\nthroughput at 98.7 % of the quality; 2.42×",
        "| op | target |\n|---|---|\n| a | ≥ 1.5× |\n| b | 70 % |",
        "| op | Target (stretch) | published, two H100 | computed floor |\n|-|:-|-:|-|\n| a | 1.5× | 2.4× | 3 ms |",
        "torch 2.11, sm_90a, arXiv 2606.26493, 118 GiB, 2.1 GHz, 128 experts, top 6, step 3, v4",
    ],
)
def test_what_is_no_measurement_of_ours_needs_no_marker(text: str):
    assert markers.unmarked(text) == []


def test_a_column_of_targets_excuses_only_itself():
    table = (
        "| op | target | speed |\n|---|---|---|\n| a | 1.5× | 3.2× |\n\n| op | target met |\n|---|---|\n| a | 4× |\n7×"
    )
    assert markers.unmarked(table) == [f"line {n} lacks its marker" for n in ("3: 3.2×", "7: 4×", "8: 7×")]


def test_markers_in_code_are_examples(source):
    text = "`9× <!-- bench:file#key -->`\n\n```text\n9× <!-- bench:file#key -->\n```\n"
    assert markers.check(text, source) == []
    assert markers.refresh(text, source) == (text, [])


# Renewing them.


def test_refreshing_keeps_units_digits_and_everything_else(source):
    old = (
        f"above `1×`\n\n| {mark('9.99 ms', 'seconds')} | **{mark('1×', 'ratio')}** | {mark('50 %', 'fraction')} |\n"
        f"{mark('999', 'large')}, {mark('9999.9', 'large')}, {mark('+1.0', 'ratio')}, {mark('−1.00', 'negative')};"
        f" 7 ms\n"
        f"{mark('12.35 ms', 'seconds')} {mark('1 µs', 'seconds')}\n"
    )
    new, changes = markers.refresh(old, source)
    for before, after in (
        ("9.99 ms", "12.35 ms"), ("1× <", "5× <"), ("50 %", "73 %"), ("999 <", "1,234,568 <"), ("9999.9", "1234567.8"),
        ("+1.0", "+5.3"), ("−1.00", "−0.05"), ("1 µs", "12,346 µs"),
    ):  # fmt: skip
        old = old.replace(before, after)
    assert new == old
    assert len(changes) == 8
    assert changes[0] == "line 3: 9.99 -> 12.35 ms"
    assert markers.check(new, source) == []
    assert markers.refresh(new, source) == (new, [])


def test_refreshing_leaves_a_half_as_it_is(source):
    for text in (mark("2×", "exact_half"), mark("3×", "exact_half")):
        assert markers.refresh(text, source) == (text, [])


@pytest.mark.parametrize("broken", [mark("9×", "gone"), mark("9 %", "tiny"), "fast <!-- bench:small.json#ratio -->"])
def test_refreshing_refuses_what_it_cannot_resolve(broken: str, source):
    with pytest.raises(ValueError, match="line 2"):
        markers.refresh(f"\n{broken}\n", source)


def test_one_command_renews_documents(source, tmp_path, capsys):
    good, same = tmp_path / "good.md", tmp_path / "same.md"
    good.write_text(f"It takes {mark('9.9 ms', 'seconds')}.\n", encoding="utf-8")
    same.write_text("Nothing measured.\n", encoding="utf-8")
    options = ["--results", str(source.folder), str(good), str(same)]
    assert markers.main(["--check", *options]) == 1
    assert f"{good}: line 1: 9.9 ms must be 12.3" in capsys.readouterr().out
    assert markers.main(["--write", *options]) == 0
    assert capsys.readouterr().out == f"{good}: line 1: 9.9 -> 12.3 ms\n{same}: unchanged\n"
    assert good.read_text(encoding="utf-8") == f"It takes {mark('12.3 ms', 'seconds')}.\n"
    assert markers.main(["--check", *options]) == 0


def test_nothing_is_written_where_one_document_is_broken(source, tmp_path, capsys):
    good, broken = tmp_path / "good.md", tmp_path / "broken.md"
    good.write_text(mark("9.9 ms", "seconds"), encoding="utf-8")
    broken.write_text(mark("9.9 ms", "gone"), encoding="utf-8")
    assert markers.main(["--write", "--results", str(source.folder), str(good), str(broken)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(broken) in error
    assert good.read_text(encoding="utf-8") == mark("9.9 ms", "seconds")


@pytest.mark.parametrize("argv", [[], ["--check", "--write"], ["--write", "no-such-file.md"], ["--check", "--what"]])
def test_bad_arguments_are_one_line(argv: list[str], capsys):
    assert markers.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_result_file_is_one_line(source, tmp_path, capsys):
    (source.folder / "cpu.json").write_text(json.dumps({"schema": 99}), encoding="utf-8")
    document = tmp_path / "page.md"
    document.write_text(mark("9.9 ms", f"{ENTRY}/seconds", "cpu.json"), encoding="utf-8")
    assert markers.main(["--write", "--results", str(source.folder), str(document)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
