"""Tilings of the two products of a mixture's experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch
from ..kernels.common import dtype_of
from ..kernels.moe_experts import (
    MAX_TOKENS,
    Experts,
    Tiling,
    default_tiling,
    experts_build,
    key_of,
    source,
    way_of,
)
from .models import mixture
from .search import Job, Scope, Tunable
from .trials import SHARED_MEMORY, TOLERANCE, compile_all, copies, us_of, worst_error


class Product(NamedTuple):
    """What a job is about: the gated product of every expert, or the one after it."""

    experts: Experts
    num_tokens: int  # the most of a class
    gated: bool
    dtype: str

    @property
    def pairs(self) -> int:
        return self.num_tokens * self.experts.topk

    @property
    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs) of an expert."""
        inside, outside = self.experts.hidden_size, self.experts.intermediate_size
        return (inside, outside) if self.gated else (outside, inside)

    @property
    def programs(self) -> int:
        """For each tile of an expert's columns."""
        return self.pairs if way_of(self.experts, self.num_tokens)[1] else self.experts.num_experts


def products(scope: Scope) -> Iterator[Product]:
    """Two for each power of two of tokens that decode."""
    experts = mixture(scope.config, scope.tp)
    if experts is None:
        return
    most = min(scope.most_reqs, MAX_TOKENS)
    for power in range((most - 1).bit_length() + 1):
        for gated in (True, False):
            yield Product(experts, 1 << power, gated, scope.dtype)


def jobs(scope: Scope) -> Iterator[Job]:
    """One for each product."""
    for about in products(scope):
        key = key_of(about.experts, about.num_tokens, about.gated, dtype_of(scope.dtype))
        yield Job(key, about, "moe_experts")


def build_of(about: Product, tiling: Tiling) -> launch.Build:
    return experts_build(
        about.experts, tiling, dtype_of(about.dtype), about.gated, *way_of(about.experts, about.num_tokens)
    )


def candidates(job: Job) -> Sequence[Tiling]:
    """The default, and tilings with rows for half, all and twice of what an expert gets if all get the same."""
    experts, num_tokens, gated, _ = job.about
    default = default_tiling(experts, num_tokens, gated, 2)
    parts = 2 if gated else 1
    found = [default]
    for rows, cols, depth, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (64, 128), (3, 4, 5)):
        size = 2 * depth * (rows + parts * cols)
        if (
            default.rows <= 2 * rows <= 4 * default.rows
            and parts * cols * rows <= 8192
            and size >= 16 << 10
            and size * stages <= SHARED_MEMORY // 2  # two programs share a multiprocessor
        ):
            found.append(Tiling(rows, cols, depth, 4, stages))
    return list(dict.fromkeys(found))


def compile_one(job: Job, candidate: Tiling, arch: int) -> None:
    compile_all([build_of(job.about, candidate)], arch)


class Routed(NamedTuple):
    """Which expert each pair of a token and one goes to."""

    ids: torch.Tensor
    pairs: torch.Tensor  # by expert
    starts: torch.Tensor  # where an expert's begin


class Context(NamedTuple):
    """What the trials of a job share."""

    x: torch.Tensor
    weight: torch.Tensor
    routes: list[Routed]  # of sets; the first is verified
    want: torch.Tensor  # float32


def prepare(job: Job, device: str) -> Context:
    about = job.about
    experts, dtype = about.experts, dtype_of(about.dtype)
    width, out = about.sizes
    weight = torch.randn(experts.num_experts, (2 if about.gated else 1) * out, width, device=device, dtype=dtype)
    weight *= width**-0.5
    x = torch.randn(about.num_tokens if about.gated else about.pairs, width, device=device).to(dtype)
    routes = routed(about, 2 * weight[0].numel(), device)
    return Context(x, weight, routes, wanted(about, x, lambda expert: weight[expert].float(), routes[0].ids))


def routed(about: Product, nbytes: int, device: str) -> list[Routed]:
    """Sets of random ones. An expert has so many bytes: few tokens ask for few experts, whose weights a cache may hold
    until they are asked for again."""
    experts = about.experts
    found = []
    for _ in range(min(16, copies(nbytes * min(experts.num_experts, about.pairs)))):
        order = torch.rand(about.num_tokens, experts.num_experts, device=device).argsort(dim=1)
        ids = order[:, : experts.topk].to(torch.int32).flatten()
        counts = torch.bincount(ids, minlength=experts.num_experts)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        found.append(Routed(ids, ids.argsort(stable=True).to(torch.int32), starts))
    return found


def wanted(
    about: Product, x: torch.Tensor, weight_of: Callable[[int], torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """The result in float32, of experts' weights in float32."""
    want = torch.empty(about.pairs, about.sizes[1], device=x.device)
    for expert in ids.unique().tolist():
        (mine,) = (ids == expert).nonzero(as_tuple=True)
        rows = x[mine // about.experts.topk if about.gated else mine].float()
        found = rows @ weight_of(expert).T
        if about.gated:
            gate, up = found.chunk(2, dim=-1)
            found = torch.nn.functional.silu(gate) * up
        want[mine] = found
    return want


def call_of(about: Product, tiling: Tiling, context: Context) -> Callable[..., torch.Tensor]:
    """call(ids, pairs, starts) with this tiling."""
    device = context.x.get_device()
    run = launch.launcher(build_of(about, tiling), device)
    out_features = about.sizes[1]
    empty = launch.allocator(device, dtype_of(about.dtype) if about.gated else torch.float32)
    looked_for, _ = way_of(about.experts, about.num_tokens)
    grid = about.programs * -(-out_features // tiling.cols)
    x_at, weight_at = context.x.data_ptr(), context.weight.data_ptr()

    def call(ids: torch.Tensor, pairs: torch.Tensor, starts: torch.Tensor) -> Any:
        out = empty(about.pairs, out_features)
        listed = (0, 0) if looked_for else (pairs.data_ptr(), starts.data_ptr())
        run(grid, x_at, weight_at, ids.data_ptr(), *listed, out.data_ptr(), about.pairs)
        return out

    return call


def error(job: Job, candidate: Tiling, context: Context) -> float:
    return worst_error(call_of(job.about, candidate, context)(*context.routes[0]), context.want)


def us(job: Job, candidate: Tiling, context: Context) -> float:
    return us_of(call_of(job.about, candidate, context), [each._asdict() for each in context.routes])


MOE_EXPERTS = Tunable(
    ops=("moe_experts",),
    kernel="moe_experts",
    source=source,
    jobs=jobs,
    candidates=candidates,
    compile=compile_one,
    prepare=prepare,
    error=error,
    tolerance=TOLERANCE,
    us=us,
)
