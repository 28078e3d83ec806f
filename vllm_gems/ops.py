"""`torch.ops.vllm_gems.*`: the kernels as PyTorch ops, for tracing.

Compiled code has no original to go back to. So an op here that refuses or raises computes the kernel's reference in
float32 instead, counted, rather than break a graph.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from .errors import LateCompileError
from .nouns import Kernel

logger = logging.getLogger("vllm_gems")

# Calls through torch.ops, by kernel, and those of them that the reference had to do.
CALLS: defaultdict[str, int] = defaultdict(int)  # which counts in a third of a Counter's time
FALLBACKS: Counter[str] = Counter()

# What no guard of ours keeps: the machine's state, and what whoever forbade compilations wants to be stopped by.
PASSING = torch.OutOfMemoryError, LateCompileError

LIBRARY = torch.library.Library("vllm_gems", "FRAGMENT")
_DEFINED: set[str] = set()
_LOCK = threading.Lock()


def define(kernels: Iterable[Kernel]) -> None:
    """Make an op of every kernel that is none yet."""
    with _LOCK:
        for kernel in kernels:
            if kernel.name in _DEFINED:
                continue
            LIBRARY.define(kernel.schema, tags=(torch.Tag.pt2_compliant_tag,))
            for key in ("CUDA", "CPU"):
                LIBRARY.impl(kernel.name, _implementation(kernel), key)
            LIBRARY._register_fake(kernel.name, kernel.fake)
            _DEFINED.add(kernel.name)


def refuse_tangents(name: str) -> None:
    """Raise NotImplementedError where derivatives are computed forwards: PyTorch would take those of an op for zero."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"torch.ops.vllm_gems.{name} has no derivative in forward mode: call PyTorch's own operation there"
        )


def _implementation(kernel: Kernel) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        refuse_tangents(kernel.name)
        try:
            result = kernel.op(*args, **kwargs)
        except PASSING:
            raise
        except Exception:
            if not FALLBACKS[kernel.name]:
                logger.exception("torch.ops.vllm_gems.%s raised; PyTorch's own operations do its work", kernel.name)
            FALLBACKS[kernel.name] += 1
            return by_reference(kernel, *args, **kwargs)
        CALLS[kernel.name] += 1
        return result

    return run


def by_reference(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
    """What `kernel.op` does, by its reference in float32, rounded to the dtypes that the kernel gives."""
    named = inspect.signature(kernel.op).bind(*args, **kwargs).arguments
    floats = [value for value in args if isinstance(value, torch.Tensor) and value.is_floating_point()]
    wide = [value.float() if any(value is each for each in floats) else value for value in args]
    results = kernel.reference(*wide, **kwargs)
    fakes = kernel.fake(*args, **kwargs)
    likes = iter((fakes,) if isinstance(fakes, torch.Tensor) else fakes or ())
    returned = []
    for where, value in zip(kernel.results, results, strict=True):
        if where.startswith("return"):
            returned.append(value.to(next(likes).dtype))
        elif value is not None:
            named[where].copy_(value)
    if not returned:
        return None
    return returned[0] if len(returned) == 1 else tuple(returned)
