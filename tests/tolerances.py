"""How far a kernel may be from its reference, computed in float64: one table, each line with its reason.

A result is judged elementwise, |got - expected| <= atol + rtol * |expected|. Tolerances are in units of the result's
dtype, because the last thing a kernel does is to round to it.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_gems.kernels.block_fp8_linear import dequantised, quantise_reference

# dtype -> (rtol, atol)
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    # Sums of up to 8192 squares in float32, in another order than float64's: some units in the last place (6e-8) each.
    torch.float32: (2e-6, 2e-6),
    # One rounding to 11 bits (4.9e-4 relative) at the end, and one before it: of the sum with the residual, or of the
    # activated half.
    torch.float16: (1.5e-3, 1e-5),
    # The same with 8 bits (3.9e-3 relative).
    torch.bfloat16: (1.2e-2, 1e-5),
}

# The dtype's unit in the last place, relative.
_ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def absolute(kernel: str, inputs: dict[str, Any], dtype: torch.dtype) -> float | None:
    """The absolute tolerance of a kernel whose error is relative to its operands, not to the result; else None."""
    if "rotary" in kernel:
        # Products of like size are subtracted: one rounding of the result, and those of float32 products.
        return float(inputs["query"].abs().max()) * _ULP[dtype] if inputs["query"].numel() else 0.0
    if kernel == "head_linear" and inputs["x"].numel():
        # As of linear, whose products are summed for each head.
        most = float(torch.einsum("rhi,hio->rho", inputs["x"].double().abs(), inputs["weight"].double().abs()).max())
        return max(TOLERANCES[dtype][1], 2 * most * _ULP[torch.float32])
    if "block_fp8_linear" in kernel and inputs["x"].numel():
        # As of linear. Hopper's tensor cores keep 14 bits of the sum over a block, whose products are of float8
        # (https://arxiv.org/abs/2412.19437, section 3.5.2).
        weight = dequantised(inputs["weight"], inputs["scale"].double()).abs()
        most = float((inputs["x"].double().abs() @ weight.T).max())
        unit = 2**-13 if inputs["x"].is_cuda else 2 * _ULP[torch.float32]
        return max(TOLERANCES[dtype][1], most * (most if "gated" in kernel else 1.0) * unit)
    if "linear" in kernel and inputs["x"].numel():
        # Products of both signs are summed in float32; the activation is as steep as what it is multiplied by.
        most = float((inputs["x"].double().abs() @ inputs["weight"].double().abs().T).max())
        units = 2.0
        if dtype is not torch.float32:
            # Tensor cores cut a sum off after every 16 products instead of rounding it, so these errors add up
            # (https://arxiv.org/abs/2203.03341): one unit of a partial sum each, which grows with the square root.
            units = max(units, inputs["x"].shape[1] ** 0.5 / 16)
        return max(TOLERANCES[dtype][1], units * most * (most if "gated" in kernel else 1.0) * _ULP[torch.float32])
    if kernel == "matmul" and inputs["a"].numel():
        # As of linear, with what is added to the sum, in float32 too.
        most = abs(inputs["alpha"]) * float((inputs["a"].double().abs() @ inputs["b"].double().abs()).max())
        if inputs["beta"]:
            most += abs(inputs["beta"]) * float(inputs["input"].double().abs().max())
        units = 2.0 if inputs["a"].dtype is torch.float32 else max(2.0, inputs["a"].shape[-1] ** 0.5 / 16)
        return max(TOLERANCES[dtype][1], units * most * _ULP[torch.float32])
    if kernel == "moe_experts" and inputs["x"].numel():
        # The activation is rounded to the dtype, off by some units of float32 before, and then summed with both signs.
        sizes = torch.zeros_like(inputs["x"], dtype=torch.float64)
        for expert, (both, down) in enumerate(zip(inputs["gate_up"], inputs["down"], strict=True)):
            token, k = (inputs["ids"] == expert).nonzero(as_tuple=True)
            gate, up = (inputs["x"][token].double() @ both.double().T).chunk(2, dim=-1)
            active = (torch.nn.functional.silu(gate) * up).abs() @ down.double().abs().T
            sizes.index_add_(0, token, active * inputs["weights"][token, k][:, None])
        return float(sizes.max()) * (_ULP[dtype] / 2 + 16 * _ULP[torch.float32])
    if kernel == "block_fp8_experts" and inputs["x"].numel():
        # Of what is quantised between the products a few elements are rounded the other way, since they were off by
        # some units before: by an eighth at most, which the second product multiplies.
        total, sizes = 0.0, torch.zeros_like(inputs["x"], dtype=torch.float64)
        x = quantise_reference(inputs["x"].double())
        for expert in range(inputs["gate_up"].shape[0]):
            both, down = (
                dequantised(inputs[name][expert], inputs[f"{name}_scale"][expert].double())
                for name in ("gate_up", "down")
            )
            token, k = (inputs["ids"] == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ both.T).chunk(2, dim=-1)
            active = (torch.nn.functional.silu(gate) * up).abs() * inputs["weights"][token, k][:, None]
            sizes.index_add_(0, token, active @ down.abs().T)
            if token.numel():
                total = max(total, float((active.amax(dim=0) * down.abs().amax(dim=0)).max()))
        return total / 4 + float(sizes.max()) * (2**-13 if inputs["x"].is_cuda else 16 * _ULP[torch.float32])
    if kernel == "rope_and_cache":
        # As of a rotation alone; v is copied.
        return float(inputs["qkv"].abs().max()) * _ULP[dtype] if inputs["qkv"].numel() else 0.0
    if kernel == "qk_norm_rope_and_cache" and inputs["qkv"].numel():
        # As of a rotation of what was normalised: rounded to the dtype before, and off by some units of float32.
        heads = inputs["qkv"].double().unflatten(-1, (-1, inputs["key_cache"].shape[-1]))
        normalised = heads * heads.pow(2).mean(dim=-1, keepdim=True).rsqrt()
        weight = max(float(inputs[name].abs().max()) for name in ("q_weight", "k_weight"))
        return float(normalised.abs().max()) * weight * (_ULP[dtype] + 4 * _ULP[torch.float32])
    if kernel == "mla_rope_and_cache" and inputs["kv"].numel():
        # As of a rotation, of queries and of a key; the latent is a norm, whose error is relative to the result.
        return float(max(inputs["query_rope"].abs().max(), inputs["kv"].abs().max())) * _ULP[dtype]
    if kernel == "decode_attention" and inputs["query"].numel():
        # What the values are weighted by is off by some units of float32, and rounded to the dtype; the values cancel.
        largest = float(inputs["value_cache"].abs().nan_to_num(posinf=0.0).max())  # infinite where nothing may be read
        return largest * (_ULP[dtype] + 8 * _ULP[torch.float32])
    if kernel == "mla_decode" and inputs["query"].numel():
        # As of decode_attention. Scores are sums of 576 products, and the logarithms beside them cancel near zero.
        largest = float(inputs["kv_cache"].abs().nan_to_num(posinf=0.0).max())
        return largest * (_ULP[dtype] + 16 * _ULP[torch.float32])
    if kernel in ("gelu_and_mul", "gelu_tanh_and_mul", "gelu_new", "gelu_fast") and inputs["x"].numel():
        # 1 + erf(x) and 1 + tanh(x) cancel near -1, in float32, before the product with the other half.
        largest = max(1.0, float(inputs["x"].abs().max()))
        return max(TOLERANCES[dtype][1], 8 * largest * largest * _ULP[torch.float32])
    return None


def assert_close(got: torch.Tensor, expected: torch.Tensor, name: str, atol: float | None = None) -> None:
    """Compare with the table; `expected` is in float64. NaN never passes. Integers must be the same."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not got.dtype.is_floating_point:
        assert torch.equal(got, expected.to(got.dtype)), f"{name} differs"
        return
    rtol, default_atol = TOLERANCES[got.dtype]
    limit = (default_atol if atol is None else atol) + rtol * expected.abs()
    error = (got.double() - expected).abs().where(got.double() != expected, 0.0)  # infinities are equal or not
    worst = (error / limit).max().item() if error.numel() else 0.0
    assert bool((error <= limit).all()), f"{name}: {worst:.2f} times the tolerance of {got.dtype}"
