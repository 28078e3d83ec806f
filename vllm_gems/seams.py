"""Where vLLM keeps what we replace. The only module that knows vLLM's releases and its names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .nouns import Place, Seam

_LAYERS = "vllm.model_executor.layers"
# What vLLM makes of the model classes that it may compile; an instance says by `do_not_compile` whether it is.
COMPILED_MODEL = "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper"
# Importing this module loads the extension libraries that register vLLM's ops.
_OPS = "vllm._custom_ops"

# A method inherited from CustomOp, for the platforms that a layer has no method of its own for.
_INHERITED = "(self, *args, **kwargs)"


def _layer(name: str, module: str, cls: str, *signatures: str, since: str = "0.17.1") -> Seam:
    """A CustomOp layer, which calls `forward_cuda` on a GPU and `forward_cpu` on a CPU."""
    module = f"{_LAYERS}.{module}"
    places = tuple(
        Place("attribute", module, f"{cls}.forward_{platform}", accepts, f"{since}-0.33", platform)
        for platform, accepts in (("cuda", signatures), ("cpu", (*signatures, _INHERITED)))
    )
    return Seam(name, places, layer=f"{module}:{cls}")


def _op(name: str, *schemas: str, since: str = "0.17.1", layer: str = "") -> Seam:
    """An op of vLLM's `_C` library; `layer` is the layer that calls it, as "module:Class"."""
    place = Place("op", _OPS, f"_C::{name}", schemas, f"{since}-0.33")
    return Seam(f"op.{name}", (place,), f"{_LAYERS}.{layer}" if layer else "")


def _decoder(name: str, cls: str) -> Seam:
    """A decoder layer, replaced as a whole: the same twelve lines in every dense model and release."""
    module = f"vllm.model_executor.models.{name}"
    place = Place(
        "attribute", module, f"{cls}.forward", ("(self, positions, hidden_states, residual)",), "0.17.1-0.33",
        sources=frozenset({"b1136578122e0f6e"}),
    )  # fmt: skip
    return Seam(f"layer.{name}_decoder_layer", (place,), layer=f"{module}:{cls}", eager_only=True)


def _model(name: str, cls: str) -> Seam:
    """What calls the model that vLLM compiles, and is not compiled itself."""
    expects = ("(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None)",)
    module = f"vllm.model_executor.models.{name}"
    return Seam(f"model.{name}", (Place("attribute", module, f"{cls}.forward", expects, "0.17.1-0.33"),))


def _part(
    module: str, name: str, signatures: tuple[str, ...], *sources: str, versions: str = "0.17.1-0.33"
) -> Place:
    return Place("attribute", f"vllm.{module}", name, signatures, versions, sources=frozenset(sources))


_ATTENTION = _part(
    "model_executor.layers.attention.attention", "Attention.forward",
    (
        "(self, query, key, value, output_shape=None, output_dtype=None)",
        "(self, query, key, value, output_shape=None)",  # until 0.24
    ),
    "298ed384fbf6b699", "dc655e0091a1bb97", "d0f71f1b2f041a72", "f45f328b67ab8f7d", "edef316f2418435d",
)  # fmt: skip
_LATENT_ATTENTION = _part(
    "model_executor.layers.mla", "MultiHeadLatentAttentionWrapper.forward",
    ("(self, positions, hidden_states, llama_4_scaling=None)",),
    "be2b929891c4ce9a", "3c8eb1c81af7dd02", "e0432540543912da", "59c6f711b184553e",
)  # fmt: skip
_DEEPSEEK_LAYER = _part(
    "model_executor.models.deepseek_v2", "DeepseekV2DecoderLayer.forward",
    ("(self, positions, hidden_states, residual, llama_4_scaling=None)",), "8d7b33e35a4e1da3", versions="0.25-0.33",
)  # fmt: skip
_MOE = "model_executor.layers.fused_moe"
_SINCE_MOE = "0.24-0.33"
_MIXTURE = _part(
    f"{_MOE}.runner.moe_runner", "MoERunner.forward",
    (
        "(self, hidden_states, router_logits, input_ids=None, shared_experts_input=None)",
        "(self, hidden_states, router_logits, input_ids=None)",  # until 0.26
    ),
    "0d650e8f0d896602", "9c4fee9fda110ff8", "cead3b01c4c23839", versions=_SINCE_MOE,
)  # fmt: skip
_ROUTE = ("(self, hidden_states, router_logits, indices_type, *, input_ids=None)",)
_SELECT = ("(self, hidden_states, router_logits, topk_indices_dtype=None, *, input_ids=None)",)
_TRITON_MLA = _part(
    "v1.attention.backends.mla.triton_mla", "TritonMLAImpl.forward_mqa",
    ("(self, q, kv_c_and_k_pe_cache, attn_metadata, layer)",),
    "bacbf89dda890a57", "5ab6292374bd0acd", "1d2237cca1baf68f", "bebbe3ef519319ce", "da2d1a5b580e450c",
    "f700d6ac56d30068", "35742a01276b9498",
)  # fmt: skip
_ROTARY = "(self, positions, query, key=None)"
_ROTARY_OFFSETS = "(self, positions, query, key=None, offsets=None)"
_GATED = "(Tensor!, Tensor) -> ()"

_ALL = (
    _layer("layer.rms_norm", "layernorm", "RMSNorm", "(self, x, residual=None)"),
    _layer("layer.gemma_rms_norm", "layernorm", "GemmaRMSNorm", "(self, x, residual=None)"),
    _layer("layer.rotary_embedding", "rotary_embedding.base", "RotaryEmbedding", _ROTARY),
    _layer(
        "layer.deepseek_scaling_rotary_embedding",
        "rotary_embedding.deepseek_scaling_rope",
        "DeepseekScalingRotaryEmbedding",
        _ROTARY_OFFSETS,
    ),
    _layer("layer.mrotary_embedding", "rotary_embedding.mrope", "MRotaryEmbedding", _ROTARY_OFFSETS),
    _layer("layer.silu_and_mul", "activation", "SiluAndMul", "(self, x)"),
    _layer("layer.mul_and_silu", "activation", "MulAndSilu", "(self, x)"),
    _layer("layer.gelu_and_mul", "activation", "GeluAndMul", "(self, x)"),
    _layer("layer.gelu_new", "activation", "NewGELU", "(self, x)"),
    _layer("layer.gelu_fast", "activation", "FastGELU", "(self, x)"),
    _layer("layer.gelu_quick", "activation", "QuickGELU", "(self, x)"),
    _layer("layer.fatrelu_and_mul", "activation", "FatreluAndMul", "(self, x)"),
    _layer("layer.swigluoai_and_mul", "activation", "SwigluOAIAndMul", "(self, x)"),
    _layer("layer.silu_and_mul_with_clamp", "activation", "SiluAndMulWithClamp", "(self, x)", since="0.20"),
    # The weight became optional in 0.24.
    _op(
        "rms_norm",
        "(Tensor!, Tensor, Tensor?, float) -> ()",
        "(Tensor!, Tensor, Tensor, float) -> ()",
        layer="layernorm:RMSNorm",
    ),
    _op(
        "fused_add_rms_norm",
        "(Tensor!, Tensor!, Tensor?, float) -> ()",
        "(Tensor!, Tensor!, Tensor, float) -> ()",
        layer="layernorm:RMSNorm",
    ),
    # The offset and the direction came in 0.20.
    _op(
        "rotary_embedding",
        "(Tensor, Tensor!, Tensor!?, int, Tensor, bool, int=0, bool=False) -> ()",
        "(Tensor, Tensor!, Tensor!?, int, Tensor, bool) -> ()",
        layer="rotary_embedding.base:RotaryEmbedding",
    ),
    _op("silu_and_mul", _GATED, layer="activation:SiluAndMul"),
    _op("mul_and_silu", _GATED, layer="activation:MulAndSilu"),
    _op("gelu_and_mul", _GATED, layer="activation:GeluAndMul"),
    _op("gelu_tanh_and_mul", _GATED, layer="activation:GeluAndMul"),
    _op("gelu_new", _GATED, layer="activation:NewGELU"),
    _op("gelu_fast", _GATED, layer="activation:FastGELU"),
    _op("gelu_quick", _GATED, layer="activation:QuickGELU"),
    _op("fatrelu_and_mul", "(Tensor!, Tensor, float) -> ()", layer="activation:FatreluAndMul"),
    _op(
        "swigluoai_and_mul",
        "(Tensor!, Tensor, float=1.702, float=7.0) -> ()",
        layer="activation:SwigluOAIAndMul",
    ),
    # The sigmoid's scale and the bias came in 0.24.
    _op(
        "silu_and_mul_with_clamp",
        "(Tensor!, Tensor, float, float=1.0, float=0.0) -> ()",
        "(Tensor!, Tensor, float) -> ()",
        since="0.20",
        layer="activation:SiluAndMulWithClamp",
    ),
    _decoder("qwen2", "Qwen2DecoderLayer"),
    _decoder("qwen3", "Qwen3DecoderLayer"),
    _decoder("llama", "LlamaDecoderLayer"),
    _decoder("qwen3_moe", "Qwen3MoeDecoderLayer"),
    Seam(
        "layer.deepseek_v2_decoder_layer",
        (_DEEPSEEK_LAYER,),
        layer=f"{_DEEPSEEK_LAYER.module}:DeepseekV2DecoderLayer",
        eager_only=True,
    ),
    *(
        _model(name, cls)
        for name, cls in (
            ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM"), ("llama", "LlamaForCausalLM"),
            ("qwen3_moe", "Qwen3MoeForCausalLM"), ("deepseek_v2", "DeepseekV2ForCausalLM"),
        )
    ),
    Seam("layer.attention", (_ATTENTION,), layer=f"{_ATTENTION.module}:Attention", eager_only=True),
    # Compiled by itself, in eager mode too. Kimi-K3's own model calls `fused_grouped_topk` beside it.
    Seam(
        "moe.grouped_topk",
        (
            _part(
                "model_executor.layers.fused_moe.router.grouped_topk_router",
                "grouped_topk",
                (
                    "(hidden_states, gating_output, topk, renormalize, num_expert_group=0, topk_group=0, "
                    "scoring_func='softmax', routed_scaling_factor=1.0, e_score_correction_bias=None)",
                ),
                "5cd3f5a22fd6ddd3",
                "2453cfecf85f886b",
                "a60c606c083f00fd",
            ),
        ),
    ),
    Seam("mla.triton_decode", (_TRITON_MLA,)),
    Seam(
        "layer.latent_attention",
        (_LATENT_ATTENTION,),
        layer=f"{_LATENT_ATTENTION.module}:MultiHeadLatentAttentionWrapper",
        eager_only=True,
    ),
    Seam("layer.mixture", (_MIXTURE,), layer=f"{_MIXTURE.module}:MoERunner", eager_only=True),
    Seam(
        "sampler.top_k_top_p",
        (
            _part(
                "v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p",
                ("(logits, k, p)", "(logits, k, p, has_topp_only_rows=True)"),  # 0.33
                "486ddf78855eb514", "9003c2bd8dff0fa9", "2383a0dee300cca0", "6948048b85a972bb", "708009ff69301ba5",
            ),
        ),
    ),
    # vLLM IR existed from 0.20 to 0.33. Its ops take providers, of which the user chooses.
    Seam(
        "ir.rms_norm",
        (
            Place(
                "ir",
                "vllm.ir.ops.layernorm",
                "rms_norm",
                ("(x, weight, epsilon, variance_size=None)",),
                "0.20-0.33",
            ),
        ),
    ),
    Seam(
        "ir.fused_add_rms_norm",
        (
            Place(
                "ir",
                "vllm.ir.ops.layernorm",
                "fused_add_rms_norm",
                ("(x, x_residual, weight, epsilon, variance_size=None)",),
                "0.21-0.33",
            ),
        ),
    ),
)

SEAMS: dict[str, Seam] = {seam.name: seam for seam in _ALL}


_FORWARD = ("(self, positions, hidden_states)",)
_LINEAR = ("(self, input_)",)
_MLA = "model_executor.layers.attention.mla_attention"
_FORWARD_IMPL = "(self, q, k_c_normed, k_pe, kv_cache, attn_metadata"
_QUANTIZED = (
    ", output_scale=None, output_block_scale=None, quant_group_size=None, quant_scale_ue8m0=None, "
    "quant_col_major=None, quant_tma_aligned=None"
)

# What a replacement of a whole layer repeats besides the layer's own method: role -> the methods that may play it, each
# with the sources it was written against.
PARTS: dict[str, tuple[Place, ...]] = {
    "attention": (
        _part("model_executor.models.qwen2", "Qwen2Attention.forward", _FORWARD, "ff7a252677f1fd68"),
        _part("model_executor.models.qwen3", "Qwen3Attention.forward", _FORWARD, "4f8ff102c0ac33f3"),
        _part("model_executor.models.llama", "LlamaAttention.forward", _FORWARD, "4e2c69360faaa9d3"),
        _part("model_executor.models.qwen3_moe", "Qwen3MoeAttention.forward", _FORWARD, "4f8ff102c0ac33f3"),
    ),
    "mlp": (
        _part("model_executor.models.qwen2", "Qwen2MLP.forward", ("(self, x)",), "ed8f76673b96ed75"),
        # From 0.32 on the activation may quantise for the layer after it, if that is quantised.
        _part(
            "model_executor.models.llama", "LlamaMLP.forward", ("(self, x)",),
            "fac73f565ecc23b4", "372698f456c565a1",
        ),
    ),
    "column": (
        _part(
            "model_executor.layers.linear", "ColumnParallelLinear.forward", _LINEAR,
            "6b30057e7c45e5b3", "d6b54c3cabd94b60",
        ),
    ),
    "row": (
        _part(
            "model_executor.layers.linear", "RowParallelLinear.forward", _LINEAR,
            "a92da0b7baa06838", "f191e90f7317215a", "6d129f93bbc9ce6e",
        ),
    ),
    "replicated": (
        _part(
            "model_executor.layers.linear", "ReplicatedLinear.forward", ("(self, x)",),
            "5f8c891b586a7710", "bef64f7d41e69378",
        ),
    ),
    # Of DeepSeek's own, which leaves most products to the class that it inherits from.
    "fused column": (
        _part(
            "model_executor.models.deepseek_v2", "DeepSeekV2FusedQkvAProj.forward", _LINEAR, "d936727262c1b057",
            versions="0.17.1-0.17",
        ),
        _part(
            "model_executor.models.deepseek_v2", "DeepSeekV2FusedQkvAProjLinear.forward", _LINEAR, "d936727262c1b057",
            versions="0.18-0.33",
        ),
    ),
    "linear method": (
        _part(
            "model_executor.layers.linear", "UnquantizedLinearMethod.apply", ("(self, layer, x, bias=None)",),
            "ddcebaec46fff786", "31b95f60b2627c55", "bff62d93bf9afb0d", "311be6e7f0e867db",
        ),
    ),
    # With weights in float8: what multiplies by a linear layer's, and by experts'.
    "float8 method of Fp8LinearMethod": (
        _part(
            "model_executor.layers.quantization.fp8", "Fp8LinearMethod.apply", ("(self, layer, x, bias=None)",),
            "3949dba60d13589e", "0abce175309b9c61", versions=_SINCE_MOE,
        ),
    ),
    "float8 product": (
        _part(
            "model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel",
            "Fp8BlockScaledMMLinearKernel.apply_weights", ("(self, layer, x, bias=None, **kwargs)",),
            "6d24c064b6461230", "e27b8d7e3c314077", versions="0.23-0.33",
        ),
    ),
    "float8 method of Fp8MoEMethod": (
        _part(
            "model_executor.layers.quantization.fp8", "Fp8MoEMethod.apply",
            ("(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)",),
            "9a11d2b8a6c73e2b", "41937bf9df30c4ca", versions="0.22-0.33",
        ),
    ),
    # Since 0.33 somebody may be given what the experts make before it is weighted.
    "float8 experts": (
        _part(
            f"{_MOE}.experts.triton_moe", "TritonExperts.apply",
            (
                "(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, "
                "expert_map, a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, "
                "apply_router_weight_on_input)",
            ),
            "6a281cf6d2fa9d56", "500a0016e8b2e0c9", "61244d048ec16925", "ff575783dcd39ff3", "4faefa6853b47800",
            versions="0.24-0.32",
        ),
    ),
    "attention layer": (_ATTENTION,),
    "attention implementation": (
        _part(
            "v1.attention.backends.flash_attn", "FlashAttentionImpl.forward",
            (
                "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, "
                "output_block_scale=None)",
                "(self, layer, query, key, value, kv_cache, attn_metadata, output=None, output_scale=None, "
                "output_block_scale=None)",  # until 0.17
            ),
            "14197e1ebb204d73", "9c8958fbdbf2cfeb", "b1186d22fb3441d5", "bf43cc403ef97a8a", "df1de8d4e28bad6e",
            "a1fea64751ea1b3e", "bd3b5363a117f3d6", "a3a7fe9aac8f09fa", "92ff78b58d467421", "b114e81fe1fff75f",
            "f3a16c2d375cf042", "03a36689f7b8cfc0",
        ),
    ),
    "cache write": (
        _part(
            "v1.attention.backends.flash_attn", "FlashAttentionImpl.do_kv_cache_update",
            ("(self, layer, key, value, kv_cache, slot_mapping)",),
            "53c7db03eaad9705", "e3f2d43d1d2ad8f3", "48b628d73a9cc62b",
        ),
    ),
    "latent attention module": (
        _part(
            "model_executor.models.deepseek_v2", "DeepseekV2MLAAttention.forward",
            ("(self, positions, hidden_states, llama_4_scaling)",), "e160675da521f36b",
        ),
    ),
    "mixture module": (
        _part(
            "model_executor.models.deepseek_v2", "DeepseekV2MoE.forward",
            ("(self, hidden_states, already_sequence_parallel=False)",),
            "90509013216f9848", "5c1892e99174ef9a", versions="0.25-0.33",
        ),
        _part(
            "model_executor.models.qwen3_moe", "Qwen3MoeSparseMoeBlock.forward", ("(self, hidden_states)",),
            "487556e8efc32345", "72bf7ced59d75b78", versions="0.20-0.33",
        ),
    ),
    "mixture _forward_impl": (
        _part(
            f"{_MOE}.runner.moe_runner", "MoERunner._forward_impl",
            ("(self, hidden_states, router_logits, shared_experts_input, input_ids=None)",),
            "eb4518ff6e06fe1b", "1f5c5505f0fd205f", "24632cda62049198", versions=_SINCE_MOE,
        ),
    ),
    "mixture _apply_quant_method": (
        _part(
            f"{_MOE}.runner.moe_runner", "MoERunner._apply_quant_method",
            (
                "(self, hidden_states, router_logits, shared_experts_input, input_ids=None, "
                "shared_experts_overlapping=False)",
                "(self, hidden_states, router_logits, shared_experts_input, input_ids=None)",  # until 0.26
            ),
            "c195d8fa0169ddf0", "4de859f459813132", "f828f389e6fae6b2", versions=_SINCE_MOE,
        ),
    ),
    "mixture _maybe_apply_routed_scale_to_output": (
        _part(
            f"{_MOE}.runner.moe_runner", "MoERunner._maybe_apply_routed_scale_to_output",
            ("(self, shared_output, fused_output)",), "720e93552c22e536", versions="0.20-0.33",
        ),
    ),
    "router": (
        _part(
            f"{_MOE}.router.fused_topk_router", "FusedTopKRouter._compute_routing", _ROUTE, "426f44a3b500b0ba",
            versions="0.20-0.33",
        ),
        _part(
            f"{_MOE}.router.grouped_topk_router", "GroupedTopKRouter._compute_routing", _ROUTE,
            "357398f7410bd090", "f44166e3780c585d", versions="0.20-0.33",
        ),
    ),
    "router's selection": (
        _part(
            f"{_MOE}.router.base_router", "BaseRouter._select_experts", _SELECT, "cbd26c3ee4548eb7",
            versions=_SINCE_MOE,
        ),
    ),
    "router's entry": (
        _part(
            f"{_MOE}.router.fused_moe_router", "FusedMoERouter.select_experts", _SELECT, "97e6f393a30b6ca2",
            versions=_SINCE_MOE,
        ),
    ),
    "gate": (
        _part(
            f"{_MOE}.router.gate_linear", "GateLinear.forward", ("(self, x)",),
            "92b69b09a5db534e", "10320e3b2abc2421", "801aacfd8a1ba7f1", "96b3e5c85e0addde", "fbfcb4e79e9ded5b",
            "c2c7b353306ad332", versions=_SINCE_MOE,
        ),
    ),
    "latent attention layer": (
        _part(
            _MLA, "MLAAttention.forward",
            (
                "(self, q, kv_c_normed, k_pe, output_shape=None, q_dcp_replicated=None)",
                "(self, q, kv_c_normed, k_pe, output_shape=None)",  # until 0.26
            ),
            "083ce380ac708f58", "cf40340db7e24650", "4e79e0073e9329f0", "caeb3a01c9ce8760", "00ab686e11d7d885",
            "fce20f346ec6ca76", "a90141d0d0beb822",
        ),
    ),
    "latent attention": (
        _part(
            _MLA, "MLAAttention.forward_impl",
            (
                f"{_FORWARD_IMPL}, output{_QUANTIZED}, q_dcp_replicated=None)",
                f"{_FORWARD_IMPL}, output{_QUANTIZED})",  # until 0.26
                f"{_FORWARD_IMPL}, output=None, output_scale=None, output_block_scale=None)",  # until 0.17
            ),
            "e627cd63549810c5", "b1e6894096948f3b", "0b2c445e5d5e3f74", "924392a1c47215ad", "02bf7de7cddf146f",
            "51c88e615ad3871f", "3f4b682ac81e1071", "df31b52c0f47ef73", "7501a03592d00b03", "9a53a2b416432fd7",
            "0bbabf986b5936d5", "e10759ff2f2aab26", "4b53183ee3f104de",
        ),
    ),
    "latent values": (
        _part(
            _MLA, "MLAAttention._v_up_proj", ("(self, x, out)",),
            "34eea3d904ef39d1", "b33244853d89dfbf", "8dba2611b67e1a5f", "abb308c84dd6a8ed",
        ),
    ),
    # Until 0.29 the layer's own method did it.
    "latent cache update": (
        _part(
            _MLA, "MLAAttention.update_kv_cache",
            ("(self, kv_c_normed, k_pe, kv_cache, slot_mapping, attn_metadata, kv_cache_dtype, k_scale)",),
            "71b577e8ad363bfd", "88e079aa0f0ce214", "7e2bcc96e72c3279", versions="0.30-0.33",
        ),
    ),
    "latent attention implementation": (_TRITON_MLA,),
    "latent cache write": (
        _part(
            "v1.attention.backend", "MLAAttentionImpl.do_kv_cache_update",
            (
                "(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale=False)",
                "(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)",  # until 0.32
            ),
            "891e73ea3d6cce29", "38e2bb135a9a3ca3",
        ),
    ),
}  # fmt: skip

# By the source of the method that writes a layer's KV cache: (cache, head_size) -> key and value cache, each
# [num_blocks, block_size, num_kv_heads, head_size].
KV_CACHE_LAYOUTS: dict[str, Callable[[Any, int], Any]] = {
    "53c7db03eaad9705": lambda cache, head_size: cache.unbind(0),
    "e3f2d43d1d2ad8f3": lambda cache, head_size: cache.unbind(1),
    "48b628d73a9cc62b": lambda cache, head_size: cache.transpose(1, 2).split(head_size, dim=-1),
}


def vllm_version() -> str:
    """Of the vLLM imported here, "" if none is."""
    return str(getattr(sys.modules.get("vllm"), "__version__", ""))


def platform() -> str:
    """What vLLM runs on: "cuda" (NVIDIA or AMD), "cpu", a name of its own, or "" while it has not chosen."""
    module = sys.modules.get("vllm.platforms")
    if module is None:
        return ""
    current = module.current_platform
    if current.is_cuda_alike():
        return "cuda"
    return str(current.device_type)


@contextmanager
def eager_layers() -> Iterator[None]:
    """Layers that are made and called here are as they are under `enforce_eager`, with all custom ops. Imports vLLM."""
    config, mode, platforms = (
        importlib.import_module(f"vllm.{name}") for name in ("config", "config.compilation", "platforms")
    )
    platforms.current_platform.import_kernels()
    compilation = config.CompilationConfig(mode=mode.CompilationMode.NONE, custom_ops=["all"])
    found = config.VllmConfig(compilation_config=compilation)
    # What a worker does when it starts, where there is vLLM IR (0.20 to 0.33).
    if hasattr(compilation, "ir_enable_torch_wrap"):
        importlib.import_module("vllm.ir").set_default_torch_wrap(compilation.ir_enable_torch_wrap)
    if hasattr(found.kernel_config, "ir_op_priority"):
        found.kernel_config.ir_op_priority.set_default()
    with config.set_current_vllm_config(found):
        yield


def salt_compile_caches(fingerprint: str, names: tuple[str, ...]) -> Callable[[], None] | None:
    """Make vLLM's compile caches see us; returns the undo, or None if vLLM has no such table.

    vLLM hashes the values of this table into the key of its compiled artifacts (0.12 and later). Without an entry of
    ours, an artifact compiled without the plugin would be loaded with it, and the other way round. Our own variables
    are entered with constant values, so that vLLM does not call them unknown.
    """
    table: dict[str, Callable[[], Any]] | None = getattr(sys.modules.get("vllm.envs"), "environment_variables", None)
    if table is None:
        return None
    ours: dict[str, Callable[[], Any]] = {name: lambda: None for name in names}
    ours["VLLM_GEMS_FINGERPRINT"] = lambda: fingerprint
    table.update(ours)

    def undo() -> None:
        for name in ours:
            table.pop(name, None)

    return undo
