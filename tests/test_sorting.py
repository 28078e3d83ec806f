"""Overrides of sort and topk: to the bit what PyTorch gives, where it says what that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from aten_calls import DEVICE, elements, same

import vllm_gems
from vllm_gems.kernels.sort import BEST, DTYPES, TILE

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# This gets all layouts, since what lies where does not depend on the dtype.
THOROUGH = torch.float32


def called(name: str, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What comes of a call, and the report's row of the overload that it goes to."""
    with vllm_gems.use_gems(name):
        got = call()
        (row,) = (row for row in vllm_gems.report().rows if row.patch == f"aten.{name.removesuffix('.default')}")
    assert not row.errors, row.why
    return got, row


def ours(name: str, call: Callable[[], Any]) -> Any:
    """What a call gives that is our kernels' from beginning to end."""
    got, row = called(name, call)
    assert row.hits > 0
    assert not row.declined
    return got


def declined(name: str, call: Callable[[], Any]) -> tuple[Any, str]:
    """What PyTorch gives in our place, and why."""
    got, row = called(name, call)
    (reason,) = row.declined
    return got, reason


def extremes(dtype: torch.dtype) -> torch.Tensor:
    """What a key could go wrong at, in disorder and twice, so that order among equals shows."""
    if dtype is torch.bool:
        values = torch.tensor([True, False, True, False])
    elif dtype.is_floating_point:
        info = torch.finfo(dtype)
        nan, infinity = float("nan"), float("inf")
        numbers = [0.0, nan, -infinity, -0.0, info.max, infinity, -0.0, 0.0, info.min, info.tiny, -info.tiny, -nan, 1.0]
        values = torch.tensor([*numbers, info.smallest_normal / 2, *numbers]).to(dtype)
    else:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        values = torch.tensor([high, low, 0, high - 1, low + 1, 1, high, low, high // 2, 0]).to(dtype)
    return values.to(DEVICE)


def tensors(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    yield "extremes", extremes(dtype)
    yield "contiguous", elements((3, 5, 37), dtype)
    if dtype is not THOROUGH:
        return
    yield "transposed", elements((7, 4, 6), dtype).permute(2, 0, 1)
    yield "gapped", elements((3, 5, 40), dtype)[:, ::2, 3::3]
    yield "expanded", elements((1, 5, 3), dtype).expand(4, 5, 3)
    yield "long", elements((2, 1, 1500), dtype)
    yield "of one element", elements((), dtype)
    yield "empty", elements((3, 0, 2), dtype)


def with_dims(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, int]]:
    for label, x in tensors(dtype):
        for dim in range(max(1, x.dim())):
            # From the end and from the beginning, in turn.
            yield f"{label}, {dim=}", x, dim - x.dim() if dim % 2 and x.dim() else dim


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """Zeros and NaNs of either sign are others."""
    return x.view(BITS[x.element_size()]) if x.dtype.is_floating_point else x


@pytest.mark.parametrize("descending", [False, True], ids=("ascending", "descending"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sort_is_stable(dtype: torch.dtype, descending: bool) -> None:
    """Values to the bit, indices and strides, as on a CPU: on a GPU PyTorch itself puts a negative NaN first."""
    cases = list(with_dims(dtype))

    def call(on: str) -> list[Any]:
        moved = [(x if x.device.type == on else x.to(on), dim) for _, x, dim in cases]
        return [torch.sort(x, stable=True, dim=dim, descending=descending) for x, dim in moved]

    expected = call("cpu")
    got = ours("sort.stable", lambda: call(DEVICE))
    for (label, *_), mine, other in zip(cases, got, expected, strict=True):
        same([each.to(DEVICE) for each in mine], [each.to(DEVICE) for each in other], label)
        assert torch.equal(bits_of(mine.values).cpu(), bits_of(other.values)), label


def test_sort_is_stable_unasked() -> None:
    x = elements((2, 300), torch.uint8)
    got = ours("sort.default", lambda: torch.sort(x))
    same(list(got), list(torch.sort(x, stable=True)), "sort")


def is_best(got: Any, x: torch.Tensor, k: int, dim: int, largest: bool, label: str) -> None:
    """PyTorch's values in order, at places that are as many."""
    values, indices = got
    expected = torch.topk(x, k, dim, largest)
    same(values, expected.values, label)
    assert indices.dtype is torch.int64, label
    assert indices.shape == values.shape, label
    assert not indices.numel() or indices.stride() == expected.indices.stride(), label
    at = x.gather(dim, indices)
    assert torch.equal(bits_of(at), bits_of(values)), label
    if indices.numel():
        ordered = indices.sort(dim=dim).values
        assert (ordered.diff(dim=dim) > 0).all() if x.dim() else (ordered == 0).all(), label


@pytest.mark.parametrize("largest", [False, True], ids=("smallest", "largest"))
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype is not torch.bool], ids=str)
def test_topk(dtype: torch.dtype, largest: bool) -> None:
    cases = [
        (f"{label}, {k=}", x, k, dim)
        for label, x, dim in with_dims(dtype)
        for size in (x.shape[dim] if x.dim() else 1,)
        for k in sorted({0, min(1, size), min(3, size), size})
        if x.dim() or k
    ]
    got = ours(
        "topk.default",
        lambda: [torch.topk(x, k, dim, largest, index % 2 == 0) for index, (_, x, k, dim) in enumerate(cases)],
    )
    for (label, x, k, dim), mine in zip(cases, got, strict=True):
        is_best(mine, x, k, dim, largest, label)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_topk_of_rows_that_take_several_launches(dtype: torch.dtype) -> None:
    """With ties across tiles, the best in the last one, rows apart, and fewer left over than are wanted."""
    x = elements((2, 2 * (TILE + 3)), dtype)[:, ::2]
    ties, late = torch.zeros_like(x), torch.zeros_like(x)
    late[:, -2:] = 1
    cases = [(x, 5, -1), (late, 5, -1), (ties, 3, -1), (x.T, 2, 0)]
    if dtype is THOROUGH:
        cases += [(elements((1, 9 * TILE + 3), dtype), BEST, 1)]
    got = ours("topk.default", lambda: [torch.topk(x, k, dim) for x, k, dim in cases])
    for (x, k, dim), mine in zip(cases, got, strict=True):
        is_best(mine, x, k, dim, True, f"{k} of {tuple(x.shape)} along {dim}")
    assert got[2].indices.tolist() == [[0, 1, 2]] * 2, "the first of what is equal"


@pytest.mark.parametrize(
    ("name", "dim", "descending", "call"),
    [
        ("sort.values", 1, False, lambda x, out: torch.sort(x, dim=1, out=out)),
        ("sort.values_stable", 0, True, lambda x, out: torch.sort(x, stable=True, dim=0, descending=True, out=out)),
        ("topk.values", 1, True, lambda x, out: torch.topk(x, 6, out=out)),
        ("topk.values", 0, False, lambda x, out: torch.topk(x, 6, 0, largest=False, out=out)),
    ],
)
def test_into_tensors_that_are_given(name: str, dim: int, descending: bool, call: Callable[..., Any]) -> None:
    """Of strides of their own, which differ from one another."""
    x = torch.randperm(36, device=DEVICE).float().view(6, 6)
    expected = torch.sort(x, dim=dim, descending=descending)
    out = torch.full((6, 12), 3.0, device=DEVICE)[:, ::2], torch.full((6, 6), -1, device=DEVICE).T
    got = ours(name, lambda: call(x, out))
    for mine, other, given in zip(got, expected, out, strict=True):
        assert torch.equal(mine, other)
        assert mine.data_ptr() == given.data_ptr()
        assert mine.stride() == given.stride()


def test_what_pytorch_does() -> None:
    """Elements that do not fit into a word, rows that do not fit into a tile, and results on top of what is read."""
    whole = elements((3, 5), torch.int64)
    got, reason = declined("sort.default", lambda: torch.sort(whole))
    assert "int64" in reason
    same(got.values, torch.sort(whole).values, "int64")

    row = elements((TILE + 1,), torch.float32)
    got, reason = declined("sort.default", lambda: torch.sort(row))
    assert str(TILE) in reason
    same(got.values, torch.sort(row).values, "a long row")
    _, reason = declined("topk.default", lambda: torch.topk(row, BEST + 1))
    assert str(BEST) in reason

    x = elements((3, 5), torch.float32, finite=True)
    expected = torch.sort(x).values
    got, reason = declined("sort.values", lambda: torch.sort(x, out=(x, torch.empty_like(whole))))
    assert "shares memory" in reason
    same(got[0], expected, "in place")


def test_more_than_there_are_is_an_error() -> None:
    x = elements((3, 5), torch.float32)
    with vllm_gems.use_gems("topk"), pytest.raises(RuntimeError):
        torch.topk(x, 6)
