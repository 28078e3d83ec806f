"""The routing of tokens to experts."""

from __future__ import annotations

from typing import Any

from ..nouns import Patch


def _grouped_topk(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..faster import Decisions, check
    from ..kernels.moe_routing import Routing, bind_grouped_topk
    from ..sites import function

    decisions = Decisions(site.name, bind_grouped_topk.__module__)

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
        routing = Routing(
            shape[-1], topk, renormalize, num_expert_group, topk_group, scoring_func, routed_scaling_factor
        )
        dtype, device = gating_output.dtype, gating_output.get_device()
        of = shape[-1], topk, num_expert_group, topk_group, scoring_func
        if slower := decisions[(device, dtype, "grouped_topk", *of)]:
            check(slower, shape[0])
        route = bind_grouped_topk(routing, dtype, bias_dtype, device)
        return route(gating_output, e_score_correction_bias)

    return function(original, site, call)


PATCHES = (
    Patch(
        "moe.grouped_topk",
        "moe.grouped_topk",
        ("grouped_topk",),
        _grouped_topk,
        "one direct launch where vLLM calls a function that it compiles apart from the model",
        default=False,
    ),
)
