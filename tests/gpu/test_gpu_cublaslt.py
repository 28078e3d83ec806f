"""Products of many rows by cuBLASLt, at the shapes of real models, against float64."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tolerances import absolute, assert_close

from vllm_gems.cublaslt import WORKSPACE, bind_product
from vllm_gems.kernels.linear import PROJECTIONS, Shape

SHAPES = [
    pytest.param(shape, id=f"{model}-{layer}")
    for model, layers in PROJECTIONS.items()
    for layer, shape in layers.items()
]


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor | None = None
) -> torch.Tensor:
    rows, (out_features, in_features) = x.shape[0], weight.shape
    product = bind_product(in_features, out_features, bias is not None, x.dtype, x.get_device())
    out = torch.full((rows, out_features), torch.nan, dtype=x.dtype, device=x.device)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.device)
    product(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), rows,
        workspace.data_ptr(), 0 if addend is None else addend.data_ptr(),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: Shape, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out_features = shape.out_features * (2 if shape.gated else 1)
    weight = torch.randn(out_features, shape.in_features, dtype=dtype, device="cuda")
    for rows, bias in ((65, False), (72, True), (256, shape.bias), (511, not shape.bias)):
        x = torch.randn(rows, shape.in_features, dtype=dtype, device="cuda")
        b = torch.randn(out_features, dtype=dtype, device="cuda") if bias else None
        want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        atol = absolute("linear", {"x": x, "weight": weight}, dtype)
        assert_close(multiply(x, weight, b), want, f"{rows} rows", atol)
        addend = torch.randn(rows, out_features, dtype=dtype, device="cuda")
        assert_close(multiply(x, weight, b, addend), want + addend, f"{rows} rows and an addend", atol)


def test_streams_and_threads() -> None:
    """Each in its own order, with inputs that arrive late."""
    together = threading.Barrier(4)

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            together.wait()
            for rows in (70 + seed, 100):
                torch.cuda._sleep(5_000_000)
                x = torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda")
                weight = torch.randn(1024, 512, dtype=torch.bfloat16, device="cuda")
                bias = torch.randn(1024, dtype=torch.bfloat16, device="cuda")
                got, want = multiply(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
                torch.testing.assert_close(got, want, rtol=2e-2, atol=0.1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
