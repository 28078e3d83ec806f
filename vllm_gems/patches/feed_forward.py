"""What a decoder layer does after attention: dense layers or a mixture of experts, settled the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import moe_step
from .decode_steps import (
    Memory,
    bind_projection,
    is_one_of,
    linear_refuses,
    parameters_of,
    part_refuses,
    read_of,
    workspace_for,
)

# (the end of the module's name, the class) that holds a mixture.
_MIXTURES = (("models.deepseek_v2", "DeepseekV2MoE"), ("models.qwen3_moe", "Qwen3MoeSparseMoeBlock"))


def _is_mixture(mlp: Any) -> bool:
    return any(is_one_of(mlp, *each) for each in _MIXTURES)


def refusals(mlp: Any) -> Iterator[str | None]:
    """Why a layer's `mlp` is not settled here, if it is not."""
    if _is_mixture(mlp):
        yield part_refuses(type(mlp), "mixture module")
        if mlp.is_sequence_parallel:
            yield "tokens in parallel"
        yield moe_step.runner_refuses(mlp.experts)
        return
    yield part_refuses(type(mlp), "mlp")
    yield from linear_refuses("gate_up_proj", mlp.gate_up_proj, "column")
    yield from linear_refuses("down_proj", mlp.down_proj, "row")
    if not is_one_of(mlp.act_fn, "layers.activation", "SiluAndMul"):
        yield f"the activation is {type(mlp.act_fn).__name__}"


def experts_of(mlp: Any) -> Any:
    """The runner of a mixture, None of dense layers."""
    return getattr(mlp, "experts", None)


def bind_block(mlp: Any, hidden_states: Any) -> moe_step.Block:
    """The launches of a layer's `mlp`; raises Refused."""
    experts = experts_of(mlp)
    return _dense(mlp, hidden_states) if experts is None else moe_step.bind_block(experts, hidden_states)


def _dense(mlp: Any, hidden_states: Any) -> moe_step.Block:
    from ..errors import Refused

    dtype, device, hidden_size = hidden_states.dtype, hidden_states.get_device(), hidden_states.shape[-1]
    up, down = mlp.gate_up_proj, mlp.down_proj
    width = down.weight.shape[1]
    if (up.weight.shape, down.weight.shape) != ((2 * width, hidden_size), (hidden_size, width)):
        raise Refused(f"weights of shapes {tuple(up.weight.shape)} and {tuple(down.weight.shape)}")
    project_up, project_down = bind_projection(up, dtype, device, gated=True), bind_projection(down, dtype, device)

    def launches(
        memory: Memory, rows: int, read_at: tuple[int, ...], x_at: int, out_at: int, *addend_at: int
    ) -> None:
        more = rows, memory, workspace_for(rows, memory)
        active_at = memory(rows * width * dtype.itemsize)
        project_up(x_at, read_at[:3], active_at, *more)
        project_down(active_at, read_at[3:], out_at, *more, *addend_at)

    return moe_step.Block(parameters_of(mlp), (*read_of(up), *read_of(down)), launches, adds=True)
