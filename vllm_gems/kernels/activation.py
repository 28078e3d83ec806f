"""Activations: gated (one half of the input times a function of the other) and plain, one device function for all.

A row of `_FORMULAS` is an activation. Formulas are evaluated in float32; where vLLM rounds the activated half to the
input's dtype before the product, so do we.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, the field's name for it
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..errors import Refused
from ..launch import Build, Launch, allocator, launcher, pointer
from ..nouns import Case, Kernel, Settled
from .common import TOKENS, nbytes, power_of_two, randn, rows_of, strided


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@triton.jit
def _apply(x, FORMULA: tl.constexpr, A: tl.constexpr):
    """The activation named FORMULA of x, in float32. A is its parameter, if it has one.

    In PyTorch's order of operations and with its functions, so that results are its own to the last bit (but for erf,
    whose libraries differ in it).
    """
    if FORMULA == "silu":
        y = tl.div_rn(x, 1.0 + libdevice.exp(-x))
    elif FORMULA == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FORMULA == "gelu_tanh":
        y = 0.5 * x * (1.0 + libdevice.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif FORMULA == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    elif FORMULA == "fatrelu":
        y = tl.where(x > A, x, 0.0)
    else:
        tl.static_assert(False, "unknown activation formula")
    return y


@triton.jit
def _activation_kernel(
    # Tensors
    x_ptr,  # gated: [rows, 2 * WIDTH]; plain: [num_elements]
    out_ptr,  # gated: [rows, WIDTH]; plain: [num_elements]
    # Scalars
    num_elements,  # plain only
    x_stride,  # between rows, gated only
    # Constexprs
    WIDTH: tl.constexpr,  # of a gated row's half; 0 if plain
    FORMULA: tl.constexpr,
    ORDER: tl.constexpr,  # where the activated half is: "first", "second", "pairs" (interleaved), "" if plain
    A: tl.constexpr,
    LIMIT: tl.constexpr,  # clamp: gate from above, the other from both sides; infinity for none
    BETA: tl.constexpr,  # added to the other half
    ROUND: tl.constexpr,  # round the activated half to x's dtype before the product
    BLOCK: tl.constexpr,
):
    if ORDER == "":
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = at < num_elements
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, _apply(x, FORMULA, A).to(out_ptr.dtype.element_ty), mask=live)
    else:
        BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
        row = (tl.program_id(0) // BLOCKS).to(tl.int64)
        col = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        live = col < WIDTH
        x_row = x_ptr + row * x_stride
        if ORDER == "pairs":
            # Neighbours are read together and parted in registers, so that the reads stay contiguous.
            both = (tl.program_id(0) % BLOCKS) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
            pairs = tl.load(x_row + both, mask=both < 2 * WIDTH, other=0.0)
            gate, other = tl.split(tl.reshape(pairs, (BLOCK, 2)))
        elif ORDER == "first":
            gate = tl.load(x_row + col, mask=live, other=0.0)
            other = tl.load(x_row + WIDTH + col, mask=live, other=0.0)
        else:
            other = tl.load(x_row + col, mask=live, other=0.0)
            gate = tl.load(x_row + WIDTH + col, mask=live, other=0.0)
        gate = gate.to(tl.float32)
        other = other.to(tl.float32)
        if LIMIT != float("inf"):  # noqa: SIM300
            gate = tl.minimum(gate, LIMIT)
            other = tl.minimum(tl.maximum(other, -LIMIT), LIMIT)
        if FORMULA == "swish":
            y = gate * _sigmoid(A * gate)
        else:
            y = _apply(gate, FORMULA, A)
        if ROUND:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y *= other + BETA
        tl.store(out_ptr + row * WIDTH + col, y.to(out_ptr.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class _Formula:
    """One activation: how the device function computes it, and what its op is called with after x."""

    name: str
    formula: str
    order: str  # "first", "second", "pairs" or "" as in the device function
    meaning: str  # for the docstring, with the halves called gate and up
    reference: Callable[..., torch.Tensor]  # (gate, up, *params) or (x,)
    rounds: bool = False
    params: tuple[tuple[str, float | None], ...] = ()  # name, default (None: must be given)
    constants: Callable[..., tuple[float, float, float]] = lambda: (0.0, math.inf, 0.0)  # params -> A, LIMIT, BETA


def _clamped(gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float, beta: float) -> torch.Tensor:
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + beta)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_FORMULAS = (
    _Formula("silu_and_mul", "silu", "first", "silu(gate) * up", lambda g, u: F.silu(g) * u, rounds=True),
    _Formula("mul_and_silu", "silu", "second", "up * silu(gate)", lambda g, u: F.silu(g) * u, rounds=True),
    _Formula("gelu_and_mul", "gelu", "first", "gelu(gate) * up", lambda g, u: F.gelu(g) * u, rounds=True),
    _Formula(
        "gelu_tanh_and_mul", "gelu_tanh", "first", "gelu(gate, approximate='tanh') * up",
        lambda g, u: _gelu_tanh(g) * u, rounds=True,
    ),
    _Formula(
        "fatrelu_and_mul", "fatrelu", "first", "(gate if gate > threshold else 0) * up",
        lambda g, u, threshold: F.threshold(g, threshold, 0.0) * u, rounds=True,
        params=(("threshold", None),), constants=lambda threshold: (threshold, math.inf, 0.0),
    ),
    _Formula(
        "swigluoai_and_mul", "swish", "pairs",
        "g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = clamp(up, -limit, limit)",
        lambda g, u, alpha, limit: _clamped(g, u, limit, alpha, 1.0),
        params=(("alpha", 1.702), ("limit", 7.0)), constants=lambda alpha, limit: (alpha, limit, 1.0),
    ),
    _Formula(
        "silu_and_mul_with_clamp", "swish", "first",
        "g * sigmoid(alpha * g) * (u + beta), g = min(gate, limit), u = clamp(up, -limit, limit)",
        _clamped,
        params=(("limit", None), ("alpha", 1.0), ("beta", 0.0)),
        constants=lambda limit, alpha, beta: (alpha, limit, beta),
    ),
    _Formula("gelu_new", "gelu_tanh", "", "gelu(x, approximate='tanh')", _gelu_tanh),
    _Formula("gelu_fast", "gelu_tanh", "", "gelu(x, approximate='tanh')", _gelu_tanh),
    _Formula("gelu_quick", "quick_gelu", "", "x * sigmoid(1.702 * x)", lambda x: x * torch.sigmoid(1.702 * x)),
)  # fmt: skip
_BY_NAME = {row.name: row for row in _FORMULAS}


# From this many elements of the result on, the GPU is full. Measured on an H100 with rows of 14336 to 18944: below, 4
# elements a thread beat 8 by 2% to 4%; above, 8 (one 16-byte access) are within 2% of the best, 1% from 512 rows on.
_MANY_ELEMENTS = 1 << 20
_PER_THREAD = {False: 4, True: 8}  # by whether there are many


def _tiling(width: int, many: bool) -> tuple[int, int]:
    """(elements of the result per program, warps)."""
    block = min(1024, max(256, power_of_two(width))) if width else 1024
    return block, block // (32 * _PER_THREAD[many])


def _build(
    name: str, dtype: torch.dtype, width: int, params: tuple[float, ...], many: bool = False, aligned: bool = True,
    rounds: bool | None = None,
) -> Build:  # fmt: skip
    row = _BY_NAME[name]
    a, limit, beta = row.constants(*params)
    block, num_warps = _tiling(width, many)
    return Build(
        function=_activation_kernel,
        types=(pointer(dtype), pointer(dtype), "i32", "i32/16"),
        constexprs=(
            ("WIDTH", width),
            ("FORMULA", row.formula),
            ("ORDER", row.order),
            ("A", a),
            ("LIMIT", limit),
            ("BETA", beta),
            ("ROUND", row.rounds if rounds is None else rounds),
            ("BLOCK", block),
        ),
        aligned=aligned,
        num_warps=num_warps,
    )


@functools.cache
def bind_gated_rows(
    name: str, dtype: torch.dtype, width: int, params: tuple[float, ...], device: int, rounds: bool | None = None
) -> Callable[[int, int, int, int], None]:
    """A gated activation by addresses: activate(x_at, x_stride, out_at, num_rows), for those who have checked them.

    x: num_rows rows of 2 * width elements, x_stride elements from one to the next; out: [num_rows, width], contiguous.
    rounds: whether the activated half is rounded before the product; None: where vLLM's op does that.
    """
    block, _ = _tiling(width, True)
    blocks = (width + block - 1) // block  # of a row

    @functools.cache
    def launch_for(many: bool, aligned: bool) -> Launch:
        return launcher(_build(name, dtype, width, params, many, aligned, rounds), device)

    few, many = launch_for(False, True), launch_for(True, True)

    def activate(x_at: int, x_stride: int, out_at: int, num_rows: int) -> None:
        launch = few if num_rows * width < _MANY_ELEMENTS else many
        if (x_at | out_at | x_stride) & 15:
            launch = launch_for(launch is many, False)
        launch(num_rows * blocks, x_at, out_at, 0, x_stride)

    return activate


@functools.cache
def bind_activation(
    name: str, dtype: torch.dtype, last: int, params: tuple[float, ...], device: int
) -> Callable[..., torch.Tensor]:
    """The activation with everything settled that a layer knows for ever: call(x, out=None) -> out.

    last: the size of x's last dimension, twice the result's for a gated activation; ignored for a plain one.
    """
    if not _BY_NAME[name].order:
        return _bind_plain(name, dtype, params, device)
    width = last // 2
    activate, empty = bind_gated_rows(name, dtype, width, params, device), allocator(device, dtype)

    def call(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        shape = x.shape
        if x.dtype is not dtype or x.get_device() != device or shape[-1] != last:
            raise Refused(f"x is {x.dtype} {tuple(shape)} on device {x.get_device()}, expected {dtype} [..., {last}]")
        if x.is_contiguous():
            rows, stride = x.numel() // last, last
        else:
            found = rows_of(x)
            if found is None or found[1] != 1:
                raise Refused(f"x of strides {x.stride()} is not rows at one distance")
            rows, stride = found[0], found[2]
        result = empty(rows, width) if out is None else out
        activate(x.data_ptr(), stride, result.data_ptr(), rows)
        return result if out is not None or len(shape) == 2 else result.view(*shape[:-1], width)

    return call


def _bind_plain(name: str, dtype: torch.dtype, params: tuple[float, ...], device: int) -> Callable[..., torch.Tensor]:
    block, _ = _tiling(0, True)

    @functools.cache
    def launch_for(many: bool, aligned: bool) -> Launch:
        return launcher(_build(name, dtype, 0, params, many, aligned), device)

    few, many = launch_for(False, True), launch_for(True, True)
    empty = allocator(device, dtype)

    def call(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype is not dtype or x.get_device() != device:
            raise Refused(f"x is {x.dtype} on device {x.get_device()}, expected {dtype} on device {device}")
        if not x.is_contiguous():
            raise Refused(f"x of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous")
        elements = x.numel()
        result = empty(1, elements).view(x.shape) if out is None else out
        x_at, out_at = x.data_ptr(), result.data_ptr()
        launch = few if elements < _MANY_ELEMENTS else many
        if (x_at | out_at) & 15:
            launch = launch_for(launch is many, False)
        launch((elements + block - 1) // block, x_at, out_at, elements, 0)
        return result

    return call


def activation_refuses(name: str, x: torch.Tensor, out: torch.Tensor | None = None) -> str | None:
    """None if the activation called `name` does this, else why not."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x has dtype {x.dtype}, not float16, bfloat16 or float32"
    if x.dim() == 0:
        return "x has no dimensions"
    shape = x.shape
    if _BY_NAME[name].order:
        if shape[-1] < 2 or shape[-1] % 2:
            return f"the last dimension of x, {shape[-1]}, is not an even number of at least 2"
        rows = rows_of(x)
        if rows is None or rows[1] != 1:
            return f"x of shape {tuple(shape)} and strides {x.stride()} is not rows at one distance"
        shape = torch.Size((*shape[:-1], shape[-1] // 2))
    elif not x.is_contiguous():
        return f"x of shape {tuple(shape)} and strides {x.stride()} is not contiguous"
    elif x.numel() >= 2**31:
        return f"x has {x.numel()} elements, more than a 32-bit index reaches"
    if out is not None and (
        out.shape != shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous()
    ):
        return f"out is not a contiguous {x.dtype} tensor of shape {tuple(shape)} on {x.device}"
    return None


def _settle(row: _Formula) -> Callable[..., Settled[torch.Tensor]]:
    """(x, all parameters, out) -> the activation for arguments that look like these; raises Refused."""

    def settle(x: torch.Tensor, *more: Any) -> Settled[torch.Tensor]:
        *params, out = more
        if reason := activation_refuses(row.name, x, out):
            raise Refused(reason)
        call = bind_activation(row.name, x.dtype, x.shape[-1] if row.order else 0, tuple(params), x.get_device())
        return lambda args: call(args[0], args[-1])

    return settle


def _op(row: _Formula) -> Callable[..., torch.Tensor]:
    settle = _settle(row)

    def op(x: torch.Tensor, *params: float, out: torch.Tensor | None = None, **named: float) -> torch.Tensor:
        given = (*params, *(named.pop(name, default) for name, default in row.params[len(params) :]))
        if len(given) != len(row.params) or None in given or named:
            wants = ", ".join(name for name, _ in row.params) or "no parameters"
            raise TypeError(f"{row.name}() takes {wants} after x, not {(*params, *named)}")
        args = x, *given, out
        return settle(*args)(args)

    halves = {
        "first": "gate and up are the first and second half of x's last dimension",
        "second": "up and gate are the first and second half of x's last dimension",
        "pairs": "gate and up are the even and odd elements of x's last dimension",
        "": "elementwise",
    }
    shape = "[..., 2 * width], rows at one distance" if row.order else "contiguous"
    op.__name__ = op.__qualname__ = row.name
    op.__signature__ = _signature(row)  # type: ignore[attr-defined]
    op.__doc__ = (
        f"{row.meaning}; {halves[row.order]}.\n\n"
        f"x: {shape}, float16, bfloat16 or float32. out: a contiguous tensor for the result, else a new one.\n"
        f"Stands in for `torch.ops._C.{row.name}`. Raises Refused for what it does not do.\n"
    )
    return op


def _signature(row: _Formula) -> inspect.Signature:
    """What the op takes, spelt out for people, `inspect` and help()."""
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    params = [
        inspect.Parameter(name, positional, default=inspect.Parameter.empty if default is None else default)
        for name, default in row.params
    ]
    return inspect.Signature(
        [inspect.Parameter("x", positional), *params, inspect.Parameter("out", keyword, default=None)]
    )


def _reference(row: _Formula) -> Callable[..., tuple[torch.Tensor]]:
    def reference(x: torch.Tensor, *params: float, **named: Any) -> tuple[torch.Tensor]:
        values = (*params, *(named.get(name, default) for name, default in row.params[len(params) :]))
        if row.order == "":
            return (row.reference(x),)
        if row.order == "pairs":
            return (row.reference(x[..., ::2], x[..., 1::2], *values),)
        first, second = x.chunk(2, dim=-1)
        gate, up = (first, second) if row.order == "first" else (second, first)
        return (row.reference(gate, up, *values),)

    return reference


# Intermediate sizes of Qwen2.5-7B, Llama-3.1-8B and DeepSeek-V3's dense layers.
_MODELS = {"qwen2.5-7b": 18944, "llama-3.1-8b": 14336, "deepseek-v3": 18432}
_SMALL = (
    Case("one row", {"shape": (1, 64)}),
    Case("odd size", {"shape": (5, 46)}),
    Case("wider than a program", {"shape": (3, 4100)}),
    Case("empty", {"shape": (0, 64)}),
    Case("three dimensions", {"shape": (2, 3, 96)}),
    Case("large values", {"shape": (4, 128), "scale": 40.0}),
)
_APART = (
    Case("rows apart", {"shape": (6, 96), "gap": 32}),
    Case("odd offset", {"shape": (6, 96), "gap": 5, "offset": 3}),
)
_PARAMS = {"threshold": 0.3, "limit": 1.5, "alpha": 1.25, "beta": 0.5}


def _kernel(row: _Formula) -> Kernel:
    def inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
        if "gap" in case.params:
            x = strided(case["shape"], dtype, device, case["gap"], case.get("offset", 0))
        else:
            x = randn(case["shape"], dtype, device, case.get("scale", 1.0))
        return {"x": x, **{name: _PARAMS[name] for name, _ in row.params}}

    def builds(case: Case, dtype: str) -> Iterator[Build]:
        width = case["shape"][-1] // 2 if row.order else 0
        for many in (False, True):
            for is_aligned in (True, False):
                params = tuple(_PARAMS[name] for name, _ in row.params)
                yield _build(row.name, getattr(torch, dtype), width, params, many, is_aligned)

    def result_shape(x: torch.Tensor) -> torch.Size:
        return torch.Size((*x.shape[:-1], x.shape[-1] // 2)) if row.order else x.shape

    def stock_call(op: Callable[..., None], x: torch.Tensor, **params: float) -> torch.Tensor:
        out = torch.empty(result_shape(x), dtype=x.dtype, device=x.device)
        op(out, x, *params.values())
        return out

    def fake(x: torch.Tensor, *params: float, **named: float) -> torch.Tensor:
        return torch.empty(result_shape(x), dtype=x.dtype, device=x.device)

    def refuses(x: torch.Tensor, *params: float, out: torch.Tensor | None = None, **named: float) -> str | None:
        return activation_refuses(row.name, x, out)

    benches = (
        Case(f"{model} {tokens}", {"shape": (tokens, (2 if row.order else 1) * size), "model": model}, bench=True)
        for model, size in _MODELS.items()
        for tokens in TOKENS
    )
    arguments = "".join(
        f", float {name}" + ("" if default is None else f"={default}") for name, default in row.params
    )
    return Kernel(
        name=row.name,
        op=_op(row),
        settle=_settle(row),
        reference=_reference(row),
        refuses=refuses,
        inputs=inputs,
        results=("return",),
        cases=(*_SMALL, *(_APART if row.order else ()), *(benches if row.name == "silu_and_mul" else ())),
        builds=builds,
        schema=f"{row.name}(Tensor x{arguments}) -> Tensor",
        fake=fake,
        stock=f"_C::{row.name}",
        stock_call=stock_call,
        traffic=lambda x, **_: nbytes(x) + (nbytes(x) // 2 if row.order else nbytes(x)),
    )


KERNELS = tuple(_kernel(row) for row in _FORMULAS)
