"""The binders on the real things that they bind to: PyTorch's dispatcher, and vLLM's registries where vLLM is there."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch

from vllm_gems.binders import BINDERS
from vllm_gems.errors import Refused
from vllm_gems.nouns import Place
from vllm_gems.sites import Site, op_kernel
from vllm_gems.worlds import LiveWorld

LIBRARY = torch.library.Library("gems_test", "DEF")
LIBRARY.define("scale_(Tensor! x, float by=2.0) -> ()")
LIBRARY.impl("scale_", lambda x, by=2.0: (x.mul_(by), None)[1], "CPU")

OPS = BINDERS["op"]
SCALE = Place("op", "torch", "gems_test::scale_", ("(Tensor!, float=2.0) -> ()",))


def scale(x: float, *by: float) -> float:
    tensor = torch.tensor([float(x)])
    torch.ops.gems_test.scale_(tensor, *by)
    return tensor.item()


def add(x: torch.Tensor, by: float = 2.0) -> None:
    x.add_(by)


def bind(call: Any, site: Site) -> Any:
    return OPS.bind(SCALE, lambda original: op_kernel(original, site, call), "cpu")


def test_an_op_is_probed_by_its_schema() -> None:
    world = LiveWorld()
    assert OPS.refuses(SCALE, world, "cpu") is None
    assert "is now (Tensor!, float=2.0) -> (), not (Tensor!, float) -> ()" in str(
        OPS.refuses(Place("op", "torch", "gems_test::scale_", ("(Tensor!, float) -> ()",)), world, "cpu")
    )
    absent = Place("op", "torch", "gems_test::none", ())
    assert OPS.refuses(absent, world, "cpu") == "no op gems_test.none is registered"


def test_an_op_is_covered_and_uncovered() -> None:
    site = Site("test")
    before = torch._C._dispatch_dump("gems_test::scale_")
    assert scale(3) == 6
    for _ in range(2):
        bound = bind(add, site)
        assert (scale(3), scale(3, 5.0)) == (5, 8)
        bound.undo()
        assert torch._C._dispatch_dump("gems_test::scale_") == before
        assert scale(3) == 6
    assert site.hits == 4


def test_the_covered_kernel_does_what_ours_declines_and_takes_over_when_it_fails() -> None:
    def call(x: torch.Tensor, by: float = 2.0) -> None:
        if by == 7.0:
            raise Refused("seven")
        if by == 9.0:
            raise ValueError("nine")
        add(x, by)

    site = Site("test")
    bound = bind(call, site)
    try:
        assert scale(3, 7.0) == 21
        assert scale(3, 5.0) == 8
        assert scale(3, 9.0) == 27
        assert scale(3, 5.0) == 15, "from then on, the original"
        assert (site.hits, site.declined, site.errors) == (1, {"seven": 1}, 1)
        assert site.failure == "ValueError: nine"
    finally:
        bound.undo()


def test_an_op_without_a_kernel_here_is_refused() -> None:
    with pytest.raises(LookupError, match="no CUDA kernel"):
        OPS.bind(SCALE, lambda original: original, "cuda")


def test_an_aten_op() -> None:
    place = Place("aten", "torch", "aten::erfinv", ("(Tensor) -> Tensor",))
    binder = BINDERS["aten"]
    assert binder.refuses(place, LiveWorld(), "cpu") is None
    site = Site("test")
    x = torch.tensor([0.5])
    expected = torch.erfinv(x)
    bound = binder.bind(place, lambda original: op_kernel(original, site, lambda x: x * 0), "cpu")
    assert torch.erfinv(x).item() == 0
    bound.undo()
    assert torch.equal(torch.erfinv(x), expected)
    assert site.hits == 1


def ir_module() -> types.ModuleType:
    """An IR op in the shape of vLLM's, for machines without one."""

    def twice(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        return x * by

    class IrOp:
        def __init__(self) -> None:
            self.impls: dict[str, Any] = {"native": types.SimpleNamespace(impl_fn=twice)}
            self._priority_impls: list[Any] = []

        def register_impl(self, provider: str, supports_args: Any = None) -> Any:
            def register(function: Any) -> Any:
                self.impls[provider] = types.SimpleNamespace(impl_fn=function, supports_args=supports_args)
                return self.impls[provider]

            return register

    module = types.ModuleType("toy_ir")
    module.twice = IrOp()  # type: ignore[attr-defined]
    return module


def test_an_ir_provider_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ir_module()
    monkeypatch.setitem(sys.modules, "toy_ir", module)
    binder = BINDERS["ir"]
    place = Place("ir", "toy_ir", "twice", ("(x, by=2.0)",))
    assert binder.refuses(place, LiveWorld(), "cpu") is None
    assert "is now" in str(binder.refuses(Place("ir", "toy_ir", "twice", ("(x)",)), LiveWorld(), "cpu"))
    bound = binder.bind(place, lambda op: (lambda x, by=2.0: x + by, lambda x, by=2.0: True), "cpu")
    op = module.twice
    op._priority_impls = [op.impls["vllm_gems"], op.impls["native"]]
    with pytest.raises(LookupError, match="has a provider"):
        binder.bind(place, lambda op: (None, None), "cpu")
    bound.undo()
    assert list(op.impls) == ["native"]
    assert op._priority_impls == [op.impls["native"]]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_an_attention_backend_comes_and_goes() -> None:
    registry = importlib.import_module("vllm.v1.attention.backends.registry")
    member = registry.AttentionBackendEnum.TRITON_MLA
    before = member.get_path()
    binder = BINDERS["backend"]
    place = Place("backend", registry.__name__, "TRITON_MLA", ("(backend, class_path=None, is_mamba=False)",))
    assert binder.refuses(place, LiveWorld(), "cuda") is None
    bound = binder.bind(place, lambda path: "vllm_gems.nouns.Row", "cuda")
    assert member.get_path() == "vllm_gems.nouns.Row"
    over = binder.bind(place, lambda path: "vllm_gems.nouns.Case", "cuda")
    assert over.replaced == "vllm_gems.nouns.Row"
    over.undo()
    assert member.get_path() == "vllm_gems.nouns.Row"
    bound.undo()
    assert member.get_path() == before
    assert not member.is_overridden()
