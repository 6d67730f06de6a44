"""Threads and processes: forks, workers of a DataLoader, callers at once, and no second pool beside torch's."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twotower_ext import array, ops


def work(index: int) -> Tensor:
    """Large enough to be shared out among threads."""
    g = torch.Generator().manual_seed(index)
    x, up = torch.randn(48, 96, generator=g), torch.randn(6, 64, 96, generator=g)
    down, weights = torch.randn(6, 96, 64, generator=g), torch.rand(48, 2, generator=g)
    ids = torch.stack([torch.randperm(6, generator=g)[:2] for _ in range(48)]).int()
    return ops.moe_experts(x, ids, weights, up, down)


def array_work(index: int) -> np.ndarray:
    r = np.random.default_rng(index)
    q, k, v = (r.normal(size=(2, 4, 33, 32)).astype(np.float32) for _ in range(3))
    return np.from_dlpack(array.block_attention(q, k, v)).copy()


class Worked(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray]:
        return work(index), array_work(index)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_a_data_loader(start: str):
    """Their parent has used both pools before: a forked child has none of its threads."""
    expected = [Worked()[i] for i in range(12)]
    loader = DataLoader(Worked(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120)
    for (a, b), (x, y) in zip(loader, expected, strict=True):
        assert torch.equal(a, x)
        assert np.array_equal(b, y)


def _in_child(queue: multiprocessing.Queue) -> None:
    queue.put((work(3).sum().item(), float(array_work(3).sum())))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_computes():
    """Whatever the pool's locks are at that moment, the child has a pool of its own."""
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            array_work(1)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        context = multiprocessing.get_context("fork")
        expected = (work(3).sum().item(), float(array_work(3).sum()))
        for _ in range(5):
            queue = context.Queue()
            child = context.Process(target=_in_child, args=(queue,))
            child.start()
            assert queue.get(timeout=60) == expected
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        busy.join()


def test_callers_at_once_get_the_bits_of_one():
    expected = [(work(i), array_work(i)) for i in range(6)]
    wrong: list[int] = []

    def caller(index: int) -> None:
        for _ in range(5):
            if not torch.equal(work(index), expected[index][0]) or not np.array_equal(
                array_work(index), expected[index][1]
            ):
                wrong.append(index)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_torchs_threads_gives_the_same_bits(threads: int):
    before, expected = torch.get_num_threads(), work(5)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(work(5), expected)
    finally:
        torch.set_num_threads(before)


def test_no_threads_are_added_to_torchs():
    """The ops run on torch's own: its team, once awake, is all there is."""
    code = """
import re, torch
from twotower_ext import ops
def threads():
    return int(re.search(r"Threads:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
torch.set_num_threads(3)
a = torch.randn(512, 512)
for _ in range(3):
    a @ a; torch.sort(a); (a + a).sum()
before = threads()
x, w = torch.randn(4, 256, 512), torch.ones(512)
for _ in range(5):
    ops.rms_norm(x, w)
    ids, up, down = torch.zeros(256, 1, dtype=torch.int32), torch.randn(2, 64, 512), torch.randn(2, 512, 64)
    ops.moe_experts(x[0], ids, torch.ones(256, 1), up, down)
print(threads() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 0
