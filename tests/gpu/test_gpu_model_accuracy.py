"""BERT, LLaMA and LLaVA in their public shapes on a GPU, with PyTorch's operations replaced by the default set."""

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

# A model in float32, its copy in half precision while that is made, and what PyTorch keeps beside them.
NEEDED_BYTES = {"bert": 4 << 30, "llama": 70 << 30, "llava": 70 << 30}


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference is computed in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.cuda.empty_cache()


@pytest.mark.skipif("use_gems" not in dir(vllm_gems), reason="this version replaces none of PyTorch's operations")
@pytest.mark.parametrize("name", list(NEEDED_BYTES))
def test_public_shapes(name: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED_BYTES[name]:
        pytest.skip(f"needs {NEEDED_BYTES[name] >> 30} GiB of free GPU memory, {free >> 30} are")
    rows, table = model_accuracy.compare(hf_models.make(name, device="cuda"), vllm_gems.use_gems)
    print(table, model_accuracy.told(rows), sep="\n")
    assert [text for row in rows for text in row.complaints()] == []
