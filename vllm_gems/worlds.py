"""Where probes look: the vLLM of this process, or (in tests) a release recorded from its wheel."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from . import probes


class World(Protocol):
    """What a probe may ask. Nothing is imported to answer it."""

    def has_module(self, module: str) -> bool: ...

    def signature(self, module: str, qualname: str) -> str | None:
        """Of a function or method, inherited ones included; None if there is none."""

    def source_hash(self, module: str, qualname: str) -> str | None: ...

    def schemas(self, op: str) -> tuple[str, ...]:
        """Of "namespace::name"; empty if it is not registered."""


class LiveWorld:
    """The modules that this process has imported."""

    def has_module(self, module: str) -> bool:
        found = sys.modules.get(module)
        spec = getattr(found, "__spec__", None)
        return found is not None and not getattr(spec, "_initializing", False)

    def signature(self, module: str, qualname: str) -> str | None:
        found = find(module, qualname)
        try:
            return None if found is None else probes.signature_of(found)
        except (TypeError, ValueError):
            return None

    def source_hash(self, module: str, qualname: str) -> str | None:
        found = find(module, qualname)
        try:
            return None if found is None else probes.hash_of(found)
        except (OSError, TypeError):
            return None

    def schemas(self, op: str) -> tuple[str, ...]:
        import torch

        return tuple(str(schema) for schema in torch._C._jit_get_schemas_for_operator(op))


def find(module: str, qualname: str) -> Any:
    """The callable at module:qualname of an imported module, or None."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    native = getattr(found, "impls", {}).get("native")  # a vLLM IR op: what it means is its native implementation
    return found if native is None else native.impl_fn
