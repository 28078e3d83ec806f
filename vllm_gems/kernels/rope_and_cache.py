"""From the qkv projection to attention in one launch: q and k normalised and rotated, k and v into the paged cache.

Unfused, these are four launches (two without the norms of Qwen3) that each read what the one before wrote. Here every
head of qkv is read once: q is written where it was, k and v only to their slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import Refused
from ..launch import Build, Launch, launcher, pointer
from ..nouns import Case, Kernel
from .common import TOKENS, dtype_of, nbytes, power_of_two, randn, strided
from .paged import elsewhere, tokens_refuse

MAX_HEAD_SIZE = 256


@triton.jit
def _rope_and_cache_kernel(
    # Tensors
    qkv_ptr,  # [num_tokens, (Q_HEADS + 2 * KV_HEADS) * HEAD], q written in place
    positions_ptr,  # [num_tokens]
    cos_sin_cache_ptr,  # [max_position, 2 * HALF], cosines then sines
    key_cache_ptr,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD]
    value_cache_ptr,  # the same
    slot_mapping_ptr,  # [num_tokens], block * BLOCK_SIZE + place in the block, negative to write nothing
    q_weight_ptr,  # [HEAD] or None
    k_weight_ptr,  # [HEAD] or None
    # Scalars, strides in elements
    qkv_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    epsilon,
    # Constexprs
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,  # rotated pairs, the leading elements of a head
    BLOCK_SIZE: tl.constexpr,  # slots of a block of the cache
    IS_NEOX: tl.constexpr,
    QK_NORM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,  # for the elements after the rotated ones, 0 without
    HEADS: tl.constexpr,  # per program
):
    # A tile is HEADS heads of q, of k or of v.
    Q_TILES: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_TILES: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // (Q_TILES + 2 * KV_TILES)).to(tl.int64)
    tile = tl.program_id(0) % (Q_TILES + 2 * KV_TILES)
    token_at = qkv_ptr + token * qkv_stride
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    block = slot // BLOCK_SIZE
    place = slot % BLOCK_SIZE
    stored_heads = tl.where(slot >= 0, KV_HEADS, 0)

    if tile >= Q_TILES + KV_TILES:
        head = (tile - Q_TILES - KV_TILES) * HEADS + tl.arange(0, HEADS)[:, None]
        live = head < KV_HEADS
        stored = head < stored_heads
        column = tl.arange(0, HEAD_BLOCK)[None, :]
        value_at = token_at + (Q_HEADS + KV_HEADS + head) * HEAD + column
        value = tl.load(value_at, mask=live & (column < HEAD), other=0.0)
        slot_at = value_cache_ptr + block * value_block_stride + place * value_slot_stride
        tl.store(slot_at + head * value_head_stride + column, value, mask=stored & (column < HEAD))
    else:
        is_query = tile < Q_TILES
        head = tl.where(is_query, tile, tile - Q_TILES) * HEADS + tl.arange(0, HEADS)[:, None]
        # Heads are asked for while the slot and the position are on their way: no load has `stored` in its mask.
        live = head < tl.where(is_query, Q_HEADS, KV_HEADS)
        stored = head < tl.where(is_query, Q_HEADS, stored_heads)
        from_at = token_at + (tl.where(is_query, 0, Q_HEADS) + head) * HEAD
        slot_at = key_cache_ptr + block * key_block_stride + place * key_slot_stride
        to_at = tl.where(is_query, token_at, slot_at) + head * tl.where(is_query, HEAD, key_head_stride)
        # For every head anew, so that a thread reads the angles and weights of its own pairs. As one row for all heads
        # they would lie over the threads in a way of their own, and q and k go there and back through shared memory.
        pair = tl.broadcast_to(tl.arange(0, HALF_BLOCK)[None, :], (HEADS, HALF_BLOCK))
        pair_live = pair < HALF
        position = tl.load(positions_ptr + token).to(tl.int64)

        if IS_NEOX:
            first_at = pair
            second_at = HALF + pair
            first = tl.load(from_at + first_at, mask=live & pair_live, other=0.0)
            second = tl.load(from_at + second_at, mask=live & pair_live, other=0.0)
        else:
            # Pairs are neighbours: read together and parted in registers, so that the reads stay contiguous.
            first_at = 2 * pair
            second_at = 2 * pair + 1
            element = tl.arange(0, 2 * HALF_BLOCK)[None, :]
            element_live = element < 2 * HALF
            both = tl.load(from_at + element, mask=live & element_live, other=0.0)
            first, second = tl.split(tl.reshape(both, (HEADS, HALF_BLOCK, 2)))
        if REST_BLOCK > 0:
            rest_at = 2 * HALF + tl.broadcast_to(tl.arange(0, REST_BLOCK)[None, :], (HEADS, REST_BLOCK))
            rest_live = rest_at < HEAD
            if not QK_NORM:
                # What is not rotated of q is where it belongs.
                rest_live = rest_live & (head < tl.where(is_query, 0, KV_HEADS))
            rest = tl.load(from_at + rest_at, mask=live & rest_live, other=0.0)
        angle_at = cos_sin_cache_ptr + position * (2 * HALF) + pair
        cos = tl.load(angle_at, mask=live & pair_live, other=0.0).to(tl.float32)
        sin = tl.load(angle_at + HALF, mask=live & pair_live, other=0.0).to(tl.float32)

        a = first.to(tl.float32)
        b = second.to(tl.float32)
        if QK_NORM:
            # Rounded before it is rotated, because the norm alone stores it so: results are those of two kernels.
            weight_at = tl.where(is_query, q_weight_ptr, k_weight_ptr)
            first_weight = tl.load(weight_at + first_at, mask=live & pair_live, other=0.0).to(tl.float32)
            second_weight = tl.load(weight_at + second_at, mask=live & pair_live, other=0.0).to(tl.float32)
            square = tl.sum(a * a + b * b, axis=1, keep_dims=True)
            if REST_BLOCK > 0:
                c = rest.to(tl.float32)
                square += tl.sum(c * c, axis=1, keep_dims=True)
            scale = tl.rsqrt(square / HEAD + epsilon)
            a = (a * scale * first_weight).to(first.dtype).to(tl.float32)
            b = (b * scale * second_weight).to(first.dtype).to(tl.float32)
            if REST_BLOCK > 0:
                rest_weight = tl.load(weight_at + rest_at, mask=live & rest_live, other=0.0).to(tl.float32)
                rest = (c * scale * rest_weight).to(first.dtype)
        turned_first = (a * cos - b * sin).to(first.dtype)
        turned_second = (b * cos + a * sin).to(first.dtype)

        if IS_NEOX:
            tl.store(to_at + first_at, turned_first, mask=stored & pair_live)
            tl.store(to_at + second_at, turned_second, mask=stored & pair_live)
        else:
            turned = tl.reshape(tl.join(turned_first, turned_second), (HEADS, 2 * HALF_BLOCK))
            tl.store(to_at + element, turned, mask=stored & element_live)
        if REST_BLOCK > 0:
            tl.store(to_at + rest_at, rest, mask=stored & rest_live)


class Attention(NamedTuple):
    """What an attention layer and its cache know for ever."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    rotary_dim: int
    is_neox: bool
    block_size: int
    qk_norm: bool = False


# Elements of a program, which is one warp: 16 a thread, in 16 bits one access of 16 bytes to either half of a head. A
# sum over a head then stays within the warp, and so does what is read and written in place. A token of 28 and twice 4
# heads of 128 elements is 9 programs. Not measured against other tiles.
_TILE = 512


def _tiling(spec: Attention) -> tuple[int, int]:
    """(heads per program, programs per token)."""
    most = power_of_two(max(spec.num_heads, spec.num_kv_heads))
    heads = min(most, max(1, _TILE // power_of_two(spec.head_size)))
    return heads, -(-spec.num_heads // heads) + 2 * -(-spec.num_kv_heads // heads)


def _build(
    spec: Attention,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    position_dtype: torch.dtype,
    slot_dtype: torch.dtype,
    aligned: bool = True,
) -> Build:
    rest = spec.head_size - spec.rotary_dim
    x = pointer(dtype)
    weight = x if spec.qk_norm else None
    return Build(
        function=_rope_and_cache_kernel,
        types=(
            x,
            pointer(position_dtype),
            pointer(cache_dtype),
            x,
            x,
            pointer(slot_dtype),
            weight,
            weight,
            *("i32/16",) * 7,  # pages are numbered in 64 bits, as caches have more than 2**31 elements
            "fp32",
        ),
        constexprs=(
            ("Q_HEADS", spec.num_heads),
            ("KV_HEADS", spec.num_kv_heads),
            ("HEAD", spec.head_size),
            ("HALF", spec.rotary_dim // 2),
            ("BLOCK_SIZE", spec.block_size),
            ("IS_NEOX", spec.is_neox),
            ("QK_NORM", spec.qk_norm),
            ("HEAD_BLOCK", power_of_two(spec.head_size)),
            ("HALF_BLOCK", power_of_two(spec.rotary_dim // 2)),
            ("REST_BLOCK", power_of_two(rest) if rest else 0),
            ("HEADS", _tiling(spec)[0]),
        ),
        aligned=aligned,
        num_warps=1,
    )


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _never(spec: Attention, dtype: torch.dtype, cache_dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    head_size, rotary_dim = spec.head_size, spec.rotary_dim
    if dtype not in _FLOATS:
        return f"qkv has dtype {dtype}, not float16, bfloat16 or float32"
    if cache_dtype not in _FLOATS:
        return f"cos_sin_cache has dtype {cache_dtype}, not float16, bfloat16 or float32"
    if spec.num_heads <= 0 or spec.num_kv_heads <= 0 or spec.block_size <= 0:
        return f"num_heads {spec.num_heads}, kv heads {spec.num_kv_heads} or block_size {spec.block_size} is below 1"
    if not 0 < head_size <= MAX_HEAD_SIZE or head_size % 2:
        return f"key_cache has heads of {head_size}, not of an even number of elements up to {MAX_HEAD_SIZE}"
    if not 0 < rotary_dim <= head_size or rotary_dim % 2:
        return f"cos_sin_cache has rotary_dim {rotary_dim}, not an even number up to the head's {head_size} elements"
    return None


@functools.cache
def bind_rope_and_cache(
    spec: Attention,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    position_dtype: torch.dtype,
    slot_dtype: torch.dtype,
    device: int,
) -> Callable[..., None]:
    """The operation with everything settled that a layer knows for ever, for callers who have checked their tensors.

    dtype: of qkv, the weights and both caches; cache_dtype: of cos_sin_cache. Returns write(qkv_at, qkv_stride,
    positions_at, cos_sin_at, key_at, value_at, cache_strides, slot_mapping_at, q_weight_at, k_weight_at, epsilon,
    num_tokens): addresses, and strides in elements; cache_strides are those of block, slot and head, of the key cache
    and then of the value cache; weights and epsilon are 0 without qk_norm. What aligned tensors need is compiled now.
    """
    if reason := _never(spec, dtype, cache_dtype):
        raise Refused(reason)

    @functools.cache
    def launch_for(aligned: bool) -> Launch:
        return launcher(_build(spec, dtype, cache_dtype, position_dtype, slot_dtype, aligned), device)

    all_aligned = launch_for(True)
    _, tiles = _tiling(spec)

    def write(
        qkv_at: int,
        qkv_stride: int,
        positions_at: int,
        cos_sin_at: int,
        key_at: int,
        value_at: int,
        cache_strides: tuple[int, int, int, int, int, int],
        slot_mapping_at: int,
        q_weight_at: int,
        k_weight_at: int,
        epsilon: float,
        num_tokens: int,
    ) -> None:
        key_block, key_slot, key_head, value_block, value_slot, value_head = cache_strides
        bits = qkv_at | positions_at | cos_sin_at | key_at | value_at | slot_mapping_at | q_weight_at | k_weight_at
        bits |= qkv_stride | key_block | key_slot | key_head | value_block | value_slot | value_head
        launch = launch_for(False) if bits & 15 else all_aligned
        launch(
            num_tokens * tiles, qkv_at, positions_at, cos_sin_at, key_at, value_at, slot_mapping_at, q_weight_at,
            k_weight_at, qkv_stride, key_block, key_slot, key_head, value_block, value_slot, value_head, epsilon,
        )  # fmt: skip

    return write


def _spec(
    cos_sin_cache: torch.Tensor, key_cache: torch.Tensor, num_heads: int, is_neox: bool, qk_norm: bool
) -> Attention:
    _, block_size, num_kv_heads, head_size = key_cache.shape
    return Attention(num_heads, num_kv_heads, head_size, cos_sin_cache.shape[1], is_neox, block_size, qk_norm)


def rope_and_cache_refuses(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    is_neox: bool,
) -> str | None:
    """None if `rope_and_cache` does this, else why not."""
    if qkv.dim() != 2 or qkv.stride(1) != 1:
        return f"qkv of shape {tuple(qkv.shape)} and strides {qkv.stride()} is not rows of contiguous elements"
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        if x.dim() != 4 or x.stride(3) != 1 or x.shape != key_cache.shape:
            have = f"{name} of shape {tuple(x.shape)} and strides {x.stride()}"
            return f"{have} is not a [num_blocks, block_size, num_kv_heads, head_size] of contiguous heads"
        if max(x.stride()) >= 2**31 or x.shape[2] * x.stride(2) >= 2**31:
            return f"{name} of strides {x.stride()} has pages, tokens or heads 2**31 elements apart, or more"
    if cos_sin_cache.dim() != 2 or not cos_sin_cache.is_contiguous():
        return f"cos_sin_cache of shape {tuple(cos_sin_cache.shape)} is not a contiguous [max_position, rotary_dim]"
    spec = _spec(cos_sin_cache, key_cache, num_heads, is_neox, False)
    if reason := _never(spec, qkv.dtype, cos_sin_cache.dtype):
        return reason
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        if x.dtype != qkv.dtype:
            return f"{name} has dtype {x.dtype}, and nothing is converted from qkv's {qkv.dtype}"
    num_tokens, width = qkv.shape
    if width != (expected := (num_heads + 2 * spec.num_kv_heads) * spec.head_size):
        heads = f"{num_heads} heads of q and {spec.num_kv_heads} each of k and v"
        return f"qkv has rows of {width}, not the {expected} elements of {heads} of {spec.head_size}"
    if reason := tokens_refuse(positions, slot_mapping, num_tokens, "qkv"):
        return reason
    others = {
        "positions": positions, "cos_sin_cache": cos_sin_cache, "key_cache": key_cache, "value_cache": value_cache,
        "slot_mapping": slot_mapping,
    }  # fmt: skip
    return elsewhere(others, "qkv", qkv.device)


def qk_norm_rope_and_cache_refuses(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    is_neox: bool,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    epsilon: float,
) -> str | None:
    """None if `qk_norm_rope_and_cache` does this, else why not."""
    if reason := rope_and_cache_refuses(
        qkv, positions, cos_sin_cache, key_cache, value_cache, slot_mapping, num_heads, is_neox
    ):
        return reason
    head_size = key_cache.shape[3]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if (
            weight.shape != (head_size,)
            or weight.dtype != qkv.dtype
            or weight.device != qkv.device
            or not weight.is_contiguous()
        ):
            have = f"{weight.dtype} {tuple(weight.shape)} on {weight.device} with strides {weight.stride()}"
            return f"{name} is {have}, expected a contiguous {qkv.dtype} ({head_size},) on {qkv.device}"
    return None


def _run(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    is_neox: bool,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> None:
    write = bind_rope_and_cache(
        _spec(cos_sin_cache, key_cache, num_heads, is_neox, norm is not None), qkv.dtype, cos_sin_cache.dtype,
        positions.dtype, slot_mapping.dtype, qkv.get_device(),
    )  # fmt: skip
    weights_at, epsilon = ((norm[0].data_ptr(), norm[1].data_ptr()), norm[2]) if norm else ((0, 0), 0.0)
    write(
        qkv.data_ptr(), qkv.stride(0), positions.data_ptr(), cos_sin_cache.data_ptr(), key_cache.data_ptr(),
        value_cache.data_ptr(), (*key_cache.stride()[:3], *value_cache.stride()[:3]), slot_mapping.data_ptr(),
        *weights_at, epsilon, qkv.shape[0],
    )  # fmt: skip


def rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    is_neox: bool,
) -> None:
    """Rotate q in place, and write k rotated and v as it is to their slots of the paged cache.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_size], float16, bfloat16 or float32, rows may lie apart; its
    k and v are only read. positions: [num_tokens], int64 or int32, contiguous. cos_sin_cache: [max_position,
    rotary_dim], cosines then sines, of any of the three dtypes; what of a head is beyond rotary_dim is not rotated.
    key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size] of qkv's dtype, any strides but within a
    head. slot_mapping: [num_tokens], int64 or int32, contiguous: block * block_size + place in the block, of different
    tokens different; negative for padding, whose k and v are not written. is_neox: a pair is (i, i + rotary_dim / 2),
    else (2i, 2i + 1). Rotated in float32 and rounded once.

    Does what `torch.ops._C.rotary_embedding` and `torch.ops._C_cache_ops.reshape_and_cache_flash` do one after the
    other. Raises Refused for what it does not do.
    """
    args = qkv, positions, cos_sin_cache, key_cache, value_cache, slot_mapping, num_heads, is_neox
    if reason := rope_and_cache_refuses(*args):
        raise Refused(reason)
    _run(*args, None)


def qk_norm_rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    is_neox: bool,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    epsilon: float,
) -> None:
    """`rope_and_cache` of q and k whose every head is first normalised: weight * x / sqrt(mean(x**2) + epsilon).

    q_weight, k_weight: [head_size] of qkv's dtype. The norm is computed in float32 and rounded to that dtype before the
    rotation, as `rms_norm` stores it. Raises Refused for what it does not do.
    """
    args = qkv, positions, cos_sin_cache, key_cache, value_cache, slot_mapping, num_heads, is_neox
    if reason := qk_norm_rope_and_cache_refuses(*args, q_weight, k_weight, epsilon):
        raise Refused(reason)
    _run(*args, (q_weight, k_weight, epsilon))


def _normalised(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon) * weight


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    y = x.clone()
    half = cos.shape[-1]
    part = y[..., : 2 * half]
    first, second = (part[..., :half], part[..., half:]) if is_neox else (part[..., ::2], part[..., 1::2])
    a, b = first.clone(), second.clone()
    first.copy_(a * cos - b * sin)
    second.copy_(b * cos + a * sin)
    return y


def _stored(cache: torch.Tensor, slot_mapping: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The cache with each token's x at its slot."""
    found = cache.clone()
    slots = slot_mapping[slot_mapping >= 0].long()
    found[slots // cache.shape[1], slots % cache.shape[1]] = x[slot_mapping >= 0]
    return found


def rope_and_cache_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    is_neox: bool,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_kv_heads, head_size = key_cache.shape[2:]
    heads = qkv.reshape(len(qkv), num_heads + 2 * num_kv_heads, head_size)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin_cache[positions.long(), None].chunk(2, dim=-1)
    new_q, new_k = (
        _turned(x if weight is None else _normalised(x, weight, epsilon), cos, sin, is_neox)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    new_qkv = torch.cat((new_q, k, v), dim=1).reshape(qkv.shape)
    return new_qkv, _stored(key_cache, slot_mapping, new_k), _stored(value_cache, slot_mapping, v)


def cache_views(base: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(key_cache, value_cache) in one allocation, as releases of vLLM have laid them out."""
    if layout == "pairs":  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        key, value = base.chunk(2, dim=-1)
        return key.transpose(1, 2), value.transpose(1, 2)
    if layout == "blocks":  # [num_blocks, 2, block_size, num_kv_heads, head_size]
        return base[:, 0], base[:, 1]
    return base[0], base[1]  # [2, num_blocks, block_size, num_kv_heads, head_size]


def cache_base(layout: str, blocks: int, block_size: int, heads: int, head_size: int) -> tuple[int, ...]:
    """The shape of that allocation."""
    if layout == "pairs":
        return blocks, heads, block_size, 2 * head_size
    if layout == "blocks":
        return blocks, 2, block_size, heads, head_size
    return 2, blocks, block_size, heads, head_size


_MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {"heads": (28, 4), "head_size": 128, "hidden_size": 3584},
    "llama-3.1-8b": {"heads": (32, 8), "head_size": 128, "hidden_size": 4096},
}
_QK_NORM_MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {"heads": (32, 8), "head_size": 128, "hidden_size": 4096},
}


def _bench(models: dict[str, dict[str, Any]]) -> tuple[Case, ...]:
    return tuple(
        Case(f"{model} {tokens}", {**sizes, "tokens": (tokens,), "layout": "pairs", "model": model}, bench=True)
        for model, sizes in models.items()
        for tokens in TOKENS
    )


_CASES = (
    Case("neox", {"tokens": (5,), "heads": (4, 2), "head_size": 64}),
    Case("gpt-j", {"tokens": (5,), "heads": (4, 2), "head_size": 64, "neox": False}),
    Case("one kv head", {"tokens": (3,), "heads": (7, 1), "head_size": 128}),
    Case("grouped", {"tokens": (2,), "heads": (28, 4), "head_size": 128, "layout": "pairs"}),
    Case("as many kv heads", {"tokens": (3,), "heads": (3, 3), "head_size": 80}),
    Case("gpt-j of 80", {"tokens": (3,), "heads": (3, 3), "head_size": 80, "neox": False}),
    Case("wide heads", {"tokens": (2,), "heads": (3, 1), "head_size": 256}),
    Case("partial", {"tokens": (4,), "heads": (3, 1), "head_size": 80, "rotary_dim": 24}),
    Case("partial gpt-j", {"tokens": (4,), "heads": (3, 1), "head_size": 64, "rotary_dim": 32, "neox": False}),
    Case("float32 cos_sin_cache", {"tokens": (4,), "heads": (3, 1), "head_size": 64, "cos_sin": "float32"}),
    Case("bfloat16 cos_sin_cache", {"tokens": (4,), "heads": (3, 1), "head_size": 64, "cos_sin": "bfloat16"}),
    Case("int32 positions", {"tokens": (4,), "heads": (3, 1), "head_size": 64, "positions": "int32"}),
    Case("int32 slots", {"tokens": (4,), "heads": (3, 1), "head_size": 64, "slots": "int32"}),
    Case("k beside v", {"tokens": (6,), "heads": (4, 2), "head_size": 64, "layout": "pairs", "block_size": 64}),
    Case("k before v in blocks", {"tokens": (6,), "heads": (4, 2), "head_size": 64, "layout": "blocks"}),
    Case("odd block size", {"tokens": (6,), "heads": (4, 2), "head_size": 64, "block_size": 7}),
    Case("rows apart", {"tokens": (4,), "heads": (3, 1), "head_size": 64, "gap": 32}),
    Case("odd offset", {"tokens": (4,), "heads": (3, 1), "head_size": 64, "gap": 5, "offset": 3}),
    Case("padded", {"tokens": (9,), "heads": (4, 2), "head_size": 64, "padded": True, "layout": "pairs"}),
    Case("empty", {"tokens": (0,), "heads": (4, 2), "head_size": 64}),
    *_bench(_MODELS),
)

_OF_QK_NORM = (
    "neox", "gpt-j", "one kv head", "gpt-j of 80", "wide heads", "partial", "partial gpt-j", "float32 cos_sin_cache",
    "odd offset", "padded", "empty",
)  # fmt: skip
_QK_NORM_CASES = (*(case for case in _CASES if case.name in _OF_QK_NORM), *_bench(_QK_NORM_MODELS))

_BLOCK_SIZE = 16
_MAX_POSITION = 4096


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    (tokens,), (q_heads, kv_heads), head_size = case["tokens"], case["heads"], case["head_size"]
    rotary_dim, block_size = case.get("rotary_dim", head_size), case.get("block_size", _BLOCK_SIZE)
    layout, blocks = case.get("layout", ""), tokens // block_size + 2
    angles = torch.rand(_MAX_POSITION, rotary_dim // 2, device=device) * 6.28
    slots = torch.randperm(blocks * block_size, device=device)[:tokens]
    if "padded" in case.params:
        slots[::3] = -1
    # Each cache in an allocation of its own, so that tests see what is written beside it.
    shape = cache_base(layout, blocks, block_size, kv_heads, head_size)
    key_cache, value_cache = (cache_views(randn(shape, dtype, device), layout)[index] for index in (0, 1))
    width = (q_heads + 2 * kv_heads) * head_size
    return {
        "qkv": strided((tokens, width), dtype, device, case.get("gap", 0), case.get("offset", 0)),
        "positions": torch.randint(_MAX_POSITION, (tokens,), device=device).to(
            dtype_of(case.get("positions", "int64"))
        ),
        "cos_sin_cache": torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype_of(case.get("cos_sin", dtype))),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": slots.to(dtype_of(case.get("slots", "int64"))),
        "num_heads": q_heads,
        "is_neox": case.get("neox", True),
    }


def _qk_norm_inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    q_weight, k_weight = (1 + randn((case["head_size"],), dtype, device, scale=0.2) for _ in range(2))
    return _inputs(case, dtype, device) | {"q_weight": q_weight, "k_weight": k_weight, "epsilon": 1e-6}


def _builds(qk_norm: bool) -> Callable[[Case, str], Iterator[Build]]:
    def builds(case: Case, dtype: str) -> Iterator[Build]:
        q_heads, kv_heads = case["heads"]
        spec = Attention(
            q_heads, kv_heads, case["head_size"], case.get("rotary_dim", case["head_size"]), case.get("neox", True),
            case.get("block_size", _BLOCK_SIZE), qk_norm,
        )  # fmt: skip
        for is_aligned in (True, False):
            yield _build(
                spec, dtype_of(dtype), dtype_of(case.get("cos_sin", dtype)), dtype_of(case.get("positions", "int64")),
                dtype_of(case.get("slots", "int64")), is_aligned,
            )  # fmt: skip

    return builds


def _traffic(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    is_neox: bool,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> int:
    # q, k and v are each read once and written once, somewhere. Each token's angles are read once, though some tokens
    # may share them.
    angles = len(positions) * cos_sin_cache.shape[1] * cos_sin_cache.element_size()
    return 2 * nbytes(qkv) + nbytes(positions, slot_mapping, q_weight, k_weight) + angles


ROPE_AND_CACHE = Kernel(
    name="rope_and_cache",
    op=rope_and_cache,
    reference=rope_and_cache_reference,
    refuses=rope_and_cache_refuses,
    inputs=_inputs,
    results=("qkv", "key_cache", "value_cache"),
    cases=_CASES,
    builds=_builds(qk_norm=False),
    schema="rope_and_cache(Tensor(a!) qkv, Tensor positions, Tensor cos_sin_cache, Tensor(b!) key_cache, "
    "Tensor(c!) value_cache, Tensor slot_mapping, int num_heads, bool is_neox) -> ()",
    fake=lambda *args, **named: None,
    traffic=_traffic,
)

QK_NORM_ROPE_AND_CACHE = Kernel(
    name="qk_norm_rope_and_cache",
    op=qk_norm_rope_and_cache,
    reference=rope_and_cache_reference,
    refuses=qk_norm_rope_and_cache_refuses,
    inputs=_qk_norm_inputs,
    results=("qkv", "key_cache", "value_cache"),
    cases=_QK_NORM_CASES,
    builds=_builds(qk_norm=True),
    schema="qk_norm_rope_and_cache(Tensor(a!) qkv, Tensor positions, Tensor cos_sin_cache, Tensor(b!) key_cache, "
    "Tensor(c!) value_cache, Tensor slot_mapping, int num_heads, bool is_neox, Tensor q_weight, Tensor k_weight, "
    "float epsilon) -> ()",
    fake=lambda *args, **named: None,
    traffic=_traffic,
)

KERNELS = (ROPE_AND_CACHE, QK_NORM_ROPE_AND_CACHE)
