"""The patch by which vLLM's CUDA graphs of decode steps have our layers: when it goes around the compiled model."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_decoder_steps import metadata

from vllm_gems.patches import decoder, graphs
from vllm_gems.sites import Site, layer_method

POSITIONS = torch.tensor([5, 8, 6])


class Norm:
    """A layer that has chosen its native form, and whose other one is ours; which was called is kept."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self._forward_method = self.forward_native

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward_method(*args, **kwargs)

    def forward_native(self) -> None:
        self.called.append("native")

    def _cuda(self) -> None:
        raise AssertionError("vLLM's own is not called")

    forward_cuda = layer_method(
        _cuda, Site("layernorm.rms_norm"), lambda norm: lambda: norm.called.append("ours"), lambda norm: None
    )  # fmt: skip


def layer_class(site: Site | None) -> type:
    def forward(self: Any) -> None: ...

    if site:
        forward.__vllm_gems__ = site  # type: ignore[attr-defined]
    return type("Layer", (torch.nn.Module,), {"forward": forward})


class Model:
    """A model of two layers in a forward pass, of which is kept whether its compiled code was skipped."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ours: bool = True, refuses: str | None = None, most: int = 3,
        unmeasured: str | None = None,
    ) -> None:  # fmt: skip
        step = metadata()
        self.context = SimpleNamespace(
            attn_metadata={"layers.0": step}, slot_mapping={"layers.0": step.slot_mapping}, skip_compiled=False,
            cudagraph_runtime_mode=SimpleNamespace(name="NONE"),
        )  # fmt: skip
        module = SimpleNamespace(get_forward_context=lambda: self.context)
        monkeypatch.setitem(sys.modules, "vllm.forward_context", module)
        self.site, self.skipped = Site("graphs.qwen2"), list[bool]()
        self.layers, self.take = Site("decoder.qwen2"), 2  # of which so many take a batch
        self.norm = Norm()
        inner = torch.nn.Module()
        cls = layer_class(self.layers if ours else None)
        inner.layers, inner.norm = torch.nn.ModuleList([cls(), cls()]), self.norm  # type: ignore[assignment]
        monkeypatch.setattr(graphs, "_not_measured", lambda layer: unmeasured)
        inner.do_not_compile = False  # type: ignore[assignment]
        self.mode, self.apart = SimpleNamespace(name="FULL"), True
        mode = SimpleNamespace(decode_mode=lambda: self.mode, separate_routine=lambda: self.apart)
        inner.compilation_config = SimpleNamespace(cudagraph_mode=mode)  # type: ignore[assignment]

        def original(whole: Any, input_ids: Any, positions: Any) -> str:
            self.skipped.append(self.context.skip_compiled)
            if input_ids == "raise":
                raise RuntimeError("out of luck")
            self.layers.hits += self.take if self.context.skip_compiled else 0
            self.norm.forward()
            return f"of {input_ids}"

        patch = graphs._patch("qwen2", decoder.read, lambda layer: refuses, most)
        self.inner: Any = inner
        self.whole = type("Whole", (torch.nn.Module,), {"forward": patch.adapt(original, self.site)})()
        self.whole.model = inner

    def declined(self) -> str:
        """Why the compiled model ran."""
        assert self.whole("ids", POSITIONS) == "of ids"
        assert self.skipped == [False]
        (reason,) = self.site.declined
        return reason


def in_a_step(**changes: Any) -> Any:
    return lambda model: setattr(model.context, "attn_metadata", {"layers.0": metadata(**changes)})


def test_decode_steps_skip_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    for _ in range(2):
        assert model.whole("ids", positions=POSITIONS) == "of ids"
        assert not model.context.skip_compiled, "the next forward pass may be another"
    assert (model.skipped, model.site.hits, model.site.declined) == ([True, True], 2, {})
    assert model.norm.called == ["ours", "ours"]
    assert model.norm._forward_method == model.norm.forward_native
    assert "forward" not in vars(model.norm)


def test_what_vllm_skips_by_itself_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    model.context.skip_compiled = True
    model.whole("ids", POSITIONS)
    assert model.context.skip_compiled


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: setattr(model.inner, "do_not_compile", True), "does not compile"),
        (lambda model: setattr(model.context, "attn_metadata", None), "without attention metadata"),
        (lambda model: setattr(model.context, "attn_metadata", {}), "without attention metadata"),
        (lambda model: setattr(model.mode, "name", "PIECEWISE"), "no graphs of the whole model"),
        (lambda model: setattr(model, "apart", False), "and of their own"),
        (lambda model: setattr(model.context.cudagraph_runtime_mode, "name", "PIECEWISE"), "of pieces"),
        (in_a_step(max_query_len=2), "a batch that does not only decode"),
        (lambda model: setattr(model.context, "slot_mapping", {}), "no slots"),
        (in_a_step(use_cascade=True), "cascade"),
    ],
)
def test_other_passes_are_compiled(monkeypatch: pytest.MonkeyPatch, change: Any, words: str) -> None:
    model = Model(monkeypatch)
    change(model)
    assert words in model.declined()


def test_a_graph_is_captured_after_a_warm_up_of_as_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    model.whole("ids", POSITIONS)
    monkeypatch.setattr(graphs, "capturing", lambda: True)
    model.whole("ids", POSITIONS)
    assert model.skipped == [True, True]
    assert "without a warm-up" in Model(monkeypatch).declined()


def test_where_a_layer_declines_the_compiled_model_runs_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    model.take = 1
    for _ in range(2):
        assert model.whole("ids", POSITIONS) == "of ids"
    assert model.skipped == [True, False, False]
    assert model.norm.called == ["ours", "native", "native"]
    assert model.site.declined == {"only 1 of 2 layers took a batch of 3 requests": 2}


def test_more_requests_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Model(monkeypatch, most=2).declined() == "more than 2 requests"


def test_other_layers_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Layer is not replaced as a whole" in Model(monkeypatch, ours=False).declined()
    assert Model(monkeypatch, refuses="tensor parallelism").declined() == "tensor parallelism"


@pytest.mark.parametrize(
    ("dtype", "gpu", "words"),
    [
        (torch.bfloat16, "NVIDIA H100 80GB HBM3", None),
        (torch.float16, "NVIDIA H100 PCIe", None),
        (torch.bfloat16, "NVIDIA A100-SXM4-80GB", "linear layers are not measured on this GPU"),
        (torch.float8_e4m3fn, "NVIDIA H100 80GB HBM3", "weights in torch.float8_e4m3fn"),
        (torch.float32, "NVIDIA H100 80GB HBM3", "weights in torch.float32"),
    ],
)
def test_where_nothing_is_measured_the_graphs_are_vllms(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, gpu: str, words: str | None
) -> None:
    weight = SimpleNamespace(dtype=dtype, shape=(4096, 4096), get_device=lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    layer = SimpleNamespace(self_attn=SimpleNamespace(o_proj=SimpleNamespace(weight=weight)))
    reason = graphs._not_measured(layer)
    assert (reason is None) if words is None else (words in str(reason))
    if reason:
        assert Model(monkeypatch, unmeasured=reason).declined() == reason


def test_after_a_failure_the_compiled_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    with pytest.raises(RuntimeError, match="out of luck"):
        model.whole("raise", POSITIONS)
    assert not model.context.skip_compiled
    assert model.skipped == [True, False]
