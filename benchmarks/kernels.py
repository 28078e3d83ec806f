"""Every kernel that stands beside an op of vLLM's: GPU time against that op and against a copy, and host time per call.

    python benchmarks/kernels.py [--ops GLOB] [--out DIR] [--quick]

Each result is compared with the kernel's reference before it is timed. Writes the records `kernels_gpu` and
`host_per_call`; needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import inspect
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import vllm_gems
from benchmarks import measure
from vllm_gems import apply_gems_patches_to_vllm, faster, launch, remove_gems_patches_from_vllm, report
from vllm_gems.catalog import catalog
from vllm_gems.kernels import activation, rms_norm, rotary_embedding
from vllm_gems.nouns import Case, Kernel
from vllm_gems.tuning.timing import gpu_us

DTYPE = "bfloat16"
# Relative distance from the float32 reference, in the norm of the whole result: two or three roundings to 8 bits.
TOLERANCE = 5e-3
QUICK_TOKENS = (1, 128, 8192)
# The fraction of a copy's bandwidth is reported where an op has most to move.
FULL_TOKENS = 8192


def stock_op(kernel: Kernel) -> Any:
    namespace, name = kernel.stock.split("::")
    return getattr(getattr(torch.ops, namespace), name)


def stock_of(kernel: Kernel) -> Callable[..., Any]:
    """vLLM's own op, called with the arguments of `kernel.op`."""
    op, call = stock_op(kernel), kernel.stock_call
    assert call is not None, f"{kernel.name} names {kernel.stock} but not how to call it"
    return lambda **inputs: call(op, **inputs)


def error_of(kernel: Kernel, case: Case, call: Callable[..., Any], poisoned: bool = False) -> float:
    """Relative error of call(**inputs) on fresh random inputs, the worst of its results; infinity for NaN."""
    inputs = kernel.inputs(case, DTYPE, "cuda")
    wide = {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    expected = kernel.reference(**wide)
    if poisoned and "out" in inspect.signature(call).parameters:
        inputs["out"] = torch.full_like(expected[0], float("nan"), dtype=getattr(torch, DTYPE))
    returned = call(**inputs)
    errors = []
    for where, want in zip(kernel.results, expected, strict=True):
        if want is not None:
            _, _, index = where.partition(".")
            returns = where.startswith("return")
            got = (returned[int(index)] if index else returned) if returns else inputs[where]
            error = ((got.float() - want).norm() / want.norm()).item()
            errors.append(error if error == error else float("inf"))
    return max(errors)


def tokens_of(case: Case) -> int:
    shape = case.get("tokens") or case["shape"]
    return int(shape[0])


def size_of(kernel: Kernel, case: Case, inputs: dict[str, Any]) -> int:
    """The model's hidden size, or the size of a result's rows."""
    returned = kernel.fake(**inputs)
    result = inputs[kernel.results[0]] if returned is None else returned
    return int(case.get("hidden_size", result.shape[-1]))


def time_on_gpu(kernel: Kernel, case: Case, copy: float, repeats: int) -> dict[str, Any]:
    """A row of `kernels_gpu`; `copy` is the bandwidth of one in TB/s. Raises ValueError if a result is wrong."""
    stock = stock_of(kernel)
    for name, call, poisoned in (("ours", kernel.op, True), (kernel.stock, stock, False)):
        error = error_of(kernel, case, call, poisoned)
        if error > TOLERANCE:
            raise ValueError(f"{kernel.name}, {case.name}: {name} is off by {error:.1e}, more than {TOLERANCE:.0e}")
    inputs = kernel.inputs(case, DTYPE, "cuda")
    assert kernel.traffic is not None, f"{kernel.name} does not say how many bytes it moves"
    traffic = kernel.traffic(**inputs)
    sets = measure.input_sets(lambda: kernel.inputs(case, DTYPE, "cuda"), traffic)
    times = gpu_us({"ours": kernel.op, "stock": stock}, sets, repeats=repeats)
    return {
        "case": {
            "op": kernel.name,
            "model": case["model"],
            "num_tokens": tokens_of(case),
            "hidden_size": size_of(kernel, case, inputs),
            "dtype": DTYPE,
        },
        "unit": "us",
        "ours": round(times["ours"], 3),
        "against": {"stock": round(times["stock"], 3), "copy": round(traffic / copy / 1e6, 3)},
    }


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per op and for "all": geometric mean and worst of ours / stock, and the least fraction of a copy's bandwidth."""

    def of(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        ratios = {_label(row): row["ours"] / row["against"]["stock"] for row in chosen}
        worst = max(ratios, key=lambda label: ratios[label])
        found: dict[str, Any] = {
            "geometric_mean": round(statistics.geometric_mean(ratios.values()), 3),
            "worst": round(ratios[worst], 3),
            "worst_case": worst,
        }
        full = [row["against"]["copy"] / row["ours"] for row in chosen if row["case"]["num_tokens"] == FULL_TOKENS]
        if full:
            found[f"of_copy_at_{FULL_TOKENS}"] = round(min(full), 3)
        return found

    ops = list(dict.fromkeys(row["case"]["op"] for row in rows))
    return {op: of([row for row in rows if row["case"]["op"] == op]) for op in ops} | {"all": of(list(rows))}


def _label(row: dict[str, Any]) -> str:
    return " ".join(str(row["case"][key]) for key in ("op", "model", "num_tokens"))


def run_gpu(kernels: Iterable[Kernel], quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of `kernels_gpu`, and the bandwidth of copies before and after them, the better of each."""
    before = measure.copy_bandwidth()
    rows = []
    for kernel in kernels:
        for case in kernel.cases:
            if case.bench and (not quick or tokens_of(case) in QUICK_TOKENS):
                rows.append(time_on_gpu(kernel, case, max(before.values()), repeats=7 if quick else 21))
                print("  ", line_of(rows[-1]), flush=True)
                torch.cuda.empty_cache()
    after = measure.copy_bandwidth()
    best = {name: round(max(before[name], after[name]), 3) for name in before}
    # What counts is the fastest copy of the run, whichever it was.
    scale = max(before.values()) / max(best.values())
    for row in rows:
        row["against"]["copy"] = round(row["against"]["copy"] * scale, 3)
    return rows, best


@dataclass(frozen=True)
class Path:
    """One way through the host, and what it is compared with."""

    op: str
    path: str  # "layer": vLLM's layer, stock and patched; "function": of the package; "launch": the kernel alone
    hidden_size: int
    calls: dict[str, Callable[[], Any]]  # "ours" and the keys of `against`
    fresh: Callable[[], Any] | None = None  # the results of a layer, from inputs that stay as they are


def layer_paths() -> tuple[list[Path], tuple[str, ...]]:
    """vLLM's layers with the shapes of Llama-3.1-8B at one token, and the patches that they come to.

    Both calls of a path are the same call of the same layer: what differs is whether the patches are bound.
    """
    import vllm.ir
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.config.compilation import CompilationMode
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    dtype = getattr(torch, DTYPE)
    # As `enforce_eager` has it; the last two lines are what a worker does when it starts.
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"]))
    config.kernel_config.ir_op_priority.set_default()
    vllm.ir.set_default_torch_wrap(config.compilation_config.ir_enable_torch_wrap)
    with set_current_vllm_config(config), torch.device("cuda"):
        norm = RMSNorm(4096, dtype=dtype)
        rotary = RotaryEmbedding(128, 128, 8192, 500000.0, True, dtype).cuda()
        silu = SiluAndMul()
        x, residual = torch.randn(2, 1, 4096, dtype=dtype)
        gate_up = torch.randn(1, 2 * 14336, dtype=dtype)
        qkv = torch.randn(1, 6144, dtype=dtype)
        query, key = qkv[:, :4096], qkv[:, 4096:5120]
        positions = torch.tensor([7])

    norm.weight.data.normal_()

    def turned() -> Any:
        copy = qkv.clone()
        return rotary(positions, copy[:, :4096], copy[:, 4096:5120])

    def path(op: str, hidden_size: int, call: Callable[[], Any], fresh: Callable[[], Any]) -> Path:
        return Path(op, "layer", hidden_size, {"ours": call, "stock": call}, fresh)

    return [
        path("rms_norm", 4096, lambda: norm(x), lambda: norm(x)),
        path("fused_add_rms_norm", 4096, lambda: norm(x, residual), lambda: norm(x.clone(), residual.clone())),
        path("rotary_embedding", 4096, lambda: rotary(positions, query, key), turned),
        path("silu_and_mul", 14336, lambda: silu(gate_up), lambda: silu(gate_up)),
    ], ("layernorm.rms_norm", "rotary.rotary_embedding", "activation.silu_and_mul")


def launch_paths() -> list[Path]:
    """The same kernels from settled arguments: launched directly, through `kernel[grid]`, and as vLLM's bare op."""
    dtype, device = getattr(torch, DTYPE), torch.cuda.current_device()
    x = torch.randn(1, 4096, device="cuda").to(dtype)
    weight, out = torch.ones_like(x[0]), torch.empty_like(x)
    norm_args = (1, x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), 0, 1, 4096, 0, 0, 1e-6)
    gate_up = torch.randn(1, 2 * 14336, device="cuda").to(dtype)
    gated = torch.empty(1, 14336, device="cuda", dtype=dtype)

    def build_of(kernel: Kernel, shape: tuple[int, ...]) -> launch.Build:
        builds: Iterable[launch.Build] = kernel.builds(Case("", {"shape": shape}), DTYPE)
        return next(build for build in builds if build.aligned)

    norm = build_of(rms_norm.RMS_NORM, (1, 4096))
    silu_kernel = next(kernel for kernel in activation.KERNELS if kernel.name == "silu_and_mul")
    silu = build_of(silu_kernel, (1, 2 * 14336))
    silu_grid = -(-14336 // dict(silu.constexprs)["BLOCK"])
    silu_args = (silu_grid, gate_up.data_ptr(), gated.data_ptr(), 0, 2 * 14336)
    norm_op, silu_op = stock_op(rms_norm.RMS_NORM), stock_op(silu_kernel)

    def path(op: str, hidden_size: int, build: launch.Build, args: tuple[Any, ...], stock: Callable[[], Any]) -> Path:
        direct, slow = launch.launcher(build, device), launch._by_subscript(build)
        calls = {"ours": lambda: direct(*args), "kernel[grid]": lambda: slow(*args), "stock": stock}
        return Path(op, "launch", hidden_size, calls)

    # The arguments hold addresses; the calls of vLLM's ops keep the tensors themselves.
    return [
        path("rms_norm", 4096, norm, norm_args, lambda: norm_op(out, x, weight, 1e-6)),
        path("silu_and_mul", 14336, silu, silu_args, lambda: silu_op(gated, gate_up)),
    ]


def call_paths() -> list[Path]:
    """What a patch calls once a layer is settled, tensors in and out, and functions of the package, which check their
    arguments; and vLLM's bare op with its allocation."""
    dtype, device = getattr(torch, DTYPE), torch.cuda.current_device()
    x, residual = torch.randn(2, 1, 4096, device="cuda").to(dtype)
    weight = torch.ones_like(x[0])
    gate_up = torch.randn(1, 2 * 14336, device="cuda").to(dtype)
    qkv = torch.randn(1, 6144, device="cuda").to(dtype)
    query, key = qkv[:, :4096], qkv[:, 4096:5120]
    positions = torch.tensor([7], device="cuda")
    cache = torch.randn(8192, 128, device="cuda").to(dtype)
    settled = dtype, dtype, 4096, 1e-6, None, False
    alone = rms_norm.bind_rms_norm(*settled, device)
    fused = rms_norm.bind_fused_add_rms_norm(*settled, True, device)
    silu = activation.bind_activation("silu_and_mul", dtype, 2 * 14336, (), device)
    rotation = rotary_embedding.Rotation(128, 128, True)
    turn = rotary_embedding.bind_rotary_embedding(rotation, dtype, dtype, device)
    kernels = catalog().kernels
    norm_op, fused_op, silu_op, rotary_op = (
        stock_of(kernels[name]) for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul", "rotary_embedding")
    )
    norm_args: dict[str, Any] = {"weight": weight, "epsilon": 1e-6, "variance_size": None}
    rotary_args: dict[str, Any] = {"head_size": 128, "cos_sin_cache": cache, "is_neox": True}

    def paths(op: str, hidden_size: int, call: Any, function: Any, stock: Any) -> Iterator[Path]:
        for name, ours in (("call", call), ("function", function)):
            yield Path(op, name, hidden_size, {"ours": ours, "stock": stock})

    return [
        *paths(
            "rms_norm", 4096, lambda: alone(x, weight), lambda: vllm_gems.rms_norm(x, weight, 1e-6),
            lambda: norm_op(x=x, **norm_args),
        ),
        *paths(
            "fused_add_rms_norm", 4096,
            lambda: fused(x, residual, weight), lambda: vllm_gems.fused_add_rms_norm(x, residual, weight, 1e-6),
            lambda: fused_op(x=x, residual=residual, **norm_args),
        ),
        *paths(
            "rotary_embedding", 4096, lambda: turn(positions, query, key, cache),
            lambda: vllm_gems.rotary_embedding(positions, query, key, 128, cache, True),
            lambda: rotary_op(positions=positions, query=query, key=key, **rotary_args),
        ),
        *paths(
            "silu_and_mul", 14336, lambda: silu(gate_up), lambda: vllm_gems.silu_and_mul(gate_up),
            lambda: silu_op(x=gate_up),
        ),
    ]  # fmt: skip


class Patches:
    """Binds and takes back the named patches between the bursts of one run, and adds up their hits."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.bound = False
        self.hits = dict.fromkeys(names, 0)

    def switch(self, bound: bool) -> None:
        if bound is self.bound:
            return
        if bound:
            apply_gems_patches_to_vllm(include=self.names)
        else:
            for row in report().rows:
                if row.patch in self.hits:
                    self.hits[row.patch] += row.hits
                    if row.declined or row.errors:
                        raise RuntimeError(f"{row.patch} is {row.state}: {row.why} {dict(row.declined)}")
            remove_gems_patches_from_vllm()
        self.bound = bound


def compare_layers(paths: Sequence[Path], patches: Patches) -> None:
    """Raise ValueError if a layer computes something else with the patches than without."""

    def results() -> list[tuple[torch.Tensor, ...]]:
        found = [path.fresh() for path in paths if path.fresh is not None]
        return [each if isinstance(each, tuple) else (each,) for each in found]

    stock = results()
    patches.switch(True)
    for path, ours, theirs in zip(paths, results(), stock, strict=False):  # the layers come first
        for got, want in zip(ours, theirs, strict=True):
            error = ((got.float() - want.float()).norm() / want.float().norm()).item()
            if not error <= TOLERANCE:
                raise ValueError(f"{path.op}: the patched layer is {error:.1e} from the stock one")
    patches.switch(False)


def run_host(ops: str, quick: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of `host_per_call`, and the hits of the patches that were measured."""
    layers, names = layer_paths()
    paths = [path for path in (*layers, *call_paths(), *launch_paths()) if fnmatchcase(path.op, ops)]
    patches = Patches(names)
    calls = {f"{path.op}/{path.path}/{side}": call for path in paths for side, call in path.calls.items()}
    patched = {name for name in calls if name.endswith("/layer/ours")}
    try:
        with torch.inference_mode(), faster.undecided():
            compare_layers(paths, patches)
            times = measure.host_us(
                # Those with the patches last, so that a round switches only twice.
                {name: calls[name] for name in sorted(calls, key=patched.__contains__)},
                rounds=2 if quick else 9,
                bursts=5,
                before=lambda name: patches.switch(name in patched),
                pause=torch.cuda.synchronize,
            )
    finally:
        patches.switch(False)
    rows = []
    for path in paths:
        found = {side: round(times[f"{path.op}/{path.path}/{side}"], 2) for side in path.calls}
        case = {"op": path.op, "path": path.path, "num_tokens": 1, "hidden_size": path.hidden_size, "dtype": DTYPE}
        rows.append({"case": case, "unit": "us", "ours": found.pop("ours"), "against": found})
    if unused := [name for name, hits in patches.hits.items() if not hits and ops == "*"]:
        raise RuntimeError(f"measured as patched, but never hit: {', '.join(unused)}")
    return rows, patches.hits


def line_of(row: dict[str, Any]) -> str:
    case, against = row["case"], row["against"]
    what = f"{case['op']:20}{case.get('model') or case['path']:14}{case['num_tokens']:6}{case['hidden_size']:7}"
    others = "".join(f"  {name} {value:8.2f}" for name, value in against.items())
    return f"{what}  ours {row['ours']:8.2f}{others}  {row['ours'] / against['stock']:.2f} of stock"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="*", metavar="GLOB", help="names of kernels (default: all)")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder of the records")
    parser.add_argument("--quick", action="store_true", help="fewer token counts and repeats; for a look, not a record")
    parser.add_argument("--commit", default="", help="what to record as the commit (default: git's HEAD)")
    args = parser.parse_args()

    from vllm.platforms import current_platform

    current_platform.import_kernels()
    remove_gems_patches_from_vllm()  # the plugin may have been loaded; `stock` is vLLM's own
    kernels = [kernel for kernel in catalog().kernels.values() if kernel.stock and fnmatchcase(kernel.name, args.ops)]
    if not any(case.bench for kernel in kernels for case in kernel.cases):
        parser.error(f"no kernel with an op of vLLM's beside it and shapes to time is called {args.ops!r}")
    head = {"folder": args.out, "commit": args.commit}

    host, hits = run_host(args.ops, args.quick)
    if host:
        measure.record("host_per_call", host, hits=hits, **head)
    gpu, copies = run_gpu(kernels, args.quick)
    summary = summary_of(gpu) if gpu else {}
    if gpu:
        measure.record("kernels_gpu", gpu, copy_tb_per_s=copies, summary=summary, **head)

    print(f"\n{measure.gpu_name()}: copies at {copies} TB/s; hits {hits}")
    for row in host:
        print(line_of(row))
    for op, found in summary.items():
        print(f"{op:20}", ", ".join(f"{name} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
