"""BERT, LLaMA-2-7B and LLaVA-1.5-7B in their public shapes, with every operation overridden that can be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vllm_gems

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "tools")]

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import hf_models  # noqa: E402
import model_accuracy  # noqa: E402

# Of free memory: the weights in float32 and in a half, and what is computed. BERT is judged in float64, too.
GIB = {"bert": 4, "llama": 46, "llava": 48}
REFERENCE = {"bert": "float64", "llama": "float32", "llava": "float32"}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with hf_models.exact_float32():
        yield


@pytest.mark.parametrize("name", ["bert", "llama", "llava"])
def test_public_shapes(name: str) -> None:
    """Results as the example demands, and of LLaMA the same tokens: a hundred, with five beams."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < GIB[name]:
        pytest.skip(f"{name} takes {GIB[name]} GiB of GPU memory, and {free:.0f} are free")
    subject = hf_models.make(name, device="cuda")
    everything = lambda: vllm_gems.use_gems(include="*")  # noqa: E731
    rows, _ = model_accuracy.compare(subject, everything, max_length=100, beams=5, reference=REFERENCE[name])
    print(model_accuracy.told(rows))
    assert [text for row in rows for text in row.complaints()] == []
    assert [row.dtype for row in rows] == list(model_accuracy.DTYPES)
    for row in rows:
        assert {"aten.add.Tensor", "aten.mul.Tensor"} <= row.hits.keys() or name == "bert", sorted(row.hits)
        assert ("aten.gelu" if name == "bert" else "aten.silu") in row.hits
    assert rows[0].tokens is (True if name == "llama" else None)
