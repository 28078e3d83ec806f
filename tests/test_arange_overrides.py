"""Overrides of PyTorch's `arange`: the same numbers, as many of them; what is declined, and why."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from aten_calls import DEVICE
from test_matmul_overrides import overridden
from torch.testing import assert_close

from vllm_gems.aten.arange import Arange
from vllm_gems.aten.overloads import Overload
from vllm_gems.errors import Refused
from vllm_gems.kernels.arange import COMPUTE
from vllm_gems.patches import aten

FLOATS = [dtype for dtype in COMPUTE if dtype.is_floating_point]
INTEGERS = [dtype for dtype in COMPUTE if not dtype.is_floating_point]
(ROW,) = (row for row in aten.ROWS if isinstance(row, Arange))


def check(*numbers: Any, exact: bool = True, **options: Any) -> None:
    """By our kernel, against PyTorch's; which for CPUs rounds fractions otherwise, and those are near float64's."""
    expected = torch.arange(*numbers, device=DEVICE, **options)
    with overridden("arange"):
        got = torch.arange(*numbers, device=DEVICE, **options)
    assert got.dtype is expected.dtype
    assert got.device == expected.device
    assert got.shape == expected.shape
    if exact or DEVICE == "cuda":
        assert torch.equal(got, expected), (numbers, options)
    else:
        compute = torch.promote_types(got.dtype, torch.float32)
        start, _, step = torch.tensor(numbers, dtype=compute).double()
        precise = start + step * torch.arange(len(got), dtype=torch.float64)
        unit, largest = torch.finfo(compute).eps, float(precise.abs().max()) if len(got) else 0.0
        assert_close(got.double(), precise, rtol=torch.finfo(got.dtype).eps, atol=2 * unit * largest)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_whole_numbers(dtype: torch.dtype) -> None:
    """As many as there are before the end, which wrap around as conversions do; and int64 if nobody says."""
    chosen = random.Random(0)
    cases = [(0,), (1,), (1500,), (3, 3), (2, 9), (5, -4, -2), (5, -3, -2), (-7, 11, 3), (2**40, 2**40 + 7, 5)]
    for _ in range(8):
        start, span, step = chosen.randint(-1000, 1000), chosen.randint(0, 3000), chosen.randint(1, 40)
        cases += [(start, start + span, step), (start, start - span, -step)]
    for case in cases if dtype is torch.int64 else cases[::3]:
        check(*case, dtype=dtype)
    if dtype is torch.int64:
        check(7)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fractions(dtype: torch.dtype) -> None:
    """Their number is that in float64; the default dtype if nobody says."""
    chosen = random.Random(1)
    check(2100, dtype=dtype)  # more than half precision tells apart
    check(5.5, dtype=dtype)
    check(1, 3, dtype=dtype)
    for numbers in ((0.0, 1.0, 0.1), (-1, 1, 1 / 3), (3.0, -2, -0.7), (1.0, 1.0, 5), (0, 1.0, 1e30)):
        check(*numbers, dtype=dtype, exact=False)
    for _ in range(4):
        start, step = chosen.uniform(-10, 10), chosen.uniform(0.01, 1)
        check(start, start + chosen.uniform(0, 300) * step, step, dtype=dtype, exact=False)


def test_the_default_dtype_is_asked_for_at_each_call() -> None:
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            check(4.0)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [1, 3])
def test_results_are_written_where_they_are_wanted(dtype: torch.dtype, step: int) -> None:
    """And not between."""
    for numbers in ((1200,), (3, 40, 2)):
        expected = torch.arange(*numbers, dtype=dtype, device=DEVICE)
        base = torch.full((step * len(expected) + 2,), 77, dtype=dtype, device=DEVICE)
        out = base[1:-1:step]
        with overridden("arange"):
            assert torch.arange(*numbers, out=out) is out
        assert torch.equal(out, expected)
        out.fill_(77)
        assert bool((base == 77).all())


def test_what_is_pytorchs() -> None:
    def out(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    for declined, call in {
        "is resized": lambda: torch.arange(7, out=out(0)),
        "has 2 dimensions": lambda: torch.arange(6, out=out(2, 3)),
        "numbers with fractions": lambda: torch.arange(0.5, 5, dtype=torch.int64, device=DEVICE),
        "its numbers are ['bool']": lambda: torch.arange(True, device=DEVICE),
        "larger than 2**53": lambda: torch.arange(2**62, 2**62 + 2, device=DEVICE),
    }.items():
        expected = call()
        with overridden("arange", hits=0, declined=declined):
            assert torch.equal(call(), expected)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0, 5, 0), "nonzero"), ((2, 0), "inconsistent"), ((0.0, 1.0, -0.5), "inconsistent"),
        ((float("nan"),), "unsupported range"), ((0, float("inf")), "unsupported range"),
    ],
)  # fmt: skip
def test_errors_are_pytorchs(numbers: tuple[Any, ...], words: str) -> None:
    with overridden("arange", hits=0), pytest.raises(RuntimeError, match=words):
        torch.arange(*numbers, device=DEVICE)


def test_too_many() -> None:
    call = Overload(torch.ops.aten.arange.start_step, ROW)
    for numbers, dtype in (((0, 2**32, 1), torch.uint8), ((0.0, 1e300, 1e-300), torch.float64)):
        with pytest.raises(Refused, match="elements"):
            call(numbers, {"dtype": dtype, "device": torch.device(DEVICE)})
