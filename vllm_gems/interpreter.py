"""Triton's interpreter (TRITON_INTERPRET=1), made numerically right so that tests without a GPU mean something.

As shipped it keeps bf16 and fp8 as raw integers: arithmetic on them is arithmetic on bit patterns, stores truncate,
fp8 overflow is garbage. It rounds a fused multiply-add twice (before Triton 3.9), sums bf16 in bf16, has no libdevice,
and autotuning asks for a GPU driver. `install()` corrects that in place, for Triton 3.6 to 3.9.

What a GPU refuses is still refused here (tl.exp of a bf16, say): a kernel that passes in the interpreter must compile.
Inline assembly stays unsupported.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

from .errors import GemsError

Array = Any  # numpy.ndarray; numpy is imported by install()

_LOCK = threading.Lock()

# Triton's name of a type -> the ml_dtypes type whose numpy arrays hold it. Its fp8e4b15 has none and stays as it is.
_HELD = {
    "bf16": "bfloat16",
    "fp8e4nv": "float8_e4m3fn",
    "fp8e5": "float8_e5m2",
    "fp8e4b8": "float8_e4m3fnuz",
    "fp8e5b16": "float8_e5m2fnuz",
}

# Everything of Triton's that is replaced, or called under the assumption that it means what it means in 3.6 to 3.9.
_RELIED_ON = {
    "triton.runtime.interpreter": (
        "InterpretedFunction",
        "InterpreterBuilder.cast_impl",
        "InterpreterBuilder.create_clampf",
        "InterpreterBuilder.create_dot",
        "InterpreterBuilder.create_extern_elementwise",
        "InterpreterBuilder.create_fma",
        "InterpreterBuilder.create_fp_to_fp",
        "InterpreterBuilder.create_maxnumf",
        "InterpreterBuilder.create_minnumf",
        "ReduceOps.sum",
        "ScanOps.cumsum",
        "TensorHandle",
        "_get_np_dtype",
        "_interpreter.atomic_cas",
        "_interpreter.atomic_rmw",
        "_interpreter.load",
        "_interpreter.store",
        "_ir.PROPAGATE_NAN.NONE",
        "_ir.ROUNDING_MODE.RTZ",
        "interpreter_builder",
        "interpreter_semantic",
    ),
    "triton.runtime.autotuner": ("Autotuner.do_bench",),
    "triton.language": ("sum",),
    "triton.language.extra.libdevice": ("exp",),
    "triton.language.extra.cuda.libdevice": ("exp",),
}


class MissingMlDtypesError(GemsError, ImportError):
    """numpy has no bf16 and no fp8 of its own."""

    def __init__(self) -> None:
        super().__init__("Triton's interpreter needs ml_dtypes to compute in bf16 and fp8; pip install ml_dtypes.")


class NotInterpretedError(GemsError, RuntimeError):
    """Triton compiles its kernels in this process; what the interpreter needs would break them."""

    def __init__(self) -> None:
        super().__init__(
            "Triton compiles kernels in this process instead of interpreting them; set TRITON_INTERPRET=1 in the "
            "environment before the first import of triton."
        )


class InterpreterDriftError(GemsError, RuntimeError):
    """Triton's interpreter is not the one that we know how to correct."""

    def __init__(self, version: str, missing: str) -> None:
        super().__init__(
            f"Triton {version} has no {missing}, which the corrections to its interpreter rely on. Use Triton 3.6 to "
            "3.9, a newer vllm-gems, or a GPU without TRITON_INTERPRET."
        )


def install() -> None:
    """Correct Triton's interpreter, once per process; calling it again changes nothing.

    Kernels may be defined before or after. libdevice functions must be called as attributes of their module: a name
    imported from it earlier stays what it was.

    Raises NotInterpretedError, MissingMlDtypesError or InterpreterDriftError, and then nothing has been changed.
    """
    with _LOCK:
        _check_internals()
        interpreter = import_module("triton.runtime.interpreter")
        if isinstance(interpreter._interpreter, _Memory):
            return
        if not isinstance(import_module("triton.language").sum, interpreter.InterpretedFunction):
            raise NotInterpretedError
        formats = _Formats()
        _hold(interpreter, formats)
        _replace_builder(interpreter, formats)
        _replace_reductions(interpreter, formats)
        _replace_libdevice(interpreter.interpreter_semantic)
        import_module("triton.runtime.autotuner").Autotuner.do_bench = staticmethod(_run_once)


def _check_internals() -> None:
    for module, names in _RELIED_ON.items():
        for name in names:
            try:
                attrgetter(name)(import_module(module))
            except (ImportError, AttributeError) as error:
                raise InterpreterDriftError(import_module("triton").__version__, f"{module}.{name}") from error


class _Formats:
    """How numbers get into the types that numpy lacks, and out of them."""

    def __init__(self) -> None:
        try:
            import ml_dtypes
        except ImportError as error:
            raise MissingMlDtypesError from error
        import numpy as np

        self.by_name = {name: np.dtype(getattr(ml_dtypes, held)) for name, held in _HELD.items()}
        self.held = frozenset(self.by_name.values())
        self.narrow = self.held | {np.dtype(np.float16)}
        self.limits = {dtype: float(ml_dtypes.finfo(dtype).max) for dtype in self.held if dtype.itemsize == 1}

    def bits(self, data: Array) -> Array:
        """`data` as the C++ half of the interpreter takes it: unsigned integers in place of a held type."""
        return data.view(f"u{data.dtype.itemsize}") if data.dtype in self.held else data

    def widen(self, data: Array) -> Array:
        """`data` in fp32 if it is a float of fewer bits; exact."""
        return data.astype("f4") if data.dtype in self.narrow else data

    def cast(self, data: Array, dtype: Any) -> Array:
        """`data` as `dtype`, rounded once, to nearest even; fp8 saturates as NVIDIA's cvt.rn.satfinite does."""
        data = self.widen(data)
        if dtype not in self.held:
            return data.astype(dtype)
        if data.dtype != "f4":  # ml_dtypes would round to fp32 first, and then again
            exact = data.astype("f8")
            near = exact.astype("f4")
            data = _to_odd(near, exact - near)
        if dtype in self.limits:
            data = data.clip(-self.limits[dtype], self.limits[dtype])
        return data.astype(dtype)

    def truncate(self, data: Array, dtype: Any) -> Array:
        """`data` as the float type `dtype`, rounded toward zero."""
        near = self.cast(data, dtype)
        beyond = abs(near.astype("f8")) > abs(data.astype("f8"))
        return (near.view(f"u{dtype.itemsize}") - beyond).view(dtype)  # one step nearer to zero, whatever the sign

    def fma(self, x: Array, y: Array, z: Array) -> Array:
        """x * y + z of values of at most 32 bits, in fp64 so that rounding it to their type rounds the exact value."""
        product, z = x.astype("f8") * y.astype("f8"), z.astype("f8")  # the product is exact
        total = product + z
        part = total - product
        return _to_odd(total, (product - (total - part)) + (z - part))


def _to_odd(near: Array, error: Array) -> Array:
    """`near`, or where it differs from the exact value near + error and is even, its odd neighbour on that side.

    Rounding once more, to a type with at least two bits fewer, then gives what rounding the exact value would.
    """
    import numpy as np

    even = near.view(f"u{near.dtype.itemsize}") & 1 == 0
    up, down = (np.nextafter(near, near.dtype.type(end)) for end in (np.inf, -np.inf))
    return np.where(even & (error > 0), up, np.where(even & (error < 0), down, near))


class _Memory:
    """The C++ half of the interpreter, which knows numpy's own types only: held values cross over as bits."""

    def __init__(self, native: Any, formats: _Formats) -> None:
        self._native, self._formats = native, formats

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def load(self, pointers: Array, mask: Array, other: Array, dtype: Any) -> Array:
        bits = self._formats.bits(other)
        raw = f"u{dtype.itemsize}" if dtype in self._formats.held else dtype
        return self._native.load(pointers, mask, bits, bits.dtype.newbyteorder("=") if raw != dtype else dtype).view(dtype)

    def store(self, pointers: Array, values: Array, mask: Array) -> None:
        self._native.store(pointers, self._formats.bits(values), mask)
