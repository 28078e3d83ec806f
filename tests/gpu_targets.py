"""Compiles the catalog's builds for one architecture of `budgets.DEVICES`, a line of JSON each; no GPU is needed.

    python tests/gpu_targets.py sm_90

The first line says how many builds each kernel has. A process of its own, because compiling needs a Triton that was
imported without TRITON_INTERPRET, and so that it can be stopped: compilers have inputs that take them minutes.
"""

from __future__ import annotations

import collections
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from budgets import DEVICES
from triton.backends.compiler import GPUTarget

from vllm_gems.catalog import catalog
from vllm_gems.elementwise import Elementwise
from vllm_gems.kernels import along
from vllm_gems.kernels.mla_decode import GLUON, MLA_DECODE, Latents, hopper_build
from vllm_gems.kernels.pointwise import Pointwise, pointwise_build, walk
from vllm_gems.kernels.reduce import Reduction, reduce_build
from vllm_gems.launch import Build, compile_for, triton_release
from vllm_gems.nouns import Kernel
from vllm_gems.overloads import overloads_of
from vllm_gems.patches import aten

MODELS_ON = "sm_90"  # where kernels are tuned and timed
MUST_SPILL = "a kernel that must spill"

# Constexprs that say how large operands are, not how the work is divided. Kernels branch on whether they are 0 or 1.
SIZES = {
    "BLOCK_SIZE", "EXPERTS", "GROUP", "HALF", "HEAD", "HEADS", "HEAD_SIZE", "HIDDEN", "IN", "INNER", "KV_HEADS",
    "K_HEADS", "LATENT", "OFFSET", "OUT", "PADDED", "PADDED_HEADS", "Q_HEADS", "ROPE", "SECTION_H", "SECTION_T",
    "SECTION_W", "SPLIT", "VARIANCE_SIZE", "VOCAB", "WIDTH",
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


OVERRIDES = ("elementwise", "reductions", "along")  # of PyTorch's operations, which are no kernels of the catalog


def elementwise_jobs(target: str) -> Iterator[Job]:
    """Every formula on tensors that are one walk through memory, in float32 and int32; and every kind of walk."""
    rows = [row for row in aten.ROWS if isinstance(row, Elementwise)]
    if target != MODELS_ON:
        rows = [row for row in rows if row.op in ("add", "gelu", "remainder", "where", "floor_divide")]
    dtypes = {"f": torch.float32, "i": torch.int32}
    for row in rows:
        schema = next(each._schema for each in overloads_of(row.op) if row.reads(each._schema))
        for family, dtype in dtypes.items():
            if family in row.families:
                for call in _calls(row, schema, dtype):
                    count = 1 + sum(each is not None for each in call.tensors)
                    build, _ = pointwise_build(call, walk((4096,), [(1,)] * count), True)
                    yield Job(build, list(OVERRIDES), f"{row.op} {call.constant}", str(dtype), (str(dtype),), False)
    add = next(row for row in rows if row.op == "add")
    schema = next(each._schema for each in overloads_of("add") if add.reads(each._schema))
    (call,) = _calls(add, schema, torch.bfloat16)
    for dims in range(1, 6):
        shape = (6, 5, 7, 3, 9)[:dims]
        gapped = [math.prod(size + 1 for size in shape[dim + 1 :]) * 2 for dim in range(dims)]
        for factor in (1, 2**31):
            walked = walk(shape, [[factor * step for step in gapped], gapped[::-1], gapped])
            for aligned in (True, False):
                build, _ = pointwise_build(call, walked, aligned)
                yield Job(build, list(OVERRIDES), f"add, {dims} dimensions, {factor=}", "bfloat16", (), False)


def _calls(row: Elementwise, schema: Any, dtype: torch.dtype) -> Iterator[Pointwise]:
    """What a row computes in `dtype`, one call for each word that an argument may be."""
    kinds = [str(each.type) for each in schema.arguments if not each.is_out]
    names = [each.name for each in schema.arguments if not each.is_out]
    words = {"approximate": ("none", "tanh"), "rounding_mode": ("trunc", "floor")}
    (options,) = [words[name] for name in names if name in words] or [(None,)]
    compute = torch.float32 if dtype.is_floating_point else dtype
    kind = row.kind if isinstance(row.kind, str) else "default"
    for option in options:
        yield Pointwise(
            formula=row.formula,
            tensors=tuple(
                (torch.bool if name in row.as_is else dtype) if "Tensor" in kind else None
                for name, kind in zip(names, kinds, strict=True)
            ),
            scalars=tuple("number" in kind or "float" in kind for kind in kinds),
            constant=option if names[-1] in words else False if kinds[-1] == "bool" else None,
            compute=compute,
            out=torch.bool if kind == "bool" else dtype,
            as_is=tuple(index for index, name in enumerate(names) if name in row.as_is),
        )


def reduction_jobs(target: str) -> Iterator[Job]:
    """Everything that is reduced or done along a dimension: of rows, and of columns, which are walked through apart.

    Columns take more registers; they are enough where nothing is tuned.
    """
    layouts = {"rows": ((512,), (4096,), (4096, 1)), "columns": ((4096,), (512,), (1, 4096))}
    if target != MODELS_ON:
        del layouts["rows"]
    for label, (kept, gone, (kept_step, step)) in layouts.items():
        kept_walk = walk(kept, [[kept_step], [1]])
        for what in ("sum", "mean", "prod", "max", "min", "any", "all", "count", "var", "std", "argmax", "argmin"):
            for x, compute in ((torch.bfloat16, torch.float32), (torch.int64, torch.int64)):
                if compute is torch.int64 and (what in ("mean", "var", "std") or target != MODELS_ON):
                    continue
                out = torch.bool if what in ("any", "all") else torch.int64 if what == "count" else x
                call = Reduction(what, x, compute, out, x if what == "var" else None)
                build, _, _ = reduce_build(call, kept_walk, walk(gone, [[step]]), True)
                yield Job(build, ["reductions"], f"{what} of {label}", str(x), (), False)
        for what in along.FUNCTIONS:
            count = 3 if "gradient" in what else 2
            rows = along.Rows(walk(kept, [[kept_step]] * count), gone[0], (step,) * count)
            build, _, _ = along.along_build(what, (torch.bfloat16,) * count, torch.float32, rows, True)
            yield Job(build, ["along"], f"{what} of {label}", "bfloat16", (), False)
    for groups in (0, 32):
        x = torch.bfloat16
        norm = along.Norm(x, x, x, torch.float32, torch.float32, 4096, groups, 64, 64)
        yield Job(along.norm_build(norm, True), ["along"], f"norm, {groups=}", "bfloat16", (), False)


def jobs_for(target: str) -> list[Job]:
    """What is compiled for `target`."""
    jobs = every_job(catalog().kernels.values())
    overrides = [*elementwise_jobs(target), *reduction_jobs(target)]
    if target != MODELS_ON:
        return [*representatives(jobs, target), *overrides]
    of_models = [job for job in jobs if job.bench and job.build.aligned and job.dtype == job.dtypes[-1]]
    return list({job.build: job for job in (*of_models, *representatives(jobs, target), *hopper_jobs(), *overrides)}.values())


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
