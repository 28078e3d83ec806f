"""The routing of tokens to experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..nouns import Patch


def _grouped_topk(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..faster import key_of, where_faster
    from ..kernels.moe_routing import Routing, bind_grouped_topk
    from ..sites import function

    @functools.cache
    def settled(dtype: Any, bias_dtype: Any, device: int, *routing: Any) -> Callable[..., Any]:
        num_experts, topk, _, groups, kept, scoring, _ = routing
        key = key_of(dtype, "grouped_topk", num_experts, topk, groups, kept, scoring)
        route = bind_grouped_topk(Routing(*routing), dtype, bias_dtype, device)
        return where_faster(site.name, key, device, route, lambda logits, bias: logits.shape[0])

    def call(
        hidden_states: Any,
        gating_output: Any,
        topk: int,
        renormalize: bool,
        num_expert_group: int = 0,
        topk_group: int = 0,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: Any = None,
    ) -> Any:
        shape = gating_output.shape
        if hidden_states.shape[0] != shape[0]:
            raise Refused(f"hidden_states {tuple(hidden_states.shape)} and gating_output {tuple(shape)}")
        bias_dtype = None if e_score_correction_bias is None else e_score_correction_bias.dtype
        route = settled(
            gating_output.dtype, bias_dtype, gating_output.get_device(), shape[-1], topk, renormalize,
            num_expert_group, topk_group, scoring_func, routed_scaling_factor,
        )  # fmt: skip
        return route(gating_output, e_score_correction_bias)

    return function(original, site, call)


PATCHES = (
    Patch(
        "moe.grouped_topk",
        "moe.grouped_topk",
        ("grouped_topk",),
        _grouped_topk,
        "one direct launch where vLLM calls a function that it compiles apart from the model",
    ),
)
