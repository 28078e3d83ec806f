"""Tilings of PyTorch's products of matrices, of any number of rows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import launch
from ..kernels.common import dtype_of, randn
from ..kernels.matmul import Matrices, Tiling, default_tiling, key_of, matmul_build, rows_class, source
from .models import absorbed, all_linears, vocabulary
from .search import Job, Scope, Tunable
from .trials import SHARED_MEMORY, TOLERANCE, compile_all, copies, us_of, worst, worst_error

# (rows, cols, warps) of tiles that fill tensor cores, with at most 128 sums a thread.
TILES = (
    (16, 32, 4), (16, 64, 4), (16, 128, 4),
    (32, 32, 4), (32, 64, 4), (32, 128, 4),
    (64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (64, 256, 8),
    (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8),
    (256, 64, 8), (256, 128, 8),
)  # fmt: skip
# (depth, stages). Few rows wait for memory, and have most of it on its way in long steps.
STEPS = ((64, 3), (64, 4), (128, 3), (128, 4))
STEPS_OF_FEW = (*STEPS, (64, 6), (128, 6), (256, 3), (256, 4))
FEW = 64


class Product(NamedTuple):
    """What a job is about: a[rows, inner] @ b[inner, cols], of each batch."""

    rows: int  # the most of a class
    cols: int
    inner: int
    transposed: bool  # b lies as [cols, inner], as a weight does
    dtype: str
    batch: int = 1
    bias: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of rows at which it is tried: what fills tiles, and what does not, which is another build."""
        return self.rows, self.rows * 3 // 4 + 1

    def matrices(self, rows: int) -> Matrices:
        cols, inner = self.cols, self.inner
        each = (rows * inner, inner * cols, rows * cols) if self.batch > 1 else (0, 0, 0)
        return Matrices(
            batch=self.batch,
            rows=rows,
            cols=cols,
            inner=inner,
            a=(each[0], inner, 1),
            b=(each[1], 1, inner) if self.transposed else (each[1], cols, 1),
            input=(0, 0, 1) if self.bias else None,
            out=(each[2], cols, 1),
            dtype=dtype_of(self.dtype),
            out_dtype=dtype_of(self.dtype),
        )


def jobs(scope: Scope) -> Iterator[Job]:
    """A job for each product of a model and class of rows: layers in steps of any size, logits and what every head
    multiplies in those that decode."""

    def of(op: str, most: int, product: Product) -> Iterator[Job]:
        contiguous = (product.inner,) if product.transposed else (product.inner, product.cols)
        rows = rows_class(1)
        # What cannot be read 16 bytes at a time is not looked up.
        while rows <= rows_class(most) and not any(size % 8 for size in contiguous):
            about = product._replace(rows=rows)
            yield Job(key_of(about.matrices(rows)), about, op)
            rows *= 2

    for shape in all_linears(scope.config, scope.tp):
        cols = shape.out_features * (2 if shape.gated else 1)
        product = Product(0, cols, shape.in_features, True, scope.dtype, bias=shape.bias)
        yield from of("addmm" if shape.bias else "mm", scope.max_tokens, product)
    if head := vocabulary(scope.config, scope.tp):
        product = Product(0, head.out_features, head.in_features, True, scope.dtype)
        yield from of("mm_logits", scope.most_reqs, product)
    for heads, inner, cols, transposed in absorbed(scope.config, scope.tp):
        yield from of("bmm", scope.most_reqs, Product(0, cols, inner, transposed, scope.dtype, batch=heads))


def candidates(job: Job) -> Sequence[Tiling]:
    """The default, and tilings that can keep an H100 busy: enough programs, not too small, enough bytes on their way.

    A weight is read once for up to 64 rows.
    """
    rows, cols, inner, _, _, batch, _ = job.about
    found = [default_tiling(batch, rows, cols, inner, 2)]

    def programs(tile_rows: int, tile_cols: int) -> int:
        return batch * -(-rows // tile_rows) * -(-cols // tile_cols)

    tiles = [tile for tile in TILES if min(rows, FEW) <= tile[0] <= rows]
    enough = min(100, max(programs(*tile[:2]) for tile in tiles))
    for tile, (depth, stages) in itertools.product(tiles, STEPS_OF_FEW if rows <= FEW else STEPS):
        tile_rows, tile_cols, warps = tile
        count = programs(tile_rows, tile_cols)
        size = 2 * depth * (tile_rows + tile_cols)
        at_once = min(count, 132 * (SHARED_MEMORY // (size * stages)))
        if (
            size * stages <= SHARED_MEMORY
            and stages * depth <= max(inner, 256)
            and count >= enough
            and (count <= 2400 or tile_rows * tile_cols >= 128 * 128)
            and (count < 100 or at_once * (stages - 1) * size >= 2 << 20)
        ):
            found.append(Tiling(tile_rows, tile_cols, depth, warps, stages))
    return list(dict.fromkeys(found))


def compile_one(job: Job, candidate: Tiling, arch: int) -> None:
    about = job.about
    built = (matmul_build(about.matrices(count), about.bias, True, tiling=candidate) for count in about.counts)
    compile_all((build for build, _, _ in built), arch)


class Context(NamedTuple):
    """What the trials of a job share. The products of fewer rows are the first ones of those of more."""

    sets: list[dict[str, torch.Tensor]]  # a, b and what is added; the first is verified
    want: torch.Tensor  # float32


def prepare(job: Job, device: str) -> Context:
    about = job.about
    lead = (about.batch,) if about.batch > 1 else ()

    def one() -> dict[str, torch.Tensor]:
        weight = (about.cols, about.inner) if about.transposed else (about.inner, about.cols)
        b = randn((*lead, *weight), about.dtype, device, scale=about.inner**-0.5)
        found = {"a": randn((*lead, about.rows, about.inner), about.dtype, device), "b": b}
        return {**found, "input": randn((about.cols,), about.dtype, device)} if about.bias else found

    sets = [one() for _ in range(copies(2 * about.batch * about.inner * (about.rows + about.cols)))]
    a, b = sets[0]["a"].float(), sets[0]["b"].float()
    want = a @ (b.mT if about.transposed else b)
    return Context(sets, want + sets[0]["input"].float() if about.bias else want)


def call_of(about: Product, rows: int, tiling: Tiling, device: int) -> Callable[..., torch.Tensor]:
    """call(a, b, input) with this tiling."""
    build, grid, tail = matmul_build(about.matrices(rows), about.bias, True, tiling=tiling)
    run = launch.launcher(build, device)
    empty = launch.allocator(device, dtype_of(about.dtype))

    def call(a: torch.Tensor, b: torch.Tensor, input: torch.Tensor | None = None) -> Any:
        out = empty(about.batch * rows, about.cols)
        run(grid, a.data_ptr(), b.data_ptr(), 0 if input is None else input.data_ptr(), out.data_ptr(), 1.0, 1.0, *tail)
        return out

    return call


def rows_of(about: Product, count: int, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of the first rows, of each batch one after the other."""
    a = inputs["a"]
    return {**inputs, "a": a if count == about.rows else a[..., :count, :].contiguous()}


def error(job: Job, candidate: Tiling, context: Context) -> float:
    """The worse of those of both numbers of rows."""
    about, first = job.about, context.sets[0]

    def of(count: int) -> float:
        call = call_of(about, count, candidate, first["a"].get_device())
        want = context.want[..., :count, :]
        return worst_error(call(**rows_of(about, count, first)).view(want.shape), want)

    return worst(map(of, about.counts))


def us(job: Job, candidate: Tiling, context: Context) -> float:
    about, device = job.about, context.sets[0]["a"].get_device()
    return statistics.geometric_mean(
        us_of(call_of(about, count, candidate, device), [rows_of(about, count, each) for each in context.sets])
        for count in about.counts
    )


MATMUL = Tunable(
    ops=("mm", "addmm", "mm_logits", "bmm"),
    kernel="matmul",
    source=source,
    jobs=jobs,
    candidates=candidates,
    compile=compile_one,
    prepare=prepare,
    error=error,
    tolerance=TOLERANCE,
    us=us,
)
