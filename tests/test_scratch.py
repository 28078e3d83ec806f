"""Counters: zeros, one buffer a stream, none shared with a CUDA graph."""

from __future__ import annotations

import threading

import pytest
import torch

from vllm_gems import scratch
from vllm_gems.launch import CPU
from vllm_gems.scratch import counters


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_COUNTERS", {})


def test_zeros() -> None:
    found = counters(CPU, 3)
    assert (found.dtype, found.device.type) == (torch.int32, "cpu")
    assert found.numel() >= 3
    assert found.is_contiguous()
    assert not found.any()


def test_the_same_buffer_again() -> None:
    first = counters(CPU, 3)
    assert counters(CPU, 1) is first
    assert counters(CPU, first.numel()) is first


def test_growth() -> None:
    """By powers of two; what it grew to is kept."""
    first = counters(CPU, 1)
    grown = counters(CPU, first.numel() + 1)
    assert grown.numel() == 2 * first.numel()
    assert not grown.any()
    assert counters(CPU, 1) is grown


def test_threads_share_one_buffer() -> None:
    together, found = threading.Barrier(8), []

    def ask() -> None:
        together.wait()
        found.append(counters(CPU, 3))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


class Driver:
    """What is asked of CUDA, for two devices that are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 0, False
        core = torch._C
        monkeypatch.setattr(core, "_cuda_getCurrentRawStream", lambda device: self.stream, raising=False)
        monkeypatch.setattr(core, "_cuda_isCurrentStreamCapturing", lambda: self.capturing, raising=False)
        monkeypatch.setattr(scratch, "_zeros", lambda device, count: torch.zeros(count, dtype=torch.int32))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_every_stream_has_its_own(driver: Driver) -> None:
    first = counters(0, 3)
    assert counters(1, 3) is not first
    driver.stream = 0x5000
    assert counters(0, 3) is not first
    driver.stream = 0
    assert counters(0, 3) is first


def test_a_captured_graph_has_its_own(driver: Driver) -> None:
    """At every call, because PyTorch may give the memory of one to the next kernel of the graph."""
    first = counters(0, 3)
    driver.capturing = True
    captured = [counters(0, 3), counters(0, 3)]
    assert first is not captured[0] is not captured[1] is not first
    driver.capturing = False
    assert counters(0, 3) is first
