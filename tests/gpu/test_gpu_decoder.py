"""Whole decoder layers in a real engine on a GPU: the logits of forced decoding against stock vLLM and float32.

Two layers of each model in their real shapes, in processes of their own; in eager mode, prefills too, and in vLLM's
default mode as what its CUDA graphs of decode steps are captured of.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from served import assert_answered, assert_captured, serve

MODELS = {
    "qwen2.5-7b": "decoder.qwen2", "llama-3.1-8b": "decoder.llama", "qwen3-8b": "decoder.qwen3",
    "qwen3-30b-a3b": "decoder.qwen3_moe",
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_as_near_to_float32_as_stocks(model: str, tmp_path: Path) -> None:
    record = serve(model, tmp_path, "default,decoder.*")
    assert_answered(record, MODELS[model])


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_graphs_that_are_captured_of_them(model: str, tmp_path: Path) -> None:
    record = serve(model, tmp_path, "default,graphs.*", "--modes", "compiled")
    assert_captured(record, MODELS[model], MODELS[model].replace("decoder", "graphs"))
