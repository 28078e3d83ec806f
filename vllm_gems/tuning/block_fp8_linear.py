"""Tilings of linear layers over few rows with weights in block-wise float8."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch
from ..kernels.block_fp8_linear import (
    BLOCK,
    Tiling,
    _never,
    bind_block_fp8_linear,
    block_fp8_linear_reference,
    build_of,
    default_tiling,
    device_refuses,
    key_of,
    random_weight,
    silu_gated_block_fp8_linear_reference,
    source,
)
from ..kernels.common import dtype_of, randn
from .linear import CLASSES, Product
from .models import in_block_fp8, projections
from .search import Job, Scope, Tunable
from .trials import SHARED_MEMORY, TOLERANCE, Context, compile_all, copies, worst_error

REGISTERS = 168  # of a thread, as the kernel is built


def jobs(scope: Scope) -> Iterator[Job]:
    """A job for each quantised layer and class of rows that a decode step can have."""
    dtype = dtype_of(scope.dtype)
    for shape in projections(scope.config, scope.tp) if in_block_fp8(scope.config) else ():
        for rows, counts in CLASSES.items():
            if scope.most_reqs >= min(counts) and not _never(shape, dtype):
                op = "silu_gated_block_fp8_linear" if shape.gated else "block_fp8_linear"
                yield Job(key_of(shape, rows), Product(shape, rows, dtype), op)


class Tile(NamedTuple):
    """What a program multiplies in a step: rows by so many columns, of gates and as many others if there are parts."""

    rows: int
    cols: int
    parts: int

    @property
    def nbytes(self) -> int:
        return BLOCK * (self.rows + self.parts * self.cols)


def warps_and_stages(tile: Tile, programs: int, moving: int, registers: int) -> Iterator[tuple[int, int]]:
    """Those that an H100 can launch, whose sums fit into registers, and with which so many bytes of weights are on
    their way of all programs that it has at once."""
    sums = tile.parts * tile.rows * tile.cols
    for warps, stages in itertools.product((4, 8), (2, 3, 4, 6)):
        shared = stages * tile.nbytes
        if (
            shared <= SHARED_MEMORY
            # A step's sums are added to those before; both and what is multiplied are in registers.
            and (sums + tile.rows * tile.cols) <= 32 * warps * registers // 2
            and (warps == 4 or sums >= 4096)
        ):
            at_once = min(programs, 132 * min(SHARED_MEMORY // shared, 65536 // (32 * warps * registers)))
            if at_once * (stages - 1) * BLOCK * tile.parts * tile.cols >= moving:
                yield warps, stages


def candidates(job: Job) -> Sequence[Tiling]:
    """The default, and tilings that can keep an H100 busy: enough programs, enough bytes on their way."""
    shape, rows, _ = job.about
    parts, groups = 2 if shape.gated else 1, shape.in_features // BLOCK
    found = [default_tiling(shape, rows)]
    # A small weight has work for fewer.
    most = -(-shape.out_features // 64) * min(8, groups)
    enough, moving = min(100, most), min(2 << 20, shape.in_features * shape.out_features * parts // 2)
    for cols, split in itertools.product((64, 128), (1, 2, 4, 8)):
        programs = -(-shape.out_features // cols) * split
        if enough <= programs <= 900 and split <= groups:
            for warps, stages in warps_and_stages(Tile(rows, cols, parts), programs, moving, REGISTERS):
                if stages <= max(2, groups // split):
                    found.append(Tiling(cols, split, warps, stages))
    return list(dict.fromkeys(found))


def compile_one(job: Job, candidate: Tiling, arch: int) -> None:
    shape, rows, dtype = job.about
    compile_all([build_of(shape, rows, candidate, dtype)], arch)


def prepare(job: Job, device: str) -> Context:
    shape, rows, dtype = job.about
    name = str(dtype).removeprefix("torch.")
    height = shape.out_features * (2 if shape.gated else 1)
    weights = [random_weight((height, shape.in_features), device) for _ in range(copies(height * shape.in_features))]
    bias = randn((height,), name, device) if shape.bias else None
    sets = [
        [
            {"x": randn((count, shape.in_features), name, device), "weight": weight, "scale": scale, "bias": bias}
            for weight, scale in weights
        ]
        for count in CLASSES[rows]
    ]
    reference = silu_gated_block_fp8_linear_reference if shape.gated else block_fp8_linear_reference

    def wanted(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return reference(x.float(), weight, scale, None if bias is None else bias.float())[0]

    return Context(sets, [wanted(**first) for first, *_ in sets])


def call_of(job: Job, tiling: Tiling, device: int) -> Callable[..., Any]:
    """call(x, weight, scale, bias) with this tiling."""
    shape, _, dtype = job.about
    project = bind_block_fp8_linear(shape, dtype, device, tiling)
    empty = launch.allocator(device, dtype)

    def call(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Any:
        rows = x.shape[0]
        out = empty(rows, shape.out_features)
        bias_at = 0 if bias is None else bias.data_ptr()
        project(x.data_ptr(), shape.in_features, weight.data_ptr(), scale.data_ptr(), bias_at, out.data_ptr(), rows)
        return out

    return call


def error(job: Job, candidate: Tiling, context: Context) -> float:
    call = call_of(job, candidate, context.device)
    return context.error(lambda first, want: worst_error(call(**first), want))


def us(job: Job, candidate: Tiling, context: Context) -> float:
    """Quantising the rows included."""
    return context.us(call_of(job, candidate, context.device))


BLOCK_FP8_LINEAR = Tunable(
    ops=("block_fp8_linear", "silu_gated_block_fp8_linear"),
    kernel="block_fp8_linear",
    source=source,
    jobs=jobs,
    candidates=candidates,
    compile=compile_one,
    prepare=prepare,
    error=error,
    # Hopper's tensor cores keep 14 bits of the sum over a block (https://arxiv.org/abs/2412.19437, section 3.5.2).
    tolerance=TOLERANCE + 1e-3,
    us=us,
    refuses=device_refuses,
)
