"""tools/aten_census.py: it counts what reaches the dispatcher, and its records are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools import aten_census

RECORDS = sorted(aten_census.RESULTS.glob("*/aten_census.json"))


def test_counts_calls_below_autograd() -> None:
    """With their dtypes and shapes; a linear layer is the parts that it is taken apart into."""
    x, weight, bias = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)
    with torch.no_grad(), aten_census.Census() as census:
        for _ in range(2):
            torch.nn.functional.linear(x, weight, bias)
        x.add_(1)
        torch.add(x, x.double(), out=torch.empty(2, 3, dtype=torch.float64))
    assert {name: (seen.kind, seen.calls) for name, seen in census.seen.items()} == {
        "t.default": ("view", 2),
        "addmm.default": ("functional", 2),
        "add_.Tensor": ("inplace", 1),
        "_to_copy.default": ("functional", 1),
        "empty.memory_format": ("functional", 1),
        "add.out": ("out", 1),
    }
    addmm = census.seen["addmm.default"]
    assert addmm.dtypes == {"float32, float32, float32": 2}
    assert addmm.shapes == {"5, 2x3, 3x5": 2}
    assert census.seen["add.out"].dtypes == {"float32, float64, float64": 1}


def test_results_are_those_without_it() -> None:
    x = torch.randn(4, 8)
    expected = torch.softmax(x, dim=-1)
    with aten_census.Census():
        got = torch.softmax(x, dim=-1)
    assert torch.equal(got, expected)


def test_overloads_of_a_record(tmp_path: Path) -> None:
    seen = {"add.Tensor": aten_census.Seen("functional", 3), "t.default": aten_census.Seen("view", 1)}
    path = tmp_path / "aten_census.json"
    path.write_text(json.dumps({"rows": [each.row("bert", name) for name, each in seen.items()]}))
    assert aten_census.overloads(path) == {"add.Tensor", "t.default"}
    assert aten_census.overloads(path, lambda row: row["kind"] != "view") == {"add.Tensor"}


def test_there_is_a_record() -> None:
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_records_are_of_all_models(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    assert {row["case"]["model"] for row in rows} == set(aten_census.MODELS)
    assert all(row["ours"] == sum(row["dtypes"].values()) >= sum(row["shapes"].values()) > 0 for row in rows)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_recorded_overloads_are_pytorchs(path: Path) -> None:
    for row in json.loads(path.read_text())["rows"]:
        packet, _, overload = row["case"]["op"].rpartition(".")
        assert row["kind"] == aten_census.kind(getattr(getattr(torch.ops.aten, packet), overload)), row["case"]
