"""The launcher on a real GPU: direct, on the current stream and device, under hooks, and from many threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import triton
from gpu_cases import KERNELS, bench_cases, checked, copies, run, small_case

from vllm_gems import launch, replay
from vllm_gems.kernels.rms_norm import bind_norm_rows
from vllm_gems.nouns import Kernel

# What does not do with one: a second puts together what the first has shared out; a digit each, and the mask.
LAUNCHES = {
    "mla_decode": 2, "moe_experts": 3, "top_p": 9, "block_fp8_linear": 2, "silu_gated_block_fp8_linear": 2,
    "block_fp8_experts": 4,
}  # fmt: skip

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


@pytest.fixture
def direct() -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in launch._CALLS:
        pytest.skip(f"the direct launcher does not know Triton {triton.__version__}")


@pytest.mark.usefixtures("direct")
def test_nothing_refuses_direct_launches() -> None:
    assert launch.direct_refuses() is None


@pytest.mark.usefixtures("direct")
@each_kernel
def test_triton_does_not_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton's own way barred, kernels run all the same, the ones that are compiled only now too."""

    def barred(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("launched through kernel[grid]")

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", barred)
    for case in (small_case(kernel), *bench_cases(kernel, most_tokens=8)):
        checked(kernel, kernel.inputs(case, "float16", "cuda"), case.name)


@each_kernel
def test_launch_hooks_are_called(kernel: Kernel) -> None:
    """A profiler's hook sees every launch while it is there, and the results are right with and without it."""
    hook = triton.knobs.runtime.launch_enter_hook
    seen: list[object] = []
    inputs = kernel.inputs(small_case(kernel), "bfloat16", "cuda")
    run(kernel, copies(inputs))
    hook.add(seen.append)
    try:
        checked(kernel, copies(inputs), "under a launch hook")
    finally:
        hook.remove(seen.append)
    launches = LAUNCHES.get(kernel.name, 1)
    assert len(seen) == launches
    checked(kernel, copies(inputs), "after a launch hook")
    assert len(seen) == launches


@each_kernel
def test_streams(kernel: Kernel) -> None:
    """On each of two streams the inputs arrive late; a launch on any other stream would not wait for them."""
    case = small_case(kernel)
    fresh = [kernel.inputs(case, "bfloat16", "cuda") for _ in range(2)]
    wanted = [run(kernel, copies(inputs)) for inputs in fresh]
    static = [kernel.inputs(case, "bfloat16", "cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream, late, inputs in zip(streams, fresh, static, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # cycles: about 30 ms
            for name, value in late.items():
                if isinstance(value, torch.Tensor):
                    inputs[name].copy_(value)
            results.append(run(kernel, inputs))
    torch.cuda.synchronize()
    for got, want in zip(results, wanted, strict=True):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_kernel
def test_tensors_on_another_device(kernel: Kernel) -> None:
    """The current device stays 0; the kernel runs where its tensors are."""
    inputs = kernel.inputs(small_case(kernel), "bfloat16", "cuda:1")
    assert torch.cuda.current_device() == 0
    checked(kernel, inputs, "on cuda:1")
    assert torch.cuda.current_device() == 0


@each_kernel
def test_threads(kernel: Kernel, forget: Callable[[], None]) -> None:
    """Eight threads that begin together, with nothing compiled, in three dtypes and on streams of their own."""
    threads, calls = 8, 200
    case = small_case(kernel)
    dtypes = [kernel.dtypes[index % len(kernel.dtypes)] for index in range(threads)]
    inputs = [kernel.inputs(case, dtype, "cuda") for dtype in dtypes]
    wanted = [run(kernel, copies(each)) for each in inputs]
    torch.cuda.synchronize()
    forget()
    together = threading.Barrier(threads)

    def work(index: int) -> int:
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            together.wait()
            for _ in range(calls):
                for got, want in zip(run(kernel, copies(inputs[index])), wanted[index], strict=True):
                    wrong += (got != want).sum()
            return int(wrong)

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(work, range(threads))) == [0] * threads


def test_threads_without_a_context() -> None:
    """Of what is recorded, and of a launch by itself; a thread may find the memory that it asks PyTorch for."""
    device, (x, weight) = torch.cuda.current_device(), torch.randn(2, 3, 64, device="cuda")
    norm = bind_norm_rows(torch.float32, torch.float32, 64, 1e-6, False, False, device)
    run = replay.bind(device, lambda memory, x_at, out_at: norm(x_at, 0, weight.data_ptr(), out_at, 0, 3))
    wanted = torch.nn.functional.rms_norm(x, (64,), weight[0], 1e-6)
    torch.empty(4 << 20, device="cuda", dtype=torch.uint8)
    for launches in (
        lambda out: run((), (x.data_ptr(), out.data_ptr())),
        lambda out: norm(x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), 0, 3),
    ):
        outs = [torch.full_like(x, torch.nan) for _ in range(4)]
        launches(outs[0])
        torch.cuda.synchronize()
        for out in outs[1:]:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(launches, out).result()
        torch.cuda.synchronize()
        for out in outs:
            torch.testing.assert_close(out, wanted)
