"""Tilings of linear layers over few rows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch
from ..kernels.common import dtype_of
from ..kernels.linear import (
    Shape,
    Tiling,
    bind_linear,
    build_of,
    default_tiling,
    general_key,
    key_of,
    linear_reference,
    silu_gated_linear_reference,
    source,
)
from .models import linears
from .search import Job, Scope, Tunable, best_of_all
from .trials import SHARED_MEMORY, TOLERANCE, compile_all, copies, us_of, worst, worst_error

# Rows at which each class of them is tuned.
CLASSES = {16: (1, 16), 32: (32,), 64: (64,)}


class Product(NamedTuple):
    """What a job is about."""

    shape: Shape
    rows: int  # a key of CLASSES
    dtype: torch.dtype


def jobs(scope: Scope) -> Iterator[Job]:
    """A job for each layer and class of rows that a decode step can have."""
    dtype = dtype_of(scope.dtype)
    for shape in linears(scope.config, scope.tp):
        for rows, counts in CLASSES.items():
            if scope.most_reqs >= min(counts):
                op = "silu_gated_linear" if shape.gated else "linear"
                yield Job(key_of(shape, rows, dtype), Product(shape, rows, dtype), op)


def candidates(job: Job) -> Sequence[Tiling]:
    """The default, and tilings that can keep an H100 busy: enough programs, enough bytes on their way."""
    shape, rows, dtype = job.about
    parts = 2 if shape.gated else 1
    found = [default_tiling(shape, rows, dtype.itemsize)]
    # A small weight has work for fewer.
    most = -(-shape.out_features // 32) * 8
    enough, moving = min(100, most), min(2 << 20, shape.in_features * shape.out_features * parts)
    for cols, depth, split, swapped, stages in itertools.product(
        (32, 64, 128), (64, 128, 256), (1, 2, 4, 8) if most < 200 else (1, 2, 4), (False, True), (3, 4, 6)
    ):
        programs = -(-shape.out_features // cols) * split
        stage = 2 * depth * (parts * cols + rows)
        resident = min(programs, 132 * (SHARED_MEMORY // (stage * stages)))
        in_flight = resident * (stages - 1) * 2 * depth * parts * cols
        if (
            stage * stages <= SHARED_MEMORY
            and enough <= programs <= 1400
            and in_flight >= moving
            and shape.in_features // split >= stages * depth
            and (cols >= 64 or not swapped)
            and parts * cols * rows <= 8192
        ):
            found.append(Tiling(cols, depth, split, swapped, 4, stages))
    return list(dict.fromkeys(found))


def compile_one(job: Job, candidate: Tiling, arch: int) -> None:
    shape, rows, dtype = job.about
    compile_all([build_of(shape, rows, candidate, dtype)], arch)


def weights(shape: Shape, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """As many as no cache holds."""
    size = shape.in_features * shape.out_features * (2 if shape.gated else 1)
    return [
        (torch.randn(size, device=device) * shape.in_features**-0.5).to(dtype).view(-1, shape.in_features)
        for _ in range(copies(2 * size))
    ]


def prepare(job: Job, device: str) -> list[torch.Tensor]:
    return weights(job.about.shape, device, job.about.dtype)


def inputs_of(shape: Shape, rows: int, weight: torch.Tensor) -> dict[str, Any]:
    dtype, device = weight.dtype, weight.device
    return {
        "x": torch.randn(rows, shape.in_features, device=device).to(dtype),
        "weight": weight,
        "bias": torch.randn(weight.shape[0], device=device).to(dtype) if shape.bias else None,
    }


def call_of(shape: Shape, tiling: Tiling | None, device: int, dtype: torch.dtype) -> Any:
    """call(x, weight, bias) with this tiling, the one that serving takes if it is None."""
    project = bind_linear(shape, dtype, device, tiling)
    empty = launch.allocator(device, dtype)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.shape[0]
        out = empty(rows, shape.out_features)
        bias_at = 0 if bias is None else bias.data_ptr()
        project(x.data_ptr(), shape.in_features, weight.data_ptr(), bias_at, out.data_ptr(), rows)
        return out

    return call


def wanted(shape: Shape, inputs: dict[str, Any]) -> torch.Tensor:
    """The result in float32."""
    reference = silu_gated_linear_reference if shape.gated else linear_reference
    return reference(**{name: None if value is None else value.float() for name, value in inputs.items()})[0]


def error(job: Job, candidate: Tiling, context: list[torch.Tensor]) -> float:
    shape, rows, dtype = job.about
    call = call_of(shape, candidate, context[0].get_device(), dtype)
    every = [inputs_of(shape, count, context[0]) for count in CLASSES[rows]]
    return worst(worst_error(call(**inputs), wanted(shape, inputs)) for inputs in every)


def us(job: Job, candidate: Tiling, context: list[torch.Tensor]) -> float:
    shape, rows, dtype = job.about
    call = call_of(shape, candidate, context[0].get_device(), dtype)
    return statistics.geometric_mean(
        us_of(call, [inputs_of(shape, count, weight) for weight in context]) for count in CLASSES[rows]
    )


def general(times: Mapping[str, Mapping[Any, float]]) -> Mapping[str, Any]:
    """For each class of rows, gated and not, the tiling that is best over all layers."""
    groups: dict[str, list[Mapping[Any, float]]] = {}
    for key, each in times.items():
        dtype, *sizes, rows = key.split()
        groups.setdefault(general_key("gated" in sizes, int(rows), dtype_of(dtype)), []).append(each)
    return {key: best_of_all(found) for key, found in groups.items()}


LINEAR = Tunable(
    ops=("linear", "silu_gated_linear"),
    kernel="linear",
    source=source,
    jobs=jobs,
    candidates=candidates,
    compile=compile_one,
    prepare=prepare,
    error=error,
    tolerance=TOLERANCE,
    us=us,
    general=general,
)
