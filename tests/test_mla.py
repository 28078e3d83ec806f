"""vLLM's Triton MLA decode step with ours in its place: the query's parts as vLLM has them, and what goes back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import DEVICE
from tolerances import absolute, assert_close

from vllm_gems.kernels.mla_decode import MLA_DECODE, mla_decode_reference
from vllm_gems.kernels.paged import random_pages
from vllm_gems.patches.mla import PATCHES
from vllm_gems.sites import Site

HEADS, LATENT, ROPE, PAGE = 4, 64, 32, 16
SEQ_LENS = (37, 1, 16)


def original(self: Any, q: Any, kv_c_and_k_pe_cache: Any, attn_metadata: Any, layer: Any) -> str:
    return "the original"


class Step:
    """A decode step's arguments, and `forward_mqa` with the patch around it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        num_reqs = len(SEQ_LENS)
        self.site = Site("mla.triton_decode")
        self.forward = PATCHES[0].adapt(original, self.site)
        self.impl = SimpleNamespace(kv_lora_rank=LATENT, dcp_world_size=1, scale=0.1)
        # What `bmm` leaves: heads outermost.
        self.latent = torch.randn(HEADS, num_reqs, LATENT, device=DEVICE).transpose(0, 1)
        # What is left of a wider query.
        self.rope = torch.randn(num_reqs, HEADS, 128 + ROPE, device=DEVICE)[..., 128:]
        self.cache = torch.randn(12, PAGE, LATENT + ROPE, device=DEVICE)
        block_table, _ = random_pages(SEQ_LENS, PAGE, 12, str(DEVICE))
        self.decode = SimpleNamespace(
            block_table=block_table, seq_lens=torch.tensor(SEQ_LENS, dtype=torch.int32, device=DEVICE)
        )
        self.metadata = SimpleNamespace(decode=self.decode, max_seq_len=max(SEQ_LENS))

    def call(self, q: Any = None) -> Any:
        return self.forward(self.impl, q or (self.latent, self.rope), self.cache, self.metadata, None)


@pytest.mark.parametrize("together", [False, True])
def test_the_query_is_taken_as_vllm_has_it(together: bool) -> None:
    step = Step()
    query = torch.cat((step.latent, step.rope), dim=-1)
    out, lse = step.forward(
        step.impl, query if together else (step.latent, step.rope), step.cache, step.metadata, None
    )
    inputs = {
        "query": query, "kv_cache": step.cache, "block_table": step.decode.block_table,
        "seq_lens": step.decode.seq_lens, "scale": 0.1, "latent": LATENT,
    }  # fmt: skip
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    expected = mla_decode_reference(**wide)
    atol = absolute(MLA_DECODE.name, inputs, torch.float32)
    assert out.shape == (len(SEQ_LENS), HEADS, LATENT)
    assert_close(out, expected[0], MLA_DECODE.name, atol)
    assert_close(lse, expected[1], MLA_DECODE.name, atol)
    assert (step.site.hits, step.site.declined) == (1, {})


def _several_tokens(step: Step) -> None:
    step.decode.seq_lens = step.decode.seq_lens[:1]


def _other_cache(step: Step) -> None:
    step.cache = step.cache.to(torch.float8_e4m3fn)


def _context_parallel(step: Step) -> None:
    step.impl.dcp_world_size = 2


def _tokens_apart(step: Step) -> None:
    step.cache = torch.randn(12, PAGE, LATENT + ROPE + 16, device=DEVICE)[..., : LATENT + ROPE]


def _long_lengths(step: Step) -> None:
    step.decode.seq_lens = step.decode.seq_lens.long()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_several_tokens, "3 query tokens of 1 requests"),
        (_other_cache, "a KV cache in torch.float8_e4m3fn"),
        (_context_parallel, "decode context parallelism"),
        (_tokens_apart, "of strides"),
        (_long_lengths, "seq_lens in torch.int64"),
    ],
)
def test_what_is_not_done_goes_to_the_original_with_a_reason(change: Any, reason: str) -> None:
    step = Step()
    change(step)
    assert step.call() == "the original"
    (said,) = step.site.declined
    assert reason in said
    assert (step.site.hits, step.site.errors) == (0, 0)
