"""An overload of PyTorch's on elements, done by one launch: planned once for what its tensors look like, then repeated.

PyTorch's own meta kernel says what the result is (shape, strides, dtype, and all errors), so that promotion,
broadcasting and memory formats are PyTorch's. That takes long and happens once for each set of shapes, strides and
dtypes; a call after that is a look-up, an allocation and a launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KINDS
from torch._prims_common import compute_elementwise_output_strides, elementwise_dtypes, make_contiguous_strides_for

from ..kernels.pointwise import COMPUTE, MAX_ARGUMENTS, MAX_DIMS, MAX_TENSORS, Pointwise, pointwise_build, walk
from .overloads import Overload, Plan, decline, exact_doubles, launches_of, scalar_of

_KINDS = {"default": KINDS.DEFAULT, "float": KINDS.INT_TO_FLOAT, "bool": KINDS.ALWAYS_BOOL}


@dataclass(frozen=True)
class Elementwise:
    """An operation of PyTorch's and its formula: its overloads, in place and with `out`, follow from their schemas."""

    op: str
    formula: Any
    # What PyTorch makes of its operands' dtypes, a key of _KINDS; or how that follows from the arguments by name.
    kind: str | Callable[[Mapping[str, Any]], str] = "default"
    families: str = "fib"  # what is computed in: floats, integers, bool
    promotes: tuple[str, ...] = ("other", "exponent")  # numbers whose type counts, as all tensors' does
    only: str = ""  # the one argument whose dtype counts
    in_place: bool = False  # and in no other form
    converts: bool = False  # to any dtype that is written to, as copying does
    as_is: tuple[str, ...] = ()  # tensors that are not converted, and do not count
    contiguous: tuple[str, ...] = ()  # overloads whose result is so, however the arguments lie
    last_first: bool = False  # the last argument's layout is the result's, not the first one's
    # (name, dtype of the result) -> the number in the place of None
    missing: Callable[[str, torch.dtype], float] | None = None
    # Argument -> the formula of the others, where it is None.
    without: Mapping[str, Any] = field(default_factory=dict)
    for_bool: Any = None  # the formula for bool, where it is another one

    def reads(self, schema: Any) -> bool:
        """Whether the formula computes an overload of this schema."""
        arguments = [each for each in schema.arguments if not each.is_out]
        types = [str(each.type) for each in arguments]
        return (
            len(arguments) == len(self.formula.arg_names) <= MAX_ARGUMENTS
            and [str(each.type) for each in schema.returns] == ["Tensor"]
            and "Tensor" in types
            and (not self.in_place or schema.name.endswith("_"))
            and not any("List" in kind for kind in types)
            and not any("Tensor" in kind for kind in types[MAX_TENSORS:])
        )

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan:
        """How a call with arguments like these is done; raises Refused if it is not done here."""
        result = overload.on_meta(args)
        given = args[: overload.count]
        named = dict(zip(overload.names, given, strict=False))
        kind = self.kind if isinstance(self.kind, str) else self.kind(named)
        counted = [
            value
            for name, value, is_tensor in zip(overload.names, given, overload.tensors, strict=True)
            if value is not None
            and name not in self.as_is
            and (name == self.only if self.only else is_tensor or name in self.promotes)
        ]
        compute, produced = elementwise_dtypes(*counted, type_promotion_kind=_KINDS[kind])
        if not self.converts and not torch.can_cast(produced, result.dtype):
            decline(f"PyTorch does not write {produced} to {result.dtype}")
        if compute not in COMPUTE:
            decline(f"it is computed in {compute}")
        family = "b" if compute is torch.bool else "f" if compute.is_floating_point else "i"
        if family not in self.families:
            decline(f"it is computed in {compute}, which the formula is not for")

        result = self._laid_out(overload, result, given)
        device = overload.device(args)
        tensors: list[torch.dtype | None] = []
        scalars: list[bool] = []
        constant: Any = None
        strides = [result.stride()]
        fixed: dict[int, float] = {}
        places: list[int] = []  # of the formula's arguments among ours
        formula = self.for_bool if self.for_bool is not None and compute is torch.bool else self.formula
        for index, (name, value) in enumerate(zip(overload.names, given, strict=True)):
            if value is None and self.missing is not None:
                value = fixed[index] = self.missing(name, result.dtype)
            if value is None:
                formula = self.without[name]
                continue
            places.append(index)
            is_scalar = scalar_of(value, device, overload.kinds[index])
            if isinstance(value, torch.Tensor) and not is_scalar:
                tensors.append(value.dtype)
                strides.append(value.expand(result.shape).stride())
            else:
                tensors.append(None)
            scalars.append(is_scalar)
            constant = None if is_scalar or isinstance(value, torch.Tensor) else value
        if any(scalars) and compute is torch.float64 and not exact_doubles():
            decline("a number in float64 would be rounded")
        walked = walk(result.shape, strides)
        if len(walked.sizes) > MAX_DIMS:
            decline(f"its tensors lie in {len(walked.sizes)} dimensions that are no single walk, more than {MAX_DIMS}")
        call = Pointwise(
            formula=formula,
            tensors=tuple(tensors),
            scalars=tuple(scalars),
            constant=constant,
            compute=compute,
            out=result.dtype,
            as_is=tuple(index for index, place in enumerate(places) if overload.names[place] in self.as_is),
        )
        return _plan(overload, call, result, walked, device, places, fixed)

    def _laid_out(self, overload: Overload, result: torch.Tensor, given: tuple[Any, ...]) -> torch.Tensor:
        """With the strides of PyTorch's kernels: some meta kernels are made of several operations, and differ."""
        if overload.written:
            return result
        if overload.op._overloadname in self.contiguous:
            strides = make_contiguous_strides_for(result.shape)
        else:
            tensors = [each.expand(result.shape) for each in given if isinstance(each, torch.Tensor)]
            strides = compute_elementwise_output_strides(*(reversed(tensors) if self.last_first else tensors))
        return torch.empty_strided(result.shape, strides, dtype=result.dtype, device="meta")


def _plan(
    overload: Overload, call: Pointwise, result: torch.Tensor, walked: Any, device: int, places: Sequence[int],
    fixed: Mapping[int, float],
) -> Plan:  # fmt: skip
    build, tail = pointwise_build(call, walked, True)
    block = dict(build.constexprs)["BLOCK"]
    grid = -(-tail[0] // block)
    allocate = overload.allocation(result, device)
    if result.numel() == 0:
        return allocate
    # Written out for these arguments: loops over them would cost more than PyTorch's whole call.
    template: list[Any] = [...]
    numbers, passed = [], ["out_at"]
    lines = ["out = allocate(args)", "out_at = out.data_ptr()"]
    for index in range(MAX_TENSORS):
        is_tensor = index < len(call.tensors) and call.tensors[index] is not None
        template.append(... if is_tensor else 0)
        if is_tensor:
            lines.append(f"p{index} = args[{places[index]}].data_ptr()")
            passed.append(f"p{index}")
    bits = " | ".join(passed)
    for index in range(MAX_ARGUMENTS):
        is_number = index < len(call.scalars) and call.scalars[index]
        template.append(... if is_number else 0)
        if is_number:
            numbers.append(f"convert({fixed.get(places[index], f'args[{places[index]}]')!s})")
    launch_for = launches_of(
        lambda aligned: pointwise_build(call, walked, aligned)[0], device, grid, (*template, *tail)
    )  # fmt: skip
    lines += [f"(launch_for(15) if ({bits}) & 15 else aligned)({', '.join((*passed, *numbers))})", "return out"]
    names: dict[str, Any] = {
        "allocate": allocate, "launch_for": launch_for, "aligned": launch_for(0), "convert": _number(call.compute),
    }  # fmt: skip
    exec("def run(args):\n    " + "\n    ".join(lines), names)
    plan: Plan = names["run"]
    return plan


def _number(compute: torch.dtype) -> Callable[[Any], Any]:
    """A number as the launcher takes it, which has to fit into what is computed in."""

    def number(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.item()
        return value

    def floating(value: Any) -> float:
        if type(value) in (int, float) and least <= value <= largest:  # nearly always
            return float(value)
        value = float(number(value))
        if abs(value) > largest and math.isfinite(value):
            decline(f"{value} is no {compute}")
        return value

    def whole(value: Any) -> int:
        if type(value) is int and least <= value <= largest:
            return value
        value = number(value)
        if isinstance(value, float) and not math.isfinite(value):
            decline(f"{value} is no {compute}")
        value = int(value)
        if not least <= value <= largest:
            decline(f"{value} is no {compute}")
        return value

    if compute.is_floating_point:
        least, largest = torch.finfo(compute).min, torch.finfo(compute).max
        return floating
    if compute is torch.bool:
        return lambda value: int(bool(number(value)))
    least, largest = torch.iinfo(compute).min, torch.iinfo(compute).max
    return whole
