"""Kernels under CUDA-graph capture: replayed on new inputs, and refused where they would have to be compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_cases import KERNELS, bench_cases, checked, copies, run, small_case
from test_kernels import results_of

from vllm_gems.errors import Refused
from vllm_gems.nouns import Kernel

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


@each_kernel
def test_replay(kernel: Kernel) -> None:
    for case in (small_case(kernel), *bench_cases(kernel, most_tokens=32)):
        fresh = kernel.inputs(case, "bfloat16", "cuda")
        wanted = run(kernel, copies(fresh))  # compiles, too
        static = kernel.inputs(case, "bfloat16", "cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = kernel.op(**static)
        results = results_of(kernel, static, returned)
        for where, result in zip(kernel.results, results, strict=True):
            if where.startswith("return"):
                result.fill_(float("nan") if result.is_floating_point() else -1)
        for name, value in fresh.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip((result for result in results if result is not None), wanted, strict=True):
            assert torch.equal(got, want), f"{kernel.name}, {case.name}"


@each_kernel
def test_what_is_not_compiled_is_refused(kernel: Kernel, forget: Callable[[], None]) -> None:
    """The capture goes on after the refusal, and outside it the same call compiles and is right."""
    inputs = kernel.inputs(small_case(kernel), "bfloat16", "cuda")
    counter = torch.zeros(4, device="cuda").add_(0)
    torch.cuda.synchronize()
    forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(Refused, match="not compiled yet and a CUDA graph is being captured"):
            kernel.op(**inputs)
        counter.add_(1)
    graph.replay()
    graph.replay()
    assert counter.tolist() == [2.0] * 4
    checked(kernel, inputs, "after a refusal under capture")
