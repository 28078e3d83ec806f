"""A decoder layer settled as a whole, dense or with experts: its numbers on stand-ins for its parts."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import test_mla_step
import test_moe_step
import torch
from test_decoder_steps import FlashAttentionMetadata
from test_deepseek import Dense
from test_kernels import DEVICE

from vllm_gems import replay
from vllm_gems.kernels.paged import random_pages
from vllm_gems.patches import decode_steps, decoder
from vllm_gems.sites import Site

HIDDEN, EPSILON = test_mla_step.HIDDEN, test_mla_step.EPSILON
HEADS, KV_HEADS, HEAD, PAGE = 4, 2, 16, 16
LENGTHS = 1, 20, 37
DECODES, MIXED = (1, 1, 1), (1, 5, 33)  # tokens of each request
Q, KV = HEADS * HEAD, KV_HEADS * HEAD


class Rotary(test_mla_step.Rotary):
    is_neox_style = True


def attended(query: torch.Tensor, kv_cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """One query, [HEADS, HEAD], over so many tokens of a cache."""
    cache = kv_cache[:, pages[: -(-length // PAGE)].long()].double().flatten(1, 2)[:, :length]
    keys, values = cache.repeat_interleave(HEADS // KV_HEADS, dim=2)
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * HEAD**-0.5
    return torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values)


class Implementation:
    scale = HEAD**-0.5

    def do_kv_cache_update(self) -> None:
        """Its source says how a cache lies."""

    def forward(self, layer: Any, query: Any, key: None, value: None, kv_cache: Any, metadata: Any, output: Any) -> Any:
        """Of batches that do not only decode."""
        assert key is value is None, "keys and values are in the cache"
        for request, (start, end) in enumerate(itertools.pairwise(metadata.query_start_loc.tolist())):
            for row in range(start, end):
                length = int(metadata.seq_lens[request]) - (end - 1 - row)
                output[row] = attended(query[row], kv_cache, metadata.block_table[request], length)
        return output


class Attention(torch.nn.Module):
    layer_name = "layers.0.attn"
    num_heads, num_kv_heads, head_size = HEADS, KV_HEADS, HEAD

    def __init__(self, kv_cache: torch.Tensor) -> None:
        super().__init__()
        self.impl = Implementation()
        self.kv_cache = kv_cache


def normalised(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * norm.weight.double()


def original(self: Any, positions: Any, hidden_states: Any, residual: Any) -> str:
    return "the original"


class Model:
    """A layer with the patch around its forward, and the step that it is called in: so many tokens of each request."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, mixture: bool, qk_norm: bool, tokens: tuple[int, ...] = DECODES,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        monkeypatch.setattr(test_moe_step, "HIDDEN", HIDDEN)
        monkeypatch.setattr(decoder, "layer_refuses", lambda layer: None)
        monkeypatch.setattr(decoder, "source_hash", lambda function: "made up")
        monkeypatch.setitem(decoder.KV_CACHE_LAYOUTS, "made up", lambda cache, head_size: cache.unbind(0))
        blocks, rows = 8, sum(tokens)
        table, _ = random_pages(list(LENGTHS), PAGE, blocks, str(DEVICE))
        places = [
            (request, length - count + place)
            for request, (length, count) in enumerate(zip(LENGTHS, tokens, strict=True))
            for place in range(count)
        ]
        requests, self.positions = torch.tensor(places, device=DEVICE).T.contiguous()
        self.pages = table[requests]  # of each token's request
        pages = self.pages.gather(1, (self.positions // PAGE)[:, None]).long()[:, 0]
        self.slots = pages * PAGE + self.positions % PAGE
        starts = torch.tensor([0, *tokens]).cumsum(0).to(DEVICE, torch.int32)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
        metadata = FlashAttentionMetadata(
            rows, max(tokens), starts, max(LENGTHS), lengths, table, self.slots, False, 0
        )  # fmt: skip
        name = Attention.layer_name
        self.context = SimpleNamespace(
            attn_metadata={name: metadata}, slot_mapping={name: self.slots}, skip_compiled=False
        )
        forward_context = SimpleNamespace(get_forward_context=lambda: self.context)
        monkeypatch.setitem(sys.modules, "vllm.forward_context", forward_context)
        self.site = Site("decoder.qwen3_moe" if mixture else "decoder.qwen3")
        self.mixture = test_moe_step.Model(monkeypatch, shared=False) if mixture else None

        class Layer(torch.nn.Module):
            forward = decoder.PATCHES[0].adapt(original, self.site)

        layer: Any = Layer()
        layer.input_layernorm, layer.post_attention_layernorm = (test_mla_step.Norm(HIDDEN) for _ in range(2))
        layer.self_attn = torch.nn.Module()
        layer.self_attn.qkv_proj = test_mla_step.Linear(HIDDEN, Q + 2 * KV)
        layer.self_attn.o_proj = test_mla_step.Linear(Q, HIDDEN)
        if qk_norm:
            layer.self_attn.q_norm, layer.self_attn.k_norm = (test_mla_step.Norm(HEAD) for _ in range(2))
        layer.self_attn.rotary_emb = Rotary()
        layer.self_attn.attn = Attention(torch.randn(2, blocks, PAGE, KV_HEADS, HEAD, device=DEVICE))
        layer.mlp = torch.nn.Module() if self.mixture else Dense()
        if self.mixture:
            layer.mlp.experts = self.mixture.runner
        self.layer = layer
        self.hidden, self.residual = (torch.randn(rows, HIDDEN, device=DEVICE) for _ in range(2))

    def call(self, residual: torch.Tensor | None) -> Any:
        return self.layer(self.positions, self.hidden, residual)

    def _attended(self, x: torch.Tensor) -> torch.Tensor:
        part = self.layer.self_attn
        q, k, v = (x @ part.qkv_proj.weight.double().T).split((Q, KV, KV), dim=-1)
        q, k, v = q.unflatten(-1, (HEADS, HEAD)), k.unflatten(-1, (KV_HEADS, HEAD)), v.unflatten(-1, (KV_HEADS, HEAD))
        if hasattr(part, "q_norm"):
            q, k = normalised(q, part.q_norm), normalised(k, part.k_norm)
        cos, sin = part.rotary_emb.cos_sin_cache[self.positions].double()[:, None].chunk(2, dim=-1)

        def turned(each: torch.Tensor) -> torch.Tensor:
            first, second = each.chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        cache = part.attn.kv_cache.double()
        cache.flatten(1, 2)[:, self.slots] = torch.stack((turned(k), v))
        each = zip(turned(q), self.pages, self.positions.tolist(), strict=True)
        rows = [attended(query, cache, pages, position + 1).flatten() for query, pages, position in each]
        return torch.stack(rows) @ part.o_proj.weight.double().T

    def expected(self, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64."""
        total = self.hidden.double() + (0 if residual is None else residual.double())
        total = total + self._attended(normalised(total, self.layer.input_layernorm))
        x = normalised(total, self.layer.post_attention_layernorm)
        return (self.mixture or self.layer.mlp).expected(x), total


@pytest.mark.parametrize("qk_norm", [True, False], ids=["norms", "no norms"])
@pytest.mark.parametrize(
    ("mixture", "tokens"),
    [(True, DECODES), (False, DECODES), (False, MIXED)],
    ids=["experts", "dense", "dense with prefills"],
)
def test_a_step_is_right(
    monkeypatch: pytest.MonkeyPatch, mixture: bool, qk_norm: bool, tokens: tuple[int, ...]
) -> None:
    model = Model(monkeypatch, mixture, qk_norm, tokens)
    hidden, before = model.hidden.clone(), model.residual.clone()
    for residual in (None, model.residual, model.residual):
        expected = model.expected(residual)
        for got, want in zip(model.call(residual), expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)
    assert torch.equal(model.hidden, hidden)
    assert torch.equal(model.residual, before)
    assert (model.site.hits, model.site.by_layer, model.site.declined) == (3, {"layers.0.attn": 3}, {})


@pytest.mark.parametrize("mixture", [True, False], ids=["experts", "dense"])
def test_what_a_graph_captures_is_right_and_not_recorded(monkeypatch: pytest.MonkeyPatch, mixture: bool) -> None:
    monkeypatch.setattr(decode_steps, "capturing", lambda: True)
    monkeypatch.setattr(replay, "_capturing", lambda device: lambda: True)
    monkeypatch.setattr(replay, "_program", lambda *_: pytest.fail("it was recorded"))
    model = Model(monkeypatch, mixture, qk_norm=True)
    assert model.call(model.residual) == "the original", "the graph may be for any batch"
    assert list(model.site.declined) == ["a CUDA graph is being captured, and the next step's batch is another"]
    monkeypatch.setattr(decode_steps, "capturing", lambda: False)
    model = Model(monkeypatch, mixture, qk_norm=True)
    model.call(model.residual)
    monkeypatch.setattr(decode_steps, "capturing", lambda: True)
    assert model.call(model.residual) == "the original", "nor may the step of a warm-up be, whose metadata it shares"
    model = Model(monkeypatch, mixture, qk_norm=True)
    model.context.skip_compiled = True
    for got, want in zip(model.call(model.residual), model.expected(model.residual), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)
    assert model.site.declined == {}


def test_replaced_experts_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, mixture=True, qk_norm=True)
    model.call(model.residual)
    experts = model.layer.mlp.experts.routed_experts
    experts.w2_weight = torch.nn.Parameter(experts.w2_weight * -2, requires_grad=False)
    assert model.call(model.residual) == "the original"  # and settled anew after it
    for got, want in zip(model.call(model.residual), model.expected(model.residual), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)
    assert list(model.site.declined) == ["weights that were replaced"]


def test_experts_of_batches_that_prefill_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, mixture=True, qk_norm=True, tokens=MIXED)
    assert model.call(model.residual) == "the original"
    (reason,) = model.site.declined
    assert "a batch that does not only decode, of a layer with experts" in reason


def test_no_graph_is_captured_of_a_batch_that_does_not_only_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "capturing", lambda: True)
    model = Model(monkeypatch, mixture=False, qk_norm=False, tokens=MIXED)
    assert model.call(model.residual) == "the original"
    assert list(model.site.declined) == ["a CUDA graph is being captured, and the next step's batch is another"]


def test_a_failure_in_attention_leaves_what_the_layer_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the original can begin anew."""
    model = Model(monkeypatch, mixture=False, qk_norm=False, tokens=MIXED)
    hidden, residual = model.hidden.clone(), model.residual.clone()
    monkeypatch.setattr(Implementation, "forward", lambda *_, **__: 1 // 0)
    assert model.call(model.residual) == "the original"
    assert model.site.failure.startswith("ZeroDivisionError")
    assert torch.equal(model.hidden, hidden)
    assert torch.equal(model.residual, residual)
