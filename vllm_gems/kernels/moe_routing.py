"""Grouped top-k routing: from a router's logits to each token's experts and their weights, in one launch.

A program is one token and, up to 512 experts, one warp: nothing leaves its registers between the logits and the result,
and reductions never wait for another warp. Scores are ordered as integers, which keeps NaN in the order, finds the
largest in one instruction per warp where the GPU has one, and leaves room below all scores for what is out of the race.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..errors import Refused
from ..launch import Build, Launch, allocator, launcher, pointer
from ..nouns import Case, Kernel
from .common import TOKENS, dtype_of, nbytes, power_of_two, randn, strided

MAX_EXPERTS = 2048
MAX_TOPK = 32


@triton.jit
def _score(x, most, total, SCORING: tl.constexpr):
    """What softmax or sigmoid make of a logit, by PyTorch's order of operations."""
    if SCORING == "softmax":
        y = tl.div_rn(libdevice.exp(x - most), total)
    else:
        y = tl.div_rn(1.0, 1.0 + libdevice.exp(-x))
    return y


@triton.jit
def _ordered(x):
    """An integer that is greater where x is, and greatest where x is NaN; never the least one."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _grouped_topk_kernel(
    # Tensors
    logits_ptr,  # [num_tokens, EXPERTS], rows apart
    bias_ptr,  # [EXPERTS], or None
    weights_ptr,  # [num_tokens, TOPK], float32
    ids_ptr,  # [num_tokens, TOPK], int32
    # Scalars
    logits_stride,
    factor,
    # Constexprs
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,  # groups; if that is all of them, they are not looked at
    TOPK: tl.constexpr,
    SCORING: tl.constexpr,  # "softmax" or "sigmoid"
    RENORMALIZE: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,  # powers of two
    WIDTH_BLOCK: tl.constexpr,  # of a group, or of all experts where groups are not looked at
    TOPK_BLOCK: tl.constexpr,
):
    OUT: tl.constexpr = -0x80000000  # out of the race: less than `_ordered` of anything
    WIDTH: tl.constexpr = EXPERTS // GROUPS if KEPT < GROUPS else EXPERTS
    token = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + token * logits_stride

    group = tl.arange(0, GROUPS_BLOCK)
    within = tl.arange(0, WIDTH_BLOCK)
    expert = group[:, None] * WIDTH + within[None, :]
    live = (group[:, None] * WIDTH < EXPERTS) & (within[None, :] < WIDTH)
    x = tl.load(logits + expert, mask=live, other=-float("inf")).to(tl.float32)
    most = 0.0
    total = 1.0
    if SCORING == "softmax":
        most = tl.max(x)
        total = tl.sum(libdevice.exp(x - most))
    choice = _score(x, most, total, SCORING)
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert, mask=live, other=0.0).to(tl.float32)
    key = tl.where(live, _ordered(choice), OUT)

    if KEPT < GROUPS:
        best = tl.max(key, axis=1)
        if bias_ptr is not None:
            # The sum of the two best, the second of which may equal the first.
            first = tl.min(tl.where(key == best[:, None], within[None, :], WIDTH), axis=1)
            second = tl.max(tl.where(within[None, :] == first[:, None], OUT, key), axis=1)
            # `_ordered` is its own inverse.
            first_choice = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            second_choice = (second ^ ((second >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            best = tl.where(group < GROUPS, _ordered(first_choice + second_choice), OUT)
        # How many groups are better than each.
        mine = best[:, None]
        other = best[None, :]
        is_better = (other > mine) | ((other == mine) & (group[None, :] < group[:, None]))
        rank = tl.sum(is_better.to(tl.int32), axis=1)
        key = tl.where(rank[:, None] < KEPT, key, OUT)

    key = tl.reshape(key, (GROUPS_BLOCK * WIDTH_BLOCK,))
    expert = tl.reshape(expert, (GROUPS_BLOCK * WIDTH_BLOCK,))
    slot = tl.arange(0, TOPK_BLOCK)
    ids = tl.zeros((TOPK_BLOCK,), tl.int32)
    for k in range(TOPK):
        chosen = tl.min(tl.where(key == tl.max(key), expert, EXPERTS))
        ids = tl.where(slot == k, chosen, ids)
        key = tl.where(expert == chosen, OUT, key)

    # Read again rather than summed out of the registers that have them: one access for all, which the cache answers.
    filled = slot < TOPK
    x = tl.load(logits + ids, mask=filled, other=0.0).to(tl.float32)
    weights = _score(x, most, total, SCORING)
    if RENORMALIZE:
        weights = tl.div_rn(weights, tl.sum(tl.where(filled, weights, 0.0)) + 1e-20)
    tl.store(weights_ptr + token * TOPK + slot, weights * factor, mask=filled)
    tl.store(ids_ptr + token * TOPK + slot, ids, mask=filled)


class Routing(NamedTuple):
    """What a router knows for ever."""

    num_experts: int
    topk: int
    renormalize: bool
    num_expert_group: int = 1
    topk_group: int = 1
    scoring_func: str = "softmax"
    routed_scaling_factor: float = 1.0


def _build(
    routing: Routing, dtype: torch.dtype, bias_dtype: torch.dtype | None, aligned: bool = True
) -> Build:
    experts, groups, kept = routing.num_experts, routing.num_expert_group, routing.topk_group
    grouped = kept < groups
    groups_block = power_of_two(groups) if grouped else 1
    width_block = power_of_two(experts // groups if grouped else experts)
    return Build(
        function=_grouped_topk_kernel,
        types=(pointer(dtype), bias_dtype and pointer(bias_dtype), "*fp32", "*i32", "i32/16", "fp32"),
        constexprs=(
            ("EXPERTS", experts),
            ("GROUPS", groups if grouped else 1),
            ("KEPT", kept if grouped else 1),
            ("TOPK", routing.topk),
            ("SCORING", routing.scoring_func),
            ("RENORMALIZE", bool(routing.renormalize)),
            ("GROUPS_BLOCK", groups_block),
            ("WIDTH_BLOCK", width_block),
            ("TOPK_BLOCK", power_of_two(routing.topk)),
        ),
        aligned=aligned,
        num_warps=max(1, groups_block * width_block // 512),
    )


def _never(routing: Routing, has_bias: bool) -> str | None:
    """Why no logits can be routed so."""
    experts, topk, _, groups, kept, scoring, _ = routing
    if scoring not in ("softmax", "sigmoid"):
        return f"scoring_func is {scoring!r}, not 'softmax' or 'sigmoid'"
    if not 1 <= experts <= MAX_EXPERTS:
        return f"{experts} experts are not between 1 and {MAX_EXPERTS}"
    if groups < 1 or experts % groups:
        return f"num_expert_group {groups} does not divide {experts} experts"
    if not 1 <= kept <= groups:
        return f"topk_group {kept} is not between 1 and num_expert_group {groups}"
    if not 1 <= topk <= min(MAX_TOPK, kept * (experts // groups)):
        return f"topk {topk} is not between 1 and {MAX_TOPK}, or exceeds the {kept * (experts // groups)} experts kept"
    if has_bias and experts // groups < 2:
        return "with e_score_correction_bias a group's score is the sum of two, and groups have one expert"
    return None


def _unlike(gating_output: torch.Tensor, bias: torch.Tensor | None) -> str:
    have = f"gating_output is {gating_output.dtype} {tuple(gating_output.shape)} of strides {gating_output.stride()}"
    if bias is not None:
        have += f", e_score_correction_bias {bias.dtype} {tuple(bias.shape)} on {bias.device}"
    return f"{have} on {gating_output.device}, unlike what the call was settled for"


@functools.cache
def bind_routing(
    routing: Routing, dtype: torch.dtype, bias_dtype: torch.dtype | None, device: int
) -> Callable[[int, int, int, int, int, int], None]:
    """`grouped_topk` by addresses, for those who have checked their tensors.

    route(logits_at, logits_stride, bias_at, weights_at, ids_at, num_tokens); bias_at is 0 without one.
    """
    if reason := _never(routing, bias_dtype is not None):
        raise Refused(reason)
    factor = float(routing.routed_scaling_factor)

    @functools.cache
    def launch_for(aligned: bool) -> Launch:
        return launcher(_build(routing, dtype, bias_dtype, aligned), device)

    aligned_launch = launch_for(True)

    def route(
        logits_at: int, logits_stride: int, bias_at: int, weights_at: int, ids_at: int, num_tokens: int
    ) -> None:
        launch = aligned_launch
        if (logits_at | bias_at | weights_at | ids_at | logits_stride) & 15:
            launch = launch_for(False)
        launch(num_tokens, logits_at, bias_at, weights_at, ids_at, logits_stride, factor)

    return route


@functools.cache
def bind_grouped_topk(
    routing: Routing, dtype: torch.dtype, bias_dtype: torch.dtype | None, device: int
) -> Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]:
    """`grouped_topk` with everything settled that a router knows for ever: call(gating_output, bias) -> weights, ids.

    bias_dtype: None for a router without `e_score_correction_bias`.
    """
    if reason := _never(routing, bias_dtype is not None):
        raise Refused(reason)
    experts, topk = routing.num_experts, routing.topk
    route = bind_routing(routing, dtype, bias_dtype, device)
    empty_weights, empty_ids = allocator(device, torch.float32), allocator(device, torch.int32)

    def call(gating_output: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        shape, strides = gating_output.shape, gating_output.stride()
        if gating_output.dtype is not dtype or gating_output.get_device() != device or len(shape) != 2:
            raise Refused(_unlike(gating_output, bias))
        if shape[1] != experts or (strides[1] != 1 and experts > 1):
            raise Refused(_unlike(gating_output, bias))
        if bias is None:
            if bias_dtype is not None:
                raise Refused(_unlike(gating_output, bias))
            bias_at = 0
        else:
            if bias.dtype is not bias_dtype or bias.get_device() != device or bias.shape != (experts,):
                raise Refused(_unlike(gating_output, bias))
            if not bias.is_contiguous():
                raise Refused(f"e_score_correction_bias of strides {bias.stride()} is not contiguous")
            bias_at = bias.data_ptr()
        tokens, stride = shape[0], strides[0]
        weights, ids = empty_weights(tokens, topk), empty_ids(tokens, topk)
        route(gating_output.data_ptr(), stride, bias_at, weights.data_ptr(), ids.data_ptr(), tokens)
        return weights, ids

    return call


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def grouped_topk_refuses(
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 1,
    topk_group: int = 1,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> str | None:
    """None if `grouped_topk` does this, else why not."""
    bias = e_score_correction_bias
    if gating_output.dtype not in _FLOATS:
        return f"gating_output has dtype {gating_output.dtype}, not float16, bfloat16 or float32"
    if gating_output.dim() != 2:
        return f"gating_output is of shape {tuple(gating_output.shape)}, not [num_tokens, num_experts]"
    experts = gating_output.shape[1]
    if gating_output.stride(1) != 1 and experts > 1:
        return f"gating_output of strides {gating_output.stride()} is not rows of contiguous elements"
    if bias is not None:
        if bias.dtype not in _FLOATS:
            return f"e_score_correction_bias has dtype {bias.dtype}, not float16, bfloat16 or float32"
        if bias.shape != (experts,) or bias.device != gating_output.device or not bias.is_contiguous():
            have = f"{tuple(bias.shape)} on {bias.device} with strides {bias.stride()}"
            return f"e_score_correction_bias is {have}, expected a contiguous ({experts},) on {gating_output.device}"
    routing = Routing(
        experts, topk, renormalize, num_expert_group, topk_group, scoring_func, routed_scaling_factor
    )
    return _never(routing, bias is not None)


def grouped_topk(
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 1,
    topk_group: int = 1,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights, by DeepSeek's grouped top-k (https://arxiv.org/abs/2412.19437).

    gating_output: [num_tokens, num_experts] logits, float16, bfloat16 or float32, at most 2048 experts; rows may lie
    apart. A token's scores are the softmax or sigmoid of its logits. Of num_expert_group groups of neighbouring experts
    the topk_group best are kept, and of their experts the topk best, at most 32. e_score_correction_bias [num_experts]
    is added to the scores for these choices alone; a group is then as good as the sum of its two best, without it as
    its best. renormalize: a token's weights are divided by their sum plus 1e-20. routed_scaling_factor: then times it.
    Returns weights [num_tokens, topk] in float32 and ids [num_tokens, topk] in int32, the best first.

    All in float32, the scores too: vLLM rounds them to the logits' dtype on some paths, and then has ties to break that
    are none here. Among equals the lowest index wins, where `torch.topk` does not say which. NaN is better than any
    number, as for `torch.topk`, so that it shows in the weights; ids are always distinct and of experts that there are.

    Stands in for vLLM's `grouped_topk`. Raises Refused for what it does not do.
    """
    bias = e_score_correction_bias
    if reason := grouped_topk_refuses(
        gating_output, topk, renormalize, num_expert_group, topk_group, scoring_func, routed_scaling_factor, bias
    ):
        raise Refused(reason)
    routing = Routing(
        gating_output.shape[1], topk, renormalize, num_expert_group, topk_group, scoring_func, routed_scaling_factor
    )
    bias_dtype = None if bias is None else bias.dtype
    return bind_grouped_topk(routing, gating_output.dtype, bias_dtype, gating_output.get_device())(gating_output, bias)


def _choices(
    gating_output: torch.Tensor, num_expert_group: int, topk_group: int, scoring_func: str, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores, scores of the groups, scores by which experts are chosen: minus infinity in groups that are not)."""
    scores = gating_output.softmax(dim=-1) if scoring_func == "softmax" else gating_output.sigmoid()
    choice = scores if bias is None else scores + bias
    groups = choice.unflatten(-1, (num_expert_group, -1))
    group_scores = groups.amax(dim=-1) if bias is None else groups.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, group_scores.topk(topk_group, dim=-1).indices, True)
    return scores, group_scores, groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)


def grouped_topk_reference(
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 1,
    topk_group: int = 1,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores, _, choice = _choices(
        gating_output, num_expert_group, topk_group, scoring_func, e_score_correction_bias
    )
    ids = choice.topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids.to(torch.int32)


class Router(NamedTuple):
    """The router of a named model."""

    experts: int
    topk: int
    groups: int
    kept: int
    scoring: str
    renormalize: bool
    factor: float
    bias: bool = False


ROUTERS = {
    "deepseek-v2-lite": Router(64, 6, 1, 1, "softmax", False, 1.0),
    "deepseek-v2": Router(160, 6, 8, 3, "softmax", False, 16.0),
    "deepseek-v3": Router(256, 8, 8, 4, "sigmoid", True, 2.5, bias=True),
    "kimi-k2": Router(384, 8, 1, 1, "sigmoid", True, 2.827, bias=True),
}
_BENCHED = ("deepseek-v2-lite", "deepseek-v3")

_CASES = (
    Case("one row", {"tokens": 1, "router": ROUTERS["deepseek-v2-lite"]}),
    *(Case(model, {"tokens": 3, "router": router}) for model, router in ROUTERS.items()),
    Case("odd sizes", {"tokens": 5, "router": Router(77, 5, 7, 3, "softmax", True, 1.0)}),
    Case("odd sizes, bias", {"tokens": 5, "router": Router(77, 5, 7, 3, "sigmoid", True, 1.5, bias=True)}),
    Case("softmax, bias", {"tokens": 4, "router": Router(60, 4, 6, 2, "softmax", True, 1.0, bias=True)}),
    Case("sigmoid, no bias", {"tokens": 4, "router": Router(32, 3, 4, 2, "sigmoid", False, 0.5)}),
    Case("all groups kept", {"tokens": 4, "router": Router(48, 4, 4, 4, "softmax", True, 1.0)}),
    Case("all experts", {"tokens": 4, "router": Router(8, 8, 2, 2, "softmax", True, 1.0)}),
    Case("one expert", {"tokens": 3, "router": Router(1, 1, 1, 1, "sigmoid", False, 1.0)}),
    Case("the most experts kept", {"tokens": 3, "router": Router(64, 32, 8, 4, "sigmoid", True, 1.0, bias=True)}),
    Case("bfloat16 bias", {"tokens": 4, "bias": "bfloat16", "router": ROUTERS["deepseek-v3"]}),
    Case("rows apart", {"tokens": 6, "gap": 32, "router": Router(96, 4, 3, 2, "softmax", True, 1.0)}),
    Case("odd offset", {"tokens": 6, "gap": 5, "offset": 3, "router": Router(96, 4, 3, 2, "softmax", True, 1.0)}),
    Case("several warps", {"tokens": 2, "router": Router(1030, 8, 10, 4, "sigmoid", True, 1.0, bias=True)}),
    Case("empty", {"tokens": 0, "router": ROUTERS["deepseek-v2-lite"]}),
    *(
        Case(f"{model} {tokens}", {"tokens": tokens, "router": ROUTERS[model], "model": model}, bench=True)
        for model in _BENCHED
        for tokens in TOKENS
    ),
)


def _too_close(inputs: dict[str, Any]) -> torch.Tensor:
    """Rows whose choices hang on less than what float32 is off by, ties among them."""
    logits, bias = inputs["gating_output"].double(), inputs["e_score_correction_bias"]
    wide = None if bias is None else bias.double()
    _, groups, choice = _choices(
        logits, inputs["num_expert_group"], inputs["topk_group"], inputs["scoring_func"], wide
    )
    close = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for scores, count in ((groups, groups.shape[1]), (choice, min(inputs["topk"] + 1, choice.shape[1]))):
        best = scores.topk(count, dim=-1).values
        close |= (best[:, :-1] - best[:, 1:] < 1e-5 * best[:, :1].abs()).any(dim=-1)
    return close


def _inputs(case: Case, dtype: str, device: str) -> dict[str, Any]:
    router: Router = case["router"]
    shape = case["tokens"], router.experts
    if "gap" in case.params:
        logits = strided(shape, dtype, device, case["gap"], case.get("offset", 0))
    else:
        logits = randn(shape, dtype, device)
    inputs = {
        "gating_output": logits,
        "topk": router.topk,
        "renormalize": router.renormalize,
        "num_expert_group": router.groups,
        "topk_group": router.kept,
        "scoring_func": router.scoring,
        "routed_scaling_factor": router.factor,
        "e_score_correction_bias": randn(shape[1:], case.get("bias", "float32"), device, 0.1) if router.bias else None,
    }
    while (close := _too_close(inputs)).any():
        logits[close] = randn((int(close.sum()), router.experts), dtype, device)
    return inputs


def _builds(case: Case, dtype: str) -> Iterator[Build]:
    router: Router = case["router"]
    routing = Routing(
        router.experts, router.topk, router.renormalize, router.groups, router.kept, router.scoring, router.factor
    )
    for is_aligned in (True, False):
        bias_dtype = dtype_of(case.get("bias", "float32")) if router.bias else None
        yield _build(routing, dtype_of(dtype), bias_dtype, is_aligned)


def _fake(gating_output: torch.Tensor, topk: int, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = gating_output.shape[0], topk
    return gating_output.new_empty(shape, dtype=torch.float32), gating_output.new_empty(shape, dtype=torch.int32)


GROUPED_TOPK = Kernel(
    name="grouped_topk",
    op=grouped_topk,
    reference=grouped_topk_reference,
    refuses=grouped_topk_refuses,
    inputs=_inputs,
    results=("return.0", "return.1"),
    cases=_CASES,
    builds=_builds,
    schema="grouped_topk(Tensor gating_output, SymInt topk, bool renormalize, SymInt num_expert_group=1, "
    "SymInt topk_group=1, str scoring_func='softmax', float routed_scaling_factor=1.0, "
    "Tensor? e_score_correction_bias=None) -> (Tensor, Tensor)",
    fake=_fake,
    traffic=lambda gating_output, topk, e_score_correction_bias, **_: (
        nbytes(gating_output, e_score_correction_bias) + 8 * gating_output.shape[0] * topk
    ),
)

KERNELS = (GROUPED_TOPK,)
