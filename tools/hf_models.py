"""BERT, LLaMA and LLaVA as transformers has them, with inputs: public shapes or tiny ones with random weights, or real
weights from a folder.

The random weights are the same in every run on one kind of device, and large enough that every layer moves the result.
LLaVA gets three generated images and a prompt through transformers' own processor classes; its tokenizer knows few
words, for none can be downloaded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models  # a neighbour of this file
import torch

SENTENCES = (
    "The capital of France is",
    "A kitten sleeps on the warm stove while it rains.",
    "Stocks fell sharply.",
)
QUESTION = "USER: <image> <image> <image> What differs between these pictures? ASSISTANT:"


@dataclass(frozen=True)
class Subject:
    """A model in float32, ready to be called, and what to call it with.

    result: which of the model's outputs is compared, (batch, tokens, width). generates: whether tokens are, too.
    """

    name: str
    model: Any
    inputs: dict[str, torch.Tensor]
    result: str
    generates: bool

    def inputs_for(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The inputs of a model in `dtype`: pixels in it, tokens as they are."""
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in self.inputs.items()}


# bert-base-uncased
_BERT: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip
_TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
}  # fmt: skip
# Llama-2-7b-hf; LLaVA-1.5-7B's language model has 64 tokens more and is padded by nothing.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
_TINY_LLAMA: dict[str, Any] = {**_TINY, "num_key_value_heads": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
# clip-vit-large-patch14-336
_VISION: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_TINY_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "projection_dim": 16,
}  # fmt: skip


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Have PyTorch compute float32 in float32 on a GPU for a while; by default its convolutions round to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def _fill(model: torch.nn.Module, device: str) -> None:
    """Random weights, of a size that keeps activations near one."""
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        weight.normal_(generator=generator)
        if weight.dim() == 2 and "embed" in name:
            continue
        if weight.dim() > 1:
            weight.mul_(1 / math.sqrt(weight[0].numel()))
        else:
            weight.mul_(0.1).add_(float("norm" in name.lower() and "weight" in name))


def _random(config: Any, architecture: str, device: str, attention: str) -> Any:
    import transformers

    config._attn_implementation = attention
    with torch.device(device):
        model = getattr(transformers, architecture)(config)
    _fill(model, device)
    return model.eval()


def _load(architecture: str, path: Path, device: str, attention: str) -> Any:
    import transformers

    cls = getattr(transformers, architecture)
    model = cls.from_pretrained(path, dtype=torch.float32, attn_implementation=attention, local_files_only=True)
    return model.to(device).eval()


def _tokens(vocabulary: int, lengths: tuple[int, ...], device: str) -> dict[str, torch.Tensor]:
    """Random tokens in a batch, padded on the right; the first ids are left out, which tend to be special."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, vocabulary, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.long().to(device)}


def _texts(path: Path, texts: tuple[str, ...], device: str) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(path, local_files_only=True)(list(texts), padding=True, return_tensors="pt")
    return {name: value.to(device) for name, value in batch.items()}


def bert(path: Path | None, tiny: bool, device: str, attention: str) -> Subject:
    """BertModel: three sentences of different lengths; compared are the last hidden states."""
    if path:
        model, inputs = _load("BertModel", path, device, attention), _texts(path, SENTENCES, device)
    else:
        from transformers import BertConfig

        config = BertConfig(**{**_BERT, **(_TINY if tiny else {})})
        model = _random(config, "BertModel", device, attention)
        inputs = _tokens(config.vocab_size, (7, 5, 3) if tiny else (128, 75, 9), device)
    return Subject("bert", model, inputs, "last_hidden_state", generates=False)


def llama(path: Path | None, tiny: bool, device: str, attention: str) -> Subject:
    """LlamaForCausalLM: one prompt; compared are its logits and the tokens that beam search continues it with."""
    if path:
        model, inputs = _load("LlamaForCausalLM", path, device, attention), _texts(path, SENTENCES[:1], device)
    else:
        from transformers import LlamaConfig

        config = LlamaConfig(**(_TINY_LLAMA if tiny else _LLAMA), tie_word_embeddings=False)
        model = _random(config, "LlamaForCausalLM", device, attention)
        model.generation_config.eos_token_id = None  # every token means as little as this one would
        model.generation_config.pad_token_id = 0
        inputs = _tokens(config.vocab_size, (12,), device)
    inputs.pop("token_type_ids", None)
    return Subject("llama", model, inputs, "logits", generates=True)


def images(count: int = 3) -> list[Any]:
    """Pictures of different sizes: smooth colours, stripes and noise."""
    import numpy
    from PIL import Image

    pictures = []
    for number in range(count):
        height, width = 240 + 50 * number, 320 - 30 * number
        rows, columns = numpy.mgrid[0:height, 0:width]
        noise = numpy.random.default_rng(number).integers(0, 64, (height, width))
        waves = 96 + 60 * numpy.sin(columns / (5 + 9 * number)) + noise
        channels = [rows * 255 / height, columns * 255 / width, waves]
        pictures.append(Image.fromarray(numpy.stack(channels, axis=-1).clip(0, 255).astype(numpy.uint8)))
    return pictures


def _processor(image_size: int, patch_size: int) -> Any:
    """LLaVA-1.5's processor; the image processor that needs no torchvision goes by one of two names."""
    import transformers

    without_torchvision = hasattr(transformers, "CLIPImageProcessorPil")
    of_images = transformers.CLIPImageProcessorPil if without_torchvision else transformers.CLIPImageProcessor
    size = {"height": image_size, "width": image_size}
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return transformers.LlavaProcessor(
        of_images(size={"shortest_edge": image_size}, crop_size=size),
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava(path: Path | None, tiny: bool, device: str, attention: str) -> Subject:
    """LlavaForConditionalGeneration: three pictures and a question; compared are the logits."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    if path:
        model = _load("LlavaForConditionalGeneration", path, device, attention)
        processor = LlavaProcessor.from_pretrained(path, local_files_only=True)
    else:
        vision = CLIPVisionConfig(**(_TINY_VISION if tiny else _VISION))
        text = LlamaConfig(**(_TINY_LLAMA if tiny else {**_LLAMA, "vocab_size": 32064}))
        processor = _processor(vision.image_size, vision.patch_size)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id)
        model = _random(config, "LlavaForConditionalGeneration", device, attention)
    inputs = processor(images=images(), text=QUESTION, return_tensors="pt")
    return Subject("llava", model, {name: value.to(device) for name, value in inputs.items()}, "logits", False)


SUBJECTS: dict[str, Callable[[Path | None, bool, str, str], Subject]] = {"bert": bert, "llama": llama, "llava": llava}


def make(
    name: str, path: Path | None = None, *, tiny: bool = False, device: str = "cpu", attention: str = "sdpa"
) -> Subject:
    """The model of this name in float32 and its inputs, on `device`.

    path: a folder with real weights, else they are random. tiny: of a shape for tests. attention: transformers'
    implementation, "sdpa" or "eager". Raises KeyError for another name, OSError for a folder without the model.
    """
    return SUBJECTS[name](path, tiny, device, attention)
