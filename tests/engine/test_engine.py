"""The plugin in real engines: the text stays the same, and the kernels that made it were ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
from engine_runs import CAN_COMPILE, MODELS, REFEREED, TOKENS, Run

Runs = dict[str, Callable[[], Run]]

# model -> patch -> calls in one forward pass of its two layers. All that a model calls is claimed here, so that a call
# which quietly goes to the original shows as a number that does not fit.
CALLS: dict[str, dict[str, int]] = {
    # two norms a layer and one at the end
    "qwen2": {"layernorm.rms_norm": 5, "rotary.rotary_embedding": 2, "activation.silu_and_mul": 2},
    # and one each for queries and keys
    "qwen3": {"layernorm.rms_norm": 9, "rotary.rotary_embedding": 2, "activation.silu_and_mul": 2},
    # before and after attention and feed-forward, queries, keys
    "gemma3": {"layernorm.gemma_rms_norm": 13, "rotary.rotary_embedding": 2, "activation.gelu_and_mul": 2},
    # the compressed keys and values; feed-forward in one layer, the shared expert in the other
    "deepseek_v2": {"layernorm.rms_norm": 7, "rotary.rotary_embedding": 2, "activation.silu_and_mul": 2},
    # the compressed queries too
    "deepseek_v3": {"layernorm.rms_norm": 9, "rotary.deepseek_scaling": 2, "activation.silu_and_mul": 2},
}


def differences(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    pairs = zip(ours, theirs, strict=True)
    return [a - b for mine, other in pairs for a, b in zip(mine, other, strict=True)]


def referee(runs: Runs, model: str) -> dict[str, Any]:
    """What is right in float32."""
    return runs["off"]().job(f"{model} transformers" if model in REFEREED else f"{model} float32")


def hits(report: dict[str, Any]) -> dict[str, int]:
    return {row["patch"]: row["hits"] for row in report["rows"]}


def assert_all_calls(calls: dict[str, int], counted: dict[str, int], at_least: int) -> None:
    """Every patch answered every call: all counts are the same multiple of the calls in one forward pass."""
    passes = {patch: counted.get(patch, 0) / calls[patch] for patch in calls}
    assert len(set(passes.values())) == 1, passes
    assert min(passes.values()) >= at_least, passes


@pytest.mark.parametrize("model", MODELS)
def test_float32_tokens_are_the_referees(runs: Runs, model: str) -> None:
    ours = runs["on"]().job(f"{model} float32")
    assert ours["tokens"] == referee(runs, model)["tokens"]


@pytest.mark.parametrize("model", MODELS)
def test_float32_probabilities_are_the_referees(runs: Runs, model: str) -> None:
    """Sums of a few hundred float32 terms in another order: 1e-4 is a hundred times what is seen, and a hundredth of
    what one bfloat16 rounding does."""
    ours = runs["on"]().job(f"{model} float32")["scores"]
    assert max(map(abs, differences(ours, referee(runs, model)["scores"]))) < 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_probabilities_are_as_near_as_stock(runs: Runs, model: str) -> None:
    """One rounding more or less moves a bfloat16 run, so that tokens prove nothing, and no fixed number is a bound for
    every model. The yardstick is how far stock vLLM's bfloat16 is from its own float32; ours may be half as far again
    from the (checked) float32 run, while a wrong layer is ten times as far. The median of all positions, because where
    two experts are nearly as good one rounding chooses the other, and that position alone is far off."""
    on, off = runs["on"](), runs["off"]()
    noise, yardstick = (
        statistics.median(
            map(abs, differences(run.job(f"{model} bfloat16")["scores"], run.job(f"{model} float32")["scores"]))
        )
        for run in (on, off)
    )
    assert 0 < noise < 1.5 * yardstick


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_each_layer_ran_our_kernel(runs: Runs, model: str, dtype: str) -> None:
    counted = runs["on"]().job(f"{model} {dtype}")["hits"]
    if (model, dtype) == ("gemma3", "bfloat16"):
        # vLLM has one GeluAndMul for all engines of a process. The first call in another dtype goes to the original,
        # and the next one settles the layer anew.
        counted["activation.gelu_and_mul"] += 1
    assert_all_calls(CALLS[model], counted, at_least=TOKENS if dtype == "float32" else 1)


def test_no_kernel_failed(runs: Runs) -> None:
    reports = [runs["on"]().result["report"], *runs["processes"]().reports, *runs["ranks"]().reports]
    assert [row for report in reports for row in report["rows"] if row["errors"] or row["state"] == "failed"] == []


@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler for the CPU")
def test_compiled_mode_generates_the_same_with_our_kernels(runs: Runs) -> None:
    ours, stock = runs["on"]().job("compiled"), runs["off"]().job("compiled")
    assert ours["tokens"] == stock["tokens"]
    assert_all_calls(CALLS["qwen2"], ours["hits"], at_least=TOKENS)


@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler for the CPU")
def test_compiled_code_has_a_key_for_each_side(runs: Runs) -> None:
    """With the plugin and without, in one cache: neither finds the other's, and each finds its own again."""
    off, on = runs["off again"](), runs["on again"]()
    assert off.result["compiled"] == on.result["compiled"]
    assert len(on.result["compiled"]) == 2
    for side, again in (("off", off), ("on", on)):
        assert again.job("compiled")["tokens"] == runs[side]().job("compiled")["tokens"]
    assert_all_calls(CALLS["qwen2"], on.job("compiled")["hits"], at_least=TOKENS)
    assert sum(off.job("compiled")["hits"].values()) == 0


def test_worker_of_the_multiprocess_engine_runs_our_kernels(runs: Runs) -> None:
    run = runs["processes"]()
    assert run.job("processes")["tokens"] == referee(runs, "qwen2")["tokens"]
    counted = [hits(report) for report in run.reports if sum(hits(report).values())]
    assert len(counted) == 1, [(report["pid"], hits(report)) for report in run.reports]
    assert_all_calls(CALLS["qwen2"], counted[0], at_least=TOKENS)


def test_both_tensor_parallel_ranks_run_our_kernels(runs: Runs) -> None:
    run = runs["ranks"]()
    assert run.job("ranks")["tokens"] == referee(runs, "qwen2")["tokens"]
    counted = {report["rank"]: hits(report) for report in run.reports if sum(hits(report).values())}
    assert sorted(counted) == ["0", "1"]
    assert counted["0"] == counted["1"]
    assert_all_calls(CALLS["qwen2"], counted["0"], at_least=TOKENS)


def test_switched_off_leaves_vllm_as_it_is(runs: Runs) -> None:
    """Every method of every replaceable layer is the identical object after a dozen engines, and nothing of ours that
    could replace one was even imported. In the run with the plugin on, the same look finds what it replaced."""
    off = runs["off"]().result
    assert off["changed"] == []
    assert [name for name in off["modules"] if name.startswith(("vllm_gems.kernels", "vllm_gems.patches"))] == []
    assert any(".layernorm:RMSNorm." in name for name in runs["processes"]().result["changed"])
