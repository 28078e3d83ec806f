"""What stands in vLLM in place of the original: the replacement, guarded, with its counters.

A site is the one mutable thing per bound patch. Counting is one attribute increment; an exception of ours costs
nothing until it happens, and then the original runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from .errors import LateCompileError, Refused, Slower, Unsettled

logger = logging.getLogger("vllm_gems")

# Python's `torch.compiler.is_compiling` takes three calls; Dynamo knows this one too, and eager pays for one.
is_tracing = torch.compiler.is_dynamo_compiling


class Site:
    """Counters of one bound patch, and what to do when our side raises."""

    __slots__ = (
        "by_layer", "declined", "errors", "failure", "hits", "kernels", "name", "on_failure", "rank", "strict",
    )  # fmt: skip

    def __init__(self, name: str, kernels: tuple[str, ...] = (), strict: bool = False) -> None:
        self.name = name
        self.kernels = kernels
        self.strict = strict
        self.hits = 0
        self.errors = 0
        self.rank = ""  # in torch.distributed, while it was up: it is down again when a process tells what it did
        self.failure = ""
        self.declined: dict[str, int] = {}
        self.by_layer: dict[str, int] = {}  # hits of each layer, where the patch tells them apart
        self.on_failure: Callable[[], None] | None = None  # puts the original back

    def decline(self, reason: object) -> None:
        """The original does this call, for the reason given."""
        text = str(reason)
        self.declined[text] = self.declined.get(text, 0) + 1

    def fail(self, error: Exception) -> None:
        """Our side raised: the original takes over from this call on, and the log says so once.

        Out of memory is the machine's state and not the kernel's fault; it passes through, as do all errors in strict
        mode, and what whoever forbade compilations wants to be stopped by.
        """
        if self.strict or isinstance(error, (torch.OutOfMemoryError, LateCompileError)):
            raise error
        self.errors += 1
        if not self.failure:
            self.failure = f"{type(error).__name__}: {error}".strip()
            logger.exception("%s raised; vLLM's own code runs in its place from now on", self.name)
            if self.on_failure is not None:
                self.on_failure()

    def reset(self) -> None:
        """Forget the counts, as a forked child must."""
        self.hits = self.errors = 0
        self.declined = {}
        self.by_layer.clear()  # layers hold it


def layer_method(
    original: Callable[..., Any],
    site: Site,
    bind: Callable[..., Callable[..., Any]],
    traced: Callable[..., Any],
) -> Callable[..., Any]:
    """A replacement for a `forward_*` method of vLLM's CustomOp layers.

    bind(layer, *args) -> call(*args): settles what the layer knows for ever; raises Refused for a layer that is not
    for us. traced(layer, *args): the same through torch.ops, for Dynamo.

    A CustomOp keeps the method it chose in `_forward_method`. The first call puts the settled call into that slot of
    the instance, and over its `forward` where that only calls the slot, so that later calls go there without another
    look-up; a call that declines takes it out again, unless the original is only faster at this number of tokens.
    """

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_tracing():
            return traced(self, *args, **kwargs)
        slot = self.__dict__.get("_forward_method")
        chosen = getattr(slot, "__func__", None)
        if chosen is not forward and getattr(chosen, "__vllm_gems__", None) is site:
            return slot(*args, **kwargs)
        settled = _settle(self, original, site, bind, traced, args, kwargs)
        if settled is None:
            return original(self, *args, **kwargs)
        if chosen is forward:
            self._forward_method = settled
            if "forward" not in self.__dict__ and _only_forwards(type(self)):
                self.forward = settled  # what __call__ calls: one frame less
        return settled(*args, **kwargs)

    forward.__vllm_gems__ = site  # type: ignore[attr-defined]
    return forward


def module_forward(
    original: Callable[..., Any],
    site: Site,
    settle: Callable[..., Callable[..., Any]],
) -> Callable[..., Any]:
    """A replacement for the `forward` of a torch.nn.Module that vLLM builds models of; Dynamo traces the original.

    settle(module, *args) -> call(*args): what the module knows for ever; raises Refused for a module that is not for
    us. The first call puts the settled call over the instance's `forward`, which is what its `__call__` calls.
    """

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_tracing():
            return original(self, *args, **kwargs)
        if type(self).forward is not forward:
            site.decline(f"{type(self).__name__} has a forward of its own, and calls this one")
            return original(self, *args, **kwargs)
        try:
            call = settle(self, *args, **kwargs)
        except Refused as refusal:
            call = _declining(original, self, site, str(refusal))
        except Exception as error:
            site.fail(error)
            return original(self, *args, **kwargs)
        else:
            call = _guarded(original, self, site, call)
        site.rank = site.rank or distributed_rank()
        call.__vllm_gems__ = site  # type: ignore[attr-defined]
        call.__name__ = original.__name__  # by which a bound method is pickled
        self.forward = MethodType(call, self)
        return self.forward(*args, **kwargs)

    forward.__vllm_gems__ = site  # type: ignore[attr-defined]
    return forward


def _declining(original: Callable[..., Any], module: Any, site: Site, reason: str) -> Callable[..., Any]:
    def declined(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            return _as_copy(self, *args, **kwargs)
        if not is_tracing():
            site.decline(reason)
        return original(module, *args, **kwargs)

    return declined


def _guarded(original: Callable[..., Any], module: Any, site: Site, call: Callable[..., Any]) -> Callable[..., Any]:
    def settled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            return _as_copy(self, *args, **kwargs)
        if is_tracing():
            return original(module, *args, **kwargs)
        try:
            result = call(*args, **kwargs) if kwargs else call(*args)
        except Refused as refusal:
            site.decline(refusal)
            if isinstance(refusal, Unsettled):
                unseat(module, site)
            return original(module, *args, **kwargs)
        except Exception as error:
            site.fail(error)
            return original(module, *args, **kwargs)
        site.hits += 1
        return result

    return settled


def _as_copy(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A copy of a module brought its original's call with it, and is settled anew."""
    del module.__dict__["forward"]
    return module.forward(*args, **kwargs)


def unseat(module: Any, site: Any) -> None:
    """Have `module` call its class's `forward` again, if a settled call of `site` is over it."""
    if getattr(module.__dict__.get("forward"), "__vllm_gems__", None) is site:
        del module.__dict__["forward"]


def distributed_rank() -> str:
    """This process's rank in torch.distributed, "" if that is not up."""
    distributed = torch.distributed
    return str(distributed.get_rank()) if distributed.is_available() and distributed.is_initialized() else ""


def _only_forwards(cls: type) -> bool:
    """Whether `cls.forward` does nothing but call the method in `_forward_method`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward_method(*args, **kwargs)

    found, plain = getattr(cls.forward, "__code__", None), forward.__code__  # type: ignore[attr-defined]
    return found is not None and all(
        getattr(found, part) == getattr(plain, part) for part in ("co_code", "co_names", "co_consts", "co_varnames")
    )


def reseat(layer: Any, method: Any) -> None:
    """Have `layer` call `method` again, which it chose at birth, in place of a settled call."""
    layer._forward_method = method
    if hasattr(layer.__dict__.get("forward"), "__vllm_gems__"):
        del layer.forward


def _settle(
    layer: Any,
    original: Callable[..., Any],
    site: Site,
    bind: Callable[..., Callable[..., Any]],
    traced: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[..., Any] | None:
    try:
        call = bind(layer, *args, **kwargs)
    except Refused as refusal:
        site.decline(refusal)
        return None
    except Exception as error:
        site.fail(error)
        return None

    site.rank = site.rank or distributed_rank()

    # A method and not a closure alone, so that a copy of the layer calls it with itself and is settled anew.
    def settled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not layer:
            reseat(self, getattr(self, original.__name__))
            return self._forward_method(*args, **kwargs)
        if is_tracing():
            return traced(layer, *args, **kwargs)
        try:
            # Nearly all calls are by position; an empty dictionary unpacked costs as much as the counter.
            result = call(*args, **kwargs) if kwargs else call(*args)
        except Refused as refusal:
            site.decline(refusal)
            # The next call may be settled differently, by its own arguments; not if only its number of tokens differs.
            ours = getattr(layer.__dict__.get("_forward_method"), "__func__", None) is settled
            if ours and not isinstance(refusal, Slower):
                reseat(layer, getattr(layer, original.__name__))
            return original(layer, *args, **kwargs)
        except Exception as error:
            site.fail(error)
            return original(layer, *args, **kwargs)
        site.hits += 1
        return result

    settled.__vllm_gems__ = site  # type: ignore[attr-defined]
    settled.__name__ = original.__name__  # by which a bound method is pickled
    return MethodType(settled, layer)


def op_kernel(original: Any, site: Site, call: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement for an op's kernel in the dispatcher. `original` is the kernel that it covers.

    call(*args) takes the op's arguments by position, with the schema's defaults, because PyTorch leaves trailing
    arguments out when they equal those.
    """

    def kernel(keyset: Any, *args: Any) -> Any:
        if not site.failure:
            try:
                result = call(*args)
            except Refused as refusal:
                site.decline(refusal)
            except Exception as error:
                site.fail(error)
            else:
                site.hits += 1
                return result
        return original.call_boxed(keyset, *args)

    return kernel


def function(original: Callable[..., Any], site: Site, call: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement for a function of a module, or a method that is called as one; Dynamo traces the original.

    call takes the arguments as the original does. The same replacement each time, because others may have copied it out
    of its module: they too get the original from it while the patch is off (`live` is None) or has failed.
    """
    replacement = _REPLACEMENTS.get(original)
    if replacement is None:
        replacement = _REPLACEMENTS[original] = _replacement(original)
    replacement.live = site, call
    replacement.__vllm_gems__ = site
    return replacement


# original -> what stands in for it
_REPLACEMENTS: dict[Any, Any] = {}


def _replacement(original: Callable[..., Any]) -> Any:
    # Without what the original has in its `__dict__`, where torch.compile leaves notes for Dynamo.
    @functools.wraps(original, updated=())
    def replacement(*args: Any, **kwargs: Any) -> Any:
        live = this.live
        if live is None or live[0].failure or is_tracing():
            return original(*args, **kwargs)
        site, call = live
        try:
            result = call(*args, **kwargs)
        except Refused as refusal:
            site.decline(refusal)
        except Exception as error:
            site.fail(error)
        else:
            site.hits += 1
            return result
        return original(*args, **kwargs)

    this: Any = replacement
    return this
