"""`vllm-gems bench`: patches against what they stand in for, by shape and number of tokens, for `faster` to decide by.

Of every patch that stands in for one op or one layer's method of vLLM's: whole layers of a decoder are measured in an
engine, PyTorch's own operations by `benchmarks/aten.py`. Both sides are called as vLLM calls them (a layer through its
`__call__`, an op through the dispatcher), with the same inputs, compared with the kernel's reference, timed in turns.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch

from .. import faster, seams, tuned
from ..binders import BINDERS, Bound
from ..nouns import Case, Patch, Place
from ..sites import Site
from ..tuning.run import must_be_writable
from ..tuning.timing import gpu_us, host_us, input_sets
from .families import Inputs, Task, plan

# Relative distance from the reference in float32, in the norm of the whole result: two or three roundings.
TOLERANCES = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}
# What vLLM has no kernel for, it rounds at every step.
VLLM_TOLERANCE = 4
_MOST_MEMORY = 16 << 30  # that is kept for the next point

OURS, VLLM = "ours", "vllm"
_NAMES = {OURS: "ours", VLLM: "vLLM's own"}


class WrongError(Exception):
    """A side computes something else."""


class Timer(NamedTuple):
    """(sides by name -> calls, ...) -> microseconds by name, of the host and of the GPU; see `tuning.timing`."""

    host: Callable[..., Mapping[str, float]] = host_us
    gpu: Callable[..., Mapping[str, float]] = gpu_us


class Sides(NamedTuple):
    """Ours and vLLM's: what to call with a kernel's inputs as `args` gives them, and how to come to either."""

    calls: Mapping[str, Callable[..., Any]]
    args: Callable[[Inputs], tuple[Any, ...]]
    switch: Callable[[str], None]
    results: Callable[[Inputs, Any], tuple[Any, ...]]


@contextmanager
def _sides(task: Task, place: Place, site: Site, inputs: Inputs, device: str) -> Iterator[Sides]:
    """Both sides of a task at a place of vLLM's, which is left as it was. May adapt the inputs."""
    family, module = task.family, importlib.import_module(place.module)
    owner, _, attribute = place.name.rpartition(".")
    if place.kind == "op":
        with _of_op(task, place, site, tuple(inputs)) as sides:
            yield sides
    elif family.layer is not None:
        cls = getattr(module, owner)
        original = getattr(cls, attribute)
        with torch.device(device):
            ours, vllm = family.layer(cls, inputs), family.layer(cls, inputs)
        # Where the class keeps the method that it chose, as it would choose with the patch bound and without.
        ours._forward_method = MethodType(task.patch.adapt(original, site), ours)
        vllm._forward_method = MethodType(original, vllm)
        yield Sides({OURS: ours, VLLM: vllm}, family.args, _nothing, _returned)
    else:
        original = getattr(getattr(module, owner) if owner else module, attribute)
        replacement = task.patch.adapt(original, site)
        calls = {OURS: replacement, VLLM: original}
        if family.call is not None:
            calls = {side: partial(family.call, function) for side, function in calls.items()}
        try:
            yield Sides(calls, family.args, _nothing, _returned)
        finally:
            replacement.live = None


def _nothing(side: str) -> None:
    """Both sides are there at once."""


def _returned(inputs: Inputs, returned: Any) -> tuple[Any, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


@contextmanager
def _of_op(task: Task, place: Place, site: Site, names: tuple[str, ...]) -> Iterator[Sides]:
    """Of an op, whose kernel in the dispatcher is now ours and now vLLM's. names: of the inputs."""
    kernel, bound = task.kernel, list[Bound]()
    namespace, _, name = place.name.partition("::")
    op = getattr(getattr(torch.ops, namespace), name)

    def switch(side: str) -> None:
        if side == OURS and not bound:
            adapt = task.patch.adapt
            bound.append(BINDERS["op"].bind(place, lambda original: adapt(original, site), seams.platform()))
        elif side == VLLM and bound:
            bound.pop().undo()

    def call(*args: Any) -> Any:
        assert kernel.stock_call is not None
        return kernel.stock_call(op, **dict(zip(names, args, strict=True)))

    def results(inputs: Inputs, returned: Any) -> tuple[Any, ...]:
        """In the order of the kernel's reference."""
        many = _returned(inputs, returned)
        return tuple(
            many[int(where[7:] or 0)] if where.startswith("return") else inputs[where] for where in kernel.results
        )

    try:
        yield Sides({OURS: call, VLLM: call}, lambda inputs: tuple(inputs.values()), switch, results)
    finally:
        switch(VLLM)


def _copied(inputs: Inputs) -> Inputs:
    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # With its gaps between rows, which a clone would close.
        size = 1 + sum((many - 1) * step for many, step in zip(value.shape, value.stride(), strict=True))
        return value.as_strided((size,), (1,)).clone().as_strided(value.shape, value.stride())

    return {name: copy(value) for name, value in inputs.items()}


def _verify(task: Task, sides: Sides, inputs: Inputs) -> None:
    """Raises WrongError if a side is not near the reference."""
    wide = {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in _copied(inputs).items()
    }
    expected = tuple(want for want in task.kernel.reference(**wide) if want is not None)
    view, tolerance = task.family.view, task.family.tolerance or TOLERANCES[task.dtype]
    for side in (OURS, VLLM):
        given = _copied(inputs)
        # Memory that a result may be put into has nothing right in it from before.
        for want in expected:
            torch.full_like(want, math.nan, dtype=torch.float32)
            torch.full_like(want, math.nan, dtype=getattr(torch, task.dtype))
        sides.switch(side)
        results = sides.results(given, sides.calls[side](*sides.args(given)))
        if side == VLLM:
            view, tolerance = task.family.view_of_vllm or view, VLLM_TOLERANCE * tolerance
        for got, want in zip(view(*results), view(*expected), strict=True):
            if got.shape != want.shape:
                raise WrongError(f"{_NAMES[side]} gives {tuple(got.shape)}, expected {tuple(want.shape)}")
            error = float((got.float() - want.float()).norm() / want.float().norm())
            if not error <= tolerance:
                raise WrongError(f"{_NAMES[side]} is off by {error:.1e}, more than {tolerance:.0e}")


def _place(patch: Patch) -> Place:
    """Where vLLM has what the patch stands in for. Raises LookupError if that is not there, or unlike what we know."""
    from ..catalog import catalog
    from ..worlds import LiveWorld

    platform, refusals = seams.platform(), []
    for place in catalog().seams[patch.seam].places:
        if place.platform in ("any", platform):
            try:
                importlib.import_module(place.module)
            except ModuleNotFoundError as error:
                refusals.append(str(error))
                continue
            reason = BINDERS[place.kind].refuses(place, LiveWorld(), platform)
            if reason is None:
                return place
            refusals.append(reason)
    raise LookupError("; ".join(refusals) or f"vLLM has no such place on its platform {platform!r}")


def measure(task: Task, place: Place, tokens: int, timer: Timer, device: str) -> faster.Times:
    """Both sides at one number of tokens. Raises WrongError, and what vLLM or a kernel raises."""
    site = Site(task.patch.name, task.patch.kernels, strict=True)
    inputs = task.kernel.inputs(Case(f"{tokens} tokens", task.shape.case(tokens)), task.dtype, device)
    with faster.undecided() as asked, _sides(task, place, site, inputs, device) as sides:
        _verify(task, sides, inputs)
        if task.key not in asked:
            raise RuntimeError(f"{task.key} is not what the patch asks for, which is {', '.join(sorted(asked))}")
        host = timer.host(
            {side: partial(call, *sides.args(_copied(inputs))) for side, call in sides.calls.items()},
            rounds=2, bursts=5, burst=30, before=sides.switch,
            pause=torch.cuda.synchronize if device == "cuda" else lambda: None,
        )  # fmt: skip
        traffic = task.kernel.traffic(**inputs) if task.kernel.traffic else 1 << 30
        calls = {side: partial(_on_gpu, sides, side) for side in (OURS, VLLM)}
        gpu = timer.gpu(calls, input_sets(lambda: _copied(inputs), traffic), repeats=7)
        if site.declined or not site.hits:
            raise RuntimeError(f"ours declined: {', '.join(site.declined) or 'it was never called'}")
    return faster.Times(*(round(float(us), 3) for us in (host[OURS], gpu[OURS], host[VLLM], gpu[VLLM])))


def _on_gpu(sides: Sides, side: str, **inputs: Any) -> Any:
    sides.switch(side)
    return sides.calls[side](*sides.args(inputs))


def bench(
    names: Sequence[str],
    *,
    patches: str | None = None,
    dtype: str = "bfloat16",
    tp: int = 1,
    max_tokens: int = 8192,
    dry_run: bool = False,
    device: str = "cuda",
    timer: Timer = Timer(),  # noqa: B008
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure what `plan` says, and keep each result at once. What is wrong or cannot be measured does not end the run;
    an interrupt does, and what was measured before it stays.

    Returns {"gpu", "tables": [{"patch", "key", "tokens"} and, but in a dry run, "source" and "times" (number of tokens
    -> `faster.Times`) or "failed" (why)]}; `tell` gets a line on each when it is there. Raises ValueError for what
    `plan` does, without a GPU, and where results cannot be written; ImportError without vLLM.
    """
    tasks = plan(names, patches, dtype, tp, max_tokens)
    if dry_run:
        rows = [{"patch": each.patch.name, "key": each.key, "tokens": list(each.tokens)} for each in tasks]
        lines = [f"{each.patch.name:36}{each.key:46}1 to {each.tokens[-1]} tokens" for each in tasks]
        points = sum(len(each.tokens) for each in tasks)
        for line in (*lines, f"{len(tasks)} tables, {points} points of both sides"):
            tell(line)
        return {"gpu": "", "tables": rows}
    from .. import api
    from ..ops import define

    if device == "cuda" and (not torch.cuda.is_available() or torch.version.hip is not None):
        raise ValueError("there is no NVIDIA GPU here to measure on; --dry-run says what would be measured")
    gpu = torch.cuda.get_device_name() if device == "cuda" else device
    for name in dict.fromkeys(task.patch.name for task in tasks):
        must_be_writable(name, gpu)
    api.remove_gems_patches_from_vllm()  # the plugin may have been loaded; the other side is vLLM's own
    rows = []
    with seams.eager_layers(), torch.inference_mode():
        for task in tasks:
            define([task.kernel])
            row: dict[str, Any] = {"patch": task.patch.name, "key": task.key, "tokens": list(task.tokens)}
            stopped = False
            try:
                place, times = _place(task.patch), {}
                for tokens in task.tokens:
                    times[str(tokens)] = measure(task, place, tokens, timer, device)
                    if device == "cuda" and torch.cuda.memory_reserved() > _MOST_MEMORY:
                        torch.cuda.empty_cache()  # each graph has memory of its own, which no other is given before
            except KeyboardInterrupt:
                row["failed"], stopped = "stopped", True
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"
            else:
                row |= {"source": faster.source(task.kernel.op.__module__), "times": times}
                tuned.write(task.patch.name, gpu, {
                    "key": task.key, "configuration": times, "gpu": gpu, "source": row["source"],
                    "versions": {**tuned.versions(), "vllm": tuned.version("vllm")},
                })  # fmt: skip
            rows.append(row)
            tell(_line(row))
            if stopped:
                break
    tell(f"{len(rows)} of {len(tasks)} tables, {sum('failed' in row for row in rows)} without a result")
    return {"gpu": gpu, "tables": rows}


def _line(row: Mapping[str, Any]) -> str:
    """The range of both ratios over the numbers of tokens, and where vLLM's own code will run."""
    head = f"{row['patch']:36}{row['key']:46}"
    if "failed" in row:
        return f"{head}failed: {row['failed']}"
    times = {int(tokens): faster.Times(*each) for tokens, each in row["times"].items()}
    parts = []
    for mode in (faster.EAGER, faster.GRAPH):
        ratios = [each.ratio(mode) for each in times.values()]
        slow = [str(tokens) for tokens, each in times.items() if each.slower(tokens, mode)]
        own = f" (vLLM's own at {', '.join(slow)})" if slow else ""
        parts.append(f"{mode} {min(ratios):.2f} to {max(ratios):.2f}{own}")
    return head + ", ".join(parts)
