"""A whole decoder layer of a dense model in eight direct launches, for batches that only decode.

In eager mode the host is the bottleneck: modules, dispatch and F.linear cost several times what the GPU needs. What a
layer does in a decode step is always the same, so it is settled once per layer, and a call only launches it. Every
other batch (prefill, mixed, more than a GEMM for few rows is good for) goes to the original, whose parts have patches
of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..nouns import Patch
from ..seams import KV_CACHE_LAYOUTS, PARTS

# The most requests of a decode step; beyond them the GPU, not the host, sets the pace.
MAX_REQUESTS = 512

# Up to so many rows a product is a walk through its weight; beyond, it is cuBLAS's.
FEW_ROWS = 64

# What a decode step's metadata says that does not change what is computed, or that is read here. A field that is in
# neither list must have its default, or the original runs: a release that adds a feature adds a field.
_READ = {"max_query_len", "max_seq_len", "seq_lens", "block_table", "num_actual_tokens"}
_HARMLESS = {
    "query_start_loc", "slot_mapping", "common_prefix_len", "scheduler_metadata", "prefix_scheduler_metadata",
    "max_num_splits", "num_decode_reqs", "num_prefill_reqs", "num_decode_tokens", "num_prefill_tokens",
    "cu_prefix_query_lens", "prefix_kv_lens", "suffix_kv_lens", "max_dcp_context_kv_len",
}  # fmt: skip
_NO_WINDOW = (None, (-1, -1))


class _Step(NamedTuple):
    """What all layers of a forward pass share. The tensors are kept, so that their addresses stay theirs."""

    metadata: Any
    slot_mapping: Any
    positions: Any
    num_requests: int
    max_seq_len: int
    positions_at: int
    slot_mapping_at: int
    block_table_at: int
    block_table_stride: int
    seq_lens_at: int


def _metadata_refuses(metadata: Any) -> str | None:
    """Why a step with this metadata is not for us."""
    if type(metadata).__name__ != "FlashAttentionMetadata":
        return f"attention metadata of {type(metadata).__name__}"
    if metadata.max_query_len != 1:
        return "a batch that does not only decode"
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if field.name in _READ or field.name in _HARMLESS:
            continue
        if field.name == "sliding_window":
            if value not in _NO_WINDOW:
                return "a sliding window"
        elif field.name == "use_cascade":
            if value:
                return "cascade attention"
        elif value is not field.default:
            return f"attention metadata with {field.name}"
    return None


def _capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _transfers_kv() -> bool:
    """Whether a connector wants to see the cache of every layer."""
    state = sys.modules.get("vllm.distributed.kv_transfer.kv_transfer_state")
    return state is not None and bool(state.has_kv_transfer_group())


def _make_step(metadata: Any, slot_mapping: Any, positions: Any) -> _Step:
    """Raises Refused for a step that is not for us."""
    import torch

    from ..errors import Refused

    if metadata is None:
        raise Refused("a forward pass without attention metadata (vLLM measures its memory)")
    if reason := _metadata_refuses(metadata):
        raise Refused(reason)
    rows = metadata.num_actual_tokens
    block_table, seq_lens = metadata.block_table, metadata.seq_lens
    if slot_mapping is None:
        raise Refused("no slots to write keys and values to")
    if not 0 < rows <= MAX_REQUESTS:
        raise Refused(f"{rows} requests, not between 1 and {MAX_REQUESTS}")
    if positions.dim() != 1 or not positions.is_contiguous() or positions.dtype is not torch.int64:
        raise Refused(f"positions {positions.dtype} {tuple(positions.shape)}, not one int64 a token")
    if positions.shape[0] != rows or slot_mapping.shape[0] != rows or seq_lens.shape[0] != rows:
        raise Refused("a batch padded with tokens that are nobody's")
    if slot_mapping.dtype is not torch.int64 or not slot_mapping.is_contiguous():
        raise Refused(f"slot_mapping {slot_mapping.dtype}, not contiguous int64")
    if seq_lens.dtype is not torch.int32 or not seq_lens.is_contiguous():
        raise Refused(f"seq_lens {seq_lens.dtype}, not contiguous int32")
    if block_table.dtype is not torch.int32 or block_table.stride(1) != 1:
        raise Refused(f"block_table {block_table.dtype} of strides {block_table.stride()}, not rows of int32")
    if _capturing():
        raise Refused("a CUDA graph is being captured, and the next step's batch is another")
    if _transfers_kv():
        raise Refused("a KV connector waits for every layer")
    return _Step(
        metadata, slot_mapping, positions, rows, metadata.max_seq_len, positions.data_ptr(), slot_mapping.data_ptr(),
        block_table.data_ptr(), block_table.stride(0), seq_lens.data_ptr(),
    )  # fmt: skip


# Which layers are for us


def _part(obj: Any, role: str, method: str = "forward") -> str | None:
    """None if `obj` does by `method` what one of the known sources of `role` does."""
    found = getattr(type(obj), method, None)
    for place in PARTS[role]:
        if found is not None and _source_hash(found) in place.sources:
            return None
    return f"{type(obj).__name__}.{method} is none of those that the replacement was written against"


@functools.cache
def _source_hash(function: Any) -> str:
    from ..probes import hash_of

    try:
        return hash_of(function)
    except (OSError, TypeError):
        return ""


def _is(obj: Any, module: str, *names: str) -> bool:
    return type(obj).__module__.endswith(module) and type(obj).__name__ in names


def _linear_refuses(name: str, linear: Any, role: str) -> Iterator[str | None]:
    if not _is(linear, "layers.linear", "QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"):
        yield f"{name} is a {type(linear).__name__}"
        return
    yield _part(linear, role)
    if not _is(linear.quant_method, "layers.linear", "UnquantizedLinearMethod"):
        yield f"{name} is quantised ({type(linear.quant_method).__name__})"
        return
    yield _part(linear.quant_method, "linear method", "apply")
    if linear.tp_size != 1:
        yield "tensor parallelism: a collective sits inside the layer"
    if linear.skip_bias_add or not linear.return_bias:
        yield f"{name} returns its bias apart"
    if linear.weight.dim() != 2 or not linear.weight.is_contiguous():
        yield f"the weight of {name} is packed or not contiguous"


def _norm_refuses(name: str, norm: Any) -> Iterator[str | None]:
    if not _is(norm, "layers.layernorm", "RMSNorm"):
        yield f"{name} is a {type(norm).__name__}"
    elif norm.variance_size_override is not None or not getattr(norm, "has_weight", True):
        yield f"{name} has no weight, or normalises over a part"


def _attention_refuses(attention: Any) -> Iterator[str | None]:
    yield _part(attention, "attention layer")
    impl = attention.impl
    if not _is(impl, "backends.flash_attn", "FlashAttentionImpl"):
        yield f"the attention backend is {type(impl).__name__}, not FlashAttentionImpl"
        return
    yield _part(impl, "attention implementation")
    yield _part(impl, "cache write", "do_kv_cache_update")
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


def _rotary_refuses(rotary: Any) -> Iterator[str | None]:
    base: Any = next((cls for cls in type(rotary).__mro__ if cls.__name__ == "RotaryEmbedding"), None)
    if base is None or type(rotary).forward_cuda is not base.forward_cuda:
        yield f"{type(rotary).__name__} is no plain rotary embedding"


def _refusals(layer: Any) -> Iterator[str | None]:
    attention, mlp = layer.self_attn, layer.mlp
    yield _part(attention, "attention")
    yield _part(mlp, "mlp")
    yield from _norm_refuses("input_layernorm", layer.input_layernorm)
    yield from _norm_refuses("post_attention_layernorm", layer.post_attention_layernorm)
    for norm in ("q_norm", "k_norm"):
        if hasattr(attention, norm):
            yield from _norm_refuses(norm, getattr(attention, norm))
    yield from _linear_refuses("qkv_proj", attention.qkv_proj, "column")
    yield from _linear_refuses("o_proj", attention.o_proj, "row")
    yield from _linear_refuses("gate_up_proj", mlp.gate_up_proj, "column")
    yield from _linear_refuses("down_proj", mlp.down_proj, "row")
    if not _is(mlp.act_fn, "layers.activation", "SiluAndMul"):
        yield f"the activation is {type(mlp.act_fn).__name__}"
    yield from _rotary_refuses(attention.rotary_emb)
    yield from _attention_refuses(attention.attn)


def layer_refuses(layer: Any) -> str | None:
    """None if a decoder layer is made of the parts that are settled here, else why not."""
    try:
        return next((reason for reason in _refusals(layer) if reason), None)
    except AttributeError as error:
        return f"not the parts of a dense decoder layer: {error}"


class _Hooks:
    """Whether any module of a layer has hooks, which calling it past its `__call__` would pass over."""

    def __init__(self, layer: Any) -> None:
        from torch.nn.modules import module
        from torch.utils.hooks import RemovableHandle

        self._handle: Any = RemovableHandle
        self._any_global: Any = module._has_any_global_hook
        self._modules = list(layer.modules())[1:]  # the layer's own are called by its own __call__
        self._registered = -1

    def refuses(self) -> str | None:
        """PyTorch numbers the hooks that are registered; as long as no new one is, there is nothing to look at."""
        registered = self._handle.next_id
        if registered == self._registered:
            return None
        if self._any_global():
            return "a hook on all modules"
        for module in self._modules:
            if module._forward_hooks or module._forward_pre_hooks:
                return f"a hook on {type(module).__name__}"
        self._registered = registered
        return None


# One layer's launches


class _Cache(NamedTuple):
    """A layer's KV cache as the kernels take it."""

    tensor: Any
    key_offset: int  # bytes
    value_offset: int
    strides: tuple[int, int, int, int, int, int]
    block_size: int


def _settle_cache(kv_cache: Any, layout: Callable[[Any, int], tuple[Any, Any]], head_size: int, like: Any) -> _Cache:
    from ..errors import Refused

    if kv_cache.dtype is not like.dtype or kv_cache.device != like.device or kv_cache.numel() == 0:
        raise Refused(f"a KV cache in {kv_cache.dtype} on {kv_cache.device}, hidden states in {like.dtype}")
    key, value = layout(kv_cache, head_size)
    if key.stride(3) != 1 or value.stride(3) != 1 or max(*key.stride(), *value.stride()) >= 2**31:
        raise Refused(f"a KV cache of strides {kv_cache.stride()}")
    at = kv_cache.data_ptr()
    strides = (*key.stride()[:3], *value.stride()[:3])
    return _Cache(kv_cache, key.data_ptr() - at, value.data_ptr() - at, strides, key.shape[1])


def _bind(layer: Any, hidden_states: Any) -> Callable[..., Any]:
    """call(step, kv_cache, hidden_states, residual) -> (hidden_states, residual) for this layer; raises Refused."""
    import torch

    from ..errors import Refused, Unsettled
    from ..kernels.activation import bind_activation
    from ..kernels.decode_attention import Heads, bind_decode_attention, splits
    from ..kernels.linear import Shape, bind_linear
    from ..kernels.rms_norm import bind_fused_add_rms_norm, bind_rms_norm
    from ..kernels.rope_and_cache import Attention, bind_rope_and_cache
    from ..launch import allocator
    from .rotary import _cache_of

    if reason := layer_refuses(layer):
        raise Refused(reason)
    attention, mlp = layer.self_attn, layer.mlp
    attn, rotary = attention.attn, attention.rotary_emb
    dtype, device = hidden_states.dtype, hidden_states.get_device()
    hidden_size = hidden_states.shape[-1]
    heads, kv_heads, head_size = attn.num_heads, attn.num_kv_heads, attn.head_size
    qkv_size, q_size = (heads + 2 * kv_heads) * head_size, heads * head_size
    layout = KV_CACHE_LAYOUTS[_source_hash(type(attn.impl).do_kv_cache_update)]
    qk_norm = hasattr(attention, "q_norm") and getattr(attention, "qk_norm", True)
    scale = float(attn.impl.scale)

    modules = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
    qkv, o, gate_up, down = (module.weight for module in modules)
    qkv_bias, o_bias, gate_up_bias, down_bias = (module.bias for module in modules)
    for weight in (qkv, o, gate_up, down):
        if weight.dtype is not dtype or weight.get_device() != device:
            raise Refused(f"a weight in {weight.dtype} on {weight.device}, hidden states in {dtype}")
    intermediate_size = down.shape[1]
    shapes = [tuple(weight.shape) for weight in (qkv, o, gate_up, down)]
    if shapes != [
        (qkv_size, hidden_size), (hidden_size, q_size), (2 * intermediate_size, hidden_size),
        (hidden_size, intermediate_size),
    ]:  # fmt: skip
        raise Refused(f"weights of shapes {shapes}")

    def few(weight: Any, bias: Any, gated: bool = False) -> Callable[..., None]:
        out_features, in_features = weight.shape
        shape = Shape(in_features, out_features // 2 if gated else out_features, bias is not None, gated)
        return bind_linear(shape, dtype, device)

    project_qkv, project_o = few(qkv, qkv_bias), few(o, o_bias)
    project_gate_up, project_down = few(gate_up, gate_up_bias, True), few(down, down_bias)
    activate = bind_activation("silu_and_mul", dtype, 2 * intermediate_size, (), device)
    empty, multiply = allocator(device, dtype), torch._C._nn.linear

    # All parameters and tables that are read, by where PyTorch keeps them: one that is replaced is seen.
    angles_of = rotary._buffers
    angles = _cache_of(rotary, hidden_states, own_dtype=rotary.use_flashinfer)
    known = [
        (module._parameters, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
    ]
    known.append((angles_of, "cos_sin_cache", angles))
    norms = layer.input_layernorm, layer.post_attention_layernorm
    input_weight, post_weight = (norm.weight for norm in norms)
    settled = [(dtype, norm.weight.dtype, hidden_size, norm.variance_epsilon, None, False) for norm in norms]
    alone = bind_rms_norm(*settled[0], device)
    first = bind_fused_add_rms_norm(*settled[0], False, device)  # the inputs stay, should anything fail after it
    second = bind_fused_add_rms_norm(*settled[1], True, device)

    q_weight, k_weight, epsilon = None, None, 0.0
    if qk_norm:
        q_weight, k_weight = attention.q_norm.weight, attention.k_norm.weight
        epsilon = attention.q_norm.variance_epsilon
        if attention.k_norm.variance_epsilon != epsilon or q_weight.dtype is not dtype or k_weight.dtype is not dtype:
            raise Refused("q_norm and k_norm differ, or their weights are not of the hidden states' dtype")

    # Their addresses are read at each call, because loading may move what a parameter holds; and without asking its
    # class, which vLLM derives from Parameter, what it thinks of that.
    read = qkv, o, gate_up, down, qkv_bias, o_bias, gate_up_bias, down_bias, q_weight, k_weight
    plainly = torch._C.DisableTorchFunctionSubclass

    def addresses() -> list[int]:
        return [0 if tensor is None else tensor.data_ptr() for tensor in read]

    cache: _Cache | None = None
    write: Callable[..., None]
    attend: Any

    def settle_cache(kv_cache: Any) -> _Cache:
        nonlocal cache, write, attend
        found = _settle_cache(kv_cache, layout, head_size, hidden_states)
        rotation = rotary.rotary_dim, rotary.is_neox_style
        spec = Attention(heads, kv_heads, head_size, *rotation, found.block_size, qk_norm)
        write = bind_rope_and_cache(spec, dtype, angles.dtype, torch.int64, torch.int64, device)
        attend = bind_decode_attention(Heads(heads, kv_heads, head_size, found.block_size), dtype, device)
        cache = found
        return found

    def call(step: _Step, kv_cache: Any, hidden_states: Any, residual: Any) -> Any:
        rows = step.num_requests
        if hidden_states.dtype is not dtype or hidden_states.shape != (rows, hidden_size):
            raise Refused(f"hidden_states {hidden_states.dtype} {tuple(hidden_states.shape)} for {rows} requests")
        for table, name, tensor in known:
            if table[name] is not tensor:
                raise Unsettled("weights that were replaced")
        kept = cache if cache is not None and cache.tensor is kv_cache else settle_cache(kv_cache)
        with plainly():
            (
                qkv_at, o_at, gate_up_at, down_at, qkv_bias_at, o_bias_at, gate_up_bias_at, down_bias_at,
                q_weight_at, k_weight_at,
            ) = addresses()  # fmt: skip
        cache_at = kv_cache.data_ptr()
        key_at, value_at = cache_at + kept.key_offset, cache_at + kept.value_offset
        is_few = rows <= FEW_ROWS

        if residual is None:
            x, residual = alone(hidden_states, input_weight), hidden_states.clone()
        else:
            x, residual = first(hidden_states, residual, input_weight)

        if is_few:
            y = empty(rows, qkv_size)
            project_qkv(x.data_ptr(), hidden_size, qkv_at, qkv_bias_at, y.data_ptr(), rows)
        else:
            y = multiply(x, qkv, qkv_bias)
        y_at = y.data_ptr()
        write(
            y_at, qkv_size, step.positions_at, angles.data_ptr(), key_at, value_at, kept.strides,
            step.slot_mapping_at, q_weight_at, k_weight_at, epsilon, rows,
        )  # fmt: skip
        z = empty(rows, q_size)
        attend(
            y_at, qkv_size, head_size, key_at, value_at, kept.strides, step.block_table_at, step.block_table_stride,
            step.seq_lens_at, z.data_ptr(), q_size, rows, splits(rows, kv_heads, step.max_seq_len), scale,
        )  # fmt: skip
        if is_few:
            x = empty(rows, hidden_size)
            project_o(z.data_ptr(), q_size, o_at, o_bias_at, x.data_ptr(), rows)
        else:
            x = multiply(z, o, o_bias)
        second(x, residual, post_weight)
        if is_few:
            y, z = empty(rows, intermediate_size), empty(rows, hidden_size)
            project_gate_up(x.data_ptr(), hidden_size, gate_up_at, gate_up_bias_at, y.data_ptr(), rows)
            project_down(y.data_ptr(), intermediate_size, down_at, down_bias_at, z.data_ptr(), rows)
        else:
            z = multiply(activate(multiply(x, gate_up, gate_up_bias)), down, down_bias)
        return z, residual

    return call


def _decoder_layer(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..sites import module_forward

    # The last step, or why it is not for us: what one layer found out, the others need not.
    last: _Step | None = None
    refused: tuple[Any, Any, str] = (None, None, "")

    def step_of(metadata: Any, slot_mapping: Any, positions: Any) -> _Step:
        nonlocal last, refused
        step = last
        if (
            step is not None
            and step.metadata is metadata
            and step.slot_mapping is slot_mapping
            and step.positions is positions
        ):
            return step
        if metadata is not None and refused[0] is metadata and refused[1] is positions:
            raise Refused(refused[2])
        try:
            step = last = _make_step(metadata, slot_mapping, positions)
        except Refused as refusal:
            refused = metadata, positions, str(refusal)
            raise
        return step

    def settle(layer: Any, positions: Any, hidden_states: Any, residual: Any) -> Callable[..., Any]:
        """The layer's own call(positions, hidden_states, residual)."""
        call = _bind(layer, hidden_states)
        attn = layer.self_attn.attn
        name, hooks, hits = attn.layer_name, _Hooks(layer), site.by_layer
        context_of = sys.modules["vllm.forward_context"].get_forward_context

        def run(positions: Any, hidden_states: Any, residual: Any) -> Any:
            context = context_of()
            metadata, slots = context.attn_metadata, context.slot_mapping
            if type(metadata) is not dict or type(slots) is not dict:
                raise Refused("a forward pass without attention metadata of its own for every layer")
            step = step_of(metadata[name], slots.get(name), positions)
            if reason := hooks.refuses():
                raise Refused(reason)
            kv_cache = attn.kv_cache
            if type(kv_cache) is list:  # until 0.19, one for each virtual engine
                kv_cache = kv_cache[context.virtual_engine]
            result = call(step, kv_cache, hidden_states, residual)
            hits[name] = hits.get(name, 0) + 1
            return result

        return run

    return module_forward(original, site, settle)


# Whose times and logits on a GPU are on record.
_MEASURED = {"qwen2"}

PATCHES = tuple(
    Patch(
        f"decoder.{name}",
        f"layer.{name}_decoder_layer",
        ("linear", "silu_gated_linear", "rope_and_cache", "qk_norm_rope_and_cache", "decode_attention"),
        _decoder_layer,
        "a decode step of a layer in eight direct launches, settled per layer",
        default=name in _MEASURED,
    )
    for name in ("qwen2", "qwen3", "llama")
)  # fmt: skip
