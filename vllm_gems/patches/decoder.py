"""A whole decoder layer in one recording, for batches that only decode: eight direct launches of a dense model.

In eager mode the host is the bottleneck: modules, dispatch and F.linear cost several times what the GPU needs. What a
layer does in a decode step is always the same, so it is settled once per layer, and a call only launches it. Of a batch
that prefills, too, all but attention is launched in the same way, and attention is the backend's; no two such batches
have as many tokens, so that nothing is recorded. Every other batch goes to the original, whose parts have patches of
their own. So do batches that prefill of layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import Refused
from ..nouns import Patch
from ..seams import KV_CACHE_LAYOUTS
from . import feed_forward
from .decode_steps import (
    MAX_MIXED,
    Memory,
    Mixed,
    Paged,
    Step,
    Steps,
    addresses_of,
    are_many,
    bind_projection,
    check_kept,
    first_refusal,
    is_one_of,
    linear_refuses,
    most_rows,
    norm_refuses,
    parameters_of,
    part_refuses,
    read_of,
    rotary_refuses,
    rows_like,
    source_hash,
    unknown_field,
    workspace_for,
)

# What a decode step's metadata says that does not change what is computed, or that is read here. A field that is not
# here must have its default, or the original runs.
_KNOWN = {
    "max_query_len", "max_seq_len", "seq_lens", "block_table", "num_actual_tokens",
    "query_start_loc", "slot_mapping", "common_prefix_len", "scheduler_metadata", "prefix_scheduler_metadata",
    "max_num_splits", "num_decode_reqs", "num_prefill_reqs", "num_decode_tokens", "num_prefill_tokens",
    "cu_prefix_query_lens", "prefix_kv_lens", "suffix_kv_lens", "max_dcp_context_kv_len", "sliding_window",
    "use_cascade",
}  # fmt: skip
_NO_WINDOW = (None, (-1, -1))


def read(metadata: Any) -> Paged | Mixed:
    """Raises Refused for a step that is not for us."""
    if type(metadata).__name__ != "FlashAttentionMetadata":
        raise Refused(f"attention metadata of {type(metadata).__name__}")
    if metadata.max_query_len != 1:
        return Mixed(metadata.num_actual_tokens)
    if getattr(metadata, "sliding_window", None) not in _NO_WINDOW:
        raise Refused("a sliding window")
    if getattr(metadata, "use_cascade", False):
        raise Refused("cascade attention")
    if field := unknown_field(metadata, _KNOWN):
        raise Refused(f"attention metadata with {field}")
    return Paged(metadata.num_actual_tokens, metadata.max_seq_len, metadata.block_table, metadata.seq_lens)


# Which layers are for us


def _attention_refuses(attention: Any) -> Iterator[str | None]:
    yield part_refuses(type(attention), "attention layer")
    impl = attention.impl
    if not is_one_of(impl, "backends.flash_attn", "FlashAttentionImpl"):
        yield f"the attention backend is {type(impl).__name__}, not FlashAttentionImpl"
        return
    yield part_refuses(type(impl), "attention implementation")
    yield part_refuses(type(impl), "cache write", "do_kv_cache_update")
    if getattr(attention, "calculate_kv_scales", False) or attention.query_quant is not None:  # gone in 0.32
        yield "scales of a quantised KV cache"
    if impl.kv_cache_dtype not in ("auto", "bfloat16", "float16"):
        yield f"a KV cache in {impl.kv_cache_dtype}"
    if impl.kv_sharing_target_layer_name is not None:
        yield "a KV cache shared with another layer"
    if impl.alibi_slopes is not None or impl.logits_soft_cap or impl.sinks is not None:
        yield "ALiBi, a soft cap or attention sinks"
    if tuple(impl.sliding_window) != (-1, -1):
        yield "a sliding window"
    if str(getattr(impl.attn_type, "value", impl.attn_type)) != "decoder":
        yield f"{impl.attn_type} attention"
    if impl.dcp_world_size > 1:
        yield "decode context parallelism"


def _refusals(layer: Any) -> Iterator[str | None]:
    attention = layer.self_attn
    yield part_refuses(type(attention), "attention")
    yield from feed_forward.refusals(layer.mlp)
    yield from norm_refuses("input_layernorm", layer.input_layernorm)
    yield from norm_refuses("post_attention_layernorm", layer.post_attention_layernorm)
    for norm in ("q_norm", "k_norm"):
        if hasattr(attention, norm):
            yield from norm_refuses(norm, getattr(attention, norm))
    yield from linear_refuses("qkv_proj", attention.qkv_proj, "column")
    yield from linear_refuses("o_proj", attention.o_proj, "row")
    yield from rotary_refuses(attention.rotary_emb)
    yield from _attention_refuses(attention.attn)


def layer_refuses(layer: Any) -> str | None:
    """None if a decoder layer is made of the parts that are settled here, else why not."""
    return first_refusal(_refusals, layer, "a decoder layer")


# One layer's launches


class _Cache(NamedTuple):
    """A layer's KV cache as the kernels take it."""

    tensor: Any
    key_offset: int  # bytes
    value_offset: int
    strides: tuple[int, int, int, int, int, int]
    block_size: int


def _settle_cache(kv_cache: Any, layout: Callable[[Any, int], tuple[Any, Any]], head_size: int, like: Any) -> _Cache:
    if kv_cache.dtype is not like.dtype or kv_cache.device != like.device or kv_cache.numel() == 0:
        raise Refused(f"a KV cache in {kv_cache.dtype} on {kv_cache.device}, hidden states in {like.dtype}")
    key, value = layout(kv_cache, head_size)
    if key.stride(3) != 1 or value.stride(3) != 1 or max(*key.stride(), *value.stride()) >= 2**31:
        raise Refused(f"a KV cache of strides {kv_cache.stride()}")
    at = kv_cache.data_ptr()
    strides = (*key.stride()[:3], *value.stride()[:3])
    return _Cache(kv_cache, key.data_ptr() - at, value.data_ptr() - at, strides, key.shape[1])


# Where the addresses of what a layer reads are among all of them.
_QKV, _O, _QK_NORMS, _INPUT_NORM, _POST_NORM, _BLOCK = slice(0, 3), slice(3, 6), slice(6, 8), 8, 9, slice(10, None)


def _bind(layer: Any, hidden_states: Any) -> tuple[Callable[..., Any], Callable[[Any], None]]:
    """For this layer: call(step, kv_cache, hidden_states, residual) -> (hidden_states, residual), and
    prepare(kv_cache), after which no call with it compiles anything. All raise Refused."""
    import torch

    from .. import replay
    from ..kernels.decode_attention import Heads, bind_decode_attention, splits
    from ..kernels.rms_norm import bind_norm_rows
    from ..kernels.rope_and_cache import Attention, bind_rope_and_cache
    from ..launch import allocator, holding
    from .rotary import _cache_of

    if reason := layer_refuses(layer):
        raise Refused(reason)
    attention = layer.self_attn
    attn, rotary = attention.attn, attention.rotary_emb
    dtype, device = hidden_states.dtype, hidden_states.get_device()
    hidden_size = hidden_states.shape[-1]
    heads, kv_heads, head_size = attn.num_heads, attn.num_kv_heads, attn.head_size
    qkv_size, q_size = (heads + 2 * kv_heads) * head_size, heads * head_size
    layout = KV_CACHE_LAYOUTS[source_hash(type(attn.impl).do_kv_cache_update)]
    qk_norm = hasattr(attention, "q_norm") and getattr(attention, "qk_norm", True)
    scale = float(attn.impl.scale)

    modules = attention.qkv_proj, attention.o_proj
    shapes = [tuple(module.weight.shape) for module in modules]
    if shapes != [(qkv_size, hidden_size), (hidden_size, q_size)]:
        raise Refused(f"weights of shapes {shapes}")
    project_qkv, project_o = (bind_projection(module, dtype, device) for module in modules)
    block = feed_forward.bind_block(layer.mlp, hidden_states)
    empty, empty_bytes, itemsize = allocator(device, dtype), allocator(device, torch.uint8), dtype.itemsize

    angles = _cache_of(rotary, hidden_states, own_dtype=rotary.use_flashinfer)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    known = [(rotary._buffers, "cos_sin_cache", angles), *parameters_of(attention), *block.known]
    known += [*parameters_of(norms[0]), *parameters_of(norms[1])]
    most = most_rows(known)
    # Of experts nobody has measured batches that prefill, too.
    most_mixed = 0 if feed_forward.experts_of(layer.mlp) is not None else most_rows(known, MAX_MIXED)
    input_weight, post_weight = (norm.weight for norm in norms)
    settled = [(dtype, norm.weight.dtype, hidden_size, norm.variance_epsilon) for norm in norms]
    alone = bind_norm_rows(*settled[0], False, False, device)
    first = bind_norm_rows(*settled[0], True, False, device)  # the inputs stay, should anything fail after it
    second = bind_norm_rows(*settled[1], True, True, device)
    beside = bind_norm_rows(*settled[1], True, False, device)

    q_weight, k_weight, epsilon = None, None, 0.0
    if qk_norm:
        q_weight, k_weight = attention.q_norm.weight, attention.k_norm.weight
        epsilon = attention.q_norm.variance_epsilon
        if attention.k_norm.variance_epsilon != epsilon or q_weight.dtype is not dtype or k_weight.dtype is not dtype:
            raise Refused("q_norm and k_norm differ, or their weights are not of the hidden states' dtype")

    read = (  # in the places of _QKV and the rest
        *(tensor for module in modules for tensor in read_of(module)), q_weight, k_weight, input_weight, post_weight,
        *block.read,
    )  # fmt: skip
    plainly, check = torch._C.DisableTorchFunctionSubclass, rows_like(hidden_states)

    cache: _Cache | None = None
    write: Callable[..., None]
    attend: Any
    run: Callable[[tuple[Any, ...], tuple[int, ...]], None]

    def settle_cache(kv_cache: Any) -> None:
        nonlocal cache, write, attend, run
        if cache is not None and cache.tensor is kv_cache:
            return
        found = _settle_cache(kv_cache, layout, head_size, hidden_states)
        rotation = rotary.rotary_dim, rotary.is_neox_style
        spec = Attention(heads, kv_heads, head_size, *rotation, found.block_size, qk_norm)
        write = bind_rope_and_cache(spec, dtype, angles.dtype, torch.int64, torch.int64, device)
        attend = bind_decode_attention(Heads(heads, kv_heads, head_size, found.block_size), dtype, device)
        cache, run = found, replay.bind(device, launches)

    def before_attention(
        more: tuple[int, Memory, int], is_first: bool, angles_at: int, cache_at: int, read_at: tuple[int, ...],
        hidden_at: int, before_at: int, residual_at: int, positions_at: int, slot_mapping_at: int,
        x_at: int, qkv_out_at: int,
    ) -> None:  # fmt: skip
        rows, kept = more[0], cache
        assert kept is not None
        if is_first:
            alone(residual_at, 0, read_at[_INPUT_NORM], x_at, 0, rows)
        else:
            first(hidden_at, before_at, read_at[_INPUT_NORM], x_at, residual_at, rows)
        project_qkv(x_at, read_at[_QKV], qkv_out_at, *more)
        write(
            qkv_out_at, qkv_size, positions_at, angles_at, cache_at + kept.key_offset, cache_at + kept.value_offset,
            kept.strides, slot_mapping_at, *read_at[_QK_NORMS], epsilon, rows,
        )  # fmt: skip

    def after_attention(
        more: tuple[int, Memory, int], read_at: tuple[int, ...], attended_at: int, residual_at: int, out_at: int,
        x_at: int,
    ) -> None:  # fmt: skip
        rows, memory, _ = more
        project_o(attended_at, read_at[_O], x_at, *more)
        if block.adds and are_many(rows):
            # The next layer adds the two results, and so does whoever else wants to know the hidden states. Here what
            # attention gave is part of the first, and that sum is rounded once, where the residual would be once more.
            normed_at, total_at = (memory(rows * hidden_size * itemsize) for _ in range(2))
            beside(x_at, residual_at, read_at[_POST_NORM], normed_at, total_at, rows)
            block.launches(memory, rows, read_at[_BLOCK], normed_at, out_at, x_at)
            return
        second(x_at, residual_at, read_at[_POST_NORM], x_at, residual_at, rows)
        block.launches(memory, rows, read_at[_BLOCK], x_at, out_at)

    def launches(
        memory: Memory, rows: int, splits: int, is_first: bool, block_table_stride: int,
        angles_at: int, cache_at: int, read_at: tuple[int, ...],
        hidden_at: int, before_at: int, out_at: int, residual_at: int,
        positions_at: int, slot_mapping_at: int, block_table_at: int, seq_lens_at: int,
    ) -> None:  # fmt: skip
        kept: Any = cache
        x_at, qkv_out_at, attended_at = (memory(rows * width * itemsize) for width in (hidden_size, qkv_size, q_size))
        more = rows, memory, workspace_for(rows, memory)
        before_attention(
            more, is_first, angles_at, cache_at, read_at, hidden_at, before_at, residual_at, positions_at,
            slot_mapping_at, x_at, qkv_out_at,
        )  # fmt: skip
        attend(
            qkv_out_at, qkv_size, head_size, cache_at + kept.key_offset, cache_at + kept.value_offset, kept.strides,
            block_table_at, block_table_stride, seq_lens_at, attended_at, q_size, rows, splits, scale,
        )  # fmt: skip
        after_attention(more, read_at, attended_at, residual_at, out_at, x_at)

    def mixed(
        step: Step, kv_cache: Any, is_first: bool, read_at: tuple[int, ...],
        hidden_at: int, before_at: int, out_at: int, residual_at: int,
    ) -> None:  # fmt: skip
        """The same with the backend's attention, which takes keys and values from the cache."""
        rows, memory = step.num_tokens, holding(empty_bytes)
        qkv, attended = empty(rows, qkv_size), empty(rows, q_size)
        more, x_at = (rows, memory, workspace_for(rows, memory)), memory(rows * hidden_size * itemsize)
        before_attention(
            more, is_first, angles.data_ptr(), kv_cache.data_ptr(), read_at, hidden_at, before_at, residual_at,
            step.positions_at, step.slot_mapping_at, x_at, qkv.data_ptr(),
        )  # fmt: skip
        query = qkv.as_strided((rows, heads, head_size), (qkv_size, head_size, 1))
        attn.impl.forward(
            attn, query, None, None, kv_cache, step.metadata, output=attended.view(rows, heads, head_size)
        )  # fmt: skip
        after_attention(more, read_at, attended.data_ptr(), residual_at, out_at, x_at)

    def call(step: Step, kv_cache: Any, hidden_states: Any, residual: Any) -> Any:
        rows = step.num_tokens
        if rows > (limit := most if step.only_decodes else most_mixed):
            what = "requests" if step.only_decodes else "tokens of a batch that does not only decode"
            raise Refused(f"more than {limit} {what}, of a layer with experts or in float8")
        check("hidden_states", hidden_states, rows)
        if residual is not None:
            check("residual", residual, rows)
        check_kept(known)
        if cache is None or cache.tensor is not kv_cache:
            settle_cache(kv_cache)
        with plainly():
            read_at = addresses_of(*read)
        is_first = residual is None
        before, residual = residual, hidden_states.clone() if is_first else empty(rows, hidden_size)
        out = empty(rows, hidden_size)
        streams = hidden_states.data_ptr(), 0 if is_first else before.data_ptr(), out.data_ptr(), residual.data_ptr()
        if not step.only_decodes:
            mixed(step, kv_cache, is_first, read_at, *streams)
            return out, residual
        run(
            (
                rows, splits(rows, kv_heads, step.max_seq_len), is_first, step.block_table_stride, angles.data_ptr(),
                kv_cache.data_ptr(), read_at,
            ),
            (*streams, step.positions_at, step.slot_mapping_at, step.block_table_at, step.seq_lens_at),
        )  # fmt: skip
        return out, residual

    return call, settle_cache


def _decoder_layer(original: Any, site: Any) -> Any:
    from ..sites import module_forward

    steps = Steps(read)

    def settle(layer: Any, positions: Any, hidden_states: Any, residual: Any) -> Callable[..., Any]:
        """The layer's own call(positions, hidden_states, residual)."""
        call, prepare = _bind(layer, hidden_states)
        attn = layer.self_attn.attn
        name, now, hits = attn.layer_name, steps.follow(layer, attn, prepare), site.by_layer

        def run(positions: Any, hidden_states: Any, residual: Any) -> Any:
            step, kv_cache = now(positions)
            result = call(step, kv_cache, hidden_states, residual)
            hits[name] = hits.get(name, 0) + 1
            return result

        return run

    return module_forward(original, site, settle)


_KERNELS = ("linear", "silu_gated_linear", "rope_and_cache", "qk_norm_rope_and_cache", "decode_attention")
PATCHES = (
    *(
        Patch(
            f"decoder.{name}",
            f"layer.{name}_decoder_layer",
            _KERNELS,
            _decoder_layer,
            "a decode step of a layer in eight direct launches, settled per layer",
        )
        for name in ("qwen2", "qwen3", "llama")
    ),
    Patch(
        "decoder.qwen3_moe",
        "layer.qwen3_moe_decoder_layer",
        (*_KERNELS, "grouped_topk", "moe_experts"),
        _decoder_layer,
        "a decode step of a layer, experts and all, in one recording",
    ),
)
