"""The experts of a mixture over few tokens: two products with gathered rows, each weight read once, and their sum.

A token's row goes to `topk` experts, so there are num_tokens * topk pairs of a token and an expert, counted as the ids
lie: pair = token * topk + k. Programs are for an expert and a tile of its columns; they find their pairs themselves in
the ids when those are few, and in a list made before when they are many. With few tokens everything is a walk through
the weights of those experts that anybody asked for, and an expert that nobody asked for costs a program that ends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuned
from ..errors import Refused
from ..launch import Build, Launch, allocator, holding, launcher, pointer
from ..nouns import Case, Kernel
from .common import dtype_of, name_of, nbytes, power_of_two, randn

MAX_EXPERTS = 512
MAX_TOKENS = 512
MAX_TOPK = 32

# Up to so many pairs a program looks for its own among the ids; beyond, they are listed before.
_SCANNED = 64
# Rows of a tile for experts with more pairs than most, as many as fit into registers beside the other tile's, and bytes
# of shared memory for its stages, of which AMD's GPUs have no more.
_MANY_ROWS = 32
_MANY_BYTES = 64 << 10
# Pairs that are counted at once when they are listed.
_CHUNK = 1024


@triton.jit
def _moe_list_kernel(
    # Tensors
    ids_ptr,  # [num_pairs] int32
    pairs_ptr,  # [num_pairs] int32: pairs by expert, those of an expert in their order
    starts_ptr,  # [EXPERTS + 1] int32: where an expert's begin
    # Scalars
    num_pairs,
    # Constexprs
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert = tl.program_id(0)
    at = tl.arange(0, CHUNK)
    start = 0
    for first in range(0, num_pairs, CHUNK):
        ids = tl.load(ids_ptr + first + at, mask=first + at < num_pairs, other=EXPERTS)
        start += tl.sum((ids < expert).to(tl.int32))
    tl.store(starts_ptr + expert, start)
    if expert == EXPERTS - 1:
        tl.store(starts_ptr + EXPERTS, num_pairs)
    for first in range(0, num_pairs, CHUNK):
        ids = tl.load(ids_ptr + first + at, mask=first + at < num_pairs, other=EXPERTS)
        mine = (ids == expert).to(tl.int32)
        place = start + tl.cumsum(mine, axis=0) - 1
        tl.store(pairs_ptr + place, first + at, mask=mine != 0)
        start += tl.sum(mine)


@triton.jit
def _row_tile(
    x_ptr,
    weight_of,  # the expert's
    pairs_ptr,
    out_ptr,
    every,  # all pairs, if they are looked for, which of them are the expert's, and where among these
    mine,
    rank,
    start,
    count,
    first,
    col,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TOPK: tl.constexpr,
    GATED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The product of an expert's pairs from number `first` on."""
    row = first + tl.arange(0, ROWS)
    row_live = row < count
    if PAIRS > 0:
        is_mine = mine[None, :] & (rank[None, :] == row[:, None])
        pair = tl.sum(tl.where(is_mine, every[None, :], 0), axis=1)
    else:
        pair = tl.load(pairs_ptr + start + row, mask=row_live, other=0)
    x_row = pair
    if GATED:
        x_row = pair // TOPK
    at = tl.arange(0, DEPTH)
    x_at = x_ptr + x_row.to(tl.int64)[:, None] * IN + at[None, :]
    weight_at = weight_of + col.to(tl.int64)[:, None] * IN + at[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    gated = tl.zeros((ROWS, COLS), tl.float32)
    for step in tl.range((IN + DEPTH - 1) // DEPTH, num_stages=STAGES):
        x_live = row_live[:, None]
        weight_live = (col < OUT)[:, None]
        if IN % DEPTH != 0:
            rest = (at + step * DEPTH < IN)[None, :]
            x_live = x_live & rest
            weight_live = weight_live & rest
        x = tl.load(x_at, mask=x_live, other=0.0)
        if OUT % COLS == 0 and IN % DEPTH == 0:
            weight = tl.load(weight_at)
        else:
            weight = tl.load(weight_at, mask=weight_live, other=0.0)
        total = tl.dot(x, weight.T, total, input_precision="ieee")
        if GATED:
            if OUT % COLS == 0 and IN % DEPTH == 0:
                up = tl.load(weight_at + OUT * IN)
            else:
                up = tl.load(weight_at + OUT * IN, mask=weight_live, other=0.0)
            gated = tl.dot(x, up.T, gated, input_precision="ieee")
        x_at += DEPTH
        weight_at += DEPTH
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * gated
    out_at = out_ptr + pair.to(tl.int64)[:, None] * OUT + col[None, :]
    live = row_live[:, None] & (col < OUT)[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _moe_experts_kernel(
    # Tensors
    x_ptr,  # gated: [num_tokens, IN], else [num_pairs, IN]; contiguous
    weight_ptr,  # [EXPERTS, OUT, IN] contiguous; gated: [EXPERTS, 2 * OUT, IN], gates first
    ids_ptr,  # [num_pairs] int32
    pairs_ptr,  # [num_pairs] int32, pairs by expert; None where they are looked for
    starts_ptr,  # [EXPERTS + 1] int32; None where they are looked for
    out_ptr,  # [num_pairs, OUT] contiguous
    # Scalars
    num_pairs,
    # Constexprs
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TOPK: tl.constexpr,
    GATED: tl.constexpr,  # out = silu(gate) * up
    PAIRS: tl.constexpr,  # a power of two not below num_pairs; 0 where they are listed
    BY_PAIR: tl.constexpr,  # a program is for the expert of a pair, if no pair before has the same; else for an expert
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    MANY_ROWS: tl.constexpr,  # of a tile where an expert has more than ROWS, so that its weights are not read again
    MANY_STAGES: tl.constexpr,
):
    TILES: tl.constexpr = (OUT + COLS - 1) // COLS
    # The tiles of an expert are neighbours.
    which = tl.program_id(0) // TILES
    col = (tl.program_id(0) % TILES) * COLS + tl.arange(0, COLS)
    every, mine, rank = None, None, None
    if PAIRS > 0:
        every = tl.arange(0, PAIRS)
        ids = tl.load(ids_ptr + every, mask=every < num_pairs, other=-1)
        expert = which
        if BY_PAIR:
            expert = tl.load(ids_ptr + which)
        mine = ids == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
        start = 0
        count = tl.sum(mine.to(tl.int32))
        if BY_PAIR:
            # Whoever is not the first of its expert has nothing to do.
            count = tl.where(tl.min(tl.where(mine, every, PAIRS)) == which, count, 0)
    else:
        expert = which
        start = tl.load(starts_ptr + expert)
        count = tl.load(starts_ptr + expert + 1) - start

    weight_of = weight_ptr + expert.to(tl.int64) * OUT * IN * (2 if GATED else 1)
    if MANY_ROWS > ROWS and count > ROWS:
        for first in range(0, count, MANY_ROWS):
            _row_tile(
                x_ptr, weight_of, pairs_ptr, out_ptr, every, mine, rank, start, count, first, col,
                IN, OUT, TOPK, GATED, PAIRS, MANY_ROWS, COLS, DEPTH, MANY_STAGES,
            )  # fmt: skip
    else:
        for first in range(0, count, ROWS):
            _row_tile(
                x_ptr, weight_of, pairs_ptr, out_ptr, every, mine, rank, start, count, first, col,
                IN, OUT, TOPK, GATED, PAIRS, ROWS, COLS, DEPTH, STAGES,
            )  # fmt: skip


@triton.jit
def _moe_sum_kernel(
    # Tensors
    y_ptr,  # [num_tokens * TOPK, HIDDEN] float32, contiguous
    weights_ptr,  # [num_tokens, TOPK] float32, contiguous
    shared_ptr,  # [num_tokens, HIDDEN] or None
    out_ptr,  # [num_tokens, HIDDEN]
    # Constexprs
    HIDDEN: tl.constexpr,
    TOPK: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    col = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    live = col < HIDDEN
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOPK):
        weight = tl.load(weights_ptr + token * TOPK + k)
        total += weight * tl.load(y_ptr + (token * TOPK + k) * HIDDEN + col, mask=live, other=0.0)
    if HAS_SHARED:
        total += tl.load(shared_ptr + token * HIDDEN + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + col, total.to(out_ptr.dtype.element_ty), mask=live)


class Experts(NamedTuple):
    """What a mixture knows for ever."""

    num_experts: int
    topk: int
    hidden_size: int
    intermediate_size: int


class Tiling(NamedTuple):
    """How an expert's product is divided."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


def default_tiling(experts: Experts, num_tokens: int, gated: bool, itemsize: int) -> Tiling:
    """Without a measured one for this GPU: rows for what nearly every expert gets, since weights are read again for
    more; stages of 16 to 24 KiB in 16 bits, small steps in float32."""
    each = num_tokens * experts.topk / experts.num_experts
    rows = min(64, max(16, power_of_two(math.ceil(each + 1.5 * each**0.5))))
    if itemsize == 4:  # without tensor cores a thread has an operand of its own for each sum
        return Tiling(min(rows, 32), 16 if gated else 32, 16, 4, 2)
    in_features = experts.hidden_size if gated else experts.intermediate_size
    # Masks along the sum, of sizes that steps do not divide, take registers, too.
    depth = 32 if in_features % 64 else 64 if rows >= 32 or in_features % 128 else 128
    return Tiling(rows, 32 if gated else 64, depth, 4, 4)


def key_of(experts: Experts, num_tokens: int, gated: bool, dtype: torch.dtype) -> str:
    """By which measured tilings are kept; tokens by powers of two."""
    count, topk, hidden, width = experts
    sizes = f"{hidden}x{width} gated" if gated else f"{width}x{hidden}"
    return f"{name_of(dtype)} {topk} of {count} {sizes} {power_of_two(num_tokens)}"


@functools.cache
def source() -> str:
    """By which measured tilings are recognised as this kernel's."""
    return tuned.source_hash(_moe_experts_kernel, _row_tile)


def tiling_for(experts: Experts, num_tokens: int, gated: bool, dtype: torch.dtype, device: int) -> Tiling:
    """The measured tiling for this GPU, else the default."""
    key = key_of(experts, num_tokens, gated, dtype)
    if dtype.itemsize == 2 and (found := tuned.lookup("moe_experts", device, key, source())):
        return Tiling(**found)
    return default_tiling(experts, num_tokens, gated, dtype.itemsize)


def way_of(experts: Experts, num_tokens: int) -> tuple[int, bool]:
    """How programs find the pairs of their expert, (PAIRS, BY_PAIR) of the kernel. PAIRS is 0 where they are listed."""
    num_pairs = num_tokens * experts.topk
    looked_for = num_pairs <= _SCANNED
    return power_of_two(num_pairs) if looked_for else 0, looked_for and num_pairs < experts.num_experts


def _list_build(num_experts: int, aligned: bool = True) -> Build:
    return Build(
        function=_moe_list_kernel,
        types=("*i32", "*i32", "*i32", "i32"),
        constexprs=(("EXPERTS", num_experts), ("CHUNK", _CHUNK)),
        aligned=aligned,
        num_warps=4,
    )


def experts_build(
    experts: Experts, tiling: Tiling, dtype: torch.dtype, gated: bool, pairs: int, by_pair: bool, aligned: bool = True
) -> Build:
    if not aligned:  # narrow loads take registers, and what is right need not be fast
        tiling = tiling._replace(rows=16, depth=16, num_stages=1)
    x = pointer(dtype)
    inside, outside = experts.hidden_size, experts.intermediate_size
    # Routers have favourites. Few pairs, and float32, which multiplies in registers, stay with the rows they have.
    many_rows = tiling.rows if pairs or dtype.itemsize == 4 or not aligned else max(tiling.rows, _MANY_ROWS)
    stage = tiling.depth * dtype.itemsize * (many_rows + (2 if gated else 1) * tiling.cols)
    return Build(
        function=_moe_experts_kernel,
        types=(
            x, x, "*i32", None if pairs else "*i32", None if pairs else "*i32", x if gated else "*fp32", "i32",
        ),
        constexprs=(
            ("IN", inside if gated else outside),
            ("OUT", outside if gated else inside),
            ("TOPK", experts.topk),
            ("GATED", gated),
            ("PAIRS", pairs),
            ("BY_PAIR", by_pair),
            ("ROWS", tiling.rows),
            ("COLS", tiling.cols),
            ("DEPTH", tiling.depth),
            ("STAGES", tiling.num_stages),
            ("MANY_ROWS", many_rows),
            ("MANY_STAGES", max(1, min(tiling.num_stages, _MANY_BYTES // stage))),
        ),
        aligned=aligned,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        maxnreg=168,  # as for linear layers
    )  # fmt: skip


_SUM_BLOCK = 1024


def _sum_build(experts: Experts, dtype: torch.dtype, shared: bool, aligned: bool = True) -> Build:
    x = pointer(dtype)
    block = min(_SUM_BLOCK, power_of_two(experts.hidden_size))
    return Build(
        function=_moe_sum_kernel,
        types=("*fp32", "*fp32", x if shared else None, x),
        constexprs=(
            ("HIDDEN", experts.hidden_size), ("TOPK", experts.topk), ("HAS_SHARED", shared), ("BLOCK", block),
        ),
        aligned=aligned,
        num_warps=4,
    )  # fmt: skip


def _never(experts: Experts, dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x has dtype {dtype}, not float16, bfloat16 or float32"
    if not 1 <= experts.num_experts <= MAX_EXPERTS:
        return f"{experts.num_experts} experts are not between 1 and {MAX_EXPERTS}"
    if not 1 <= experts.topk <= min(MAX_TOPK, experts.num_experts):
        return f"topk {experts.topk} is not between 1 and {min(MAX_TOPK, experts.num_experts)}"
    if experts.hidden_size < 1 or experts.intermediate_size < 1:
        return f"experts of {experts.hidden_size} by {experts.intermediate_size} elements"
    return None


@functools.cache
def bind_moe_experts(experts: Experts, dtype: torch.dtype, shared: bool, device: int) -> Callable[..., None]:
    """`moe_experts` with everything settled that a layer knows for ever:

    run(x_at, gate_up_at, down_at, ids_at, weights_at, shared_at, out_at, num_tokens, memory)

    takes addresses of contiguous tensors (0 for shared without one), launches three or four kernels, and checks nothing
    but their alignment. memory(nbytes) gives the address of memory for what they leave one another, which the caller
    keeps until they are done. What aligned tensors need is compiled now. Raises Refused for layers that are not for us.
    """
    if reason := _never(experts, dtype):
        raise Refused(reason)
    num_experts, topk, hidden_size, intermediate_size = experts
    block = min(_SUM_BLOCK, power_of_two(hidden_size))
    blocks = triton.cdiv(hidden_size, block)

    @functools.cache
    def product_for(tiling: Tiling, gated: bool, pairs: int, by_pair: bool, aligned: bool) -> Launch:
        return launcher(experts_build(experts, tiling, dtype, gated, pairs, by_pair, aligned), device)

    @functools.cache
    def list_for(aligned: bool) -> Launch:
        return launcher(_list_build(num_experts, aligned), device)

    @functools.cache
    def sum_for(aligned: bool) -> Launch:
        return launcher(_sum_build(experts, dtype, shared, aligned), device)

    @functools.cache
    def products(num_tokens: int, aligned: bool) -> tuple[Launch, Launch, int, int]:
        pairs, by_pair = way_of(experts, num_tokens)
        up, down = (tiling_for(experts, num_tokens, gated, dtype, device) for gated in (True, False))
        return (
            product_for(up, True, pairs, by_pair, aligned), product_for(down, False, pairs, by_pair, aligned),
            triton.cdiv(intermediate_size, up.cols), triton.cdiv(hidden_size, down.cols),
        )  # fmt: skip

    for num_tokens in range(1, MAX_TOKENS + 1):
        products(num_tokens, True)
    list_for(True)
    sum_for(True)

    def run(
        x_at: int, gate_up_at: int, down_at: int, ids_at: int, weights_at: int, shared_at: int, out_at: int,
        num_tokens: int, memory: Callable[[int], int],
    ) -> None:  # fmt: skip
        bits = x_at | gate_up_at | down_at | ids_at | weights_at | shared_at | out_at
        aligned = not bits & 15
        num_pairs = num_tokens * topk
        active_at, y_at = memory(num_pairs * intermediate_size * dtype.itemsize), memory(num_pairs * hidden_size * 4)
        pairs_at = starts_at = 0
        up, down, up_tiles, down_tiles = products(num_tokens, aligned)
        pairs, by_pair = way_of(experts, num_tokens)
        programs = num_pairs if by_pair else num_experts
        if not pairs:
            pairs_at, starts_at = memory(num_pairs * 4), memory((num_experts + 1) * 4)
            list_for(aligned)(num_experts, ids_at, pairs_at, starts_at, num_pairs)
        up(programs * up_tiles, x_at, gate_up_at, ids_at, pairs_at, starts_at, active_at, num_pairs)
        down(programs * down_tiles, active_at, down_at, ids_at, pairs_at, starts_at, y_at, num_pairs)
        sum_for(aligned)(num_tokens * blocks, y_at, weights_at, shared_at, out_at)

    return run


def moe_experts_refuses(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    shared: torch.Tensor | None = None,
) -> str | None:
    """None if `moe_experts` does this, else why not."""
    if x.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3 or ids.dim() != 2:
        have = ", ".join(str(tuple(each.shape)) for each in (x, gate_up, down, ids))
        return f"x, gate_up, down and ids of shapes {have}, not of 2, 3, 3 and 2 dimensions"
    num_tokens, hidden_size = x.shape
    num_experts, both, _ = gate_up.shape
    experts = Experts(num_experts, ids.shape[1], hidden_size, both // 2)
    if reason := _never(experts, x.dtype):
        return reason
    if num_tokens > MAX_TOKENS:
        return f"x has {num_tokens} tokens, more than {MAX_TOKENS}"
    for name, tensor, shape, dtype in (
        ("x", x, (num_tokens, hidden_size), x.dtype),
        ("gate_up", gate_up, (num_experts, 2 * experts.intermediate_size, hidden_size), x.dtype),
        ("down", down, (num_experts, hidden_size, experts.intermediate_size), x.dtype),
        ("weights", weights, (num_tokens, experts.topk), torch.float32),
        ("ids", ids, (num_tokens, experts.topk), torch.int32),
        ("shared", shared, (num_tokens, hidden_size), x.dtype),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device or not tensor.is_contiguous():
            have = f"{tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()} on {tensor.device}"
            return f"{name} is {have}, expected a contiguous {dtype} {shape} on {x.device}"
    return None


def moe_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it, for few tokens (https://arxiv.org/abs/2401.06066).

    x: [num_tokens, hidden_size], at most 512 tokens, float16, bfloat16 or float32. gate_up: [num_experts,
    2 * intermediate_size, hidden_size], gates first. down: [num_experts, hidden_size, intermediate_size]. weights:
    [num_tokens, topk] float32. ids: [num_tokens, topk] int32, experts from 0 to num_experts - 1, each at most once for
    a token. shared: [num_tokens, hidden_size], which is added. All contiguous. An expert computes
    down @ (silu(gate @ x) * (up @ x)) with sums in float32, rounded to x's dtype before `down` and not after it.
    Returns [num_tokens, hidden_size], rounded once. The same inputs always give the same bits.

    Stands in for vLLM's `fused_experts` and the addition of the shared experts' result. Raises Refused for what it does
    not do.
    """
    if reason := moe_experts_refuses(x, gate_up, down, weights, ids, shared):
        raise Refused(reason)
    num_tokens, hidden_size = x.shape
    experts = Experts(gate_up.shape[0], ids.shape[1], hidden_size, down.shape[2])
    run = bind_moe_experts(experts, x.dtype, shared is not None, x.get_device())
    out = torch.empty_like(x)
    memory = holding(allocator(x.get_device(), torch.uint8))
    if num_tokens:
        run(
            x.data_ptr(), gate_up.data_ptr(), down.data_ptr(), ids.data_ptr(), weights.data_ptr(),
            0 if shared is None else shared.data_ptr(), out.data_ptr(), num_tokens, memory,
        )  # fmt: skip
    return out


def moe_experts_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    shared: torch.Tensor | None = None,
) -> tuple[torch.Tensor]:
    out = torch.zeros_like(x) if shared is None else shared.clone()
    for expert in range(gate_up.shape[0]):
        token, k = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        out.index_add_(0, token, y * weights[token, k][:, None].to(y.dtype))
    return (out,)


# The experts of named models, bf16.
MIXTURES = {
    "deepseek-v2-lite": Experts(64, 6, 2048, 1408),
    "deepseek-v3": Experts(256, 8, 7168, 2048),
    "qwen3-30b-a3b": Experts(128, 8, 2048, 768),
}


def _case(name: str, num_tokens: int, experts: Experts, bench: bool = False, **more: Any) -> Case:
    sizes = dict(zip(("experts", "topk", "hidden", "intermediate"), experts, strict=True))
    return Case(name, {"num_tokens": num_tokens, **sizes, **more}, bench)


_CASES = (
    _case("one token", 1, Experts(8, 2, 64, 32)),
    _case("odd sizes, shared", 5, Experts(7, 3, 77, 51), shared=True),
    _case("more pairs than experts", 20, Experts(6, 4, 64, 48)),
    _case("listed", 90, Experts(5, 3, 48, 33), shared=True),
    _case("all to one expert", 40, Experts(4, 1, 64, 32), crowded=True),
    _case("listed, all to one expert", 90, Experts(16, 1, 64, 32), crowded=True),
    _case("empty", 0, Experts(8, 2, 64, 32), shared=True),
)


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    tokens, count, topk = case["num_tokens"], case["experts"], case["topk"]
    hidden, width = case["hidden"], case["intermediate"]
    order = torch.rand(tokens, count, device=device).argsort(dim=1)
    if case.get("crowded"):
        order = torch.full_like(order, count - 1)
    return {
        "x": randn((tokens, hidden), dtype, device),
        "gate_up": randn((count, 2 * width, hidden), dtype, device, scale=hidden**-0.5),
        "down": randn((count, hidden, width), dtype, device, scale=width**-0.5),
        "weights": torch.rand(tokens, topk, device=device),
        "ids": order[:, :topk].to(torch.int32).contiguous(),
        "shared": randn((tokens, hidden), dtype, device) if case.get("shared") else None,
    }


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    experts = Experts(case["experts"], case["topk"], case["hidden"], case["intermediate"])
    tokens, kind = max(case["num_tokens"], 1), dtype_of(dtype)
    pairs, by_pair = way_of(experts, tokens)
    for gated in (True, False):
        tiling = default_tiling(experts, tokens, gated, kind.itemsize)
        for aligned in (True, False):
            yield experts_build(experts, tiling, kind, gated, pairs, by_pair, aligned)
    if not pairs:
        yield _list_build(experts.num_experts)
    yield _sum_build(experts, kind, bool(case.get("shared")))


def _fake(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(x)


MOE_EXPERTS = Kernel(
    name="moe_experts",
    op=moe_experts,
    reference=moe_experts_reference,
    refuses=moe_experts_refuses,
    inputs=_inputs,
    results=("return",),
    cases=(
        *_CASES,
        # Of a sixteenth of the experts and more, whose weights in float64 a test can hold.
        *(
            _case(f"{model}, 16 experts {tokens}", tokens, experts._replace(num_experts=16), True, shared=True,
                  model=model)
            for model, experts in MIXTURES.items()
            for tokens in (1, 32, 256)
        ),
    ),
    builds=_builds,
    schema="moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor ids, Tensor? shared=None)"
    " -> Tensor",
    fake=_fake,
    traffic=lambda x, gate_up, down, weights, ids, shared: nbytes(x, gate_up, down, shared) + nbytes(x),
)  # fmt: skip

KERNELS = (MOE_EXPERTS,)
