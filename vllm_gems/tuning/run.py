"""`vllm-gems pretune`: jobs of a model, those that are done left out, and a bar that says how long it takes."""

from __future__ import annotations

import os
from typing import Any

from .models import configurations
from .search import Job, Tunable, chosen, compiled, generalise, keep, pending, search


def pretune(
    model: str,
    *,
    tp: int = 1,
    max_tokens: int = 16384,
    max_reqs: int = 1024,
    ops: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Measure what the store does not have yet, job by job, and keep each result at once: a run that was stopped goes
    on where it was. Returns {"jobs": [{"kernel", "key", "candidates", "us"?}], "lines": [what to print]}.

    Raises ValueError for a model or an op that is not known, for `tp` that does not divide a layer, and without a GPU.
    """
    for name, value in (("--tp", tp), ("--max-tokens", max_tokens), ("--max-reqs", max_reqs)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    wanted = chosen(ops)
    configs = configurations(model)
    jobs = []
    for tunable in wanted:
        every = [job for config in configs for job in tunable.jobs(config, tp, max_tokens, max_reqs)]
        jobs.append((tunable, list(dict.fromkeys(every))))
    if dry_run:
        return _told([
            {"kernel": tunable.kernel, "key": job.key, "candidates": len(tunable.candidates(job))}
            for tunable, every in jobs
            for job in every
        ])  # fmt: skip
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise ValueError("there is no NVIDIA GPU here to measure on; --dry-run says what would be measured")
    gpu = torch.cuda.get_device_name()
    rows = []
    for tunable, every in jobs:
        rows += _measured(tunable, every, gpu)
    return _told(rows)


def _measured(tunable: Tunable, every: list[Job], gpu: str) -> list[dict[str, Any]]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    todo = pending(tunable, gpu, every)
    work = [(job, candidate) for job in todo for candidate in tunable.candidates(job)]
    rows = [{"kernel": tunable.kernel, "key": job.key, "candidates": 0} for job in every if job not in todo]
    # Compiling and timing take about the same: each candidate counts twice.
    with tqdm(total=2 * len(work), desc=tunable.kernel, unit="trial") as bar:
        right = set(compiled(tunable, work, _arch(), bar.update))
        for job in todo:
            candidates = [candidate for each, candidate in work if each == job and (job, candidate) in right]
            outcome = search(tunable, job, candidates, tunable.prepare(job, "cuda"))
            keep(tunable, gpu, job, outcome)
            bar.update(sum(each == job for each, _ in work))
            rows.append({"kernel": tunable.kernel, "key": job.key, "candidates": len(candidates), "us": outcome.us})
    if todo:
        generalise(tunable, gpu)
    return rows


def _arch() -> int:
    """This GPU's architecture as Triton says it: 90 for sm_90."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _told(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lines = [
        f"{row['kernel']:24} {row['key']:28} "
        + (f"{row['us']:9.1f} us, of {row['candidates']}" if "us" in row else f"{row['candidates']} candidates")
        for row in rows
    ]
    total = sum(row["candidates"] for row in rows)
    lines.append(f"{len(rows)} jobs, {total} candidates, {len(os.sched_getaffinity(0))} processes to compile them")
    return {"jobs": rows, "lines": lines}
