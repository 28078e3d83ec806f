"""Calls of PyTorch's operations made from their schemas, and what comes of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip
# These get all layouts; of the others two are enough, since what lies where does not depend on the dtype.
THOROUGH = (torch.float32, torch.int64)


class Call(NamedTuple):
    """Arguments of an overload; `written` is what it writes to, by position or name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: str

    def copy(self, wide: bool = False) -> Call:
        """With tensors of their own, of the same strides; in float32 for half precision if `wide`."""
        return Call(
            tuple(_copied(arg, wide) for arg in self.args),
            {name: _copied(arg, wide) for name, arg in self.kwargs.items()},
            self.label,
        )


def _copied(value: Any, wide: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    dtype = torch.float32 if wide and value.dtype in HALVES else value.dtype
    if any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
        return value.to(dtype)
    new = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)
    return new.copy_(value)


def elements(shape: tuple[int, ...], dtype: torch.dtype, finite: bool = False) -> torch.Tensor:
    """Normal numbers, with zeros, infinities and NaN among them; small whole numbers, none of them 0."""
    if dtype is torch.bool:
        return torch.rand(shape, device=DEVICE) < 0.5
    if not dtype.is_floating_point:
        signs = torch.randint(0, 2, shape, device=DEVICE) * 2 - 1 if dtype.is_signed else 1
        return (torch.randint(1, 7, shape, device=DEVICE) * signs).to(dtype)
    values = torch.randn(shape, device=DEVICE) * 2
    for special in (0.0,) if finite else (0.0, float("inf"), float("-inf"), float("nan")):
        values[torch.rand(shape, device=DEVICE) < 0.04] = special
    return values.to(dtype)


def layouts(thorough: bool, finite: bool) -> Iterator[tuple[str, Any]]:
    """(name, (position of a tensor, dtype) -> tensor), in which all tensors together broadcast to one shape."""

    make = functools.partial(elements, finite=finite)

    def gapped(position: int, dtype: torch.dtype) -> torch.Tensor:
        return make((4, 3, 11), dtype)[:, :, 2:9:2]

    def broadcast(position: int, dtype: torch.dtype) -> torch.Tensor:
        return make(((5, 1, 7), (7,), (3, 1))[position % 3], dtype) if position else make((5, 3, 7), dtype)

    yield "contiguous", lambda position, dtype: make((3, 37), dtype)
    yield "transposed and not", lambda position, dtype: (
        make((6, 5), dtype).t() if position % 2 == 0 else make((5, 6), dtype)
    )
    if thorough:
        yield "gapped", gapped
        yield "broadcast", broadcast
        yield "channels last", lambda position, dtype: (
            make((2, 3, 4, 5), dtype).to(memory_format=torch.channels_last)
        )
        yield "empty", lambda position, dtype: make((3, 0, 2), dtype)
        yield "of one element", lambda position, dtype: make((), dtype)


def numbers(kind: str, name: str, dtype: torch.dtype) -> list[Any]:
    """What an argument that is no tensor may be."""
    if kind in ("number", "Optional[number]"):
        if dtype is torch.bool:
            return [True]
        one = 0.75 if dtype.is_floating_point else 2
        return [one, 1] if name == "alpha" else [one]
    if kind in ("float", "Optional[float]"):
        return [0.25, *([None] if kind != "float" else [])]
    if kind == "bool":
        return [False]
    if kind == "str":
        return ["none", "tanh"] if name == "approximate" else ["mean"]
    if kind == "Optional[str]":
        return [None, "trunc", "floor"]
    return []


def calls_of(overload: Any, finite: bool = False) -> Iterator[tuple[torch.dtype, Call]]:
    """Calls of each dtype in several layouts; some are none that PyTorch accepts."""
    schema = overload._schema
    for dtype in DTYPES:
        for label, tensor in layouts(dtype in THOROUGH, finite):
            variants = max([len(numbers(str(each.type), each.name, dtype)) for each in schema.arguments], default=1)
            for variant in range(max(variants, 1)):
                args: list[Any] = []
                kwargs: dict[str, Any] = {}
                position = 0
                for each in schema.arguments:
                    kind = str(each.type)
                    if each.is_out:
                        continue
                    if "Tensor" in kind:
                        value: Any = tensor(position, torch.bool if each.name in ("condition", "mask") else dtype)
                        if each.name == "value":  # of one element
                            value = elements((), dtype)
                        position += 1
                    else:
                        choices = numbers(kind, each.name, dtype)
                        value = choices[min(variant, len(choices) - 1)]
                    if each.kwarg_only:
                        kwargs[each.name] = value
                    else:
                        args.append(value)
                yield dtype, Call(tuple(args), kwargs, f"{dtype} {label} {variant}")


def outcome(overload: Any, call: Call) -> Any:
    """The result, or the type of what was raised."""
    try:
        return overload(*call.args, **call.kwargs)
    except Exception as error:
        return type(error)


def same(got: Any, expected: Any, label: str) -> None:
    """The same dtype, shape and strides, and values that PyTorch's own tests would accept; or the same error."""
    if isinstance(expected, type) or isinstance(got, type):
        assert got is expected, f"{label}: {got}, PyTorch {expected}"
        return
    if isinstance(expected, (tuple, list)):
        for mine, other in zip(got, expected, strict=True):
            same(mine, other, label)
        return
    assert got.dtype == expected.dtype, f"{label}: {got.dtype}, PyTorch {expected.dtype}"
    laid_out = expected.numel() > 0  # there is nothing whose place could matter
    torch.testing.assert_close(
        got, expected, equal_nan=True, check_stride=laid_out, msg=lambda text: f"{label}: {text}"
    )


def expected_of(overload: Any, call: Call, wide: bool = True) -> Any:
    """What PyTorch says, computed in float32 and rounded once where the arguments are in half precision."""
    exact = outcome(overload, call.copy())
    if isinstance(exact, type) or not wide:
        return exact
    precise = outcome(overload, call.copy(wide=True))
    return exact if isinstance(precise, type) else _rounded(exact, precise)


def _rounded(exact: Any, wide: Any) -> Any:
    if isinstance(exact, (tuple, list)):
        return [_rounded(each, other) for each, other in zip(exact, wide, strict=True)]
    if exact.dtype not in HALVES:
        return exact
    return torch.empty_strided(exact.shape, exact.stride(), dtype=exact.dtype, device=exact.device).copy_(wide)
