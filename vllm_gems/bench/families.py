"""What `vllm-gems bench` can measure: how each kernel is called in vLLM, and which shapes a model comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .. import faster
from ..nouns import Kernel, Patch
from ..tuning import models

Config = Mapping[str, Any]
Inputs = dict[str, Any]

MOST_REQS = 256  # whose logits are sampled at once


class Shape(NamedTuple):
    """What one table of times is about."""

    key: tuple[Any, ...]  # as in `faster.key_of`, after the kernel
    case: Callable[[int], dict[str, Any]]  # number of tokens -> the parameters of the kernel's case
    rows: int = 1  # of a token, each of which counts as one


@dataclass(frozen=True)
class Family:
    """How kernels of a kind are called in vLLM."""

    shapes: Callable[[Config, int], Iterable[Shape]]  # of a model, on one of so many ranks
    args: Callable[[Inputs], tuple[Any, ...]]  # a kernel's inputs as a layer or function takes them
    layer: Callable[[Any, Inputs], Any] | None = None  # (class, inputs) -> a layer for these; may adapt the inputs
    # What is compared of ours, and of vLLM's where that is another thing.
    view: Callable[..., tuple[Any, ...]] = lambda *results: results
    view_of_vllm: Callable[..., tuple[Any, ...]] | None = None
    tolerance: float = 0.0  # where it is not that of the dtype
    dtypes: tuple[str, ...] = ()  # where they are not the model's
    most: int = 1 << 30  # tokens, where it is less than a step may have
    call: Callable[..., Any] | None = None  # (function, *args), where more is to be done than to call it


def _rows(width: int, rows: int = 1) -> Shape:
    return Shape((width,), lambda tokens: {"shape": (tokens, width)}, rows)


def _norms(config: Config, tp: int) -> Iterator[Shape]:
    for width, rows in models.norms(config, tp):
        yield _rows(width, rows)


def _norms_of_layers(config: Config, tp: int) -> Iterator[Shape]:
    """Those that a residual is added before."""
    yield _rows(*models.norms(config, tp)[0])


def _norm_layer(cls: Any, inputs: Inputs) -> Any:
    layer = cls(inputs["x"].shape[-1], eps=inputs["epsilon"]).to(inputs["x"].device)
    layer.weight.data = inputs["weight"]
    return layer


def _norm_args(inputs: Inputs) -> tuple[Any, ...]:
    return (inputs["x"], inputs["residual"]) if "residual" in inputs else (inputs["x"],)


def _activations(config: Config, tp: int, halves: int = 2) -> Iterator[Shape]:
    for width in models.activated(config, tp):
        yield _rows(halves * width)


def _activation_layer(name: str) -> Callable[[Any, Inputs], Any]:
    def make(cls: Any, inputs: Inputs) -> Any:
        if name in ("gelu_and_mul", "gelu_tanh_and_mul"):
            return cls("tanh" if "tanh" in name else "none")
        return cls(*(value for key, value in inputs.items() if key != "x"))

    return make


def _heads(latent: bool, sections: bool = False) -> Callable[[Config, int], Iterator[Shape]]:
    def shapes(config: Config, tp: int) -> Iterator[Shape]:
        found = models.heads(config, tp)
        if found.latent is not latent:
            return
        params: dict[str, Any] = {
            "heads": (found.query, found.key), "head_size": found.size, "rotary_dim": found.rotated,
            "neox": not latent, "layout": "mla" if latent else "qkv",
        }  # fmt: skip
        if sections:
            third = 3 * found.rotated // 16
            params["section"] = found.rotated // 2 - 2 * third, third, third
        key = found.query, found.key, found.size, found.rotated, "pairs" if latent else "neox"
        yield Shape(key, lambda tokens: {**params, "tokens": (tokens,)})

    return shapes


def _rotary_layer(*scaling: float) -> Callable[[Any, Inputs], Any]:
    def make(cls: Any, inputs: Inputs) -> Any:
        query, cache = inputs["query"], inputs["cos_sin_cache"]
        sections = {name: inputs[name] for name in ("mrope_section", "mrope_interleaved") if name in inputs}
        size, turned = inputs["head_size"], cache.shape[-1]
        layer = cls(size, turned, len(cache), 10000.0, inputs["is_neox"], *scaling, query.dtype, **sections)
        layer = layer.to(query.device)
        inputs["cos_sin_cache"] = layer.cos_sin_cache
        return layer

    return make


def _rotary(latent: bool, *scaling: float, sections: bool = False) -> Family:
    return Family(
        _heads(latent, sections), lambda inputs: (inputs["positions"], inputs["query"], inputs["key"]),
        _rotary_layer(*scaling),
    )  # fmt: skip


def _routers(config: Config, tp: int) -> Iterator[Shape]:
    from ..kernels.moe_routing import Router

    if found := models.router(config, tp):
        router = Router(**found)
        key = router.experts, router.topk, router.groups, router.kept, router.scoring
        yield Shape(key, lambda tokens: {"tokens": tokens, "router": router})


def _routing_args(inputs: Inputs) -> tuple[Any, ...]:
    logits, *rest = inputs.values()
    return logits, logits, *rest  # of the hidden states only the number of tokens counts


def _of_experts(weights: Any, ids: Any) -> tuple[Any, ...]:
    """Experts and their weights, in whatever order they were chosen."""
    ids, order = ids.sort(dim=-1)
    return ids, weights.gather(1, order)


def _vocabularies(config: Config, tp: int) -> Iterator[Shape]:
    if size := config.get("vocab_size"):
        yield Shape((size,), lambda tokens: {"rows": tokens, "vocab": size})


_NORM = Family(_norms, _norm_args, _norm_layer)
_FUSED_NORM = Family(_norms_of_layers, _norm_args, _norm_layer)
_NORMS = {
    "rms_norm": _NORM, "gemma_rms_norm": _NORM, "fused_add_rms_norm": _FUSED_NORM,
    "gemma_fused_add_rms_norm": _FUSED_NORM,
}  # fmt: skip
_ROUTING = Family(
    _routers, _routing_args, view=_of_experts, dtypes=("bfloat16", "float32"),
    # vLLM's chooses among rounded scores, of which some are equal.
    view_of_vllm=lambda weights, ids: (weights.sort(dim=-1).values,),
)  # fmt: skip
_SAMPLING = Family(
    _vocabularies,
    lambda inputs: (inputs["logits"], None, inputs["p"]),
    # A token more or less, where the sum of those before it is as good as p.
    view=lambda logits: (logits.float().softmax(dim=-1),),
    # In bfloat16, where it adds up in bfloat16 or drops equal logits together, it ends somewhere else.
    view_of_vllm=lambda logits: (logits.float().amax(dim=-1),),
    tolerance=1e-2,
    dtypes=("bfloat16", "float32"),  # of vLLM's two model runners
    most=MOST_REQS,
    # It writes its argument, and what is masked already takes another time: both sides copy.
    call=lambda function, logits, k, p: function(logits.clone(), k, p),
)


def _activation(name: str) -> Family:
    halves = 1 if name in ("gelu_new", "gelu_fast", "gelu_quick") else 2
    return Family(
        lambda config, tp: _activations(config, tp, halves), lambda inputs: (inputs["x"],), _activation_layer(name)
    )


def _family(patch: str, kernel: str) -> Family | None:
    """How this kernel of this patch is measured; None if it is not, by itself."""
    from ..kernels import activation

    if patch in ("moe.grouped_topk", "sampler.top_p"):
        return _ROUTING if kernel == "grouped_topk" else _SAMPLING
    if patch == "rotary.deepseek_scaling":
        return _rotary(True, 1.0)
    if kernel == "mrotary_embedding":
        return _rotary(False, sections=True)
    if patch in ("rotary.rotary_embedding", "op.rotary_embedding"):
        return _rotary(False)
    if patch.partition(".")[0] not in ("layernorm", "activation", "op"):
        return None
    if any(kernel == each.name for each in activation.KERNELS):
        return _activation(kernel)
    return _NORMS.get(kernel)


# The activations of models by their configurations' names for them; the others are measured if asked for.
_ACTIVATIONS = {
    "silu": "silu_and_mul", "gelu": "gelu_and_mul", "gelu_pytorch_tanh": "gelu_tanh_and_mul", "gelu_new": "gelu_new",
    "quick_gelu": "gelu_quick", "gelu_fast": "gelu_fast",
}  # fmt: skip


def _has(config: Config, kernel: str) -> bool:
    """Whether a model of this configuration comes to the kernel."""
    if kernel in _NORMS:
        return kernel.startswith("gemma") is str(config.get("model_type")).startswith("gemma")
    if kernel == "mrotary_embedding":
        return "mrope_section" in (config.get("rope_scaling") or {})
    if kernel in ("rotary_embedding", "grouped_topk", "top_p"):
        return True
    return _ACTIVATIONS.get(config.get("hidden_act") or config.get("hidden_activation") or "silu") == kernel


class Task(NamedTuple):
    """One table of times."""

    patch: Patch
    kernel: Kernel
    family: Family
    shape: Shape
    dtype: str
    tokens: tuple[int, ...]

    @property
    def key(self) -> str:
        return faster.key_of(self.dtype, self.kernel.name, *self.shape.key)


def plan(
    names: Sequence[str], patches: str | None = None, dtype: str = "bfloat16", tp: int = 1, max_tokens: int = 8192
) -> list[Task]:
    """What there is to measure for these models, each once.

    patches: globs with commas; without them what the models come to. Raises ValueError for a model that is not known,
    and for globs that fit no patch that can be measured.
    """
    from ..catalog import catalog

    globs = None if patches is None else [glob.strip() for glob in patches.split(",")]
    found: dict[tuple[str, str], Task] = {}
    configs = [each.get("text_config") or each for name in names for each in models.configurations(name)]
    known = []
    for patch in catalog().patches.values():
        for kernel, family in ((name, _family(patch.name, name)) for name in patch.kernels):
            if family is None:
                continue
            known.append(patch.name)
            if globs is not None and not any(fnmatchcase(patch.name, glob) for glob in globs):
                continue
            for config in configs:
                if globs is None and not _has(config, kernel):
                    continue
                for shape in family.shapes(config, tp):
                    tokens = _powers_of_two(min(family.most, max_tokens) * shape.rows)
                    for each in family.dtypes or (dtype,):
                        task = Task(patch, catalog().kernels[kernel], family, shape, each, tokens)
                        found.setdefault((patch.name, task.key), task)
    for glob in globs or ():
        if not any(fnmatchcase(name, glob) for name in known):
            can = ", ".join(dict.fromkeys(known))
            raise ValueError(f"--patches {glob}: no patch that can be measured by itself; those are {can}")
    return list(found.values())


def _powers_of_two(most: int) -> tuple[int, ...]:
    return tuple(1 << power for power in range(most.bit_length()))
