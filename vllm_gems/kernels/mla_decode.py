"""Paged multi-head latent attention of one query token per request: decoding in DeepSeek's models.

All query heads attend to one latent vector a token, whose first part is the value too. The programs share the tokens of
the whole batch evenly, whatever the requests' lengths are; a second launch puts together the requests that were shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import Refused
from ..launch import CPU, INTERPRETED, Build, Launch, allocator, launcher, pointer, triton_release
from ..nouns import Case, Kernel
from .common import dtype_of, nbytes, power_of_two, randn, strided
from .paged import pages_for, pages_refuse, random_pages

# An accumulator of 64 heads fills the registers of eight warps; with larger vectors it spills.
MAX_LATENT = 512
MAX_ROPE = 64

# Requests looked at together when the work is divided.
_REQS = 256

# Partial results of one head that a program of the second launch takes at a time, elements of each, and its warps. Few
# heads are spread over many programs with much on its way in each; with many, programs are what costs.
_MERGE_WIDE = (16, 128, 4)
_MERGE_NARROW = (4, 512, 1)
_MERGE_MANY = 1024


@triton.jit
def _mla_decode_kernel(
    # Tensors
    query_ptr,  # [num_reqs, HEADS, LATENT]
    query_rope_ptr,  # [num_reqs, HEADS, ROPE]
    cache_ptr,  # [num_blocks, BLOCK_SIZE, LATENT + ROPE], tokens of a page contiguous
    block_table_ptr,  # [num_reqs, max_blocks]
    seq_lens_ptr,  # [num_reqs]
    out_ptr,  # [num_reqs, HEADS, LATENT], heads of a request contiguous
    lse_ptr,  # [num_reqs, HEADS]
    partial_ptr,  # [2 * shares, head tiles, ROWS, LATENT], results of pieces of requests; None without SPLIT
    partial_lse_ptr,  # [2 * shares, head tiles, ROWS], to base 2; None without SPLIT
    pieces_ptr,  # [num_reqs, 2], the first piece of a request, and how many there are; None without SPLIT
    # Scalars, strides in elements
    query_stride,
    query_head_stride,
    query_rope_stride,
    query_rope_head_stride,
    cache_block_stride,
    block_table_stride,
    out_stride,
    num_reqs,
    shares,  # that the tokens of all requests are divided into
    scale,
    # Constexprs
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # tokens of a page
    SPLIT: tl.constexpr,
    IN_PAGE: tl.constexpr,  # no tile crosses the end of a page
    ROWS: tl.constexpr,  # heads
    TILE: tl.constexpr,  # tokens
    REQS: tl.constexpr,
):
    # Tiles of heads that go over the same tokens are neighbours, so that one of them finds these in the L2 cache.
    HEAD_TILES: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    WIDTH: tl.constexpr = LATENT + ROPE
    piece = tl.program_id(0) // HEAD_TILES
    head_tile = tl.program_id(0) % HEAD_TILES
    if SPLIT:
        # A share of all tiles. A request without tokens has a tile too, from which its zeros come.
        total = 0
        for base in range(0, num_reqs, REQS):
            at = base + tl.arange(0, REQS)
            length = tl.load(seq_lens_ptr + at, mask=at < num_reqs, other=0)
            total += tl.sum(tl.where(at < num_reqs, tl.maximum(tl.cdiv(length, TILE), 1), 0))
        share = tl.cdiv(total, shares)
        # Programs with a full share come first, then those with the rest of a request: short ones fill the gaps.
        full_pieces = 0
        for base in range(0, num_reqs, REQS):
            at = base + tl.arange(0, REQS)
            length = tl.load(seq_lens_ptr + at, mask=at < num_reqs, other=0)
            full_pieces += tl.sum(tl.maximum(tl.cdiv(length, TILE), 1) // share * (at < num_reqs).to(tl.int32))
        is_rest = piece >= full_pieces
        index = piece - tl.where(is_rest, full_pieces, 0)
        # The request is the one after those whose pieces of this kind all come before.
        found = 0
        full_before = 0
        same_before = 0
        full_base = 0
        same_base = 0
        for base in range(0, num_reqs, REQS):
            at = base + tl.arange(0, REQS)
            length = tl.load(seq_lens_ptr + at, mask=at < num_reqs, other=0)
            tiles = tl.where(at < num_reqs, tl.maximum(tl.cdiv(length, TILE), 1), 0)
            full = tiles // share
            same = tl.where(is_rest, (tiles % share > 0).to(tl.int32), full)
            full_ends = full_base + tl.cumsum(full, axis=0)
            same_ends = same_base + tl.cumsum(same, axis=0)
            passed = (at < num_reqs) & (same_ends <= index)
            found += tl.sum(passed.to(tl.int32))
            full_before = tl.maximum(full_before, tl.max(tl.where(passed, full_ends, 0)))
            same_before = tl.maximum(same_before, tl.max(tl.where(passed, same_ends, 0)))
            full_base += tl.sum(full)
            same_base += tl.sum(same)
        if found >= num_reqs:
            return
        request = tl.cast(found, tl.int64)
        seq_len = tl.load(seq_lens_ptr + request)
        tiles = tl.maximum(tl.cdiv(seq_len, TILE), 1)
        full = tiles // share
        first = tl.where(is_rest, full, index - same_before) * share
        last = tl.minimum(first + share, tiles)
    else:
        request = piece.to(tl.int64)
        seq_len = tl.load(seq_lens_ptr + request)
        first = 0
        last = tl.maximum(tl.cdiv(seq_len, TILE), 1)

    row = tl.arange(0, ROWS)
    head = head_tile * ROWS + row
    head_live = head < HEADS
    dim = tl.arange(0, LATENT)
    dim_rope = tl.arange(0, ROPE)
    tokens = tl.arange(0, TILE)
    query_ptr += request * query_stride
    query_rope_ptr += request * query_rope_stride
    query_at = query_ptr + head[:, None] * query_head_stride + dim[None, :]
    query_rope_at = query_rope_ptr + head[:, None] * query_rope_head_stride + dim_rope[None, :]
    query = tl.load(query_at, mask=head_live[:, None], other=0.0)
    query_rope = tl.load(query_rope_at, mask=head_live[:, None], other=0.0)

    # Powers of two instead of e.
    log2_scale = scale * 1.4426950408889634
    pages_ptr = block_table_ptr + request * block_table_stride
    # From a number, because a tile without tokens has minus infinity, whose difference from itself would be NaN.
    top = tl.full((ROWS,), -3.0e38, tl.float32)
    sum_p = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, LATENT), tl.float32)
    # A page is asked for one tile ahead: otherwise the compiler, seeing loads that wait for loads, would ask for a tile
    # only when the one before it is done. The table is garbage beyond the request's pages.
    if IN_PAGE:
        page = tl.load(pages_ptr + first * TILE // BLOCK_SIZE, mask=first * TILE < seq_len, other=0)
    else:
        page = tl.load(pages_ptr + (first * TILE + tokens) // BLOCK_SIZE, mask=first * TILE + tokens < seq_len, other=0)
    for tile in range(first, last):
        token = tile * TILE + tokens
        live = token < seq_len
        block_ptr = cache_ptr + page.to(tl.int64) * cache_block_stride
        if IN_PAGE:
            token_ptr = block_ptr + tile * TILE % BLOCK_SIZE * WIDTH + (tokens * WIDTH)[:, None]
            page = tl.load(pages_ptr + (tile + 1) * TILE // BLOCK_SIZE, mask=tile + 1 < last, other=0)
        else:
            token_ptr = (block_ptr + token % BLOCK_SIZE * WIDTH)[:, None]
            page = tl.load(pages_ptr + (token + TILE) // BLOCK_SIZE, mask=token + TILE < seq_len, other=0)
        # One tile in shared memory for both products: as keys, and as values.
        latent = tl.load(token_ptr + dim[None, :], mask=live[:, None], other=0.0)
        rope = tl.load(token_ptr + LATENT + dim_rope[None, :], mask=live[:, None], other=0.0)

        score = tl.dot(query_rope, tl.trans(rope), input_precision="ieee")
        score = tl.dot(query, tl.trans(latent), score, input_precision="ieee") * log2_scale
        score = tl.where(live[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        sum_p = sum_p * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee")
        top = higher

    # Zeros and minus infinity for a request without tokens.
    divisor = tl.where(sum_p == 0.0, 1.0, sum_p)
    lse = tl.where(sum_p == 0.0, float("-inf"), top + tl.log2(divisor))
    inverse = 1.0 / divisor
    result = acc * inverse[:, None]
    if SPLIT:
        count = tl.cdiv(tiles, share)
        if (first == 0) & (head_tile == 0):
            tl.store(pieces_ptr + request * 2, piece)
            tl.store(pieces_ptr + request * 2 + 1, tl.where(count == 1, 0, full * 2 + count - full))
        if count > 1:
            # A rest lies as far behind the full shares as its request's first piece behind the first of all.
            place = tl.where(is_rest, shares + full_before, piece).to(tl.int64) * HEAD_TILES * ROWS + head_tile * ROWS
            tl.store(partial_ptr + place * LATENT + (row * LATENT)[:, None] + dim[None, :], result)
            tl.store(partial_lse_ptr + place + row, lse)
            return
    out_at = request * out_stride + head_tile * (ROWS * LATENT)
    result = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at + (row * LATENT)[:, None] + dim[None, :], result, mask=head_live[:, None])
    tl.store(lse_ptr + request * HEADS + head, lse * 0.6931471805599453, mask=head_live)


@triton.jit
def _mla_merge_kernel(
    # Tensors
    partial_ptr,  # [2 * shares, PADDED_HEADS, LATENT]
    partial_lse_ptr,  # [2 * shares, PADDED_HEADS]
    pieces_ptr,  # [num_reqs, 2]
    out_ptr,  # [num_reqs, HEADS, LATENT], heads of a request contiguous
    lse_ptr,  # [num_reqs, HEADS]
    # Scalars, strides in elements
    out_stride,
    shares,
    # Constexprs
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,  # whole tiles of them
    LATENT: tl.constexpr,
    PIECES: tl.constexpr,  # taken together
    BLOCK: tl.constexpr,  # elements of a head
):
    PARTS: tl.constexpr = LATENT // BLOCK
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % HEADS
    request = (tl.program_id(0) // (PARTS * HEADS)).to(tl.int64)
    found = tl.load(pieces_ptr + request * 2 + 1)
    if found == 0:  # it was one piece, whose program wrote the result
        return
    first = tl.load(pieces_ptr + request * 2)
    full = found // 2
    count = full + found % 2
    dim = part * BLOCK + tl.arange(0, BLOCK)
    top = -3.0e38
    total = 0.0
    acc = tl.zeros((BLOCK,), tl.float32)
    # In the order of the pieces: the same result every time.
    for base in range(0, count, PIECES):
        each = base + tl.arange(0, PIECES)
        live = each < count
        place = tl.where(each < full, each, shares).to(tl.int64) + first
        lse = tl.load(partial_lse_ptr + place * PADDED_HEADS + head, mask=live, other=float("-inf"))
        at = (place * PADDED_HEADS + head)[:, None] * LATENT + dim[None, :]
        part_result = tl.load(partial_ptr + at, mask=live[:, None], other=0.0)
        higher = tl.maximum(top, tl.max(lse, axis=0))
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(lse - higher)
        total = total * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink + tl.sum(part_result * weight[:, None], axis=0)
        top = higher
    tl.store(out_ptr + request * out_stride + head * LATENT + dim, (acc / total).to(out_ptr.dtype.element_ty))
    if part == 0:
        tl.store(lse_ptr + request * HEADS + head, (top + tl.log2(total)) * 0.6931471805599453)


class Latents(NamedTuple):
    """What an attention layer knows for ever."""

    num_heads: int
    latent: int  # elements that are keys and values
    rope: int  # elements that are keys only
    block_size: int  # tokens of a page


# Query heads of a program: the fewest that matrix products have. With more, fewer programs would read a tile, but with
# 32 an SM holds one program, and there is not the shared memory everywhere to have another tile on its way. With 64,
# for which Hopper has wgmma, the assembler spills: LLVM takes the descriptors of the query out of the loop, 36 of two
# registers each, beside 128 of sums.
_ROWS = 16

# Programs that an SM holds by their registers.
_RESIDENT = 2


def _tiling(itemsize: int, aligned: bool) -> tuple[int, int, int, int | None]:
    """(tokens of a tile, warps, stages, registers), by reasoning for an H100, from what the compiler makes of it.

    A token has 1152 bytes in 16 bits, and a tile of 32 is 36 KiB, which is all that an SM needs on its way to keep its
    share of the memory busy. Two stages are one tile in shared memory, asked for when the one before it is done: an SM
    has two programs, one of which waits while the other computes. A third stage would be a second tile, which AMD's
    64 KiB do not hold. Four warps, because each of them reads the whole query from shared memory for every tile.

    Products in float32 take whole rows of a tile into registers, as narrow loads do, which are not made ahead.
    """
    if aligned and itemsize == 2:
        # Left to itself, NVIDIA's assembler spills a few registers to fit in more programs.
        return 32, 4, 2, 240
    return 16, 4 if itemsize == 4 else 8, 1, None


def _build(latents: Latents, dtype: torch.dtype, split: bool, aligned: bool = True) -> Build:
    tile, num_warps, num_stages, maxnreg = _tiling(dtype.itemsize, aligned)
    x = pointer(dtype)
    return Build(
        function=_mla_decode_kernel,
        types=(
            x,
            x,
            x,
            "*i32",
            "*i32",
            x,
            "*fp32",
            "*fp32" if split else None,
            "*fp32" if split else None,
            "*i32" if split else None,
            *("i32/16",) * 5,
            "i32",
            "i32/16",
            "i32",
            "i32",
            "fp32",
        ),
        constexprs=(
            ("HEADS", latents.num_heads),
            ("LATENT", latents.latent),
            ("ROPE", latents.rope),
            ("BLOCK_SIZE", latents.block_size),
            ("SPLIT", split),
            ("IN_PAGE", latents.block_size % tile == 0),
            ("ROWS", _ROWS),
            ("TILE", tile),
            ("REQS", _REQS),
        ),
        aligned=aligned,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
    )


def _merge_build(latents: Latents, dtype: torch.dtype, wide: bool, aligned: bool = True) -> Build:
    pieces, block, num_warps = _MERGE_WIDE if wide else _MERGE_NARROW
    return Build(
        function=_mla_merge_kernel,
        types=("*fp32", "*fp32", "*i32", pointer(dtype), "*fp32", "i32/16", "i32"),
        constexprs=(
            ("HEADS", latents.num_heads),
            ("PADDED_HEADS", triton.cdiv(latents.num_heads, _ROWS) * _ROWS),
            ("LATENT", latents.latent),
            ("PIECES", pieces),
            ("BLOCK", min(block, latents.latent)),
        ),
        aligned=aligned,
        num_warps=num_warps,
    )


@functools.cache
def _multiprocessors(device: int) -> int:
    if device == CPU:
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shares(num_reqs: int, num_heads: int, max_seq_len: int, device: int) -> int:
    """Into how many parts the tokens of a batch should be divided: what runs at once, if there is so much; 1: not.

    A second launch puts together what belongs to one request. The last program of a request to finish could do that
    without a launch, but it would be one: of 65536 tokens, of which each of 264 programs had its share, it would read
    264 * 16 * 512 floats, 8.7 MB, which takes an SM 80 us. Spread over all of them it takes 3, and the launch 1 or 2.
    At 32 requests of 1024 tokens, which are 8 pieces each, both would take 2 to 3.
    """
    most = _most_shares(num_heads, device)
    count = max(1, num_reqs * -(-max_seq_len // 32))  # without triton.cdiv: this is asked at every layer
    # Below, rounded down to three binary digits: a context that grows changes it seldom, and launches that are recorded
    # are recorded for each.
    unit = 1 << max(count.bit_length() - 3, 0)
    return most if count >= most else count // unit * unit


@functools.cache
def _most_shares(num_heads: int, device: int) -> int:
    return max(1, _RESIDENT * _multiprocessors(device) // triton.cdiv(num_heads, _ROWS))


def _never(latents: Latents, dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    num_heads, latent, rope, block_size = latents
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"query has dtype {dtype}, not float16, bfloat16 or float32"
    if num_heads < 1:
        return "query has no heads"
    if not 16 <= latent <= MAX_LATENT or latent != power_of_two(latent):
        return f"latent is {latent}, not a power of two from 16 to {MAX_LATENT}"
    if not 16 <= rope <= MAX_ROPE or rope != power_of_two(rope):
        return f"query has {rope} elements beside latent, not a power of two from 16 to {MAX_ROPE}"
    if block_size < 1:
        return f"kv_cache has pages of {block_size} tokens, expected at least 1"
    return None


# The release of Triton whose Gluon the Hopper kernel was written against and run with. 3.9 compiles it, too, but was
# never run, and without SPLIT it spills for pages of 16 and of 128 tokens.
GLUON = (3, 6)


@functools.cache
def hopper_refuses(latents: Latents, dtype: torch.dtype, device: int) -> str | None:
    """None if `bind_mla_decode` takes the kernel for Hopper's tensor cores, else why the portable one."""
    num_heads, latent, rope, block_size = latents
    if device == CPU or INTERPRETED:
        return "no GPU runs it"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return "the GPU is no Hopper"
    if triton_release() != GLUON:
        return f"Triton is {triton.__version__}, whose Gluon may be another than that of {GLUON[0]}.{GLUON[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"query has dtype {dtype}, not float16 or bfloat16"
    if num_heads % 64:
        return f"query has {num_heads} heads, not a multiple of 64"
    if (latent, rope) != (512, 64):
        return f"query has {latent} and {rope} elements, not 512 and 64"
    if 64 % block_size and block_size % 64:
        return f"kv_cache has pages of {block_size} tokens, neither a divisor nor a multiple of 64"
    return None


def hopper_build(latents: Latents, dtype: torch.dtype, split: bool) -> Build:
    """Of aligned tensors alone."""
    from .mla_decode_hopper import mla_decode_hopper_kernel

    x = pointer(dtype)
    return Build(
        function=mla_decode_hopper_kernel,
        types=(
            x, x, x, "*i32", "*i32", x, "*fp32", *(("*fp32", "*fp32", "*i32") if split else (None,) * 3),
            *("i32/16",) * 5, "i32", "i32/16", "i32", "i32", "fp32",
        ),
        constexprs=(
            ("HEADS", latents.num_heads), ("BLOCK_SIZE", latents.block_size), ("SPLIT", split), ("REQS", _REQS),
        ),
    )  # fmt: skip


@functools.cache
def bind_mla_decode(latents: Latents, dtype: torch.dtype, device: int) -> Callable[..., None]:
    """`mla_decode` with everything settled that a layer knows for ever:

    attend(query_at, query_stride, query_head_stride, rope_at, rope_stride, rope_head_stride, cache_at,
    cache_block_stride, block_table_at, block_table_stride, seq_lens_at, out_at, out_stride, lse_at, num_reqs, shares,
    scale)

    Addresses are integers, strides in elements; the query's two parts may be two tensors. shares: what the function of
    that name says, which is the same for all layers of a step; with 1 a request's result does not depend on the others.
    Nothing is checked, and memory is the caller's to keep.

    What aligned tensors need is compiled now, the rest at first use.
    """
    if reason := _never(latents, dtype):
        raise Refused(reason)
    num_heads, latent, _, _ = latents
    head_tiles = triton.cdiv(num_heads, _ROWS)
    padded_heads = head_tiles * _ROWS
    empty = allocator(device, torch.float32)

    @functools.cache
    def launch_for(split: bool, aligned: bool) -> Launch:
        return launcher(_build(latents, dtype, split, aligned), device)

    @functools.cache
    def merge_for(wide: bool, aligned: bool) -> Launch:
        return launcher(_merge_build(latents, dtype, wide, aligned), device)

    whole, split = launch_for(False, True), launch_for(True, True)
    merge_wide, merge_narrow = merge_for(True, True), merge_for(False, True)
    hopper: Any = None
    if hopper_refuses(latents, dtype, device) is None:
        hopper = tuple(launcher(hopper_build(latents, dtype, is_split), device) for is_split in (False, True))
        hopper_tiles, hopper_most = num_heads // 64, max(1, _multiprocessors(device) // (num_heads // 64))

    def attend(
        query_at: int,
        query_stride: int,
        query_head_stride: int,
        rope_at: int,
        rope_stride: int,
        rope_head_stride: int,
        cache_at: int,
        cache_block_stride: int,
        block_table_at: int,
        block_table_stride: int,
        seq_lens_at: int,
        out_at: int,
        out_stride: int,
        lse_at: int,
        num_reqs: int,
        shares: int,
        scale: float,
    ) -> None:
        bits = query_at | rope_at | cache_at | block_table_at | seq_lens_at | out_at | lse_at
        bits |= query_stride | query_head_stride | rope_stride | rope_head_stride | cache_block_stride | out_stride
        own = hopper is not None and not bits & 15
        if own and shares > 1:
            shares = max(2, hopper_most * shares // _most_shares(num_heads, device))
        if shares == 1:
            launch = hopper[0] if own else launch_for(False, False) if bits & 15 else whole
            programs = num_reqs * (hopper_tiles if own else head_tiles)
            launch(
                programs, query_at, rope_at, cache_at, block_table_at, seq_lens_at, out_at, lse_at,
                0, 0, 0, query_stride, query_head_stride, rope_stride, rope_head_stride, cache_block_stride,
                block_table_stride, out_stride, num_reqs, 1, scale,
            )  # fmt: skip
            return
        # Freed on return, for what this stream does next. Results first, whose alignment is that of the whole.
        rows = 2 * shares * padded_heads
        scratch = empty(1, rows * (latent + 1) + 2 * num_reqs)
        partial_at = scratch.data_ptr()
        partial_lse_at = partial_at + rows * latent * 4
        pieces_at = partial_lse_at + rows * 4
        wide = num_reqs * num_heads < _MERGE_MANY
        # As many full shares as there are at most, and the rest of each request; a program of Hopper's goes on to the
        # next request.
        programs = (shares + num_reqs) * head_tiles
        if own:
            launch, merge = hopper[1], merge_wide if wide else merge_narrow
            programs = shares * hopper_tiles
        elif bits & 15:
            launch, merge = launch_for(True, False), merge_for(wide, False)
        else:
            launch, merge = split, merge_wide if wide else merge_narrow
        launch(
            programs, query_at, rope_at, cache_at, block_table_at, seq_lens_at, out_at, lse_at,
            partial_at, partial_lse_at, pieces_at, query_stride, query_head_stride, rope_stride, rope_head_stride,
            cache_block_stride, block_table_stride, out_stride, num_reqs, shares, scale,
        )  # fmt: skip
        block = min((_MERGE_WIDE if wide else _MERGE_NARROW)[1], latent)
        merge(
            num_reqs * num_heads * (latent // block), partial_at, partial_lse_at, pieces_at, out_at, lse_at, out_stride,
            shares,
        )  # fmt: skip

    return attend


def mla_decode_refuses(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    latent: int,
    max_seq_len: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> str | None:
    """None if `mla_decode` does this, else why not."""
    if query.dim() != 3:
        return f"query of shape {tuple(query.shape)} is not [num_reqs, num_heads, latent + rope]"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"query has dtype {query.dtype}, not float16, bfloat16 or float32"
    num_reqs, num_heads, width = query.shape
    if query.stride(2) != 1 or (num_heads - 1) * query.stride(1) >= 2**31:
        return f"query of strides {query.stride()} has elements of a head apart, or heads 2**31 elements apart"
    if kv_cache.dtype != query.dtype:
        return f"kv_cache has dtype {kv_cache.dtype}, query {query.dtype}"
    if kv_cache.dim() != 3 or kv_cache.shape[2] != width or kv_cache.device != query.device:
        have = f"{tuple(kv_cache.shape)} on {kv_cache.device}"
        return f"kv_cache is {have}, expected [num_blocks, block_size, {width}] on {query.device}"
    if kv_cache.stride()[1:] != (width, 1) or kv_cache.stride(0) >= 2**31:
        return f"kv_cache of strides {kv_cache.stride()} has tokens of a page apart, or pages 2**31 elements"
    if reason := _never(Latents(num_heads, latent, width - latent, kv_cache.shape[1]), query.dtype):
        return reason
    if reason := pages_refuse(block_table, seq_lens, num_reqs, query.device):
        return reason
    if out is not None and (
        out.shape != (num_reqs, num_heads, latent)
        or out.dtype != query.dtype
        or out.device != query.device
        or (num_reqs > 0 and not out[0].is_contiguous())
    ):
        have = f"{out.dtype} {tuple(out.shape)} of strides {out.stride()} on {out.device}"
        wanted = f"{query.dtype} {(num_reqs, num_heads, latent)} on {query.device}"
        return f"out is {have}, expected {wanted}, heads contiguous"
    if lse is not None and (
        lse.shape != (num_reqs, num_heads)
        or lse.dtype != torch.float32
        or lse.device != query.device
        or not lse.is_contiguous()
    ):
        have = f"{lse.dtype} {tuple(lse.shape)} of strides {lse.stride()} on {lse.device}"
        return f"lse is {have}, expected torch.float32 {(num_reqs, num_heads)} on {query.device}, contiguous"
    return None


def mla_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    latent: int,
    max_seq_len: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * query @ keys) @ values of each request's one token, over the tokens that its pages hold, and the
    logarithm of the sum that the softmax divides by.

    query: [num_reqs, num_heads, latent + rope], float16, bfloat16 or float32; requests and heads may lie apart,
    elements of a head may not. kv_cache: [num_blocks, block_size, latent + rope] of query's dtype, the keys of all
    heads; their first `latent` elements are the values. Pages may lie apart, the tokens of one may not. latent and
    rope: powers of two, from 16 to 512 and to 64. block_table: [num_reqs, max_blocks] int32, the pages of each request,
    anything beyond them. seq_lens: [num_reqs] int32, tokens of each request with the present one, which is in the
    cache; zeros give zeros, and minus infinity. max_seq_len: at least the largest of seq_lens; it only decides how the
    work is divided, as if the pages were full if it is None. out: [num_reqs, num_heads, latent] to write, heads of a
    request contiguous, lse: [num_reqs, num_heads] float32, contiguous; else new tensors. Scores, softmax and sums are
    in float32; what multiplies the values is rounded to their dtype. Returns out and lse.

    Source: https://arxiv.org/abs/2405.04434, split as in https://arxiv.org/abs/2311.01282. Raises Refused for what it
    does not do.
    """
    refusal = mla_decode_refuses(query, kv_cache, block_table, seq_lens, scale, latent, max_seq_len, out, lse)
    if refusal is not None:
        raise Refused(refusal)
    num_reqs, num_heads, width = query.shape
    block_size, device = kv_cache.shape[1], query.get_device()
    attend = bind_mla_decode(Latents(num_heads, latent, width - latent, block_size), query.dtype, device)
    if out is None:
        out = torch.empty((num_reqs, num_heads, latent), dtype=query.dtype, device=query.device)
    if lse is None:
        lse = torch.empty((num_reqs, num_heads), dtype=torch.float32, device=query.device)
    longest = block_table.shape[1] * block_size if max_seq_len is None else max_seq_len
    if num_reqs:
        strides = query.stride()[:2]
        attend(
            query.data_ptr(), *strides, query.data_ptr() + latent * query.element_size(), *strides,
            kv_cache.data_ptr(), kv_cache.stride(0), block_table.data_ptr(), block_table.stride(0),
            seq_lens.data_ptr(), out.data_ptr(), out.stride(0), lse.data_ptr(), num_reqs,
            shares(num_reqs, num_heads, longest, device), scale,
        )  # fmt: skip
    return out, lse


def mla_decode_reference(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    latent: int,
    max_seq_len: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_reqs, num_heads, _ = query.shape
    result = torch.zeros((num_reqs, num_heads, latent), dtype=query.dtype, device=query.device)
    logs = torch.full((num_reqs, num_heads), float("-inf"), dtype=query.dtype, device=query.device)
    for request, seq_len in enumerate(seq_lens.tolist()):
        if seq_len > 0:
            pages = block_table[request, : -(-seq_len // kv_cache.shape[1])].long()
            keys = kv_cache[pages].flatten(0, 1)[:seq_len]
            scores = query[request] @ keys.T * scale
            result[request] = scores.softmax(dim=-1) @ keys[:, :latent]
            logs[request] = scores.logsumexp(dim=-1)
    return result, logs


# Query heads, and the tokens of each request with how many requests there are of them.
_MODELS = {"deepseek-v2-lite": 16, "deepseek-v3": 128}
_BENCHED = {1024: (1, 32, 128), 8192: (1, 32, 128), 65536: (1,)}

_CASES = (
    Case("one request", {"heads": 16, "seq_lens": (37,)}),
    Case("ragged", {"heads": 16, "seq_lens": (1, 16, 0, 33, 130), "poison": True}),
    Case("not shared", {"heads": 8, "seq_lens": (1, 0, 16, 9), "max_seq_len": 0, "poison": True}),
    Case("empty", {"heads": 16, "seq_lens": ()}),
    Case("tiles in pages", {"heads": 24, "block_size": 64, "seq_lens": (64, 1, 129), "poison": True}),
    Case("odd pages", {"heads": 8, "block_size": 24, "seq_lens": (24, 50, 0)}),
    Case("few shares", {"heads": 128, "seq_lens": (150, 0, 64), "max_seq_len": 32, "poison": True}),
    Case("full pages unknown", {"heads": 64, "block_size": 64, "seq_lens": (70, 20), "max_seq_len": None}),
    Case("query of a wider tensor", {"heads": 16, "seq_lens": (3, 20), "strided": True}),
    Case("misaligned query", {"heads": 16, "seq_lens": (3, 70), "strided": True, "offset": 1}),
    Case("pages apart", {"heads": 16, "seq_lens": (50, 8), "apart": True}),
    Case("model's sizes", {"heads": 16, "latent": 512, "rope": 64, "seq_lens": (70, 0)}),
    Case("model's sizes in pages", {"heads": 24, "latent": 512, "rope": 64, "block_size": 64, "seq_lens": (65,)}),
    *(
        Case(
            f"{model} {seq_len} {num_reqs}",
            {"heads": heads, "latent": 512, "rope": 64, "block_size": 64, "seq_lens": (seq_len,) * num_reqs},
            True,
        )
        for model, heads in _MODELS.items()
        for seq_len, counts in _BENCHED.items()
        for num_reqs in counts
    ),
)


def _latents(case: Case) -> Latents:
    return Latents(case["heads"], case.get("latent", 64), case.get("rope", 32), case.get("block_size", 16))


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    num_heads, latent, rope, block_size = _latents(case)
    seq_lens, poison = case["seq_lens"], case.get("poison", False)
    num_reqs, longest, width = len(seq_lens), max(seq_lens, default=0), latent + rope
    num_blocks = sum(pages_for(seq_lens, block_size)) + 3
    gap = 16 * width if case.get("apart") else 0
    kv_cache = strided((num_blocks, block_size * width), dtype, device, gap).unflatten(1, (block_size, width))
    block_table, unused = random_pages(seq_lens, block_size, num_blocks, device)
    if poison:
        # Infinities become NaN in a product with zero, and are equal to themselves where NaN is not.
        kv_cache[unused] = float("inf")
    if case.get("strided"):
        query = strided((num_reqs, num_heads, width), dtype, device, 32, case.get("offset", 0))
    else:
        query = randn((num_reqs, num_heads, width), dtype, device)
    return {
        "query": query,
        "kv_cache": kv_cache,
        "block_table": block_table,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32, device=device),
        "scale": width**-0.5,
        "latent": latent,
        "max_seq_len": case.get("max_seq_len", longest),
    }


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    for is_aligned in (True, False):
        for either in (True, False):
            yield _build(_latents(case), dtype_of(dtype), either, is_aligned)
            yield _merge_build(_latents(case), dtype_of(dtype), either, is_aligned)


def _fake(
    query: torch.Tensor,
    kv_cache: Any,
    block_table: Any,
    seq_lens: Any,
    scale: float,
    latent: int,
    max_seq_len: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_reqs, num_heads, _ = query.shape
    out = torch.empty((num_reqs, num_heads, latent), dtype=query.dtype, device=query.device)
    return out, torch.empty((num_reqs, num_heads), dtype=torch.float32, device=query.device)


def _traffic(query: torch.Tensor, kv_cache: torch.Tensor, seq_lens: torch.Tensor, latent: int, **_: Any) -> int:
    rows = query.shape[0] * query.shape[1]
    token = kv_cache.shape[2] * kv_cache.element_size()
    return int(seq_lens.sum()) * token + nbytes(query) + rows * (latent * query.element_size() + 4)


MLA_DECODE = Kernel(
    name="mla_decode",
    op=mla_decode,
    reference=mla_decode_reference,
    refuses=mla_decode_refuses,
    inputs=_inputs,
    results=("return.0", "return.1"),
    cases=_CASES,
    builds=_builds,
    schema="mla_decode(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, float scale, SymInt latent, "
    "SymInt? max_seq_len=None) -> (Tensor, Tensor)",
    fake=_fake,
    traffic=_traffic,
)

KERNELS = (MLA_DECODE,)
