"""Kernels in bfloat16 at the shapes of real models, and on memory that is not aligned."""

from __future__ import annotations

import gpu_cases
import pytest
import torch
from gpu_cases import KERNELS, bench_cases, checked, small_case
from test_kernels import storage_outside

from vllm_gems.errors import Refused
from vllm_gems.nouns import Case, Kernel

MODEL_SHAPES = [
    pytest.param(kernel, case, id=f"{kernel.name}-{case.name}".replace(" ", "_"))
    for kernel in KERNELS
    for case in bench_cases(kernel, most_tokens=2048)
]


@pytest.mark.parametrize(("kernel", "case"), MODEL_SHAPES)
def test_shapes_of_models(kernel: Kernel, case: Case) -> None:
    torch.manual_seed(0)
    inputs = kernel.inputs(case, "bfloat16", "cuda")
    written = [name for name in kernel.results if name in inputs]
    outside = {name: storage_outside(inputs[name]) for name in written}
    checked(kernel, inputs, case.name)
    for name, before in outside.items():
        assert torch.equal(storage_outside(inputs[name]), before), f"memory beside {name} was written"


# Kernels that take nothing but x where it is not aligned: weights in float8 are read by 16 bytes at a time.
ONLY_X = ("block_fp8_linear", "silu_gated_block_fp8_linear", "block_fp8_experts")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_unaligned(kernel: Kernel, dtype: str) -> None:
    """Every tensor one element past a multiple of 16 bytes: the aligned build would read wrongly or fault."""
    torch.manual_seed(0)
    for case in (small_case(kernel), *bench_cases(kernel, most_tokens=32)):
        inputs = kernel.inputs(case, dtype, "cuda")
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                continue
            moved = gpu_cases.relocated(value, shift=1)
            assert moved.data_ptr() % 16
            if kernel.name in ONLY_X and name != "x":
                with pytest.raises(Refused, match="aligned"):
                    gpu_cases.run(kernel, {**inputs, name: moved})
            else:
                inputs[name] = moved
        checked(kernel, inputs, f"{case.name}, unaligned")
