"""Trying the configurations of kernels: compiled in as many processes as there are cores, verified, timed, kept."""

from __future__ import annotations

import multiprocessing
import os
import queue
import statistics
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import tuned


class Job(NamedTuple):
    """One search: what to call its result in the store, and what it is about, in the kernel's own terms."""

    key: str
    about: Any


@dataclass(frozen=True)
class Tunable:
    """How the configurations of one kernel are found. A candidate is a NamedTuple, whose fields are kept.

    It goes to the processes that compile, with jobs and candidates: functions of a module, data that pickle.
    """

    ops: tuple[str, ...]  # as --ops names them
    kernel: str  # under which the store keeps them
    dtype: str  # of what is measured; a kernel that needs more than one has them in its keys
    source: Callable[[], str]
    # (model's configuration, ranks of tensor parallelism, most tokens of a step, most requests) -> jobs
    jobs: Callable[[Mapping[str, Any], int, int, int], Iterable[Job]]
    candidates: Callable[[Job], Sequence[Any]]
    # (job, candidate, architecture), in a process of its own that leaves the GPU alone: machine code into Triton's
    # cache. Raises what compilers raise.
    compile: Callable[[Job, Any, int], None]
    # The rest on the GPU. Memory that the trials of a job share.
    prepare: Callable[[Job, str], Any]
    error: Callable[[Job, Any, Any], float]  # relative, against float32; NaN is wrong, too
    tolerance: float
    us: Callable[[Job, Any, Any], float]
    # (keys and the times of their candidates) -> configurations for what was not measured itself
    general: Callable[[Mapping[str, Mapping[Any, float]]], Mapping[str, Any]]


class Outcome(NamedTuple):
    """What became of a job."""

    best: Any
    us: float
    times: dict[Any, float]
    lost: dict[Any, str]  # candidate -> why it is out of the question


def search(tunable: Tunable, job: Job, candidates: Iterable[Any], context: Any) -> Outcome:
    """The fastest of the right ones. One that raises is lost, and not the run. Raises RuntimeError if all are lost."""
    times: dict[Any, float] = {}
    lost: dict[Any, str] = {}
    for candidate in candidates:
        try:
            error = tunable.error(job, candidate, context)
            if not error <= tunable.tolerance:
                lost[candidate] = f"off by {error:.1e}"
                continue
            times[candidate] = tunable.us(job, candidate, context)
        except Exception as failure:
            lost[candidate] = f"{type(failure).__name__}: {failure}"
    if not times:
        raise RuntimeError(f"{job.key}: no configuration gives the right result: {lost}")
    best = min(times, key=lambda candidate: times[candidate])
    return Outcome(best, times[best], times, lost)


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
        "dtype": tunable.dtype,
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
    for key, best in tunable.general(times).items():
        configuration = dict(zip(fields, best, strict=True))
        tuned.write(tunable.kernel, gpu, {
            "key": key,
            "configuration": configuration,
            "gpu": gpu,
            "dtype": tunable.dtype,
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


def _end_with_parent() -> None:
    """A run that is killed outright leaves no processes behind that wait for it."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _process() -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with_parent)


def compiled(
    tunable: Tunable, work: Sequence[tuple[Job, Any]], arch: int, tick: Callable[[], Any]
) -> list[tuple[Job, Any]]:
    """Those of `work` that compile, in as many processes as there are cores. `tick` is called for each that is done.

    A compiler may take its process down. Each process is its own pool, so that this costs one candidate.
    """
    cores = len(os.sched_getaffinity(0))
    idle: queue.SimpleQueue[ProcessPoolExecutor] = queue.SimpleQueue()
    for _ in range(cores):
        idle.put(_process())

    def attempt(each: tuple[Job, Any]) -> bool:
        process = idle.get()
        try:
            return process.submit(_compile, tunable, *each, arch).result()
        except BrokenProcessPool:
            process.shutdown()
            process = _process()
            return False
        finally:
            idle.put(process)

    found = []
    with ThreadPoolExecutor(cores) as threads:
        for each, right in zip(work, threads.map(attempt, work), strict=True):
            tick()
            if right:
                found.append(each)
    for _ in range(cores):
        idle.get().shutdown()
    return found


def tunables() -> list[Tunable]:
    """All there are."""
    from .linear import LINEAR

    return [LINEAR]


def chosen(ops: str | None) -> list[Tunable]:
    """Those that `--ops` names, all if it is None. Raises ValueError for an op that none has."""
    every = tunables()
    known = [op for tunable in every for op in tunable.ops]
    wanted = known if ops is None else [op.strip() for op in ops.split(",")]
    for op in wanted:
        if op not in known:
            raise ValueError(f"--ops {op}: nothing to tune there; kernels with configurations are {', '.join(known)}")
    return [tunable for tunable in every if not set(wanted).isdisjoint(tunable.ops)]
