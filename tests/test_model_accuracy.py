"""examples/model_accuracy.py on small models: ours changes nothing in their results, and what would is found out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_gems

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "examples"), str(ROOT / "tools")]

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import hf_models  # noqa: E402
import model_accuracy  # noqa: E402

needs_overrides = pytest.mark.skipif(
    "use_gems" not in dir(vllm_gems), reason="this version replaces none of PyTorch's operations"
)
# Beam search runs on the CPU in Triton's interpreter: a few tokens after the twelve of the prompt.
MAX_LENGTH = 18


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            made[name] = hf_models.make(name, tiny=True)
        return made[name]

    return make


@contextlib.contextmanager
def replaced(op: str, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """One operation of PyTorch on the CPU replaced by `function`."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl(op, function, "CPU")
        yield
    finally:
        library._destroy()


def complaints(subject: Any, overrides: Callable[[], Any], **options: Any) -> list[str]:
    rows, _ = model_accuracy.compare(subject, overrides, max_length=MAX_LENGTH, **options)
    return [text for row in rows for text in row.complaints()]


@pytest.mark.parametrize("name", ["bert", "llama", "llava"])
def test_without_overrides_nothing_changes_and_that_is_said(name: str, tiny: Callable[[str], Any]) -> None:
    rows, _ = model_accuracy.compare(tiny(name), contextlib.nullcontext, max_length=MAX_LENGTH)
    assert [row.dtype for row in rows] == ["float32", "float16", "bfloat16"]
    for row in rows:
        assert row.stock == row.ours
        assert (row.ours == 0.0) == (row.dtype == "float32")
        assert row.cosine >= 0.99
        assert row.tokens is (True if name == "llama" else None)
        assert row.complaints() == [f"{name}, {row.dtype}: none of our kernels ran"]


@pytest.mark.parametrize(("name", "op"), [("bert", "gelu"), ("llama", "silu"), ("llava", "silu")])
def test_a_wrong_kernel_is_found(name: str, op: str, tiny: Callable[[str], Any]) -> None:
    """An activation that is nearly the right one shows in float32; one that is nothing shows in every dtype."""

    def off(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return 1.02 * x * torch.sigmoid(x if op == "silu" else 1.702 * x)

    def nothing(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.zeros_like(x)

    found = complaints(tiny(name), lambda: replaced(op, off), dtypes=["float32"])
    assert any("differs from float32" in text for text in found)
    found = complaints(tiny(name), lambda: replaced(op, nothing))
    for dtype in model_accuracy.DTYPES:
        assert any(text.startswith(f"{name}, {dtype}: differs from float32") for text in found)
    assert any("other tokens" in text for text in found) == (name == "llama")


def test_a_right_kernel_passes(tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded otherwise than PyTorch's, and counted."""
    calls = 0

    def silu(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        wide = x.double()
        return (wide / (1 + torch.exp(-wide))).to(x.dtype)

    monkeypatch.setattr(model_accuracy, "counted", lambda: (calls, []))
    assert complaints(tiny("llama"), lambda: replaced("silu", silu)) == []
    assert calls > 0


def test_not_a_number_is_wrong(tiny: Callable[[str], Any]) -> None:
    def broken(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.full_like(x, float("nan"))

    found = complaints(tiny("bert"), lambda: replaced("gelu", broken))
    assert sum("differs from float32" in text for text in found) == len(model_accuracy.DTYPES)


def test_a_failed_kernel_is_told() -> None:
    row = model_accuracy.Row("bert", "float16", 1e-3, 1e-3, 1.0, True, None, 5, ("aten.add failed 1 times: no",))
    assert row.complaints() == ["bert, float16: aten.add failed 1 times: no"]


def test_llava_sees_its_pictures(tiny: Callable[[str], Any]) -> None:
    """Every picture has its tokens in the prompt, and moves the logits after it."""
    subject = tiny("llava")
    inputs = subject.inputs
    size = subject.model.config.vision_config
    per_picture = (size.image_size // size.patch_size) ** 2
    assert int((inputs["input_ids"] == subject.model.config.image_token_index).sum()) == 3 * per_picture
    first = model_accuracy.outputs(subject, subject.model)
    for picture in range(3):
        changed = inputs["pixel_values"].clone()
        changed[picture] = changed[picture].flip(-1)
        other = hf_models.Subject("llava", subject.model, {**inputs, "pixel_values": changed}, "logits", False)
        assert (model_accuracy.outputs(other, subject.model)[-1] - first[-1]).abs().max() > 1e-2


@needs_overrides
@pytest.mark.parametrize("name", ["bert", "llama", "llava"])
def test_with_overrides(name: str, tiny: Callable[[str], Any]) -> None:
    """Every override that there is, in every dtype."""
    assert complaints(tiny(name), lambda: vllm_gems.use_gems(include="*")) == []


@needs_overrides
def test_real_bert_with_overrides() -> None:
    import minilm

    subject = hf_models.make("bert", minilm.make())
    assert complaints(subject, vllm_gems.use_gems, dtypes=["float32"]) == []


@needs_overrides
def test_real_llama_with_overrides() -> None:
    """SmolLM2's answer; of its matrix products, Triton's interpreter would make minutes."""
    import smollm2

    subject = hf_models.make("llama", smollm2.make())
    exclude = ["*mm*", "*linear*", "*attention*"]
    rows, _ = model_accuracy.compare(
        subject, lambda: vllm_gems.use_gems(exclude=exclude), ["float32"], subject.inputs["input_ids"].shape[1] + 3
    )
    assert [text for row in rows for text in row.complaints()] == []
