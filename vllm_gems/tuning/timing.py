"""GPU time of calls without the host's, and the host's without the GPU's."""

from __future__ import annotations

import collections
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# About a third of a millisecond at an H100's clock.
_SPIN_CYCLES = 1 << 19

# Two and a half times the L2 cache of an H100, and the most input sets that are made to reach it.
_COLD_BYTES = 128 << 20
_MOST_SETS = 32
_WARM_SETS = 8


def gpu_us(
    calls: Mapping[str, Callable[..., Any]], sets: Sequence[dict[str, Any]], *, repeats: int = 15
) -> dict[str, float]:
    """Median microseconds of GPU time of each `call(**inputs)`, from replays, turn by turn, of CUDA graphs of many.

    A graph leaves the host out: what is timed is the kernel and the gap to the next one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # where `sets` were made
    with torch.cuda.stream(stream):
        graphs = {name: _graph_of(call, sets, stream) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, (graph, count) in graphs.items():
                times[name].append(_replay_us(graph, stream) / count)
    return {name: statistics.median(samples) for name, samples in times.items()}


def _replay_us(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> float:
    """Microseconds of one replay. The GPU spins until the host has enqueued it all; where the host took longer than
    that, the time would be the host's, and is taken again."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for attempt in range(8):
        graph.replay()  # its data are where the last replay leaves them, whatever ran in between
        torch.cuda._sleep(_SPIN_CYCLES << attempt)
        start.record()
        graph.replay()
        end.record()
        host_was_first = not start.query()
        stream.synchronize()
        if host_was_first:
            return float(start.elapsed_time(end)) * 1e3
    raise RuntimeError("the host is too slow to keep the GPU busy; another program may be using it")


def _graph_of(
    call: Callable[..., Any], sets: Sequence[dict[str, Any]], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of `call` over `sets` in turn, for about half a millisecond, and the number of its calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for inputs in sets:  # warm up: compile, load, fill caches
        call(**inputs)
    stream.synchronize()
    start.record()
    for inputs in sets:
        call(**inputs)
    end.record()
    stream.synchronize()
    once = max(start.elapsed_time(end) / len(sets), 2e-3)
    calls = len(sets) * max(1, round(min(200, 0.5 / once) / len(sets)))
    # What a call returns is kept for a while, so that outputs take turns in memory as inputs do.
    kept: collections.deque[Any] = collections.deque(maxlen=len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for inputs in itertools.islice(itertools.cycle(sets), calls):
            kept.append(call(**inputs))
    return graph, calls


def input_sets(make: Callable[[], dict[str, Any]], nbytes: int) -> list[dict[str, Any]]:
    """Independent arguments of `nbytes` each, to call with in turn.

    Large ones are as many as the L2 cache cannot hold, so that every call reads from memory; small ones are few and all
    stay in the cache, as they do in serving. Between the two lies nothing: a cache half hit would judge its own policy.
    """
    cold = max(2, -(-_COLD_BYTES // max(nbytes, 1)))
    return [make() for _ in range(cold if cold <= _MOST_SETS else _WARM_SETS)]


def host_us(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    bursts: int = 9,
    burst: int = 50,
    before: Callable[[str], Any] = lambda name: None,
    pause: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Median microseconds of host time per call, for several calls measured turn by turn in one run.

    Bursts are short, and the GPU is drained (`pause`) before each, so that a full launch queue never makes the host
    wait; that is what a call costs when the host is the bottleneck. before(name) prepares a call's turn, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before(name)
            for _ in range(burst):
                call()
            for _ in range(bursts):
                pause()
                begin = time.perf_counter()
                for _ in range(burst):
                    call()
                times[name].append((time.perf_counter() - begin) * 1e6 / burst)
    return {name: statistics.median(samples) for name, samples in times.items()}
