"""Operations of PyTorch's that put the elements along a dimension in order: sort, and the k best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.sort import BEST, DTYPES, TILE, Order, sort_builds, word_of
from ..launch import allocator
from .along import rows_along
from .overloads import Overload, Plan, decline, launches_of

_INT32_MAX = 2**31 - 1
_ARGUMENTS = {
    "self": "Tensor", "k": "int", "dim": "int", "descending": "bool", "largest": "bool", "sorted": "bool",
    "stable": "Optional[bool]",
}  # fmt: skip


@dataclass(frozen=True)
class Sort:
    """`sort`, stable whether that is asked for or not, and `topk`, in order whether that is asked for or not.

    Of what is equal the first comes first, and is among the k best, where PyTorch does not say which is.
    """

    op: str

    def reads(self, schema: Any) -> bool:
        """Whether an overload of this schema is this operation."""
        kinds = {each.name: str(each.type) for each in schema.arguments if not each.is_out}
        return kinds.items() <= _ARGUMENTS.items() and [str(each.type) for each in schema.returns] == ["Tensor"] * 2

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan:
        """How a call with arguments like these is done; raises Refused if it is not done here."""
        results = overload.on_meta(args)
        # What is given stays as it lies, whatever the meta kernel does with it.
        values, indices = (args[at] for at in overload.written) if overload.written else results
        named = dict(zip(overload.names, args, strict=False))
        x, dim = named["self"], named["dim"]
        if (values.dtype, indices.dtype) != (x.dtype, torch.int64):
            decline(f"values in {values.dtype} and places in {indices.dtype}")
        if self.op == "topk" and x.dtype is torch.bool:
            decline("PyTorch has no best in bool")
        if x.dtype not in DTYPES:
            decline(f"{x.dtype}, which does not fit into 64 bits with its place")
        length = x.shape[dim] if x.dim() else 1
        k = named.get("k", length)
        if k == 0 and not x.dim():
            decline("none of a single number is a number to PyTorch")
        if length > TILE and k > BEST:
            decline(f"a row of {length}, of which {k} are wanted; up to {TILE} are sorted, and {BEST} found in more")
        device = overload.device(args)
        # Elements are read at their places when all places are known.
        allocations = [overload.allocation(each, device, which, apart=True) for which, each in enumerate(results)]
        if values.numel() == 0:
            return lambda args: tuple(allocate(args) for allocate in allocations)
        rows = rows_along(x.shape, dim, [each.stride() for each in (x, values, indices)])
        descending = named["largest"] if self.op == "topk" else named["descending"]
        order = Order(x.dtype, descending, k)
        steps = sort_builds(order, rows, True)
        if any(max(step.words, step.grid) > _INT32_MAX for step in steps):
            decline("its offsets need 64 bits")

        def launches(at: int, step: Any) -> Callable[[int], Callable[..., None]]:
            args = (*[...] * 5, *step.tail)
            return launches_of(lambda aligned: sort_builds(order, rows, aligned)[at].build, device, step.grid, args)

        *first, (last, _) = [(launches(at, step), step) for at, step in enumerate(steps)]
        words_for = allocator(device, word_of(x.dtype, rows.length))
        position = overload.names.index("self")

        def run(args: tuple[Any, ...]) -> Any:
            outs = [allocate(args) for allocate in allocations]
            x_at, values_at, indices_at = args[position].data_ptr(), outs[0].data_ptr(), outs[1].data_ptr()
            bits = x_at | values_at | indices_at
            before_at, words = 0, None  # which are held until the next launch has been given them
            for launch_for, step in first:
                after = words_for(1, step.words)
                launch_for(bits)(x_at, before_at, after.data_ptr(), 0, 0)
                words, before_at = after, after.data_ptr()
            last(bits)(x_at, before_at, 0, values_at, indices_at)
            del words
            return tuple(outs)

        return run
