"""Whole decoder layers in a real engine on a GPU: the logits of forced decoding against stock vLLM and float32.

Two layers of each model in their real shapes, in processes of their own. The comparison is the benchmark's own
(`benchmarks/serve.py`), which fails if our error against float32 is more than 1.1 times stock's, or if a layer's patch
did not answer as often as there were decode steps; here nothing is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"qwen2.5-7b": "decoder.qwen2", "llama-3.1-8b": "decoder.llama", "qwen3-8b": "decoder.qwen3"}
CASES = {"1", "32", "72", "long", "mixed"}


def serve(model: str, folder: Path) -> tuple[int, str, dict[str, Any]]:
    """(exit status, output, record) of the benchmark without its timings."""
    options = ["--layers", "2", "--batches", "1,72", "--no-times", "--out", str(folder)]
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--model", model, *options]
    environ = {**os.environ, "VLLM_GEMS_INCLUDE": "default,decoder.*"}
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900, check=False)
    record = folder / "serve.json"
    return ran.returncode, ran.stdout + ran.stderr[-4000:], json.loads(record.read_text()) if record.exists() else {}


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_as_near_to_float32_as_stocks(model: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    status, output, record = serve(model, tmp_path)
    assert status == 0, output
    assert {each["case"] for each in record["logits"]} == CASES
    assert all("error_ratio" in each for each in record["logits"]), "there was no float32 engine"
    hits = record["hits"]["eager"]
    assert all(hits[case]["hits"][MODELS[model]] > 0 for case in CASES), hits
    row = next(row for row in record["report"]["eager"] if row["patch"] == MODELS[model])
    assert (row["state"], row["errors"]) == ("bound", 0)
