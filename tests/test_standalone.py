"""Ops that stand alone: they pass opcheck, have PyTorch's gradients and results, and go to it where we decline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aten_calls import DEVICE

import vllm_gems
from vllm_gems import ops, standalone
from vllm_gems.catalog import catalog


def randn(*shape: int, positive: bool = False) -> torch.Tensor:
    values = torch.rand(shape, device=DEVICE) + 0.5 if positive else torch.randn(shape, device=DEVICE)
    return values.requires_grad_()


def randint(*shape: int) -> torch.Tensor:
    return torch.randint(0, 3, shape, device=DEVICE)


def arguments(name: str) -> tuple[Any, ...]:
    """What an op is called with; operands broadcast, and floats require gradients."""
    special: dict[str, tuple[Any, ...]] = {
        "where": (torch.rand(3, 5, device=DEVICE) < 0.5, randn(3, 5), randn(5)),
        "clamp": (randn(3, 5), -0.5, 0.5),
        "log": (randn(3, 5, positive=True),),
        "sqrt": (randn(3, 5, positive=True),),
        "rsqrt": (randn(3, 5, positive=True),),
        "sum_dim": (randn(3, 5), [1]),
        "mean_dim": (randn(3, 5), [0], True),
        "amax": (randn(3, 5), [1]),
        "amin": (randn(3, 5), [1]),
        "argmax": (randn(3, 5), 1),
        "softmax": (randn(3, 5), -1),
        "log_softmax": (randn(3, 5), 0),
        "cumsum": (randn(3, 5), 1),
        "layer_norm": (randn(3, 5), [5], randn(5), randn(5), 1e-5),
        "embedding": (randn(7, 5), randint(3, 2)),
        "index_select": (randn(7, 5), 0, randint(4)),
        "gather": (randn(7, 5), 0, randint(3, 5)),
        "mm": (randn(3, 4), randn(4, 5)),
        "bmm": (randn(2, 3, 4), randn(2, 4, 5)),
        "addmm": (randn(5), randn(3, 4), randn(4, 5)),
        "baddbmm": (randn(5), randn(2, 3, 4), randn(2, 4, 5)),
    }
    operands = len([each for each in standalone.TABLE[name]()._schema.arguments if each.name in ("self", "other")])
    return special.get(name) or (randn(3, 1, 5), randn(4, 1))[:operands]


def first(results: Any) -> torch.Tensor:
    return results if isinstance(results, torch.Tensor) else results[0]


@pytest.mark.parametrize("name", standalone.TABLE)
def test_opcheck(name: str) -> None:
    """Its schema, registrations and fake, and ahead-of-time compilation with fixed sizes and with others."""
    op = standalone.function(name)
    before = ops.CALLS[name]
    torch.library.opcheck(op.default, arguments(name))
    assert ops.CALLS[name] > before
    assert ops.FALLBACKS[name] == 0


@pytest.mark.parametrize("name", standalone.TABLE)
def test_results_and_gradients_are_pytorchs(name: str) -> None:
    torch.manual_seed(1)
    op, args = standalone.TABLE[name], arguments(name)
    got, expected = first(standalone.function(name)(*args)), first(op()(*args, *op.rest))
    torch.testing.assert_close(got, expected)
    assert got.requires_grad == expected.requires_grad
    if expected.requires_grad:
        wanted = [each for each in args if isinstance(each, torch.Tensor) and each.requires_grad]
        weight = torch.randn_like(expected)
        mine, others = (torch.autograd.grad(result, wanted, weight, allow_unused=True) for result in (got, expected))
        for one, other in zip(mine, others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["mul_tensor", "softmax", "mm", "layer_norm"])
def test_fullgraph(name: str) -> None:
    args, op = arguments(name), standalone.function(name)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    before = ops.CALLS[name]
    torch.testing.assert_close(first(compiled(*args)), first(op(*args)))
    assert ops.CALLS[name] == before + 2


def test_what_we_decline_is_done_by_pytorch_and_counted() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64, device=DEVICE)
    before = ops.FALLBACKS["mul_tensor"]
    try:
        assert torch.equal(vllm_gems.mul_tensor(x, x), x * x)
        assert ops.FALLBACKS["mul_tensor"] == before + 1
    finally:
        ops.FALLBACKS["mul_tensor"] = before


def test_errors_are_pytorchs() -> None:
    before = ops.FALLBACKS["mm"]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        vllm_gems.mm(torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE))
    ops.FALLBACKS["mm"] = before


def test_every_op_is_a_function_of_the_package() -> None:
    listed = dir(vllm_gems)
    for name in (*standalone.TABLE, *catalog().kernels):
        assert callable(getattr(vllm_gems, name))
        assert name in listed
    assert {"enable", "report", "device"} <= set(listed)
    assert vllm_gems.device.type == DEVICE
    x, weight = torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    torch.testing.assert_close(vllm_gems.rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))


def test_an_unknown_name_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'vllm_gems' has no attribute 'softmacks'"):
        _ = vllm_gems.softmacks
    assert not hasattr(vllm_gems, "_private")


def test_no_name_hides_a_module_or_a_verb() -> None:
    import pkgutil

    taken = {each.name for each in pkgutil.iter_modules(vllm_gems.__path__)} | set(vllm_gems.__all__)
    assert not taken & {*standalone.TABLE, *catalog().kernels, "device"}
