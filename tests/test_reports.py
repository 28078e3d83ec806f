"""The report: text, JSON, merging, and what `check` objects to."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from vllm_gems.nouns import Row, State
from vllm_gems.reports import Report, merge

ROWS = (
    Row("layernorm.rms_norm", State.BOUND, "RMSNorm.forward_cuda", hits=57344, wanted=True, speedup=1.94),
    Row("activation.silu_and_mul", State.ASLEEP, "SiluAndMul.forward_cuda", "custom_ops leave it out", wanted=True),
    Row("rotary.mrope", State.REFUSED, "MRotaryEmbedding.forward_cuda", "it has moved", declined={"odd": 3}, errors=1),
    Row("ir.rms_norm", State.OFF, "rms_norm", "off by default"),
)
VERSIONS = {"vllm_gems": "0.1.0", "vllm": "0.26.0", "torch": "2.11.0", "triton": "3.6.0"}


def report(*rows: Row, pid: int = 1, rank: str = "0") -> Report:
    return Report(rows or ROWS, VERSIONS, "NVIDIA H100 80GB HBM3", (pid,), rank, "eager")


def test_text_has_a_line_for_every_patch() -> None:
    lines = report().text().splitlines()
    assert lines[0].startswith("vllm-gems 0.1.0  vllm 0.26.0  torch 2.11.0  triton 3.6.0  NVIDIA H100")
    assert lines[1].split() == ["patch", "state", "where", "hits", "vs", "vLLM", "why"]
    assert lines[2].split() == ["layernorm.rms_norm", "bound", "RMSNorm.forward_cuda", "57344", "1.9x"]
    assert lines[4].endswith("it has moved; declined 3: odd; errors 1")
    assert len({line.index("  ", 25) for line in lines[1:2]}) == 1
    assert len(lines) == 2 + len(ROWS)
    assert "ir.rms_norm" not in report().text(everything=False)


def test_json_round_trip(tmp_path: pathlib.Path) -> None:
    path = report().write(tmp_path)
    assert path.name == "1.json"
    assert list(tmp_path.iterdir()) == [path]
    data = json.loads(path.read_text())
    keys = ["vllm_gems", "vllm", "torch", "triton", "device", "pid", "rank", "mode", "rows", "tuned", "compiled"]
    assert list(data) == keys
    fields = {field.name for field in dataclasses.fields(Row)}
    assert all(set(row) == fields for row in data["rows"])
    assert Report.read(path) == report()
    assert Report.read(tmp_path) == report()


def test_an_empty_folder_says_how_to_fill_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="VLLM_GEMS_REPORT="):
        Report.read(tmp_path)


def test_merging_adds_counts_and_keeps_the_liveliest_state() -> None:
    waiting = tuple(dataclasses.replace(row, state=State.WAITING, hits=0, declined={}, errors=0) for row in ROWS)
    whole = merge([report(*waiting, pid=1), report(pid=2), report(pid=3, rank="1")])
    assert whole.pid == (1, 2, 3)
    assert whole.rank == "0,1"
    by_name = {row.patch: row for row in whole.rows}
    assert by_name["layernorm.rms_norm"].hits == 2 * 57344
    assert by_name["layernorm.rms_norm"].state is State.BOUND
    assert by_name["rotary.mrope"].declined == {"odd": 6}
    assert by_name["rotary.mrope"].errors == 2
    assert whole.to_json()["pid"] == [1, 2, 3]
    assert Report.from_json(whole.to_json()) == whole


def test_problems() -> None:
    assert report().problems() == [
        "activation.silu_and_mul was asked for and never hit: custom_ops leave it out",
    ]
    refused = dataclasses.replace(ROWS[2], wanted=True)
    failed = dataclasses.replace(ROWS[0], state=State.FAILED, why="ValueError: no")
    assert report(refused, failed).problems() == [
        "rotary.mrope was asked for and is refused: it has moved",
        "layernorm.rms_norm failed: ValueError: no",
    ]
    idle = dataclasses.replace(ROWS[0], hits=0)
    assert report(idle).problems() == [], "nothing has run yet, so nothing can have been hit"


def test_measured_configurations_are_told() -> None:
    state = {
        "found": 18,
        "borrowed": {"triton 3.6.0": 12},
        "missing": ["4096x6144 16"],
        "stale": {"measured with triton 3.5.0": [f"{rows}x1 16" for rows in range(10)]},
    }
    found = dataclasses.replace(report(), tuned={"linear": state})
    assert found.text().splitlines()[-1] == (
        "linear: 18 measured configurations; 12 of them shipped, measured with triton 3.6.0; none for 4096x6144 16, "
        "which take what was best for others, or the default; 10 not used, measured with triton 3.5.0: 0x1 16, 1x1 16, "
        "2x1 16, 3x1 16, 4x1 16, 5x1 16, 6x1 16, 7x1 16 and 2 more"
    )
    assert Report.from_json(json.loads(json.dumps(found.to_json()))) == found
    other = dataclasses.replace(report(pid=2), tuned={"linear": {**state, "missing": ["1x1 16"]}})
    assert merge([found, other]).tuned == {"linear": {**state, "missing": ["1x1 16", "4096x6144 16"]}}


def test_what_was_compiled_after_warm_up_is_a_problem() -> None:
    early = {"number": 40, "seconds": 12.5, "last": 100.0, "late": {}}
    late = {"number": 2, "seconds": 0.25, "last": 90.0, "late": {"_linear_kernel": 2}}
    assert dataclasses.replace(report(), compiled=early).text() == report().text()
    whole = merge([dataclasses.replace(report(pid=pid), compiled=each) for pid, each in enumerate((early, late, {}))])
    assert whole.compiled == {"number": 42, "seconds": 12.75, "last": 100.0, "late": {"_linear_kernel": 2}}
    assert whole.text().splitlines()[-1] == "compiled after warm-up: _linear_kernel 2"
    assert whole.problems()[-1] == "compiled after warm-up: _linear_kernel 2"
    assert Report.from_json(json.loads(json.dumps(whole.to_json()))) == whole
