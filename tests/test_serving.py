"""What the serving benchmarks do around engines and servers: processes by turns, what counts as a problem, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serve, serving
from benchmarks.models import MODELS
from tools import tables

# Stands in for the script with an engine in it, and keeps a journal of what it does and when.
CHILD = r"""
import json, sys, time
from multiprocessing.connection import Connection
from pathlib import Path

spec = json.loads(sys.argv[2])
out, name, ms = Path(spec["out"]), spec["name"], {}

def note(what):
    with (out / "journal").open("a") as journal:
        journal.write(f"{name} {what}\n")

note("starts")
if name == "broken":
    sys.exit("no room")
asked = Connection(spec["asked"])
asked.send("ready")
for point in iter(asked.recv, ""):
    note(f"begins {point}")
    time.sleep(0.02)
    note(f"ends {point}")
    ms.setdefault(point, []).append(float(point))
    asked.send(point)
(out / f"{name}.json").write_text(json.dumps({"startup": 1.0, "ms": ms}))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    monkeypatch.setattr(serve, "__file__", str(path))
    return tmp_path


def told(name: str, **spec: Any) -> serve.Told:
    return serve.Side(name, "compiled", False), name, {"timed": True, **spec}


def test_processes_start_together_and_measure_by_turns(script: Path) -> None:
    results = serve.measured([told("stock"), told("ours"), told("watches", timed=False)], script, ("1", "32"), turns=2)
    journal = (script / "journal").read_text().splitlines()
    assert {line.split()[1] for line in journal[:3]} == {"starts"}
    order = [("ours", "1"), ("ours", "32"), ("stock", "1"), ("stock", "32")]
    order += [("stock", "1"), ("stock", "32"), ("ours", "1"), ("ours", "32")]
    assert journal[3:] == [f"{name} {what} {point}" for name, point in order for what in ("begins", "ends")]
    assert results["stock"]["ms"] == results["ours"]["ms"] == {"1": [1.0, 1.0], "32": [32.0, 32.0]}
    assert results["watches"]["ms"] == {}


def test_a_process_that_ends_early_is_told_with_the_end_of_its_log(script: Path) -> None:
    with pytest.raises(serve.ChildError, match=r"(?s)broken: EOFError.*no room"):
        serve.measured([told("stock"), told("broken")], script, ("1",), turns=1)


def test_as_many_run_together_as_there_is_room_for() -> None:
    assert serve.groups_of([3, 3, 3, 9, 1, 1], 7) == [[0, 1], [2], [3], [4, 5]]
    assert serve.groups_of([], 7) == []


def run(tokens_per_s: float, ms: float, failed: int = 0) -> dict[str, Any]:
    measures = dict.fromkeys(serving.MEASURES, ms) | {"output_throughput": tokens_per_s}
    return {"completed": 10 - failed, "failed": failed, **measures}


def server(*runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "first_ttft_ms": 80.0,
        "again_ttft_ms": [20.0, 30.0],
        "runs": list(runs),
        "complaints": [],
        "given_up": [],
        **more,
    }


def gems(errors: int = 0, late: dict[str, int] | None = None) -> dict[str, Any]:
    why = "_linear_kernel is not compiled yet and a CUDA graph is being captured" if late else "a hook"
    rows = [{"patch": "layernorm.rms_norm", "errors": errors, "declined": {why: 1}}]
    return {"rows": rows, "compiled": {"late": late or {}, "after_first_request": False}, "problems": []}


def test_problems_of_a_server() -> None:
    assert serving.problems_of("ours", server(run(1, 1), report=gems())) == []
    found = server(run(1, 1, failed=3), complaints=["theirs, during inference"], report=gems(2, {"_linear_kernel": 1}))
    assert serving.problems_of("ours", found) == [
        "ours: 3 of 10 requests failed",
        "ours: layernorm.rms_norm raised 2 times",
        "ours: layernorm.rms_norm declined: _linear_kernel is not compiled yet and a CUDA graph is being captured",
        "ours: compiled after warm-up: {'_linear_kernel': 1}",
    ]


def test_the_serving_table_has_medians_of_both_sides() -> None:
    found = {
        "stock-compiled": server(run(1000.0, 4.0), run(2000.0, 6.0), run(1200.0, 5.0)),
        "ours-compiled": server(run(1500.0, 5.0), run(1500.0, 5.0), run(1500.0, 5.0)),
        "ours-eager": server(run(1, 1)),
    }
    rows = serving.rows_of(MODELS["tiny"], ["compiled", "eager"], found)
    assert [row["case"]["mode"] for row in rows] == ["compiled"] * (2 + len(serving.MEASURES))
    lines = tables.serving({"rows": rows}).splitlines()
    assert lines[2] == "| tiny | default | time to first token of the first request, ms | 80.0 | 80.0 | 1.000 |"
    assert "| tiny | default | output tokens/s | 1200 | 1500 | 1.250 |" in lines
    assert "| tiny | default | median time per output token, ms | 5.00 | 5.00 | 1.000 |" in lines


def test_the_table_of_modes_has_tokens_per_second() -> None:
    row = {
        "case": {"model": "tiny", "mode": "eager", "batch": 32},
        "tokens_per_s": {"ours": 6400.0, "stock": 3200.0},
        "turns": {"ours": [5.0, 5.0], "stock": [10.0, 15.0]},
    }
    assert tables.serve_modes({"rows": [row]}).splitlines()[2:] == [
        "| tiny | 32 | 3200 | 6400 | 2.50 |  |  |  |"
    ]
    compiled = {**row, "case": {**row["case"], "mode": "compiled"}, "turns": {"ours": [4.0], "stock": [5.0]}}
    assert tables.serve_modes({"rows": [compiled, row]}).splitlines()[2:] == [
        "| tiny | 32 | 3200 | 6400 | 2.50 | 3200 | 6400 | 1.25 |"
    ]


def test_a_table_of_several_records_names_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row = {"tokens_per_s": {"ours": 2.0, "stock": 1.0}, "turns": {"ours": [1.0], "stock": [2.0]}}
    (tmp_path / "h100").mkdir()
    for model in ("a", "b"):
        record = {
            "gpu": "NVIDIA H100", "versions": {"vllm": "1", "torch": "2", "triton": "3"}, "date": "2026-01-01",
            "commit": model * 12, "rows": [{**row, "case": {"model": model, "mode": "compiled", "batch": 1}}],
        }  # fmt: skip
        (tmp_path / "h100" / f"serve_modes_{model}.json").write_text(json.dumps(record))
    text = tables.rendered("serve_modes")
    assert "(`serve_modes_a.json`, 2026-01-01, commit aaaaaaaaaa; `serve_modes_b.json`, 2026-01-01, commit bbbb" in text
    assert [line.split(" | ")[0] for line in text.splitlines()[-2:]] == ["| a", "| b"]


def test_a_word_is_a_token(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    serving.write_model(tmp_path / "model", MODELS["tiny"])
    words = transformers.AutoTokenizer.from_pretrained(serving.tokenizer_of(tmp_path / "model"))
    tokens = [5, 511, 0, 33]
    assert words.vocab_size == MODELS["tiny"].config["vocab_size"]
    assert words.encode(words.decode(tokens)) == tokens
