"""A mixture of experts settled for few tokens: its numbers on a stand-in for vLLM's runner, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import DEVICE

from vllm_gems.errors import Refused
from vllm_gems.kernels.moe_experts import moe_experts_reference
from vllm_gems.kernels.moe_routing import grouped_topk_reference
from vllm_gems.patches import moe_step
from vllm_gems.sites import Site

HIDDEN, EXPERTS, TOPK, WIDTH, SHARED = 48, 8, 3, 32, 40


def weight(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, device=DEVICE) * shape[-1] ** -0.5, requires_grad=False)


class Linear(torch.nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight, self.bias = weight(out_features, in_features), None


class Shared(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = Linear(HIDDEN, 2 * SHARED), Linear(SHARED, HIDDEN)


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight, self.w2_weight = weight(EXPERTS, 2 * WIDTH, HIDDEN), weight(EXPERTS, HIDDEN, WIDTH)


def original(self: Any, hidden_states: Any, router_logits: Any, input_ids: Any = None) -> str:
    return "the original"


class Model:
    """A runner with the patch around its forward."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, shared: bool = True, groups: int = 1, bias: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.site = Site("moe.mixture")
        monkeypatch.setattr(moe_step, "runner_refuses", lambda runner: None)
        self.router = SimpleNamespace(
            top_k=TOPK, global_num_experts=EXPERTS, renormalize=groups > 1,
            scoring_func="sigmoid" if bias else "softmax",
        )  # fmt: skip
        if groups > 1:
            self.router.num_expert_group, self.router.topk_group = groups, groups // 2
            self.router.routed_scaling_factor = 1.5
        self.bias = torch.randn(EXPERTS, device=DEVICE) if bias else None
        if bias:
            self.router.e_score_correction_bias = self.bias

        class Runner(torch.nn.Module):
            forward = moe_step.PATCHES[0].adapt(original, self.site)

        runner: Any = Runner()
        runner.gate, runner.routed_experts, runner.router = Linear(HIDDEN, EXPERTS), Experts(), self.router
        runner.layer_name, runner.routed_scaling_factor = "layers.1.experts", 2.0
        runner._shared_experts = SimpleNamespace(_layer=Shared()) if shared else None
        self.runner = runner

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """In float64."""
        runner, router = self.runner, self.router
        factor = runner.routed_scaling_factor * getattr(router, "routed_scaling_factor", 1.0)
        weights, ids = grouped_topk_reference(
            x.double() @ runner.gate.weight.double().T, TOPK, router.renormalize,
            getattr(router, "num_expert_group", 1), getattr(router, "topk_group", 1), router.scoring_func, factor,
            None if self.bias is None else self.bias.double(),
        )  # fmt: skip
        shared = None
        if runner._shared_experts is not None:
            layer = runner._shared_experts._layer
            gate, up = (x.double() @ layer.gate_up_proj.weight.double().T).chunk(2, dim=-1)
            shared = (torch.nn.functional.silu(gate) * up) @ layer.down_proj.weight.double().T
        experts = runner.routed_experts
        (out,) = moe_experts_reference(
            x.double(), experts.w13_weight.double(), experts.w2_weight.double(), weights, ids, shared
        )
        return out


@pytest.mark.parametrize("tokens", [1, 5, 40])  # by pair, by expert, listed
@pytest.mark.parametrize(
    "kind", [{}, {"shared": False}, {"groups": 4, "bias": True}], ids=["plain", "no shared experts", "groups and bias"]
)
def test_a_mixture_is_right(monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], tokens: int) -> None:
    model = Model(monkeypatch, **kind)
    for call in range(2):  # the second is settled and recorded
        x = torch.randn(tokens, HIDDEN, device=DEVICE)
        before = x.clone()
        got = model.runner(x, x)
        torch.testing.assert_close(got.double(), model.expected(x), rtol=0, atol=2e-5)
        assert torch.equal(x, before)
        assert model.site.hits == call + 1
    assert (model.site.by_layer, model.site.declined) == ({"layers.1.experts": 2}, {})


def test_replaced_weights_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(monkeypatch), torch.randn(2, HIDDEN, device=DEVICE)
    model.runner(x, x)
    down = model.runner._shared_experts._layer.down_proj
    for owner, name in ((model.runner.routed_experts, "w2_weight"), (down, "weight")):
        setattr(owner, name, torch.nn.Parameter(getattr(owner, name) * -2, requires_grad=False))
        assert model.runner(x, x) == "the original"
        torch.testing.assert_close(model.runner(x, x).double(), model.expected(x), rtol=0, atol=2e-5)
    assert list(model.site.declined) == ["weights that were replaced"]


def test_hooks_on_a_part_and_on_the_shared_experts_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(monkeypatch), torch.randn(2, HIDDEN, device=DEVICE)
    model.runner(x, x)
    for part in (model.runner.gate, model.runner._shared_experts._layer.down_proj):
        handle = part.register_forward_hook(lambda *_: None)
        assert model.runner(x, x) == "the original"
        handle.remove()
        assert model.runner(x, x) != "the original"
    assert list(model.site.declined) == ["a hook on Linear"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.half(), "hidden_states torch.float16"),
        (lambda x: x.repeat(1, 2)[:, :HIDDEN], "of strides"),
        (lambda x: x.repeat(300, 1), "no tokens, or more than"),
        (lambda x: x[:0], "no tokens, or more than"),
    ],
)
def test_calls_that_are_not_done_go_to_the_original(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    model, x = Model(monkeypatch), torch.randn(2, HIDDEN, device=DEVICE)
    model.runner(x, x)
    assert model.runner(change(x), x) == "the original"
    (said,) = model.site.declined
    assert words in said


def apart(*shape: int) -> torch.nn.Parameter:
    """A weight whose last dimension is not contiguous."""
    return torch.nn.Parameter(weight(shape[0], shape[2], shape[1]).data.transpose(1, 2), requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: setattr(r.gate, "weight", weight(EXPERTS + 1, HIDDEN)), "weights of shapes"),
        (lambda r: r.routed_experts.half(), "experts in torch.float16"),
        (lambda r: setattr(r.routed_experts, "w2_weight", apart(EXPERTS, HIDDEN, WIDTH)), "of strides"),
        (lambda r: setattr(r.router, "e_score_correction_bias", torch.ones(3)), "e_score_correction_bias"),
    ],
)  # fmt: skip
def test_other_mixtures_go_to_the_original(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], None], words: str
) -> None:
    model = Model(monkeypatch)
    spoil(model.runner)
    with pytest.raises(Refused, match=words):
        moe_step._bind(model.runner, torch.randn(2, HIDDEN, device=DEVICE))


def test_float16_with_a_scale_goes_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    model.runner.half()
    with pytest.raises(Refused, match="float16 with a scale"):
        moe_step._bind(model.runner, torch.randn(2, HIDDEN, device=DEVICE).half())


class Configuration:
    """What a runner that is for us says of itself, as far as it is no class of vLLM's."""

    tp_size = pcp_size = dp_size = ep_size = sp_size = 1
    enable_eplb = False


def runner(**changes: Any) -> Any:
    made = SimpleNamespace(
        moe_config=SimpleNamespace(moe_parallel_config=Configuration()), enable_dbo=False, gate=None,
        router=SimpleNamespace(eplb_state=None, capture_fn=None), routed_experts=SimpleNamespace(),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "SimpleNamespace._forward_impl is none of those"),
        ({"router": SimpleNamespace(eplb_state=object())}, "balanced"),
        ({"enable_dbo": True}, "dual batches"),
        ({"moe_config": SimpleNamespace(moe_parallel_config=SimpleNamespace(tp_size=2))}, "tp_size is 2"),
        ({"router": None}, "not the parts of a mixture"),
    ],
)
def test_runners_of_other_parts_are_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    if changes:
        monkeypatch.setattr(moe_step, "part_refuses", lambda *_: None)
    assert words in str(moe_step.runner_refuses(runner(**changes)))
