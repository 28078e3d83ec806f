"""The nouns of the project: frozen data, without torch, Triton or vLLM.

Everything else is a verb over them. A kernel says what it computes and what it refuses, a seam says where vLLM keeps
the thing it replaces, a patch joins the two, a row says what became of it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
# What does a call of an op, given all of its arguments in a tuple.
Settled = Callable[[tuple[Any, ...]], T]


class State(str, enum.Enum):
    """What became of a patch at one place."""

    BOUND = "bound"  # our replacement is in place
    ASLEEP = "asleep"  # in place, but vLLM's present mode never calls it
    WAITING = "waiting"  # vLLM has not imported the module yet
    REFUSED = "refused"  # a probe, a veto or this machine speaks against it
    OFF = "off"  # the policy does not want it
    FAILED = "failed"  # our replacement raised; the original is back in place

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Case:
    """One set of arguments of a kernel, by sizes and layouts: what tests and benchmarks iterate."""

    name: str
    params: Mapping[str, Any]
    bench: bool = False  # a shape of a named model, worth timing

    def __getitem__(self, key: str) -> Any:
        return self.params[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.params.get(key, default)


@dataclass(frozen=True)
class Kernel:
    """One operation that we compute: the public op, what it means, what it refuses, and the shapes it is tried on."""

    name: str
    op: Callable[..., Any]
    # Plain PyTorch: the parameters of `op`, nothing written in place, the expected `results` returned as a tuple.
    reference: Callable[..., tuple[Any, ...]]
    # The same parameters; None means yes, a sentence says why not.
    refuses: Callable[..., str | None]
    # (case, dtype, device) -> keyword arguments of `op`, random and fresh on each call.
    inputs: Callable[[Case, str, str], dict[str, Any]]
    # Where the results are: "return", "return.0", ... or the name of an argument that `op` writes.
    results: tuple[str, ...]
    cases: tuple[Case, ...]
    # (case, dtype) -> what the launcher compiles for it (`launch.Build`).
    builds: Callable[[Case, str], Iterable[Any]]
    # `name(args) -> results` of torch.ops.vllm_gems.<name>, and its shape function.
    schema: str
    fake: Callable[..., Any]
    # The op of vLLM's own that this stands beside, "namespace::name", and how to call it with `inputs`.
    stock: str = ""
    stock_call: Callable[..., Any] | None = None
    # Bytes that must cross the memory bus for these inputs, each input read once and each output written once.
    traffic: Callable[..., int] | None = None
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    # The parameters of `op`, all by position -> what does its calls from then on whose arguments look alike: tensors
    # have the same dtypes, devices, shapes and strides, and all else the same values. Raises as `op`.
    settle: Callable[..., Settled[Any]] | None = None
    distribution: str = "vllm-gems"


@dataclass(frozen=True)
class Place:
    """One address inside vLLM, and what must be found there before it is touched."""

    kind: str  # a key of binders.BINDERS
    module: str  # the place exists once vLLM has imported this module
    name: str  # "Class.method" or "function", "namespace::op", an IR op, an attention backend
    # The signatures (attribute, ir) or schemas (op, aten) that we know how to stand in for.
    expects: tuple[str, ...]
    versions: str = ""  # the vLLM releases in which it was seen; information, never a condition
    platform: str = "any"  # "cuda" or "cpu": where vLLM calls it
    # For a replacement that repeats what the original does: the originals it was written against.
    sources: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name.replace("::", ".") if self.kind in ("op", "aten") else self.name


@dataclass(frozen=True)
class Seam:
    """One thing that vLLM does, and the places where releases have kept it; the first that fits is taken."""

    name: str
    places: tuple[Place, ...]
    # "module:Class" whose instances choose at birth whether they call this place at all.
    layer: str = ""
    # The replacement sleeps in models that vLLM compiles: Dynamo traces the original.
    eager_only: bool = False


@dataclass(frozen=True)
class Patch:
    """A seam, and what to put there."""

    name: str
    seam: str
    kernels: tuple[str, ...]
    # (original, site) -> replacement with the original's signature. Imports kernels only when it is called.
    adapt: Callable[[Any, Any], Any]
    why: str  # one sentence: what the user gains
    default: bool = True
    distribution: str = "vllm-gems"


@dataclass(frozen=True)
class Row:
    """What became of one patch: a line of the report."""

    patch: str
    state: State
    where: str = ""
    why: str = ""
    hits: int = 0
    declined: Mapping[str, int] = field(default_factory=dict)  # reason -> calls that went to the original
    errors: int = 0
    by_layer: Mapping[str, int] = field(default_factory=dict)  # hits of each layer, where a patch tells them apart
    replaced: str = ""  # what stood there before, as it calls itself
    wanted: bool = False  # asked for by name
    speedup: float | None = None  # vLLM's time over ours, measured on this GPU

    @property
    def ok(self) -> bool:
        return self.state is State.BOUND
