"""Numbers of equal distance, out of nothing: start, start + step, start + 2 * step, ...

Computed in 64-bit integers, or in the float that PyTorch computes in on a GPU (float32 for half precision), with one
rounding of the product and the sum together, as its compiler makes of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Build, pointer

BLOCK = 1024

COMPUTE = {
    torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32, torch.float64: tl.float64,
    torch.uint8: tl.int64, torch.int8: tl.int64, torch.int16: tl.int64, torch.int32: tl.int64, torch.int64: tl.int64,
}  # fmt: skip


@triton.jit
def _arange_kernel(
    out_ptr,  # [numel]
    start,
    step,
    numel,
    stride,  # of out, or None where it is 1
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.full((BLOCK,), start, COMPUTE)
    each = tl.full((BLOCK,), step, COMPUTE)
    if COMPUTE.is_floating():
        value = tl.fma(each, index.to(COMPUTE), first)
    else:
        value = first + index.to(COMPUTE) * each
    at = index
    if stride is not None:
        at = index * stride
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=index < numel)


def arange_build(dtype: torch.dtype, contiguous: bool) -> Build:
    """What is compiled for results of a dtype; those that are not contiguous have a stride."""
    number = {tl.float32: "fp32", tl.float64: "fp64", tl.int64: "i64"}[COMPUTE[dtype]]
    return Build(
        function=_arange_kernel,
        types=(pointer(dtype), number, number, "i32", None if contiguous else "i32"),
        constexprs=(("COMPUTE", COMPUTE[dtype]), ("BLOCK", BLOCK)),
        aligned=False,
        num_warps=4,
    )
