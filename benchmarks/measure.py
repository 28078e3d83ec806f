"""How everything here is timed and recorded: medians, both sides in one run, one JSON file per claim."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"

# Input sets are rotated until they cover this many bytes (twice an H100's L2), or there are this many of them.
_ROTATE_BYTES = 128 << 20
_MOST_SETS = 8


def input_sets(make: Callable[[], dict[str, Any]], nbytes: int) -> list[dict[str, Any]]:
    """Enough independent arguments that repeated calls do not all find theirs in the L2 cache."""
    return [make() for _ in range(min(_MOST_SETS, max(2, _ROTATE_BYTES // max(nbytes, 1))))]


def gpu_us(call: Callable[..., Any], sets: Sequence[dict[str, Any]], *, repeats: int = 15) -> float:
    """Median microseconds of GPU time of `call(**inputs)`, from replays of a CUDA graph of many calls.

    A graph leaves the host out: what is timed is the kernel and the gap to the next one.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
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
        calls = len(sets) * max(1, round(min(100, 2.0 / once) / len(sets)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for inputs in itertools.islice(itertools.cycle(sets), calls):
                call(**inputs)
        graph.replay()
        times = []
        for _ in range(repeats):
            start.record()
            graph.replay()
            end.record()
            stream.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def host_us(
    calls: dict[str, Callable[[], Any]], *, repeats: int = 41, burst: int = 50, pause: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Median microseconds of host time per call, for several calls measured turn by turn in one run.

    Bursts are short, and the GPU is drained (`pause`) before each, so that a full launch queue never makes the host
    wait; that is what a call costs when the host is the bottleneck.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(burst):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            pause()
            begin = time.perf_counter()
            for _ in range(burst):
                call()
            times[name].append((time.perf_counter() - begin) * 1e6 / burst)
    return {name: statistics.median(samples) for name, samples in times.items()}


def copy_bandwidth(nbytes: int = 512 << 20) -> float:
    """Terabytes per second of a device-to-device copy, bytes read and written both counted."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * nbytes / gpu_us(lambda source, target: target.copy_(source), [{"source": source, "target": target}]) / 1e6


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def slug(gpu: str) -> str:
    """The folder of a GPU's records: 'NVIDIA H100 80GB HBM3' -> 'h100'."""
    words = gpu.lower().replace("nvidia", "").split()
    return words[0] if words else "cpu"


def record(name: str, rows: list[dict[str, Any]], *, folder: pathlib.Path | None = None, **more: Any) -> pathlib.Path:
    """Write `rows` as benchmarks/results/<gpu>/<name>.json, with what is needed to judge and repeat them."""
    gpu = gpu_name()
    path = (folder or RESULTS / slug(gpu)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "name": name,
        "gpu": gpu,
        "commit": more.pop("commit", "") or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {
            "vllm": _version("vllm"),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": sys.version.split()[0],
        },
        "command": " ".join(["python", pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        **more,
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n'
    path.write_text(text)
    return path
