"""PyTorch's `arange`: how many numbers there are depends on them, not on any tensor, and is found at each call."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.arange import BLOCK, COMPUTE, arange_build
from ..kernels.matmul import INT32_MAX
from ..launch import Launch, launcher
from .overloads import Overload, Plan, decline, exact_doubles

_EXACT = 2**53  # whole numbers up to here are float64
_LARGEST = torch.finfo(torch.float32).max

_NUMBERS = ("start", "end", "step")
_OPTIONS = ("dtype", "layout", "device", "pin_memory")


@dataclass(frozen=True)
class Arange:
    """PyTorch's operation, to a new tensor or to one that has as many elements as there are numbers."""

    op: str

    def reads(self, schema: Any) -> bool:
        """Whether an overload of this schema has no arguments but those that are known."""
        names = {each.name for each in schema.arguments if not each.is_out}
        return "end" in names and names <= {*_NUMBERS, *_OPTIONS}

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan:
        """How a call with numbers of these types is done; raises Refused if it is not done here."""
        named = dict(zip(overload.names, args, strict=False))
        types = {type(named[name]) for name in _NUMBERS if name in named}
        if not types <= {int, float}:
            decline(f"its numbers are {sorted(each.__name__ for each in types)}")
        if overload.written:
            return self._written(overload, args, float in types)
        if named["layout"] not in (None, torch.strided) or named["pin_memory"]:
            decline("its result is no plain tensor")
        places = [overload.names.index(name) if name in named else None for name in _NUMBERS]
        given = named["dtype"] or (None if float in types else torch.int64)
        if given is not None:
            _check(given, float in types)
        where = torch.device("cpu") if named["device"] is None else named["device"]
        launch_on = functools.cache(lambda dtype, device: launcher(arange_build(dtype, True), device))

        def run(args: tuple[Any, ...]) -> torch.Tensor:
            dtype = given or torch.get_default_dtype()
            start, step, count = _numbers(args, places, dtype)
            out = torch.empty((count,), dtype=dtype, device=where)
            if count:
                device = out.get_device()
                launch_on(dtype, device)(-(-count // BLOCK), out.data_ptr(), start, step, count, 0)
            return out

        return run

    def _written(self, overload: Overload, args: tuple[Any, ...], with_floats: bool) -> Plan:
        (which,) = overload.written
        out = args[which]
        _check(out.dtype, with_floats)
        if out.dim() != 1:
            decline(f"the tensor to write to has {out.dim()} dimensions")
        (size,), (stride,), dtype = out.shape, out.stride(), out.dtype
        if size > 1 and stride == 0:
            decline("elements of the tensor to write to share memory")
        if size * max(stride, 1) > INT32_MAX:
            decline("its elements lie more than 2**31 apart")
        places = [overload.names.index(name) if name in overload.names else None for name in _NUMBERS]
        launch: Launch = launcher(arange_build(dtype, stride == 1), out.get_device())

        def run(args: tuple[Any, ...]) -> torch.Tensor:
            start, step, count = _numbers(args, places, dtype)
            if count != size:
                decline("the tensor to write to has another shape, and is resized")
            out: torch.Tensor = args[which]
            if count:
                launch(-(-count // BLOCK), out.data_ptr(), start, step, count, stride)
            return out

        return run


def _check(dtype: torch.dtype, with_floats: bool) -> None:
    """Raises Refused for what is not done to a result of a dtype."""
    if dtype not in COMPUTE:
        decline(f"its result is {dtype}")
    if with_floats and not dtype.is_floating_point:
        decline(f"its result is {dtype} of numbers with fractions, whose count differs between releases of PyTorch")
    if dtype is torch.float64 and not exact_doubles():
        decline("a number in float64 would be rounded")


def _numbers(args: tuple[Any, ...], places: list[int | None], dtype: torch.dtype) -> tuple[Any, Any, int]:
    """(start, step, how many there are); raises Refused where PyTorch raises an error, and for too many."""
    at_start, at_end, at_step = places
    start = 0 if at_start is None else args[at_start]
    end = 0 if at_end is None else args[at_end]
    step = 1 if at_step is None else args[at_step]
    floating = dtype.is_floating_point
    if floating:
        start, end, step = float(start), float(end), float(step)
        most = math.inf if dtype is torch.float64 else _LARGEST
        if not (abs(start) <= most and abs(end) <= most and abs(step) <= most) or math.isinf(start) or math.isinf(end):
            decline("its numbers are no finite ones of what it is computed in")
    elif not (abs(start) <= _EXACT and abs(end) <= _EXACT and abs(step) <= _EXACT):
        decline("its numbers are larger than 2**53")
    if step == 0 or (end > start and step < 0) or (end < start and step > 0):
        decline("it never gets to its end")
    count = (end - start) / step if floating else -((start - end) // step)
    if count > INT32_MAX - BLOCK:
        decline(f"it is of {count} elements")
    return start, step, math.ceil(count)
