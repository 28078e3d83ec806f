"""The models that are served with random weights: public configurations, and how often each patch should answer.

What a model is cut to so that it fits, or so that a test is short, is in its title: layers, and experts of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What a model has many of, or one: what calls are counted by.
LAYER, DENSE, EXPERTS, ONCE = "layer", "layer without experts", "layer with experts", "model"
Calls = Mapping[str, int]


@dataclass(frozen=True)
class Whole:
    """A patch that does a decode step of a whole block: one call for each, in place of the parts' calls."""

    of: str
    parts: Mapping[str, int]  # patch -> its calls in one block


@dataclass(frozen=True)
class Model:
    """A public configuration, and how often each patch should answer in one forward pass."""

    title: str
    config: dict[str, Any]
    calls: Mapping[str, Calls]  # patch -> its calls by what they are counted by
    wholes: Mapping[str, Whole]

    @property
    def experts(self) -> int:
        """Routed experts of a layer that has any."""
        return int(self.config.get("n_routed_experts") or self.config.get("num_experts") or 0)

    @property
    def latent(self) -> bool:
        return "kv_lora_rank" in self.config

    @property
    def numbers(self) -> dict[str, int]:
        """How many the model has of what calls are counted by."""
        layers: int = self.config["num_hidden_layers"]
        dense: int = self.config.get("first_k_dense_replace", 0) if self.experts else layers
        return {LAYER: layers, DENSE: dense, EXPERTS: layers - dense, ONCE: 1}

    def cut(self, layers: int | None = None, experts: int | None = None) -> Model:
        """The model with fewer layers, at least one of them with experts if it has any; or with fewer experts."""
        config, title = dict(self.config), self.title
        if layers is not None and layers != config["num_hidden_layers"]:
            config["num_hidden_layers"] = layers
            if "max_window_layers" in config:
                config["max_window_layers"] = layers
            if "first_k_dense_replace" in config:
                config["first_k_dense_replace"] = min(config["first_k_dense_replace"], layers - 1)
            title += f", {layers} layers"
        if experts is not None and experts != self.experts:
            config["n_routed_experts" if "n_routed_experts" in config else "num_experts"] = experts
            title += f", {experts} experts"
        return dataclasses.replace(self, title=title, config=config)

    def expected(self, decodes: int, answering: set[str], mixed: bool = False) -> dict[str, int]:
        """Hits of a prefill and so many decode steps.

        answering: the patches that are bound; of whole blocks, those that have answered at all. mixed: whether whole
        layers took the prefill, too, which those of latent attention never do.
        """
        numbers, found = self.numbers, {}
        for patch, calls in self.calls.items():
            each = sum(count * numbers[kind] for kind, count in calls.items())
            found[patch] = each * (decodes if patch in _DECODES_ONLY else 1 + decodes)
        for name, whole in self.wholes.items():
            if name in answering:
                passes = decodes + (mixed and not self.latent)
                found[name] = numbers[whole.of] * passes
                for patch, count in whole.parts.items():
                    found[patch] -= numbers[whole.of] * count * passes
        if answering & _WITH_EXPERTS:  # answer whatever has few tokens, short prefills too
            found = {patch: count for patch, count in found.items() if patch not in _OF_EXPERTS}
        return {patch: count for patch, count in found.items() if patch in answering}

    def weight_bytes(self, itemsize: int) -> int:
        """About how much memory the weights take, a little too much rather than too little."""
        config, numbers = self.config, self.numbers
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        attention = 4 * hidden * heads * config.get("v_head_dim", config.get("head_dim", hidden // heads))
        narrow = config.get("moe_intermediate_size", 0) * (self.experts + config.get("n_shared_experts", 0))
        each = {LAYER: attention, DENSE: 3 * hidden * config["intermediate_size"], EXPERTS: 3 * hidden * narrow}
        each[ONCE] = 2 * hidden * config["vocab_size"]
        return itemsize * sum(count * numbers[kind] for kind, count in each.items())

    def cache_bytes(self, tokens: int, itemsize: int, absorbed: bool = True) -> int:
        """Of the KV cache of so many tokens; with latent attention not `absorbed`, of every head's keys and values."""
        config = self.config
        if self.latent and absorbed:
            width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        elif self.latent:
            width = 2 * config["num_attention_heads"] * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
        else:
            head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
            width = 2 * config["num_key_value_heads"] * head
        return itemsize * tokens * width * int(config["num_hidden_layers"])


# Patches of what happens inside a mixture of experts.
MIXTURE = "moe.mixture"
_WITH_EXPERTS = {MIXTURE, "decoder.deepseek_v2", "decoder.qwen3_moe"}
_OF_EXPERTS = {"activation.silu_and_mul", "moe.grouped_topk", "op.silu_and_mul"}
# Patches of what a prefill does not call.
_DECODES_ONLY = {"mla.triton_decode"}

_DENSE: dict[str, Calls] = {
    "layernorm.rms_norm": {LAYER: 2, ONCE: 1},
    "rotary.rotary_embedding": {LAYER: 1},
    "activation.silu_and_mul": {DENSE: 1},
}
_QUERY_KEY_NORMS: dict[str, Calls] = {**_DENSE, "layernorm.rms_norm": {LAYER: 4, ONCE: 1}}
# Experts call the op of the activation; the router's function is called of grouped choices only.
_ROUTED: dict[str, Calls] = {"op.silu_and_mul": {EXPERTS: 1}}


def _decoder(patch: str, calls: Mapping[str, Calls]) -> dict[str, Whole]:
    per_layer = {part: counts[LAYER] if LAYER in counts else counts[DENSE] for part, counts in calls.items()}
    return {patch: Whole(LAYER, per_layer)}


def _latent(norms: int) -> tuple[dict[str, Calls], dict[str, Whole]]:
    """DeepSeek's calls and whole blocks; so many norms inside attention."""
    calls: dict[str, Calls] = {
        "layernorm.rms_norm": {LAYER: 2 + norms, ONCE: 1},
        "rotary.deepseek_scaling": {LAYER: 1},
        "activation.silu_and_mul": {LAYER: 1},  # in the shared experts where there are experts
        "mla.triton_decode": {LAYER: 1},
        "moe.grouped_topk": {EXPERTS: 1},
        **_ROUTED,
    }
    inside = {"layernorm.rms_norm": norms, "rotary.deepseek_scaling": 1, "mla.triton_decode": 1}
    layer = {**inside, "layernorm.rms_norm": 2 + norms}
    return calls, {"mla.decode_step": Whole(LAYER, inside), "decoder.deepseek_v2": Whole(LAYER, layer)}


def _config(architecture: str, model_type: str, **values: Any) -> dict[str, Any]:
    common = {"hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    return {"architectures": [architecture], "model_type": model_type, **common, "tie_word_embeddings": False, **values}


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": mscale, "mscale_all_dim": mscale,
    }  # fmt: skip


_DEEPSEEK = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "max_position_embeddings": 163840, "moe_layer_freq": 1, "attention_bias": False,
}  # fmt: skip

_DEEPSEEK_V3 = _config(
    "DeepseekV3ForCausalLM", "deepseek_v3", **_DEEPSEEK, hidden_size=7168, intermediate_size=18432,
    moe_intermediate_size=2048, num_hidden_layers=4, first_k_dense_replace=2, num_attention_heads=128,
    num_key_value_heads=128, q_lora_rank=1536, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
    n_group=8, topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.5, vocab_size=129280, rope_scaling=_yarn(1.0),
)  # fmt: skip

# As DeepSeek's checkpoints say it: e4m3 with a scale for 128 by 128 weights, and for 128 elements of an activation.
_BLOCK_FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}  # fmt: skip

MODELS = {
    "qwen2.5-7b": Model(
        "Qwen2.5-7B",
        _config(
            "Qwen2ForCausalLM", "qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rms_norm_eps=1e-6, rope_theta=1e6,
            max_position_embeddings=32768, use_sliding_window=False, max_window_layers=28,
        ),
        _DENSE,
        _decoder("decoder.qwen2", _DENSE),
    ),
    "llama-3.1-8b": Model(
        "Llama-3.1-8B",
        _config(
            "LlamaForCausalLM", "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5, rope_theta=5e5,
            max_position_embeddings=131072, attention_bias=False, mlp_bias=False,
            rope_scaling={
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        _DENSE,
        _decoder("decoder.llama", _DENSE),
    ),
    "qwen3-8b": Model(
        "Qwen3-8B",
        _config(
            "Qwen3ForCausalLM", "qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6,
            rope_theta=1e6, max_position_embeddings=40960, attention_bias=False, use_sliding_window=False,
            max_window_layers=36,
        ),
        _QUERY_KEY_NORMS,
        _decoder("decoder.qwen3", _QUERY_KEY_NORMS),
    ),
    # 31 GB in bfloat16.
    "deepseek-v2-lite": Model(
        "DeepSeek-V2-Lite",
        _config(
            "DeepseekV2ForCausalLM", "deepseek_v2", **_DEEPSEEK, hidden_size=2048, intermediate_size=10944,
            moe_intermediate_size=1408, num_hidden_layers=27, first_k_dense_replace=1, num_attention_heads=16,
            num_key_value_heads=16, q_lora_rank=None, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
            n_group=1, topk_group=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
            routed_scaling_factor=1.0, vocab_size=102400, rope_scaling=_yarn(0.707),
        ),
        *_latent(norms=1),
    ),
    # 52 GB in bfloat16. A layer with experts takes 23 GB, so that of four layers two have them: three would leave an
    # 80 GB GPU no room. The real model has 61, the first three without experts, and weights in block-wise float8.
    "deepseek-v3-4l": Model("DeepSeek-V3, 4 layers, 2 of them with experts", _DEEPSEEK_V3, *_latent(norms=2)),
    # 28 GB. There is no float32 to compare with, which vLLM has not for such weights: --no-reference.
    "deepseek-v3-4l-fp8": Model(
        "DeepSeek-V3 in float8, 4 layers, 2 of them with experts",
        {**_DEEPSEEK_V3, "quantization_config": _BLOCK_FP8},
        *_latent(norms=2),
    ),
    # 61 GB in bfloat16.
    "qwen3-30b-a3b": Model(
        "Qwen3-30B-A3B",
        _config(
            "Qwen3MoeForCausalLM", "qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], vocab_size=151936,
            rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960, attention_bias=False,
            use_sliding_window=False, max_window_layers=48, router_aux_loss_coef=0.001,
        ),
        {**_QUERY_KEY_NORMS, **_ROUTED},
        {"decoder.qwen3_moe": Whole(LAYER, {"layernorm.rms_norm": 4, "rotary.rotary_embedding": 1})},
    ),
    "tiny": Model(
        "tiny",
        _config(
            "Qwen2ForCausalLM", "qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=512, rms_norm_eps=1e-6, rope_theta=1e4,
            max_position_embeddings=2048, use_sliding_window=False, max_window_layers=2,
        ),
        _DENSE,
        _decoder("decoder.qwen2", _DENSE),
    ),
    # vLLM's kernels for a CPU take no other head sizes than the real ones.
    "tiny-deepseek": Model(
        "tiny DeepSeek",
        _config(
            "DeepseekV3ForCausalLM", "deepseek_v3", **_DEEPSEEK, hidden_size=128, intermediate_size=256,
            moe_intermediate_size=64, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4,
            num_key_value_heads=4, q_lora_rank=64, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
            n_group=4, topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
            routed_scaling_factor=2.5, vocab_size=512, rope_scaling=_yarn(1.0),
        ),
        # On a CPU vLLM routes and activates inside the experts' one kernel.
        {patch: calls for patch, calls in _latent(norms=2)[0].items() if EXPERTS not in calls},
        {"mla.decode_step": _latent(norms=2)[1]["mla.decode_step"]},
    ),
}  # fmt: skip
