"""Top-p sampling's mask: of each row of logits all but the most probable ones that together reach p.

The least logit that stays is found digit by digit, four bits of its ordered integer at a time, from the probability of
each of sixteen ranges. A launch is one digit; a row is shared by as many programs as it has tiles, which leave their
sums for the next launch. Eight digits are all of a float32, so the number of launches never depends on the data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..errors import Refused
from ..launch import Build, allocator, launcher, pointer
from ..nouns import Case, Kernel
from .common import dtype_of, nbytes, power_of_two, strided

# Logits of a program, read in chunks: what its threads need at a time.
_TILE, _CHUNK = 8192, 1024
_DIGITS = 8
MAX_VOCAB = 1 << 20


@triton.jit
def _ordered(x):
    """An unsigned integer that is greater where x is; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _narrowed(row, digits, p_ptr, peaks_ptr, masses_ptr, prefix_ptr, spare_ptr, num_rows, SPLITS, PADDED: tl.constexpr):
    """What is known after so many digits, one or more: (the digits, the probability that may still go, the row's
    highest logit, what each split has in the ranges of the last digit, which range it is). Unnormalised probabilities.
    """
    split = tl.arange(0, PADDED)
    live = split < SPLITS
    digit = tl.arange(0, 16)
    peak = tl.load(peaks_ptr + row * SPLITS + split, mask=live, other=-float("inf"))
    top = tl.max(peak, axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    at = (((digits - 1) * num_rows + row) * SPLITS + split)[:, None] * 16 + digit[None, :]
    mass = tl.load(masses_ptr + at, mask=live[:, None], other=0.0)
    if digits == 1:  # which was summed before the row's highest was known
        mass *= tl.exp(peak - top)[:, None]
    ranges = tl.sum(mass, axis=0)
    if digits == 1:
        prefix = tl.zeros((), tl.uint32)
        spare = (1.0 - tl.load(p_ptr + row)) * tl.sum(ranges, axis=0)
    else:
        before = (digits - 1) * num_rows + row
        prefix = tl.load(prefix_ptr + before).to(tl.uint32, bitcast=True)
        spare = tl.load(spare_ptr + before)
    # The first range that is not spared whole. Rounding can leave none: then the highest that has something.
    some = ranges > 0.0
    chosen = tl.min(tl.where(some & (tl.cumsum(ranges, axis=0) > spare), digit, 16), axis=0)
    chosen = tl.where(chosen < 16, chosen, tl.max(tl.where(some, digit, 0), axis=0))
    spare -= tl.sum(tl.where(digit < chosen, ranges, 0.0), axis=0)
    return (prefix << 4) | chosen.to(tl.uint32), spare, top, mass, chosen


@triton.jit
def _top_p_digit_kernel(
    # Tensors
    logits_ptr,  # [num_rows, VOCAB], rows apart
    p_ptr,  # [num_rows]
    peaks_ptr,  # [num_rows, SPLITS], the highest logit of each tile
    masses_ptr,  # [8, num_rows, SPLITS, 16], what a tile has in each range of each digit
    prefix_ptr,  # [9, num_rows], the digits so far
    spare_ptr,  # [9, num_rows], the probability that may still go
    # Scalars
    row_stride,
    num_rows,
    digits,  # that are known
    # Constexprs
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
):
    SPLITS: tl.constexpr = (VOCAB + TILE - 1) // TILE
    row = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    logits_ptr += row.to(tl.int64) * row_stride
    prefix = tl.zeros((), tl.uint32)
    if digits == 0:
        highest = tl.full((CHUNK,), -float("inf"), tl.float32)
        for start in range(0, TILE, CHUNK):
            at = split * TILE + start + tl.arange(0, CHUNK)
            x = tl.load(logits_ptr + at, mask=at < VOCAB, other=-float("inf")).to(tl.float32)
            highest = tl.maximum(highest, x)
        top = tl.max(highest, axis=0)
        tl.store(peaks_ptr + row * SPLITS + split, top)
        top = tl.where(top == -float("inf"), 0.0, top)
    else:
        prefix, spare, top, _, _ = _narrowed(
            row, digits, p_ptr, peaks_ptr, masses_ptr, prefix_ptr, spare_ptr, num_rows, SPLITS, PADDED
        )
        if split == 0:
            tl.store(prefix_ptr + digits * num_rows + row, prefix.to(tl.int32, bitcast=True))
            tl.store(spare_ptr + digits * num_rows + row, spare)
    digit = tl.arange(0, 16)
    shift = 28 - 4 * digits
    mass = tl.zeros((16, CHUNK), tl.float32)
    for start in range(0, TILE, CHUNK):
        at = split * TILE + start + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + at, mask=at < VOCAB, other=-float("inf")).to(tl.float32)
        key = _ordered(x) >> shift
        # By four bits more, because a shift by all 32 is none.
        weight = tl.where((key >> 4) == prefix, tl.exp(x - top), 0.0)
        mass += tl.where((key & 15).to(tl.int32)[None, :] == digit[:, None], weight[None, :], 0.0)
    at = ((digits * num_rows + row) * SPLITS + split) * 16 + digit
    tl.store(masses_ptr + at, tl.sum(mass, axis=1))


@triton.jit
def _top_p_mask_kernel(
    # Tensors, as above
    logits_ptr,
    p_ptr,
    peaks_ptr,
    masses_ptr,
    prefix_ptr,
    spare_ptr,
    # Scalars
    row_stride,
    num_rows,
    # Constexprs
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
):
    SPLITS: tl.constexpr = (VOCAB + TILE - 1) // TILE
    row = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    if tl.load(p_ptr + row) >= 1.0:
        return
    least, spare, top, mass, chosen = _narrowed(
        row, 8, p_ptr, peaks_ptr, masses_ptr, prefix_ptr, spare_ptr, num_rows, SPLITS, PADDED
    )
    # Logits that equal the least one: as many go, the last ones, as may.
    bits = least.to(tl.int32, bitcast=True)
    each = tl.exp(tl.where(bits < 0, bits ^ -0x80000000, ~bits).to(tl.float32, bitcast=True) - top)
    splits = tl.arange(0, PADDED)
    equal = tl.sum(tl.where(tl.arange(0, 16)[None, :] == chosen, mass, 0.0), axis=1)
    equal = tl.floor(equal / each + 0.5).to(tl.int32)
    total = tl.sum(equal, axis=0)
    gone = tl.minimum(tl.maximum(spare / each, 0.0), (total - 1).to(tl.float32)).to(tl.int32)
    stay = total - gone - tl.sum(tl.where(splits < split, equal, 0), axis=0)

    at = split * TILE + tl.arange(0, TILE)
    logits_ptr += row.to(tl.int64) * row_stride
    x = tl.load(logits_ptr + at, mask=at < VOCAB, other=-float("inf"))
    key = _ordered(x.to(tl.float32))
    ties = (key == least) & (at < VOCAB)
    rank = tl.cumsum(ties.to(tl.int32), axis=0)
    goes = (key < least) | (ties & (rank > stay))
    tl.store(logits_ptr + at, tl.full((TILE,), -float("inf"), logits_ptr.dtype.element_ty), mask=goes & (at < VOCAB))


def _splits(vocab_size: int) -> int:
    return triton.cdiv(vocab_size, _TILE)


def _build(vocab_size: int, dtype: torch.dtype, digit: bool, aligned: bool = True) -> Build:
    padded = max(2, power_of_two(_splits(vocab_size)))
    scratch = "*fp32", "*fp32", "*i32", "*fp32"
    chunk = (("CHUNK", _CHUNK),) if digit else ()
    return Build(
        function=_top_p_digit_kernel if digit else _top_p_mask_kernel,
        types=(pointer(dtype), "*fp32", *scratch, "i32/16", "i32", *(("i32",) if digit else ())),
        constexprs=(("VOCAB", vocab_size), ("TILE", _TILE), *chunk, ("PADDED", padded)),
        aligned=aligned,
        num_warps=8,
    )


def _never(vocab_size: int, dtype: torch.dtype) -> str | None:
    """Why no call with these can be done; None if some can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"logits has dtype {dtype}, not float16, bfloat16 or float32"
    if not 1 <= vocab_size <= MAX_VOCAB:
        return f"logits has rows of {vocab_size} elements, not between 1 and {MAX_VOCAB}"
    return None


@functools.cache
def bind_top_p(vocab_size: int, dtype: torch.dtype, device: int) -> Callable[[int, int, int, int], None]:
    """`top_p` with everything settled that a model knows for ever.

    mask(logits_at, row_stride, p_at, num_rows) takes addresses, launches nine times, and checks nothing but alignment.
    What aligned tensors need is compiled now, the rest at first use. Raises Refused for what is not for us.
    """
    if reason := _never(vocab_size, dtype):
        raise Refused(reason)
    empty = allocator(device, torch.float32)
    splits = _splits(vocab_size)

    @functools.cache
    def chosen(aligned: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        digit, mask = (_build(vocab_size, dtype, digit, aligned) for digit in (True, False))
        return launcher(digit, device), launcher(mask, device)

    chosen(True)

    def mask(logits_at: int, row_stride: int, p_at: int, num_rows: int) -> None:
        digit, finish = chosen(not (logits_at | p_at | row_stride) & 15)
        rows = (num_rows + 3) // 4 * 4  # so that what follows begins at a multiple of 16 bytes
        # Freed on return, for what this stream does next.
        scratch = empty(1, rows * ((_DIGITS * 16 + 1) * splits + 2 * (_DIGITS + 1)))
        masses_at = scratch.data_ptr()
        peaks_at = masses_at + 4 * _DIGITS * 16 * splits * rows
        prefix_at = peaks_at + 4 * splits * rows
        spare_at = prefix_at + 4 * (_DIGITS + 1) * rows
        known = p_at, peaks_at, masses_at, prefix_at, spare_at, row_stride, num_rows
        for digits in range(_DIGITS):
            digit(num_rows * splits, logits_at, *known, digits)
        finish(num_rows * splits, logits_at, *known)

    return mask


def top_p_refuses(logits: torch.Tensor, p: torch.Tensor) -> str | None:
    """None if `top_p` does this, else why not."""
    if logits.dim() != 2:
        return f"logits of shape {tuple(logits.shape)} is not [num_rows, vocab_size]"
    if reason := _never(logits.shape[1], logits.dtype):
        return reason
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        return f"logits of strides {logits.stride()} is not rows of contiguous elements"
    if logits.stride(0) >= 2**31 or (logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]):
        return f"logits of strides {logits.stride()} has rows that overlap, or 2**31 elements apart"
    if p.shape != logits.shape[:1] or p.dtype != torch.float32 or p.device != logits.device or not p.is_contiguous():
        have = f"{p.dtype} {tuple(p.shape)} of strides {p.stride()} on {p.device}"
        return f"p is {have}, expected torch.float32 ({logits.shape[0]},) on {logits.device}, contiguous"
    return None


def top_p(logits: torch.Tensor, p: torch.Tensor) -> None:
    """In place: minus infinity for all logits of a row but the most probable ones that together have p of the softmax.

    logits: [num_rows, vocab_size], float16, bfloat16 or float32; rows may lie apart. p: [num_rows] float32; from 1 on
    all stay, and one always does. Of equal logits the first ones stay. Probabilities are summed in float32.

    Source: https://arxiv.org/abs/1904.09751. Stands in for vLLM's `apply_top_k_top_p` without a top-k. Raises Refused
    for what it does not do.
    """
    if reason := top_p_refuses(logits, p):
        raise Refused(reason)
    num_rows, vocab_size = logits.shape
    if num_rows:
        mask = bind_top_p(vocab_size, logits.dtype, logits.get_device())
        mask(logits.data_ptr(), logits.stride(0) if num_rows > 1 else 16, p.data_ptr(), num_rows)


def top_p_reference(logits: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor]:
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probabilities = logits.gather(1, order).softmax(dim=-1)
    below = probabilities.flip(-1).cumsum(dim=-1).flip(-1)  # of each and all after it
    stays = below > 1.0 - p.unsqueeze(1)
    stays[:, :1] = True
    stays |= (p >= 1.0).unsqueeze(1)
    return (logits.masked_fill(~torch.zeros_like(stays).scatter(1, order, stays), float("-inf")),)


_MODELS = {"qwen2.5-7b": 152064, "llama-3.1-8b": 128256}

_CASES = (
    Case("one row", {"rows": 1, "vocab": 1000}),
    Case("several tiles", {"rows": 2, "vocab": 2 * _TILE + 77}),
    Case("equal logits", {"rows": 2, "vocab": 515, "step": 0.5}),
    Case("equal logits in several tiles", {"rows": 1, "vocab": _TILE + 900, "step": 1.0}),
    Case("all equal", {"rows": 1, "vocab": 300, "step": 100.0}),
    Case("two in all", {"rows": 1, "vocab": 2}),
    Case("some are out already", {"rows": 2, "vocab": 700, "out": True}),
    Case("p at its ends", {"rows": 4, "vocab": 333, "p": (0.0, 1e-6, 1.0, 2.0)}),
    Case("rows apart", {"rows": 2, "vocab": 640, "gap": 32}),
    Case("misaligned", {"rows": 2, "vocab": 501, "gap": 2, "offset": 1}),
    Case("empty", {"rows": 0, "vocab": 100}),
    *(
        Case(f"{model} {rows}", {"rows": rows, "vocab": vocab}, True)
        for model, vocab in _MODELS.items()
        for rows in (1, 8, 32, 256)
    ),
)


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    rows, vocab = case["rows"], case["vocab"]
    logits = strided((rows, vocab), dtype, device, case.get("gap", 0), case.get("offset", 0))
    logits *= 3.0
    if step := case.get("step"):
        logits.div_(step).round_().mul_(step)
    if case.get("out"):
        logits[:, ::3] = float("-inf")
    p = torch.tensor(case["p"], device=device) if "p" in case.params else torch.rand(rows, device=device) * 0.9 + 0.05
    return {"logits": logits, "p": p}


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    for aligned in (True, False):
        for digit in (True, False):
            yield _build(case["vocab"], dtype_of(dtype), digit, aligned)


TOP_P = Kernel(
    name="top_p",
    op=top_p,
    reference=top_p_reference,
    refuses=top_p_refuses,
    inputs=_inputs,
    results=("logits",),
    cases=_CASES,
    builds=_builds,
    schema="top_p(Tensor(a!) logits, Tensor p) -> ()",
    fake=lambda logits, p: None,
    # Once for each digit and the mask, which also writes.
    traffic=lambda logits, p: (_DIGITS + 2) * nbytes(logits),
)

KERNELS = (TOP_P,)
