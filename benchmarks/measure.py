"""How everything here is timed and recorded: medians, both sides in one run, one JSON file per claim."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from vllm_gems.tuned import gpu_slug
from vllm_gems.tuning.timing import gpu_us, host_us, input_sets

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"
__all__ = ["copy_bandwidth", "gpu_name", "gpu_us", "host_us", "input_sets", "record", "told"]


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


# Whether vLLM takes FlashInfer's sampler, which it does by default where that can be compiled.
SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


def switches() -> dict[str, str]:
    """The plugin's variables as they are set, and which sampler vLLM was told to take, for a record."""
    return {name: value for name, value in os.environ.items() if name.startswith("VLLM_GEMS") or name == SAMPLER}


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
