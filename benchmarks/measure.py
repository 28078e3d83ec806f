"""How everything here is timed and recorded: medians, both sides in one run, one JSON file per claim."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vllm_gems.tuned import gpu_slug
from vllm_gems.tuning.timing import gpu_us

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"

# Two and a half times the L2 cache of an H100, and the most input sets that are made to reach it.
_COLD_BYTES = 128 << 20
_MOST_SETS = 32
_WARM_SETS = 8


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


def copy_bandwidth(nbytes: int = 512 << 20) -> dict[str, float]:
    """Terabytes per second of device-to-device copies, bytes read and written both counted: the driver's own
    ("memcpy"), and the fastest elementwise kernel that PyTorch has ("kernel")."""

    def memcpy(source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def kernel(source: torch.Tensor, target: torch.Tensor) -> None:
        torch.neg(source, out=target)

    source = torch.randn(nbytes // 2, device="cuda").to(torch.bfloat16)
    inputs = {"source": source, "target": torch.empty_like(source)}
    times = gpu_us({"memcpy": memcpy, "kernel": kernel}, [inputs])
    return {name: 2 * nbytes / us / 1e6 for name, us in times.items()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if found.returncode else found.stdout.strip()


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# Options that say where a record goes, and nothing of how it was made.
_WHERE = ("--out", "--record-to", "--commit", "--record-commit")


def told(words: Sequence[str]) -> str:
    """A command for a record: what has to be typed to make it again."""
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before not in _WHERE and word.partition("=")[0] not in _WHERE
    ]
    return " ".join(kept)


def record(name: str, rows: list[dict[str, Any]], *, folder: pathlib.Path | None = None, **more: Any) -> pathlib.Path:
    """Write `rows` as benchmarks/results/<gpu>/<name>.json, with what is needed to judge and repeat them."""
    gpu = gpu_name()
    path = (folder or RESULTS / gpu_slug(gpu)) / f"{name}.json"
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
        "command": told(["python", f"{ROOT.name}/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]),
        **more,
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n'
    path.write_text(text)
    return path
