"""An overload of PyTorch's that multiplies matrices, done by one launch: planned once for what its tensors look like.

As in `elementwise`, PyTorch's own meta kernel says what the result is and what is an error. What is transposed, sliced
or broadcast is read where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ..kernels.matmul import DTYPES, INT32_MAX, Matrices, matmul_build
from ..launch import launcher, settled
from .overloads import Overload, Plan, decline

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Product:
    """An operation of PyTorch's that is beta * input + alpha * left @ right, by its arguments' names."""

    op: str
    left: str
    right: str
    input: str = ""  # without one there are no beta and alpha

    def reads(self, schema: Any) -> bool:
        """Whether an overload of this schema multiplies nothing but these."""
        names = {each.name for each in schema.arguments if not each.is_out}
        known = {self.left, self.right, *((self.input, "beta", "alpha") if self.input else ())}
        return known <= names <= known | {"out_dtype"}

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan:
        """How a call with arguments like these is done; raises Refused if it is not done here."""
        result = overload.on_meta(args)
        places = [overload.names.index(name) for name in (self.left, self.right, self.input) if name]
        factors = [overload.names.index(name) for name in ("alpha", "beta") if self.input]
        a, b, *inputs = (args[place] for place in places)
        if a.dtype not in DTYPES or b.dtype is not a.dtype:
            decline(f"it multiplies {a.dtype} by {b.dtype}")
        if result.dtype not in DTYPES or any(each.dtype is not result.dtype for each in inputs):
            decline(f"its result is {result.dtype}, and what is added to that is {inputs[0].dtype if inputs else None}")
        if any(type(args[index]) not in (int, float) for index in factors):
            decline("alpha or beta is no real number")
        device = overload.device(args)
        if any(args[place].get_device() != device for place in places):
            decline("its tensors are on several devices")
        call = matrices(a, b, result, *inputs)
        if call.reach > INT32_MAX:
            decline("its elements lie more than 2**31 apart")
        return _plan(call, places, factors, overload.allocation(result, device, apart=True), device)


def matrices(a: torch.Tensor, b: torch.Tensor, result: torch.Tensor, *inputs: torch.Tensor) -> Matrices:
    """What the kernel is told of a product, with or without one that is added."""
    return Matrices(
        batch=a.shape[0] if a.dim() == 3 else 1,
        rows=a.shape[-2],
        cols=b.shape[-1] if b.dim() == a.dim() else 1,
        inner=a.shape[-1],
        a=_strides(a.stride()),
        b=_strides(b.stride()),
        input=_strides(inputs[0].expand(result.shape).stride()) if inputs else None,
        out=_strides(result.stride()),
        dtype=a.dtype,
        out_dtype=result.dtype,
    )


def _strides(strides: Sequence[int]) -> tuple[int, int, int]:
    """Of [batch, row, column]: a matrix is a batch of one, a vector a column."""
    batch, row, col = {1: (0, *strides, 0), 2: (0, *strides), 3: tuple(strides)}[len(strides)]
    return batch, row, col


def _plan(
    call: Matrices, places: Sequence[int], factors: Sequence[int], allocate: Callable[..., Any], device: int
) -> Plan:
    empty = call.batch * call.rows * call.cols == 0
    launches: dict[tuple[bool, bool], Any] = {}

    def compiled(with_input: bool, aligned: bool) -> Any:
        build, grid, tail = matmul_build(call, with_input, aligned, device)
        if grid > INT32_MAX:
            decline(f"it takes {grid} programs")
        try:
            launch = settled(
                launcher(build, device), grid, (..., ..., ... if with_input else 0, ..., ..., ..., *tail)
            )  # fmt: skip
        except OutOfResources as error:
            decline(f"its tiles are too large for this GPU: {error}")
        launches[with_input, aligned] = launch
        return launch

    if not empty:
        compiled(call.input is not None, True)
    first, second, *third = places
    in_float32, inner = call.dtype is torch.float32, call.inner

    def run(args: tuple[Any, ...]) -> Any:
        if in_float32 and torch._C._get_fp32_precision_getter("cuda", "matmul") not in ("ieee", "none"):
            decline("PyTorch is allowed to multiply float32 in TF32")
        alpha, beta = 1.0, 0.0
        if factors:
            alpha, beta = _factor(args[factors[0]]), _factor(args[factors[1]])
        out = allocate(args)
        if empty:
            return out
        a_at, b_at, out_at = args[first].data_ptr(), args[second].data_ptr(), out.data_ptr()
        with_input = beta != 0.0
        if not with_input:
            aligned = not (a_at | b_at | out_at) & 15
            launch = launches.get((False, aligned)) or compiled(False, aligned)
            launch(a_at, b_at, out_at, alpha if inner else 0.0, beta)
            return out
        input_at = args[third[0]].data_ptr()
        aligned = not (a_at | b_at | out_at | input_at) & 15
        launch = launches.get((True, aligned)) or compiled(True, aligned)
        # Of no products the sum is 0, whatever it is multiplied by.
        launch(a_at, b_at, input_at, out_at, alpha if inner else 0.0, beta)
        return out

    return run


def _factor(value: Any) -> float:
    value = float(value)
    if abs(value) > _LARGEST and math.isfinite(value):
        decline(f"{value} is no float32")
    return value
