"""How rows that indices pick are copied: the embedding of tokens, and the rows of a step that logits are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch
from ..kernels.common import dtype_of, randn
from ..kernels.indexing import (
    DEFAULT,
    MAX_INDICES,
    UNIT,
    Division,
    Index,
    Launchable,
    Move,
    key_of,
    move_builds,
    source,
)
from .models import vocabulary
from .search import Job, Scope, Tunable
from .trials import compile_all, copies, us_of


class Rows(NamedTuple):
    """What a job is about."""

    rows: int
    width: int  # elements
    table: int  # rows that there are to pick from
    dtype: str

    def way(self, division: Division) -> Launchable:
        """Several elements at a time, from addresses that allow it."""
        shape, steps = (self.rows, self.width), (self.width, 1)
        index = Index(torch.int64, (1, 0), limit=self.table, step=self.width)
        reach = max(self.rows, self.table) * self.width
        move = Move(shape, steps, steps, (0, 1), dtype_of(self.dtype).itemsize, reach, (index,))
        return move_builds(move, division=division)[-1]


def jobs(scope: Scope) -> Iterator[Job]:
    """A job for each power of two of tokens; rows of no whole units are not looked up."""
    head = vocabulary(scope.config, scope.tp)
    if head is None or head.in_features * dtype_of(scope.dtype).itemsize % UNIT:
        return
    units = head.in_features * dtype_of(scope.dtype).itemsize // UNIT
    for power in range((scope.max_tokens - 1).bit_length() + 1):
        count = 1 << power
        yield Job(key_of(count * units), Rows(count, head.in_features, head.out_features, scope.dtype), "index")


def candidates(job: Job) -> Sequence[Division]:
    """One to 16 units a thread."""
    every = itertools.product((256, 512, 1024, 2048), (2, 4, 8))
    fits = [Division(block, warps) for block, warps in every if 1 <= block // (32 * warps) <= 16]
    return list(dict.fromkeys([DEFAULT, *fits]))


def compile_one(job: Job, candidate: Division, arch: int) -> None:
    compile_all([job.about.way(candidate).build], arch)


class Context(NamedTuple):
    """What the trials of a job share."""

    table: torch.Tensor
    indices: list[torch.Tensor]  # of sets; the first is verified


def prepare(job: Job, device: str) -> Context:
    count, width, size, dtype = job.about
    sets = copies(2 * count * width * dtype_of(dtype).itemsize)
    return Context(
        randn((size, width), dtype, device), [torch.randint(size, (count,), device=device) for _ in range(sets)]
    )


def call_of(about: Rows, division: Division, table: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """call(index) with this division."""
    way = about.way(division)
    run = launch.launcher(way.build, table.get_device())
    empty = launch.allocator(table.get_device(), table.dtype)
    absent = (0,) * (MAX_INDICES - 1)

    def call(index: torch.Tensor) -> Any:
        out = empty(about.rows, about.width)
        run(way.grid, out.data_ptr(), table.data_ptr(), 0, index.data_ptr(), *absent, *way.tail)
        return out

    return call


def error(job: Job, candidate: Division, context: Context) -> float:
    """A copy is right or wrong."""
    got = call_of(job.about, candidate, context.table)(context.indices[0])
    return 0.0 if torch.equal(got, context.table[context.indices[0]]) else 1.0


def us(job: Job, candidate: Division, context: Context) -> float:
    return us_of(call_of(job.about, candidate, context.table), [{"index": each} for each in context.indices])


INDEX = Tunable(
    ops=("index",),
    kernel="indexing",
    source=source,
    jobs=jobs,
    candidates=candidates,
    compile=compile_one,
    prepare=prepare,
    error=error,
    tolerance=0.0,
    us=us,
)
