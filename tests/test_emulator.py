"""The emulator itself: it says what is wrong with wrong kernels, and where."""

from __future__ import annotations

import ctypes
import re

import emulation
import pytest
import torch

from twotower_ext.registry import OPS

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(bool(emulation.missing(emulation.variant())), reason="no emulation here"),
]
LINE = r"wrong_kernels(?:_sm90)?\.cu:\d+"
# What every build finds.
ALWAYS = {
    "barrier_for_some": rf"DEADLOCK: .*\n    block 0: block_sync \(32 of 64 threads arrived\), {LINE}: threads 0-31"
    rf"\n    block 0: wait_for \(counter at 0 of 7\), {LINE}: threads 32-63",
    "divergent_lanes": rf"DIVERGENCE: (ballot|shuffle) \({LINE}\) is called while other lanes .* in (ballot|shuffle) "
    rf"\({LINE}\)",
    "half_a_warp": rf"DEADLOCK: .*\n    block 0: ballot \(16 of 32 lanes arrived\), {LINE}: threads 0-15",
    "copy_never_awaited": "a thread returns with a cp_async under way",
    "unaligned_copy": rf"cp_async: global address 0x[0-9a-f]+ is not 16-byte aligned \({LINE}\)",
    "too_little_shared": "dynamic_shared: 1024 bytes are wanted, the launch gave 1023",
    "address_of_global": rf"shared_address of a pointer that is not shared memory \({LINE}\)",
    "too_many_coresident": "more blocks than coresident_blocks",
    "arrival_is_missing": rf"Barrier::wait \(phase 0 has 32 of 64 arrivals and lacks 0 bytes\), {LINE}: threads 0-63",
    "bytes_are_missing": rf"Barrier::wait \(phase 0 has 1 of 1 arrivals and lacks 8192 bytes\), {LINE}: threads 0-63",
    "bytes_not_expected": "the block ends while a Barrier expects -8192 more bytes|ends with a copy_tile under way",
    "barrier_not_initialised": rf"Barrier::wait of a Barrier that nobody has initialised \({LINE}\)",
    "barrier_not_published": rf"copy_tile: its Barrier has not been published .* \({LINE}",
    "too_many_arrivals": rf"Barrier::arrive: the phase has all of its 2 arrivals \({LINE}\)",
    "tile_at_an_odd_address": r"copy_tile: shared address \d+ is not 1024-byte aligned",
    "block_ends_before_its_copy": "the block ends with a copy_tile under way|ends while a Barrier expects -8192 more",
    "rows_that_nobody_waits_for": "returns with a cp_async that it has not committed|comes before the wait for the",
    "rows_refilled_before_the_wait": rf"RACE: cp_async at {LINE} overwrites what the wgmma at {LINE}.* reads",
    "block_ends_before_its_rows": "the block ends with a cp_async under way, whose Barrier nobody has waited for",
    "product_without_begin": rf"wgmma outside of a group: wgmma_begin\(\) opens it \({LINE}\)",
    "product_never_awaited": "the block ends with a wgmma that nobody has waited for",
    "product_of_other_rows": rf"wgmma: operand a at shared address \d+ is no 16 columns of .* \({LINE}\)",
    "operands_differ": rf"wgmma: threads of a warpgroup name different operands \({LINE}\)",
    "refilled_before_the_wait": rf"RACE: copy_tile at {LINE}.* overwrites what the wgmma at {LINE}.* reads",
    "wrong_parity": r"Barrier::arrive: the phase has all of its 64 arrivals|Barrier::wait \(phase 0 has 0 of 64 ",
    "three_warps_multiply": rf"wgmma_begin \(96 of 128 threads arrived\), {LINE}: threads 0-95",
}
# What the race checker adds: both lines of a race are named.
RACE = {
    "missing_barrier": rf"RACE: read of static shared byte \d+ at {LINE} is not ordered after the write at {LINE}|"
    rf"UNINITIALISED: read of static shared byte \d+ at {LINE}",
    "overwritten_too_soon": rf"RACE: (read|write) of static shared byte \d+ at {LINE} is not ordered after the "
    rf"(write|read) at {LINE}",
    "unwritten_shared": rf"UNINITIALISED: read of static shared byte \d+ at {LINE}, which nothing has written",
    "beyond_shared": rf"OUT OF BOUNDS: write of 4 bytes at shared byte \d+, .* at {LINE}",
    "copy_not_awaited": rf"RACE: read of dynamic shared byte \d+ at {LINE} comes before the wait for the asynchronous "
    rf"copy at {LINE}",
    "tile_not_awaited": rf"RACE: read of dynamic shared byte \d+ at {LINE} (comes before the wait for the asynchronous "
    rf"copy|is not ordered after the write) at {LINE} < {LINE} by a copy or product of block 0|"
    rf"UNINITIALISED: read of dynamic shared byte \d+ at {LINE}",
    "tile_refilled_too_soon": rf"RACE: (asynchronous write of dynamic shared byte \d+ at {LINE} < {LINE} is not "
    rf"ordered after the read at {LINE} by thread|read of dynamic shared byte \d+ at {LINE} .* by a copy or product)",
    "product_of_stored": rf"PROXY: the wgmma at {LINE} reads what a thread has stored .* no fence_products between",
    "product_of_rows_without_a_fence": rf"PROXY: the wgmma at {LINE} reads what a thread has stored",
    "product_of_rows_fenced_too_soon": rf"PROXY: the wgmma at {LINE} reads what a thread has stored",
    "product_of_rows_not_awaited": rf"RACE: read of dynamic shared byte \d+ at {LINE}.* comes before the wait for the "
    rf"asynchronous copy at {LINE}|UNINITIALISED: read of dynamic shared byte",
    "one_warp_is_forgotten": rf"RACE: asynchronous write of dynamic shared byte \d+ at {LINE}.* is not ordered after "
    rf"the read at {LINE} by a copy or product",
    "barrier_not_known": rf"RACE: read of dynamic shared byte \d+ at {LINE} is not ordered after the write at {LINE}",
    "blocks_write_the_same": rf"RACE: write of global byte 0x[0-9a-f]+ at {LINE} is not ordered after the write at "
    rf"{LINE} by thread 0 of block 0",
    "signal_before_the_barrier": rf"RACE: (read|write) of global byte 0x[0-9a-f]+ at {LINE} is not ordered after the "
    rf"(read|write) at {LINE}",
}


def report(name: str) -> str:
    wrong = ctypes.CDLL(str(emulation.library())).twotower_wrong
    wrong.restype = ctypes.c_char_p
    out = torch.zeros(4096 + 128, dtype=torch.int32)
    return wrong(name.encode(), ctypes.c_void_p(out.data_ptr())).decode()


@pytest.mark.parametrize("name", ALWAYS)
def test_reports_of_every_build(name: str):
    text = report(name)
    assert re.search(ALWAYS[name], text), text
    assert text.startswith(f"{name}: emulator: ")


@pytest.mark.skipif(emulation.variant() != "race", reason="the other builds do not check for races")
@pytest.mark.parametrize("name", RACE)
def test_reports_of_the_race_checker(name: str):
    text = report(name)
    assert re.search(RACE[name], text), text


def test_sums_are_nan_before_the_wait():
    wrong = ctypes.CDLL(str(emulation.library())).twotower_wrong
    wrong.restype = ctypes.c_char_p
    out = torch.zeros(4096 + 128, dtype=torch.int32)
    assert wrong(b"sums_before_the_wait", ctypes.c_void_p(out.data_ptr())) == b""
    assert out[4096:].tolist() == [2] * 128


@pytest.mark.parametrize("name", ["refilled_after_the_wait", "product_of_rows"])
def test_a_right_kernel_has_no_report(name: str):
    assert report(name) == ""


def test_the_next_launch_is_not_disturbed():
    """A kernel that is given up leaves nothing behind."""
    for name in ALWAYS:
        assert report(name)
    row = OPS["rms_norm"]
    sample = row.samples()[1]
    with emulation.emulated():
        actual = row.op(*sample.args, **sample.kwargs)[0]
    torch.testing.assert_close(actual, row.reference(*sample.args, **sample.kwargs)[0])


@pytest.mark.parametrize(("variable", "value"), [("SIMT_SCHEDULE", "sideways"), ("SIMT_ASYNC", "never")])
def test_an_unknown_policy_is_refused(variable: str, value: str, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert re.search(rf"{variable} must be one of .*, got '{value}'", report("half_a_warp"))
