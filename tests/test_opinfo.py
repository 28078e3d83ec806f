"""PyTorch's own samples for its operations (OpInfo), with our kernels in PyTorch's place: values and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from aten_calls import DEVICE, HALVES, same

pytest.importorskip("expecttest", reason="PyTorch's samples need the package expecttest")

from torch.testing._internal.common_methods_invocations import op_db

import vllm_gems
from vllm_gems.patches import aten

SAMPLES = 4  # of each dtype; the whole set is PyTorch's to run, and takes an hour in Triton's interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
OPERATIONS = {row.op for row in aten.ROWS}
# Names of PyTorch's under which it has the operations of the table, where they are not the same.
NAMES = {
    "true_divide": "div",
    "softmax": "_softmax",
    "log_softmax": "_log_softmax",
    "nn.functional.layer_norm": "native_layer_norm",
    "nn.functional.group_norm": "native_group_norm",
    "nn.functional.conv1d": "convolution",
    "nn.functional.conv2d": "convolution",
}


def operation(info: Any) -> str | None:
    """The one of the table that an OpInfo is about."""
    names = (info.aten_name, info.name.rpartition(".")[2], NAMES.get(info.name, ""))
    return next((name.rstrip("_") for name in names if name.rstrip("_") in OPERATIONS), None)


# Those have overloads of their own, which are not in the table.
OTHERS = ("decimals_0", "decimals_3", "decimals_neg_3", "complex", "binary")
INFOS = [
    info
    for info in op_db
    if operation(info) and info.variant_test_name not in OTHERS and not info.name.startswith(("masked.", "sparse."))
]
# What comes out after the values is open where values are equal; test_sorting.py judges it.
PLACES_ARE_OPEN = ("topk",)


def identity(info: Any) -> str:
    return f"{info.name}-{info.variant_test_name}" if info.variant_test_name else str(info.name)


def samples(info: Any, dtype: torch.dtype, gradients: bool = False) -> Iterator[Any]:
    if dtype in info.supported_dtypes(DEVICE):
        yield from itertools.islice(info.sample_inputs(DEVICE, dtype, requires_grad=gradients), SAMPLES)


def forms(info: Any, sample: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each way to call it, on fresh tensors."""

    def first() -> Any:
        return sample.input.clone() if isinstance(sample.input, torch.Tensor) else sample.input

    yield "functional", lambda: info(first(), *sample.args, **sample.kwargs)
    if info.inplace_variant is not None and not sample.broadcasts_input:
        yield "in place", lambda: info.inplace_variant(first(), *sample.args, **sample.kwargs)
    if info.supports_out:

        def out() -> Any:
            like = info(first(), *sample.args, **sample.kwargs)
            if not isinstance(like, torch.Tensor):
                return None
            return info(first(), *sample.args, **sample.kwargs, out=torch.full_like(like, 1))

        yield "out", out


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def calls_on(info: Any, wide: bool = False) -> list[tuple[str, Callable[[], Any]]]:
    """The same each time; with half precision made float32 if `wide`."""
    torch.manual_seed(0)
    found = []
    for dtype in DTYPES:
        for index, sample in enumerate(samples(info, dtype)):
            if wide:
                sample = sample.transform(_widened)
            found += [(f"{info.name} {dtype} sample {index} {form}", call) for form, call in forms(info, sample)]
    return found


def _widened(value: Any) -> Any:
    """A tensor, or the dtype that is asked for, in float32 if it is in half precision."""
    return torch.float32 if value in HALVES else value.float() if _is_half(value) else value


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in HALVES


def rounded(exact: Any, precise: Any) -> Any:
    """What is exact but for its half precision, from what is precise: on a CPU PyTorch rounds in between."""
    if isinstance(exact, (tuple, list)) and isinstance(precise, (tuple, list)):
        return [rounded(each, other) for each, other in zip(exact, precise, strict=True)]
    if not _is_half(exact) or not isinstance(precise, torch.Tensor):
        return exact
    return torch.empty_strided(exact.shape, exact.stride(), dtype=exact.dtype, device=exact.device).copy_(precise)


def compare(got: Any, expected: Any, label: str) -> None:
    if isinstance(expected, (torch.Tensor, tuple, list, type)):
        same(got, expected, label)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """Of convolutions in float32, which PyTorch otherwise does in TF32 on a GPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("info", INFOS, ids=identity)
def test_samples(info: Any) -> None:
    calls = calls_on(info)
    expected = [outcome(call) for _, call in calls]
    precise = [outcome(call) for _, call in calls_on(info, wide=True)]
    expected = [rounded(each, other) for each, other in zip(expected, precise, strict=True)]
    with vllm_gems.use_gems(operation(info)):
        got = [outcome(call) for _, call in calls]
        rows = vllm_gems.report().rows
    for (label, _), mine, other in zip(calls, got, expected, strict=True):
        if info.name in PLACES_ARE_OPEN and isinstance(other, (tuple, list)):
            mine, other = mine[0], other[0]
        compare(mine, other, label)
    assert not [row for row in rows if row.errors]
    assert sum(row.hits for row in rows) > 0, [row.declined for row in rows]


@pytest.mark.parametrize("info", [info for info in INFOS if info.supports_autograd], ids=identity)
def test_gradients(info: Any) -> None:
    """With every kernel of ours, those of gradients among them."""
    every = list(itertools.islice(samples(info, torch.float32, gradients=True), 2))
    expected = [outcome(lambda sample=sample: gradients(info, sample)) for sample in every]
    with vllm_gems.use_gems("*"):
        got = [outcome(lambda sample=sample: gradients(info, sample)) for sample in every]
    for index, (mine, other) in enumerate(zip(got, expected, strict=True)):
        compare(mine, other, f"{info.name} sample {index}")


def gradients(info: Any, sample: Any) -> list[Any]:
    inputs = [each for each in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(each, torch.Tensor)]
    wanted = [each for each in inputs if each.requires_grad]
    results = info(sample.input, *sample.args, **sample.kwargs)
    results = [results] if isinstance(results, torch.Tensor) else results
    total = sum((each * torch.linspace(-1, 1, each.numel()).view(each.shape)).sum() for each in results)
    return [each for each in torch.autograd.grad(total, wanted, allow_unused=True) if each is not None]
