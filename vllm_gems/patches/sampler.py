"""What the sampler does to the logits of a step."""

from __future__ import annotations

from typing import Any

from ..nouns import Patch


def _top_k_top_p(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..kernels.top_p import bind_top_p, top_p
    from ..sites import function

    def call(logits: Any, k: Any, p: Any, has_topp_only_rows: bool = True) -> Any:
        if k is not None:
            # vLLM warms up with both; when a request comes with top-p alone, it is too late to compile.
            bind_top_p(logits.shape[-1], logits.dtype, logits.get_device())
            raise Refused("a top-k")
        if p is None:
            raise Refused("neither top-k nor top-p")
        top_p(logits, p)
        return logits

    return function(original, site, call)


PATCHES = (
    Patch(
        "sampler.top_p",
        "sampler.top_k_top_p",
        ("top_p",),
        _top_k_top_p,
        "a row is shared by many programs where vLLM has one, or sorts it",
        default=False,
    ),
)
