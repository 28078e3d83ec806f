"""Triton kernels for vLLM that you can see, measure and switch off.

Nothing heavy is imported until a name is used: vLLM loads this package in every one of its processes.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module that has it. Resolved on first use (PEP 562).
_LAZY = {
    "apply_gems_patches_to_vllm": "api",
    "remove_gems_patches_from_vllm": "api",
    "gems_patches": "api",
    "report": "api",
    "enable": "api",
    "only_enable": "api",
    "disable": "api",
    "use_gems": "api",
}

__all__ = ["__version__", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
