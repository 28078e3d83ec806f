"""Triton kernels for vLLM that you can see, measure and switch off.

Nothing heavy is imported until a name is used: vLLM loads this package in every one of its processes.
"""

from __future__ import annotations

import importlib
import importlib.util
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
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    # A module of ours that nobody has imported yet is asked for here, too, before it is imported.
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    standalone = importlib.import_module(f"{__name__}.standalone")  # every op is a function of the package
    if name == "device":
        return standalone.device()
    # From now on it is found without coming here, which costs more than most calls of it.
    function = globals()[name] = standalone.function(name)
    return function


def __dir__() -> list[str]:
    standalone = importlib.import_module(f"{__name__}.standalone")
    return sorted({*globals(), *_LAZY, "device", *standalone.names()})
