"""`vllm-gems pretune` from nothing: how long it takes, how large its results are, what they gain over the defaults.

    python benchmarks/pretune.py --model FOLDER [--ops mm,addmm,...] [--record NAME]

--model and --ops are those of `vllm-gems pretune`. Writes the record `pretune`: microseconds of GPU time of each job's
best configuration and of the default that a kernel has without one. Results go to a folder of their own, so that what
was measured before is measured again, and to --keep if they are to be used. Needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import measure
from vllm_gems.tuning.run import pretune


def rows_of(jobs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the record; jobs without a result have none."""
    return [
        {
            "case": {"kernel": job["kernel"], "key": job["key"]},
            "unit": "us",
            "ours": round(job["us"], 2),
            "against": {"default": round(job["default"], 2)},
            "candidates": job["of"],
        }
        for job in jobs
        if "us" in job and job.get("default")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--ops")
    parser.add_argument("--max-reqs", type=int, default=1024)
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for the results")
    parser.add_argument("--record", default="pretune", help="the record's name")
    parser.add_argument("--out", type=pathlib.Path, help="its folder")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_GEMS_TUNED"] = folder
        begin = time.monotonic()
        found = pretune(args.model, ops=args.ops, max_reqs=args.max_reqs)
        seconds = time.monotonic() - begin
        files = list(pathlib.Path(folder).rglob("*.json"))
        store = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
        if args.keep:
            shutil.copytree(folder, args.keep, dirs_exist_ok=True)
    failed = [job for job in found["jobs"] if "failed" in job]
    path = measure.record(
        args.record, rows_of(found["jobs"]), folder=args.out, commit=args.commit, seconds=round(seconds), store=store,
        failed=failed,
    )  # fmt: skip
    print("\n".join(found["lines"]))
    print(f"{path}: {seconds:.0f} s, {store['files']} files of {store['bytes']} bytes")


if __name__ == "__main__":
    main()
