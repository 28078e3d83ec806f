"""Reductions along any dimensions: sums, products, extremes with their places, tests, variances.

A program has BLOCK_M results and walks through what is reduced for them, BLOCK_N elements at a time. Both are walks
through memory of up to three dimensions, so that no tensor is ever copied to bring its dimensions into an order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..launch import Build, integers
from .common import power_of_two
from .formulas import divide
from .pointwise import Walk, memory_pointer

MAX_DIMS = 3  # of what is kept, and of what is reduced
_TILE = 2048  # elements

_TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.int64: tl.int64, torch.int32: tl.int32,
    torch.int16: tl.int16, torch.int8: tl.int8, torch.uint8: tl.uint8, torch.bool: tl.int8,
}  # fmt: skip


@triton.jit
def _place(at, size1, size2, stride0, stride1, stride2, DIMS: tl.constexpr):
    """Offset of element number `at` of a walk."""
    if DIMS == 1:
        return at * stride0
    elif DIMS == 2:
        return (at // size1) * stride0 + (at % size1) * stride1
    else:
        rest = at // size2
        return (rest // size1) * stride0 + (rest % size1) * stride1 + (at % size2) * stride2


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _reduce_kernel(
    # Tensors, of bytes where they are bool
    x_ptr,
    out_ptr,  # contiguous in the order of the kept walk
    second_ptr,  # of a variance's mean; or None
    # Scalars
    kept,
    reduced,
    kept1, kept2,  # sizes
    kept_stride0, kept_stride1, kept_stride2,
    out_stride0, out_stride1, out_stride2,
    reduced1, reduced2,
    reduced_stride0, reduced_stride1, reduced_stride2,
    correction,
    # Constexprs
    WHAT: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUT_BOOL: tl.constexpr,
    KEPT_DIMS: tl.constexpr,
    REDUCED_DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = row < kept
    x_row = x_ptr + _place(row, kept1, kept2, kept_stride0, kept_stride1, kept_stride2, KEPT_DIMS)
    IS_VARIANCE: tl.constexpr = WHAT == "var" or WHAT == "std"
    IS_EXTREME: tl.constexpr = WHAT == "max" or WHAT == "min"
    IS_TEST: tl.constexpr = WHAT == "any" or WHAT == "all" or WHAT == "count"

    if WHAT == "prod":
        total = tl.full((BLOCK_M, BLOCK_N), 1, COMPUTE)
    elif IS_TEST:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
    elif IS_EXTREME:
        # The first element stands for nothing: it is looked at again.
        first = tl.load(x_row, mask=row_live, other=0).to(COMPUTE)
        total = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE) + first[:, None]
        nan = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    for start in range(0, reduced, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        live = row_live[:, None] & (col < reduced)[None, :]
        at = _place(col, reduced1, reduced2, reduced_stride0, reduced_stride1, reduced_stride2, REDUCED_DIMS)
        x = tl.load(x_row[:, None] + at[None, :], mask=live, other=0)
        if IS_TEST:
            hit = x == 0 if WHAT == "all" else x != 0
            total += (hit & live).to(tl.int64)
        else:
            x = x.to(COMPUTE)
            if WHAT == "prod":
                total *= tl.where(live, x, 1)
            elif WHAT == "max":
                total = tl.where(live & (x > total), x, total)
                nan |= (live & (x != x)).to(tl.int32)
            elif WHAT == "min":
                total = tl.where(live & (x < total), x, total)
                nan |= (live & (x != x)).to(tl.int32)
            else:
                total += x

    if WHAT == "prod":
        y = tl.reduce(total, 1, _multiply)
    elif WHAT == "max":
        y = tl.max(total, axis=1)
    elif WHAT == "min":
        y = tl.min(total, axis=1)
    else:
        y = tl.sum(total, axis=1)
    if IS_EXTREME and COMPUTE.is_floating():
        y = tl.where(tl.sum(nan, axis=1) > 0, float("nan"), y)
    if WHAT == "mean" or IS_VARIANCE:
        y = divide(y, tl.zeros((BLOCK_M,), COMPUTE) + reduced)
    if WHAT == "any":
        y = y > 0
    elif WHAT == "all":
        y = y == 0
    out_at = _place(row, kept1, kept2, out_stride0, out_stride1, out_stride2, KEPT_DIMS)
    if IS_VARIANCE:
        # The squares of what is left without the mean, in another walk: no cancellation.
        squares = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        for start in range(0, reduced, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            live = row_live[:, None] & (col < reduced)[None, :]
            at = _place(col, reduced1, reduced2, reduced_stride0, reduced_stride1, reduced_stride2, REDUCED_DIMS)
            x = tl.load(x_row[:, None] + at[None, :], mask=live, other=0).to(COMPUTE)
            apart = tl.where(live, x - y[:, None], 0)
            squares += apart * apart
        if second_ptr is not None:
            tl.store(second_ptr + out_at, y.to(second_ptr.dtype.element_ty), mask=row_live)
        degrees = tl.maximum(reduced - tl.full((), correction, COMPUTE), 0)
        y = divide(tl.sum(squares, axis=1), tl.zeros((BLOCK_M,), COMPUTE) + degrees)
        if WHAT == "std":
            y = libdevice.sqrt(y)
    if OUT_BOOL:
        y = y != 0
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=row_live)


@triton.jit
def _arg_kernel(
    # Tensors
    x_ptr,
    value_ptr,  # or None
    index_ptr,  # int64
    # Scalars: as of _reduce_kernel
    kept,
    reduced,
    kept1, kept2,
    kept_stride0, kept_stride1, kept_stride2,
    out_stride0, out_stride1, out_stride2,
    reduced1, reduced2,
    reduced_stride0, reduced_stride1, reduced_stride2,
    # Constexprs
    IS_MAX: tl.constexpr,
    COMPUTE: tl.constexpr,
    KEPT_DIMS: tl.constexpr,
    REDUCED_DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first of the largest (smallest) elements; a NaN is more than any number."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = row < kept
    x_row = x_ptr + _place(row, kept1, kept2, kept_stride0, kept_stride1, kept_stride2, KEPT_DIMS)
    first = tl.load(x_row, mask=row_live, other=0).to(COMPUTE)
    best = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE) + first[:, None]
    where = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, reduced, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        live = row_live[:, None] & (col < reduced)[None, :]
        at = _place(col, reduced1, reduced2, reduced_stride0, reduced_stride1, reduced_stride2, REDUCED_DIMS)
        x = tl.load(x_row[:, None] + at[None, :], mask=live, other=0).to(COMPUTE)
        better = x > best if IS_MAX else x < best
        better = live & (better | ((x != x) & (best == best)))
        best = tl.where(better, x, best)
        where = tl.where(better, col[None, :], where)
    # Of the columns: NaN first, then the best, and among these the one that came first.
    nan = best != best
    any_nan = tl.sum(nan.to(tl.int32), axis=1) > 0
    number = tl.where(nan, first[:, None], best)
    top = tl.max(number, axis=1) if IS_MAX else tl.min(number, axis=1)
    chosen = tl.where(any_nan[:, None], nan, best == top[:, None])
    index = tl.min(tl.where(chosen, where, 2147483647), axis=1)
    out_at = _place(row, kept1, kept2, out_stride0, out_stride1, out_stride2, KEPT_DIMS)
    tl.store(index_ptr + out_at, index.to(tl.int64), mask=row_live)
    if value_ptr is not None:
        value = top
        if COMPUTE.is_floating():
            value = tl.where(any_nan, float("nan"), top)
        tl.store(value_ptr + out_at, value.to(value_ptr.dtype.element_ty), mask=row_live)


class Reduction(NamedTuple):
    """What decides a build, besides the walks."""

    what: str  # sum, mean, prod, max, min, any, all, count, var, std, argmax, argmin
    x: torch.dtype
    compute: torch.dtype
    out: torch.dtype | None  # of the values, where there are any
    second: torch.dtype | None = None  # of the mean, beside a variance


def reduce_build(call: Reduction, kept: Walk, reduced: Walk, aligned: bool) -> tuple[Build, int, tuple[int, ...]]:
    """What is compiled; how many programs there are; and the arguments after the tensors.

    kept: of the tensor and the result. reduced: of the tensor.
    """
    kept_numel, reduced_numel = kept.numel, reduced.numel
    by_rows = not reduced.strides[0] or min(reduced.strides[0]) == 1
    if by_rows:
        block_n = min(_TILE, max(16, power_of_two(reduced_numel)))
        block_m = max(1, min(_TILE // 4 // block_n, power_of_two(kept_numel)))
    else:  # neighbours are kept
        block_m = min(64, power_of_two(kept_numel))
        block_n = min(32, power_of_two(reduced_numel))
    num_warps = 4 if block_m * block_n <= _TILE // 2 else 8
    is_arg = call.what.startswith("arg")
    number = "fp64" if call.compute is torch.float64 else "fp32"
    sizes, dims, tail = [], [], [kept_numel, reduced_numel]
    for walked in (kept, reduced):
        padded = [*walked.sizes, *(1,) * (MAX_DIMS - len(walked.sizes))]
        tail += padded[1:]
        for strides in walked.strides:
            tail += [*strides, *(0,) * (MAX_DIMS - len(strides))]
        dims.append(max(1, len(walked.sizes)))
        sizes.append(padded)
    types = integers(tail, "i32")
    shape = (("KEPT_DIMS", dims[0]), ("REDUCED_DIMS", dims[1]), ("BLOCK_M", block_m), ("BLOCK_N", block_n))
    value = None if call.out is None else memory_pointer(call.out)
    if is_arg:
        build = Build(
            function=_arg_kernel,
            types=(memory_pointer(call.x), value, "*i64", *types),
            constexprs=(("IS_MAX", call.what == "argmax"), ("COMPUTE", _TYPES[call.compute]), *shape),
            aligned=aligned,
            num_warps=num_warps,
        )
    else:
        second = None if call.second is None else memory_pointer(call.second)
        is_variance = call.what in ("var", "std")
        build = Build(
            function=_reduce_kernel,
            types=(memory_pointer(call.x), value, second, *types, number if is_variance else None),
            constexprs=(
                ("WHAT", call.what), ("COMPUTE", _TYPES[call.compute]), ("OUT_BOOL", call.out is torch.bool), *shape,
            ),
            aligned=aligned,
            num_warps=num_warps,
        )  # fmt: skip
    return build, triton.cdiv(kept_numel, block_m), tuple(tail)
