"""Operations of PyTorch's that copy elements to or from where tensors of indices say, planned once for each look.

PyTorch's meta kernels say what the result is, and with it raise all errors that do not depend on indices themselves.
Those are not looked at before the launch, as PyTorch does not on a GPU, where its kernels stop the process at an index
outside of its dimension. Ours reads and writes nothing there: what would have been read is 0, whatever the dtype, and
what would have been written is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from .kernels.indexing import MAX_INDICES, Index, Move, move_builds
from .launch import launcher
from .overloads import Overload, Plan, decline

Arguments = tuple[Any, ...]
# arguments -> the tensor among them, or in a list of them
Getter = Callable[[Arguments], torch.Tensor]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INDICES = (torch.int32, torch.int64)


class Part(NamedTuple):
    """A launch: what it moves, and which tensors it is about."""

    move: Move
    read: Getter | None
    indices: tuple[Getter, ...] = ()
    skipped: int = 0  # elements of the result before the first that it writes


@dataclass(frozen=True)
class Indexing:
    """An operation of PyTorch's, and how its result is put together."""

    op: str
    # (overload, arguments, result) -> launches, in order; raises Refused
    parts: Callable[[Overload, Arguments, torch.Tensor], Iterator[Part]]
    # The arguments' types in the schema, of overloads that are done
    types: tuple[tuple[str, ...], ...]
    number: int | None = None  # the argument that is written if it is no tensor

    def reads(self, schema: Any) -> bool:
        """Whether an overload of this schema is done."""
        types = tuple(str(each.type) for each in schema.arguments if not each.is_out)
        return types in self.types and [str(each.type) for each in schema.returns] == ["Tensor"]

    def plan(self, overload: Overload, args: Arguments) -> Plan:
        """How a call with arguments like these is done; raises Refused if it is not done here."""
        devices = {each.get_device() for each in _tensors(args)}
        if len(devices) != 1:
            decline("its tensors are on several devices")
        result = overload.on_meta(args)
        if result.dtype.itemsize not in _INTEGERS:
            decline(f"an element of {result.dtype} is {result.dtype.itemsize} bytes")
        device = devices.pop()
        parts = list(self.parts(overload, args, result))
        parts = [part for part in parts if result.numel() and math.prod(part.move.shape)]
        if any(index.limit == 0 for part in parts for index in part.move.indices):
            decline("no index is inside of a dimension of no elements")
        launches = [_launch(part, device) for part in parts]
        races = any(part.move.scatters and not part.move.adds for part in parts)
        number = self.number if any(part.read is None for part in parts) else None
        allocate = overload.allocation(result, device, apart=True)
        dtype = result.dtype
        deterministic = torch._C._get_deterministic_algorithms

        def run(args: Arguments) -> torch.Tensor:
            if races and deterministic():
                decline("which element is written last where indices are the same is not determined")
            value = 0 if number is None else _bits(args[number], dtype)
            out = allocate(args)
            start = out.data_ptr()
            for launch in launches:
                launch(start, value, args)
            return out

        return run


def _launch(part: Part, device: int) -> Callable[[int, int, Arguments], None]:
    """(address of the result, number, arguments) -> what a launch does."""
    ways = move_builds(part.move)
    by_element, together = ways[0], ways[-1]
    launch_one, launch_many = (launcher(way.build, device) for way in (by_element, together))
    skipped = part.skipped * part.move.itemsize
    loose = together.itemsize - 1
    read_of, indices = part.read, part.indices
    absent = (0,) * (MAX_INDICES - len(indices))

    def launch(start: int, value: int, args: Arguments) -> None:
        write = start + skipped
        read = 0 if read_of is None else read_of(args).data_ptr()
        places = [each(args).data_ptr() for each in indices]
        if (write | read) & loose:
            launch_one(by_element.grid, write, read, value, *places, *absent, *by_element.tail)
        else:
            launch_many(together.grid, write, read, value, *places, *absent, *together.tail)

    return launch


def _bits(value: Any, dtype: torch.dtype) -> int:
    """A number as PyTorch makes it an element, read as an integer."""
    try:
        return int(torch.full((), value, dtype=dtype).view(_INTEGERS[dtype.itemsize]).item())
    except (RuntimeError, TypeError) as error:
        decline(f"{value} is no {dtype}: {type(error).__name__}")


def _tensors(args: Arguments) -> Iterator[torch.Tensor]:
    for each in args:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from _tensors(tuple(each))


def _item(argument: int, index: int) -> Getter:
    """Of a list."""
    return lambda args: args[argument][index]


# Shapes and strides, in which a tensor without dimensions has one


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape) or (1,)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride()) or (1,)


def _with(strides: Sequence[int], dim: int, step: int) -> tuple[int, ...]:
    return (*strides[:dim], step, *strides[dim + 1 :])


def _zeros(count: int) -> tuple[int, ...]:
    return (0,) * count


def _reach(*tensors: torch.Tensor) -> int:
    """The largest offset of an element."""
    return max(sum((size - 1) * step for size, step in zip(_shape(t), _strides(t), strict=True)) for t in tensors)


def _index(index: torch.Tensor, strides: tuple[int, ...], of: torch.Tensor, dim: int) -> Index:
    """Indices along a dimension of a tensor; raises Refused for what cannot be any."""
    if index.dtype not in _INDICES:
        decline(f"its indices are {index.dtype}")
    return Index(index.dtype, strides, limit=_shape(of)[dim], step=_strides(of)[dim])


def _same_dtype(*tensors: torch.Tensor) -> None:
    if len({each.dtype for each in tensors}) > 1:
        decline("its tensors have several dtypes")


def _picked(
    out: torch.Tensor,
    source: torch.Tensor,
    read: tuple[int, ...],
    indices: Sequence[Index],
    getters: Sequence[Getter],
    wraps: bool = False,
) -> Part:
    """Every element of the result from where indices say, out of the first argument."""
    _same_dtype(out, source)
    order = _strides(out)
    reach = _reach(out, source)
    move = Move(_shape(out), order, order, read, out.dtype.itemsize, reach, tuple(indices), wraps=wraps)
    return Part(move, itemgetter(0), tuple(getters))


# The operations: (overload, arguments, result) -> launches


def _gather(overload: Overload, args: Arguments, out: torch.Tensor) -> Iterator[Part]:
    source, dim, index = args[:3]
    dim %= max(source.dim(), 1)
    found = _index(index, _strides(index), source, dim)
    yield _picked(out, source, _with(_strides(source), dim, 0), [found], [itemgetter(2)])


def _index_select(overload: Overload, args: Arguments, out: torch.Tensor) -> Iterator[Part]:
    source, dim, index = args[:3]
    dim %= max(source.dim(), 1)
    if index.dim() > 1 or index.numel() != _shape(out)[dim]:
        decline("its indices are no vector")
    found = _index(index, _with(_zeros(len(_shape(out))), dim, _strides(index)[0]), source, dim)
    yield _picked(out, source, _with(_strides(source), dim, 0), [found], [itemgetter(2)])


def _embedding(overload: Overload, args: Arguments, out: torch.Tensor) -> Iterator[Part]:
    weight, index = args[:2]
    found = _index(index, (*index.stride(), 0), weight, 0)
    yield _picked(out, weight, (*_zeros(index.dim()), weight.stride(1)), [found], [itemgetter(1)])


def _indexed(overload: Overload, args: Arguments, out: torch.Tensor) -> Iterator[Part]:
    source, given = args[:2]
    dims = [dim for dim, each in enumerate(given) if each is not None]
    if not dims:
        decline("it has no tensor of indices")
    first, count = dims[0], len(dims)
    if dims[-1] - first >= count:
        decline("its indices are of dimensions that are not beside each other")
    if count > MAX_INDICES:
        decline(f"it has {count} tensors of indices, more than {MAX_INDICES}")
    shape = torch.broadcast_shapes(*(given[dim].shape for dim in dims))
    behind = source.dim() - first - count
    indices = [
        _index(given[dim], (*_zeros(first), *given[dim].expand(shape).stride(), *_zeros(behind)), source, dim)
        for dim in dims
    ]
    steps = source.stride()
    read = (*steps[:first], *_zeros(len(shape)), *steps[first + count :])
    getters = [_item(1, dim) for dim in dims]
    yield _picked(out, source, read, indices, getters, wraps=True)


def _scatter(overload: Overload, args: Arguments, out: torch.Tensor, adds: bool = False) -> Iterator[Part]:
    source, dim, index, what = args[:4]
    dim %= max(out.dim(), 1)
    _same_dtype(out, source, *_tensors((what,)))
    if adds and out.dtype not in _INDICES:
        decline(f"the order of sums in {out.dtype} would not be determined, or they are not atomic")
    itemsize, steps = out.dtype.itemsize, _strides(out)
    if overload.written != (0,):
        yield Part(Move(_shape(out), steps, steps, _strides(source), itemsize, _reach(out, source)), itemgetter(0))
    if index.numel() == 0:
        return
    found = _index(index, _strides(index), out, dim)
    reads = isinstance(what, torch.Tensor)
    move = Move(
        shape=_shape(index),
        order=steps,
        write=_with(steps, dim, 0),
        read=_strides(what) if reads else None,
        itemsize=itemsize,
        reach=_reach(out, what) if reads else _reach(out),
        indices=(found,),
        scatters=True,
        adds=adds,
    )
    yield Part(move, itemgetter(3) if reads else None, (itemgetter(2),))


def _scatter_add(overload: Overload, args: Arguments, out: torch.Tensor) -> Iterator[Part]:
    return _scatter(overload, args, out, adds=True)


def _cat(overload: Overload, args: Arguments, out: torch.Tensor) -> Iterator[Part]:
    tensors, dim = args[:2]
    dim %= out.dim()
    _same_dtype(out, *tensors)
    at, steps = 0, out.stride()
    for index, each in enumerate(tensors):
        if each.numel():
            shape = tuple(each.shape)
            move = Move(shape, steps, steps, each.stride(), out.dtype.itemsize, _reach(out, each))
            yield Part(move, _item(0, index), skipped=at * steps[dim])
            at += shape[dim]


_ALONG = ("Tensor", "int", "Tensor")

INDEXING = (
    Indexing("embedding", _embedding, (("Tensor", "Tensor", "int", "bool", "bool"),)),
    Indexing("index_select", _index_select, (_ALONG,)),
    Indexing("gather", _gather, ((*_ALONG, "bool"),)),
    Indexing("index", _indexed, (("Tensor", "List[Optional[Tensor]]"),)),
    Indexing("scatter", _scatter, ((*_ALONG, "Tensor"), (*_ALONG, "number")), number=3),
    Indexing("scatter_add", _scatter_add, ((*_ALONG, "Tensor"),)),
    Indexing("cat", _cat, (("List[Tensor]", "int"),)),
)
