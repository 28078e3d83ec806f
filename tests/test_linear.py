"""Linear layers over few rows: every way to divide the work gives the same numbers, and the measured ones are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_kernels import DEVICE
from tolerances import absolute, assert_close

import vllm_gems
from vllm_gems import tuned
from vllm_gems.kernels.linear import (
    MAX_ROWS,
    Shape,
    Tiling,
    bind_linear,
    default_tiling,
    linear_reference,
    rows_class,
    silu_gated_linear_reference,
    tiling_for,
)

TILINGS = (
    Tiling(16, 32, 1, False, 4, 2),
    Tiling(64, 64, 1, True, 4, 3),
    Tiling(64, 64, 3, True, 4, 3),
    Tiling(32, 128, 5, False, 4, 4),
    Tiling(128, 32, 8, True, 8, 4),
)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling_computes_the_same(tiling: Tiling, gated: bool) -> None:
    torch.manual_seed(0)
    shape = Shape(600, 100, True, gated)
    x = torch.randn(19, 600, device=DEVICE)
    weight = torch.randn(200 if gated else 100, 600, device=DEVICE) / 25
    bias = torch.randn(weight.shape[0], device=DEVICE)
    out = torch.full((19, 100), float("nan"), device=DEVICE)
    project = bind_linear(shape, x.dtype, x.get_device(), tiling)
    reference = silu_gated_linear_reference if gated else linear_reference
    (expected,) = reference(x.double(), weight.double(), bias.double())
    name = "silu_gated_linear" if gated else "linear"
    atol = absolute(name, {"x": x, "weight": weight}, x.dtype)
    for _ in range(2):  # the second finds the counters as the first left them
        project(x.data_ptr(), 600, weight.data_ptr(), bias.data_ptr(), out.data_ptr(), 19)
        assert_close(out, expected, name, atol)
        out.fill_(float("nan"))


def test_every_number_of_rows_has_a_tile() -> None:
    assert [rows_class(rows) for rows in (1, 16, 17, 32, 33, 64, 65, MAX_ROWS)] == [16, 16, 32, 32, 64, 64, 64, 64]


def test_measured_tilings_come_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(3584, 18944, False, True)
    measured = Tiling(64, 128, 1, True, 4, 3)
    found = {"bfloat16 3584x18944 gated 16": measured._asdict()}
    monkeypatch.setattr(tuned, "lookup", lambda kernel, device, key, source: found.get(key))
    assert tiling_for(shape, 16, torch.bfloat16, 0) == measured
    assert tiling_for(shape, 32, torch.bfloat16, 0) == default_tiling(shape, 32, 2)
    assert tiling_for(shape, 16, torch.float32, 0) == default_tiling(shape, 16, 4)


def test_a_layer_that_was_not_measured_takes_what_was_best_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"float16 any 32": Tiling(32, 128, 1, False, 4, 6), "float16 any gated 32": Tiling(64, 64, 1, True, 4, 3)}
    monkeypatch.setattr(tuned, "lookup", lambda kernel, device, key, source: key in found and found[key]._asdict())
    assert tiling_for(Shape(4096, 6144, False, False), 32, torch.float16, 0) == found["float16 any 32"]
    assert tiling_for(Shape(4096, 14336, False, True), 32, torch.float16, 0) == found["float16 any gated 32"]
    # With few columns, programs share the sum of a tile.
    shared = found["float16 any 32"]._replace(split=4)
    assert tiling_for(Shape(4096, 1024, False, False), 32, torch.float16, 0) == shared


def test_shipped_tilings_are_tilings() -> None:
    for path in (Path(vllm_gems.__file__).parent / "tuned").glob("*/linear.json"):
        for key, fields in json.loads(path.read_text())["configurations"].items():
            assert key.split()[0] in ("bfloat16", "float16")
            assert key.split()[-1] in ("16", "32", "64")
            Tiling(**fields)
