"""Rows in order: sort, and the k best of each row.

An element is a word: an integer that orders as the element does, and below it the element's place, from the last one
on. So no two words are equal, what is equal stays in order, and a place is all that is moved with an element. Triton's
bitonic network puts a tile of words in order, the greatest first. The k best of a row that is longer than a tile are
those of its tiles' k best, which another launch finds: as many launches as it takes until a tile has them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import Build, integers
from .along import Rows, row_arguments
from .common import power_of_two
from .reduce import _place

TILE = 4096  # elements, the most that a program has
BEST = TILE // 8  # of a longer row, so that each launch leaves an eighth to the next
_SHORT = 1024  # elements of a program with several rows

# Bits of an element -> what its bits are loaded as.
_BITS = {8: "*i8", 16: "*i16", 32: "*i32"}
_INFINITIES = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
DTYPES = (*_INFINITIES, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@triton.jit
def _key(bits, INFINITY: tl.constexpr, UNSIGNED: tl.constexpr, MOST: tl.constexpr):
    """A signed integer of as many bits that orders as the element does: NaN above all, both zeros the same."""
    if INFINITY > 0:
        size = bits & MOST
        return tl.where(size > INFINITY, MOST, tl.where(bits < 0, -size, size)).to(bits.dtype)
    elif UNSIGNED:
        return bits ^ (-MOST - 1)
    else:
        return bits


@triton.jit
def _sort_kernel(
    # Tensors: x and values as signed integers of the same bits
    x_ptr,
    before_ptr,  # [rows, length], words of the launch before; or None in the first
    words_ptr,  # [rows, tiles, K], for the next launch; or None in the last
    values_ptr,  # k a row; or None but in the last, as the next
    indices_ptr,
    # Scalars: rows, their length, and where they begin
    rows,
    length,
    size1, size2,
    x_stride0, x_stride1, x_stride2,
    values_stride0, values_stride1, values_stride2,
    indices_stride0, indices_stride1, indices_stride2,
    x_step,
    values_step,
    indices_step,
    tiles,  # of a row
    k,
    # Constexprs
    DESCENDING: tl.constexpr,
    INFINITY: tl.constexpr,  # the bits of the infinite; 0 where there is none
    UNSIGNED: tl.constexpr,
    MOST: tl.constexpr,  # the greatest key
    WORD: tl.constexpr,
    SHIFT: tl.constexpr,  # bits of a word that are the place
    DIMS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    MASK: tl.constexpr = (1 << SHIFT) - 1
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = row < rows
    x_row = x_ptr + _place(row, size1, size2, x_stride0, x_stride1, x_stride2, DIMS)
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row_live[:, None] & (col < length)[None, :]
    # What is not there is behind all that is: its place is.
    LEAST: tl.constexpr = -(MOST + 1) * (MASK + 1)
    if before_ptr is None:
        key = _key(tl.load(x_row[:, None] + col[None, :] * x_step, mask=live, other=0), INFINITY, UNSIGNED, MOST)
        if not DESCENDING:
            key = ~key
        word = (key.to(WORD) << SHIFT) | (MASK - col.to(WORD))[None, :]
        word = tl.where(live, word, LEAST)
    else:
        word = tl.load(before_ptr + row[:, None] * length + col[None, :], mask=live, other=LEAST)
    best = tl.topk(word, K)
    rank = tl.arange(0, K)
    if words_ptr is not None:
        at = (row[:, None] * tiles + tile) * K + rank[None, :]
        tl.store(words_ptr + at, best, mask=row_live[:, None])
    else:
        kept = row_live[:, None] & (rank < k)[None, :]
        index = MASK - (best & MASK)
        bits = tl.load(x_row[:, None] + index.to(tl.int32) * x_step, mask=kept)
        values_row = values_ptr + _place(row, size1, size2, values_stride0, values_stride1, values_stride2, DIMS)
        tl.store(values_row[:, None] + rank[None, :] * values_step, bits, mask=kept)
        indices_row = indices_ptr + _place(row, size1, size2, indices_stride0, indices_stride1, indices_stride2, DIMS)
        tl.store(indices_row[:, None] + rank[None, :] * indices_step, index.to(tl.int64), mask=kept)


class Order(NamedTuple):
    """What decides a build, besides the rows."""

    dtype: torch.dtype  # one of DTYPES
    descending: bool
    k: int  # of a row, the first in this order; all of them to sort


class Step(NamedTuple):
    """One launch of a call: from a row's elements, or its words, to the first ones of each of its tiles."""

    build: Build
    grid: int
    tail: tuple[int, ...]  # the arguments after the tensors
    words: int  # that it leaves for the next; none if it is the last


def word_of(dtype: torch.dtype, length: int) -> torch.dtype:
    """Of what type the words of a row are: of 32 bits if key and place fit."""
    narrow = 8 * dtype.itemsize + max(length - 1, 0).bit_length() <= 32
    return torch.int32 if narrow else torch.int64


def sort_builds(order: Order, rows: Rows, aligned: bool) -> list[Step]:
    """Rows of at least one element of x, with the steps of x, the values and the indices, 1 <= k <= their length.

    k is at most BEST where they are longer than TILE.
    """
    bits = 8 * order.dtype.itemsize
    width = 8 * word_of(order.dtype, rows.length).itemsize
    best = max(2, power_of_two(order.k))
    found: list[Step] = []
    length, first, last = rows.length, True, False
    while not last:
        block_n = min(TILE, max(2, power_of_two(length)))
        last = length <= block_n
        kept = min(best, block_n)
        block_m = max(1, min(_SHORT // block_n, power_of_two(rows.starts.numel)))
        tiles = triton.cdiv(length, block_n)
        tail = (*row_arguments(rows._replace(length=length)), tiles, order.k)
        words = f"*i{width}"
        build = Build(
            function=_sort_kernel,
            types=(
                _BITS[bits],
                None if first else words,
                None if last else words,
                _BITS[bits] if last else None,
                "*i64" if last else None,
                *integers(tail, "i32"),
            ),
            constexprs=(
                ("DESCENDING", order.descending),
                ("INFINITY", _INFINITIES.get(order.dtype, 0)),
                ("UNSIGNED", order.dtype is torch.uint8),
                ("MOST", (1 << (bits - 1)) - 1),
                ("WORD", tl.int32 if width == 32 else tl.int64),
                ("SHIFT", width - bits),
                ("DIMS", max(1, len(rows.starts.sizes))),
                ("K", kept),
                ("BLOCK_M", block_m),
                ("BLOCK_N", block_n),
            ),
            aligned=aligned,
            num_warps=max(4, min(16, block_m * block_n // 256)),  # eight words a thread
        )
        left = 0 if last else rows.starts.numel * tiles * kept
        found.append(Step(build, triton.cdiv(rows.starts.numel, block_m) * tiles, tail, left))
        length, first = tiles * kept, False
    return found
