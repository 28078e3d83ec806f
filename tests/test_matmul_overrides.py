"""Overrides of PyTorch's products of matrices: values against float64, wherever they lie; what is declined, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tolerances import absolute, assert_close
from torch.testing import assert_close as assert_as_pytorch
from triton.runtime.errors import OutOfResources

import vllm_gems
from vllm_gems.aten import products
from vllm_gems.aten.overloads import Overload
from vllm_gems.aten.products import Product
from vllm_gems.errors import Refused
from vllm_gems.kernels import matmul
from vllm_gems.kernels.matmul import Matrices, Tiling, default_tiling, matmul_build
from vllm_gems.patches import aten

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = {row.op: row for row in aten.ROWS if isinstance(row, Product)}
NAN = float("nan")


@contextmanager
def overridden(op: str, hits: int = 1, declined: str = "") -> Iterator[None]:
    """With our kernels for `op`, which run `hits` times, and decline with these words if there are any.

    References are in float64, which is declined, so that they may be computed here.
    """

    def count() -> tuple[int, dict[str, int]]:
        rows = [row for row in vllm_gems.report().rows if row.patch.split(".")[1].rstrip("_") == op]
        assert not [row.why for row in rows if row.errors]
        reasons: dict[str, int] = {}
        for row in rows:
            for reason, times in row.declined.items():
                reasons[reason] = reasons.get(reason, 0) + times
        return sum(row.hits for row in rows), reasons

    with vllm_gems.use_gems(op):
        before, known = count()
        yield
        after, reasons = count()
    assert after - before == hits
    new = [reason for reason, times in reasons.items() if times > known.get(reason, 0)]
    assert not declined or any(declined in reason for reason in new), reasons


def dense(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def transposed(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return dense((*shape[:-2], shape[-1], shape[-2]), dtype).mT if len(shape) > 1 else dense(shape, dtype)


def gapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    wide = torch.full([2 * size + 1 for size in shape], NAN, device=DEVICE, dtype=dtype)
    view = wide[tuple(slice(1, None, 2) for _ in shape)]
    return view.copy_(dense(shape, dtype))


def padded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Rows a multiple of 16 elements apart, from an address that is a multiple of 16 bytes."""
    wide = torch.full((*shape[:-1], -(-shape[-1] // 16) * 16 + 16), NAN, device=DEVICE, dtype=dtype)
    return wide[..., : shape[-1]].copy_(dense(shape, dtype))


def misaligned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return dense((math.prod(shape) + 1,), dtype)[1:].view(shape)


def repeated(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One row for all, one matrix for all of a batch."""
    return dense((1, *shape[1:]), dtype).expand(shape)


LAYOUTS = (dense, transposed, gapped, padded, misaligned, repeated)


def check(
    got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, input: Any = None, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """Against float64. `input` is not looked at if beta is 0."""
    expected = alpha * (a.double() @ b.double())
    if input is None or beta == 0:
        beta = 0.0
    else:
        expected = expected + beta * input.double()
    atol = absolute("matmul", {"a": a, "b": b, "input": input, "alpha": alpha, "beta": beta}, got.dtype)
    assert_close(got, expected, "product", atol)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("left", "right", "dtype"),
    [
        *((left, right, torch.float32) for left in LAYOUTS for right in (dense, transposed, gapped)),
        *((layout, layout, dtype) for layout in LAYOUTS for dtype in DTYPES[1:]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_matrices_are_read_where_they_lie(left: Any, right: Any, dtype: torch.dtype) -> None:
    a, b = left((37, 70), dtype), right((70, 50), dtype)
    with overridden("mm"):
        got = torch.mm(a, b)
    assert got.is_contiguous()
    check(got, a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches(layout: Any) -> None:
    a, b = layout((3, 19, 40), torch.float32), layout((3, 40, 33), torch.float32)
    with overridden("bmm"):
        check(torch.bmm(a, b), a, b)
    input = layout((3, 19, 33), torch.float32)
    with overridden("baddbmm"):
        check(torch.baddbmm(input, a, b, beta=0.5, alpha=-2), a, b, input, 0.5, -2)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 33), (300, 1, 17), (16, 16, 16), (33, 128, 1), (2, 3, 1000)])
def test_sizes(shape: tuple[int, int, int]) -> None:
    rows, cols, inner = shape
    for dtype in DTYPES:
        a, b = dense((rows, inner), dtype), dense((inner, cols), dtype)
        with overridden("mm"):
            check(torch.mm(a, b), a, b)


def test_more_tiles_than_are_gone_through_together() -> None:
    """Of 19 rows of tiles the last group has three, and every tile is somebody's."""
    a, b = dense((301, 20), torch.float32), dense((20, 70), torch.float32)
    with overridden("mm"):
        check(torch.mm(a, b), a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors(layout: Any, dtype: torch.dtype) -> None:
    matrix, vector = layout((45, 70), dtype), layout((70,), dtype)
    with overridden("mv"):
        check(torch.mv(matrix, vector)[:, None], matrix, vector[:, None])
    input = layout((45,), dtype)
    with overridden("addmv"):
        got = torch.addmv(input, matrix, vector, beta=2, alpha=0.5)
    check(got[:, None], matrix, vector[:, None], input[:, None], 2, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(20, 33), (33,), (1, 33), (20, 1), (1,), ()], ids=str)
def test_what_is_added_is_broadcast(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input, a, b = dense(shape, dtype), dense((20, 40), dtype), dense((40, 33), dtype)
    with overridden("addmm"):
        check(torch.addmm(input, a, b), a, b, input)
    with overridden("baddbmm"):
        check(torch.baddbmm(input, a[None], b[None])[0], a, b, input)


@pytest.mark.parametrize("beta", [1, 0, -0.5, 3.0])
@pytest.mark.parametrize("alpha", [1, 0, 0.25, -2])
def test_factors(alpha: float, beta: float) -> None:
    """They are the same plan, with what is added and without."""
    input, a, b = (dense(shape, torch.float32) for shape in ((5, 7), (5, 6), (6, 7)))
    with overridden("addmm"):
        check(torch.addmm(input, a, b, beta=beta, alpha=alpha), a, b, input, beta, alpha)


@pytest.mark.parametrize("beta", [0, 0.0, -0.0])
def test_what_is_multiplied_by_zero_is_not_read(beta: float) -> None:
    input, a, b = torch.full((5, 7), NAN, device=DEVICE), dense((5, 6), torch.float32), dense((6, 7), torch.float32)
    with overridden("addmm", hits=2):
        check(torch.addmm(input, a, b, beta=beta), a, b, input, 0)
        check(input.addmm_(a, b, beta=beta), a, b, input, 0)
    inputs = torch.full((2, 5, 7), NAN, device=DEVICE)
    with overridden("baddbmm"):
        inputs.baddbmm_(a.expand(2, 5, 6), b.expand(2, 6, 7), beta=beta, alpha=2)
    check(inputs[1], a, b, None, alpha=2)


def test_what_is_no_number_spreads_as_in_pytorch() -> None:
    """And not out of what fills a tile up."""
    a, b = dense((20, 19), torch.float32), dense((19, 21), torch.float32)
    a[3, 18], a[5, 0], b[18, 4] = float("inf"), NAN, float("-inf")
    with overridden("mm"):
        got = torch.mm(a, b)
    assert_as_pytorch(got, torch.mm(a, b), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_no_products_are_zero() -> None:
    a, b = dense((5, 0), torch.float32), dense((0, 7), torch.float32)
    out = torch.full((5, 7), NAN, device=DEVICE)
    with overridden("mm", hits=2):
        assert torch.equal(torch.mm(a, b), torch.zeros(5, 7, device=DEVICE))
        assert torch.equal(torch.mm(a, b, out=out), torch.zeros(5, 7, device=DEVICE))
    input = dense((7,), torch.float32)
    with overridden("addmm", hits=2):
        got = torch.addmm(input, a, b, beta=2.0, alpha=float("inf"))
        assert torch.equal(got, (2.0 * input).expand(5, 7))
        assert torch.equal(torch.addmm(input, a, b, beta=0), torch.zeros(5, 7, device=DEVICE))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 0, 0)], ids=str)
def test_empty_results(shape: tuple[int, int, int]) -> None:
    rows, cols, inner = shape
    a, b = dense((rows, inner), torch.float32), dense((inner, cols), torch.float32)
    with overridden("mm"):
        assert torch.mm(a, b).shape == (rows, cols)
    with overridden("bmm"):
        assert torch.bmm(a.expand(0, rows, inner), b.expand(0, inner, cols)).shape == (0, rows, cols)
    with overridden("addmm"):
        assert torch.addmm(dense((cols,), torch.float32), a, b).shape == (rows, cols)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [dense, transposed, gapped, padded, misaligned])
def test_results_are_written_where_they_are_wanted(layout: Any, dtype: torch.dtype) -> None:
    """And nowhere else: what lies in the gaps is as it was."""
    a, b, input = dense((20, 40), dtype), dense((40, 33), dtype), dense((33,), dtype)
    out = layout((20, 33), dtype)
    strides, base = out.stride(), out._base if out._base is not None else out
    written = torch.zeros_like(base, dtype=torch.bool)
    written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    before = base.clone()
    out.fill_(NAN)
    with overridden("mm"):
        assert torch.mm(a, b, out=out) is out
    assert out.stride() == strides
    check(out, a, b)
    assert_as_pytorch(base[~written], before[~written], equal_nan=True, rtol=0, atol=0)
    with overridden("addmm", hits=2):
        check(torch.addmm(input, a, b, beta=2, alpha=0.5, out=out.fill_(NAN)), a, b, input, 2, 0.5)
        out.copy_(first := dense((20, 33), dtype))
        check(out.addmm_(a, b, beta=-1, alpha=3), a, b, first, -1, 3)
    assert_as_pytorch(base[~written], before[~written], equal_nan=True, rtol=0, atol=0)


def test_batches_and_vectors_in_place() -> None:
    a, b, first = dense((3, 5, 6), torch.float32), dense((3, 6, 7), torch.float32), dense((3, 5, 7), torch.float32)
    with overridden("baddbmm", hits=2):
        check(first.clone().baddbmm_(a, b, beta=0.5), a, b, first, 0.5)
        out = torch.full((3, 7, 5), NAN, device=DEVICE).mT
        check(torch.baddbmm(first, a, b, out=out), a, b, first)
    with overridden("bmm"):
        check(torch.bmm(a, b, out=out.fill_(NAN)), a, b)
    vector, kept = dense((6,), torch.float32), dense((5,), torch.float32)
    with overridden("addmv"):
        check(kept.clone().addmv_(a[0], vector, alpha=2)[:, None], a[0], vector[:, None], kept[:, None], 1, 2)


def test_a_plan_is_for_all_addresses() -> None:
    """The same shapes and strides, at multiples of 16 bytes and not."""
    with overridden("addmm", hits=3):
        for offset in (0, 1, 2):
            flat = [dense((offset + size,), torch.bfloat16)[offset:] for size in (32, 32 * 48, 48 * 32)]
            input, a, b = flat[0], flat[1].view(32, 48), flat[2].view(48, 32)
            check(torch.addmm(input, a, b), a, b, input)


def test_gradients_are_products_too() -> None:
    x, weight = dense((9, 20), torch.float32).requires_grad_(), dense((20, 11), torch.float32).requires_grad_()
    slope = dense((9, 11), torch.float32)
    with overridden("mm", hits=3):
        torch.mm(x, weight).backward(slope)
    check(x.grad, slope, weight.detach().t())
    check(weight.grad, x.detach().t(), slope)


TILINGS = (
    Tiling(128, 256, 64, 8, 3), Tiling(16, 16, 16, 4, 1), Tiling(64, 32, 128, 4, 4), Tiling(32, 128, 32, 4, 4),
)  # fmt: skip


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("shape", [(130, 40, 70), (128, 64, 64)], ids=str)
def test_every_tile_computes_the_same(
    tiling: Tiling, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "tiling_for", lambda *args: tiling)
    rows, cols, inner = shape
    input, a, b = (dense(size, torch.bfloat16) for size in ((cols,), (rows, inner), (inner, cols)))
    call = Overload(torch.ops.aten.addmm.default, ROWS["addmm"])
    check(call((input, a, b), {}), a, b, input)


def test_tiles_leave_work_for_all_and_fit_into_shared_memory() -> None:
    for rows, cols, inner in ((1, 4096, 4096), (16, 152064, 896), (128, 4096, 14336), (8192, 8192, 8192), (7, 5, 3)):
        for batch in (1, 32):
            for itemsize in (2, 4):
                for wide in (True, False):
                    tiling = default_tiling(batch, rows, cols, inner, itemsize, wide)
                    programs = batch * -(-rows // tiling.rows) * -(-cols // tiling.cols)
                    assert programs >= 128 or tiling.rows + tiling.cols <= 48
                    stage = (tiling.rows + tiling.cols) * tiling.depth * itemsize
                    assert tiling.num_stages * stage <= 160 * 1024
                    assert all(size >= 16 and size & (size - 1) == 0 for size in tiling[:3])
    assert default_tiling(1, 8192, 8192, 8192, 2) == Tiling(128, 256, 64, 8, 3)


def test_a_result_in_float32_of_operands_in_bfloat16() -> None:
    """An overload that PyTorch has a kernel for on GPUs alone."""
    a, b = dense((20, 40), torch.bfloat16), dense((40, 33), torch.bfloat16)
    got = Overload(torch.ops.aten.mm.dtype, ROWS["mm"])((a, b, torch.float32), {})
    assert got.dtype is torch.float32
    check(got, a, b)


def _meta(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")


def test_how_far_matrices_may_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """2**31 elements each; a batch of them further."""
    monkeypatch.setattr(products, "launcher", lambda build, device: None)
    row, overload = ROWS["bmm"], Overload(torch.ops.aten.bmm.default, ROWS["bmm"])
    b = _meta((3, 8, 16), (128, 16, 1))
    with pytest.raises(Refused, match="more than 2\\*\\*31 apart"):
        row.plan(overload, (_meta((3, 5, 8), (0, 2**29, 1)), b))
    far = (2**32 + 16, 8, 1)
    row.plan(overload, (_meta((3, 5, 8), far), b))
    call = Matrices(3, 5, 16, 8, far, (128, 16, 1), None, (80, 16, 1), torch.bfloat16, torch.bfloat16)
    build, _, tail = matmul_build(call, False, True)
    assert ("i64/16", far[0]) in zip(build.types[6:], tail, strict=True)


# PyTorch has no products of whole numbers on a GPU.
OTHERS = (torch.float64, torch.complex64, *((torch.int64, torch.int8) if DEVICE == "cpu" else ()))


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_dtypes_are_pytorchs(dtype: torch.dtype) -> None:
    a, b = torch.ones(3, 4, dtype=dtype, device=DEVICE), torch.ones(4, 5, dtype=dtype, device=DEVICE)
    with overridden("mm", hits=0, declined=f"it multiplies {dtype} by {dtype}"):
        assert torch.equal(torch.mm(a, b), torch.full((3, 5), 4, dtype=dtype, device=DEVICE))


def test_what_is_written_must_not_be_multiplied() -> None:
    """What comes of it is PyTorch's to say."""
    shared, other = dense((8, 6), torch.float32), dense((6, 6), torch.float32)
    square = shared[:6]
    for call in (
        lambda: square.addmm_(square, other),
        lambda: torch.addmm(other, other, square, out=square),
        lambda: torch.addmm(other, square, other, out=shared[2:]),
    ):
        with overridden("addmm", hits=0, declined="what is written shares memory with what is read"):
            call()


def test_tensors_to_write_to_of_another_shape_are_resized_by_pytorch() -> None:
    a, b, out = dense((3, 4), torch.float32), dense((4, 5), torch.float32), torch.empty(0, device=DEVICE)
    with overridden("mm", hits=0, declined="another shape"):
        check(torch.mm(a, b, out=out), a, b)


def test_gpus_with_less_shared_memory_have_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(build: Any, device: int) -> Any:
        raise OutOfResources(147456, 101376, "shared memory")

    monkeypatch.setattr(products, "launcher", too_large)
    call = Overload(torch.ops.aten.mm.default, ROWS["mm"])
    with pytest.raises(Refused, match=r"too large for this GPU.*147456"):
        call((dense((3, 4), torch.float32), dense((4, 5), torch.float32)), {})


def test_factors_that_are_no_float32() -> None:
    input, a, b = dense((5,), torch.float32), dense((3, 4), torch.float32), dense((4, 5), torch.float32)
    with overridden("addmm", hits=0, declined="1e+39 is no float32"), pytest.raises(RuntimeError, match="overflow"):
        torch.addmm(input, a, b, alpha=1e39)


def test_errors_are_pytorchs() -> None:
    a, b = dense((3, 4), torch.float32), dense((5, 6), torch.float32)
    other, neither = dense((4, 6), torch.bfloat16), "PyTorch does not do it either"
    with overridden("mm", hits=0, declined=neither), pytest.raises(RuntimeError, match="shapes"):
        torch.mm(a, b)
    with overridden("mm", hits=0, declined="by torch.bfloat16"), pytest.raises(RuntimeError, match="dtype"):
        torch.mm(a, other)


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_where_tf32_is_allowed_float32_is_pytorchs(precision: None) -> None:
    """Asked at each call; bfloat16 has nothing to do with it."""
    a, b = dense((3, 4), torch.float32), dense((4, 5), torch.float32)
    with overridden("mm", hits=2):
        torch.mm(a, b)
        torch.set_float32_matmul_precision("high")
        torch.mm(a.bfloat16(), b.bfloat16())
    with overridden("mm", hits=0, declined="multiply float32 in TF32"):
        torch.mm(a, b)
    torch.backends.cuda.matmul.allow_tf32 = False
    with overridden("mm"):
        check(torch.mm(a, b), a, b)
