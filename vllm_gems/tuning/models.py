"""The layers of a model, from its configuration alone: no weights are read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..kernels.block_fp8_linear import BLOCK
from ..kernels.linear import Shape
from ..kernels.moe_experts import Experts

Result = TypeVar("Result")

# The models that a family's name stands for: the numbers of their public configurations.
PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": (
        # Llama 3.1: 8B, 70B
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "vocab_size": 128256},
        {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
         "vocab_size": 128256},
    ),
    "qwen": (
        # Qwen2.5-7B, Qwen3-8B, Qwen3-30B-A3B
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
         "attention_bias": True, "vocab_size": 152064},
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128, "vocab_size": 151936, "model_type": "qwen3"},
        {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
         "head_dim": 128, "vocab_size": 151936, "moe_intermediate_size": 768, "num_experts": 128,
         "num_experts_per_tok": 8, "model_type": "qwen3_moe"},
    ),
    "deepseek": (
        # V2-Lite, V3
        {"hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16, "kv_lora_rank": 512,
         "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "vocab_size": 102400, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6,
         "n_shared_experts": 2, "first_k_dense_replace": 1,
         "n_group": 1, "topk_group": 1, "scoring_func": "softmax", "norm_topk_prob": False,
         "routed_scaling_factor": 1.0},
        {"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "kv_lora_rank": 512,
         "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "vocab_size": 129280, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8,
         "n_shared_experts": 1, "first_k_dense_replace": 3,
         "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid", "norm_topk_prob": True,
         "routed_scaling_factor": 2.5, "topk_method": "noaux_tc",
         "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
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


def _sizes(function: Callable[..., Result]) -> Callable[[Mapping[str, Any], int], Result]:
    """(configuration, ranks) -> what `function` says of its text model; ValueError for a size that is missing."""

    @functools.wraps(function)
    def asked(config: Mapping[str, Any], tp: int = 1) -> Result:
        try:
            return function(config.get("text_config") or config, tp)
        except KeyError as error:
            raise ValueError(f"the configuration has no {error}, so it is not that of a decoder") from None

    return asked


# On one of `tp` ranks, fused as vLLM fuses them. All raise ValueError for a configuration that lacks a size, or a `tp`
# that does not divide one.


def in_block_fp8(config: Mapping[str, Any]) -> bool:
    """Whether weights, but those of gates and vocabularies, are in float8 with a scale for 128 by 128 of them."""
    text = config.get("text_config") or config
    found = config.get("quantization_config") or text.get("quantization_config") or {}
    return found.get("quant_method") == "fp8" and found.get("weight_block_size") == [BLOCK, BLOCK]


@_sizes
def linears(config: Mapping[str, Any], tp: int) -> list[Shape]:
    """The different linear layers of a decode step's decoder layers."""
    count = _num_experts(config)
    gate = [Shape(config["hidden_size"], count)] if count else []  # each rank has the whole one
    return list(dict.fromkeys([*projections(config, tp), *gate]))


@_sizes
def projections(config: Mapping[str, Any], tp: int) -> list[Shape]:
    """Those without the gate of a mixture, which is never quantised."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    bias = bool(config.get("attention_bias") or config.get("model_type") in ("qwen2", "qwen2_moe"))
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
    for width in _widths(config):
        width = _shared(width, tp, "intermediate_size")
        found += [Shape(hidden, width, gated=True), Shape(width, hidden)]
    return list(dict.fromkeys(found))


def _num_experts(config: Mapping[str, Any]) -> int:
    """0: it is no mixture."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    return next((config[name] for name in names if config.get(name)), 0)


def _widths(config: Mapping[str, Any]) -> Iterator[int]:
    """Of the gated layers: dense ones, which a mixture may have some of, and experts that all tokens go to."""
    dense = config.get("first_k_dense_replace") or config.get("mlp_only_layers")
    if not _num_experts(config) or dense or config.get("decoder_sparse_step", 1) > 1:
        yield config["intermediate_size"]
    if shared := config.get("n_shared_experts"):
        yield shared * config["moe_intermediate_size"]
    if shared := config.get("shared_expert_intermediate_size"):
        yield shared


@_sizes
def all_linears(config: Mapping[str, Any], tp: int) -> list[Shape]:
    """Those of a prefill too, which takes keys and values out of the latent; a decode step does not."""
    found = linears(config, tp)
    if latent := config.get("kv_lora_rank"):
        mine = _shared(config["num_attention_heads"], tp, "num_attention_heads")
        found.append(Shape(latent, mine * (config["qk_nope_head_dim"] + config["v_head_dim"])))
    return list(dict.fromkeys(found))


class PerHead(NamedTuple):
    """A product for each head: [rows, inner] @ [inner, cols]."""

    heads: int
    inner: int
    cols: int
    transposed: bool  # the weight lies as [cols, inner]


@_sizes
def absorbed(config: Mapping[str, Any], tp: int) -> list[PerHead]:
    """The products of every head into the latent and out of it."""
    latent = config.get("kv_lora_rank")
    if not latent:
        return []
    mine = _shared(config["num_attention_heads"], tp, "num_attention_heads")
    return [
        PerHead(mine, config["qk_nope_head_dim"], latent, transposed=False),
        PerHead(mine, latent, config["v_head_dim"], transposed=True),
    ]


@_sizes
def vocabulary(config: Mapping[str, Any], tp: int) -> Shape | None:
    """The layer that gives logits; as many rows has the embedding. None if the configuration does not say its size."""
    size = config.get("vocab_size")
    return Shape(config["hidden_size"], _shared(-(-size // 64) * 64, tp, "vocab_size")) if size else None


@_sizes
def mixture(config: Mapping[str, Any], tp: int) -> Experts | None:
    """The experts that tokens are routed to; None if there are none."""
    count = _num_experts(config)
    if not count:
        return None
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    return Experts(
        count, config["num_experts_per_tok"], config["hidden_size"], _shared(width, tp, "moe_intermediate_size")
    )


class Heads(NamedTuple):
    """What a rotary embedding turns."""

    query: int
    key: int
    size: int  # elements of a head
    rotated: int  # of them
    latent: bool  # DeepSeek's: a part of each query head, and one key for all


@_sizes
def heads(config: Mapping[str, Any], tp: int) -> Heads:
    """Those of attention on one rank."""
    mine = _shared(config["num_attention_heads"], tp, "num_attention_heads")
    if config.get("kv_lora_rank"):
        size = config["qk_rope_head_dim"]
        return Heads(mine, 1, size, size, True)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    keys = _heads_of_keys(config.get("num_key_value_heads") or config["num_attention_heads"], tp)
    return Heads(mine, keys, size, int(size * config.get("partial_rotary_factor", 1)), False)


@_sizes
def norms(config: Mapping[str, Any], tp: int) -> list[tuple[int, int]]:
    """(elements of a row, rows of a token) of the different norms, those of heads among them."""
    found = [(config["hidden_size"], 1)]
    found += [(config[name], 1) for name in ("q_lora_rank", "kv_lora_rank") if config.get(name)]
    if str(config.get("model_type")).startswith("qwen3"):
        query, _, size, *_ = heads(config, tp)
        found.append((size, query))
    return list(dict.fromkeys(found))


@_sizes
def activated(config: Mapping[str, Any], tp: int) -> list[int]:
    """Elements of a result row of the gated activations, those of experts among them."""
    found = [*_widths(config)]
    if _num_experts(config):
        found.append(config.get("moe_intermediate_size") or config["intermediate_size"])
    return [_shared(width, tp, "intermediate_size") for width in dict.fromkeys(found)]


@_sizes
def router(config: Mapping[str, Any], tp: int) -> dict[str, Any] | None:
    """How DeepSeek's gate chooses experts, which is in groups; None if the model has none of that kind."""
    if not config.get("n_group"):
        return None
    return {
        "experts": _num_experts(config),
        "topk": config["num_experts_per_tok"],
        "groups": config["n_group"],
        "kept": config["topk_group"],
        "scoring": config.get("scoring_func", "softmax"),
        "renormalize": config.get("norm_topk_prob", False),
        "factor": config.get("routed_scaling_factor", 1.0),
        "bias": config.get("topk_method") == "noaux_tc",
    }
