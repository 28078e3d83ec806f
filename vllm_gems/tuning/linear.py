"""Tilings of linear layers over few rows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch
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
from .search import Job, Tunable, best_of_all

DTYPE = torch.bfloat16
# Relative distance from the float32 reference, in the norm of the whole result: one rounding to 8 bits.
TOLERANCE = 4e-3
SHARED_MEMORY = 220 * 1024  # bytes a program may have, some left for Triton
# Rows at which each class of them is tuned.
CLASSES = {16: (1, 16), 32: (32,), 64: (64,)}


class Product(NamedTuple):
    """What a job is about."""

    shape: Shape
    rows: int  # a key of CLASSES


def jobs(config: Mapping[str, Any], tp: int, max_tokens: int, max_reqs: int) -> Iterator[Job]:
    """A job for each layer and class of rows that a decode step can have."""
    most = min(max_tokens, max_reqs)
    for shape in linears(config, tp):
        for rows, counts in CLASSES.items():
            if most >= min(counts):
                yield Job(key_of(shape, rows), Product(shape, rows))


def candidates(job: Job) -> Sequence[Tiling]:
    """The default, and tilings that can keep an H100 busy: enough programs, enough bytes on their way."""
    shape, rows = job.about
    parts = 2 if shape.gated else 1
    found = [default_tiling(shape, rows, DTYPE.itemsize)]
    for cols, depth, split, swapped, stages in itertools.product(
        (32, 64, 128), (64, 128, 256), (1, 2, 4), (False, True), (3, 4, 6)
    ):
        programs = -(-shape.out_features // cols) * split
        stage = 2 * depth * (parts * cols + rows)
        resident = min(programs, 132 * (SHARED_MEMORY // (stage * stages)))
        in_flight = resident * (stages - 1) * 2 * depth * parts * cols
        if (
            stage * stages <= SHARED_MEMORY
            and 100 <= programs <= 1400
            and in_flight >= 2 << 20
            and shape.in_features // split >= stages * depth
            and (cols >= 64 or not swapped)
            and parts * cols * rows <= 8192
        ):
            found.append(Tiling(cols, depth, split, swapped, 4, stages))
    return list(dict.fromkeys(found))


def compile_one(job: Job, candidate: Tiling, arch: int) -> None:
    from triton.backends.compiler import GPUTarget

    shape, rows = job.about
    launch.compile_for(build_of(shape, rows, candidate, DTYPE), GPUTarget("cuda", arch, 32))


def weights(shape: Shape, device: str) -> list[torch.Tensor]:
    """As many as no cache holds."""
    size = shape.in_features * shape.out_features * (2 if shape.gated else 1)
    count = max(2, -(-(192 << 20) // (2 * size)))
    return [
        (torch.randn(size, device=device) * shape.in_features**-0.5).to(DTYPE).view(-1, shape.in_features)
        for _ in range(count)
    ]


def prepare(job: Job, device: str) -> list[torch.Tensor]:
    return weights(job.about.shape, device)


def inputs_of(shape: Shape, rows: int, weight: torch.Tensor) -> dict[str, Any]:
    return {
        "x": torch.randn(rows, shape.in_features, device=weight.device).to(DTYPE),
        "weight": weight,
        "bias": torch.randn(weight.shape[0], device=weight.device).to(DTYPE) if shape.bias else None,
    }


def call_of(shape: Shape, tiling: Tiling | None, device: int) -> Any:
    """call(x, weight, bias) with this tiling, the one that serving takes if it is None."""
    project = bind_linear(shape, DTYPE, device, tiling)
    empty = launch.allocator(device, DTYPE)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.shape[0]
        out = empty(rows, shape.out_features)
        bias_at = 0 if bias is None else bias.data_ptr()
        project(x.data_ptr(), shape.in_features, weight.data_ptr(), bias_at, out.data_ptr(), rows)
        return out

    return call


def relative_error(shape: Shape, call: Any, inputs: dict[str, Any]) -> float:
    """Of a call against float32, in the norm of the whole result."""
    reference = silu_gated_linear_reference if shape.gated else linear_reference
    wide = {name: None if value is None else value.float() for name, value in inputs.items()}
    want = reference(**wide)[0]
    return float((call(**inputs).float() - want).norm() / want.norm())


def error(job: Job, candidate: Tiling, context: list[torch.Tensor]) -> float:
    shape, rows = job.about
    call = call_of(shape, candidate, context[0].get_device())
    # NaN in any is NaN in the sum; `max` would lose it.
    return sum(relative_error(shape, call, inputs_of(shape, count, context[0])) for count in CLASSES[rows])


def us(job: Job, candidate: Tiling, context: list[torch.Tensor]) -> float:
    from .timing import gpu_us

    shape, rows = job.about
    call = call_of(shape, candidate, context[0].get_device())
    return statistics.geometric_mean(
        gpu_us({"it": call}, [inputs_of(shape, count, weight) for weight in context], repeats=3)["it"]
        for count in CLASSES[rows]
    )


def general(times: Mapping[str, Mapping[Any, float]]) -> Mapping[str, Any]:
    """For each class of rows, gated and not, the tiling that is best over all layers."""
    groups: dict[str, list[Mapping[Any, float]]] = {}
    for key, each in times.items():
        rows = int(key.rpartition(" ")[2])
        groups.setdefault(general_key(" gated " in key, rows), []).append(each)
    return {key: best_of_all(found) for key, found in groups.items()}


LINEAR = Tunable(
    ops=("linear", "silu_gated_linear"),
    kernel="linear",
    dtype="bfloat16",
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
