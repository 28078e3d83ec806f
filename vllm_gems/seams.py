"""Where vLLM keeps what we replace. The only module that knows vLLM's releases and its names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .nouns import Place, Seam

_LAYERS = "vllm.model_executor.layers"
# Importing this module loads the extension libraries that register vLLM's ops.
_OPS = "vllm._custom_ops"

# A method inherited from CustomOp, for the platforms that a layer has no method of its own for.
_INHERITED = "(self, *args, **kwargs)"


def _layer(name: str, module: str, cls: str, *signatures: str, since: str = "0.17.1") -> Seam:
    """A CustomOp layer, which calls `forward_cuda` on a GPU and `forward_cpu` on a CPU."""
    module = f"{_LAYERS}.{module}"
    places = tuple(
        Place("attribute", module, f"{cls}.forward_{platform}", accepts, f"{since}-0.33", platform)
        for platform, accepts in (("cuda", signatures), ("cpu", (*signatures, _INHERITED)))
    )
    return Seam(name, places, layer=f"{module}:{cls}")


def _op(name: str, *schemas: str, since: str = "0.17.1", layer: str = "") -> Seam:
    """An op of vLLM's `_C` library; `layer` is the layer that calls it, as "module:Class"."""
    place = Place("op", _OPS, f"_C::{name}", schemas, f"{since}-0.33")
    return Seam(f"op.{name}", (place,), f"{_LAYERS}.{layer}" if layer else "")


_ROTARY = "(self, positions, query, key=None)"
_ROTARY_OFFSETS = "(self, positions, query, key=None, offsets=None)"
_GATED = "(Tensor!, Tensor) -> ()"

_ALL = (
    _layer("layer.rms_norm", "layernorm", "RMSNorm", "(self, x, residual=None)"),
    _layer("layer.gemma_rms_norm", "layernorm", "GemmaRMSNorm", "(self, x, residual=None)"),
    _layer("layer.rotary_embedding", "rotary_embedding.base", "RotaryEmbedding", _ROTARY),
    _layer(
        "layer.deepseek_scaling_rotary_embedding",
        "rotary_embedding.deepseek_scaling_rope",
        "DeepseekScalingRotaryEmbedding",
        _ROTARY_OFFSETS,
    ),
    _layer("layer.mrotary_embedding", "rotary_embedding.mrope", "MRotaryEmbedding", _ROTARY_OFFSETS),
    _layer("layer.silu_and_mul", "activation", "SiluAndMul", "(self, x)"),
    _layer("layer.mul_and_silu", "activation", "MulAndSilu", "(self, x)"),
    _layer("layer.gelu_and_mul", "activation", "GeluAndMul", "(self, x)"),
    _layer("layer.gelu_new", "activation", "NewGELU", "(self, x)"),
    _layer("layer.gelu_fast", "activation", "FastGELU", "(self, x)"),
    _layer("layer.gelu_quick", "activation", "QuickGELU", "(self, x)"),
    _layer("layer.fatrelu_and_mul", "activation", "FatreluAndMul", "(self, x)"),
    _layer("layer.swigluoai_and_mul", "activation", "SwigluOAIAndMul", "(self, x)"),
    _layer("layer.silu_and_mul_with_clamp", "activation", "SiluAndMulWithClamp", "(self, x)", since="0.20.2"),
    # The weight became optional in 0.24.
    _op(
        "rms_norm",
        "(Tensor!, Tensor, Tensor?, float) -> ()",
        "(Tensor!, Tensor, Tensor, float) -> ()",
        layer="layernorm:RMSNorm",
    ),
    _op(
        "fused_add_rms_norm",
        "(Tensor!, Tensor!, Tensor?, float) -> ()",
        "(Tensor!, Tensor!, Tensor, float) -> ()",
        layer="layernorm:RMSNorm",
    ),
    # The offset and the direction came in 0.20.
    _op(
        "rotary_embedding",
        "(Tensor, Tensor!, Tensor!?, int, Tensor, bool, int=0, bool=False) -> ()",
        "(Tensor, Tensor!, Tensor!?, int, Tensor, bool) -> ()",
        layer="rotary_embedding.base:RotaryEmbedding",
    ),
    _op("silu_and_mul", _GATED, layer="activation:SiluAndMul"),
    _op("mul_and_silu", _GATED, layer="activation:MulAndSilu"),
    _op("gelu_and_mul", _GATED, layer="activation:GeluAndMul"),
    _op("gelu_tanh_and_mul", _GATED, layer="activation:GeluAndMul"),
    _op("gelu_new", _GATED, layer="activation:NewGELU"),
    _op("gelu_fast", _GATED, layer="activation:FastGELU"),
    _op("gelu_quick", _GATED, layer="activation:QuickGELU"),
    _op("fatrelu_and_mul", "(Tensor!, Tensor, float) -> ()", layer="activation:FatreluAndMul"),
    _op(
        "swigluoai_and_mul",
        "(Tensor!, Tensor, float=1.702, float=7.0) -> ()",
        layer="activation:SwigluOAIAndMul",
    ),
    # The sigmoid's scale and the bias came in 0.24.
    _op(
        "silu_and_mul_with_clamp",
        "(Tensor!, Tensor, float, float=1.0, float=0.0) -> ()",
        "(Tensor!, Tensor, float) -> ()",
        since="0.20.2",
        layer="activation:SiluAndMulWithClamp",
    ),
    # vLLM IR existed from 0.20 to 0.33. Its ops take providers, of which the user chooses.
    Seam(
        "ir.rms_norm",
        (
            Place(
                "ir",
                "vllm.ir.ops.layernorm",
                "rms_norm",
                ("(x, weight, epsilon, variance_size=None)",),
                "0.20.2-0.33",
            ),
        ),
    ),
    Seam(
        "ir.fused_add_rms_norm",
        (
            Place(
                "ir",
                "vllm.ir.ops.layernorm",
                "fused_add_rms_norm",
                ("(x, x_residual, weight, epsilon, variance_size=None)",),
                "0.22.1-0.33",
            ),
        ),
    ),
)

SEAMS: dict[str, Seam] = {seam.name: seam for seam in _ALL}


def vllm_version() -> str:
    """Of the vLLM imported here, "" if none is."""
    return str(getattr(sys.modules.get("vllm"), "__version__", ""))


def platform() -> str:
    """What vLLM runs on: "cuda" (NVIDIA or AMD), "cpu", a name of its own, or "" while it has not chosen."""
    module = sys.modules.get("vllm.platforms")
    if module is None:
        return ""
    current = module.current_platform
    if current.is_cuda_alike():
        return "cuda"
    return str(current.device_type)


def salt_compile_caches(fingerprint: str, names: tuple[str, ...]) -> Callable[[], None] | None:
    """Make vLLM's compile caches see us; returns the undo, or None if vLLM has no such table.

    vLLM hashes the values of this table into the key of its compiled artifacts (0.12 and later). Without an entry of
    ours, an artifact compiled without the plugin would be loaded with it, and the other way round. Our own variables
    are entered with constant values, so that vLLM does not call them unknown.
    """
    table: dict[str, Callable[[], Any]] | None = getattr(sys.modules.get("vllm.envs"), "environment_variables", None)
    if table is None:
        return None
    ours: dict[str, Callable[[], Any]] = {name: lambda: None for name in names}
    ours["VLLM_GEMS_FINGERPRINT"] = lambda: fingerprint
    table.update(ours)

    def undo() -> None:
        for name in ours:
            table.pop(name, None)

    return undo
