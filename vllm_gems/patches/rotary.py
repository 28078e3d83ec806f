"""The rotary embeddings: plain (with Llama 3's, YaRN's and other scalings of it), DeepSeek's and M-RoPE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..nouns import Patch


def _adapt(original: Any, site: Any, bind: Callable[..., Any], traced: Callable[..., Any]) -> Any:
    from ..sites import layer_method

    return layer_method(original, site, bind, traced)


def _cache_of(layer: Any, query: Any, own_dtype: bool) -> Any:
    """The layer's cosines and sines, in the dtype that vLLM would use them in."""
    from ..errors import Refused

    cache = layer.cos_sin_cache if own_dtype else layer._match_cos_sin_cache_dtype(query)
    if cache.device != query.device or not cache.is_contiguous() or cache.shape[-1] != layer.rotary_dim:
        raise Refused(f"cos_sin_cache {tuple(cache.shape)} on {cache.device} is not [max_position, {layer.rotary_dim}]")
    return cache


def _faster(
    site: Any, kernel: str, query: Any, key: Any, tokens: int, rotation: Any, call: Callable[..., Any]
) -> Callable[..., Any]:
    """`call` for heads like those of query and key, which are of `tokens` tokens now, where it is faster."""
    from ..faster import key_of, where_faster

    of_a_head = tokens * rotation.head_size or 1
    heads = query.numel() // of_a_head, 0 if key is None else key.numel() // of_a_head
    pairs = "neox" if rotation.is_neox else "pairs"
    named = key_of(query.dtype, kernel, *heads, rotation.head_size, rotation.rotary_dim, pairs)
    axes = 3 if rotation.mrope_section else 1
    device = query.get_device()
    return where_faster(site.name, named, device, call, lambda positions, *rest: positions.numel() // axes)


def _settled(
    site: Any, layer: Any, tokens: int, query: Any, key: Any, own_dtype: bool, *sections: Any
) -> Callable[..., Any]:
    """call(positions, query, key) for this layer, in place; query and key are of `tokens` tokens now."""
    from ..kernels.rotary_embedding import Rotation, bind_rotary_embedding

    cache_dtype = _cache_of(layer, query, own_dtype).dtype
    rotation = Rotation(layer.head_size, layer.rotary_dim, layer.is_neox_style, 0, False, *sections)
    turn = bind_rotary_embedding(rotation, query.dtype, cache_dtype, query.get_device())
    kernel = "mrotary_embedding" if sections else "rotary_embedding"
    turn = _faster(site, kernel, query, key, tokens, rotation, turn)
    buffers = layer._buffers

    def call(positions: Any, query: Any, key: Any = None) -> Any:
        turn(positions, query, key, buffers["cos_sin_cache"])
        return query, key

    return call


def _rotary_embedding(original: Any, site: Any) -> Any:
    import torch

    def bind(layer: Any, positions: Any, query: Any, key: Any = None) -> Callable[..., Any]:
        return _settled(site, layer, positions.numel(), query, key, layer.use_flashinfer)

    def traced(layer: Any, positions: Any, query: Any, key: Any = None) -> Any:
        cache = layer.cos_sin_cache if layer.use_flashinfer else layer._match_cos_sin_cache_dtype(query)
        torch.ops.vllm_gems.rotary_embedding(positions, query, key, layer.head_size, cache, layer.is_neox_style)
        return query, key

    return _adapt(original, site, bind, traced)


def _deepseek_scaling(original: Any, site: Any) -> Any:
    import torch

    from ..errors import Refused

    # Neither vLLM's FlashInfer path nor its plain one converts this layer's cosines and sines.
    def bind(layer: Any, positions: Any, query: Any, key: Any = None, offsets: Any = None) -> Callable[..., Any]:
        turn = _settled(site, layer, positions.numel(), query, key, True)

        def call(positions: Any, query: Any, key: Any = None, offsets: Any = None) -> Any:
            if offsets is not None:
                raise Refused("offsets to the positions")
            return turn(positions, query, key)

        return call

    def traced(layer: Any, positions: Any, query: Any, key: Any = None, offsets: Any = None) -> Any:
        if offsets is not None:
            return original(layer, positions, query, key, offsets)
        cache = layer.cos_sin_cache
        torch.ops.vllm_gems.rotary_embedding(positions, query, key, layer.head_size, cache, layer.is_neox_style)
        return query, key

    return _adapt(original, site, bind, traced)


def _mrope(original: Any, site: Any) -> Any:
    import torch

    from ..errors import Refused

    def bind(layer: Any, positions: Any, query: Any, key: Any = None, offsets: Any = None) -> Callable[..., Any]:
        shared = site, layer, positions.shape[-1], query, key, False
        plain = _settled(*shared)
        section = tuple(layer.mrope_section or ())
        # vLLM's kernel for sections turns NeoX pairs only.
        sections = _settled(*shared, section, layer.mrope_interleaved) if section else None

        def call(positions: Any, query: Any, key: Any = None, offsets: Any = None) -> Any:
            if offsets is not None:
                raise Refused("offsets to the positions")
            if positions.dim() == 1:
                return plain(positions, query, key)
            if sections is None or not layer.is_neox_style:
                raise Refused("sections of the positions without mrope_section, or without NeoX pairs")
            return sections(positions, query, key)

        return call

    def traced(layer: Any, positions: Any, query: Any, key: Any = None, offsets: Any = None) -> Any:
        cache = layer._match_cos_sin_cache_dtype(query)
        settled = layer.head_size, cache, layer.is_neox_style
        if offsets is not None or (positions.dim() == 2 and not (layer.mrope_section and layer.is_neox_style)):
            return original(layer, positions, query, key, offsets)
        if positions.dim() == 1:
            torch.ops.vllm_gems.rotary_embedding(positions, query, key, *settled)
        else:
            sections = list(layer.mrope_section), layer.mrope_interleaved
            torch.ops.vllm_gems.mrotary_embedding(positions, query, key, *settled, *sections)
        return query, key

    return _adapt(original, site, bind, traced)


def _rotary_embedding_op(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..kernels.rotary_embedding import Rotation, bind_rotary_embedding, rotary_embedding_refuses
    from ..sites import op_kernel

    settled: dict[Any, Callable[..., Any]] = {}

    def call(
        positions: Any, query: Any, key: Any, head_size: int, cache: Any, is_neox: bool,
        offset: int = 0, inverse: bool = False,
    ) -> None:  # fmt: skip
        if reason := rotary_embedding_refuses(positions, query, key, head_size, cache, is_neox, offset, inverse):
            raise Refused(reason)
        tokens = positions.numel()
        widths = (query.numel() // tokens, 0 if key is None else key.numel() // tokens) if tokens else (0, 0)
        turned = head_size, cache.shape[-1], is_neox, offset, inverse
        of = query.dtype, cache.dtype, query.get_device(), widths, turned
        if of not in settled:
            rotation = Rotation(*turned)
            turn = bind_rotary_embedding(rotation, *of[:3])
            settled[of] = _faster(site, "rotary_embedding", query, key, tokens, rotation, turn)
        settled[of](positions, query, key, cache)

    return op_kernel(original, site, call)


PATCHES = (
    Patch(
        "rotary.rotary_embedding",
        "layer.rotary_embedding",
        ("rotary_embedding",),
        _rotary_embedding,
        "one direct launch for query and key, their layout worked out once",
    ),
    Patch(
        "rotary.deepseek_scaling",
        "layer.deepseek_scaling_rotary_embedding",
        ("rotary_embedding",),
        _deepseek_scaling,
        "one launch in place of about fifteen where vLLM has no FlashInfer",
    ),
    Patch(
        "rotary.mrope",
        "layer.mrotary_embedding",
        ("mrotary_embedding", "rotary_embedding"),
        _mrope,
        "one launch in place of a gather, copies and a launch",
    ),
    Patch(
        "op.rotary_embedding",
        "op.rotary_embedding",
        ("rotary_embedding",),
        _rotary_embedding_op,
        "reaches every caller of the op, in every mode that calls it",
    ),
)
