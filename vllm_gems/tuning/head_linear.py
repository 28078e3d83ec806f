"""Tilings of what every head multiplies by in a decode step: latent attention's absorbed weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch
from ..kernels.common import dtype_of, randn
from ..kernels.head_linear import (
    HeadShape,
    Tiling,
    bind_head_linear,
    build_of,
    default_tiling,
    head_linear_reference,
    key_of,
    source,
)
from .linear import CLASSES as FEW
from .models import absorbed
from .search import Job, Scope, Tunable
from .trials import SHARED_MEMORY, TOLERANCE, Context, compile_all, copies, worst_error

# Rows at which each class of them is tuned.
CLASSES = {**FEW, 128: (128,)}


class Product(NamedTuple):
    """What a job is about."""

    shape: HeadShape
    rows: int  # a key of CLASSES
    dtype: str


def jobs(scope: Scope) -> Iterator[Job]:
    """A job for each product and class of rows that a decode step can have."""
    for heads, inner, cols, transposed in absorbed(scope.config, scope.tp):
        shape = HeadShape(heads, inner, cols, not transposed)
        for rows, counts in CLASSES.items():
            # What cannot be read 16 bytes at a time is not looked up.
            if scope.most_reqs >= min(counts) and not (inner % 8 or cols % 8):
                key = key_of(shape, rows, dtype_of(scope.dtype))
                yield Job(key, Product(shape, rows, scope.dtype), "head_linear")


def candidates(job: Job) -> Sequence[Tiling]:
    """The default, and tilings that can keep an H100 busy: enough programs, enough bytes on their way."""
    (heads, inner, outside, _), most, dtype = job.about
    found = [default_tiling(job.about.shape, most, dtype_of(dtype))]
    # A small weight has work for fewer.
    enough, moving = min(100, heads * -(-outside // 16)), min(2 << 20, heads * inner * outside)
    tiles = itertools.product((64, 128) if most == 128 else (most,), (16, 32, 64, 128))
    depths = (64, 128) if inner > 128 else (32, 64, 128)
    for (rows, cols), depth, warps, stages in itertools.product(tiles, depths, (4, 8), (2, 3, 4)):
        programs, size = heads * -(-outside // cols) * (most // rows), 2 * depth * (rows + cols)
        at_once = min(programs, 132 * (SHARED_MEMORY // (size * stages)))
        if (
            enough <= programs <= 2400
            and size * stages <= SHARED_MEMORY
            and rows * cols <= 32 * 32 * warps
            and (warps == 4 or rows * cols >= 4096)
            and depth <= inner
            and stages <= max(2, inner // depth)
            and at_once * (stages - 1) * 2 * depth * cols >= moving
        ):
            found.append(Tiling(rows, cols, depth, warps, stages))
    return list(dict.fromkeys(found))


def compile_one(job: Job, candidate: Tiling, arch: int) -> None:
    compile_all([build_of(job.about.shape, candidate, dtype_of(job.about.dtype))], arch)


def prepare(job: Job, device: str) -> Context:
    (heads, inner, outside, along_out), most, dtype = job.about
    lies = (heads, inner, outside) if along_out else (heads, outside, inner)
    found = [randn(lies, dtype, device, scale=inner**-0.5) for _ in range(copies(2 * heads * inner * outside))]
    weights = found if along_out else [each.transpose(1, 2) for each in found]
    sets = [
        [{"x": randn((count, heads, inner), dtype, device), "weight": weight} for weight in weights]
        for count in CLASSES[most]
    ]
    wants = [head_linear_reference(first["x"].float(), first["weight"].float())[0] for first, *_ in sets]
    return Context(sets, [want.transpose(0, 1) for want in wants])


def call_of(job: Job, tiling: Tiling, device: int) -> Callable[..., Any]:
    """call(x, weight) -> [rows * heads, out] with this tiling."""
    (heads, inner, outside, along_out), _, dtype = job.about
    project = bind_head_linear(job.about.shape, dtype_of(dtype), device, tiling)
    empty = launch.allocator(device, dtype_of(dtype))
    step = outside if along_out else inner

    def call(x: torch.Tensor, weight: torch.Tensor) -> Any:
        rows = x.shape[0]
        out = empty(rows * heads, outside)
        project(x.data_ptr(), heads * inner, inner, weight.data_ptr(), inner * outside, step, out.data_ptr(), rows)
        return out

    return call


def error(job: Job, candidate: Tiling, context: Context) -> float:
    call = call_of(job, candidate, context.device)

    def of(inputs: dict[str, torch.Tensor], want: torch.Tensor) -> float:
        heads, rows, outside = want.shape
        return worst_error(call(**inputs).view(rows, heads, outside).transpose(0, 1), want)

    return context.error(of)


def us(job: Job, candidate: Tiling, context: Context) -> float:
    return context.us(call_of(job, candidate, context.device))


HEAD_LINEAR = Tunable(
    ops=("head_linear",),
    kernel="head_linear",
    source=source,
    jobs=jobs,
    candidates=candidates,
    compile=compile_one,
    prepare=prepare,
    error=error,
    tolerance=TOLERANCE,
    us=us,
)
