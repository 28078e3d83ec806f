"""vLLM's own layers and ops on a GPU: patched against stock, failing, declining, and as they were afterwards."""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import gpu_cases
import pytest
import torch
from gpu_cases import KERNELS, bench_cases, relocated, small_case
from test_kernels import results_of

import vllm_gems
from vllm_gems import faster, tuned
from vllm_gems.bench.run import bench
from vllm_gems.nouns import Kernel, Row, State

TOKENS = 33


@pytest.fixture(autouse=True)
def _vllm(_gpu: None) -> Iterator[None]:
    """The configuration that vLLM has under `enforce_eager`: every layer runs its kernel, and so do vLLM IR's ops."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform

    importlib.import_module("vllm._custom_ops")  # as every engine does; patches of ops wait for it
    if not current_platform.is_cuda():
        pytest.skip("this vLLM is not the CUDA build")
    config = VllmConfig(compilation_config=CompilationConfig(mode=0, custom_ops=["all"]))
    with set_current_vllm_config(config), config.kernel_config.ir_op_priority.set_priority():
        torch.manual_seed(0)
        # What was measured on this GPU is no part of most tests.
        with faster.undecided():
            yield


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def _norm(cls: str, hidden: int, residual: bool) -> tuple[Any, tuple[Any, ...]]:
    from vllm.model_executor.layers import layernorm

    layer = getattr(layernorm, cls)(hidden).to("cuda", torch.bfloat16)
    layer.weight.data.normal_(1.0, 0.2)
    return layer, (_x(TOKENS, hidden), _x(TOKENS, hidden) if residual else None)


def _activation(cls: str, *args: Any, width: int = 2 * 1536, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    from vllm.model_executor.layers import activation

    return getattr(activation, cls)(*args, **options), (_x(TOKENS, width),)


def _rotary(
    head_size: int, neox: bool, sections: int = 0, by_head: bool = False, **parameters: Any
) -> tuple[Any, tuple[Any, ...]]:
    """q and k as slices of one projection, as models have them; by head as DeepSeek's, which turns a part of each."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    given = {"rope_type": "default", "rope_theta": 10000.0, **parameters}
    layer = get_rope(head_size, 4096, neox, given, torch.bfloat16).to("cuda")
    qkv = _x(TOKENS, 12 * head_size)
    positions = torch.randint(4096, (sections, TOKENS) if sections else (TOKENS,), device="cuda")
    if by_head:
        heads = qkv.view(TOKENS, 4, 3 * head_size)[..., head_size : 2 * head_size]
        return layer, (positions, heads[:, :3], heads[:, 3:])
    return layer, (positions, qkv[:, : 8 * head_size], qkv[:, 8 * head_size : 10 * head_size])


_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip

# patch and variant -> (layer, arguments)
LAYERS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "layernorm.rms_norm/alone": lambda: _norm("RMSNorm", 3584, False),
    "layernorm.rms_norm/residual": lambda: _norm("RMSNorm", 3584, True),
    "layernorm.gemma_rms_norm/alone": lambda: _norm("GemmaRMSNorm", 2048, False),
    "layernorm.gemma_rms_norm/residual": lambda: _norm("GemmaRMSNorm", 2048, True),
    "rotary.rotary_embedding/neox": lambda: _rotary(128, True),
    "rotary.rotary_embedding/gpt-j": lambda: _rotary(64, False),
    "rotary.rotary_embedding/partial": lambda: _rotary(96, True, partial_rotary_factor=0.5),
    "rotary.rotary_embedding/llama3": lambda: _rotary(128, True, **_LLAMA3),
    "rotary.deepseek_scaling/yarn": lambda: _rotary(
        64, False, by_head=True, rope_type="deepseek_yarn", factor=4.0, original_max_position_embeddings=1024,
        beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
    ),
    "rotary.mrope/text": lambda: _rotary(128, True, mrope_section=[16, 24, 24]),
    "rotary.mrope/sections": lambda: _rotary(128, True, sections=3, mrope_section=[16, 24, 24]),
    "rotary.mrope/interleaved": lambda: _rotary(
        128, True, sections=3, mrope_section=[24, 20, 20], mrope_interleaved=True
    ),
    "activation.silu_and_mul/": lambda: _activation("SiluAndMul", compile_native=False),
    "activation.mul_and_silu/": lambda: _activation("MulAndSilu"),
    "activation.gelu_and_mul/none": lambda: _activation("GeluAndMul", approximate="none"),
    "activation.gelu_and_mul/tanh": lambda: _activation("GeluAndMul", approximate="tanh"),
    "activation.gelu_new/": lambda: _activation("NewGELU"),
    "activation.gelu_fast/": lambda: _activation("FastGELU"),
    "activation.gelu_quick/": lambda: _activation("QuickGELU"),
    "activation.fatrelu_and_mul/": lambda: _activation("FatreluAndMul", 0.3),
    "activation.swigluoai_and_mul/": lambda: _activation("SwigluOAIAndMul"),
    "activation.silu_and_mul_with_clamp/": lambda: _activation("SiluAndMulWithClamp", 1.5, compile_native=False),
}  # fmt: skip


def call(layer: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The layer's results on copies of `args`, which it may write."""
    mine = [relocated(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with torch.inference_mode():
        returned = layer(*mine)
    return [returned] if isinstance(returned, torch.Tensor) else [each for each in returned if each is not None]


def row_of(patch: str) -> Row:
    return next(row for row in vllm_gems.report().rows if row.patch == patch)


def assert_near(ours: list[torch.Tensor], stock: list[torch.Tensor]) -> None:
    """Both are within some roundings to bfloat16 (2**-9 each, relative) of the truth, on either side of it."""
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = a.double(), b.double()
        assert float((a - b).norm() / b.norm()) < 1e-2
        assert torch.allclose(a, b, rtol=2.5e-2, atol=1e-2 * float(b.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_patched_against_stock(name: str) -> None:
    """The layer was there before the patch, and is the same object with the same results after it."""
    patch = name.partition("/")[0]
    layer, args = LAYERS[name]()
    stock = call(layer, args)
    with vllm_gems.gems_patches(include=[patch], strict=True):
        ours = call(layer, args)
        again = call(layer, args)
        assert row_of(patch).hits == 2
    assert_near(ours, stock)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(call(layer, args), stock, strict=True))


WITH_STOCK = [kernel for kernel in KERNELS if kernel.stock]


@pytest.mark.parametrize("kernel", WITH_STOCK, ids=lambda kernel: kernel.name)
def test_op_patched_against_stock(kernel: Kernel) -> None:
    namespace, _, name = kernel.stock.partition("::")
    op = getattr(getattr(torch.ops, namespace), name)

    def results(inputs: dict[str, Any]) -> list[torch.Tensor]:
        mine = gpu_cases.copies(inputs)
        assert kernel.stock_call is not None
        return [each for each in results_of(kernel, mine, kernel.stock_call(op, **mine)) if each is not None]

    for case in (small_case(kernel), *bench_cases(kernel, most_tokens=32)):
        inputs = kernel.inputs(case, "bfloat16", "cuda")
        stock = results(inputs)
        with vllm_gems.gems_patches(include=[f"op.{name}"], strict=True):
            ours = results(inputs)
            assert row_of(f"op.{name}").hits == 1
        assert_near(ours, stock)
        assert all(torch.equal(a, b) for a, b in zip(results(inputs), stock, strict=True))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, forget: Callable[[], None]) -> None:
    """No activation can be launched any more."""
    from vllm_gems.kernels import activation

    def launcher(*args: Any) -> None:
        raise RuntimeError("out of registers")

    forget()
    monkeypatch.setattr(activation, "launcher", launcher)


@pytest.mark.usefixtures("broken")
def test_a_kernel_that_raises_is_replaced_by_the_original() -> None:
    layer, args = LAYERS["activation.silu_and_mul/"]()
    stock = call(layer, args)
    with vllm_gems.gems_patches(include=["activation.silu_and_mul", "op.silu_and_mul"], strict=False):
        for _ in range(3):
            assert torch.equal(call(layer, args)[0], stock[0])
        for patch in ("activation.silu_and_mul", "op.silu_and_mul"):
            row = row_of(patch)
            assert (row.state, row.hits, row.errors) == (State.FAILED, 0, 1)
            assert "out of registers" in row.why
    assert torch.equal(call(layer, args)[0], stock[0])


def test_a_layer_whose_kernel_is_not_compiled_is_captured_with_the_original(forget: Callable[[], None]) -> None:
    layer, args = LAYERS["activation.silu_and_mul/"]()
    stock = call(layer, args)
    with vllm_gems.gems_patches(include=["activation.silu_and_mul"], strict=True):
        forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(*args)
        graph.replay()
        assert torch.equal(captured, stock[0])
        row = row_of("activation.silu_and_mul")
        assert row.hits == 0
        assert any("being captured" in reason for reason in row.declined)
        ours = call(layer, args)  # compiled now
        assert row_of("activation.silu_and_mul").hits == 1
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(*args)
        assert row_of("activation.silu_and_mul").hits == 2
    assert_near(ours, stock)


def test_removal_restores_the_identical_objects() -> None:
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    layers = [LAYERS["activation.silu_and_mul/"](), LAYERS["layernorm.rms_norm/residual"]()]
    stock = [call(*each) for each in layers]
    before = [vars(cls)["forward_cuda"] for cls in (SiluAndMul, RMSNorm)]
    vllm_gems.apply_gems_patches_to_vllm()
    try:
        patched = [vars(cls)["forward_cuda"] for cls in (SiluAndMul, RMSNorm)]
        for each in layers:
            call(*each)
        assert row_of("activation.silu_and_mul").hits == 1
        assert row_of("layernorm.rms_norm").hits == 1
    finally:
        vllm_gems.remove_gems_patches_from_vllm()
    assert all(new is not old for new, old in zip(patched, before, strict=True))
    assert all(vars(cls)["forward_cuda"] is old for cls, old in zip((SiluAndMul, RMSNorm), before, strict=True))
    assert all(layer._forward_method.__func__ is old for (layer, _), old in zip(layers, before, strict=True))
    for each, want in zip(layers, stock, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(call(*each), want, strict=True))


def test_patches_are_measured_against_vllm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model; what the times are is no matter."""
    monkeypatch.setenv("VLLM_GEMS_TUNED", str(tmp_path))
    tiny = {
        "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 128, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    found = bench([str(tmp_path)], max_tokens=2)
    assert [table for table in found["tables"] if "failed" in table] == []
    assert {table["patch"] for table in found["tables"]} >= {"layernorm.rms_norm", "op.silu_and_mul", "sampler.top_p"}
    for table in found["tables"]:
        assert list(table["times"]) == ["1", "2"]
        assert all(min(times) > 0 for times in table["times"].values())


def test_what_was_measured_in_a_graph_decides_in_a_graph(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GEMS_TUNED", str(tmp_path))
    monkeypatch.setattr(tuned, "_TABLES", {})
    monkeypatch.setattr(faster, "_asked", None)
    layer, args = LAYERS["activation.silu_and_mul/"]()
    tuned.write("activation.silu_and_mul", torch.cuda.get_device_name(), {
        "key": faster.key_of("bfloat16", "silu_and_mul", args[0].shape[-1]),
        "configuration": {"64": [1.0, 3.0, 9.0, 1.0]},  # faster with the host's time, slower without
        "versions": tuned.versions(),
        "source": faster.source("vllm_gems.kernels.activation"),
    })  # fmt: skip
    stock = call(layer, args)
    with vllm_gems.gems_patches(include=["activation.silu_and_mul"], strict=True):
        ours = call(layer, args)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            captured = layer(*args)
        graph.replay()
        assert torch.equal(captured, stock[0])
        row = row_of("activation.silu_and_mul")
        assert (row.hits, row.declined) == (1, {"measured slower: 3.00 of vLLM's at 64 tokens, graph": 1})
        call(layer, args)
        assert row_of("activation.silu_and_mul").hits == 2
    assert_near(ours, stock)


def test_what_is_left_to_vllm_of_top_p_is_compiled_in_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which samples with a top-k and a top-p, at as many rows as there may be."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("vllm.v1.sample.ops.topk_topp_triton", reason="this vLLM sorts")
    module = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    monkeypatch.setattr(faster, "_asked", None)
    rows, vocab_size = 64, 2080  # which nobody has measured
    logits, k = torch.randn(rows, vocab_size, device="cuda"), torch.full((rows,), 50, device="cuda")
    p = torch.full((rows,), 0.9, device="cuda")
    with vllm_gems.gems_patches(include=["sampler.top_p"], strict=True):
        module.apply_top_k_top_p(logits.clone(), k, p)
        compiled: list[str] = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda *, repr, **_: compiled.append(repr)
        )  # fmt: skip
        for some in (8, 33, 48, 64):
            module.apply_top_k_top_p(logits[:some].clone(), None, p[:some])
        row = row_of("sampler.top_p")
    assert compiled == []
    assert (row.hits, sum(row.declined.values())) == (1, 4)
