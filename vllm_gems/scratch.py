"""Memory that kernels need beside their arguments and leave as they found it."""

from __future__ import annotations

import threading
from typing import Any

import torch

from .launch import CPU, recording

_LEAST = 4096  # 16 KiB, enough for the decode batches of most models

# (device, raw stream) -> zeros. Kernels of one stream follow one another, those of two may run at once.
_COUNTERS: dict[tuple[int, int], torch.Tensor] = {}
_LOCK = threading.Lock()


def counters(device: int, count: int) -> torch.Tensor:
    """At least `count` int32 zeros for a kernel on `device`'s current stream, which leaves them zero when it is done.

    The same buffer at every call on a stream, until it has to grow. While a CUDA graph is being captured new ones: the
    graph may be replayed on any stream, and brings the filling with zeros along.
    """
    stream = 0
    if device != CPU:
        core: Any = torch._C
        if core._cuda_isCurrentStreamCapturing():
            return _zeros(device, count)
        stream = core._cuda_getCurrentRawStream(device)
    found = _COUNTERS.get((device, stream))
    if found is None or found.numel() < count:
        with _LOCK:
            found = _COUNTERS.get((device, stream))
            if found is None or found.numel() < count:
                # What it replaces goes back to PyTorch's allocator, which gives it to no other stream.
                found = _COUNTERS[device, stream] = _zeros(device, max(_LEAST, 1 << (count - 1).bit_length()))
    if tape := recording():
        tape.hold(found)
    return found


def _zeros(device: int, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=_where(device))


def _where(device: int) -> torch.device:
    return torch.device("cpu") if device == CPU else torch.device("cuda", device)


_LEAST_ARENA = 1 << 20
_ALIGNMENT = 256

# (device, raw stream, thread) -> bytes that hold nothing between the launches of one call. A thread makes all launches
# of a call before it makes others; what another thread launches in between has its own.
_ARENAS: dict[tuple[int, int, int], tuple[int, int, torch.Tensor]] = {}


def arena(device: int, stream: int, nbytes: int) -> int:
    """The address of at least `nbytes` bytes for what this thread launches next on `device`'s current stream `stream`.

    Its contents are anybody's. It grows by powers of two, and stays.
    """
    key = device, stream, threading.get_ident()
    found = _ARENAS.get(key)
    if found is None or found[0] < nbytes:
        size = max(_LEAST_ARENA, 1 << (nbytes - 1).bit_length())
        # What it replaces goes back to PyTorch's allocator, which gives it to no other stream.
        memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=_where(device))
        found = _ARENAS[key] = size, -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT, memory
    return found[1]
