"""Real engines on a GPU whose logits are compared, by the benchmark's own comparison (`benchmarks/serve.py`).

It fails if our error against float32 is more times stock's than rounding explains, or if a patch did not answer as
often as the model has layers and decode steps for it; here nothing is timed.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = 3
CASES = {"1", "32", "72", "long", "mixed"}


@contextmanager
def _a_place() -> Iterator[None]:
    """One of a few: each comparison is three engines, and the memory of the GPU is for the tests beside it, too."""
    while True:
        for place in range(PLACES):
            with (Path(tempfile.gettempdir()) / f"vllm-gems-engines-{place}").open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield
                return
        time.sleep(1)


def serve(model: str, folder: Path, include: str, *options: str, exclude: str = "", most: int = 72) -> dict[str, Any]:
    """The benchmark's record of two layers of `model`, decoded for comparison with these patches, `most` at a time."""
    pytest.importorskip("vllm")
    options = ("--layers", "2", "--batches", f"1,{most}", "--no-times", "--out", str(folder), *options)
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--model", model, *options]
    environ = {**os.environ, "VLLM_GEMS_INCLUDE": include, "VLLM_GEMS_EXCLUDE": exclude}
    with _a_place():
        ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    record: dict[str, Any] = json.loads((folder / "serve.json").read_text())
    assert {each["case"] for each in record["logits"]} == (CASES if most == 72 else CASES - {"72"})
    assert all("error_ratio" in each for each in record["logits"]), "there was no float32 engine"
    return record


def assert_captured(record: dict[str, Any], *patches: str) -> None:
    """Of the default mode: while graphs were captured; replays are not counted."""
    rows = {row["patch"]: row for row in record["report"]["compiled"]}
    for patch in patches:
        assert (rows[patch]["hits"] > 0, rows[patch]["errors"]) == (True, 0)


def assert_answered(record: dict[str, Any], patch: str) -> None:
    """In every way of decoding, and nothing went wrong."""
    hits = record["hits"]["eager"]
    assert all(each["hits"].get(patch, 0) > 0 for each in hits.values()), hits
    row = next(row for row in record["report"]["eager"] if row["patch"] == patch)
    assert (row["state"], row["errors"]) == ("bound", 0)
