"""Overrides of PyTorch's reductions, and of what is done along a dimension, of tensors that lie anyhow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from aten_calls import DEVICE, HALVES, elements, same

import vllm_gems

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
DIMS: tuple[Any, ...] = (None, 0, -1, (0, 2))


def tensors(dtype: torch.dtype, finite: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    yield "contiguous", elements((3, 5, 37), dtype, finite)
    yield "transposed", elements((7, 4, 6), dtype, finite).permute(2, 0, 1)
    yield "gapped", elements((3, 5, 40), dtype, finite)[:, ::2, 3::3]
    yield "channels last", elements((2, 3, 4, 5), dtype, finite).to(memory_format=torch.channels_last)
    yield "expanded", elements((1, 5, 3), dtype, finite).expand(4, 5, 3)
    yield "long", elements((2, 1, 2500), dtype, finite)
    yield "of one element", elements((), dtype, finite)
    yield "empty", elements((3, 0, 2), dtype, finite)


def reduced(name: str) -> Callable[[torch.Tensor, Any, bool], Any]:
    """(x, dim, keepdim) -> PyTorch's result; a TypeError where it takes no such dimensions."""
    function = getattr(torch, name)

    def call(x: torch.Tensor, dim: Any, keepdim: bool) -> Any:
        if name == "count_nonzero":
            return function(x) if dim is None else function(x, dim)
        if name in ("max", "min", "any", "all", "prod", "argmax", "argmin") and dim is None:
            return function(x)
        if name in ("max", "min", "prod", "argmax", "argmin") and isinstance(dim, tuple):
            raise TypeError
        if name in ("amax", "amin") and dim is None:
            return function(x)
        return function(x, dim=dim, keepdim=keepdim)

    return call


def outcome(call: Callable[[], Any]) -> Any:
    try:
        result = call()
    except Exception as error:
        return type(error)
    return list(result) if isinstance(result, tuple) else result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "sum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "count_nonzero", "var",
        "std", "var_mean", "std_mean",
    ],
)  # fmt: skip
def test_any_dimensions(name: str, dtype: torch.dtype) -> None:
    """Half precision is judged by float32 on the same numbers: PyTorch rounds in between on a CPU."""
    call = reduced(name)
    cases = [
        (f"{label}, {dim=}, {keepdim=}", x, dim, keepdim)
        for label, x in tensors(dtype, finite=name in ("sum", "mean", "prod", "var", "std", "var_mean", "std_mean"))
        for dim, keepdim in zip(DIMS, itertools.cycle((False, True)))
    ]
    expected = []
    for _, x, dim, keepdim in cases:
        exact = outcome(lambda x=x, dim=dim, keepdim=keepdim: call(x, dim, keepdim))
        if dtype in HALVES and not isinstance(exact, type):
            wide = outcome(lambda x=x, dim=dim, keepdim=keepdim: call(x.float(), dim, keepdim))
            both = ([exact], [wide]) if isinstance(exact, torch.Tensor) else (exact, wide)
            rounded = [other.to(each.dtype) for each, other in zip(*both, strict=True)]
            exact = rounded[0] if isinstance(exact, torch.Tensor) else rounded
        expected.append(exact)
    with vllm_gems.use_gems(name):
        got = [outcome(lambda x=x, d=dim, k=keepdim: call(x, d, k)) for _, x, dim, keepdim in cases]
        rows = vllm_gems.report().rows
    for (label, *_), mine, other in zip(cases, got, expected, strict=True):
        compare(mine, other, f"{name} {dtype} {label}")
    assert not [row.why for row in rows if row.errors]
    if not all(isinstance(each, type) for each in expected):
        assert sum(row.hits for row in rows) > 0, [row.declined for row in rows]


def compare(got: Any, expected: Any, label: str) -> None:
    """Sums of thousands of numbers in another order, of both signs: some units of their size, not of the result's."""
    if isinstance(expected, torch.Tensor) and expected.dtype is torch.float32 and isinstance(got, torch.Tensor):
        assert got.shape == expected.shape, label
        assert got.stride() == expected.stride() or not got.numel(), label
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-4, equal_nan=True, msg=label)
    elif isinstance(expected, list) and isinstance(got, list):
        for mine, other in zip(got, expected, strict=True):
            compare(mine, other, label)
    else:
        same(got, expected, label)


ALONG: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "_softmax": torch.softmax,
    "_log_softmax": torch.log_softmax,
    "cumsum": torch.cumsum,
    "cumprod": lambda x, dim: torch.cumprod(x * 0.5 if x.dtype.is_floating_point else x, dim),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ALONG for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        *((name, torch.int64) for name in ("cumsum", "cumprod")),
    ],
    ids=str,
)
def test_along_any_dimension(name: str, dtype: torch.dtype) -> None:
    cases = [
        (f"{label}, {dim=}", x, dim)
        for label, x in tensors(dtype)
        if not (name == "cumprod" and label == "long")  # products of thousands, which the interpreter does one by one
        for dim in range(max(1, x.dim()))
    ]
    call = ALONG[name]
    expected = [call(x.float() if dtype in HALVES else x, dim).to(dtype) for _, x, dim in cases]
    with vllm_gems.use_gems(name):
        got = [call(x, dim) for _, x, dim in cases]
        rows = vllm_gems.report().rows
    for (label, *_), mine, other in zip(cases, got, expected, strict=True):
        assert mine.dtype == other.dtype
        if dtype is not torch.float32:
            torch.testing.assert_close(mine, other, msg=lambda text, label=label: f"{name} {dtype} {label}: {text}")
        else:
            compare(mine, other, f"{name} {label}")
    assert not [row.why for row in rows if row.errors]
    assert sum(row.hits for row in rows) >= len(cases) - 2, [row.declined for row in rows]


def test_rows_of_minus_infinity_are_no_numbers() -> None:
    """As PyTorch has it; and a block of them before the first number takes nothing from it."""
    x = torch.full((3, 2500), float("-inf"), device=DEVICE)
    x[1, 2499] = 1.0
    x[2, 0] = 1.0
    expected = torch.softmax(x, -1), torch.log_softmax(x, -1)
    with vllm_gems.use_gems("_softmax,_log_softmax"):
        got = torch.softmax(x, -1), torch.log_softmax(x, -1)
    same(got, expected, "softmax")


def test_a_long_walk_by_few_programs_is_pytorchs() -> None:
    x = torch.ones(1 << 17, device=DEVICE)
    with vllm_gems.use_gems("sum"):
        assert x.sum() == 1 << 17
        (reason,) = next(row.declined for row in vllm_gems.report().rows if row.patch == "aten.sum")
    assert "which PyTorch divides" in reason
