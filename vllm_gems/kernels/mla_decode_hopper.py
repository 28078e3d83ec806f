"""`mla_decode` for 64 heads and their multiples on Hopper, in Gluon: the tensor cores kept busy by three warp groups.

With so many heads the products are what counts, and what Triton's own compiler makes of the portable kernel keeps the
sums of 64 heads, 64 by 512 in float32, in the registers of one group of warps, which then multiplies and waits in turn.
Here a program is 64 heads of consecutive tokens and has three groups of four warps. One brings tiles of 64 tokens from
the cache to shared memory, two at a time. The other two each take the scores of one tile of a pair, hand the
exponentials to each other through shared memory, where the tile's rotated part was, and each multiplies both with its
half of the 512 columns. So every tile is read once, and one group's products hide the other's exponentials. The scheme
is FlashMLA's (https://github.com/deepseek-ai/FlashMLA), the code is not.

Work is divided as in the portable kernel, in shares of a line of all requests' tokens, here in pairs of tiles, and what
is left in pieces is put together by the same second launch.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Its name in Triton 3.9, or else that in 3.6.
_load_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

ROWS = gl.constexpr(64)
LATENT = gl.constexpr(512)
HALF = gl.constexpr(256)
ROPE = gl.constexpr(64)
WIDTH = gl.constexpr(576)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
_COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_LINE = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))

# Of a thread. Together what an SM has, with what the first four warps, which are a consumer, were started with.
_CONSUMER_REGISTERS = gl.constexpr(224)
_PRODUCER_REGISTERS = gl.constexpr(56)

# Barriers.
_Q_FULL = gl.constexpr(0)
_Q_EMPTY = gl.constexpr(1)
_FULL = gl.constexpr(2)  # + 2 * tile + half
_EMPTY = gl.constexpr(6)  # + 2 * tile + half
_P = gl.constexpr(10)  # + tile
_L = gl.constexpr(12)  # + half
_BARRIERS = gl.constexpr(14)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _pairs_of(seq_lens_ptr, base, num_reqs, REQS: gl.constexpr):
    at = base + gl.arange(0, REQS, layout=_LINE)
    length = gl.load(seq_lens_ptr + at, mask=at < num_reqs, other=0)
    return gl.where(at < num_reqs, gl.maximum((length + 127) // 128, 1), 0)


@gluon.jit
def _share(seq_lens_ptr, num_reqs, shares, index, REQS: gl.constexpr):
    """(pairs of a share, the request that share `index` begins in, with which of its pairs, how many pairs it has, none
    if that is below 1)."""
    total = 0
    for base in range(0, num_reqs, REQS):
        total += gl.sum(_pairs_of(seq_lens_ptr, base, num_reqs, REQS), axis=0)
    share = (total + shares - 1) // shares
    start = index * share
    todo = gl.minimum(total - start, share)
    request = 0
    before = 0
    end = 0
    for base in range(0, num_reqs, REQS):
        pairs = _pairs_of(seq_lens_ptr, base, num_reqs, REQS)
        ends = end + gl.associative_scan(pairs, 0, _plus)
        passed = (ends <= start) & (pairs > 0)
        request += gl.sum(passed.to(gl.int32), axis=0)
        before = gl.maximum(before, gl.max(gl.where(passed, ends, 0), axis=0))
        end += gl.sum(pairs, axis=0)
    return share, request, start - before, todo


@gluon.jit
def _pieces(whole, line, pairs, share, index):
    """What the merge is told of a request of `pairs` that begins at `line`, in share `index`: 0 if it is whole, else
    twice the number of pieces after the first, and one. The first counts as the rest, which has a place of its own.
    """
    others = gl.where(whole, 0, (line + pairs - 1) // share - index)
    return gl.where(whole, 0, 2 * others + 1)


@gluon.jit
def _place(position, index, shares):
    """Of what share `index` has of a request, from pair `position` on. A share has at most one piece that begins its
    request and one that goes on with it; the merge looks for the one that begins it at `shares` and `index + 1`."""
    return gl.where(position == 0, shares + index + 1, index)


@gluon.jit
def _page(pages_ptr, first, row, stop, BLOCK_SIZE: gl.constexpr):
    """Of each row of the tile that begins with token `first`, none of which is `stop` or beyond."""
    token = first + row
    if BLOCK_SIZE % 64 == 0:
        token = first  # one page for all rows
    return gl.load(pages_ptr + token // BLOCK_SIZE, mask=token < stop, other=0)


@gluon.jit
def _produce(
    query, query_rope, latent, rope, bars,
    query_ptr, query_rope_ptr, cache_ptr, block_table_ptr, seq_lens_ptr,
    query_stride, query_head_stride, query_rope_stride, query_rope_head_stride, cache_block_stride, block_table_stride,
    head, request, position, todo,
    BLOCK_SIZE: gl.constexpr,
):
    """Brings queries and tiles to shared memory; tokens that there are not become zeros."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, _COPY))
    dim = gl.arange(0, HALF, layout=gl.SliceLayout(0, _COPY))
    dim_rope = gl.arange(0, ROPE, layout=gl.SliceLayout(0, _COPY))
    step = 0
    piece = 0
    while todo > 0:
        seq_len = gl.load(seq_lens_ptr + request)
        pairs = gl.maximum((seq_len + 127) // 128, 1)
        stop = gl.minimum(pairs, position + todo)
        pages_ptr = block_table_ptr + request.to(gl.int64) * block_table_stride
        end = gl.minimum(seq_len, stop * 128)
        page_a = _page(pages_ptr, position * 128, row, end, BLOCK_SIZE)
        page_b = _page(pages_ptr, position * 128 + 64, row, end, BLOCK_SIZE)
        query_at = query_ptr + request.to(gl.int64) * query_stride + ((head + row) * query_head_stride)[:, None]
        rope_at = query_rope_ptr + request.to(gl.int64) * query_rope_stride
        rope_at += ((head + row) * query_rope_head_stride)[:, None]
        mbarrier.wait(bars.index(_Q_EMPTY), (piece & 1) ^ 1)
        _load_to_shared(query.index(0), query_at + dim[None, :])
        _load_to_shared(query.index(1), query_at + (HALF + dim)[None, :])
        _load_to_shared(query_rope.index(0), rope_at + dim_rope[None, :])
        async_copy.mbarrier_arrive(bars.index(_Q_FULL), increment_count=False)
        for pair in range(position, stop):
            parity = (step & 1) ^ 1
            next_a = _page(pages_ptr, pair * 128 + 128, row, end, BLOCK_SIZE)
            next_b = _page(pages_ptr, pair * 128 + 192, row, end, BLOCK_SIZE)
            for tile in gl.static_range(2):
                page = page_a if tile == 0 else page_b
                token = pair * 128 + tile * 64 + row
                live = (token < seq_len)[:, None]
                in_page = cache_ptr + ((token % BLOCK_SIZE) * WIDTH)[:, None]
                if BLOCK_SIZE % 64 == 0:
                    token_at = in_page + page.to(gl.int64) * cache_block_stride
                else:
                    token_at = in_page + (page.to(gl.int64) * cache_block_stride)[:, None]
                mbarrier.wait(bars.index(_EMPTY + 2 * tile), parity)
                _load_to_shared(latent.index(2 * tile), token_at + dim[None, :], mask=live)
                async_copy.mbarrier_arrive(bars.index(_FULL + 2 * tile), increment_count=False)
                mbarrier.wait(bars.index(_EMPTY + 2 * tile + 1), parity)
                _load_to_shared(
                    latent.index(2 * tile + 1), token_at + (HALF + dim)[None, :], mask=live
                )
                _load_to_shared(
                    rope.index(tile), token_at + (LATENT + dim_rope)[None, :], mask=live
                )
                async_copy.mbarrier_arrive(bars.index(_FULL + 2 * tile + 1), increment_count=False)
            page_a = next_a
            page_b = next_b
            step += 1
        todo -= stop - position
        position = 0
        request += 1
        piece += 1


@gluon.jit
def _consume(
    WHICH: gl.constexpr,
    query, query_rope, latent, rope, stats, bars,
    seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, pieces_ptr,
    out_stride, scale, head, request, position, todo, index, share, shares,
    HEADS: gl.constexpr, SPLIT: gl.constexpr,
):
    """Scores of tile WHICH of each pair, and columns WHICH * 256 and on of the result."""
    OTHER: gl.constexpr = 1 - WHICH
    dtype: gl.constexpr = query.dtype
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, _SCORES))
    by_row: gl.constexpr = gl.SliceLayout(1, _SCORES)
    by_sum: gl.constexpr = gl.SliceLayout(1, _SUMS)
    log2_scale = scale * LOG2E
    step = 0
    piece = 0
    line = index * share
    while todo > 0:
        seq_len = gl.load(seq_lens_ptr + request)
        pairs = gl.maximum((seq_len + 127) // 128, 1)
        stop = gl.minimum(pairs, position + todo)
        top = gl.full([64], -3.0e38, gl.float32, layout=by_row)
        total = gl.full([64], 0.0, gl.float32, layout=by_row)
        acc = gl.full([64, HALF], 0.0, gl.float32, layout=_SUMS)
        mbarrier.wait(bars.index(_Q_FULL), piece & 1)
        for pair in range(position, stop):
            parity = step & 1
            # A zero that the compiler does not know: else it keeps what describes shared memory to the products
            # in registers over the loop, and spills.
            zero = gl.inline_asm_elementwise(
                "and.b32 $0, $1, 0;", "=r,r", [step], dtype=gl.int32, is_pure=False, pack=1
            )
            score = gl.full([64, 64], 0.0, gl.float32, layout=_SCORES)
            mbarrier.wait(bars.index(_FULL + 2 * WHICH), parity)
            fence_async_shared()
            first = latent.index(zero + 2 * WHICH).permute([1, 0])
            score = warpgroup_mma(query.index(zero + 0), first, score, use_acc=False, is_async=True)
            mbarrier.wait(bars.index(_FULL + 2 * WHICH + 1), parity)
            fence_async_shared()
            second = latent.index(zero + 2 * WHICH + 1).permute([1, 0])
            score = warpgroup_mma(query.index(zero + 1), second, score, is_async=True)
            rotated = rope.index(zero + WHICH).permute([1, 0])
            score = warpgroup_mma(query_rope.index(zero), rotated, score, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            mbarrier.arrive(bars.index(_Q_EMPTY), pred=pair + 1 == stop)
            score = score * log2_scale
            score = gl.where((pair * 128 + WHICH * 64 + column < seq_len)[None, :], score, float("-inf"))
            highest = gl.max(score, axis=1)
            if WHICH == 0:
                higher = gl.maximum(top, highest)
                shrink = gl.exp2(top - higher)
            else:
                mbarrier.wait(bars.index(_P), parity)
                top = stats.index(0).load(by_row)
                shrink_a = stats.index(1).load(by_row)
                higher = gl.maximum(top, highest)
                shrink = gl.exp2(top - higher)
            p = gl.exp2(score - higher[:, None])
            stats.index(2 * WHICH).store(higher)
            stats.index(2 * WHICH + 1).store(shrink)
            rope.index(zero + WHICH).store(p.to(dtype))
            fence_async_shared()
            mbarrier.arrive(bars.index(_P + WHICH))
            if WHICH == 0:
                total = total * shrink + gl.sum(p, axis=1)
                acc = acc * gl.convert_layout(shrink, by_sum)[:, None]
                acc = warpgroup_mma(rope.index(zero + 0), latent.index(zero + 0), acc, is_async=True)
                mbarrier.wait(bars.index(_P + 1), parity)
                top = stats.index(2).load(by_row)
                shrink_b = stats.index(3).load(by_row)
                total = total * shrink_b
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(bars.index(_EMPTY))
                mbarrier.arrive(bars.index(_EMPTY + 1))
                acc = acc * gl.convert_layout(shrink_b, by_sum)[:, None]
                mbarrier.wait(bars.index(_FULL + 2), parity)
                fence_async_shared()
                acc = warpgroup_mma(rope.index(zero + 1), latent.index(zero + 2), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(bars.index(_EMPTY + 2))
                mbarrier.arrive(bars.index(_EMPTY + 3))
            else:
                top = higher
                total = total * shrink_a * shrink + gl.sum(p, axis=1)
                acc = acc * gl.convert_layout(shrink_a, by_sum)[:, None]
                mbarrier.wait(bars.index(_FULL + 1), parity)
                fence_async_shared()
                acc = warpgroup_mma(rope.index(zero + 0), latent.index(zero + 1), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(bars.index(_EMPTY + 1))
                acc = acc * gl.convert_layout(shrink, by_sum)[:, None]
                acc = warpgroup_mma(rope.index(zero + 1), latent.index(zero + 3), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(bars.index(_EMPTY + 3))
            step += 1

        stats.index(4 + WHICH).store(total)
        mbarrier.arrive(bars.index(_L + WHICH))
        mbarrier.wait(bars.index(_L + OTHER), piece & 1)
        total += stats.index(4 + OTHER).load(by_row)
        divisor = gl.where(total == 0.0, 1.0, total)
        lse = gl.where(total == 0.0, float("-inf"), top + gl.log2(divisor))
        result = acc * (1.0 / gl.convert_layout(divisor, by_sum))[:, None]
        row = head + gl.arange(0, 64, layout=by_row)
        row_sum = head + gl.arange(0, 64, layout=by_sum)
        dim = WHICH * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, _SUMS))
        whole = (position == 0) & (stop == pairs)
        if SPLIT:  # noqa: SIM102
            if (WHICH == 0) & (head == 0) & (position == 0):
                gl.store(pieces_ptr + request * 2, index + 1)
                gl.store(pieces_ptr + request * 2 + 1, _pieces(whole, line, pairs, share, index))
        if whole:
            out_at = out_ptr + request.to(gl.int64) * out_stride
            gl.store(out_at + (row_sum * LATENT)[:, None] + dim[None, :], result.to(dtype))
            if WHICH == 0:
                gl.store(lse_ptr + request * HEADS + row, lse * LN2)
        else:
            if SPLIT:
                place = _place(position, index, shares).to(gl.int64) * HEADS
                gl.store(partial_ptr + place * LATENT + (row_sum * LATENT)[:, None] + dim[None, :], result)
                if WHICH == 0:
                    gl.store(partial_lse_ptr + place + row, lse)
        line += stop - position
        todo -= stop - position
        position = 0
        request += 1
        piece += 1


@gluon.jit
def mla_decode_hopper_kernel(
    query_ptr, query_rope_ptr, cache_ptr, block_table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    partial_ptr, partial_lse_ptr, pieces_ptr,
    query_stride, query_head_stride, query_rope_stride, query_rope_head_stride, cache_block_stride, block_table_stride,
    out_stride, num_reqs, shares, scale,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, SPLIT: gl.constexpr, REQS: gl.constexpr,
):
    HEAD_TILES: gl.constexpr = HEADS // ROWS
    index = gl.program_id(0) // HEAD_TILES
    head = gl.program_id(0) % HEAD_TILES * ROWS
    if SPLIT:
        share, request, position, todo = _share(seq_lens_ptr, num_reqs, shares, index, REQS)
    else:
        share = 0
        request = index
        position = 0
        todo = gl.maximum((gl.load(seq_lens_ptr + request) + 127) // 128, 1)

    dtype: gl.constexpr = query_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    query = gl.allocate_shared_memory(dtype, [2, 64, HALF], swizzled)
    query_rope = gl.allocate_shared_memory(dtype, [1, 64, ROPE], swizzled)
    latent = gl.allocate_shared_memory(dtype, [4, 64, HALF], swizzled)
    rope = gl.allocate_shared_memory(dtype, [2, 64, ROPE], swizzled)
    stats = gl.allocate_shared_memory(gl.float32, [6, 64], plain)
    bars = gl.allocate_shared_memory(gl.int64, [_BARRIERS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(_Q_FULL), count=128)
    mbarrier.init(bars.index(_Q_EMPTY), count=2)
    for tile in gl.static_range(2):
        mbarrier.init(bars.index(_FULL + 2 * tile), count=128)
        mbarrier.init(bars.index(_FULL + 2 * tile + 1), count=128)
        mbarrier.init(bars.index(_EMPTY + 2 * tile), count=1)
        mbarrier.init(bars.index(_EMPTY + 2 * tile + 1), count=2)
        mbarrier.init(bars.index(_P + tile), count=1)
        mbarrier.init(bars.index(_L + tile), count=1)
    gl.warp_specialize(
        [
            (_consume, (0, query, query_rope, latent, rope, stats, bars,
                seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, pieces_ptr,
                out_stride, scale, head, request, position, todo, index, share, shares, HEADS, SPLIT)),
            (_consume, (1, query, query_rope, latent, rope, stats, bars,
                seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, pieces_ptr,
                out_stride, scale, head, request, position, todo, index, share, shares, HEADS, SPLIT)),
            (_produce, (query, query_rope, latent, rope, bars,
                query_ptr, query_rope_ptr, cache_ptr, block_table_ptr, seq_lens_ptr,
                query_stride, query_head_stride, query_rope_stride, query_rope_head_stride,
                cache_block_stride, block_table_stride, head, request, position, todo, BLOCK_SIZE)),
        ],
        [4, 4],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )
