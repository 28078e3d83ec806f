"""Run by test_bench.py in a process of its own: what `bench` does with this vLLM, on a CPU, with made-up times.

Prints JSON, last.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch

import vllm_gems
from vllm_gems import faster, seams, tuned
from vllm_gems.bench.run import OURS, VLLM, Timer, bench
from vllm_gems.kernels import activation

# Slower under a host that waits, twice as fast in a graph.
HOST, GPU = {OURS: 3.0, VLLM: 1.0}, {OURS: 1.0, VLLM: 2.0}


def host(calls: Mapping[str, Callable[..., Any]], before: Callable[[str], None], **rest: Any) -> dict[str, float]:
    for side, call in calls.items():
        before(side)
        call()
    return HOST


def gpu(calls: Mapping[str, Callable[..., Any]], sets: Sequence[dict[str, Any]], **rest: Any) -> dict[str, float]:
    for call in calls.values():
        call(**sets[0])
    return GPU


def run(config: str, **how: Any) -> list[dict[str, Any]]:
    found = bench([config], device="cpu", timer=Timer(host, gpu), **how)
    return found["tables"]


def main() -> None:
    config = sys.argv[1]
    right = activation.bind_activation

    def wrong(*settled: Any) -> Any:
        call = right(*settled)
        return lambda x, out=None: call(x, out).mul_(1.1)

    def unheard(*settled: Any) -> Any:
        raise RuntimeError("boom")

    def interrupted(*settled: Any) -> Any:
        raise KeyboardInterrupt

    told: dict[str, Any] = {}
    told["others"] = run(config, max_tokens=1, patches="activation.*, layernorm.*, rotary.mrope")
    for name, made_up in (("wrong", wrong), ("raises", unheard)):
        with mock.patch.object(activation, "bind_activation", made_up):
            told[name] = run(config, max_tokens=1, patches="*.silu_and_mul")
    with mock.patch.object(activation, "bind_activation", interrupted):
        told["stopped"] = run(config, max_tokens=1, patches="layernorm.rms_norm,*.silu_and_mul")
    told["all"] = run(config, max_tokens=2)

    # What was measured decides for a layer of vLLM's. A CPU has no results otherwise.
    lookup = tuned.lookup
    with (
        mock.patch.object(tuned, "lookup", lambda patch, device, key, source: lookup(patch, 0, key, source)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="cpu"),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        seams.eager_layers(),
        vllm_gems.gems_patches(include="activation.silu_and_mul", strict=True),
    ):
        layers = importlib.import_module("vllm.model_executor.layers.activation")
        layer = layers.SiluAndMul()
        for tokens in (2, 8, 1):  # of which 8 are more than was measured
            layer(torch.randn(tokens, 192).bfloat16())
        layers.SiluAndMul()(torch.randn(2, 64).bfloat16())  # another shape
        report = vllm_gems.report()
    (row,) = (row for row in report.rows if row.patch == "activation.silu_and_mul")
    told["here"] = {"hits": row.hits, "declined": dict(row.declined), "tuned": report.tuned[row.patch]}
    told["explained"] = faster.told("activation.silu_and_mul", "cpu", activation.__name__)["rows"]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
