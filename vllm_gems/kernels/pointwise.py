"""One kernel for all that is computed element by element; the formulas are in `formulas`.

A formula takes the arguments of PyTorch's operation in its order: tensors as tiles and numbers as scalars, both in the
dtype that PyTorch computes in, and what is None, a word or a whole number of the schema as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import Build, integers, pointer
from .common import power_of_two

MAX_ARGUMENTS = 4
MAX_TENSORS = 3  # which are among the first arguments
MAX_DIMS = 5

_BLOCK = 1024
_INT32_MAX = 2**31 - 1

# What Triton computes in, for the dtype that PyTorch computes in. Sums of bool are those of bytes, and then compared.
COMPUTE = {
    torch.float32: tl.float32, torch.float64: tl.float64,
    torch.bool: tl.int8, torch.uint8: tl.uint8, torch.int8: tl.int8,
    torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64,
}  # fmt: skip


@triton.jit
def _offset(i0, i1, i2, i3, i4, stride0, stride1, stride2, stride3, stride4, DIMS: tl.constexpr):
    offset = i0 * stride0 + i1 * stride1
    if DIMS > 2:
        offset += i2 * stride2
    if DIMS > 3:
        offset += i3 * stride3
    if DIMS > 4:
        offset += i4 * stride4
    return offset


@triton.jit
def _argument(ptr, at, live, scalar, COMPUTE: tl.constexpr, IS_BOOL: tl.constexpr, AS_IS: tl.constexpr):
    """What the formula gets: a tile or a number."""
    if ptr is not None:
        tile = tl.load(ptr + at, mask=live)
        if IS_BOOL:
            tile = tile != 0
        if AS_IS:
            return tile
        else:
            return tile.to(COMPUTE)
    else:
        return tl.full((), scalar, COMPUTE)


@triton.jit
def _pointwise_kernel(
    # Tensors, of bytes where they are bool
    out_ptr,
    ptr0,
    ptr1,
    ptr2,
    # Scalars: the arguments that are numbers
    scalar0,
    scalar1,
    scalar2,
    scalar3,
    # Elements; those of each dimension but the first, and strides, where it is not one walk through memory
    numel,
    size1,
    size2,
    size3,
    size4,
    out0, out1, out2, out3, out4,
    a0, a1, a2, a3, a4,
    b0, b1, b2, b3, b4,
    c0, c1, c2, c3, c4,
    # Constexprs
    FORMULA: tl.constexpr,
    COUNT: tl.constexpr,  # arguments
    CONSTANT: tl.constexpr,  # the last argument, if it is neither tensor nor number
    COMPUTE: tl.constexpr,  # the dtype that is computed in
    BOOLS: tl.constexpr,  # bits: the tensors that are bool
    AS_IS: tl.constexpr,  # bits: the arguments that are not converted to it
    OUT_BOOL: tl.constexpr,
    DIMS: tl.constexpr,  # 0: contiguous
    WIDE: tl.constexpr,  # offsets need 64 bits
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    live = at < numel
    out_at, at0, at1, at2 = at, at, at, at
    if DIMS == 1:
        out_at = at * out0
        if ptr0 is not None:
            at0 = at * a0
        if ptr1 is not None:
            at1 = at * b0
        if ptr2 is not None:
            at2 = at * c0
    if DIMS > 1:
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
        i1 = i0 % size1
        i0 = i0 // size1
        out_at = _offset(i0, i1, i2, i3, i4, out0, out1, out2, out3, out4, DIMS)
        if ptr0 is not None:
            at0 = _offset(i0, i1, i2, i3, i4, a0, a1, a2, a3, a4, DIMS)
        if ptr1 is not None:
            at1 = _offset(i0, i1, i2, i3, i4, b0, b1, b2, b3, b4, DIMS)
        if ptr2 is not None:
            at2 = _offset(i0, i1, i2, i3, i4, c0, c1, c2, c3, c4, DIMS)

    v0 = _argument(ptr0, at0, live, scalar0, COMPUTE, BOOLS & 1, AS_IS & 1)
    VALUES: tl.constexpr = COUNT - (CONSTANT is not None)
    if VALUES > 1:
        v1 = _argument(ptr1, at1, live, scalar1, COMPUTE, BOOLS & 2, AS_IS & 2)
    if VALUES > 2:
        v2 = _argument(ptr2, at2, live, scalar2, COMPUTE, BOOLS & 4, AS_IS & 4)
    if VALUES > 3:
        v3 = _argument(None, at, live, scalar3, COMPUTE, 0, 0)
    if CONSTANT is None:
        if COUNT == 1:
            y = FORMULA(v0)
        elif COUNT == 2:
            y = FORMULA(v0, v1)
        elif COUNT == 3:
            y = FORMULA(v0, v1, v2)
        else:
            y = FORMULA(v0, v1, v2, v3)
    else:
        if COUNT == 2:
            y = FORMULA(v0, CONSTANT)
        elif COUNT == 3:
            y = FORMULA(v0, v1, CONSTANT)
        else:
            y = FORMULA(v0, v1, v2, CONSTANT)
    if OUT_BOOL:
        y = y != 0
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=live)


class Walk(NamedTuple):
    """How several tensors of one shape lie in memory, with dimensions that all of them walk through alike as one."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # of each tensor

    @property
    def contiguous(self) -> bool:
        return len(self.sizes) == 0 or (len(self.sizes) == 1 and all(each == (1,) for each in self.strides))

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def reach(self) -> int:
        """The largest offset of an element, or their number."""
        ends = [sum((size - 1) * step for size, step in zip(self.sizes, each, strict=True)) for each in self.strides]
        return max(self.numel, *ends)


def walk(shape: Sequence[int], strides: Sequence[Sequence[int]], in_order: bool = False) -> Walk:
    """The first tensor decides the order: its largest stride is the outermost, so that it is written as it lies.

    in_order: elements are numbered as the dimensions are, whatever their strides.
    """
    order = [dim for dim, size in enumerate(shape) if size != 1]
    if not in_order:
        order.sort(key=lambda dim: [-each[dim] for each in strides])
    sizes: list[int] = []
    steps: list[list[int]] = []
    for dim in order:
        here = [each[dim] for each in strides]
        if sizes and all(before == shape[dim] * step for before, step in zip(steps[-1], here, strict=True)):
            sizes[-1] *= shape[dim]
            steps[-1] = here
        else:
            sizes.append(shape[dim])
            steps.append(here)
    return Walk(tuple(sizes), tuple(tuple(step[i] for step in steps) for i in range(len(strides))))


def memory_pointer(dtype: torch.dtype) -> str:
    """The Triton type of a pointer to `dtype`, which is bytes for bool."""
    return "*i8" if dtype is torch.bool else pointer(dtype)


class Pointwise(NamedTuple):
    """What decides a build, besides the walk."""

    formula: Any
    tensors: tuple[torch.dtype | None, ...]  # by argument; None for what is none
    scalars: tuple[bool, ...]  # by argument
    constant: Any  # the last argument, if that is neither; else None
    compute: torch.dtype
    out: torch.dtype
    as_is: tuple[int, ...] = ()  # arguments that keep their dtype


def pointwise_build(call: Pointwise, walked: Walk, aligned: bool) -> tuple[Build, tuple[int, ...]]:
    """What is compiled, and the arguments after the scalars."""
    wide = walked.reach > _INT32_MAX - _BLOCK
    whole = "i64" if wide else "i32"
    number = {torch.float32: "fp32", torch.float64: "fp64"}.get(call.compute, "i64")
    count = len(call.tensors)
    padded = [*call.tensors, *(None,) * (MAX_ARGUMENTS - count)]
    scalars = [*call.scalars, *(False,) * (MAX_ARGUMENTS - count)]
    dims = 0 if walked.contiguous else len(walked.sizes)
    numel = walked.numel

    types: list[str | None] = [memory_pointer(call.out)]
    types += [None if each is None else memory_pointer(each) for each in padded[:MAX_TENSORS]]
    types += [number if each else None for each in scalars]
    tail = [numel, *(walked.sizes[dim] if dim < dims else 0 for dim in range(1, MAX_DIMS))]
    present = iter(walked.strides[1:])
    every = [walked.strides[0], *(next(present) if each is not None else None for each in padded[:MAX_TENSORS])]
    for strides in every:
        tail += [0 if strides is None or dim >= dims else strides[dim] for dim in range(MAX_DIMS)]
    types += integers(tail, whole)
    bools = sum(1 << index for index, each in enumerate(padded) if each is torch.bool)
    build = Build(
        function=_pointwise_kernel,
        types=tuple(types),
        constexprs=(
            ("FORMULA", call.formula),
            ("COUNT", count),
            ("CONSTANT", call.constant),
            ("COMPUTE", COMPUTE[call.compute]),
            ("BOOLS", bools),
            ("AS_IS", sum(1 << index for index in call.as_is)),
            ("OUT_BOOL", call.out is torch.bool),
            ("DIMS", dims),
            ("WIDE", wide),
            ("BLOCK", min(_BLOCK, max(128, power_of_two(numel)))),
        ),
        aligned=aligned,
        num_warps=4,
    )
    return build, tuple(tail)
