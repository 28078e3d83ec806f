"""Along one dimension, with a result for each element: softmax and its gradient, norms of layers and groups, cumulative
sums and products.

A program has BLOCK_M rows and walks through them, BLOCK_N elements at a time, as often as it needs their sums. A row is
elements at one distance from another; where rows begin is a walk through memory of up to three dimensions.
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
from .pointwise import COMPUTE, Walk, memory_pointer
from .reduce import MAX_DIMS, _multiply, _place

_TILE = 2048  # elements


@triton.jit
def _softmax_kernel(
    # Tensors
    x_ptr,
    out_ptr,
    # Scalars: rows, their length, and where they begin
    rows,
    length,
    size1, size2,
    x_stride0, x_stride1, x_stride2,
    out_stride0, out_stride1, out_stride2,
    x_step,
    out_step,
    # Constexprs
    LOG: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = row < rows
    x_row = x_ptr + _place(row, size1, size2, x_stride0, x_stride1, x_stride2, DIMS)
    out_row = out_ptr + _place(row, size1, size2, out_stride0, out_stride1, out_stride2, DIMS)
    most = tl.full((BLOCK_M,), float("-inf"), COMPUTE)
    total = tl.zeros((BLOCK_M,), COMPUTE)
    for start in range(0, length, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        live = row_live[:, None] & (col < length)[None, :]
        x = tl.load(x_row[:, None] + col[None, :] * x_step, mask=live, other=float("-inf")).to(COMPUTE)
        before = most
        most = tl.maximum(most, tl.max(x, axis=1))
        # Nothing but minus infinity so far: their difference is no number, and the sum is still none.
        nothing = most == float("-inf")
        total *= tl.where(nothing, 0.0, libdevice.exp(before - most))
        total += tl.sum(tl.where(nothing[:, None], 0.0, libdevice.exp(x - most[:, None])), axis=1)
    log_total = libdevice.log(total)
    for start in range(0, length, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        live = row_live[:, None] & (col < length)[None, :]
        x = tl.load(x_row[:, None] + col[None, :] * x_step, mask=live, other=0.0).to(COMPUTE)
        if LOG:
            y = x - most[:, None] - log_total[:, None]
        else:
            y = divide(libdevice.exp(x - most[:, None]), total[:, None] + tl.zeros((BLOCK_M, BLOCK_N), COMPUTE))
        tl.store(out_row[:, None] + col[None, :] * out_step, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _softmax_gradient_kernel(
    # Tensors
    gradient_ptr,
    y_ptr,  # what the softmax gave
    out_ptr,
    # Scalars: as of _softmax_kernel
    rows,
    length,
    size1, size2,
    g_stride0, g_stride1, g_stride2,
    y_stride0, y_stride1, y_stride2,
    out_stride0, out_stride1, out_stride2,
    g_step,
    y_step,
    out_step,
    # Constexprs
    LOG: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = row < rows
    g_row = gradient_ptr + _place(row, size1, size2, g_stride0, g_stride1, g_stride2, DIMS)
    y_row = y_ptr + _place(row, size1, size2, y_stride0, y_stride1, y_stride2, DIMS)
    out_row = out_ptr + _place(row, size1, size2, out_stride0, out_stride1, out_stride2, DIMS)
    total = tl.zeros((BLOCK_M,), COMPUTE)
    for start in range(0, length, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        live = row_live[:, None] & (col < length)[None, :]
        gradient = tl.load(g_row[:, None] + col[None, :] * g_step, mask=live, other=0.0).to(COMPUTE)
        if not LOG:
            gradient *= tl.load(y_row[:, None] + col[None, :] * y_step, mask=live, other=0.0).to(COMPUTE)
        total += tl.sum(gradient, axis=1)
    for start in range(0, length, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        live = row_live[:, None] & (col < length)[None, :]
        gradient = tl.load(g_row[:, None] + col[None, :] * g_step, mask=live, other=0.0).to(COMPUTE)
        y = tl.load(y_row[:, None] + col[None, :] * y_step, mask=live, other=0.0).to(COMPUTE)
        if LOG:
            slope = gradient - libdevice.exp(y) * total[:, None]
        else:
            slope = (gradient - total[:, None]) * y
        tl.store(out_row[:, None] + col[None, :] * out_step, slope.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _norm_kernel(
    # Tensors
    x_ptr,  # [rows, length] contiguous
    weight_ptr,  # of `length` elements, or of a group's channels; or None
    bias_ptr,  # or None
    out_ptr,  # as x
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    # Scalars
    length,
    eps,
    # Constexprs
    GROUPS: tl.constexpr,  # 0: a weight for each element of a row
    CHANNELS: tl.constexpr,  # of a group
    SPACE: tl.constexpr,  # elements of a channel
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    x_row = x_ptr + row.to(tl.int64) * length
    out_row = out_ptr + row.to(tl.int64) * length
    count = tl.full((1,), length, COMPUTE)
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, length, BLOCK):
        col = start + tl.arange(0, BLOCK)
        total += tl.load(x_row + col, mask=col < length, other=0.0).to(COMPUTE)
    mean = divide(tl.sum(total, axis=0) + tl.zeros((1,), COMPUTE), count)
    squares = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, length, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + col, mask=col < length, other=0.0).to(COMPUTE)
        apart = tl.where(col < length, x - mean, 0.0)
        squares += apart * apart
    variance = divide(tl.sum(squares, axis=0) + tl.zeros((1,), COMPUTE), count)
    rstd = divide(tl.full((1,), 1, COMPUTE), libdevice.sqrt(variance + eps))
    one = tl.arange(0, 1)
    tl.store(mean_ptr + row + one, mean.to(mean_ptr.dtype.element_ty))
    tl.store(rstd_ptr + row + one, rstd.to(rstd_ptr.dtype.element_ty))
    for start in range(0, length, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = col < length
        y = (tl.load(x_row + col, mask=live, other=0.0).to(COMPUTE) - mean) * rstd
        at = col
        if GROUPS > 0:
            at = (row % GROUPS) * CHANNELS + col // SPACE
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + at, mask=live, other=0.0).to(COMPUTE)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + at, mask=live, other=0.0).to(COMPUTE)
        tl.store(out_row + col, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _scan_kernel(
    # Tensors, of bytes where they are bool
    x_ptr,
    out_ptr,
    # Scalars: as of _softmax_kernel
    rows,
    length,
    size1, size2,
    x_stride0, x_stride1, x_stride2,
    out_stride0, out_stride1, out_stride2,
    x_step,
    out_step,
    # Constexprs
    PRODUCT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = row < rows
    x_row = x_ptr + _place(row, size1, size2, x_stride0, x_stride1, x_stride2, DIMS)
    out_row = out_ptr + _place(row, size1, size2, out_stride0, out_stride1, out_stride2, DIMS)
    carry = tl.full((BLOCK_M,), 1 if PRODUCT else 0, COMPUTE)
    for start in range(0, length, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        live = row_live[:, None] & (col < length)[None, :]
        x = tl.load(x_row[:, None] + col[None, :] * x_step, mask=live, other=1 if PRODUCT else 0).to(COMPUTE)
        if PRODUCT:
            y = tl.associative_scan(x, 1, _multiply) * carry[:, None]
        else:
            y = tl.cumsum(x, axis=1) + carry[:, None]
        # What is last, and not the carry with what is here: Triton 3.6 takes that for a sum alone, and fails.
        last = (tl.arange(0, BLOCK_N) == BLOCK_N - 1)[None, :]
        carry = tl.sum(tl.where(last, y, tl.zeros_like(y)), axis=1).to(COMPUTE)
        tl.store(out_row[:, None] + col[None, :] * out_step, y.to(out_ptr.dtype.element_ty), mask=live)


class Rows(NamedTuple):
    """Tensors of one shape as rows along one of its dimensions."""

    starts: Walk  # of the rows, of each tensor
    length: int
    steps: tuple[int, ...]  # from an element to the next, of each tensor


def row_arguments(rows: Rows) -> tuple[int, ...]:
    """How many rows there are, their length, where they begin and their steps, as kernels take it."""
    sizes = [*rows.starts.sizes, *(1,) * (MAX_DIMS - len(rows.starts.sizes))]
    found = [rows.starts.numel, rows.length, *sizes[1:]]
    for strides in rows.starts.strides:
        found += [*strides, *(0,) * (MAX_DIMS - len(strides))]
    return (*found, *rows.steps)


FUNCTIONS = {
    "softmax": (_softmax_kernel, "LOG", False), "log_softmax": (_softmax_kernel, "LOG", True),
    "softmax gradient": (_softmax_gradient_kernel, "LOG", False),
    "log_softmax gradient": (_softmax_gradient_kernel, "LOG", True),
    "cumsum": (_scan_kernel, "PRODUCT", False), "cumprod": (_scan_kernel, "PRODUCT", True),
}  # fmt: skip


def along_build(
    what: str, dtypes: tuple[torch.dtype, ...], compute: torch.dtype, rows: Rows, aligned: bool
) -> tuple[Build, int, tuple[int, ...]]:
    """What is compiled; how many programs there are; and the arguments after the tensors.

    what: a key of FUNCTIONS. dtypes: of the tensors, the result's last.
    """
    function, name, value = FUNCTIONS[what]
    if min(rows.steps) == 1:
        block_n = min(_TILE, max(16, power_of_two(rows.length)))
        block_m = max(1, min(1024 // block_n, power_of_two(rows.starts.numel)))
    else:  # the elements of a row are apart, those of neighbouring rows are not
        block_n = min(64, max(16, power_of_two(rows.length)))
        block_m = max(1, min(32, power_of_two(rows.starts.numel)))
    tail = row_arguments(rows)
    build = Build(
        function=function,
        types=(*map(memory_pointer, dtypes), *integers(tail, "i32")),
        constexprs=(
            (name, value),
            ("COMPUTE", COMPUTE[compute]),
            ("DIMS", max(1, len(rows.starts.sizes))),
            ("BLOCK_M", block_m),
            ("BLOCK_N", block_n),
        ),
        aligned=aligned,
        num_warps=4 if block_m * block_n <= 1024 else 8,
    )
    return build, triton.cdiv(rows.starts.numel, block_m), tail


class Norm(NamedTuple):
    """What decides the build of a norm."""

    x: torch.dtype
    weight: torch.dtype | None
    bias: torch.dtype | None
    statistics: torch.dtype
    compute: torch.dtype
    length: int
    groups: int = 0
    channels: int = 1  # of a group
    space: int = 1  # elements of a channel


def norm_build(norm: Norm, aligned: bool) -> Build:
    """What is compiled; its scalars are the length and eps, and there is a program for each row."""
    block = min(_TILE, max(16, power_of_two(norm.length)))
    statistics = memory_pointer(norm.statistics)
    return Build(
        function=_norm_kernel,
        types=(
            memory_pointer(norm.x),
            None if norm.weight is None else memory_pointer(norm.weight),
            None if norm.bias is None else memory_pointer(norm.bias),
            memory_pointer(norm.x),
            statistics,
            statistics,
            *integers([norm.length], "i32"),
            "fp64" if norm.compute is torch.float64 else "fp32",
        ),
        constexprs=(
            ("GROUPS", norm.groups),
            ("CHANNELS", norm.channels),
            ("SPACE", norm.space),
            ("COMPUTE", COMPUTE[norm.compute]),
            ("BLOCK", block),
        ),
        aligned=aligned,
        num_warps=4 if block <= 1024 else 8,
    )
