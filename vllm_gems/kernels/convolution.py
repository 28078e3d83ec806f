"""Convolutions of signals and images: a product of matrices, one of which is read out of the image as it is needed.

    out[image, channel, y, x] = bias[channel] + sum of weight[channel, ...] * window of input at (y, x)

A row of the product is a place of the result in an image, a column one of its channels, and what is summed is gone
through in the order in which it lies in the weight: channels, rows and columns of a window, or channels last. Nothing
is unfolded into memory. Sums are in float32 and not in TF32, in one program from the first product to the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import Build, pointer
from .matmul import GROUP, Scalars, default_tiling, load_tile, steps, tile_of
from .pointwise import walk


@triton.jit
def _convolution_kernel(
    # Tensors
    x_ptr,  # [images, num_channels, height, width]
    weight_ptr,  # [num_cols, num_channels, KERNEL_H, KERNEL_W]
    bias_ptr,  # [num_cols] or None
    out_ptr,  # [images, num_cols, out_height, out_width]
    # Sizes
    num_rows,  # images * out_height * out_width
    num_cols,
    num_inner,  # num_channels * KERNEL_H * KERNEL_W
    num_channels,
    height,
    width,
    out_height,
    out_width,
    # Strides: None is 1
    x_image, x_channel, x_row, x_col,
    weight_out, weight_channel, weight_row, weight_col,  # weight_channel that of what is summed if FLAT
    out_image, out_channel, out_row, out_col,
    bias_out,
    # Constexprs
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # they are the innermost of what is summed
    FLAT: tl.constexpr,  # what is summed has one stride in the weight
    ROWS: tl.constexpr,  # of a tile of out
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,  # of what is multiplied at a time
    GROUP: tl.constexpr,
    EVEN_ROWS: tl.constexpr,  # num_rows is a multiple of ROWS
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(num_rows, ROWS)
    col_tiles = tl.cdiv(num_cols, COLS)
    row_tile, col_tile = tile_of(tl.program_id(0), row_tiles, col_tiles, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    col = col_tile * COLS + tl.arange(0, COLS)
    row_live = row < num_rows
    col_live = col < num_cols
    out_x = row % out_width
    out_y = row // out_width % out_height
    image = row // out_width // out_height
    # Where the window begins, which may be outside of the image.
    left = out_x * STRIDE_W - PADDING_W
    top = out_y * STRIDE_H - PADDING_H
    window_at = x_ptr + (steps(image, x_image) + steps(top, x_row) + steps(left, x_col))[:, None]
    filter_at = weight_ptr + steps(col, weight_out)[None, :]

    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_inner, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        inner_live = inner < num_inner
        if CHANNELS_LAST:
            channel = inner % num_channels
            tap = inner // num_channels
        else:
            channel = inner // (KERNEL_H * KERNEL_W)
            tap = inner % (KERNEL_H * KERNEL_W)
        tap_y = tap // KERNEL_W
        tap_x = tap % KERNEL_W
        down = tap_y * DILATION_H
        right = tap_x * DILATION_W
        a_at = window_at + (steps(channel, x_channel) + steps(down, x_row) + steps(right, x_col))[None, :]
        if PADDING_H > 0 or PADDING_W > 0:
            y = top[:, None] + down[None, :]
            x = left[:, None] + right[None, :]
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            a = tl.load(a_at, mask=inside & row_live[:, None] & inner_live[None, :], other=0.0)
        else:
            a = load_tile(a_at, row_live, inner_live, EVEN_ROWS, EVEN_DEPTH)
        if FLAT:
            b_at = filter_at + steps(inner, weight_channel)[:, None]
        else:
            b_at = steps(channel, weight_channel) + steps(tap_y, weight_row) + steps(tap_x, weight_col)
            b_at = filter_at + b_at[:, None]
        b = load_tile(b_at, inner_live, col_live, EVEN_DEPTH, EVEN_COLS)
        total = tl.dot(a, b, total, input_precision="ieee")

    if bias_ptr is not None:
        total += tl.load(bias_ptr + steps(col, bias_out), mask=col_live, other=0.0).to(tl.float32)[None, :]
    out_at = steps(image, out_image) + steps(out_y, out_row) + steps(out_x, out_col)
    out_at = out_ptr + out_at[:, None] + steps(col, out_channel)[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=row_live[:, None] & col_live[None, :])


# Of a tile: of products of matrices they are more, but here the places of elements take registers too.
_MOST_COLS = 128

Four = tuple[int, int, int, int]
Two = tuple[int, int]


class Convolved(NamedTuple):
    """What is convolved: shapes of four dimensions, strides in elements, pairs for rows and columns of an image."""

    shape: Four  # of x
    weight_shape: Four
    out_shape: Four
    x: Four  # strides
    weight: Four
    bias: int | None  # stride
    out: Four
    stride: Two
    padding: Two
    dilation: Two
    dtype: torch.dtype  # of all

    @property
    def rows(self) -> int:
        images, _, height, width = self.out_shape
        return images * height * width

    @property
    def inner(self) -> int:
        return math.prod(self.weight_shape[1:])

    @property
    def reach(self) -> int:
        """The largest offset of an element, those that padding stands for among them."""
        padded = (*self.shape[:2], *(size + 2 * more for size, more in zip(self.shape[2:], self.padding, strict=True)))
        pairs = ((padded, self.x), (self.weight_shape, self.weight), (self.out_shape, self.out))
        return max(sum(size * step for size, step in zip(sizes, each, strict=True)) for sizes, each in pairs)


def _one_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """That of dimensions in their order, if they are one walk through memory."""
    walked = walk(sizes, [strides], in_order=True)
    if len(walked.sizes) > 1:
        return None
    return walked.strides[0][0] if walked.sizes else 1


def convolution_build(call: Convolved, aligned: bool) -> tuple[Build, int, tuple[int, ...]]:
    """What is compiled, the number of programs, and the arguments after the addresses."""
    cols, channels, kernel_h, kernel_w = call.weight_shape
    _, by_channel, by_row, by_col = call.weight
    flat = _one_stride((channels, kernel_h, kernel_w), (by_channel, by_row, by_col))
    last = False
    if flat is None:
        flat = _one_stride((kernel_h, kernel_w, channels), (by_row, by_col, by_channel))
        last = flat is not None

    scalars = Scalars()

    def add_strides(strides: Sequence[int], sizes: Sequence[int]) -> None:
        for step, size in zip(strides, sizes, strict=True):
            if step == 1:
                scalars.leave_out()
            else:
                scalars.add(step if size > 1 else 0)

    scalars.add(call.rows, hinted=False)  # changes between calls, and nothing is contiguous along it
    for size in (cols, call.inner, channels):
        scalars.add(size)
    for size in (*call.shape[2:], *call.out_shape[2:]):
        scalars.add(size, hinted=False)
    add_strides(call.x, call.shape)
    if flat is None:
        add_strides(call.weight, call.weight_shape)
    else:
        add_strides((call.weight[0], flat), (cols, call.inner))
        scalars.leave_out(2)
    add_strides(call.out, call.out_shape)
    # Channels are beside each other in all three, in whole pieces of 16.
    hinted = all(value % 16 == 0 for value in scalars.values[-12:])
    together = (call.x[1], flat, call.out[1]) == (1, 1, 1) and (last or kernel_h * kernel_w == 1)
    wide = aligned and hinted and together and channels % 16 == 0 and cols % 16 == 0
    if call.bias is None:
        scalars.leave_out()
    else:
        add_strides((call.bias,), (cols,))

    dtype = pointer(call.dtype)
    # As if of several products with columns for one tile each.
    parts = -(-cols // _MOST_COLS)
    tiling = default_tiling(parts, call.rows, min(cols, _MOST_COLS), call.inner, call.dtype.itemsize, wide)
    build = Build(
        function=_convolution_kernel,
        types=(dtype, dtype, None if call.bias is None else dtype, dtype, *scalars.types),
        constexprs=(
            ("KERNEL_H", kernel_h),
            ("KERNEL_W", kernel_w),
            ("STRIDE_H", call.stride[0]),
            ("STRIDE_W", call.stride[1]),
            ("PADDING_H", call.padding[0]),
            ("PADDING_W", call.padding[1]),
            ("DILATION_H", call.dilation[0]),
            ("DILATION_W", call.dilation[1]),
            ("CHANNELS_LAST", last),
            ("FLAT", flat is not None),
            ("ROWS", tiling.rows),
            ("COLS", tiling.cols),
            ("DEPTH", tiling.depth),
            ("GROUP", GROUP),
            ("EVEN_ROWS", call.rows % tiling.rows == 0),
            ("EVEN_COLS", cols % tiling.cols == 0),
            ("EVEN_DEPTH", call.inner % tiling.depth == 0),
        ),
        aligned=aligned,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        maxnreg=None if wide and call.dtype.itemsize == 2 else 255,
    )
    grid = -(-call.rows // tiling.rows) * -(-cols // tiling.cols)
    return build, grid, tuple(scalars.values)
