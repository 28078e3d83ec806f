"""Ops that stand alone: PyTorch's operations by our kernels as `torch.ops.vllm_gems.*`, whatever is enabled.

`vllm_gems.mm(a, b)` does what `torch.ops.vllm_gems.mm(a, b)` does: with autograd, under torch.compile, in a CUDA graph.
Where the dispatcher would do nothing on the way it is left out, which saves half of the host's time. What a kernel does
not do, PyTorch's own operation does, counted in `ops.FALLBACKS`. Importing this file defines all ops.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import ops
from .aten.overloads import (
    TENSORS,
    Attempts,
    Overload,
    Plan,
    Signature,
    arguments_of,
    is_replaceable,
    name_of,
    signature_of,
)
from .catalog import catalog
from .nouns import Kernel
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


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """The op called `name`, as a function; raises AttributeError if there is none."""
    if name in TABLE:
        return _of_table(name)
    kernel = catalog().kernels.get(name)
    if kernel is None:
        raise AttributeError(f"module 'vllm_gems' has no attribute {name!r}")
    ops.define([kernel])
    return functools.wraps(kernel.op)(_of_kernel(kernel))


def _of_table(name: str) -> Callable[..., Any]:
    """An op of the table: what attempts do not do is done by the plan for such arguments, which they have from then on.
    """
    define(name)
    op: Any = getattr(torch.ops.vllm_gems, name).default
    # Attempts of its own: what is plain is known before one is remembered, and a guard sees when that changes.
    attempts = Attempts(_overload_of(name).kinds)
    direct = _shortcut(op, _direct(name, attempts), _pytorchs(name))
    rest = {f"g_rest_{index}": value for index, value in enumerate(TABLE[name].rest)}
    # What an attempt raises is tried once more, and then left to PyTorch.
    call = _written_out(name, signature_of(arguments_of(op._schema)), attempts, op, direct, Exception, ops.CALLS, rest)
    call.__module__, call.__qualname__ = __name__, name
    call.__doc__ = f"torch.ops.aten.{TABLE[name].overload} by our kernel: {op._schema}"
    return call


def _of_kernel(kernel: Kernel) -> Callable[..., Any]:
    """A kernel: what it settles for arguments is remembered for those that look like them."""
    op: Any = getattr(torch.ops.vllm_gems, kernel.name).default
    schema = {each.name: str(each.type) for each in op._schema.arguments}
    count, parameters = len(schema), list(inspect.signature(kernel.op).parameters.values())
    more = [each.name for each in parameters[count:]]  # tensors to write, which the schema does not have
    # If it settles nothing it asks for everything at each call, whatever numbers there are.
    kinds = [kind if kind in TENSORS else "value" if kernel.settle else "number" for kind in schema.values()]
    attempts = Attempts([*kinds, *["Optional[Tensor]"] * len(more)])
    alike = [each.name for each in parameters[:count]] == list(schema)
    if not alike or any(each.kind in _ANY for each in parameters) or not attempts.first(list(schema)):
        return _shortcut(op, kernel.op)

    def anew(*_: Any) -> Plan:
        return lambda args: kernel.op(*args[:count], **dict(zip(more, args[count:], strict=True)))

    settle = kernel.settle or anew

    def through(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **{name: value for name, value in kwargs.items() if name not in more or value is not None})

    def direct(*args: Any, **kwargs: Any) -> Any:
        args = (*args, *kwargs.values())
        plan = settle(*args)
        result = plan(args)
        attempts.add(args, plan)
        return result

    signature = signature_of([(each.name, each.kind is each.KEYWORD_ONLY, each.default) for each in parameters], more)
    # What an attempt raises is not tried once more: it may have written.
    return _written_out(kernel.name, signature, attempts, through, _shortcut(through, direct), (), None, {})


_ANY = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def _written_out(
    name: str,
    signature: Signature,
    attempts: Attempts,
    op: Callable[..., Any],
    direct: Callable[..., Any],
    retried: Any,
    calls: dict[str, int] | None,
    rest: dict[str, Any],
) -> Callable[..., Any]:
    """A function that leaves the dispatcher out: an attempt that does calls which look like this one, else `direct`.

    op: does it where there is more than plain tensors. retried: exceptions of an attempt that are forgotten. rest: what
    attempts take after the function's arguments.
    """
    counted = "pass" if calls is None else f"g_calls[{name!r}] += 1"
    text = f"""
def {name}({signature.heads}):
    if g_is_traced() or g_modes():  # Dynamo does not look further than the first
        return g_op({signature.given})
    {attempts.text(signature.names, rest, "g_forward_ad._current_level < 0", counted)}
    return g_direct({signature.given})
"""
    found: dict[str, Any] = {
        **signature.defaults,
        **rest,
        **attempts.names_of_text(retried),
        "g_is_traced": torch.compiler.is_dynamo_compiling,
        "g_modes": torch._C._len_torch_dispatch_stack,  # guards do not see that of fake tensors
        "g_op": op,
        "g_forward_ad": forward_ad,  # guards do not see tangents either
        "g_direct": direct,
        "g_calls": calls,
    }
    exec(text, found)
    function: Callable[..., Any] = found[name]
    return function


def _shortcut(op: Any, direct: Callable[..., Any], own: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`direct` where the dispatcher would do nothing before it, else `op`.

    own: PyTorch's operation, where there is one, which has gradients; it is called in transforms of torch.func and for
    derivatives in forward mode, where an op's would be zero.
    """
    plain = _plain()
    keys_of, modes = torch._C._dispatch_keys, torch._C._len_torch_dispatch_stack
    transform = torch._C._functorch.peek_interpreter_stack

    def call(*args: Any, **kwargs: Any) -> Any:
        # Dynamo does not look further than this.
        if torch.compiler.is_dynamo_compiling() or modes():
            return op(*args, **kwargs)
        if forward_ad._current_level >= 0 or transform() is not None:
            return (own or op)(*args, **kwargs)
        for each in (*args, *kwargs.values()) if kwargs else args:
            if not isinstance(each, torch.Tensor):
                continue
            if keys_of(each).raw_repr() not in plain or (
                own is not None and each.requires_grad and torch.is_grad_enabled()
            ):
                return op(*args, **kwargs)
        return direct(*args, **kwargs)

    return call


@functools.cache
def _plain() -> frozenset[int]:
    """The dispatch keys of tensors that are nothing but memory: no subclass, no transform, no lazy sign."""
    where = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    normal = [torch.empty(0, device=each) for each in where]
    with torch.inference_mode():
        inference = [torch.empty(0, device=each) for each in where]
    return frozenset(torch._C._dispatch_keys(each).raw_repr() for each in (*normal, *inference))


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
                library.impl(name, _direct(name), key)
        library._register_fake(name, lambda *args, **kwargs: overload(*args, *op.rest, **kwargs))
        if any(str(each.type) == "Tensor" for each in overload._schema.returns) and name not in _WITHOUT_GRADIENT:
            _differentiate(name, op, overload)
        _DEFINED.add(name)


_WITHOUT_GRADIENT = ("eq_tensor", "lt_tensor", "argmax")


def _direct(name: str, attempts: Attempts | None = None) -> Callable[..., Any]:
    """What an op does once the dispatcher is through."""
    op, call, own = TABLE[name], _overload_of(name), _pytorchs(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        ops.refuse_tangents(name)
        try:
            result = call((*args, *op.rest), kwargs, attempts)
        except ops.PASSING:
            raise
        except Exception:
            if not ops.FALLBACKS[name]:
                logger.debug("torch.ops.vllm_gems.%s is done by PyTorch", name, exc_info=True)
            return own(*args, **kwargs)
        ops.CALLS[name] += 1
        return result

    return run


def _pytorchs(name: str) -> Callable[..., Any]:
    """PyTorch's operation in the place of an op, counted."""
    op, overload = TABLE[name], TABLE[name]()

    def run(*args: Any, **kwargs: Any) -> Any:
        ops.FALLBACKS[name] += 1
        return overload(*args, *op.rest, **kwargs)

    return run


@functools.cache
def _overload_of(name: str) -> Overload:
    op, overload = TABLE[name], TABLE[name]()
    base = op.overload.partition(".")[0]
    return Overload(overload, next(row for row in aten.ROWS if row.op == base and row.reads(overload._schema)))


def _differentiate(name: str, op: Op, overload: Any) -> None:
    """Gradients are PyTorch's: its operation is done again with autograd."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Any = None) -> None:
        flat: list[torch.Tensor] = []
        ctx.shape = [_take(each, flat) for each in inputs]
        ctx.save_for_backward(*flat)
        ctx.keywords = dict(keyword_only_inputs or {})
        if not isinstance(output, torch.Tensor):
            ctx.mark_non_differentiable(*output[1:])  # statistics and places, as PyTorch has it

    def backward(ctx: Any, *gradients: Any) -> Any:
        further = torch.is_grad_enabled()  # gradients of gradients will be asked for
        # Defaults that the caller left out are in `shape` alone, at its end, and no tensors.
        needed = [need for each, need in zip(ctx.shape, ctx.needs_input_grad, strict=False) if each is _TENSOR]
        with torch.enable_grad():
            # Each with a place of its own in the graph: one may have been computed from another.
            again = [
                (each.view_as(each) if further else each.detach().requires_grad_()) if need else each.detach()
                for each, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            remaining = iter(again)
            inputs = [_put(each, remaining) for each in ctx.shape]
            results = overload(*inputs, *op.rest, **ctx.keywords)
        result = results if isinstance(results, torch.Tensor) else results[0]
        wanted = [each for each, need in zip(again, needed, strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, gradients[0], allow_unused=True, create_graph=further))
        flat = iter([next(found) if need else None for need in needed])
        given = [_put(each, flat, absent=None) for each in ctx.shape]
        return given[0] if len(given) == 1 else tuple(given)

    torch.library.register_autograd(f"vllm_gems::{name}", backward, setup_context=remember, lib=ops.LIBRARY)


_TENSOR = object()


def _take(value: Any, flat: list[torch.Tensor]) -> Any:
    """`value`, or a placeholder for a tensor, which goes to `flat`. No op of the table takes a list of tensors."""
    if isinstance(value, torch.Tensor):
        flat.append(value)
        return _TENSOR
    return value


def _put(value: Any, flat: Any, **absent: Any) -> Any:
    """The reverse; what is no tensor becomes `absent`, if that is given."""
    return next(flat) if value is _TENSOR else absent.get("absent", value)


ops.define(catalog().kernels.values())
for _name in TABLE:
    define(_name)
