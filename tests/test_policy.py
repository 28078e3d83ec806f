"""What the user wants, from the environment and from code."""

from __future__ import annotations

import pathlib

import pytest

from vllm_gems.policy import VARIABLES, Policy

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_defaults_want_everything() -> None:
    policy = Policy.from_env({})
    assert policy == Policy()
    assert policy.refuses("layernorm.rms_norm") is None
    assert "VLLM_GEMS_INCLUDE=default,ir.rms_norm adds it" in str(policy.refuses("ir.rms_norm", default=False))


@pytest.mark.parametrize("value", ["0", "false", "No", " off ", ""])
def test_the_off_switch(value: str) -> None:
    policy = Policy.from_env({"VLLM_GEMS": value})
    assert policy.refuses("layernorm.rms_norm") == "VLLM_GEMS=0"


def test_include_and_exclude_by_glob() -> None:
    policy = Policy.from_env({"VLLM_GEMS_INCLUDE": "layernorm.*, op.silu_and_mul", "VLLM_GEMS_EXCLUDE": "*.gemma*"})
    assert policy.refuses("layernorm.rms_norm") is None
    assert policy.refuses("op.silu_and_mul", default=False) is None, "included by name, so the default does not count"
    assert policy.refuses("op.rms_norm") == "not in the include list"
    assert policy.refuses("layernorm.gemma_rms_norm") == "excluded by '*.gemma*'"
    assert policy.named("layernorm.rms_norm")
    assert not policy.named("op.rms_norm")


def test_code_overrides_the_environment() -> None:
    env = Policy.from_env({"VLLM_GEMS_INCLUDE": "a.*", "VLLM_GEMS_STRICT": "1", "VLLM_GEMS_REPORT": "x"})
    assert env.replace() == env
    changed = env.replace(include="b, c", exclude=["d"], strict=False, verbose=True)
    assert changed == Policy(True, ("b", "c"), ("d",), False, True, "x")
    assert env.replace(include=()).include == ()


def test_the_fingerprint_tells_policies_apart() -> None:
    policies = [Policy(), Policy(enabled=False), Policy(include=("a",)), Policy(exclude=("a",))]
    assert len({policy.fingerprint() for policy in policies}) == len(policies)
    assert Policy(verbose=True).fingerprint() == Policy().fingerprint(), "it changes no code"


def test_every_variable_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in VARIABLES:
        assert f"`{name}`" in readme


def test_default_in_the_include_list_adds_to_what_is_bound_anyway() -> None:
    policy = Policy(include=("default", "decoder.*"), exclude=("op.*",))
    assert policy.refuses("layernorm.rms_norm") is None
    assert policy.refuses("decoder.llama", default=False) is None
    assert policy.refuses("ir.rms_norm", default=False) == "not in the include list"
    assert policy.refuses("op.rms_norm") == "excluded by 'op.*'"
    assert policy.named("decoder.llama")
    assert not policy.named("layernorm.rms_norm")


def test_names_that_fit_nothing_are_told_from_those_that_do() -> None:
    policy = Policy(include=("default", "op.*", "op.rmsnorm"), exclude=("toy.?", "op.rmsnorm"))
    assert policy.strangers(["op.rms_norm"]) == ("op.rmsnorm", "toy.?")
