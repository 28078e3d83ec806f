"""Hooks for distributions that bring their own kernels, seams or patches (entry-point group `vllm_gems`).

An entry point names a module or object whose `@hookimpl` functions have the names below; they may take fewer
arguments than declared here. Hooks run while patches are planned and bound, never while vLLM serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pluggy

from .nouns import Kernel, Patch, Row, Seam

PROJECT = "vllm_gems"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def vllm_gems_kernels() -> Iterable[Kernel]:  # type: ignore[empty-body]
    """Yield kernels to add to the catalog."""


@hookspec
def vllm_gems_seams() -> Iterable[Seam]:  # type: ignore[empty-body]
    """Yield seams to add to the catalog."""


@hookspec
def vllm_gems_patches() -> Iterable[Patch]:  # type: ignore[empty-body]
    """Yield patches to add to the catalog."""


@hookspec(firstresult=True)
def vllm_gems_refuses(patch: Patch, facts: Mapping[str, Any]) -> str | None:
    """Return a sentence to veto `patch` on this machine; the first sentence counts. None lets it pass."""


@hookspec
def vllm_gems_bound(row: Row) -> None:
    """Called after each decision about a patch: bound, refused, waiting, off."""
