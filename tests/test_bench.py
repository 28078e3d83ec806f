"""`vllm-gems bench`: what it would measure, what it does with a real vLLM, and that a wrong kernel is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_cli import needs_vllm
from test_rules import ROOT

from vllm_gems import cli
from vllm_gems.bench.families import plan
from vllm_gems.catalog import catalog
from vllm_gems.tuning.models import PRESETS, Heads, activated, heads, norms, router

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 100,
}  # fmt: skip


def test_layers_of_models() -> None:
    _, v3 = PRESETS["deepseek"]
    qwen3 = PRESETS["qwen"][1]
    assert norms(v3, 8) == [(7168, 1), (1536, 1), (512, 1)]
    assert norms(qwen3, 2) == [(4096, 1), (128, 16)]
    assert heads(v3, 8) == Heads(16, 1, 64, 64, True)
    assert heads(qwen3, 16) == Heads(2, 1, 128, 128, False)
    assert activated(v3, 2) == [9216, 1024]
    assert activated(TINY, 1) == [96]
    assert router(TINY, 1) is None
    assert router(v3, 1) == {
        "experts": 256, "topk": 8, "groups": 8, "kept": 4, "scoring": "sigmoid", "renormalize": True, "factor": 2.5,
        "bias": True,
    }  # fmt: skip


def test_every_patch_of_one_op_or_layer_can_be_measured() -> None:
    """Those that cannot are whole layers and models, attention's, providers that a user chooses, and no kernel."""
    tasks = plan(["llama", "deepseek"], patches="*")
    measured = {task.patch.name for task in tasks}
    assert {name.partition(".")[0] for name in catalog().patches.keys() - measured} == {
        "attention", "decoder", "graphs", "ir", "mla", "moe",
    }  # fmt: skip
    assert len({(task.patch.name, task.key) for task in tasks}) == len(tasks)
    for task in plan(["llama", "qwen", "deepseek"]):
        assert task.tokens == tuple(sorted(task.tokens))
        assert task.kernel.name in task.patch.kernels


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "qwen", "--max-tokens", "64", "--patches", "op.silu*,rotary.*", "--dry-run"]
    assert cli.main(["bench", *words]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    told = "rotary.rotary_embedding bfloat16 rotary_embedding 28 4 128 128 neox 1 to 64 tokens"
    assert told in {" ".join(line.split()) for line in lines}
    assert last == f"{len(lines)} tables, {7 * len(lines)} points of both sides"
    assert cli.main(["bench", "--model", "deepseek", "--dry-run", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert {"patch": "moe.grouped_topk", "key": "float32 grouped_topk 256 8 8 4 sigmoid",
            "tokens": [1 << power for power in range(14)]} in tables  # fmt: skip


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["--patches", "decoder.*"], "--patches decoder.*: no patch that can be measured by itself"),
        (["--model", "llama", "--tp", "7"], "--tp 7 does not divide"),
    ):
        assert cli.main(["bench", *words, "--dry-run"]) == cli.USAGE
        assert told in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench"]) == cli.USAGE
        assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What bench_here.py prints."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "config.json").write_text(json.dumps(TINY))
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bench_here.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ, "TRITON_INTERPRET": "1", "VLLM_LOGGING_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": "",
            "VLLM_GEMS_TUNED": str(folder / "store"), "PYTHONPATH": str(ROOT),
        },
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stdout.splitlines()[-1]), "files": sorted((folder / "store" / "cpu").rglob("*"))}


@needs_vllm
def test_everything_that_a_model_has_is_measured(here: dict[str, Any]) -> None:
    assert [table for table in here["all"] if "failed" in table] == []
    assert {(table["patch"], table["key"]) for table in here["all"]} == {
        ("layernorm.rms_norm", "bfloat16 rms_norm 64"),
        ("layernorm.rms_norm", "bfloat16 fused_add_rms_norm 64"),
        ("op.rms_norm", "bfloat16 rms_norm 64"),
        ("op.fused_add_rms_norm", "bfloat16 fused_add_rms_norm 64"),
        ("rotary.rotary_embedding", "bfloat16 rotary_embedding 4 2 16 16 neox"),
        ("op.rotary_embedding", "bfloat16 rotary_embedding 4 2 16 16 neox"),
        ("activation.silu_and_mul", "bfloat16 silu_and_mul 192"),
        ("op.silu_and_mul", "bfloat16 silu_and_mul 192"),
        ("sampler.top_p", "bfloat16 top_p 100"),
        ("sampler.top_p", "float32 top_p 100"),
    }
    for table in here["all"]:
        assert table["times"] == {"1": [3.0, 1.0, 1.0, 2.0], "2": [3.0, 1.0, 1.0, 2.0]}
    assert not [path for path in here["files"] if path.is_file() and path.suffix != ".json"]


@needs_vllm
def test_others_are_measured_if_asked_for(here: dict[str, Any]) -> None:
    failed = {table["patch"]: table["failed"] for table in here["others"] if "failed" in table}
    assert failed == {}
    assert {table["key"].split()[1] for table in here["others"]} >= {
        "gelu_tanh_and_mul", "gelu_fast", "fatrelu_and_mul", "swigluoai_and_mul", "silu_and_mul_with_clamp",
        "gemma_rms_norm", "gemma_fused_add_rms_norm", "mrotary_embedding",
    }  # fmt: skip


@needs_vllm
def test_a_wrong_kernel_is_not_measured(here: dict[str, Any]) -> None:
    for name, words in (("wrong", "WrongError: ours is off by"), ("raises", "RuntimeError: boom")):
        assert {table["patch"] for table in here[name]} == {"activation.silu_and_mul", "op.silu_and_mul"}
        for table in here[name]:
            assert table["failed"].startswith(words)
            assert "times" not in table


@needs_vllm
def test_an_interrupt_ends_it_with_what_it_has(here: dict[str, Any]) -> None:
    *measured, last = here["stopped"]
    assert {table["patch"] for table in measured} == {"layernorm.rms_norm"}
    assert all("times" in table for table in measured)
    assert (last["patch"], last["failed"]) == ("activation.silu_and_mul", "stopped")


@needs_vllm
def test_what_was_measured_decides_and_is_told(here: dict[str, Any]) -> None:
    told = here["here"]
    assert told["hits"] == 2
    assert told["declined"] == {f"measured slower: 1.33 of vLLM's at {tokens} tokens, eager": 1 for tokens in (1, 2)}
    assert told["tuned"]["missing"] == ["bfloat16 silu_and_mul 64"]
    assert [(row["tokens"], row["eager"], row["graph"], row["original"]) for row in here["explained"]] == [
        (1, 1.333, 0.5, ["eager"]), (2, 1.333, 0.5, ["eager"]),
    ]  # fmt: skip
