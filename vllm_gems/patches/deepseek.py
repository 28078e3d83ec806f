"""A whole decoder layer of DeepSeek's in one recording, for batches that only decode.

Norm, latent attention, norm, and the experts or the dense layers: what `mla_step` and `moe_step` settle as blocks, with
nothing of vLLM's between them. A layer of which one part is not for us keeps vLLM's forward, and its blocks' patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..errors import Refused
from ..nouns import Patch
from . import feed_forward, mla_step
from .decode_steps import (
    Memory,
    Step,
    Steps,
    addresses_of,
    check_kept,
    first_refusal,
    most_rows,
    norm_refuses,
    parameters_of,
    part_refuses,
    rows_like,
)

# Which layers are for us


def _refusals(layer: Any) -> Iterator[str | None]:
    if layer.use_mha:
        yield "attention that is not latent"
    if layer.use_sequence_parallel_moe:
        yield "tokens in parallel"
    yield from norm_refuses("input_layernorm", layer.input_layernorm)
    yield from norm_refuses("post_attention_layernorm", layer.post_attention_layernorm)
    yield part_refuses(type(layer.self_attn), "latent attention module")
    yield mla_step.layer_refuses(layer.self_attn.mla_attn)
    yield from feed_forward.refusals(layer.mlp)


def layer_refuses(layer: Any) -> str | None:
    """None if a decoder layer is made of the parts that are settled here, else why not."""
    return first_refusal(_refusals, layer, "DeepSeek's decoder layer")


# One layer's launches


def _bind(layer: Any, hidden_states: Any) -> tuple[Callable[..., Any], Callable[[Any], None]]:
    """For this layer: call(step, kv_cache, hidden_states, residual) -> (hidden_states, residual), and
    prepare(kv_cache), after which no call with it compiles anything. All raise Refused."""
    import torch

    from .. import replay
    from ..kernels.rms_norm import bind_norm_rows
    from ..launch import allocator

    if reason := layer_refuses(layer):
        raise Refused(reason)
    dtype, device, hidden_size = hidden_states.dtype, hidden_states.get_device(), hidden_states.shape[-1]
    if dtype is torch.float16:
        raise Refused("float16, in which vLLM scales what goes from layer to layer")
    attention = mla_step.bind_block(layer.self_attn.mla_attn, hidden_states)
    block = feed_forward.bind_block(layer.mlp, hidden_states)
    impl = layer.self_attn.mla_attn.mla_attn.impl
    norms = layer.input_layernorm, layer.post_attention_layernorm
    known = [*attention.known, *block.known, *parameters_of(norms[0]), *parameters_of(norms[1])]
    most = most_rows(known)
    settled = [(dtype, norm.weight.dtype, hidden_size, norm.variance_epsilon) for norm in norms]
    alone = bind_norm_rows(*settled[0], False, False, device)
    first = bind_norm_rows(*settled[0], True, False, device)  # the inputs stay, should anything fail after it
    second = bind_norm_rows(*settled[1], True, True, device)
    read = norms[0].weight, norms[1].weight, *attention.read, *block.read
    after = 2 + len(attention.read)
    empty, row_bytes = allocator(device, dtype), hidden_size * dtype.itemsize
    plainly, check = torch._C.DisableTorchFunctionSubclass, rows_like(hidden_states)

    def launches(
        memory: Memory, rows: int, facts: tuple[int, ...], is_first: bool, cache_at: int, read_at: tuple[int, ...],
        hidden_at: int, before_at: int, out_at: int, residual_at: int, *step_at: int,
    ) -> None:  # fmt: skip
        x_at, attended_at = memory(rows * row_bytes), memory(rows * row_bytes)
        if is_first:
            alone(residual_at, 0, read_at[0], x_at, 0, rows)
        else:
            first(hidden_at, before_at, read_at[0], x_at, residual_at, rows)
        attention.launches(memory, rows, facts, read_at[2:after], cache_at, x_at, attended_at, *step_at)
        second(attended_at, residual_at, read_at[1], attended_at, residual_at, rows)
        block.launches(memory, rows, read_at[after:], attended_at, out_at)

    cache: Any = None
    run: Callable[[tuple[Any, ...], tuple[int, ...]], None]

    def prepare(kv_cache: Any) -> None:
        nonlocal cache, run
        attention.settle_cache(kv_cache)
        cache, run = kv_cache, replay.bind(device, launches)

    def call(step: Step, kv_cache: Any, hidden_states: Any, residual: Any) -> Any:
        rows = step.num_tokens
        if rows > most:
            raise Refused(f"more than {most} requests of a layer in float8")
        check("hidden_states", hidden_states, rows)
        if residual is not None:
            check("residual", residual, rows)
        if impl.dcp_world_size != 1:
            raise Refused("decode context parallelism")
        check_kept(known)
        if kv_cache is not cache:
            prepare(kv_cache)
        with plainly():
            read_at = addresses_of(*read)
        is_first = residual is None
        before, residual = residual, hidden_states.clone() if is_first else empty(rows, hidden_size)
        out = empty(rows, hidden_size)
        run(
            (rows, attention.facts(step), is_first, kv_cache.data_ptr(), read_at),
            (
                hidden_states.data_ptr(), 0 if is_first else before.data_ptr(), out.data_ptr(), residual.data_ptr(),
                step.positions_at, step.slot_mapping_at, step.block_table_at, step.seq_lens_at,
            ),
        )  # fmt: skip
        return out, residual

    return call, prepare


def _decoder_layer(original: Any, site: Any) -> Any:
    from ..sites import module_forward

    steps = Steps(mla_step.read)

    def settle(
        layer: Any, positions: Any, hidden_states: Any, residual: Any, llama_4_scaling: Any = None
    ) -> Callable[..., Any]:
        """The layer's own call(positions, hidden_states, residual, llama_4_scaling)."""
        call, prepare = _bind(layer, hidden_states)
        attn = layer.self_attn.mla_attn.mla_attn
        name, now, hits = attn.layer_name, steps.follow(layer, attn, prepare), site.by_layer

        def run(positions: Any, hidden_states: Any, residual: Any, llama_4_scaling: Any = None) -> Any:
            if llama_4_scaling is not None:
                raise Refused("queries scaled by their positions")
            step, kv_cache = now(positions)
            result = call(step, kv_cache, hidden_states, residual)
            hits[name] = hits.get(name, 0) + 1
            return result

        return run

    return module_forward(original, site, settle)


PATCHES = (
    Patch(
        "decoder.deepseek_v2",
        "layer.deepseek_v2_decoder_layer",
        ("rms_norm", "linear", "mla_rope_and_cache", "head_linear", "mla_decode", "grouped_topk", "moe_experts"),
        _decoder_layer,
        "a decode step of a layer, latent attention and experts and all, in one recording",
    ),
)
