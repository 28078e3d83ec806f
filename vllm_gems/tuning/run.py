"""`vllm-gems pretune`: jobs of a model, those that are done left out, and a bar that says how long it takes."""

from __future__ import annotations

import os
from typing import Any

from .. import tuned
from .models import configurations
from .search import Job, NothingFoundError, Scope, Tunable, chosen, compiled, generalise, keep, pending, search, tried
from .workers import Worker


def pretune(
    model: str,
    *,
    dtype: str = "bfloat16",
    tp: int = 1,
    max_tokens: int = 16384,
    max_reqs: int = 1024,
    ops: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Measure what the store does not have yet, job by job, and keep each result at once: a run that was stopped goes
    on where it was. A job that has no right candidate does not end it.

    Returns {"jobs": [{"kernel", "key"} and one of "candidates" (a dry run), "us" with "of" (candidates) and "default"
    (its us; None if it is out of the question), "known", "skipped" (why the kernel is not for this GPU), "failed"
    (why)], "lines": [what to print]}. Raises ValueError for a model or an op that is not known, for `tp` that does not
    divide a layer, without a GPU, and where results cannot be written.
    """
    for name, value in (("--tp", tp), ("--max-tokens", max_tokens), ("--max-reqs", max_reqs)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    wanted = chosen(ops)
    configs = configurations(model)
    jobs = []
    for tunable in wanted:
        scopes = [Scope(config, tp, max_tokens, max_reqs, dtype) for config in configs]
        every = {job.key: job for scope in scopes for job in tunable.jobs(scope) if job.op in tunable.ops}
        jobs.append((tunable, list(every.values())))
    if dry_run:
        return _told([
            {"kernel": tunable.kernel, "key": job.key, "candidates": len(tunable.candidates(job))}
            for tunable, every in jobs
            for job in every
        ])  # fmt: skip
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise ValueError("there is no NVIDIA GPU here to measure on; --dry-run says what would be measured")
    worker = Worker()
    try:
        gpu, arch = worker.run(_gpu)
        for tunable, _ in jobs:
            must_be_writable(tunable.kernel, gpu)
        return _told([row for tunable, every in jobs for row in _measured(tunable, every, gpu, arch, worker)])
    finally:
        worker.close()


def _measured(tunable: Tunable, every: list[Job], gpu: str, arch: int, worker: Worker) -> list[dict[str, Any]]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    if tunable.refuses is not None and (reason := worker.run(tunable.refuses, 0)):
        return [{"kernel": tunable.kernel, "key": job.key, "skipped": reason} for job in every]
    trials = {job: tunable.candidates(job) for job in pending(tunable, gpu, every)}
    work = [(job, candidate) for job, candidates in trials.items() for candidate in candidates]
    rows = [{"kernel": tunable.kernel, "key": job.key, "known": True} for job in every if job not in trials]
    # Compiling and timing take about the same: each candidate counts twice.
    with tqdm(total=2 * len(work), desc=tunable.kernel, unit="trial") as bar:
        right = set(compiled(tunable, work, arch, bar.update))
        bar.update(len(work) - len(right))
        for job, candidates in trials.items():

            def attempt(candidate: Any, job: Job = job) -> float | str:
                found = tried(worker, tunable, job, candidate)
                bar.update()
                return found

            row = {"kernel": tunable.kernel, "key": job.key}
            try:
                outcome = search(job, [each for each in candidates if (job, each) in right], attempt)
            except NothingFoundError as error:
                rows.append({**row, "failed": str(error)})
                continue
            keep(tunable, gpu, job, outcome)
            rows.append({
                **row, "us": outcome.us, "of": len(outcome.times), "default": outcome.times.get(candidates[0]),
            })  # fmt: skip
    generalise(tunable, gpu)  # again, if all were known: the last run may have been stopped before it
    return rows


def _gpu() -> tuple[str, int]:
    """The name of this GPU, and its architecture as Triton says it: 90 for sm_90."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), 10 * major + minor


def must_be_writable(kernel: str, gpu: str) -> None:
    """Said before hours are spent."""
    folder = tuned.folder_of(kernel, gpu)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error}); VLLM_GEMS_TUNED names another folder") from None


def _told(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lines = [f"{row['kernel']:24} {row['key']:36} {_outcome(row)}" for row in rows]
    summary = f"{len(rows)} jobs"
    if failed := sum("failed" in row for row in rows):
        summary += f", {failed} without a result"
    if total := sum(row.get("candidates", 0) for row in rows):
        summary += f", {total} candidates, {len(os.sched_getaffinity(0))} processes to compile them"
    return {"jobs": rows, "lines": [*lines, summary]}


def _outcome(row: dict[str, Any]) -> str:
    if "us" in row:
        gain = f", the default takes {row['default']:.1f}" if row["default"] else ""
        return f"{row['us']:9.1f} us, the best of {row['of']}{gain}"
    if "failed" in row:
        return f"failed: {row['failed']}"
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    return "measured before" if "known" in row else f"{row['candidates']} candidates"
