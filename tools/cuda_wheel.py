"""vLLM's CUDA build on a machine without a GPU: its real op schemas, and our patches on its real ops and layers.

    python tools/cuda_wheel.py snapshot   # write the schemas to tests/recorded/schemas-cuda-<version>.json
    python tools/cuda_wheel.py check      # bind, call and undo everything; print a table

The extension libraries of that build need the driver, libcuda.so.1. With a stand-in (`libcuda_stub.c`, compiled here)
they load and register their ops. vLLM is then told that it is on a Hopper GPU, and runs the Python code that it runs
there, on CPU tensors, with our kernels in Triton's interpreter below it.

Exit status: 0 if everything is as declared, 1 if something is not (each disagreement is printed), 2 if this environment
cannot try it. It must be a fresh process, because Triton and vLLM look at the machine when they are first imported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_gems import binders, probes
from vllm_gems.binders import BINDERS
from vllm_gems.catalog import catalog
from vllm_gems.nouns import Patch, Place, State
from vllm_gems.patcher import Patcher
from vllm_gems.policy import Policy
from vllm_gems.sites import Site
from vllm_gems.worlds import LiveWorld, find

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "recorded"
STAND_IN = Path(__file__).with_name("libcuda_stub.c")
LIBRARIES = ("_C_stable_libtorch", "_moe_C_stable_libtorch")
NAMESPACES = ("_C", "_moe_C", "_C_cache_ops")
KEYS = ("CUDA", "CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")

# What vLLM's kernels say where there is no GPU, in one of two helpers that they start with.
NO_DEVICE = ("cudaGetDeviceCount failed", "aoti_torch_create_device_guard")

# The largest error that is still rounding, in units of the largest result. That kernels are exact is for other tests
# to show; here arguments could be mixed up, which is wrong by about one unit.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def unavailable() -> str | None:
    """None if this can be tried here, else why not. Imports nothing of vLLM's."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return "vLLM is not installed"
    folder = Path(next(iter(spec.submodule_search_locations)))
    missing = [name for name in LIBRARIES if not (folder / f"{name}.abi3.so").is_file()]
    if missing:
        return f"the installed vLLM has no {' and no '.join(missing)}; it is no CUDA build, or of another release"
    if shutil.which("nvidia-smi") is not None:
        return "this machine has an NVIDIA driver, and the stand-in is for those that have none"
    if shutil.which("gcc") is None:
        return "there is no gcc to compile the stand-in for the driver"
    return None


def load_libraries() -> None:
    """Load vLLM's extension libraries over a stand-in for the driver; their ops are registered from then on."""
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "libcuda.so.1"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{driver.name}", "-o", str(driver), str(STAND_IN)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(driver), ctypes.RTLD_GLOBAL)  # whoever asks for this soname now gets the one that is loaded
    for name in LIBRARIES:
        importlib.import_module(f"vllm.{name}")


# The schemas


def registered() -> dict[str, dict[str, list[str]]]:
    """Every op of vLLM's namespaces: its schemas (one per overload), the same normalised, and the keys with kernels."""
    ops: dict[str, dict[str, list[str]]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.partition("::")[0] in NAMESPACES:
            op = ops.setdefault(schema.name, {"schemas": [], "normalised": [], "keys": []})
            op["schemas"].append(str(schema))
            op["normalised"].append(probes.normalise_schema(str(schema)))
            overload = ".".join(filter(None, (schema.name, schema.overload_name)))
            found = (key for key in KEYS if torch._C._dispatch_has_kernel_for_dispatch_key(overload, key))
            op["keys"] = sorted({*op["keys"], *found})
    return dict(sorted(ops.items()))


class _Schemas(LiveWorld):
    """A world with these ops."""

    def __init__(self, ops: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        self._ops = ops

    def schemas(self, op: str) -> tuple[str, ...]:
        return tuple(self._ops[op]["schemas"]) if op in self._ops else ()


def disagreements(ops: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """What the places of our catalog declare and `ops`, as `registered` found them, do not have."""
    world = _Schemas(ops)
    places = [place for seam in catalog().seams.values() for place in seam.places if place.kind == "op"]
    reasons = ((place, BINDERS["op"].refuses(place, world, "cuda")) for place in places)
    without = [place for place in places if "CUDA" not in ops.get(place.name, {"keys": ()})["keys"]]
    return [
        *(f"{place}: {reason}" for place, reason in reasons if reason is not None),
        *(f"{place}: there is no CUDA kernel to stand in for" for place in without),
    ]


def version() -> str:
    """The release of the installed vLLM, without the name of its build."""
    return importlib.metadata.version("vllm").partition("+")[0]


def snapshot_file() -> Path:
    """Where the schemas of the installed vLLM are recorded."""
    return RECORDED / f"schemas-cuda-{version()}.json"


def snapshot() -> int:
    """Record the schemas of the installed vLLM; the exit status."""
    ops = registered()
    found = disagreements(ops)
    path = snapshot_file()
    path.write_text(json.dumps({"version": version(), "ops": ops}, indent=1) + "\n")
    print(f"{path.name}: {len(ops)} ops, {path.stat().st_size} bytes")
    print("\n".join(found) or "every op that a seam names is as declared")
    return 1 if found else 0


# What is looked at, before and after


@dataclass(frozen=True)
class Outcome:
    """One line of the table, and what is wrong with it."""

    what: str
    seen: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """What stands at a place: objects, of which only the identical ones are the same, and texts."""

    objects: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()

    def same(self, other: Look) -> bool:
        """Whether both looks saw the same."""
        return list(map(id, self.objects)) == list(map(id, other.objects)) and self.texts == other.texts


def place_of(patch: Patch) -> Place:
    """Where a patch goes on a GPU."""
    return next(place for place in catalog().seams[patch.seam].places if place.platform in ("any", "cuda"))


def class_of(patch: Patch) -> Any:
    """The layer that a patch is for."""
    return find(*catalog().seams[patch.seam].layer.split(":"))


def look(place: Place) -> Look:
    """What stands at a place now."""
    if place.kind == "op":
        return Look(texts=(torch._C._dispatch_dump(place.name), repr(torch.library.get_kernel(place.name, "CUDA"))))
    owner, _, attribute = place.name.rpartition(".")
    if place.kind == "ir":
        op = getattr(sys.modules[place.module], attribute)
        return Look((*op.impls.values(), *op._priority_impls), tuple(op.impls))
    found = vars(find(place.module, owner))
    return Look((found.get(attribute),), (str(attribute in found),))


def look_at_all() -> dict[str, Look]:
    """What stands at the place of each patch now."""
    return {name: look(place_of(patch)) for name, patch in catalog().patches.items()}


def not_bound(patcher: Patcher) -> list[str]:
    """Complaints about patches that are not in place; a provider of an IR op sleeps until the user chooses it."""
    fine = (State.BOUND, State.ASLEEP)
    found = {row.patch: row for row in patcher.rows()}
    lost = [f"{name} is not known to the patcher" for name in catalog().patches if name not in found]
    return lost + [f"{row.patch} is {row.state}: {row.why}" for row in found.values() if row.state not in fine]


def not_on_top(before: Mapping[str, Look]) -> list[str]:
    """Complaints about places at which, with everything bound, ours does not stand over what stood there."""
    problems = []
    for name, patch in catalog().patches.items():
        place, now = place_of(patch), look(place_of(patch))
        if place.kind == "attribute":
            good = getattr(now.objects[0], "__wrapped__", None) is before[name].objects[0]
        elif place.kind == "ir":
            good = now.texts == (*before[name].texts, "vllm_gems")
        else:
            good = _covers(now.texts[0], before[name].texts[0])
        if not good:
            problems.append(f"{name} does not stand at {place} over the original")
    return problems


def _covers(dump: str, before: str) -> bool:
    """Whether the dispatcher has a kernel that our binder registered, over the one it had, once."""
    lines, origin = dump.splitlines(), _line(before, "CUDA: ")
    ours = [line for line in lines if line.startswith("CUDA") and str(binders.__file__) in line]
    return ours == [f"CUDA: {_line(dump, 'CUDA: ')}"] and f"CUDA (inactive): {origin}" in lines


def _line(dump: str, head: str) -> str:
    return next((line.removeprefix(head) for line in dump.splitlines() if line.startswith(head)), "")


def not_as(before: Mapping[str, Look]) -> list[str]:
    """Complaints about places that are not what they were."""
    return [f"{name}: not what was there before" for name, now in look_at_all().items() if not now.same(before[name])]


# Binding and undoing


def pretend_hopper() -> None:
    """Have vLLM believe that it is on an H100, as far as Python can tell."""
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

    vllm.platforms._current_platform = Hopper()


@contextlib.contextmanager
def bound(*include: str) -> Iterator[Patcher]:
    """A patcher that has bound the patches named, or those of the default policy; whatever happens, it undoes them."""
    patcher = Patcher(catalog())
    try:
        patcher.apply(Policy(include=include))
        yield patcher
    finally:
        patcher.undo()


def deferred() -> Outcome:
    """Patches applied before vLLM has imported its layers are bound when it does, and go without a trace."""
    with bound("*") as patcher:
        waiting = sum(row.state is State.WAITING for row in patcher.rows())
        for seam in catalog().seams.values():
            for place in seam.places:
                importlib.import_module(place.module)
        problems = not_bound(patcher) if waiting == len(catalog().patches) else [f"only {waiting} patches had to wait"]
    left = [str(look(place_of(patch))) for patch in catalog().patches.values()]
    problems += [f"a trace of us is left: {text}" for text in left if "vllm_gems" in text]
    return Outcome("bound as vLLM imports its modules", f"{waiting} waited", tuple(problems))


def round_trip(title: str, order: Sequence[str], undo: Sequence[str]) -> Outcome:
    """Bind all patches, one after the other, a second time, and undo them one after the other."""
    before = look_at_all()
    with bound(order[0]) as patcher:
        for last in range(1, len(order)):
            patcher.apply(Policy(include=tuple(order[: last + 1])))
        problems = not_bound(patcher) + not_on_top(before)
        once = look_at_all()
        again = patcher.apply(Policy(include=("*",)))
        problems += [f"{name} was bound a second time" for name in again] + not_as(once)
        for name in undo:
            patcher.undo([name])
    return Outcome(title, f"{len(order)} patches", tuple(problems + not_as(before)))


def round_trips() -> Iterator[Outcome]:
    """Every patch bound and undone, in several orders."""
    names = list(catalog().patches)
    shuffled = random.Random(7).sample(names, len(names))
    yield round_trip("bind and undo, last first", names, names[::-1])
    yield round_trip("bind and undo once more", names, names[::-1])
    yield round_trip("bind backwards, undo backwards", names[::-1], names[::-1])
    yield round_trip("bind and undo, shuffled", shuffled, names)


# Calling what is bound


def distance(got: Any, expected: Any) -> float:
    """The largest error in units of the largest expected value; infinite if shapes differ or something is NaN."""
    if not isinstance(expected, torch.Tensor):
        return 0.0 if got is expected else float("inf")
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return float("inf")
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float("inf") if error.isnan() else float(error)


def farthest(got: Any, expected: Any) -> float:
    """The largest `distance` of the tensors in two results."""
    pair = [each if isinstance(each, tuple) else (each,) for each in (got, expected)]
    if len(pair[0]) != len(pair[1]):
        return float("inf")
    return max(map(distance, *pair))


def copied(arguments: Iterable[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Arguments of one's own, since many ops write theirs; floating tensors in `dtype`."""

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()

    return tuple(map(copy, arguments))


def call_op(patch: Patch, through: Callable[..., None], dtype: torch.dtype = torch.float32) -> float:
    """Call the op that a patch is for by through(op, *arguments); how far the result is from the kernel's reference."""
    kernel = catalog().kernels[patch.kernels[0]]
    case = next(case for case in kernel.cases if not case.bench)
    inputs = kernel.inputs(case, "float32", "cpu")
    expected = kernel.reference(**_copied(inputs))
    inputs = _copied(inputs, dtype)
    if kernel.stock_call is None:
        raise LookupError(f"{kernel.name} does not say how to call vLLM's op")
    returned = kernel.stock_call(functools.partial(through, op_of(patch)), **inputs)
    return farthest(tuple(returned if where == "return" else inputs[where] for where in kernel.results), expected)


def _copied(inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    return dict(zip(inputs, copied(inputs.values(), dtype), strict=True))


def op_of(patch: Patch) -> Any:
    """The op that a patch is for, as PyTorch calls it."""
    namespace, _, name = place_of(patch).name.partition("::")
    return getattr(getattr(torch.ops, namespace), name).default


def on_cuda_key(op: Any, *arguments: Any) -> None:
    """Call the CUDA kernel of an op, with CPU tensors: nothing else can where there is no GPU."""
    op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


def with_schema_checked(op: Any, *arguments: Any) -> None:
    """Call an op, after PyTorch has seen that it writes what its schema says, and nothing else."""
    torch.library.opcheck(op, copied(arguments), test_utils="test_schema")
    op(*arguments)


def reaches_the_original(patch: Patch, dtype: torch.dtype) -> bool:
    """Whether a call ends in vLLM's own kernel: it answers that there is no GPU."""
    try:
        with _quiet():
            call_op(patch, on_cuda_key, dtype)
    except RuntimeError as error:
        return any(text in str(error) for text in NO_DEVICE)
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the stack traces that C++ prints before it raises."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def called_op(patch: Patch) -> Outcome:
    """Our kernel answers on the CUDA key of an op; what it refuses, and after the undo everything, goes to vLLM's."""
    with bound(patch.name) as patcher:
        error = call_op(patch, on_cuda_key)
        problems = [] if error <= LIMITS[torch.float32] else [f"wrong by {error:.1g}"]
        if not reaches_the_original(patch, torch.int32):
            problems.append("integers, which our kernel refuses, do not reach vLLM's kernel")
        row = next(row for row in patcher.rows() if row.patch == patch.name)
    if (row.hits, sum(row.declined.values()), row.errors) != (1, 1, 0):
        problems.append(f"{row.hits} hits, declined {dict(row.declined)}, {row.errors} errors after one call of each")
    if not reaches_the_original(patch, torch.float32):
        problems.append("vLLM's kernel does not answer after the undo")
    return Outcome(f"{place_of(patch)} on the CUDA key", f"error {error:.0e}", tuple(problems))


def checked_op(patch: Patch) -> Outcome:
    """Our kernel keeps to the schema of the op, with nothing redispatched."""
    with on_cpu_key(patch) as site:
        error = call_op(patch, with_schema_checked)
    good = error <= LIMITS[torch.float32] and site.hits == 2
    problems = () if good else (f"wrong by {error:.1g}, {site.hits} hits in 2 calls, declined {site.declined}",)
    return Outcome(f"{place_of(patch)} keeps to its schema", f"error {error:.0e}", problems)


def called_provider(patch: Patch) -> Outcome:
    """Our provider of a vLLM IR op answers once it is chosen."""
    place = place_of(patch)
    op = getattr(sys.modules[place.module], place.name)
    arguments = op.generate_inputs(num_tokens=5, hidden_size=64, dtype=torch.float32, epsilon=1e-5)
    expected = op.impls["native"].impl_fn(*copied(arguments))
    with bound(patch.name) as patcher:
        with op.set_priority(["vllm_gems", "native"]):
            error = farthest(op(*arguments), expected)
        hits = next(row.hits for row in patcher.rows() if row.patch == patch.name)
    problems = () if hits == 1 and error <= LIMITS[torch.float32] else (f"{hits} hits, wrong by {error:.1g}",)
    return Outcome(f"vllm.ir.ops.{place}", f"error {error:.0e}", problems)


# The layers


@dataclass(frozen=True)
class LayerCase:
    """One way to make a layer of vLLM's and to call it."""

    name: str
    patch: str
    make: Callable[[Any, torch.dtype], Any]  # (class, dtype) -> layer
    inputs: Callable[[torch.dtype], tuple[Any, ...]]
    op: str = ""  # the patch of the op that the layer's own `forward_cuda` calls, if it calls one of ours


def _rows(width: int, count: int = 1) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: tuple(torch.randn(5, width).to(dtype) for _ in range(count))


def _heads(
    *shapes: tuple[int, ...] | None, sections: int = 0, most: int = 32
) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """Positions, query and key for five tokens."""

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        positions = torch.randint(most, (sections, 5) if sections else (5,))
        return positions, *(None if shape is None else torch.randn(5, *shape).to(dtype) for shape in shapes)

    return inputs


def _rotary(*, neox: bool, rotary_dim: int = 32) -> Callable[[Any, torch.dtype], Any]:
    return lambda cls, dtype: cls(32, rotary_dim, 32, 10000.0, neox, dtype)


def _deepseek(*, neox: bool) -> Callable[[Any, torch.dtype], Any]:
    return lambda cls, dtype: cls(64, 64, 32, 10000.0, neox, 2.0, dtype)


def _mrope(section: list[int] | None, *, neox: bool = True, turns: bool = False) -> Callable[[Any, torch.dtype], Any]:
    return lambda cls, dtype: cls(32, 32, 8, 10000.0, neox, dtype, section, turns)


def _plain(*arguments: Any) -> Callable[[Any, torch.dtype], Any]:
    return lambda cls, dtype: cls(*arguments)


_MLA = _heads((4, 64), (1, 64))
_FLAT = _heads((128,), (64,))
_SECTIONS = _heads((128,), (64,), sections=3)

LAYERS = (
    LayerCase("RMSNorm", "layernorm.rms_norm", _plain(64), _rows(64), "op.rms_norm"),
    LayerCase("RMSNorm, residual", "layernorm.rms_norm", _plain(64), _rows(64, 2), "op.fused_add_rms_norm"),
    LayerCase("RMSNorm, no weight", "layernorm.rms_norm", _plain(64, 1e-6, None, False), _rows(64), "op.rms_norm"),
    LayerCase("RMSNorm, var_hidden_size", "layernorm.rms_norm", _plain(64, 1e-6, 48), _rows(64)),
    LayerCase("GemmaRMSNorm", "layernorm.gemma_rms_norm", _plain(64), _rows(64)),
    LayerCase("GemmaRMSNorm, residual", "layernorm.gemma_rms_norm", _plain(64), _rows(64, 2)),
    LayerCase("RotaryEmbedding", "rotary.rotary_embedding", _rotary(neox=True), _FLAT, "op.rotary_embedding"),
    LayerCase("RotaryEmbedding, GPT-J", "rotary.rotary_embedding", _rotary(neox=False), _FLAT, "op.rotary_embedding"),
    LayerCase(
        "RotaryEmbedding, partial",
        "rotary.rotary_embedding",
        _rotary(neox=True, rotary_dim=24),
        _heads((4, 32), (2, 32)),
        "op.rotary_embedding",
    ),
    LayerCase(
        "RotaryEmbedding, no key",
        "rotary.rotary_embedding",
        _rotary(neox=True),
        _heads((128,), None),
        "op.rotary_embedding",
    ),
    LayerCase("DeepseekScalingRotaryEmbedding", "rotary.deepseek_scaling", _deepseek(neox=False), _MLA),
    LayerCase("DeepseekScalingRotaryEmbedding, NeoX", "rotary.deepseek_scaling", _deepseek(neox=True), _MLA),
    LayerCase("MRotaryEmbedding, 1-D", "rotary.mrope", _mrope([4, 6, 6]), _FLAT),
    LayerCase("MRotaryEmbedding, 1-D, GPT-J", "rotary.mrope", _mrope(None, neox=False), _FLAT),
    LayerCase("MRotaryEmbedding, 3 rows", "rotary.mrope", _mrope([4, 6, 6]), _SECTIONS),
    LayerCase("MRotaryEmbedding, 3 rows by turns", "rotary.mrope", _mrope([6, 5, 5], turns=True), _SECTIONS),
    LayerCase("SiluAndMul", "activation.silu_and_mul", _plain(), _rows(64), "op.silu_and_mul"),
    LayerCase("MulAndSilu", "activation.mul_and_silu", _plain(), _rows(64), "op.mul_and_silu"),
    LayerCase("GeluAndMul", "activation.gelu_and_mul", _plain("none"), _rows(64), "op.gelu_and_mul"),
    LayerCase("GeluAndMul, tanh", "activation.gelu_and_mul", _plain("tanh"), _rows(64), "op.gelu_tanh_and_mul"),
    LayerCase("NewGELU", "activation.gelu_new", _plain(), _rows(64), "op.gelu_new"),
    LayerCase("FastGELU", "activation.gelu_fast", _plain(), _rows(64), "op.gelu_fast"),
    LayerCase("QuickGELU", "activation.gelu_quick", _plain(), _rows(64), "op.gelu_quick"),
    LayerCase("FatreluAndMul", "activation.fatrelu_and_mul", _plain(0.4), _rows(64), "op.fatrelu_and_mul"),
    LayerCase("SwigluOAIAndMul", "activation.swigluoai_and_mul", _plain(1.3, 0.8), _rows(64), "op.swigluoai_and_mul"),
    LayerCase(
        "SiluAndMulWithClamp",
        "activation.silu_and_mul_with_clamp",
        _plain(0.8, 1.3, 0.5),
        _rows(64),
        "op.silu_and_mul_with_clamp",
    ),
)


def made(case: LayerCase, dtype: torch.dtype, like: Any = None) -> Any:
    """A new layer in `dtype`, with the parameters of `like`, or random ones."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = case.make(class_of(catalog().patches[case.patch]), dtype)
    finally:
        torch.set_default_dtype(before)
    if like is None:
        for parameter in layer.parameters():
            parameter.data.normal_()
    else:
        layer.load_state_dict(like.state_dict())
    return layer.requires_grad_(False)


def native(case: LayerCase, layer: Any, inputs: Iterable[Any]) -> Any:
    """What vLLM's own PyTorch code says, in float32."""
    return made(case, torch.float32, like=layer).forward_native(*copied(inputs, torch.float32))


def without_case() -> Outcome:
    """Every patch of a layer, and of an op, must be in `LAYERS`."""
    kinds = {name: place_of(patch).kind for name, patch in catalog().patches.items()}
    tried = {case.patch for case in LAYERS} | {case.op for case in LAYERS}
    missing = [name for name, kind in kinds.items() if kind != "ir" and name not in tried]
    return Outcome("layers that are tried", str(len(LAYERS)), tuple(f"no layer calls {name}" for name in missing))


def patched_layers(dtype: torch.dtype) -> Iterator[Outcome]:
    """The layers with our patches, made before and after these were bound.

    Those made before are frozen, as vLLM freezes the heap of a worker that is warm.
    """
    before = look_at_all()
    old = [made(case, dtype) for case in LAYERS]
    gc.freeze()
    try:
        with bound():
            new = [made(case, dtype, like=layer) for case, layer in zip(LAYERS, old, strict=True)]
            for case, first, second in zip(LAYERS, old, new, strict=True):
                yield from tried(case.name, one, patched_layer, case, first, second, dtype)
    finally:
        gc.unfreeze()
    problems = [
        f"a layer made {when} the patches, {case.name}, keeps {slot}"
        for when, layers in (("before", old), ("after", new))
        for case, layer in zip(LAYERS, layers, strict=True)
        if getattr(slot := layer._forward_method, "__func__", None) is not vars(type(layer))["forward_cuda"]
    ]
    yield Outcome(f"layers after the undo, {_short(dtype)}", f"{len(old) + len(new)}", (*problems, *not_as(before)))


def patched_layer(case: LayerCase, old: Any, new: Any, dtype: torch.dtype) -> Outcome:
    """One layer, by its method, by vLLM's dispatch of old and new layers, and by that once our call has settled."""
    site: Site = type(old).forward_cuda.__vllm_gems__
    site.reset()
    inputs = case.inputs(dtype)
    expected = native(case, old, inputs)
    calls = (old.forward_cuda, old, old, new)
    error = max(farthest(call(*copied(inputs)), expected) for call in calls)
    problems = [] if error <= LIMITS[dtype] else [f"wrong by {error:.1g}"]
    if (site.hits, site.errors, site.declined) != (len(calls), 0, {}):
        problems.append(f"{site.hits} hits in {len(calls)} calls, {site.errors} errors, declined {site.declined}")
    return Outcome(f"{case.name}, {_short(dtype)}, patched", f"error {error:.0e}, {site.hits} hits", tuple(problems))


def stock_layer(case: LayerCase, dtype: torch.dtype) -> Outcome:
    """vLLM's own `forward_cuda`, with our adapter as the CPU kernel of the op that it calls."""
    layer = made(case, dtype)
    inputs = case.inputs(dtype)
    expected = native(case, layer, inputs)
    with on_cpu_key(catalog().patches[case.op]) as site, kernels_of_vllm():
        error = farthest(layer.forward_cuda(*copied(inputs)), expected)
    problems = [] if error <= LIMITS[dtype] else [f"wrong by {error:.1g}"]
    if site.hits != 1:
        problems.append(f"{site.hits} hits in one call, declined {site.declined}")
    return Outcome(f"{case.name}, {_short(dtype)}, {case.op}", f"error {error:.0e}", tuple(problems))


@contextlib.contextmanager
def on_cpu_key(patch: Patch) -> Iterator[Site]:
    """Our adapter at the CPU key of an op, where the CUDA build has nothing, over a kernel that must not be reached."""
    place = place_of(patch)
    namespace, _, name = place.name.partition("::")
    covered = torch.library.Library(namespace, "IMPL")
    covered.m.impl(name, "CPU", _unreachable)  # Library.impl would not let Python override Python
    site = Site(patch.name, patch.kernels, strict=True)
    bound = BINDERS["op"].bind(place, lambda original: patch.adapt(original, site), "cpu")
    try:
        yield site
    finally:
        bound.undo()
        covered._destroy()


def _unreachable(*arguments: Any) -> None:
    raise AssertionError("our adapter passed the call on")


@contextlib.contextmanager
def kernels_of_vllm() -> Iterator[None]:
    """vLLM IR's choice on a GPU: the ops of the extension library first."""
    with contextlib.ExitStack() as stack:
        for patch in catalog().patches.values():
            place = place_of(patch)
            if place.kind == "ir":
                op = getattr(sys.modules[place.module], place.name)
                stack.enter_context(op.set_priority(["vllm_c", "native"]))
        yield


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The whole


# What is done at a place, by its kind, besides binding and undoing.
CALLS: dict[str, tuple[Callable[[Patch], Outcome], ...]] = {"op": (called_op, checked_op), "ir": (called_provider,)}


def tried(what: str, outcomes: Callable[..., Iterable[Outcome]], *arguments: Any) -> Iterator[Outcome]:
    """outcomes(*arguments), and one more if that raises."""
    try:
        yield from outcomes(*arguments)
    except Exception as error:
        yield Outcome(what, "raised", (f"{type(error).__name__}: {error}",))


def one(outcome: Callable[..., Outcome], *arguments: Any) -> list[Outcome]:
    """outcome(*arguments), for `tried`."""
    return [outcome(*arguments)]


def recorded() -> Outcome:
    """The ops are as declared, and as recorded for machines that do not have this vLLM."""
    ops, path = registered(), snapshot_file()
    problems = disagreements(ops)
    if not path.is_file() or json.loads(path.read_text())["ops"] != ops:
        problems.append(f"{path.name} does not have them; python tools/cuda_wheel.py snapshot")
    return Outcome("schemas", f"{len(ops)} ops", tuple(problems))


def all_outcomes() -> Iterator[Outcome]:
    """Everything that is checked, in an order in which nothing is imported before its time."""
    yield from tried("schemas", one, recorded)
    pretend_hopper()
    yield from tried("bound as vLLM imports its modules", one, deferred)
    yield from tried("bind and undo", round_trips)
    for patch in catalog().patches.values():
        for verb in CALLS.get(place_of(patch).kind, ()):
            yield from tried(f"{patch.name}, {verb.__name__}", one, verb, patch)
    yield without_case()
    with eager_config():
        for dtype in LIMITS:
            yield from tried(f"patched layers, {_short(dtype)}", patched_layers, dtype)
            for case in LAYERS:
                if case.op:
                    yield from tried(f"{case.name}, {_short(dtype)}, {case.op}", one, stock_layer, case, dtype)


@contextlib.contextmanager
def eager_config() -> Iterator[None]:
    """What vLLM's layers ask for when they are made: without compilation they choose their CUDA methods."""
    from vllm.config import CompilationConfig, DeviceConfig, VllmConfig, set_current_vllm_config

    compilation = CompilationConfig(mode=0, custom_ops=["all"])
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"), compilation_config=compilation)):
        yield


def check() -> int:
    """Print the table; the exit status."""
    torch.manual_seed(0)
    outcomes = []
    for outcome in all_outcomes():
        outcomes.append(outcome)
        print(f"{'FAILED' if outcome.problems else 'ok':6}  {outcome.what:56}  {outcome.seen}", flush=True)
        for problem in outcome.problems:
            print(f"        {problem}", flush=True)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"vLLM {version()}, {len(outcomes)} checks, {failed} failed")
    return 1 if failed else 0


def main() -> int:
    """Run the verb of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verb", choices=("snapshot", "check"))
    verb = parser.parse_args().verb
    if reason := unavailable():
        print(reason, file=sys.stderr)
        return 2
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    load_libraries()
    return snapshot() if verb == "snapshot" else check()


if __name__ == "__main__":
    sys.exit(main())
