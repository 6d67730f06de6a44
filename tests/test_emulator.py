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
LINE = r"wrong_kernels\.cu:\d+"
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
}
# What the race checker adds: both lines of a race are named.
RACE = {
    "missing_barrier": rf"RACE: read of static shared byte \d+ at {LINE} is not ordered after the write at {LINE}|"
    rf"UNINITIALISED: read of static shared byte \d+ at {LINE}",
    "overwritten_too_soon": rf"RACE: (read|write) of static shared byte \d+ at {LINE} is not ordered after the "
    rf"(write|read) at {LINE}",
    "unwritten_shared": rf"UNINITIALISED: read of static shared byte \d+ at {LINE}, which nothing has written",
    "beyond_shared": rf"OUT OF BOUNDS: write of 4 bytes at shared byte \d+, .* at {LINE}",
    "copy_not_awaited": rf"RACE: read of dynamic shared byte \d+ at {LINE} comes before the wait for the cp_async at "
    rf"{LINE}",
    "blocks_write_the_same": rf"RACE: write of global byte 0x[0-9a-f]+ at {LINE} is not ordered after the write at "
    rf"{LINE} by thread 0 of block 0",
    "signal_before_the_barrier": rf"RACE: (read|write) of global byte 0x[0-9a-f]+ at {LINE} is not ordered after the "
    rf"(read|write) at {LINE}",
}


def report(name: str) -> str:
    wrong = ctypes.CDLL(str(emulation.library())).twotower_wrong
    wrong.restype = ctypes.c_char_p
    out = torch.zeros(128, dtype=torch.int32)
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
