"""DeepSeek's attention in decode steps: what vLLM's TRITON_MLA backend runs, over the batch's tokens shared evenly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..nouns import Patch


def _triton_decode(original: Any, site: Any) -> Any:
    import torch

    from ..errors import Refused
    from ..kernels.mla_decode import Latents, bind_mla_decode, shares
    from ..launch import allocator
    from ..sites import function

    @functools.cache
    def settled(latents: Latents, dtype: Any, device: int) -> tuple[Callable[..., None], Any, Any]:
        return bind_mla_decode(latents, dtype, device), allocator(device, dtype), allocator(device, torch.float32)

    def call(self: Any, q: Any, kv_c_and_k_pe_cache: Any, attn_metadata: Any, layer: Any) -> Any:
        cache, decode = kv_c_and_k_pe_cache, attn_metadata.decode
        block_table, seq_lens = decode.block_table, decode.seq_lens
        latent = self.kv_lora_rank
        # vLLM has the two parts of the query from two places, and would put them together in a third.
        query, rope = q if type(q) is tuple else (q[..., :latent], q[..., latent:])
        num_reqs, num_heads, rope_dim = rope.shape
        if self.dcp_world_size > 1:
            raise Refused("decode context parallelism")
        if cache.dtype is not query.dtype or rope.dtype is not query.dtype:
            raise Refused(f"a KV cache in {cache.dtype}, queries in {query.dtype} and {rope.dtype}")
        if seq_lens.shape[0] != num_reqs or block_table.shape[0] != num_reqs:
            raise Refused(f"{num_reqs} query tokens of {seq_lens.shape[0]} requests")
        if query.shape[2] != latent or cache.dim() != 3 or cache.stride()[1:] != (latent + rope_dim, 1):
            raise Refused(f"a KV cache {tuple(cache.shape)} of strides {cache.stride()}, queries {tuple(query.shape)}")
        if query.stride(2) != 1 or rope.stride(2) != 1:
            raise Refused("queries with elements apart")
        if max(*query.stride(), *rope.stride(), cache.stride(0)) >= 2**31:
            raise Refused("queries or pages 2**31 elements apart")
        if seq_lens.dtype is not torch.int32 or block_table.dtype is not torch.int32:
            raise Refused(f"block_table in {block_table.dtype}, seq_lens in {seq_lens.dtype}, not int32")
        if block_table.stride(1) != 1 or not seq_lens.is_contiguous():
            raise Refused("block_table or seq_lens with elements apart")
        device = query.get_device()
        latents = Latents(num_heads, latent, rope_dim, cache.shape[1])
        attend, empty, empty_lse = settled(latents, query.dtype, device)
        out = empty(num_reqs, num_heads * latent).view(num_reqs, num_heads, latent)
        lse = empty_lse(num_reqs, num_heads)
        if num_reqs:
            attend(
                query.data_ptr(), query.stride(0), query.stride(1), rope.data_ptr(), rope.stride(0), rope.stride(1),
                cache.data_ptr(), cache.stride(0), block_table.data_ptr(), block_table.stride(0), seq_lens.data_ptr(),
                out.data_ptr(), num_heads * latent, lse.data_ptr(), num_reqs,
                shares(num_reqs, num_heads, attn_metadata.max_seq_len, device), self.scale,
            )  # fmt: skip
        return out, lse

    return function(original, site, call)


PATCHES = (
    Patch(
        "mla.triton_decode",
        "mla.triton_decode",
        ("mla_decode",),
        _triton_decode,
        "one pass over the latent cache, its tokens shared evenly among the multiprocessors; no copy of the query",
    ),
)
