"""A kernel that is made up, whose functions go to other processes: these start fast, as nothing here needs torch."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

from vllm_gems.tuning.search import Job, Scope, Tunable, best_of_all


class Toy(NamedTuple):
    size: int


CANDIDATES = [Toy(size) for size in (1, 2, 3, 4, 5, 6, 7)]


def jobs(scope: Scope) -> list[Job]:
    found = [Job(f"job {number}", number, "made_up") for number in range(scope.config["jobs"])]
    return [*found, Job("none right", -1, "made_up")]


def candidates(job: Job) -> list[Toy]:
    return CANDIDATES


def compile(job: Job, candidate: Toy, arch: int) -> None:
    if candidate.size == 2:
        raise ValueError(f"not for {arch}")
    if candidate.size == 3 and job.about == 0:
        os._exit(1)


def prepare(job: Job, device: str) -> str:
    return f"context of {job.key}"


def error(job: Job, candidate: Toy, context: str) -> float:
    assert context == f"context of {job.key}"
    if candidate.size == 5 and job.about == 0:
        os._exit(1)
    return 1.0 if candidate.size in (4, 7) or job.about < 0 else 0.0


def us(job: Job, candidate: Toy, context: str) -> float:
    time.sleep(float(os.environ.get("SECONDS_OF_A_TRIAL", "0")))
    if candidate.size == 6:
        raise MemoryError("too large")
    return 10.0 - candidate.size


def general(times: Any) -> dict[str, Any]:
    return {"any": best_of_all(times.values())} if times else {}


def source() -> str:
    return "the source"


def refuses(device: int) -> str:
    return f"not for GPU {device}"


KERNEL = Tunable(
    ops=("made_up",),
    kernel="made_up",
    source=source,
    jobs=jobs,
    candidates=candidates,
    compile=compile,
    prepare=prepare,
    error=error,
    tolerance=1e-3,
    us=us,
    general=general,
)
