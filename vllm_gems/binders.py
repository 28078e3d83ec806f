"""The ways into vLLM, one binder per kind of place: check it, put a replacement there, return the undo.

A binder creates nothing that was not there, and its undo leaves the identical objects behind.
"""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from . import probes
from .nouns import Place
from .sites import reseat, unseat
from .worlds import World

Undo = Callable[[], None]
# original -> replacement
Adapt = Callable[[Any], Any]


@dataclass(frozen=True)
class Bound:
    """A replacement in place."""

    undo: Undo
    replaced: str  # what stood there, as it calls itself


def _accepts(found: str | None, expected: Iterable[str], what: str) -> str | None:
    if found is None:
        return f"{what} is not there"
    if found in expected:
        return None
    return f"{what} is now {found}, not {' or '.join(expected)}"


class AttributeBinder:
    """A function of a module or a method of a class, replaced by assignment."""

    def refuses(self, place: Place, world: World, platform: str) -> str | None:
        found = world.signature(place.module, place.name)
        if reason := _accepts(found, place.expects, str(place)):
            return reason
        if place.sources:
            source = world.source_hash(place.module, place.name)
            if source not in place.sources:
                return f"the source of {place} ({source}) is none of those that the replacement was written against"
        return None

    def bind(self, place: Place, adapt: Adapt, platform: str) -> Bound:
        owner_name, _, attribute = place.name.rpartition(".")
        owner = _owner(place.module, owner_name)
        own = vars(owner)
        inherited = attribute not in own
        before = None if inherited else own[attribute]  # not getattr: a staticmethod must come back as one
        original = getattr(owner, attribute)
        replacement = adapt(original)
        setattr(owner, attribute, replacement)
        if not getattr(sys.modules[place.module].__spec__, "_initializing", False):
            _reseat(owner, original, replacement)  # while its module is being imported, a class has no instances

        def undo() -> None:
            if vars(owner).get(attribute) is not replacement:
                raise RuntimeError(f"{place} was patched again by someone else; undo that first")
            if inherited:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, before)
            _reseat(owner, replacement, original)
            if hasattr(replacement, "live"):  # for those who have copied it
                replacement.live = None

        return Bound(undo, f"{original.__module__}.{original.__qualname__}")


def _owner(module: str, qualname: str) -> Any:
    owner: Any = sys.modules[module]
    for part in filter(None, qualname.split(".")):
        owner = getattr(owner, part)
    return owner


def instances(*classes_: type) -> list[Any]:
    """The live instances of `classes_` and of their subclasses, in one walk over the heap, the frozen ones among them.

    vLLM freezes the heap when a worker is warm; the collector's searches do not look at what is frozen.
    """
    classes = {each for cls in classes_ for each in (cls, *_subclasses(cls))}
    frozen = gc.get_freeze_count()
    if frozen:
        gc.unfreeze()
    try:
        return [obj for obj in gc.get_referrers(*classes) if type(obj) in classes]
    finally:
        if frozen:
            gc.freeze()


def _subclasses(cls: type) -> Iterable[type]:
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _reseat(owner: Any, before: Any, after: Any) -> None:
    """Instances of vLLM's CustomOp keep the method that they chose at birth; those that chose `before` get `after`.

    Other modules lose the settled call that was put over their class's method.
    """
    if not isinstance(owner, type):
        return
    site = getattr(before, "__vllm_gems__", None)
    for obj in instances(owner):
        slot = vars(obj).get("_forward_method") if hasattr(obj, "__dict__") else None
        ours = site is not None and getattr(slot, "__vllm_gems__", None) is site
        if ours or getattr(slot, "__func__", None) is before:
            reseat(obj, MethodType(after, obj))
        elif site is not None and slot is None and hasattr(obj, "__dict__"):
            unseat(obj, site)


class OpBinder:
    """The kernel of an existing op in PyTorch's dispatcher, with the covered kernel kept as the fallback."""

    _KEYS = {"cuda": "CUDA", "cpu": "CPU"}  # noqa: RUF012

    def _operation(self, name: str) -> str:
        return name

    def _has_kernel(self, name: str, key: str) -> bool:
        import torch

        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))

    def refuses(self, place: Place, world: World, platform: str) -> str | None:
        schemas = world.schemas(self._operation(place.name))
        if not schemas:
            return f"no op {place} is registered"
        found = {probes.normalise_schema(schema) for schema in schemas}
        if not found & set(place.expects):
            return _accepts(" or ".join(sorted(found)), place.expects, str(place))
        return None

    def bind(self, place: Place, adapt: Adapt, platform: str) -> Bound:
        import torch

        # Newer releases of PyTorch want to be told that a kernel made in Python may be covered by another.
        known = inspect.signature(torch.library.Library.impl).parameters
        allow = {"allow_override": True} if "allow_override" in known else {}
        key = self._KEYS[platform]
        namespace, _, name = place.name.partition("::")
        if not self._has_kernel(place.name, key):
            raise LookupError(f"{place} has no {key} kernel, so there is nothing to stand in for")
        if not hasattr(torch.library, "get_kernel"):
            raise LookupError("this PyTorch cannot keep the covered kernel (torch.library.get_kernel is missing)")
        original = torch.library.get_kernel(place.name, key)
        library = torch.library.Library(namespace, "IMPL")
        with warnings.catch_warnings():
            # Some releases of PyTorch warn once.
            warnings.filterwarnings("ignore", message="(?s).*overriding a previously registered kernel")
            library.impl(name, adapt(original), key, with_keyset=True, **allow)
        return Bound(library._destroy, f"the {key} kernel of {place}")


class AtenBinder(OpBinder):
    """The same for an overload of PyTorch's own, whose kernel may be one that serves all devices."""

    def _operation(self, name: str) -> str:
        return name.partition(".")[0]

    def _has_kernel(self, name: str, key: str) -> bool:
        import torch

        return bool(torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key))


class IrBinder:
    """A provider of a vLLM IR op; which provider runs is the user's choice (`--ir-op-priority.<op>`)."""

    PROVIDER = "vllm_gems"

    def refuses(self, place: Place, world: World, platform: str) -> str | None:
        return _accepts(world.signature(place.module, place.name), place.expects, f"vllm.ir.ops.{place.name}")

    def bind(self, place: Place, adapt: Adapt, platform: str) -> Bound:
        op = getattr(sys.modules[place.module], place.name)
        if self.PROVIDER in op.impls:
            raise LookupError(f"vllm.ir.ops.{place.name} has a provider {self.PROVIDER!r} already")
        implementation, supports_args = adapt(op)
        op.register_impl(self.PROVIDER, supports_args=supports_args)(implementation)

        def undo() -> None:
            ours = op.impls.pop(self.PROVIDER)
            op._priority_impls = [impl for impl in op._priority_impls if impl is not ours]

        return Bound(undo, f"providers {', '.join(name for name in op.impls if name != self.PROVIDER)}")


class BackendBinder:
    """An attention backend of vLLM's registry, overridden by a class of ours named by its path."""

    MODULE = "vllm.v1.attention.backends.registry"

    def refuses(self, place: Place, world: World, platform: str) -> str | None:
        return _accepts(world.signature(self.MODULE, "register_backend"), place.expects, "register_backend")

    def bind(self, place: Place, adapt: Adapt, platform: str) -> Bound:
        registry = sys.modules[self.MODULE]
        member = registry.AttentionBackendEnum[place.name]
        overridden = member.is_overridden()
        before = member.get_path()
        # By keyword: the order of the parameters changed in 0.14.
        registry.register_backend(member, class_path=adapt(before))

        def undo() -> None:
            if overridden:
                registry.register_backend(member, class_path=before)
            else:
                member.clear_override()

        return Bound(undo, before)


BINDERS: dict[str, Any] = {
    "attribute": AttributeBinder(),
    "op": OpBinder(),
    "aten": AtenBinder(),
    "ir": IrBinder(),
    "backend": BackendBinder(),
}
