"""Compiles the catalog's builds for one architecture of `budgets.DEVICES`, a line of JSON each; no GPU is needed.

    python tests/gpu_targets.py sm_90

The first line says how many builds each kernel has. A process of its own, because compiling needs a Triton that was
imported without TRITON_INTERPRET, and so that it can be stopped: compilers have inputs that take them minutes.
"""

from __future__ import annotations

import collections
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from budgets import DEVICES
from override_builds import FAMILIES
from triton.backends.compiler import GPUTarget

from vllm_gems.catalog import catalog
from vllm_gems.kernels.mla_decode import GLUON, MLA_DECODE, Latents, hopper_build
from vllm_gems.launch import Build, compile_for, triton_release
from vllm_gems.nouns import Kernel

MODELS_ON = "sm_90"  # where kernels are tuned and timed
# One of each maker's: what narrow loads take is the same on all of them.
MISALIGNED_ON = (MODELS_ON, "gfx942")
# What `block_fp8_linear.device_refuses` lets pass.
FLOAT8_ON = (MODELS_ON, "sm_100")
MUST_SPILL = "a kernel that must spill"

# Constexprs that say how large operands are, not how the work is divided. Kernels branch on whether they are 0 or 1.
SIZES = {
    "BLOCK_SIZE", "EXPERTS", "GROUP", "HALF", "HEAD", "HEADS", "HEAD_SIZE", "HIDDEN", "IN", "INNER", "KV_HEADS",
    "K_HEADS", "LATENT", "OFFSET", "OUT", "PADDED", "PADDED_HEADS", "PAIRS", "Q_HEADS", "ROPE", "SECTION_H",
    "SECTION_T", "SECTION_W", "SPLIT", "TOPK", "VARIANCE_SIZE", "VOCAB", "WIDTH",
}  # fmt: skip

# Constexprs for an operand that adds to what a kernel takes and changes nothing else of it: with it is enough.
ADDED = {"HAS_BIAS"}


class Job(NamedTuple):
    """A build and the kernels that have it; the case and dtype are those of the first."""

    build: Build
    kernels: list[str]
    case: str
    dtype: str
    dtypes: tuple[str, ...]  # of the kernel
    bench: bool  # a shape of a named model


def every_job(kernels: Iterable[Kernel]) -> list[Job]:
    """All different builds."""
    jobs: dict[Build, Job] = {}
    for kernel in kernels:
        for case in kernel.cases:
            for dtype in kernel.dtypes:
                for build in kernel.builds(case, dtype):
                    job = jobs.setdefault(build, Job(build, [], case.name, dtype, kernel.dtypes, case.bench))
                    if kernel.name not in job.kernels:
                        job.kernels.append(kernel.name)
                    if case.bench and not job.bench:
                        jobs[build] = job._replace(bench=True)
    return list(jobs.values())


def _sizes(build: Build) -> tuple[int, ...]:
    return tuple(value for name, value in build.constexprs if name in ADDED or name in SIZES)


def _configuration(job: Job) -> tuple[Any, ...]:
    """All that tells builds apart but sizes and dtypes."""
    build = job.build
    constexprs = tuple(
        (name, min(value, 2) if name in SIZES else value) for name, value in build.constexprs if name not in ADDED
    )
    return (*job.kernels, build.num_warps, build.num_stages, build.aligned, constexprs)


def _has_products(build: Build) -> bool:
    """Which every architecture does in its own way, and in 16 bits not as in float32."""
    return "tl.dot(" in inspect.getsource(sys.modules[build.function.__module__])


def representatives(jobs: Iterable[Job], target: str) -> list[Job]:
    """Of each configuration the build with the largest sizes, in the kernel's first dtype, and in its last too if it is
    aligned, and `target` is where models are timed or the kernel has products.

    That is float32, which takes the most registers, and bfloat16, which models are served in.
    """
    chosen: dict[tuple[Any, ...], Job] = {}
    for job in jobs:
        last = job.build.aligned and (target == MODELS_ON or _has_products(job.build))
        if job.dtype == job.dtypes[0] or (job.dtype == job.dtypes[-1] and last):
            key = (job.dtype, *_configuration(job))
            if key not in chosen or _sizes(job.build) > _sizes(chosen[key].build):
                chosen[key] = job
    return list(chosen.values())


def hopper_jobs() -> list[Job]:
    """What `mla_decode` launches on Hopper alone, which no other architecture has the instructions for.

    With the release of Triton that it is launched with all pages, with others those that do not spill there.
    """
    dtypes, pages = MLA_DECODE.dtypes, (16, 32, 64, 128) if triton_release() == GLUON else (64,)
    return [
        Job(
            hopper_build(Latents(heads, 512, 64, page), dtype, split), [MLA_DECODE.name],
            f"for Hopper, {heads} heads, pages of {page}, {split=}", str(dtype).removeprefix("torch."), dtypes, False,
        )
        for page in pages
        for heads, dtype in ((128, torch.bfloat16), (64, torch.float16))
        for split in (True, False)
    ]  # fmt: skip


def override_jobs(target: str) -> list[Job]:
    """What stands in for PyTorch's operations."""
    return [
        Job(each.build, [family], each.label, each.dtype, (), False)
        for family, builds in FAMILIES.items()
        for each in builds(target == MODELS_ON)
    ]


def made_for(kernel: str, target: str) -> bool:
    """Whether a kernel of this name is for `target` at all."""
    return "fp8" not in kernel or target in FLOAT8_ON


def jobs_for(target: str) -> list[Job]:
    """What is compiled for `target`."""
    jobs = every_job(kernel for name, kernel in catalog().kernels.items() if made_for(name, target))
    overrides = override_jobs(target)
    if target != MODELS_ON:
        some = [*representatives(jobs, target), *overrides]
        # Some kernels have no other builds.
        others = {name for job in some if job.build.aligned for name in job.kernels}
        return [job for job in some if job.build.aligned or target in MISALIGNED_ON or not others & set(job.kernels)]
    of_models = [job for job in jobs if job.bench and job.build.aligned and job.dtype == job.dtypes[-1]]
    every = (*of_models, *representatives(jobs, target), *hopper_jobs(), *overrides)
    return list({job.build: job for job in every}.values())


@triton.jit
def greedy_kernel(x_ptr, BLOCK: tl.constexpr):
    """Needs all its elements at once, for the sum and then for the product."""
    at = x_ptr + tl.arange(0, BLOCK)
    x = tl.load(at)
    tl.store(at, x * tl.sum(x))


def spilling(warp_size: int) -> Build:
    """512 elements a thread, for which nothing has the registers: compiled to see that spills are seen."""
    return Build(greedy_kernel, ("*fp32",), (("BLOCK", 512 * warp_size),), num_warps=1)


def _nvidia(kernel: Any) -> dict[str, int]:
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
    """What the machine code for `target` takes, in the words of `budgets.excesses`."""
    kernel = compile_for(build, target)
    used = _nvidia(kernel) if target.backend == "cuda" else _amd(kernel)
    return {**used, "shared": kernel.metadata.shared}


def _line(kernels: list[str], label: str, build: Build, target: GPUTarget) -> dict[str, Any]:
    line = {"kernels": kernels, "label": label, "function": build.function.__name__}
    try:
        return {**line, "used": measure(build, target)}
    except Exception as error:  # whatever a compiler raises is what became of this build
        return {**line, "error": f"{type(error).__name__}: {error}"}


def lines(target: str) -> Iterator[dict[str, Any]]:
    """How many builds there are by kernel, the one that must spill, and all the others."""
    device, jobs = DEVICES[target], jobs_for(target)
    gpu = GPUTarget(device.backend, device.arch, device.warp_size)
    yield {"builds": collections.Counter(name for job in jobs for name in job.kernels)}
    yield _line([MUST_SPILL], "", spilling(device.warp_size), gpu)
    for build, kernels, case, dtype, _, _ in jobs:
        options = f"{'aligned' if build.aligned else 'misaligned'}, num_warps={build.num_warps}"
        yield _line(kernels, f"{case}, {dtype}, {options}", build, gpu)


if __name__ == "__main__":
    for line in lines(sys.argv[1]):
        print(json.dumps(line), flush=True)
