"""Linear layers of named models over few rows: tilings tried, the best kept, and ours against cuBLAS.

    python benchmarks/linear.py --models qwen2.5-7b,llama-3.1-8b [--tune] [--out DIR]

Writes the record `linear`: GPU time of ours and of `F.linear` (gated layers: and vLLM's `silu_and_mul` after it, or
PyTorch's where there is no vLLM), on weights that no cache holds, and the host time of one call of each. With --tune
every tiling is compiled, in as many processes as there are cores, verified, and timed; the best of each layer and
number of rows go into vllm_gems/tuned/<gpu>/linear.json, which the kernel reads. Needs a GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import measure
from vllm_gems import launch
from vllm_gems.kernels.linear import (
    PROJECTIONS,
    ROWS,
    Projection,
    Shape,
    Tiling,
    bind_linear,
    build_of,
    default_tiling,
    key_of,
    linear_reference,
    silu_gated_linear_reference,
    tiling_for,
)
from vllm_gems.tuned import gpu_slug

DTYPE = torch.bfloat16
DEVICE = 0
# Relative distance from the float32 reference, in the norm of the whole result: one rounding to 8 bits.
TOLERANCE = 4e-3
SHARED_MEMORY = 220 * 1024  # bytes a program may have, some left for Triton
# Rows at which each class of them is tuned.
CLASSES = {16: (1, 16), 32: (32,), 64: (64,)}


def candidates(shape: Shape, rows: int) -> Iterator[Tiling]:
    """Tilings that can keep an H100 busy: enough programs, enough bytes on their way."""
    parts = 2 if shape.gated else 1
    for cols, depth, split, swapped, stages in itertools.product(
        (32, 64, 128), (64, 128, 256), (1, 2, 4), (False, True), (3, 4, 6)
    ):
        programs = -(-shape.out_features // cols) * split
        stage = 2 * depth * (parts * cols + rows)
        resident = min(programs, 132 * (SHARED_MEMORY // (stage * stages)))
        in_flight = resident * (stages - 1) * 2 * depth * parts * cols
        if (
            stage * stages <= SHARED_MEMORY
            and 100 <= programs <= 1400
            and in_flight >= 2 << 20
            and shape.in_features // split >= stages * depth
            and (cols >= 64 or not swapped)
            and parts * cols * rows <= 8192
        ):
            yield Tiling(cols, depth, split, swapped, 4, stages)


def _compile(key: tuple[Shape, int, Tiling]) -> str:
    """Into Triton's cache; what went wrong, if something did."""
    from triton.backends.compiler import GPUTarget

    try:
        launch.compile_for(build_of(*key, DTYPE), GPUTarget("cuda", 90, 32))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def weights(shape: Shape) -> list[torch.Tensor]:
    """As many as no cache holds."""
    size = shape.in_features * shape.out_features * (2 if shape.gated else 1)
    count = max(2, -(-(192 << 20) // (2 * size)))
    return [
        (torch.randn(size, device="cuda") * shape.in_features**-0.5).to(DTYPE).view(-1, shape.in_features)
        for _ in range(count)
    ]


def ours(shape: Shape, tiling: Tiling | None = None) -> Callable[..., torch.Tensor]:
    project = bind_linear(shape, DTYPE, DEVICE, tiling)
    empty = launch.allocator(DEVICE, DTYPE)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.shape[0]
        out = empty(rows, shape.out_features)
        bias_at = 0 if bias is None else bias.data_ptr()
        project(x.data_ptr(), shape.in_features, weight.data_ptr(), bias_at, out.data_ptr(), rows)
        return out

    return call


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


def inputs_of(shape: Shape, rows: int, weight: torch.Tensor) -> dict[str, Any]:
    return {
        "x": torch.randn(rows, shape.in_features, device="cuda").to(DTYPE),
        "weight": weight,
        "bias": torch.randn(weight.shape[0], device="cuda").to(DTYPE) if shape.bias else None,
    }


def wrong(shape: Shape, call: Callable[..., torch.Tensor], inputs: dict[str, Any]) -> float:
    """Relative error against float32; infinity for NaN."""
    reference = silu_gated_linear_reference if shape.gated else linear_reference
    wide = {name: None if value is None else value.float() for name, value in inputs.items()}
    want = reference(**wide)[0]
    error = ((call(**inputs).float() - want).norm() / want.norm()).item()
    return error if error == error else float("inf")


def tune(shapes: list[Shape], budget_s: float) -> dict[str, dict[str, Any]]:
    """key -> the best tiling of each shape and class of rows."""
    began = time.monotonic()
    jobs = {
        (shape, rows): list(dict.fromkeys([default_tiling(shape, rows, 2), *candidates(shape, rows)]))
        for shape in shapes
        for rows in CLASSES
    }
    builds = [(shape, rows, tiling) for (shape, rows), tilings in jobs.items() for tiling in tilings]
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        failed = dict(zip(builds, pool.map(_compile, builds, chunksize=4), strict=True))
    lost = sum(map(bool, failed.values()))
    print(f"{len(builds)} builds compiled in {time.monotonic() - began:.0f} s, {lost} failed", flush=True)
    chosen: dict[str, dict[str, Any]] = {}
    # (gated, rows) -> by tiling, how many times the best of each shape it takes
    ratios: dict[tuple[bool, int], dict[Tiling, list[float]]] = {}
    for (shape, rows), tilings in jobs.items():
        sets = weights(shape)
        scores: dict[Tiling, float] = {}
        for tiling in tilings:
            if failed[shape, rows, tiling]:
                continue
            if time.monotonic() - began > budget_s and scores:
                print(f"{key_of(shape, rows)}: out of time after {len(scores)} of {len(tilings)} tilings")
                break
            try:
                call = ours(shape, tiling)
                error = max(wrong(shape, call, inputs_of(shape, count, sets[0])) for count in CLASSES[rows])
            except Exception as failure:
                print(f"{key_of(shape, rows)} {tiling}: {type(failure).__name__}: {failure}")
                continue
            if error > TOLERANCE:
                print(f"{key_of(shape, rows)} {tiling}: off by {error:.1e}")
                continue
            scores[tiling] = statistics.geometric_mean(
                measure.gpu_us({"it": call}, [inputs_of(shape, count, weight) for weight in sets], repeats=3)["it"]
                for count in CLASSES[rows]
            )
        best = min(scores, key=lambda tiling: scores[tiling])
        first = scores.get(default_tiling(shape, rows, 2), float("nan"))
        told = f"{scores[best]:.1f} us, default {first:.1f}, of {len(scores)}"
        print(f"{key_of(shape, rows)}: {told}: {best}", flush=True)
        chosen[key_of(shape, rows)] = best._asdict()
        for tiling, score in scores.items():
            ratios.setdefault((shape.gated, rows), {}).setdefault(tiling, []).append(score / scores[best])
    for (gated, rows), by_tiling in ratios.items():
        most = max(map(len, by_tiling.values()))
        means = {each: statistics.geometric_mean(found) for each, found in by_tiling.items() if len(found) == most}
        best = min(means, key=lambda tiling: means[tiling])
        print(f"{key_of(None, rows, gated)}: {means[best]:.3f} of the best, over {most} shapes: {best}", flush=True)
        chosen[key_of(None, rows, gated)] = best._asdict()
    return chosen


def compare(model: str, name: str, layer: Projection) -> Iterator[dict[str, Any]]:
    """Rows of the record, for one layer."""
    shape = Shape(*layer)
    sets = weights(shape)
    sides = {"ours": ours(shape), "cublas": stock(shape)}
    for rows in ROWS:
        for side, call in sides.items():
            error = wrong(shape, call, inputs_of(shape, rows, sets[0]))
            if error > TOLERANCE * (1 if side == "ours" else 3):
                raise ValueError(f"{model} {name}, {rows} rows: {side} is off by {error:.1e}")
        inputs = [inputs_of(shape, rows, weight) for weight in sets]
        gpu = measure.gpu_us(sides, inputs)
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
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="try tilings for so long, and keep the best")
    parser.add_argument("--out", type=pathlib.Path, help="a folder for copies of what is written")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    models = args.models.split(",")
    layers = [(model, name, layer) for model in models for name, layer in PROJECTIONS[model].items()]
    torch.cuda.set_device(DEVICE)
    if args.tune:
        shapes = list(dict.fromkeys(Shape(*layer) for _, _, layer in layers))
        slug = gpu_slug(measure.gpu_name())
        path = pathlib.Path(launch.__file__).parent / "tuned" / slug / "linear.json"
        known = json.loads(path.read_text())["configurations"] if path.exists() else {}
        content = {
            "gpu": measure.gpu_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "configurations": known | tune(shapes, args.tune),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1) + "\n"
        for target in (path, *([args.out / "tuned-linear.json"] if args.out else [])):
            target.write_text(text)
    rows = [row for model, name, layer in layers for row in compare(model, name, layer)]
    for row in rows:
        ratio = row["ours"] / row["against"]["cublas"]
        print(f"{' '.join(map(str, row['case'].values())):44} {row['ours']:8.2f} {row['against']['cublas']:8.2f} "
              f"{row['unit']:15} ratio {ratio:.3f} {row.get('tb_per_s', '')}")  # fmt: skip
    tilings = {key_of(Shape(*layer), rows): tiling_for(Shape(*layer), rows, DTYPE, DEVICE)._asdict()
               for _, _, layer in layers for rows in CLASSES}  # fmt: skip
    measure.record("linear", rows, folder=args.out, commit=args.commit, tilings=tilings)


if __name__ == "__main__":
    main()
