"""The README's first command, on a tiny model, and what it says when something is wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from engine_runs import LIMIT_S, ROOT, environment

SCRIPT = ROOT / "examples" / "compare_tokens.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_tokens", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_compares_two_engines_and_is_content(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", str(tiny / "qwen2"), "--max-tokens", "3"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: 9 tokens in float32, identical with the plugin off and on" in done.stdout
    assert "layernorm.rms_norm" in done.stdout


def answer(**changes: Any) -> dict[str, Any]:
    hits = {"layernorm.rms_norm": 5, "op.rotary_embedding": 2, "activation.silu_and_mul": 2}
    return {"dtype": "float32", "tokens": [[1, 2], [3, 4]], "hits": hits, **changes}


ROW = {"patch": "layernorm.rms_norm", "errors": 0, "why": ""}


def test_it_has_no_complaint_where_none_is_due(script: ModuleType) -> None:
    assert script.complaints(answer(), answer(), {"rows": [ROW]}) == []
    rounded = answer(dtype="bfloat16", tokens=[[1, 2], [3, 5]])
    assert script.complaints(answer(dtype="bfloat16"), rounded, {"rows": [ROW]}) == []


@pytest.mark.parametrize(
    ("on", "report", "words"),
    [
        (answer(), None, "did not load the plugin"),
        (answer(tokens=[[1, 2], [3, 5]]), {"rows": [ROW]}, "for prompt 2"),
        (answer(hits={}), {"rows": [ROW]}, "no call went through rotary.rotary_embedding or op.rotary_embedding"),
        (
            answer(),
            {"rows": [ROW | {"errors": 1, "why": "boom"}]},
            "the kernel failed 1 times: boom",
        ),
    ],
)
def test_it_complains_in_words(
    script: ModuleType, on: dict[str, Any], report: dict[str, Any] | None, words: str
) -> None:
    assert words in "\n".join(script.complaints(answer(), on, report))
