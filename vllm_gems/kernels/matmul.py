"""Products of matrices: one kernel for a batch of them, wherever their elements lie, with what is added to each.

    out = beta * input + alpha * a @ b

A matrix is an address and a stride for each of its dimensions, so that transposed, sliced and broadcast ones are read
where they are. Sums are in float32, in one program from the first product to the last: the same numbers every time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuned
from ..launch import CPU, Build, integer, pointer
from .common import name_of, power_of_two

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

INT32_MAX = 2**31 - 1


@triton.jit
def steps(index, stride):
    """Elements from the first to number `index`; a stride that is left out is 1."""
    if stride is None:
        return index
    else:
        return index * stride


@triton.jit
def load_tile(at, row_live, col_live, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr):
    """A tile, with zeros outside of its matrix."""
    if EVEN_ROWS and EVEN_COLS:
        return tl.load(at)
    elif EVEN_COLS:
        return tl.load(at, mask=row_live[:, None], other=0.0)
    elif EVEN_ROWS:
        return tl.load(at, mask=col_live[None, :], other=0.0)
    else:
        return tl.load(at, mask=row_live[:, None] & col_live[None, :], other=0.0)


@triton.jit
def tile_of(tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    """(row, column) of the tile that is a program's: those that run at the same time share both in the L2 cache."""
    group = tile // (GROUP * col_tiles)
    inside = tile % (GROUP * col_tiles)
    group_rows = min(row_tiles - group * GROUP, GROUP)
    return group * GROUP + inside % group_rows, inside // group_rows


@triton.jit
def _matmul_kernel(
    # Tensors
    a_ptr,  # [batch, num_rows, num_inner]
    b_ptr,  # [batch, num_inner, num_cols]
    input_ptr,  # [batch, num_rows, num_cols], or None where beta is 0
    out_ptr,  # [batch, num_rows, num_cols]
    # Scalars
    alpha,
    beta,
    num_rows,
    num_cols,
    num_inner,
    # Strides: None is 1, for that of a batch None is that there is one product
    a_batch, a_row, a_inner,
    b_batch, b_inner, b_col,
    input_batch, input_row, input_col,
    out_batch, out_row, out_col,
    # Constexprs
    ROWS: tl.constexpr,  # of a tile of out
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,  # of what is multiplied at a time
    GROUP: tl.constexpr,  # rows of tiles that programs go through together, column by column
    EVEN_ROWS: tl.constexpr,  # num_rows is a multiple of ROWS
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(num_rows, ROWS)
    col_tiles = tl.cdiv(num_cols, COLS)
    tile = tl.program_id(0)
    if out_batch is not None:
        batch = (tile // (row_tiles * col_tiles)).to(tl.int64)
        tile = tile % (row_tiles * col_tiles)
        a_ptr += batch * a_batch
        b_ptr += batch * b_batch
        out_ptr += batch * out_batch
        if input_ptr is not None:
            input_ptr += batch * input_batch
    row_tile, col_tile = tile_of(tile, row_tiles, col_tiles, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    col = col_tile * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, DEPTH)
    row_live = row < num_rows
    col_live = col < num_cols

    a_at = a_ptr + steps(row, a_row)[:, None] + steps(inner, a_inner)[None, :]
    b_at = b_ptr + steps(inner, b_inner)[:, None] + steps(col, b_col)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_inner, DEPTH):
        inner_live = inner < num_inner - start
        a = load_tile(a_at, row_live, inner_live, EVEN_ROWS, EVEN_DEPTH)
        b = load_tile(b_at, inner_live, col_live, EVEN_DEPTH, EVEN_COLS)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_at += steps(DEPTH, a_inner)
        b_at += steps(DEPTH, b_inner)

    total *= alpha
    if input_ptr is not None:
        input_at = input_ptr + steps(row, input_row)[:, None] + steps(col, input_col)[None, :]
        total += beta * load_tile(input_at, row_live, col_live, EVEN_ROWS, EVEN_COLS).to(tl.float32)
    out_at = out_ptr + steps(row, out_row)[:, None] + steps(col, out_col)[None, :]
    if EVEN_ROWS and EVEN_COLS:
        tl.store(out_at, total.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=row_live[:, None] & col_live[None, :])


class Matrices(NamedTuple):
    """What is multiplied: sizes, and strides in elements of [batch, row, column]."""

    batch: int
    rows: int
    cols: int
    inner: int
    a: tuple[int, int, int]
    b: tuple[int, int, int]
    input: tuple[int, int, int] | None
    out: tuple[int, int, int]
    dtype: torch.dtype  # of a and b
    out_dtype: torch.dtype  # of out and input

    @property
    def reach(self) -> int:
        """The largest offset of an element in one matrix of a batch."""
        last = (self.rows - 1, self.cols - 1, self.inner - 1)
        pairs = [(self.a, last[0], last[2]), (self.b, last[2], last[1])]
        pairs += [(each, last[0], last[1]) for each in (self.input, self.out) if each is not None]
        return max(row * strides[1] + col * strides[2] for strides, row, col in pairs)


class Tiling(NamedTuple):
    """How the work is divided."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


# Programs that keep an H100 (132 multiprocessors) or a like GPU busy. A constant: where nothing was measured the same
# product is the same sum on every GPU.
_ENOUGH = 128

GROUP = 8  # rows of tiles that programs go through together


def default_tiling(batch: int, rows: int, cols: int, inner: int, itemsize: int, wide: bool = True) -> Tiling:
    """Without a measured one for this GPU: tiles as large as leaves work for all multiprocessors, in steps that a few
    fit into shared memory at a time.

    wide: a and b are read 16 bytes at a time. If not, their tiles are on their way in registers, and small.
    """
    if itemsize == 2:
        most_rows, most_cols = (128, 256) if wide else (64, 64)
    else:  # multiplied in registers
        most_rows, most_cols = (128, 128) if wide else (64, 32)
    tile_rows = min(most_rows, max(16, power_of_two(rows)))
    tile_cols = min(most_cols, max(16, power_of_two(cols)))
    while batch * -(-rows // tile_rows) * -(-cols // tile_cols) < _ENOUGH and tile_rows + tile_cols > 48:
        if tile_cols >= tile_rows:
            tile_cols //= 2
        else:
            tile_rows //= 2
    small = tile_rows + tile_cols <= (128 if itemsize == 2 else 64)
    depth = (128 if small else 64) if itemsize == 2 else (32 if small else 16)
    if not wide:
        depth = 32 if itemsize == 2 else 16
    depth = min(depth, max(16, power_of_two(inner)))
    stages = 1 if not wide else 3 if tile_rows * tile_cols > 64 * 128 else 4
    return Tiling(tile_rows, tile_cols, depth, 8 if tile_rows * tile_cols > 64 * 128 else 4, stages)


def rows_class(rows: int) -> int:
    """The numbers of rows that tilings are measured for: powers of two, of which the smallest is that of all below."""
    return max(16, power_of_two(rows))


def key_of(call: Matrices) -> str:
    """By which measured tilings are kept: dtype, batch, sizes, how a and b lie (t: transposed), and class of rows."""
    batch = f"{call.batch}*" if call.batch > 1 else ""
    lie = "".join("n" if each[2] == 1 else "t" for each in (call.a, call.b))
    return f"{name_of(call.dtype)} {batch}{call.inner}x{call.cols} {lie} {rows_class(call.rows)}"


@functools.cache
def source() -> str:
    """By which measured tilings are recognised as this kernel's."""
    return tuned.source_hash(_matmul_kernel, load_tile, steps, tile_of)


def tiling_for(call: Matrices, wide: bool, device: int) -> Tiling:
    """The measured tiling for this GPU, else the default. What cannot be read 16 bytes at a time is not measured."""
    if wide and call.dtype.itemsize == 2 and (found := tuned.lookup("matmul", device, key_of(call), source())):
        return Tiling(**found)
    return default_tiling(call.batch, call.rows, call.cols, call.inner, call.dtype.itemsize, wide)


class Scalars:
    """The whole numbers of a launch, and their types. Multiples are compiled for as such."""

    def __init__(self) -> None:
        self.types: list[str | None] = []
        self.values: list[int] = []

    def add(self, value: int, kind: str = "i32", hinted: bool = True) -> None:
        self.types.append(integer(value, kind) if hinted else kind)
        self.values.append(value)

    def leave_out(self, count: int = 1) -> None:
        self.types.extend([None] * count)
        self.values.extend([0] * count)


def matmul_build(
    call: Matrices, with_input: bool, aligned: bool, device: int = CPU, tiling: Tiling | None = None
) -> tuple[Build, int, tuple[int, ...]]:
    """What is compiled, the number of programs, and the arguments after alpha and beta.

    device: whose measured tilings are looked up. tiling: another, for those who measure them.
    """
    dtype, out_dtype = pointer(call.dtype), pointer(call.out_dtype)
    scalars = Scalars()
    unit = 16 // call.dtype.itemsize

    def strides(each: tuple[int, int, int] | None, rows: int, cols: int) -> bool:
        """Whether rows or columns can be read 16 bytes at a time."""
        if each is None:
            scalars.leave_out(3)
            return False
        if call.batch > 1:
            scalars.add(each[0], "i64")
        else:
            scalars.leave_out()
        contiguous = 0  # elements
        for step, size in zip(each[1:], (rows, cols), strict=True):
            if step == 1 and size > 1:
                contiguous = size
                scalars.leave_out()
            else:
                scalars.add(step if size > 1 else 0)
        return contiguous > 0 and all(value % unit == 0 for value in (*scalars.values[-3:], contiguous))

    # That the number of rows is a multiple of 16 matters where they are what is contiguous; it changes between calls.
    scalars.add(call.rows, hinted=call.a[1] == 1 or call.out[1] == 1)
    scalars.add(call.cols)
    scalars.add(call.inner)
    wide = strides(call.a, call.rows, call.inner)
    wide = strides(call.b, call.inner, call.cols) and wide
    strides(call.input if with_input else None, call.rows, call.cols)
    strides(call.out, call.rows, call.cols)
    wide = wide and aligned
    tiling = tiling or tiling_for(call, wide, device)
    build = Build(
        function=_matmul_kernel,
        types=(dtype, dtype, out_dtype if with_input else None, out_dtype, "fp32", "fp32", *scalars.types),
        constexprs=(
            ("ROWS", tiling.rows),
            ("COLS", tiling.cols),
            ("DEPTH", tiling.depth),
            ("GROUP", GROUP),
            ("EVEN_ROWS", call.rows % tiling.rows == 0),
            ("EVEN_COLS", call.cols % tiling.cols == 0),
            ("EVEN_DEPTH", call.inner % tiling.depth == 0),
        ),
        aligned=aligned,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        # Left to itself the assembler spills tiles that are in registers, to fit more programs.
        maxnreg=None if wide and call.dtype.itemsize == 2 else 255,
    )
    grid = call.batch * -(-call.rows // tiling.rows) * -(-call.cols // tiling.cols)
    return build, grid, tuple(scalars.values)
