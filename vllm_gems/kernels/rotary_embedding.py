"""Rotary position embedding of query and key in place: NeoX and GPT-J pairs, partial, inverse, M-RoPE's sections."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import Refused
from ..launch import Build, Launch, launcher, pointer
from ..nouns import Case, Kernel, Settled
from .common import TOKENS, dtype_of, nbytes, power_of_two, randn, strided


@triton.jit
def _rotary_embedding_kernel(
    # Tensors
    positions_ptr,  # [num_tokens], or [3, num_tokens] with sections
    query_ptr,  # [num_tokens, Q_HEADS, ...], written in place
    key_ptr,  # [num_tokens, K_HEADS, ...] or None, written in place
    cos_sin_cache_ptr,  # [max_position, 2 * HALF], cosines then sines
    # Scalars, in elements
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    cache_stride,
    section_stride,  # between the rows of positions
    # Constexprs
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,  # 0 without a key
    HALF: tl.constexpr,  # rotated pairs
    OFFSET: tl.constexpr,  # of the rotated elements in a head
    IS_NEOX: tl.constexpr,
    INVERSE: tl.constexpr,
    SECTION_T: tl.constexpr,  # M-RoPE: pairs that turn by the temporal position; 0 for plain positions
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    INTERLEAVED: tl.constexpr,  # sections take turns instead of following one another
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,  # per program
):
    # A tile is HEADS heads of query or of key.
    Q_TILES: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    K_TILES: tl.constexpr = (K_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // (Q_TILES + K_TILES)).to(tl.int64)
    tile = tl.program_id(0) % (Q_TILES + K_TILES)
    if K_HEADS == 0:
        head = tile * HEADS + tl.arange(0, HEADS)[:, None]
        head_live = head < Q_HEADS
        heads_at = query_ptr + token * query_stride + OFFSET + head * query_head_stride
    else:
        is_query = tile < Q_TILES
        head = tl.where(is_query, tile, tile - Q_TILES) * HEADS + tl.arange(0, HEADS)[:, None]
        head_live = head < tl.where(is_query, Q_HEADS, K_HEADS)
        token_at = tl.where(is_query, query_ptr + token * query_stride, key_ptr + token * key_stride)
        heads_at = token_at + OFFSET + head * tl.where(is_query, query_head_stride, key_head_stride)

    pair = tl.arange(0, HALF_BLOCK)[None, :]
    if SECTION_T == 0:
        position = tl.load(positions_ptr + token).to(tl.int64)
    else:
        if INTERLEAVED:
            section = tl.where((pair % 3 == 1) & (pair < 3 * SECTION_H), 1, 0)
            section = tl.where((pair % 3 == 2) & (pair < 3 * SECTION_W), 2, section)
        else:
            section = tl.where(pair < SECTION_T, 0, tl.where(pair < SECTION_T + SECTION_H, 1, 2))
        position = tl.load(positions_ptr + section * section_stride + token).to(tl.int64)

    # The heads are asked for while the position is on its way, which the angles have to wait for.
    if IS_NEOX:
        live = head_live & (pair < HALF)
        first = tl.load(heads_at + pair, mask=live, other=0.0)
        second = tl.load(heads_at + HALF + pair, mask=live, other=0.0)
    else:
        # Pairs are neighbours: read together and parted in registers, so that the reads stay contiguous.
        element = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        live = head_live & (element < 2 * HALF)
        both = tl.load(heads_at + element, mask=live, other=0.0)
        first, second = tl.split(tl.reshape(both, (HEADS, HALF_BLOCK, 2)))
    angle_at = cos_sin_cache_ptr + position * cache_stride + pair
    cos = tl.load(angle_at, mask=pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(angle_at + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin

    a = first.to(tl.float32)
    b = second.to(tl.float32)
    turned_first = (a * cos - b * sin).to(first.dtype)
    turned_second = (b * cos + a * sin).to(first.dtype)
    if IS_NEOX:
        tl.store(heads_at + pair, turned_first, mask=live)
        tl.store(heads_at + HALF + pair, turned_second, mask=live)
    else:
        turned = tl.reshape(tl.join(turned_first, turned_second), (HEADS, 2 * HALF_BLOCK))
        tl.store(heads_at + element, turned, mask=live)


class Rotation(NamedTuple):
    """What a rotary layer knows for ever."""

    head_size: int
    rotary_dim: int
    is_neox: bool
    rope_dim_offset: int = 0
    inverse: bool = False
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False


class _Heads(NamedTuple):
    """One of query and key, seen as heads of tokens."""

    number: int
    stride: int  # between tokens
    head_stride: int


# Of query and key together: launches for few and many tokens, tiles of a token, strides as the kernel takes them, all
# their bits, and the numbers of heads.
_Layout = tuple[Launch, Launch, int, tuple[int, int, int, int, int], int, tuple[int, int]]
# check(*tensors) -> whether they are like others in all but the number of tokens
_Like = Callable[..., bool]


def _nothing_like(*tensors: Any) -> bool:
    return False


def _like(*tensors: tuple[torch.Tensor, int | None]) -> _Like:
    """check(*others) -> whether they are like `tensors`, each given with the dimension whose size is free.

    Types, dtypes, devices, sizes and strides are compared in one call into C++, which Dynamo has for its guards, for a
    third of what it costs to ask for them in Python. Where PyTorch lacks it, nothing is like anything.
    """
    sizes, strides = [], []
    for x, free in tensors:
        sizes.append([None if dim == free else size for dim, size in enumerate(x.shape)])
        strides.append([None if free is not None and dim < free else step for dim, step in enumerate(x.stride())])
    core: Any = torch._C
    try:
        guards = core._dynamo.guards.TensorGuards(
            *(x for x, _ in tensors), dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        )
        check: _Like = guards.check
    except (AttributeError, TypeError):
        return _nothing_like
    return check


def _heads_of(name: str, x: torch.Tensor, token_dims: int, head_size: int) -> _Heads:
    """x is [*tokens, heads * head_size] or [*tokens, heads, head_size]; raises Refused if its tokens are not evenly
    spaced."""
    shape, strides = x.shape, x.stride()
    if x.dim() == token_dims + 1:
        count, left = divmod(shape[-1], head_size)
        head_stride = head_size
    elif x.dim() == token_dims + 2:
        count, left, head_stride = shape[-2], abs(shape[-1] - head_size), strides[-2]
    else:
        count, left, head_stride = 0, 1, 0
    if left:
        raise Refused(f"{name} of shape {tuple(shape)} is not heads of size {head_size} for {token_dims}-d positions")
    even = token_dims == 1 or shape[0] <= 1 or strides[0] == shape[1] * strides[1]
    if strides[-1] != 1 or not even:
        raise Refused(f"{name} of shape {tuple(shape)} and strides {strides} is not evenly spaced tokens")
    return _Heads(count, strides[token_dims - 1], head_stride)


# From this many tokens on, the GPU is full. Measured on an H100 with 32, 40 and 129 heads: of tiles of 64 to 4096 pairs
# on 1 to 8 warps, these are within 6% of the best throughout (GPT-J's pairs at 128 tokens apart, which would take 8 a
# thread); 4 pairs a thread for many tokens too would cost 5% to 13%.
_MANY_TOKENS = 512
_TILE_PAIRS = 512
_PAIRS_PER_THREAD = {False: 4, True: 16}  # by whether there are many


def _tiling(heads: int, half: int, many: bool) -> tuple[int, int]:
    """(heads per program, warps)."""
    half = power_of_two(half)
    per_program = min(power_of_two(heads), max(1, _TILE_PAIRS // half))
    return per_program, max(1, per_program * half // (32 * _PAIRS_PER_THREAD[many]))


def _build(
    rotation: Rotation,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    position_dtype: torch.dtype,
    q_heads: int,
    k_heads: int,
    many: bool = False,
    aligned: bool = True,
) -> Build:
    half = rotation.rotary_dim // 2
    heads, num_warps = _tiling(max(q_heads, k_heads), half, many)
    sections = (*rotation.mrope_section, 0, 0, 0)[:3]
    return Build(
        function=_rotary_embedding_kernel,
        types=(
            pointer(position_dtype),
            pointer(dtype),
            pointer(dtype) if k_heads else None,
            pointer(cache_dtype),
            *("i32/16",) * 5,
            "i32",
        ),
        constexprs=(
            ("Q_HEADS", q_heads),
            ("K_HEADS", k_heads),
            ("HALF", half),
            ("OFFSET", rotation.rope_dim_offset),
            ("IS_NEOX", rotation.is_neox),
            ("INVERSE", rotation.inverse),
            ("SECTION_T", sections[0]),
            ("SECTION_H", sections[1]),
            ("SECTION_W", sections[2]),
            ("INTERLEAVED", rotation.mrope_interleaved),
            ("HALF_BLOCK", power_of_two(half)),
            ("HEADS", heads),
        ),
        aligned=aligned,
        num_warps=num_warps,
    )


def _never(rotation: Rotation, dtype: torch.dtype, cache_dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    head_size, rotary_dim = rotation.head_size, rotation.rotary_dim
    if rotary_dim <= 0 or rotary_dim % 2 or rotation.rope_dim_offset < 0:
        return f"rotary_dim {rotary_dim} at offset {rotation.rope_dim_offset} is not an even number of elements"
    if rotation.rope_dim_offset + rotary_dim > head_size:
        return f"rotary_dim {rotary_dim} at offset {rotation.rope_dim_offset} exceeds head_size {head_size}"
    floats = (torch.float16, torch.bfloat16, torch.float32)
    if dtype not in floats or cache_dtype not in floats:
        return f"query is {dtype} and cos_sin_cache {cache_dtype}, not float16, bfloat16 or float32"
    section = rotation.mrope_section
    if section and (len(section) != 3 or sum(section) != rotary_dim // 2 or section[0] == 0):
        return f"mrope_section {section} is not three parts of rotary_dim / 2 = {rotary_dim // 2}"
    return None


@functools.cache
def bind_rotary_embedding(
    rotation: Rotation, dtype: torch.dtype, cache_dtype: torch.dtype, device: int
) -> Callable[..., None]:
    """`rotary_embedding` with everything settled that a layer knows for ever: call(positions, query, key, cache).

    The layout of query and key is worked out once per shape and strides. The call checks what can still change, and
    raises Refused for what it does not do.
    """
    if reason := _never(rotation, dtype, cache_dtype):
        raise Refused(reason)
    sections = bool(rotation.mrope_section)
    cache_width = rotation.rotary_dim

    @functools.cache
    def launch_for(position_dtype: torch.dtype, q_heads: int, k_heads: int, many: bool, aligned: bool) -> Launch:
        return launcher(_build(rotation, dtype, cache_dtype, position_dtype, q_heads, k_heads, many, aligned), device)

    def layout(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None) -> _Layout:
        token_dims = positions.dim() - sections
        q = _heads_of("query", query, token_dims, rotation.head_size)
        k = _Heads(0, 0, 0) if key is None else _heads_of("key", key, token_dims, rotation.head_size)
        # Both are compiled now, so that no later call with this layout does.
        few, many = (launch_for(positions.dtype, q.number, k.number, many, True) for many in (False, True))
        per_program, _ = _tiling(max(q.number, k.number), rotation.rotary_dim // 2, True)
        tiles = (q.number + per_program - 1) // per_program + (k.number + per_program - 1) // per_program
        strides = q.stride, q.head_stride, k.stride, k.head_stride, cache_width
        return few, many, tiles, strides, functools.reduce(operator.or_, strides), (q.number, k.number)

    # By all of query's and key's shapes and strides but the number of tokens.
    layouts: dict[Any, _Layout] = {}
    likes: dict[Any, _Like] = {}

    def checked(
        positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None, cache: torch.Tensor
    ) -> tuple[_Layout, int, _Like]:
        """(layout, number of tokens, what later calls are like); raises Refused."""
        q_shape = query.shape
        k_shape = q_shape if key is None else key.shape
        flat = positions.dim() - sections == 1 and len(q_shape) > 1
        tokens = q_shape[0] if flat else q_shape[0] * q_shape[1]
        if (
            query.dtype is not dtype
            or query.get_device() != device
            or (key is not None and (key.dtype is not dtype or key.get_device() != device))
            or k_shape[0] != q_shape[0]
            or positions.numel() != (3 * tokens if sections else tokens)
            or positions.get_device() != device
            or not positions.is_contiguous()
            or cache.dtype is not cache_dtype
            or cache.get_device() != device
            or cache.shape[-1] != cache_width
            or not cache.is_contiguous()
        ):
            raise Refused(_unlike(positions, query, key, cache, dtype, cache_dtype, device))
        if not flat:
            return layout(positions, query, key), tokens, _nothing_like
        of = positions.dtype, q_shape[1:], query.stride(), None if key is None else (k_shape[1:], key.stride())
        if of not in layouts:
            layouts[of] = layout(positions, query, key)
        like: _Like = likes.get(of, _nothing_like)
        if key is not None and tokens and not like(positions, query, key, cache):
            like = likes[of] = _like((positions, int(sections)), (query, 0), (key, 0), (cache, None))
        return layouts[of], tokens, like

    # The last call's: what it was like, the elements of query and key at a token, the layout.
    last: tuple[_Like, int, int, _Layout | None] = (_nothing_like, 0, 0, None)

    def call(
        positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None, cache: torch.Tensor
    ) -> None:
        nonlocal last
        like, q_width, k_width, found = last
        tokens = positions.numel() // 3 if sections else positions.numel()
        if (
            key is None
            or found is None
            or not like(positions, query, key, cache)
            or query.numel() != tokens * q_width
            or key.numel() != tokens * k_width
        ):
            found, tokens, like = checked(positions, query, key, cache)
            if key is not None and tokens:
                last = like, query.numel() // tokens, key.numel() // tokens, found
        few, many, tiles, strides, bits, heads = found
        launch = few if tokens < _MANY_TOKENS else many
        query_at, key_at, cache_at = query.data_ptr(), 0 if key is None else key.data_ptr(), cache.data_ptr()
        positions_at = positions.data_ptr()
        if (positions_at | query_at | key_at | cache_at | bits) & 15:
            launch = launch_for(positions.dtype, *heads, launch is many, False)
        launch(
            tokens * tiles, positions_at, query_at, key_at, cache_at, *strides,
            positions.stride(0) if sections else 0,
        )  # fmt: skip

    return call


def _unlike(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    cache: torch.Tensor,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: int,
) -> str:
    have = ", ".join(
        f"{name} {x.dtype} {tuple(x.shape)} on device {x.get_device()}"
        for name, x in (("positions", positions), ("query", query), ("key", key), ("cos_sin_cache", cache))
        if x is not None
    )
    return f"{have}; expected {dtype} query and key and {cache_dtype} cache on device {device}, one position a token"


def rotary_embedding_refuses(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
    mrope_section: tuple[int, ...] = (),
    mrope_interleaved: bool = False,
) -> str | None:
    """None if `rotary_embedding` does this, else why not."""
    if cos_sin_cache.dim() != 2 or not cos_sin_cache.is_contiguous():
        return f"cos_sin_cache of shape {tuple(cos_sin_cache.shape)} is not a contiguous [max_position, rotary_dim]"
    rotation = Rotation(
        head_size, cos_sin_cache.shape[1], is_neox, rope_dim_offset, inverse, mrope_section, mrope_interleaved
    )
    if reason := _never(rotation, query.dtype, cos_sin_cache.dtype):
        return reason
    if positions.dtype not in (torch.int32, torch.int64):
        return f"positions has dtype {positions.dtype}, not int32 or int64"
    sections = bool(mrope_section)
    token_dims = positions.dim() - sections
    if token_dims not in (1, 2 - sections) or (sections and positions.shape[0] != 3):
        return f"positions of shape {tuple(positions.shape)} is not {'[3, num_tokens]' if sections else 'one a token'}"
    if not positions.is_contiguous():
        return f"positions of strides {positions.stride()} is not contiguous"
    tensors = {"query": query} | ({} if key is None else {"key": key})
    for name, x in tensors.items():
        if x.dtype != query.dtype or x.device != query.device or x.shape[:token_dims] != positions.shape[sections:]:
            return f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, unlike positions or query"
        try:
            _heads_of(name, x, token_dims, head_size)
        except Refused as refusal:
            return str(refusal)
    if cos_sin_cache.device != query.device or positions.device != query.device:
        return f"cos_sin_cache on {cos_sin_cache.device} and positions on {positions.device}, query on {query.device}"
    return None


def _settled(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    rotation: Rotation,
) -> Settled[None]:
    """Of either op, whose fourth argument is no tensor."""
    refusal = rotary_embedding_refuses(
        positions, query, key, rotation.head_size, cos_sin_cache, rotation.is_neox, rotation.rope_dim_offset,
        rotation.inverse, rotation.mrope_section, rotation.mrope_interleaved,
    )  # fmt: skip
    if refusal is not None:
        raise Refused(refusal)
    call = bind_rotary_embedding(rotation, query.dtype, cos_sin_cache.dtype, query.get_device())
    return lambda args: call(args[0], args[1], args[2], args[4])


def settle_rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> Settled[None]:
    """`rotary_embedding` for arguments that look like these; raises Refused."""
    rotation = Rotation(head_size, cos_sin_cache.shape[-1], is_neox, rope_dim_offset, inverse)
    return _settled(positions, query, key, cos_sin_cache, rotation)


def settle_mrotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    mrope_section: list[int],
    mrope_interleaved: bool = False,
) -> Settled[None]:
    """`mrotary_embedding` for arguments that look like these; raises Refused."""
    width = cos_sin_cache.shape[-1]
    rotation = Rotation(head_size, width, is_neox, 0, False, tuple(mrope_section), mrope_interleaved)
    return _settled(positions, query, key, cos_sin_cache, rotation)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Turn pairs of elements of each head by the angle of its token's position, in place, in float32.

    positions: [num_tokens] or [batch, seq_len], int64 or int32, contiguous. query: [*positions.shape, heads *
    head_size] or [*positions.shape, heads, head_size], float16, bfloat16 or float32, evenly spaced tokens (a slice of
    qkv will do). key: the same with its own number of heads, or None. cos_sin_cache: [max_position, rotary_dim],
    cosines then sines, of any of the three dtypes. is_neox: a pair is (i, i + rotary_dim / 2), else (2i, 2i + 1).
    rope_dim_offset: where in a head the rotated elements begin. inverse: turn back.

    Source: https://arxiv.org/abs/2104.09864. Stands in for `torch.ops._C.rotary_embedding`. Raises Refused for what it
    does not do.
    """
    args = positions, query, key, head_size, cos_sin_cache, is_neox, rope_dim_offset, inverse
    settle_rotary_embedding(*args)(args)


def mrotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    mrope_section: list[int],
    mrope_interleaved: bool = False,
) -> None:
    """`rotary_embedding` with three positions a token (time, height, width), each for its section of the pairs.

    positions: [3, num_tokens]. mrope_section: pairs of each section, rotary_dim / 2 in all. mrope_interleaved: the
    sections take turns pair by pair (Qwen3-VL) instead of following one another (Qwen2-VL).

    Stands in for the rotation of vLLM's `MRotaryEmbedding`. Raises Refused for what it does not do.
    """
    args = positions, query, key, head_size, cos_sin_cache, is_neox, mrope_section, mrope_interleaved
    settle_mrotary_embedding(*args)(args)


def _turned(
    x: torch.Tensor, tokens: int, head_size: int, offset: int, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool
) -> torch.Tensor:
    if tokens == 0:
        return x.clone()
    y = x.reshape(tokens, -1, head_size).clone()
    half = cos.shape[-1]
    part = y[..., offset : offset + 2 * half]
    first, second = (part[..., :half], part[..., half:]) if is_neox else (part[..., ::2], part[..., 1::2])
    a, b = first.clone(), second.clone()
    first.copy_(a * cos[:, None] - b * sin[:, None])
    second.copy_(b * cos[:, None] + a * sin[:, None])
    return y.reshape(x.shape)


def rotary_embedding_reference(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    cos, sin = cos_sin_cache[positions.reshape(-1).long()].chunk(2, dim=-1)
    sin = -sin if inverse else sin
    tokens = positions.numel()
    turned = [
        None if x is None else _turned(x, tokens, head_size, rope_dim_offset, cos, sin, is_neox) for x in (query, key)
    ]
    return turned[0], turned[1]


def mrotary_embedding_reference(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    mrope_section: list[int],
    mrope_interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    half = cos_sin_cache.shape[-1] // 2
    if mrope_interleaved:
        section = [
            1 if i % 3 == 1 and i < 3 * mrope_section[1] else 2 if i % 3 == 2 and i < 3 * mrope_section[2] else 0
            for i in range(half)
        ]
    else:
        section = [index for index, size in enumerate(mrope_section) for _ in range(size)]
    pairs = torch.arange(half, device=query.device)
    at = positions.long()[torch.tensor(section, device=query.device)].T  # [num_tokens, half]
    cos, sin = cos_sin_cache[at, pairs], cos_sin_cache[at, half + pairs]
    tokens = positions.shape[1]
    turned = [None if x is None else _turned(x, tokens, head_size, 0, cos, sin, is_neox) for x in (query, key)]
    return turned[0], turned[1]


# Query heads, key heads, head size, rotated elements, NeoX: attention of Qwen2.5-7B and Llama-3.1-8B as slices of qkv,
# of DeepSeek-V3 as the rope part of each head, one key for all.
_MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {"heads": (28, 4), "head_size": 128, "hidden_size": 3584},
    "llama-3.1-8b": {"heads": (32, 8), "head_size": 128, "hidden_size": 4096},
    "deepseek-v3": {"heads": (128, 1), "head_size": 64, "neox": False, "layout": "mla", "hidden_size": 7168},
}

_CASES = (
    Case("neox", {"tokens": (5,), "heads": (4, 2), "head_size": 32}),
    Case("gpt-j", {"tokens": (5,), "heads": (4, 2), "head_size": 32, "neox": False}),
    Case("odd number of heads", {"tokens": (3,), "heads": (7, 3), "head_size": 48}),
    Case("partial", {"tokens": (4,), "heads": (3, 1), "head_size": 40, "rotary_dim": 24}),
    Case("partial gpt-j", {"tokens": (4,), "heads": (3, 1), "head_size": 40, "rotary_dim": 24, "neox": False}),
    Case("no key", {"tokens": (4,), "heads": (3, 0), "head_size": 32}),
    Case("float32 cache", {"tokens": (4,), "heads": (3, 1), "head_size": 32, "cache": "float32"}),
    Case("bfloat16 cache", {"tokens": (4,), "heads": (3, 1), "head_size": 32, "cache": "bfloat16"}),
    Case("three dimensions", {"tokens": (4,), "heads": (3, 2), "head_size": 32, "layout": "heads"}),
    Case("slices of qkv", {"tokens": (4,), "heads": (3, 2), "head_size": 32, "layout": "qkv"}),
    Case("rope part of heads", {"tokens": (4,), "heads": (3, 1), "head_size": 32, "layout": "mla", "neox": False}),
    Case("batch and sequence", {"tokens": (2, 3), "heads": (3, 2), "head_size": 32}),
    Case("int32 positions", {"tokens": (4,), "heads": (3, 2), "head_size": 32, "positions": "int32"}),
    Case("offset", {"tokens": (4,), "heads": (3, 2), "head_size": 48, "rotary_dim": 16, "offset": 32}),
    Case("inverse", {"tokens": (4,), "heads": (3, 2), "head_size": 32, "inverse": True}),
    Case("empty", {"tokens": (0,), "heads": (3, 2), "head_size": 32}),
    *(
        Case(f"{model} {tokens}", {"layout": "qkv", **sizes, "tokens": (tokens,), "model": model}, bench=True)
        for model, sizes in _MODELS.items()
        for tokens in TOKENS
    ),
)

_MROPE_CASES = (
    Case("sections", {"tokens": (5,), "heads": (4, 2), "head_size": 32, "section": (4, 6, 6)}),
    Case("interleaved", {"tokens": (5,), "heads": (4, 2), "head_size": 64, "section": (12, 10, 10), "turns": True}),
    Case("slices of qkv", {"tokens": (4,), "heads": (3, 2), "head_size": 32, "section": (8, 4, 4), "layout": "qkv"}),
    Case("empty", {"tokens": (0,), "heads": (3, 2), "head_size": 32, "section": (8, 4, 4)}),
)

_MAX_POSITION = 4096


def _one(case: Case, heads: int, dtype: str, device: str) -> torch.Tensor | None:
    tokens, head_size, layout = case["tokens"], case["head_size"], case.get("layout", "flat")
    if heads == 0:
        return None
    if layout == "mla":
        return strided((*tokens, heads, head_size), dtype, device, 0, 128)
    if layout == "qkv":
        return strided((*tokens, heads * head_size), dtype, device, 3 * head_size, 2 * head_size)
    return randn((*tokens, heads, head_size) if layout == "heads" else (*tokens, heads * head_size), dtype, device)


def _rotary_inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    q_heads, k_heads = case["heads"]
    rotary_dim = case.get("rotary_dim", case["head_size"])
    tokens = case["tokens"] if "section" not in case.params else (3, *case["tokens"])
    angles = torch.rand(_MAX_POSITION, rotary_dim // 2, device=device) * 6.28
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
    inputs: dict[str, Any] = {
        "positions": torch.randint(_MAX_POSITION, tokens, device=device).to(dtype_of(case.get("positions", "int64"))),
        "query": _one(case, q_heads, dtype, device),
        "key": _one(case, k_heads, dtype, device),
        "head_size": case["head_size"],
        "cos_sin_cache": cache.to(dtype_of(case.get("cache", dtype))),
        "is_neox": case.get("neox", True),
    }
    if "section" in case.params:
        return inputs | {"mrope_section": list(case["section"]), "mrope_interleaved": case.get("turns", False)}
    return inputs | {"rope_dim_offset": case.get("offset", 0), "inverse": case.get("inverse", False)}


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    rotation = Rotation(
        case["head_size"], case.get("rotary_dim", case["head_size"]), case.get("neox", True), case.get("offset", 0),
        case.get("inverse", False), case.get("section", ()), case.get("turns", False),
    )  # fmt: skip
    dtypes = dtype_of(dtype), dtype_of(case.get("cache", dtype)), dtype_of(case.get("positions", "int64"))
    q_heads, k_heads = case["heads"]
    for many in (False, True):
        for is_aligned in (True, False):
            yield _build(rotation, *dtypes, q_heads, k_heads, many, is_aligned)


def _traffic(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None, **rest: Any) -> int:
    rotary_dim, head_size = rest["cos_sin_cache"].shape[-1], rest["head_size"]
    turned = 2 * nbytes(query, key) * rotary_dim // head_size
    # Each token's angles are read once, though some tokens may share them.
    return nbytes(positions) + turned + positions.numel() * rotary_dim * rest["cos_sin_cache"].element_size()


def _stock_call(op: Callable[..., None], **inputs: Any) -> None:
    op(*inputs.values())


ROTARY_EMBEDDING = Kernel(
    name="rotary_embedding",
    op=rotary_embedding,
    settle=settle_rotary_embedding,
    reference=rotary_embedding_reference,
    refuses=rotary_embedding_refuses,
    inputs=_rotary_inputs,
    results=("query", "key"),
    cases=_CASES,
    builds=_builds,
    schema="rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
    fake=lambda *args, **named: None,
    stock="_C::rotary_embedding",
    stock_call=_stock_call,
    traffic=_traffic,
)

MROTARY_EMBEDDING = Kernel(
    name="mrotary_embedding",
    op=mrotary_embedding,
    settle=settle_mrotary_embedding,
    reference=mrotary_embedding_reference,
    refuses=rotary_embedding_refuses,
    inputs=_rotary_inputs,
    results=("query", "key"),
    cases=_MROPE_CASES,
    builds=_builds,
    schema="mrotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox, int[] mrope_section, bool mrope_interleaved=False) -> ()",
    fake=lambda *args, **named: None,
    traffic=_traffic,
)

KERNELS = (ROTARY_EMBEDDING, MROTARY_EMBEDDING)
