"""Linear layers and experts with weights in block-wise float8 over few rows: ours against vLLM's own kernels.

    python benchmarks/block_fp8.py [--check] [--rows 1,32,64] [--layers o,experts] [--out DIR]

Writes the record `block_fp8`: GPU time in bfloat16 of DeepSeek-V3's linear layers and experts, quantising the rows and
the activation included on both sides, and the relative Frobenius error of each side against float64, of weights and
activations that are quantised. vLLM's side is `per_token_group_quant_fp8` with `cutlass_scaled_mm`, which its linear
layers take on Hopper without DeepGEMM, or with its Triton kernel where there is none; and `fused_experts`. First both
sides' quantised rows are compared, element by element.

--check stops after the errors. Other divisions of the work are measured by `vllm-gems pretune`; its results are taken.
Needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import measure
from vllm_gems.kernels.block_fp8_experts import block_fp8_experts, block_fp8_experts_reference
from vllm_gems.kernels.block_fp8_linear import (
    BLOCK,
    PROJECTIONS,
    bind_group_quantise,
    block_fp8_linear,
    block_fp8_linear_reference,
    random_weight,
    silu_gated_block_fp8_linear,
    silu_gated_block_fp8_linear_reference,
)
from vllm_gems.kernels.linear import Shape
from vllm_gems.kernels.moe_experts import MIXTURES, Experts
from vllm_gems.tuning.block_fp8_experts import random_experts
from vllm_gems.tuning.timing import gpu_us

MODEL = "deepseek-v3"
# Ours may be that much further from float64 than vLLM's, whose activations are rounded to bfloat16 on the way.
LIMIT = 1.1

Call = Callable[..., torch.Tensor]


def vllm_quantise(x: torch.Tensor, column_major: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    found: tuple[torch.Tensor, torch.Tensor] = per_token_group_quant_fp8(
        x, BLOCK, column_major_scales=column_major, use_ue8m0=False
    )
    return found


def same_bits() -> float:
    """The share of elements that both sides quantise to another number."""
    x = (torch.randn(64, 7168, device="cuda") * torch.logspace(-6, 4, 64, device="cuda")[:, None]).bfloat16()
    want, want_scales = vllm_quantise(x, column_major=False)
    inside, scales = bind_group_quantise(7168, x.dtype, 0)(x.data_ptr(), 7168, 64)
    differing = (inside != want.view(torch.uint8)).float().mean()
    print(f"quantised rows: {float(differing):.1e} of the elements differ, scales by "
          f"{float((scales.T / want_scales - 1).abs().max()):.1e} at most", flush=True)  # fmt: skip
    return float(differing)


def vllm_side(shape: Shape) -> dict[str, Call]:
    """What its linear layers take on this GPU without DeepGEMM."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.fp8_utils import w8a8_triton_block_scaled_mm
    from vllm.model_executor.layers.quantization.utils.w8a8_utils import CUTLASS_BLOCK_FP8_SUPPORTED

    def after(both: torch.Tensor) -> torch.Tensor:
        if not shape.gated:
            return both
        out = torch.empty((both.shape[0], shape.out_features), dtype=both.dtype, device=both.device)
        torch.ops._C.silu_and_mul(out, both)
        return out

    def cutlass(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        inside, scales = vllm_quantise(x)
        return after(ops.cutlass_scaled_mm(inside, weight.T, scales, scale.T, x.dtype))

    def triton(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        inside, scales = vllm_quantise(x, column_major=False)
        return after(w8a8_triton_block_scaled_mm(inside, weight, scales, scale, [BLOCK, BLOCK], x.dtype))

    return {"vllm_cutlass": cutlass} if CUTLASS_BLOCK_FP8_SUPPORTED else {"vllm_triton": triton}


def errors_of(name: str, sides: dict[str, Call], inputs: dict[str, Any], want: torch.Tensor) -> dict[str, float]:
    """Raises ValueError if ours is further off than it may be."""
    found = {side: float((call(**inputs).double() - want).norm() / want.norm()) for side, call in sides.items()}
    theirs = [error for side, error in found.items() if side != "ours"]
    if not found["ours"] <= LIMIT * min(theirs):
        raise ValueError(f"{name}: errors {found}")
    return {side: float(f"{error:.2e}") for side, error in found.items()}


def row_of(case: dict[str, Any], sides: dict[str, Call], sets: list[dict[str, Any]], want: Any, timed: bool) -> Any:
    name = " ".join(map(str, case.values()))
    errors = errors_of(name, sides, sets[0], want)
    us = gpu_us(sides, sets, repeats=5) if timed else dict.fromkeys(sides, 0.0)
    row: dict[str, Any] = {
        "case": case,
        "unit": "us",
        "ours": round(us["ours"], 1),
        "against": {side: round(each, 1) for side, each in us.items() if side != "ours"},
        "errors": errors,
    }
    least = min(row["against"].values())
    ratio = f"{row['ours']:8.1f} us, ratio {row['ours'] / least:.2f}, " if timed else ""
    print(f"{name:44} {ratio}{row['against'] if timed else ''} errors {errors}", flush=True)
    return row


def linear_rows(name: str, shape: Shape, *, points: list[int], timed: bool) -> Iterator[dict[str, Any]]:
    height = shape.out_features * (2 if shape.gated else 1)
    op = silu_gated_block_fp8_linear if shape.gated else block_fp8_linear
    reference = silu_gated_block_fp8_linear_reference if shape.gated else block_fp8_linear_reference
    weights = [random_weight((height, shape.in_features), "cuda")
               for _ in range(max(2, min(16, (160 << 20) // (height * shape.in_features))))]  # fmt: skip
    for rows in points:
        sets: list[dict[str, Any]] = [
            {"x": torch.randn(rows, shape.in_features, device="cuda").bfloat16(), "weight": weight, "scale": scale}
            for weight, scale in weights
        ]
        want = reference(sets[0]["x"].double(), weights[0][0], weights[0][1].double())[0]
        sides: dict[str, Call] = {"ours": op, **vllm_side(shape)}
        yield row_of({"op": op.__name__, "layer": name, "rows": rows}, sides, sets, want, timed)


def fused_experts(
    x: torch.Tensor, gate_up: Any, gate_up_scale: Any, down: Any, down_scale: Any, weights: Any, ids: Any
) -> torch.Tensor:
    from vllm.model_executor.layers.fused_moe import fused_experts as fused
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    config = fp8_w8a8_moe_quant_config(w1_scale=gate_up_scale, w2_scale=down_scale, block_shape=[BLOCK, BLOCK])
    out: torch.Tensor = fused(x, gate_up, down, weights, ids, quant_config=config)
    return out


def expert_rows(experts: Experts, *, points: list[int], timed: bool) -> Iterator[dict[str, Any]]:
    count, topk, hidden, width = experts
    made: dict[str, torch.Tensor] = {}
    for name, rows, columns in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
        made[name], made[f"{name}_scale"] = random_experts(count, rows, columns, "cuda")
    for tokens in points:
        sets = [
            {
                "x": torch.randn(tokens, hidden, device="cuda").bfloat16(),
                **made,
                "weights": torch.rand(tokens, topk, device="cuda"),
                "ids": torch.rand(tokens, count, device="cuda").argsort(dim=1)[:, :topk].to(torch.int32).contiguous(),
            }
            for _ in range(4)
        ]
        wide = {name: value.double() if value.dtype in (torch.bfloat16, torch.float32) else value
                for name, value in sets[0].items()}  # fmt: skip
        want = block_fp8_experts_reference(**wide)[0]
        sides: dict[str, Call] = {"ours": block_fp8_experts, "vllm_triton": fused_experts}
        yield row_of({"op": "block_fp8_experts", "layer": "experts", "rows": tokens}, sides, sets, want, timed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="errors alone")
    parser.add_argument("--rows", type=lambda text: [int(each) for each in text.split(",")], default=[1, 32, 64])
    parser.add_argument("--layers", type=lambda text: text.split(","), default=[*PROJECTIONS[MODEL], "experts"])
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the record, instead of benchmarks/results/<gpu>")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    from vllm.config import VllmConfig, set_current_vllm_config

    torch.manual_seed(0)
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    how: dict[str, Any] = {"points": args.rows, "timed": not args.check}
    with set_current_vllm_config(VllmConfig()):
        differing = same_bits()
        for name, shape in PROJECTIONS[MODEL].items():
            if name in args.layers:
                rows += linear_rows(name, shape, **how)
        if "experts" in args.layers:
            rows += expert_rows(MIXTURES[MODEL], **how)
    print(f"{time.monotonic() - began:.0f} s")
    if not args.check:
        print(measure.record("block_fp8", rows, folder=args.out, commit=args.commit, differing=differing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
