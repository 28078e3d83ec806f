"""head_linear where the catalog's cases do not reach: what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kernels import DEVICE

from vllm_gems.errors import Refused
from vllm_gems.kernels.head_linear import head_linear

X = torch.randn(4, 3, 32, device=DEVICE)
WEIGHT = torch.randn(3, 32, 16, device=DEVICE)


@pytest.mark.parametrize(
    ("x", "weight", "out", "words"),
    [
        (X[0], WEIGHT, None, "x of shape"),
        (X[..., ::2], WEIGHT[:, ::2], None, "x of shape"),
        (X.repeat(40, 1, 1), WEIGHT, None, "160 rows, more than 128"),
        (X, WEIGHT[:2], None, r"weight of shape \(2, 32, 16\) is not \[3, 32, out_features\]"),
        (X[..., :8], torch.randn(3, 16, 32, device=DEVICE)[:, ::2, ::2], None, "contiguous neither along"),
        (X, WEIGHT[..., :0], None, "weight has 3 by 32 by 0 elements"),
        (X, torch.empty_strided((3, 32, 16), (2**31, 16, 1), device="meta"), None, "elements 2.*31 apart"),
        (X, torch.empty_strided((3, 32, 16), (512, 2**27, 1), device="meta"), None, "elements 2.*31 apart"),
        (X, WEIGHT.half(), None, "weight is torch.float16"),
        (X, WEIGHT, torch.empty(4, 3, 17, device=DEVICE), "out of shape"),
        (X, WEIGHT, torch.empty(3, 4, 16, device=DEVICE).transpose(0, 1), "out of shape"),
    ],
)
def test_what_does_not_fit_is_refused(x: Any, weight: Any, out: Any, words: str) -> None:
    with pytest.raises(Refused, match=words):
        head_linear(x, weight, out)
