"""The activations: each a layer of vLLM's and an op of its `_C` library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..nouns import Patch


def _gelu_kernel(layer: Any) -> str:
    return "gelu_tanh_and_mul" if layer.approximate == "tanh" else "gelu_and_mul"


# seam -> (layer -> kernel, layer -> the kernel's parameters after x)
_LAYERS: dict[str, tuple[Callable[[Any], str], Callable[[Any], tuple[float, ...]]]] = {
    "silu_and_mul": (lambda layer: "silu_and_mul", lambda layer: ()),
    "mul_and_silu": (lambda layer: "mul_and_silu", lambda layer: ()),
    "gelu_and_mul": (_gelu_kernel, lambda layer: ()),
    "gelu_new": (lambda layer: "gelu_new", lambda layer: ()),
    "gelu_fast": (lambda layer: "gelu_fast", lambda layer: ()),
    "gelu_quick": (lambda layer: "gelu_quick", lambda layer: ()),
    "fatrelu_and_mul": (lambda layer: "fatrelu_and_mul", lambda layer: (layer.threshold,)),
    "swigluoai_and_mul": (lambda layer: "swigluoai_and_mul", lambda layer: (layer.alpha, layer.limit)),
    # vLLM 0.20 to 0.23 had neither alpha nor beta.
    "silu_and_mul_with_clamp": (
        lambda layer: "silu_and_mul_with_clamp",
        lambda layer: (layer.swiglu_limit, getattr(layer, "alpha", 1.0), getattr(layer, "beta", 0.0)),
    ),
}


def _layer(name: str) -> Callable[[Any, Any], Any]:
    kernel_of, params_of = _LAYERS[name]

    def adapt(original: Any, site: Any) -> Any:
        import torch

        from ..faster import Decisions
        from ..kernels.activation import bind_activation
        from ..sites import layer_method

        decisions = Decisions(site.name, bind_activation.__module__)

        def bind(layer: Any, x: Any) -> Callable[..., Any]:
            kernel, dtype, last, device = kernel_of(layer), x.dtype, x.shape[-1], x.get_device()
            call = bind_activation(kernel, dtype, last, params_of(layer), device)
            return decisions.settled((device, dtype, kernel, last), call, lambda x: x.numel() // last)

        def traced(layer: Any, x: Any) -> Any:
            return getattr(torch.ops.vllm_gems, kernel_of(layer))(x, *params_of(layer))

        return layer_method(original, site, bind, traced)

    return adapt


def _op(name: str) -> Callable[[Any, Any], Any]:
    def adapt(original: Any, site: Any) -> Any:
        from ..faster import Decisions, check
        from ..kernels import activation
        from ..sites import op_kernel

        activate = next(kernel.op for kernel in activation.KERNELS if kernel.name == name)
        decisions = Decisions(site.name, activation.__name__)

        def call(out: Any, x: Any, *params: float) -> None:
            if slower := decisions[x.get_device(), x.dtype, name, last := x.size(-1)]:
                check(slower, x.numel() // last)
            activate(x, *params, out=out)

        return op_kernel(original, site, call)

    return adapt


_OPS = (*_LAYERS, "gelu_tanh_and_mul")

PATCHES = (
    *(
        Patch(
            f"activation.{name}",
            f"layer.{name}",
            (name, "gelu_tanh_and_mul") if name == "gelu_and_mul" else (name,),
            _layer(name),
            "one direct launch, settled per layer, with the shortest allocation",
        )
        for name in _LAYERS
    ),
    *(
        Patch(
            f"op.{name}",
            f"op.{name}",
            (name,),
            _op(name),
            "reaches every caller of the op (experts among them), in every mode that calls it",
        )
        for name in _OPS
    ),
)
