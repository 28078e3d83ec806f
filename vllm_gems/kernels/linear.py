"""Linear layers over few rows: a weight that is read once, and the gated activation after it in the same launch.

With a handful of tokens a matrix product is a walk through its weight, bound by memory. What cuBLAS cannot give there
is a short way in: `F.linear` costs more time on the host than the GPU needs for the product.
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
from ..launch import Build, Launch, allocator, launcher, pointer
from ..nouns import Case, Kernel, Settled
from ..scratch import counters
from .common import dtype_of, name_of, nbytes, power_of_two, randn, strided

# Beyond this many rows the product is no longer bound by its weight.
MAX_ROWS = 128


@triton.jit
def _linear_kernel(
    # Tensors
    x_ptr,  # [num_rows, IN]
    weight_ptr,  # [OUT, IN] contiguous; gated: [2 * OUT, IN], gates first
    bias_ptr,  # [OUT] (gated: [2 * OUT]) or None
    out_ptr,  # [num_rows, OUT] contiguous
    partial_ptr,  # float32, a tile of sums for each program; None without a split
    counter_ptr,  # int32, one for each tile of out, zero before and after; None without a split
    # Scalars
    num_rows,
    x_stride,
    # Constexprs
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,  # out = silu(gate) * up
    SWAPPED: tl.constexpr,  # multiply weight by x, so that the long side of the product is the weight's
    SPLIT: tl.constexpr,  # programs that share the sum of one tile
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    STEPS: tl.constexpr = (IN + DEPTH * SPLIT - 1) // (DEPTH * SPLIT)
    EVEN: tl.constexpr = IN % (DEPTH * SPLIT) == 0
    # Programs of one tile are neighbours, and so are the tiles that share a part of the weight.
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    row_tiles = (num_rows + ROWS - 1) // ROWS
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    col = (tile // row_tiles) * COLS + tl.arange(0, COLS)
    row_live = row < num_rows
    col_live = col < OUT

    at = part * STEPS * DEPTH + tl.arange(0, DEPTH)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_stride + at[None, :]
    weight_at = weight_ptr + col.to(tl.int64)[:, None] * IN + at[None, :]
    if SWAPPED:
        total = tl.zeros((COLS, ROWS), tl.float32)
        gated = tl.zeros((COLS, ROWS), tl.float32)
    else:
        total = tl.zeros((ROWS, COLS), tl.float32)
        gated = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(STEPS):
        x_live = row_live[:, None]
        weight_live = col_live[:, None]
        if not EVEN:
            rest = (at + step * DEPTH < IN)[None, :]
            x_live = x_live & rest
            weight_live = weight_live & rest
        x = tl.load(x_at, mask=x_live, other=0.0)
        if OUT % COLS == 0 and EVEN:
            weight = tl.load(weight_at)
        else:
            weight = tl.load(weight_at, mask=weight_live, other=0.0)
        total = _product(x, weight, total, SWAPPED)
        if GATED:
            if OUT % COLS == 0 and EVEN:
                up = tl.load(weight_at + OUT * IN)
            else:
                up = tl.load(weight_at + OUT * IN, mask=weight_live, other=0.0)
            gated = _product(x, up, gated, SWAPPED)
        x_at += DEPTH
        weight_at += DEPTH

    if SWAPPED:
        total = total.T
        gated = gated.T
    inside = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    KEPT: tl.constexpr = ROWS * COLS * (2 if GATED else 1)
    live = row_live[:, None] & col_live[None, :]
    if SPLIT == 1:
        _finish(total, gated, bias_ptr, out_ptr, row, col, live, OUT, HAS_BIAS, GATED)
    else:
        mine = partial_ptr + tl.program_id(0) * KEPT + inside
        tl.store(mine, total)
        if GATED:
            tl.store(mine + ROWS * COLS, gated)
        # Whoever comes last adds up what all have left, in an order that does not depend on who came when.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((ROWS, COLS), tl.float32)
            gated = tl.zeros((ROWS, COLS), tl.float32)
            for other in range(SPLIT):
                theirs = partial_ptr + (tile * SPLIT + other) * KEPT + inside
                total += tl.load(theirs, cache_modifier=".cg")
                if GATED:
                    gated += tl.load(theirs + ROWS * COLS, cache_modifier=".cg")
            _finish(total, gated, bias_ptr, out_ptr, row, col, live, OUT, HAS_BIAS, GATED)
            tl.store(counter_ptr + tile, 0)


@triton.jit
def _product(x, weight, total, SWAPPED: tl.constexpr):
    if SWAPPED:
        total = tl.dot(weight, x.T, total, input_precision="ieee")
    else:
        total = tl.dot(x, weight.T, total, input_precision="ieee")
    return total


@triton.jit
def _finish(
    total, gated, bias_ptr, out_ptr, row, col, live, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr
):
    """Bias, activation, and the one rounding."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + col, mask=col < OUT, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            gated += tl.load(bias_ptr + OUT + col, mask=col < OUT, other=0.0).to(tl.float32)[None, :]
        total = total / (1.0 + tl.exp(-total)) * gated
    out_at = out_ptr + row.to(tl.int64)[:, None] * OUT + col[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=live)


class Shape(NamedTuple):
    """What a linear layer knows for ever."""

    in_features: int
    out_features: int  # of the result; a gated layer's weight has twice as many rows
    bias: bool = False
    gated: bool = False


class Tiling(NamedTuple):
    """How the work is divided."""

    cols: int
    depth: int
    split: int
    swapped: bool
    num_warps: int
    num_stages: int


def rows_class(num_rows: int) -> int:
    """The number of rows of a program's tile, by which tilings are chosen: 16, 32 or 64."""
    return min(64, max(16, power_of_two(num_rows)))


# Programs that keep the memory of an H100 (132 multiprocessors) or a like GPU busy.
_ENOUGH = 200


def default_tiling(shape: Shape, rows: int, itemsize: int) -> Tiling:
    """Without a measured one for this GPU: 4 stages of at most 16 KiB, and as many programs as keep the memory busy.

    float32, which multiplies in registers, takes small steps.
    """
    cols = 32 if rows < 64 or itemsize == 4 else 64
    depth = 16 if itemsize == 4 else 64 if rows == 64 or shape.gated else 128
    if shape.gated and (rows == 64 or itemsize == 4):
        cols //= 2
    return _spread(Tiling(cols, depth, 1, False, 4, 4 if itemsize == 2 else 2), shape, _ENOUGH)


def _spread(tiling: Tiling, shape: Shape, enough: int) -> Tiling:
    """With the sum of a tile shared by several programs, if there are few tiles."""
    tiles = (shape.out_features + tiling.cols - 1) // tiling.cols
    split = tiling.split
    while tiles * split < enough and split < 8 and shape.in_features // (2 * split) >= 4 * tiling.depth:
        split *= 2
    return tiling._replace(split=split)


def key_of(shape: Shape, rows: int, dtype: torch.dtype) -> str:
    """By which measured tilings are kept."""
    sizes = f"{shape.in_features}x{shape.out_features}"
    return f"{name_of(dtype)} {sizes}{' gated' if shape.gated else ''} {rows}"


def general_key(gated: bool, rows: int, dtype: torch.dtype) -> str:
    """By which is kept what is best for all layers that were measured together."""
    return f"{name_of(dtype)} any{' gated' if gated else ''} {rows}"


@functools.cache
def source() -> str:
    """By which measured tilings are recognised as this kernel's."""
    return tuned.source_hash(_linear_kernel, _product, _finish)


def measured_tiling(shape: Shape, rows: int, dtype: torch.dtype, device: int) -> Tiling | None:
    """The measured tiling for this GPU, else what was best for the shapes that were measured, else None."""
    if dtype.itemsize != 2:
        return None
    if found := tuned.lookup("linear", device, key_of(shape, rows, dtype), source()):
        return Tiling(**found)
    if found := tuned.lookup("linear", device, general_key(shape.gated, rows, dtype), source()):
        return _spread(Tiling(**found), shape, _ENOUGH // 2)
    return None


def tiling_for(shape: Shape, rows: int, dtype: torch.dtype, device: int) -> Tiling:
    """The measured tiling, else the default."""
    return measured_tiling(shape, rows, dtype, device) or default_tiling(shape, rows, dtype.itemsize)


def build_of(shape: Shape, rows: int, tiling: Tiling, dtype: torch.dtype, aligned: bool = True) -> Build:
    x = pointer(dtype)
    if not aligned:  # narrow loads take registers, and what is right need not be fast
        tiling = tiling._replace(depth=16, swapped=False, num_stages=1)
    split = tiling.split > 1
    return Build(
        function=_linear_kernel,
        types=(
            x,
            x,
            x if shape.bias else None,
            x,
            "*fp32" if split else None,
            "*i32" if split else None,
            "i32",
            "i32/16",
        ),
        constexprs=(
            ("IN", shape.in_features),
            ("OUT", shape.out_features),
            ("HAS_BIAS", shape.bias),
            ("GATED", shape.gated),
            ("SWAPPED", tiling.swapped),
            ("SPLIT", tiling.split),
            ("ROWS", rows),
            ("COLS", tiling.cols),
            ("DEPTH", tiling.depth),
        ),
        aligned=aligned,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        maxnreg=168,  # left to itself the assembler spills, to fit more programs than shared memory holds
    )


# (launch, tiles of columns, split, float32 sums that a program keeps)
_Chosen = tuple[Launch, int, int, int]


@functools.cache
def bind_linear(
    shape: Shape, dtype: torch.dtype, device: int, tiling: Tiling | None = None
) -> Callable[[int, int, int, int, int, int], None]:
    """`linear` or `silu_gated_linear` with everything settled that a layer knows for ever.

    project(x_at, x_stride, weight_at, bias_at, out_at, num_rows) takes addresses, launches, and checks nothing but
    their alignment. What aligned tensors need is compiled now; with a `tiling`, which is for those who measure them, at
    first use. Raises Refused for layers that are not for us.
    """
    if reason := _never(shape, dtype):
        raise Refused(reason)
    floats = allocator(device, torch.float32)

    @functools.cache
    def chosen(rows: int, aligned: bool) -> _Chosen:
        by = tiling or tiling_for(shape, rows, dtype, device)
        launch = launcher(build_of(shape, rows, by, dtype, aligned), device)
        tiles = (shape.out_features + by.cols - 1) // by.cols
        return launch, tiles, by.split, rows * by.cols * (2 if shape.gated else 1)

    class ByRows(dict[int, _Chosen]):
        def __missing__(self, num_rows: int) -> _Chosen:
            return self.setdefault(num_rows, chosen(rows_class(max(num_rows, 1)), True))

    # By the number of rows, which a decode step changes in steps of one: a look-up and no arithmetic.
    aligned = ByRows()
    for num_rows in range(MAX_ROWS + 1) if tiling is None else ():
        aligned[num_rows]

    def project(x_at: int, x_stride: int, weight_at: int, bias_at: int, out_at: int, num_rows: int) -> None:
        found = aligned[num_rows]
        if (x_at | weight_at | bias_at | out_at | x_stride) & 15:
            found = chosen(rows_class(num_rows), False)
        launch, tiles, split, kept = found
        if num_rows > 64:
            tiles *= (num_rows + 63) // 64
        if split == 1:
            launch(tiles, x_at, weight_at, bias_at, out_at, 0, 0, num_rows, x_stride)
        else:
            partial = floats(tiles * split, kept)
            counter = counters(device, tiles)
            launch(
                tiles * split, x_at, weight_at, bias_at, out_at, partial.data_ptr(), counter.data_ptr(),
                num_rows, x_stride,
            )  # fmt: skip

    return project


def _never(shape: Shape, dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x has dtype {dtype}, not float16, bfloat16 or float32"
    if shape.in_features < 1 or shape.out_features < 1:
        return f"weight has {shape.out_features} by {shape.in_features} elements"
    return None


def _refuses(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None, gated: bool
) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x has dtype {x.dtype}, not float16, bfloat16 or float32"
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        return f"x of shape {tuple(x.shape)} and strides {x.stride()} is not rows of contiguous elements"
    if x.shape[0] > MAX_ROWS:
        return f"x has {x.shape[0]} rows, more than {MAX_ROWS}: a GEMM for many rows is faster"
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not weight.is_contiguous():
        return f"weight of shape {tuple(weight.shape)} is not a contiguous [out_features, {x.shape[1]}]"
    if 0 in weight.shape:
        return f"weight has {weight.shape[0]} by {weight.shape[1]} elements"
    if gated and weight.shape[0] % 2:
        return f"weight has {weight.shape[0]} rows, which is not as many gates as others"
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return f"bias of shape {tuple(bias.shape)} is not a contiguous ({weight.shape[0]},)"
    for name, other in (("weight", weight), ("bias", bias), ("out", out)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            return f"{name} is {other.dtype} on {other.device}, expected {x.dtype} on {x.device} as x"
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is not None and (out.shape != (x.shape[0], features) or not out.is_contiguous()):
        return f"out of shape {tuple(out.shape)} is not a contiguous ({x.shape[0]}, {features})"
    return None


def linear_refuses(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> str | None:
    """None if `linear` does this, else why not."""
    return _refuses(x, weight, bias, out, False)


def silu_gated_linear_refuses(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> str | None:
    """None if `silu_gated_linear` does this, else why not."""
    return _refuses(x, weight, bias, out, True)


def _settle(gated: bool) -> Callable[..., Settled[torch.Tensor]]:
    """(x, weight, bias, out) -> the product for arguments that look like these; raises Refused."""

    def settle(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> Settled[torch.Tensor]:
        if reason := _refuses(x, weight, bias, out, gated):
            raise Refused(reason)
        rows, (out_features, in_features) = x.shape[0], weight.shape
        shape = Shape(in_features, out_features // 2 if gated else out_features, bias is not None, gated)
        project, empty = bind_linear(shape, x.dtype, x.get_device()), allocator(x.get_device(), x.dtype)
        features, stride = shape.out_features, x.stride(0) if rows > 1 else in_features

        def run(args: tuple[Any, ...]) -> torch.Tensor:
            x, weight, bias, out = args
            result: torch.Tensor = empty(rows, features) if out is None else out
            if rows:
                bias_at = 0 if bias is None else bias.data_ptr()
                project(x.data_ptr(), stride, weight.data_ptr(), bias_at, result.data_ptr(), rows)
            return result

        return run

    return settle


settle_linear, settle_silu_gated_linear = _settle(False), _settle(True)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight.T + bias for few rows, summed in float32 and rounded once.

    x: [num_rows, in_features], at most 128 rows, float16, bfloat16 or float32; rows may lie apart. weight:
    [out_features, in_features], contiguous. bias: [out_features] or None. out: [num_rows, out_features] to write, else
    a new tensor. Returns out. The same inputs always give the same bits.

    Stands beside `torch.nn.functional.linear`. Raises Refused for what it does not do.
    """
    args = x, weight, bias, out
    return settle_linear(*args)(args)


def silu_gated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) in one launch, where weight is gate above up (https://arxiv.org/abs/2002.05202).

    weight: [2 * intermediate_size, in_features]; bias: [2 * intermediate_size] or None; the rest as in `linear`.
    Between the products and the result nothing is rounded. Returns [num_rows, intermediate_size].

    Stands in for vLLM's `gate_up_proj` and `SiluAndMul` after it. Raises Refused for what it does not do.
    """
    args = x, weight, bias, out
    return settle_silu_gated_linear(*args)(args)


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor]:
    y = x @ weight.T
    return (y if bias is None else y + bias,)


def silu_gated_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor]:
    gate, up = linear_reference(x, weight, bias)[0].chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up,)


# The linear layers of a decoder layer: qkv, o, gate and up, down.
PROJECTIONS: dict[str, dict[str, Shape]] = {
    "qwen2.5-7b": {
        "qkv": Shape(3584, 4608, bias=True),
        "o": Shape(3584, 3584),
        "gate_up": Shape(3584, 18944, gated=True),
        "down": Shape(18944, 3584),
    },
    "llama-3.1-8b": {
        "qkv": Shape(4096, 6144),
        "o": Shape(4096, 4096),
        "gate_up": Shape(4096, 14336, gated=True),
        "down": Shape(14336, 4096),
    },
    "qwen3-8b": {
        "gate_up": Shape(4096, 12288, gated=True),
        "down": Shape(12288, 4096),
    },
}
ROWS = (1, 8, 16, 32, 64)  # at which they are timed


def _cases(gated: bool) -> tuple[Case, ...]:
    return (
        Case("one row", {"rows": 1, "in": 64, "out": 48}),
        Case("odd sizes", {"rows": 5, "in": 77, "out": 51}),
        Case("bias", {"rows": 7, "in": 128, "out": 96, "bias": True}),
        Case("several tiles of rows", {"rows": 67, "in": 64, "out": 32, "bias": True}),
        Case("rows apart", {"rows": 3, "in": 96, "out": 64, "gap": 32}),
        Case("split", {"rows": 3, "in": 4096, "out": 40, "bias": True}),
        Case("uneven split", {"rows": 20, "in": 4200, "out": 33}),
        Case("empty", {"rows": 0, "in": 64, "out": 32}),
        *(
            Case(f"{model} {name} {rows}", {"rows": rows, "in": each.in_features, "out": each.out_features,
                 "bias": each.bias, "model": model}, bench=True)
            for model, layers in PROJECTIONS.items()
            for name, each in layers.items()
            for rows in ROWS
            if each.gated is gated
        ),
    )  # fmt: skip


def _inputs(gated: bool) -> Callable[[Case, str, str], dict[str, Any]]:
    def inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
        rows, in_features, out_features = case["rows"], case["in"], case["out"] * (2 if gated else 1)
        x = strided((rows, in_features), dtype, device, case["gap"]) if "gap" in case.params else None
        return {
            "x": randn((rows, in_features), dtype, device) if x is None else x,
            "weight": randn((out_features, in_features), dtype, device, scale=in_features**-0.5),
            "bias": randn((out_features,), dtype, device) if case.get("bias") else None,
        }

    return inputs


def _builds(gated: bool) -> Callable[[Case, str], Iterator[Build]]:
    def builds(case: Case, dtype: str) -> Iterator[Build]:
        shape = Shape(case["in"], case["out"], bool(case.get("bias")), gated)
        kind = dtype_of(dtype)
        rows = rows_class(max(case["rows"], 1))
        tiling = default_tiling(shape, rows, kind.itemsize)
        for is_aligned in (True, False):
            yield build_of(shape, rows, tiling, kind, is_aligned)
        if case.name == "split" and kind.itemsize == 2:  # which measured tilings may be
            yield build_of(shape, rows, tiling._replace(cols=64, depth=64, swapped=True), kind)

    return builds


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _gated_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


LINEAR = Kernel(
    name="linear",
    op=linear,
    settle=settle_linear,
    reference=linear_reference,
    refuses=linear_refuses,
    inputs=_inputs(False),
    results=("return",),
    cases=_cases(False),
    builds=_builds(False),
    schema="linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    fake=_fake,
    traffic=lambda x, weight, bias: nbytes(x, weight, bias) + x.shape[0] * weight.shape[0] * x.element_size(),
)

SILU_GATED_LINEAR = Kernel(
    name="silu_gated_linear",
    op=silu_gated_linear,
    settle=settle_silu_gated_linear,
    reference=silu_gated_linear_reference,
    refuses=silu_gated_linear_refuses,
    inputs=_inputs(True),
    results=("return",),
    cases=_cases(True),
    builds=_builds(True),
    schema="silu_gated_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    fake=_gated_fake,
    traffic=lambda x, weight, bias: nbytes(x, weight, bias) + x.shape[0] * weight.shape[0] // 2 * x.element_size(),
)

KERNELS = (LINEAR, SILU_GATED_LINEAR)
