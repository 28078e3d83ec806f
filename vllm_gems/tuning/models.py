"""The layers of a model, from its configuration alone: no weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..kernels.linear import Shape

# The models that a family's name stands for: the numbers of their public configurations.
PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},  # 8B
        {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},  # 70B
    ),
    "qwen": (
        # Qwen2.5-7B, Qwen3-8B
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
         "attention_bias": True},
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128},
    ),
    "deepseek": (
        # V2-Lite, V3
        {"hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16, "kv_lora_rank": 512,
         "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "moe_intermediate_size": 1408, "n_shared_experts": 2},
        {"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "kv_lora_rank": 512,
         "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "moe_intermediate_size": 2048, "n_shared_experts": 1},
    ),
}  # fmt: skip


def configurations(model: str) -> tuple[dict[str, Any], ...]:
    """Of a family of `PRESETS`, a folder with config.json, or a name that transformers knows where to find.

    Raises ValueError if there is none.
    """
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model) / "config.json"
    if path.is_file():
        try:
            return (dict(json.loads(path.read_text())),)
        except (ValueError, TypeError) as error:
            raise ValueError(f"--model {model}: {path} is no configuration: {error}") from None
    try:
        from transformers import AutoConfig

        found: dict[str, Any] = AutoConfig.from_pretrained(model).to_dict()
    except (ImportError, OSError, ValueError) as error:
        known = ", ".join(PRESETS)
        raise ValueError(f"--model {model}: not one of {known}, no folder with config.json, and {error}") from error
    return (found,)


def _shared(size: int, ranks: int, name: str) -> int:
    if size % ranks:
        raise ValueError(f"--tp {ranks} does not divide {name} = {size}")
    return size // ranks


def _heads_of_keys(heads: int, ranks: int) -> int:
    """Of one rank; with more ranks than heads, some have the same."""
    if heads < ranks and ranks % heads == 0:
        return 1
    return _shared(heads, ranks, "num_key_value_heads")


def linears(config: Mapping[str, Any], tp: int = 1) -> list[Shape]:
    """The different linear layers of a decoder layer on one of `tp` ranks, fused as vLLM fuses them.

    Raises ValueError for a configuration that lacks a size, or a `tp` that does not divide one.
    """
    try:
        return _linears(config.get("text_config") or config, tp)
    except KeyError as error:
        raise ValueError(f"the configuration has no {error}, so it is not that of a decoder") from None


def _linears(config: Mapping[str, Any], tp: int) -> list[Shape]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    intermediate = config["intermediate_size"]
    bias = bool(config.get("attention_bias") or config.get("model_type") == "qwen2")
    mine = _shared(heads, tp, "num_attention_heads")
    found: list[Shape] = []
    if config.get("kv_lora_rank"):
        key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        latent = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        if rank := config.get("q_lora_rank"):
            found += [Shape(hidden, rank + latent), Shape(rank, mine * key)]
        else:
            found += [Shape(hidden, mine * key), Shape(hidden, latent)]
        found.append(Shape(mine * config["v_head_dim"], hidden))
    else:
        size = config.get("head_dim") or hidden // heads
        pairs = _heads_of_keys(config.get("num_key_value_heads") or heads, tp)
        found += [Shape(hidden, (mine + 2 * pairs) * size, bias), Shape(mine * size, hidden)]
    widths = [intermediate]
    if shared := config.get("n_shared_experts"):
        widths.append(shared * config["moe_intermediate_size"])
    for width in widths:
        width = _shared(width, tp, "intermediate_size")
        found += [Shape(hidden, width, gated=True), Shape(width, hidden)]
    return list(dict.fromkeys(found))
