"""Top-p's mask on rows of a real vocabulary: what stays are the highest logits, as few as reach p, every time."""

from __future__ import annotations

import torch
from test_kernels import DEVICE

from vllm_gems.kernels.top_p import top_p
from vllm_gems.patches.sampler import warm_original

VOCAB = 32768 + 1
# The sums of a row in float32, in another order than float64's.
EPSILON = 1e-5


def test_what_stays_is_the_least_that_reaches_p() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, VOCAB, device=DEVICE)
    logits[1].clamp_(max=1.5)  # thousands that are equal, more than fit under p
    p = torch.tensor([0.9, 0.3], device=DEVICE)
    masked = logits.clone()
    top_p(masked, p)
    probabilities = logits.double().softmax(dim=-1)
    for row in range(2):
        stays = masked[row] != float("-inf")
        assert torch.equal(masked[row][stays], logits[row][stays])
        assert logits[row][stays].min() >= logits[row][~stays].max()
        mass, least = probabilities[row][stays].sum(), probabilities[row][stays].min()
        assert p[row] - EPSILON <= mass < p[row] + least + EPSILON
    # Of equal logits the first stay.
    equal = (logits[1] == 1.5).nonzero().flatten()
    stays = (masked[1] != float("-inf"))[equal]
    assert 0 < int(stays.sum()) < len(equal)
    assert bool(stays[: int(stays.sum())].all())
    again = logits.clone()
    top_p(again, p)
    assert torch.equal(masked, again)


def test_what_vllm_needs_of_top_p_alone_is_compiled_with_its_warm_up() -> None:
    seen: list[tuple[int, int]] = []

    def original(logits: torch.Tensor, k: None, p: torch.Tensor) -> torch.Tensor:
        assert k is None
        seen.append((len(logits), len(p)))
        return logits.fill_(float("-inf"))

    for rows, expected in ((256, [(16, 16), (15, 15)]), (15, [(15, 15)]), (3, [])):
        logits = torch.zeros(rows, 10)
        warm_original(original, logits, torch.ones(rows))
        assert seen == expected
        assert bool((logits == 0).all()), "what vLLM warms up with is left as it is"
        seen.clear()
