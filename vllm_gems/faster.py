"""Only where faster: what `vllm-gems bench` measured decides, by shape, number of tokens and mode, who does a call.

A patch's measurements are kept as kernels' configurations are (`tuned`), under the patch's name, by the key
"<dtype> <kernel> <shape>"; each gives the `Times` at some numbers of tokens, powers of two. A call counts as one of the
least number that is not smaller than its own. Where ours took more than `MARGIN` of the original's time the original
runs, and the report counts it with the reason. Where nothing was measured ours does, up to a number of tokens that some
patches set, and the report names the key.

In eager mode the time is the host's and the GPU's together; in a CUDA graph that is being captured the GPU's alone.
What Dynamo traces serves all numbers of tokens, and is left as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from . import tuned
from .errors import Slower

# By how much ours has to be slower for the original to run: medians differ by some percent from run to run.
MARGIN = 1.05

EAGER, GRAPH = "eager", "graph"


class Times(NamedTuple):
    """Median microseconds of one call at one number of tokens, both sides measured in turns in one run."""

    host: float
    gpu: float
    vllm_host: float
    vllm_gpu: float

    def ratio(self, mode: str) -> float:
        """Our time over the original's."""
        if mode == EAGER:
            return (self.host + self.gpu) / (self.vllm_host + self.vllm_gpu)
        return self.gpu / self.vllm_gpu

    def slower(self, tokens: int, mode: str) -> str | None:
        """Why the original runs; None if ours does."""
        ratio = self.ratio(mode)
        return f"measured slower: {ratio:.2f} of vLLM's at {tokens} tokens, {mode}" if ratio > MARGIN else None


# By the bit length of a number of tokens less one: why the original runs in eager mode and why in a graph. Empty if it
# never does.
Reasons = tuple[tuple[str | None, str | None], ...]

_NEITHER = None, None


def reasons(measured: Mapping[str, Any]) -> Reasons:
    """measured: number of tokens -> `Times`, as they are stored."""
    found: list[tuple[str | None, str | None]] = []
    for tokens in sorted(map(int, measured)):
        times = Times(*measured[str(tokens)])
        each = times.slower(tokens, EAGER), times.slower(tokens, GRAPH)
        found += [each] * ((tokens - 1).bit_length() + 1 - len(found))
    return tuple(found) if any(each != _NEITHER for each in found) else ()


@functools.cache
def source(module: str) -> str:
    """By which the measurements of kernels in this file are recognised: all device functions that it has or uses."""
    functions = [value for value in vars(sys.modules[module]).values() if hasattr(value, "fn")]
    return tuned.source_hash(*functions)


def told(patch: str, gpu: str, module: str) -> dict[str, Any]:
    """What was measured of a patch, whose kernels are in `module`, on the GPU of this name.

    {"gpu", "rows": [{"key", "tokens", a field of `Times` each, "eager" and "graph" (ratios), "original" (the modes in
    which it runs)}], "borrowed" and "stale" as in `tuned.Table`}.
    """
    table = tuned.Table(patch, gpu, source(module))
    rows = []
    for key, measured in sorted(table.measured.items()):
        for tokens in sorted(map(int, measured)):
            times = Times(*measured[str(tokens)])
            rows.append({
                "key": key, "tokens": tokens, **times._asdict(),
                **{mode: round(times.ratio(mode), 3) for mode in (EAGER, GRAPH)},
                "original": [mode for mode in (EAGER, GRAPH) if times.slower(tokens, mode)],
            })  # fmt: skip
    return {"gpu": gpu, "rows": rows, "borrowed": dict(table.borrowed), "stale": table.stale}


def text(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on `told`'s rows."""
    head = f"{'shape':46}{'tokens':>7}{'vLLM, host + GPU us':>21}{'ours':>17}{'eager':>7}{'graph':>7}"
    lines = [head] if rows else []
    for row in rows:
        vllm, ours = (f"{host:.1f} + {gpu:.1f}" for host, gpu in _sides(row))
        who = f"  vLLM's own runs: {', '.join(row['original'])}" if row["original"] else ""
        ratios = f"{row[EAGER]:7.2f}{row[GRAPH]:7.2f}"
        lines.append(f"{row['key']:46}{row['tokens']:7}{vllm:>21}{ours:>17}{ratios}{who}")
    return lines


def _sides(row: Mapping[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    return (row["vllm_host"], row["vllm_gpu"]), (row["host"], row["gpu"])


def key_of(dtype: torch.dtype | str, kernel: str, *shape: Any) -> str:
    return " ".join((str(dtype).removeprefix("torch."), kernel, *map(str, shape)))


# Keys that were asked for while nothing is decided; None nearly always.
_asked: set[str] | None = None


@contextmanager
def undecided() -> Iterator[set[str]]:
    """Our side runs, whatever was measured: for those who measure. Yields the keys that are asked for."""
    global _asked
    before, _asked = _asked, set()
    try:
        yield _asked
    finally:
        _asked = before


def where_faster(
    patch: str, key: str, device: int, call: Callable[..., Any], tokens_of: Callable[..., int], most: int | None = None
) -> Callable[..., Any]:
    """`call`, settled by a kernel's file, which raises Slower at numbers of tokens where the original is faster.

    It is `call` itself where that is nowhere. key: by `key_of`. tokens_of takes what `call` does. most: tokens that are
    ours to do where nothing was measured, of a kernel that was found slower from some number on elsewhere.
    """
    if _asked is not None:
        _asked.add(key)
        return call
    measured = tuned.lookup(patch, device, key, source(call.__module__))
    if not measured:
        return call if most is None else _at_most(most, call, tokens_of)
    known = reasons(measured)
    if not known:
        return call

    def checked(*args: Any, **named: Any) -> Any:
        check(known, tokens_of(*args, **named))
        return call(*args, **named)

    return checked


def _at_most(most: int, call: Callable[..., Any], tokens_of: Callable[..., int]) -> Callable[..., Any]:
    reason = f"not measured on this GPU, and known to be slower from some number on: more than {most} tokens"

    def limited(*args: Any, **named: Any) -> Any:
        if tokens_of(*args, **named) > most:
            raise Slower(reason)
        return call(*args, **named)

    return limited


def check(known: Reasons, tokens: int) -> None:
    """Raises Slower if the original is to do a call of that many tokens."""
    size = (tokens - 1).bit_length()
    if tokens > 0 and size < len(known):
        eager, graph = known[size]
        reason = eager if eager is graph or not torch.cuda.is_current_stream_capturing() else graph
        if reason is not None:
            raise Slower(reason)
