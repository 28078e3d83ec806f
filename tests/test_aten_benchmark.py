"""The benchmark of overrides has arguments for every one of them, and its record decides the default set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from aten_calls import DEVICE

from benchmarks import aten as benchmark
from tools import tables
from vllm_gems import ops, standalone
from vllm_gems.catalog import aten_catalog
from vllm_gems.patches import aten


def test_every_overload_is_called_with_what_our_kernel_takes() -> None:
    """At a tiny size; PyTorch accepts it too."""
    called = []
    for name, overload, row in benchmark.overridden():
        benchmark.taken(overload, row, 3, 16, DEVICE)
        called.append(name)
    assert sorted(called) == sorted(aten_catalog().patches)


def test_what_stands_alone_is_called_like_pytorchs() -> None:
    """In order and by name."""
    for name in ("softmax", "sum_dim", "addmm", "clamp"):
        overload = standalone.TABLE[name]()
        row = next(row for row in aten.ROWS if row.op == overload._opname and row.reads(overload._schema))
        _, (args, kwargs), _ = benchmark.taken(overload, row, 3, 16, DEVICE)
        before = ops.CALLS[name]
        ours, others, ours_named, others_named = (call() for call in benchmark.alone_calls(name, args, kwargs).values())
        assert ops.CALLS[name] == before + 2
        for got in (ours, ours_named):
            torch.testing.assert_close(got, others)
        assert torch.equal(others, others_named)


def test_the_record_makes_the_default_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst shape of each counts, and is rounded against us."""
    rows = [
        {"case": {"op": "aten.silu"}, "ours": 5.0, "against": {"aten": 9.0}},
        {"case": {"op": "aten.silu"}, "ours": 5.0, "against": {"aten": 5.04}},
        {"case": {"op": "aten.mul.Tensor"}, "ours": 10.0, "against": {"aten": 9.999}},
    ]
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "aten.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    found = json.loads(tables.speedups("gpu"))["speedup"]
    assert found == {"aten.mul.Tensor": 0.99, "aten.silu": 1.0}
