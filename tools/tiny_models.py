"""Tiny checkpoints with random weights: every layer that a patch replaces, in real architectures, in a few megabytes.

    python tools/tiny_models.py FOLDER [NAME ...]

The weights are the same on every machine and in every run. They are stored in bfloat16, so that a bfloat16 run rounds
no weight and differs from a float32 run by its arithmetic alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 512
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning there was a small kernel that normalised every row of a tensor.",
    "A rotary embedding turns pairs of numbers by an angle that grows with the position.",
)

_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
# vLLM's MLA kernels on the CPU are compiled for the head sizes of the real models, so these cannot shrink.
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 64}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

# name -> (transformers' configuration class, what differs from _COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", _GROUPED),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, **_GEMMA}),
    "deepseek_v2": ("DeepseekV2Config", {**_MLA, "q_lora_rank": None, "topk_method": "greedy"}),
    # noaux_tc: without it vLLM finds no place for the checkpoint's e_score_correction_bias.
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_MLA, "q_lora_rank": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_parameters": _YARN},
    ),
}


def tokenizer() -> Any:
    """A byte-level tokenizer that knows every byte and the commonest pairs of `SENTENCES`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def _fill(model: Any, norm_mean: float) -> None:
    """Random weights, large enough that every layer moves the logits."""
    import torch

    generator = torch.Generator().manual_seed(0)
    biases = [buffer for name, buffer in model.named_buffers() if "e_score_correction" in name]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0.0, 0.08, generator=generator)
            elif "norm" in name:
                weight.normal_(norm_mean, 0.1, generator=generator)
        for buffer in biases:
            buffer.normal_(0.0, 0.01, generator=generator)


def make(name: str, folder: Path) -> Path:
    """The checkpoint of this name inside `folder`, made if it is not there."""
    import torch
    import transformers

    target = folder / name
    finished = target / "tokenizer.json"  # written last
    if finished.exists():
        return target
    config_class, options = MODELS[name]
    make_config: Callable[..., Any] = getattr(transformers, config_class)
    model = transformers.AutoModelForCausalLM.from_config(make_config(**{**_COMMON, **options}))
    # Gemma's norm multiplies by one plus the weight.
    _fill(model, norm_mean=0.0 if name.startswith("gemma") else 1.0)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer().save_pretrained(target)
    return target


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"{__doc__}\nNames: {', '.join(MODELS)}")
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(MODELS)
    for name in names:
        print(make(name, folder))


if __name__ == "__main__":
    main()
