"""DeepSeek's attention block, from the hidden states to its output, in direct launches, for batches that only decode.

The projections, norms, rotation, cache write and attention that vLLM calls one by one are settled once per layer:
without a compressed query seven launches, eight with one, and one more where requests are shared by programs. The
queries go to attention as they lie, in two tensors. Every other batch goes to the original, whose parts have patches of
their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import Refused
from ..nouns import Patch
from .decode_steps import (
    Kept,
    Memory,
    Paged,
    Step,
    Steps,
    addresses_of,
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
    unknown_field,
    workspace_for,
)

# What a decode step's metadata says that does not change what is computed, or that is read here. A field that is not
# here must have its default, or the original runs.
_KNOWN = {
    "num_reqs", "max_query_len", "max_seq_len", "num_actual_tokens", "query_start_loc", "slot_mapping", "num_decodes",
    "num_decode_tokens", "num_prefills", "head_dim", "decode",
}  # fmt: skip
_KNOWN_OF_DECODE = {"block_table", "seq_lens", "dcp_tot_seq_lens"}


def _learn_dcp(impl: Any) -> None:
    """Fill in, as vLLM does in an implementation's first forward pass (until 0.26), how many GPUs share a context."""
    if impl.dcp_world_size == -1:
        impl.dcp_world_size = sys.modules["vllm.distributed.parallel_state"].get_dcp_group().world_size


def read(metadata: Any) -> Paged:
    """Raises Refused for a step that is not for us."""
    if type(metadata).__name__ != "MLACommonMetadata":
        raise Refused(f"attention metadata of {type(metadata).__name__}")
    decode, rows = metadata.decode, metadata.num_actual_tokens
    if metadata.num_prefills or metadata.max_query_len != 1 or metadata.num_decodes != rows or decode is None:
        raise Refused("a batch that does not only decode")
    if type(decode).__name__ != "MLACommonDecodeMetadata":
        raise Refused(f"attention metadata of {type(decode).__name__}")
    if decode.dcp_tot_seq_lens is not None:
        raise Refused("decode context parallelism")
    if field := unknown_field(metadata, _KNOWN) or unknown_field(decode, _KNOWN_OF_DECODE):
        raise Refused(f"attention metadata with {field}")
    return Paged(rows, metadata.max_seq_len, decode.block_table, decode.seq_lens)


# Which layers are for us


def _attention_refuses(attention: Any) -> Iterator[str | None]:
    yield part_refuses(type(attention), "latent attention layer")
    yield part_refuses(type(attention), "latent attention", "forward_impl")
    yield part_refuses(type(attention), "latent values", "_v_up_proj")
    if hasattr(attention, "update_kv_cache"):
        yield part_refuses(type(attention), "latent cache update", "update_kv_cache")
    impl = attention.impl
    if not any(cls.__module__.endswith("mla.triton_mla") for cls in type(impl).__mro__):
        yield f"the attention backend is {type(impl).__name__}, not TritonMLAImpl"
        return
    yield part_refuses(type(impl), "latent attention implementation", "forward_mqa")
    yield part_refuses(type(impl), "latent cache write", "do_kv_cache_update")
    if getattr(attention, "calculate_kv_scales", False):  # gone in 0.29
        yield "scales of a quantised KV cache"
    if attention.kv_cache_dtype not in ("auto", "bfloat16", "float16"):
        yield f"a KV cache in {attention.kv_cache_dtype}"
    if getattr(attention, "sliding_window", None) is not None:
        yield "a sliding window"
    # Later releases' branches, which the sources above take by these.
    if getattr(attention, "use_pcp", False) or getattr(attention, "dcp_q_replicate", False):
        yield "context parallelism"
    if getattr(attention, "hisparse_cache", None) is not None or getattr(attention, "use_sparse", False):
        yield "sparse attention"
    if attention.q_pad_num_heads is not None:
        yield "padded heads"
    for product in ("is_aiter_triton_fp4_bmm_enabled", "is_aiter_triton_fp8_bmm_enabled", "is_amx_bmm_enabled"):
        if getattr(attention, product, False):
            yield "absorbed weights that are packed or quantised"
    if getattr(attention, "W_UK_T", None) is None or getattr(attention, "W_UV", None) is None:
        yield "no absorbed weights"


def _refusals(layer: Any) -> Iterator[str | None]:
    if layer.is_sparse or layer.indexer is not None:
        yield "sparse attention: an indexer chooses the tokens"
    if getattr(layer, "g_proj", None) is not None:
        yield "a gate on what attention returns"
    if getattr(layer, "fuse_qkv_rmsnorm", False):
        yield "vLLM's own fusion of the two norms"
    if layer.q_lora_rank is None:
        yield from linear_refuses("q_proj", layer.q_proj, "column")
        yield from linear_refuses("kv_a_proj_with_mqa", layer.kv_a_proj_with_mqa, "replicated")
    else:
        yield from linear_refuses("fused_qkv_a_proj", layer.fused_qkv_a_proj, "column")
        yield from norm_refuses("q_a_layernorm", layer.q_a_layernorm)
        yield from linear_refuses("q_b_proj", layer.q_b_proj, "column")
    yield from norm_refuses("kv_a_layernorm", layer.kv_a_layernorm)
    yield from linear_refuses("o_proj", layer.o_proj, "row")
    if not _is_deepseeks(layer.rotary_emb):
        yield from rotary_refuses(layer.rotary_emb)
    yield from _attention_refuses(layer.mla_attn)


def _is_deepseeks(rotary: Any) -> bool:
    """Whether it is the rotary embedding whose cosines and sines vLLM does not convert."""
    return is_one_of(rotary, "rotary_embedding.deepseek_scaling_rope", "DeepseekScalingRotaryEmbedding")


def layer_refuses(layer: Any) -> str | None:
    """None if an attention block is made of the parts that are settled here, else why not."""
    return first_refusal(_refusals, layer, "DeepSeek's attention")


# One layer's launches


class Block(NamedTuple):
    """An attention block, settled."""

    known: list[Kept]  # parameters, by where they are kept
    read: tuple[Any, ...]  # tensors whose addresses `launches` takes
    settle_cache: Callable[[Any], None]  # for the layer's KV cache; raises Refused
    facts: Callable[[Step], tuple[int, ...]]  # what of a step decides which launches there are
    # launches(memory, rows, facts, read_at, cache_at, hidden_at, out_at, *addresses of the step)
    launches: Callable[..., None]


def bind_block(layer: Any, hidden_states: Any) -> Block:
    """Raises Refused for a block that is not made of what is settled here."""
    import torch

    from ..kernels.head_linear import HeadShape, along_out, bind_head_linear
    from ..kernels.mla_decode import Latents, bind_mla_decode, shares
    from ..kernels.mla_rope_and_cache import Projected, bind_mla_rope_and_cache
    from ..kernels.rms_norm import bind_norm_rows
    from .rotary import _cache_of

    if reason := layer_refuses(layer):
        raise Refused(reason)
    attn, rotary, kv_norm = layer.mla_attn, layer.rotary_emb, layer.kv_a_layernorm
    scale, itemsize = float(attn.impl.scale), hidden_states.dtype.itemsize
    dtype, device, hidden_size = hidden_states.dtype, hidden_states.get_device(), hidden_states.shape[-1]
    heads, nope, rope, value_size = layer.num_heads, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim
    q_lora, latent = layer.q_lora_rank or 0, layer.kv_lora_rank
    head_size, width = nope + rope, latent + rope

    if q_lora:
        kv_linear, q_linear = layer.fused_qkv_a_proj, layer.q_b_proj
        q_norm = layer.q_a_layernorm
        settled = dtype, q_norm.weight.dtype, q_lora, q_norm.variance_epsilon
        norm = bind_norm_rows(*settled, False, False, device, q_lora + width)
    else:
        kv_linear, q_linear = layer.kv_a_proj_with_mqa, layer.q_proj
    absorbed, values = attn.W_UK_T, attn.W_UV
    tensors = kv_linear.weight, q_linear.weight, layer.o_proj.weight, absorbed, values, kv_norm.weight
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if shapes != [
        (q_lora + width, hidden_size), (heads * head_size, q_lora or hidden_size), (hidden_size, heads * value_size),
        (heads, nope, latent), (heads, latent, value_size), (latent,),
    ]:  # fmt: skip
        raise Refused(f"weights of shapes {shapes}")
    for tensor in (absorbed, values, kv_norm.weight):
        if tensor.dtype is not dtype or tensor.get_device() != device:
            raise Refused(f"a weight in {tensor.dtype} on {tensor.device}, hidden states in {dtype}")
    if (rotary.rotary_dim, rotary.head_size) != (rope, rope):
        raise Refused(f"{rotary.rotary_dim} of {rotary.head_size} elements rotated, keys have {rope}")
    angles = _cache_of(rotary, hidden_states, own_dtype=_is_deepseeks(rotary) or rotary.use_flashinfer)
    _learn_dcp(attn.impl)
    known = [*parameters_of(layer), (rotary._buffers, "cos_sin_cache", angles)]
    for name in ("W_UK_T", "W_UV"):  # no parameters until 0.24
        if name in vars(attn):
            known.append((vars(attn), name, getattr(attn, name)))
    read = (
        *read_of(kv_linear), *read_of(q_linear), *read_of(layer.o_proj), absorbed, values, kv_norm.weight,
        q_norm.weight if q_lora else None, angles,
    )  # fmt: skip

    def head_projection(weight: Any, x_size: int) -> Callable[[int, int, int, int], None]:
        """(x_at, weight_at, out_at, rows): the first elements of each head's `x_size` multiplied by the head's own."""
        in_features, out_features = weight.shape[1:]
        order = along_out(weight)
        if order is None:
            raise Refused(f"absorbed weights of strides {weight.stride()}")
        each = bind_head_linear(HeadShape(heads, in_features, out_features, order), dtype, device)
        strides = weight.stride(0), weight.stride(1 if order else 2)
        return lambda x_at, weight_at, out_at, rows: each(
            x_at, heads * x_size, x_size, weight_at, *strides, out_at, rows
        )

    project_kv, project_q, project_o = (
        bind_projection(linear, dtype, device) for linear in (kv_linear, q_linear, layer.o_proj)
    )
    absorb, expand = head_projection(absorbed, head_size), head_projection(values, latent)
    epsilon, rope_offset, kv_offset = kv_norm.variance_epsilon, nope * itemsize, q_lora * itemsize
    block_stride = 0
    write: Callable[..., None]
    attend: Callable[..., None]

    def settle_cache(kv_cache: Any) -> None:
        nonlocal block_stride, write, attend
        if kv_cache.dtype is not dtype or kv_cache.get_device() != device or kv_cache.numel() == 0:
            raise Refused(f"a KV cache in {kv_cache.dtype} on {kv_cache.device}, hidden states in {dtype}")
        strides = kv_cache.stride()
        if kv_cache.dim() != 3 or kv_cache.shape[2] != width or strides[1:] != (width, 1) or strides[0] >= 2**31:
            raise Refused(f"a KV cache {tuple(kv_cache.shape)} of strides {strides}")
        block_size = kv_cache.shape[1]
        projected = Projected(heads, latent, rope, rotary.is_neox_style, block_size)
        write = bind_mla_rope_and_cache(projected, dtype, angles.dtype, torch.int64, torch.int64, device)
        attend = bind_mla_decode(Latents(heads, latent, rope, block_size), dtype, device)
        block_stride = strides[0]

    def facts(step: Step) -> tuple[int, ...]:
        return shares(step.num_tokens, heads, step.max_seq_len, device), step.block_table_stride

    def launches(
        memory: Memory, rows: int, facts: tuple[int, ...], read_at: tuple[int, ...], cache_at: int, hidden_at: int,
        out_at: int, positions_at: int, slot_mapping_at: int, block_table_at: int, seq_lens_at: int,
    ) -> None:  # fmt: skip
        kv_read_at, q_read_at, o_read_at = read_at[:3], read_at[3:6], read_at[6:9]
        absorbed_at, values_at, kv_norm_at, q_norm_at, angles_at = read_at[9:]
        count, block_table_stride = facts
        more = rows, memory, workspace_for(rows, memory)
        kv_at, q_at, query_at, attended_at, expanded_at = (
            memory(rows * each * itemsize)
            for each in (q_lora + width, heads * head_size, heads * latent, heads * latent, heads * value_size)
        )
        project_kv(hidden_at, kv_read_at, kv_at, *more)
        q_input_at = hidden_at
        if q_lora:
            q_input_at = memory(rows * q_lora * itemsize)
            norm(kv_at, 0, q_norm_at, q_input_at, 0, rows)
        project_q(q_input_at, q_read_at, q_at, *more)
        q_rope_at = q_at + rope_offset
        write(
            q_rope_at, heads * head_size, head_size, kv_at + kv_offset, q_lora + width, kv_norm_at, positions_at,
            angles_at, cache_at, block_stride, width, slot_mapping_at, epsilon, rows,
        )  # fmt: skip
        absorb(q_at, absorbed_at, query_at, rows)
        attend(
            query_at, heads * latent, latent, q_rope_at, heads * head_size, head_size, cache_at, block_stride,
            block_table_at, block_table_stride, seq_lens_at, attended_at, heads * latent, memory(rows * heads * 4),
            rows, count, scale,
        )  # fmt: skip
        expand(attended_at, values_at, expanded_at, rows)
        project_o(expanded_at, o_read_at, out_at, *more)

    return Block(known, read, settle_cache, facts, launches)


def _bind(layer: Any, hidden_states: Any) -> tuple[Callable[..., Any], Callable[[Any], None]]:
    """call(step, kv_cache, hidden_states) -> what the layer returns, and prepare(kv_cache), after which no call with it
    compiles anything. All raise Refused."""
    import torch

    from .. import replay
    from ..launch import allocator

    block, impl = bind_block(layer, hidden_states), layer.mla_attn.impl
    dtype, device, hidden_size = hidden_states.dtype, hidden_states.get_device(), hidden_states.shape[-1]
    empty, plainly = allocator(device, dtype), torch._C.DisableTorchFunctionSubclass
    check = rows_like(hidden_states)
    most = most_rows(block.known)
    cache: Any = None
    run: Callable[[tuple[Any, ...], tuple[int, ...]], None]

    def prepare(kv_cache: Any) -> None:
        nonlocal cache, run
        block.settle_cache(kv_cache)
        cache, run = kv_cache, replay.bind(device, block.launches)

    def call(step: Step, kv_cache: Any, hidden_states: Any) -> Any:
        rows = step.num_tokens
        if rows > most:
            raise Refused(f"more than {most} requests of a layer in float8")
        check("hidden_states", hidden_states, rows)
        if impl.dcp_world_size != 1:
            raise Refused("decode context parallelism")
        check_kept(block.known)
        if kv_cache is not cache:
            prepare(kv_cache)
        with plainly():
            read_at = addresses_of(*block.read)
        out = empty(rows, hidden_size)
        run(
            (rows, block.facts(step), read_at, kv_cache.data_ptr()),
            (
                hidden_states.data_ptr(), out.data_ptr(), step.positions_at, step.slot_mapping_at, step.block_table_at,
                step.seq_lens_at,
            ),
        )  # fmt: skip
        return out

    return call, prepare


def _decode_step(original: Any, site: Any) -> Any:
    from ..sites import module_forward

    steps = Steps(read)

    def settle(layer: Any, positions: Any, hidden_states: Any, llama_4_scaling: Any = None) -> Callable[..., Any]:
        """The layer's own call(positions, hidden_states, llama_4_scaling)."""
        call, prepare = _bind(layer, hidden_states)
        attn = layer.mla_attn
        name, now, hits = attn.layer_name, steps.follow(layer, attn, prepare), site.by_layer

        def run(positions: Any, hidden_states: Any, llama_4_scaling: Any = None) -> Any:
            if llama_4_scaling is not None:
                raise Refused("queries scaled by their positions")
            step, kv_cache = now(positions)
            result = call(step, kv_cache, hidden_states)
            hits[name] = hits.get(name, 0) + 1
            return result

        return run

    return module_forward(original, site, settle)


PATCHES = (
    Patch(
        "mla.decode_step",
        "layer.latent_attention",
        ("linear", "rms_norm", "mla_rope_and_cache", "head_linear", "mla_decode"),
        _decode_step,
        "a decode step of DeepSeek's attention block in seven to nine direct launches, settled per layer",
        default=False,
    ),
)
