"""Overrides of operations on indices: values, strides and errors are PyTorch's; no other memory is written."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from aten_calls import DEVICE, Call, elements, outcome, same
from torch.testing._internal.common_methods_invocations import op_db

import vllm_gems
from vllm_gems.aten.indexing import INDEXING
from vllm_gems.aten.overloads import Overload
from vllm_gems.catalog import aten_catalog
from vllm_gems.kernels.indexing import MAX_DIMS, MAX_INDICES
from vllm_gems.patches import aten as patches

aten = torch.ops.aten

# One of each size, and those that few kernels take
DTYPES = (
    torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64,
)  # fmt: skip
OPS = ("embedding", "index_select", "gather", "index", "scatter", "scatter_add", "cat")


def row(name: str) -> Any:
    return next(each for each in vllm_gems.report().rows if each.patch == patches.PREFIX + name)


def overridden(overload: Any, call: Call, hit: bool = True) -> Any:
    """What comes of a call by our kernel; or by PyTorch's, after ours declined it, if not `hit`."""
    name = str(overload).removeprefix("aten.").removesuffix(".default")
    with vllm_gems.use_gems(patches.PREFIX + name):
        before = row(name).hits
        got = outcome(overload, call)
        assert row(name).hits - before == hit, f"{name} {call.label}: {dict(row(name).declined)}"
    return got


def declined(overload: Any, reason: str, *args: Any, **kwargs: Any) -> None:
    """PyTorch does it, and the report says why."""
    call = Call(args, kwargs, reason)
    name = str(overload).removeprefix("aten.").removesuffix(".default")
    expected = outcome(overload, call.copy())
    with vllm_gems.use_gems(patches.PREFIX + name):
        got = outcome(overload, call.copy())
        (found,) = row(name).declined
        assert row(name).hits == 0
    assert reason in found
    same(got, expected, reason)


def ones_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random elements of any dtype."""
    if dtype in (torch.float8_e4m3fn, torch.complex64):
        return elements(shape, torch.float32, finite=True).to(dtype)
    return elements(shape, dtype, finite=True)


def laid(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random elements, in dimensions of any order with gaps between them, anywhere in their storage."""
    order = random.sample(range(len(shape)), len(shape))
    gaps = [random.choice((0, 0, 1, 3)) for _ in shape]
    wide = ones_of(dtype, tuple(shape[dim] + gap for dim, gap in zip(order, gaps, strict=True)))
    for place, dim in enumerate(order):
        wide = wide.narrow(place, random.randint(0, gaps[place]), shape[dim])
    return wide.permute([order.index(dim) for dim in range(len(shape))])


def indices(dtype: torch.dtype, limit: int, shape: tuple[int, ...], least: int = 0) -> torch.Tensor:
    found = torch.randint(least, limit, shape, device=DEVICE, dtype=dtype)
    return found.t().contiguous().t() if found.dim() == 2 and random.random() < 0.5 else found


def distinct(limit: int, shape: tuple[int, ...], dim: int) -> torch.Tensor:
    """Indices of which no two along a dimension are the same."""
    whole = list(shape)
    whole[dim] = limit
    return torch.rand(whole, device=DEVICE).argsort(dim).narrow(dim, 0, shape[dim])


def below(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(random.randint(1, size) for size in shape)


# Operation -> (dtype of elements, of indices, shape, dimension) -> (overload, arguments of a call)
Maker = Callable[[torch.dtype, torch.dtype, tuple[int, ...], int], tuple[Any, tuple[Any, ...]]]


def embedding(dtype: torch.dtype, index: torch.dtype, shape: tuple[int, ...], dim: int) -> Any:
    weight = laid(dtype, (37, random.choice((8, 24, 33))))
    return aten.embedding.default, (weight, indices(index, 37, below(shape)), 3)


def index_select(dtype: torch.dtype, index: torch.dtype, shape: tuple[int, ...], dim: int) -> Any:
    where = indices(index, shape[dim], random.choice(((), (7,), (1,))))
    return aten.index_select.default, (laid(dtype, shape), dim, where)


def gather(dtype: torch.dtype, index: torch.dtype, shape: tuple[int, ...], dim: int) -> Any:
    smaller = list(below(shape))
    smaller[dim] = random.randint(1, 9)
    return aten.gather.default, (laid(dtype, shape), dim, indices(index, shape[dim], tuple(smaller)))


def index(dtype: torch.dtype, index: torch.dtype, shape: tuple[int, ...], dim: int) -> Any:
    first = random.randint(0, len(shape) - 1)
    count = random.randint(1, min(MAX_INDICES, len(shape) - first))
    shapes = [(4, 3), (3,), (4, 1), ()][: count + 1]
    given = [
        indices(random.choice((index, torch.int64)), shape[first + each], shapes[each], -shape[first + each])
        for each in range(count)
    ]
    return aten.index.Tensor, (laid(dtype, shape), [*[None] * first, *given])


def scatter(dtype: torch.dtype, index: torch.dtype, shape: tuple[int, ...], dim: int) -> Any:
    smaller = below(shape)
    source = laid(dtype, tuple(size + random.randint(0, 2) for size in smaller))
    where = distinct(shape[dim], smaller, dim).to(index)
    if random.random() < 0.5 and dtype not in (torch.complex64, torch.float8_e4m3fn):
        return aten.scatter.value, (laid(dtype, shape), dim, where, random.choice((True, 2, 3.5, -0.0)))
    return aten.scatter.src, (laid(dtype, shape), dim, where, source)


def scatter_add(dtype: torch.dtype, index: torch.dtype, shape: tuple[int, ...], dim: int) -> Any:
    smaller, dtype = below(shape), random.choice((torch.int32, torch.int64))
    where = indices(index, shape[dim], smaller)
    return aten.scatter_add.default, (laid(dtype, shape), dim, where, laid(dtype, smaller))


def cat(dtype: torch.dtype, index: torch.dtype, shape: tuple[int, ...], dim: int) -> Any:
    sizes = [random.randint(0, 5) for _ in range(random.randint(1, 4))]
    tensors = [laid(dtype, (*shape[:dim], size, *shape[dim + 1 :])) for size in sizes]
    return aten.cat.default, ([*tensors, torch.empty(0, dtype=dtype, device=DEVICE)], dim)


def expected_of(overload: Any, call: Call) -> Any:
    """What PyTorch says, with indices and elements of dtypes that all of its kernels take."""

    def wide(arg: Any) -> Any:
        if isinstance(arg, list):
            return [wide(each) for each in arg]
        return arg.view(torch.uint8) if isinstance(arg, torch.Tensor) and arg.dtype is torch.float8_e4m3fn else arg

    args = [*map(wide, call.args)]
    if len(args) > 3 or overload is aten.gather.default:
        args[2] = args[2].long()
    found = overload(*args)
    return found.view(torch.float8_e4m3fn) if found.dtype is torch.uint8 else found


def out_of(overload: Any) -> Any:
    """The overload that writes to `out`."""
    packet = getattr(aten, overload._schema.name.removeprefix("aten::"))
    names = {"value": "value_out", "src": "src_out", "Tensor": "Tensor_out"}
    return getattr(packet, names.get(overload._overloadname, "out"))


def shapes(count: int) -> Iterator[tuple[tuple[int, ...], int]]:
    for _ in range(count):
        shape = tuple(random.choice((1, 2, 3, 5, 8, 16)) for _ in range(random.randint(1, 4)))
        yield shape, random.randrange(len(shape))
    yield (24, 64), 0  # rows that are copied in units


@pytest.mark.parametrize("make", [globals()[op] for op in OPS], ids=OPS)
def test_any_layout_and_dtype(make: Maker) -> None:
    """Functional, and into a tensor that is given, full of something else and with gaps."""
    for dtype in DTYPES:
        for number, (shape, dim) in enumerate(shapes(5)):
            overload, args = make(dtype, (torch.int64, torch.int32)[number % 2], shape, dim)
            call = Call(args, {}, f"{overload} {dtype} {shape} {dim}")
            expected = expected_of(overload, call)
            same(overridden(overload, call), expected, call.label)
            out = laid(dtype if make is not scatter_add else expected.dtype, tuple(expected.shape))
            into = call._replace(kwargs={"out": out})
            got = overridden(out_of(overload), into)
            assert got is out
            assert torch.equal(as_bytes(out), as_bytes(expected)), call.label


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE).copy_(tensor).reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_scatter_in_place_leaves_what_no_index_names(dtype: torch.dtype) -> None:
    for shape, dim in (((5, 7), 0), ((3, 4, 6), 2), ((9,), 0)):
        where = distinct(shape[dim], below(shape), dim)
        source = laid(dtype, shape)
        for overload, what in ((aten.scatter_.src, source), (aten.scatter_.value, 1)):
            into = laid(dtype, shape)
            expected = into.clone().scatter_(dim, where, what)
            got = overridden(overload, Call((into, dim, where, what), {}, f"{shape} {dim}"))
            assert got is into
            assert torch.equal(into, expected)


def test_scatter_add_in_place_sums_all_that_go_to_one_place() -> None:
    where, ones = indices(torch.int64, 5, (3, 2000)), torch.ones(3, 2000, dtype=torch.int64, device=DEVICE)
    into = torch.zeros(3, 5, dtype=torch.int64, device=DEVICE)
    overridden(aten.scatter_add_.default, Call((into, 1, where, ones), {}, "counts"))
    assert torch.equal(into, torch.stack([each.bincount(minlength=5) for each in where]))


SAMPLES = ("index_select", "gather", "scatter", "scatter_add", "cat", "nn.functional.embedding", "__getitem__")


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_pytorch_itself(name: str) -> None:
    (op,) = [each for each in op_db if each.name == name]
    hits = 0
    for dtype in (torch.float32, torch.int64):
        for number, sample in enumerate(op.sample_inputs(DEVICE, dtype)):
            if number >= 16:
                break
            call = Call((sample.input, *sample.args), sample.kwargs, f"{name} {dtype} {number}")
            expected = outcome(op, call)
            with vllm_gems.use_gems(",".join(OPS)):
                got = outcome(op, call)
                hits += sum(each.hits for each in vllm_gems.report().rows if each.patch.startswith(patches.PREFIX))
            same(got, expected, call.label)
    assert hits > 0


def test_empty_and_without_dimensions() -> None:
    one, none = torch.tensor(2.5, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    zero, wide = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.rand(4, 0, 3, device=DEVICE)
    rows = torch.rand(4, 3, device=DEVICE)
    for overload, args in (
        (aten.gather.default, (one, 0, zero)),
        (aten.gather.default, (one, -1, zero.reshape(1))),
        (aten.gather.default, (rows, 1, none)),
        (aten.index_select.default, (one, 0, zero.reshape(1))),
        (aten.index_select.default, (rows, 0, none)),
        (aten.index_select.default, (wide, 2, zero)),
        (aten.index_select.default, (wide, 1, none)),
        (aten.embedding.default, (rows, zero)),
        (aten.embedding.default, (rows, none)),
        (aten.index.Tensor, (rows, [zero, zero])),
        (aten.index.Tensor, (rows, [None, none])),
        (aten.scatter.src, (one, 0, zero, rows[0, 0])),
        (aten.scatter.src, (rows, 0, none, rows)),
        (aten.scatter.value, (rows, 0, none, 1.0)),
        (aten.scatter.value, (one, 0, zero, 1.0)),
        (aten.cat.default, ([wide, wide], 1)),
        (aten.cat.default, ([wide, wide], -3)),
    ):
        call = Call(args, {}, f"{overload} {[each.shape for each in args if isinstance(each, torch.Tensor)]}")
        same(overridden(overload, call), outcome(overload, call), call.label)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_wrong_index_reads_0_and_writes_nothing(dtype: torch.dtype) -> None:
    """Around the tensor lies memory that would show it."""
    limit, far = 6, 2**31 - 1
    wrong = torch.tensor([0, limit, -1, 5, far, -far], dtype=dtype, device=DEVICE)
    good = (wrong >= 0) & (wrong < limit)
    for width in (8, 5):  # in units, and not
        memory = torch.rand(3 * limit, width, device=DEVICE)
        rows, before = memory[limit : 2 * limit], memory.clone()
        expected = torch.where(good[:, None], rows[torch.where(good, wrong, 0).long()], torch.zeros(()))
        across = wrong[:, None].expand(-1, width)
        for overload, args in (
            (aten.embedding.default, (rows, wrong)),
            (aten.index_select.default, (rows, 0, wrong)),
            (aten.gather.default, (rows, 0, across)),
        ):
            assert torch.equal(overridden(overload, Call(args, {}, "wrong")), expected)
        wraps = rows.index_select(0, torch.tensor([0, 5, 5], device=DEVICE))
        picked = overridden(aten.index.Tensor, Call((rows, [wrong]), {}, "wrong"))
        assert torch.equal(picked[[0, 2, 3]], wraps)
        assert not picked[[1, 4, 5]].any()
        for overload, what in (
            (aten.scatter_.src, torch.full((6, width), 2.0, device=DEVICE)),
            (aten.scatter_.value, 2),
        ):
            overridden(overload, Call((rows, 0, across, what), {}, "wrong"))
            changed = torch.zeros(3 * limit, dtype=torch.bool, device=DEVICE)
            changed[limit], changed[limit + 5] = True, True
            assert (memory[changed] == 2).all()
            assert torch.equal(memory[~changed], before[~changed])
            memory.copy_(before)


def test_offsets_beyond_32_bits() -> None:
    memory = torch.empty(2**31 + 4096, dtype=torch.int8, device=DEVICE)
    far = memory.as_strided((3, 40), (2**30, 1))
    far.copy_(torch.randint(-9, 9, (3, 40), device=DEVICE))
    where = torch.tensor([2, 0, 1, 2], device=DEVICE)
    expected = torch.stack([far[index] for index in (2, 0, 1, 2)])
    assert torch.equal(overridden(aten.index_select.default, Call((far, 0, where), {}, "far")), expected)
    into = Call((far, 0, where[:1, None].expand(1, 40), far[:1].clone() + 1), {}, "far")
    overridden(aten.scatter_.src, into)
    assert torch.equal(far[2], into.args[3][0])


def test_numbers_become_elements_as_in_pytorch() -> None:
    where = torch.tensor([[1, 0]], device=DEVICE)
    for dtype, value in (
        (torch.float16, -0.0), (torch.bfloat16, 0.3), (torch.float32, float("nan")), (torch.float64, 0.1),
        (torch.float32, float("-inf")), (torch.uint8, 255), (torch.int64, -(2**63)), (torch.bool, 7),
        (torch.complex64, 1 + 2j),
    ):  # fmt: skip
        rows = torch.zeros(2, 3, dtype=dtype, device=DEVICE)
        call = Call((rows, 1, where, value), {}, f"{dtype} {value}")
        assert torch.equal(
            as_bytes(overridden(aten.scatter.value, call)), as_bytes(outcome(aten.scatter.value, call))
        ), call.label
    whole = torch.zeros(2, 3, dtype=torch.uint8, device=DEVICE)
    declined(aten.scatter.value, "is no torch.uint8", whole, 1, where, 300)
    declined(aten.scatter.value, "is no torch.float16", whole.to(torch.float16), 1, where, 1e6)


def test_what_is_declined() -> None:
    rows, where = torch.rand(6, 5, device=DEVICE), torch.tensor([[1, 0, 3, 2, 4]], device=DEVICE)
    flat = where[0]
    deep = torch.rand(2, 3, 2, 3, 2, 3, 2, device=DEVICE)
    alternating = deep[:, ::2, :, ::2, :, ::2]
    assert deep.dim() > MAX_DIMS
    declined(aten.index.Tensor, "not beside each other", deep, [flat[:2], None, flat[:2]])
    declined(aten.index.Tensor, "without computing", rows, [rows > 0.5])
    declined(aten.index.Tensor, "without computing", rows, [None, flat.to(torch.uint8)])
    declined(aten.index.Tensor, "more than 3", deep, [flat[:2]] * 4)
    declined(aten.index_select.default, "no single walk", alternating, 6, flat[:2])
    if DEVICE == "cpu":  # a GPU's kernel stops the process
        declined(aten.index_select.default, "of no elements", rows[:0], 0, flat)
    declined(aten.gather.default, "does not do it either", rows, 0, where.to(torch.float32))
    declined(aten.gather.default, "16 bytes", rows.to(torch.complex128), 0, where)
    declined(aten.cat.default, "several dtypes", [rows, rows.double()])
    declined(aten.scatter_add.default, "torch.float32", rows, 0, where, rows)
    declined(aten.gather.out, "resized", rows, 0, where, out=rows.new_empty(0))
    declined(aten.gather.out, "does not do it either", rows, 0, where, out=rows.new_empty(1).expand(1, 5))


def test_what_is_written_must_be_apart_from_what_is_read() -> None:
    rows, where = torch.rand(5, 5, device=DEVICE), torch.zeros(5, 5, dtype=torch.int64, device=DEVICE)
    for overload, args, kwargs in (
        (aten.gather.out, (rows, 0, where), {"out": rows}),
        (aten.scatter_.src, (rows, 0, where[:2], rows), {}),
        (aten.cat.out, ([rows[:2], rows[2:]],), {"out": rows}),
    ):
        call = Call(args, kwargs, str(overload))
        assert overridden(overload, call, hit=False) is RuntimeError  # as in PyTorch


def test_scatter_is_pytorchs_where_it_must_be_deterministic() -> None:
    rows, where = torch.rand(6, 5, device=DEVICE), torch.tensor([[1, 0, 3, 2, 4]], device=DEVICE)
    overridden(aten.scatter.value, Call((rows, 0, where, 1.0), {}, "planned before"))
    torch.use_deterministic_algorithms(True)
    try:
        declined(aten.scatter.value, "is not determined", rows, 0, where, 1.0)
        overridden(aten.gather.default, Call((rows, 0, where), {}, "gather is"))
        counts = torch.zeros(6, 5, dtype=torch.int64, device=DEVICE)
        overridden(aten.scatter_add.default, Call((counts, 0, where, where), {}, "sums of integers are"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_plans_know_lists_of_tensors_by_their_looks() -> None:
    """New tensors of the same look need no new plan; of another one they do."""
    calls = Overload(aten.cat.default, next(each for each in INDEXING if each.op == "cat"))
    for shape, plans in (((3, 4), 1), ((3, 4), 1), ((3, 5), 2), ((4, 3), 3)):
        tensors = [torch.rand(shape, device=DEVICE), torch.rand(shape, device=DEVICE)]
        assert torch.equal(calls((tensors, 0), {}), torch.cat(tensors))
        assert len(calls.plans) == plans
    transposed = [torch.rand(3, 4, device=DEVICE).t() for _ in range(2)]
    assert torch.equal(calls((transposed, 0), {}), torch.cat(transposed))
    assert len(calls.plans) == 4


def test_all_that_is_meant_is_overridden() -> None:
    names = {name.removeprefix(patches.PREFIX) for name in aten_catalog().patches}
    assert {
        "embedding", "embedding.out", "index_select", "index_select.out", "gather", "gather.out", "index.Tensor",
        "index.Tensor_out", "scatter.src", "scatter.src_out", "scatter_.src", "scatter.value", "scatter.value_out",
        "scatter_.value", "scatter_add", "scatter_add.out", "scatter_add_", "cat", "cat.out",
    } <= names  # fmt: skip
    assert not {name for name in names if name.startswith("scatter") and "reduce" in name}
