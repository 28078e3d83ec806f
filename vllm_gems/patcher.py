"""The one object that changes the world: plan, bind now or when vLLM imports the module, undo in reverse."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import policy as policies
from . import seams
from .binders import BINDERS, Bound, instances
from .catalog import Catalog, lookup, unknown
from .errors import NotBoundError, UnknownNameError
from .nouns import Patch, Place, Row, Seam, State
from .policy import Policy
from .sites import Site
from .worlds import LiveWorld, World, find

logger = logging.getLogger("vllm_gems")


@dataclass
class _Entry:
    """What is known of one patch so far."""

    patch: Patch
    seam: Seam
    state: State = State.WAITING
    why: str = ""
    wanted: bool = False
    place: Place | None = None
    site: Site | None = None
    bound: Bound | None = None


class Patcher:
    """Binds the patches of a catalog as a policy wants it. Every change it makes it can take back."""

    def __init__(
        self, catalog: Catalog, world: World | None = None, platform: Callable[[], str] | None = None
    ) -> None:
        self.catalog = catalog
        self._platform = platform
        self.world: World = world or LiveWorld()
        self.policy = Policy()
        self._entries: dict[str, _Entry] = {}
        self._order: list[_Entry] = []  # bound, in this order
        self._watcher = _Watcher(self._imported)
        self._lock = threading.RLock()

    def apply(self, policy: Policy, names: Iterable[str] | None = None) -> tuple[str, ...]:
        """Bind what `policy` wants and is not bound yet; returns the names of the patches that this call bound.

        names: the patches to decide about, whatever the policy says of them by name; None for all, as it says.

        A patch whose module vLLM has not imported is bound when it does. Raises NotBoundError in strict mode if a
        patch asked for by name is refused; what was bound until then stays.
        """
        with self._lock:
            self.policy = policy
            before = {entry.patch.name for entry in self._order}
            if names is None:
                for patch in self.catalog.patches.values():
                    self._decide(patch, policy.refuses(patch.name, patch.default))
            else:
                for name in names:
                    self._decide(lookup("patch", self.catalog.patches, name), None)
            if any(entry.state is State.WAITING for entry in self._entries.values()):
                self._watcher.install()
            if policy.strict:
                for entry in self._entries.values():
                    if entry.wanted and entry.state in (State.REFUSED, State.FAILED):
                        raise NotBoundError(entry.patch.name, entry.why)
                for name, error in self.strangers(policy).items():
                    raise NotBoundError(name, str(error))
            return tuple(entry.patch.name for entry in self._order if entry.patch.name not in before)

    def undo(self, names: Iterable[str] | None = None) -> None:
        """Take back the patches called `names` (all if None), the last bound first.

        Raises RuntimeError, after undoing the rest, for a place that somebody else has patched since.
        """
        with self._lock:
            chosen = set(self._entries) if names is None else set(names)
            stuck = []
            for entry in reversed(list(self._order)):
                if entry.patch.name in chosen:
                    try:
                        self._unbind(entry)
                    except RuntimeError as error:
                        stuck.append(str(error))
            for name in chosen & set(self._entries):
                if self._entries[name].bound is None:
                    del self._entries[name]
            if not any(entry.state is State.WAITING for entry in self._entries.values()):
                self._watcher.remove()
            if stuck:
                raise RuntimeError("; ".join(stuck))

    def rows(self) -> tuple[Row, ...]:
        """The state of every patch now, in the catalog's order."""
        with self._lock:
            addresses = {entry.seam.layer for entry in self._order}
            if any(entry.seam.eager_only for entry in self._order):
                addresses.add(seams.COMPILED_MODEL)
            classes = {cls for address in addresses if isinstance(cls := _class_at(address), type)}
            layers = instances(*classes) if classes else []
            entries = [self._entries[name] for name in self.catalog.patches if name in self._entries]
            strangers = (
                Row(name, State.REFUSED, why=str(error), wanted=True)
                for name, error in self.strangers(self.policy).items()
            )
            return (*(self._row(entry, layers) for entry in entries), *strangers)

    def strangers(self, policy: Policy) -> dict[str, UnknownNameError]:
        """What `policy` names and nobody has, with the error that says what was probably meant."""
        patches = self.catalog.patches
        return {name: unknown("patch", patches, name) for name in policy.strangers(patches)}

    def rank(self) -> str:
        """The rank of this process in torch.distributed, as its layers found it; "0" if they found none."""
        return next((entry.site.rank for entry in self._order if entry.site and entry.site.rank), "0")

    def reset_counts(self) -> None:
        """Forget the hits of the parent, in a forked child."""
        for entry in self._entries.values():
            if entry.site is not None:
                entry.site.reset()

    # Deciding

    def _decide(self, patch: Patch, off: str | None) -> None:
        entry = self._entries.get(patch.name)
        if entry is not None and entry.bound is not None:
            return
        if entry is not None and entry.state is State.WAITING and off is not None:
            return  # an earlier policy asked for it, and what it asked for stays until it is undone
        entry = self._entries[patch.name] = _Entry(patch, lookup("seam", self.catalog.seams, patch.seam))
        entry.wanted = self.policy.named(patch.name)
        if off is not None:
            entry.state, entry.why = State.OFF, off
            self.catalog.tell(self._row(entry))
        else:
            self._try(entry)

    def _try(self, entry: _Entry) -> None:
        """Bind `entry` at the first of its places that fits, or say why it waits or is refused."""
        present = [place for place in entry.seam.places if self._is_imported(place.module)]
        platform = (self._platform or seams.platform)()
        if not present:
            modules = sorted({place.module for place in entry.seam.places})
            self._watcher.modules.update(modules)
            entry.state, entry.why = State.WAITING, f"vLLM has not imported {' or '.join(modules)}"
        elif reason := self._machine_refuses(entry.patch, platform):
            entry.state, entry.why = State.REFUSED, reason
        else:
            self._bind_first(entry, present, platform)
        self.catalog.tell(self._row(entry))

    def _is_imported(self, module: str) -> bool:
        # While the watcher calls back, the import system still counts the module as being imported.
        return module in self._watcher.loaded or self.world.has_module(module)

    def _machine_refuses(self, patch: Patch, platform: str) -> str | None:
        if policies.batch_invariant():
            return "VLLM_BATCH_INVARIANT is set, and our reductions do not promise that"
        if platform == "cpu" and not policies.triton_interpreted():
            return "there is no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 switches it on)"
        if platform not in ("cuda", "cpu"):
            return f"no kernels for vLLM's platform {platform!r}"
        return self.catalog.vetoes(patch, {"platform": platform, "vllm": seams.vllm_version()})

    def _bind_first(self, entry: _Entry, places: Sequence[Place], platform: str) -> None:
        refusals = []
        for place in places:
            if place.platform not in ("any", platform):
                continue
            binder = BINDERS[place.kind]
            reason = binder.refuses(place, self.world, platform)
            if reason is None:
                site = Site(entry.patch.name, entry.patch.kernels, self.policy.strict)
                try:
                    self._define_ops(entry.patch)
                    bound = binder.bind(place, lambda original, site=site: entry.patch.adapt(original, site), platform)
                except Exception as error:
                    logger.debug("%s could not be bound", entry.patch.name, exc_info=True)
                    reason = f"{type(error).__name__}: {error}"
                else:
                    site.on_failure = lambda: self._failed(entry)
                    entry.place, entry.site, entry.bound = place, site, bound
                    entry.state, entry.why = State.BOUND, ""
                    self._order.append(entry)
                    return
            refusals.append(reason)
        entry.state = State.REFUSED
        entry.why = "; ".join(refusals) or f"vLLM has no such place on its platform {platform!r}"

    def _define_ops(self, patch: Patch) -> None:
        from . import ops

        ops.define(lookup("kernel", self.catalog.kernels, name) for name in patch.kernels)

    # Changing one's mind

    def _imported(self, module: str) -> None:
        with self._lock:
            for entry in list(self._entries.values()):
                waits = entry.state is State.WAITING
                if waits and any(place.module == module for place in entry.seam.places):
                    self._try(entry)

    def _unbind(self, entry: _Entry) -> None:
        assert entry.bound is not None
        entry.bound.undo()
        entry.bound = None
        self._order.remove(entry)

    def _failed(self, entry: _Entry) -> None:
        """Our side raised. A dispatcher override may not be taken out while it runs; its site lets the original do."""
        assert entry.site is not None
        assert entry.place is not None
        entry.state, entry.why = State.FAILED, entry.site.failure
        if entry.place.kind == "attribute" and entry.bound is not None:
            with self._lock:
                self._unbind(entry)
        self.catalog.tell(self._row(entry))

    # Telling

    def _row(self, entry: _Entry, layers: Sequence[Any] = ()) -> Row:
        """Of `entry`; `layers` are the live instances to judge by whether it sleeps."""
        site, place = entry.site, entry.place
        hits = 0 if site is None else site.hits + _traced_hits(entry)
        state, why = entry.state, entry.why
        if state is State.BOUND and hits == 0:
            state, why = self._unused(entry, layers)
        return Row(
            patch=entry.patch.name,
            state=state,
            where=str(place or entry.seam.places[0]),
            why=why,
            hits=hits,
            declined=dict(site.declined) if site else {},
            errors=site.errors if site else 0,
            by_layer=dict(site.by_layer) if site else {},
            replaced=entry.bound.replaced if entry.bound else "",
            wanted=entry.wanted,
        )

    def _unused(self, entry: _Entry, layers: Sequence[Any]) -> tuple[State, str]:
        """Why a bound patch has no hits: (bound, "") if it may still come to it."""
        assert entry.place is not None
        if entry.place.kind == "ir":
            return State.ASLEEP, f"not chosen; --ir-op-priority.{entry.place.name}=vllm_gems,native chooses it"
        compiled = {type(layer).__name__ for layer in layers if vars(layer).get("do_not_compile") is False}
        if entry.seam.eager_only and compiled:
            return State.ASLEEP, f"vLLM compiles {', '.join(sorted(compiled))}; enforce_eager=True wakes it"
        if not entry.seam.layer:
            return State.BOUND, ""
        for other in self._order:
            same = other.seam.layer == entry.seam.layer and other is not entry
            if same and other.place is not None and other.place.kind == "attribute" and entry.place.kind == "op":
                return State.BOUND, f"{other.patch.name} answers first"
        cls = _class_at(entry.seam.layer)
        chosen = [_chose_native(layer) for layer in layers if isinstance(cls, type) and issubclass(type(layer), cls)]
        if chosen and all(chosen):
            name = getattr(cls, "name", cls.__name__)
            return State.ASLEEP, f"all {len(chosen)} layers run forward_native; custom_ops=[\"+{name}\"] wakes it"
        return State.BOUND, ""


def _class_at(address: str) -> Any:
    """The class at "module:Class", if it is imported."""
    return find(*address.split(":")) if address else None


def _chose_native(layer: Any) -> bool:
    slot = vars(layer).get("_forward_method")
    return slot is not None and not hasattr(slot, "__vllm_gems__") and _name_of(slot) == "forward_native"


def _name_of(method: Any) -> str:
    return str(getattr(method, "__name__", ""))


def _traced_hits(entry: _Entry) -> int:
    """Calls of compiled code to this patch's kernels, by torch.ops; patches that share a kernel share these."""
    ops = sys.modules.get(f"{__package__}.ops")
    if ops is None or entry.place is None or entry.place.kind != "attribute":
        return 0
    return sum(ops.CALLS[name] for name in entry.patch.kernels)


class _Watcher(importlib.abc.MetaPathFinder):
    """Calls back when one of `modules` has been imported, after its body has run."""

    def __init__(self, callback: Callable[[str], None]) -> None:
        self.modules: set[str] = set()
        self.loaded: set[str] = set()
        self._callback = callback

    def install(self) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        self.modules.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.modules:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, lambda: self._loaded(fullname))
                return spec
        return None

    def _loaded(self, module: str) -> None:
        self.modules.discard(module)
        self.loaded.add(module)
        try:
            self._callback(module)
        except Exception:
            logger.exception("patches for %s could not be bound; vLLM runs its own code there", module)
        finally:
            self.loaded.discard(module)


class _Loader(importlib.abc.Loader):
    """Another loader, and a call when it is done. The module keeps the other loader."""

    def __init__(self, loader: Any, done: Callable[[], None]) -> None:
        self._loader = loader
        self._done = done

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._done()
