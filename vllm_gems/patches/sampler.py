"""What the sampler does to the logits of a step."""

from __future__ import annotations

from typing import Any

from ..nouns import Patch


def _top_k_top_p(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..faster import Decisions, check
    from ..kernels.top_p import top_p
    from ..sites import function

    decisions = Decisions(site.name, top_p.__module__)

    def call(logits: Any, k: Any, p: Any, has_topp_only_rows: bool = True) -> Any:
        if k is not None:
            raise Refused("a top-k")
        if p is None:
            raise Refused("neither top-k nor top-p")
        rows, vocab_size = logits.shape
        if slower := decisions[logits.get_device(), logits.dtype, "top_p", vocab_size]:
            check(slower, rows)
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
