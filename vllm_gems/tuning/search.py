"""Trying the configurations of kernels: compiled in as many processes as there are cores, verified, timed, kept."""

from __future__ import annotations

import functools
import os
import queue
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .. import tuned
from .workers import Crashed, Worker


class Scope(NamedTuple):
    """What jobs are made for: a model, and the steps that it may have."""

    config: Mapping[str, Any]
    tp: int  # ranks of tensor parallelism
    max_tokens: int  # of one step
    max_reqs: int
    dtype: str

    @property
    def most_reqs(self) -> int:
        """Tokens of the largest decode step."""
        return min(self.max_tokens, self.max_reqs)


class Job(NamedTuple):
    """One search: what to call its result in the store, what it is about in the kernel's own terms, and for which op.

    The key says all that a result is for, the dtype too.
    """

    key: str
    about: Any
    op: str  # of its Tunable


@dataclass(frozen=True)
class Tunable:
    """How the configurations of one kernel are found. A candidate is a NamedTuple, whose fields are kept.

    It goes to the processes that compile and try, with jobs and candidates: functions of a module, data that pickle.
    """

    ops: tuple[str, ...]  # as --ops names them
    kernel: str  # under which the store keeps them
    source: Callable[[], str]
    jobs: Callable[[Scope], Iterable[Job]]
    candidates: Callable[[Job], Sequence[Any]]  # the first is what the kernel takes where nothing was measured
    # (job, candidate, architecture), in a process of its own that leaves the GPU alone: machine code into Triton's
    # cache. Raises what compilers raise.
    compile: Callable[[Job, Any, int], None]
    # The rest on the GPU. Memory that the trials of a job share.
    prepare: Callable[[Job, str], Any]
    error: Callable[[Job, Any, Any], float]  # relative, against float32; NaN is wrong, too
    tolerance: float
    us: Callable[[Job, Any, Any], float]
    # (keys and the times of their candidates) -> configurations for what was not measured itself; None if that takes
    # the kernel's default
    general: Callable[[Mapping[str, Mapping[Any, float]]], Mapping[str, Any]] | None = None
    # (index of a GPU) -> why the kernel does nothing there, None if it does; None where it is for all
    refuses: Callable[[int], str | None] | None = None


class Outcome(NamedTuple):
    """What became of a job."""

    best: Any
    us: float
    times: dict[Any, float]
    lost: dict[Any, str]  # candidate -> why it is out of the question


def search(job: Job, candidates: Iterable[Any], attempt: Callable[[Any], float | str]) -> Outcome:
    """The fastest of the right ones. `attempt` answers microseconds, or why a candidate is out of the question.

    Raises NothingFoundError if all are.
    """
    times: dict[Any, float] = {}
    lost: dict[Any, str] = {}
    for candidate in candidates:
        found = attempt(candidate)
        if isinstance(found, str):
            lost[candidate] = found
        else:
            times[candidate] = found
    if not times:
        reasons = ", ".join(dict.fromkeys(lost.values())) or "none compiles"
        raise NothingFoundError(f"no configuration gives the right result: {reasons}")
    best = min(times, key=lambda candidate: times[candidate])
    return Outcome(best, times[best], times, lost)


class NothingFoundError(Exception):
    """A job has no configuration that works."""


@functools.lru_cache(maxsize=1)
def _prepared(tunable: Tunable, job: Job, device: str) -> Any:
    return tunable.prepare(job, device)


def trial(tunable: Tunable, job: Job, candidate: Any, device: str) -> float | str:
    """Microseconds of a candidate that is right, else why it is out of the question."""
    try:
        context = _prepared(tunable, job, device)
        error = tunable.error(job, candidate, context)
        return tunable.us(job, candidate, context) if error <= tunable.tolerance else f"off by {error:.1e}"
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def _trial_and_check(tunable: Tunable, job: Job, candidate: Any, device: str) -> float | str:
    """`trial` in a process of its own, which ends itself where its GPU answers nothing but errors any more."""
    found = trial(tunable, job, candidate, device)
    torch = sys.modules.get("torch")
    if isinstance(found, str) and torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)
    return found


def tried(worker: Worker, tunable: Tunable, job: Job, candidate: Any, device: str = "cuda") -> float | str:
    """`trial` by a worker, whose process may be lost with the candidate."""
    try:
        return worker.run(_trial_and_check, tunable, job, candidate, device)
    except Crashed as crash:
        return str(crash)


def pending(tunable: Tunable, gpu: str, jobs: Iterable[Job]) -> list[Job]:
    """The jobs that the store has no valid result for."""
    source = tunable.source()
    known = {each["key"] for each in tuned.entries(tunable.kernel, gpu) if tuned.stale(each, source) is None}
    return [job for job in jobs if job.key not in known]


def keep(tunable: Tunable, gpu: str, job: Job, outcome: Outcome) -> None:
    """Write a job's result into the store."""
    tuned.write(tunable.kernel, gpu, {
        "key": job.key,
        "configuration": outcome.best._asdict(),
        "us": round(outcome.us, 2),
        "times": [[candidate._asdict(), round(us, 2)] for candidate, us in outcome.times.items()],
        "gpu": gpu,
        "versions": tuned.versions(),
        "source": tunable.source(),
    })  # fmt: skip


def generalise(tunable: Tunable, gpu: str) -> None:
    """Write the configurations for what was not measured itself, from all that was."""
    source = tunable.source()
    times: dict[str, dict[tuple[Any, ...], float]] = {}
    fields: tuple[str, ...] = ()
    for entry in tuned.entries(tunable.kernel, gpu):
        if tuned.stale(entry, source) is None and "times" in entry:
            fields = tuple(entry["configuration"])
            times[entry["key"]] = {tuple(found[name] for name in fields): us for found, us in entry["times"]}
    for key, best in tunable.general(times).items() if tunable.general else ():
        configuration = dict(zip(fields, best, strict=True))
        tuned.write(tunable.kernel, gpu, {
            "key": key,
            "configuration": configuration,
            "gpu": gpu,
            "versions": tuned.versions(),
            "source": source,
        })  # fmt: skip


def best_of_all(times: Iterable[Mapping[Any, float]]) -> Any:
    """The candidate with the least geometric mean of its time over the best one's, of those that most jobs have."""
    ratios: dict[Any, list[float]] = {}
    for each in times:
        best = min(each.values())
        for candidate, us in each.items():
            ratios.setdefault(candidate, []).append(us / best)
    most = max(map(len, ratios.values()))
    means = {each: statistics.geometric_mean(found) for each, found in ratios.items() if len(found) == most}
    return min(means, key=lambda candidate: means[candidate])


def _compile(tunable: Tunable, job: Job, candidate: Any, arch: int) -> bool:
    try:
        tunable.compile(job, candidate, arch)
    except Exception:
        return False
    return True


def compiled(
    tunable: Tunable, work: Sequence[tuple[Job, Any]], arch: int, tick: Callable[[], Any]
) -> list[tuple[Job, Any]]:
    """Those of `work` that compile, in as many processes as there are cores. `tick` is called for each that is done."""
    cores = len(os.sched_getaffinity(0))
    workers = [Worker() for _ in range(cores)]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def attempt(each: tuple[Job, Any]) -> bool:
        worker = idle.get()
        try:
            return worker.run(_compile, tunable, *each, arch)
        except Crashed:  # a compiler may
            return False
        finally:
            idle.put(worker)

    found = []
    with ThreadPoolExecutor(cores) as threads:
        for each, right in zip(work, threads.map(attempt, work), strict=True):
            tick()
            if right:
                found.append(each)
    for worker in workers:
        worker.close()
    return found


def tunables() -> list[Tunable]:
    """All there are."""
    from .block_fp8_experts import BLOCK_FP8_EXPERTS
    from .block_fp8_linear import BLOCK_FP8_LINEAR
    from .head_linear import HEAD_LINEAR
    from .indexing import INDEX
    from .linear import LINEAR
    from .matmul import MATMUL
    from .moe_experts import MOE_EXPERTS

    return [LINEAR, MATMUL, INDEX, MOE_EXPERTS, BLOCK_FP8_LINEAR, BLOCK_FP8_EXPERTS, HEAD_LINEAR]


def chosen(ops: str | None) -> list[Tunable]:
    """Those that `--ops` names, each with the ops that it names; all if it is None.

    Raises ValueError for an op that none has.
    """
    every = tunables()
    known = [op for tunable in every for op in tunable.ops]
    wanted = known if ops is None else [op.strip() for op in ops.split(",")]
    for op in wanted:
        if op not in known:
            raise ValueError(f"--ops {op}: nothing to tune there; kernels with configurations are {', '.join(known)}")
    narrowed = [replace(tunable, ops=tuple(op for op in tunable.ops if op in wanted)) for tunable in every]
    return [tunable for tunable in narrowed if tunable.ops]
