"""Compiles the catalog's builds for one architecture of `budgets.DEVICES`, a JSON line each; no GPU is needed.

    python tests/gpu_targets.py sm_90

A process of its own, because compiling needs a Triton that was imported without TRITON_INTERPRET, and so that whoever
starts it can stop it: ptxas and LLVM have inputs that take them minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from budgets import DEVICES
from triton.backends.compiler import GPUTarget

from vllm_gems.catalog import catalog
from vllm_gems.launch import Build, compile_for
from vllm_gems.nouns import Kernel

SPILLS = "a kernel that must spill"
EVERYTHING_ON = "sm_90"  # where the kernels are tuned and timed

# Constexprs that say how large the operands are, not how the work is divided. Kernels branch on 0 and on 1.
SIZES = {
    "HALF", "HIDDEN", "INNER", "K_HEADS", "OFFSET", "Q_HEADS", "SECTION_H", "SECTION_T", "SECTION_W", "VARIANCE_SIZE",
    "WIDTH",
}  # fmt: skip


class Job(NamedTuple):
    """A build, and whose it is; several cases may share one, the first is named."""

    kernel: Kernel
    case: str
    dtype: str
    build: Build


def every_job(kernels: Iterable[Kernel]) -> list[Job]:
    """All different builds."""
    found: dict[Build, Job] = {}
    for kernel in kernels:
        for case in kernel.cases:
            for dtype in kernel.dtypes:
                for build in kernel.builds(case, dtype):
                    found.setdefault(build, Job(kernel, case.name, dtype, build))
    return list(found.values())


def _sizes(build: Build) -> tuple[int, ...]:
    return tuple(value for name, value in build.constexprs if name in SIZES)


def _configuration(build: Build) -> tuple[Any, ...]:
    """All that tells builds apart, but sizes and dtypes."""
    constexprs = tuple((name, min(value, 2) if name in SIZES else value) for name, value in build.constexprs)
    absent = tuple(kind is None for kind in build.types)
    return build.function.__name__, build.num_warps, build.num_stages, build.aligned, absent, constexprs


def representatives(jobs: Iterable[Job]) -> list[Job]:
    """Of each configuration the one with the largest sizes, in the kernel's first dtype; aligned, in its last too.

    That is float32, which takes the most registers, and bfloat16, which models are served in and whose conversions
    every architecture does its own way.
    """
    found: dict[tuple[Any, ...], Job] = {}
    for job in jobs:
        dtypes = job.kernel.dtypes
        if job.dtype != dtypes[0] and not (job.dtype == dtypes[-1] and job.build.aligned):
            continue
        key = (job.dtype, *_configuration(job.build))
        if key not in found or _sizes(job.build) > _sizes(found[key].build):
            found[key] = job
    return list(found.values())


def jobs_for(target: str) -> list[Job]:
    """What is compiled for `target`."""
    jobs = every_job(catalog().kernels.values())
    return jobs if target == EVERYTHING_ON else representatives(jobs)


@triton.jit
def greedy_kernel(x_ptr, BLOCK: tl.constexpr):
    """Needs all its elements at once, each for the sum and for the product."""
    at = x_ptr + tl.arange(0, BLOCK)
    x = tl.load(at)
    tl.store(at, x * tl.sum(x))


def spilling(warp_size: int) -> Build:
    """What no GPU has the registers for: measured to see that spilling is seen."""
    return Build(greedy_kernel, ("*fp32",), (("BLOCK", 512 * warp_size),), num_warps=1)


def _nvidia(kernel: Any) -> dict[str, int]:
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    text = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack bytes": int(found["STACK"]), "local bytes": int(found["LOCAL"])}


def _amd(kernel: Any) -> dict[str, int]:
    names = {
        "vgpr_count": "registers",
        "vgpr_spill_count": "spilled vector registers",
        "sgpr_spill_count": "spilled scalar registers",
        "private_segment_fixed_size": "scratch bytes",
    }
    found = dict(re.findall(rf"\.({'|'.join(names)}):\s*(\d+)", kernel.asm["amdgcn"]))
    return {name: int(found[key]) for key, name in names.items()}


def measure(build: Build, target: GPUTarget) -> dict[str, int]:
    """Compile; what the machine code takes, in the words of `budgets.excesses`."""
    kernel = compile_for(build, target)
    used = _nvidia(kernel) if target.backend == "cuda" else _amd(kernel)
    return {**used, "shared": kernel.metadata.shared}


def _row(kernel: str, label: str, build: Build, target: GPUTarget) -> dict[str, Any]:
    row = {"kernel": kernel, "function": build.function.__name__, "label": label}
    try:
        return {**row, "used": measure(build, target)}
    except Exception as error:  # whatever the compiler raises is this build's result
        return {**row, "error": f"{type(error).__name__}: {error}"}


def rows(target: str) -> Iterator[dict[str, Any]]:
    """One for every job, and first one that must not be within the budget."""
    device = DEVICES[target]
    gpu = GPUTarget(device.backend, device.arch, device.warp_size)
    yield _row("", SPILLS, spilling(device.warp_size), gpu)
    for kernel, case, dtype, build in jobs_for(target):
        options = f"{'' if build.aligned else 'un'}aligned, num_warps={build.num_warps}"
        yield _row(kernel.name, f"{case}, {dtype}, {options}", build, gpu)


if __name__ == "__main__":
    for line in rows(sys.argv[1]):
        print(json.dumps(line), flush=True)
