"""Everything there is to bind: ours and third parties', through the same door."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pluggy

from . import hookspecs
from .errors import DuplicateNameError, UnknownNameError
from .hookspecs import hookimpl
from .nouns import Kernel, Patch, Row, Seam

T = TypeVar("T", Kernel, Seam, Patch)


class _BuiltIn:
    """What this distribution brings, as a plugin like any other."""

    @hookimpl
    def vllm_gems_kernels(self) -> Iterable[Kernel]:
        from .kernels import (
            activation,
            block_fp8_experts,
            block_fp8_linear,
            decode_attention,
            head_linear,
            linear,
            mla_decode,
            mla_rope_and_cache,
            moe_experts,
            moe_routing,
            rms_norm,
            rope_and_cache,
            rotary_embedding,
            top_p,
        )

        modules = (
            rms_norm,
            rotary_embedding,
            activation,
            linear,
            block_fp8_linear,
            rope_and_cache,
            decode_attention,
            moe_routing,
            mla_decode,
            top_p,
            mla_rope_and_cache,
            head_linear,
            moe_experts,
            block_fp8_experts,
        )
        return [kernel for module in modules for kernel in module.KERNELS]

    @hookimpl
    def vllm_gems_seams(self) -> Iterable[Seam]:
        from .seams import SEAMS

        return SEAMS.values()

    @hookimpl
    def vllm_gems_patches(self) -> Iterable[Patch]:
        from .patches import (
            activation,
            attention,
            decoder,
            deepseek,
            graphs,
            layernorm,
            mla,
            mla_step,
            moe,
            moe_step,
            rotary,
            sampler,
        )

        modules = (
            layernorm, rotary, activation, attention, decoder, deepseek, moe, mla, mla_step, moe_step, sampler, graphs,
        )  # fmt: skip
        return [patch for module in modules for patch in module.PATCHES]


class Catalog:
    """Kernels, seams and patches by name. Kernels are asked for only when used, because they import torch."""

    def __init__(
        self, manager: pluggy.PluginManager, seams: Iterable[Iterable[Seam]], patches: Iterable[Iterable[Patch]]
    ) -> None:
        self.manager = manager
        self.seams = _by_name("seam", seams)
        self.patches = _by_name("patch", patches)
        for patch in self.patches.values():
            lookup("seam", self.seams, patch.seam)

    @functools.cached_property
    def kernels(self) -> Mapping[str, Kernel]:
        kernels = _by_name("kernel", self.manager.hook.vllm_gems_kernels())
        for patch in self.patches.values():
            for name in patch.kernels:
                lookup("kernel", kernels, name)
        return kernels

    def vetoes(self, patch: Patch, facts: Mapping[str, Any]) -> str | None:
        """The first sentence that a plugin says against `patch`, or None."""
        reason: str | None = self.manager.hook.vllm_gems_refuses(patch=patch, facts=facts)
        return reason

    def tell(self, row: Row) -> None:
        """Let the plugins know of a decision."""
        self.manager.hook.vllm_gems_bound(row=row)


def _by_name(kind: str, groups: Iterable[Iterable[T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    # pluggy calls the last registered first; ours come first in every list.
    for group in reversed(list(groups)):
        for item in group:
            if item.name in found:
                first = getattr(found[item.name], "distribution", "another plugin")
                raise DuplicateNameError(kind, item.name, first, getattr(item, "distribution", "a plugin"))
            found[item.name] = item
    return found


def lookup(kind: str, table: Mapping[str, T], name: str) -> T:
    """table[name], or an error that says what was probably meant."""
    try:
        return table[name]
    except KeyError:
        raise unknown(kind, table, name) from None


def unknown(kind: str, table: Iterable[str], name: str) -> UnknownNameError:
    """The error that says what was probably meant."""
    return UnknownNameError(kind, name, difflib.get_close_matches(name, table))


@functools.cache
def plugins() -> pluggy.PluginManager:
    """Ours, and every installed one of the entry-point group `vllm_gems`."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(_BuiltIn(), name="vllm-gems")
    manager.load_setuptools_entrypoints(hookspecs.PROJECT)
    manager.check_pending()
    return manager


@functools.cache
def catalog() -> Catalog:
    """What there is for vLLM in this process."""
    manager = plugins()
    return Catalog(manager, manager.hook.vllm_gems_seams(), manager.hook.vllm_gems_patches())


@functools.cache
def aten_catalog() -> Catalog:
    """What there is for PyTorch's own operations in this process."""
    from .patches import aten

    pairs = aten.overrides(aten.torch_platform())
    return Catalog(plugins(), [[seam for seam, _ in pairs]], [[patch for _, patch in pairs]])
