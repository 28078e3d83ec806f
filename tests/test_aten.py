"""Overrides of PyTorch's operations: each overload of the table against PyTorch, in all layouts and dtypes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from aten_calls import DEVICE, Call, calls_of, expected_of, outcome, same
from test_rules import ROOT

import vllm_gems
from vllm_gems.aten.elementwise import Elementwise
from vllm_gems.aten.overloads import name_of, overloads_of
from vllm_gems.catalog import aten_catalog
from vllm_gems.patches import aten

BOUND = tuple(aten_catalog().patches)
ELEMENTWISE = sorted({row.op for row in aten.ROWS if isinstance(row, Elementwise)})


# PyTorch's kernels for CPUs and for GPUs differ where there is no number: ours are for GPUs.
FINITE = ("gelu",)
# Whose kernel for CPUs wants tensors of one shape, which that for GPUs does not.
LENIENT = ("gelu_backward",)
# What comes out depends on the limits of the dtype.
BY_DTYPE = ("nan_to_num",)


def overridden(op: str) -> list[tuple[str, Any]]:
    every = ((aten.PREFIX + name_of(each).partition("::")[2], each) for each in overloads_of(op))
    return [(name, each) for name, each in every if name in BOUND]


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_overloads_do_what_pytorch_does(op: str) -> None:
    """Values, dtypes, strides and errors; functional, in place, and into tensors that are given; and our kernel ran."""
    finite = op in FINITE or op.endswith("_backward")
    for name, overload in overridden(op):
        calls = [with_outs(overload, call) for _, call in calls_of(overload, finite)]
        expected = [expected_of(overload, call, wide=op not in BY_DTYPE) for call in calls]
        given = [call.copy() for call in calls]
        with vllm_gems.use_gems(name):
            got = [outcome(overload, call) for call in given]
            (row,) = (row for row in vllm_gems.report().rows if row.patch == name)
        for mine, other, call in zip(got, expected, given, strict=True):
            if op in LENIENT and isinstance(other, type):
                continue
            same(mine, other, f"{name} {call.label}")
        assert not row.errors, row.why
        assert row.hits > 0, f"{name} was called {len(calls)} times, and never by our kernel: {row.declined}"


def with_outs(overload: Any, call: Call) -> Call:
    """With tensors to write to, of the shape that PyTorch would give them and full of something else."""
    outs = [each.name for each in overload._schema.arguments if each.is_out]
    like = next(each.dtype for each in call.args if isinstance(each, torch.Tensor))
    for dtype in (torch.bool, like, torch.float32):
        written = {name: torch.empty(0, dtype=dtype, device=DEVICE) for name in outs}
        if outs and not isinstance(outcome(overload, Call(call.args, {**call.kwargs, **written}, "")), type):
            call.kwargs.update({name: torch.full_like(out, 3) for name, out in written.items()})
            return call
    call.kwargs.update({name: torch.zeros(0, device=DEVICE) for name in outs})
    return call


def test_what_models_dispatch_is_ours_or_named() -> None:
    """Every operation of the census is overridden, only looks at memory differently, or is in the document."""
    named = set(re.findall(r"`(\w+)(?:\.\w+)?`", (ROOT / "docs" / "aten.md").read_text().partition("we leave to")[2]))
    census = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "aten_census.json").read_text())["rows"]
    missing = {
        row["case"]["op"]
        for row in census
        if row["kind"] != "view"
        and aten.PREFIX + row["case"]["op"].removesuffix(".default") not in BOUND
        and row["case"]["op"].partition(".")[0] not in named
    }
    assert not missing
