"""RMS normalisation, alone and fused with the residual addition before it; Gemma's variant of both.

One device function serves all four: the residual, the weight's form and the place of the results are constexprs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..errors import Refused
from ..launch import Build, Launch, allocator, launcher, pointer
from ..nouns import Case, Kernel, Settled
from .common import TOKENS, nbytes, power_of_two, randn, rows_of, strided

# One program keeps a whole row in registers; beyond this they spill.
MAX_HIDDEN_SIZE = 16384


@triton.jit
def _rms_norm_kernel(
    # Tensors
    x_ptr,  # [num_rows, HIDDEN], row r at (r // INNER) * x_outer_stride + (r % INNER) * x_inner_stride
    residual_ptr,  # [num_rows, HIDDEN] or None
    weight_ptr,  # [HIDDEN] or None
    out_ptr,  # like x in place, else [num_rows, HIDDEN] contiguous
    residual_out_ptr,  # like residual in place, else [num_rows, HIDDEN] contiguous; None without a residual
    # Scalars
    num_rows,
    x_outer_stride,
    x_inner_stride,
    residual_stride,
    epsilon,
    # Constexprs
    HIDDEN: tl.constexpr,
    VARIANCE_SIZE: tl.constexpr,  # leading elements that the variance is taken over
    INNER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    GEMMA: tl.constexpr,  # the weight is an offset from one, applied in float32
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    col_live = col < HIDDEN
    live = col_live
    if ROWS > 1:
        live = col_live & (row < num_rows)
    if INNER == 1:
        x_at = row * x_outer_stride + col
    else:
        x_at = (row // INNER) * x_outer_stride + (row % INNER) * x_inner_stride + col
    dense_at = row * HIDDEN + col

    if HAS_WEIGHT:
        # Asked for before the reduction, so that it is there when the reduction is done.
        weight = tl.load(weight_ptr + col, mask=col_live, other=0.0)
    x = tl.load(x_ptr + x_at, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_at = row * residual_stride + col
        x += tl.load(residual_ptr + residual_at, mask=live, other=0.0).to(tl.float32)
        residual_out_at = residual_at if IN_PLACE else dense_at
        # What is normalised is the sum itself: as vLLM's native form and Inductor's code have it, its C++ op has not.
        tl.store(residual_out_ptr + residual_out_at, x.to(residual_out_ptr.dtype.element_ty), mask=live)

    if VARIANCE_SIZE == HIDDEN:
        square = x * x
    else:
        square = tl.where(col < VARIANCE_SIZE, x * x, 0.0)
    scale = tl.rsqrt(tl.sum(square, axis=1, keep_dims=True) / VARIANCE_SIZE + epsilon)
    y = x * scale
    if GEMMA:
        y *= weight.to(tl.float32) + 1.0
    elif HAS_WEIGHT:
        y *= weight.to(tl.float32)
    out_at = x_at if IN_PLACE else dense_at
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=live)


# From this many rows on, the GPU is full.
_MANY_ROWS = 512
# Rows up to this long share a program.
_SHORT = 1024


def _tiling(hidden_size: int, residual: bool, many: bool) -> tuple[int, int]:
    """(rows per program, warps), from measurements on an H100 with rows of 128 and of 3584 to 7168 elements.

    A few rows: 16 elements a thread, the quickest way through one row. Many: 64 with a residual, 32 without (in rows of
    more than 4096), because fewer warps wait for one another at the reduction: up to 6% at 512 rows, 1% at 2048. Short
    rows share a program, few or many: one program each takes three times as long from 65536 on.
    """
    block = power_of_two(hidden_size)
    if block <= _SHORT:
        return 2048 // block, 8
    if many or block > 8192:
        return 1, max(4, block // 2048) if residual else max(8, block // 1024)
    return 1, block // 512


def _build(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    hidden_size: int,
    variance_size: int | None,
    gemma: bool,
    residual: bool,
    in_place: bool,
    inner: int = 1,
    many: bool = False,
    aligned: bool = True,
) -> Build:
    # Gemma's product in float32 takes registers that 64 elements a thread do not leave, and so do narrow loads.
    rows, num_warps = _tiling(hidden_size, residual and not gemma and aligned, many)
    x = pointer(dtype)
    return Build(
        function=_rms_norm_kernel,
        types=(
            x,
            x if residual else None,
            None if weight_dtype is None else pointer(weight_dtype),
            x,
            x if residual else None,
            "i32",
            "i32/16",
            "i32/16",
            "i32/16",
            "fp32",
        ),
        constexprs=(
            ("HIDDEN", hidden_size),
            ("VARIANCE_SIZE", variance_size or hidden_size),
            ("INNER", inner),
            ("HAS_WEIGHT", weight_dtype is not None),
            ("HAS_RESIDUAL", residual),
            ("IN_PLACE", in_place),
            ("GEMMA", gemma),
            ("ROWS", rows),
            ("BLOCK", power_of_two(hidden_size)),
        ),
        aligned=aligned,
        num_warps=num_warps,
        # Without wide loads the addresses take more registers than the assembler would give for its occupancy.
        maxnreg=None if aligned else 128,
    )


def _never(hidden_size: int, variance_size: int | None, weight_dtype: torch.dtype | None) -> str | None:
    """Why no call with these can be done; None if some can."""
    if not 0 < hidden_size <= MAX_HIDDEN_SIZE:
        return f"hidden_size {hidden_size} is not between 1 and {MAX_HIDDEN_SIZE}"
    if variance_size is not None and not 0 < variance_size <= hidden_size:
        return f"variance_size {variance_size} is not between 1 and hidden_size {hidden_size}"
    if weight_dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        return f"weight has dtype {weight_dtype}, not float16, bfloat16 or float32"
    return None


def _not_rows(name: str, x: torch.Tensor) -> str:
    return f"{name} of shape {tuple(x.shape)} and strides {x.stride()} is not rows of contiguous elements"


def _unlike(name: str, x: torch.Tensor, dtype: torch.dtype, device: int, hidden_size: int) -> str:
    have = f"{x.dtype} [..., {x.shape[-1] if x.dim() else '-'}] on device {x.get_device()}"
    return f"{name} is {have}, expected {dtype} [..., {hidden_size}] on device {device}"


def _launches(
    device: int, *args: Any
) -> tuple[Launch, int, Callable[[int, int, int], tuple[Launch, int]]]:
    """(the launch for aligned rows, one a program, below how many rows it is the right one,
    (rows, inner, misaligned bits) -> (launch, grid) for all others).

    `args` are those of `_build` up to `in_place`. Both tilings of aligned rows are compiled here, others at first use.
    """

    @functools.cache
    def tiled(inner: int, many: bool, aligned: bool) -> tuple[Launch, int]:
        build = _build(*args, inner, many, aligned)  # type: ignore[call-arg]
        return launcher(build, device), dict(build.constexprs)["ROWS"]

    def pick(rows: int, inner: int, misaligned: int) -> tuple[Launch, int]:
        launch, per_program = tiled(inner, rows >= _MANY_ROWS, not misaligned)
        return launch, (rows + per_program - 1) // per_program

    tiled(1, True, True)
    few, per_program = tiled(1, False, True)
    return few, _MANY_ROWS if per_program == 1 else 0, pick


@functools.cache
def bind_rms_norm(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    hidden_size: int,
    epsilon: float,
    variance_size: int | None,
    gemma: bool,
    device: int,
) -> Callable[..., torch.Tensor]:
    """`rms_norm` with everything settled that a layer knows for ever: call(x, weight, out=None) -> out.

    What contiguous input needs is compiled now. The call checks what can still change, and raises Refused for what it
    does not do.
    """
    if reason := _never(hidden_size, variance_size, weight_dtype):
        raise Refused(reason)
    few, below, pick = _launches(device, dtype, weight_dtype, hidden_size, variance_size, gemma, False, False)
    empty = allocator(device, dtype)

    def call(x: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        shape = x.shape
        if x.dtype is not dtype or x.get_device() != device or shape[-1] != hidden_size:
            raise Refused(_unlike("x", x, dtype, device, hidden_size))
        if x.is_contiguous():
            rows, inner, outer_stride, inner_stride = x.numel() // hidden_size, 1, hidden_size, 0
        elif (found := rows_of(x)) is not None:
            rows, inner, outer_stride, inner_stride = found
        else:
            raise Refused(_not_rows("x", x))
        result = empty(rows, hidden_size) if out is None else out
        x_at, out_at = x.data_ptr(), result.data_ptr()
        weight_at = 0 if weight is None else weight.data_ptr()
        misaligned = (x_at | weight_at | out_at | outer_stride | inner_stride) & 15
        if inner == 1 and rows < below and not misaligned:
            launch, grid = few, rows
        else:
            launch, grid = pick(rows, inner, misaligned)
        launch(grid, x_at, 0, weight_at, out_at, 0, rows, outer_stride, inner_stride, 0, epsilon)
        return result if out is not None or len(shape) == 2 else result.view(shape)

    return call


@functools.cache
def bind_fused_add_rms_norm(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    hidden_size: int,
    epsilon: float,
    variance_size: int | None,
    gemma: bool,
    in_place: bool,
    device: int,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`fused_add_rms_norm` with everything settled: call(x, residual, weight) -> (normalised, new residual).

    In place the results are x and residual themselves, else new contiguous tensors.
    """
    if reason := _never(hidden_size, variance_size, weight_dtype):
        raise Refused(reason)
    few, below, pick = _launches(device, dtype, weight_dtype, hidden_size, variance_size, gemma, True, in_place)
    empty = allocator(device, dtype)

    def call(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = x.shape
        if x.dtype is not dtype or x.get_device() != device or shape[-1] != hidden_size:
            raise Refused(_unlike("x", x, dtype, device, hidden_size))
        if residual.dtype is not dtype or residual.get_device() != device or residual.shape != shape:
            raise Refused(_unlike("residual", residual, dtype, device, hidden_size))
        if x.is_contiguous() and residual.is_contiguous():
            rows, inner, outer_stride, inner_stride = x.numel() // hidden_size, 1, hidden_size, 0
            residual_stride = hidden_size
        else:
            found, beside = rows_of(x), rows_of(residual)
            if found is None:
                raise Refused(_not_rows("x", x))
            if beside is None or beside[1] != 1:
                raise Refused(_not_rows("residual", residual))
            rows, inner, outer_stride, inner_stride = found
            residual_stride = beside[2]
        x_at, residual_at = x.data_ptr(), residual.data_ptr()
        weight_at = 0 if weight is None else weight.data_ptr()
        if in_place:
            out, residual_out, out_at, residual_out_at = x, residual, x_at, residual_at
        else:
            out, residual_out = empty(rows, hidden_size), empty(rows, hidden_size)
            out_at, residual_out_at = out.data_ptr(), residual_out.data_ptr()
            if len(shape) != 2:
                out, residual_out = out.view(shape), residual_out.view(shape)
        bits = x_at | residual_at | weight_at | out_at | residual_out_at
        misaligned = (bits | outer_stride | inner_stride | residual_stride) & 15
        if inner == 1 and rows < below and not misaligned:
            launch, grid = few, rows
        else:
            launch, grid = pick(rows, inner, misaligned)
        launch(
            grid, x_at, residual_at, weight_at, out_at, residual_out_at,
            rows, outer_stride, inner_stride, residual_stride, epsilon,
        )  # fmt: skip
        return out, residual_out

    return call


@functools.cache
def bind_norm_rows(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    hidden_size: int,
    epsilon: float,
    residual: bool,
    in_place: bool,
    device: int,
    x_stride: int | None = None,
) -> Callable[[int, int, int, int, int, int], None]:
    """Both norms by addresses of contiguous rows, for those who have checked them: what a call settles is settled here.

    norm(x_at, residual_at, weight_at, out_at, residual_out_at, num_rows); 0 for what there is not. In place, out is x
    and residual_out is residual. x_stride: elements from one row of x to the next, if it is not contiguous.
    """
    if reason := _never(hidden_size, None, weight_dtype):
        raise Refused(reason)
    few, below, pick = _launches(device, dtype, weight_dtype, hidden_size, None, False, residual, in_place)
    stride, x_stride = hidden_size if residual else 0, hidden_size if x_stride is None else x_stride

    def norm(x_at: int, residual_at: int, weight_at: int, out_at: int, residual_out_at: int, num_rows: int) -> None:
        launch, grid = few, num_rows
        misaligned = (x_at | residual_at | weight_at | out_at | residual_out_at | hidden_size | x_stride) & 15
        if num_rows >= below or misaligned:
            launch, grid = pick(num_rows, 1, misaligned)
        launch(
            grid, x_at, residual_at, weight_at, out_at, residual_out_at, num_rows, x_stride, 0, stride, epsilon
        )  # fmt: skip

    return norm


def rms_norm_refuses(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
    out: torch.Tensor | None = None,
) -> str | None:
    """None if `rms_norm` does this, else why not."""
    if x.dim() == 0:
        return "x has no dimension to normalise over"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x has dtype {x.dtype}, not float16, bfloat16 or float32"
    hidden_size = x.shape[-1]
    if reason := _never(hidden_size, variance_size, None if weight is None else weight.dtype):
        return reason
    if weight is not None and (
        weight.shape != (hidden_size,) or weight.device != x.device or not weight.is_contiguous()
    ):
        have = f"{tuple(weight.shape)} on {weight.device} with strides {weight.stride()}"
        return f"weight is {have}, expected a contiguous ({hidden_size},) on {x.device}"
    if rows_of(x) is None:
        return _not_rows("x", x)
    if out is not None and (
        out.shape != x.shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous()
    ):
        return f"out is not a contiguous {x.dtype} tensor of x's shape {tuple(x.shape)} on {x.device}"
    return None


def fused_add_rms_norm_refuses(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> str | None:
    """None if `fused_add_rms_norm` does this, else why not."""
    if reason := rms_norm_refuses(x, weight, epsilon, variance_size):
        return reason
    if residual.dtype != x.dtype or residual.device != x.device or residual.shape != x.shape:
        return _unlike("residual", residual, x.dtype, x.get_device(), x.shape[-1])
    rows = rows_of(residual)
    return None if rows is not None and rows[1] == 1 else _not_rows("residual", residual)


def _accept(reason: str | None) -> None:
    if reason is not None:
        raise Refused(reason)


def settle_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
    out: torch.Tensor | None = None,
) -> Settled[torch.Tensor]:
    """`rms_norm` for arguments that look like these; raises Refused."""
    _accept(rms_norm_refuses(x, weight, epsilon, variance_size, out))
    dtype = None if weight is None else weight.dtype
    call = bind_rms_norm(x.dtype, dtype, x.shape[-1], epsilon, variance_size, False, x.get_device())
    return lambda args: call(args[0], args[1], args[4])


def settle_fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> Settled[None]:
    """`fused_add_rms_norm` for arguments that look like these; raises Refused."""
    _accept(fused_add_rms_norm_refuses(x, residual, weight, epsilon, variance_size))
    dtype = None if weight is None else weight.dtype
    call = bind_fused_add_rms_norm(
        x.dtype, dtype, x.shape[-1], epsilon, variance_size, False, True, x.get_device()
    )

    def run(args: tuple[Any, ...]) -> None:
        call(args[0], args[1], args[2])

    return run


def settle_gemma_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> Settled[torch.Tensor]:
    """`gemma_rms_norm` for arguments that look like these; raises Refused."""
    _accept(rms_norm_refuses(x, weight, epsilon))
    call = bind_rms_norm(x.dtype, weight.dtype, x.shape[-1], epsilon, None, True, x.get_device())
    return lambda args: call(args[0], args[1])


def settle_gemma_fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> Settled[tuple[torch.Tensor, torch.Tensor]]:
    """`gemma_fused_add_rms_norm` for arguments that look like these; raises Refused."""
    _accept(fused_add_rms_norm_refuses(x, residual, weight, epsilon))
    call = bind_fused_add_rms_norm(
        x.dtype, weight.dtype, x.shape[-1], epsilon, None, True, False, x.get_device()
    )
    return lambda args: call(args[0], args[1], args[2])


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight * x / sqrt(mean(x**2) + epsilon) over the last dimension (https://arxiv.org/abs/1910.07467).

    x: [..., hidden_size], float16, bfloat16 or float32; rows may lie apart (strided views of q or k), elements of a row
    may not. weight: [hidden_size], None for ones, of x's dtype or another. variance_size: the mean is over that many
    leading elements. out: a contiguous tensor of x's shape and dtype to write, else a new one. Computed in float32 and
    rounded once. Returns out.

    Stands in for `torch.ops._C.rms_norm` and `vllm.ir.ops.rms_norm`. Raises Refused for what it does not do.
    """
    args = x, weight, epsilon, variance_size, out
    return settle_rms_norm(*args)(args)


def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> None:
    """residual += x; x = rms_norm(residual), both in place; what is normalised is the sum before it is rounded.

    x, residual: [..., hidden_size] of one dtype, rows may lie apart. The rest as in `rms_norm`.

    Stands in for `torch.ops._C.fused_add_rms_norm`. Raises Refused for what it does not do.
    """
    args = x, residual, weight, epsilon, variance_size
    settle_fused_add_rms_norm(*args)(args)


def gemma_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(1 + weight) * x / sqrt(mean(x**2) + epsilon), all in float32 and rounded once, as Gemma trains it.

    x: [..., hidden_size] as in `rms_norm`; weight: [hidden_size], any of the three dtypes. Returns a new tensor.

    Stands in for vLLM's `GemmaRMSNorm`. Raises Refused for what it does not do.
    """
    args = x, weight, epsilon
    return settle_gemma_rms_norm(*args)(args)


def gemma_fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gemma_rms_norm(x + residual), x + residual) as two new tensors, the sum kept in float32 for the normalisation.

    Not in place, because vLLM's `GemmaRMSNorm` is not. Raises Refused for what it does not do.
    """
    args = x, residual, weight, epsilon
    return settle_gemma_fused_add_rms_norm(*args)(args)


def _normalised(x: torch.Tensor, epsilon: float, variance_size: int | None) -> torch.Tensor:
    head = x if variance_size is None else x[..., :variance_size]
    return x * torch.rsqrt(head.pow(2).mean(dim=-1, keepdim=True) + epsilon)


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor]:
    y = _normalised(x, epsilon, variance_size)
    return (y if weight is None else y * weight,)


def fused_add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, epsilon, variance_size)[0], total


def gemma_rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor]:
    return (_normalised(x, epsilon, None) * (1 + weight),)


def gemma_fused_add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return gemma_rms_norm_reference(x + residual, weight, epsilon)[0], x + residual


# Hidden sizes of Qwen2.5-7B, Llama-3.1-8B and DeepSeek-V3.
_MODELS = {"qwen2.5-7b": 3584, "llama-3.1-8b": 4096, "deepseek-v3": 7168}

_CASES = (
    Case("one row", {"shape": (1, 128)}),
    Case("power of two", {"shape": (7, 256)}),
    Case("odd size", {"shape": (5, 769)}),
    Case("one element", {"shape": (3, 1)}),
    Case("empty", {"shape": (0, 64)}),
    Case("no weight", {"shape": (4, 192), "weight": None}),
    Case("float32 weight", {"shape": (4, 192), "weight": "float32"}),
    Case("rows apart", {"shape": (6, 96), "gap": 32}),
    Case("odd offset", {"shape": (6, 96), "gap": 5, "offset": 3}),
    Case("four dimensions", {"shape": (2, 3, 2, 64)}),
    Case("variance of a part", {"shape": (4, 128), "variance_size": 48}),
    Case("many short rows", {"shape": (2053, 32)}),
    Case("q heads", {"shape": (5, 4, 64), "gap": 0, "of": 10}),
    Case("wide", {"shape": (2, 7168)}),
    *(
        Case(f"{model} {tokens}", {"shape": (tokens, hidden), "model": model}, bench=True)
        for model, hidden in _MODELS.items()
        for tokens in TOKENS
    ),
)


def _x(case: Case, dtype: str, device: str) -> torch.Tensor:
    shape = case["shape"]
    if heads := case.get("of"):  # the first heads of a wider projection, as q is of qkv
        return randn((shape[0], heads, shape[2]), dtype, device)[:, : shape[1]]
    if "gap" in case.params:
        return strided(shape, dtype, device, case["gap"], case.get("offset", 0))
    return randn(shape, dtype, device)


def _weight(case: Case, dtype: str, device: str) -> torch.Tensor | None:
    kind = case.get("weight", dtype)
    return None if kind is None else 1 + randn(case["shape"][-1:], kind, device, scale=0.2)


def _rms_norm_inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    return {
        "x": _x(case, dtype, device),
        "weight": _weight(case, dtype, device),
        "epsilon": 1e-6,
        "variance_size": case.get("variance_size"),
    }


def _fused_inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    inputs = _rms_norm_inputs(case, dtype, device)
    return {"x": inputs.pop("x"), "residual": randn(case["shape"], dtype, device), **inputs}


def _gemma(inputs: dict[str, Any]) -> dict[str, Any]:
    del inputs["variance_size"]
    inputs["weight"] = inputs["weight"] - 1
    return inputs


def _builds(
    residual: bool, in_place: bool, gemma: bool
) -> Callable[[Case, str], Iterator[Build]]:
    def builds(case: Case, dtype: str) -> Iterator[Build]:
        weight = case.get("weight", dtype)
        inner = case["shape"][1] if "of" in case.params else 1
        for many in (False, True):
            for is_aligned in (True, False):
                yield _build(
                    getattr(torch, dtype), None if weight is None else getattr(torch, weight), case["shape"][-1],
                    case.get("variance_size"), gemma, residual, in_place, inner, many, is_aligned,
                )  # fmt: skip

    return builds


def _rms_norm_stock(
    op: Callable[..., None], x: torch.Tensor, weight: torch.Tensor, epsilon: float, variance_size: None
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    op(out, x, weight, epsilon)
    return out


def _fused_stock(
    op: Callable[..., None],
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    variance_size: None,
) -> None:
    op(x, residual, weight, epsilon)


_GEMMA_CASES = tuple(
    case for case in _CASES if case.get("weight", "") is not None and "variance_size" not in case.params
)

RMS_NORM = Kernel(
    name="rms_norm",
    op=rms_norm,
    settle=settle_rms_norm,
    reference=rms_norm_reference,
    refuses=rms_norm_refuses,
    inputs=_rms_norm_inputs,
    results=("return",),
    cases=_CASES,
    builds=_builds(residual=False, in_place=False, gemma=False),
    schema="rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor",
    fake=lambda x, weight, epsilon, variance_size=None: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    stock="_C::rms_norm",
    stock_call=_rms_norm_stock,
    traffic=lambda x, weight, **_: 2 * nbytes(x) + nbytes(weight),
)

FUSED_ADD_RMS_NORM = Kernel(
    name="fused_add_rms_norm",
    op=fused_add_rms_norm,
    settle=settle_fused_add_rms_norm,
    reference=fused_add_rms_norm_reference,
    refuses=fused_add_rms_norm_refuses,
    inputs=_fused_inputs,
    results=("x", "residual"),
    cases=_CASES,
    builds=_builds(residual=True, in_place=True, gemma=False),
    schema="fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, float epsilon, "
    "SymInt? variance_size=None) -> ()",
    fake=lambda x, residual, weight, epsilon, variance_size=None: None,
    stock="_C::fused_add_rms_norm",
    stock_call=_fused_stock,
    traffic=lambda x, weight, **_: 4 * nbytes(x) + nbytes(weight),
)

GEMMA_RMS_NORM = Kernel(
    name="gemma_rms_norm",
    op=gemma_rms_norm,
    settle=settle_gemma_rms_norm,
    reference=gemma_rms_norm_reference,
    refuses=rms_norm_refuses,
    inputs=lambda case, dtype, device: _gemma(_rms_norm_inputs(case, dtype, device)),
    results=("return",),
    cases=_GEMMA_CASES,
    builds=_builds(residual=False, in_place=False, gemma=True),
    schema="gemma_rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor",
    fake=lambda x, weight, epsilon: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    traffic=lambda x, weight, **_: 2 * nbytes(x) + nbytes(weight),
)

GEMMA_FUSED_ADD_RMS_NORM = Kernel(
    name="gemma_fused_add_rms_norm",
    op=gemma_fused_add_rms_norm,
    settle=settle_gemma_fused_add_rms_norm,
    reference=gemma_fused_add_rms_norm_reference,
    refuses=fused_add_rms_norm_refuses,
    inputs=lambda case, dtype, device: _gemma(_fused_inputs(case, dtype, device)),
    results=("return.0", "return.1"),
    cases=_GEMMA_CASES,
    builds=_builds(residual=True, in_place=False, gemma=True),
    schema="gemma_fused_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    fake=lambda x, residual, weight, epsilon: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
    ),
    traffic=lambda x, weight, **_: 4 * nbytes(x) + nbytes(weight),
)

KERNELS = (RMS_NORM, FUSED_ADD_RMS_NORM, GEMMA_RMS_NORM, GEMMA_FUSED_ADD_RMS_NORM)
