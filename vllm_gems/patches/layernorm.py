"""RMSNorm and GemmaRMSNorm, with and without the residual addition before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..nouns import Patch


def _weight_of(layer: Any) -> tuple[dict[str, Any], Any]:
    """(the dictionary that a layer's weight is read from at each call, the weight or None).

    `layer._parameters` is where PyTorch keeps it; reading it there costs a fraction of `layer.weight`, and a weight
    that is reloaded or moved is seen all the same.
    """
    if not getattr(layer, "has_weight", True):
        return {"weight": None}, None
    parameters = layer._parameters
    return parameters, parameters["weight"]


def _faster(site: Any, kernel: str, x: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` for rows like those of x, where it is faster."""
    from ..faster import key_of, where_faster

    hidden_size = x.shape[-1]
    key = key_of(x.dtype, kernel, hidden_size)
    return where_faster(site.name, key, x.get_device(), call, lambda x, *rest: x.numel() // hidden_size)


def _adapt(
    original: Any,
    site: Any,
    gemma: bool,
    in_place: bool,
    variance_size_of: Callable[[Any], int | None],
    traced: Callable[..., Any],
) -> Any:
    from ..errors import Refused
    from ..kernels.rms_norm import bind_fused_add_rms_norm, bind_rms_norm
    from ..sites import layer_method

    kind = "gemma_" if gemma else ""

    def bind(layer: Any, x: Any, residual: Any = None) -> Callable[..., Any]:
        parameters, weight = _weight_of(layer)
        dtype, device = x.dtype, x.get_device()
        weight_dtype = None if weight is None else weight.dtype
        if weight is not None and not weight.is_contiguous():
            raise Refused("the weight is not contiguous")
        settled = dtype, weight_dtype, x.shape[-1], layer.variance_epsilon, variance_size_of(layer), gemma
        if weight is not None and weight.shape != x.shape[-1:]:
            raise Refused(f"x has {x.shape[-1]} elements a row, the weight {tuple(weight.shape)}")
        alone = _faster(site, f"{kind}rms_norm", x, bind_rms_norm(*settled, device))
        fused = _faster(site, f"{kind}fused_add_rms_norm", x, bind_fused_add_rms_norm(*settled, in_place, device))

        def call(x: Any, residual: Any = None) -> Any:
            weight = parameters["weight"]
            if weight_dtype is not None and (weight.dtype is not weight_dtype or weight.get_device() != device):
                raise Refused("the weight has changed its dtype or device")
            if residual is None:
                return alone(x, weight)
            return fused(x, residual, weight)

        return call

    return layer_method(original, site, bind, traced)


def _rms_norm(original: Any, site: Any) -> Any:
    import torch

    def traced(layer: Any, x: Any, residual: Any = None) -> Any:
        weight = layer.weight if getattr(layer, "has_weight", True) else None
        settled = layer.variance_epsilon, layer.variance_size_override
        if residual is None:
            return torch.ops.vllm_gems.rms_norm(x, weight, *settled)
        torch.ops.vllm_gems.fused_add_rms_norm(x, residual, weight, *settled)
        return x, residual

    return _adapt(original, site, False, True, lambda layer: layer.variance_size_override, traced)


def _gemma_rms_norm(original: Any, site: Any) -> Any:
    import torch

    def traced(layer: Any, x: Any, residual: Any = None) -> Any:
        if residual is None:
            return torch.ops.vllm_gems.gemma_rms_norm(x, layer.weight, layer.variance_epsilon)
        return torch.ops.vllm_gems.gemma_fused_add_rms_norm(x, residual, layer.weight, layer.variance_epsilon)

    return _adapt(original, site, True, False, lambda layer: None, traced)


def _rms_norm_op(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..kernels.rms_norm import bind_rms_norm, rms_norm_refuses
    from ..sites import op_kernel

    settled: dict[Any, Callable[..., Any]] = {}

    def call(out: Any, x: Any, weight: Any, epsilon: float) -> None:
        if reason := rms_norm_refuses(x, weight, epsilon, None, out):
            raise Refused(reason)
        of = x.dtype, None if weight is None else weight.dtype, x.shape[-1], epsilon, None, False, x.get_device()
        if of not in settled:
            settled[of] = _faster(site, "rms_norm", x, bind_rms_norm(*of))
        settled[of](x, weight, out)

    return op_kernel(original, site, call)


def _fused_add_rms_norm_op(original: Any, site: Any) -> Any:
    from ..errors import Refused
    from ..kernels.rms_norm import bind_fused_add_rms_norm, fused_add_rms_norm_refuses
    from ..sites import op_kernel

    settled: dict[Any, Callable[..., Any]] = {}

    def call(x: Any, residual: Any, weight: Any, epsilon: float) -> None:
        if reason := fused_add_rms_norm_refuses(x, residual, weight, epsilon):
            raise Refused(reason)
        dtype = None if weight is None else weight.dtype
        of = x.dtype, dtype, x.shape[-1], epsilon, None, False, True, x.get_device()
        if of not in settled:
            settled[of] = _faster(site, "fused_add_rms_norm", x, bind_fused_add_rms_norm(*of))
        settled[of](x, residual, weight)

    return op_kernel(original, site, call)


def _rms_norm_ir(op: Any, site: Any) -> Any:
    from ..kernels.rms_norm import rms_norm_refuses

    def implementation(x: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> Any:
        import torch

        site.hits += 1
        return torch.ops.vllm_gems.rms_norm(x, weight, epsilon, variance_size)

    def supports_args(x: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> bool:
        return rms_norm_refuses(x, weight, epsilon, variance_size) is None

    return _annotated_like(op, implementation), supports_args


def _fused_add_rms_norm_ir(op: Any, site: Any) -> Any:
    from ..kernels.rms_norm import fused_add_rms_norm_refuses

    def implementation(
        x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None
    ) -> Any:
        import torch

        site.hits += 1
        # The op's default overload must not write its inputs.
        x, x_residual = x.clone(), x_residual.clone()
        torch.ops.vllm_gems.fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size)
        return x, x_residual

    def supports_args(
        x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None
    ) -> bool:
        return fused_add_rms_norm_refuses(x, x_residual, weight, epsilon, variance_size) is None

    return _annotated_like(op, implementation), supports_args


def _annotated_like(op: Any, implementation: Any) -> Any:
    """vLLM infers a schema from the annotations of an implementation and wants it equal to the native one's."""
    implementation.__annotations__ = dict(op.impls["native"].impl_fn.__annotations__)
    return implementation


PATCHES = (
    Patch(
        "layernorm.rms_norm",
        "layer.rms_norm",
        ("rms_norm", "fused_add_rms_norm"),
        _rms_norm,
        "one direct launch, settled per layer, in place of the dispatch through vLLM IR and a C++ op",
    ),
    Patch(
        "layernorm.gemma_rms_norm",
        "layer.gemma_rms_norm",
        ("gemma_rms_norm", "gemma_fused_add_rms_norm"),
        _gemma_rms_norm,
        "one launch in place of about ten: vLLM has no kernel for Gemma's float32 weight",
    ),
    Patch(
        "op.rms_norm",
        "op.rms_norm",
        ("rms_norm",),
        _rms_norm_op,
        "reaches every caller of the op, in every mode that calls it",
    ),
    Patch(
        "op.fused_add_rms_norm",
        "op.fused_add_rms_norm",
        ("fused_add_rms_norm",),
        _fused_add_rms_norm_op,
        "reaches every caller of the op, in every mode that calls it",
    ),
    Patch(
        "ir.rms_norm",
        "ir.rms_norm",
        ("rms_norm",),
        _rms_norm_ir,
        "a provider for --ir-op-priority.rms_norm",
        default=False,
    ),
    Patch(
        "ir.fused_add_rms_norm",
        "ir.fused_add_rms_norm",
        ("fused_add_rms_norm",),
        _fused_add_rms_norm_ir,
        "a provider for --ir-op-priority.fused_add_rms_norm",
        default=False,
    ),
)
