"""The compiled kernels: what docs/kernel-resources.md says of them, no spills, the instructions they are made for."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

import kernel_resources
import pytest
import torch
from kernel_resources import LIBRARY, Usage, instructions, shorten, table, usages

from twotower_ext import _C, build_info
from twotower_ext.registry import OPS

FACTS = build_info()
# csrc/simt/resources.h: the list of kernels in twotower::simt::detail::registered().
REGISTERED = "_ZZN8twotower4simt6detail10registeredB5cxx11EvE7kernels"
CODES = [a for a in FACTS["architectures"] if a.startswith("sm_")]
compiled = pytest.mark.skipif(not FACTS["cuda"], reason="built without CUDA: there is no machine code to read")

# kernel -> what its code must hold. `LDG.128` is met by any LDG with this among its modifiers.
CLAIMS = {
    # Vector variants move 16 bytes an access, in and out.
    r"rms_norm_kernel<(bf16|f16), 8, \d+>": "LDG.128 STG.128 SHFL.BFLY",
    r"rms_norm_kernel<f32, 4, \d+>": "LDG.128 STG.128 SHFL.BFLY",
    # Logits are float32 products from shared memory.
    r"router_logits_kernel<\w+, true, \d+>": "LDG.128 LDS.128 STS.128 FFMA",
    r"choose_experts_kernel<\d+>": "SHFL.BFLY SHFL.IDX POPC",
    # Tensor cores, fed by ldmatrix from tiles that cp.async fills; a queue and flags in global memory.
    r"moe_experts_kernel<bf16, .*>": "HMMA.16816.F32.BF16 LDSM.M88.4 LDGSTS.BYPASS.128 ATOMG.ADD",
    r"moe_experts_kernel<f16, .*>": "HMMA.16816.F32 LDSM.M88.4 LDGSTS.BYPASS.128 ATOMG.ADD",
    r"moe_experts_kernel<f32, .*>": "FFMA LDGSTS.BYPASS.128 ATOMG.ADD",
    r"gated_norm_kernel<(bf16|f16), \w+, 8>": "LDG.128 STG.128 SHFL.BFLY",
    r"gated_norm_kernel<f32, \w+, 4>": "LDG.128 STG.128 SHFL.BFLY",
    r"conv_kernel<.*>": "LDG STG FFMA MUFU.EX2",
    # The state by 16 bytes, what rows share from shared memory, sums over teams of lanes.
    r"scan_kernel<.*>": "LDG.128 STG.128 LDS.128 FFMA SHFL.BFLY SHFL.IDX MUFU.EX2",
    r"attention_kernel<bf16, .*>": "HMMA.16816.F32.BF16 LDSM.M88.4 LDSM.MT88.4 LDGSTS.BYPASS.128 MUFU.EX2",
    r"attention_kernel<f16, .*>": "HMMA.16816.F32 LDSM.M88.4 LDSM.MT88.4 LDGSTS.BYPASS.128 MUFU.EX2",
    r"attention_kernel<f32, .*>": "FFMA LDGSTS.BYPASS.128 MUFU.EX2",
    r"head_logits_kernel<bf16, .*>": "HMMA.16816.F32.BF16 LDSM.M88.4 LDGSTS.BYPASS.128 MUFU.EX2",
    r"head_logits_kernel<f16, .*>": "HMMA.16816.F32 LDSM.M88.4 LDGSTS.BYPASS.128 MUFU.EX2",
    r"head_logits_kernel<f32, .*>": "FFMA LDGSTS.BYPASS.128 MUFU.EX2",
    r"commit_scan_kernel<((bf16|f16), 8|f32, 4), .*>": "LDG.128 SHFL.BFLY",
    r"commit_filter_kernel<((bf16|f16), 8|f32, 4), .*>": "LDG.128 ATOMS SHFL.UP",
}
# The same from sm_90 on.
CLAIMS_SINCE_90 = {r"moe_experts_kernel<bf16, .*>": "STSM.MT88.2"}
# The same in code for one architecture alone.
CLAIMS_OF = {
    # Tiles copied by the tensor memory accelerator, products by warpgroups, barriers in shared memory.
    "sm_90a": {
        r"moe_stream_kernel<bf16, .*>": "HGMMA.F32.BF16 UTMALDG.5D LDGSTS.BYPASS.128 SYNCS.ARRIVE.TRANS64 ATOMG.ADD",
        r"moe_stream_kernel<f16, .*>": "HGMMA.F32 UTMALDG.5D LDGSTS.BYPASS.128 SYNCS.ARRIVE.TRANS64 ATOMG.ADD",
        r"moe_stream_kernel<\w+, \d+, .*>": "FENCE.VIEW.ASYNC.S ARRIVES.LDGSTSBAR WARPGROUP.ARRIVE WARPGROUP.DEPBAR",
        r"align_rows_kernel<\w+>": "STG.128",
    }
}
# What must not be there: float32 stays float32.
FORBIDDEN = {
    r"((moe_experts|attention|head_logits)_kernel<f32, |router_logits_kernel<|commit_|rms_norm_|scan_).*": "HMMA"
}


def holds(code: frozenset[str], wanted: str) -> bool:
    name, *modifiers = wanted.split(".")
    return any(name == i.split(".")[0] and set(modifiers) <= set(i.split(".")[1:]) for i in code)


def number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


@pytest.fixture(scope="module")
def committed() -> str:
    return kernel_resources.table_in(kernel_resources.DOCUMENT.read_text(encoding="utf-8"))[1]


@compiled
def test_the_document_lists_the_kernels(committed: str):
    found = usages()
    assert kernel_resources.kernels_in(committed) == sorted(found), "run: python tests/kernel_resources.py --write"
    if kernel_resources.cuda_in(committed) == FACTS["cuda_version"] and set(CODES) == set(architectures_in(committed)):
        assert committed == table(found, FACTS["cuda_version"]), "run: python tests/kernel_resources.py --write"


def architectures_in(text: str) -> list[str]:
    header = next(line for line in text.splitlines() if line.startswith("| kernel"))
    return header.strip("| ").split(" | ")[1:]


@compiled
def test_every_kernel_is_registered():
    """What build_info() asks a device about is what the library holds; read from its memory, as there is no device."""
    kernels = (ctypes.c_void_p * 3).in_dll(ctypes.CDLL(str(LIBRARY)), REGISTERED)
    names = []
    for at in range(kernels[0] or 0, kernels[1] or 0, 40):  # of a std::vector<std::pair<const void*, std::string>>
        text, length = ctypes.c_void_p.from_address(at + 8), ctypes.c_size_t.from_address(at + 16)
        names.append(ctypes.string_at(text.value, length.value).decode())
    assert sorted(kernel_resources.readable(names).values()) == sorted(usages())


@pytest.mark.gpu
def test_build_info_tells_what_kernels_use(committed: str):
    found = build_info()["kernels"]
    kernels = {shorten(name): uses for name, uses in found.items() if not kernel_resources.OPTIONAL.search(name)}
    assert sorted(kernels) == kernel_resources.kernels_in(committed)
    for uses in kernels.values():
        assert 1 <= uses["registers"] <= 255
        assert uses["local_bytes"] == 0
    code = [re.sub(r"\D", "", a) for a in architectures_in(committed)]
    device = "{}{}".format(*torch.cuda.get_device_capability())
    if device in code and kernel_resources.cuda_in(committed) == FACTS["cuda_version"]:
        rows = [line.split("|")[1:-1] for line in committed.splitlines() if line.startswith("| `")]
        for kernel, *cells in rows:
            uses = kernels[kernel.strip("` ")]
            registers, shared = map(int, cells[code.index(device)].split(","))
            assert uses["registers"] == registers
            assert shared - uses["shared_bytes"] in (0, 1024)  # from sm_90 on, these are the system's


@pytest.mark.gpu
def test_loading_the_library_leaves_the_gpu_alone():
    code = f"""
import ctypes, importlib.util
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
assert driver.cuDeviceGetCount(ctypes.byref(count)) == 3  # not initialised
assert module.build_info()["kernels"]
assert driver.cuDeviceGetCount(ctypes.byref(count)) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@compiled
def test_every_kernel_is_there_for_every_architecture():
    for kernel, usage in usages().items():
        assert set(usage) == set(CODES), kernel


@compiled
def test_nothing_spills():
    spilling = {
        f"{kernel}, {architecture}": f"{u.stack} bytes of stack, {u.local} of local memory"
        for kernel, usage in usages().items()
        for architecture, u in usage.items()
        if u.stack or u.local
    }
    assert not spilling


@compiled
@pytest.mark.parametrize("architecture", CODES)
def test_claimed_instructions_are_in_the_code(architecture: str):
    claims = [*CLAIMS.items(), *(CLAIMS_SINCE_90.items() if number(architecture) >= 90 else ())]
    claims += CLAIMS_OF.get(architecture, {}).items()
    missing = [
        f"{kernel}: no {wanted}"
        for kernel, code in instructions(architecture).items()
        for pattern, claimed in claims
        if re.fullmatch(pattern, kernel)
        for wanted in claimed.split()
        if not holds(code, wanted)
    ]
    there = [
        f"{kernel}: {forbidden}"
        for kernel, code in instructions(architecture).items()
        for pattern, forbidden in FORBIDDEN.items()
        if re.fullmatch(pattern, kernel) and holds(code, forbidden)
    ]
    assert not missing + there


@compiled
@pytest.mark.skipif("sm_90a" not in CODES, reason="not built for sm_90a")
def test_products_of_warpgroups_are_not_serialised():
    """Four products a group and 64 rows: a compiler that cannot prove the accumulators untouched waits in between."""
    for kernel, found in kernel_resources.code("sm_90a", LIBRARY).items():
        products = sum(text.startswith("HGMMA") for text in found)
        groups = sum(text.startswith("HGMMA") and "gsb0" in text for text in found)
        rows = re.search(r"moe_stream_kernel<\w+, (\d+),", kernel)
        assert products == (4 * int(rows[1]) // 128 * groups if rows else 0), kernel
        assert (products > 0) == kernel.startswith("moe_stream_kernel"), kernel


@compiled
@pytest.mark.parametrize("architecture", CODES)
def test_copies_are_started_among_products(architecture: str):
    """In the tile for prompts, so that tensor cores do not wait while all are issued: in the code of a whole step, 96
    products without a branch, four of ten copies stand behind at least a quarter of the products, in both products."""
    (kernel,) = [name for name in usages() if re.fullmatch(r"moe_experts_kernel<bf16, 192, 128, .*, 4>", name)]
    kinds = {"HMMA": "H", "LDGSTS": "C", "BRA": "|", "BAR": "|"}
    order = "".join(
        kinds.get(re.split(r"\W", text)[0], "") for text in kernel_resources.code(architecture, LIBRARY)[kernel]
    )
    steps = [part for part in order.split("|") if part.count("H") == 96 and "C" in part]
    assert len(steps) == 2
    for step in steps:
        behind = [step[:i].count("H") for i, kind in enumerate(step) if kind == "C"]
        assert len(behind) == 192 // 32 + 128 // 32, "a warp's copies of a step"
        assert sum(h >= 24 for h in behind) >= 4, behind
        assert max(map(len, re.findall("C+", step))) <= 5, behind


@compiled
def test_every_claim_is_about_a_kernel():
    """And every op with a CUDA kernel has a claim."""
    kernels = list(usages())
    patterns = [*CLAIMS, *CLAIMS_SINCE_90, *(pattern for claims in CLAIMS_OF.values() for pattern in claims)]
    stale = [pattern for pattern in patterns if not any(re.fullmatch(pattern, kernel) for kernel in kernels)]
    assert not stale
    for stem in {row.stem for row in OPS.values() if row.cuda}:
        source = (kernel_resources.ROOT / "csrc" / "kernels" / f"{stem}.cuh").read_text()
        names = re.findall(r"\b(\w+_kernel)\(", source)
        assert any(re.match(re.escape(name), pattern) for name in names for pattern in CLAIMS), stem


# Reading


def test_names_are_short():
    traits = "void twotower::kernels::rms_norm_kernel<twotower::kernels::NormTraits<__nv_bfloat16, 8, 256> >"
    assert shorten(f"{traits}(twotower::RmsNormParams)") == "rms_norm_kernel<bf16, 8, 256>"
    scan = "void twotower::kernels::scan_kernel<twotower::kernels::CommitTraits<float, 4, 128>, false>"
    assert shorten(f"{scan}(twotower::CommitParams, unsigned int)") == "scan_kernel<f32, 4, 128, false>"
    assert shorten("twotower::kernels::sort_kernel(twotower::P, twotower::kernels::Q)") == "sort_kernel"
    assert shorten("void (anonymous namespace)::x<__half, (twotower::Mode)1>(void (*)(int))") == "x<f16, (Mode)1>"


def test_kernels_of_one_name_are_refused():
    one = ["_ZN1a1kEv", "_ZN1b1kEv"]
    with pytest.raises(ValueError, match="kernels of one name: k"):
        kernel_resources.readable(one)
    assert kernel_resources.readable(one[:1]) == {"_ZN1a1kEv": "k"}
    assert kernel_resources.readable([]) == {}


def test_a_table_is_read_back():
    usage = {"sm_80": Usage(32, 0, 64, 0, 500), "sm_100a": Usage(40, 0, 0, 0, 500)}
    made = table({"b<f32, 1>": usage, "a": {"sm_100a": usage["sm_100a"]}}, "13.0.88")
    assert kernel_resources.kernels_in(made) == ["a", "b<f32, 1>"]
    assert kernel_resources.cuda_in(made) == "13.0.88"
    assert architectures_in(made) == ["sm_80", "sm_100a"]
    assert "| `b<f32, 1>` | 32, 64 | 40, 0 |" in made
    assert "| `a` | – | 40, 0 |" in made
    with pytest.raises(ValueError, match="does not say which CUDA"):
        kernel_resources.cuda_in("")
    with pytest.raises(ValueError, match="resources:begin"):
        kernel_resources.table_in(made)


def test_claims_are_met_by_modifiers():
    code = frozenset({"LDG.E.128.CONSTANT", "FFMA", "HMMA.16816.F32.BF16"})
    assert holds(code, "LDG.128")
    assert holds(code, "HMMA.16816.F32")
    assert not holds(code, "LDG.64")
    assert not holds(code, "LDGSTS.128")
