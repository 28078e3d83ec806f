"""What trials share: machine code before they begin, how many inputs no cache holds, and how wrong a result is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..launch import Build, compile_for

# Relative distance from the float32 reference in 16 bits: one rounding, which is 2**-8 of a bfloat16 at most.
TOLERANCE = 4e-3
SHARED_MEMORY = 220 * 1024  # bytes a program may have on an H100, some left for Triton


def compile_all(builds: Iterable[Build], arch: int) -> None:
    """Machine code for NVIDIA's architecture `arch` into Triton's cache."""
    from triton.backends.compiler import GPUTarget

    for build in builds:
        compile_for(build, GPUTarget("cuda", arch, 32))


def copies(nbytes: int) -> int:
    """Of inputs of this size, to go through in turn: as many as no cache holds, where that takes few enough to make."""
    return min(256, max(2, -(-(192 << 20) // max(nbytes, 1))))


def worst_error(got: torch.Tensor, want: torch.Tensor, nearest: torch.Tensor | None = None) -> float:
    """The largest relative distance of a row or a column of matrices, in its norm.

    A wrong row among thousands is nothing in the norm of the whole. What a column of few elements is relative to may be
    close to zero, so these are not looked at by themselves. Of results that are quantised it is how much further off
    they are than the nearest that there are, which takes more elements: one that lies between two can be either.
    """
    fewest = 8 if nearest is None else 128
    distance, size = (got.float() - want.float()).square(), want.float().square()
    if nearest is not None:
        distance = distance - (nearest - want).square()
    dims = [dim for dim in (-1, -2) if want.shape[dim] >= fewest]
    errors = [(distance.sum(dim).clamp(min=0) / size.sum(dim)).flatten() for dim in dims]
    return float(torch.cat(errors).max().sqrt())  # NaN in any is NaN here


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if there is one, which `max` would lose."""
    return float(torch.tensor(list(errors)).max())


def us_of(call: Callable[..., Any], sets: list[dict[str, Any]]) -> float:
    """Microseconds of GPU time."""
    from .timing import gpu_us

    found = gpu_us({"it": call}, sets, repeats=3)["it"]
    torch.cuda.empty_cache()  # each graph has memory of its own, which no other is given before that
    return found


class Context(NamedTuple):
    """What the trials of a job share, for each of its numbers of rows."""

    sets: list[list[dict[str, Any]]]  # of a call's arguments; the first of each is verified
    wants: list[torch.Tensor]  # float32

    @property
    def device(self) -> int:
        return self.wants[0].get_device()

    def error(self, of: Callable[[dict[str, Any], torch.Tensor], float]) -> float:
        """The worst of those of all numbers of rows."""
        return worst(of(first, want) for (first, *_), want in zip(self.sets, self.wants, strict=True))

    def us(self, call: Callable[..., Any]) -> float:
        return statistics.geometric_mean(us_of(call, sets) for sets in self.sets)
