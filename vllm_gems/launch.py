"""The launcher: a compiled Triton kernel called past Triton's Python, in a fifth of the host time or less.

`kernel[grid](...)` rebuilds argument dictionaries and a cache key at every call. Here the key is settled once, by
`Build`: argument types, constexprs, and one bit for alignment. What is left per call is integer pointers, the raw
current stream, and the guards without which a direct launch would be wrong: launch hooks set by a profiler, another
current device, or a recording. `launch.c` does all of it; without it, Triton's own C launcher. What the guards find, an
unknown Triton release, the interpreter and backends without that launcher go through `kernel[grid]`, with the same
arguments.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeGuard

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JitFunctionInfo

from . import interpreter, policy
from .errors import LateCompileError, NoDeviceError, Refused

logger = logging.getLogger("vllm_gems")

INTERPRETED = policy.triton_interpreted()
if INTERPRETED:
    interpreter.install()

# launch(grid, *args): pointers as integers, scalars as they are, in the order of the kernel's parameters.
Launch = Callable[..., None]

CPU = -1  # what Tensor.get_device() answers for a CPU tensor

# thread -> what writes its launches down instead of making them (`replay.Tape`); empty nearly always.
_TAPES: dict[int, Any] = {}


class Native(NamedTuple):
    """A kernel as the driver launches it."""

    kernel: int  # its handle
    threads: int  # of a program
    shared: int  # bytes
    types: tuple[str | None, ...]  # as in Build


@contextmanager
def recording_on(tape: Any) -> Iterator[None]:
    """What this thread launches and allocates goes to `tape`."""
    thread = threading.get_ident()
    if thread in _TAPES:
        raise RuntimeError("a recording within a recording")
    _TAPES[thread] = tape
    try:
        yield
    finally:
        del _TAPES[thread]


def recording() -> Any:
    """The tape of this thread, or None."""
    return _TAPES.get(threading.get_ident()) if _TAPES else None


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Of float8 only kernels know that are made for it: for any other it is a dtype like any that it does not take.
_DTYPES = {**{name: dtype for dtype, name in _TYPES.items()}, "fp8e4nv": torch.float8_e4m3fn}


def pointer(dtype: torch.dtype) -> str:
    """The Triton type of a pointer to `dtype`; raises Refused for a dtype that no kernel here takes."""
    try:
        return "*" + _TYPES[dtype]
    except KeyError:
        known = ", ".join(str(d).removeprefix("torch.") for d in _TYPES)
        raise Refused(f"dtype {dtype} is not one of {known}") from None


@dataclass(frozen=True)
class Build:
    """Everything that decides a kernel's machine code.

    types: per runtime parameter, in order: "*bf16", "i32", "fp32"; "i32/16" for an integer that is a multiple of 16 (or
    8, or 4) in an aligned build (a stride); "=1" for one that is in the machine code, whatever a call says; None for a
    pointer that this build leaves out.
    constexprs: the parameters after them, by name.
    aligned: every pointer is a multiple of 16 bytes and every "/16" integer a multiple of 16 elements; so for 8 and 4.
    """

    function: Any
    types: tuple[str | None, ...]
    constexprs: tuple[tuple[str, Any], ...]
    aligned: bool = True
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None  # registers a thread that NVIDIA's assembler may use, where it spills to use fewer

    @property
    def is_gluon(self) -> bool:
        """Whether the kernel is in Gluon, which compiles another way; only then is that imported."""
        return bool(getattr(self.function, "is_gluon", lambda: False)())

    def source(self) -> ASTSource:
        names = self.function.arg_names
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attrs: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, (name, kind) in enumerate(zip(names, self.types, strict=False)):
            if kind is None:
                signature[name], constants[(index,)] = "constexpr", None
                continue
            if kind.startswith("="):
                signature[name], constants[(index,)] = "constexpr", int(kind[1:])
                continue
            base, _, multiple = kind.partition("/")
            signature[name] = base
            if self.aligned and (multiple or base.startswith("*")):
                attrs[(index,)] = [["tt.divisibility", int(multiple or 16)]]
        for index, (name, value) in enumerate(self.constexprs, start=len(self.types)):
            if names[index] != name:
                raise TypeError(f"{self.function.__name__}: parameter {index} is {names[index]!r}, not {name!r}")
            signature[name], constants[(index,)] = "constexpr", value
        if self.is_gluon:
            from triton.experimental.gluon._runtime import GluonASTSource

            return GluonASTSource(self.function, signature, constants, attrs)
        return ASTSource(self.function, signature, constants, attrs)

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.maxnreg is not None and torch.version.hip is None:  # AMD's backend does not know it
            options["maxnreg"] = self.maxnreg
        return options


def is_passed(kind: str | None) -> TypeGuard[str]:
    """Whether a parameter of this type gets to the kernel in a call, and is not in its machine code."""
    return kind is not None and not kind.startswith("=")


def integer(value: int, kind: str) -> str:
    """The type of an integer parameter of `kind` that is such a multiple in all calls of a build."""
    return next((f"{kind}/{multiple}" for multiple in (16, 8, 4) if value % multiple == 0), kind)


def integers(values: Iterable[int], kind: str) -> list[str]:
    """The types of integer parameters that are known when a build is made and the same in all its calls.

    Unless the compiler knows that a stride is 1, elements are loaded one by one; unless it knows that a size is a
    multiple of what a thread loads at once, it guards each of them.
    """
    return [f"={value}" if value in (0, 1) else integer(value, kind) for value in values]


def compile_for(build: Build, target: Any) -> Any:
    """Compile `build` for a `GPUTarget`, present or not."""
    return triton.compile(build.source(), target=target, options=build.options())


class _Pointer:
    """An address with a dtype, in the shape that `kernel[grid]` and the interpreter expect of a tensor.

    The interpreter moves tensors to the host through their storage; an address is where it is.
    """

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address

    def _self(self, *args: Any, **kwargs: Any) -> _Pointer:
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = storage_offset = size = stride = _self


def _by_subscript(build: Build) -> Launch:
    """Launch as Triton does it itself."""
    kinds = tuple(None if kind is None else _DTYPES.get(kind[1:]) if kind[0] == "*" else "" for kind in build.types)
    keywords = dict(build.constexprs) | ({} if INTERPRETED else build.options())

    def launch(grid: int, *args: Any) -> None:
        if tape := recording():
            tape.launch(launch, None, grid, args)
            return
        wrapped = [
            None if kind is None else arg if kind == "" else _Pointer(arg, kind)
            for kind, arg in zip(kinds, args, strict=True)
        ]
        build.function[(grid,)](*wrapped, **keywords)

    return launch


def _call_3_6(kernel: Any, runner: Any, build: Build) -> tuple[Callable[..., None], tuple[Any, ...], bool]:
    head = (kernel.function, runner.launch_cooperative_grid, runner.launch_pdl, None, None, kernel.packed_metadata)
    return runner.launch, (*head, None, None, None), False


def _call_3_9(kernel: Any, runner: Any, build: Build) -> tuple[Callable[..., None], tuple[Any, ...], bool]:
    head = (kernel.function, runner.launch_cooperative_grid, runner.launch_pdl, kernel.packed_metadata)
    return runner.launch, (*head, None, None, None, None, None, runner.arg_annotations, runner.kernel_signature), True


# Triton release -> (C function, arguments between the stream and the kernel's own, whether the latter are one tuple).
_CALLS = {(3, 6): _call_3_6, (3, 7): _call_3_9, (3, 8): _call_3_9, (3, 9): _call_3_9}


def triton_release() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def direct_refuses() -> str | None:
    """None if kernels are launched directly in this process, else why they go through `kernel[grid]`."""
    if INTERPRETED:
        return "Triton's interpreter runs the kernels (TRITON_INTERPRET)"
    if torch.version.hip is not None:
        return "the direct launcher knows NVIDIA's backend only"
    if triton_release() not in _CALLS:
        known = ", ".join(f"{major}.{minor}" for major, minor in _CALLS)
        return f"the direct launcher knows Triton {known}, this is {triton.__version__}"
    if triton.knobs.runtime.debug:
        return "TRITON_DEBUG is set"
    return None


def _direct(build: Build, device: int) -> Launch:
    kernel = compile_for(build, triton.runtime.driver.active.get_current_target())
    # What is in the machine code costs no call a placeholder each, out of the launcher's signature, and builds that
    # differ in it alone share one C launcher.
    runtime = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
    kernel.src = SimpleNamespace(fn=kernel.src.fn, signature=runtime, constants={})
    runner = kernel.run  # loads the binary on the current device; raises OutOfResources
    subscript = _by_subscript(build)
    if runner.global_scratch_size or runner.profile_scratch_size:
        return subscript
    function, head, packed = _CALLS[triton_release()](kernel, runner, build)

    num_warps, num_ctas, shared = kernel.packed_metadata
    native = None
    if num_ctas == 1 and not (runner.launch_cooperative_grid or runner.launch_pdl):
        native = Native(int(kernel.function), 32 * num_warps, shared, build.types)

    def guarded(grid: int, *args: Any) -> None:
        if tape := recording():
            tape.launch(launch, native, grid, args)
            return
        with torch.cuda.device(device):
            subscript(grid, *args)

    made = _in_c(native, device, guarded, kernel)
    if made is not None:
        launch: Launch = made
        return launch
    # Written out for this kernel's number of arguments: unpacking tuples into a call would cost a third of what the
    # wrapper around the C launcher costs.
    own = [f"a{index}" for index in range(len(build.types))]
    settled = [f"h{index}" for index in range(len(head))]
    passed = ", ".join(name for name, kind in zip(own, build.types, strict=True) if is_passed(kind))
    passed = f"({passed},)" if packed else passed
    source = (
        f"def launch(grid, {', '.join(own)}):\n"
        f"    if current_device() != device or enter.calls or leave.calls or tapes:\n"
        f"        guarded(grid, {', '.join(own)})\n"
        f"    else:\n"
        f"        function(grid, 1, 1, raw_stream(device), {', '.join(settled)}, {passed})\n"
    )
    names: dict[str, Any] = {
        "current_device": torch._C._cuda_getDevice,
        "raw_stream": torch._C._cuda_getCurrentRawStream,
        "enter": triton.knobs.runtime.launch_enter_hook,
        "leave": triton.knobs.runtime.launch_exit_hook,
        "tapes": _TAPES,
        "device": device,
        "guarded": guarded,
        "function": function,
        "kernel": kernel,  # held: Triton unloads the machine code of a kernel that nobody holds
        **dict(zip(settled, head, strict=True)),
    }
    exec(source, names)
    launch = names["launch"]
    return launch


def settled(launch: Launch, grid: int, args: tuple[Any, ...]) -> Callable[..., None]:
    """`launch(grid, *args)` as a function of those of `args` that are `...`, in their order.

    What does not change is not passed and packed again at every call.
    """
    holes = [f"a{index}" for index, arg in enumerate(args) if arg is ...]
    # More than thirty arguments take Python a list and a tuple; numbers that were packed take nothing.
    names: dict[str, Any] = {"launch": launch, **{f"a{index}": arg for index, arg in enumerate(args) if arg is not ...}}
    passed = ", ".join(f"a{index}" for index in range(len(args)))
    exec(f"def whole({', '.join(holes)}):\n    launch({grid}, {passed})\n", names)
    in_c = getattr(launch, "settle", None)
    found: Callable[..., None] = names["whole"] if in_c is None else in_c(grid, args, names["whole"])
    return found


class Driver(NamedTuple):
    """Of CUDA's driver what launches without Triton take."""

    launch: int  # the address of cuLaunchKernel
    parameters: Callable[[int], list[int] | None]  # a kernel's handle -> the sizes of its parameters, in bytes


@functools.cache
def driver() -> Driver | None:
    """None where kernels are launched by Triton's own launchers."""
    if direct_refuses():
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
        ask, launch = library.cuFuncGetParamInfo, library.cuLaunchKernel
    except (OSError, AttributeError) as error:  # a driver before CUDA 12.4: slower, and nothing else
        logger.warning("kernels are launched by Triton's launchers: %s: %s", type(error).__name__, error)
        return None
    ask.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]

    def parameters(kernel: int) -> list[int] | None:
        found: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        while ask(kernel, len(found), ctypes.addressof(offset), ctypes.addressof(size)) == 0:
            found.append(size.value)
            if len(found) > 256:
                return None
        return found

    return Driver(int(ctypes.cast(launch, ctypes.c_void_p).value or 0), parameters)


@functools.cache
def in_c(name: str) -> Any:
    """`<name>.c` of this package as a module, or None where there is no compiler for it: slower, and nothing else.

    It is built by the compiler that Triton builds its launchers with, and kept where those are.
    """
    from triton.runtime.build import compile_module_from_src

    try:
        return compile_module_from_src(Path(__file__).with_name(f"{name}.c").read_text(), f"vllm_gems_{name}")
    except Exception as error:
        logger.warning("%s.c is not built, and Python does its work: %s: %s", name, type(error).__name__, error)
        return None


_LETTERS = {"i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}
_SIZES = {"p": 8, "i": 4, "l": 8, "f": 4, "d": 8}


def layout(native: Native) -> tuple[str, int] | None:
    """What each argument is to `launch.c`, and the number of the kernel's parameters; None if that is not known.

    After the kernel's own come the addresses of Triton's scratch memory, of which it uses none.
    """
    found = driver()
    have = found.parameters(native.kernel) if found is not None else None
    letters = [
        " " if not is_passed(kind) else "p" if kind[0] == "*" else _LETTERS.get(kind.partition("/")[0], "")
        for kind in native.types
    ]
    sizes = [_SIZES.get(letter, 0) for letter in letters if letter != " "]
    if have is None or have[: len(sizes)] != sizes or any(size != 8 for size in have[len(sizes) :]):
        return None
    return "".join(letters), len(have)


def _in_c(native: Native | None, device: int, guarded: Launch, kernel: Any) -> Any:
    """The launch of a kernel by `launch.c`, or None where that cannot be."""
    known = layout(native) if native is not None else None
    module = in_c("launch") if known is not None else None
    if native is None or known is None or module is None or max(len(native.types) + 1, known[1]) > module.MOST:
        return None
    letters, parameters = known
    hooks = triton.knobs.runtime.launch_enter_hook.calls, triton.knobs.runtime.launch_exit_hook.calls
    core: Any = torch._C
    # The kernel is held: Triton unloads the machine code of one that nobody holds.
    asked = device, core._cuda_getDevice, core._cuda_getCurrentRawStream, *hooks, _TAPES, guarded, kernel
    address = driver().launch  # type: ignore[union-attr]
    return module.make(address, native.kernel, native.threads, native.shared, parameters, letters, asked)


def readiness(device: int) -> Callable[[], bool]:
    """() -> whether kernels of `device` can be launched past Triton now: it is current, and nobody wants to know."""
    if direct_refuses():
        return lambda: False
    current_device: Callable[[], int] = torch._C._cuda_getDevice
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return lambda: current_device() == device and not enter.calls and not leave.calls


def raw_streams(device: int) -> Callable[[int], int]:
    """(device) -> the current stream as the driver's integer; 0 where there is none."""
    if device == CPU:
        return lambda device: 0
    current: Callable[[int], int] = torch._C._cuda_getCurrentRawStream
    return current


_LAUNCHES: dict[tuple[Build, int], Launch] = {}
_LOCK = threading.RLock()


class Compiled(NamedTuple):
    """A kernel that this process made ready to launch: compiled, or loaded from Triton's cache."""

    name: str
    at: float  # the time when it was ready, as of time.time()
    seconds: float  # that it took
    late: bool  # somebody wanted to know of compilations by then, as vLLM does when it has warmed up


# Every kernel of this process, in the order in which they were made ready.
COMPILED: list[Compiled] = []


def launcher(build: Build, device: int) -> Launch:
    """The way to launch `build` on `device`, compiled and loaded if it was not.

    Raises Refused while a CUDA graph is being captured and the kernel is not compiled yet: compiling would break the
    capture. Raises NoDeviceError for CPU tensors outside the interpreter, and LateCompileError if who wants to know of
    compilations does not allow this one.
    """
    key = (build, device)
    found = _LAUNCHES.get(key)
    if found is not None:
        return found
    with _LOCK:
        if key not in _LAUNCHES:
            _LAUNCHES[key] = _noted(build, device)
        return _LAUNCHES[key]


def watched() -> bool:
    """Whether somebody wants to know of compilations, as vLLM does when it has warmed up."""
    return triton.knobs.runtime.jit_post_compile_hook is not None


def _noted(build: Build, device: int) -> Launch:
    """`_make`, counted, and told to the hook that Triton calls after compilations of its own.

    vLLM's JIT monitor is such a hook. It never hears of kernels that are compiled past `kernel[grid]`.
    """
    began = time.time()
    launch = _make(build, device)
    hook, name, ready = triton.knobs.runtime.jit_post_compile_hook, build.function.__name__, time.time()
    COMPILED.append(Compiled(name, ready, ready - began, hook is not None))
    if hook is not None:
        about = JitFunctionInfo(build.function.__module__, name, build.function)
        signature = dict(zip(build.function.arg_names, build.types, strict=False))
        known = {"signature": signature, "constants": dict(build.constexprs), **build.options()}
        try:
            hook(key=str(build), repr=name, fn=about, compile=known, is_manual_warmup=False, already_compiled=False)
        except Exception as error:
            raise LateCompileError(name, str(error)) from error
    return launch


def _make(build: Build, device: int) -> Launch:
    if INTERPRETED:
        return _by_subscript(build)
    if device == CPU:
        raise NoDeviceError("cpu")
    if torch.cuda.is_current_stream_capturing():
        raise Refused(f"{build.function.__name__} is not compiled yet and a CUDA graph is being captured")
    with torch.cuda.device(device):
        return _by_subscript(build) if direct_refuses() else _direct(build, device)


def allocator(device: int, dtype: torch.dtype) -> Callable[[int, int], Any]:
    """(rows, width) -> an uninitialised contiguous tensor, by the shortest way PyTorch has.

    Most of what `torch.empty` costs on the host is parsing; the allocation that Inductor's generated code calls has
    none, and takes the memory from the same caching allocator. While launches are recorded, the memory is the
    recording's, and what is returned knows nothing but its `data_ptr()`.
    """
    where = torch.device("cpu") if device == CPU else torch.device("cuda", device)
    shortest: Any = None
    current_device: Any = None
    if device != CPU:
        shortest = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
        current_device = torch._C._cuda_getDevice

    def empty(rows: int, width: int) -> Any:
        if _TAPES and (tape := recording()):
            return tape.memory(rows * width * dtype.itemsize)
        if shortest is not None and current_device() == device:
            return shortest((rows, width), (width, 1), dtype)
        return torch.empty((rows, width), dtype=dtype, device=where)

    return empty


def holding(empty: Callable[[int, int], Any]) -> Callable[[int], int]:
    """memory(nbytes) -> the address of so many bytes, of an `allocator` of uint8, kept as long as `memory` is."""
    held = []

    def memory(nbytes: int) -> int:
        held.append(empty(1, nbytes))
        at: int = held[-1].data_ptr()
        return at

    return memory


def strided_allocator(
    device: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Callable[[Any], Any]:
    """(anything) -> an uninitialised tensor, by the shortest way that PyTorch has; see `allocator`."""
    where = torch.device("cpu") if device == CPU else torch.device("cuda", device)
    empty = torch.empty_strided
    shortest: Any = None if device == CPU else getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if shortest is None:
        return lambda _: empty(shape, strides, dtype=dtype, device=where)
    current_device: Any = torch._C._cuda_getDevice

    def allocate(_: Any) -> Any:
        if current_device() == device:
            return shortest(shape, strides, dtype)
        return empty(shape, strides, dtype=dtype, device=where)

    return allocate


def aligned(*addresses: int) -> bool:
    """Whether all addresses (or byte strides) are multiples of 16."""
    bits = 0
    for address in addresses:
        bits |= address
    return not bits & 15
