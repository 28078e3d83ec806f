"""mla_rope_and_cache where the catalog's cases do not reach: the unfused kernels, padding, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_kernels import DEVICE

from vllm_gems.errors import Refused
from vllm_gems.kernels.mla_rope_and_cache import MLA_ROPE_AND_CACHE, mla_rope_and_cache
from vllm_gems.kernels.rms_norm import rms_norm
from vllm_gems.kernels.rotary_embedding import rotary_embedding
from vllm_gems.nouns import Case

LATENT, ROPE, BLOCK_SIZE = 64, 32, 16


def inputs_of(dtype: str) -> dict[str, Any]:
    """Those of a case of these sizes, with padding."""
    params = {"tokens": (7,), "heads": 5, "latent": LATENT, "rope": ROPE, "padded": True}
    return MLA_ROPE_AND_CACHE.inputs(Case("these sizes", params), dtype, DEVICE)


def unfused(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(query_rope, kv_cache) after one kernel for each step, on copies."""
    query, cache = inputs["query_rope"].clone(), inputs["kv_cache"].clone()
    latent, key = inputs["kv"].split((LATENT, ROPE), dim=-1)
    latent, key = rms_norm(latent, inputs["weight"], inputs["epsilon"]), key.clone()
    rotary_embedding(inputs["positions"], query, key[:, None], ROPE, inputs["cos_sin_cache"], inputs["is_neox"])
    for token, slot in enumerate(inputs["slot_mapping"].tolist()):
        if slot >= 0:
            cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = torch.cat((latent[token], key[token]))
    return query, cache


# Some units in the last place of values up to 4.
CLOSE = {"float32": 4e-6, "float16": 4e-3, "bfloat16": 3.2e-2}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("neox", [True, False])
def test_results_are_those_of_the_unfused_kernels(neox: bool, dtype: str) -> None:
    """But for the order in which squares are added, which rarely shows after rounding to 16 bits."""
    torch.manual_seed(0)
    inputs = inputs_of(dtype) | {"is_neox": neox}
    wanted = unfused(inputs)
    mla_rope_and_cache(**inputs)
    for got, want in zip((inputs["query_rope"], inputs["kv_cache"]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=CLOSE[dtype])
        assert dtype == "float32" or (got == want).float().mean() > 0.995


def test_padding_writes_queries_alone() -> None:
    inputs = inputs_of("float16")
    inputs["slot_mapping"].fill_(-1)
    query, cache = unfused(inputs)
    assert not torch.equal(inputs["query_rope"], query)
    mla_rope_and_cache(**inputs)
    torch.testing.assert_close(inputs["query_rope"], query, rtol=0, atol=CLOSE["float16"])
    assert torch.equal(inputs["kv_cache"], cache)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("query_rope", lambda x: x[..., ::2], "query_rope of shape .* is not a .* of contiguous heads"),
        ("query_rope", lambda x: x[1:], r"kv of shape \(7, 96\) .* is not \(6, 96\)"),
        ("kv", lambda x: x.half(), "kv has dtype torch.float16, and nothing is converted"),
        ("weight", lambda x: x[1:], "kv_cache of shape .* is not a .* 95"),
        ("weight", lambda x: x.double(), "weight has dtype torch.float64"),
        ("positions", lambda x: x[1:], r"positions of shape \(6,\)"),
        ("cos_sin_cache", lambda x: x[:, 2:], "cos_sin_cache of shape .* is not a contiguous .* 32"),
        ("cos_sin_cache", lambda x: x.double(), "cos_sin_cache has dtype torch.float64"),
        ("kv_cache", lambda x: x.to(torch.float8_e4m3fn), "kv_cache has dtype torch.float8_e4m3fn, and nothing is"),
        ("kv_cache", lambda x: x[..., 1:], "kv_cache of shape"),
        ("slot_mapping", lambda x: x.float(), "slot_mapping has dtype torch.float32, not int32 or int64"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, spoil: Callable[[Any], Any], words: str) -> None:
    inputs = inputs_of("float32")
    before = inputs["query_rope"].clone()
    with pytest.raises(Refused, match=words):
        mla_rope_and_cache(**inputs | {name: spoil(inputs[name])})
    assert torch.equal(inputs["query_rope"], before)


@pytest.mark.parametrize(("latent", "rope", "words"), [(513, 32, "weight has 513"), (64, 31, "heads of 31")])
def test_sizes_that_are_not_done_are_refused(latent: int, rope: int, words: str) -> None:
    inputs = inputs_of("float32")
    width = latent + rope
    sizes = {"query_rope": rope, "kv": width, "weight": latent, "cos_sin_cache": rope, "kv_cache": width}
    others = {name: torch.zeros(*inputs[name].shape[:-1], size, device=DEVICE) for name, size in sizes.items()}
    with pytest.raises(Refused, match=words):
        mla_rope_and_cache(**inputs | others)
