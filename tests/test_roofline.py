"""Floors against numbers worked out by hand: of the published model on an H200, and of one small enough to count."""

from __future__ import annotations

import dataclasses
import json

import pytest
from twotower.config import Config
from twotower_ext.benchmarks import results, roofline
from twotower_ext.benchmarks.roofline import H200, MID, REAL, Dimensions, Machine, forward, total

# GFLOP, MB and µs of a launch, context 2048, uniform routing, on a GPU of 790 TFLOP/s, 4.6 TB/s read, 4.3 TB/s copied:
# computed beforehand with another program, and rounded to the digits shown.
PUBLISHED = {
    "routed experts": {"denoise 1": (1.9, 1372, 298), "denoise 8": (15, 2557, 555), "denoise 32": (61, 2584, 559),
                       "extend 1": (1.9, 1372, 298), "ar 1": (0.12, 121, 26), "prefill 2048": (245, 2669, 568),
                       "prefill 8192": (981, 3009, 1242)},
    "shared expert": {"denoise 1": (0.64, 40, 8.7), "denoise 8": (5.1, 43, 9.0), "denoise 32": (20, 53, 26),
                      "ar 1": (0.04, 40, 8.7), "prefill 2048": (82, 92, 103), "prefill 8192": (327, 250, 414)},
    "in_proj": {"denoise 1": (0.89, 56, 12), "denoise 8": (7.1, 59, 12), "denoise 32": (28, 69, 36),
                "ar 1": (0.06, 55, 12), "prefill 2048": (113, 109, 144), "prefill 8192": (454, 268, 574)},
    "conv, scan, gated norm": {"denoise 1": (0.02, 2.6, 0.5), "denoise 8": (0.16, 20, 4.2),
                               "denoise 32": (0.65, 82, 17), "extend 1": (0.04, 4.7, 1.1), "ar 1": (0.00, 4.2, 1.0),
                               "prefill 2048": (7.1, 61, 14), "prefill 8192": (28, 238, 55)},
    "out_proj": {"denoise 1": (0.35, 22, 4.8), "denoise 8": (2.8, 24, 5.0), "denoise 32": (11, 29, 14),
                 "prefill 2048": (45, 50, 57), "prefill 8192": (180, 133, 228)},
    "attention projections": {"denoise 1": (0.75, 47, 10), "denoise 32": (24, 61, 30), "ar 1": (0.05, 47, 10),
                              "prefill 2048": (96, 104, 121), "prefill 8192": (383, 277, 485)},
    "attention": {"denoise 1": (0.54, 2.4, 0.7), "denoise 8": (4.3, 19, 5.5), "denoise 32": (17, 76, 22),
                  "ar 1": (0.03, 2.1, 0.5), "prefill 2048": (34, 36, 44), "prefill 8192": (550, 143, 696)},
    "norm, residual, modulation": {"denoise 1": (0.00, 0.34, 0.1), "denoise 8": (0.00, 2.8, 0.6),
                                   "denoise 32": (0.01, 11, 2.6), "prefill 2048": (0.06, 44, 10),
                                   "prefill 8192": (0.2, 176, 41)},
    "head and commit": {"denoise 1": (11, 705, 153), "denoise 8": (90, 705, 153), "denoise 32": (361, 707, 457),
                        "ar 1": (0.7, 705, 153)},
}  # fmt: skip
PUBLISHED_MS = {
    "denoise 1": 7.68, "denoise 8": 13.75, "denoise 32": 15.89, "extend 1": 7.54, "ar 1": 1.43,
    "prefill 2048": 21.9, "prefill 8192": 67.0,
}  # fmt: skip


def kernels(name: str, dimensions: Dimensions = REAL) -> dict[str, roofline.Kernel]:
    mode, number = name.split()
    if mode == "prefill":
        return {k.name: k for k in forward(dimensions, mode, 1, int(number))}
    return {k.name: k for k in forward(dimensions, mode, int(number))}


def rounds_to(value: float, shown: float) -> bool:
    """Whether the value, rounded to as many decimals as are shown, is what is shown."""
    decimals = len(str(shown).partition(".")[2]) if isinstance(shown, float) else 0
    return abs(value - shown) <= 0.5 * 10**-decimals + 1e-9


@pytest.mark.parametrize("kernel", PUBLISHED)
def test_the_published_model_on_an_h200(kernel):
    for name, shown in PUBLISHED[kernel].items():
        k = kernels(name)[kernel]
        found = k.flops / 1e9, (k.read + k.written) / 1e6, k.floor(H200) * 1e6
        assert all(map(rounds_to, found, shown)), f"{name}: {found}, expected {shown}"


@pytest.mark.parametrize("name", PUBLISHED_MS)
def test_sums_of_a_forward(name):
    assert rounds_to(total(list(kernels(name).values()), H200) * 1e3, PUBLISHED_MS[name])


def test_launches_of_a_forward():
    launches = {name: k.launches for name, k in kernels("denoise 1").items()}
    assert launches == {
        "routed experts": 23, "shared expert": 23, "in_proj": 23, "conv, scan, gated norm": 23, "out_proj": 23,
        "attention projections": 6, "attention": 6, "norm, residual, modulation": 52, "head and commit": 1,
    }  # fmt: skip
    assert "head and commit" not in kernels("extend 1")
    assert "head and commit" not in kernels("prefill 2048")


def test_routed_experts_by_hand():
    # 16 tokens take 6 of 128 experts each: 128 · (1 − (122/128)^16) = 68.6 experts of 2 · 2688 · 1856 weights
    hit = 128 * (1 - (122 / 128) ** 16)
    assert hit == pytest.approx(68.63, abs=0.01)
    k = kernels("denoise 1")["routed experts"]
    assert k.flops == 16 * 6 * (2 * 2688 * 1856 + 2 * 1856 * 2688) == 1_915_748_352
    router, tokens, inner = 128 * 2688 * 4, 16 * 2688 * 2, 16 * 6 * 1856 * 2
    assert k.read == pytest.approx(hit * 19_955_712 + router + tokens + inner)
    assert k.written == tokens + inner
    # Nothing but a hundred times fewer bytes is written, so the read bandwidth holds: 1371.3 MB / 4.6 TB/s.
    assert k.floor(H200) == pytest.approx(k.read / 4.6e12) == pytest.approx(298.1e-6, abs=0.1e-6)
    # Where the routing hits 34 experts, as on a trace, the floor of a denoise step is 4.3 ms.
    assert total(forward(REAL, "denoise", experts_hit=34.3), H200) == pytest.approx(4.255e-3, abs=1e-6)


def test_in_proj_by_hand():
    # 2688 inputs; outputs: gate 4096, x 4096, B and C 8 · 128 each, dt 64 = 10304
    assert REAL.projected == 10_304
    k = kernels("denoise 32")["in_proj"]
    assert k.flops == 2 * 512 * 2688 * 10_304
    assert (k.read, k.written) == ((2688 * 10_304 + 512 * 2688) * 2, 512 * 10_304 * 2)
    assert k.floor(H200) == k.flops / 790e12
    assert k.bound(H200) == "compute"


# One layer of each kind, small enough to count on paper.
SMALL = Dimensions(
    hidden=4, vocab=10, pattern="M*E", mamba_heads=2, mamba_head_dim=3, groups=1, state=5, query_heads=2, kv_heads=1,
    head_dim=6, experts=4, top_k=2, expert_width=7, shared_width=8, taps=2, block=3,
)  # fmt: skip


def test_a_small_model_by_hand():
    found = {k.name: k for k in forward(SMALL, "extend", batch=2, context=9, itemsize=4)}  # 6 tokens
    # Mamba: 6 inner channels; 6 + 2 · 5 = 16 convolved; 6 + 16 + 2 = 24 projected; 2 · 3 · 5 = 30 states a sequence
    k = found["in_proj"]
    assert (k.flops, k.read, k.written) == (2 * 6 * 4 * 24, 4 * (4 * 24 + 6 * 4), 4 * 6 * 24)
    k = found["conv, scan, gated norm"]
    # a row: C·Bᵀ with 3 rows 2·3·5, times x 2·6·3, C·h 2·6·5, Bᵀ·x 2·6·5, convolution 2·16·2
    assert k.flops == 6 * (30 + 36 + 60 + 60 + 64)
    assert (k.read, k.written) == (4 * 6 * 24 + 2 * 30 * 4, 4 * 6 * 6 + 2 * 30 * 4)
    k = found["out_proj"]
    assert (k.flops, k.read, k.written) == (2 * 6 * 6 * 4, 4 * (6 * 4 + 6 * 6), 4 * 6 * 4)
    # Attention: 12 query and 6 key columns; each of 6 queries meets 9 + 3 keys
    k = found["attention"]
    assert k.flops == 4 * 12 * 6 * 12
    assert (k.read, k.written) == (4 * (2 * 12 * 2 * 6 + 6 * 12), 4 * 6 * 12)
    k = found["attention projections"]
    weights = 4 * 12 + 2 * 4 * 6 + 12 * 4
    assert SMALL.attention_weights == weights
    assert (k.flops, k.read, k.written) == (2 * 6 * weights, 4 * (weights + 6 * (4 + 12)), 4 * 6 * (12 + 12 + 4))
    # MoE: 4 · (1 − (2/4)^6) experts of 2 · 4 · 7 weights
    k = found["routed experts"]
    assert k.flops == 6 * 2 * (2 * 4 * 7 + 2 * 7 * 4)
    assert k.read == pytest.approx(4 * (1 - 0.5**6) * 2 * 4 * 7 * 4 + 4 * 4 * 4 + 6 * 4 * 4 + 6 * 2 * 7 * 4)
    k = found["shared expert"]
    assert (k.flops, k.read, k.written) == (6 * 4 * 4 * 8, 4 * (2 * 4 * 8 + 6 * 4 + 6 * 8), 4 * (6 * 8 + 6 * 4))
    k = found["norm, residual, modulation"]
    assert (k.launches, k.read, k.written) == (3, 4 * 2 * 6 * 4, 4 * 2 * 6 * 4)
    # A denoise step reads the states and writes none; its head reads 10 · 4 weights and writes no logits.
    found = {k.name: k for k in forward(SMALL, "denoise", batch=2, context=9, itemsize=4)}
    assert found["conv, scan, gated norm"].written == 4 * 6 * 6
    assert found["conv, scan, gated norm"].flops == 6 * (30 + 36 + 60 + 64)
    assert found["head and commit"].flops == 2 * 6 * 10 * 4
    assert found["head and commit"].read == 4 * (40 + 6 * 4)
    # A prompt of 3 has no context and no state to begin with, and 1 + 2 + 3 pairs a sequence.
    found = {k.name: k for k in forward(SMALL, "prefill", 2, 3, context=9, itemsize=4)}
    assert found["attention"].flops == 4 * 12 * 2 * 6
    assert found["conv, scan, gated norm"].read == 4 * 6 * 24
    assert found["conv, scan, gated norm"].written == 4 * 6 * 6 + 2 * 30 * 4


def test_floor_takes_the_slower_of_memory_and_compute():
    machine = Machine(read=100.0, copy=50.0, matmul=1000.0)
    assert machine.floor(flops=500, read=400, written=10) == 4.0  # reads alone: the writes are below a tenth of them
    assert machine.floor(flops=500, read=400, written=100) == 10.0  # mixed: 500 bytes at 50 a second
    assert machine.bound(500, 400, 100) == "memory"
    assert machine.floor(flops=20_000, read=400, written=100) == 20.0
    assert machine.bound(20_000, 400, 100) == "compute"


def test_parameters_are_those_of_the_model():
    # 2 towers of 31.578 G and what conditions them on time: 120,518 MiB in bfloat16
    assert REAL.tower_parameters() / 1e9 == pytest.approx(31.578, abs=5e-4)
    assert REAL.parameters() * 2 / 2**20 == pytest.approx(120_518, abs=0.5)


def test_dimensions_from_a_config(golden):
    path = golden.checkpoint / "config.json"
    config, found = Config.from_json(path), Dimensions.from_config(path)
    assert found.parameters() == sum(config.parameter_counts().values())
    assert (found.pattern, found.projected) == (
        config.hybrid_override_pattern, config.d_inner + config.conv_dim + config.mamba_num_heads,
    )  # fmt: skip
    assert found.pattern.count("M") == sum(k.launches for k in forward(found, "ar") if k.name == "in_proj")


def test_diffusion_over_ar():
    # By hand from the sums above, which are rounded: 16 · 1.432 / (16 / 2.5 · 7.680 + 7.540) = 0.404
    assert roofline.diffusion_over_ar(REAL, H200, 2.5) == pytest.approx(16 * 1.432 / (6.4 * 7.680 + 7.540), rel=1e-3)
    assert roofline.diffusion_over_ar(REAL, H200, 3.33, batch=32) == pytest.approx(2.02, abs=5e-3)
    # Only the denoiser's routing hits fewer experts.
    assert roofline.diffusion_over_ar(REAL, H200, 2.5, experts_hit=34.3) == pytest.approx(0.66, abs=5e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": 0}, ValueError, "hidden must be positive"),
        ({"experts": 2.0}, TypeError, "experts must be an int"),
        ({"state": True}, TypeError, "state must be an int"),
        ({"top_k": 99}, ValueError, "top_k must be at most experts"),
        ({"groups": 3}, ValueError, "groups must divide"),
        ({"pattern": "MX"}, ValueError, "pattern must hold"),
        ({"pattern": ""}, ValueError, "pattern must hold"),
    ],
)
def test_impossible_dimensions(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(MID, **change)


def test_impossible_forwards_and_machines():
    for mode, batch, rows in (("sideways", 1, 1), ("ar", 0, 1), ("prefill", 1, 0)):
        with pytest.raises(ValueError, match="must be"):
            forward(MID, mode, batch, rows)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="copy must be a positive finite number"):
            Machine(1.0, value, 1.0)


def test_command_line(capsys, golden):
    assert roofline.main(["--batch", "1", "--prompt", "2048"]) == 0
    out = capsys.readouterr().out
    assert "63.19 G parameters, 117.7 GiB" in out
    line = next(line for line in out.splitlines() if "routed experts" in line)
    assert line.split() == ["routed", "experts", "23", "1.916", "1371.71", "298.10", "6.856", "memory"]
    assert (
        roofline.main(["--config", str(golden.checkpoint / "config.json"), "--read", "10", "--dtype", "float32"]) == 0
    )
    assert "read 10 GB/s" in capsys.readouterr().out


def test_ceilings_of_a_results_file(tmp_path, capsys):
    data = {
        **results.new({}, {"threads": 2}),
        "ceilings": {
            "read": {"1": 3e10, "2": 5e10},
            "copy": {"1": 2e10, "2": 4e10},
            "matmul_float32": {"1": 1e11, "2": 2e11},
        },
    }
    assert Machine.from_results(data, "float32") == Machine(5e10, 4e10, 2e11)
    assert Machine.from_results(data, "float32", 1) == Machine(3e10, 2e10, 1e11)
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(data))
    assert roofline.main(["--results", str(path), "--dtype", "float32", "--threads", "1", "--batch", "1"]) == 0
    assert "read 30 GB/s, copy 20 GB/s, matmul 0.1 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--experts 129", "--experts must be above 0 and at most 128, got 129"),
        ("--batch 0", "batch must be at least 1, got 0"),
        ("--read -3", "read must be a positive finite number"),
        ("--results missing.json", "missing.json: no such file"),
        ("--config missing.json", "missing.json: no such file"),
        ("--context x", "argument --context: invalid integer value: 'x'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert roofline.main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("roofline: error: ")
    assert message in err
    assert err.count("\n") == 1
