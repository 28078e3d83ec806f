"""What the serving benchmark expects and how it judges: models, hits, weights, logits. It needs no engine for these."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import serve
from benchmarks.models import MODELS
from vllm_gems.catalog import catalog
from vllm_gems.kernels.block_fp8_linear import dequantised

GB = 1e9


def test_every_patch_that_is_expected_exists() -> None:
    names = {patch for model in MODELS.values() for patch in (*model.calls, *model.wholes)}
    assert names <= set(catalog().patches)


@pytest.mark.parametrize(
    ("model", "size"),
    [("deepseek-v2-lite", 31.4), ("deepseek-v3-4l", 51.5), ("qwen3-30b-a3b", 61.1), ("llama-3.1-8b", 16.1)],
)
def test_weights_take_about_what_is_said(model: str, size: float) -> None:
    assert MODELS[model].weight_bytes(2) / GB == pytest.approx(size, rel=0.1)


def test_a_latent_cache_is_a_row_for_each_token_and_layer() -> None:
    model = MODELS["deepseek-v2-lite"]
    assert model.cache_bytes(1000, 2) == 1000 * 27 * 576 * 2
    assert model.cache_bytes(1000, 4, absorbed=False) == 1000 * 27 * 2 * 16 * 192 * 4


def test_a_cut_model_keeps_a_layer_with_experts() -> None:
    model = MODELS["deepseek-v3-4l"].cut(layers=2, experts=32)
    assert model.numbers == {"layer": 2, "layer without experts": 1, "layer with experts": 1, "model": 1}
    assert (model.experts, model.config["n_routed_experts"]) == (32, 32)
    assert model.title.endswith(", 2 layers, 32 experts")


def test_whole_blocks_take_over_the_calls_of_their_parts() -> None:
    """27 layers of DeepSeek-V2-Lite, 26 with experts; a prefill and three decode steps."""
    model = MODELS["deepseek-v2-lite"]
    parts = model.expected(3, set(model.calls))
    assert parts == {
        "layernorm.rms_norm": 4 * (27 * 3 + 1), "rotary.deepseek_scaling": 4 * 27, "activation.silu_and_mul": 4 * 27,
        "mla.triton_decode": 3 * 27, "moe.grouped_topk": 4 * 26, "op.silu_and_mul": 4 * 26,
    }  # fmt: skip
    blocks = model.expected(3, {*model.calls, "mla.decode_step"})
    assert blocks == {
        **parts,
        "layernorm.rms_norm": 4 * (27 * 2 + 1) + 27,
        "rotary.deepseek_scaling": 27,
        "mla.triton_decode": 0,
        "mla.decode_step": 3 * 27,
    }
    experts = {"activation.silu_and_mul", "moe.grouped_topk", "op.silu_and_mul"}
    mixtures = model.expected(3, {*model.calls, "mla.decode_step", "moe.mixture"})
    assert mixtures == {patch: count for patch, count in blocks.items() if patch not in experts}
    layers = model.expected(3, {*model.calls, "decoder.deepseek_v2"})
    assert layers == {
        "layernorm.rms_norm": 4 + 27 * 3, "rotary.deepseek_scaling": 27, "mla.triton_decode": 0,
        "decoder.deepseek_v2": 3 * 27,
    }  # fmt: skip


def test_hits_that_do_not_fit_are_told_but_not_of_patches_that_nobody_asked_for() -> None:
    model = MODELS["tiny"]
    right = {"layernorm.rms_norm": 10, "rotary.rotary_embedding": 4, "activation.silu_and_mul": 4}
    found = {"1": {"steps": 2, "hits": right}, "mixed": {"steps": 2, "hits": {}}}
    assert serve.wrong_hits(model, found, set()) == []
    found["1"]["hits"] = {**right, "rotary.rotary_embedding": 3}
    assert ["rotary.rotary_embedding answered 3 times in 2 steps, expected 4" in each
            for each in serve.wrong_hits(model, found, set())] == [True]  # fmt: skip
    assert serve.wrong_hits(model, found, {"rotary.rotary_embedding"}) == []


def test_whole_layers_take_short_prefills() -> None:
    model = MODELS["qwen2.5-7b"]
    layers, norms = model.numbers["layer"], 2
    for batch, passes in (("1", 3), ("32", 2)):  # of which 32 are 2,048 tokens
        hits = {
            "decoder.qwen2": layers * passes, "layernorm.rms_norm": 3 + (3 - passes) * norms * layers,
            "rotary.rotary_embedding": (3 - passes) * layers, "activation.silu_and_mul": (3 - passes) * layers,
        }  # fmt: skip
        found = {batch: {"steps": 3, "hits": hits}}
        assert serve.wrong_hits(model, found, set()) == []


def attention(q_lora_rank: int = 3, **weights: tuple[int, ...]) -> Any:
    model = torch.nn.Module()
    for name, shape in weights.items():
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.full(shape, float("nan"), dtype=torch.bfloat16), requires_grad=False)
        model.add_module(name, layer)
    model.config = SimpleNamespace(q_lora_rank=q_lora_rank)
    return model


def test_weights_are_the_same_whether_in_one_parameter_or_two() -> None:
    fused = attention(fused_qkv_a_proj=(8, 16), norm=(16,))
    parts = attention(q_a_proj=(3, 16), kv_a_proj_with_mqa=(5, 16), norm=(16,))
    serve.seed_weights(fused)
    serve.seed_weights(parts.float())
    assert torch.equal(fused.fused_qkv_a_proj.weight[:3].float(), parts.q_a_proj.weight)
    assert torch.equal(fused.fused_qkv_a_proj.weight[3:].float(), parts.kv_a_proj_with_mqa.weight)
    assert torch.equal(fused.norm.weight.float(), parts.norm.weight)
    assert abs(float(parts.norm.weight.mean()) - 1) < 0.2


def test_large_weights_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_DRAWN_AT_ONCE", 100)
    model = attention(experts=(7, 4, 16))
    serve.seed_weights(model)
    weight = model.experts.weight.float()
    assert weight.isfinite().all()
    assert float(weight.std()) == pytest.approx(16**-0.5, rel=0.2)
    assert len({float(row[0, 0]) for row in weight}) == 7


def in_float8(layer: Any, name: str) -> None:
    """Give a layer's parameter the dtype and the scales of vLLM's, nothing in them yet."""
    shape = getattr(layer, name).shape
    blocks = (*shape[:-2], *(-(-size // 128) for size in shape[-2:]))
    setattr(layer, name, torch.nn.Parameter(torch.empty(shape, dtype=torch.float8_e4m3fn), requires_grad=False))
    layer.register_parameter(f"{name}_scale_inv", torch.nn.Parameter(torch.empty(blocks), requires_grad=False))


def widened(layer: Any) -> torch.Tensor:
    return dequantised(layer.weight, layer.weight_scale_inv)


def test_weights_in_float8_are_as_large_as_those_in_bfloat16() -> None:
    """With their scales, one for a block, all different."""
    model = attention(o_proj=(200, 256))
    in_float8(model.o_proj, "weight")
    serve.seed_weights(model)
    assert len(set(model.o_proj.weight_scale_inv.flatten().tolist())) == 4
    assert float(widened(model.o_proj).std()) == pytest.approx(256**-0.5, rel=0.4)
    assert float(model.o_proj.weight.float().abs().max()) > 224  # the largest is 448


def test_a_model_without_quantisation_has_the_weights_of_the_one_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused or not, in pieces or not; and what is never in float8 is as it always was."""
    monkeypatch.setattr(serve, "_DRAWN_AT_ONCE", 70_000)
    quantised = attention(128, fused_qkv_a_proj=(128 + 72, 256), experts=(3, 200, 256), embed=(9, 16))
    wide = attention(q_a_proj=(128, 256), kv_a_proj_with_mqa=(72, 256), experts=(3, 200, 256), embed=(9, 16)).float()
    for layer in (quantised.fused_qkv_a_proj, quantised.experts):
        in_float8(layer, "weight")
    serve.seed_weights(quantised)
    serve.seed_weights(wide, float8=True)
    fused = torch.cat((wide.q_a_proj.weight, wide.kv_a_proj_with_mqa.weight))
    assert torch.equal(fused, widened(quantised.fused_qkv_a_proj))
    assert torch.equal(wide.experts.weight, widened(quantised.experts))
    assert torch.equal(wide.embed.weight, quantised.embed.weight.float())


def compared(folder: Path, rows: int, ours: float, far_rows: int, routed: bool) -> dict[str, Any]:
    """Stock is one off, ours `ours` off, and ten times as far in some rows."""
    torch.manual_seed(0)
    reference, noise = torch.randn(rows, 1024), torch.randn(rows, 1024)
    off = torch.full((rows, 1), ours)
    off[:far_rows] *= 10
    for name, logits in (("float32", reference), ("stock-eager-0", reference + 1e-2 * noise),
                         ("ours-eager-0", reference + 1e-2 * off * noise.flip(0))):  # fmt: skip
        torch.save(logits, folder / f"{name}-1.pt")
    names = ("float32", "stock-eager-0", "ours-eager-0")
    return serve.compare(folder, "eager", "1", {name: {"verified": {"1": {"rows": [rows]}}} for name in names}, routed)


def test_requests_are_compared_with_themselves_whatever_their_order_in_a_step() -> None:
    torch.manual_seed(0)
    reference = torch.randn(6, 100)
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    stock = torch.empty_like(reference)
    stock[order] = reference + 1e-2
    assert torch.equal(serve.order_like(stock, reference, [3, 1, 2]), order)
    assert torch.equal(serve.order_like(stock[:1].expand(6, -1), reference, [6]), torch.arange(6))


@pytest.mark.parametrize(
    ("rows", "ours", "far_rows", "routed", "right"),
    [
        (200, 1.05, 0, False, True),
        (200, 1.2, 0, False, False),
        (200, 1.0, 1, False, False),  # one row of two hundred, ten times as far
        (200, 1.05, 2, True, True),  # where it may have chosen another expert
        (200, 1.0, 20, True, False),  # but not in every tenth row
        (200, 1.2, 0, True, False),
        (9, 1.2, 3, True, True),  # too few to tell a rate
        (9, 1.0, 9, True, False),
        (200, float("nan"), 0, True, False),
        (9, 2.5, 0, True, False),
    ],
)
def test_logits_are_judged(tmp_path: Path, rows: int, ours: float, far_rows: int, routed: bool, right: bool) -> None:
    found = compared(tmp_path, rows, ours, far_rows, routed)
    assert found["within_bf16_rounding"] == right
    assert bool(serve.wrong_logits([found])) != right
