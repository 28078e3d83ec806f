"""What several kernel files share: sizes, tensors for their cases, and the model shapes they are tried on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# The token counts at which kernels are timed: one request, small and large decode batches, prefills.
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not less than `value`."""
    return 1 << max(value - 1, 0).bit_length()


def dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def randn(shape: Sequence[int], dtype: str, device: str, scale: float = 1.0) -> torch.Tensor:
    """Normal values rounded to `dtype`, drawn in float32 so that every dtype sees the same distribution."""
    return (torch.randn(tuple(shape), device=device) * scale).to(dtype_of(dtype))


def strided(shape: Sequence[int], dtype: str, device: str, gap: int, offset: int = 0) -> torch.Tensor:
    """A view of `shape` whose rows lie `gap` elements further apart than they are long, `offset` into its storage."""
    *outer, last = shape
    wide = randn((*outer, offset + last + gap), dtype, device)
    return wide[..., offset : offset + last]


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of `tensors`, gaps between rows not counted."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def rows_of(x: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(rows, inner, outer_stride, inner_stride) of `x` seen as rows of its last dimension.

    Row r begins at (r // inner) * outer_stride + (r % inner) * inner_stride elements. None if the rows need more than
    two strides, or if the last dimension is not contiguous.
    """
    shape, strides = x.shape, x.stride()
    if strides[-1] != 1 and shape[-1] > 1:
        return None
    # Merge leading dimensions as long as they are one walk through memory.
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == size * step:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    if len(sizes) > 2:
        return None
    if not sizes:
        return 1, 1, shape[-1], 0
    if len(sizes) == 1:
        return sizes[0], 1, steps[0], 0
    return sizes[0] * sizes[1], sizes[1], steps[0], steps[1]
