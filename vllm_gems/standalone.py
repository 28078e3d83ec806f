"""Ops that stand alone: PyTorch's operations by our kernels as `torch.ops.vllm_gems.*`, whatever is enabled.

`vllm_gems.mm(a, b)` is `torch.ops.vllm_gems.mm(a, b)`: with autograd, under torch.compile, in a CUDA graph. What a
kernel does not do, PyTorch's own operation does, counted in `ops.FALLBACKS`.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import ops
from .aten.overloads import Overload, is_replaceable, name_of
from .catalog import catalog
from .patches import aten

logger = logging.getLogger("vllm_gems")


class Op(NamedTuple):
    """An op that stands alone, beside an overload of PyTorch's."""

    overload: str  # of aten
    schema: str = ""  # where it is not that of the overload
    rest: tuple[Any, ...] = ()  # what the overload takes after that

    def __call__(self) -> Any:
        name, _, overload = self.overload.partition(".")
        return getattr(getattr(torch.ops.aten, name), overload or "default")


# name -> what it stands beside. Arguments are PyTorch's, and so are dtypes, broadcasting and errors.
TABLE: dict[str, Op] = {
    "add_tensor": Op("add.Tensor"),
    "sub_tensor": Op("sub.Tensor"),
    "mul_tensor": Op("mul.Tensor"),
    "div_tensor": Op("div.Tensor"),
    "maximum": Op("maximum"),
    "minimum": Op("minimum"),
    "where": Op("where.self"),
    "clamp": Op("clamp"),
    "exp": Op("exp"),
    "log": Op("log"),
    "sqrt": Op("sqrt"),
    "rsqrt": Op("rsqrt"),
    "sigmoid": Op("sigmoid"),
    "tanh": Op("tanh"),
    "relu": Op("relu"),
    "silu": Op("silu"),
    "gelu": Op("gelu"),
    "eq_tensor": Op("eq.Tensor"),
    "lt_tensor": Op("lt.Tensor"),
    "sum_dim": Op("sum.dim_IntList"),
    "mean_dim": Op("mean.dim"),
    "amax": Op("amax"),
    "amin": Op("amin"),
    "argmax": Op("argmax"),
    "softmax": Op("_softmax", "(Tensor self, int dim) -> Tensor", (False,)),
    "log_softmax": Op("_log_softmax", "(Tensor self, int dim) -> Tensor", (False,)),
    "cumsum": Op("cumsum"),
    "layer_norm": Op("native_layer_norm"),
    "embedding": Op("embedding"),
    "index_select": Op("index_select"),
    "gather": Op("gather"),
    "mm": Op("mm"),
    "bmm": Op("bmm"),
    "addmm": Op("addmm"),
    "baddbmm": Op("baddbmm"),
}

_LOCK = threading.Lock()
_DEFINED: set[str] = set()


def names() -> tuple[str, ...]:
    """Of all functions of the package: those of the table, and the kernels'."""
    return (*TABLE, *catalog().kernels)


def function(name: str) -> Callable[..., Any]:
    """The op called `name`, as a function; raises AttributeError if there is none."""
    if name in TABLE:
        define(name)
        return getattr(torch.ops.vllm_gems, name)
    kernel = catalog().kernels.get(name)
    if kernel is None:
        raise AttributeError(f"module 'vllm_gems' has no attribute {name!r}")
    ops.define([kernel])
    traced, direct = getattr(torch.ops.vllm_gems, name), kernel.op

    @functools.wraps(direct)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (traced if torch.compiler.is_dynamo_compiling() else direct)(*args, **kwargs)

    return call


def device() -> torch.device:
    """Where kernels run: the current GPU, or the CPU in Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def define(name: str) -> None:
    """Make `torch.ops.vllm_gems.<name>` of a row of the table, if it is none yet."""
    with _LOCK:
        if name in _DEFINED:
            return
        op, overload = TABLE[name], TABLE[name]()
        schema = op.schema or str(overload._schema).partition("(")[1] + str(overload._schema).partition("(")[2]
        library = ops.LIBRARY
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CUDA", "CPU"):
            if is_replaceable(name_of(overload), key):
                library.impl(name, _implementation(name, op, overload), key)
        library._register_fake(name, lambda *args, **kwargs: overload(*args, *op.rest, **kwargs))
        if any(str(each.type) == "Tensor" for each in overload._schema.returns) and name not in _WITHOUT_GRADIENT:
            _differentiate(name, op, overload)
        _DEFINED.add(name)


_WITHOUT_GRADIENT = ("eq_tensor", "lt_tensor", "argmax")


def _implementation(name: str, op: Op, overload: Any) -> Callable[..., Any]:
    call = Overload(overload, next(row for row in aten.ROWS if row.op == _base(op) and row.reads(overload._schema)))

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            result = call((*args, *op.rest), kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if not ops.FALLBACKS[name]:
                logger.debug("torch.ops.vllm_gems.%s is done by PyTorch", name, exc_info=True)
            ops.FALLBACKS[name] += 1
            return overload(*args, *op.rest, **kwargs)
        ops.CALLS[name] += 1
        return result

    return run


def _base(op: Op) -> str:
    return op.overload.partition(".")[0]


def _differentiate(name: str, op: Op, overload: Any) -> None:
    """Gradients are PyTorch's: its operation is done again with autograd."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Any = None) -> None:
        flat: list[torch.Tensor] = []
        ctx.shape = [_take(each, flat) for each in inputs]
        ctx.save_for_backward(*flat)
        ctx.keywords = dict(keyword_only_inputs or {})

    def backward(ctx: Any, *gradients: Any) -> Any:
        saved = [each.detach() for each in ctx.saved_tensors]
        with torch.enable_grad():
            saved = [each.requires_grad_() if each.is_floating_point() else each for each in saved]
            remaining = iter(saved)
            inputs = [_put(each, remaining) for each in ctx.shape]
            results = overload(*inputs, *op.rest, **ctx.keywords)
            results = [results] if isinstance(results, torch.Tensor) else list(results)
            pairs = [
                (result, gradient)
                for result, gradient in zip(results, gradients, strict=True)
                if gradient is not None and result.requires_grad
            ]
            wanted = [each for each in saved if each.requires_grad]
            found = torch.autograd.grad(
                [result for result, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
            )
        by_tensor = iter(found)
        flat = iter([next(by_tensor) if each.requires_grad else None for each in saved])
        given = [_put(each, flat, absent=None) for each in ctx.shape]
        return given[0] if len(given) == 1 else tuple(given)

    torch.library.register_autograd(f"vllm_gems::{name}", backward, setup_context=remember, lib=ops.LIBRARY)


_TENSOR = object()


def _take(value: Any, flat: list[torch.Tensor]) -> Any:
    """`value` with placeholders for its tensors, which go to `flat`."""
    if isinstance(value, torch.Tensor):
        flat.append(value)
        return _TENSOR
    if isinstance(value, (list, tuple)) and any(isinstance(each, torch.Tensor) for each in value):
        return [_take(each, flat) for each in value]
    return value


def _put(value: Any, flat: Any, **absent: Any) -> Any:
    """The reverse; what is no tensor becomes `absent`, if that is given."""
    if value is _TENSOR:
        return next(flat)
    if isinstance(value, list) and _TENSOR in value:
        return [_put(each, flat, **absent) for each in value]
    return absent.get("absent", value)
