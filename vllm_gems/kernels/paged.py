"""What the kernels over a paged KV cache share: how pages and tokens are checked, and pages made for cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def pages_refuse(
    block_table: torch.Tensor, seq_lens: torch.Tensor, num_reqs: int, device: torch.device
) -> str | None:
    """None if these are [num_reqs, max_blocks] and [num_reqs] of int32 on `device`, rows contiguous, else why not."""
    for name, x, shape in (("block_table", block_table, (num_reqs, "max_blocks")), ("seq_lens", seq_lens, (num_reqs,))):
        fits = x.dim() == len(shape) and x.shape[0] == num_reqs and (x.shape[-1] <= 1 or x.stride(-1) == 1)
        if not fits or x.dtype != torch.int32 or x.device != device:
            have = f"{x.dtype} {tuple(x.shape)} of strides {x.stride()} on {x.device}"
            wanted = ", ".join(map(str, shape))
            return f"{name} is {have}, expected torch.int32 [{wanted}] on {device}, rows contiguous"
    return None


def tokens_refuse(positions: torch.Tensor, slot_mapping: torch.Tensor, num_tokens: int, of: str) -> str | None:
    """None if each of the tokens of `of` has one position and one slot, integers and contiguous, else why not."""
    for name, x in (("positions", positions), ("slot_mapping", slot_mapping)):
        if x.dtype not in (torch.int32, torch.int64):
            return f"{name} has dtype {x.dtype}, not int32 or int64"
        if x.shape != (num_tokens,) or not x.is_contiguous():
            have = f"{name} of shape {tuple(x.shape)} and strides {x.stride()}"
            return f"{have} is not a contiguous ({num_tokens},), one for each token of {of}"
    return None


def elsewhere(others: Mapping[str, torch.Tensor], of: str, device: torch.device) -> str | None:
    """None if the others are on `device`, where `of` is, else which is not."""
    for name, x in others.items():
        if x.device != device:
            return f"{name} is on {x.device}, {of} on {device}"
    return None


def pages_for(seq_lens: Sequence[int], block_size: int) -> list[int]:
    """How many pages each request has."""
    return [-(-seq_len // block_size) for seq_len in seq_lens]


def random_pages(
    seq_lens: Sequence[int], block_size: int, num_blocks: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_table of requests in shuffled pages, which slots [num_blocks, block_size] hold no token)."""
    pages, longest = pages_for(seq_lens, block_size), max(seq_lens, default=0)
    order = torch.randperm(num_blocks, dtype=torch.int32, device=device)
    # Page ids that would fault, in a table with room for more requests' pages.
    table = torch.full((len(seq_lens), -(-longest // block_size) + 5), 2**30, dtype=torch.int32, device=device)
    unused = torch.ones((num_blocks, block_size), dtype=torch.bool, device=device)
    for request, (count, of) in enumerate(zip(pages, order.split([*pages, num_blocks - sum(pages)]), strict=False)):
        table[request, :count] = of
        slots = torch.arange(seq_lens[request], device=device)
        unused[of.long()[slots // block_size], slots % block_size] = False
    return table[:, : table.shape[1] - 3], unused
