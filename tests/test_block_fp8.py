"""Weights in block-wise float8: the numbers are vLLM's, every division of the work gives them, and layers are wired."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import test_deepseek
import test_mla_step
import test_moe_step
import torch
from test_kernels import DEVICE

from vllm_gems.errors import Refused
from vllm_gems.kernels import block_fp8_experts, block_fp8_linear
from vllm_gems.kernels.block_fp8_linear import (
    BLOCK,
    FLOAT8,
    LARGEST,
    Tiling,
    bind_block_fp8_linear,
    bind_group_quantise,
    dequantised,
    quantise_reference,
    random_weight,
    silu_gated_block_fp8_linear_reference,
)
from vllm_gems.kernels.linear import Shape
from vllm_gems.kernels.moe_routing import grouped_topk_reference
from vllm_gems.patches import decode_steps, moe_step


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def as_vllm_quantises(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`per_token_group_quant_fp8` of vLLM's, line by line, in PyTorch: (elements, scales [rows, groups])."""
    groups = x.float().unflatten(-1, (-1, BLOCK))
    absmax = groups.abs().amax(dim=-1).maximum(torch.tensor(1e-10, device=x.device))
    scale = absmax / absmax.new_tensor(448.0)  # by a number PyTorch does not divide on a GPU
    return (groups / scale[..., None]).clamp(-448.0, 448.0).to(FLOAT8).flatten(-2), scale


def as_vllm_multiplies(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`_w8a8_triton_block_scaled_mm` of vLLM's: a float32 product for each block, times both scales, added up."""
    inside, x_scale = as_vllm_quantises(x)
    total = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    for group in range(x.shape[1] // BLOCK):
        at = slice(group * BLOCK, (group + 1) * BLOCK)
        rows = scale[:, group].repeat_interleave(BLOCK)[: weight.shape[0]]
        total += (inside[:, at].float() @ weight[:, at].float().T) * x_scale[:, group, None] * rows[None, :]
    return total.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_quantised_as_vllm_does(dtype: torch.dtype) -> None:
    """To the last bit, in all sizes that a dtype has, of nothing but zeros too; rows may lie anywhere."""
    torch.manual_seed(0)
    sizes = 10.0 ** torch.arange(-7 if dtype is torch.float16 else -35, 4, device=DEVICE)
    wide = torch.randn(len(sizes) + 1, 3 * BLOCK + 3, device=DEVICE) * torch.cat((sizes, sizes.new_zeros(1)))[:, None]
    for x in (wide.to(dtype)[:, : 3 * BLOCK], wide.to(dtype)[:, : 3 * BLOCK].contiguous()):
        inside, scales = bind_group_quantise(3 * BLOCK, dtype, x.get_device())(x.data_ptr(), x.stride(0), x.shape[0])
        want, want_scales = as_vllm_quantises(x)
        assert torch.equal(inside, want.view(torch.uint8))
        assert torch.equal(scales, want_scales.T)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("columns", [96, 200, 256])
def test_products_are_vllms(rows: int, columns: int) -> None:
    """Into memory full of NaN, with rows behind it that stay so."""
    torch.manual_seed(rows)
    x = torch.randn(rows, 256, device=DEVICE).bfloat16()
    weight, scale = random_weight((columns, 256), str(DEVICE))
    out = torch.full((rows + 2, columns), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    project = bind_block_fp8_linear(Shape(256, columns), x.dtype, x.get_device())
    project(x.data_ptr(), 256, weight.data_ptr(), scale.data_ptr(), 0, out.data_ptr(), rows)
    assert relative(out[:rows], as_vllm_multiplies(x.float(), weight, scale)) < 2**-8
    assert bool(out[rows:].isnan().all())


def test_a_product_of_float32_is_exact_but_for_the_order_of_its_sums() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 640, device=DEVICE)
    weight, scale = random_weight((200, 640), str(DEVICE))
    want = quantise_reference(x.double()) @ dequantised(weight, scale.double()).T
    got = block_fp8_linear.block_fp8_linear(x, weight, scale)
    limit = 2e-6 if DEVICE == "cpu" else 2**-12  # of the tensor cores' sums
    assert relative(got, want) < limit
    assert relative(as_vllm_multiplies(x, weight, scale), want) < limit


TILINGS = (Tiling(64, 1, 4, 2), Tiling(128, 3, 8, 3), Tiling(32, 7, 4, 4))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling_computes_the_same(tiling: Tiling, gated: bool) -> None:
    torch.manual_seed(0)
    shape = Shape(5 * BLOCK, 128, True, gated)
    x = torch.randn(19, shape.in_features, device=DEVICE)
    weight, scale = random_weight((256 if gated else 128, shape.in_features), str(DEVICE))
    bias = torch.randn(weight.shape[0], device=DEVICE)
    want = quantise_reference(x.double()) @ dequantised(weight, scale.double()).T + bias
    if gated:
        want = torch.nn.functional.silu(want[:, :128]) * want[:, 128:]
    project = bind_block_fp8_linear(shape, x.dtype, x.get_device(), tiling)
    for _ in range(2):  # the second finds the counters as the first left them
        out = torch.full((19, 128), float("nan"), device=DEVICE)
        project(
            x.data_ptr(), shape.in_features, weight.data_ptr(), scale.data_ptr(), bias.data_ptr(), out.data_ptr(), 19
        )
        assert relative(out, want) < (2e-6 if DEVICE == "cpu" else 2**-12)


@pytest.mark.parametrize("tokens", [1, 6, 40])  # by pair, by expert, listed
def test_experts_are_right(tokens: int) -> None:
    """The few elements between the products that are rounded the other way are all that differs."""
    torch.manual_seed(tokens)
    kernel = block_fp8_experts.BLOCK_FP8_EXPERTS
    sizes = {"num_tokens": tokens, "experts": 8, "topk": 2, "hidden": 256, "intermediate": 384, "shared": True}
    inputs = kernel.inputs(type(kernel.cases[0])("", sizes), "float32", str(DEVICE))
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    assert relative(kernel.op(**inputs), kernel.reference(**wide)[0]) < (1e-3 if DEVICE == "cpu" else 1e-2)


# What is not done


def test_devices_without_such_tensor_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, words in ((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), ""), ((10, 0), ""), ((12, 0), "sm_120"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        block_fp8_linear.device_refuses.cache_clear()
        reason = block_fp8_linear.device_refuses(0)
        assert words in str(reason)
        assert (reason is None) == (not words)
    block_fp8_linear.device_refuses.cache_clear()
    monkeypatch.setattr(block_fp8_linear, "device_refuses", lambda device: "no float8 here")
    with pytest.raises(Refused, match="no float8 here"):
        bind_block_fp8_linear(Shape(BLOCK, 64, True), torch.float32, -1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, 200)}, "no multiple of 128"),
        ({"x": torch.zeros(513, 256)}, "513 rows"),
        ({"weight": torch.zeros(64, 256)}, "weight is torch.float32"),
        ({"weight": torch.zeros(64, 512).to(FLOAT8)[:, :256]}, r"strides \(512, 1\)"),
        ({"weight": torch.zeros(64 * 256 + 1).to(FLOAT8)[1:].view(64, 256)}, "weight is not aligned"),
        ({"scale": torch.zeros(1, 1)}, "scale is"),
        ({"scale": torch.zeros(1, 2).bfloat16()}, "scale is torch.bfloat16"),
        ({"bias": torch.zeros(63)}, "bias is"),
    ],
)
def test_other_weights_are_refused(changes: dict[str, torch.Tensor], words: str) -> None:
    inputs = {"x": torch.zeros(3, 256), "weight": torch.zeros(64, 256).to(FLOAT8), "scale": torch.zeros(1, 2)}
    inputs |= changes
    if inputs["x"].shape[1] == 200:
        inputs["weight"] = torch.zeros(64, 200).to(FLOAT8)
    with pytest.raises(Refused, match=words):
        block_fp8_linear.block_fp8_linear(**inputs)


# In whole layers


def narrowed(linear: Any) -> None:
    """Give a linear layer a weight in float8, as vLLM's has it after loading."""
    weight, scale = random_weight(tuple(linear.weight.shape), str(DEVICE))
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)


def widened(linear: Any) -> None:
    """Give it the same weight in float32 again."""
    wide = dequantised(linear.weight, linear.weight_scale_inv)
    linear.weight = torch.nn.Parameter(wide, requires_grad=False)
    del linear.weight_scale_inv


EXPERT_WEIGHTS = "w13_weight", "w2_weight"


def narrow_experts(experts: Any) -> None:
    for name in EXPERT_WEIGHTS:
        weight, scale = random_weight(tuple(getattr(experts, name).shape), str(DEVICE))
        setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))
        setattr(experts, f"{name}_scale_inv", torch.nn.Parameter(scale, requires_grad=False))


def widen_experts(experts: Any) -> None:
    for name in EXPERT_WEIGHTS:
        wide = dequantised(getattr(experts, name), getattr(experts, f"{name}_scale_inv"))
        setattr(experts, name, torch.nn.Parameter(wide, requires_grad=False))
        delattr(experts, f"{name}_scale_inv")


@pytest.fixture
def mixture(monkeypatch: pytest.MonkeyPatch) -> test_moe_step.Model:
    """A mixture and its shared experts with weights in float8; its router has none."""
    for name, size in (("HIDDEN", 256), ("WIDTH", 128), ("SHARED", 128)):
        monkeypatch.setattr(test_moe_step, name, size)
    model = test_moe_step.Model(monkeypatch)
    shared = model.runner._shared_experts._layer
    for linear in (shared.gate_up_proj, shared.down_proj):
        narrowed(linear)
    narrow_experts(model.runner.routed_experts)
    return model


def expected(model: test_moe_step.Model, x: torch.Tensor) -> torch.Tensor:
    """In float64, activations quantised."""
    runner, router = model.runner, model.router
    shared, experts, wide = runner._shared_experts._layer, runner.routed_experts, x.double()
    weights, ids = grouped_topk_reference(
        wide @ runner.gate.weight.double().T, router.top_k, router.renormalize, 1, 1, router.scoring_func,
        runner.routed_scaling_factor, None,
    )  # fmt: skip
    up, down = shared.gate_up_proj, shared.down_proj
    (active,) = silu_gated_block_fp8_linear_reference(wide, up.weight, up.weight_scale_inv.double())
    (out,) = block_fp8_linear.block_fp8_linear_reference(active, down.weight, down.weight_scale_inv.double())
    (out,) = block_fp8_experts.block_fp8_experts_reference(
        wide, experts.w13_weight, experts.w13_weight_scale_inv.double(), experts.w2_weight,
        experts.w2_weight_scale_inv.double(), weights, ids, out,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("tokens", [1, 22])  # by pair, and listed
def test_a_mixture_is_right(mixture: test_moe_step.Model, tokens: int) -> None:
    for call in range(2):  # the second is settled and recorded
        x = torch.randn(tokens, 256, device=DEVICE)
        got = mixture.runner(x, x)
        assert relative(got, expected(mixture, x)) < (1e-3 if DEVICE == "cpu" else 1e-2)
        assert mixture.site.hits == call + 1
    assert mixture.site.declined == {}


@pytest.mark.parametrize("name", ["w13_weight", "w2_weight", "w2_weight_scale_inv"])
def test_replaced_weights_and_scales_are_used(mixture: test_moe_step.Model, name: str) -> None:
    x, experts = torch.randn(2, 256, device=DEVICE), mixture.runner.routed_experts
    mixture.runner(x, x)
    other = (getattr(experts, name).float() * -0.5).to(getattr(experts, name).dtype)
    setattr(experts, name, torch.nn.Parameter(other, requires_grad=False))
    assert mixture.runner(x, x) == "the original"
    assert relative(mixture.runner(x, x), expected(mixture, x)) < (1e-3 if DEVICE == "cpu" else 1e-2)


def test_many_tokens_are_left_to_vllm(mixture: test_moe_step.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "FEW_ROWS_OF_FLOAT8", 4)
    x = torch.randn(5, 256, device=DEVICE)
    assert mixture.runner(x, x) == "the original"
    assert mixture.runner(x[:4], x[:4]) != "the original"
    assert list(mixture.site.declined) == ["no tokens, or more than 4"]


def test_experts_with_other_scales_go_to_the_original(mixture: test_moe_step.Model) -> None:
    experts = mixture.runner.routed_experts
    experts.w2_weight_scale_inv = torch.nn.Parameter(torch.ones(3, 1, 1, device=DEVICE), requires_grad=False)
    with pytest.raises(Refused, match="down_scale"):
        moe_step._bind(mixture.runner, torch.randn(2, 256, device=DEVICE))


@pytest.mark.parametrize("mixture_too", [True, False], ids=["experts", "dense"])
def test_a_whole_layer_is_right(monkeypatch: pytest.MonkeyPatch, mixture_too: bool) -> None:
    """But for what quantising its activations adds, a few hundredths for each product: a wrong scale adds half."""
    for module in (test_mla_step, test_deepseek):
        monkeypatch.setattr(module, "HIDDEN", 128)
    for name, size in (("HEADS", 4), ("VALUE", 32)):
        monkeypatch.setattr(test_mla_step, name, size)
    for name, size in (("WIDTH", 128), ("SHARED", 128)):
        monkeypatch.setattr(test_moe_step, name, size)
    model = test_deepseek.Model(monkeypatch, mixture_too, q_lora=128)
    block, mlp = model.attention.layer, model.layer.mlp
    linears = [block.fused_qkv_a_proj, block.q_b_proj, block.o_proj]
    if model.mixture is None:
        mlp.gate_up_proj, mlp.down_proj = test_mla_step.Linear(128, 256), test_mla_step.Linear(128, 128)
        linears += [mlp.gate_up_proj, mlp.down_proj]
    else:
        shared = mlp.experts._shared_experts._layer
        linears += [shared.gate_up_proj, shared.down_proj]
        narrow_experts(mlp.experts.routed_experts)
    for linear in linears:
        narrowed(linear)
    got = [model.call(model.residual) for _ in range(2)][1]
    assert (model.site.hits, model.site.declined) == (2, {})
    monkeypatch.setattr(decode_steps, "FEW_ROWS_OF_FLOAT8", 2)
    model.layer.input_layernorm.weight = torch.nn.Parameter(model.layer.input_layernorm.weight, requires_grad=False)
    assert model.call(model.residual) == "the original"  # a weight was replaced, so that it is settled again
    assert model.call(model.residual) == "the original"
    assert "more than 2 requests of a layer in float8" in model.site.declined
    for linear in linears:
        widened(linear)
    if model.mixture is not None:
        widen_experts(mlp.experts.routed_experts)
    for each, want in zip(got, model.expected(model.residual), strict=True):
        assert relative(each, want) < 0.1


# Which layers are taken


def method(name: str, module: str, **attributes: Any) -> Any:
    """An instance of a stand-in for a class of vLLM's."""
    cls = type(name, (), {"__module__": f"vllm.model_executor.{module}"})
    made = cls()
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def linear_of(product: str = "CutlassFp8BlockScaledMMKernel", file: str = "cutlass", **changes: Any) -> Any:
    quant = SimpleNamespace(use_ue8m0=changes.pop("use_ue8m0", False))
    made = method(product, f"kernels.linear.scaled_mm.{file}", quant_fp8=quant)
    attributes: dict[str, Any] = {"weight_block_size": [128, 128], "fp8_linear": made, **changes}
    return method(
        "RowParallelLinear", "layers.linear", tp_size=1, skip_bias_add=False, return_bias=True,
        weight=torch.zeros(4, 4), quant_method=method("Fp8LinearMethod", "layers.quantization.fp8", **attributes),
    )  # fmt: skip


def reasons(linear: Any) -> Iterator[str]:
    return (reason for reason in decode_steps.linear_refuses("o_proj", linear, "row") if reason)


def test_layers_in_float8_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "part_refuses", lambda *_: None)
    assert not list(reasons(linear_of()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_block_size": [1, 128]}, r"blocks of \[1, 128\]"),
        ({"weight_block_size": None}, "blocks of None"),
        ({"product": "DeepGemmFp8BlockScaledMMKernel", "file": "deep_gemm"}, "multiplied by DeepGemmFp8"),
        ({"use_ue8m0": True}, "powers of two"),
    ],
)
def test_other_quantisation_is_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(decode_steps, "part_refuses", lambda *_: None)
    (reason,) = reasons(linear_of(**changes))
    assert re.search(words, reason)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        ({"fp8_backend": SimpleNamespace(name="DEEPGEMM")}, "not Triton's"),
        ({"powers_of_two": True}, "powers of two"),
    ],
)
def test_experts_in_float8_are_taken_and_others_left(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    for module in (decode_steps, moe_step):
        monkeypatch.setattr(module, "part_refuses", lambda *_: None)
    powers_of_two = changes.get("powers_of_two", False)
    deep_gemm = SimpleNamespace(is_deep_gemm_e8m0_used=lambda: powers_of_two)
    monkeypatch.setitem(sys.modules, "vllm.utils.deep_gemm", deep_gemm)
    attributes = {"weight_block_size": [128, 128], "fp8_backend": SimpleNamespace(name="TRITON"), **changes}
    experts = SimpleNamespace(
        quant_method=method("Fp8MoEMethod", "layers.quantization.fp8", experts_cls=object, **attributes),
        activation="silu", expert_map=None, apply_router_weight_on_input=False,
    )  # fmt: skip
    found = [reason for reason in moe_step._experts_refuse(experts) if reason]
    assert len(found) == bool(words)
    assert re.search(words, "".join(found))


def test_sources_that_are_not_known_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_GEMS_INCLUDE", "decoder.*")
    found = list(reasons(linear_of()))
    assert any("Fp8LinearMethod.apply is none of those" in reason for reason in found)
    assert any("CutlassFp8BlockScaledMMKernel.apply_weights is none of those" in reason for reason in found)


def test_largest_is_float8s() -> None:
    assert torch.finfo(FLOAT8).max == LARGEST
