"""Linear layers over few rows with weights in float8, a scale for 128 by 128 of them (https://arxiv.org/abs/2412.19437).

The rows are quantised, too, 128 elements to a scale: by a small launch of its own, so that the programs of the product
need not each do it again. The product is the walk through the weight that `linear` is, over half the bytes. A step is
one block: its sum of products in float8, times both scales, is added in float32. The weight is the left operand, whose
tile is as wide as the tensor cores of Hopper want it, however few rows there are.
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
from ..launch import CPU, Build, Launch, allocator, launcher, pointer
from ..nouns import Case, Kernel
from ..scratch import counters
from .common import dtype_of, nbytes, power_of_two, randn, strided
from .linear import Shape, _finish, rows_class

MAX_ROWS = 512
BLOCK = 128  # elements of a row, and rows and columns of a weight, to a scale
FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8
POINTER = "*fp8e4nv"

_BLOCK = tl.constexpr(BLOCK)
_LARGEST = tl.constexpr(LARGEST)
_LEAST = tl.constexpr(1e-10)  # what is divided by, as vLLM's `per_token_group_quant_fp8` has it
# Groups that a program quantises: eight elements a thread.
_GROUPS = 8


@triton.jit
def quantised(x):
    """(x / scales, scales) of rows [count, BLOCK] in float32, the former in float8, the largest of each its largest.

    Divisions are rounded as IEEE 754 says: with others an element in a thousand is another.
    """
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=1), _LEAST), _LARGEST)
    inside = tl.clamp(tl.div_rn(x, scale[:, None]), -_LARGEST, _LARGEST)
    return inside.to(tl.float8e4nv), scale


@triton.jit
def _group_quantise_kernel(
    # Tensors
    x_ptr,  # [num_rows, IN]
    quantised_ptr,  # [num_rows, IN] float8, contiguous
    scales_ptr,  # [IN / BLOCK, num_rows] float32, contiguous
    # Scalars
    num_rows,
    x_stride,
    # Constexprs
    IN: tl.constexpr,
    GROUPS: tl.constexpr,
):
    CHUNKS: tl.constexpr = (IN // _BLOCK + GROUPS - 1) // GROUPS
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    group = (tl.program_id(0) % CHUNKS) * GROUPS + tl.arange(0, GROUPS)
    live = group < IN // _BLOCK
    at = group[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    x = tl.load(x_ptr + row * x_stride + at, mask=live[:, None], other=0.0).to(tl.float32)
    inside, scale = quantised(x)
    tl.store(quantised_ptr + row * IN + at, inside, mask=live[:, None])
    tl.store(scales_ptr + group.to(tl.int64) * num_rows + row, scale, mask=live)


@triton.jit
def block_sums(
    x_at,  # addresses [ROWS, BLOCK] of the first block, in float8
    x_scale_at,  # [ROWS]
    x_scale_stride,
    row_live,
    weight_at,  # [COLS, BLOCK]
    scale_at,  # one: a tile is inside a block of the weight
    col_live,
    steps,
    UP: tl.constexpr,  # how many weights and scales after a gate its partner has its own
    UP_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    MASKED: tl.constexpr,  # some columns may be none
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """weight @ x.T over so many blocks, [COLS, ROWS] in float32, and its partner's."""
    total = tl.zeros((COLS, ROWS), tl.float32)
    gated = tl.zeros((COLS, ROWS), tl.float32)
    for _ in tl.range(steps, num_stages=STAGES):
        x = tl.load(x_at, mask=row_live[:, None], other=0.0)
        x_scale = tl.load(x_scale_at, mask=row_live, other=0.0)
        if MASKED:
            weight = tl.load(weight_at, mask=col_live[:, None], other=0.0)
        else:
            weight = tl.load(weight_at)
        total += tl.dot(weight, x.T) * (tl.load(scale_at) * x_scale)[None, :]
        if GATED:
            if MASKED:
                up = tl.load(weight_at + UP, mask=col_live[:, None], other=0.0)
            else:
                up = tl.load(weight_at + UP)
            gated += tl.dot(up, x.T) * (tl.load(scale_at + UP_SCALES) * x_scale)[None, :]
        x_at += _BLOCK
        x_scale_at += x_scale_stride
        weight_at += _BLOCK
        scale_at += 1
    return total, gated


@triton.jit
def _block_fp8_linear_kernel(
    # Tensors
    x_ptr,  # [num_rows, IN] float8, contiguous
    x_scales_ptr,  # [IN / BLOCK, num_rows] float32
    weight_ptr,  # [OUT, IN] float8, contiguous; gated: [2 * OUT, IN], gates first
    scales_ptr,  # [OUT / BLOCK, IN / BLOCK] float32, contiguous; gated: with twice as many rows
    bias_ptr,  # [OUT] (gated: [2 * OUT]) or None
    out_ptr,  # [num_rows, OUT] contiguous
    partial_ptr,  # float32, a tile of sums for each program; None without a split
    counter_ptr,  # int32, one for each tile of out, zero before and after; None without a split
    # Scalars
    num_rows,
    # Constexprs
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,  # out = silu(gate) * up
    SPLIT: tl.constexpr,  # programs that share the sum of one tile
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    GROUPS: tl.constexpr = IN // _BLOCK
    STEPS: tl.constexpr = (GROUPS + SPLIT - 1) // SPLIT
    # Programs of one tile are neighbours, and so are the tiles that share a part of the weight.
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    row_tiles = (num_rows + ROWS - 1) // ROWS
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    first_col = (tile // row_tiles) * COLS
    col = first_col + tl.arange(0, COLS)
    row_live = row < num_rows
    col_live = col < OUT

    first = part * STEPS
    at = first * _BLOCK + tl.arange(0, _BLOCK)
    steps = STEPS
    if GROUPS % SPLIT != 0:
        steps = tl.minimum(GROUPS - first, STEPS)
    total, gated = block_sums(
        x_ptr + row.to(tl.int64)[:, None] * IN + at[None, :], x_scales_ptr + first * num_rows + row, num_rows, row_live,
        weight_ptr + col.to(tl.int64)[:, None] * IN + at[None, :],
        scales_ptr + (first_col // _BLOCK) * GROUPS + first, col_live, steps,
        OUT * IN, OUT // _BLOCK * GROUPS, GATED, OUT % COLS != 0, ROWS, COLS, STAGES,
    )  # fmt: skip
    total = total.T
    gated = gated.T

    live = row_live[:, None] & col_live[None, :]
    if SPLIT == 1:
        _finish(total, gated, bias_ptr, out_ptr, row, col, live, OUT, HAS_BIAS, GATED)
    else:
        # As in `linear`, whose source is the one by which measured tilings are recognised.
        KEPT: tl.constexpr = ROWS * COLS * (2 if GATED else 1)
        inside = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        mine = partial_ptr + tl.program_id(0) * KEPT + inside
        tl.store(mine, total)
        if GATED:
            tl.store(mine + ROWS * COLS, gated)
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


class Tiling(NamedTuple):
    """How the work is divided."""

    cols: int  # a divisor of BLOCK
    split: int
    num_warps: int
    num_stages: int


# Programs that keep the memory of an H100 (132 multiprocessors) or a like GPU busy, and bytes of their stages, so that
# three fit into its shared memory.
_ENOUGH = 200
_STAGE_BYTES = 72 << 10


def stages_for(cols: int, rows: int, gated: bool, nbytes: int = _STAGE_BYTES) -> int:
    """As many stages of a program as `nbytes` are, and no more than memory needs to be busy."""
    return max(2, min(6, nbytes // (BLOCK * (cols * (2 if gated else 1) + rows))))


def default_tiling(shape: Shape, rows: int) -> Tiling:
    """Without a measured one for this GPU: tiles as small as the tensor cores take them, and as many programs as keep
    the memory busy."""
    cols, split, groups = 64, 1, shape.in_features // BLOCK
    tiles = triton.cdiv(shape.out_features, cols)
    while tiles * split < _ENOUGH and split < 8 and groups // (2 * split) >= 4:
        split *= 2
    warps = 8 if rows == 64 and shape.gated else 4  # two tiles of sums, and a third of a step's, are many registers
    return Tiling(cols, split, warps, stages_for(cols, rows, shape.gated))


def key_of(shape: Shape, rows: int) -> str:
    """By which measured tilings are kept, whatever dtype the rows had before they were quantised."""
    return f"{shape.in_features}x{shape.out_features}{' gated' if shape.gated else ''} {rows}"


@functools.cache
def source() -> str:
    """By which measured tilings are recognised as this kernel's."""
    return tuned.source_hash(_block_fp8_linear_kernel, block_sums, _finish)


def tiling_for(shape: Shape, rows: int, device: int) -> Tiling:
    """The measured tiling for this GPU, else the default."""
    found = tuned.lookup("block_fp8_linear", device, key_of(shape, rows), source())
    return Tiling(**found) if found else default_tiling(shape, rows)


def quantise_build(in_features: int, dtype: torch.dtype, aligned: bool = True) -> Build:
    return Build(
        function=_group_quantise_kernel,
        types=(pointer(dtype), POINTER, "*fp32", "i32", "i32/16"),
        constexprs=(("IN", in_features), ("GROUPS", min(_GROUPS, power_of_two(in_features // BLOCK)))),
        aligned=aligned,
        num_warps=4,
    )


def build_of(shape: Shape, rows: int, tiling: Tiling, dtype: torch.dtype) -> Build:
    x, split = pointer(dtype), tiling.split > 1
    return Build(
        function=_block_fp8_linear_kernel,
        types=(
            POINTER, "*fp32", POINTER, "*fp32", x if shape.bias else None, x, "*fp32" if split else None,
            "*i32" if split else None, "i32",
        ),
        constexprs=(
            ("IN", shape.in_features),
            ("OUT", shape.out_features),
            ("HAS_BIAS", shape.bias),
            ("GATED", shape.gated),
            ("SPLIT", tiling.split),
            ("ROWS", rows),
            ("COLS", tiling.cols),
            ("STAGES", tiling.num_stages),
        ),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        maxnreg=168,  # as for linear layers
    )  # fmt: skip


@functools.cache
def device_refuses(device: int) -> str | None:
    """None if a device has tensor cores for float8 as wide as these tiles, and the memory for them; else why not."""
    if device == CPU:
        return None
    if torch.version.hip is not None:
        return "AMD's float8 is another"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major in (9, 10) else f"tiles in float8 are made for sm_90 and sm_100, this is sm_{major}{minor}"


@functools.cache
def bind_group_quantise(
    in_features: int, dtype: torch.dtype, device: int
) -> Callable[[int, int, int], tuple[Any, Any]]:
    """quantise(x_at, x_stride, num_rows) -> (rows in float8, their scales), as memory with a `data_ptr()`.

    Rows are contiguous, [num_rows, in_features]; scales are [in_features / BLOCK, num_rows] float32. Nobody else has
    the memory until what is launched next on this stream is done.
    """
    octets, floats = allocator(device, torch.uint8), allocator(device, torch.float32)
    groups = in_features // BLOCK
    by_alignment = {each: launcher(quantise_build(in_features, dtype, each), device) for each in (True, False)}
    chunks = triton.cdiv(groups, min(_GROUPS, power_of_two(groups)))

    def quantise(x_at: int, x_stride: int, num_rows: int) -> tuple[Any, Any]:
        inside, scales = octets(num_rows, in_features), floats(groups, num_rows)
        launch = by_alignment[not (x_at | x_stride) & 15]
        launch(num_rows * chunks, x_at, inside.data_ptr(), scales.data_ptr(), num_rows, x_stride)
        return inside, scales

    return quantise


# (launch, tiles of columns, split, float32 sums that a program keeps)
_Chosen = tuple[Launch, int, int, int]


@functools.cache
def bind_block_fp8_linear(
    shape: Shape, dtype: torch.dtype, device: int, tiling: Tiling | None = None
) -> Callable[[int, int, int, int, int, int, int], None]:
    """`block_fp8_linear` or its gated kind with everything settled that a layer knows for ever.

    project(x_at, x_stride, weight_at, scale_at, bias_at, out_at, num_rows) takes addresses, all but that of x aligned
    to 16 bytes, and makes two launches. What they need is compiled now; with a `tiling`, which is for those who measure
    them, at first use. Raises Refused for layers that are not for us.
    """
    if reason := _never(shape, dtype) or device_refuses(device):
        raise Refused(reason)
    floats = allocator(device, torch.float32)
    quantise = bind_group_quantise(shape.in_features, dtype, device)

    @functools.cache
    def chosen(rows: int) -> _Chosen:
        by = tiling or tiling_for(shape, rows, device)
        launch = launcher(build_of(shape, rows, by, dtype), device)
        tiles = triton.cdiv(shape.out_features, by.cols)
        return launch, tiles, by.split, rows * by.cols * (2 if shape.gated else 1)

    for rows in (16, 32, 64) if tiling is None else ():
        chosen(rows)

    def project(
        x_at: int, x_stride: int, weight_at: int, scale_at: int, bias_at: int, out_at: int, num_rows: int
    ) -> None:
        if (weight_at | scale_at | bias_at | out_at) & 15:
            raise Refused("tensors that are not aligned to 16 bytes")
        rows = rows_class(num_rows)
        launch, tiles, split, kept = chosen(rows)
        tiles *= triton.cdiv(num_rows, rows)
        x, scales = quantise(x_at, x_stride, num_rows)
        partial_at = counter_at = 0
        if split > 1:
            partial = floats(tiles * split, kept)
            partial_at, counter_at = partial.data_ptr(), counters(device, tiles).data_ptr()
        launch(
            tiles * split, x.data_ptr(), scales.data_ptr(), weight_at, scale_at, bias_at, out_at, partial_at,
            counter_at, num_rows,
        )  # fmt: skip

    return project


def _never(shape: Shape, dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x has dtype {dtype}, not float16, bfloat16 or float32"
    if shape.in_features < 1 or shape.out_features < 1:
        return f"weight has {shape.out_features} by {shape.in_features} elements"
    if shape.in_features % BLOCK:
        return f"weight has {shape.in_features} columns, no multiple of {BLOCK}"
    if shape.gated and shape.out_features % BLOCK:
        return f"weight has {shape.out_features} gates, no multiple of {BLOCK}"
    return None


def part_refuses(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: int
) -> str | None:
    """None if a tensor is as these kernels read it, else why not."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.get_device() != device or not tensor.is_contiguous():
        have = f"{tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()} on {tensor.device}"
        return f"{name} is {have}, expected a contiguous {dtype} {shape}"
    return f"{name} is not aligned to 16 bytes" if tensor.data_ptr() & 15 else None


def parts_refuse(weight: torch.Tensor, scale: torch.Tensor, device: int) -> str | None:
    """None if a weight of two dimensions and its scales are as these kernels read them, else why not."""
    rows, columns = weight.shape
    return part_refuses("weight", weight, (rows, columns), FLOAT8, device) or part_refuses(
        "scale", scale, (triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK)), torch.float32, device
    )


def _refuses(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> str | None:
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        return f"x of shape {tuple(x.shape)} and strides {x.stride()} is not rows of contiguous elements"
    if x.shape[0] > MAX_ROWS:
        return f"x has {x.shape[0]} rows, more than {MAX_ROWS}: a GEMM for many rows is faster"
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        return f"weight of shape {tuple(weight.shape)} is not [out_features, {x.shape[1]}]"
    if gated and weight.shape[0] % 2:
        return f"weight has {weight.shape[0]} rows, which is not as many gates as others"
    rows, columns = weight.shape
    if reason := _never(Shape(columns, rows // 2 if gated else rows, bias is not None, gated), x.dtype):
        return reason
    device = x.get_device()
    if reason := parts_refuse(weight, scale, device):
        return reason
    if bias is not None and (reason := part_refuses("bias", bias, (rows,), x.dtype, device)):
        return reason
    return device_refuses(device)


def block_fp8_linear_refuses(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> str | None:
    """None if `block_fp8_linear` does this, else why not."""
    return _refuses(x, weight, scale, bias, False)


def silu_gated_block_fp8_linear_refuses(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> str | None:
    """None if `silu_gated_block_fp8_linear` does this, else why not."""
    return _refuses(x, weight, scale, bias, True)


def _run(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> torch.Tensor:
    if reason := _refuses(x, weight, scale, bias, gated):
        raise Refused(reason)
    rows, (out_features, in_features) = x.shape[0], weight.shape
    shape = Shape(in_features, out_features // 2 if gated else out_features, bias is not None, gated)
    project = bind_block_fp8_linear(shape, x.dtype, x.get_device())
    out = torch.empty((rows, shape.out_features), dtype=x.dtype, device=x.device)
    if rows:
        bias_at = 0 if bias is None else bias.data_ptr()
        stride = x.stride(0) if rows > 1 else in_features
        project(x.data_ptr(), stride, weight.data_ptr(), scale.data_ptr(), bias_at, out.data_ptr(), rows)
    return out


def block_fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ (weight * scale).T + bias for few rows, x quantised as the weight is, summed in float32 and rounded once.

    x: [num_rows, in_features], at most 512 rows, float16, bfloat16 or float32; rows may lie apart. weight:
    [out_features, in_features] float8_e4m3fn, in_features a multiple of 128. scale: [ceil(out_features / 128),
    in_features / 128] float32, of blocks of the weight. bias: [out_features] of x's dtype, or None. All but x are
    contiguous and aligned to 16 bytes. Every 128 elements of a row have a scale, the largest of them over 448. Returns
    [num_rows, out_features] of x's dtype. The same inputs always give the same bits.

    Stands in for vLLM's `per_token_group_quant_fp8` and the product after it. Raises Refused for what it does not do.
    """
    return _run(x, weight, scale, bias, False)


def silu_gated_block_fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) as `block_fp8_linear` multiplies, where weight is gate above up.

    weight: [2 * intermediate_size, in_features], intermediate_size a multiple of 128; bias: [2 * intermediate_size] or
    None; the rest as in `block_fp8_linear`. Between the products and the result nothing is rounded. Returns
    [num_rows, intermediate_size].

    Stands in for vLLM's quantised `gate_up_proj` and `SiluAndMul` after it. Raises Refused for what it does not do.
    """
    return _run(x, weight, scale, bias, True)


def quantise_reference(x: torch.Tensor) -> torch.Tensor:
    """What remains of x, whose last dimension is a multiple of BLOCK, when it was quantised; in float32."""
    groups = x.float().unflatten(-1, (-1, BLOCK))
    # Divided by a tensor: by a number PyTorch multiplies with its reciprocal on a GPU, and rounds twice.
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / groups.new_tensor(LARGEST)
    inside = (groups / scale).clamp(-LARGEST, LARGEST).to(FLOAT8)
    return inside.to(x.dtype).mul(scale.to(x.dtype)).flatten(-2)


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight [..., rows, columns] times the scales of its blocks, in the dtype of the scales."""
    rows, columns = weight.shape[-2:]
    whole = scale.repeat_interleave(BLOCK, dim=-2)[..., :rows, :].repeat_interleave(BLOCK, dim=-1)[..., :columns]
    return weight.to(scale.dtype) * whole


def block_fp8_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor]:
    y = quantise_reference(x) @ dequantised(weight, scale).to(x.dtype).T
    return (y if bias is None else y + bias,)


def silu_gated_block_fp8_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor]:
    gate, up = block_fp8_linear_reference(x, weight, scale, bias)[0].chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up,)


# The linear layers of a decoder layer: of latent attention, of the first layers' MLP, and of the shared experts.
PROJECTIONS: dict[str, dict[str, Shape]] = {
    "deepseek-v3": {
        "qkv_a": Shape(7168, 2112),
        "q_b": Shape(1536, 24576),
        "o": Shape(16384, 7168),
        "gate_up": Shape(7168, 18432, gated=True),
        "down": Shape(18432, 7168),
        "shared gate_up": Shape(7168, 2048, gated=True),
        "shared down": Shape(2048, 7168),
    },
}
ROWS = (1, 64)  # the least and the most that they are for


def _cases(gated: bool) -> tuple[Case, ...]:
    return (
        Case("one row", {"rows": 1, "in": 128, "out": 128}),
        Case("several", {"rows": 5, "in": 384, "out": 256, "bias": True}),
        *(() if gated else (Case("columns of half a block", {"rows": 9, "in": 256, "out": 200, "bias": True}),)),
        *(() if gated else (Case("few columns", {"rows": 3, "in": 128, "out": 7}),)),
        Case("several tiles of rows", {"rows": 67, "in": 128, "out": 128}),
        Case("rows apart", {"rows": 3, "in": 256, "out": 128, "gap": 33}),
        Case("split", {"rows": 7, "in": 1024, "out": 128, "bias": True}),
        Case("uneven split", {"rows": 2, "in": 1152, "out": 128}),
        Case("empty", {"rows": 0, "in": 128, "out": 128}),
        *(
            Case(f"{model} {name} {rows}", {"rows": rows, "in": each.in_features, "out": each.out_features,
                 "model": model}, bench=True)
            for model, layers in PROJECTIONS.items()
            for name, each in layers.items()
            for rows in ROWS
            if each.gated is gated
        ),
    )  # fmt: skip


def random_weight(shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of float8's whole range and its blocks' scales, all different, that keep activations near one."""
    *batch, rows, columns = shape
    weight = (torch.randn(shape, device=device) * LARGEST / 4).clamp(-LARGEST, LARGEST).to(FLOAT8)
    scale = (0.5 + torch.rand(*batch, triton.cdiv(rows, BLOCK), columns // BLOCK, device=device)) * columns**-0.5
    return weight, scale * (4 / LARGEST)


def _inputs(gated: bool) -> Callable[[Case, str, str], dict[str, Any]]:
    def inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
        rows, in_features, out_features = case["rows"], case["in"], case["out"] * (2 if gated else 1)
        gap = case.get("gap")
        x = strided((rows, in_features), dtype, device, gap) if gap else randn((rows, in_features), dtype, device)
        weight, scale = random_weight((out_features, in_features), device)
        bias = randn((out_features,), dtype, device) if case.get("bias") else None
        return {"x": x, "weight": weight, "scale": scale, "bias": bias}

    return inputs


def _builds(gated: bool) -> Callable[[Case, str], Iterator[Build]]:
    def builds(case: Case, dtype: str) -> Iterator[Build]:
        shape, kind = Shape(case["in"], case["out"], bool(case.get("bias")), gated), dtype_of(dtype)
        rows = rows_class(max(case["rows"], 1))
        for aligned in (True, False):
            yield quantise_build(shape.in_features, kind, aligned)
        yield build_of(shape, rows, default_tiling(shape, rows), kind)

    return builds


def _fake(gated: bool) -> Callable[..., torch.Tensor]:
    def fake(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return x.new_empty((x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0]))

    return fake


def _traffic(gated: bool) -> Callable[..., int]:
    def traffic(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> int:
        width = weight.shape[0] // 2 if gated else weight.shape[0]
        return nbytes(x, weight, scale, bias) + x.shape[0] * width * x.element_size()

    return traffic


_DTYPES = ("bfloat16",)  # in which such models are served

BLOCK_FP8_LINEAR = Kernel(
    name="block_fp8_linear",
    op=block_fp8_linear,
    reference=block_fp8_linear_reference,
    refuses=block_fp8_linear_refuses,
    inputs=_inputs(False),
    results=("return",),
    cases=_cases(False),
    builds=_builds(False),
    schema="block_fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
    fake=_fake(False),
    traffic=_traffic(False),
    dtypes=_DTYPES,
)

SILU_GATED_BLOCK_FP8_LINEAR = Kernel(
    name="silu_gated_block_fp8_linear",
    op=silu_gated_block_fp8_linear,
    reference=silu_gated_block_fp8_linear_reference,
    refuses=silu_gated_block_fp8_linear_refuses,
    inputs=_inputs(True),
    results=("return",),
    cases=_cases(True),
    builds=_builds(True),
    schema="silu_gated_block_fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
    fake=_fake(True),
    traffic=_traffic(True),
    dtypes=_DTYPES,
)

KERNELS = (BLOCK_FP8_LINEAR, SILU_GATED_BLOCK_FP8_LINEAR)
