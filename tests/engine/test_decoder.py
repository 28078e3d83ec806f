"""Whole layers in real engines on vLLM's FlashAttention and Triton MLA backends: their tokens, when they stand down."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_runs import CAN_COMPILE, DECODER, DENSE, MIXED_TOKENS, REFEREED, ROOT, TOKENS, Run, checked, environment

Runs = dict[str, Callable[[], Run]]
LAYERS = 2


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["patch"]: row for row in report["rows"]}


@pytest.mark.parametrize("model", DENSE)
def test_tokens_are_stocks(runs: Runs, model: str) -> None:
    assert runs["decoder"]().job(model)["tokens"] == runs["off"]().job(f"{model} float32")["tokens"]


def test_tokens_are_stocks_when_prefills_and_decodes_share_batches(runs: Runs) -> None:
    assert runs["decoder"]().job("chunked")["tokens"] == runs["off"]().job("qwen3 float32")["tokens"]


@pytest.mark.parametrize("model", DENSE)
def test_every_step_was_a_whole_layers(runs: Runs, model: str) -> None:
    """All prompts are prefilled in one pass, and each later pass only decodes."""
    hits = runs["decoder"]().job(model)["hits"]
    assert hits[f"decoder.{model}"] == LAYERS * TOKENS
    assert hits["activation.silu_and_mul"] == hits["attention.direct_call"] == 0
    assert hits["layernorm.rms_norm"] == TOKENS  # the last norm of every pass


def test_mixed_batches_were_whole_layers_too(runs: Runs) -> None:
    job = runs["decoder"]().job("chunked")
    assert job["hits"]["decoder.qwen3"] > LAYERS * TOKENS
    assert job["hits"]["activation.silu_and_mul"] == 0


@pytest.mark.parametrize("model", REFEREED)
def test_latent_attention_of_decode_steps_was_ours(runs: Runs, model: str) -> None:
    """In the layer without experts as a part of the layer, in the other, whose experts a CPU does another way, the
    block alone; and the layers' own patches in the prefill."""
    job = runs["decoder"]().job(model)
    assert job["tokens"] == runs["off"]().job(f"{model} transformers")["tokens"]
    assert job["hits"]["decoder.deepseek_v2"] == job["hits"]["mla.decode_step"] == TOKENS - 1
    assert job["hits"]["mla.triton_decode"] == 0
    rotary = "rotary.deepseek_scaling" if model == "deepseek_v3" else "rotary.rotary_embedding"
    assert job["hits"][rotary] == LAYERS


def test_latent_attention_in_mixed_batches_went_to_the_original(runs: Runs) -> None:
    """In whose decode steps the attention alone is ours."""
    job, right = runs["decoder"]().job("mixed"), runs["off"]().job("mixed transformers")
    assert [len(tokens) for tokens in job["tokens"]] == [2, MIXED_TOKENS, MIXED_TOKENS]
    assert job["tokens"] == [right["tokens"][0][:2], *right["tokens"][1:]]
    assert job["hits"]["decoder.deepseek_v2"] == job["hits"]["mla.decode_step"] == 4
    assert job["hits"]["mla.triton_decode"] == LAYERS


def test_report_counts_layers_and_reasons(runs: Runs) -> None:
    result = runs["decoder"]().result
    found = rows(result["report"])
    layers = {**{f"decoder.{model}": LAYERS for model in DENSE}, "decoder.deepseek_v2": 1, "mla.decode_step": 1}
    for name, count in layers.items():
        row = found[name]
        assert row["state"] == "bound"
        assert row["errors"] == 0
        assert len(row["by_layer"]) == count
        assert len(set(row["by_layer"].values())) == 1
        assert sum(row["by_layer"].values()) == row["hits"]
        if name.removeprefix("decoder.") in DENSE:
            assert row["declined"] == {}
            continue
        assert "a batch that does not only decode" in row["declined"]
        assert len(row["declined"]) == (2 if name == "decoder.deepseek_v2" else 1)  # and the layer with a CPU's experts
    assert f"in each of {LAYERS} layers" in result["table"]


@pytest.fixture(scope="session")
def changes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `decoder_changes.py` found out in one engine."""
    folder = tmp_path_factory.mktemp("changes")
    script = str(Path(__file__).parent / "decoder_changes.py")
    command = [sys.executable, "-W", "ignore", script, str(tiny / "qwen2"), str(folder / "found.json")]
    variables = environment(folder / "cache", **DECODER) | {"PYTHONPATH": f"{ROOT / 'tools'}:{ROOT}"}
    checked(command, folder / "log", variables)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_nothing_is_compiled_after_warm_up(changes: dict[str, Any]) -> None:
    """Whatever the batches; and vLLM's JIT monitor would have stopped it."""
    ready = changes["ready"]
    assert ready["late"] == []
    assert ready["at_start"] > 0
    assert ready["hits"] > 0
    assert "during inference" in ready["forbidden"]
    assert ready["report"]["number"] == ready["at_start"] + 1
    assert sum(ready["report"]["late"].values()) == 1


def test_a_hook_is_called_and_only_its_layer_stands_down(changes: dict[str, Any]) -> None:
    hooked = changes["hooked"]
    assert hooked["tokens"] == changes["plain"]["tokens"]
    assert hooked["hook_calls"] == changes["plain"]["passes"]
    assert hooked["hits"][0] == 0
    assert hooked["hits"][1] == changes["plain"]["hits"][1] > 0
    assert "a hook on RowParallelLinear" in hooked["declined"]


def test_a_removed_hook_is_forgotten(changes: dict[str, Any]) -> None:
    assert changes["unhooked"]["tokens"] == changes["plain"]["tokens"]
    assert changes["unhooked"]["hits"] == changes["plain"]["hits"]


def test_a_replaced_weight_is_used(changes: dict[str, Any]) -> None:
    replaced = changes["replaced"]
    assert replaced["tokens"] == changes["removed"]["tokens"] != changes["plain"]["tokens"]
    assert "weights that were replaced" in replaced["declined"]
    # One call of one layer settles it anew.
    assert sum(replaced["hits"]) == sum(changes["plain"]["hits"]) - 1


def test_top_p_is_what_vllm_computes(changes: dict[str, Any]) -> None:
    assert changes["top_p"]["different"] == []
    assert (changes["top_p"]["hits"], changes["top_p"]["declined"]) == (2, {"a top-k": 2})
    assert changes["top_p"]["late"] == []


def test_undo_leaves_vllms_own_objects(changes: dict[str, Any]) -> None:
    assert changes["removed"]["forward_is_the_original"]
    assert changes["removed"]["settled_layers"] == 0
    assert changes["removed"]["hits"] == [0, 0]


def test_a_batch_that_prefills_is_ours_but_for_its_attention(changes: dict[str, Any]) -> None:
    """The first pass takes both prompts."""
    assert changes["plain"]["hits"] == [changes["plain"]["passes"]] * LAYERS
    assert changes["plain"]["declined"] == []


def test_a_failure_in_the_middle_of_a_layer_harms_nothing(changes: dict[str, Any]) -> None:
    """Norm, projection and cache write are done when attention raises: the original begins again."""
    failed = changes["failed"]
    assert failed["tokens"] == changes["removed"]["tokens"]
    assert failed["state"] == "failed"
    assert "broken on purpose" in failed["why"]
    assert failed["settled_layers"] == 0


@pytest.mark.skipif(not CAN_COMPILE, reason="Inductor needs a C++ compiler")
def test_decode_steps_of_vllms_default_mode_are_ours(tiny: Path, tmp_path: Path) -> None:
    """The prefill is compiled, and each step after it goes around the compiled model."""
    script = str(Path(__file__).parent / "captured_graphs.py")
    command = [sys.executable, "-W", "ignore", script, str(tiny / "qwen2"), str(tmp_path / "found.json")]
    variables = {"VLLM_GEMS_INCLUDE": "default,graphs.*", "PYTHONPATH": f"{ROOT / 'tools'}:{ROOT}"}
    checked(command, tmp_path / "log", environment(tmp_path / "cache", **variables))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["apart"] == ["FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"], "graphs that are for decode steps alone"
    assert found["ours"] == found["stock"]
    steps = len(found["ours"][0]) - 1
    assert found["rows"] == {"graphs.qwen2": [steps, 0], "decoder.qwen2": [steps * LAYERS, 0]}
