"""`vllm-gems bench`, as a record: each patch against what it stands in for, by shape and number of tokens.

    python benchmarks/patches.py [--model llama,qwen,deepseek] [--patches GLOBS] [--max-tokens N] [--out DIR]

Writes the record `patches`: microseconds of host time through vLLM's layer or op, and of GPU time from CUDA-graph
replays, of both sides in one run, each compared with the kernel's reference first. `python tools/tables.py` makes of it
what is shipped, `vllm_gems/tuned/<gpu>/<patch>.json`, by which vLLM's own code runs where it is faster. Needs a GPU and
vLLM. The exit code is 1 if anything was wrong or could not be measured; what could is recorded all the same.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import measure
from vllm_gems import tuned
from vllm_gems.bench.run import bench


def rows_of(tables: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the record, one a table: number of tokens -> host and GPU time of ours, host and GPU time of vLLM's."""
    return [
        {
            "case": {"patch": table["patch"], "key": table["key"]},
            "unit": "us of the host and the GPU, ours and vLLM's",
            "times": table["times"],
            "source": table["source"],
        }
        for table in tables
        if "times" in table
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama,qwen,deepseek")
    parser.add_argument("--patches", help="globs with commas; default: what the models come to")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the record, instead of benchmarks/results/<gpu>")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_GEMS_TUNED"] = folder  # a user's own stay as they are
        found = bench(
            args.model.split(","), patches=args.patches, max_tokens=args.max_tokens,
            tell=lambda line: print(line, flush=True),
        )  # fmt: skip
    failed = [table for table in found["tables"] if "failed" in table]
    path = measure.record(
        "patches", rows_of(found["tables"]), folder=args.out, commit=args.commit,
        modules={**tuned.versions(), "vllm": tuned.version("vllm")}, seconds=round(time.monotonic() - begin),
        failed=failed,
    )  # fmt: skip
    print(path)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
