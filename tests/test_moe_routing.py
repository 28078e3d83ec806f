"""grouped_topk where the catalog's cases do not reach: against vLLM's own function, what is declined, NaN, ties."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from test_kernels import DEVICE

import vllm_gems
from vllm_gems.errors import Refused
from vllm_gems.kernels.moe_routing import GROUPED_TOPK, Router, grouped_topk, grouped_topk_reference
from vllm_gems.nouns import Case, Row

MODULE = "vllm.model_executor.layers.fused_moe.router.grouped_topk_router"
TOKENS, EXPERTS, TOPK = 7, 64, 6

# (scoring, bias, renormalise, (groups, kept), logits)
COMBINATIONS = list(
    itertools.product(
        ("softmax", "sigmoid"), (None, "float32", "bfloat16"), (False, True), ((1, 1), (8, 3)), ("float32", "bfloat16")
    )
)


def inputs_of(
    scoring: str, bias: str | None, renormalize: bool, groups: tuple[int, int], dtype: str
) -> dict[str, Any]:
    torch.manual_seed(0)
    router = Router(EXPERTS, TOPK, *groups, scoring, renormalize, 2.5, bias is not None)
    return GROUPED_TOPK.inputs(Case("", {"tokens": TOKENS, "router": router, "bias": bias}), dtype, DEVICE)


def by_expert(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In ascending order of the ids."""
    ids, order = ids.sort(dim=-1)
    return weights.gather(1, order), ids


def difference(got: Any, want: Any) -> str:
    """How a routing differs from vLLM's, by more than it may."""
    if [result.dtype for result in got] != [result.dtype for result in want]:
        return f"dtypes {[result.dtype for result in got]}, not {[result.dtype for result in want]}"
    (weights, ids), (expected, experts) = by_expert(*got), by_expert(*want)
    same = torch.equal(ids, experts) and torch.allclose(weights, expected, rtol=2e-6, atol=1e-7)
    return "" if same else f"{ids}, {weights}, not {experts}, {expected}"


def row() -> Row:
    return next(row for row in vllm_gems.report().rows if row.patch == "moe.grouped_topk")


def against_vllm() -> dict[Any, Any]:
    """In a process of its own: what differs, by combination, and what became of calls that are not for us."""
    module = importlib.import_module(MODULE)
    importlib.import_module("vllm.platforms").current_platform.is_cuda()
    torch.compiler.set_stance("force_eager")  # the original is compiled apart from any model
    original = module.grouped_topk
    found: dict[Any, Any] = {}
    hidden = torch.zeros(TOKENS, 1, device=DEVICE)
    with vllm_gems.gems_patches(include="moe.grouped_topk"):
        for combination in COMBINATIONS:
            inputs = inputs_of(*combination)
            got = module.grouped_topk(hidden_states=hidden, **inputs)
            # In bfloat16 scores are equal to vLLM that are not, and whose turn it is then is open.
            inputs["gating_output"] = inputs["gating_output"].float()
            found[combination] = difference(got, original(hidden_states=hidden, **inputs))
        found["hits"] = row().hits

        inputs = inputs_of("sigmoid", "float32", True, (8, 3), "float32")
        inputs["gating_output"][1, 17] = float("nan")
        inputs["gating_output"][2, 40] = float("inf")
        inputs["gating_output"][2, 8:16] = -float("inf")
        (weights, ids), (expected, experts) = (by_expert(*f(hidden, **inputs)) for f in (module.grouped_topk, original))
        found["nan"] = torch.equal(ids, experts) and torch.allclose(weights, expected, equal_nan=True)
        found["shown"] = bool(weights[1].isnan().all())

        inputs["gating_output"] = inputs["gating_output"].nan_to_num().T.contiguous().T
        results = zip(module.grouped_topk(hidden, **inputs), original(hidden, **inputs), strict=True)
        found["declined calls are the original's"] = all(torch.equal(got, want) for got, want in results)
        try:
            module.grouped_topk(hidden, **{**inputs, "scoring_func": "tanh"})
        except ValueError as error:
            found["error"] = str(error)
        found["declined"], found["errors"] = list(row().declined), row().errors
    found["given back"] = module.grouped_topk is original
    return found


@pytest.fixture(scope="module")
def vllms() -> Any:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    if DEVICE == "cuda":
        pytest.skip("vLLM has a kernel of its own for some of these on a GPU")
    # Not forked: a child would wait for ever for the threads that earlier tests have started in PyTorch.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(against_vllm).result()


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_as_vllm_routes(combination: Any, vllms: Any) -> None:
    assert vllms[combination] == ""


def test_every_call_is_ours(vllms: Any) -> None:
    assert vllms["hits"] == len(COMBINATIONS)


def test_nan_and_infinite_logits_as_vllm_routes_them(vllms: Any) -> None:
    """By sigmoid scores, where PyTorch does it; vLLM's fused kernel for GPUs passes experts by that are not finite."""
    assert vllms["nan"]
    assert vllms["shown"]


def test_what_is_not_for_us_is_vllms(vllms: Any) -> None:
    assert vllms["declined calls are the original's"]
    assert "Unsupported scoring function" in vllms["error"]
    strides, scoring = vllms["declined"]
    assert "strides (1, 7)" in strides
    assert "'tanh'" in scoring
    assert vllms["errors"] == 0
    assert vllms["given back"]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of infinity less infinity
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_softmax_that_is_none_chooses_experts_that_there_are(value: float) -> None:
    """All scores of the row are NaN, hence equal: those that come first, each once; the other rows are as they were."""
    inputs = inputs_of("softmax", None, False, (8, 3), "float32")
    weights, ids = grouped_topk(**inputs)
    inputs["gating_output"][1, 17] = value
    got_weights, got_ids = grouped_topk(**inputs)
    assert got_ids[1].tolist() == list(range(TOPK))
    assert got_weights[1].isnan().all()
    others = [0, *range(2, TOKENS)]
    assert torch.equal(got_ids[others], ids[others])
    assert torch.equal(got_weights[others], weights[others])


@pytest.mark.parametrize("bias", [False, True])
def test_among_equals_the_first_wins(bias: bool) -> None:
    logits = torch.zeros(1, 16, device=DEVICE)
    zeros = torch.zeros(16, device=DEVICE) if bias else None
    logits[0, 13] = 1.0
    weights, ids = grouped_topk(logits, 4, True, 4, 2, "sigmoid", 1.0, zeros)
    assert ids.tolist() == [[13, 0, 1, 2]]  # of groups 3 and, the first of three that are equal, 0
    assert weights[0, 1:].unique().numel() == 1


def test_no_score_at_all_is_no_division_by_zero() -> None:
    logits = torch.full((1, 8), -float("inf"), device=DEVICE)
    weights, ids = grouped_topk(logits, 2, True, 1, 1, "sigmoid")
    assert weights.tolist() == [[0.0, 0.0]]
    assert ids.tolist() == [[0, 1]]


def test_experts_without_a_chance_are_chosen_last() -> None:
    """A bias of minus infinity: within the groups that are kept, never outside of them."""
    logits = torch.randn(3, 16, device=DEVICE)
    bias = torch.full((16,), -float("inf"), device=DEVICE)
    bias[4:7] = 0.0
    _, ids = grouped_topk(logits, 4, False, 4, 1, "sigmoid", 1.0, bias)
    for row in ids.tolist():
        assert set(row) == {4, 5, 6, 7}
        assert row[3] == 7


REFUSED = [
    ({"topk": 33}, "topk 33"),
    ({"topk": 25}, "exceeds the 24 experts kept"),
    ({"topk": 0}, "topk 0"),
    ({"num_expert_group": 0}, "num_expert_group 0"),
    ({"num_expert_group": 7}, "does not divide"),
    ({"topk_group": 9}, "topk_group 9"),
    ({"scoring_func": "sqrtsoftplus"}, "'sqrtsoftplus'"),
    ({"num_expert_group": 64, "topk_group": 8}, "sum of two"),
    ({"gating_output": torch.zeros(2, 3, 64)}, r"shape \(2, 3, 64\)"),
    ({"gating_output": torch.zeros(64, 2).T}, "contiguous"),
    ({"gating_output": torch.zeros(2, 4096)}, "4096"),
    ({"e_score_correction_bias": torch.zeros(63)}, r"\(63,\)"),
    ({"e_score_correction_bias": torch.zeros(64, dtype=torch.float64)}, "float64"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refusals(change: dict[str, Any], words: str) -> None:
    inputs = inputs_of("sigmoid", "float32", True, (8, 3), "float32")
    change = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(Refused, match=words):
        grouped_topk(**{**inputs, **change})


def test_zero_tokens_and_a_column_of_a_wider_projection() -> None:
    wide = torch.randn(5, 200, device=DEVICE)
    got = grouped_topk(wide[:, 3:67], 4, True, 8, 3)
    want = grouped_topk_reference(wide[:, 3:67].double(), 4, True, 8, 3)
    assert torch.equal(got[1], want[1])
    assert [tuple(result.shape) for result in grouped_topk(wide[:0, :64], 4, True)] == [(0, 4), (0, 4)]
