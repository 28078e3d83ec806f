"""Operations of PyTorch's that put the elements along a dimension in order: sort, and the k best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        values, indices = results
        named = dict(zip(overload.names, args, strict=False))
        x, dim = named["self"], named["dim"]
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
        order = Order(x.dtype, named.get("largest", named.get("descending", False)), k)
        steps = sort_builds(order, rows, True)
        if any(max(step.words, step.grid) > _INT32_MAX for step in steps):
            decline("its offsets need 64 bits")
        launches = [
            launches_of(lambda aligned, at=at: sort_builds(order, rows, aligned)[at].build, device)
            for at in range(len(steps))
        ]
        *_, last = steps
        every = [(launch, step.grid, step.tail, step.words) for launch, step in zip(launches, steps, strict=True)]
        words_for = allocator(device, word_of(x.dtype, rows.length))
        position = overload.names.index("self")

        def run(args: tuple[Any, ...]) -> Any:
            outs = [allocate(args) for allocate in allocations]
            x_at, values_at, indices_at = args[position].data_ptr(), outs[0].data_ptr(), outs[1].data_ptr()
            bits = x_at | values_at | indices_at
            before, before_at = None, 0
            for launch_for, grid, tail, count in every:
                if count:
                    words = words_for(1, count)
                    words_at = words.data_ptr()
                    launch_for(bits)(grid, x_at, before_at, words_at, 0, 0, *tail)
                    before, before_at = words, words_at
                else:
                    launch_for(bits)(grid, x_at, before_at, 0, values_at, indices_at, *tail)
            return tuple(outs)

        return run
