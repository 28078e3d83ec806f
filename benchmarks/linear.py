"""Linear layers of named models over few rows: ours against cuBLAS.

    python benchmarks/linear.py --models qwen2.5-7b,llama-3.1-8b [--out DIR]

Writes the record `linear`: GPU time of ours, with the tilings that serving takes, and of `F.linear` (gated layers: and
vLLM's `silu_and_mul` after it, or PyTorch's where there is no vLLM), on weights that no cache holds, and the host time
of one call of each. Needs a GPU.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import measure
from vllm_gems.kernels.linear import PROJECTIONS, ROWS, Shape, key_of, tiling_for
from vllm_gems.tuning.linear import CLASSES, call_of, inputs_of, wanted, weights
from vllm_gems.tuning.timing import gpu_us
from vllm_gems.tuning.trials import TOLERANCE

DEVICE = 0
DTYPE = torch.bfloat16


def stock(shape: Shape) -> Callable[..., torch.Tensor]:
    """What vLLM calls in eager mode."""
    if not shape.gated:
        return torch.nn.functional.linear
    try:
        import vllm._custom_ops  # noqa: F401  (it registers the op)

        activate = torch.ops._C.silu_and_mul
    except (ImportError, AttributeError):
        activate = None

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        both = torch.nn.functional.linear(x, weight, bias)
        if activate is None:
            gate, up = both.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up
        out = torch.empty((x.shape[0], shape.out_features), dtype=x.dtype, device=x.device)
        activate(out, both)
        return out

    return call


def compare(model: str, name: str, shape: Shape) -> Iterator[dict[str, Any]]:
    """Rows of the record, for one layer."""
    sets = weights(shape, "cuda", DTYPE)
    sides = {"ours": call_of(shape, None, DEVICE, DTYPE), "cublas": stock(shape)}
    for rows in ROWS:
        for side, call in sides.items():
            first = inputs_of(shape, rows, sets[0])
            want = wanted(shape, first)
            error = float((call(**first).float() - want).norm() / want.norm())
            if error > TOLERANCE * (1 if side == "ours" else 3):
                raise ValueError(f"{model} {name}, {rows} rows: {side} is off by {error:.1e}")
        inputs = [inputs_of(shape, rows, weight) for weight in sets]
        gpu = gpu_us(sides, inputs)
        calls = {side: functools.partial(call, **inputs[0]) for side, call in sides.items()}
        host = measure.host_us(calls, rounds=3, bursts=5, burst=20, pause=torch.cuda.synchronize)
        moved = sum(each.numel() * 2 for each in (inputs[0]["x"], inputs[0]["weight"])) + 2 * rows * shape.out_features
        op = "silu_gated_linear" if shape.gated else "linear"
        case = {"op": op, "model": model, "layer": name, "num_tokens": rows}
        for unit, times in (("us", gpu), ("us of host time", host)):
            yield {
                "case": case,
                "unit": unit,
                "ours": round(times["ours"], 2),
                "against": {"cublas": round(times["cublas"], 2)},
                **({"tb_per_s": round(moved / times["ours"] / 1e6, 3)} if unit == "us" else {}),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen2.5-7b", help=f"of {', '.join(PROJECTIONS)}")
    parser.add_argument("--out", type=pathlib.Path, help="a folder for copies of what is written")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    models = args.models.split(",")
    layers = [(model, name, layer) for model in models for name, layer in PROJECTIONS[model].items()]
    torch.cuda.set_device(DEVICE)
    rows = [row for model, name, layer in layers for row in compare(model, name, layer)]
    for row in rows:
        ratio = row["ours"] / row["against"]["cublas"]
        print(f"{' '.join(map(str, row['case'].values())):44} {row['ours']:8.2f} {row['against']['cublas']:8.2f} "
              f"{row['unit']:15} ratio {ratio:.3f} {row.get('tb_per_s', '')}")  # fmt: skip
    tilings = {key_of(layer, rows, DTYPE): tiling_for(layer, rows, DTYPE, DEVICE)._asdict()
               for _, _, layer in layers for rows in CLASSES}  # fmt: skip
    measure.record("linear", rows, folder=args.out, commit=args.commit, tilings=tilings)


if __name__ == "__main__":
    main()
