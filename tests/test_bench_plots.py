"""The pictures of result files: they show what the file holds, nothing overlaps, the same file gives the same bytes."""

from __future__ import annotations

import html
import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import pytest
from bench_sample import sample
from matplotlib.text import Text
from twotower_ext.benchmarks import plots, results
from twotower_ext.benchmarks.plots import batch, data, labels, style

SVG = "{http://www.w3.org/2000/svg}"
LARGEST = 150_000  # bytes of a picture
SAMPLES = {
    "cpu": sample(),
    "cpu-all": sample(shapes=("real", "mid"), dtypes=("bfloat16", "float32")),
    "cuda": sample("cuda"),
    "bare": sample(peers=False, model=False),
}
SAMPLES["bare"]["results"] = {key: e for key, e in SAMPLES["bare"]["results"].items() if e["op"] == "moe_experts"}


@pytest.fixture(scope="module")
def pages() -> dict[str, style.Page]:
    """Every page of three samples, finished as it is when written."""
    with style.settings():
        found = {name: page for s in ("cpu", "cuda", "bare") for name, page in plots.pages(SAMPLES[s], s).items()}
        for page in found.values():
            page.last()
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, str]:
    """The pictures of one sample as text."""
    folder = tmp_path_factory.mktemp("docs")
    return {path.stem: path.read_text(encoding="utf-8") for path in plots.draw(SAMPLES["cpu"], folder, "cpu")}


# What there is to draw is drawn, and nothing else.


def test_every_picture_has_its_file(drawn, tmp_path):
    group = "real-bfloat16"
    assert set(drawn) == {
        f"cpu-roofline-{group}", f"cpu-peers-{group}", "cpu-model-mid-bfloat16", "cpu-step", "cpu-batch",
    }  # fmt: skip


def test_each_shape_and_dtype_has_its_own():
    with style.settings():
        names = set(plots.pages(SAMPLES["cpu-all"], "x"))
    for kind in ("roofline", "peers"):
        assert {n for n in names if kind in n} == {
            f"x-{kind}-{shape}-{dtype}" for shape in ("real", "mid") for dtype in ("bfloat16", "float32")
        }
    assert {n for n in names if "model" in n} == {"x-model-mid-bfloat16", "x-model-mid-float32"}


def test_what_was_not_measured_is_not_drawn(pages):
    assert [name for name in pages if name.startswith("bare")] == ["bare-roofline-real-bfloat16"]
    without = sample(model=False) | {"ceilings": {}}
    with style.settings():
        assert list(plots.pages(without, "x")) == ["x-peers-real-bfloat16"]
        assert plots.pages(results.new({}, {}), "x") == {}


# Form.


def test_pictures_are_whole_small_and_accessible(drawn):
    for name, text in drawn.items():
        assert len(text.encode()) < LARGEST, name
        root = ElementTree.fromstring(text)
        assert (root.tag, root.get("role"), root.get("aria-labelledby")) == (f"{SVG}svg", "img", "title desc")
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert (title.get("id"), description.get("id")) == ("title", "desc")
        assert len(title.text) > 20
        assert len(description.text) > 100
        page = re.search(r'<g id="patch_1">\s*<path[^>]*style="([^"]*)"', text)
        assert "fill: #ffffff" in page[1], "the page is white on every background"
        assert "<dc:date>" not in text
        assert not re.search(r"[ \t]$", text, re.MULTILINE)


def test_the_same_file_gives_the_same_bytes(drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)  # a user's own settings
    monkeypatch.setitem(matplotlib.rcParams, "axes.labelsize", 30.0)
    again = plots.draw(SAMPLES["cpu"], tmp_path / "new" / "folder", "cpu")
    assert {path.stem: path.read_text(encoding="utf-8") for path in again} == drawn
    assert matplotlib.rcParams["font.size"] == 20.0


def texts(page: style.Page) -> list[tuple[str, object]]:
    """Every text that is drawn, with the rectangle it takes; tick labels outside of their axis are not drawn."""
    page.figure.draw_without_rendering()
    found = []
    for text in page.figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), text.get_window_extent(), text.get_rotation()))
    ticks = {t for axes in page.figure.axes for axis in (axes.xaxis, axes.yaxis) for t in hidden(axis)}
    return [(name, box) for name, box, rotation in found if rotation in (0, 90) and (name, box.bounds) not in ticks]


def hidden(axis) -> set[tuple[str, tuple[float, ...]]]:
    """Labels of ticks that lie outside of the axis' limits, or of an axis that is switched off."""
    low, high = sorted(axis.get_view_interval())
    return {
        (label.get_text(), label.get_window_extent().bounds)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not axis.axes.axison or not low <= tick.get_loc() <= high
    }


def test_no_text_is_cut_off_or_covered(pages):
    for name, page in pages.items():
        with style.settings():
            found = texts(page)
        assert len(found) > 10, name
        whole = page.figure.bbox
        for text, box in found:
            inside = whole.x0 <= box.x0 < box.x1 <= whole.x1 and whole.y0 <= box.y0 < box.y1 <= whole.y1
            assert inside, f"{name}: {text!r} is cut off"
        for (a, box_a), (b, box_b) in combinations(found, 2):
            wide = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
            high = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
            assert wide <= 1 or high <= 1, f"{name}: {a!r} covers {b!r}"


def test_labels_cover_no_point(pages):
    for name, page in pages.items():
        if "roofline" not in name:
            continue
        axes = page.figure.axes[0]
        points = [axes.transData.transform(line.get_xydata()[0]) for line in axes.lines if line.get_marker() != "None"]
        assert len(points) >= 3
        for text in axes.texts:
            if text.get_rotation() == 0:
                box = text.get_window_extent()
                assert not [p for p in points if box.contains(*p)], f"{name}: {text.get_text()!r}"


# What the pictures say.


def test_points_are_where_the_results_are(pages):
    result = SAMPLES["cpu"]
    axes = pages["cpu-roofline-real-bfloat16"].figure.axes[0]
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() != "None"]
    entries = list(result["results"].values())
    assert len(points) == len(entries) == 15
    for point, e in zip(points, entries, strict=True):
        assert point == pytest.approx((e["flops"] / e["bytes"], e["flops"] / e["seconds"] / 1e9))
    ((x0, y0), (x1, y1), (_, y2)) = axes.lines[0].get_xydata()
    assert y0 / x0 == pytest.approx(result["ceilings"]["read"]["2"] / 1e9)
    assert y1 == y2 == pytest.approx(result["ceilings"]["matmul_bfloat16"]["2"] / 1e9)
    assert y1 / x1 == pytest.approx(y0 / x0)
    assert {"moe_experts T16", "mamba_block 1 row update", "block_attention 16 rows context 4096"} <= {
        text.get_text() for text in axes.texts
    }


def test_bars_end_at_the_relative_speed(pages):
    page = pages["cpu-peers-real-bfloat16"]
    axes = page.figure.axes[0]
    peers = [p for e in SAMPLES["cpu"]["results"].values() for p in e["peers"].values()]
    assert len(axes.patches) == len(peers) > 20
    for bar, whisker, peer in zip(axes.patches, axes.lines[1:], peers, strict=True):
        assert (bar.get_x(), bar.get_x() + bar.get_width()) == (1, pytest.approx(1 / peer["ratio"]))
        assert (bar.get_facecolor()[2] > 0.5) == (peer["ratio"] >= 1), "slower and faster differ in colour"
        assert list(whisker.get_xdata()) == [1 / peer["ratio_high"], 1 / peer["ratio_low"]]
    written = [text.get_text() for text in page.figure.texts]
    assert "Not drawn: mamba_ssm Triton: needs an NVIDIA GPU (ssd_scan, mamba_block)" in written
    assert any("torch 2.13.0+cpu: " in text and "expert loop" in text for text in written)
    assert "0.38×" in written  # the expert loop takes 2.6 times as long
    assert "1.1×" in written  # and a peer that is faster than this package is shown to be


def test_cases_without_a_time_are_named():
    result = sample(model=False)
    result["refused"]["moe_route/real/bfloat16/T128"] = "result 0: 5 of 96 entries differ"
    result["skipped"]["moe_experts/real/bfloat16/T999"] = "needs 99 GiB of memory"
    result["skipped"]["moe_experts/mid/bfloat16/T999"] = "another picture's"
    result["skipped"]["model/real/bfloat16"] = "another thing"
    with style.settings():
        for page in plots.pages(result, "x").values():
            written = [text.get_text() for text in page.figure.texts]
            assert "moe_route T128: refused, its results are wrong: result 0: 5 of 96 entries differ" in written
            assert "moe_experts T999: not run: needs 99 GiB of memory" in written
            assert not any("another" in text for text in written)


def test_pictures_name_what_they_were_measured_on(pages):
    for stem, device in (("cpu", "Sample CPU @ 2.10GHz, 2 threads, kernels v4_bf16"), ("cuda", "Sample GPU 141GB")):
        for page in (page for name, page in pages.items() if name.startswith(stem)):
            written = " ".join(text.get_text() for text in page.figure.texts)
            assert f"measured in one run: {device}, torch 2.13.0+cpu, commit 0123456789ab" in written.replace(
                "Measured", "measured"
            )


def test_the_step_is_split_whole(pages):
    entry = SAMPLES["cpu"]["model"]["mid/bfloat16/denoise-commit"]
    page = pages["cpu-step"]
    bar = page.figure.axes[0]
    widths = [patch.get_width() for patch in bar.patches]
    assert [patch.get_x() for patch in bar.patches] == pytest.approx([sum(widths[:i]) for i in range(len(widths))])
    assert sum(widths) == pytest.approx(entry["seconds"])
    assert widths[:-1] == pytest.approx(sorted(entry["split"].values(), reverse=True))
    written = [text.get_text() for text in page.figure.texts]
    assert "mid model, bfloat16: 61.0 ms" in written
    for text in ("routed experts", "28.1 ms", "46.0 %", "< 0.1 %", "between the kernels"):
        assert text in written


def test_throughput_is_the_formula(pages):
    assert batch.ratio({"denoise": 2.0, "extend": 1.0, "ar": 1.0}, 4, 16) == pytest.approx(16 / 9)
    assert batch.ratio({"denoise": 1.0, "extend": 1.0, "ar": 1.0}, 1, 8) == pytest.approx(8 / 9)
    times = SAMPLES["cpu"]["model"]["mid/bfloat16/batch"]
    axes = pages["cpu-batch"].figure.axes[0]
    lines = [line for line in axes.lines if line.get_marker() != "None"]
    assert len(lines) == len(batch.TOKENS_PER_NFE)
    for line, r in zip(lines, batch.TOKENS_PER_NFE, strict=True):
        assert list(line.get_xdata()) == [1, 2, 4, 8]
        expected = [16 * t["ar"] / (16 / r * t["denoise"] + t["extend"]) for t in times.values()]
        assert list(line.get_ydata()) == pytest.approx(expected)
    written = {text.get_text() for text in axes.texts}
    assert {"r = 1", "r = 16", "break-even", "2.42: published, two H100, not ours"} <= written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "12.3 ms"), (1.5, "1.50 s"), (0.9999, "1.00 s"), (2.4e-5, "24.0 µs"), (0.9996e-3, "1.00 ms"),
        (123.4, "123 s"),
    ],
)  # fmt: skip
def test_times_have_three_digits(value: float, text: str):
    assert data.seconds(value) == text


def test_rates_have_three_digits():
    assert data.rate(21.44e9, "B/s") == "21.4 GB/s"
    assert data.rate(7.9e14, "FLOP/s") == "790 TFLOP/s"
    assert data.rate(9.999e11, "B/s") == "1.00 TB/s"


def test_neighbouring_names_are_pushed_apart():
    with style.settings():
        axes = style.Page(4, "title", "subtitle").axes(1, 1, 4, 2)
        axes.set_ylim(0, 1)
        labels.spread(axes, [(0.5, f"line {i}", style.INK) for i in range(5)])
        heights = sorted(text.get_window_extent().y0 for text in axes.texts)
    assert min(b - a for a, b in pairwise(heights)) > 10


# The command line, and what it needs.


def test_one_command_draws_files(tmp_path, capsys):
    path = tmp_path / "mine.json"
    results.save(path, SAMPLES["bare"])
    assert plots.main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "mine-roofline-real-bfloat16.svg")]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema": 2}'])
def test_a_bad_file_is_one_line(content: str | None, tmp_path, capsys):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert plots.main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "mine.json" in error
    assert not (tmp_path / "out").exists()


def test_without_files_those_of_the_suite_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert plots.main(["--out", str(tmp_path)]) == 2
    assert "no results yet" in capsys.readouterr().err
    results.save(tmp_path / "cpu.json", SAMPLES["bare"])
    (tmp_path / "other.json").write_text('{"tests": 3}', encoding="utf-8")
    assert plots.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "cpu-roofline-real-bfloat16.svg")]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'matplotlib"):
        plots.draw(SAMPLES["bare"], tmp_path, "x")
    results.save(tmp_path / "mine.json", SAMPLES["bare"])
    assert plots.main([str(tmp_path / "mine.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'matplotlib" in error


def test_the_pictures_in_docs_are_those_of_the_results():
    """By their descriptions, which hold the numbers: another matplotlib may draw other lines."""
    stale = []
    for path in plots.committed():
        with style.settings():
            for name, page in plots.pages(results.load(path), path.stem).items():
                picture = Path(plots.DOCS) / f"{name}.svg"
                if picture.exists():
                    text = picture.read_text(encoding="utf-8")
                    if html.unescape(text.partition('<desc id="desc">')[2].partition("</desc>")[0]) != page.description:
                        stale.append(picture.name)
    assert not stale, "run: python -m twotower_ext.benchmarks.plots"
