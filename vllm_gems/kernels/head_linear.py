"""A linear layer of every attention head, over few rows: latent attention's products with its absorbed weights.

Each head has a weight of its own and a few rows to multiply it by. As in `linear`, that is a walk through the weights,
and the way into a batched GEMM costs the host more than the GPU needs for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuned
from ..errors import Refused
from ..launch import Build, Launch, launcher, pointer
from ..nouns import Case, Kernel
from .common import dtype_of, name_of, nbytes, power_of_two, randn
from .linear import MAX_ROWS, rows_class


@triton.jit
def _head_linear_kernel(
    # Tensors
    x_ptr,  # [num_rows, HEADS, IN]
    weight_ptr,  # [HEADS, IN, OUT], elements of IN or of OUT contiguous
    out_ptr,  # [num_rows, HEADS, OUT] contiguous
    # Scalars, strides in elements
    num_rows,
    x_stride,
    x_head_stride,
    weight_head_stride,
    weight_stride,  # of the dimension that is not contiguous
    # Constexprs
    HEADS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ALONG_OUT: tl.constexpr,  # elements of OUT are contiguous
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    COL_TILES: tl.constexpr = (OUT + COLS - 1) // COLS
    # Programs that read the same part of a weight are neighbours.
    row_tiles = (num_rows + ROWS - 1) // ROWS
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) // row_tiles % COL_TILES * COLS + tl.arange(0, COLS)
    head = (tl.program_id(0) // row_tiles // COL_TILES).to(tl.int64)
    row_live = (row < num_rows)[:, None]
    depth = tl.arange(0, DEPTH)
    x_at = x_ptr + head * x_head_stride + row.to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight_ptr += head * weight_head_stride
    total = tl.zeros((ROWS, COLS), tl.float32)
    for base in range(0, IN, DEPTH):
        if IN % DEPTH == 0:
            x = tl.load(x_at + base, mask=row_live, other=0.0)
        else:
            x = tl.load(x_at + base, mask=row_live & (base + depth < IN)[None, :], other=0.0)
        if ALONG_OUT:
            weight_at = weight_ptr + (base + depth)[:, None] * weight_stride + col[None, :]
            if IN % DEPTH == 0 and OUT % COLS == 0:
                weight = tl.load(weight_at)
            else:
                weight = tl.load(weight_at, mask=(base + depth < IN)[:, None] & (col < OUT)[None, :], other=0.0)
        else:
            weight_at = weight_ptr + col[:, None] * weight_stride + (base + depth)[None, :]
            if IN % DEPTH == 0 and OUT % COLS == 0:
                weight = tl.load(weight_at)
            else:
                weight = tl.load(weight_at, mask=(col < OUT)[:, None] & (base + depth < IN)[None, :], other=0.0)
            weight = weight.T
        total = tl.dot(x, weight, total, input_precision="ieee")
    out_at = out_ptr + (row.to(tl.int64)[:, None] * HEADS + head) * OUT + col[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=row_live & (col < OUT)[None, :])


class HeadShape(NamedTuple):
    """What a linear layer of every head knows for ever."""

    num_heads: int
    in_features: int
    out_features: int
    along_out: bool  # a weight's elements are contiguous along out_features, else along in_features


class Tiling(NamedTuple):
    """How the work is divided."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


# Numbers of rows, the most of a class each, by which tilings are chosen.
CLASSES = (16, 32, 64, 128)
# Programs that keep the memory of an H100 (132 multiprocessors) or a like GPU busy.
_ENOUGH = 128


def class_of(num_rows: int) -> int:
    """The class of so many rows."""
    return min(CLASSES[-1], max(CLASSES[0], power_of_two(num_rows)))


def default_tiling(shape: HeadShape, num_rows: int, dtype: torch.dtype, aligned: bool = True) -> Tiling:
    """Without a measured one for this GPU, by reasoning.

    Many heads keep a GPU busy with large tiles, too, which read a weight fewer times; 16-bit tiles are narrower where
    there would be few of them. float32 multiplies in registers, and narrow loads take them.
    """
    rows = rows_class(num_rows)
    if dtype.itemsize == 4 or not aligned:
        return Tiling(rows, 32, 32 if aligned else 16, 4, 1)
    if num_rows > 64 and shape.num_heads * triton.cdiv(shape.out_features, 64) >= 2 * _ENOUGH:
        return Tiling(128, 64, 64, 8, 2)
    return Tiling(rows, 32 if shape.num_heads * triton.cdiv(shape.out_features, 32) >= _ENOUGH else 16, 64, 4, 3)


def key_of(shape: HeadShape, num_rows: int, dtype: torch.dtype) -> str:
    """By which measured tilings are kept."""
    heads, inside, outside, along = shape
    return f"{name_of(dtype)} {heads}*{inside}x{outside} {'nn' if along else 'nt'} {class_of(num_rows)}"


@functools.cache
def source() -> str:
    """By which measured tilings are recognised as this kernel's."""
    return tuned.source_hash(_head_linear_kernel)


def tiling_for(shape: HeadShape, num_rows: int, dtype: torch.dtype, device: int) -> Tiling:
    """The measured tiling for this GPU, else the default."""
    key = key_of(shape, num_rows, dtype)
    if dtype.itemsize == 2 and (found := tuned.lookup("head_linear", device, key, source())):
        return Tiling(**found)
    return default_tiling(shape, num_rows, dtype)


def build_of(shape: HeadShape, tiling: Tiling, dtype: torch.dtype, aligned: bool = True) -> Build:
    x = pointer(dtype)
    return Build(
        function=_head_linear_kernel,
        types=(x, x, x, "i32", *("i32/16",) * 4),
        constexprs=(
            ("HEADS", shape.num_heads),
            ("IN", shape.in_features),
            ("OUT", shape.out_features),
            ("ALONG_OUT", shape.along_out),
            ("ROWS", tiling.rows),
            ("COLS", tiling.cols),
            ("DEPTH", tiling.depth),
        ),
        aligned=aligned,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        maxnreg=128,  # left to itself the assembler spills, to fit more programs
    )


def _never(shape: HeadShape, dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x has dtype {dtype}, not float16, bfloat16 or float32"
    if min(shape[:3]) < 1:
        return f"weight has {shape.num_heads} by {shape.in_features} by {shape.out_features} elements"
    return None


@functools.cache
def bind_head_linear(
    shape: HeadShape, dtype: torch.dtype, device: int, tiling: Tiling | None = None
) -> Callable[..., None]:
    """`head_linear` with everything settled that a layer knows for ever.

    project(x_at, x_stride, x_head_stride, weight_at, weight_head_stride, weight_stride, out_at, num_rows) takes
    addresses, and strides in elements, the last of the dimension of a weight that is not contiguous. It launches, and
    checks nothing but the alignment. What aligned tensors need is compiled now; with a `tiling`, which is for those who
    measure them, at first use. Raises Refused for layers that are not for us.
    """
    if reason := _never(shape, dtype):
        raise Refused(reason)

    @functools.cache
    def launch_for(most: int, aligned: bool) -> tuple[Launch, int, int]:
        """For a class, with the rows of a tile and the number of tiles for so many rows."""
        if not aligned:
            by = default_tiling(shape, most, dtype, aligned)
        else:
            by = tiling or tiling_for(shape, most, dtype, device)
        tiles = shape.num_heads * triton.cdiv(shape.out_features, by.cols)
        return launcher(build_of(shape, by, dtype, aligned), device), by.rows, tiles

    for most in CLASSES if tiling is None else ():
        launch_for(most, True)

    def project(
        x_at: int,
        x_stride: int,
        x_head_stride: int,
        weight_at: int,
        weight_head_stride: int,
        weight_stride: int,
        out_at: int,
        num_rows: int,
    ) -> None:
        bits = x_at | x_stride | x_head_stride | weight_at | weight_head_stride | weight_stride | out_at
        launch, rows, tiles = launch_for(class_of(num_rows), not bits & 15)
        launch(
            tiles * ((num_rows + rows - 1) // rows), x_at, weight_at, out_at, num_rows, x_stride, x_head_stride,
            weight_head_stride, weight_stride,
        )  # fmt: skip

    return project


def along_out(weight: torch.Tensor) -> bool | None:
    """Whether the elements of a [num_heads, in, out] are contiguous along out, or along in; None for neither."""
    if weight.stride(2) == 1:
        return True
    return False if weight.stride(1) == 1 else None


def head_linear_refuses(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> str | None:
    """None if `head_linear` does this, else why not."""
    if x.dim() != 3 or x.stride(2) != 1:
        return f"x of shape {tuple(x.shape)} and strides {x.stride()} is not [num_rows, num_heads, in] of whole heads"
    rows, heads, in_features = x.shape
    if rows > MAX_ROWS:
        return f"x has {rows} rows, more than {MAX_ROWS}: a GEMM for many rows is faster"
    if weight.dim() != 3 or weight.shape[:2] != (heads, in_features):
        return f"weight of shape {tuple(weight.shape)} is not [{heads}, {in_features}, out_features]"
    order = along_out(weight)
    if order is None:
        return f"weight of strides {weight.stride()} is contiguous neither along in_features nor along out_features"
    shape = HeadShape(heads, in_features, weight.shape[2], order)
    if reason := _never(shape, x.dtype):
        return reason
    if max(*x.stride(), weight.stride(0), _reach(weight[0])) >= 2**31:
        return f"x of strides {x.stride()} or weight of strides {weight.stride()} has elements 2**31 apart, or more"
    for name, other in (("weight", weight), ("out", out)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            return f"{name} is {other.dtype} on {other.device}, expected {x.dtype} on {x.device} as x"
    if out is not None and (out.shape != (rows, heads, shape.out_features) or not out.is_contiguous()):
        return f"out of shape {tuple(out.shape)} is not a contiguous {(rows, heads, shape.out_features)}"
    return None


def _reach(x: torch.Tensor) -> int:
    """How far the last element lies behind the first."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def head_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """out[:, head] = x[:, head] @ weight[head] for few rows, summed in float32 and rounded once.

    x: [num_rows, num_heads, in_features], at most 128 rows, float16, bfloat16 or float32; rows and heads may lie apart.
    weight: [num_heads, in_features, out_features] of that dtype, contiguous along one of the last two dimensions, which
    are both at least 1. out: [num_rows, num_heads, out_features] to write, contiguous, else a new tensor. Returns out.

    Stands beside `torch.bmm`. Raises Refused for what it does not do.
    """
    if reason := head_linear_refuses(x, weight, out):
        raise Refused(reason)
    rows, heads, in_features = x.shape
    order = along_out(weight)
    shape = HeadShape(heads, in_features, weight.shape[2], bool(order))
    project = bind_head_linear(shape, x.dtype, x.get_device())
    if out is None:
        out = torch.empty((rows, heads, shape.out_features), dtype=x.dtype, device=x.device)
    if rows:
        project(
            x.data_ptr(), x.stride(0), x.stride(1), weight.data_ptr(), weight.stride(0),
            weight.stride(1 if order else 2), out.data_ptr(), rows,
        )  # fmt: skip
    return out


def head_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor]:
    return (torch.einsum("rhi,hio->rho", x, weight),)


# Heads; each has queries of 128 elements that become a latent of 512, and a latent that becomes a value of 128.
_MODELS = {"deepseek-v2-lite": 16, "deepseek-v3": 128}

_CASES = (
    Case("along out", {"rows": 5, "heads": 3, "in": 64, "out": 96}),
    Case("along in", {"rows": 5, "heads": 3, "in": 64, "out": 96, "along_out": False}),
    Case("one row", {"rows": 1, "heads": 1, "in": 64, "out": 48}),
    Case("odd sizes", {"rows": 5, "heads": 3, "in": 77, "out": 51}),
    Case("odd sizes along in", {"rows": 5, "heads": 3, "in": 77, "out": 51, "along_out": False}),
    Case("wide tiles", {"rows": 19, "heads": 16, "in": 64, "out": 256}),
    Case("wide tiles along in", {"rows": 35, "heads": 64, "in": 32, "out": 64, "along_out": False}),
    Case("several tiles of rows", {"rows": 67, "heads": 2, "in": 64, "out": 32}),
    Case("large tiles", {"rows": 125, "heads": 128, "in": 32, "out": 128}),
    Case("heads apart", {"rows": 4, "heads": 3, "in": 32, "out": 32, "gap": 16}),
    Case("odd offset", {"rows": 4, "heads": 3, "in": 32, "out": 32, "gap": 5, "offset": 3}),
    Case("heads outermost", {"rows": 4, "heads": 3, "in": 32, "out": 32, "outermost": True}),
    Case("part of a weight", {"rows": 4, "heads": 3, "in": 64, "out": 32, "beside": 16}),
    Case("part of a weight along in", {"rows": 4, "heads": 3, "in": 64, "out": 32, "beside": 16, "along_out": False}),
    Case("empty", {"rows": 0, "heads": 3, "in": 64, "out": 32}),
    *(
        Case(
            f"{model} {name} {rows}",
            {"rows": rows, "heads": heads, "in": sizes[0], "out": sizes[1], "along_out": name == "key", "beside": 128,
             "model": model},
            bench=True,
        )
        for model, heads in _MODELS.items()
        for name, sizes in {"key": (128, 512), "value": (512, 128)}.items()
        for rows in (1, 8, 16, 32, 64, 128)
    ),
)  # fmt: skip


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    rows, heads, in_features, out_features = case["rows"], case["heads"], case["in"], case["out"]
    gap, offset, beside = case.get("gap", 0), case.get("offset", 0), case.get("beside", 0)
    outer = (heads, rows) if case.get("outermost") else (rows, heads)
    x = randn((*outer, offset + in_features + gap), dtype, device)[..., offset : offset + in_features]
    # As vLLM has them: views of one weight, in which a head's keys and values follow each other.
    lines, width = (in_features, out_features) if case.get("along_out", True) else (out_features, in_features)
    weight = randn((heads, lines + beside, width), dtype, device, scale=in_features**-0.5)[:, :lines]
    return {
        "x": x.transpose(0, 1) if case.get("outermost") else x,
        "weight": weight if case.get("along_out", True) else weight.transpose(1, 2),
    }


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    shape = HeadShape(case["heads"], case["in"], case["out"], case.get("along_out", True))
    for is_aligned in (True, False):
        kind = dtype_of(dtype)
        yield build_of(shape, default_tiling(shape, max(case["rows"], 1), kind, is_aligned), kind, is_aligned)


def _fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[2]))


HEAD_LINEAR = Kernel(
    name="head_linear",
    op=head_linear,
    reference=head_linear_reference,
    refuses=head_linear_refuses,
    inputs=_inputs,
    results=("return",),
    cases=_CASES,
    builds=_builds,
    schema="head_linear(Tensor x, Tensor weight) -> Tensor",
    fake=_fake,
    traffic=lambda x, weight: nbytes(x, weight) + x.shape[0] * x.shape[1] * weight.shape[2] * x.element_size(),
)

KERNELS = (HEAD_LINEAR,)
