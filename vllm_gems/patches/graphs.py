"""vLLM's default mode: CUDA graphs of decode steps are captured from whole layers of ours, not from Inductor's code.

There the host does not count, and our layers gain what their kernels gain: few rows are walks through weights at the
speed of memory, and what lies between them is fused into fewer launches than Inductor makes of it. vLLM itself has a
way around its compiled code, for models whose inputs vary too much: `ForwardContext.skip_compiled`. It is taken where a
graph is captured of a batch that only decodes, and in the warm-up before, in which our kernels are compiled. Prefills
and mixed batches run compiled as ever. Should a layer decline in the warm-up, the graphs are the compiled model's: what
vLLM does without Inductor, one kernel after the other, is in none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import Refused
from ..nouns import Patch
from . import decoder, deepseek, mla_step
from .decode_steps import FEW_ROWS, MAX_REQUESTS, capturing, make_step


def _layers_refuse(model: Any, layer_refuses: Callable[[Any], str | None]) -> str | None:
    """None if every layer of a model is one of ours, else why not."""
    for layer in model.layers:
        if getattr(type(layer).forward, "__vllm_gems__", None) is None:
            return f"{type(layer).__name__} is not replaced as a whole"
        if reason := layer_refuses(layer):
            return reason
    return None


def _not_measured(layer: Any) -> str | None:
    """Why graphs are vLLM's own until somebody measures: its compiled code is fast everywhere, our tilings where they
    were chosen."""
    from ..kernels.linear import Shape, measured_tiling

    weight = layer.self_attn.o_proj.weight
    if weight.dtype.itemsize != 2:
        return f"weights in {weight.dtype}, of which graphs are not measured"
    out_features, in_features = weight.shape
    if measured_tiling(Shape(in_features, out_features), 16, weight.dtype, weight.get_device()) is None:
        return "linear layers are not measured on this GPU; `vllm-gems pretune --ops linear` does that"
    return None


def _full_graphs(model: Any) -> bool:
    """Whether decode steps have graphs of the whole model, which are for no other batch; a backend may have changed
    that since the model was made."""
    mode = getattr(getattr(model, "compilation_config", None), "cudagraph_mode", None)
    return mode is not None and mode.separate_routine() and mode.decode_mode().name == "FULL"


@contextmanager
def _past_the_compiled(context: Any, norm: Any) -> Iterator[None]:
    """A forward pass past the compiled code, the model's last norm by one kernel instead of PyTorch's dozen.

    Compiled models have chosen the norm's native form, which Inductor would fuse and nobody else does.
    """
    from ..sites import reseat

    skipped, chosen = context.skip_compiled, getattr(norm, "_forward_method", None)
    try:
        context.skip_compiled = True
        if chosen is not None:
            norm._forward_method = norm.forward_cuda
        yield
    finally:
        context.skip_compiled = skipped
        if chosen is not None:
            reseat(norm, chosen)


def _model(
    read: Callable[[Any], Any], layer_refuses: Callable[[Any], str | None], most: int
) -> Callable[[Any, Any], Any]:
    """How a model's `forward` is replaced; read: as `Steps` takes it. most: requests of a step."""

    def adapt(original: Any, site: Any) -> Any:
        from ..sites import module_forward

        def settle(whole: Any, *args: Any, **named: Any) -> Callable[..., Any]:
            model = whole.model
            if getattr(model, "do_not_compile", True):
                raise Refused("a model that vLLM does not compile")
            if reason := _layers_refuse(model, layer_refuses) or _not_measured(model.layers[0]):
                raise Refused(reason)
            context_of = sys.modules["vllm.forward_context"].get_forward_context
            layers, norm = len(model.layers), getattr(model, "norm", None)
            sites = {type(layer).forward.__vllm_gems__ for layer in model.layers}
            warm, incomplete = set[int](), ""

            def run(*args: Any, **named: Any) -> Any:
                nonlocal incomplete
                if incomplete:
                    raise Refused(incomplete)
                context = context_of()
                metadata, slots = context.attn_metadata, context.slot_mapping
                if type(metadata) is not dict or type(slots) is not dict or not metadata:
                    raise Refused("a forward pass without attention metadata of its own for every layer")
                name, first = next(iter(metadata.items()))
                if getattr(first, "max_query_len", 1) != 1:  # soon, for what comes with every prompt
                    raise Refused("a batch that does not only decode")
                positions = named["positions"] if "positions" in named else args[1]
                # What the layers would refuse they would do in vLLM's way, one kernel after the other.
                rows = make_step(read, first, slots.get(name), positions, captured=True).num_tokens
                if rows > most:
                    raise Refused(f"more than {most} requests")
                if not _full_graphs(model):
                    raise Refused("decode steps have no graphs of the whole model and of their own")
                if not hasattr(context, "skip_compiled"):
                    raise Refused("a vLLM that does not skip its compiled code")
                if context.cudagraph_runtime_mode.name == "PIECEWISE":
                    raise Refused("a graph of pieces of the model")
                if capturing() and rows not in warm:
                    raise Refused("a CUDA graph is captured without a warm-up of as many requests")
                before = sum(each.hits for each in sites)
                with _past_the_compiled(context, norm):
                    result = original(whole, *args, **named)
                if (ran := sum(each.hits for each in sites) - before) != layers:
                    incomplete = f"only {ran} of {layers} layers took a batch of {rows} requests"
                    raise Refused(incomplete)
                warm.add(rows)
                return result

            return run

        return module_forward(original, site, settle)

    return adapt


def _patch(
    name: str, read: Callable[[Any], Any], layer_refuses: Callable[[Any], str | None], most: int, default: bool = True
) -> Patch:
    gain = "graphs of decode steps have our layers' launches in place of Inductor's"
    return Patch(f"graphs.{name}", f"model.{name}", (), _model(read, layer_refuses, most), gain, default)


PATCHES = (
    *(_patch(name, decoder.read, decoder.layer_refuses, MAX_REQUESTS) for name in ("qwen2", "qwen3", "llama")),
    # Beyond, what Inductor makes around vLLM's experts is faster: of V2-Lite's 256 requests.
    _patch("deepseek_v2", mla_step.read, deepseek.layer_refuses, FEW_ROWS),
    _patch("qwen3_moe", decoder.read, decoder.layer_refuses, FEW_ROWS, default=False),  # not measured
)
