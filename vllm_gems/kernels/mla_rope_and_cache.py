"""From the projections to latent attention in one launch: the latent normalised, keys and queries rotated, the cache.

DeepSeek's attention has its keys and values from one compressed vector a token, and rotates a few elements of each
query head and of one key that all heads share. Unfused these are a norm, a rotation and a write to the cache, of a few
kilobytes a token each.
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

# A program of one warp keeps its token's latent in registers, 16 elements a thread.
MAX_LATENT = 512
MAX_ROPE = 128


@triton.jit
def _mla_rope_and_cache_kernel(
    # Tensors
    query_rope_ptr,  # [num_tokens, HEADS, 2 * HALF], written in place
    kv_ptr,  # [num_tokens, LATENT + 2 * HALF]
    weight_ptr,  # [LATENT]
    positions_ptr,  # [num_tokens]
    cos_sin_cache_ptr,  # [max_position, 2 * HALF], cosines then sines
    kv_cache_ptr,  # [num_blocks, BLOCK_SIZE, LATENT + 2 * HALF]
    slot_mapping_ptr,  # [num_tokens], block * BLOCK_SIZE + place in the block, negative to write nothing
    # Scalars, strides in elements
    query_stride,
    query_head_stride,
    kv_stride,
    cache_block_stride,
    cache_slot_stride,
    epsilon,
    # Constexprs
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    HALF: tl.constexpr,  # rotated pairs
    BLOCK_SIZE: tl.constexpr,  # slots of a block of the cache
    IS_NEOX: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # heads of a program
):
    # The first tile of a token is its key and latent, the others are ROWS heads of its query.
    TILES: tl.constexpr = 1 + (HEADS + ROWS - 1) // ROWS
    token = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    is_key = tile == 0
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    slot_at = kv_cache_ptr + slot // BLOCK_SIZE * cache_block_stride + slot % BLOCK_SIZE * cache_slot_stride
    kv_at = kv_ptr + token * kv_stride

    if is_key:
        dim = tl.arange(0, LATENT_BLOCK)
        dim_live = dim < LATENT
        latent = tl.load(kv_at + dim, mask=dim_live, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + dim, mask=dim_live, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(latent * latent, axis=0) / LATENT + epsilon)
        normalised = (latent * scale * weight).to(kv_cache_ptr.dtype.element_ty)
        tl.store(slot_at + dim, normalised, mask=dim < tl.where(slot >= 0, LATENT, 0))

    # The key is one head, which goes from its row to its slot; heads of the query stay where they are.
    row = tl.arange(0, ROWS)[:, None]
    head = tl.where(is_key, row, (tile - 1) * ROWS + row)
    # Loads are not to wait for the slot.
    live = head < tl.where(is_key, 1, HEADS)
    stored = head < tl.where(is_key, tl.where(slot >= 0, 1, 0), HEADS)
    query_at = query_rope_ptr + token * query_stride
    from_at = tl.where(is_key, kv_at + LATENT, query_at) + head * query_head_stride
    to_at = tl.where(is_key, slot_at + LATENT, query_at) + head * query_head_stride
    # For every head anew, so that a thread reads the angles of its own pairs.
    pair = tl.broadcast_to(tl.arange(0, HALF_BLOCK)[None, :], (ROWS, HALF_BLOCK))
    pair_live = live & (pair < HALF)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if IS_NEOX:
        first = tl.load(from_at + pair, mask=pair_live, other=0.0)
        second = tl.load(from_at + HALF + pair, mask=pair_live, other=0.0)
    else:
        # Pairs are neighbours: read together and parted in registers, so that the reads stay contiguous.
        element = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        both = tl.load(from_at + element, mask=live & (element < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(both, (ROWS, HALF_BLOCK, 2)))
    angle_at = cos_sin_cache_ptr + position * (2 * HALF) + pair
    cos = tl.load(angle_at, mask=pair_live, other=0.0).to(tl.float32)
    sin = tl.load(angle_at + HALF, mask=pair_live, other=0.0).to(tl.float32)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    turned_first = (a * cos - b * sin).to(first.dtype)
    turned_second = (b * cos + a * sin).to(first.dtype)
    if IS_NEOX:
        tl.store(to_at + pair, turned_first, mask=stored & (pair < HALF))
        tl.store(to_at + HALF + pair, turned_second, mask=stored & (pair < HALF))
    else:
        turned = tl.reshape(tl.join(turned_first, turned_second), (ROWS, 2 * HALF_BLOCK))
        tl.store(to_at + element, turned, mask=stored & (element < 2 * HALF))


class Projected(NamedTuple):
    """What an attention layer and its cache know for ever."""

    num_heads: int
    latent: int  # normalised elements of a token
    rope: int  # rotated elements of a head, and of a token
    is_neox: bool
    block_size: int


# Rotated elements of a program, which is one warp: 16 a thread. DeepSeek's heads have 64, so that a token of 16 heads
# is 3 programs, and one of 128 is 17. Not measured against other tiles.
_TILE = 512


def _rows(spec: Projected) -> int:
    """Heads of a program."""
    return min(power_of_two(spec.num_heads), max(1, _TILE // power_of_two(spec.rope)))


def _build(
    spec: Projected,
    dtype: torch.dtype,
    angle_dtype: torch.dtype,
    position_dtype: torch.dtype,
    slot_dtype: torch.dtype,
    aligned: bool = True,
) -> Build:
    x = pointer(dtype)
    return Build(
        function=_mla_rope_and_cache_kernel,
        types=(
            x,
            x,
            x,
            pointer(position_dtype),
            pointer(angle_dtype),
            x,
            pointer(slot_dtype),
            *("i32/16",) * 5,
            "fp32",
        ),
        constexprs=(
            ("HEADS", spec.num_heads),
            ("LATENT", spec.latent),
            ("HALF", spec.rope // 2),
            ("BLOCK_SIZE", spec.block_size),
            ("IS_NEOX", spec.is_neox),
            ("LATENT_BLOCK", power_of_two(spec.latent)),
            ("HALF_BLOCK", power_of_two(spec.rope // 2)),
            ("ROWS", _rows(spec)),
        ),
        aligned=aligned,
        num_warps=1,
    )


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _never(spec: Projected, dtype: torch.dtype, angle_dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    if dtype not in _FLOATS:
        return f"query_rope has dtype {dtype}, not float16, bfloat16 or float32"
    if angle_dtype not in _FLOATS:
        return f"cos_sin_cache has dtype {angle_dtype}, not float16, bfloat16 or float32"
    if spec.num_heads < 1 or spec.block_size < 1:
        return f"query_rope has {spec.num_heads} heads, kv_cache blocks of {spec.block_size}: at least 1 is expected"
    if not 0 < spec.latent <= MAX_LATENT:
        return f"weight has {spec.latent} elements, not from 1 to {MAX_LATENT}"
    if not 0 < spec.rope <= MAX_ROPE or spec.rope % 2:
        return f"query_rope has heads of {spec.rope}, not of an even number of elements up to {MAX_ROPE}"
    return None


@functools.cache
def bind_mla_rope_and_cache(
    spec: Projected,
    dtype: torch.dtype,
    angle_dtype: torch.dtype,
    position_dtype: torch.dtype,
    slot_dtype: torch.dtype,
    device: int,
) -> Callable[..., None]:
    """The operation with everything settled that a layer knows for ever, for callers who have checked their tensors.

    dtype: of query, kv, weight and cache; angle_dtype: of cos_sin_cache. Returns write(query_rope_at, query_stride,
    query_head_stride, kv_at, kv_stride, weight_at, positions_at, cos_sin_at, cache_at, cache_block_stride,
    cache_slot_stride, slot_mapping_at, epsilon, num_tokens): addresses, and strides in elements. What aligned tensors
    need is compiled now.
    """
    if reason := _never(spec, dtype, angle_dtype):
        raise Refused(reason)

    @functools.cache
    def launch_for(aligned: bool) -> Launch:
        return launcher(_build(spec, dtype, angle_dtype, position_dtype, slot_dtype, aligned), device)

    all_aligned = launch_for(True)
    tiles = 1 + triton.cdiv(spec.num_heads, _rows(spec))

    def write(
        query_rope_at: int,
        query_stride: int,
        query_head_stride: int,
        kv_at: int,
        kv_stride: int,
        weight_at: int,
        positions_at: int,
        cos_sin_at: int,
        cache_at: int,
        cache_block_stride: int,
        cache_slot_stride: int,
        slot_mapping_at: int,
        epsilon: float,
        num_tokens: int,
    ) -> None:
        bits = query_rope_at | kv_at | weight_at | positions_at | cos_sin_at | cache_at | slot_mapping_at
        bits |= query_stride | query_head_stride | kv_stride | cache_block_stride | cache_slot_stride
        launch = launch_for(False) if bits & 15 else all_aligned
        launch(
            num_tokens * tiles, query_rope_at, kv_at, weight_at, positions_at, cos_sin_at, cache_at, slot_mapping_at,
            query_stride, query_head_stride, kv_stride, cache_block_stride, cache_slot_stride, epsilon,
        )  # fmt: skip

    return write


def mla_rope_and_cache_refuses(
    query_rope: torch.Tensor,
    kv: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    epsilon: float,
    is_neox: bool,
) -> str | None:
    """None if `mla_rope_and_cache` does this, else why not."""
    if query_rope.dim() != 3 or query_rope.stride(2) != 1:
        have = f"query_rope of shape {tuple(query_rope.shape)} and strides {query_rope.stride()}"
        return f"{have} is not a [num_tokens, num_heads, rope] of contiguous heads"
    if weight.dim() != 1 or not weight.is_contiguous():
        return f"weight of shape {tuple(weight.shape)} and strides {weight.stride()} is not a contiguous [latent]"
    num_tokens, num_heads, rope = query_rope.shape
    width = len(weight) + rope
    if kv_cache.dim() != 3 or kv_cache.stride(2) != 1 or kv_cache.shape[2] != width:
        have = f"kv_cache of shape {tuple(kv_cache.shape)} and strides {kv_cache.stride()}"
        return f"{have} is not a [num_blocks, block_size, {width}] of contiguous tokens"
    spec = Projected(num_heads, len(weight), rope, is_neox, kv_cache.shape[1])
    if reason := _never(spec, query_rope.dtype, cos_sin_cache.dtype):
        return reason
    for name, x in (("kv", kv), ("weight", weight), ("kv_cache", kv_cache)):
        if x.dtype != query_rope.dtype:
            return f"{name} has dtype {x.dtype}, and nothing is converted from query_rope's {query_rope.dtype}"
    if kv.shape != (num_tokens, width) or kv.stride(1) != 1:
        have = f"kv of shape {tuple(kv.shape)} and strides {kv.stride()}"
        return f"{have} is not {(num_tokens, width)} with rows contiguous"
    if cos_sin_cache.dim() != 2 or cos_sin_cache.shape[1] != rope or not cos_sin_cache.is_contiguous():
        return f"cos_sin_cache of shape {tuple(cos_sin_cache.shape)} is not a contiguous [max_position, {rope}]"
    for name, x in (("query_rope", query_rope), ("kv", kv), ("kv_cache", kv_cache)):
        if max(x.stride()) >= 2**31 or num_heads * query_rope.stride(1) >= 2**31:
            return f"{name} of strides {x.stride()} has rows or heads 2**31 elements apart, or more"
    if reason := tokens_refuse(positions, slot_mapping, num_tokens, "query_rope"):
        return reason
    others = {
        "kv": kv, "weight": weight, "positions": positions, "cos_sin_cache": cos_sin_cache, "kv_cache": kv_cache,
        "slot_mapping": slot_mapping,
    }  # fmt: skip
    return elsewhere(others, "query_rope", query_rope.device)


def mla_rope_and_cache(
    query_rope: torch.Tensor,
    kv: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    epsilon: float,
    is_neox: bool,
) -> None:
    """Rotate the queries in place; write each token's latent normalised, and its key rotated, to its slot of the cache.

    query_rope: [num_tokens, num_heads, rope], float16, bfloat16 or float32: what is rotated of each head, usually the
    last elements of a wider one; tokens and heads may lie apart. kv: [num_tokens, latent + rope] of that dtype, rows
    may lie apart, only read. weight: [latent] of that dtype, up to 512 elements; the norm is weight * x / sqrt(mean(x
    ** 2) + epsilon), in float32. positions: [num_tokens], int64 or int32, contiguous. cos_sin_cache: [max_position,
    rope], cosines then sines, of any of the three dtypes; rope is even, up to 128. kv_cache: [num_blocks, block_size,
    latent + rope] of query_rope's dtype, any strides but within a token. slot_mapping: [num_tokens], int64 or int32,
    contiguous: block * block_size + place in the block, of different tokens different; negative for padding, whose
    latent and key are not written. is_neox: a pair is (i, i + rope / 2), else (2i, 2i + 1). Everything is rounded once.

    Does what vLLM's `kv_a_layernorm`, `rotary_emb` and `torch.ops._C_cache_ops.concat_and_cache_mla` do one after the
    other. Source: https://arxiv.org/abs/2405.04434. Raises Refused for what it does not do.
    """
    args = query_rope, kv, weight, positions, cos_sin_cache, kv_cache, slot_mapping, epsilon, is_neox
    if reason := mla_rope_and_cache_refuses(*args):
        raise Refused(reason)
    num_tokens, num_heads, rope = query_rope.shape
    write = bind_mla_rope_and_cache(
        Projected(num_heads, len(weight), rope, is_neox, kv_cache.shape[1]), query_rope.dtype, cos_sin_cache.dtype,
        positions.dtype, slot_mapping.dtype, query_rope.get_device(),
    )  # fmt: skip
    if num_tokens:
        write(
            query_rope.data_ptr(), *query_rope.stride()[:2], kv.data_ptr(), kv.stride(0), weight.data_ptr(),
            positions.data_ptr(), cos_sin_cache.data_ptr(), kv_cache.data_ptr(), *kv_cache.stride()[:2],
            slot_mapping.data_ptr(), epsilon, num_tokens,
        )  # fmt: skip


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1) if is_neox else torch.stack(turned, dim=-1).flatten(-2)


def mla_rope_and_cache_reference(
    query_rope: torch.Tensor,
    kv: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    epsilon: float,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    latent, key = kv.split((len(weight), query_rope.shape[2]), dim=-1)
    normalised = latent * torch.rsqrt(latent.pow(2).mean(dim=-1, keepdim=True) + epsilon) * weight
    cos, sin = cos_sin_cache[positions.long()].chunk(2, dim=-1)
    rows = torch.cat((normalised, _turned(key, cos, sin, is_neox)), dim=-1)
    cache = kv_cache.clone()
    slots = slot_mapping[slot_mapping >= 0].long()
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows[slot_mapping >= 0]
    return _turned(query_rope, cos[:, None], sin[:, None], is_neox), cache


_MODELS = {"deepseek-v2-lite": 16, "deepseek-v3": 128}

_CASES = (
    Case("gpt-j", {"tokens": (5,), "heads": 4}),
    Case("neox", {"tokens": (5,), "heads": 4, "neox": True}),
    Case("one head", {"tokens": (3,), "heads": 1}),
    Case("odd heads", {"tokens": (3,), "heads": 11}),
    Case("odd sizes", {"tokens": (4,), "heads": 3, "latent": 77, "rope": 22, "nope": 13}),
    Case("odd sizes neox", {"tokens": (4,), "heads": 3, "latent": 77, "rope": 22, "nope": 13, "neox": True}),
    Case("model's sizes", {"tokens": (3,), "heads": 16, "latent": 512, "rope": 64, "nope": 128}),
    Case("wide", {"tokens": (2,), "heads": 5, "latent": 500, "rope": 128}),
    Case("float32 cos_sin_cache", {"tokens": (4,), "heads": 3, "cos_sin": "float32"}),
    Case("bfloat16 cos_sin_cache", {"tokens": (4,), "heads": 3, "cos_sin": "bfloat16"}),
    Case("int32 positions", {"tokens": (4,), "heads": 3, "positions": "int32"}),
    Case("int32 slots", {"tokens": (4,), "heads": 3, "slots": "int32"}),
    Case("odd block size", {"tokens": (9,), "heads": 3, "block_size": 7}),
    Case("pages apart", {"tokens": (9,), "heads": 3, "apart": 48}),
    Case("queries alone", {"tokens": (4,), "heads": 3, "nope": 0}),
    Case("rows apart", {"tokens": (4,), "heads": 3, "gap": 32}),
    Case("odd offset", {"tokens": (4,), "heads": 3, "gap": 5, "offset": 3}),
    Case("padded", {"tokens": (9,), "heads": 4, "padded": True}),
    Case("empty", {"tokens": (0,), "heads": 4}),
    *(
        Case(
            f"{model} {tokens}",
            {"tokens": (tokens,), "heads": heads, "latent": 512, "rope": 64, "nope": 128, "model": model},
            bench=True,
        )
        for model, heads in _MODELS.items()
        for tokens in TOKENS
        if tokens <= 512  # decode steps
    ),
)

_BLOCK_SIZE = 16
_MAX_POSITION = 4096


def _spec(case: Case) -> Projected:
    return Projected(
        case["heads"], case.get("latent", 64), case.get("rope", 32), case.get("neox", False),
        case.get("block_size", _BLOCK_SIZE),
    )  # fmt: skip


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    (tokens,), nope, spec = case["tokens"], case.get("nope", 32), _spec(case)
    blocks, width = tokens // spec.block_size + 2, spec.latent + spec.rope
    angles = torch.rand(_MAX_POSITION, spec.rope // 2, device=device) * 6.28
    slots = torch.randperm(blocks * spec.block_size, device=device)[:tokens]
    if "padded" in case.params:
        slots[::3] = -1
    gap, offset = case.get("gap", 0), case.get("offset", 0)
    heads = strided((tokens, spec.num_heads * (nope + spec.rope)), dtype, device, gap, offset)
    cache = strided((blocks, spec.block_size * width), dtype, device, case.get("apart", 0))
    return {
        "query_rope": heads.unflatten(1, (spec.num_heads, nope + spec.rope))[..., nope:],
        "kv": strided((tokens, width), dtype, device, gap, offset),
        "weight": 1 + randn((spec.latent,), dtype, device, scale=0.2),
        "positions": torch.randint(_MAX_POSITION, (tokens,), device=device).to(
            dtype_of(case.get("positions", "int64"))
        ),
        "cos_sin_cache": torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype_of(case.get("cos_sin", dtype))),
        "kv_cache": cache.unflatten(1, (spec.block_size, width)),
        "slot_mapping": slots.to(dtype_of(case.get("slots", "int64"))),
        "epsilon": 1e-6,
        "is_neox": spec.is_neox,
    }


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    for is_aligned in (True, False):
        yield _build(
            _spec(case), dtype_of(dtype), dtype_of(case.get("cos_sin", dtype)),
            dtype_of(case.get("positions", "int64")), dtype_of(case.get("slots", "int64")), is_aligned,
        )  # fmt: skip


def _traffic(
    query_rope: torch.Tensor,
    kv: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    **_: Any,
) -> int:
    # Each token's angles are read once, though some tokens may share them.
    angles = len(positions) * cos_sin_cache.shape[1] * cos_sin_cache.element_size()
    return 2 * nbytes(query_rope, kv) + nbytes(weight, positions, slot_mapping) + angles


MLA_ROPE_AND_CACHE = Kernel(
    name="mla_rope_and_cache",
    op=mla_rope_and_cache,
    reference=mla_rope_and_cache_reference,
    refuses=mla_rope_and_cache_refuses,
    inputs=_inputs,
    results=("query_rope", "kv_cache"),
    cases=_CASES,
    builds=_builds,
    schema="mla_rope_and_cache(Tensor(a!) query_rope, Tensor kv, Tensor weight, Tensor positions, "
    "Tensor cos_sin_cache, Tensor(b!) kv_cache, Tensor slot_mapping, float epsilon, bool is_neox) -> ()",
    fake=lambda *args, **named: None,
    traffic=_traffic,
)

KERNELS = (MLA_ROPE_AND_CACHE,)
