"""`mla_decode` by the kernel for Hopper's tensor cores, against float64; the portable one has its tests elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_gems.kernels.mla_decode import Latents, hopper_refuses, mla_decode, mla_decode_reference
from vllm_gems.kernels.paged import pages_for, random_pages

LATENT, ROPE, SCALE = 512, 64, 576**-0.5
LENGTHS = {
    "one page": (64,),
    "part of a page": (37,),
    "a few, one of them empty": (1, 0, 200, 129),
    "mixed": (1000, 64, 65, 0, 0, 8191, 127, 128, 3),
    "more than are looked at at once": tuple(range(0, 600, 2)),
    "long and short": (70000, 5, 300),
    "even": (4096,) * 70,
}


def inputs_for(heads: int, lengths: tuple[int, ...], dtype: torch.dtype, page: int) -> dict[str, Any]:
    """Queries with heads outermost and elements between them, pages anywhere, and infinities where nothing is."""
    num_blocks = sum(pages_for(lengths, page)) + 3
    block_table, unused = random_pages(lengths, page, num_blocks, "cuda")
    cache = torch.randn(num_blocks, page, LATENT + ROPE, device="cuda").to(dtype)
    cache[unused] = float("inf")
    query = torch.randn(heads, len(lengths), LATENT + ROPE + 32, device="cuda").to(dtype)
    return {
        "query": query.transpose(0, 1)[..., : LATENT + ROPE],
        "kv_cache": cache,
        "block_table": block_table,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
    }


@pytest.mark.parametrize(("heads", "dtype", "page"), [
    (128, torch.bfloat16, 64), (64, torch.bfloat16, 64), (128, torch.float16, 64), (128, torch.bfloat16, 16),
    (64, torch.float16, 32), (128, torch.bfloat16, 128),
])  # fmt: skip
@pytest.mark.parametrize("name", LENGTHS)
def test_results_and_logarithms(name: str, heads: int, dtype: torch.dtype, page: int) -> None:
    if reason := hopper_refuses(Latents(heads, LATENT, ROPE, page), dtype, 0):
        pytest.skip(reason)
    torch.manual_seed(0)
    inputs = inputs_for(heads, LENGTHS[name], dtype, page)
    torch.full((64 << 20,), torch.nan, device="cuda")  # what new memory then holds
    out, lse = mla_decode(**inputs, scale=SCALE, latent=LATENT)
    again, _ = mla_decode(**inputs, scale=SCALE, latent=LATENT)
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    want, logarithms = mla_decode_reference(**wide, scale=SCALE, latent=LATENT)
    live = logarithms > float("-inf")
    # The exponentials are rounded to the dtype and summed with both signs: half a unit each, as FlashMLA's.
    unit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    assert (out.double() - want).norm() <= 1.2 * unit * want.norm()
    assert (lse.double() - logarithms)[live].abs().max() < 1e-4
    assert bool((out[~live] == 0).all())
    assert bool((lse[~live] == float("-inf")).all())
    assert torch.equal(out, again)


def test_a_graph_is_replayed_on_other_lengths() -> None:
    """As vLLM does: captured for the longest requests that there may be, in pages that come later."""
    if reason := hopper_refuses(Latents(128, LATENT, ROPE, 64), torch.bfloat16, 0):
        pytest.skip(reason)
    torch.manual_seed(0)
    longest, fresh = 8192, inputs_for(128, (5000, 0, 1, 129, 64, 8192, 2), torch.bfloat16, 64)
    fixed = {name: x.clone() for name, x in inputs_for(128, (8192,) * 7, torch.bfloat16, 64).items()}
    pages, table = fresh["kv_cache"].shape[0], fresh["block_table"].shape[1]
    want = mla_decode(**fresh, scale=SCALE, latent=LATENT, max_seq_len=longest)  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = mla_decode(**fixed, scale=SCALE, latent=LATENT, max_seq_len=longest)
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    fixed["query"].copy_(fresh["query"])
    fixed["kv_cache"][:pages] = fresh["kv_cache"]
    fixed["block_table"][:, :table] = fresh["block_table"]
    fixed["seq_lens"].copy_(fresh["seq_lens"])
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


def test_pages_apart_and_results_in_a_wider_tensor() -> None:
    if reason := hopper_refuses(Latents(64, LATENT, ROPE, 64), torch.bfloat16, 0):
        pytest.skip(reason)
    torch.manual_seed(0)
    inputs = inputs_for(64, (300, 0, 4000), torch.bfloat16, 64)
    want, logarithms = mla_decode(**inputs, scale=SCALE, latent=LATENT)
    apart = torch.full((inputs["kv_cache"].shape[0], 2, 64, LATENT + ROPE), torch.inf, device="cuda").bfloat16()
    apart[:, 0] = inputs["kv_cache"]
    wider = torch.full((3, 2, 64, LATENT), 7.0, device="cuda").bfloat16()
    out, lse = mla_decode(**inputs | {"kv_cache": apart[:, 0]}, scale=SCALE, latent=LATENT, out=wider[:, 1])
    assert torch.equal(out, want)
    assert torch.equal(lse, logarithms)
    assert bool((wider[:, 0] == 7.0).all())
