"""What a decode step or a decoder layer may look like to be done as a whole, and what is left to vLLM."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_gems.errors import Refused
from vllm_gems.patches import decode_steps, decoder


@dataclass
class FlashAttentionMetadata:
    """The fields of vLLM 0.26's, as far as they are told apart, and one that a later release might add."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    max_seq_len: int
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    use_cascade: bool
    common_prefix_len: int
    max_dcp_context_kv_len: int | None = None
    scheduler_metadata: torch.Tensor | None = None
    max_num_splits: int = 0
    causal: bool | torch.Tensor = True
    sliding_window: tuple[int, int] | None = None
    mm_prefix_range_tensor: torch.Tensor | None = None
    novelty: object = None


REQUESTS = 3


def metadata(**changes: Any) -> FlashAttentionMetadata:
    """Of a step in which three requests decode."""
    slots = torch.tensor([5, 40, 70])
    plain = FlashAttentionMetadata(
        REQUESTS, 1, torch.arange(REQUESTS + 1, dtype=torch.int32), 9, torch.tensor([6, 9, 7], dtype=torch.int32),
        torch.zeros(REQUESTS, 4, dtype=torch.int32), slots, False, 0, max_dcp_context_kv_len=0,
        scheduler_metadata=torch.zeros(4, dtype=torch.int32), max_num_splits=32, sliding_window=(-1, -1),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def step(meta: Any, slots: Any = None, positions: Any = None) -> decode_steps.Step:
    slots = meta.slot_mapping if slots is None else slots
    positions = torch.tensor([5, 8, 6]) if positions is None else positions
    return decode_steps.make_step(decoder.read, meta, slots, positions)


def test_a_decode_step_is_taken() -> None:
    meta = metadata()
    found = step(meta)
    assert (found.num_tokens, found.max_seq_len, found.block_table_stride) == (REQUESTS, 9, 4)
    assert found.seq_lens_at == meta.seq_lens.data_ptr()
    assert found.slot_mapping_at == meta.slot_mapping.data_ptr()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_cascade": True}, "cascade"),
        ({"sliding_window": (511, 0)}, "sliding window"),
        ({"causal": False}, "metadata with causal"),
        ({"causal": torch.ones(REQUESTS)}, "metadata with causal"),
        ({"mm_prefix_range_tensor": torch.zeros(1)}, "metadata with mm_prefix_range_tensor"),
        ({"novelty": object()}, "metadata with novelty"),
        ({"num_actual_tokens": 0}, "no requests, or more than 512"),
        ({"num_actual_tokens": 10_000}, "no requests, or more than 512"),
        ({"num_actual_tokens": 2}, "padded"),
        ({"seq_lens": torch.zeros(4, dtype=torch.int32)}, "padded"),
        ({"seq_lens": torch.zeros(REQUESTS)}, "seq_lens torch.float32"),
        ({"block_table": torch.zeros(REQUESTS, 4, dtype=torch.int64)}, "block_table torch.int64"),
        ({"block_table": torch.zeros(4, REQUESTS, dtype=torch.int32).T}, "block_table"),
    ],
)
def test_other_steps_are_left_to_vllm(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        step(metadata(**changes))


def test_other_metadata_positions_and_slots_are_left_to_vllm() -> None:
    meta = metadata()
    with pytest.raises(Refused, match="measures its memory"):
        decode_steps.make_step(decoder.read, None, None, None)
    with pytest.raises(Refused, match="attention metadata of SimpleNamespace"):
        step(SimpleNamespace(**vars(meta)))
    with pytest.raises(Refused, match="no slots"):
        decode_steps.make_step(decoder.read, meta, None, torch.arange(REQUESTS))
    for positions in (torch.zeros(3, REQUESTS, dtype=torch.int64), torch.arange(REQUESTS, dtype=torch.int32)):
        with pytest.raises(Refused, match="positions"):
            step(meta, positions=positions)
    with pytest.raises(Refused, match="padded"):
        step(meta, slots=torch.zeros(REQUESTS + 1, dtype=torch.int64))
    with pytest.raises(Refused, match="slot_mapping"):
        step(meta, slots=torch.zeros(REQUESTS, dtype=torch.int32))


def test_a_layer_of_other_parts_is_left_to_vllm() -> None:
    layer = torch.nn.Module()
    assert "not the parts of a decoder layer" in str(decoder.layer_refuses(layer))
    layer.self_attn, layer.mlp = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert "Linear.forward is none of those" in str(decoder.layer_refuses(layer))


def test_hooks_are_seen_when_they_come_and_when_they_go() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    hooks = decode_steps.Hooks(layer)
    assert hooks.refuses() is None
    layer.register_forward_hook(lambda *_: None)  # called by the layer's own __call__
    assert hooks.refuses() is None
    handle = layer[1].register_forward_pre_hook(lambda *_: None)
    assert hooks.refuses() == hooks.refuses() == "a hook on ReLU"
    handle.remove()
    assert hooks.refuses() is None
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert hooks.refuses() == "a hook on all modules"
    everywhere.remove()
    assert hooks.refuses() is None
