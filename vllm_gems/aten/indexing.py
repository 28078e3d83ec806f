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
from torch._prims_common import compute_elementwise_output_strides

from ..kernels.indexing import MAX_INDICES, Index, Move, move_builds
from ..launch import launcher, settled
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
    # (arguments, shape) -> strides of a new result, where those of PyTorch's meta kernel are not its kernel's
    strides: Callable[[Arguments, Sequence[int]], Sequence[int]] | None = None

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
        if self.strides is not None and not overload.written:
            result = result.new_empty_strided(result.shape, self.strides(args, result.shape))
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
    ways = move_builds(part.move, device)
    by_element, together = ways[0], ways[-1]
    read_of, indices = part.read, part.indices
    places = *[...] * len(indices), *[0] * (MAX_INDICES - len(indices))
    launch_one, launch_many = (
        settled(launcher(way.build, device), way.grid, (..., ..., ..., *places, *way.tail))
        for way in (by_element, together)
    )
    skipped = part.skipped * part.move.itemsize
    loose = together.itemsize - 1
    only = indices[0] if len(indices) == 1 else None

    def run(start: int, value: int, args: Arguments) -> None:
        write = start + skipped
        read = 0 if read_of is None else read_of(args).data_ptr()
        launch = launch_one if (write | read) & loose else launch_many
        if only is not None:
            launch(write, read, value, only(args).data_ptr())
        else:
            launch(write, read, value, *[each(args).data_ptr() for each in indices])

    return run


def _bits(value: Any, dtype: torch.dtype) -> int:
    """A number as PyTorch makes it an element, read as an integer."""
    if dtype.is_floating_point and torch.finfo(dtype).max < abs(value) < math.inf:
        decline(f"{value} is no {dtype}")
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


def _look(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Without memory."""
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


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


class _Picks(NamedTuple):
    """What index.Tensor picks: which dimensions, by indices that are broadcast to one shape."""

    dims: list[int]
    shape: torch.Size

    @property
    def first(self) -> int:
        return self.dims[0]

    def of_source(self, source: torch.Tensor) -> tuple[int, ...]:
        """Its strides in the shape of the result."""
        steps = source.stride()
        return (*steps[: self.first], *_zeros(len(self.shape)), *steps[self.first + len(self.dims) :])

    def of_index(self, index: torch.Tensor, source: torch.Tensor) -> tuple[int, ...]:
        behind = source.dim() - self.first - len(self.dims)
        return (*_zeros(self.first), *index.expand(self.shape).stride(), *_zeros(behind))


def _picks(given: Sequence[torch.Tensor | None]) -> _Picks:
    """Raises Refused for no index, and for those of dimensions with others between them."""
    found = {dim: each for dim, each in enumerate(given) if each is not None}
    dims = list(found)
    if not dims:
        decline("it has no tensor of indices")
    if dims[-1] - dims[0] >= len(dims):
        decline("its indices are of dimensions that are not beside each other")
    return _Picks(dims, torch.broadcast_shapes(*(each.shape for each in found.values())))


def _indexed(overload: Overload, args: Arguments, out: torch.Tensor) -> Iterator[Part]:
    source, given = args[:2]
    picks = _picks(given)
    if len(picks.dims) > MAX_INDICES:
        decline(f"it has {len(picks.dims)} tensors of indices, more than {MAX_INDICES}")
    indices = [_index(given[dim], picks.of_index(given[dim], source), source, dim) for dim in picks.dims]
    getters = [_item(1, dim) for dim in picks.dims]
    yield _picked(out, source, picks.of_source(source), indices, getters, wraps=True)


def _indexed_strides(args: Arguments, shape: Sequence[int]) -> Sequence[int]:
    """Those that an operation on elements would give its result, of what is picked from and the indices."""
    source, given = args[:2]
    picks = _picks(given)
    behind = source.dim() - picks.first - len(picks.dims)
    broadcast = (*(1,) * picks.first, *picks.shape, *(1,) * behind)
    # In int64, which PyTorch makes them once they are broadcast; on GPUs it lays several out alike.
    indices = [
        _look(given[dim].shape, given[dim].stride(), given[dim].dtype).expand(picks.shape).long().reshape(broadcast)
        for dim in picks.dims
    ]
    if source.is_cuda and len({each.stride() for each in indices}) > 1:
        indices = [each.contiguous() for each in indices]
    picked = _look(shape, picks.of_source(source), source.dtype)
    return compute_elementwise_output_strides(picked, *(each.expand(shape) for each in indices))


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
    Indexing("index", _indexed, (("Tensor", "List[Optional[Tensor]]"),), strides=_indexed_strides),
    Indexing("scatter", _scatter, ((*_ALONG, "Tensor"), (*_ALONG, "number")), number=3),
    Indexing("scatter_add", _scatter_add, ((*_ALONG, "Tensor"),)),
    Indexing("cat", _cat, (("List[Tensor]", "int"),)),
)
