"""GPU time of calls, without the host's."""

from __future__ import annotations

import collections
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# About a third of a millisecond at an H100's clock.
_SPIN_CYCLES = 1 << 19


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
