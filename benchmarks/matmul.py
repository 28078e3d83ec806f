"""Products of matrices as overrides of PyTorch's: ours against cuBLAS.

    python benchmarks/matmul.py [--out DIR]

Writes the record `matmul`: GPU time of both, on operands that no cache holds if they are large, the host time of one
call of each through the dispatcher, and the largest error of each in units of the largest sum of absolute products,
against float64. Needs a GPU.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import vllm_gems
from benchmarks import measure
from vllm_gems.aten.overloads import Overload
from vllm_gems.aten.products import matrices
from vllm_gems.kernels.matmul import tiling_for
from vllm_gems.patches import aten
from vllm_gems.tuning.timing import gpu_us


class Shape(NamedTuple):
    """out[rows, cols] = a[rows, inner] @ b[inner, cols], and b is a weight [cols, inner] if `linear`."""

    rows: int
    cols: int
    inner: int
    linear: bool = True
    batch: int = 0  # 0: a product of matrices, not of a batch of one
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16


SHAPES = (
    *(Shape(rows, 3584, 3584, bias=True) for rows in (1, 16, 64, 256, 1024, 4096)),
    Shape(2048, 18944, 3584),
    Shape(2048, 3584, 18944),
    Shape(4096, 4096, 4096, linear=False),
    Shape(4096, 4096, 4096, dtype=torch.float16),
    Shape(1000, 1000, 1000),
    Shape(16, 151936, 1536),
    Shape(512, 512, 128, batch=64),
    Shape(512, 128, 512, linear=False, batch=64),
    Shape(1, 1024, 128, batch=256),
    Shape(256, 2048, 2048, dtype=torch.float32),
    Shape(2048, 2048, 2048, linear=False, dtype=torch.float32),
)


def operation(shape: Shape) -> str:
    return ("baddbmm" if shape.bias else "bmm") if shape.batch else "addmm" if shape.bias else "mm"


def inputs(shape: Shape) -> dict[str, Any]:
    """Operands, whose products have sums of about 1."""
    lead = (shape.batch,) if shape.batch else ()
    a = torch.randn(*lead, shape.rows, shape.inner, device="cuda").to(shape.dtype)
    sizes = (shape.cols, shape.inner) if shape.linear else (shape.inner, shape.cols)
    b = (torch.randn(*lead, *sizes, device="cuda") / shape.inner**0.5).to(shape.dtype)
    every = (a, b.mT if shape.linear else b)
    return {"args": (torch.randn(shape.cols, device="cuda").to(shape.dtype), *every) if shape.bias else every}


def worst(args: tuple[torch.Tensor, ...], got: torch.Tensor) -> float:
    """The largest error on the first rows, in units of the largest sum of absolute products."""
    *bias, a, b = (each.double() for each in args)
    a, b, got = (each[0] if each.dim() == 3 else each for each in (a, b, got.double()))
    a, got = a[:64], got[:64]
    expected = a @ b + (bias[0] if bias else 0.0)
    return float((got - expected).abs().max() / (a.abs() @ b.abs()).max())


def compare(shape: Shape) -> Iterator[dict[str, Any]]:
    """Two rows of the record, for one product."""
    name = operation(shape)
    op = getattr(torch.ops.aten, name).default
    (row,) = (each for each in aten.ROWS if each.op == name)
    planned = Overload(op, row)
    nbytes = sum(each.numel() * each.element_size() for each in inputs(shape)["args"])
    sets = measure.input_sets(lambda: inputs(shape), nbytes)
    # Once each without a graph: kernels are compiled, and errors are known, before anything is timed.
    args = sets[0]["args"]
    errors = {"ours": worst(args, planned(args, {})), "torch": worst(args, op(*args))}
    gpu = gpu_us({"torch": lambda args: op(*args), "ours": lambda args: planned(args, {})}, sets)

    def before(side: str) -> None:
        if side == "ours":
            vllm_gems.enable(name)
        else:
            vllm_gems.disable()

    call = getattr(torch, name)
    host = measure.host_us(
        {"torch": lambda: call(*args), "ours": lambda: call(*args)},
        rounds=3, burst=20, before=before, pause=torch.cuda.synchronize,
    )  # fmt: skip
    vllm_gems.disable()
    *input, a, b = args
    tiling = tiling_for(matrices(a, b, planned(args, {}), *input), True, a.get_device())
    case = {"op": name, **shape._asdict(), "dtype": str(shape.dtype).removeprefix("torch.")}
    for unit, times in (("us", gpu), ("us of host time", host)):
        yield {
            "case": case,
            "unit": unit,
            "ours": round(times["ours"], 2),
            "against": {"torch": round(times["torch"], 2)},
            **({"tiling": tiling._asdict(), "error": errors} if unit == "us" else {}),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="a folder for copies of what is written")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    rows = [row for shape in SHAPES for row in compare(shape)]
    print(measure.record("matmul", rows, folder=args.out, commit=args.commit))
    print("product, tiling, us of ours and of PyTorch's, ratio; host time of both; errors of both")
    for gpu, host in zip(rows[::2], rows[1::2], strict=True):
        case, tiling, error = gpu["case"], gpu["tiling"], gpu["error"]
        sizes = "x".join(str(case[name]) for name in ("batch", "rows", "cols", "inner") if case[name])
        label = f"{case['op']} {sizes} {'nt' if case['linear'] else 'nn'} {case['dtype']}"
        tflops = 2e-6 * max(case["batch"], 1) * case["rows"] * case["cols"] * case["inner"] / gpu["ours"]
        print(
            f"{label:40} {'x'.join(map(str, tiling.values())):18} {gpu['ours']:9.1f} {gpu['against']['torch']:9.1f} "
            f"{gpu['ours'] / gpu['against']['torch']:6.2f} {tflops:6.0f} TFLOPS {host['ours']:6.1f} "
            f"{host['against']['torch']:6.1f} {error['ours']:8.1e} {error['torch']:8.1e}"
        )


if __name__ == "__main__":
    main()
