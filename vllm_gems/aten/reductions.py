"""Reductions of PyTorch's: which dimensions go, what is computed in, and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.pointwise import walk
from ..kernels.reduce import MAX_DIMS, Reduction, reduce_build
from .overloads import Overload, Plan, decline, launches_of

_INT32_MAX = 2**31 - 1
_ARGUMENTS = {"self", "dim", "keepdim", "dtype", "correction"}
# Fewer programs that walk through more elements each are slower than PyTorch, which divides what is reduced too.
_FEW_PROGRAMS, _LONG_WALK = 16, 1 << 16


@dataclass(frozen=True)
class Reduce:
    """An operation that reduces dimensions, all of them if none is named."""

    op: str
    what: str  # a name that the kernel knows
    indices: bool = False  # it gives places, beside values if it gives two results
    mean: bool = False  # beside a variance

    def reads(self, schema: Any) -> bool:
        """Whether an overload of this schema is such a reduction."""
        inputs = [each for each in schema.arguments if not each.is_out]
        kinds = {each.name: str(each.type) for each in inputs}
        results = [str(each.type) for each in schema.returns]
        gives = {"max": (1, 2), "min": (1, 2)}.get(self.op, (2,) if self.mean else (1,))
        return (
            kinds.get("self") == "Tensor"
            and set(kinds) <= _ARGUMENTS
            and "str" not in kinds.get("dim", "")
            and set(results) == {"Tensor"}
            and len(results) in gives
        )

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan:
        """How a call with arguments like these is done; raises Refused if it is not done here."""
        results = overload.on_meta(args)
        named = dict(zip(overload.names, args, strict=False))
        x: torch.Tensor = named["self"]
        single = isinstance(results, torch.Tensor)
        results = [results] if single else list(results)
        gone = _dims(named.get("dim"), x.dim())
        what = self.what
        indices: torch.Tensor | None = None
        values: torch.Tensor | None = results[0]
        if self.indices or (self.op in ("max", "min") and len(results) == 2):
            what, indices = f"arg{self.what}", results[-1]
            values = results[0] if len(results) == 2 else None
        if self.indices and x.dtype is torch.bool:
            decline("PyTorch has no such place in bool")
        compute = _computed(what, x.dtype, values)
        keeps = bool(named.get("keepdim", False))
        kept_dims = [dim for dim in range(x.dim()) if dim not in gone]
        out = results[0]
        # A result's dimension for each that is kept.
        out_dims = kept_dims if keeps and out.dim() == x.dim() else range(len(kept_dims))
        kept_shape = [x.shape[dim] for dim in kept_dims]
        kept = walk(
            kept_shape, [[x.stride(dim) for dim in kept_dims], [out.stride(dim) for dim in out_dims]]
        )  # fmt: skip
        reduced = walk(
            [x.shape[dim] for dim in gone], [[x.stride(dim) for dim in gone]], in_order=indices is not None
        )
        if len(kept.sizes) > MAX_DIMS or len(reduced.sizes) > MAX_DIMS:
            decline(f"its dimensions are more than {MAX_DIMS} walks through memory")
        if reduced.numel == 0 and (indices is not None or what in ("max", "min")):
            decline("nothing has no extreme")
        if kept.reach + reduced.reach > _INT32_MAX:
            decline("its offsets need 64 bits")
        if any(each.stride() != out.stride() for each in results):
            decline("its results lie differently in memory")
        call = Reduction(
            what, x.dtype, compute, None if values is None else values.dtype, results[1].dtype if self.mean else None
        )
        _, grid, tail = reduce_build(call, kept, reduced, True)
        if grid < _FEW_PROGRAMS and reduced.numel > _LONG_WALK:
            decline(f"{grid} programs would walk through {reduced.numel} elements, which PyTorch divides")
        device = overload.device(args)
        allocations = [overload.allocation(each, device, which) for which, each in enumerate(results)]
        # Of values and of what is beside them, in one result or two.
        where = (0, ...) if indices is not None and values is None else (..., ... if len(results) > 1 else 0)
        corrected = what in ("var", "std")
        extra = (...,) if corrected else (0,) if indices is None else ()
        launch_for = launches_of(
            lambda aligned: reduce_build(call, kept, reduced, aligned)[0], device, grid, (..., *where, *tail, *extra)
        )  # fmt: skip
        position = overload.names.index("self")
        at_correction = overload.names.index("correction") if "correction" in overload.names else None
        empty = kept.numel == 0

        def correction(args: tuple[Any, ...]) -> float:
            value = None if at_correction is None else args[at_correction]
            return 1.0 if value is None else float(value)

        def one(args: tuple[Any, ...]) -> Any:
            out = allocations[0](args)
            if not empty:
                at, out_at = args[position].data_ptr(), out.data_ptr()
                launch = launch_for(at | out_at)
                if corrected:
                    launch(at, out_at, correction(args))
                else:
                    launch(at, out_at)
            return out

        def two(args: tuple[Any, ...]) -> Any:
            first, second = (allocate(args) for allocate in allocations)
            if not empty:
                at, first_at, second_at = args[position].data_ptr(), first.data_ptr(), second.data_ptr()
                launch_for(at | first_at | second_at)(
                    at, first_at, second_at, *((correction(args),) if corrected else ())
                )
            return first, second

        return one if single else two


def _dims(dim: Any, count: int) -> list[int]:
    """The dimensions that are reduced, in their order."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(count))
    if count == 0:
        return []
    chosen = [dim] if isinstance(dim, int) else dim
    return sorted(each % count for each in chosen)


def _computed(what: str, x: torch.dtype, values: torch.Tensor | None) -> torch.dtype:
    if what in ("any", "all", "count"):
        return torch.int64
    if what in ("sum", "prod", "mean", "var", "std"):
        assert values is not None
        if values.dtype is torch.bool:
            decline(f"{what} in bool")
        if what not in ("sum", "prod") and not (x.is_floating_point and values.dtype.is_floating_point):
            decline(f"{what} of {x}")
        return _wide(values.dtype) if values.dtype.is_floating_point else torch.int64
    return _wide(x)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
