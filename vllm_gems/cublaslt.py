"""cuBLASLt called directly: a product of many rows in one C call, with a plan that is made once for its shape.

`torch.nn.functional.linear` spends the host's time on the dispatcher, an allocation, and cuBLAS looking for an
algorithm, at every call. What that search depends on is settled for a layer but for the number of rows. What is left is
the call itself, with addresses, into the library that PyTorch has loaded: the same algorithms, by the same heuristic.

Source of the interface: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int, c_size_t, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch

from .errors import Refused
from .launch import recording

# Bytes of memory that a product may use beside its operands; what PyTorch gives cuBLAS on Hopper.
WORKSPACE = 32 << 20
# Every address is a multiple of this many bytes.
ALIGNMENT = 16

# Of cublasLt.h and library_types.h.
_REAL = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_32F = 68
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8
_TRANSPOSED, _WITH_BIAS = 1, 4
_MOST_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)

_CALLS = {
    "cublasLtCreate": (c_void_p,),
    "cublasLtMatmulDescCreate": (c_void_p, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, ctypes.c_int64),
    "cublasLtMatmulPreferenceCreate": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (*(c_void_p,) * 7, c_int, c_void_p, c_void_p),
    "cublasLtMatmul": (*(c_void_p,) * 14, c_size_t, c_void_p),
}


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class _Plan(NamedTuple):
    """For one number of rows."""

    x_layout: int
    out_layout: int
    algorithm: int
    held: _Algorithm


def _load() -> Any:
    if torch.version.cuda is None:
        raise OSError("this PyTorch was not built for CUDA")
    # By the name that it is loaded under. The interpreter's lock is kept: a call takes a few us, and does not wait.
    return ctypes.PyDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")


@functools.cache
def _library() -> Any:
    """The library, or why there is none, as Refused."""
    try:
        library = _load()
        for name, types in _CALLS.items():
            getattr(library, name).argtypes = types
    except (OSError, AttributeError) as error:
        return Refused(f"no cuBLASLt: {error}")
    return library


def _call(name: str, *args: Any) -> None:
    status = getattr(_library(), name)(*args)
    if status:
        raise Refused(f"{name} returned status {status}")


def _created(name: str, *args: Any) -> int:
    found = c_void_p()
    _call(name, ctypes.addressof(found), *args)
    return int(found.value or 0)


@functools.cache
def _handle(device: int) -> int:
    """Safe for many threads. Made while `device` is the current one."""
    return _created("cublasLtCreate")


@functools.cache
def bind_product(
    in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: int
) -> Callable[..., None]:
    """x @ weight.T + bias, summed in float32, with everything settled that a layer knows for ever.

    product(x_at, weight_at, bias_at, out_at, num_rows, workspace_at, addend_at=0) takes addresses of contiguous
    tensors, x [num_rows, in_features], weight [out_features, in_features], bias [out_features], out and what is added
    to it before it is rounded [num_rows, out_features] and WORKSPACE bytes, launches on the current stream and checks
    nothing but their alignment. For a number of rows that it sees for the first time it asks cuBLASLt for an algorithm.

    Raises Refused where there is no cuBLASLt, or none of its algorithms does this.
    """
    library = _library()
    if isinstance(library, Refused):
        raise library
    if dtype not in _REAL:
        raise Refused(f"a product in {dtype}")
    core: Any = torch._C
    current_device, current_stream = core._cuda_getDevice, core._cuda_getCurrentRawStream
    if current_device() != device:
        raise Refused(f"the current device is not {device}, where the tensors are")
    kind, handle, matmul = _REAL[dtype], _handle(device), library.cublasLtMatmul
    one, zero = c_float(1.0), c_float(0.0)
    one_at, zero_at = ctypes.addressof(one), ctypes.addressof(zero)
    # cuBLAS counts columns first. So to it x is [in_features, num_rows], the weight is [in_features, out_features] and
    # to be transposed, and the bias is added to each column of the result.
    weight_layout = _created("cublasLtMatrixLayoutCreate", kind, in_features, out_features, in_features)

    @functools.cache
    def described(bias_at: int) -> int:
        found = _created("cublasLtMatmulDescCreate", _COMPUTE_32F, _REAL[torch.float32])
        settings: list[tuple[int, Any]] = [(_TRANSPOSE_A, c_int(_TRANSPOSED))]
        if bias:
            settings += [(_EPILOGUE, c_int(_WITH_BIAS)), (_BIAS_POINTER, c_void_p(bias_at))]
        for attribute, value in settings:
            size = ctypes.sizeof(value)
            _call("cublasLtMatmulDescSetAttribute", found, attribute, ctypes.addressof(value), size)
        return found

    def planned(num_rows: int, description: int) -> _Plan:
        x_layout = _created("cublasLtMatrixLayoutCreate", kind, in_features, num_rows, in_features)
        out_layout = _created("cublasLtMatrixLayoutCreate", kind, out_features, num_rows, out_features)
        preference = _created("cublasLtMatmulPreferenceCreate")
        most = c_uint64(WORKSPACE)
        _call("cublasLtMatmulPreferenceSetAttribute", preference, _MOST_WORKSPACE, ctypes.addressof(most), 8)
        alignment = ctypes.c_uint32(ALIGNMENT)
        for attribute in _ALIGNMENTS:
            _call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, ctypes.addressof(alignment), 4)
        best, count = _Algorithm(), c_int()
        _call(
            "cublasLtMatmulAlgoGetHeuristic", handle, description, weight_layout, x_layout, out_layout, out_layout,
            preference, 1, ctypes.addressof(best), ctypes.addressof(count),
        )  # fmt: skip
        if not count.value or best.status:
            raise Refused(f"cuBLASLt has no algorithm for {num_rows} rows of {in_features} to {out_features}")
        return _Plan(x_layout, out_layout, ctypes.addressof(best), best)

    plans: dict[int, _Plan] = {}

    def product(
        x_at: int, weight_at: int, bias_at: int, out_at: int, num_rows: int, workspace_at: int, addend_at: int = 0
    ) -> None:
        if (x_at | weight_at | bias_at | out_at | addend_at) % ALIGNMENT:
            raise Refused(f"addresses that are no multiples of {ALIGNMENT} bytes")
        if current_device() != device:
            raise Refused(f"the current device is not {device}, where the tensors are")
        description = described(bias_at)
        plan = plans.get(num_rows)
        if plan is None:
            plan = plans.setdefault(num_rows, planned(num_rows, description))
        x_layout, out_layout, algorithm, _ = plan
        times_at, added_at = (one_at, addend_at) if addend_at else (zero_at, out_at)
        if tape := recording():
            tape.hold(plan)
            tape.call(
                matmul, handle, description, one_at, weight_at, weight_layout, x_at, x_layout, times_at, added_at,
                out_layout, out_at, out_layout, algorithm, workspace_at, WORKSPACE, tape.stream(),
            )  # fmt: skip
            return
        status = matmul(
            handle, description, one_at, weight_at, weight_layout, x_at, x_layout, times_at, added_at, out_layout,
            out_at, out_layout, algorithm, workspace_at, WORKSPACE, current_stream(device),
        )  # fmt: skip
        if status:
            raise RuntimeError(f"cublasLtMatmul returned status {status} for {num_rows} rows")

    # Held: cuBLASLt is given their addresses at every call.
    product.__dict__["constants"] = one, zero
    return product
