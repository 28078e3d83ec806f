"""The attention layer's way to its backend: a call where vLLM, for torch.compile's sake, enters the dispatcher."""

from __future__ import annotations

import functools
from typing import Any

from ..nouns import Patch


def _direct_call(original: Any, site: Any) -> Any:
    from ..sites import is_tracing

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        if own["use_direct_call"] or is_tracing():
            return original(self, *args, **kwargs)
        # vLLM's own branch for platforms that compile attention with the rest. For this call only: compiled code that
        # found the flag set would trace what it must keep opaque.
        own["use_direct_call"] = True
        site.hits += 1
        try:
            return original(self, *args, **kwargs)
        finally:
            own["use_direct_call"] = False

    forward.__vllm_gems__ = site  # type: ignore[attr-defined]
    return forward


PATCHES = (
    Patch(
        "attention.direct_call",
        "layer.attention",
        (),
        _direct_call,
        "two entries into Python through the dispatcher less for each attention layer",
    ),
)
