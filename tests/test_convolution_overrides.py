"""Overrides of PyTorch's convolution: values against float64, formats as PyTorch's; what is declined, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from test_matmul_overrides import DEVICE, DTYPES, NAN, dense, gapped, misaligned, overridden
from tolerances import absolute, assert_close
from torch.nn import functional
from torch.testing import assert_close as assert_as_pytorch
from triton.runtime.errors import OutOfResources

from vllm_gems.aten import convolution
from vllm_gems.aten.convolution import Convolution
from vllm_gems.aten.overloads import Overload
from vllm_gems.errors import Refused
from vllm_gems.kernels import convolution as kernel
from vllm_gems.kernels.matmul import Tiling
from vllm_gems.patches import aten

(ROW,) = (row for row in aten.ROWS if isinstance(row, Convolution))

Pair = tuple[int, int]


class Case(NamedTuple):
    """Sizes of a convolution of images; of the first row of them, it is one of signals."""

    images: int = 2
    channels: int = 3
    size: Pair = (9, 11)
    filters: int = 5
    kernel: Pair = (3, 2)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def tensors(self, dtype: torch.dtype, make: Any = dense) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape, weight = (self.images, self.channels, *self.size), (self.filters, self.channels, *self.kernel)
        return make(shape, dtype), make(weight, dtype), make((self.filters,), dtype)

    @property
    def arguments(self) -> tuple[Pair, Pair, Pair]:
        return self.stride, self.padding, self.dilation


CASES = {
    "plain": Case(),
    "padded": Case(padding=(1, 2)),
    "padded in one direction": Case(padding=(0, 1)),
    "strides": Case(stride=(2, 3), padding=(1, 1)),
    "dilated": Case(size=(13, 10), dilation=(3, 2), padding=(2, 1)),
    "everything": Case(3, 7, (12, 9), 18, (2, 4), (3, 1), (1, 3), (1, 2)),
    "1x1": Case(channels=19, filters=18, kernel=(1, 1)),
    "1x1 with strides": Case(kernel=(1, 1), stride=(2, 3), padding=(1, 0)),
    "patches": Case(1, 3, (28, 42), 10, (14, 14), (14, 14)),
    "one window": Case(2, 16, (3, 3), 17, (3, 3)),
    "the image is in the padding": Case(1, 1, (1, 1), 1, (3, 3), padding=(2, 1)),
}


def in_format(tensor: torch.Tensor, last: bool) -> torch.Tensor:
    return tensor.to(memory_format=torch.channels_last) if last else tensor


def check(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, case: Case) -> None:
    """Against the product of unfolded windows in float64."""
    if x.dim() == 3:
        got, x, weight = (each.unsqueeze(2) for each in (got, x, weight))
    stride, padding, dilation = case.arguments
    windows = functional.unfold(x.detach(), weight.shape[2:], dilation, padding, stride).mT
    filters = weight.detach().flatten(1).t()
    expected = windows.double() @ filters.double() + (0 if bias is None else bias.detach().double())
    inputs = {"a": windows, "b": filters, "input": bias, "alpha": 1, "beta": 0 if bias is None else 1}
    assert_close(got.flatten(2).mT, expected, "convolution", absolute("matmul", inputs, got.dtype))


def as_signals(case: Case, *tensors: torch.Tensor) -> tuple[Case, tuple[torch.Tensor, ...]]:
    """Of the first rows."""
    one = case._replace(
        size=(1, case.size[1]),
        kernel=(1, case.kernel[1]),
        stride=(1, case.stride[1]),
        padding=(0, case.padding[1]),
        dilation=(1, case.dilation[1]),
    )
    return one, tuple(each[:, :, 0] for each in tensors)


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    """Seeded, and with PyTorch's sums of products in float32, as ours are."""
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        *(("everything", dtype) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_images(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x, weight, bias = case.tensors(dtype)
    for last in (False, True):
        given = in_format(x, last), in_format(weight, last), None if last else bias
        with overridden("convolution"):
            got = functional.conv2d(*given, *case.arguments)
        check(got, *given, case)
        assert got.stride() == functional.conv2d(*given, *case.arguments).stride()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_signals(case: Case) -> None:
    x, weight, bias = case.tensors(torch.float32)
    one, (x, weight) = as_signals(case, x, weight)
    arguments = [each[1] for each in one.arguments]
    with overridden("convolution"):
        got = functional.conv1d(x, weight, bias, *arguments)
    check(got, x, weight, bias, one)
    assert got.stride() == functional.conv1d(x, weight, bias, *arguments).stride()


@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_results_are_in_the_format_that_pytorch_gives_them(channels: int, last: bool, weight_last: bool) -> None:
    """Which of both decides is not the same for signals, nor with one channel."""
    case = Case(channels=channels)
    x, weight, _ = case.tensors(torch.float32)
    x, weight = in_format(x, last), in_format(weight, weight_last)
    with overridden("convolution", hits=5):
        got = functional.conv2d(x, weight)
        check(got, x, weight, None, case)
        cut = functional.conv2d(x[:, :, ::2], weight)
        one, (signals, filters) = as_signals(case, x, weight)
        signal = functional.conv1d(signals, filters)
        check(signal, signals, filters, None, one)
        swapped = functional.conv1d(in_format(x, not last)[:, :, 0], filters)
        single = functional.conv1d(signals[:1], filters)
    for mine, other in (
        (got, functional.conv2d(x, weight)),
        (cut, functional.conv2d(x[:, :, ::2], weight)),
        (signal, functional.conv1d(signals, filters)),
        (swapped, functional.conv1d(in_format(x, not last)[:, :, 0], filters)),
        (single, functional.conv1d(signals[:1], filters)),
    ):
        assert_as_pytorch(mine, other, check_stride=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "dtype"), [(gapped, torch.float32), (misaligned, torch.bfloat16)], ids=["gapped", "misaligned"]
)
def test_tensors_are_read_where_they_lie(layout: Any, dtype: torch.dtype) -> None:
    """Weights and biases too, whose elements need not be beside each other; and what is repeated."""
    case = CASES["everything"]
    x, weight, bias = case.tensors(dtype, layout)
    with overridden("convolution"):
        check(functional.conv2d(x, weight, bias, *case.arguments), x, weight, bias, case)
    x, weight = x[:1].expand(x.shape), weight[:, :1].expand(weight.shape)
    with overridden("convolution"):
        check(functional.conv2d(x, weight, bias, *case.arguments), x, weight, bias, case)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_channels_that_are_read_16_bytes_at_a_time(dtype: torch.dtype) -> None:
    """They are the innermost of what is summed, in large tiles if the memory is aligned."""
    for case in (Case(1, 32, (5, 6), 16, padding=(1, 0)), Case(1, 48, filters=16, kernel=(1, 1))):
        x, weight, bias = case.tensors(dtype)
        x, weight = in_format(x, True), in_format(weight, True)
        odd = misaligned((x.numel(),), dtype).as_strided(x.shape, x.stride(), 1).copy_(x)
        with overridden("convolution", hits=2):
            check(functional.conv2d(x, weight, bias, *case.arguments), x, weight, bias, case)
            check(functional.conv2d(odd, weight, bias, *case.arguments), x, weight, bias, case)


TILINGS = (Tiling(128, 256, 64, 8, 3), Tiling(16, 16, 16, 4, 1), Tiling(32, 64, 32, 4, 1))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("case", [Case(2, 16, (6, 6), 32, (3, 3)), CASES["everything"]], ids=["whole", "ragged"])
def test_every_tile_computes_the_same(tiling: Tiling, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows, columns and depths that are whole numbers of tiles, and that are not."""
    monkeypatch.setattr(kernel, "default_tiling", lambda *args: tiling)
    x, weight, bias = case.tensors(torch.bfloat16)
    call = Overload(torch.ops.aten.convolution.default, ROW)
    got = call((x, weight, bias, *map(list, case.arguments), False, [0, 0], 1), {})
    check(got, x, weight, bias, case)


def test_one_number_is_for_rows_and_columns() -> None:
    case = Case(size=(12, 13), stride=(2, 2), padding=(1, 1), dilation=(3, 3))
    x, weight, _ = case.tensors(torch.float32)
    with overridden("convolution"):
        got = torch.ops.aten.convolution(x, weight, None, [2], [1], [3], False, [0], 1)
    check(got, x, weight, None, case)


def test_images_without_a_batch_and_padding_by_name() -> None:
    case = Case(images=1, kernel=(3, 5), padding=(1, 2))
    x, weight, bias = case.tensors(torch.float32)
    with overridden("convolution", hits=2):
        check(functional.conv2d(x[0], weight, bias, padding="same")[None], x, weight, bias, case)
        case = case._replace(padding=(0, 0))
        check(functional.conv2d(x[0], weight, bias, padding="valid")[None], x, weight, bias, case)


def test_no_images() -> None:
    x, weight, bias = Case(images=0).tensors(torch.float32)
    with overridden("convolution"):
        assert functional.conv2d(x, weight, bias).shape == (0, 5, 7, 10)


def test_what_is_no_number_spreads_as_far_as_its_windows() -> None:
    """And not out of what fills a tile up or pads an image."""
    case = CASES["everything"]
    x, weight, bias = case.tensors(torch.float32)
    x[1, 2, 5, 5], x[2, 0, 0, 0] = NAN, math.inf
    with overridden("convolution"):
        got = functional.conv2d(x, weight, bias, *case.arguments)
    expected = functional.conv2d(x, weight, bias, *case.arguments)
    assert 0 < expected.isfinite().sum() < expected.numel()
    assert_as_pytorch(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [dense, gapped, misaligned])
def test_results_are_written_where_they_are_wanted(layout: Any) -> None:
    case = Case()
    x, weight, bias = case.tensors(torch.float32)
    arguments = (x, weight, bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    out = layout((2, 5, 7, 10), torch.float32).fill_(NAN)
    strides, base = out.stride(), out._base if out._base is not None else out
    before = base.isnan().sum().item() - out.numel()
    with overridden("convolution"):
        assert torch.ops.aten.convolution.out(*arguments, out=out) is out
    assert out.stride() == strides
    check(out, x, weight, bias, case)
    if layout is gapped:  # what lies in the gaps is as it was
        assert base.isnan().sum().item() == before


def test_results_that_pytorch_copies_to_where_they_are_wanted() -> None:
    """It convolves into new memory first, which is ours again."""
    case = Case(channels=5, kernel=(1, 1))
    x, weight, bias = case.tensors(torch.float32)
    expected = functional.conv2d(x, weight, bias)
    for declined, out in {"another shape": torch.empty(0, device=DEVICE), "shares memory with": x}.items():
        with overridden("convolution", declined=declined):
            torch.ops.aten.convolution.out(x, weight, bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, out=out)
        assert_as_pytorch(out, expected, rtol=1e-4, atol=1e-4)


def test_gradients() -> None:
    """PyTorch's, of our result; in gradients of gradients there are three convolutions more, and transposed ones."""
    case = Case(padding=(1, 0), stride=(2, 1))

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        tensors = [each.requires_grad_() for each in case.tensors(torch.float32)]
        result = functional.conv2d(*tensors, *case.arguments)
        first = torch.autograd.grad(result.square().sum(), tensors, create_graph=True)
        return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), tensors)]

    expected = gradients()
    with overridden("convolution", hits=4, declined="is transposed"):
        got = gradients()
    for mine, other in zip(got, expected, strict=True):
        assert_as_pytorch(mine, other, rtol=1e-4, atol=1e-2)


def test_modules_under_autocast() -> None:
    module = torch.nn.Conv2d(3, 20, 7, stride=7, device=DEVICE)
    x = dense((2, 3, 15, 22), torch.float32)
    with overridden("convolution"), torch.autocast(DEVICE, torch.bfloat16):
        got = module(x)
    case = Case(stride=(7, 7))
    check(got, x.bfloat16(), *(each.detach().bfloat16() for each in (module.weight, module.bias)), case)


def test_other_convolutions_are_pytorchs() -> None:
    x, weight, bias = Case(channels=4, filters=4).tensors(torch.float32)
    for declined, call in {
        "has 2 groups": lambda: functional.conv2d(x, weight[:, :2], bias, groups=2),
        "is transposed": lambda: functional.conv_transpose2d(x, weight, bias),
        "of 3 dimensions": lambda: functional.conv3d(x[None], weight[:2, :2, None]),
        "multiplies torch.float64": lambda: functional.conv2d(x.double(), weight.double()),
    }.items():
        with overridden("convolution", hits=0, declined=declined):
            got = call()
        assert_as_pytorch(got, call())


def test_errors_are_pytorchs() -> None:
    x, weight, bias = Case().tensors(torch.float32)
    for words, call in {
        "channels": lambda: functional.conv2d(x[:, :2], weight),
        "negative padding": lambda: functional.conv2d(x, weight, padding=(-1, 0)),
        "stride": lambda: functional.conv2d(x, weight, stride=0),
        "Kernel size can't be greater": lambda: functional.conv2d(x[:, :, :2], weight),
        "expected bias": lambda: functional.conv2d(x, weight, bias[:2]),
    }.items():
        with overridden("convolution", hits=0, declined="not do it either"), pytest.raises(RuntimeError, match=words):
            call()
    with overridden("convolution", hits=0), pytest.raises(RuntimeError, match="bias"):
        functional.conv2d(x, weight, bias.bfloat16())


def test_the_format_depends_on_cudnn() -> None:
    """Which is asked at each call, as a plan is made once."""
    x, weight, bias = Case().tensors(torch.float32)
    with overridden("convolution"):
        functional.conv2d(x, weight, bias)
        with torch.backends.cudnn.flags(enabled=not torch.backends.cudnn.enabled):
            functional.conv2d(x, weight, bias)


def test_how_far_images_may_reach() -> None:
    call = Overload(torch.ops.aten.convolution.default, ROW)
    x = dense((1,), torch.bfloat16).as_strided((2, 3, 4, 4), (0, 0, 0, 0))
    far = dense((1,), torch.bfloat16).expand(2**13, 1, 2**9, 2**9)
    weight = dense((1, 1, 3, 3), torch.bfloat16)
    arguments = ([1, 1], [2**14, 2**14], [1, 1], False, [0, 0], 1)
    with pytest.raises(Refused, match="more than 2\\*\\*31 apart"):
        ROW.plan(call, (far, weight, None, *arguments))
    with pytest.raises(Refused, match="to have 1 channels"):
        ROW.plan(call, (x, weight, None, *arguments))


def test_gpus_with_less_shared_memory_have_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(build: Any, device: int) -> Any:
        raise OutOfResources(147456, 101376, "shared memory")

    monkeypatch.setattr(convolution, "launcher", too_large)
    x, weight, bias = Case().tensors(torch.float32)
    call = Overload(torch.ops.aten.convolution.default, ROW)
    with pytest.raises(Refused, match=r"too large for this GPU.*147456"):
        call((x, weight, bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {})
