"""A mixture of experts from the hidden states to its output, in seven or eight direct launches, for few tokens.

vLLM's runner of a mixture calls a router, which is compiled apart even in eager mode, five Triton kernels the ordinary
way, and keeps books of streams and workspaces. What it launches for a layer without parallelism is settled here once:
the router's product, the choice of experts, their two products, the shared experts' two, and one sum of everything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import Refused
from ..nouns import Patch
from .decode_steps import (
    Hooks,
    Kept,
    Memory,
    addresses_of,
    bind_projection,
    block_fp8_refuses,
    check_kept,
    first_refusal,
    is_one_of,
    linear_refuses,
    most_rows,
    parameters_of,
    part_refuses,
    read_of,
    rows_like,
    workspace_for,
)

# Which layers are for us

_SIZES = "tp_size", "pcp_size", "dp_size", "ep_size", "sp_size"


def _refusals(runner: Any) -> Iterator[str | None]:
    for method in ("_forward_impl", "_apply_quant_method", "_maybe_apply_routed_scale_to_output"):
        yield part_refuses(type(runner), f"mixture {method}", method)
    experts, router, config = runner.routed_experts, runner.router, runner.moe_config
    parallel = config.moe_parallel_config
    for name in _SIZES:
        if getattr(parallel, name) != 1:
            yield f"experts in parallel: {name} is {getattr(parallel, name)}"
    if parallel.enable_eplb or router.eplb_state is not None:
        yield "experts that are balanced"
    if runner.enable_dbo:
        yield "dual batches"
    yield from _router_refuses(router)
    yield from _experts_refuse(experts)
    if runner.gate is None:
        yield "the router's logits are computed elsewhere"
        return
    yield from _gate_refuses(runner.gate)
    if runner.shared_expert_gate is not None:
        yield "a gate on the shared experts"
    if runner.routed_input_transform is not None or runner.routed_output_transform is not None:
        yield "a projection around the experts"
    if shared := _shared_of(runner):
        yield part_refuses(type(shared), "mlp")
        yield from linear_refuses("shared gate_up_proj", shared.gate_up_proj, "column")
        yield from linear_refuses("shared down_proj", shared.down_proj, "row")
        if not is_one_of(shared.act_fn, "layers.activation", "SiluAndMul"):
            yield f"the shared experts' activation is {type(shared.act_fn).__name__}"


def _router_refuses(router: Any) -> Iterator[str | None]:
    if not is_one_of(router, "router.fused_topk_router", "FusedTopKRouter") and not is_one_of(
        router, "router.grouped_topk_router", "GroupedTopKRouter"
    ):
        yield f"the router is a {type(router).__name__}"
        return
    yield part_refuses(type(router), "router", "_compute_routing")
    yield part_refuses(type(router), "router's selection", "_select_experts")
    yield part_refuses(type(router), "router's entry", "select_experts")
    if router.capture_fn is not None:
        yield "somebody wants to know the experts that are chosen"
    if getattr(router, "skip_padding", False):  # from 0.32 on
        yield "tokens that are nobody's are routed to nobody"
    if getattr(router, "num_fused_shared_experts", 0):
        yield "shared experts among the routed"
    groups = getattr(router, "num_expert_group", 1)
    if groups >= router.global_num_experts or router.global_num_experts % groups:
        yield f"{router.global_num_experts} experts in {groups} groups"


def _experts_refuse(experts: Any) -> Iterator[str | None]:
    method = experts.quant_method
    if is_one_of(method, "quantization.fp8", "Fp8MoEMethod"):
        yield from block_fp8_refuses("the experts' weight", method)
        yield part_refuses(method.experts_cls, "float8 experts", "apply")
        if sys.modules["vllm.utils.deep_gemm"].is_deep_gemm_e8m0_used():
            yield "experts with scales that are powers of two"
        backend = method.fp8_backend
    elif is_one_of(method, "unquantized_fused_moe_method", "UnquantizedFusedMoEMethod"):
        backend = method.unquantized_backend
    else:
        yield f"the experts are quantised ({type(method).__name__})"
        return
    if getattr(backend, "name", "") != "TRITON":
        yield f"the experts' backend is {backend}, not Triton's"
    if str(getattr(experts.activation, "value", experts.activation)) != "silu":
        yield f"the experts' activation is {experts.activation}"
    if experts.expert_map is not None:
        yield "a map of experts"
    if experts.apply_router_weight_on_input:
        yield "weights on the experts' input"
    for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
        if getattr(experts, name, None) is not None:
            yield f"experts with {name}"
    if hasattr(experts, "w13_bias") or hasattr(experts, "w2_bias"):
        yield "experts with biases"


def _gate_refuses(gate: Any) -> Iterator[str | None]:
    if is_one_of(gate, "layers.linear", "ReplicatedLinear"):  # Qwen3's, until 0.29
        yield from linear_refuses("the router's product", gate, "replicated")
        return
    if not is_one_of(gate, "router.gate_linear", "GateLinear"):
        yield f"the router's product is a {type(gate).__name__}"
        return
    yield part_refuses(type(gate), "gate")
    if gate.out_dtype not in (None, gate.weight.dtype):
        yield f"logits in {gate.out_dtype} of a weight in {gate.weight.dtype}"
    if not is_one_of(gate.quant_method, "layers.linear", "UnquantizedLinearMethod"):
        yield "the router's product is quantised"
    if gate.weight.dim() != 2 or not gate.weight.is_contiguous():
        yield "the router's weight is packed or not contiguous"


def _shared_of(runner: Any) -> Any:
    """The module of the shared experts, or None."""
    shared = runner._shared_experts
    return None if shared is None else shared._layer


def runner_refuses(runner: Any) -> str | None:
    """None if a mixture is made of the parts that are settled here, else why not."""
    return first_refusal(_refusals, runner, "a mixture of experts")


# One layer's launches


class Block(NamedTuple):
    """What a layer does after attention, settled."""

    known: list[Kept]  # parameters, by where they are kept
    read: tuple[Any, ...]  # tensors whose addresses `launches` takes
    launches: Callable[..., None]  # launches(memory, num_tokens, read_at, x_at, out_at)
    adds: bool = False  # whether `launches` of many tokens takes an addend_at, too, of what it adds to out


def bind_block(runner: Any, hidden_states: Any) -> Block:
    """Raises Refused for a mixture that is not made of what is settled here."""
    import torch

    from ..kernels.block_fp8_experts import bind_block_fp8_experts, experts_refuse
    from ..kernels.moe_experts import Experts, bind_moe_experts
    from ..kernels.moe_routing import Routing, bind_routing

    if reason := runner_refuses(runner):
        raise Refused(reason)
    experts, router, gate, shared = runner.routed_experts, runner.router, runner.gate, _shared_of(runner)
    dtype, device, hidden_size = hidden_states.dtype, hidden_states.get_device(), hidden_states.shape[-1]
    itemsize = dtype.itemsize
    both, down = experts.w13_weight, experts.w2_weight
    narrow = both.dtype.itemsize == 1
    scales = (experts.w13_weight_scale_inv, experts.w2_weight_scale_inv) if narrow else (None, None)
    num_experts, width = router.global_num_experts, down.shape[2]
    shapes = [tuple(tensor.shape) for tensor in (gate.weight, both, down)]
    if shapes != [(num_experts, hidden_size), (num_experts, 2 * width, hidden_size), (num_experts, hidden_size, width)]:
        raise Refused(f"weights of shapes {shapes}")
    for tensor in (both, down):
        if (tensor.dtype is not dtype and not narrow) or tensor.get_device() != device or not tensor.is_contiguous():
            have = f"{tensor.dtype} of strides {tensor.stride()} on {tensor.device}"
            raise Refused(f"experts in {have}, hidden states in {dtype}")
    factor = float(router.routed_scaling_factor if hasattr(router, "routed_scaling_factor") else 1.0)
    factor *= float(runner.routed_scaling_factor)
    if dtype is torch.float16 and factor != 1.0:
        raise Refused("float16 with a scale, which vLLM takes from the shared experts to keep it in range")
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None and (bias.get_device() != device or bias.shape != (num_experts,)):
        raise Refused(f"e_score_correction_bias {tuple(bias.shape)} on {bias.device}")
    routing = Routing(
        num_experts, router.top_k, bool(router.renormalize), getattr(router, "num_expert_group", 1),
        getattr(router, "topk_group", 1), router.scoring_func, factor,
    )  # fmt: skip
    route = bind_routing(routing, dtype, None if bias is None else bias.dtype, device)
    sizes = Experts(num_experts, router.top_k, hidden_size, width)
    if narrow:
        if reason := experts_refuse(both, scales[0], down, scales[1], device):
            raise Refused(reason)
        mix = bind_block_fp8_experts(sizes, dtype, shared is not None, device)
    else:
        mix = bind_moe_experts(sizes, dtype, shared is not None, device)
    project = bind_projection(gate, dtype, device)
    read: tuple[Any, ...] = *read_of(gate), both, down, bias, *scales
    known = [*parameters_of(runner), *([] if shared is None else parameters_of(shared))]
    if shared is not None:
        shared_up = bind_projection(shared.gate_up_proj, dtype, device, gated=True)
        shared_down = bind_projection(shared.down_proj, dtype, device)
        for linear in (shared.gate_up_proj, shared.down_proj):
            read += read_of(linear)
        shared_width = shared.down_proj.weight.shape[1]
        if shared.gate_up_proj.weight.shape != (2 * shared_width, hidden_size):
            raise Refused(f"shared experts of {tuple(shared.gate_up_proj.weight.shape)}")

    def launches(memory: Memory, num_tokens: int, read_at: tuple[int, ...], x_at: int, out_at: int) -> None:
        gate_at, (both_at, down_at, bias_at, both_scale_at, down_scale_at) = read_at[:3], read_at[3:8]
        more = num_tokens, memory, workspace_for(num_tokens, memory)
        logits_at = memory(num_tokens * num_experts * itemsize)
        project(x_at, gate_at, logits_at, *more)
        weights_at, ids_at = (memory(num_tokens * router.top_k * 4) for _ in range(2))
        route(logits_at, num_experts, bias_at, weights_at, ids_at, num_tokens)
        shared_out_at = 0
        if shared is not None:
            active_at = memory(num_tokens * shared_width * itemsize)
            shared_up(x_at, read_at[8:11], active_at, *more)
            shared_out_at = memory(num_tokens * hidden_size * itemsize)
            shared_down(active_at, read_at[11:], shared_out_at, *more)
        weights = (both_at, both_scale_at, down_at, down_scale_at) if narrow else (both_at, down_at)
        mix(x_at, *weights, ids_at, weights_at, shared_out_at, out_at, num_tokens, memory)

    return Block(known, read, launches)


def _bind(runner: Any, hidden_states: Any) -> Callable[[Any], Any]:
    """call(hidden_states) -> what the runner returns; raises Refused."""
    import torch

    from .. import replay
    from ..kernels.moe_experts import MAX_TOKENS
    from ..launch import allocator

    block = bind_block(runner, hidden_states)
    dtype, device, hidden_size = hidden_states.dtype, hidden_states.get_device(), hidden_states.shape[-1]
    empty, plainly = allocator(device, dtype), torch._C.DisableTorchFunctionSubclass
    run, check = replay.bind(device, block.launches), rows_like(hidden_states)
    most = min(MAX_TOKENS, most_rows(block.known))

    def call(x: Any) -> Any:
        num_tokens = x.shape[0]
        check("hidden_states", x, num_tokens)
        if not 0 < num_tokens <= most:
            raise Refused(f"no tokens, or more than {most}")
        check_kept(block.known)
        with plainly():
            read_at = addresses_of(*block.read)
        out = empty(num_tokens, hidden_size)
        run((num_tokens, read_at), (x.data_ptr(), out.data_ptr()))
        return out

    return call


def _mixture(original: Any, site: Any) -> Any:
    from ..sites import module_forward
    from .decode_steps import capturing

    def settle(runner: Any, hidden_states: Any, *_: Any, **__: Any) -> Callable[..., Any]:
        call = _bind(runner, hidden_states)
        shared = _shared_of(runner)
        hooked = [Hooks(runner), *([] if shared is None else [Hooks(shared)])]
        name, hits = runner.layer_name, site.by_layer

        def run(
            hidden_states: Any, router_logits: Any, input_ids: Any = None, shared_experts_input: Any = None
        ) -> Any:
            if shared_experts_input is not None:
                raise Refused("a projection before the experts")
            if capturing():
                raise Refused("a CUDA graph is being captured")
            for hooks in hooked:
                if reason := hooks.refuses():
                    raise Refused(reason)
            result = call(hidden_states)
            hits[name] = hits.get(name, 0) + 1
            return result

        return run

    return module_forward(original, site, settle)


PATCHES = (
    Patch(
        "moe.mixture",
        "layer.mixture",
        ("linear", "grouped_topk", "silu_gated_linear", "moe_experts"),
        _mixture,
        "a mixture of experts over few tokens in seven or eight direct launches, settled per layer",
        default=False,
    ),
)
