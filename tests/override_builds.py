"""Builds of what stands in for PyTorch's operations, which are no kernels of the catalog: representatives of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from vllm_gems.aten.elementwise import Elementwise
from vllm_gems.aten.overloads import overloads_of
from vllm_gems.kernels import along
from vllm_gems.kernels.arange import COMPUTE, arange_build
from vllm_gems.kernels.convolution import Convolved, Two, convolution_build
from vllm_gems.kernels.indexing import MAX_DIMS, MAX_INDICES, Index, Move, move_builds
from vllm_gems.kernels.matmul import Matrices, matmul_build
from vllm_gems.kernels.pointwise import Pointwise, pointwise_build, walk
from vllm_gems.kernels.reduce import Reduction, reduce_build
from vllm_gems.kernels.sort import TILE, Order, sort_builds
from vllm_gems.launch import Build
from vllm_gems.patches import aten


class Override(NamedTuple):
    """A build and what it is for."""

    build: Build
    label: str
    dtype: str


def elementwise(everything: bool) -> Iterator[Override]:
    """Every formula on tensors that are one walk through memory, in float32 and int32; and every kind of walk."""
    rows = [row for row in aten.ROWS if isinstance(row, Elementwise)]
    if not everything:
        rows = [row for row in rows if row.op in ("add", "gelu", "remainder", "where", "floor_divide")]
    dtypes = {"f": torch.float32, "i": torch.int32}
    for row in rows:
        schema = next(each._schema for each in overloads_of(row.op) if row.reads(each._schema))
        for family, dtype in dtypes.items():
            if family in row.families:
                for call in _calls(row, schema, dtype):
                    count = 1 + sum(each is not None for each in call.tensors)
                    build, _ = pointwise_build(call, walk((4096,), [(1,)] * count), True)
                    yield Override(build, f"{row.op} {call.constant}", str(dtype))
    add = next(row for row in rows if row.op == "add")
    schema = next(each._schema for each in overloads_of("add") if add.reads(each._schema))
    (call,) = _calls(add, schema, torch.bfloat16)
    for dims in range(1, 6):
        shape = (6, 5, 7, 3, 9)[:dims]
        gapped = [math.prod(size + 1 for size in shape[dim + 1 :]) * 2 for dim in range(dims)]
        for factor in (1, 2**31):
            walked = walk(shape, [[factor * step for step in gapped], gapped[::-1], gapped])
            for aligned in (True, False):
                build, _ = pointwise_build(call, walked, aligned)
                yield Override(build, f"add, {dims} dimensions, {factor=}", "bfloat16")


def _calls(row: Elementwise, schema: Any, dtype: torch.dtype) -> Iterator[Pointwise]:
    """What a row computes in `dtype`, one call for each word that an argument may be."""
    kinds = [str(each.type) for each in schema.arguments if not each.is_out]
    names = [each.name for each in schema.arguments if not each.is_out]
    words = {"approximate": ("none", "tanh"), "rounding_mode": ("trunc", "floor")}
    (options,) = [words[name] for name in names if name in words] or [(None,)]
    compute = torch.float32 if dtype.is_floating_point else dtype
    kind = row.kind if isinstance(row.kind, str) else "default"
    for option in options:
        call = Pointwise(
            formula=row.formula,
            tensors=tuple(
                (torch.bool if name in row.as_is else dtype) if "Tensor" in kind else None
                for name, kind in zip(names, kinds, strict=True)
            ),
            scalars=tuple("number" in kind or "float" in kind for kind in kinds),
            constant=option if names[-1] in words else False if kinds[-1] == "bool" else None,
            compute=compute,
            out=torch.bool if kind == "bool" else dtype,
            as_is=tuple(index for index, name in enumerate(names) if name in row.as_is),
        )
        yield call
    for absent, formula in row.without.items():
        there = [index for index, name in enumerate(names) if name != absent]
        yield call._replace(
            formula=formula,
            tensors=tuple(call.tensors[index] for index in there),
            scalars=tuple(call.scalars[index] for index in there),
            constant=None,
        )


def _layouts(everything: bool) -> list[tuple[str, Any]]:
    """(name, (shape of what is kept, of what is not, their strides))"""
    columns = ("columns", ((4096,), (512,), (1, 4096)))
    return [("rows", ((512,), (4096,), (4096, 1))), columns] if everything else [columns]


def reductions(everything: bool) -> Iterator[Override]:
    """Everything that is reduced, of rows and of columns, which are walked through apart and take more registers."""
    for label, (kept, gone, (kept_step, step)) in _layouts(everything):
        kept_walk = walk(kept, [[kept_step], [1]])
        for what in ("sum", "mean", "prod", "max", "min", "any", "all", "count", "var", "std", "argmax", "argmin"):
            for x, compute in ((torch.bfloat16, torch.float32), (torch.int64, torch.int64)):
                if compute is torch.int64 and (what in ("mean", "var", "std") or not everything):
                    continue
                out = torch.bool if what in ("any", "all") else torch.int64 if what == "count" else x
                call = Reduction(what, x, compute, out, x if what == "var" else None)
                build, _, _ = reduce_build(call, kept_walk, walk(gone, [[step]]), True)
                yield Override(build, f"{what} of {label}", str(x))


def along_dimensions(everything: bool) -> Iterator[Override]:
    """Everything that is done along a dimension, likewise."""
    for label, (kept, gone, (kept_step, step)) in _layouts(everything):
        for what in along.FUNCTIONS:
            count = 3 if "gradient" in what else 2
            rows = along.Rows(walk(kept, [[kept_step]] * count), gone[0], (step,) * count)
            build, _, _ = along.along_build(what, (torch.bfloat16,) * count, torch.float32, rows, True)
            yield Override(build, f"{what} of {label}", "bfloat16")
    for groups in (0, 32):
        x = torch.bfloat16
        norm = along.Norm(x, x, x, torch.float32, torch.float32, 4096, groups, 64, 64)
        yield Override(along.norm_build(norm, True), f"norm, {groups=}", "bfloat16")


def sorting(everything: bool) -> Iterator[Override]:
    """Words of 64 bits and of 32: whole tiles, the best of rows that take two launches, several rows in a program.

    A tile takes a compiler ten times as long as a short row, which has the same in it.
    """
    wanted = [(torch.uint8, 64, 64, 1)]
    if everything:
        wanted += [(torch.float32, TILE, TILE, 1), (torch.uint8, TILE, TILE, 1), (torch.bfloat16, 151936, 64, 512)]
    for dtype, length, k, step in wanted:
        starts = walk((512,), [[length if step == 1 else 1], [k], [k]])
        for each in sort_builds(Order(dtype, False, k), along.Rows(starts, length, (step, 1, 1)), True):
            yield Override(each.build, f"{k} of {length}, {step=}", str(dtype))


def indexing(everything: bool) -> Iterator[Override]:
    """Moves of one to five dimensions with no index to three, by offsets of 32 bits and of 64, in every direction."""
    shape, dense, other = (3, 5, 7, 9, 11), (99999, 7700, 900, 60, 2), (1, 7, 90, 1000, 12345)
    indices = [Index(dtype, other, 10, 2) for dtype in (torch.int64, torch.int32, torch.int64)]
    moves = {"rows": Move((512, 4096), (4096, 1), (4096, 1), (0, 1), 2, 0, (Index(torch.int64, (1, 0), 9, 4096),))}
    for dims in range(1, MAX_DIMS + 1):
        sizes, steps, others = shape[:dims], dense[:dims], other[:dims]
        for count in range(MAX_INDICES + 1) if dims in (2, MAX_DIMS) else (1,):
            of = tuple(each._replace(strides=others) for each in indices[:count])
            moves[f"{dims} dimensions, {count} indices"] = Move(sizes, steps, steps, others, 2, 0, of, wraps=count > 1)
    steps, of = dense[:3], (indices[0]._replace(strides=other[:3]),)
    for itemsize in (1, 2, 4, 8):
        moves[f"scatter, {itemsize} bytes"] = Move(shape[:3], steps, steps, other[:3], itemsize, 0, of, scatters=True)
        moves[f"number, {itemsize} bytes"] = Move(shape[:3], steps, steps, None, itemsize, 0, of, scatters=True)
    for itemsize in (4, 8):
        move = Move(shape[:3], steps, steps, other[:3], itemsize, 0, of, scatters=True, adds=True)
        moves[f"sum, {itemsize} bytes"] = move
    if not everything:
        moves = {label: move for label, move in moves.items() if "5 dimensions" in label or "2 bytes" in label}
    for label, move in moves.items():
        for reach in (0, 2**31):
            for way in move_builds(move._replace(reach=reach)):
                label_of = f"{label}, {reach=}, {way.itemsize} bytes at a time"
                yield Override(way.build, label_of, "as bytes")


def aranges(everything: bool) -> Iterator[Override]:
    """Of all dtypes, and with a stride."""
    for dtype in COMPUTE if everything else (torch.bfloat16,):
        yield Override(arange_build(dtype, dtype is not torch.float64), "arange", str(dtype))


def products(everything: bool) -> Iterator[Override]:
    """Every tile, of weights as they lie and transposed, with sizes that fill it and that do not; gaps, and batches."""
    sizes = {
        "prefill": (8192, 8192, 4096), "ragged": (8190, 8176, 4080), "square": (2048, 2048, 2048),
        "64 rows": (64, 16384, 4096), "a batch": (64, 4096, 4096), "16 rows": (16, 4096, 4096),
        "logits": (16, 151936, 2048), "a row": (1, 4096, 4000), "a column": (4096, 1, 4096), "tall": (100000, 16, 512),
        "tiny": (5, 7, 3),
    }  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for label, (rows, cols, inner) in sizes.items():
            if not everything and label not in ("16 rows", "a row", "tiny"):
                continue
            for transposed in (True, False) if dtype is torch.bfloat16 else (True,):
                weight = (0, 1, inner) if transposed else (0, cols, 1)
                out = (0, cols, 1)
                call = Matrices(1, rows, cols, inner, (0, inner, 1), weight, (0, 0, 1), out, dtype, dtype)
                yield _product(call, True, f"{label}, {transposed=}")
        if not everything:
            continue
        gaps = Matrices(
            3, 8190, 8190, 4090, (99999937, 2 * 4090, 2), (99999937, 2, 2 * 4090), (0, 1, 8190), (99999937, 8190, 1),
            dtype, dtype,
        )  # fmt: skip
        whole = Matrices(32, 512, 128, 512, (2**18, 512, 1), (2**16, 128, 1), (0, 0, 1), (2**16, 128, 1), dtype, dtype)
        yield _product(gaps, True, "gaps in a batch")
        yield _product(gaps._replace(a=(0, 4090, 1), b=(0, 1, 4090)), False, "misaligned")
        yield _product(whole, True, "a batch of products")


def _product(call: Matrices, aligned: bool, label: str) -> Override:
    build, _, _ = matmul_build(call, True, aligned)
    return Override(build, label, str(call.dtype))


def convolutions(everything: bool) -> Iterator[Override]:
    """Of images and a signal, in both memory formats and with gaps, in all tiles."""

    def strides(shape: tuple[int, ...], last: bool = False) -> Any:
        _, channels, height, width = shape
        whole = channels * height * width
        return (whole, 1, width * channels, channels) if last else (whole, height * width, width, 1)

    def call(
        shape: Any, weight: Any, stride: Two = (1, 1), padding: Two = (0, 0), dilation: Two = (1, 1),
        last: bool = False, weight_last: bool = False, dtype: torch.dtype = torch.bfloat16,
    ) -> Convolved:  # fmt: skip
        spans = [by * (size - 1) + 1 for by, size in zip(dilation, weight[2:], strict=True)]
        sizes = [(s + 2 * p - span) // by + 1 for s, p, span, by in zip(shape[2:], padding, spans, stride, strict=True)]
        out = (shape[0], weight[0], *sizes)
        of_x, of_weight, of_out = strides(shape, last), strides(weight, weight_last), strides(out, last or weight_last)
        return Convolved(shape, weight, out, of_x, of_weight, 1, of_out, stride, padding, dilation, dtype)

    patches = call((8, 3, 336, 336), (1024, 3, 14, 14), (14, 14))
    ragged = call((31, 256, 57, 57), (240, 256, 3, 3), padding=(1, 1), last=True, weight_last=True)
    odd = call((31, 33, 57, 57), (250, 33, 3, 5), (2, 3), (1, 2), (2, 1))
    calls = {
        "patches": patches,
        "ragged tiles, channels last": ragged,
        "gaps": odd._replace(x=(214517, 6500, 114, 2), weight=(2000, 60, 20, 4), bias=2, out=(400000, 1600, 40, 2)),
        "a signal": call((8, 80, 1, 3000), (1280, 80, 1, 3), padding=(0, 1)),
        "odd sizes": odd,
        "odd sizes, channels last": call(
            (31, 256, 57, 57), (250, 256, 3, 3), padding=(1, 1), last=True, weight_last=True
        ),
        "an image channels last": call((31, 33, 57, 57), (250, 33, 3, 5), (2, 3), (1, 2), (2, 1), last=True),
        "3x3": call((32, 256, 56, 56), (256, 256, 3, 3), padding=(1, 1)),
        "3x3, channels last": call((32, 256, 56, 56), (256, 256, 3, 3), padding=(1, 1), last=True, weight_last=True),
        "1x1": call((32, 256, 56, 56), (512, 256, 1, 1)),
        "1x1, channels last": call((32, 80, 57, 57), (240, 80, 1, 1), (2, 3), last=True, weight_last=True),
        "few, channels last": call((1, 64, 14, 14), (64, 64, 3, 3), padding=(1, 1), last=True, weight_last=True),
        "tiny": call((1, 3, 5, 7), (5, 3, 2, 3)),
    }  # fmt: skip
    in_float32 = ("gaps", "3x3, channels last")
    if not everything:
        calls = {label: each for label, each in calls.items() if label in ("patches", "gaps", "few, channels last")}
    for label, each in calls.items():
        for dtype in (torch.bfloat16, torch.float32) if everything else (torch.bfloat16,):
            if dtype is torch.bfloat16 or label in in_float32:
                build, _, _ = convolution_build(each._replace(dtype=dtype), True)
                yield Override(build, label, str(dtype))
    build, _, _ = convolution_build(patches, False)
    yield Override(build, "patches, misaligned", "bfloat16")


# What stands in -> (all builds, or a few where nothing is tuned and time is short) -> them.
FAMILIES = {
    "elementwise": elementwise,
    "reductions": reductions,
    "along a dimension": along_dimensions,
    "in order": sorting,
    "indexing": indexing,
    "arange": aranges,
    "products": products,
    "convolutions": convolutions,
}
