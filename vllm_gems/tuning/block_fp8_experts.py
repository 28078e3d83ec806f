"""Tilings of the two products of a mixture's experts with weights in block-wise float8."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch
from ..kernels.block_fp8_experts import Tiling, _never, default_tiling, experts_build, key_of, source
from ..kernels.block_fp8_linear import (
    BLOCK,
    FLOAT8,
    bind_group_quantise,
    dequantised,
    device_refuses,
    quantise_reference,
    random_weight,
)
from ..kernels.common import dtype_of, randn
from ..kernels.moe_experts import way_of
from .block_fp8_linear import REGISTERS, Tile, warps_and_stages
from .models import in_block_fp8
from .moe_experts import Product, Routed, products, routed, wanted
from .search import Job, Scope, Tunable
from .trials import compile_all, us_of, worst_error

REGISTERS_OF_GATED = 255


def jobs(scope: Scope) -> Iterator[Job]:
    """Two for each power of two of tokens that decode."""
    for about in products(scope) if in_block_fp8(scope.config) else ():
        if not _never(about.experts, dtype_of(scope.dtype)):
            yield Job(key_of(about.experts, about.num_tokens, about.gated), about, "block_fp8_experts")


def candidates(job: Job) -> Sequence[Tiling]:
    """The default, and tilings with rows for half, all and twice of what an expert gets if all get the same."""
    about: Product = job.about
    default = default_tiling(about.experts, about.num_tokens, about.gated)
    inside, outside = about.sizes
    parts, cols = (2, (BLOCK,)) if about.gated else (1, (BLOCK // 2, BLOCK))
    moving = min(2 << 20, min(about.experts.num_experts, about.pairs) * parts * inside * outside // 2)
    registers = REGISTERS_OF_GATED if about.gated else REGISTERS
    found = [default]
    for tile in itertools.starmap(Tile, itertools.product((16, 32, 64), cols, (parts,))):
        programs = about.programs * -(-outside // tile.cols)
        if default.rows <= 2 * tile.rows <= 4 * default.rows:
            found += [
                Tiling(tile.rows, tile.cols, warps, stages)
                for warps, stages in warps_and_stages(tile, programs, moving, registers)
            ]
    return list(dict.fromkeys(found))


def build_of(about: Product, tiling: Tiling) -> launch.Build:
    return experts_build(about.experts, tiling, about.gated, *way_of(about.experts, about.num_tokens))


def compile_one(job: Job, candidate: Tiling, arch: int) -> None:
    compile_all([build_of(job.about, candidate)], arch)


class Context(NamedTuple):
    """What the trials of a job share."""

    x: Any  # float8
    x_scales: Any
    weight: torch.Tensor
    scale: torch.Tensor
    routes: list[Routed]  # of sets; the first is verified
    want: torch.Tensor  # float32
    nearest: torch.Tensor | None  # what is left of it when it is quantised, if it is


def random_experts(count: int, rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`random_weight` one expert after the other: all in float32 would not fit."""
    weight = torch.empty(count, rows, columns, dtype=FLOAT8, device=device)
    scale = torch.empty(count, -(-rows // BLOCK), columns // BLOCK, device=device)
    for expert in range(count):
        weight[expert], scale[expert] = random_weight((rows, columns), device)
    return weight, scale


def prepare(job: Job, device: str) -> Context:
    about: Product = job.about
    width, out = about.sizes
    weight, scale = random_experts(about.experts.num_experts, (2 if about.gated else 1) * out, width, device)
    x = randn((about.num_tokens if about.gated else about.pairs, width), about.dtype, device)
    inside, x_scales = bind_group_quantise(width, x.dtype, x.get_device())(x.data_ptr(), width, x.shape[0])
    routes = routed(about, weight[0].numel(), device)
    rows = quantise_reference(x.float())
    want = wanted(about, rows, lambda expert: dequantised(weight[expert], scale[expert]), routes[0].ids)
    return Context(inside, x_scales, weight, scale, routes, want, quantise_reference(want) if about.gated else None)


def call_of(about: Product, tiling: Tiling, context: Context) -> Callable[..., tuple[Any, ...]]:
    """call(ids, pairs, starts) with this tiling: what every pair gets, and its scales if it is quantised."""
    device = context.weight.get_device()
    run = launch.launcher(build_of(about, tiling), device)
    out_features = about.sizes[1]
    empty = launch.allocator(device, torch.uint8 if about.gated else torch.float32)
    floats = launch.allocator(device, torch.float32)
    looked_for, _ = way_of(about.experts, about.num_tokens)
    grid = about.programs * -(-out_features // tiling.cols)
    parts = (each.data_ptr() for each in (context.x, context.x_scales, context.weight, context.scale))
    x_at, x_scales_at, weight_at, scale_at = parts

    def call(ids: torch.Tensor, pairs: torch.Tensor, starts: torch.Tensor) -> tuple[Any, ...]:
        out = empty(about.pairs, out_features)
        scales = (floats(out_features // BLOCK, about.pairs),) if about.gated else ()
        run(
            grid, x_at, x_scales_at, weight_at, scale_at, ids.data_ptr(),
            *((0, 0) if looked_for else (pairs.data_ptr(), starts.data_ptr())), out.data_ptr(),
            scales[0].data_ptr() if scales else 0, about.pairs,
        )  # fmt: skip
        return out, *scales

    return call


def error(job: Job, candidate: Tiling, context: Context) -> float:
    out, *scales = call_of(job.about, candidate, context)(*context.routes[0])
    if scales:
        out = out.view(FLOAT8).float() * scales[0].T.repeat_interleave(BLOCK, dim=1)
    return worst_error(out, context.want, context.nearest)


def us(job: Job, candidate: Tiling, context: Context) -> float:
    return us_of(call_of(job.about, candidate, context), [each._asdict() for each in context.routes])


BLOCK_FP8_EXPERTS = Tunable(
    ops=("block_fp8_experts",),
    kernel="block_fp8_experts",
    source=source,
    jobs=jobs,
    candidates=candidates,
    compile=compile_one,
    prepare=prepare,
    error=error,
    # Of sums that are off by 2**-12, as those of tensor cores are, what is quantised is further off by 5e-3 in rows or
    # columns of 128: a number that lies between two that float8 has becomes the one or the other.
    tolerance=1e-2,
    us=us,
    refuses=device_refuses,
)
