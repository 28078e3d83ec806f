"""A GPU that is not there: `standin_cuda.c` below Triton's own C launcher, and the few calls of torch.cuda above it.

For a process of its own, started with `environment()`: `install()` is never undone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent

STREAM = 77  # the only one that standin_cublaslt.c takes


def compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def refuses() -> str | None:
    """None if this machine can build the stand-in and Triton's C launcher, else why not."""
    if compiler() is None:
        return "there is no C compiler, which Triton builds its launcher with"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "this Python came without its headers, which Triton builds its launcher with"
    return None


def environment(folder: Path) -> dict[str, str]:
    """Build the library in `folder`; the environment variables of a process that is to find it."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    headers = Path(spec.submodule_search_locations[0], "backends", "nvidia", "include")
    cc, library = compiler(), folder / "libcuda.so.1"
    assert cc is not None
    subprocess.run(
        [cc, "-shared", "-fPIC", f"-I{headers}", f"-Wl,-soname,{library.name}", "-o", library,
         HERE / "standin_cuda.c"],
        check=True,
    )  # fmt: skip
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": str(HERE.parent),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(folder),
    }


class _Record(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("stream", ctypes.c_ulonglong),
        ("function", ctypes.c_ulonglong),
        ("device", ctypes.c_int),
        ("size", ctypes.c_int),
        ("parameters", ctypes.c_ubyte * 512),
    )


class Launch(NamedTuple):
    """What reached cuLaunchKernelEx. Two loads of the same machine code have the same `code`."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    stream: int
    device: int
    parameters: bytes
    code: bytes


class Standin:
    """What the test may set, and what the library saw."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.standin_launch.restype = ctypes.POINTER(_Record)
        self.library.standin_set_parameters.argtypes = [ctypes.c_ulonglong, ctypes.c_int, ctypes.c_void_p]
        self.code: dict[int, bytes] = {}  # by function
        self.device = 0
        self.capturing = False

    @property
    def loaded(self) -> int:
        """Modules ever loaded."""
        return int(self.library.standin_loaded())

    def set_device(self, device: int) -> int:
        """Make `device` the current one; the one before."""
        before, self.device = self.device, device
        self.library.standin_set_device(device)
        return before

    def stream(self, device: int) -> int:
        """The current stream of `device`."""
        return 0x5000 + device

    def on_load(self, module: int, function: int, name: str, files: dict[str, str], digest: str) -> None:
        """Triton's hook: learn from the PTX how long the parameters are, as the real driver does from the binary."""
        paths = {Path(file).suffix: Path(path) for file, path in files.items()}
        (entry,) = re.findall(r"\.entry \w+\((.*?)\)", paths[".ptx"].read_text(), re.DOTALL)
        sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry)]
        self.library.standin_set_parameters(function, len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        self.code[function] = paths[".cubin"].read_bytes()

    @contextmanager
    def launches(self) -> Iterator[list[Launch]]:
        """What is launched in this context; filled when it ends."""
        first, found = self.library.standin_launched(), []
        yield found
        for index in range(first, self.library.standin_launched()):
            record = self.library.standin_launch(index).contents
            shape = tuple(record.grid), tuple(record.block), record.shared, record.attributes
            parameters = bytes(record.parameters[: record.size])
            found.append(Launch(*shape, record.stream, record.device, parameters, self.code[record.function]))


def install() -> Standin:
    """Let PyTorch and Triton believe in two H100s."""
    import torch
    import triton

    standin = Standin()
    current: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: standin.device,
        "set_device": standin.set_device,
        "get_device_capability": lambda device=None: (9, 0),
        "is_current_stream_capturing": lambda: standin.capturing,
        "_exchange_device": standin.set_device,
        "_maybe_exchange_device": standin.set_device,
    }
    for name, function in current.items():
        setattr(torch.cuda, name, function)
    torch._C._cuda_getDevice = lambda: standin.device
    torch._C._cuda_getCurrentRawStream = standin.stream
    torch._C._cuda_isCurrentStreamCapturing = lambda: standin.capturing
    triton.knobs.runtime.kernel_load_end_hook.add(standin.on_load)
    return standin
