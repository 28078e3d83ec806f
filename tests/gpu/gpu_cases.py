"""What the GPU tests share: cases to run a kernel on, copies of its inputs, and its comparison with the reference."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from test_kernels import KERNELS, results_of, widened
from tolerances import absolute, assert_close

from vllm_gems.nouns import Case, Kernel

__all__ = ["KERNELS", "bench_cases", "checked", "copies", "forget_compiled", "relocated", "run", "small_case"]


def small_case(kernel: Kernel) -> Case:
    """A small case with something to compute."""
    return next(case for case in kernel.cases if not case.bench and case.name not in ("empty", "one row"))


def bench_cases(kernel: Kernel, most_tokens: int) -> list[Case]:
    """Shapes of named models, up to a number of tokens."""
    return [case for case in kernel.cases if case.bench and int(case.name.rpartition(" ")[2]) <= most_tokens]


def relocated(x: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """A copy of x with the storage around it, by the same strides, `shift` elements further into the new storage."""
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    room = torch.empty(storage.numel() + shift, dtype=x.dtype, device=x.device)
    room[shift:] = storage
    return room.as_strided(x.shape, x.stride(), x.storage_offset() + shift)


def copies(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in memory of their own, for a kernel that writes some of them."""
    return {name: relocated(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def run(kernel: Kernel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The results of one call."""
    return [result for result in results_of(kernel, inputs, kernel.op(**inputs)) if result is not None]


def checked(kernel: Kernel, inputs: dict[str, Any], name: str) -> None:
    """Call the kernel on `inputs` and compare with its reference in float64."""
    expected = [value for value in kernel.reference(**widened(inputs)) if value is not None]
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    dtype = next(value.dtype for value in tensors if value.is_floating_point())
    atol = absolute(kernel.name, inputs, dtype)
    likes = [value for value in results_of(kernel, inputs, kernel.fake(**inputs)) if value is not None]
    for got, want, like in zip(run(kernel, inputs), expected, likes, strict=True):
        assert got.dtype == like.dtype
        assert_close(got, want, f"{kernel.name}, {name}", atol)


def forget_compiled() -> None:
    """Drop what the kernels have settled for themselves; the launches in `launch._LAUNCHES` are for the caller."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm_gems.kernels."):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
