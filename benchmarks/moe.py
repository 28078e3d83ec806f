"""A mixture of experts over few tokens: ours against vLLM's `fused_experts`, in one run.

    python benchmarks/moe.py [--models deepseek-v2-lite,qwen3-30b-a3b] [--out DIR]

Writes the record `moe_experts`: GPU time in bfloat16 of the experts' two products, the activation and the weighted sum,
choices of experts random and the same for both, and the relative Frobenius error of each against float32 on the same
inputs. vLLM's own tuned configurations are used where it ships them. Needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import measure
from vllm_gems.kernels.moe_experts import MIXTURES, Experts, moe_experts, moe_experts_reference
from vllm_gems.tuning.timing import gpu_us

TOKENS = (1, 8, 32, 64, 128, 256, 512)


def inputs_for(experts: Experts, num_tokens: int, gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, Any]:
    count, topk, hidden_size, _ = experts
    return {
        "x": torch.randn(num_tokens, hidden_size, device="cuda").bfloat16(),
        "gate_up": gate_up,
        "down": down,
        "weights": torch.rand(num_tokens, topk, device="cuda"),
        "ids": torch.rand(num_tokens, count, device="cuda").argsort(dim=1)[:, :topk].to(torch.int32).contiguous(),
    }


def stock(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: Any, ids: Any) -> torch.Tensor:
    from vllm.model_executor.layers.fused_moe import fused_experts

    out: torch.Tensor = fused_experts(x, gate_up, down, weights, ids)
    return out


def error(got: torch.Tensor, inputs: dict[str, Any]) -> float:
    with torch.no_grad():
        (want,) = moe_experts_reference(**{key: value.float() if value.is_floating_point() else value
                                           for key, value in inputs.items()})  # fmt: skip
    return float((got.float() - want).norm() / want.norm())


def measure_model(name: str) -> list[dict[str, Any]]:
    experts, rows = MIXTURES[name], []
    count, _, hidden_size, width = experts
    gate_up = (torch.randn(count, 2 * width, hidden_size, device="cuda") * hidden_size**-0.5).bfloat16()
    down = (torch.randn(count, hidden_size, width, device="cuda") * width**-0.5).bfloat16()
    for num_tokens in TOKENS:
        sets = [inputs_for(experts, num_tokens, gate_up, down) for _ in range(4)]
        times = gpu_us({"ours": moe_experts, "vllm_triton": stock}, sets, repeats=5)
        sides = {"ours": moe_experts, "vllm_triton": stock}
        errors = {side: error(call(**sets[0]), sets[0]) for side, call in sides.items()}
        rows.append(
            {
                "case": {"op": "moe_experts", "model": name, "num_tokens": num_tokens, "dtype": "bfloat16"},
                "unit": "us",
                "ours": round(times["ours"], 1),
                "against": {"vllm_triton": round(times["vllm_triton"], 1)},
                "errors": errors,
            }
        )
        told = ", ".join(f"{side} {times[side]:.1f} us, error {errors[side]:.1e}" for side in sides)
        print(f"{name} {num_tokens} tokens: {told}; {times['ours'] / times['vllm_triton']:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["deepseek-v2-lite", "qwen3-30b-a3b"])
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the record, instead of benchmarks/results/<gpu>")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        rows = [row for name in args.models for row in measure_model(name)]
    print(measure.record("moe_experts", rows, folder=args.out, commit=args.commit))


if __name__ == "__main__":
    main()
