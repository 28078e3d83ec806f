"""rope_and_cache where the catalog's cases do not reach: caches in one allocation, the unfused kernels, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_kernels import DEVICE

from vllm_gems.errors import Refused
from vllm_gems.kernels.rms_norm import rms_norm
from vllm_gems.kernels.rope_and_cache import (
    KERNELS,
    QK_NORM_ROPE_AND_CACHE,
    ROPE_AND_CACHE,
    cache_base,
    cache_views,
    qk_norm_rope_and_cache,
    rope_and_cache,
)
from vllm_gems.kernels.rotary_embedding import rotary_embedding
from vllm_gems.nouns import Case, Kernel

TOKENS, Q_HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 7, 6, 2, 64, 16


def inputs_of(kernel: Kernel, dtype: str) -> dict[str, Any]:
    """Those of a case of these sizes, with padding."""
    params = {"tokens": (TOKENS,), "heads": (Q_HEADS, KV_HEADS), "head_size": HEAD_SIZE, "padded": True}
    return kernel.inputs(Case("these sizes", params), dtype, DEVICE)


def unfused(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qkv, key_cache, value_cache) after one kernel for each step, on copies."""
    inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    qkv, key_cache, value_cache, slots = (inputs[name] for name in ("qkv", "key_cache", "value_cache", "slot_mapping"))
    q, k, v = qkv.unflatten(-1, (-1, HEAD_SIZE)).split((Q_HEADS, KV_HEADS, KV_HEADS), dim=1)
    k = k.contiguous()
    if "q_weight" in inputs:
        q.copy_(rms_norm(q.contiguous(), inputs["q_weight"], inputs["epsilon"]))
        k = rms_norm(k, inputs["k_weight"], inputs["epsilon"])
    rotary_embedding(inputs["positions"], q, k, HEAD_SIZE, inputs["cos_sin_cache"], inputs["is_neox"])
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            key_cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = k[token]
            value_cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = v[token]
    return qkv, key_cache, value_cache


@pytest.mark.parametrize("layout", ["", "blocks", "pairs"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_caches_in_one_allocation(kernel: Kernel, layout: str) -> None:
    """Each as if alone, and nothing else of the allocation is written."""
    torch.manual_seed(0)
    alone = inputs_of(kernel, "bfloat16")
    blocks = len(alone["key_cache"])
    shape = cache_base(layout, blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
    base = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
    key_cache, value_cache = cache_views(base, layout)
    assert key_cache.shape == value_cache.shape == (blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
    key_cache.copy_(alone["key_cache"])
    value_cache.copy_(alone["value_cache"])
    assert not base.isnan().any()
    together = alone | {"qkv": alone["qkv"].clone(), "key_cache": key_cache, "value_cache": value_cache}

    kernel.op(**alone)
    kernel.op(**together)

    for name in kernel.results:
        assert torch.equal(together[name], alone[name]), name


# Some units in the last place of values up to 4.
CLOSE = {"float32": 4e-6, "float16": 4e-3, "bfloat16": 3.2e-2}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_results_are_those_of_the_unfused_kernels(kernel: Kernel, neox: bool, dtype: str) -> None:
    """But for the order in which squares are added, which rarely shows after rounding to 16 bits."""
    torch.manual_seed(0)
    inputs = inputs_of(kernel, dtype) | {"is_neox": neox}
    qkv, key_cache, value_cache = unfused(inputs)
    kernel.op(**inputs)
    for got, want in ((inputs["qkv"], qkv), (inputs["key_cache"], key_cache)):
        torch.testing.assert_close(got, want, rtol=0, atol=CLOSE[dtype])
        assert dtype == "float32" or (got == want).float().mean() > 0.995
    assert torch.equal(inputs["value_cache"], value_cache)


def test_padding_writes_q_alone() -> None:
    inputs = inputs_of(ROPE_AND_CACHE, "float16")
    inputs["slot_mapping"].fill_(-1)
    qkv, _, _ = unfused(inputs)
    before = {name: inputs[name].clone() for name in ("key_cache", "value_cache")}
    rope_and_cache(**inputs)
    torch.testing.assert_close(inputs["qkv"], qkv, rtol=0, atol=CLOSE["float16"])
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("qkv", lambda x: x[:, 64:], "rows of 576, not the 640 elements of 6 heads of q and 2 each of k and v of 64"),
        ("positions", lambda x: x[1:], r"positions of shape \(6,\)"),
        ("cos_sin_cache", lambda x: x.repeat(1, 2), "rotary_dim 128, not an even number up to the head's 64"),
        ("key_cache", lambda x: x.to(torch.float8_e4m3fn), "key_cache has dtype torch.float8_e4m3fn, and nothing is"),
        ("value_cache", lambda x: x[:, 1:], r"value_cache of shape \(2, 15, 2, 64\)"),
        ("value_cache", lambda x: x.half(), "value_cache has dtype torch.float16, and nothing is converted"),
        ("slot_mapping", lambda x: x.float(), "slot_mapping has dtype torch.float32, not int32 or int64"),
        ("num_heads", lambda x: 0, "num_heads 0"),
        ("q_weight", lambda x: x.double(), r"q_weight is torch.float64 \(64,\)"),
        ("k_weight", lambda x: x[1:], r"k_weight is torch.float32 \(63,\)"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, spoil: Callable[[Any], Any], words: str) -> None:
    inputs = inputs_of(QK_NORM_ROPE_AND_CACHE, "float32")
    before = inputs["qkv"].clone()
    with pytest.raises(Refused, match=words):
        qk_norm_rope_and_cache(**inputs | {name: spoil(inputs[name])})
    assert torch.equal(inputs["qkv"], before)


def test_odd_heads_are_refused() -> None:
    inputs = inputs_of(ROPE_AND_CACHE, "float32")
    odd = {name: inputs[name][..., 1:] for name in ("key_cache", "value_cache")}
    with pytest.raises(Refused, match="heads of 63, not of an even number of elements up to 256"):
        rope_and_cache(**inputs | odd)
