"""Where the host's time of one eager decode step goes, with and without the plugin, and how long the GPU works.

    python benchmarks/budget.py --model qwen2.5-7b --batches 1,32
    python benchmarks/budget.py --model deepseek-v2-lite --attention TRITON_MLA --name deepseek_budget
    python benchmarks/budget.py --picture docs/eager.svg    # from the record that is there; needs matplotlib

Writes a record, `eager_budget` unless it is named: microseconds of a step by part, medians over steps, from stopwatches
around vLLM's own functions and modules; what a part calls that is a part itself is not counted twice. A stopwatch costs
about half a microsecond, which is inside. Both sides are timed in one process, in turns, as in serve.py, whose engine
these are. The GPU's time is the sum of its kernels in a profile of other steps, without stopwatches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vllm_gems
from benchmarks import measure, serve
from benchmarks.models import MODELS

STEPS = 24
PROFILED = 6
ROUNDS = 3
KERNELS = 16  # of a step that the record names
# Part -> classes of modules, by the ends of their names.
MODULES = {
    "linear layers": ("Linear", "LMHead", "Embedding"),
    "attention": ("Attention",),
    "latent attention, the rest of the block": ("V2MLAAttention", "LatentAttentionWrapper"),
    "norms": ("Norm",),
    "rotary embedding": ("RotaryEmbedding",),
    "activation": ("AndMul",),
    "experts, the rest of the block": ("MoE", "MoeBlock", "MoERunner", "RoutedExperts"),
    "decoder layers, the rest of them": ("DecoderLayer", "MLP"),
    "model, the rest of it": ("Model", "CausalLM"),
}
# Part -> what to look for on the model runner, its model state, the scheduler and the engine core. Releases and
# runners name some of it differently; what is not there is not timed apart.
FUNCTIONS = {
    "schedule": (("scheduler", "schedule"), ("scheduler", "update_from_output")),
    "input preparation": (
        ("runner", "update_requests"),
        ("runner", "prepare_inputs"),
        ("runner", "_prepare_inputs"),
        ("runner", "prepare_attn"),
        ("state", "prepare_attn"),
        ("state", "prepare_inputs"),
        ("runner", "_build_attention_metadata"),
    ),
    "logits": (("model", "compute_logits"),),
    "sampler": (("runner", "sample"), ("runner", "_sample"), ("runner", "postprocess_sampled")),
    "model runner, the rest of it": (("runner", "execute_model"), ("runner", "sample_tokens")),
}
# Part -> methods, looked for on every module and on what it names so.
METHODS = {
    "choice of experts": ("router.select_experts",),
    "experts": ("routed_experts.forward_modular", "routed_experts.forward_monolithic"),
}
OUTSIDE = "engine, the rest of it"
PARTS = (*MODULES, *METHODS, *FUNCTIONS, OUTSIDE)
GPU = "GPU at work"
SIDES = {"ours": vllm_gems.apply_gems_patches_to_vllm, "stock": vllm_gems.remove_gems_patches_from_vllm}


class Stopwatch:
    """Microseconds by part, of the innermost part that runs."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.spent[self._stack[-1]] += (now - self._since) * 1e6
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        return run


def _part_of(cls: type) -> str:
    """The part that a module of this class is."""
    name = cls.__name__
    ends = [(len(end), part) for part, names in MODULES.items() for end in names if name.endswith(end)]
    return max(ends)[1] if ends else ""


@contextmanager
def stopwatches(llm: Any) -> Iterator[Stopwatch]:
    """Around vLLM's functions, and around every module's call."""
    watch = Stopwatch()
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    owners = {
        "scheduler": core.scheduler, "runner": runner, "state": getattr(runner, "model_state", None),
        "model": runner.get_model(),
    }  # fmt: skip
    undo: list[Callable[[], None]] = []

    def put(part: str, owner: Any, name: str) -> None:
        if owner is not None and hasattr(owner, name) and name not in vars(owner):
            object.__setattr__(owner, name, watch.timed(part, getattr(owner, name)))
            undo.append(functools.partial(object.__delattr__, owner, name))

    for part, places in FUNCTIONS.items():
        for owner_name, name in places:
            put(part, owners[owner_name], name)
    for part, methods in METHODS.items():
        for module, (owner_name, _, name) in product(owners["model"].modules(), (m.partition(".") for m in methods)):
            put(part, getattr(module, owner_name, None), name)
    call = torch.nn.Module.__call__
    parts: dict[type, str] = {}

    def timed_call(module: Any, *args: Any, **kwargs: Any) -> Any:
        cls = type(module)
        part = parts.get(cls)
        if part is None:
            part = parts[cls] = _part_of(cls)
        return watch.timed(part, call)(module, *args, **kwargs) if part else call(module, *args, **kwargs)

    torch.nn.Module.__call__ = timed_call
    try:
        yield watch
    finally:
        torch.nn.Module.__call__ = call
        for each in reversed(undo):
            each()


def steps_of(llm: Any, spec: dict[str, Any], batch: int, steps: int = STEPS) -> Iterator[Callable[[], Any]]:
    """The engine's step, so many times, while all requests decode; prefill and warm-up are done inside."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    params = SamplingParams(max_tokens=serve.WARMUP + steps + 2, ignore_eos=True, detokenize=False, **serve.TIMED)
    engine = llm.llm_engine
    for number, prompt in enumerate(serve.random_prompts(batch, spec["vocabulary"], seed=batch)):
        engine.add_request(f"budget-{batch}-{number}", prompt, params)
    for _ in range(serve.WARMUP):
        engine.step()
    for _ in range(steps):
        yield engine.step
    while engine.has_unfinished_requests():
        engine.step()


def host_budget(llm: Any, spec: dict[str, Any], batch: int) -> dict[str, float]:
    """Median microseconds of a step, by part."""
    samples: dict[str, list[float]] = defaultdict(list)
    with stopwatches(llm) as watch:
        for step in steps_of(llm, spec, batch):
            watch.spent.clear()
            watch.timed(OUTSIDE, step)()
            for part in PARTS:
                samples[part].append(watch.spent.get(part, 0.0))
    return {part: statistics.median(values) for part, values in samples.items()}


def gpu_us(llm: Any, spec: dict[str, Any], batch: int) -> dict[str, float]:
    """Microseconds of a step by kernel; none without a GPU."""
    if not torch.cuda.is_available():
        return {}
    from torch.profiler import ProfilerActivity, profile

    steps = steps_of(llm, spec, batch, PROFILED)
    step = next(steps)  # prefill and warm-up are done
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    for _ in steps:  # ends the requests
        pass
    return {event.key: event.self_device_time_total / PROFILED for event in found.key_averages()}


def longest(kernels: dict[str, float]) -> dict[str, float]:
    """The kernels that take the most of a step, by the beginnings of their names."""
    by_time = sorted(kernels.items(), key=lambda item: -item[1])[:KERNELS]
    return {name[:80]: round(us, 1) for name, us in by_time}


def measure_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the record, and each side's longest kernels by batch size."""
    model = MODELS[args.model].cut(args.layers, args.experts)
    settings = serve.Side("budget", "eager", True, attention=args.attention)
    serve.choose_sampler()
    os.environ.update(serve.environment(settings))
    with tempfile.TemporaryDirectory() as folder:
        serve.write_config(Path(folder), model.config)
        spec = {
            "model": folder, "vocabulary": model.config["vocab_size"], "batches": args.batches, "steps": STEPS,
            "prefill": [], "kv_cache_bytes": 8 << 30, "side": dataclasses.asdict(settings), "contexts": [serve.PROMPT],
            "latent": model.latent, "float8": False,
        }  # fmt: skip
        llm = serve.start_engine(spec)
        # Turn by turn, and in the first of them everything is compiled. Profiles come last: a process that has been
        # profiled launches more slowly ever after.
        found: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
        kernels: dict[tuple[int, str], dict[str, float]] = {}
        for turn in range(1 + ROUNDS + 1):
            for side, switch in SIDES.items():
                switch()
                for batch in args.batches:
                    if turn <= ROUNDS:
                        found[batch, side].append(host_budget(llm, spec, batch))
                    else:
                        kernels[batch, side] = gpu_us(llm, spec, batch)
        rows = []
        for batch in args.batches:
            for part in (*PARTS, GPU):
                ours, stock = (
                    sum(kernels[batch, side].values())
                    if part == GPU
                    else statistics.median(each[part] for each in found[batch, side][1:])
                    for side in SIDES
                )
                if ours or stock:
                    rows.append(
                        {
                            "case": {"model": model.title, "mode": "eager", "batch": batch, "part": part},
                            "unit": "us/step",
                            "ours": round(ours, 1),
                            "against": {"stock": round(stock, 1)},
                        }
                    )
                    print(f"batch {batch:4}  {part:34} {stock:10.0f} -> {ours:8.0f} us", flush=True)
    return rows, {f"batch {batch}, {side}": longest(times) for (batch, side), times in kernels.items()}


def draw(record: dict[str, Any], target: Path) -> None:
    """Two bars for each batch size: the host's parts one on the other, the GPU's time a line across."""
    from matplotlib import pyplot

    batches = list(dict.fromkeys(row["case"]["batch"] for row in record["rows"]))
    parts = [part for part in dict.fromkeys(row["case"]["part"] for row in record["rows"]) if part != GPU]
    value = {
        (row["case"]["batch"], row["case"]["part"], side): ms / 1e3
        for row in record["rows"]
        for side, ms in (("vLLM", row["against"]["stock"]), ("vllm-gems", row["ours"]))
    }
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.9 * len(batches)), layout="constrained")
    labels = [(batch, side) for batch in batches for side in ("vLLM", "vllm-gems")]
    left = [0.0] * len(labels)
    for index, part in enumerate(parts):
        widths = [value.get((batch, part, side), 0.0) for batch, side in labels]
        axes.barh(range(len(labels)), widths, left=left, label=part, color=pyplot.get_cmap("tab20")(index))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for at, (batch, side) in enumerate(labels):
        gpu = value.get((batch, GPU, side), 0.0)
        axes.plot([gpu, gpu], [at - 0.45, at + 0.45], color="black", label=GPU if at == 0 else None)
    axes.set_yticks(range(len(labels)), [f"{side}, batch {batch}" for batch, side in labels])
    axes.invert_yaxis()
    axes.set_xlabel("ms of one decode step")
    axes.set_title(f"{record['rows'][0]['case']['model']}, enforce_eager, {record['gpu']}", fontsize="medium")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--experts", type=int, help="cut the layers to this many routed experts")
    parser.add_argument("--attention", default="", help="vLLM's attention backend; default: its choice")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 32, 256])
    parser.add_argument("--name", default="eager_budget", help="of the record (%(default)s)")
    parser.add_argument("--out", type=Path, help="a folder for the record, instead of benchmarks/results/<gpu>")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    parser.add_argument("--picture", type=Path, help="measure nothing; draw the record")
    parser.add_argument("--record", type=Path, default=measure.RESULTS / "h100" / "eager_budget.json")
    args = parser.parse_args()
    if args.picture:
        draw(json.loads(args.record.read_text()), args.picture)
        return
    rows, kernels = measure_all(args)
    for case, times in kernels.items():
        print(case, *(f"{us:9.1f}  {name}" for name, us in times.items()), sep="\n  ")
    print(measure.record(args.name, rows, folder=args.out, commit=args.commit, kernels=kernels))


if __name__ == "__main__":
    main()
