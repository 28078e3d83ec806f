"""Overloads of PyTorch's operations: their arguments in order, what their meta kernels say, and calls by plan."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import torch

from ..errors import Refused
from ..launch import CPU, INTERPRETED, Build, direct_refuses, launcher, settled, strided_allocator

# What does a call whose arguments look like those it was made for: arguments in the schema's order -> the result.
Plan = Callable[[tuple[Any, ...]], Any]

PLANS = 1024  # kept for an overload; when there are more, all are made anew

_NUMBERS = ("number", "Optional[number]", "float", "Optional[float]")
TENSORS = ("Tensor", "Optional[Tensor]")
_LISTS = ("List[Tensor]", "List[Optional[Tensor]]")


class Row(Protocol):
    """A line of the table of operations."""

    @property
    def op(self) -> str: ...

    def reads(self, schema: Any) -> bool: ...

    def plan(self, overload: Overload, args: tuple[Any, ...]) -> Plan: ...


def decline(reason: str) -> NoReturn:
    raise Refused(reason)


def exact_doubles() -> bool:
    """Whether a float64 number gets to a kernel as it is; Triton's own launch makes it a float32."""
    return INTERPRETED or not direct_refuses()


def scalar_of(value: Any, device: int, kind: str) -> bool:
    """Whether a value is a number to the kernel: one of Python's, or a tensor of one that is not on the device."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.get_device() == CPU != device
    return value is not None and (kind in _NUMBERS or kind in TENSORS)


def overloads_of(op: str) -> Iterator[Any]:
    """The overloads of aten::op and aten::op_ that PyTorch dispatches."""
    for name in (op, f"{op}_"):
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            try:
                yield getattr(packet, overload)
            except RuntimeError:  # TorchScript's own, which is no operation on tensors
                continue


def name_of(overload: Any) -> str:
    """As the dispatcher calls it."""
    schema = overload._schema
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def is_replaceable(name: str, key: str) -> bool:
    """Whether an overload has a kernel at `key` of its own, and is not one that autograd takes apart."""
    return bool(
        torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)
        and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    )


def launches_of(
    build_of: Callable[[bool], Build], device: int, grid: int, args: tuple[Any, ...]
) -> Callable[[int], Callable[..., None]]:
    """(the bits of all addresses, or-ed) -> how to launch `grid` programs with `args`, given those that are `...`.

    Aligned tensors are compiled for now, others when there are: few ever come, and each build takes a compiler's time.
    """
    aligned = settled(launcher(build_of(True), device), grid, args)
    misaligned: Callable[..., None] | None = None

    def launch_for(bits: int) -> Callable[..., None]:
        nonlocal misaligned
        if not bits & 15:
            return aligned
        if misaligned is None:
            misaligned = settled(launcher(build_of(False), device), grid, args)
        return misaligned

    return launch_for


class Overload:
    """An overload as a row of the table does it. Calling it raises Refused where PyTorch has to."""

    def __init__(self, op: Any, row: Row) -> None:
        schema = op._schema
        self.op = op
        self.row = row
        inputs = [each for each in schema.arguments if not each.is_out]
        outs = [each for each in schema.arguments if each.is_out]
        self.count = len(inputs)
        self.names = [each.name for each in inputs]
        self.kinds = [str(each.type) for each in inputs]
        self.tensors = [kind in TENSORS for kind in self.kinds]
        self.returned = [str(each.type) for each in schema.returns]
        # Where what is written comes from: arguments, or nowhere.
        written = [index for index, each in enumerate((*inputs, *outs)) if each.alias_info and each.alias_info.is_write]
        self.written = tuple(written)
        self._all = [each.name for each in (*inputs, *outs)]
        self._positional = [each.name for each in inputs if not each.kwarg_only]
        self._defaults = tuple(each.default_value for each in (*inputs, *outs))
        kinds = [*self.kinds, *(str(each.type) for each in outs)]
        self._key = _key_of(kinds)
        self.attempts = Attempts(kinds)
        self.plans: dict[Any, Plan | str] = {}  # by key; or why there is none
        self._lock = threading.Lock()

    def in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments as the schema has them, with its defaults; those that are written with `out` come last."""
        given = len(args)
        if not kwargs:
            return args + self._defaults[given:]
        return args + tuple(map(kwargs.get, self._all[given:], self._defaults[given:]))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], attempts: Attempts | None = None) -> Any:
        """attempts: where a plan that has worked is to be found faster from then on."""
        args = self.in_order(args, kwargs)
        key = self._key(args)
        plan = self.plans.get(key)
        if plan is None:
            plan = self._make(key, args)
        if isinstance(plan, str):
            raise Refused(plan)
        result = plan(args)
        if attempts is not None:
            attempts.add(args, plan)
        return result

    def _make(self, key: Any, args: tuple[Any, ...]) -> Plan | str:
        try:
            plan: Plan | str = self.row.plan(self, args)
        except Refused as refusal:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # what is not compiled yet may be later
            plan = str(refusal)
        with self._lock:
            if len(self.plans) >= PLANS:
                self.plans.clear()
            self.plans[key] = plan
        return plan

    # What rows ask when they plan

    def device(self, args: tuple[Any, ...]) -> int:
        """Where all tensors are, but those of one number on the host."""
        found = {each.get_device() for each in args if isinstance(each, torch.Tensor)}
        for each in args:
            found |= {item.get_device() for item in _items(each) if isinstance(item, torch.Tensor)}
        if len(found) > 1 and all(
            each.dim() == 0 for each in args if isinstance(each, torch.Tensor) and each.get_device() == CPU
        ):
            found.discard(CPU)
        if len(found) != 1:
            decline("its tensors are on several devices")
        return found.pop()

    def on_meta(self, args: tuple[Any, ...]) -> Any:
        """What PyTorch says of the result without computing it."""
        metas = [_meta(arg) for arg in args]
        before = [metas[index].shape for index in self.written]
        given = metas[: len(self._positional)]
        named = dict(zip(self._all[len(self._positional):], metas[len(self._positional):], strict=True))
        try:
            result = self.op(*given, **named)
        except Exception as error:
            decline(f"PyTorch does not do it either, or not without computing: {type(error).__name__}")
        for index, shape in zip(self.written, before, strict=True):
            if metas[index].shape != shape:
                decline("the tensor to write to has another shape, and is resized")
            if _overlaps_itself(args[index]):
                decline("elements of the tensor to write to share memory")
        return result

    def allocation(
        self, result: torch.Tensor, device: int, which: int = 0, apart: bool = False
    ) -> Callable[[tuple[Any, ...]], Any]:
        """arguments -> the tensor to write result number `which` to: new, or given and apart from what is read.

        apart: it may not even be, element for element, one that is read.
        """
        if self.written:
            return self._given(self.written[which], apart)
        return strided_allocator(device, tuple(result.shape), tuple(result.stride()), result.dtype)

    def _given(self, index: int, apart: bool) -> Callable[[tuple[Any, ...]], Any]:
        others = [other for other in range(self.count) if other != index]
        # Of what is read: where it is among the arguments, bytes, and whether it lies as what is written does. All
        # calls of a plan look alike, so this is found at the first.
        reads: list[tuple[int, int, int, bool]] | None = None
        length = 0

        def look(args: tuple[Any, ...]) -> list[tuple[int, int, int, bool]]:
            nonlocal reads, length
            out, found = args[index], []
            for other in others:
                read = args[other]
                for at, each in enumerate(read) if isinstance(read, (list, tuple)) else ((-1, read),):
                    if isinstance(each, torch.Tensor):
                        alike = not apart and each.dtype == out.dtype and each.shape == out.shape
                        found.append((other, at, _extent(each), alike and each.stride() == out.stride()))
            length = _extent(out)
            reads = found
            return found

        def given(args: tuple[Any, ...]) -> Any:
            out = args[index]
            start = out.data_ptr()
            for other, at, nbytes, alike in look(args) if reads is None else reads:
                first = (args[other] if at < 0 else args[other][at]).data_ptr()
                if first < start + length and start < first + nbytes and not (alike and first == start):
                    decline("what is written shares memory with what is read")
            return out

        return given


# Arguments in the schema's order -> the result, or MISSED where they do not look like those that it was made for.
Attempt = Callable[..., Any]
MISSED: Any = object()

_ATTEMPTS = 4  # kept for a shape of the first tensor
_LONGEST = 32  # lists of tensors that are looked at
_EAGER, _RARELY = 256, 16

# Dynamo's guard on tensors, one C++ call for all of them: types, dtypes, devices, shapes, strides, whether they require
# gradients, and their dispatch keys with what the thread's modes and transforms do to these.
_GUARDS: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)


class Attempts:
    """Plans of an overload by the looks that were seen last, in a third of the time that a key takes.

    kinds: of its arguments, as a schema has them. Numbers are of their type and other values what they were; a kind
    that no schema has is that of such a value.
    find(shape, ()) -> the attempts for calls whose first tensor has this shape, to be made one after the other.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = tuple(kinds)
        self._found: dict[torch.Size, tuple[Attempt, ...]] = {}
        self._added = 0
        self.find = self._found.get
        self._first = next((index for index, kind in enumerate(kinds) if kind in ("Tensor", "List[Tensor]")), -1)

    def first(self, names: Sequence[str]) -> str:
        """The first tensor, as Python with the arguments' names; "" if there is none, and never an attempt."""
        if self._first < 0:
            return ""
        return names[self._first] + ("" if self._kinds[self._first] == "Tensor" else "[0]")

    def text(self, names: Sequence[str], rest: Iterable[str], condition: str, counted: str) -> str:
        """The body of a function with arguments of these names, as Python: it returns what an attempt gives, and goes
        on where there is none. Its names are those of `names_of_text`.

        rest: what attempts take after the arguments. counted: a statement for each call that one has done.
        """
        return f"""
    if {condition}:
        try:
            for g_attempt in g_attempts({self.first(names)}.shape, ()):
                g_result = g_attempt({", ".join([*names, *rest])})
                if g_result is not g_missed:
                    {counted}
                    return g_result
        except g_retried:
            pass
"""

    def names_of_text(self, retried: Any) -> dict[str, Any]:
        """retried: exceptions of an attempt that are forgotten."""
        return {"g_attempts": self.find, "g_missed": MISSED, "g_retried": retried}

    def add(self, args: tuple[Any, ...], plan: Plan) -> None:
        """A call that `plan` has done, and that no attempt did."""
        self._added += 1
        # Looks that change all the time are not worth a guard each.
        if _GUARDS is None or self._first < 0 or (self._added > _EAGER and self._added % _RARELY):
            return
        try:
            attempt = _attempt(self._kinds, args, plan)
            first = args[self._first]
            shape = (first if isinstance(first, torch.Tensor) else first[0]).shape
        except Exception:  # the call is done, whatever a guard says to its arguments
            return
        if attempt is None:
            return
        if len(self._found) >= PLANS:
            self._found.clear()
        self._found[shape] = (attempt, *self._found.get(shape, ())[: _ATTEMPTS - 1])


def _attempt(kinds: Sequence[str], args: tuple[Any, ...], plan: Plan) -> Attempt | None:
    """For calls like this one; None where a guard cannot tell."""
    tests: list[tuple[str, str]] = []
    settled: list[Any] = []
    tensors: dict[str, torch.Tensor] = {}

    def look(name: str, value: torch.Tensor) -> None:
        before = next((before for before, each in tensors.items() if each is value), None)
        if before is not None:  # a guard is of tensors that are several
            tests.append((name, before))
        else:
            tests.append((name, "tensor"))
            tensors[name] = value

    for index, (kind, value) in enumerate(zip(kinds, args, strict=True)):
        name = f"a{index}"
        settled.append(None)
        if kind in TENSORS and isinstance(value, torch.Tensor):
            look(name, value)
        elif kind in TENSORS or kind in _NUMBERS:
            tests.append((name, "type"))
            settled[-1] = type(value)
        elif kind in _LISTS and 0 < len(value) <= _LONGEST:
            tests.append((name, f"{len(value)} long"))
            for at, each in enumerate(value):
                if each is None:
                    tests.append((f"{name}[{at}]", "None"))
                else:
                    look(f"{name}[{at}]", each)
        elif kind in _LISTS or any(isinstance(each, torch.Tensor) for each in (value, *_items(value))):
            return None
        else:
            tests.append((name, "value"))
            settled[-1] = list(value) if isinstance(value, list) else value
    guard = _GUARDS(
        *tensors.values(),
        dynamic_dims_sizes=[list(each.shape) for each in tensors.values()],
        dynamic_dims_strides=[list(each.stride()) for each in tensors.values()],
    )
    attempt: Attempt = _attempts_of(len(args), tuple(tests), any(each.requires_grad for each in tensors.values()))(
        MISSED, guard.check, plan, torch.is_grad_enabled, *settled
    )
    return attempt


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


@functools.cache
def _attempts_of(count: int, tests: tuple[tuple[str, str], ...], without_gradient: bool) -> Callable[..., Attempt]:
    """(MISSED, guard, plan, whether gradients are wanted, the types and values of arguments) -> an attempt, written
    out. tests: what is asked of which arguments, or of things in them."""
    names = [f"a{index}" for index in range(count)]
    guarded = [name for name, test in tests if test == "tensor"]
    conditions = ["not grad_enabled()"] if without_gradient else []
    for name, test in tests:
        if test == "type":
            conditions.append(f"{name}.__class__ is settled_{name}")
        elif test == "value":
            conditions.append(f"{name} == settled_{name}")
        elif test.endswith(" long"):
            conditions.append(f"len({name}) == {test.removesuffix(' long')}")
        elif test != "tensor":
            conditions.append(f"{name} is {test}")
    conditions.append(f"guard({', '.join(guarded)})")
    text = f"""
def make(missed, guard, plan, grad_enabled, {", ".join(f"settled_{name}" for name in names)}):
    def attempt({", ".join(names)}):
        if {" and ".join(conditions)}:
            return plan(({", ".join(names)},))
        return missed
    return attempt
"""
    found: dict[str, Any] = {}
    exec(text, found)
    make: Callable[..., Attempt] = found["make"]
    return make


class Signature(NamedTuple):
    """A schema's arguments, as text of a Python function."""

    heads: str  # as it is defined, with defaults by names
    given: str  # as a call passes all of them on
    names: list[str]
    defaults: dict[str, Any]  # by those names


NONE: Any = inspect.Parameter.empty


def signature_of(arguments: Iterable[tuple[str, bool, Any]], by_name: Collection[str] = ()) -> Signature:
    """Of arguments (name, whether it is given by name alone, default or NONE); by_name: others to be passed on so.

    What is written out has no loop over arguments, which would take a third of what PyTorch's whole call takes.
    """
    heads: list[str] = []
    given: list[str] = []
    names: list[str] = []
    defaults: dict[str, Any] = {}
    for name, keyword, default in arguments:
        if keyword and "*" not in heads:
            heads.append("*")
        if default is not NONE:
            defaults[f"default_{name}"] = default
        heads.append(name if default is NONE else f"{name}=default_{name}")
        given.append(f"{name}={name}" if keyword or name in by_name else name)
        names.append(name)
    return Signature(", ".join(heads), ", ".join(given), names, defaults)


def arguments_of(schema: Any) -> list[tuple[str, bool, Any]]:
    """What `signature_of` takes."""
    return [
        (each.name, each.kwarg_only, each.default_value if each.has_default_value() else NONE)
        for each in schema.arguments
    ]


def _key_text(names: Sequence[str], kinds: Sequence[str]) -> str:
    """What a plan for arguments of these names and kinds depends on, as Python with _KEY_NAMES."""
    parts = []
    for name, kind in zip(names, kinds, strict=True):
        otherwise = f"type({name})"
        if kind not in TENSORS and kind not in _NUMBERS:
            otherwise = f"tuple(map(look, {name})) if isinstance({name}, (list, tuple)) else {name}"
        look = f"({name}.dtype, {name}.shape, {name}.stride(), {name}.get_device())"
        parts.append(f"{look} if isinstance({name}, Tensor) else {otherwise}")
    return f"({', '.join(parts)},)"


def _key_of(kinds: Sequence[str]) -> Callable[[tuple[Any, ...]], Any]:
    names = [f"a{index}" for index in range(len(kinds))]
    found: dict[str, Any] = dict(_KEY_NAMES)
    exec(f"def key(args):\n    {', '.join(names)}, = args\n    return {_key_text(names, kinds)}", found)
    key: Callable[[tuple[Any, ...]], Any] = found["key"]
    return key


def _look(value: Any) -> Any:
    """What a plan depends on of something in a list."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.get_device()
    return value


_KEY_NAMES = {"look": _look, "Tensor": torch.Tensor}


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may have one address: dimensions, the densest first, must not reach into the next."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 and value.get_device() == CPU and not INTERPRETED:
            return value  # a number to PyTorch's kernels for other devices
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return [_meta(each) for each in value]
    return value
