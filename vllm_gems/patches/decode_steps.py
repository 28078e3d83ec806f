"""What the patches of whole decode steps share: which steps and layers are for them, and the facts of a step.

Such a patch settles a layer once, and a call only launches. So everything that could make a call do something else than
vLLM's code would has to be seen: in the step's metadata, in the parts that a layer is made of, in what came after.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ..errors import Refused, Unsettled
from ..seams import PARTS

# The most requests of a decode step; beyond them the GPU, not the host, sets the pace.
MAX_REQUESTS = 512
# And the most tokens of a batch that prefills, too.
MAX_MIXED = 1024

# Up to so many rows a product is a walk through its weight; beyond, it is cuBLAS's.
FEW_ROWS = 64

# Up to so many rows a layer with weights in float8 is ours: the kernels take more, which are not measured.
FEW_ROWS_OF_FLOAT8 = 64


class Paged(NamedTuple):
    """What a backend's metadata says of a step in which every request has one token."""

    num_tokens: int
    max_seq_len: int
    block_table: Any
    seq_lens: Any


class Mixed(NamedTuple):
    """Of one in which some have more, whose attention is the backend's."""

    num_tokens: int


class Step(NamedTuple):
    """What all layers of a forward pass share. The tensors are kept, so that their addresses stay theirs."""

    metadata: Any
    slot_mapping: Any
    positions: Any
    num_tokens: int  # as many as requests, where `only_decodes`
    positions_at: int
    slot_mapping_at: int
    only_decodes: bool
    max_seq_len: int = 0
    block_table_at: int = 0
    block_table_stride: int = 0
    seq_lens_at: int = 0


def unknown_field(metadata: Any, known: set[str]) -> str | None:
    """A field of a dataclass that is not known and has not its default: a release that adds a feature adds a field."""
    for field in dataclasses.fields(metadata):
        if field.name not in known and getattr(metadata, field.name) is not field.default:
            return field.name
    return None


def capturing() -> bool:
    import torch

    return torch.cuda.is_initialized() and torch._C._cuda_isCurrentStreamCapturing()


def _transfers_kv() -> bool:
    """Whether a connector wants to see the cache of every layer."""
    state = sys.modules.get("vllm.distributed.kv_transfer.kv_transfer_state")
    return state is not None and bool(state.has_kv_transfer_group())


def make_step(
    read: Callable[[Any], Paged | Mixed], metadata: Any, slot_mapping: Any, positions: Any, captured: bool = False
) -> Step:
    """`read` takes from a backend's metadata what it says. Raises Refused, as `read` does, for a step not for us.

    captured: whether a CUDA graph that is being captured of it is for decode steps alone. vLLM has these in tensors
    that stay where they are; requests that are not there at a replay have no tokens, and no slot. A graph for any batch
    is captured of one that looks the same.
    """
    import torch

    if metadata is None:
        raise Refused("a forward pass without attention metadata (vLLM measures its memory)")
    found = read(metadata)
    rows, paged = found.num_tokens, found if isinstance(found, Paged) else None
    if slot_mapping is None:
        raise Refused("no slots to write keys and values to")
    what, most = ("requests", MAX_REQUESTS) if paged else ("tokens", MAX_MIXED)
    if not 0 < rows <= most:
        raise Refused(f"no {what}, or more than {most}")  # as few reasons as there are: the report counts each
    if positions.dim() != 1 or not positions.is_contiguous() or positions.dtype is not torch.int64:
        raise Refused(f"positions {positions.dtype} {tuple(positions.shape)}, not one int64 a token")
    if positions.shape[0] != rows or slot_mapping.shape[0] != rows:
        raise Refused("a batch padded with tokens that are nobody's")
    if slot_mapping.dtype is not torch.int64 or not slot_mapping.is_contiguous():
        raise Refused(f"slot_mapping {slot_mapping.dtype}, not contiguous int64")
    if capturing() and not (captured and paged):
        raise Refused("a CUDA graph is being captured, and the next step's batch is another")
    if _transfers_kv():
        raise Refused("a KV connector waits for every layer")
    all_have = metadata, slot_mapping, positions, rows, positions.data_ptr(), slot_mapping.data_ptr()
    if paged is None:
        return Step(*all_have, only_decodes=False)
    _, max_seq_len, block_table, seq_lens = paged
    if seq_lens.shape[0] != rows:
        raise Refused("a batch padded with tokens that are nobody's")
    if seq_lens.dtype is not torch.int32 or not seq_lens.is_contiguous():
        raise Refused(f"seq_lens {seq_lens.dtype}, not contiguous int32")
    if block_table.dtype is not torch.int32 or block_table.stride(1) != 1:
        raise Refused(f"block_table {block_table.dtype} of strides {block_table.stride()}, not rows of int32")
    return Step(
        *all_have, True, max_seq_len, block_table.data_ptr(), block_table.stride(0), seq_lens.data_ptr()
    )  # fmt: skip


class Steps:
    """The last step, or why it is not for us: what one layer found out, the others need not."""

    def __init__(self, read: Callable[[Any], Paged | Mixed]) -> None:
        self._read = read  # as `make_step` takes it
        self._last: Step | None = None
        self._refused: tuple[Any, Any, str] = (None, None, "")

    def _of(self, metadata: Any, slot_mapping: Any, positions: Any, captured: bool) -> Step:
        step = self._last
        if (
            step is not None
            and step.metadata is metadata
            and step.slot_mapping is slot_mapping
            and step.positions is positions
            and (captured or not capturing())
        ):
            return step
        refused = self._refused
        if metadata is not None and refused[0] is metadata and refused[1] is positions:
            raise Refused(refused[2])
        self._last = None
        try:
            step = self._last = make_step(self._read, metadata, slot_mapping, positions, captured)
        except Refused as refusal:
            self._refused = metadata, positions, str(refusal)
            raise
        return step

    def follow(
        self, layer: Any, attention: Any, prepare: Callable[[Any], None]
    ) -> Callable[[Any], tuple[Step, Any]]:
        """For a layer with vLLM's module `attention` in it: (positions) -> (the present step, the layer's KV cache).

        prepare(KV cache) compiles what a decode step with it needs. It is called in a forward pass without requests,
        with which vLLM warms up once it has its caches: until then nothing is known of them, and then it is too late.

        The function raises Refused for a step that is not for us, and while any module of the layer has hooks.
        """
        name, hooks, step_of = attention.layer_name, Hooks(layer), self._of
        context_of = sys.modules["vllm.forward_context"].get_forward_context
        prepared: Any = None

        def cache_of(context: Any) -> Any:
            kv_cache = attention.kv_cache
            if type(kv_cache) is list:  # until 0.19, one for each virtual engine
                kv_cache = kv_cache[context.virtual_engine]
            return kv_cache

        def now(positions: Any) -> tuple[Step, Any]:
            nonlocal prepared
            context = context_of()
            metadata, slots = context.attn_metadata, context.slot_mapping
            if type(metadata) is not dict or type(slots) is not dict:
                kv_cache = cache_of(context)
                if kv_cache is not prepared and kv_cache.numel() and not capturing():
                    prepared = kv_cache  # whatever becomes of it
                    prepare(kv_cache)
                raise Refused("a forward pass without attention metadata of its own for every layer")
            # Which `graphs` has for graphs of decode steps alone.
            captured = getattr(context, "skip_compiled", False)
            step = step_of(metadata[name], slots.get(name), positions, captured)
            if reason := hooks.refuses():
                raise Refused(reason)
            return step, cache_of(context)

        return now


# Which layers are for us


def part_refuses(cls: type, role: str, method: str = "forward") -> str | None:
    """None if `cls` does by `method` what one of the known sources of `role` does."""
    found = getattr(cls, method, None)
    for place in PARTS[role]:
        if found is not None and source_hash(found) in place.sources:
            return None
    return f"{cls.__name__}.{method} is none of those that the replacement was written against"


@functools.cache
def source_hash(function: Any) -> str:
    from ..probes import hash_of

    try:
        return hash_of(function)
    except (OSError, TypeError):
        return ""


def is_one_of(obj: Any, module: str, *names: str) -> bool:
    """Whether `obj` is of a class of these names itself, in a module whose name ends so."""
    return type(obj).__module__.endswith(module) and type(obj).__name__ in names


_LINEARS = (
    "QKVParallelLinear", "MergedColumnParallelLinear", "ColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear",
)  # fmt: skip
_FUSED = "DeepSeekV2FusedQkvAProj", "DeepSeekV2FusedQkvAProjLinear"  # the name until 0.17, and the later one


def linear_refuses(name: str, linear: Any, role: str) -> Iterator[str | None]:
    cls = type(linear)
    if is_one_of(linear, "models.deepseek_v2", *_FUSED):
        yield part_refuses(cls, "fused column")
        cls = cls.__mro__[1]  # which it leaves most products to
    elif not is_one_of(linear, "layers.linear", *_LINEARS):
        yield f"{name} is a {cls.__name__}"
        return
    yield part_refuses(cls, role)
    if is_one_of(linear.quant_method, "quantization.fp8", "Fp8LinearMethod"):
        yield from _block_fp8_refuses(name, linear)
    elif not is_one_of(linear.quant_method, "layers.linear", "UnquantizedLinearMethod"):
        yield f"{name} is quantised ({type(linear.quant_method).__name__})"
        return
    else:
        yield part_refuses(type(linear.quant_method), "linear method", "apply")
    if linear.tp_size != 1:
        yield "tensor parallelism: a collective sits inside the layer"
    if linear.skip_bias_add or not linear.return_bias:
        yield f"{name} returns its bias apart"
    if linear.weight.dim() != 2 or not linear.weight.is_contiguous():
        yield f"the weight of {name} is packed or not contiguous"


_BLOCK_SHAPE = [128, 128]


def block_fp8_refuses(name: str, method: Any) -> Iterator[str | None]:
    """What linear layers and experts with weights in float8 have in common."""
    yield part_refuses(type(method), f"float8 method of {type(method).__name__}", "apply")
    if list(method.weight_block_size or ()) != _BLOCK_SHAPE:
        yield f"{name} in float8 with blocks of {method.weight_block_size}"


def _block_fp8_refuses(name: str, linear: Any) -> Iterator[str | None]:
    method = linear.quant_method
    yield from block_fp8_refuses(name, method)
    product = method.fp8_linear
    if not is_one_of(product, "scaled_mm.cutlass", "CutlassFp8BlockScaledMMKernel") and not is_one_of(
        product, "scaled_mm.triton", "TritonFp8BlockScaledMMKernel"
    ):
        yield f"{name} is multiplied by {type(product).__name__}, whose scales may be others"
        return
    yield part_refuses(type(product), "float8 product", "apply_weights")
    if product.quant_fp8.use_ue8m0:
        yield f"{name} with scales that are powers of two"


def norm_refuses(name: str, norm: Any) -> Iterator[str | None]:
    if not is_one_of(norm, "layers.layernorm", "RMSNorm"):
        yield f"{name} is a {type(norm).__name__}"
    elif norm.variance_size_override is not None or not getattr(norm, "has_weight", True):
        yield f"{name} has no weight, or normalises over a part"


def rotary_refuses(rotary: Any) -> Iterator[str | None]:
    base: Any = next((cls for cls in type(rotary).__mro__ if cls.__name__ == "RotaryEmbedding"), None)
    if base is None or type(rotary).forward_cuda is not base.forward_cuda:
        yield f"{type(rotary).__name__} is no plain rotary embedding"


def first_refusal(refusals: Callable[[Any], Iterator[str | None]], layer: Any, kind: str) -> str | None:
    """None if a layer is made of the parts that are settled here, else why not."""
    try:
        return next((reason for reason in refusals(layer) if reason), None)
    except AttributeError as error:
        return f"not the parts of {kind}: {error}"


# What is kept of a layer


class Hooks:
    """Whether any module of a layer has hooks, which calling it past its `__call__` would pass over."""

    def __init__(self, layer: Any) -> None:
        from torch.nn.modules import module
        from torch.utils.hooks import RemovableHandle

        self._handle: Any = RemovableHandle
        self._any_global: Any = module._has_any_global_hook
        self._modules = list(layer.modules())[1:]  # the layer's own are called by its own __call__
        self._registered = -1

    def refuses(self) -> str | None:
        """PyTorch numbers the hooks that are registered; as long as no new one is, there is nothing to look at."""
        registered = self._handle.next_id
        if registered == self._registered:
            return None
        if self._any_global():
            return "a hook on all modules"
        for module in self._modules:
            if module._forward_hooks or module._forward_pre_hooks:
                return f"a hook on {type(module).__name__}"
        self._registered = registered
        return None


# (where PyTorch keeps it, its name, what was there)
Kept = tuple[dict[str, Any], str, Any]


def parameters_of(layer: Any) -> list[Kept]:
    """All parameters of a layer, by where PyTorch keeps them: one that is replaced is seen."""
    return [
        (module._parameters, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
    ]


def check_kept(known: Iterable[Kept]) -> None:
    """Raises Unsettled if a parameter is another one than when a layer was settled."""
    for table, name, tensor in known:
        if table.get(name) is not tensor:
            raise Unsettled("weights that were replaced")


def rows_like(hidden_states: Any) -> Callable[[str, Any, int], None]:
    """check(name, x, rows), which raises Refused unless x is so many contiguous rows of what `hidden_states` has."""
    dtype, device, hidden_size = hidden_states.dtype, hidden_states.get_device(), hidden_states.shape[-1]

    def check(name: str, x: Any, rows: int) -> None:
        if x.dtype is not dtype or x.shape != (rows, hidden_size) or x.get_device() != device or not x.is_contiguous():
            found = f"{x.dtype} {tuple(x.shape)} of strides {x.stride()} on {x.device}"
            raise Refused(f"{name} {found} for {rows} rows of {hidden_size} {dtype}")

    return check


def addresses_of(*tensors: Any) -> tuple[int, ...]:
    """Read at each call, because loading may move what a parameter holds; 0 for None.

    Under `torch._C.DisableTorchFunctionSubclass` without asking a tensor's class, which vLLM derives from Parameter,
    what it thinks of that.
    """
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def read_of(linear: Any) -> tuple[Any, Any, Any]:
    """What a projection reads of a linear layer: weight, bias and the scales of its blocks; None for what is not there.

    Of a layer in float8 alone: others' scales, should they have any, are not for us.
    """
    return linear.weight, linear.bias, linear.weight_scale_inv if linear.weight.dtype.itemsize == 1 else None


def most_rows(known: Iterable[Kept], most: int = MAX_REQUESTS) -> int:
    """How many rows a layer's products are done of: beyond `FEW_ROWS_OF_FLOAT8` those of its weights are vLLM's."""
    narrow = any(each is not None and each.dtype.itemsize == 1 for _, _, each in known)
    return FEW_ROWS_OF_FLOAT8 if narrow else most


# Gives so many bytes for what a layer computes on the way.
Memory = Callable[[int], int]


def are_many(rows: int) -> bool:
    """Whether products of so many rows are cuBLASLt's."""
    return rows > FEW_ROWS


def workspace_for(rows: int, memory: Memory) -> int:
    """What products of so many rows need beside their operands, one for all of a layer; 0 for nothing."""
    from ..cublaslt import WORKSPACE

    return memory(WORKSPACE) if are_many(rows) else 0


def bind_projection(linear: Any, dtype: Any, device: int, gated: bool = False) -> Callable[..., None]:
    """project(x_at, read_at, out_at, rows, memory, workspace_at, addend_at=0) for a linear layer of vLLM's.

    read_at: the addresses of what `read_of` gives. Of contiguous rows: few by our kernel, more by cuBLASLt, which adds
    what lies at addend_at before it rounds. gated: with SiLU and the product of the two halves after it. Raises
    Refused for a weight of another dtype or device, and for many rows of weights in float8, or where there is no
    cuBLASLt.
    """
    from ..cublaslt import bind_product
    from ..kernels.activation import bind_gated_rows
    from ..kernels.linear import Shape, bind_linear

    weight, bias, scale = read_of(linear)
    if weight.get_device() != device or (scale is None and weight.dtype is not dtype):
        raise Refused(f"a weight in {weight.dtype} on {weight.device}, hidden states in {dtype}")
    if scale is not None:
        return _bind_block_fp8(linear, dtype, device, gated)
    all_features, in_features = weight.shape
    has_bias, out_features = bias is not None, all_features // 2 if gated else all_features
    few = bind_linear(Shape(in_features, out_features, has_bias, gated), dtype, device)
    activate = bind_gated_rows("silu_and_mul", dtype, out_features, (), device, rounds=False) if gated else None

    def project(
        x_at: int, read_at: tuple[int, int, int], out_at: int, rows: int, memory: Memory, workspace_at: int,
        addend_at: int = 0,
    ) -> None:  # fmt: skip
        weight_at, bias_at, _ = read_at
        if not are_many(rows):
            assert not addend_at
            few(x_at, in_features, weight_at, bias_at, out_at, rows)
            return
        many = bind_product(in_features, all_features, has_bias, dtype, device)
        if activate is None:
            many(x_at, weight_at, bias_at, out_at, rows, workspace_at, addend_at)
            return
        both_at = memory(rows * all_features * dtype.itemsize)
        many(x_at, weight_at, bias_at, both_at, rows, workspace_at)
        activate(both_at, all_features, out_at, rows)

    return project


def _bind_block_fp8(linear: Any, dtype: Any, device: int, gated: bool) -> Callable[..., None]:
    """As `bind_projection`, for a layer whose weight is in float8 with a scale for each block."""
    from ..kernels.block_fp8_linear import bind_block_fp8_linear, parts_refuse
    from ..kernels.linear import Shape

    weight, bias, scale = read_of(linear)
    if reason := parts_refuse(weight, scale, device):
        raise Refused(reason)
    all_features, in_features = weight.shape
    shape = Shape(in_features, all_features // 2 if gated else all_features, bias is not None, gated)
    few = bind_block_fp8_linear(shape, dtype, device)

    def project(
        x_at: int, read_at: tuple[int, int, int], out_at: int, rows: int, memory: Memory, workspace_at: int
    ) -> None:
        weight_at, bias_at, scale_at = read_at
        if rows > FEW_ROWS_OF_FLOAT8:
            raise Refused(f"more than {FEW_ROWS_OF_FLOAT8} rows of a product in float8")
        few(x_at, in_features, weight_at, scale_at, bias_at, out_at, rows)

    return project
