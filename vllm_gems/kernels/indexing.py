"""One kernel for all that copies elements to or from where tensors of indices say: gather, scatter, embedding, ...

It goes through the elements of one shape. Each is read at an offset and written at another, and to one of the two every
index adds itself times the stride of the dimension that it is of. Without an index it copies.

Elements are integers of their size, whatever they mean: a copy needs no more. Where rows lie in one piece they are
copied eight bytes at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuned
from ..errors import Refused
from ..launch import CPU, Build, pointer
from .common import power_of_two
from .pointwise import MAX_DIMS, Walk, walk

MAX_INDICES = 3
UNIT = 8  # bytes that are copied at a time

_MOST_BLOCK = 2048
_INT32_MAX = 2**31 - 1
_POINTERS = {1: "*i8", 2: "*i16", 4: "*i32", 8: "*i64"}  # bytes of an element -> what it is to the kernel


@triton.jit
def _offset(i0, i1, i2, i3, i4, stride0, stride1, stride2, stride3, stride4, DIMS: tl.constexpr):
    offset = i0 * stride0
    if DIMS > 1:
        offset += i1 * stride1
    if DIMS > 2:
        offset += i2 * stride2
    if DIMS > 3:
        offset += i3 * stride3
    if DIMS > 4:
        offset += i4 * stride4
    return offset


@triton.jit
def _moved(ptr, at, live, limit, step, WRAPS: tl.constexpr, WIDE: tl.constexpr):
    """How far an index moves an element, and whether it is one of its dimension."""
    index = tl.load(ptr + at, mask=live, other=0)
    if WRAPS:
        index = tl.where(index < 0, index + limit, index)
    inside = (index >= 0) & (index < limit)
    return index.to(tl.int64 if WIDE else tl.int32) * step, live & inside


@triton.jit
def _indexed_copy_kernel(
    # Tensors of integers: what is written, and what is read or the one number that is
    write_ptr,
    read_ptr,
    value,
    # Tensors of indices, the sizes of the dimensions that they are of, and the strides of these
    index0_ptr,
    index1_ptr,
    index2_ptr,
    limit0,
    limit1,
    limit2,
    step0,
    step1,
    step2,
    # Elements; those of each dimension but the first, and strides
    numel,
    size1,
    size2,
    size3,
    size4,
    write0, write1, write2, write3, write4,
    read0, read1, read2, read3, read4,
    a0, a1, a2, a3, a4,
    b0, b1, b2, b3, b4,
    c0, c1, c2, c3, c4,
    # Constexprs
    SCATTERS: tl.constexpr,  # indices say where to write, else where to read
    ADDS: tl.constexpr,  # to what is there
    WRAPS: tl.constexpr,  # negative indices count from the end
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,  # offsets need 64 bits
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < numel
    i0, i1, i2, i3, i4 = at, at, at, at, at
    if DIMS > 4:
        i4 = i0 % size4
        i0 = i0 // size4
    if DIMS > 3:
        i3 = i0 % size3
        i0 = i0 // size3
    if DIMS > 2:
        i2 = i0 % size2
        i0 = i0 // size2
    if DIMS > 1:
        i1 = i0 % size1
        i0 = i0 // size1
    if WIDE:
        i0, i1, i2 = i0.to(tl.int64), i1.to(tl.int64), i2.to(tl.int64)
        i3, i4 = i3.to(tl.int64), i4.to(tl.int64)

    write_at = _offset(i0, i1, i2, i3, i4, write0, write1, write2, write3, write4, DIMS)
    moved = tl.zeros_like(i0)
    inside = live
    if index0_ptr is not None:
        index_at = _offset(i0, i1, i2, i3, i4, a0, a1, a2, a3, a4, DIMS)
        further, inside = _moved(index0_ptr, index_at, inside, limit0, step0, WRAPS, WIDE)
        moved += further
    if index1_ptr is not None:
        index_at = _offset(i0, i1, i2, i3, i4, b0, b1, b2, b3, b4, DIMS)
        further, inside = _moved(index1_ptr, index_at, inside, limit1, step1, WRAPS, WIDE)
        moved += further
    if index2_ptr is not None:
        index_at = _offset(i0, i1, i2, i3, i4, c0, c1, c2, c3, c4, DIMS)
        further, inside = _moved(index2_ptr, index_at, inside, limit2, step2, WRAPS, WIDE)
        moved += further

    if read_ptr is not None:
        read_at = _offset(i0, i1, i2, i3, i4, read0, read1, read2, read3, read4, DIMS)
        if not SCATTERS:
            read_at += moved
        element = tl.load(read_ptr + read_at, mask=inside, other=0)
    else:
        element = tl.full((BLOCK,), value, write_ptr.dtype.element_ty)
    if ADDS:
        tl.atomic_add(write_ptr + write_at + moved, element, mask=inside, sem="relaxed")
    elif SCATTERS:
        tl.store(write_ptr + write_at + moved, element, mask=inside)
    else:
        tl.store(write_ptr + write_at, element, mask=live)


class Index(NamedTuple):
    """A tensor of indices, seen in the shape that the kernel goes through."""

    dtype: torch.dtype
    strides: tuple[int, ...]
    limit: int  # the size of the dimension that it is of
    step: int  # and its stride


class Move(NamedTuple):
    """What one launch copies. Strides are in elements, and 0 for a dimension whose place an index says."""

    shape: tuple[int, ...]
    order: tuple[int, ...]  # strides by which the dimensions are gone through: the smallest innermost
    write: tuple[int, ...]
    read: tuple[int, ...] | None  # None: a number is written
    itemsize: int
    reach: int  # the largest offset in what is written and read
    indices: tuple[Index, ...] = ()
    scatters: bool = False
    adds: bool = False
    wraps: bool = False


class Division(NamedTuple):
    """How the work is divided."""

    block: int  # elements of a program
    num_warps: int


DEFAULT = Division(1024, 4)


def key_of(units: int) -> str:
    """By which measured divisions are kept, of rows that one index picks: units that are copied, by powers of two."""
    return f"rows {power_of_two(units)}"


@functools.cache
def source() -> str:
    """By which measured divisions are recognised as this kernel's."""
    return tuned.source_hash(_indexed_copy_kernel, _offset, _moved)


def division_for(move: Move, together: int, numel: int, device: int) -> Division:
    """The measured one for this GPU, for what embeddings and the choice of rows copy; else the default."""
    if together * move.itemsize == UNIT and len(move.indices) == 1 and not move.scatters:
        found = tuned.lookup("indexing", device, key_of(numel), source())
        return Division(**found) if found else DEFAULT
    return DEFAULT


class Launchable(NamedTuple):
    """A build, its grid, and its arguments after the addresses."""

    build: Build
    grid: int
    tail: tuple[int, ...]
    itemsize: int  # which the addresses of what is written and read have to be multiples of


def _together(walked: Walk, steps: Sequence[int], itemsize: int) -> int:
    """How many elements may be copied as one: those of a unit, if they are together in all that is written and read.

    The first strides of the walk are those of elements (the order's, what is written, what is read), the others those
    of indices.
    """
    if not walked.sizes:
        return 1
    together = UNIT // itemsize
    elements = walked.strides[:3]
    if any(each[-1] != 1 for each in elements) or any(each[-1] != 0 for each in walked.strides[3:]):
        return 1
    others = [walked.sizes[-1], *steps, *(step for each in elements for step in each[:-1])]
    while any(other % together for other in others):
        together //= 2
    return together


def move_builds(move: Move, device: int = CPU, division: Division | None = None) -> list[Launchable]:
    """What is compiled for a move: element by element, and then the way to copy several at a time, if there is one.

    device: whose measured divisions are looked up. division: another, for those who measure them.

    Raises Refused for 2**31 elements, and for tensors in more dimensions than the kernel goes through.
    """
    if math.prod(move.shape) > _INT32_MAX - _MOST_BLOCK:
        raise Refused(f"it is of {math.prod(move.shape)} elements")
    read = move.write if move.read is None else move.read
    walked = walk(move.shape, [move.order, move.write, read, *(each.strides for each in move.indices)])
    if len(walked.sizes) > MAX_DIMS:
        raise Refused(
            f"its tensors lie in {len(walked.sizes)} dimensions that are no single walk, more than {MAX_DIMS}"
        )
    ways = [_way(move, walked, 1, device, division)]
    if move.read is not None and not move.adds:
        together = _together(walked, [each.step for each in move.indices], move.itemsize)
        if together > 1:
            ways.append(_way(move, walked, together, device, division))
    return ways


def _way(move: Move, walked: Walk, together: int, device: int, division: Division | None) -> Launchable:
    dims = max(len(walked.sizes), 1)
    sizes = list(walked.sizes) or [1]
    strides = [list(each) or [0] for each in walked.strides]
    _, write, read, *indices = strides
    sizes[-1] //= together
    for each in (write, read):
        each[:-1] = [step // together for step in each[:-1]]
    numel = math.prod(sizes)
    wide = max(walked.reach, move.reach, *(each.limit for each in move.indices)) > _INT32_MAX - _MOST_BLOCK
    whole = "i64" if wide else "i32"
    element = _POINTERS[move.itemsize * together]

    given = len(move.indices)
    present = [index < given for index in range(MAX_INDICES)]
    types: list[str | None] = [element, *((None, "i64") if move.read is None else (element, None))]
    types += [pointer(move.indices[index].dtype) if there else None for index, there in enumerate(present)]
    types += [whole if there else None for there in present] * 2
    tail = [move.indices[index].limit if there else 0 for index, there in enumerate(present)]
    tail += [move.indices[index].step // together if there else 0 for index, there in enumerate(present)]
    types += ["i32", *("i32" if dim < dims else None for dim in range(1, MAX_DIMS))]
    tail += [numel, *(sizes[dim] if dim < dims else 0 for dim in range(1, MAX_DIMS))]
    of_tensors = [write, None if move.read is None else read, *indices, *[None] * (MAX_INDICES - given)]
    for steps in of_tensors:
        for dim in range(MAX_DIMS):
            there = steps is not None and dim < dims
            types.append(whole if there else None)
            tail.append(steps[dim] if steps is not None and dim < dims else 0)
    division = division or division_for(move, together, numel, device)
    block = min(division.block, max(128, power_of_two(numel)))
    build = Build(
        function=_indexed_copy_kernel,
        types=tuple(types),
        constexprs=(
            ("SCATTERS", move.scatters),
            ("ADDS", move.adds),
            ("WRAPS", move.wraps),
            ("DIMS", dims),
            ("WIDE", wide),
            ("BLOCK", block),
        ),
        aligned=False,
        num_warps=division.num_warps,
    )
    return Launchable(build, -(-numel // block), tuple(tail), move.itemsize * together)
