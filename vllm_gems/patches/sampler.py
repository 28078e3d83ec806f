"""What the sampler does to the logits of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..nouns import Patch

# Rows of logits that are ours on GPUs where nothing was measured. Somewhere from 64 to 128 on vLLM's kernel, whose
# programs have a row each, is faster on an H100.
_MOST_UNMEASURED = 32


def warm_original(original: Any, logits: Any, p: Any) -> None:
    """Have vLLM compile what it needs of top-p alone, for what is left to it.

    Triton compiles its kernel anew for numbers of rows that 16 divides, and vLLM takes it from 8 rows on.
    """
    for rows in (16, 15):
        if rows <= logits.shape[0]:
            original(logits[:rows].clone(), None, p[:rows])


def _top_k_top_p(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..faster import key_of, where_faster
    from ..kernels.top_p import top_p
    from ..launch import watched
    from ..sites import function

    @functools.cache
    def settled(dtype: Any, vocab_size: int, device: int) -> Callable[..., None]:
        key = key_of(dtype, "top_p", vocab_size)
        return where_faster(site.name, key, device, top_p, lambda logits, p: logits.shape[0], _MOST_UNMEASURED)

    warm = set()

    def call(logits: Any, k: Any, p: Any, has_topp_only_rows: bool = True) -> Any:
        of = logits.dtype, logits.shape[-1], logits.get_device()
        if k is not None:
            # vLLM warms up with both; when a request comes with top-p alone, it is too late to compile, and the first
            # would wait for what is looked up and loaded.
            if p is not None and of not in warm and not watched():
                warm.add(of)
                if logits.is_cuda:
                    warm_original(original, logits, p)
                settled(*of)
                top_p(logits[:1].clone(), p[:1])
            raise Refused("a top-k")
        if p is None:
            raise Refused("neither top-k nor top-p")
        settled(*of)(logits, p)
        return logits

    return function(original, site, call)


PATCHES = (
    Patch(
        "sampler.top_p",
        "sampler.top_k_top_p",
        ("top_p",),
        _top_k_top_p,
        "a row is shared by many programs where vLLM has one, or sorts it",
    ),
)
