"""Products by cuBLASLt, on a stand-in that is as strict: what it is asked for, by whom, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standin import STREAM
from test_kernels import DEVICE
from tolerances import absolute, assert_close

from vllm_gems import cublaslt
from vllm_gems.errors import Refused
from vllm_gems.launch import CPU
from vllm_gems.patches import decode_steps, decoder


@pytest.fixture(autouse=True)
def _fresh(cublaslt_caches: None) -> None: ...


def operands(rows: int, in_features: int, out_features: int, bias: bool) -> dict[str, Any]:
    return {
        "x": torch.randn(rows, in_features),
        "weight": torch.randn(out_features, in_features),
        "bias": torch.randn(out_features) if bias else None,
    }


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor | None = None
) -> torch.Tensor:
    rows, (out_features, in_features) = x.shape[0], weight.shape
    product = cublaslt.bind_product(in_features, out_features, bias is not None, torch.float32, CPU)
    out, workspace = torch.full((rows, out_features), torch.nan), torch.empty(cublaslt.WORKSPACE, dtype=torch.uint8)
    bias_at = 0 if bias is None else bias.data_ptr()
    addend_at = 0 if addend is None else addend.data_ptr()
    product(x.data_ptr(), weight.data_ptr(), bias_at, out.data_ptr(), rows, workspace.data_ptr(), addend_at)
    return out


def close(got: torch.Tensor, inputs: dict[str, Any]) -> None:
    want = torch.nn.functional.linear(*(None if value is None else value.double() for value in inputs.values()))
    assert_close(got, want, "product", absolute("linear", inputs, torch.float32))


@pytest.mark.parametrize("bias", [False, True])
def test_products(library: Any, bias: bool) -> None:
    torch.manual_seed(0)
    for rows in (1, 65, 3, 65):
        inputs = operands(rows, 40, 24, bias)
        close(multiply(**inputs), inputs)
    assert library.standin_searched() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_added_to_a_product_stays_as_it_is(library: Any, bias: bool) -> None:
    inputs, addend = operands(5, 40, 24, bias), torch.randn(5, 24)
    before = addend.clone()
    close(multiply(**inputs, addend=addend) - addend, inputs)
    assert torch.equal(addend, before)
    with pytest.raises(Refused, match="multiples of 16"):
        multiply(**inputs, addend=torch.randn(121)[1:])


def test_an_algorithm_is_looked_for_once_for_a_number_of_rows(library: Any) -> None:
    before = library.standin_searched()
    for rows in (5, 6, 5, 6, 5):
        multiply(**operands(rows, 8, 12, True))  # with another bias each time
    assert library.standin_searched() == before + 2


def test_threads_have_their_own_biases(library: Any) -> None:
    def work(seed: int) -> None:
        inputs = operands(4, 16, 20, True)
        for _ in range(50):
            close(multiply(**inputs), inputs)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_what_is_not_aligned_is_refused(library: Any, name: str) -> None:
    inputs = operands(2, 8, 8, True)
    inputs[name] = torch.randn(inputs[name].numel() + 1)[1:].view(inputs[name].shape)
    with pytest.raises(Refused, match="multiples of 16"):
        multiply(**inputs)


def test_another_device_is_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    product = cublaslt.bind_product(8, 8, False, torch.float32, CPU)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3)
    with pytest.raises(Refused, match="current device"):
        cublaslt.bind_product(8, 9, False, torch.float32, CPU)
    assert product is cublaslt.bind_product(8, 8, False, torch.float32, CPU)


def test_a_status_is_no_result(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + 1)
    with pytest.raises(RuntimeError, match="status 7"):
        multiply(**operands(2, 8, 8, False))
    with pytest.raises(Refused, match="status 7"):  # of another dtype than the stand-in's
        cublaslt.bind_product(8, 8, False, torch.float16, CPU)(16, 16, 0, 16, 1, 16)


def test_without_the_library_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    for _ in range(2):
        with pytest.raises(Refused, match="no cuBLASLt: this PyTorch was not built for CUDA"):
            cublaslt.bind_product(8, 8, False, torch.float32, CPU)
    cublaslt._library.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "0.1")
    with pytest.raises(Refused, match=r"no cuBLASLt: .*libcublasLt.so.0"):
        cublaslt.bind_product(8, 8, False, torch.float32, CPU)


# In a decoder layer

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INTERMEDIATE, BLOCK, BLOCKS = 32, 4, 2, 16, 48, 16, 6


class Impl:
    """Of attention; its cache write is what tells the layout."""

    scale = 0.25

    def do_kv_cache_update(self) -> None: ...

    def forward(self, layer: Any, query: Any, key: None, value: None, kv_cache: Any, *_: Any, output: Any) -> None:
        """In place of attention, of batches that do not only decode: any function of what it is given."""
        output.copy_(query + kv_cache.sum())


def module(**members: Any) -> torch.nn.Module:
    made = torch.nn.Module()
    for name, value in members.items():
        setattr(made, name, value)
    return made


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, device=DEVICE) * shape[-1] ** -0.5, requires_grad=False)


def linear(in_features: int, out_features: int, bias: bool = False) -> torch.nn.Module:
    return module(weight=parameter(out_features, in_features), bias=parameter(out_features) if bias else None)


def layer() -> torch.nn.Module:
    """What is read of a decoder layer."""
    angles = torch.rand(64, HEAD_SIZE // 2, device=DEVICE)
    rotary = module(rotary_dim=HEAD_SIZE, is_neox_style=True, use_flashinfer=False)
    rotary.register_buffer("cos_sin_cache", torch.cat((angles.cos(), angles.sin()), dim=-1))
    rotary._match_cos_sin_cache_dtype = lambda query: rotary.cos_sin_cache  # type: ignore[assignment]
    attn = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, impl=Impl())
    qkv = linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_SIZE, bias=True)
    attention = module(attn=attn, rotary_emb=rotary, qkv_proj=qkv, o_proj=linear(HEADS * HEAD_SIZE, HIDDEN))
    mlp = module(gate_up_proj=linear(HIDDEN, 2 * INTERMEDIATE), down_proj=linear(INTERMEDIATE, HIDDEN))
    norms = [module(weight=parameter(HIDDEN), variance_epsilon=1e-6) for _ in range(2)]
    return module(self_attn=attention, mlp=mlp, input_layernorm=norms[0], post_attention_layernorm=norms[1])


@pytest.mark.skipif(str(DEVICE) != "cpu", reason="the stand-in is for host memory")
@pytest.mark.parametrize("only_decodes", [True, False])
def test_a_layer_of_more_rows_than_few_is_the_same(
    library: Any, monkeypatch: pytest.MonkeyPatch, only_decodes: bool
) -> None:
    monkeypatch.setattr(decoder, "layer_refuses", lambda layer: None)
    monkeypatch.setattr(decoder, "source_hash", lambda function: "here")
    monkeypatch.setitem(decoder.KV_CACHE_LAYOUTS, "here", lambda cache, head_size: tuple(cache.unbind(0)))
    torch.manual_seed(0)
    block = layer()
    rows = 3
    kv_cache = torch.randn(2, BLOCKS, BLOCK, KV_HEADS, HEAD_SIZE)
    seq_lens = torch.tensor([9, 20, 1], dtype=torch.int32)
    block_table = torch.tensor([[1, 0], [2, 3], [5, 0]], dtype=torch.int32)
    positions = seq_lens.long() - 1
    slots = block_table.gather(1, (positions // BLOCK)[:, None]).long()[:, 0] * BLOCK + positions % BLOCK
    hidden_states, residual = torch.randn(rows, HIDDEN), torch.randn(rows, HIDDEN)
    results = []
    paged, mixed = decode_steps.Paged(rows, 20, block_table, seq_lens), decode_steps.Mixed(rows)
    for few in (rows, rows - 1):
        monkeypatch.setattr(decode_steps, "FEW_ROWS", few)
        step = decode_steps.make_step(lambda metadata: paged if only_decodes else mixed, object(), slots, positions)
        (call, _), cache = decoder._bind(block, hidden_states), kv_cache.clone()
        before = hidden_states.clone(), residual.clone()
        # Of many rows the sum of a layer's two results alone is the same.
        results.append((*(sum(call(step, cache, hidden_states, each)) for each in (residual, None)), cache))
        assert torch.equal(hidden_states, before[0])
        assert torch.equal(residual, before[1])
    assert library.standin_searched() > 0
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
