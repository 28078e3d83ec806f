"""The experts of a mixture over few tokens with weights in float8, a scale for 128 by 128 of them.

As `moe_experts`, which see for pairs and programs, in the numbers of `block_fp8_linear`: tokens are quantised by a
launch before. A program of the first product has 128 columns of gates and their partners, which is a group, so that
what an expert makes of its token is quantised where it is made, and the second product reads nothing but float8.
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
from ..launch import Build, Launch, allocator, holding, launcher
from ..nouns import Case, Kernel
from .block_fp8_linear import (
    BLOCK,
    FLOAT8,
    POINTER,
    bind_group_quantise,
    block_sums,
    dequantised,
    device_refuses,
    part_refuses,
    quantise_build,
    quantise_reference,
    quantised,
    random_weight,
    stages_for,
)
from .common import dtype_of, nbytes, power_of_two, randn
from .moe_experts import MAX_TOKENS, MIXTURES, Experts, _list_build, _sum_build, way_of
from .moe_experts import _never as _never_experts

_BLOCK = tl.constexpr(BLOCK)
# Rows of a tile for experts with more pairs than most, where pairs are listed.
_MANY_ROWS = 32
_GATED_BYTES = 192 << 10  # of the stages of a program of the first product


@triton.jit
def _pairs_tile(
    x_ptr,
    x_scales_ptr,
    num_x_rows,
    weight_of,  # the expert's
    scales_of,
    pairs_ptr,
    out_ptr,
    out_scales_ptr,
    num_pairs,
    every,  # all pairs, if they are looked for, which of them are the expert's, and where among these
    mine,
    rank,
    start,
    count,
    first,
    first_col,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TOPK: tl.constexpr,
    GATED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The product of an expert's pairs from number `first` on."""
    GROUPS: tl.constexpr = IN // _BLOCK
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
    at = tl.arange(0, _BLOCK)
    col = first_col + tl.arange(0, COLS)
    total, gated = block_sums(
        x_ptr + x_row.to(tl.int64)[:, None] * IN + at[None, :], x_scales_ptr + x_row, num_x_rows, row_live,
        weight_of + col.to(tl.int64)[:, None] * IN + at[None, :], scales_of + (first_col // _BLOCK) * GROUPS, col < OUT,
        GROUPS, OUT * IN, OUT // _BLOCK * GROUPS, GATED, OUT % COLS != 0, ROWS, COLS, STAGES,
    )  # fmt: skip
    total = total.T
    out_at = out_ptr + pair.to(tl.int64)[:, None] * OUT + col[None, :]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * gated.T
        inside, scale = quantised(total)
        tl.store(out_at, inside, mask=row_live[:, None])
        tl.store(out_scales_ptr + (first_col // _BLOCK) * num_pairs + pair, scale, mask=row_live)
    else:
        tl.store(out_at, total, mask=row_live[:, None] & (col < OUT)[None, :])


@triton.jit
def _block_fp8_experts_kernel(
    # Tensors
    x_ptr,  # gated: [num_tokens, IN], else [num_pairs, IN]; float8, contiguous
    x_scales_ptr,  # [IN / BLOCK, num_tokens or num_pairs] float32
    weight_ptr,  # [EXPERTS, OUT, IN] float8, contiguous; gated: [EXPERTS, 2 * OUT, IN], gates first
    scales_ptr,  # [EXPERTS, OUT / BLOCK, IN / BLOCK] float32; gated: with twice as many rows
    ids_ptr,  # [num_pairs] int32
    pairs_ptr,  # [num_pairs] int32, pairs by expert; None where they are looked for
    starts_ptr,  # [EXPERTS + 1] int32; None where they are looked for
    out_ptr,  # [num_pairs, OUT], gated: float8, else float32
    out_scales_ptr,  # gated: [OUT / BLOCK, num_pairs] float32, else None
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
    COLS: tl.constexpr,  # a divisor of BLOCK; gated: BLOCK
    STAGES: tl.constexpr,
    MANY_ROWS: tl.constexpr,  # of a tile where an expert has more than ROWS, so that its weights are not read again
    MANY_STAGES: tl.constexpr,
):
    TILES: tl.constexpr = (OUT + COLS - 1) // COLS
    # The tiles of an expert are neighbours.
    which = tl.program_id(0) // TILES
    first_col = (tl.program_id(0) % TILES) * COLS
    # As in `moe_experts`, whose source is the one by which measured tilings are recognised.
    every, mine, rank = None, None, None
    expert = which
    if PAIRS > 0:
        every = tl.arange(0, PAIRS)
        ids = tl.load(ids_ptr + every, mask=every < num_pairs, other=-1)
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
        start = tl.load(starts_ptr + expert)
        count = tl.load(starts_ptr + expert + 1) - start

    HEIGHT: tl.constexpr = OUT * (2 if GATED else 1)
    SCALES: tl.constexpr = (OUT + _BLOCK - 1) // _BLOCK * (2 if GATED else 1) * (IN // _BLOCK)
    weight_of = weight_ptr + expert.to(tl.int64) * HEIGHT * IN
    scales_of = scales_ptr + expert.to(tl.int64) * SCALES
    num_x_rows = num_pairs
    if GATED:
        num_x_rows = num_pairs // TOPK
    if MANY_ROWS > ROWS and count > ROWS:
        for first in range(0, count, MANY_ROWS):
            _pairs_tile(
                x_ptr, x_scales_ptr, num_x_rows, weight_of, scales_of, pairs_ptr, out_ptr, out_scales_ptr, num_pairs,
                every, mine, rank, start, count, first, first_col, IN, OUT, TOPK, GATED, PAIRS, MANY_ROWS, COLS,
                MANY_STAGES,
            )  # fmt: skip
    else:
        for first in range(0, count, ROWS):
            _pairs_tile(
                x_ptr, x_scales_ptr, num_x_rows, weight_of, scales_of, pairs_ptr, out_ptr, out_scales_ptr, num_pairs,
                every, mine, rank, start, count, first, first_col, IN, OUT, TOPK, GATED, PAIRS, ROWS, COLS, STAGES,
            )  # fmt: skip


class Tiling(NamedTuple):
    """How an expert's product is divided."""

    rows: int
    cols: int  # a divisor of BLOCK; BLOCK for the first product
    num_warps: int
    num_stages: int


def default_tiling(experts: Experts, num_tokens: int, gated: bool) -> Tiling:
    """Without a measured one for this GPU: rows for what nearly every expert gets, since weights are read again for
    more."""
    each = num_tokens * experts.topk / experts.num_experts
    rows = min(32 if gated else 64, max(16, power_of_two(math.ceil(each + 1.5 * each**0.5))))
    cols, num_warps = (BLOCK, 8) if gated else (BLOCK // 2, 4)
    return Tiling(rows, cols, num_warps, _stages(cols, rows, gated))


def key_of(experts: Experts, num_tokens: int, gated: bool) -> str:
    """By which measured tilings are kept, whatever dtype tokens had before they were quantised; tokens by powers of
    two."""
    count, topk, hidden, width = experts
    sizes = f"{hidden}x{width} gated" if gated else f"{width}x{hidden}"
    return f"{topk} of {count} {sizes} {power_of_two(num_tokens)}"


@functools.cache
def source() -> str:
    """By which measured tilings are recognised as this kernel's."""
    return tuned.source_hash(_block_fp8_experts_kernel, _pairs_tile, block_sums, quantised)


def tiling_for(experts: Experts, num_tokens: int, gated: bool, device: int) -> Tiling:
    """The measured tiling for this GPU, else the default."""
    found = tuned.lookup("block_fp8_experts", device, key_of(experts, num_tokens, gated), source())
    return Tiling(**found) if found else default_tiling(experts, num_tokens, gated)


def _stages(cols: int, rows: int, gated: bool) -> int:
    """A program of the first product is its multiprocessor's only one: its registers leave no other room."""
    return stages_for(cols, rows, gated, _GATED_BYTES) if gated else stages_for(cols, rows, gated)


def experts_build(experts: Experts, tiling: Tiling, gated: bool, pairs: int, by_pair: bool) -> Build:
    """The kernel of either product, whatever dtype tokens had before they were quantised."""
    inside, outside = experts.hidden_size, experts.intermediate_size
    many_rows = tiling.rows if pairs else max(tiling.rows, _MANY_ROWS)
    many_stages = min(tiling.num_stages, _stages(tiling.cols, many_rows, gated))
    listed = None if pairs else "*i32"
    return Build(
        function=_block_fp8_experts_kernel,
        types=(
            POINTER, "*fp32", POINTER, "*fp32", "*i32", listed, listed, POINTER if gated else "*fp32",
            "*fp32" if gated else None, "i32",
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
            ("STAGES", tiling.num_stages),
            ("MANY_ROWS", many_rows),
            ("MANY_STAGES", many_stages),
        ),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        maxnreg=255 if gated else 168,  # as for linear layers; beside a first product's program there is no other
    )  # fmt: skip


_SUM_BLOCK = 1024  # columns of a program of `moe_experts`' sum


def _never(experts: Experts, dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    if experts.hidden_size % BLOCK or experts.intermediate_size % BLOCK:
        return f"experts of {experts.hidden_size} by {experts.intermediate_size} elements, no multiples of {BLOCK}"
    return _never_experts(experts, dtype)


@functools.cache
def bind_block_fp8_experts(experts: Experts, dtype: torch.dtype, shared: bool, device: int) -> Callable[..., None]:
    """`block_fp8_experts` with everything settled that a layer knows for ever:

    run(x_at, gate_up_at, gate_up_scale_at, down_at, down_scale_at, ids_at, weights_at, shared_at, out_at, num_tokens,
    memory)

    takes addresses of contiguous tensors, all but that of x aligned to 16 bytes (0 for shared without one), and
    launches four or five kernels. memory(nbytes) gives the address of aligned memory for what they leave one another,
    which the caller keeps until they are done. What they need is compiled now. Raises Refused for layers that are not
    for us.
    """
    if reason := _never(experts, dtype) or device_refuses(device):
        raise Refused(reason)
    num_experts, topk, hidden_size, intermediate_size = experts
    blocks = triton.cdiv(hidden_size, min(_SUM_BLOCK, power_of_two(hidden_size)))
    quantise = bind_group_quantise(hidden_size, dtype, device)
    make_list = launcher(_list_build(num_experts), device)
    add_up = launcher(_sum_build(experts, dtype, shared), device)

    @functools.cache
    def product_for(tiling: Tiling, gated: bool, pairs: int, by_pair: bool) -> Launch:
        return launcher(experts_build(experts, tiling, gated, pairs, by_pair), device)

    @functools.cache
    def products(num_tokens: int) -> tuple[Launch, Launch, int, int]:
        pairs, by_pair = way_of(experts, num_tokens)
        up, down = (tiling_for(experts, num_tokens, gated, device) for gated in (True, False))
        return (
            product_for(up, True, pairs, by_pair), product_for(down, False, pairs, by_pair),
            triton.cdiv(intermediate_size, up.cols), triton.cdiv(hidden_size, down.cols),
        )  # fmt: skip

    for num_tokens in range(1, MAX_TOKENS + 1):
        products(num_tokens)

    def run(
        x_at: int, gate_up_at: int, gate_up_scale_at: int, down_at: int, down_scale_at: int, ids_at: int,
        weights_at: int, shared_at: int, out_at: int, num_tokens: int, memory: Callable[[int], int],
    ) -> None:  # fmt: skip
        bits = gate_up_at | gate_up_scale_at | down_at | down_scale_at | ids_at | weights_at | shared_at | out_at
        if bits & 15:
            raise Refused("tensors that are not aligned to 16 bytes")
        num_pairs = num_tokens * topk
        x, scales = quantise(x_at, hidden_size, num_tokens)
        active_at, active_scales_at = memory(num_pairs * intermediate_size), memory(num_pairs * intermediate_size // 32)
        y_at = memory(num_pairs * hidden_size * 4)
        pairs_at = starts_at = 0
        up, down, up_tiles, down_tiles = products(num_tokens)
        pairs, by_pair = way_of(experts, num_tokens)
        programs = num_pairs if by_pair else num_experts
        if not pairs:
            pairs_at, starts_at = memory(num_pairs * 4), memory((num_experts + 1) * 4)
            make_list(num_experts, ids_at, pairs_at, starts_at, num_pairs)
        up(
            programs * up_tiles, x.data_ptr(), scales.data_ptr(), gate_up_at, gate_up_scale_at, ids_at, pairs_at,
            starts_at, active_at, active_scales_at, num_pairs,
        )  # fmt: skip
        down(
            programs * down_tiles, active_at, active_scales_at, down_at, down_scale_at, ids_at, pairs_at, starts_at,
            y_at, 0, num_pairs,
        )  # fmt: skip
        add_up(num_tokens * blocks, y_at, weights_at, shared_at, out_at)

    return run


def experts_refuse(
    gate_up: torch.Tensor, gate_up_scale: torch.Tensor, down: torch.Tensor, down_scale: torch.Tensor, device: int
) -> str | None:
    """None if weights of three dimensions and their scales are as these kernels read them, else why not."""
    count, hidden_size, width = down.shape
    blocks = hidden_size // BLOCK, width // BLOCK
    for name, tensor, shape, dtype in (
        ("gate_up", gate_up, (count, 2 * width, hidden_size), FLOAT8),
        ("gate_up_scale", gate_up_scale, (count, 2 * blocks[1], blocks[0]), torch.float32),
        ("down", down, (count, hidden_size, width), FLOAT8),
        ("down_scale", down_scale, (count, *blocks), torch.float32),
    ):
        if reason := part_refuses(name, tensor, shape, dtype, device):
            return reason
    return None


def block_fp8_experts_refuses(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    shared: torch.Tensor | None = None,
) -> str | None:
    """None if `block_fp8_experts` does this, else why not."""
    if x.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3 or ids.dim() != 2:
        have = ", ".join(str(tuple(each.shape)) for each in (x, gate_up, down, ids))
        return f"x, gate_up, down and ids of shapes {have}, not of 2, 3, 3 and 2 dimensions"
    num_tokens, hidden_size = x.shape
    count, both, _ = gate_up.shape
    experts = Experts(count, ids.shape[1], hidden_size, both // 2)
    if reason := _never(experts, x.dtype):
        return reason
    if num_tokens > MAX_TOKENS:
        return f"x has {num_tokens} tokens, more than {MAX_TOKENS}"
    device, tokens = x.get_device(), (num_tokens, experts.topk)
    if not x.is_contiguous():
        return f"x of strides {x.stride()} is not contiguous"
    if reason := experts_refuse(gate_up, gate_up_scale, down, down_scale, device):
        return reason
    for name, tensor, shape, dtype in (
        ("weights", weights, tokens, torch.float32),
        ("ids", ids, tokens, torch.int32),
        ("shared", shared, (num_tokens, hidden_size), x.dtype),
    ):
        if tensor is not None and (reason := part_refuses(name, tensor, shape, dtype, device)):
            return reason
    return device_refuses(device)


def block_fp8_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """`moe_experts` with weights in float8, whose blocks of 128 by 128 have a scale (https://arxiv.org/abs/2412.19437).

    x: [num_tokens, hidden_size], at most 512 tokens, float16, bfloat16 or float32. gate_up: [num_experts,
    2 * intermediate_size, hidden_size] float8_e4m3fn, gates first; gate_up_scale: [num_experts,
    2 * intermediate_size / 128, hidden_size / 128] float32. down: [num_experts, hidden_size, intermediate_size], and
    down_scale likewise. Both sizes are multiples of 128. weights, ids and shared as in `moe_experts`. All contiguous,
    and all but x aligned to 16 bytes. x, and what is between both products, are quantised, 128 elements of a row to a
    scale; sums are in float32. Returns [num_tokens, hidden_size], rounded once. The same inputs give the same bits.

    Stands in for vLLM's `fused_experts` with block-wise float8, its activations' quantisation, and the addition of the
    shared experts' result. Raises Refused for what it does not do.
    """
    if reason := block_fp8_experts_refuses(x, gate_up, gate_up_scale, down, down_scale, weights, ids, shared):
        raise Refused(reason)
    num_tokens, hidden_size = x.shape
    experts = Experts(gate_up.shape[0], ids.shape[1], hidden_size, down.shape[2])
    run = bind_block_fp8_experts(experts, x.dtype, shared is not None, x.get_device())
    out = torch.empty_like(x)
    memory = holding(allocator(x.get_device(), torch.uint8))
    if num_tokens:
        run(
            x.data_ptr(), gate_up.data_ptr(), gate_up_scale.data_ptr(), down.data_ptr(), down_scale.data_ptr(),
            ids.data_ptr(), weights.data_ptr(), 0 if shared is None else shared.data_ptr(), out.data_ptr(), num_tokens,
            memory,
        )  # fmt: skip
    return out


def block_fp8_experts_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    shared: torch.Tensor | None = None,
) -> tuple[torch.Tensor]:
    out = torch.zeros_like(x) if shared is None else shared.clone()
    inside = quantise_reference(x)
    for expert in range(gate_up.shape[0]):
        token, k = (ids == expert).nonzero(as_tuple=True)
        gate, up = (inside[token] @ dequantised(gate_up[expert], gate_up_scale[expert]).T.to(x.dtype)).chunk(2, dim=-1)
        active = quantise_reference(torch.nn.functional.silu(gate) * up)
        y = active @ dequantised(down[expert], down_scale[expert]).T.to(x.dtype)
        out.index_add_(0, token, y * weights[token, k][:, None].to(y.dtype))
    return (out,)


def _case(name: str, tokens: int, experts: Experts, bench: bool = False, **more: Any) -> Case:
    count, topk, hidden, width = experts
    sizes = {"num_tokens": tokens, "experts": count, "topk": topk, "hidden": hidden, "intermediate": width}
    return Case(name, {**sizes, **more}, bench)


_SMALL = Experts(8, 3, 256, 128)

_CASES = (
    _case("one token", 1, _SMALL),
    _case("an expert for each pair", 5, Experts(4, 4, 128, 256), shared=True),
    _case("listed", 30, _SMALL, shared=True),
    _case("many pairs of an expert", 70, Experts(3, 2, 128, 128)),
    _case("a favourite", 40, Experts(30, 2, 128, 128), favourite=True),
    _case("empty", 0, _SMALL),
)


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    tokens, count, topk, hidden, width = (
        case[name] for name in ("num_tokens", "experts", "topk", "hidden", "intermediate")
    )
    order = torch.rand(tokens, count, device=device)
    if case.get("favourite"):
        order[:, 1] = -1.0
    gate_up, gate_up_scale = random_weight((count, 2 * width, hidden), device)
    down, down_scale = random_weight((count, hidden, width), device)
    return {
        "x": randn((tokens, hidden), dtype, device),
        "gate_up": gate_up,
        "gate_up_scale": gate_up_scale,
        "down": down,
        "down_scale": down_scale,
        "weights": torch.rand(tokens, topk, device=device),
        "ids": order.argsort(dim=1)[:, :topk].to(torch.int32).contiguous(),
        "shared": randn((tokens, hidden), dtype, device) if case.get("shared") else None,
    }


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    experts = Experts(case["experts"], case["topk"], case["hidden"], case["intermediate"])
    tokens, kind = max(case["num_tokens"], 1), dtype_of(dtype)
    pairs, by_pair = way_of(experts, tokens)
    for aligned in (True, False):
        yield quantise_build(experts.hidden_size, kind, aligned)
    for gated in (True, False):
        yield experts_build(experts, default_tiling(experts, tokens, gated), gated, pairs, by_pair)
    if not pairs:
        yield _list_build(experts.num_experts)
    yield _sum_build(experts, kind, bool(case.get("shared")))


def _fake(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(x)


BLOCK_FP8_EXPERTS = Kernel(
    name="block_fp8_experts",
    op=block_fp8_experts,
    reference=block_fp8_experts_reference,
    refuses=block_fp8_experts_refuses,
    inputs=_inputs,
    results=("return",),
    cases=(
        *_CASES,
        # Of a sixteenth of the experts, as in `moe_experts`.
        *(
            _case(f"deepseek-v3, 16 experts {tokens}", tokens, MIXTURES["deepseek-v3"]._replace(num_experts=16), True,
                  shared=True, model="deepseek-v3")
            for tokens in (1, 32)
        ),
    ),
    builds=_builds,
    schema="block_fp8_experts(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, "
    "Tensor weights, Tensor ids, Tensor? shared=None) -> Tensor",
    fake=_fake,
    traffic=lambda x, gate_up, gate_up_scale, down, down_scale, weights, ids, shared: nbytes(
        x, gate_up, gate_up_scale, down, down_scale, shared, x
    ),
    dtypes=("bfloat16",),  # in which such models are served
)  # fmt: skip

KERNELS = (BLOCK_FP8_EXPERTS,)
