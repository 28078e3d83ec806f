"""PyTorch's convolution of signals and images, done by one launch: planned once for what its tensors look like.

It is above the libraries that PyTorch chooses from (cuDNN, oneDNN and its own), and below autograd. PyTorch's choice
says what is an error and in which memory format the result is. Sums of products in float32 are in float32, where cuDNN
by default is allowed to multiply in TF32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ..kernels.convolution import Convolved, Four, Two, convolution_build
from ..kernels.matmul import DTYPES, INT32_MAX
from ..launch import launcher, settled
from .overloads import Overload, Plan, decline

_ARGUMENTS = (
    "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
)  # fmt: skip


@dataclass(frozen=True)
class Convolution:
    """PyTorch's operation with one group that is not transposed, of one dimension or two."""

    op: str

    def reads(self, schema: Any) -> bool:
        """Whether an overload of this schema has the arguments that are known."""
        return tuple(each.name for each in schema.arguments if not each.is_out) == _ARGUMENTS

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan:
        """How a call with arguments like these is done; raises Refused if it is not done here."""
        x, weight, bias, stride, padding, dilation, transposed, _, groups = given = args[: overload.count]
        tensors = [each for each in (x, weight, bias) if each is not None]
        if transposed or groups != 1:
            decline("it is transposed" if transposed else f"it has {groups} groups")
        if weight.dim() not in (3, 4):
            decline(f"it is of {weight.dim() - 2} dimensions")
        dtypes = {each.dtype for each in tensors}
        if len(dtypes) > 1 or x.dtype not in DTYPES:
            decline(f"it multiplies {x.dtype} by {weight.dtype}, and adds {None if bias is None else bias.dtype}")
        device = overload.device(args)
        chosen = _choice(given)
        result = overload.on_meta(args)
        if result.dtype is not x.dtype:
            decline(f"its result is {result.dtype}")
        if x.shape[1] == 0:
            decline("it is of no channels")
        if not overload.written:
            result = _in_format(result, _memory_format(x, weight, chosen))
        out = _image(result)
        call = Convolved(
            shape=_four(_image(x).shape),
            weight_shape=_four(_image(weight).shape),
            out_shape=_four(out.shape),
            x=_four(_image(x).stride()),
            weight=_four(_image(weight).stride()),
            bias=None if bias is None else bias.stride(0),
            out=_four(out.stride()),
            stride=_pair(stride, weight, 1),
            padding=_pair(padding, weight, 0),
            dilation=_pair(dilation, weight, 1),
            dtype=x.dtype,
        )
        if call.reach > INT32_MAX:
            decline("its elements lie more than 2**31 apart")
        return _plan(call, overload.allocation(result, device, apart=True), device, result.numel() == 0)


def _choice(given: Sequence[Any]) -> Any:
    """Which of its ways PyTorch would go; raises Refused where it would raise an error."""
    try:
        return torch._C._select_conv_backend(*given)
    except RuntimeError as error:
        decline(f"PyTorch does not do it either: {error}")


def _memory_format(x: torch.Tensor, weight: torch.Tensor, chosen: Any) -> torch.memory_format:
    """In which PyTorch would give the result; a signal is an image of one row, contiguous before anything else."""
    if weight.dim() == 3 and not x.is_contiguous():
        x = x.new_empty(()).expand(x.shape)  # is in no other format either
    found = torch._C._conv_determine_backend_memory_format(_image(x), _image(weight), chosen)
    assert isinstance(found, torch.memory_format)
    return found


def _image(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor


def _in_format(result: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    shape = _image(result).shape
    image = torch.empty(shape, dtype=result.dtype, device="meta", memory_format=memory_format)
    return image.squeeze(2) if result.dim() == 3 else image


def _four(values: Sequence[int]) -> Four:
    first, second, third, fourth = values
    return first, second, third, fourth


def _pair(values: Sequence[int], weight: torch.Tensor, of_row: int) -> Two:
    """For rows and columns of an image; one number is for all dimensions."""
    if weight.dim() == 3:
        return of_row, values[0]
    return values[0], values[-1]


def _plan(call: Convolved, allocate: Callable[..., Any], device: int, empty: bool) -> Plan:
    cudnn = torch._C._get_cudnn_enabled()
    has_bias = call.bias is not None

    @functools.cache
    def launch_for(aligned: bool) -> Any:
        build, grid, tail = convolution_build(call, aligned)
        try:
            return settled(launcher(build, device), grid, (..., ..., ..., ..., *tail))
        except OutOfResources as error:
            decline(f"its tiles are too large for this GPU: {error}")

    if not empty:
        launch_for(True)

    def run(args: tuple[Any, ...]) -> Any:
        if torch._C._get_cudnn_enabled() is not cudnn:
            decline("cuDNN was switched on or off, on which the memory format of the result depends")
        out = allocate(args)
        if empty:
            return out
        x_at, weight_at, out_at = args[0].data_ptr(), args[1].data_ptr(), out.data_ptr()
        bias_at = args[2].data_ptr() if has_bias else 0
        launch_for(not (x_at | weight_at | bias_at | out_at) & 15)(x_at, weight_at, bias_at, out_at)
        return out

    return run
