"""Every kernel x case x dtype against its reference in float64, with poisoned outputs and arguments left as they were.

On a machine without a GPU the kernels run in Triton's interpreter, on CPU tensors; on a GPU they run there.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tolerances import absolute, assert_close

from vllm_gems.catalog import catalog
from vllm_gems.errors import Refused
from vllm_gems.nouns import Case, Kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = list(catalog().kernels.values())
ALL = [
    pytest.param(kernel, case, dtype, id=f"{kernel.name}-{case.name}-{dtype}".replace(" ", "_"))
    for kernel in KERNELS
    for case in kernel.cases
    if not case.bench
    for dtype in kernel.dtypes
]


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64, detached from those that the kernel may write."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def results_of(kernel: Kernel, inputs: dict[str, Any], returned: Any) -> list[Any]:
    """What the kernel computed, in the order of its reference."""
    found = []
    for where in kernel.results:
        if where == "return":
            found.append(returned)
        elif where.startswith("return."):
            found.append(returned[int(where[7:])])
        else:
            found.append(inputs[where])
    return found


def storage_outside(x: torch.Tensor) -> torch.Tensor:
    """The elements of x's storage that x does not cover."""
    whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    covered = torch.zeros_like(whole, dtype=torch.bool)
    covered.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return whole[~covered].clone()


@pytest.mark.parametrize(("kernel", "case", "dtype"), ALL)
def test_against_reference(kernel: Kernel, case: Case, dtype: str) -> None:
    torch.manual_seed(abs(hash((kernel.name, case.name, dtype))) % 2**31)
    inputs = kernel.inputs(case, dtype, DEVICE)
    assert kernel.refuses(**inputs) is None
    expected = kernel.reference(**widened(inputs))
    atol = absolute(kernel.name, inputs, getattr(torch, dtype))
    written = [where for where in kernel.results if not where.startswith("return")]
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    outside = {name: storage_outside(value) for name, value in tensors.items()}
    before = {name: value.clone() for name, value in tensors.items() if name not in written}

    returned = kernel.op(**inputs)

    likes = results_of(kernel, inputs, kernel.fake(**inputs))
    results = zip(kernel.results, results_of(kernel, inputs, returned), expected, likes, strict=True)
    for name, got, want, like in results:
        if want is None:
            assert got is None
            continue
        assert got.dtype == like.dtype
        assert_close(got, want, f"{kernel.name}, {case.name}, {name}", atol)
    for name, value in before.items():
        assert torch.equal(tensors[name], value), f"{name} was written"
    for name, value in outside.items():
        assert torch.equal(storage_outside(tensors[name]), value), f"memory beside {name} was written"


WITH_OUT = [kernel for kernel in KERNELS if "out" in inspect.signature(kernel.op).parameters]


@pytest.mark.parametrize("kernel", WITH_OUT, ids=lambda kernel: kernel.name)
def test_every_element_of_out_is_written(kernel: Kernel) -> None:
    for case in kernel.cases:
        if case.bench:
            continue
        inputs = kernel.inputs(case, "float32", DEVICE)
        expected = kernel.reference(**widened(inputs))[0]
        atol = absolute(kernel.name, inputs, torch.float32)
        out = torch.full(expected.shape, float("nan"), dtype=torch.float32, device=DEVICE)
        assert results_of(kernel, inputs, kernel.op(**inputs, out=out))[0] is out
        assert_close(out, expected, f"{kernel.name}, {case.name}", atol)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_refusals_name_the_argument(kernel: Kernel) -> None:
    """Integers are refused, by the predicate and by the op, with the same words; nothing is written."""
    inputs = kernel.inputs(next(case for case in kernel.cases if not case.bench), "float32", DEVICE)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    first = next(name for name, value in tensors.items() if value.is_floating_point())
    inputs[first] = (inputs[first] * 100).to(torch.int32)
    before = inputs[first].clone()
    reason = kernel.refuses(**inputs)
    assert reason is not None
    assert first in reason
    assert "int32" in reason
    with pytest.raises(Refused, match="int32"):
        kernel.op(**inputs)
    assert torch.equal(inputs[first], before)


def test_rows_too_far_apart_are_refused() -> None:
    from vllm_gems.kernels.rms_norm import rms_norm, rms_norm_refuses

    x = torch.randn(4, 6, 8, device=DEVICE).transpose(0, 2)
    weight = torch.ones(4, device=DEVICE)
    assert "not rows of contiguous elements" in str(rms_norm_refuses(x, weight, 1e-6))
    with pytest.raises(Refused, match="strides"):
        rms_norm(x, weight, 1e-6)


def test_wrong_weight_is_refused() -> None:
    from vllm_gems.kernels.rms_norm import fused_add_rms_norm, rms_norm

    x = torch.randn(4, 8, device=DEVICE)
    with pytest.raises(Refused, match=r"weight is \(7,\)"):
        rms_norm(x, torch.ones(7, device=DEVICE), 1e-6)
    with pytest.raises(Refused, match="residual"):
        fused_add_rms_norm(x, torch.randn(3, 8, device=DEVICE), None, 1e-6)


def test_positions_that_do_not_fit_are_refused() -> None:
    from vllm_gems.kernels.rotary_embedding import rotary_embedding

    cache = torch.randn(64, 16, device=DEVICE)
    query = torch.randn(4, 32, device=DEVICE)
    before = query.clone()
    with pytest.raises(Refused, match="unlike positions"):
        rotary_embedding(torch.arange(3, device=DEVICE), query, None, 16, cache, True)
    with pytest.raises(Refused, match="exceeds head_size"):
        rotary_embedding(torch.arange(4, device=DEVICE), query, None, 16, cache, True, 8)
    assert torch.equal(query, before)


def test_missing_parameter_is_named() -> None:
    op = catalog().kernels["fatrelu_and_mul"].op
    with pytest.raises(TypeError, match="threshold"):
        op(torch.randn(2, 8, device=DEVICE))
