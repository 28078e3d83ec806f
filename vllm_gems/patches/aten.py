"""PyTorch's own operations, one row each: overloads, in-place and `out` forms follow from PyTorch's schemas.

None is bound unless asked for (`vllm_gems.enable()`), and by default only those that were measured not slower than
PyTorch's on this GPU.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from keyword import iskeyword
from typing import Any

import torch

from ..aten.along import Along, Normalise
from ..aten.arange import Arange
from ..aten.convolution import Convolution
from ..aten.elementwise import Elementwise
from ..aten.indexing import INDEXING
from ..aten.overloads import Overload, Row, arguments_of, is_replaceable, name_of, overloads_of, signature_of
from ..aten.products import Product
from ..aten.reductions import Reduce
from ..aten.sorting import Sort
from ..errors import Refused
from ..kernels import formulas
from ..nouns import Patch, Place, Seam
from ..probes import normalise_schema
from ..sites import Site
from ..tuned import speedups

PREFIX = "aten."


def _rounded(arguments: Mapping[str, Any]) -> str:
    return "float" if arguments["rounding_mode"] is None else "default"


def _limit(name: str, dtype: torch.dtype) -> float:
    """What nan_to_num puts in the place of what its caller does not say."""
    if not dtype.is_floating_point:
        return 0.0
    return {"nan": 0.0, "posinf": torch.finfo(dtype).max, "neginf": torch.finfo(dtype).min}[name]


_FLOAT_FUNCTIONS = (
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "deg2rad", "erf", "erfc", "exp", "exp2", "expm1",
    "log", "log10", "log1p", "log2", "rad2deg", "reciprocal", "rsqrt", "sigmoid", "sin", "sinc", "sinh", "sqrt", "tan",
    "tanh",
)  # fmt: skip
_ACTIVATIONS = (
    "celu", "elu", "frac", "gelu", "hardshrink", "hardsigmoid", "hardswish", "leaky_relu", "mish", "silu", "softplus",
    "softshrink",
)  # fmt: skip
_GRADIENTS = (
    "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "mish", "sigmoid", "silu", "softplus",
    "softshrink", "tanh",
)  # fmt: skip
_GRADIENT = ("grad_output", "output")
_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
_LOGICAL = ("logical_and", "logical_or", "logical_xor")
_BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor")
_SHIFTS = ("bitwise_left_shift", "bitwise_right_shift")
_TESTS = ("isinf", "isnan", "isneginf", "isposinf", "signbit")


def _formula(name: str) -> Any:
    found = getattr(formulas, name, None)
    return getattr(formulas, f"{name}_") if found is None else found


def _rows(names: Iterable[str], **same: Any) -> Iterator[Elementwise]:
    return (Elementwise(name, _formula(name), **same) for name in names)


ROWS: tuple[Row, ...] = (
    *_rows(_FLOAT_FUNCTIONS, kind="float", families="f"),
    *_rows(("logit",), kind="float", families="f", without={"eps": formulas.log_odds}),
    *_rows(("abs", "neg", "sign", "ceil", "floor", "trunc", "round", "relu"), families="fi"),
    *_rows(("hardtanh", "threshold"), families="f", only="self"),
    *_rows(_ACTIVATIONS, families="f"),
    *_rows((f"{name}_backward" for name in _GRADIENTS), families="f"),
    *_rows(("logit_backward",), families="f", without={"eps": formulas.log_odds_backward}),
    *_rows(("leaky_relu_backward", "threshold_backward"), families="f", last_first=True),
    *_rows(_TESTS, kind="bool", families="f"),
    *_rows(("logical_not",), kind="bool"),
    *_rows(("nan_to_num",), families="f", missing=_limit),
    *_rows(("bitwise_not",), families="ib", for_bool=formulas.logical_not),
    # Two operands
    *_rows(("add",)),
    *_rows(("sub",), families="fi"),
    *_rows(("rsub",), families="fi", last_first=True),
    *_rows(("mul", "maximum", "minimum", "fmax", "fmin")),
    Elementwise("div", formulas.true_divide, kind="float", families="f"),
    Elementwise("div", formulas.div, _rounded, "fi", without={"rounding_mode": formulas.true_divide}),
    *_rows(("floor_divide", "remainder", "fmod"), families="fi"),
    *_rows(("pow",), families="f", promotes=("self", "exponent"), contiguous=("Scalar",)),
    *_rows(("atan2", "copysign"), kind="float", families="f"),
    *_rows(("hypot", "heaviside", "logaddexp", "logaddexp2"), families="f"),
    *_rows(("xlogy",), kind="float", families="f", promotes=("self", "other")),
    *_rows(_COMPARISONS, kind="bool"),
    *_rows(_LOGICAL, kind="bool"),
    *_rows(_BITWISE, families="ib", promotes=("self", "other")),
    *_rows(_SHIFTS, families="i", promotes=("self", "other")),
    # More
    *_rows(("where",), as_is=("condition",)),
    *_rows(("masked_fill",), only="self", as_is=("mask",), contiguous=("Scalar", "Tensor")),
    Elementwise(
        "clamp", formulas.clamp, families="fi", promotes=("min", "max"),
        without={"min": formulas.clamp_max, "max": formulas.clamp_min},
    ),
    *_rows(("clamp_min",), families="fi", promotes=("min",)),
    *_rows(("clamp_max",), families="fi", promotes=("max",)),
    *_rows(("lerp", "addcdiv"), families="f"),
    *_rows(("addcmul",), families="fi"),
    # Reductions
    *(Reduce(op, op) for op in ("sum", "mean", "prod", "any", "all", "max", "min", "var", "std")),
    Reduce("amax", "max"),
    Reduce("amin", "min"),
    Reduce("argmax", "max", indices=True),
    Reduce("argmin", "min", indices=True),
    Reduce("var_mean", "var", mean=True),
    Reduce("std_mean", "std", mean=True),
    Reduce("count_nonzero", "count"),
    # Along a dimension
    Along("_softmax", "softmax", arguments=("dim", "half_to_float")),
    Along("_log_softmax", "log_softmax", arguments=("dim", "half_to_float")),
    Along("_softmax_backward_data", "softmax gradient", _GRADIENT, ("dim", "input_dtype")),
    Along("_log_softmax_backward_data", "log_softmax gradient", _GRADIENT, ("dim", "input_dtype")),
    Along("cumsum", "cumsum", arguments=("dim", "dtype"), families="fi"),
    Along("cumprod", "cumprod", arguments=("dim", "dtype"), families="fi"),
    Normalise("native_layer_norm"),
    Normalise("native_group_norm"),
    # In order
    Sort("sort"),
    Sort("topk"),
    # Memory
    *_rows(("copy",), only="src", converts=True, in_place=True),
    *_rows(("fill", "zero"), only="self"),
    Arange("arange"),
    *INDEXING,
    # Products of matrices
    Product("mm", "self", "mat2"),
    Product("bmm", "self", "mat2"),
    Product("mv", "self", "vec"),
    Product("addmm", "mat1", "mat2", input="self"),
    Product("baddbmm", "batch1", "batch2", input="self"),
    Product("addmv", "mat", "vec", input="self"),
    Convolution("convolution"),
)


def adapt(overload: Any, row: Row) -> Callable[[Any, Site], Callable[..., Any]]:
    """(the covered kernel, site) -> the kernel that does an overload as `row` says, and leaves the rest to the other.

    PyTorch unwraps numbers that stand for tensors on the way into Python and does not wrap them on the way to the
    covered kernel. Calling the operation does; it comes back here, and goes on to the covered kernel.
    """
    call = Overload(overload, row)

    def wrap(original: Any, site: Site) -> Callable[..., Any]:
        again = threading.local()

        def covered(keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            values = call.in_order(args, kwargs)
            if not any(
                is_tensor and isinstance(value, (bool, int, float, complex))
                for is_tensor, value in zip(call.tensors, values, strict=False)
            ):
                return original.call_boxed(keyset, *args, **kwargs)
            again.keyset = keyset
            try:
                return overload(*args, **kwargs)
            finally:
                again.keyset = None

        def slowly(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(again, "keyset", None) is not None:
                again.keyset = None
                return original.call_boxed(keyset, *args, **kwargs)
            if not site.failure:
                try:
                    result = call(args, kwargs, call.attempts)
                except Refused as refusal:
                    site.decline(refusal)
                except Exception as error:
                    site.fail(error)
                else:
                    site.hits += 1
                    return result
            return covered(keyset, args, kwargs)

        return _written_out(call, site, slowly)

    return wrap


def _written_out(call: Overload, site: Site, slowly: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an overload with the schema's arguments: an attempt that does calls which look like this one, else
    what makes one. What an attempt raises, `slowly` raises once more, and says so."""
    signature = signature_of(arguments_of(call.op._schema))
    if not call.attempts.first(signature.names) or any(map(iskeyword, signature.names)):
        return slowly
    text = f"""
def kernel(g_keyset, {signature.heads}):
    {call.attempts.text(signature.names, (), "not g_site.failure", "g_site.hits += 1")}
    return g_slowly(g_keyset, {signature.given})
"""
    names = call.attempts.names_of_text(Exception)
    found = {**signature.defaults, **names, "g_site": site, "g_slowly": slowly}
    exec(text, found)
    kernel: Callable[..., Any] = found["kernel"]
    return kernel


def torch_platform() -> str:
    """What PyTorch runs on, as the patcher calls it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def measured(platform: str) -> Mapping[str, float]:
    """Overload -> PyTorch's time over ours on this GPU."""
    return speedups(torch.cuda.get_device_name()) if platform == "cuda" else {}


@functools.cache
def overrides(platform: str) -> tuple[tuple[Seam, Patch], ...]:
    """All that the table stands in for on a platform ("cuda" or "cpu"), as patches."""
    key, speeds = {"cuda": "CUDA", "cpu": "CPU"}[platform], measured(platform)
    found: dict[str, tuple[Seam, Patch]] = {}
    for row in ROWS:
        for overload in overloads_of(row.op):
            place = name_of(overload)
            name = PREFIX + place.partition("::")[2]
            if name in found or not row.reads(overload._schema) or not is_replaceable(place, key):
                continue
            expects = (normalise_schema(str(overload._schema)),)
            seam = Seam(name, (Place("aten", "torch", place, expects),))
            default = speeds.get(name, 0.0) >= 1.0
            found[name] = seam, Patch(name, name, (), adapt(overload, row), f"{place} by a kernel in Triton", default)
    return tuple(found[name] for name in sorted(found))
