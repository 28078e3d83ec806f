"""PyTorch's operations that stand alone, captured in CUDA graphs and replayed on other values."""

from __future__ import annotations

import pytest
import torch

from benchmarks import stress
from vllm_gems import ops


@pytest.mark.parametrize("op", stress.standalone_ops(), ids=lambda op: op.name)
def test_replay(op: stress.Op) -> None:
    before = ops.FALLBACKS.copy()
    static, fresh = (stress.moved(values, "cuda") for values in op.values)
    wanted = stress.tensors(op.call(**fresh))
    op.call(**static)  # compiles what differs, if anything
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = stress.tensors(op.call(**static))
    for result in results:
        result.fill_(float("nan"))
    for name, value in fresh.items():
        if isinstance(value, torch.Tensor):
            static[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(results, wanted, strict=True):
        assert torch.equal(got, want)
    assert before == ops.FALLBACKS, "PyTorch did it"
