"""DeepSeek's attention block settled for decode steps: its numbers on a stand-in for the layer, and what it leaves."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import DEVICE

from vllm_gems import launch, replay
from vllm_gems.errors import Refused
from vllm_gems.kernels import mla_decode
from vllm_gems.kernels.mla_rope_and_cache import mla_rope_and_cache_reference
from vllm_gems.kernels.paged import random_pages
from vllm_gems.patches import decode_steps, mla_step
from vllm_gems.sites import Site

HIDDEN, HEADS, NOPE, ROPE, LATENT, VALUE, PAGE = 40, 3, 24, 16, 32, 20, 16
HEAD, WIDTH = NOPE + ROPE, LATENT + ROPE
SCALE, EPSILON = 0.2, 1e-6


@dataclass
class MLACommonDecodeMetadata:
    block_table: Any
    seq_lens: Any
    dcp_tot_seq_lens: Any
    novelty: object = None  # that a later release might add


@dataclass
class MLACommonMetadata:
    """The fields of vLLM 0.32's, and one that a later release might add."""

    num_reqs: int
    max_query_len: int
    max_seq_len: int
    num_actual_tokens: int
    query_start_loc: Any
    slot_mapping: Any
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    causal: bool = True
    head_dim: int | None = None
    prefill: Any = None
    decode: Any = None
    novelty: object = None


def weight(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, device=DEVICE) * shape[-1] ** -0.5, requires_grad=False)


class Linear(torch.nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight, self.bias = weight(out_features, in_features), None


class Norm(torch.nn.Module):
    variance_epsilon = EPSILON

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(1 + 0.2 * torch.randn(size, device=DEVICE), requires_grad=False)


class Rotary(torch.nn.Module):
    rotary_dim = head_size = ROPE
    is_neox_style = use_flashinfer = False

    def __init__(self) -> None:
        super().__init__()
        angles = torch.rand(256, ROPE // 2, device=DEVICE) * 6.28
        self.register_buffer("cos_sin_cache", torch.cat((angles.cos(), angles.sin()), dim=-1))

    def _match_cos_sin_cache_dtype(self, query: Any) -> Any:
        return self.cos_sin_cache


class Attention(torch.nn.Module):
    layer_name = "layers.0.attn"

    def __init__(self, kv_cache: Any) -> None:
        super().__init__()
        self.impl = SimpleNamespace(scale=SCALE, dcp_world_size=1)
        self.kv_cache = kv_cache
        # As vLLM makes them: views of one weight, a parameter or not.
        keys, values = weight(HEADS, NOPE + VALUE, LATENT).data.split((NOPE, VALUE), dim=1)
        self.W_UK_T = keys
        self.W_UV = torch.nn.Parameter(values.transpose(1, 2), requires_grad=False)


class Model:
    """A block with the patch around its forward, and the decode step that it is called in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int = 3, q_lora: int | None = None) -> None:
        torch.manual_seed(0)
        self.site = Site("mla.decode_step")
        lengths = [1 + 7 * row % 37 for row in range(rows)]
        blocks = sum(-(-length // PAGE) for length in lengths) + 3
        block_table, _ = random_pages(lengths, PAGE, blocks, str(DEVICE))
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.positions = (seq_lens - 1).long()
        pages = block_table.gather(1, (self.positions // PAGE)[:, None]).long()[:, 0]
        self.slots = pages * PAGE + self.positions % PAGE
        self.decode = MLACommonDecodeMetadata(block_table, seq_lens, None)
        self.metadata = MLACommonMetadata(
            rows, 1, max(lengths), rows, torch.arange(rows + 1), self.slots, rows, rows, 0, head_dim=WIDTH,
            decode=self.decode,
        )  # fmt: skip
        self.context = SimpleNamespace(attn_metadata={}, slot_mapping={})
        forward_context = SimpleNamespace(get_forward_context=lambda: self.context)
        monkeypatch.setitem(sys.modules, "vllm.forward_context", forward_context)
        monkeypatch.setattr(mla_step, "layer_refuses", lambda layer: None)
        self.hidden = torch.randn(rows, HIDDEN, device=DEVICE)
        self.layer = self._layer(q_lora, torch.randn(blocks, PAGE, WIDTH, device=DEVICE))

    def _layer(self, q_lora: int | None, kv_cache: Any) -> Any:
        class Block(torch.nn.Module):
            forward = mla_step.PATCHES[0].adapt(original, self.site)

        layer: Any = Block()
        layer.num_heads, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim = HEADS, NOPE, ROPE, VALUE
        layer.q_lora_rank, layer.kv_lora_rank = q_lora, LATENT
        if q_lora:
            layer.fused_qkv_a_proj, layer.q_a_layernorm = Linear(HIDDEN, q_lora + WIDTH), Norm(q_lora)
            layer.q_b_proj = Linear(q_lora, HEADS * HEAD)
        else:
            layer.kv_a_proj_with_mqa, layer.q_proj = Linear(HIDDEN, WIDTH), Linear(HIDDEN, HEADS * HEAD)
        layer.kv_a_layernorm, layer.rotary_emb = Norm(LATENT), Rotary()
        layer.mla_attn, layer.o_proj = Attention(kv_cache), Linear(HEADS * VALUE, HIDDEN)
        return layer

    def call(self, *args: Any) -> Any:
        name = self.layer.mla_attn.layer_name
        self.context.attn_metadata, self.context.slot_mapping = {name: self.metadata}, {name: self.slots}
        return self.layer(self.positions, self.hidden, *args)

    def idle(self) -> Any:
        """A pass without requests."""
        self.context.attn_metadata = self.context.slot_mapping = None
        return self.layer(self.positions, self.hidden)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the block returns, the cache after it) in float64."""
        layer, x = self.layer, self.hidden.double()
        if layer.q_lora_rank:
            compressed = x @ layer.fused_qkv_a_proj.weight.double().T
            q, kv = compressed.split((layer.q_lora_rank, WIDTH), dim=-1)
            q = q * torch.rsqrt(q.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * layer.q_a_layernorm.weight.double()
            q = q @ layer.q_b_proj.weight.double().T
        else:
            kv, q = (x @ each.weight.double().T for each in (layer.kv_a_proj_with_mqa, layer.q_proj))
        nope, rope = q.view(-1, HEADS, HEAD).split((NOPE, ROPE), dim=-1)
        attn, angles = layer.mla_attn, layer.rotary_emb.cos_sin_cache.double()
        rope, cache = mla_rope_and_cache_reference(
            rope, kv, layer.kv_a_layernorm.weight.double(), self.positions, angles, attn.kv_cache.double(),
            self.slots, EPSILON, False,
        )  # fmt: skip
        query = torch.cat((torch.einsum("rhn,hnl->rhl", nope, attn.W_UK_T.double()), rope), dim=-1)
        latents, _ = mla_decode.mla_decode_reference(
            query, cache, self.decode.block_table, self.decode.seq_lens, SCALE, LATENT
        )
        values = torch.einsum("rhl,hlv->rhv", latents, attn.W_UV.double())
        return values.flatten(1) @ layer.o_proj.weight.double().T, cache


def original(self: Any, positions: Any, hidden_states: Any, llama_4_scaling: Any = None) -> str:
    return "the original"


def assert_right(model: Model, got: Any, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Sums of a few dozen float32 terms, one after the other: 1e-5 is a hundredth of what a wrong weight does."""
    torch.testing.assert_close(got.double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.layer.mla_attn.kv_cache.double(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("few_rows", [4, 2])  # with more, the products are cuBLASLt's
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("q_lora", [None, 28])
def test_a_decode_step_is_right(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, q_lora: int | None, rows: int, few_rows: int
) -> None:
    if DEVICE == "cpu" and rows > few_rows:
        request.getfixturevalue("library")
    model = Model(monkeypatch, rows, q_lora)
    monkeypatch.setattr(decode_steps, "FEW_ROWS", few_rows)
    expected, hidden = model.expected(), model.hidden.clone()
    for _ in range(2):  # the second is settled, and writes the same to the cache
        assert_right(model, model.call(), expected)
    assert torch.equal(model.hidden, hidden)
    assert (model.site.hits, model.site.by_layer, model.site.declined) == (2, {"layers.0.attn": 2}, {})


def test_warm_up_compiles_what_decode_steps_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pass without requests, as soon as there is a KV cache; and then nothing more."""
    # Sizes whose rows are aligned, as real ones are, and none of another test.
    for name, size in {"HIDDEN": 48, "NOPE": 32, "VALUE": 48, "HEAD": 48, "WIDTH": 48, "PAGE": 8}.items():
        monkeypatch.setitem(globals(), name, size)
    model = Model(monkeypatch)
    attn, counts = model.layer.mla_attn, []
    kv_cache, attn.kv_cache = attn.kv_cache, attn.kv_cache[:0]
    for cache in (attn.kv_cache, attn.kv_cache, kv_cache, kv_cache):
        attn.kv_cache = cache
        assert model.idle() == "the original"
        counts.append(len(launch.COMPILED))
    assert counts[0] == counts[1] < counts[2] == counts[3]
    expected = model.expected()
    assert_right(model, model.call(), expected)
    assert len(launch.COMPILED) == counts[3]
    assert (model.site.hits, model.site.errors) == (1, 0)


@pytest.mark.parametrize("name", ["W_UK_T", "W_UV", "o_proj", "kv_a_layernorm"])
def test_replaced_weights_are_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The absorbed ones are attributes of attention, parameters or not."""
    model = Model(monkeypatch)
    model.call()
    owner = model.layer.mla_attn if name.startswith("W_") else getattr(model.layer, name)
    attribute = name if name.startswith("W_") else "weight"
    old = getattr(owner, attribute)
    new = old * -2
    setattr(owner, attribute, torch.nn.Parameter(new, requires_grad=False) if name != "W_UK_T" else new)
    assert model.call() == "the original"
    assert list(model.site.declined) == ["weights that were replaced"]
    assert_right(model, model.call(), model.expected())


def test_a_failure_in_the_middle_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    expected, hidden = model.expected(), model.hidden.clone()
    made = replay._one_by_one
    monkeypatch.setattr(replay, "_program", lambda *_: None)
    monkeypatch.setattr(replay, "_one_by_one", lambda entries, values: made(entries[:4], values) or 1 / 0)
    assert model.call() == "the original"
    assert "ZeroDivisionError" in model.site.failure
    assert torch.equal(model.hidden, hidden)
    # What was written to the cache is what the original would write there.
    torch.testing.assert_close(model.layer.mla_attn.kv_cache.double(), expected[1], rtol=0, atol=1e-5)


def test_a_hook_on_a_part_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    model.call()
    handle = model.layer.o_proj.register_forward_hook(lambda *_: None)
    assert model.call() == "the original"
    assert list(model.site.declined) == ["a hook on Linear"]
    handle.remove()
    assert_right(model, model.call(), model.expected())


@pytest.mark.parametrize(("gpus", "declined"), [(1, []), (2, ["decode context parallelism"])])
def test_how_many_share_a_context_is_known_before_vllms_first_pass(
    monkeypatch: pytest.MonkeyPatch, gpus: int, declined: list[str]
) -> None:
    group = SimpleNamespace(get_dcp_group=lambda: SimpleNamespace(world_size=gpus))
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", group)
    model = Model(monkeypatch)
    model.layer.mla_attn.impl.dcp_world_size = -1
    model.call()
    assert list(model.site.declined) == declined


def _context_parallel(model: Model) -> None:
    model.layer.mla_attn.impl.dcp_world_size = 2


def _other_cache(model: Model) -> None:
    model.layer.mla_attn.kv_cache = model.layer.mla_attn.kv_cache.half()


def _tokens_apart(model: Model) -> None:
    model.layer.mla_attn.kv_cache = torch.randn(9, PAGE, WIDTH + 16, device=DEVICE)[..., :WIDTH]


def _rows_apart(model: Model) -> None:
    model.hidden = torch.randn(3, 2 * HIDDEN, device=DEVICE)[:, :HIDDEN]


def _narrow(model: Model) -> None:
    model.hidden = model.hidden.half()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_context_parallel, "decode context parallelism"),
        (_other_cache, "a KV cache in torch.float16"),
        (_tokens_apart, "of strides"),
        (_rows_apart, "hidden_states torch.float32"),
        (_narrow, "hidden_states torch.float16"),
    ],
)
def test_calls_that_are_not_done_go_to_the_original(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Model], None], reason: str
) -> None:
    model = Model(monkeypatch)
    model.call()
    change(model)
    assert model.call() == "the original"
    (said,) = model.site.declined
    assert reason in said
    assert (model.site.hits, model.site.errors) == (1, 0)


def test_scaled_queries_go_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    assert model.call(torch.ones(3, 1, 1)) == "the original"
    assert list(model.site.declined) == ["queries scaled by their positions"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda layer: setattr(layer, "v_head_dim", 21), "weights of shapes"),
        (lambda layer: setattr(layer.rotary_emb, "rotary_dim", 8), r"not \[max_position, 8\]|8 of 16 elements"),
        (lambda layer: setattr(layer.mla_attn, "W_UK_T", layer.mla_attn.W_UK_T.half()), "a weight in torch.float16"),
        (lambda layer: setattr(layer.o_proj, "weight", torch.nn.Parameter(layer.o_proj.weight.half())), "float16"),
        (
            lambda layer: setattr(
                layer.mla_attn, "W_UK_T", torch.randn(HEADS, NOPE, 2 * LATENT, device=DEVICE)[..., ::2]
            ),
            "absorbed weights of strides",
        ),
    ],
)
def test_layers_of_other_sizes_go_to_the_original(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], None], words: str
) -> None:
    model = Model(monkeypatch)
    spoil(model.layer)
    with pytest.raises(Refused, match=words):
        mla_step._bind(model.layer, model.hidden)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_query_len": 2}, "does not only decode"),
        ({"num_prefills": 1}, "does not only decode"),
        ({"num_decodes": 2}, "does not only decode"),
        ({"decode": None}, "does not only decode"),
        ({"decode": SimpleNamespace()}, "attention metadata of SimpleNamespace"),
        ({"causal": False}, "metadata with causal"),
        ({"prefill": object()}, "metadata with prefill"),
        ({"novelty": object()}, "metadata with novelty"),
        ({"decode": MLACommonDecodeMetadata(None, None, torch.ones(3))}, "context parallelism"),
        ({"decode": MLACommonDecodeMetadata(None, None, None, object())}, "metadata with novelty"),
    ],
)
def test_other_steps_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str) -> None:
    metadata = Model(monkeypatch).metadata
    assert mla_step.read(metadata).num_tokens == 3
    with pytest.raises(Refused, match=words):
        mla_step.read(dataclasses.replace(metadata, **changes))
    with pytest.raises(Refused, match="attention metadata of SimpleNamespace"):
        mla_step.read(SimpleNamespace())


X = torch.ones(1)


class _Impl:
    __module__ = "vllm.v1.attention.backends.mla.triton_mla"


def attention(**changes: Any) -> Any:
    plain = {"impl": _Impl(), "kv_cache_dtype": "auto", "q_pad_num_heads": None, "W_UK_T": X, "W_UV": X}
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"impl": SimpleNamespace()}, "the attention backend is SimpleNamespace"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache in fp8"),
        ({"calculate_kv_scales": True}, "scales"),
        ({"sliding_window": 128}, "sliding window"),
        ({"use_pcp": True}, "context parallelism"),
        ({"dcp_q_replicate": True}, "context parallelism"),
        ({"use_sparse": True}, "sparse attention"),
        ({"hisparse_cache": object()}, "sparse attention"),
        ({"q_pad_num_heads": 64}, "padded heads"),
        ({"is_amx_bmm_enabled": True}, "packed or quantised"),
        ({"W_UV": None}, "no absorbed weights"),
        ({"is_aiter_triton_fp8_bmm_enabled": True}, "packed or quantised"),
    ],
)
def test_other_attention_is_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(mla_step, "part_refuses", lambda *_: None)
    assert [reason for reason in mla_step._attention_refuses(attention()) if reason] == []
    (reason,) = (reason for reason in mla_step._attention_refuses(attention(**changes)) if reason)
    assert words in reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_sparse": True}, "sparse attention"),
        ({"indexer": object()}, "sparse attention"),
        ({"g_proj": object()}, "a gate"),
        ({"fuse_qkv_rmsnorm": True}, "fusion of the two norms"),
        ({"q_lora_rank": None, "q_proj": Linear(2, 2)}, "q_proj is a Linear"),
        ({"q_lora_rank": 8, "fused_qkv_a_proj": Linear(2, 2)}, "fused_qkv_a_proj is a Linear"),
        ({"q_lora_rank": 8}, "not the parts of DeepSeek's attention"),
    ],
)
def test_other_layers_are_left_to_vllm(changes: dict[str, Any], words: str) -> None:
    plain = {"is_sparse": False, "indexer": None}
    assert words in str(mla_step.layer_refuses(SimpleNamespace(**plain | changes)))
