"""What the benchmarks measure: their cases, their peers, and the whole model against the publisher-style path."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from twotower_ext.benchmarks import inputs, model, peers, results, suite
from twotower_ext.benchmarks.cases import Case, Inputs, cases, memory_needed
from twotower_ext.benchmarks.dimensions import MID, REAL, Dimensions
from twotower_ext.benchmarks.peers.moe import without_hopper
from twotower_ext.benchmarks.peers.publisher_model import PublisherModel
from twotower_ext.benchmarks.peers.scan import chunked_scan

from twotower_ext import ops, reference
from twotower_ext.registry import OPS

TINY = Dimensions(
    hidden=256, vocab=1024, pattern="ME*M", mamba_heads=8, mamba_head_dim=8, groups=2, state=16, query_heads=4,
    kv_heads=2, head_dim=16, experts=8, top_k=3, expert_width=24, shared_width=40,
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
COMPILED = ("torch.compile", "FlexAttention")  # seconds to prepare: one case of each kind is enough here


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and lose much where other processes keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def made(key: str) -> tuple[Case, Inputs]:
    """A case of the tiny dimensions and its inputs."""
    case = next(case for case in cases(TINY, "custom", DTYPES) if case.key == key)
    return case, case.make("cpu")


TINY_KEYS = [case.key for case in cases(TINY, "custom", DTYPES)]
FLOAT_KEYS = [key for key in TINY_KEYS if "/float32/" in key]


def run(case: Case, sample) -> object:
    return OPS[case.op].op(*sample.args, **sample.kwargs)


@pytest.mark.parametrize(("dimensions", "shape"), [(REAL, "real"), (MID, "mid"), (TINY, "custom")])
def test_every_op_has_cases_under_stable_keys(dimensions, shape):
    found = cases(dimensions, shape, DTYPES)
    assert {case.op for case in found} == set(OPS)
    keys = [case.key for case in found]
    assert len(set(keys)) == len(keys)
    for case in found:
        assert results.KEY.fullmatch(case.key)
        op, named, dtype, _ = case.key.split("/")
        assert (op, named, dtype) == (case.op, shape, str(case.dtype).removeprefix("torch."))
    plain, routed = {"T1", "T16", "T128", "T512", "T2048"}, {"T512-routed", "T2048-routed"}
    traces = {"T16-traces", "T128-traces", "T512-traces"}
    needed = {"moe_experts": plain | traces | routed, "mamba_block": {"rows16", "rows1-update"}}
    for op, names in needed.items():
        assert {case.key.split("/")[3] for case in found if case.op == op} == names
    on_gpus = {case.key for case in cases(dimensions, shape, DTYPES, backend="cuda")} - set(keys)
    on_gpus = {(key.split("/")[0], key.split("/")[3]) for key in on_gpus}
    many = ("T1024", "T8192", "T2048-traces", "T1024-routed", "T8192-routed")
    assert on_gpus == {("moe_route", "T8192"), *(("moe_experts", case) for case in many)}


def test_an_op_that_is_unknown_or_has_no_inputs_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="op must be one of"):
        cases(TINY, "custom", DTYPES, ["nothing"])
    monkeypatch.delitem(inputs.INPUTS, "rms_norm")
    with pytest.raises(ValueError, match="op rms_norm has no benchmark case"):
        cases(TINY, "custom", DTYPES)


def test_memory_work_and_traffic_of_the_published_layer_are_known_without_taking_memory():
    one, _, _, many, *_ = cases(REAL, "real", [torch.bfloat16], ["moe_experts"])
    expert, shared = 2 * 1856 * 2688, 2 * 3712 * 2688  # parameters
    weights = 2 * 128 * expert
    assert weights < memory_needed(many) < weights + 2**31
    found = one.make("meta")
    assert all(t.is_meta for sample in found.samples for t in (sample.args[0], *sample.args[3:]))
    assert found.flops == 2 * (6 * expert + shared)
    token = 2 * 2688 * 2 + 6 * 4 + 6 * 4  # the row in and out in bfloat16, expert ids and weights
    assert found.bytes == 2 * (6 * expert + shared) + token
    assert found.notes["distinct_experts"] == 6


def test_head_of_the_published_size_leaves_room_for_its_reference():
    (case,) = cases(REAL, "real", [torch.bfloat16], ["lm_head_commit"])
    assert memory_needed(case) > (2 + 4) * 131072 * 2688


@pytest.mark.parametrize("key", FLOAT_KEYS)
def test_rotation_touches_other_memory_every_time(key):
    """The first argument is new in every set, and large weights rotate as well."""
    case, found = made(key)
    assert len(found.samples) >= inputs.FEWEST_SETS
    assert found.notes["sets"] == len(found.samples)
    firsts = [sample.args[0] for sample in found.samples]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in firsts)
    assert all(a_end <= b_start for (_, a_end), (b_start, _) in itertools.pairwise(spans))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts[:4], 2))
    if case.op in ("moe_experts", "lm_head_commit"):
        weights = [sample.args[3 if case.op == "moe_experts" else 1].data_ptr() for sample in found.samples]
        assert len(set(weights)) == len(weights)  # tiny ones: all of them are needed


def test_one_weight_serves_all_sets_where_it_passes_any_cache():
    (case,) = (c for c in cases(REAL, "real", [torch.bfloat16], ["moe_experts"]) if c.key.endswith("T16"))
    samples = case.make("meta").samples
    assert len({id(sample.args[3]) for sample in samples}) == 1
    assert len({id(sample.args[5]) for sample in samples}) == len(samples)  # the shared expert alone would stay cached


@pytest.mark.parametrize("key", [key for key in FLOAT_KEYS if key.startswith("moe_experts")])
def test_expert_ids_are_new_distinct_and_counted(key):
    _, found = made(key)
    counts = []
    for sample in found.samples:
        ids = sample.args[1]
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        counts.append(len({expert for row in ids.tolist() for expert in row}))
    assert found.notes["distinct_experts"] == round(sum(counts) / len(counts), 1)
    if len(found.samples[0].args[1]) == 1:
        assert len({tuple(sample.args[1][0].tolist()) for sample in found.samples}) > 4


def test_a_routed_case_times_the_router_as_well(monkeypatch):
    case, found = made("moe_experts/custom/float32/T512-routed")
    plain = made("moe_experts/custom/float32/T512")[1]
    sample = found.samples[0]
    x, gate, bias, top_k, scaling = sample.route.args
    assert x is sample.args[0]
    ids, weights = reference.moe_route(x, gate, bias, top_k, scaling)
    assert torch.equal(ids, sample.args[1])
    torch.testing.assert_close(weights, sample.args[2])
    assert len(set(ids.flatten().tolist())) == TINY.experts
    assert found.flops == plain.flops + 2 * 512 * TINY.hidden * TINY.experts
    router = 4 * (TINY.hidden * TINY.experts + TINY.experts) - 512 * TINY.top_k * 8
    assert found.bytes == plain.bytes + router

    calls = []

    def recorded(name, function):
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    for name in ("moe_route", "moe_experts"):
        monkeypatch.setattr(ops, name, recorded(name, getattr(ops, name)))
    for peer in (peers.moe.ExpertLoop(), peers.moe.GroupedMM()):
        timed = peer.prepare(case, sample)
        assert not calls
        assert peer.disagreement(case, run(case, sample), timed()) is None
        with pytest.raises(AttributeError):  # of the router, which gets a text
            peer.prepare(case, replace(sample, route=replace(sample.route, args=("x",) * 5)))()
        calls.clear()
    suite._call("moe_experts", sample)()
    assert calls == ["moe_route", "moe_experts"]
    calls.clear()
    suite._call("moe_experts", plain.samples[0])()
    assert calls == ["moe_experts"]


def test_routing_as_on_traces():
    """Of 128 experts a block of 16 tokens meets about 34, and the busiest takes about 12 of them."""
    numbers = inputs.Numbers("cpu", torch.bfloat16)
    met = [numbers.popular_ids(128, 16, 6) for _ in range(100)]
    assert all(len(set(row)) == 6 and row == sorted(row) for row in met[0].tolist())
    counts = torch.stack([ids.flatten().bincount(minlength=128) for ids in met])
    assert 32 <= (counts > 0).sum(1).double().mean() <= 36
    assert 11 <= counts.amax(1).double().mean() <= 13
    assert len({int(c.argmax()) for c in counts}) > 30  # another expert in every set


@pytest.mark.parametrize("key", TINY_KEYS)
def test_inputs_are_the_same_every_time_and_results_of_ordinary_size(key):
    case, found = made(key)
    again = case.make("cpu")
    for a, b in zip(inputs.distinct_tensors(found.samples), inputs.distinct_tensors(again.samples), strict=True):
        assert torch.equal(a, b)
    values = run(case, found.samples[0])
    for result in values if isinstance(values, tuple) else (values,):
        if result is not None and result.is_floating_point():
            assert result.isfinite().all()
            assert 0.05 < result.float().std() < 10


def test_filled_numbers_are_normal_and_do_not_repeat_by_row():
    big = torch.empty(260, 65536)  # more than the block that it is filled from
    following = inputs.fill(big, 0.5)
    assert big.std().item() == pytest.approx(0.5, rel=1e-2)
    assert abs(big.mean().item()) < 1e-3
    assert big[:, 0].unique().numel() == 260
    more = torch.empty(1000)
    inputs.fill(more, 0.5, following)
    assert not torch.equal(more, big.view(-1)[:1000])


@pytest.mark.parametrize("op", ["denoise_commit", "lm_head_commit"])
def test_commit_inputs_leave_no_decision_to_rounding(op):
    """A quarter or so of the block is sure; all confidences are far apart and far from the threshold."""
    decided = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        case, found = made(f"{op}/custom/{name}/rows16")
        _, committed, confidence, _, status = run(case, found.samples[0])
        decided[dtype] = committed
        ordered = confidence[0].sort().values
        assert committed.sum() in (4, 5)
        assert ordered.diff().min() > 0.01
        assert (confidence - inputs.THRESHOLD).abs().min() > 0.01
        assert not status.any()
    assert torch.equal(*decided.values())


def usable(case: Case) -> list[peers.Peer]:
    return [p for p in peers.ALL if p.supports(case) and p.missing("cpu") is None and p.name not in COMPILED]


@pytest.mark.parametrize("key", TINY_KEYS)
@torch.no_grad()
def test_peers_compute_what_the_op_computes(key):
    """And are caught when they do not: on other inputs every one of them disagrees."""
    case, found = made(key)
    first, second = found.samples[:2]
    names = [peer.name for peer in usable(case)]
    for peer in usable(case):
        theirs = peer.prepare(case, first)()
        assert peer.disagreement(case, run(case, first), theirs) is None, peer.name
        assert peer.disagreement(case, run(case, second), theirs) is not None, peer.name
        assert peer.version()
    assert names


def test_peers_of_the_published_targets_are_there_by_name():
    wanted = {
        "moe_experts": {"expert loop", "torch._grouped_mm"}, "mamba_block": {"reference", "torch eager"},
        "ssd_scan": {"sequential scan", "chunked scan"}, "block_attention": {"cat + SDPA (enable_gqa)"},
        "two_stream_attention": {"cat + SDPA (enable_gqa)"}, "denoise_commit": {"torch eager"},
        "lm_head_commit": {"torch eager"},
    }  # fmt: skip
    for key in TINY_KEYS:
        case, _ = made(key)
        assert wanted.get(case.op, set()) <= {peer.name for peer in usable(case)}
    names = [peer.name for peer in peers.ALL]
    assert len(set(names)) == len(names)
    assert not any("/" in name or "," in name for name in names)  # paths into results, lists on the command line


@pytest.mark.parametrize("key", [
    "causal_conv1d/custom/bfloat16/rows16", "denoise_commit/custom/float32/rows16",
    "two_stream_attention/custom/float32/rows1024-block16", "block_attention/custom/bfloat16/causal1024",
])  # fmt: skip
@torch.no_grad()
def test_compiled_peers_compute_what_the_op_computes(key):
    case, found = made(key)
    (peer,) = (p for p in peers.ALL if p.name in COMPILED and p.supports(case))
    assert peer.missing("cpu") is None
    for sample in found.samples[:2]:
        assert peer.disagreement(case, run(case, sample), peer.prepare(case, sample)()) is None


def test_peers_for_gpus_say_why_they_cannot_run_here():
    missing = {peer.name: peer.missing("cpu") for peer in peers.ALL}
    assert missing["mamba_ssm Triton"] == missing["Triton fused MoE (ours)"] == "needs an NVIDIA GPU"
    assert missing["mma.sync kernel (ours)"] == missing["CUTLASS grouped GEMM"] == "needs an NVIDIA GPU"
    assert missing["cat + SDPA flash (enable_gqa)"]
    assert missing["torch eager"] is None


def test_the_other_kernel_is_chosen_for_a_call_alone(monkeypatch):
    chosen = lambda: os.environ.get("TWOTOWER_MOE_KERNEL", "")  # noqa: E731
    monkeypatch.delenv("TWOTOWER_MOE_KERNEL", raising=False)
    assert without_hopper(chosen)() == "mma"
    assert chosen() == ""
    with pytest.raises(ZeroDivisionError):
        without_hopper(lambda: 1 // 0)()
    assert chosen() == ""


def test_disagreement_names_the_result_that_differs():
    close, far = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])
    ids, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    tolerance = (1e-3, 1e-3)
    assert peers.disagreement((close, ids), (close + 1e-4, ids), tolerance) is None
    assert peers.disagreement((close, ids), (close, None), tolerance) is None
    assert peers.disagreement(close, (close,), tolerance) is None
    assert "result 0: largest difference 0.1" in peers.disagreement((close, ids), (far, ids), tolerance)
    assert "result 1: 1 of 2 entries" in peers.disagreement((close, ids), (close, other), tolerance)
    assert "result 0" in peers.disagreement(close, close[:1], tolerance)
    assert "result 0" in peers.disagreement(close, close.double(), tolerance)
    assert "result 0" in peers.disagreement(close, close * math.nan, tolerance)
    assert "1 results, expected 2" in peers.disagreement((close, ids), (close,), tolerance)


@pytest.mark.parametrize("scan", [None, chunked_scan])
@torch.inference_mode()
def test_the_publisher_style_model_is_the_model(scan):
    """Prefill, extension by one token and by many, and denoising, logits and states, two rows at a time."""
    ours = model.random_model(TINY, torch.float32)
    theirs = PublisherModel(ours) if scan is None else PublisherModel(ours, scan)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(TINY.vocab, (2, 40), generator=generator)

    logits, state = ours.prefill(ids, last_only=True)
    expected, their_state = theirs.prefill(ids)
    close(logits, expected)
    for token_ids in (ids[:, :1], ids[:, :7]):
        logits, state = ours.extend(state, token_ids)
        expected, their_state = theirs.extend(their_state, token_ids)
        close(logits[:, -1:], expected)
    for mine, other in zip(state.layers, their_state.layers, strict=True):
        for name in ("conv", "ssm", "k", "v"):
            a, b = getattr(mine, name), getattr(other, name)
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)

    block = torch.randint(TINY.vocab, (2, 16), generator=generator)
    t = torch.tensor([0.5, 0.9375])
    close(ours.denoise(state, block, t), theirs.denoise(their_state, block, t))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_model_entries_hold_times_shares_and_peers(monkeypatch):
    monkeypatch.setattr(model, "QUICK", dict(min_seconds=0.02, max_seconds=0.4, min_runs=2))
    found = dict(model.entries(TINY, "custom", [torch.float32], quick=True))
    assert list(found) == model.keys("custom", [torch.float32])
    forwards = {name.split("/")[2]: found[name] for name in list(found)[:5]}
    assert list(forwards) == ["denoise", "denoise-commit", "ar", "prefill64", "prefill2048"]
    for name, entry in forwards.items():
        assert 0 < entry["low"] <= entry["seconds"] <= entry["high"]
        wanted = {"prefill64": {model.PEER, model.CHUNKED_PEER}, "prefill2048": {model.CHUNKED_PEER}}
        assert entry["peers"].keys() == wanted.get(name, {model.PEER})
        assert all(peer["distance"] < 1e-3 for peer in entry["peers"].values())
        assert not entry["missing"]
        assert TINY.top_k <= entry["notes"]["distinct_experts"] <= TINY.experts
    assert forwards["ar"]["notes"]["distinct_experts"] == TINY.top_k
    mixers = {"moe_experts", "moe_route", "mamba_block", "block_attention", "rms_norm", "projections"}
    assert forwards["denoise"]["split"].keys() == mixers | {"head"}
    assert forwards["denoise-commit"]["split"].keys() == mixers | {"lm_head_commit"}
    for name in ("denoise", "denoise-commit"):
        assert 0.2 * forwards[name]["seconds"] < sum(forwards[name]["split"].values()) < forwards[name]["seconds"]
    for times in found["custom/float32/batch"].values():
        assert times.keys() == {"denoise", "extend", "ar"}
        assert all(seconds > 0 for seconds in times.values())
    for mode, reached in found["custom/float32/generate"].items():
        assert reached["tokens"] == model.NEW_TOKENS
        assert reached["tokens_per_nfe"] == reached["tokens"] / reached["nfe"]
        assert mode == "mask_diffusion" or reached["nfe"] == model.NEW_TOKENS


def test_a_model_peer_that_disagrees_is_reported_and_not_timed(monkeypatch):
    def shifted(self, state, token_ids):
        logits, state = extend(self, state, token_ids)
        return logits.roll(1, dims=-1), state

    extend = PublisherModel.extend
    monkeypatch.setattr(model, "QUICK", dict(min_seconds=0.02, max_seconds=0.4, min_runs=2))
    monkeypatch.setattr(PublisherModel, "extend", shifted)
    done = [key for key in model.keys("custom", [torch.bfloat16]) if not key.endswith("/ar")]
    ((key, entry),) = model.entries(TINY, "custom", [torch.bfloat16], done=done, quick=True)
    assert key == "custom/bfloat16/ar"
    assert not entry["peers"]
    assert entry["missing"][model.PEER].startswith("disagrees: relative distance of logits ")


@pytest.mark.gpu
def test_the_triton_mixture_of_experts_computes_what_the_reference_computes():
    from twotower_ext.benchmarks.peers.triton_moe import fused_moe

    for tokens in (1, 16, 128):
        (case,) = (c for c in cases(TINY, "custom", [torch.bfloat16], ["moe_experts"]) if c.key.endswith(f"T{tokens}"))
        sample = case.make("cuda").samples[0]
        expected = reference.moe_experts(*sample.args)
        assert peers.disagreement(expected, fused_moe(*sample.args), (5e-2, 5e-2)) is None
