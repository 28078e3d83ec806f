"""What can be tuned: a model's jobs, candidates that are right and a wrong one that is seen, and that results are used.

On tiny models in Triton's interpreter; times are a GPU's alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rules import ROOT
from test_tuning import DEEPSEEK, LLAMA, QWEN2, scope

from tools import ship_tuned
from vllm_gems import cli, tuned
from vllm_gems.kernels import block_fp8_experts, block_fp8_linear, head_linear, indexing, matmul, moe_experts
from vllm_gems.kernels.block_fp8_linear import quantise_reference
from vllm_gems.kernels.head_linear import HeadShape
from vllm_gems.kernels.linear import Shape
from vllm_gems.kernels.moe_experts import Experts
from vllm_gems.tuning import OPS
from vllm_gems.tuning.block_fp8_experts import BLOCK_FP8_EXPERTS
from vllm_gems.tuning.block_fp8_linear import BLOCK_FP8_LINEAR
from vllm_gems.tuning.head_linear import HEAD_LINEAR
from vllm_gems.tuning.indexing import INDEX
from vllm_gems.tuning.linear import LINEAR
from vllm_gems.tuning.matmul import MATMUL, Product
from vllm_gems.tuning.models import PRESETS, PerHead, absorbed, all_linears, linears, mixture, vocabulary
from vllm_gems.tuning.moe_experts import MOE_EXPERTS
from vllm_gems.tuning.search import Job, Outcome, Tunable, chosen, keep, trial, tunables
from vllm_gems.tuning.trials import copies, worst, worst_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = "NVIDIA Made Up"  # for which nothing is shipped
QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "mlp_only_layers": [], "decoder_sparse_step": 1,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "attention_bias": True, "vocab_size": 100, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
TINY_MLA = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "kv_lora_rank": 32, "q_lora_rank": None,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
TINY_FP8 = {
    "hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0], **FP8,
}  # fmt: skip
TINIES = (TINY, TINY_MLA, TINY_FP8)


def test_every_op_is_known_and_can_be_chosen() -> None:
    assert tuple(op for tunable in tunables() for op in tunable.ops) == OPS
    assert len({tunable.kernel for tunable in tunables()}) == len(tunables())
    assert [(each.kernel, each.ops) for each in chosen("mm_logits, linear,mm")] == [
        ("linear", ("linear",)), ("matmul", ("mm", "mm_logits")),
    ]  # fmt: skip
    for tunable in tunables():
        for config in TINIES:
            assert {job.op for job in tunable.jobs(scope(config))} <= set(tunable.ops)


def test_every_kernel_is_tuned_or_the_design_says_what_decides() -> None:
    section = (ROOT / "docs" / "design.md").read_text().split("## Configurations\n")[1].split("\n## ")[0]
    sentence, table = section.split("| --- |")
    for tunable in tunables():
        assert f"`{tunable.kernel}`" in sentence
    files = [path for path in (ROOT / "vllm_gems" / "kernels").glob("*.py") if "num_warps=" in path.read_text()]
    assert len(files) > 15
    for path in files:
        is_tuned = path.stem in {tunable.kernel for tunable in tunables()}
        assert (f"`{path.stem}`" in table.replace("`matmul`'s", "")) != is_tuned, path.stem


def test_mixtures_heads_and_vocabularies_of_models() -> None:
    assert mixture(QWEN2, 1) is None
    assert mixture(QWEN3_MOE, 2) == Experts(128, 8, 2048, 384)
    assert [mixture(config, 1) for config in PRESETS["deepseek"]] == [
        moe_experts.MIXTURES["deepseek-v2-lite"], moe_experts.MIXTURES["deepseek-v3"],
    ]  # fmt: skip
    assert mixture(PRESETS["qwen"][2], 1) == moe_experts.MIXTURES["qwen3-30b-a3b"]
    assert mixture(TINY, 1) == Experts(4, 2, 64, 96)
    # A mixture has a gate, and dense layers only if it says so.
    assert set(linears(QWEN3_MOE, 1)) == {Shape(2048, 5120), Shape(4096, 2048), Shape(2048, 128)}
    assert Shape(2048, 6144, gated=True) in linears({**QWEN3_MOE, "mlp_only_layers": [0]}, 1)
    assert Shape(2048, 1024, gated=True) in linears({**QWEN3_MOE, "shared_expert_intermediate_size": 1024}, 1)
    # A prefill takes keys and values out of the latent, a decode step multiplies every head by what it is made with.
    assert set(all_linears(DEEPSEEK, 2)) - set(linears(DEEPSEEK, 2)) == {Shape(512, 8 * 256)}
    assert absorbed(DEEPSEEK, 2) == [PerHead(8, 128, 512, False), PerHead(8, 512, 128, True)]
    assert absorbed(LLAMA, 1) == []
    assert vocabulary(LLAMA, 2) == Shape(4096, 64128)
    assert vocabulary(TINY, 1) == Shape(64, 128), "vLLM pads to 64 rows"
    assert vocabulary(DEEPSEEK, 1) is None
    with pytest.raises(ValueError, match="--tp 7 does not divide vocab_size"):
        vocabulary(LLAMA, 7)


def test_products_of_a_model_by_rows() -> None:
    keys: dict[str, list[str]] = {}
    for job in MATMUL.jobs(scope(QWEN2, max_tokens=300, max_reqs=20)):
        keys.setdefault(job.op, []).append(job.key)
        matrices = job.about.matrices(job.about.rows)
        assert matmul.key_of(matrices) == job.key
    rows = (16, 32, 64, 128, 256, 512)
    assert keys == {
        "addmm": [f"bfloat16 3584x4608 nt {each}" for each in rows],
        "mm": [f"bfloat16 {sizes} nt {each}" for sizes in ("3584x3584", "3584x37888", "18944x3584") for each in rows],
        "mm_logits": ["bfloat16 3584x152064 nt 16", "bfloat16 3584x152064 nt 32"],
    }
    of_heads = [job.key for job in MATMUL.jobs(scope(DEEPSEEK, max_tokens=16, dtype="float16")) if job.op == "bmm"]
    assert of_heads == ["float16 16*128x512 nn 16", "float16 16*512x128 nt 16"]
    # V2-Lite's dense layer over 16 ranks has 684 columns, and no row of that many is read 16 bytes at a time.
    found = {job.key for job in MATMUL.jobs(scope(DEEPSEEK, tp=16, max_tokens=16))}
    assert "bfloat16 2048x1368 nt 16" in found
    assert not any("684x" in key for key in found)


def test_what_vllm_multiplies_has_the_keys_of_jobs() -> None:
    """As PyTorch sees a linear layer: the weight's transpose."""
    from vllm_gems.aten.products import matrices

    x, weight, bias = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in ((21, 64), (96, 64), (96,)))
    assert matmul.key_of(matrices(x, weight.t(), x @ weight.t())) == "bfloat16 64x96 nt 32"
    assert matmul.key_of(matrices(x, weight.t(), x @ weight.t(), bias)) == "bfloat16 64x96 nt 32"
    assert matmul.key_of(Product(32, 96, 64, True, "bfloat16", bias=True).matrices(21)) == "bfloat16 64x96 nt 32"
    heads = torch.empty((21, 4, 64), device="meta", dtype=torch.float16).transpose(0, 1)
    weights = torch.empty((4, 64, 96), device="meta", dtype=torch.float16)
    assert matmul.key_of(matrices(heads, weights, torch.bmm(heads, weights))) == "float16 4*64x96 nn 32"


def test_jobs_of_mixtures_and_of_rows_that_are_picked() -> None:
    keys = [job.key for job in MOE_EXPERTS.jobs(scope(QWEN3_MOE, max_reqs=3))]
    assert keys == [
        f"bfloat16 8 of 128 {sizes} {tokens}" for tokens in (1, 2, 4) for sizes in ("2048x768 gated", "768x2048")
    ]
    most = max(job.about.num_tokens for job in MOE_EXPERTS.jobs(scope(QWEN3_MOE)))
    assert most == moe_experts.MAX_TOKENS
    assert not list(MOE_EXPERTS.jobs(scope(LLAMA)))
    assert [job.key for job in INDEX.jobs(scope(LLAMA, max_tokens=3))] == ["rows 1024", "rows 2048", "rows 4096"]
    assert not list(INDEX.jobs(scope({**LLAMA, "hidden_size": 4097})))


def test_jobs_of_float8_are_of_models_in_float8() -> None:
    v2_lite, v3 = PRESETS["deepseek"]
    for config in (LLAMA, QWEN3_MOE, v2_lite, {**QWEN3_MOE, "quantization_config": None}):
        assert not [*BLOCK_FP8_LINEAR.jobs(scope(config)), *BLOCK_FP8_EXPERTS.jobs(scope(config))]
    other_blocks = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 128]}}
    assert not list(BLOCK_FP8_LINEAR.jobs(scope({**LLAMA, **other_blocks})))
    # All layers but the gate, which stays in 16 bits.
    found = {job.about.shape for job in BLOCK_FP8_LINEAR.jobs(scope(v3))}
    assert found == set(linears(v3, 1)) - {Shape(7168, 256)}
    assert found == set(block_fp8_linear.PROJECTIONS["deepseek-v3"].values())
    for config in ({**QWEN3_MOE, **FP8}, {"text_config": QWEN3_MOE, **FP8}, {"text_config": {**QWEN3_MOE, **FP8}}):
        keys = [job.key for job in BLOCK_FP8_LINEAR.jobs(scope(config, max_reqs=16))]
        assert keys == ["2048x5120 16", "4096x2048 16"]
        keys = [job.key for job in BLOCK_FP8_EXPERTS.jobs(scope(config, max_reqs=3))]
        sizes = "2048x768 gated", "768x2048"
        assert keys == [f"8 of 128 {each} {tokens}" for tokens in (1, 2, 4) for each in sizes]
    # On four ranks the down projection of its experts would have one block and a half.
    assert not list(BLOCK_FP8_EXPERTS.jobs(scope({**QWEN3_MOE, **FP8}, tp=4)))


@pytest.mark.parametrize("tunable", tunables(), ids=lambda tunable: tunable.kernel)
def test_candidates_begin_with_the_default_and_fit(tunable: Tunable) -> None:
    for config in (QWEN2, *PRESETS["deepseek"], QWEN3_MOE):
        for job in tunable.jobs(scope(config)):
            found = tunable.candidates(job)
            assert 0 < len(set(found)) == len(found) <= 110, job
            assert len({type(each) for each in found}) == 1
    assert pickle.loads(pickle.dumps((tunable, job, found))) == (tunable, job, found), "for the processes that try them"
    for job in MATMUL.jobs(scope(QWEN2)):
        default, *others = MATMUL.candidates(job)
        assert default == matmul.default_tiling(1, job.about.rows, job.about.cols, job.about.inner, 2)
        for tiling in others:
            assert 2 * tiling.depth * (tiling.rows + tiling.cols) * tiling.num_stages <= 227 * 1024
            assert tiling.rows * tiling.cols <= 128 * 32 * tiling.num_warps
    for job in HEAD_LINEAR.jobs(scope(DEEPSEEK)):
        for tiling in HEAD_LINEAR.candidates(job):
            assert 2 * tiling.depth * (tiling.rows + tiling.cols) * tiling.num_stages <= 227 * 1024
            assert tiling.rows * tiling.cols <= 32 * 32 * tiling.num_warps
    for tunable in FLOAT8:
        for job in tunable.jobs(scope(PRESETS["deepseek"][1])):
            for tiling in tunable.candidates(job):
                assert stage_of(job, tiling) * tiling.num_stages <= 227 * 1024
                assert tiling.cols in ((128,) if tunable is BLOCK_FP8_EXPERTS and job.about.gated else (64, 128))


FLOAT8 = BLOCK_FP8_LINEAR, BLOCK_FP8_EXPERTS


def stage_of(job: Job, tiling: Any) -> int:
    """Bytes of one of a kernel in float8."""
    rows = job.about.rows if isinstance(tiling, block_fp8_linear.Tiling) else tiling.rows
    return 128 * (rows + (2 if "gated" in job.key else 1) * tiling.cols)


def first_of(tunable: Tunable, op: str, **about: Any) -> Job:
    """A job of a tiny model."""
    jobs = [job for config in TINIES for job in tunable.jobs(scope(config)) if job.op == op]
    return next(job for job in jobs if all(getattr(job.about, name) == value for name, value in about.items()))


TRIED = [
    (LINEAR, "linear", {"rows": 32}),
    (LINEAR, "silu_gated_linear", {"rows": 16}),
    (MATMUL, "mm", {"rows": 32}),
    (MATMUL, "addmm", {"rows": 16}),
    (MATMUL, "mm_logits", {"rows": 64}),
    (MATMUL, "bmm", {"rows": 16, "transposed": False}),
    (MATMUL, "bmm", {"rows": 16, "transposed": True}),
    (INDEX, "index", {"rows": 64}),
    (MOE_EXPERTS, "moe_experts", {"num_tokens": 1, "gated": True}),
    (MOE_EXPERTS, "moe_experts", {"num_tokens": 8, "gated": False}),
    (MOE_EXPERTS, "moe_experts", {"num_tokens": 64, "gated": True}),
    (BLOCK_FP8_LINEAR, "block_fp8_linear", {"rows": 16}),
    (BLOCK_FP8_LINEAR, "silu_gated_block_fp8_linear", {"rows": 32}),
    (BLOCK_FP8_EXPERTS, "block_fp8_experts", {"num_tokens": 1, "gated": False}),
    (BLOCK_FP8_EXPERTS, "block_fp8_experts", {"num_tokens": 16, "gated": True}),
    (HEAD_LINEAR, "head_linear", {"rows": 16}),
    (HEAD_LINEAR, "head_linear", {"rows": 128, "shape": HeadShape(2, 32, 16, False)}),
]
IDS = [f"{op} {about}" for _, op, about in TRIED]


@pytest.mark.parametrize(("tunable", "op", "about"), TRIED, ids=IDS)
def test_right_candidates_pass_and_wrong_ones_do_not(
    tunable: Tunable, op: str, about: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict of a trial on the default, on another, and on a kernel whose last row is wrong."""
    torch.manual_seed(0)
    job = first_of(tunable, op, **about)
    untimed = dataclasses.replace(tunable, us=lambda job, candidate, context: 1.0)
    default, *others = tunable.candidates(job)
    module = sys.modules[tunable.error.__module__]
    monkeypatch.setattr(module, "copies", lambda nbytes: 2, raising=False)  # the first is looked at
    assert [trial(untimed, job, each, DEVICE) for each in (default, *others[-1:])] == [1.0] * min(2, 1 + len(others))
    call_of = module.call_of  # type: ignore[attr-defined]

    def spoiled(*args: Any) -> Any:
        call = call_of(*args)

        def spoil(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            # Of what is quantised the scales.
            out: torch.Tensor = found[-1] if isinstance(found, tuple) else found
            out[-1] *= 1.02
            return found

        return spoil

    monkeypatch.setattr(module, "call_of", spoiled)
    assert str(trial(untimed, job, default, DEVICE)).startswith("off by")


def test_one_wrong_row_or_column_is_seen() -> None:
    want = torch.randn(4000, 300)
    for at in ((slice(None), 7), (3999, slice(None))):
        got = want.clone()
        got[at] *= 1.01
        assert worst_error(got, want) == pytest.approx(0.01, rel=1e-2)
    got[5, 5] = float("nan")
    assert math.isnan(worst_error(got, want))
    assert math.isnan(worst([0.0, float("nan"), 1.0]))
    assert worst_error(want.bfloat16(), want) < 2**-8
    assert [copies(nbytes) for nbytes in (0, 1 << 20, 1 << 30)] == [256, 192, 2]


def test_what_is_quantised_may_be_as_far_off_as_it_has_to_be() -> None:
    """Numbers between two that float8 has become either; a row that is wrong is seen beside that."""
    torch.manual_seed(0)
    want = torch.randn(300, 256)
    nearest = quantise_reference(want)
    assert worst_error(nearest, want) > 2e-2
    assert worst_error(nearest, want, nearest) == 0.0
    other = quantise_reference(want * (1 + 1e-4 * torch.randn_like(want)))
    assert not torch.equal(other, nearest)
    assert worst_error(other, want, nearest) < 5e-3
    other[7] *= 1.02
    assert worst_error(other, want, nearest) > 1.5e-2
    other[9, 9] = float("nan")
    assert math.isnan(worst_error(other, want, nearest))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_GEMS_TUNED", str(tmp_path))
    monkeypatch.setattr(tuned, "_TABLES", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    return tmp_path


def kept(tunable: Tunable, key: str, best: Any) -> None:
    keep(tunable, GPU, Job(key, None, tunable.ops[0]), Outcome(best, 1.0, {best: 1.0}, {}))


def test_products_take_measured_tilings(store: Path) -> None:
    measured = matmul.Tiling(32, 64, 64, 4, 3)
    kept(MATMUL, "bfloat16 64x96 nt 32", measured)
    product = Product(32, 96, 64, True, "bfloat16")
    other = {"float16": measured, "float32": matmul.default_tiling(1, 20, 96, 64, 4)}
    for rows, dtype in ((17, "bfloat16"), (32, "bfloat16"), (20, "float16"), (20, "float32")):
        build, grid, _ = matmul.matmul_build(product._replace(dtype=dtype).matrices(rows), False, True, 0)
        expected = other.get(dtype, measured)
        found = dict(build.constexprs)
        assert (found["ROWS"], found["COLS"], found["DEPTH"]) == expected[:3]
        assert (build.num_warps, build.num_stages) == expected[3:]
        assert grid == -(-rows // expected.rows) * -(-96 // expected.cols)
    assert tuned.states()["matmul"] == {"found": 1, "borrowed": {}, "missing": [], "stale": {}}
    # The default: other rows, matrices that lie otherwise or at odd addresses, and where there is no GPU.
    call = product.matrices(20)
    default = matmul.default_tiling(1, 20, 96, 64, 2)
    lies = call._replace(b=(0, 96, 1))
    assert matmul.tiling_for(lies, True, 0) == default
    assert matmul.tiling_for(product.matrices(33), True, 0) == matmul.default_tiling(1, 33, 96, 64, 2)
    assert matmul.tiling_for(call, False, 0) == matmul.default_tiling(1, 20, 96, 64, 2, False)
    assert matmul.tiling_for(call, True, -1) == default
    assert tuned.states()["matmul"]["missing"] == ["bfloat16 64x96 nn 32", "bfloat16 64x96 nt 64"]


def test_copies_take_measured_divisions(store: Path) -> None:
    measured = indexing.Division(256, 2)
    kept(INDEX, "rows 1024", measured)
    rows = next(job.about for job in INDEX.jobs(scope(TINY)) if job.key == "rows 1024")
    index = indexing.Index(torch.int64, (1, 0), rows.table, rows.width)
    steps = (rows.width, 1)
    for count, indices, together, single in (
        (rows.rows, (index,), measured, indexing.DEFAULT),
        (2 * rows.rows, (index,), indexing.DEFAULT, indexing.DEFAULT),
        (rows.rows, (), indexing.DEFAULT, indexing.DEFAULT),
    ):
        move = indexing.Move((count, rows.width), steps, steps, (0, 1), 2, 1 << 20, indices)
        ways = indexing.move_builds(move if indices else move._replace(read=steps), 0)
        for way, expected in zip(ways, (single, together), strict=True):
            assert (dict(way.build.constexprs)["BLOCK"], way.build.num_warps) == expected
    assert tuned.states()["indexing"]["missing"] == ["rows 2048"]


def test_experts_take_measured_tilings(store: Path) -> None:
    experts, measured = Experts(4, 2, 64, 96), moe_experts.Tiling(16, 64, 64, 4, 3)
    kept(MOE_EXPERTS, "bfloat16 2 of 4 64x96 gated 8", measured)
    for tokens, gated, dtype, device, is_measured in (
        (5, True, torch.bfloat16, 0, True),
        (8, True, torch.float16, 0, True),
        (8, False, torch.bfloat16, 0, False),
        (9, True, torch.bfloat16, 0, False),
        (8, True, torch.float32, 0, False),
        (8, True, torch.bfloat16, -1, False),
    ):
        default = moe_experts.default_tiling(experts, tokens, gated, dtype.itemsize)
        assert default != measured
        found = moe_experts.tiling_for(experts, tokens, gated, dtype, device)
        assert found == (measured if is_measured else default)


def test_a_mixture_looks_tilings_up_when_it_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        moe_experts, "tiling_for",
        lambda experts, num_tokens, gated, dtype, device:
            asked.append(num_tokens) or moe_experts.default_tiling(experts, num_tokens, gated, dtype.itemsize),
    )  # fmt: skip
    run = moe_experts.bind_moe_experts(Experts(3, 2, 33, 17), torch.float32, False, -1 if DEVICE == "cpu" else 0)
    assert set(asked) == set(range(1, moe_experts.MAX_TOKENS + 1))
    asked.clear()
    gate_up, down, x = torch.randn(3, 34, 33), torch.randn(3, 33, 17), torch.randn(5, 33)
    ids, weights = torch.rand(5, 3).argsort(1)[:, :2].int().contiguous(), torch.rand(5, 2)
    every = [each.to(DEVICE) for each in (x, gate_up, down, ids, weights)]
    out, held = torch.empty_like(every[0]), []

    def memory(size: int) -> int:
        held.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
        return held[-1].data_ptr()

    run(*(each.data_ptr() for each in every), 0, out.data_ptr(), 5, memory)
    assert not asked


def test_products_of_heads_take_measured_tilings(store: Path) -> None:
    shape, measured = HeadShape(2, 32, 16, True), head_linear.Tiling(32, 16, 32, 4, 2)
    jobs = [job for job in HEAD_LINEAR.jobs(scope(TINY_MLA)) if job.about.shape == HeadShape(2, 16, 32, True)]
    assert [job.key for job in jobs] == [f"bfloat16 2*16x32 nn {rows}" for rows in head_linear.CLASSES]
    kept(HEAD_LINEAR, "bfloat16 2*32x16 nn 32", measured)
    for each, rows, dtype, device, is_measured in (
        (shape, 17, torch.bfloat16, 0, True),
        (shape, 32, torch.float16, 0, True),
        (shape, 32, torch.float32, 0, False),
        (shape, 16, torch.bfloat16, 0, False),
        (shape._replace(along_out=False), 32, torch.bfloat16, 0, False),
        (shape, 32, torch.bfloat16, -1, False),
    ):
        default = head_linear.default_tiling(each, rows, dtype)
        assert default != measured
        assert head_linear.tiling_for(each, rows, dtype, device) == (measured if is_measured else default)
    assert tuned.states()["head_linear"]["missing"] == ["bfloat16 2*32x16 nn 16", "bfloat16 2*32x16 nt 32"]


def test_products_of_heads_look_tilings_up_when_they_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    tiling = head_linear.Tiling(32, 16, 32, 4, 1)
    monkeypatch.setattr(head_linear, "tiling_for", lambda shape, rows, *rest: asked.append(rows) or tiling)
    x, weight = torch.randn(70, 3, 48, device=DEVICE), torch.randn(3, 48, 24, device=DEVICE)
    for _ in range(2):  # the second asks no more
        got = head_linear.head_linear(x, weight)
        assert asked == list(head_linear.CLASSES)
    torch.testing.assert_close(got, torch.einsum("rhi,hio->rho", x, weight), rtol=1e-4, atol=1e-4)
    head_linear.bind_head_linear.cache_clear()


def test_layers_in_float8_take_measured_tilings(store: Path) -> None:
    shape, measured = Shape(256, 384, gated=True), block_fp8_linear.Tiling(128, 2, 8, 3)
    kept(BLOCK_FP8_LINEAR, block_fp8_linear.key_of(shape, 32), measured)
    for each, rows, device, expected in (
        (shape, 32, 0, measured),
        (shape._replace(bias=True), 32, 0, measured),
        (shape, 16, 0, block_fp8_linear.default_tiling(shape, 16)),
        (shape, 32, -1, block_fp8_linear.default_tiling(shape, 32)),
        (shape._replace(gated=False), 32, 0, block_fp8_linear.default_tiling(shape._replace(gated=False), 32)),
    ):
        assert block_fp8_linear.tiling_for(each, rows, device) == expected
    assert tuned.states()["block_fp8_linear"]["missing"] == ["256x384 32", "256x384 gated 16"]
    experts, of_experts = Experts(4, 2, 256, 128), block_fp8_experts.Tiling(32, 128, 8, 2)
    kept(BLOCK_FP8_EXPERTS, block_fp8_experts.key_of(experts, 8, True), of_experts)
    for tokens, gated, device, is_measured in (
        (5, True, 0, True),
        (5, False, 0, False),
        (9, True, 0, False),
        (5, True, -1, False),
    ):
        default = block_fp8_experts.default_tiling(experts, tokens, gated)
        assert default != of_experts
        found = block_fp8_experts.tiling_for(experts, tokens, gated, device)
        assert found == (of_experts if is_measured else default)


def test_layers_in_float8_look_tilings_up_when_they_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """And give with them what they give without."""
    asked: list[Any] = []
    torch.manual_seed(0)

    def measured(module: Any, tiling: Any) -> None:
        monkeypatch.setattr(module, "tiling_for", lambda *args: asked.append(args[:-1]) or tiling(*args[:-1]))

    linear = block_fp8_linear.BLOCK_FP8_LINEAR
    inputs = linear.inputs(next(case for case in linear.cases if case.name == "several"), "float32", DEVICE)
    want = linear.op(**inputs)
    block_fp8_linear.bind_block_fp8_linear.cache_clear()
    measured(block_fp8_linear, lambda shape, rows: block_fp8_linear.Tiling(128, 3, 4, 2))
    assert worst_error(linear.op(**inputs), want) < 1e-3
    assert [rows for _, rows in asked] == [16, 32, 64]
    experts = block_fp8_experts.BLOCK_FP8_EXPERTS
    inputs = experts.inputs(next(case for case in experts.cases if case.name == "listed"), "float32", DEVICE)
    want = experts.op(**inputs)
    block_fp8_experts.bind_block_fp8_experts.cache_clear()
    asked.clear()
    measured(block_fp8_experts, lambda experts, tokens, gated: block_fp8_experts.Tiling(32, 128, 8, 2))
    # Where sums are not the same to the last bit, some are quantised to the other number between the products.
    assert worst_error(experts.op(**inputs), want) < (1e-6 if DEVICE == "cpu" else 5e-2)
    assert {tokens for _, tokens, _ in asked} == set(range(1, moe_experts.MAX_TOKENS + 1))
    asked.clear()
    experts.op(**inputs)
    assert not asked
    for bind in (block_fp8_linear.bind_block_fp8_linear, block_fp8_experts.bind_block_fp8_experts):
        bind.cache_clear()


def test_what_is_shipped_are_configurations_of_these_kernels() -> None:
    every = {tunable.kernel: tunable for tunable in tunables()}
    paths = [path for path in ship_tuned.SHIPPED.glob("*/*.json") if path.stem in every]
    assert paths
    for path in paths:
        job = next(job for config in TINIES for job in every[path.stem].jobs(scope(config)))
        fields = every[path.stem].candidates(job)[0]._fields
        for found in json.loads(path.read_text())["configurations"].values():
            assert tuple(found) == fields, path


def test_what_is_missing_is_remembered_up_to_a_limit(store: Path) -> None:
    for number in range(tuned.MISSING + 10):
        assert tuned.lookup("matmul", 0, f"{number}", "source") is None
    assert len(tuned.states()["matmul"]["missing"]) == tuned.MISSING


COMPILES = """
import sys
sys.path.insert(0, "tests")
from test_tunables import FLOAT8, PRESETS, TRIED, first_of, scope, stage_of
from vllm_gems.launch import INTERPRETED
assert not INTERPRETED
for tunable, op, about in (TRIED[index] for index in (0, 3, 7, 9, 15)):
    job = first_of(tunable, op, **about)
    tunable.compile(job, tunable.candidates(job)[0], 90)
for tunable in FLOAT8:
    every = [(job, each) for job in tunable.jobs(scope(PRESETS["deepseek"][1])) for each in tunable.candidates(job)]
    tunable.compile(*max(every, key=lambda pair: stage_of(*pair) * pair[1].num_stages), 90)
"""


def test_jobs_are_of_the_dtype_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = ["pretune", "--model", str(tmp_path), "--ops", "mm_logits,linear", "--max-reqs", "16"]
    found = []
    for dtype in ("bfloat16", "float16"):
        assert cli.main([*command, "--dtype", dtype, "--dry-run", "--json"]) == cli.OK
        keys = [job["key"] for job in json.loads(capsys.readouterr().out)["jobs"]]
        assert {key.split()[0] for key in keys} == {dtype}
        assert f"{dtype} 4096x128256 nt 16" in keys
        found.append([key.split()[1:] for key in keys])
    assert found[0] == found[1]


def test_candidates_of_each_compile_without_a_gpu(tmp_path: Path) -> None:
    """As the processes do that a run starts for it."""
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILES], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = {path.name.split(".")[0] for path in tmp_path.rglob("*.cubin")}
    assert compiled == {
        "_linear_kernel", "_matmul_kernel", "_indexed_copy_kernel", "_moe_experts_kernel", "_block_fp8_linear_kernel",
        "_block_fp8_experts_kernel", "_head_linear_kernel",
    }  # fmt: skip
    shared = [json.loads(path.read_text()).get("shared", 0) for path in tmp_path.rglob("*.json")]
    assert 200 * 1024 < max(shared) <= 227 * 1024, "the largest of those in float8 can be launched, and is large"
