"""DeepSeek's decoder layer settled as a whole: its numbers on stand-ins for its parts, and what it leaves to vLLM."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import test_mla_step
import test_moe_step
import torch
from test_kernels import DEVICE

from vllm_gems import replay
from vllm_gems.patches import decode_steps, deepseek, mla_step
from vllm_gems.sites import Site

HIDDEN, EPSILON = test_mla_step.HIDDEN, test_mla_step.EPSILON


class Dense(torch.nn.Module):
    """The first layer's, without experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (
            test_mla_step.Linear(HIDDEN, 2 * 56), test_mla_step.Linear(56, HIDDEN),
        )  # fmt: skip

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up_proj.weight.double().T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ self.down_proj.weight.double().T


def original(self: Any, positions: Any, hidden_states: Any, residual: Any, llama_4_scaling: Any = None) -> str:
    return "the original"


class Model:
    """A layer with the patch around its forward, and the decode step that it is called in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mixture: bool, q_lora: int | None = None) -> None:
        monkeypatch.setattr(test_moe_step, "HIDDEN", HIDDEN)
        monkeypatch.setattr(deepseek, "layer_refuses", lambda layer: None)
        self.attention = test_mla_step.Model(monkeypatch, 3, q_lora)
        self.mixture = test_moe_step.Model(monkeypatch) if mixture else None
        self.site = Site("decoder.deepseek_v2")

        class Layer(torch.nn.Module):
            forward = deepseek.PATCHES[0].adapt(original, self.site)

        layer: Any = Layer()
        layer.input_layernorm, layer.post_attention_layernorm = (test_mla_step.Norm(HIDDEN) for _ in range(2))
        layer.self_attn = torch.nn.Module()
        layer.self_attn.mla_attn = self.attention.layer
        layer.mlp = torch.nn.Module() if self.mixture else Dense()
        if self.mixture:
            layer.mlp.experts = self.mixture.runner
        self.layer, self.residual = layer, torch.randn(3, HIDDEN, device=DEVICE)

    def call(self, residual: torch.Tensor | None, *args: Any) -> Any:
        parts = self.attention
        name = parts.layer.mla_attn.layer_name
        parts.context.attn_metadata, parts.context.slot_mapping = {name: parts.metadata}, {name: parts.slots}
        return self.layer(parts.positions, parts.hidden, residual, *args)

    def expected(self, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64."""

        def normalised(x: torch.Tensor, norm: Any) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * norm.weight.double()

        total = self.attention.hidden.double() + (0 if residual is None else residual.double())
        hidden, self.attention.hidden = self.attention.hidden, normalised(total, self.layer.input_layernorm)
        attended, _ = self.attention.expected()
        self.attention.hidden = hidden
        total = total + attended
        x = normalised(total, self.layer.post_attention_layernorm)
        return (self.mixture or self.layer.mlp).expected(x), total


@pytest.mark.parametrize("q_lora", [None, 28])
@pytest.mark.parametrize("mixture", [True, False], ids=["experts", "dense"])
def test_a_decode_step_is_right(monkeypatch: pytest.MonkeyPatch, mixture: bool, q_lora: int | None) -> None:
    model = Model(monkeypatch, mixture, q_lora)
    hidden, before = model.attention.hidden.clone(), model.residual.clone()
    for residual in (None, model.residual, model.residual):
        expected = model.expected(residual)
        for got, want in zip(model.call(residual), expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)
    assert torch.equal(model.attention.hidden, hidden)
    assert torch.equal(model.residual, before)
    assert (model.site.hits, model.site.by_layer, model.site.declined) == (3, {"layers.0.attn": 3}, {})


def test_what_a_graph_captures_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "capturing", lambda: True)
    monkeypatch.setattr(replay, "_capturing", lambda device: lambda: True)
    monkeypatch.setattr(replay, "_program", lambda *_: pytest.fail("it was recorded"))
    model = Model(monkeypatch, mixture=True, q_lora=28)
    model.attention.context.skip_compiled = True
    expected = model.expected(model.residual)
    for got, want in zip(model.call(model.residual), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)


def test_replaced_weights_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, mixture=True)
    model.call(model.residual)
    assert model.mixture is not None
    for owner, name in (
        (model.layer.input_layernorm, "weight"), (model.attention.layer.o_proj, "weight"),
        (model.mixture.runner.routed_experts, "w2_weight"),
    ):  # fmt: skip
        setattr(owner, name, torch.nn.Parameter(getattr(owner, name) * -2, requires_grad=False))
        assert model.call(model.residual) == "the original"
        expected = model.expected(model.residual)
        torch.testing.assert_close(model.call(model.residual)[0].double(), expected[0], rtol=0, atol=3e-5)
    assert list(model.site.declined) == ["weights that were replaced"]


def test_a_failure_in_the_middle_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, mixture=True)
    hidden, before = model.attention.hidden.clone(), model.residual.clone()
    made = replay._one_by_one
    monkeypatch.setattr(replay, "_program", lambda *_: None)
    monkeypatch.setattr(replay, "_one_by_one", lambda entries, values: made(entries[:9], values) or 1 / 0)
    assert model.call(model.residual) == "the original"
    assert "ZeroDivisionError" in model.site.failure
    assert torch.equal(model.attention.hidden, hidden)
    assert torch.equal(model.residual, before)


def test_what_is_not_done_goes_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, mixture=True)
    model.call(None)
    assert model.call(None, torch.ones(3)) == "the original"
    assert model.call(model.residual.double()) == "the original"
    handle = model.layer.mlp.experts.gate.register_forward_hook(lambda *_: None)
    assert model.call(None) == "the original"
    handle.remove()
    model.attention.metadata.num_prefills = 1
    model.attention.positions = model.attention.positions.clone()  # another step
    assert model.call(None) == "the original"
    said = list(model.site.declined)
    assert "queries scaled by their positions" in said
    assert any("residual torch.float64" in reason for reason in said)
    assert "a hook on Linear" in said
    assert "a batch that does not only decode" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_mha": True}, "not latent"),
        ({"use_sequence_parallel_moe": True}, "tokens in parallel"),
        ({"input_layernorm": torch.nn.Identity()}, "input_layernorm is a Identity"),
        ({"mlp": SimpleNamespace()}, "not the parts of DeepSeek's decoder layer|none of those"),
    ],
)
def test_layers_of_other_parts_are_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(mla_step, "layer_refuses", lambda layer: None)
    if set(changes) != {"input_layernorm"}:
        monkeypatch.setattr(deepseek, "norm_refuses", lambda *_: iter(()))
    parts = {
        "use_mha": False, "use_sequence_parallel_moe": False, "input_layernorm": None, "post_attention_layernorm": None,
        "self_attn": SimpleNamespace(mla_attn=None), "mlp": None, **changes,
    }  # fmt: skip
    if "mlp" in changes:
        monkeypatch.setattr(deepseek, "part_refuses", lambda *_: None)
    assert re.search(words, str(deepseek.layer_refuses(SimpleNamespace(**parts))))
