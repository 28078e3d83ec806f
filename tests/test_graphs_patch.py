"""The patch by which vLLM's CUDA graphs of decode steps have our layers: when it goes around the compiled model."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_decoder_steps import metadata

from vllm_gems.patches import decode_steps, graphs
from vllm_gems.sites import Site

POSITIONS = torch.tensor([5, 8, 6])


def layer_class(ours: bool) -> type:
    def forward(self: Any) -> None: ...

    if ours:
        forward.__vllm_gems__ = object()  # type: ignore[attr-defined]
    return type("Layer", (torch.nn.Module,), {"forward": forward})


class Model:
    """A model of two layers in a forward pass, of which is kept whether its compiled code was skipped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ours: bool = True, refuses: str | None = None) -> None:
        step = metadata()
        self.context = SimpleNamespace(
            attn_metadata={"layers.0": step}, slot_mapping={"layers.0": step.slot_mapping}, skip_compiled=False
        )
        module = SimpleNamespace(get_forward_context=lambda: self.context)
        monkeypatch.setitem(sys.modules, "vllm.forward_context", module)
        self.site, self.skipped = Site("graphs.qwen2", wants=lambda name: True), list[bool]()
        inner = torch.nn.Module()
        inner.layers = torch.nn.ModuleList([layer_class(ours)(), layer_class(ours)()])
        inner.do_not_compile = False  # type: ignore[assignment]
        self.mode = SimpleNamespace(name="FULL")
        mode = SimpleNamespace(decode_mode=lambda: self.mode)
        inner.compilation_config = SimpleNamespace(cudagraph_mode=mode)  # type: ignore[assignment]

        def original(whole: Any, input_ids: Any, positions: Any) -> str:
            self.skipped.append(self.context.skip_compiled)
            if input_ids == "raise":
                raise RuntimeError("out of luck")
            return f"of {input_ids}"

        patch = graphs._patch("qwen2", graphs._READ, lambda layer: refuses)
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
        (in_a_step(max_query_len=2), "a batch that does not only decode"),
        (lambda model: setattr(model.context, "slot_mapping", {}), "no slots"),
        (lambda model: setattr(graphs, "_MOST", 2), "3 requests, more than 2"),
        (in_a_step(use_cascade=True), "cascade"),
    ],
)
def test_other_passes_are_compiled(monkeypatch: pytest.MonkeyPatch, change: Any, words: str) -> None:
    monkeypatch.setattr(graphs, "_MOST", graphs._MOST)
    model = Model(monkeypatch)
    change(model)
    assert words in model.declined()


def test_a_graph_is_captured_only_of_layers_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "capturing", lambda: True)
    model = Model(monkeypatch)
    model.whole("ids", POSITIONS)
    assert model.skipped == [True]
    model = Model(monkeypatch)
    model.site.wants = lambda name: False
    assert "a CUDA graph is being captured" in model.declined()


def test_other_layers_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Layer is not replaced as a whole" in Model(monkeypatch, ours=False).declined()
    assert Model(monkeypatch, refuses="tensor parallelism").declined() == "tensor parallelism"


def test_after_a_failure_the_compiled_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    with pytest.raises(RuntimeError, match="out of luck"):
        model.whole("raise", POSITIONS)
    assert not model.context.skip_compiled
    assert model.skipped == [True, False]
