"""Operations of PyTorch's along one dimension: softmax, norms, cumulative sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.along import Norm, Rows, along_build, norm_build
from ..kernels.pointwise import Walk, walk
from ..kernels.reduce import MAX_DIMS
from ..launch import CPU
from .overloads import Overload, Plan, decline, exact_doubles, launches_of

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Along:
    """An operation whose result has the shape of its tensors, and that has an argument `dim`."""

    op: str
    what: str  # a name that the kernel knows
    tensors: tuple[str, ...] = ("self",)
    arguments: tuple[str, ...] = ("dim",)
    families: str = "f"

    def reads(self, schema: Any) -> bool:
        """Whether an overload of this schema is this operation."""
        inputs = [each for each in schema.arguments if not each.is_out]
        names = tuple(each.name for each in inputs)
        return (
            names == (*self.tensors, *self.arguments)
            and [str(each.type) for each in schema.returns] == ["Tensor"]
            and all(str(each.type) != "str" for each in inputs)
        )

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan:
        """How a call with arguments like these is done; raises Refused if it is not done here."""
        result = overload.on_meta(args)
        positions = [overload.names.index(name) for name in self.tensors]
        tensors = [args[position] for position in positions]
        dim = args[overload.names.index("dim")]
        if "input_dtype" in overload.names:
            of_input = args[overload.names.index("input_dtype")]
            if of_input not in (tensors[0].dtype, torch.float16):
                decline(f"a gradient in {tensors[0].dtype} of an input in {of_input}")
            if tensors[1].dtype is not tensors[0].dtype:
                decline(f"a gradient in {tensors[0].dtype} of an output in {tensors[1].dtype}")
        family = "f" if result.dtype.is_floating_point else "i"
        if family not in self.families or result.dtype is torch.bool:
            decline(f"{self.what} in {result.dtype}")
        compute = result.dtype
        if compute in (torch.float16, torch.bfloat16):
            compute = torch.float32
        elif family == "i":
            compute = torch.int64
        rows = rows_along(result.shape, dim, [each.stride() for each in (*tensors, result)])
        call = self.what, tuple(each.dtype for each in (*tensors, result)), compute, rows
        _, grid, tail = along_build(*call, True)
        device = overload.device(args)
        launch_for = launches_of(lambda aligned: along_build(*call, aligned)[0], device)
        allocate = overload.allocation(result, device)
        empty = result.numel() == 0

        def run(args: tuple[Any, ...]) -> Any:
            out = allocate(args)
            if not empty:
                addresses = [args[position].data_ptr() for position in positions]
                out_at = bits = out.data_ptr()
                for each in addresses:
                    bits |= each
                launch_for(bits)(grid, *addresses, out_at, *tail)
            return out

        return run


def rows_along(shape: torch.Size, dim: int, strides: list[tuple[int, ...]]) -> Rows:
    """Tensors of `shape` as rows along `dim`; raises Refused for what is too large or lies in too many dimensions."""
    if not shape:  # a number is a row of one
        return Rows(Walk((), ((),) * len(strides)), 1, (1,) * len(strides))
    dim %= len(shape)
    others = [each for each in range(len(shape)) if each != dim]
    starts = walk([shape[each] for each in others], [[step[each] for each in others] for step in strides])
    if len(starts.sizes) > MAX_DIMS:
        decline(f"its rows begin in {len(starts.sizes)} dimensions that are no single walk, more than {MAX_DIMS}")
    steps = tuple(step[dim] for step in strides)
    if starts.reach + shape[dim] * max(steps) > _INT32_MAX:
        decline("its offsets need 64 bits")
    return Rows(starts, shape[dim], steps)


@dataclass(frozen=True)
class Normalise:
    """native_layer_norm (https://arxiv.org/abs/1607.06450) and native_group_norm (https://arxiv.org/abs/1803.08494)."""

    op: str

    def reads(self, schema: Any) -> bool:
        """Whether an overload of this schema is this operation."""
        return len(schema.returns) == 3 and not any(each.is_out for each in schema.arguments)

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan:
        """How a call with arguments like these is done; raises Refused if it is not done here."""
        results = overload.on_meta(args)
        named = dict(zip(overload.names, args, strict=False))
        x, weight, bias, eps = (named[name] for name in ("input", "weight", "bias", "eps"))
        groups, channels, space = 0, 1, 1
        if "group" in named:
            groups = named["group"]
            channels, space = named["C"] // groups, named["HxW"]
            length = channels * space
        else:
            length = math.prod(named["normalized_shape"])
        if not x.dtype.is_floating_point:
            decline(f"a norm of {x.dtype}")
        if any(each is not None and not each.is_contiguous() for each in (x, weight, bias)) or length == 0:
            decline("it is empty, or its tensors are not contiguous, and PyTorch copies")
        compute = torch.float64 if x.dtype is torch.float64 else torch.float32
        if compute is torch.float64 and not exact_doubles():
            decline("a number in float64 would be rounded")
        rows = x.numel() // length
        if rows > _INT32_MAX or length > _INT32_MAX // 2:
            decline("its offsets need 64 bits")
        of_weight, of_bias = (None if each is None else each.dtype for each in (weight, bias))
        device = overload.device(args)
        if device == CPU:  # where PyTorch keeps the mean in the dtype of what it is of
            results = [results[0], *(each.to(x.dtype) for each in results[1:])]
        norm = Norm(x.dtype, of_weight, of_bias, results[1].dtype, compute, length, groups, channels, space)
        launch_for = launches_of(lambda aligned: norm_build(norm, aligned), device)
        positions = [overload.names.index(name) for name in ("input", "weight", "bias")]
        allocations = [overload.allocation(each, device, which) for which, each in enumerate(results)]

        def run(args: tuple[Any, ...]) -> Any:
            outs = [allocate(args) for allocate in allocations]
            if rows:
                addresses = [0 if args[each] is None else args[each].data_ptr() for each in positions]
                addresses += [each.data_ptr() for each in outs]
                bits = 0
                for each in addresses:
                    bits |= each
                launch_for(bits)(rows, *addresses, length, eps)
            return tuple(outs)

        return run
