"""Kernels run in Triton's interpreter where there is no GPU; it must be chosen before Triton is imported."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # benchmarks and tools, which are no part of the package

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _overrides_start_at_nought() -> None:
    """What earlier tests did with PyTorch's operations is not counted."""
    used = sys.modules.get("vllm_gems.overrides")
    if used is not None:
        used.overrides().reset_counts()


# cuBLASLt where there is no GPU: a stand-in


@pytest.fixture(scope="session")
def cublaslt_built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    import standin

    if reason := standin.refuses():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("cublaslt") / "libcublasLt.so"
    command = [str(standin.compiler()), "-shared", "-fPIC", "-O2", "-o", str(path), str(HERE / "standin_cublaslt.c")]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def cublaslt_caches() -> Iterator[None]:
    """Nothing is known of cuBLASLt before and after."""
    from vllm_gems import cublaslt

    caches = cublaslt._library, cublaslt._handle, cublaslt.bind_product
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def library(cublaslt_built: pathlib.Path, cublaslt_caches: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch
    from standin import STREAM

    from vllm_gems import cublaslt, launch

    found = ctypes.PyDLL(str(cublaslt_built))
    monkeypatch.setattr(cublaslt, "_load", lambda: found)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: launch.CPU, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(launch, "raw_streams", lambda device: lambda device: STREAM)
    return found
