"""The activations: each a layer of vLLM's and an op of its `_C` library."""

from __future__ import annotations

import inspect
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

        from ..sites import layer_method

        def bind(layer: Any, x: Any) -> Callable[..., Any]:
            return _settled(site, kernel_of(layer), x.dtype, x.shape[-1], params_of(layer), x.get_device())

        def traced(layer: Any, x: Any) -> Any:
            return getattr(torch.ops.vllm_gems, kernel_of(layer))(x, *params_of(layer))

        return layer_method(original, site, bind, traced)

    return adapt


def _settled(
    site: Any, kernel: str, dtype: Any, last: int, params: tuple[float, ...], device: int
) -> Callable[..., Any]:
    """call(x, out=None) for rows of `last` elements, where it is faster."""
    from ..faster import key_of, where_faster
    from ..kernels.activation import bind_activation

    call = bind_activation(kernel, dtype, last, params, device)
    key = key_of(dtype, kernel, last)
    return where_faster(site.name, key, device, call, lambda x, *out: x.numel() // last)


def _op(name: str) -> Callable[[Any, Any], Any]:
    def adapt(original: Any, site: Any) -> Any:
        from ..errors import Refused
        from ..kernels import activation
        from ..sites import op_kernel

        kernel = next(kernel for kernel in activation.KERNELS if kernel.name == name)
        # What PyTorch leaves out, when it is the schema's default.
        parameters = inspect.signature(kernel.op).parameters.values()
        defaults = tuple(each.default for each in parameters if each.name not in ("x", "out"))
        settled: dict[Any, Callable[..., Any]] = {}

        def call(out: Any, x: Any, *params: float) -> None:
            if reason := activation.activation_refuses(name, x, out):
                raise Refused(reason)
            of = x.dtype, x.shape[-1], (*params, *defaults[len(params) :]), x.get_device()
            if of not in settled:
                if inspect.Parameter.empty in of[2]:
                    raise TypeError(f"{name} has parameters without a default, which were not given")
                settled[of] = _settled(site, name, *of)
            settled[of](x, out)

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
