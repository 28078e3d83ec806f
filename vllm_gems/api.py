"""The public verbs, on the one patcher of this process."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator

from . import __version__, seams
from .catalog import catalog
from .nouns import State
from .patcher import Patcher
from .policy import VARIABLES, Policy
from .reports import Report

Names = str | Iterable[str] | None
Files = Names | os.PathLike[str]


@functools.cache
def patcher() -> Patcher:
    return Patcher(catalog())


def reset_counts() -> None:
    """Forget the hits until now: what a parent counted is not its forked child's."""
    patcher().reset_counts()
    used = sys.modules.get(f"{__package__}.overrides")
    if used is not None:
        used.overrides().reset_counts()


def report() -> Report:
    """What is patched in this process, where, and how often it ran; PyTorch's operations too, if any was enabled."""
    used = sys.modules.get(f"{__package__}.overrides")
    overridden = used.overrides().rows() if used is not None else ()
    return Report.of_process((*patcher().rows(), *overridden), patcher().rank())


def apply_gems_patches_to_vllm(
    verbose: bool = False, include: Names = None, exclude: Names = None, strict: bool | None = None
) -> Report:
    """Put our kernels into vLLM in this process, now and as it imports its modules.

    Installed as a plugin this has happened in every process of vLLM before a model is built; call it where that is not
    the case, or to change the selection. Layers that exist already are switched too. Calling it again adds what is new.

    verbose: print a line for every patch. include, exclude: names or globs (a list, or one string with commas), over
    VLLM_GEMS_INCLUDE and VLLM_GEMS_EXCLUDE. strict: raise NotBoundError if a patch included by name is refused, and
    let exceptions of kernels through; else vLLM's own code runs instead and the report says so. Raises
    UnknownNameError for a name or glob given here that fits no patch.
    """
    _must_be_known(include, exclude)
    _apply(Policy.from_env().replace(include=include, exclude=exclude, strict=strict, verbose=verbose or None))
    found = report()
    if verbose:
        print(found.text(), flush=True)
    return found


def remove_gems_patches_from_vllm() -> None:
    """Take every patch of this process back: vLLM's objects are the identical ones again.

    Raises RuntimeError, after undoing the rest, for places that somebody else has patched on top of us.
    """
    patcher().undo()


@contextlib.contextmanager
def gems_patches(
    include: Names = None, exclude: Names = None, strict: bool | None = None
) -> Iterator[Report]:
    """`apply_gems_patches_to_vllm` for a while; what it bound is taken back at the end, after an exception too."""
    _must_be_known(include, exclude)
    before = _asked_for()
    bound = _apply(Policy.from_env().replace(include=include, exclude=exclude, strict=strict))
    try:
        yield report()
    finally:
        patcher().undo({*bound, *(_asked_for() - before)})


def enable(include: Files = None, exclude: Files = None) -> Report:
    """Have our kernels do operations of PyTorch's own (`torch.ops.aten`), in this process, until `disable()`.

    include, exclude: names (`add` is all its overloads, in place and with `out` too; `add.Tensor` is one) or globs, in
    a list or in one string with commas; or for `include` the path of a YAML file with such a list, or with both.
    Without `include` those that were measured not slower than PyTorch's on this GPU, host and GPU time together; with
    "*" all. What a kernel does not do, PyTorch does, and the report says how often and why. Raises UnknownNameError
    for a name that no operation has, and ValueError for a file of another form.
    """
    from .overrides import overrides

    overrides().enable(include, exclude)
    return report()


def only_enable(include: Files) -> Report:
    """`enable` what is chosen, and give PyTorch its kernels back for all others."""
    from .overrides import overrides

    overrides().only_enable(include)
    return report()


def disable() -> None:
    """Give PyTorch back all of its kernels: the dispatcher is as it was before `enable` and `use_gems`."""
    from .overrides import overrides

    overrides().disable()


@contextlib.contextmanager
def use_gems(include: Files = None, exclude: Files = None) -> Iterator[Report]:
    """`enable` for a while, after an exception too. It nests, and threads may be inside at the same time.

    What is overridden is so for the whole process. At the end PyTorch gets back what nobody else asked for.
    """
    from .overrides import overrides

    with overrides().using(include, exclude):
        yield report()


def _must_be_known(include: Names, exclude: Names) -> None:
    for error in patcher().strangers(Policy().replace(include=include, exclude=exclude)).values():
        raise error


def _asked_for() -> set[str]:
    return {row.patch for row in patcher().rows() if row.state is not State.OFF}


def _apply(policy: Policy) -> tuple[str, ...]:
    return patcher().apply(policy)


def salt(policy: Policy) -> None:
    """Enter our state into the key of vLLM's compile caches, if vLLM is imported."""
    seams.salt_compile_caches(f"{__version__};{policy.fingerprint()}", tuple(VARIABLES))
