"""DeepSeek's layers in a real engine on a GPU: the logits of forced decoding against stock vLLM and float32.

A dense layer and one with experts, in the real shapes but for the number of experts, on vLLM's TRITON_MLA backend: the
patches of parts of a layer, those of whole blocks, whose parts then answer prefills and mixed batches only, and that of
whole layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from served import assert_answered, assert_captured, serve

from vllm_gems.catalog import catalog

# Routed experts that are left; a multiple of the groups.
MODELS = {"deepseek-v2-lite": "16", "deepseek-v3-4l": "32"}
PARTS = ("mla.triton_decode", "moe.grouped_topk")
BLOCKS = ("mla.decode_step", "moe.mixture")
LAYERS = ("decoder.deepseek_v2",)


@pytest.mark.parametrize("patches", [PARTS, BLOCKS, LAYERS], ids=["parts", "blocks", "layers"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_as_near_to_float32_as_stocks(model: str, patches: tuple[str, ...], tmp_path: Path) -> None:
    known = [patch for patch in patches if patch in catalog().patches]
    assert known
    options = ("--attention", "TRITON_MLA", "--experts", MODELS[model])
    exclude = "" if patches is LAYERS else "decoder.*"
    record = serve(model, tmp_path, ",".join(("default", *known)), *options, exclude=exclude)
    attention = record["setting"]["attention"]
    assert {name for process, name in attention.items() if process != "float32"} == {"TRITON_MLA"}
    for patch in known:
        assert_answered(record, patch)


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_graphs_that_are_captured_of_them(model: str, tmp_path: Path) -> None:
    options = ("--attention", "TRITON_MLA", "--experts", MODELS[model], "--modes", "compiled")
    record = serve(model, tmp_path, "default,graphs.*", *options)
    assert_captured(record, *LAYERS, "graphs.deepseek_v2")


def test_logits_with_weights_in_float8(tmp_path: Path) -> None:
    """Against stock's of the same weights, and float32's of what they stand for; up to 64 requests are for us."""
    options = ("--attention", "TRITON_MLA", "--experts", "32")
    record = serve("deepseek-v3-4l-fp8", tmp_path, "default", *options, most=32)
    assert_answered(record, *LAYERS)
