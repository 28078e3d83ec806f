"""The corrected interpreter against PyTorch: bit for bit, or within a tolerance that the test states."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as shipped

from vllm_gems import interpreter

interpreter.install()

# numpy remarks on the overflows and NaNs that are tried here on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NARROW = [BF16, FP16, E4M3, E5M2]
HALVES = [BF16, FP16]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, except that any NaN equals any other."""
    assert actual.dtype == expected.dtype
    nan = expected.double().isnan()
    assert torch.equal(actual.double().isnan(), nan)
    bits = BITS[actual.element_size()]
    assert torch.equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def every(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a type of 8 or 16 bits, NaNs, infinities and subnormals included."""
    size = torch.finfo(dtype).bits
    return torch.arange(-(2 ** (size - 1)), 2 ** (size - 1), dtype=torch.int32).to(BITS[size // 8]).view(dtype)


def around_ties() -> torch.Tensor:
    """Every bf16 as fp32, the value half-way to the next one, and the two beside that: all ties of fp8 are in it."""
    top = every(BF16).view(torch.int16).to(torch.int32) << 16
    return torch.stack([top | low for low in (0, 0x7FFF, 0x8000, 0x8001)]).flatten().view(FP32)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Through fp32, which holds all narrower floats; saturating to fp8, which PyTorch does in some releases only."""
    wide = x.float()
    return (wide.clamp(-LARGEST[dtype], LARGEST[dtype]) if dtype in LARGEST else wide).to(dtype)


def normal(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> torch.Tensor:
    return cast(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dtype)


@triton.jit
def _cast(src, dst, ROUNDING: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(dst + offsets, tl.load(src + offsets).to(dst.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def run_cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, out, rounding, x.numel())
    return out


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_fp32_rounds_to_nearest_even_and_fp8_saturates(dtype):
    x = around_ties()
    assert_same(run_cast(x, dtype), cast(x, dtype))


@pytest.mark.parametrize("source", NARROW, ids=str)
@pytest.mark.parametrize("target", [*NARROW, FP32, FP64], ids=str)
def test_narrow_casts(source, target):
    if source in LARGEST and target in LARGEST and source != target:
        pytest.skip("no GPU casts one fp8 to the other")
    x = every(source)
    expected = x if source == target else x.double() if target == FP64 else cast(x, target)
    assert_same(run_cast(x, target), expected)


def test_ties_go_to_even():
    # bf16 keeps 8 significant bits, e4m3 has steps of 2 from 16 on
    x = torch.tensor([257.0, 259.0, 17.0, 19.0])
    assert run_cast(x, BF16).tolist() == [256.0, 260.0, 17.0, 19.0]
    assert run_cast(x, E4M3).tolist() == [256.0, 256.0, 16.0, 20.0]


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_fp8_overflow_saturates(dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([LARGEST[dtype] * 1.01, 1e30, inf, nan, -LARGEST[dtype] * 1.01, -1e30, -inf, 0.0])
    out = run_cast(x, dtype).double()
    assert out[3].isnan()
    assert out[[0, 1, 2]].tolist() == [LARGEST[dtype]] * 3
    assert out[[4, 5, 6, 7]].tolist() == [-LARGEST[dtype]] * 3 + [0.0]


def test_fp64_is_rounded_once():
    # just above a tie: rounded to fp32 first, it would be the tie itself and go down
    x = torch.tensor([1 + 2**-8 + 2**-40, -1 - 2**-8 - 2**-40, 1 + 2**-8, 1e300], dtype=FP64)
    assert run_cast(x, BF16).tolist() == [1 + 2**-7, -1 - 2**-7, 1.0, float("inf")]
    x = torch.tensor([1 + 2**-4 + 2**-40, 1e300], dtype=FP64)
    assert run_cast(x, E4M3).tolist() == [1 + 2**-3, 448.0]


def test_integers_and_booleans():
    # 2**24 + 2**16 is a tie of bf16, and 2**24 + 2**16 + 1 needs 25 bits
    x = torch.tensor([0, -1, 255, 257, 2**24 + 2**16, 2**24 + 2**16 + 1, -(2**31), 7], dtype=torch.int32)
    assert run_cast(x, BF16).tolist() == [0, -1, 255, 256, 2**24, 2**24 + 2**17, -(2**31), 7]
    halves = torch.tensor([0.0, -1.75, 1.75, 100.0], dtype=BF16)
    assert run_cast(halves, torch.int32).tolist() == [0, -1, 1, 100]
    assert run_cast(torch.tensor([True, False]), BF16).tolist() == [1.0, 0.0]


def test_rounding_toward_zero():
    x = around_ties()
    x = x[x.isfinite()]
    x = x[: 2 ** (x.numel().bit_length() - 1)]
    assert_same(run_cast(x, BF16, "rtz"), (x.view(torch.int32) >> 16).to(torch.int16).view(BF16))
    x = torch.tensor([65519.0, 1e9, -1e9, 1 + 2**-10 + 2**-11, -1 - 2**-10 - 2**-11, 2.0**-25, float("inf"), 3.0])
    expected = [65504.0, 65504.0, -65504.0, 1 + 2**-10, -1 - 2**-10, 0.0, float("inf"), 3.0]
    assert run_cast(x, FP16, "rtz").tolist() == expected


@triton.jit
def _through_fp8e4b15(src, bits, dst, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(src + offsets).to(tl.float8e4b15)
    tl.store(bits + offsets, x.to(tl.uint8, bitcast=True))
    tl.store(dst + offsets, x.to(tl.float16))


def test_the_fp8_that_ml_dtypes_lacks_stays_as_shipped():
    x = torch.tensor([1.5, -0.25, 0.0, 1.0], dtype=FP16)
    bits, out = torch.empty(4, dtype=torch.uint8), torch.empty_like(x)
    _through_fp8e4b15[(1,)](x, bits, out, 4)
    assert bits.tolist() == [0x7C, 0xE8, 0x00, 0x78]  # a bias of 15 and three bits of mantissa
    assert_same(out, x)


@triton.jit
def _masked_copy(src, dst, stride, limit, other, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(dst + offsets * stride, tl.load(src + offsets * stride, mask=offsets < limit, other=other), offsets != 1)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_masked_strided_load_and_store(dtype):
    x = every(dtype)[:64]
    out = torch.zeros(64, dtype=FP32).to(dtype)
    _masked_copy[(1,)](x, out, 2, 20, 0.0, 32)
    expected = torch.zeros(64, dtype=FP32).to(dtype)
    expected[0:40:2] = x[0:40:2]
    expected[2] = 0.0
    assert_same(out, expected)


def test_masked_load_fills_with_a_bf16():
    x, out = torch.ones(8, dtype=BF16), torch.zeros(8, dtype=BF16)
    _masked_copy[(1,)](x, out, 1, 4, 1.00390625, 8)  # a tie of bf16
    assert out.tolist() == [1.0, 0.0] + [1.0] * 6
    _masked_copy[(1,)](x, out, 1, 4, 0.3, 8)
    assert out[4:].tolist() == torch.tensor(0.3, dtype=BF16).repeat(4).tolist()


@triton.jit
def _store_fp32(src, dst, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(dst + offsets, tl.load(src + offsets).to(tl.float32))


def test_a_store_rounds():
    x, out = around_ties(), torch.empty(4 * 65536, dtype=BF16)
    _store_fp32[(1,)](x, out, x.numel())
    assert_same(out, x.to(BF16))


@triton.jit
def _binary(left, right, dst, OP: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x, y = tl.load(left + offsets), tl.load(right + offsets)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = (x / y).to(x.dtype)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "maximum_nan":
        z = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        z = tl.clamp(x, tl.minimum(y, 0.5), tl.maximum(y, 0.5))
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "scale":
        z = x * 0.3 + 1
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "neg":
        z = -x
    elif OP == "greater":
        z = (x.to(tl.float32) > y).to(x.dtype)
    else:
        tl.static_assert(False)
    tl.store(dst + offsets, z)


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every value of the type, with one that is random, or NaN, infinite or zero."""
    x, y = every(dtype), normal(65536, dtype=dtype) * 8
    y[::7], y[1::7], y[2::7] = float("nan"), float("inf"), 0.0
    return x, y


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "where": lambda x, y: torch.where(x < y, x, y),
    "scale": lambda x, y: x * torch.tensor(0.3, dtype=x.dtype) + torch.ones((), dtype=x.dtype),
    "abs": lambda x, y: x.abs(),
    "greater": lambda x, y: (x > y).to(x.dtype),
    "maximum_nan": torch.maximum,
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic(name, dtype):
    x, y = pairs(dtype)
    out = torch.empty_like(x)
    _binary[(1,)](x, y, out, name, x.numel())
    assert_same(out, BINARY[name](x, y))


@pytest.mark.parametrize("dtype", [*HALVES, FP32], ids=str)
@pytest.mark.parametrize(("name", "reference"), [("maximum", torch.maximum), ("minimum", torch.minimum)])
def test_a_number_wins_against_nan(name, reference, dtype):
    x, y = (t.to(dtype) for t in pairs(BF16))
    out = torch.empty_like(x)
    _binary[(1,)](x, y, out, name, x.numel())
    # not torch.fmax, which lets a signalling NaN win
    expected = torch.where(x.isnan(), y, torch.where(y.isnan(), x, reference(x, y)))
    assert_same(out + 0.0, expected + 0.0)  # which zero wins is left open


def test_clamp_of_nan_is_a_bound():
    x, y = torch.tensor([float("nan"), -3.0, 0.75, 9.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])
    out = torch.empty_like(x)
    _binary[(1,)](x, y, out, "clamp", 4)
    assert out.tolist() == [0.5, 0.5, 0.75, 2.0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_negation(dtype):
    x = every(dtype)
    x = torch.where(x == 0, torch.ones_like(x), x)  # the sign of -(+0.0) differs between Triton releases
    out = torch.empty_like(x)
    _binary[(1,)](x, x, out, "neg", x.numel())
    assert_same(out, -x)


@triton.jit
def _fma(a, b, c, dst, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(dst + offsets, tl.fma(tl.load(a + offsets), tl.load(b + offsets), tl.load(c + offsets)))


def run_fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _fma[(1,)](x, y, z, out, x.numel())
    return out


@pytest.mark.parametrize(("dtype", "half"), [(FP32, 12), (BF16, 4)], ids=str)
def test_fma_rounds_once(dtype, half):
    # (1 + h)^2 = 1 + 2h + h^2, and h^2 is half a unit in the last place of 1
    h = 2.0**-half
    tie = 1 + 2 * h
    x = torch.full((4,), 1 + h, dtype=dtype)
    z = torch.tensor([-tie, 2.0**-100, -(2.0**-100), 0.0], dtype=dtype)
    assert run_fma(x, x, z).tolist() == [h * h, tie + 2 * h * h, tie, tie]


def test_fp16_fma_rounds_once():
    # (1 + 2^-6)(1 + 2^-5) = 1 + 2^-5 + 2^-6 + 2^-11, the last half a unit in the last place of 1
    x, y = (torch.full((4,), 1 + 2.0**-k, dtype=FP16) for k in (6, 5))
    tie = 1 + 2.0**-5 + 2.0**-6
    z = torch.tensor([-tie, 2.0**-24, -(2.0**-24), 0.0], dtype=FP16)
    assert run_fma(x, y, z).tolist() == [2.0**-11, tie + 2.0**-10, tie, tie]


@pytest.mark.parametrize("dtype", [*HALVES, FP32], ids=str)
def test_fma_of_many_values(dtype):
    x, y, z = (normal(4096, dtype=dtype, seed=seed) for seed in range(3))
    x[0], y[1], z[2] = float("inf"), float("nan"), float("-inf")
    expected = (x.double() * y.double() + z.double()).float().to(dtype)  # rounded twice: may be one unit off
    out = run_fma(x, y, z)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
    assert (out != expected).sum() <= 4 + 1  # and a NaN, which differs from itself


@triton.jit
def _reduce(src, dst, OP: tl.constexpr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(src + rows * N + columns)
    if OP == "sum":
        y = tl.sum(x, axis=AXIS, keep_dims=True)
    elif OP == "max":
        y = tl.max(x, axis=AXIS, keep_dims=True)
    elif OP == "min":
        y = tl.min(x, axis=AXIS, keep_dims=True)
    elif OP == "cumsum":
        y = tl.cumsum(x, axis=AXIS)
    else:
        y = tl.reduce(x, AXIS, _product, keep_dims=True)
    tl.store(dst + tl.zeros([M, N], tl.int32) + rows * N + columns, tl.broadcast_to(y, [M, N]).to(dst.dtype.element_ty))


@triton.jit
def _product(a, b):
    return a * b


def run_reduce(x: torch.Tensor, name: str, axis: int) -> torch.Tensor:
    out = torch.empty_like(x)
    _reduce[(1,)](x, out, name, axis, *x.shape)
    return out


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_sums(dtype, axis):
    shape = (2048, 2) if axis == 0 else (2, 2048)
    assert run_reduce(torch.ones(shape, dtype=dtype), "sum", axis).unique().tolist() == [2048.0]
    x = normal(*shape, dtype=dtype)
    expected = x.double().sum(axis, keepdim=True).expand(shape)
    # fp32 keeps the sum of 2048 values of about 1 to 1e-4; then half a unit of the result
    out = run_reduce(x, "sum", axis).double()
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps / 2, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cumulative_sum(dtype):
    out = run_reduce(torch.ones(1, 512, dtype=dtype), "cumsum", 1)
    assert_same(out, torch.arange(1, 513).to(dtype)[None])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("name", "reference"), [("max", torch.amax), ("min", torch.amin)])
@pytest.mark.parametrize("axis", [0, 1])
def test_extremes(name, reference, dtype, axis):
    x = normal(64, 32, dtype=dtype)
    assert_same(run_reduce(x, name, axis), reference(x, axis, keepdim=True).expand(x.shape).contiguous())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_reduction_of_ones_own_rounds_at_each_step(dtype):
    x = normal(8, 4, dtype=dtype) + 1
    expected = x[:, 0]
    for column in x.unbind(1)[1:]:
        expected = expected * column
    assert_same(run_reduce(x, "product", 1), expected[:, None].expand(x.shape).contiguous())


@triton.jit
def _affine(a, b, c, d):
    """First a * x + b, then c * x + d: what comes out depends on the order."""
    return a * c, b * c + d


@triton.jit
def _compose(src, dst, AXIS: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(src + at)
    _, each = tl.associative_scan((x, x - 2), AXIS, _affine)
    tl.store(dst + at, each)
    _, last = tl.reduce((x, x - 2), AXIS, _affine, keep_dims=True)
    tl.store(dst + N * N + at, tl.broadcast_to(last, [N, N]))
    _, whole = tl.reduce((x, x - 2), None, _affine)
    tl.store(dst + 2 * N * N + at, tl.full([N, N], whole, tl.int64))


@pytest.mark.parametrize("axis", [0, 1])
def test_several_tensors_are_combined_in_order(axis):
    """By a function of the kernel's own: running, at last, and along no axis, which is row by row."""
    x = torch.randint(-3, 4, (4, 4))

    def composed(numbers: list[int]) -> list[int]:
        factor, offset, found = 1, 0, []
        for each in numbers:
            factor, offset = factor * each, offset * each + each - 2
            found.append(offset)
        return found

    out = torch.zeros(3, 4, 4, dtype=torch.int64)
    _compose[(1,)](x, out, axis, 4)
    running = torch.stack([torch.tensor(composed(row.tolist())) for row in x.unbind(1 - axis)], 1 - axis)
    assert_same(out[0], running)
    assert_same(out[1], running.select(axis, 3).unsqueeze(axis).expand(4, 4).contiguous())
    assert out[2].unique().tolist() == composed(x.flatten().tolist())[-1:]


@triton.jit
def _dot(a, b, dst, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    out = m[:, None] * N + n[None, :]
    tl.store(dst + out, tl.dot(x, y, acc=tl.load(dst + out), out_dtype=OUT))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_dot_accumulates_in_fp32(dtype):
    a, b = normal(16, 512, dtype=dtype), normal(512, 16, dtype=dtype, seed=1)
    out = normal(16, 16, seed=2)
    expected = a.double() @ b.double() + out.double()
    _dot[(1,)](a, b, out, 16, 16, 512, tl.float32)
    # 512 products of about 1, each sum rounded to 24 bits; a bf16 or fp16 sum would be off by 1e-2 or more
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)


def test_dot_into_fp16_rounds_at_the_end():
    a, b = torch.ones(16, 2048, dtype=FP16), torch.ones(2048, 16, dtype=FP16)
    b[0] = 2.0
    out = torch.ones(16, 16, dtype=FP16)
    _dot[(1,)](a, b, out, 16, 16, 2048, tl.float16)
    assert out.unique().tolist() == [2050.0]  # the product alone is 2049, which fp16 makes 2048


def test_integer_dot_stays_exact():
    a = torch.arange(-128, 128, dtype=torch.int8).reshape(16, 16)
    out = torch.zeros(16, 16, dtype=torch.int32)
    _dot[(1,)](a, a, out, 16, 16, 16, tl.int32)
    assert torch.equal(out, (a.int() @ a.int()))


@triton.jit
def _dot_scaled(a, scale, b, dst, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    groups = tl.arange(0, K // 32)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    scales = tl.load(scale + m[:, None] * (K // 32) + groups[None, :])
    tl.store(dst + m[:, None] * N + n[None, :], tl.dot_scaled(x, scales, "e4m3", y, None, "e4m3"))


@pytest.mark.skipif(
    not hasattr(shipped.InterpreterBuilder, "create_dot_scaled"), reason="this Triton cannot interpret tl.dot_scaled"
)
def test_scaled_dot():
    a, b = normal(16, 64, dtype=E4M3), normal(64, 16, dtype=E4M3, seed=1)
    scale = torch.randint(124, 131, (16, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = torch.empty(16, 16)
    _dot_scaled[(1,)](a, scale, b, out, 16, 16, 64)
    factors = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
    torch.testing.assert_close(out.double(), (a.double() * factors) @ b.double(), rtol=1e-5, atol=1e-4)


@triton.jit
def _unary(src, dst, OP: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(src + offsets).to(tl.float32)
    if OP == "exp":
        y = tl.exp(x)
    elif OP == "erf":
        y = tl.erf(x)
    elif OP == "sigmoid":
        y = tl.sigmoid(x)
    elif OP == "rsqrt":
        y = tl.rsqrt(x)
    elif OP == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(False)
    tl.store(dst + offsets, y.to(dst.dtype.element_ty))


UNARY = {
    "exp": torch.exp,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "rsqrt": torch.rsqrt,
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("dtype", [*NARROW, FP32], ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_functions(name, dtype):
    x = normal(1024, dtype=dtype)
    if name == "rsqrt":
        x = cast(x.float().abs() + 0.1, dtype)
    out = torch.empty_like(x)
    _unary[(1,)](x, out, name, 1024)
    # fp32 is right to two or three units, which rounding to a narrower type turns into one of its own at most
    unit = 4 * torch.finfo(dtype).eps if dtype == FP32 else torch.finfo(dtype).eps
    expected = cast(UNARY[name](x.double()), dtype)
    torch.testing.assert_close(out.double(), expected.double(), rtol=unit, atol=0)
    assert (out.double() == expected.double()).double().mean() > (0.5 if dtype == FP32 else 0.99)


@triton.jit
def _exp_unwidened(src, dst):
    tl.store(dst, tl.exp(tl.load(src)))


def test_what_a_gpu_refuses_is_refused():
    x = torch.ones(1, dtype=BF16)
    with pytest.raises(Exception, match="Expected dtype"):
        _exp_unwidened[(1,)](x, x)


@triton.jit
def _shapes(src, dst, OP: tl.constexpr):
    flat = tl.arange(0, 64)
    x = tl.load(src + flat)
    if OP == "trans":
        x = tl.trans(tl.reshape(x, [4, 16]))
    elif OP == "permute":
        x = tl.permute(tl.reshape(x, [2, 8, 4]), [2, 0, 1])
    elif OP == "split":
        even, odd = tl.split(tl.reshape(x, [32, 2]))
        x = tl.join(odd, even)
    elif OP == "add":
        x = tl.reshape(x, [8, 8]) + tl.zeros([8, 8], x.dtype)
    elif OP == "bits":
        x = (x.to(tl.int16, bitcast=True) ^ -32768).to(x.dtype, bitcast=True)
    elif OP == "flip":
        x = tl.flip(x, 0)
    tl.store(dst + flat, tl.reshape(x, [64]))


SHAPES = {
    "trans": lambda x: x.reshape(4, 16).t(),
    "permute": lambda x: x.reshape(2, 8, 4).permute(2, 0, 1),
    "split": lambda x: x.reshape(32, 2).flip(1),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype):
    x = every(dtype)[-64:]
    out = torch.empty_like(x)
    _shapes[(1,)](x, out, name)
    bits = BITS[x.element_size()]
    assert torch.equal(out.view(bits), SHAPES[name](x.view(bits)).flatten())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("name", "reference"), [("add", torch.clone), ("bits", torch.neg), ("flip", torch.flipud)])
def test_shapes_of_halves(name, reference, dtype):
    x = normal(64, dtype=dtype)
    out = torch.empty_like(x)
    _shapes[(1,)](x, out, name)
    assert_same(out, reference(x))


@triton.jit
def _constants(dst, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(dst + offsets, tl.full([N], 0.3, dst.dtype.element_ty))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_constants_round(dtype):
    out = torch.empty(4, dtype=dtype)
    _constants[(1,)](out, 4)
    assert_same(out, torch.full((4,), 0.3, dtype=dtype))


@triton.jit
def _atomic_add(src, dst, out, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out + offsets, tl.atomic_add(dst + offsets // 2, tl.load(src + offsets), mask=offsets < N - 1))


def test_atomic_add_of_bf16():
    x = torch.tensor([1.0, 2.0, 0.3, 5.0], dtype=BF16)
    total, before = torch.tensor([0.5, 1.0], dtype=BF16), torch.empty(4, dtype=BF16)
    _atomic_add[(1,)](x, total, before, 4)
    assert total.tolist() == [3.5, (x[2] + 1).item()]  # two additions to one address; the last is masked
    assert before[:3].tolist() == [0.5, 1.5, 1.0]


@triton.jit
def _atomic_cas(dst, compare, value, out):
    tl.store(out, tl.atomic_cas(dst, tl.load(compare), tl.load(value)))


def test_atomic_cas_of_bf16():
    place, before = torch.tensor([0.3], dtype=BF16), torch.empty(1, dtype=BF16)
    _atomic_cas[(1,)](place, torch.tensor([0.3], dtype=BF16), torch.tensor([0.7], dtype=BF16), before)
    assert place.item() == torch.tensor(0.7, dtype=BF16).item()
    assert before.item() == torch.tensor(0.3, dtype=BF16).item()


@triton.jit
def _descriptor(src, dst, M: tl.constexpr, N: tl.constexpr):
    source = tl.make_tensor_descriptor(src, [M - 1, N], [N, 1], [M, N])
    target = tl.make_tensor_descriptor(dst, [M, N], [N, 1], [M, N])
    target.store([0, 0], source.load([0, 0]) * 2)


def test_tensor_descriptor_of_bf16():
    x, out = normal(8, 16, dtype=BF16), torch.ones(8, 16, dtype=BF16)
    _descriptor[(1,)](x, out, 8, 16)
    expected = x * 2
    expected[-1] = 0
    assert_same(out, expected)


@triton.jit
def _rms_norm(x, weight, out, eps, N: tl.constexpr):
    offsets = tl.arange(0, N)
    row = tl.program_id(0) * N
    values = tl.load(x + row + offsets).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / N + eps)
    tl.store(out + row + offsets, (values * scale).to(x.dtype.element_ty) * tl.load(weight + offsets))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_whole_kernel(dtype):
    x, weight = normal(4, 256, dtype=dtype), normal(256, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    _rms_norm[(4,)](x, weight, out, 1e-6, 256)
    wide = x.double()
    normed = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6)).to(dtype)
    # equal except where fp32 lands on the other side of a tie
    torch.testing.assert_close(out, normed * weight, rtol=torch.finfo(dtype).eps * 2, atol=0)
    assert (out == normed * weight).double().mean() > 0.99


@triton.jit
def _libdevice(left, right, dst, OP: tl.constexpr, ARITY: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x, y = tl.load(left + offsets), tl.load(right + offsets)
    if ARITY == 1:
        z = getattr(libdevice, OP)(x)
    elif ARITY == 2:
        z = getattr(libdevice, OP)(x, y)
    else:
        z = getattr(libdevice, OP)(x, x, y)
    tl.store(dst + offsets, z.to(dst.dtype.element_ty))


def round_half_away(x: torch.Tensor) -> torch.Tensor:
    return torch.copysign((x.abs() + 0.5).floor(), x)  # exact enough in fp64 for what is tried here


ONE = {
    "abs": torch.abs,
    "acos": torch.acos,
    "acosh": torch.acosh,
    "asin": torch.asin,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "cbrt": lambda x: x.sign() * x.abs() ** (1 / 3),
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "exp": torch.exp,
    "exp10": lambda x: 10**x,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "floor": torch.floor,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "llrint": torch.round,
    "llround": round_half_away,
    "log": torch.log,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "nearbyint": torch.round,
    "rcp_rn": torch.reciprocal,
    "rint": torch.round,
    "round": round_half_away,
    "rsqrt": torch.rsqrt,
    "signbit": torch.signbit,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "sqrt_rn": torch.sqrt,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "trunc": torch.trunc,
}
TWO = {
    "add_rn": torch.add,
    "atan2": torch.atan2,
    "copysign": torch.copysign,
    "div_rn": torch.div,
    "fmod": torch.fmod,
    "hypot": torch.hypot,
    "mul_rn": torch.mul,
    "pow": torch.pow,
    "sub_rn": torch.sub,
}
ONE_FP32 = {f"fast_{name}f": ONE[name] for name in ("cos", "exp", "exp10", "log", "log10", "log2", "sin", "tan")}
ONE_FP32 |= {"rsqrt_rn": torch.rsqrt, "finitef": torch.isfinite}
TWO_FP32 = {"fast_dividef": torch.div, "fast_powf": torch.pow}
THREE_FP32 = {"fma": lambda x, y, z: x * y + z, "fma_rn": lambda x, y, z: x * y + z}
LIBDEVICE = [(name, arity, FP32, f) for arity, table in enumerate([ONE, TWO], 1) for name, f in table.items()]
LIBDEVICE += [(name, arity, FP64, f) for name, arity, _, f in LIBDEVICE] + [("isfinited", 1, FP64, torch.isfinite)]
LIBDEVICE += [
    (name, arity, FP32, f)
    for arity, table in enumerate([ONE_FP32, TWO_FP32, THREE_FP32], 1)
    for name, f in table.items()
]


@pytest.mark.parametrize(("name", "arity", "dtype", "reference"), LIBDEVICE, ids=lambda value: str(value)[:16])
def test_libdevice(name, arity, dtype, reference):
    x, y = (normal(256, seed=seed).to(dtype) * 2 for seed in range(2))
    x[:8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.0, -0.0, 0.49999997])
    if not name.startswith("ll"):  # no integer is NaN
        x[8:11] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    out = torch.empty_like(x)
    _libdevice[(1,)](x, y, out, name, arity, 256)
    arguments = (x, x, y) if arity == 3 else (x, y)[:arity]
    expected = reference(*(argument.double() for argument in arguments)).to(dtype)
    # computed in fp64, then rounded: one unit of fp32, or what two fp64 libraries differ by
    torch.testing.assert_close(out, expected, rtol=1.2e-7 if dtype == FP32 else 1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_libdevice_of_integers(dtype):
    x = torch.arange(-8, 8, dtype=dtype)
    out = torch.empty_like(x)
    _libdevice[(1,)](x, x, out, "abs", 1, 16)
    assert torch.equal(out, x.abs())
    base = normal(16)
    powers = torch.empty(16)
    _libdevice[(1,)](base, x.int(), powers, "pow", 2, 16)
    torch.testing.assert_close(powers, (base.double() ** x).float(), rtol=1.2e-7, atol=0)


def test_libdevice_refuses_what_the_compiler_does():
    x = torch.ones(4, dtype=BF16)
    with pytest.raises(Exception, match=r"bfloat16|bf16"):
        _libdevice[(1,)](x, x, x, "tanh", 1, 4)


def test_libdevice_names_what_it_lacks():
    x = torch.ones(4)
    with pytest.raises(Exception, match="__nv_j0f has no numpy counterpart"):
        _libdevice[(1,)](x, x, x, "j0", 1, 4)


@triton.jit
def _imported_from_the_backend(src, dst):
    tl.store(dst, cuda_libdevice.tanh(tl.load(src)))


def test_libdevice_of_the_backend():
    x = torch.tensor([0.5])
    _imported_from_the_backend[(1,)](x, x)
    assert x.item() == pytest.approx(math.tanh(0.5), rel=1e-7)


@triton.autotune(configs=[triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64})], key=["n"], restore_value=["x"])
@triton.jit
def _increment(x, runs, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(x + offsets, tl.load(x + offsets, mask=offsets < n) + 1, mask=offsets < n)
    tl.store(runs, tl.load(runs) + BLOCK)


def test_autotune_runs_every_configuration():
    x, runs = torch.zeros(40, dtype=BF16), torch.zeros(1, dtype=torch.int32)
    _increment[(1,)](x, runs, 40)
    assert x.unique().tolist() == [1.0]
    assert runs.item() == 16 + 64 + 16  # both on trial, and the first to keep
    assert _increment.best_config.kwargs == {"BLOCK": 16}


def test_installing_again_changes_nothing():
    before = {name: value for name, value in vars(shipped).items() if not name.startswith("__")}
    builder, exp = type(shipped.interpreter_builder), libdevice.exp
    interpreter.install()
    assert {name: value for name, value in vars(shipped).items() if not name.startswith("__")} == before
    assert type(shipped.interpreter_builder) is builder
    assert libdevice.exp is exp


@pytest.fixture
def uninstalled(monkeypatch):
    """A process that looks as if nothing had been installed; what a failing install() changed shows."""
    monkeypatch.setattr(shipped, "_interpreter", shipped._interpreter._native)
    yield
    assert not isinstance(shipped._interpreter, interpreter._Memory)


@pytest.mark.usefixtures("uninstalled")
def test_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="pip install ml_dtypes") as error:
        interpreter.install()
    assert isinstance(error.value, interpreter.MissingMlDtypesError)


@pytest.mark.usefixtures("uninstalled")
def test_an_unknown_triton(monkeypatch):
    monkeypatch.delattr(shipped.ReduceOps, "sum")
    with pytest.raises(interpreter.InterpreterDriftError, match=r"has no triton\.runtime\.interpreter\.ReduceOps\.sum"):
        interpreter.install()


def test_too_late():
    code = (
        "import os, triton.language; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from vllm_gems import interpreter\n"
        "try: interpreter.install()\n"
        "except interpreter.NotInterpretedError as error: print(error)\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "before the first import of triton" in done.stdout
