"""Paged attention of one query token per request: decoding, with grouped query heads.

One device function serves short and long contexts: where requests alone do not fill the GPU, a request's context is
split over several programs, and the last of them to finish merges what they found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import Refused
from ..launch import Build, Launch, allocator, launcher, pointer
from ..nouns import Case, Kernel
from ..scratch import counters
from .common import dtype_of, nbytes, power_of_two, randn, strided
from .paged import pages_for, pages_refuse, random_pages

# The accumulator of a group's heads is in registers; with more or larger heads it spills.
MAX_HEAD_SIZE = 256
MAX_GROUP = 32

# Tokens below which splitting a context further costs more, in merging, than it saves.
_SPLIT_TOKENS = 128
_MAX_SPLITS = 32


@triton.jit
def _decode_attention_kernel(
    # Tensors
    query_ptr,  # [num_reqs, KV_HEADS * GROUP, HEAD_SIZE]
    key_ptr,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE]
    value_ptr,  # the same
    block_table_ptr,  # [num_reqs, max_blocks]
    seq_lens_ptr,  # [num_reqs]
    out_ptr,  # [num_reqs, KV_HEADS * GROUP, HEAD_SIZE], heads of a request contiguous
    partial_ptr,  # [num_reqs, KV_HEADS, splits, GROUP, HEAD_SIZE], a split's accumulator; None without SPLIT
    stats_ptr,  # [num_reqs, KV_HEADS, splits, GROUP, 2], its largest score and its sum; None without SPLIT
    tickets_ptr,  # [num_reqs, KV_HEADS], zeros before and after; None without SPLIT
    # Scalars, strides in elements
    query_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    block_table_stride,
    out_stride,
    splits,  # programs that share a request's context at most
    scale,
    # Constexprs
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads to a KV head
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # tokens of a page
    SPLIT: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,  # that a split has at least
    IN_PAGE: tl.constexpr,  # no tile crosses the end of a page
    ROWS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    TILE: tl.constexpr,  # tokens
):
    # Splits of one context are neighbours, so that they run together and none waits long to be merged.
    if SPLIT:
        split = tl.program_id(0) % splits
        pair = tl.program_id(0) // splits
    else:
        pair = tl.program_id(0)
    request = (pair // KV_HEADS).to(tl.int64)
    kv_head = (pair % KV_HEADS).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + request)
    tiles = tl.cdiv(seq_len, TILE)
    if SPLIT:
        # A short request in a batch with long ones takes fewer splits. The others take no ticket.
        live_splits = tl.maximum(tl.minimum(splits, seq_len // SPLIT_TOKENS), 1)
        if split >= live_splits:
            return
        first = tiles * split // live_splits
        last = tiles * (split + 1) // live_splits
    else:
        first = 0
        last = tiles

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_BLOCK)
    head = kv_head * GROUP + row
    row_live = row < GROUP
    dim_live = dim < HEAD_SIZE
    head_live = row_live[:, None] & dim_live[None, :]
    query_at = request * query_stride + head[:, None] * query_head_stride + dim[None, :]
    query = tl.load(query_ptr + query_at, mask=head_live, other=0.0)

    # Powers of two instead of e.
    log2_scale = scale * 1.4426950408889634
    key_head_ptr = key_ptr + kv_head * key_head_stride
    value_head_ptr = value_ptr + kv_head * value_head_stride
    pages_ptr = block_table_ptr + request * block_table_stride
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)
    tokens = tl.arange(0, TILE)
    # A page is asked for one tile ahead: otherwise the compiler, seeing loads that wait for loads, would ask for a tile
    # only when the one before it is done. The table is garbage beyond the request's pages.
    if IN_PAGE:
        page = tl.load(pages_ptr + first * TILE // BLOCK_SIZE, mask=first < last, other=0)
    else:
        page = tl.load(pages_ptr + (first * TILE + tokens) // BLOCK_SIZE, mask=first * TILE + tokens < seq_len, other=0)
    for tile in range(first, last):
        token = tile * TILE + tokens
        token_live = token < seq_len
        block = page.to(tl.int64)
        if IN_PAGE:
            slot = tile * TILE % BLOCK_SIZE + tokens
            page = tl.load(pages_ptr + (tile + 1) * TILE // BLOCK_SIZE, mask=tile + 1 < last, other=0)
        else:
            slot = token % BLOCK_SIZE
            page = tl.load(pages_ptr + (token + TILE) // BLOCK_SIZE, mask=token + TILE < seq_len, other=0)
        live = token_live[:, None] & dim_live[None, :]
        key_at = (block * key_block_stride + slot * key_slot_stride)[:, None] + dim[None, :]
        key = tl.load(key_head_ptr + key_at, mask=live, other=0.0)
        value_at = (block * value_block_stride + slot * value_slot_stride)[:, None] + dim[None, :]
        value = tl.load(value_head_ptr + value_at, mask=live, other=0.0)

        score = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
        score = tl.where(token_live[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = higher

    if SPLIT:
        found = pair.to(tl.int64) * splits * GROUP + row
        at = found + split * GROUP
        tl.store(partial_ptr + at[:, None] * HEAD_SIZE + dim[None, :], acc, mask=head_live)
        tl.store(stats_ptr + at * 2, top, mask=row_live)
        tl.store(stats_ptr + at * 2 + 1, total, mask=row_live)
        # All threads have stored before one of them takes the ticket, which releases that to the other programs.
        tl.debug_barrier()
        if tl.atomic_add(tickets_ptr + pair, 1, sem="acq_rel") != live_splits - 1:
            return
        tl.store(tickets_ptr + pair, 0)
        # In the order of the splits, whichever came last: the same result every time. From a number, because a request
        # without tokens has minus infinity, whose difference from itself would be NaN.
        top = tl.full((ROWS,), -3.0e38, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)
        for each in tl.range(0, live_splits, loop_unroll_factor=4):
            at = found + each * GROUP
            part = tl.load(partial_ptr + at[:, None] * HEAD_SIZE + dim[None, :], mask=head_live, other=0.0)
            part_top = tl.load(stats_ptr + at * 2, mask=row_live, other=0.0)
            part_total = tl.load(stats_ptr + at * 2 + 1, mask=row_live, other=0.0)
            higher = tl.maximum(top, part_top)
            shrink = tl.exp2(top - higher)
            part_shrink = tl.exp2(part_top - higher)
            total = total * shrink + part_total * part_shrink
            acc = acc * shrink[:, None] + part * part_shrink[:, None]
            top = higher

    # Zeros for a request without tokens.
    total = tl.where(total == 0.0, 1.0, total)
    out_at = request * out_stride + head[:, None] * HEAD_SIZE + dim[None, :]
    tl.store(out_ptr + out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=head_live)


class Heads(NamedTuple):
    """What an attention layer knows for ever."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int  # tokens of a page


def _tiling(head_size: int, itemsize: int, group: int, aligned: bool) -> tuple[int, int, int]:
    """(tokens of a tile, warps, stages), by reasoning for an H100, from what the compiler makes of it.

    What counts is bytes on their way. An SM needs some 32 KiB of them to keep its share of the memory busy. Three
    stages are two tiles in shared memory, one in use and one on its way: with 64 tokens of 128 elements in 16 bits that
    is 32 KiB a program, of which an SM holds three. It is all of the 64 KiB that AMD has.

    More than 16 rows of query heads take the registers of half a tile. Products in float32 take whole rows of a tile
    into registers, as narrow loads do: 16 tokens. Eight warps where four would hold 32 elements of the accumulator a
    thread, and for narrow loads, which are not made ahead: their addresses and masks would spill.
    """
    rows, head_block = _blocks(head_size, group)
    if not aligned:
        return 16, 8, 1
    tile = min(64, max(16, 8192 * 16 // (rows * head_block))) if itemsize == 2 else 16
    num_warps = 8 if rows * head_block >= 4096 else 4
    # Float32 needs shared memory beside the tiles; with three, heads of 256 elements would leave AMD's none.
    num_stages = 3 if itemsize == 2 or head_block <= 128 else 2
    return tile, num_warps, num_stages


def _blocks(head_size: int, group: int) -> tuple[int, int]:
    """(rows, columns) of a group's query heads in registers; matrix products have at least 16 of each."""
    return max(16, power_of_two(group)), max(16, power_of_two(head_size))


def _build(heads: Heads, dtype: torch.dtype, split: bool, aligned: bool = True) -> Build:
    group = heads.num_heads // heads.num_kv_heads
    rows, head_block = _blocks(heads.head_size, group)
    tile, num_warps, num_stages = _tiling(heads.head_size, dtype.itemsize, group, aligned)
    x = pointer(dtype)
    return Build(
        function=_decode_attention_kernel,
        types=(
            x,
            x,
            x,
            "*i32",
            "*i32",
            x,
            "*fp32" if split else None,
            "*fp32" if split else None,
            "*i32" if split else None,
            *("i32/16",) * 8,
            "i32",
            "i32/16",
            "i32",
            "fp32",
        ),
        constexprs=(
            ("KV_HEADS", heads.num_kv_heads),
            ("GROUP", group),
            ("HEAD_SIZE", heads.head_size),
            ("BLOCK_SIZE", heads.block_size),
            ("SPLIT", split),
            ("SPLIT_TOKENS", _SPLIT_TOKENS),
            ("IN_PAGE", heads.block_size % tile == 0),
            ("ROWS", rows),
            ("HEAD_BLOCK", head_block),
            ("TILE", tile),
        ),
        aligned=aligned,
        num_warps=num_warps,
        num_stages=num_stages,
        # Left to itself, NVIDIA's assembler spills a few registers to fit in another program; left too many, it spills
        # products in float32 as well.
        maxnreg=168 if not aligned else 128 if dtype.itemsize == 4 else None,
    )


# Programs at which splitting stops: nearly two for each of an H100's 132 SMs, one of which loads while the other
# computes.
_FULL = 256


@functools.lru_cache(maxsize=64)  # the same for all layers of a step
def splits(num_reqs: int, num_kv_heads: int, max_seq_len: int) -> int:
    """How many programs should share the context of a request, at most: a power of two."""
    programs = num_reqs * num_kv_heads
    count = 1
    while programs * count < _FULL and 2 * count * _SPLIT_TOKENS <= max_seq_len and count < _MAX_SPLITS:
        count *= 2
    return count


def _never(heads: Heads, dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    num_heads, num_kv_heads, head_size, block_size = heads
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"query has dtype {dtype}, not float16, bfloat16 or float32"
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        return f"query has {num_heads} heads, not a multiple of the {num_kv_heads} of key_cache"
    if num_heads // num_kv_heads > MAX_GROUP:
        return f"query has {num_heads // num_kv_heads} heads to one of key_cache, more than {MAX_GROUP}"
    if not 0 < head_size <= MAX_HEAD_SIZE or head_size % 8:
        return f"query has heads of {head_size} elements, not a multiple of 8 up to {MAX_HEAD_SIZE}"
    if block_size < 1:
        return f"key_cache has pages of {block_size} tokens, expected at least 1"
    return None


@functools.cache
def bind_decode_attention(heads: Heads, dtype: torch.dtype, device: int) -> Callable[..., None]:
    """`decode_attention` with everything settled that a layer knows for ever:

    attend(query_at, query_stride, query_head_stride, key_at, value_at, cache_strides, block_table_at,
    block_table_stride, seq_lens_at, out_at, out_stride, num_reqs, splits, scale)

    Addresses are integers, strides in elements; cache_strides: of the key cache's pages, tokens and heads, then of the
    value cache's. splits: what the function of that name says, which is the same for all layers of a step. Nothing is
    checked, and memory is the caller's to keep.

    What aligned tensors need is compiled now, the rest at first use.
    """
    if reason := _never(heads, dtype):
        raise Refused(reason)
    num_heads, num_kv_heads, head_size, _ = heads
    empty = allocator(device, torch.float32)

    @functools.cache
    def launch_for(split: bool, aligned: bool) -> Launch:
        return launcher(_build(heads, dtype, split, aligned), device)

    whole, split = launch_for(False, True), launch_for(True, True)

    def attend(
        query_at: int,
        query_stride: int,
        query_head_stride: int,
        key_at: int,
        value_at: int,
        cache_strides: tuple[int, int, int, int, int, int],
        block_table_at: int,
        block_table_stride: int,
        seq_lens_at: int,
        out_at: int,
        out_stride: int,
        num_reqs: int,
        splits: int,
        scale: float,
    ) -> None:
        k_block, k_slot, k_head, v_block, v_slot, v_head = cache_strides
        bits = query_at | key_at | value_at | block_table_at | seq_lens_at | out_at
        bits |= query_stride | query_head_stride | out_stride | k_block | k_slot | k_head | v_block | v_slot | v_head
        pairs = num_reqs * num_kv_heads
        if splits == 1:
            launch = launch_for(False, False) if bits & 15 else whole
            partial_at = stats_at = tickets_at = 0
        else:
            launch = launch_for(True, False) if bits & 15 else split
            rows = num_reqs * num_heads * splits
            # Freed on return, for what this stream does next. Rows first, whose alignment is that of the whole.
            partial = empty(rows, head_size + 2)
            partial_at = partial.data_ptr()
            stats_at = partial_at + rows * head_size * 4
            tickets_at = counters(device, pairs).data_ptr()
        launch(
            pairs * splits, query_at, key_at, value_at, block_table_at, seq_lens_at, out_at,
            partial_at, stats_at, tickets_at, query_stride, query_head_stride, k_block, k_slot, k_head,
            v_block, v_slot, v_head, block_table_stride, out_stride, splits, scale,
        )  # fmt: skip

    return attend


def _cache_refuses(name: str, cache: torch.Tensor, query: torch.Tensor, shape: torch.Size) -> str | None:
    if cache.dim() != 4 or cache.shape != shape or cache.dtype != query.dtype or cache.device != query.device:
        have = f"{cache.dtype} {tuple(cache.shape)} on {cache.device}"
        expected = "[num_blocks, block_size, num_kv_heads, head_size], key_cache and value_cache alike"
        return f"{name} is {have}, expected {query.dtype} {expected}, on {query.device}"
    strides = cache.stride()
    if strides[3] != 1:
        return f"{name} of strides {strides} has elements of a head apart"
    # Pages and heads are counted in 64 bits, the tokens of a page in 32.
    if max(strides) >= 2**31 or cache.shape[1] * strides[1] >= 2**31:
        return f"{name} of strides {strides} has tokens of a page 2**31 elements apart, or more"
    return None


def decode_attention_refuses(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    max_seq_len: int | None = None,
    out: torch.Tensor | None = None,
) -> str | None:
    """None if `decode_attention` does this, else why not."""
    if query.dim() != 3:
        return f"query of shape {tuple(query.shape)} is not [num_reqs, num_heads, head_size]"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"query has dtype {query.dtype}, not float16, bfloat16 or float32"
    num_reqs, num_heads, head_size = query.shape
    if query.stride(2) != 1:
        return f"query of strides {query.stride()} has elements of a head apart"
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if reason := _cache_refuses(name, cache, query, key_cache.shape):
            return reason
    if key_cache.shape[3] != head_size:
        return f"key_cache has heads of {key_cache.shape[3]} elements, query of {head_size}"
    if reason := _never(Heads(num_heads, key_cache.shape[2], head_size, key_cache.shape[1]), query.dtype):
        return reason
    if reason := pages_refuse(block_table, seq_lens, num_reqs, query.device):
        return reason
    if out is not None and (
        out.shape != query.shape
        or out.dtype != query.dtype
        or out.device != query.device
        or (num_reqs > 0 and not out[0].is_contiguous())
    ):
        have = f"{out.dtype} {tuple(out.shape)} of strides {out.stride()} on {out.device}"
        return f"out is {have}, expected {query.dtype} {tuple(query.shape)} on {query.device}, heads contiguous"
    return None


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    max_seq_len: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * query @ keys) @ values of each request's one token, over the tokens that its pages hold.

    query: [num_reqs, num_heads, head_size], float16, bfloat16 or float32; requests and heads may lie apart (a slice of
    qkv), elements of a head may not. key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size] views of
    query's dtype with any strides but the last; num_heads is a multiple of num_kv_heads, whose heads serve as many
    neighbours in query. block_table: [num_reqs, max_blocks] int32, the pages of each request, anything beyond them.
    seq_lens: [num_reqs] int32, tokens of each request with the present one, whose key and value are in the cache; zeros
    give zeros. max_seq_len: at least the largest of seq_lens; it only decides how the work is divided, as if the pages
    were full if it is None. out: [num_reqs, num_heads, head_size] to write, heads of a request contiguous, else a new
    tensor. Scores, softmax and sums are in float32; what multiplies the values is rounded to their dtype. Returns out.

    Source: https://arxiv.org/abs/2309.06180, split as in https://arxiv.org/abs/2311.01282. Raises Refused for what it
    does not do.
    """
    refusal = decode_attention_refuses(query, key_cache, value_cache, block_table, seq_lens, scale, max_seq_len, out)
    if refusal is not None:
        raise Refused(refusal)
    num_reqs, num_heads, head_size = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    heads = Heads(num_heads, num_kv_heads, head_size, block_size)
    attend = bind_decode_attention(heads, query.dtype, query.get_device())
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    longest = block_table.shape[1] * block_size if max_seq_len is None else max_seq_len
    attend(
        query.data_ptr(), query.stride(0), query.stride(1), key_cache.data_ptr(), value_cache.data_ptr(),
        (*key_cache.stride()[:3], *value_cache.stride()[:3]), block_table.data_ptr(), block_table.stride(0),
        seq_lens.data_ptr(), result.data_ptr(), result.stride(0), num_reqs,
        splits(num_reqs, num_kv_heads, longest), scale,
    )  # fmt: skip
    return result


def decode_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    max_seq_len: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor]:
    _, block_size, num_kv_heads, head_size = key_cache.shape
    result = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for request, seq_len in enumerate(seq_lens.tolist()):
        pages = block_table[request, : -(-seq_len // block_size)].long()
        key, value = (cache[pages].flatten(0, 1)[:seq_len] for cache in (key_cache, value_cache))
        heads = query[request].reshape(num_kv_heads, -1, head_size)
        p = (torch.einsum("hgd,thd->hgt", heads, key) * scale).softmax(dim=-1)
        result[request] = torch.einsum("hgt,thd->hgd", p, value).flatten(0, 1)
    return (result,)


# Query and KV heads.
_MODELS = {"qwen2.5-7b": (28, 4), "llama-3.1-8b": (32, 8)}

# Tokens of each request, and how many requests there are of them.
_BENCHED = {300: (1, 8, 32, 64, 256), 4096: (1, 32)}

_IN_PAGES = {"heads": (8, 2), "head_size": 64, "block_size": 64}

_CASES = (
    Case("one request", {"heads": (28, 4), "seq_lens": (37,)}),
    Case("ragged", {"heads": (28, 4), "seq_lens": (1, 16, 0, 33, 130), "poison": True}),
    Case("empty", {"heads": (28, 4), "seq_lens": ()}),
    Case("older layout", {"heads": (28, 4), "seq_lens": (20, 65), "unbind": 0}),
    Case("split", {"heads": (28, 4), "seq_lens": (400, 40, 0, 256), "poison": True}),
    Case("slice of qkv", {"heads": (32, 8), "seq_lens": (3, 20), "qkv": True}),
    Case("as many kv heads", {"heads": (4, 4), "head_size": 64, "seq_lens": (5, 70)}),
    Case("tiles in pages", {**_IN_PAGES, "seq_lens": (64, 1, 129), "poison": True}),
    Case("split in pages", {**_IN_PAGES, "seq_lens": (390, 150), "max_seq_len": None}),
    Case("odd pages and heads", {"heads": (6, 2), "head_size": 80, "block_size": 24, "seq_lens": (24, 50)}),
    Case("large heads", {"heads": (2, 2), "head_size": 256, "block_size": 32, "seq_lens": (40, 260)}),
    Case("more splits than it takes", {"heads": (20, 1), "seq_lens": (530,), "max_seq_len": 9999, "unbind": 1}),
    *(
        Case(f"{model} {seq_len} {num_reqs}", {"heads": heads, "seq_lens": (seq_len,) * num_reqs, "model": model}, True)
        for model, heads in _MODELS.items()
        for seq_len, counts in _BENCHED.items()
        for num_reqs in counts
    ),
)


def _heads(case: Case) -> Heads:
    num_heads, num_kv_heads = case["heads"]
    return Heads(num_heads, num_kv_heads, case.get("head_size", 128), case.get("block_size", 16))


def _caches(case: Case, num_blocks: int, dtype: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    _, num_kv_heads, head_size, block_size = _heads(case)
    if "unbind" in case.params:  # layouts of older releases of vLLM
        shape = [num_blocks, block_size, num_kv_heads, head_size]
        shape.insert(case["unbind"], 2)
        key, value = randn(shape, dtype, device).unbind(case["unbind"])
    else:
        both = randn((num_blocks, num_kv_heads, block_size, 2 * head_size), dtype, device)
        key, value = both.transpose(1, 2).split(head_size, dim=-1)
    return key, value


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    num_heads, _, head_size, block_size = _heads(case)
    seq_lens, poison = case["seq_lens"], case.get("poison", False)
    num_reqs, longest = len(seq_lens), max(seq_lens, default=0)
    num_blocks = sum(pages_for(seq_lens, block_size)) + 3
    key_cache, value_cache = _caches(case, num_blocks, dtype, device)
    block_table, unused = random_pages(seq_lens, block_size, num_blocks, device)
    if poison:
        # Infinities become NaN in a product with zero, and are equal to themselves where NaN is not.
        key_cache[unused] = float("inf")
        value_cache[unused] = float("inf")
    if case.get("qkv"):
        width = num_heads * head_size
        query = strided((num_reqs, width), dtype, device, 2 * head_size).view(num_reqs, num_heads, head_size)
    else:
        query = randn((num_reqs, num_heads, head_size), dtype, device)
    return {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": block_table,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32, device=device),
        "scale": head_size**-0.5,
        "max_seq_len": case.get("max_seq_len", longest),
    }


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    for split in (False, True):
        for is_aligned in (True, False):
            yield _build(_heads(case), dtype_of(dtype), split, is_aligned)


def _traffic(query: torch.Tensor, key_cache: torch.Tensor, seq_lens: torch.Tensor, **_: Any) -> int:
    token = 2 * key_cache.shape[2] * key_cache.shape[3] * key_cache.element_size()  # its key and its value
    return int(seq_lens.sum()) * token + 2 * nbytes(query)


DECODE_ATTENTION = Kernel(
    name="decode_attention",
    op=decode_attention,
    reference=decode_attention_reference,
    refuses=decode_attention_refuses,
    inputs=_inputs,
    results=("return",),
    cases=_CASES,
    builds=_builds,
    schema="decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "float scale, SymInt? max_seq_len=None) -> Tensor",
    fake=lambda query, *args, **named: torch.empty(query.shape, dtype=query.dtype, device=query.device),
    traffic=_traffic,
)

KERNELS = (DECODE_ATTENTION,)
