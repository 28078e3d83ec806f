"""torch.ops.vllm_gems.*: they pass opcheck, trace under torch.compile, and never break a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kernels import DEVICE, KERNELS, results_of, widened
from test_standalone import CHECKS
from tolerances import absolute, assert_close

from vllm_gems import ops
from vllm_gems.nouns import Case, Kernel

ops.define(KERNELS)


def arguments(kernel: Kernel, case: Case) -> dict[str, Any]:
    return kernel.inputs(case, "float32", DEVICE)


def first_case(kernel: Kernel) -> Case:
    return next(case for case in kernel.cases if not case.bench)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_opcheck(kernel: Kernel) -> None:
    op = getattr(torch.ops.vllm_gems, kernel.name).default
    # That nothing is written is told by sums of all arguments, which PyTorch cannot make of float8.
    checks = [check for check in CHECKS if check != "test_schema" or "fp8" not in kernel.name]
    torch.library.opcheck(op, tuple(arguments(kernel, first_case(kernel)).values()), test_utils=checks)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_fullgraph(kernel: Kernel) -> None:
    """Compiled, with the op in the graph: the values of the reference, and a counted call."""
    op = getattr(torch.ops.vllm_gems, kernel.name)
    inputs = arguments(kernel, first_case(kernel))
    expected = kernel.reference(**widened(inputs))
    atol = absolute(kernel.name, inputs, torch.float32)
    calls = ops.CALLS[kernel.name]

    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    returned = compiled(*inputs.values())

    for got, want in zip(results_of(kernel, inputs, returned), expected, strict=True):
        assert_close(got, want, kernel.name, atol)
    assert ops.CALLS[kernel.name] == calls + 1
    assert ops.FALLBACKS[kernel.name] == 0


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_failing_kernel_is_done_by_its_reference(kernel: Kernel) -> None:
    """Compiled code has no original to go back to."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    broken.__signature__ = __import__("inspect").signature(kernel.op)  # type: ignore[attr-defined]
    failing = Kernel(**{**vars(kernel), "op": broken})
    run = ops._implementation(failing)
    inputs = arguments(kernel, first_case(kernel))
    expected = kernel.reference(**widened(inputs))
    atol = absolute(kernel.name, inputs, torch.float32)
    before = ops.FALLBACKS[kernel.name]
    try:
        returned = run(*inputs.values())
        for got, want in zip(results_of(kernel, inputs, returned), expected, strict=True):
            assert_close(got, want, kernel.name, 1e-5 if atol is None else 10 * atol)
        assert ops.FALLBACKS[kernel.name] == before + 1
    finally:
        ops.FALLBACKS[kernel.name] = before


def test_defining_twice_is_harmless() -> None:
    ops.define(KERNELS)
    ops.define(KERNELS)
