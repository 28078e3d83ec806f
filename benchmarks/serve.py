"""Serving with and without the plugin: ms per decode step of a real vLLM engine, one run, one GPU.

    python benchmarks/serve.py --model qwen2.5-7b --against-compiled --record serve_eager_dense

Every engine is in a process of its own in which vLLM loads the plugin by its entry point, or not (`VLLM_GEMS=0`), off
and on, `--rounds` times over. The models are the public configurations with random weights, written to a folder with no
tokenizer: nothing is downloaded. bfloat16, prompts of 64 random tokens.

Timed are calls of `LLMEngine.step` while every request decodes: one forward pass, temperature 0.8 and top_p 0.95
sampled; the prefill and the first steps are left out. In eager mode both sides are timed in one process, in `--turns`
turns of a burst with the patches and a burst after `remove_gems_patches_from_vllm()`, which leaves vLLM's own objects:
host time on a shared machine drifts by more, from one process to the next, than what is to be measured. A burst counts
by its median, a side by the median of its bursts. Compiled code cannot change sides, so there a process is a burst.

Before anything is timed, the first round decodes a fixed sequence of tokens, the same in every process, and keeps the
logits of every step: at batch 1, 32 and 72; at batch 1 for 200 steps, of a prompt whose prefix is cached ("long"); and
of prompts that come one after the other and are prefilled in pieces beside the decoding of others ("mixed"). Ours and
stock's are compared with each other and with those of an engine in float32 with the same weights (matrix products and
attention in full float32). What counts is the relative Frobenius error against float32: ours may be at most 1.1 times
stock's, so that what separates us from stock is bfloat16's rounding and nothing else. Hits are counted there too, and
compared with what the model's layers should give. Tokens decoded greedily and freely are compared as well, for
information: random weights put the best two tokens so close that rounding decides.

--prefill times prefills of single prompts, in the same turns. `VLLM_GEMS_INCLUDE=default,decoder.*` adds what is off by
default.

The exit status is 1 if logits or hits are not as they should be. Start-up is from the start of the process to an
engine that is ready; the first process of a run fills caches for the others, so the least of each side counts.

On a CPU, `--model tiny --batches 1,4` tries this program out, on vLLM's FlashAttention backend (tools/flash_on_cpu.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this file is in no package

from benchmarks import measure

PROMPT = 64
WARMUP = 8  # steps of a burst that are not timed, the prefill among them
FORCED = 8  # decode steps whose logits are compared
COMPARED = (1, 32, 72)  # at these batch sizes; products of more than 64 rows are done in another way
GREEDY = 32  # tokens decoded freely
LONG = 200  # decode steps compared of one prompt whose prefix is cached
MIXED = (40, 300, 3, 90, 170, 64)  # prompts that come while others decode
MIXED_TOKENS = 24
PREFILLS = 5  # of a burst
PIECE = 64  # tokens of a prefill that one step takes, there
TIMED = {"temperature": 0.8, "top_p": 0.95}
# Our error against float32 may be this many times stock's.
LIMIT = 1.1
# A process that takes longer than this has gone wrong.
LONGEST_S = 400

# Patches in a dense decoder's forward pass: calls per layer, and calls outside the layers.
_DENSE = {"layernorm.rms_norm": (2, 1), "rotary.rotary_embedding": (1, 0), "activation.silu_and_mul": (1, 0)}


@dataclass(frozen=True)
class Model:
    """A public configuration, and how often each patch should answer in one forward pass."""

    title: str
    config: dict[str, Any]
    hits: dict[str, tuple[int, int]]
    decoder: str  # the patch that does a decode step of a whole layer

    def with_layers(self, layers: int | None) -> Model:
        if layers is None or layers == self.config["num_hidden_layers"]:
            return self
        config = {**self.config, "num_hidden_layers": layers, "max_window_layers": layers}
        return dataclasses.replace(self, title=f"{self.title}, {layers} layers", config=config)

    def expected(self, decodes: int, whole_layers: bool) -> dict[str, int]:
        """Hits of a prefill and so many decode steps, with or without the patch of whole layers."""
        layers = self.config["num_hidden_layers"]
        if not whole_layers:
            return {patch: (1 + decodes) * (layers * each + once) for patch, (each, once) in self.hits.items()}
        parts = {patch: layers * each + (1 + decodes) * once for patch, (each, once) in self.hits.items()}
        return {**parts, self.decoder: layers * decodes}


def _config(architecture: str, model_type: str, **values: Any) -> dict[str, Any]:
    common = {"hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    return {"architectures": [architecture], "model_type": model_type, **common, "tie_word_embeddings": False, **values}


MODELS = {
    "qwen2.5-7b": Model(
        "Qwen2.5-7B",
        _config(
            "Qwen2ForCausalLM", "qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rms_norm_eps=1e-6, rope_theta=1e6,
            max_position_embeddings=32768, use_sliding_window=False, max_window_layers=28,
        ),
        _DENSE,
        "decoder.qwen2",
    ),
    "llama-3.1-8b": Model(
        "Llama-3.1-8B",
        _config(
            "LlamaForCausalLM", "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5, rope_theta=5e5,
            max_position_embeddings=131072, attention_bias=False, mlp_bias=False,
            rope_scaling={
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        _DENSE,
        "decoder.llama",
    ),
    "qwen3-8b": Model(
        "Qwen3-8B",
        _config(
            "Qwen3ForCausalLM", "qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6,
            rope_theta=1e6, max_position_embeddings=40960, attention_bias=False, use_sliding_window=False,
            max_window_layers=36,
        ),
        {**_DENSE, "layernorm.rms_norm": (4, 1)},  # q_norm and k_norm
        "decoder.qwen3",
    ),
    "tiny": Model(
        "tiny",
        _config(
            "Qwen2ForCausalLM", "qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=512, rms_norm_eps=1e-6, rope_theta=1e4,
            max_position_embeddings=2048, use_sliding_window=False, max_window_layers=2,
        ),
        _DENSE,
        "decoder.qwen2",
    ),
}  # fmt: skip

# What the engine is told in each mode.
MODES: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}, "compiled": {}}


@dataclass(frozen=True)
class Side:
    """One of the engines that are compared."""

    name: str
    mode: str
    gems: bool
    dtype: str = "bfloat16"


def sides_of(mode: str) -> tuple[Side, Side]:
    return Side(f"stock-{mode}", mode, False), Side(f"ours-{mode}", mode, True)


REFERENCE = Side("float32", "eager", False, "float32")


# In the process that is measured


def has_gpu() -> bool:
    """By the driver's tool, because vLLM must be the first to touch CUDA."""
    return shutil.which("nvidia-smi") is not None


def environment(side: Side) -> dict[str, str]:
    """What vLLM, Triton and the plugin read from the environment; what the caller has set besides stays."""
    settings = {
        "VLLM_GEMS": str(int(side.gems)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine, and so the counters, in this process
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would compile itself with a CUDA toolkit
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if side.dtype == "float32":
        settings["TRITON_F32_DEFAULT"] = "ieee"  # else attention in float32 multiplies in TF32
    if not has_gpu():
        settings |= {
            "TRITON_INTERPRET": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return {**os.environ, **settings}


@torch.no_grad()
def seed_weights(model: Any) -> None:
    """Random weights that depend on a parameter's name alone, of a size that keeps activations near one.

    vLLM's dummy weights lie within 0.001 of zero, those of norms too, and leave logits that rounding decides. Values
    are rounded to bfloat16 whatever the model's dtype, so that a float32 model has exactly the same weights.
    """
    for name, weight in model.named_parameters():
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
        value = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
        if weight.dim() > 1:
            value *= 1.0 if "embed" in name else weight.shape[-1] ** -0.5
        else:
            value = value * 0.1 + ("norm" in name)
        weight.copy_(value.bfloat16())


def register_loader() -> None:
    """Have vLLM know `seed_weights` as a format to load weights from, as it knows "dummy"."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class SeededLoader(DummyModelLoader):
        def load_weights(self, model: Any, model_config: object) -> None:
            seed_weights(model)

    register_model_loader("seeded")(SeededLoader)


def random_prompts(count: int, vocabulary: int, seed: int, length: int = PROMPT) -> list[dict[str, list[int]]]:
    numbers = random.Random(seed)
    return [{"prompt_token_ids": [numbers.randrange(vocabulary) for _ in range(length)]} for _ in range(count)]


def start_engine(spec: dict[str, Any]) -> Any:
    if not has_gpu():
        sys.path.insert(0, str(measure.ROOT.parent / "tools"))
        importlib.import_module("flash_on_cpu").install()
    from vllm import LLM

    register_loader()
    most = max(spec["batches"])
    longest = max(PROMPT + max(WARMUP + spec["steps"], LONG, GREEDY), max(MIXED) + MIXED_TOKENS, *spec["prefill"], 0)
    return LLM(
        spec["model"],
        dtype=spec["side"]["dtype"],
        load_format="seeded",
        skip_tokenizer_init=True,
        seed=0,
        max_model_len=longest + 8,
        max_num_seqs=max(most, len(MIXED)),
        max_num_batched_tokens=max(most * PROMPT, longest + 8),  # every prefill in one step
        enable_prefix_caching=True,
        block_size=16,
        # Room for what is run here; without it vLLM measures how much there is, which takes time and varies. The
        # fraction is only what must be free for it to start.
        **({"kv_cache_memory_bytes": spec["kv_cache_bytes"], "gpu_memory_utilization": 0.05} if has_gpu() else {}),
        **MODES[spec["side"]["mode"]],
    )


def own_report() -> Any:
    """The plugin's report, or None if vLLM has not loaded it; asking must not be what loads it."""
    return sys.modules["vllm_gems.api"].report() if "vllm_gems.api" in sys.modules else None


def count_hits() -> dict[str, int]:
    found = own_report()
    return {row.patch: row.hits for row in found.rows} if found else {}


class Forced:
    """In place of `model.compute_logits`: keeps every step's logits, and makes one fixed token the most likely of all.

    So all engines decode the same tokens, whatever they would have chosen, and their logits can be compared.
    """

    def __init__(self, model: Any, tokens: Sequence[int]) -> None:
        self.model = model
        self.tokens = tokens
        self.kept: list[torch.Tensor] = []
        self._compute = model.compute_logits

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = self._compute(*args, **kwargs)
        forced = torch.zeros_like(logits)
        forced[:, self.tokens[len(self.kept) % len(self.tokens)]] = 1e4
        self.kept.append(logits.cpu())
        return forced

    def __enter__(self) -> Forced:
        self.model.compute_logits = self
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.compute_logits  # the class's own is found again


def forced(
    llm: Any, spec: dict[str, Any], name: str, run: Callable[[dict[str, Any]], None], tokens: Sequence[int]
) -> dict[str, Any]:
    """Save the logits of all steps of `run(parameters of greedy sampling)`; how many steps, and hits in all."""
    greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    (model,) = llm.apply_model(lambda model: model)
    before = count_hits()
    with Forced(model, tokens) as kept:
        run(greedy)
    hits = {patch: count - before.get(patch, 0) for patch, count in count_hits().items()}
    torch.save(torch.cat(kept.kept), Path(spec["out"]) / f"{spec['name']}-{name}.pt")
    return {"steps": len(kept.kept), "hits": {patch: count for patch, count in hits.items() if count}}


def verify(llm: Any, spec: dict[str, Any], case: str) -> dict[str, Any]:
    """Logits of every step of forced decoding (saved), hits, and tokens of free greedy decoding."""
    from vllm import SamplingParams

    vocabulary = spec["vocabulary"]
    tokens = [random.Random(7).randrange(vocabulary) for _ in range(FORCED)]
    llm.reset_prefix_cache()
    if case == "mixed":

        def mixed(greedy: dict[str, Any]) -> None:
            run_mixed(llm, vocabulary, SamplingParams(max_tokens=MIXED_TOKENS, **greedy))

        return forced(llm, spec, case, mixed, tokens)
    steps, batch = (LONG if has_gpu() else FORCED, 1) if case == "long" else (FORCED, int(case))
    prompts = random_prompts(batch, vocabulary, seed=batch)

    def run(greedy: dict[str, Any]) -> None:
        llm.generate(prompts, SamplingParams(max_tokens=steps + 1, **greedy), use_tqdm=False)

    if case == "long":
        run({"ignore_eos": True, "detokenize": False})  # fills the cache
    found = forced(llm, spec, case, run, tokens)
    llm.reset_prefix_cache()
    greedy = SamplingParams(max_tokens=GREEDY, temperature=0.0, ignore_eos=True, detokenize=False)
    free = llm.generate(prompts, greedy, use_tqdm=False)
    return {**found, "tokens": [list(output.outputs[0].token_ids) for output in free]}


def run_mixed(llm: Any, vocabulary: int, params: Any) -> None:
    """One request more every few steps, prefilled in pieces while the others decode."""
    engine = llm.llm_engine
    config = engine.engine_core.engine_core.scheduler.scheduler_config
    before, config.long_prefill_token_threshold = config.long_prefill_token_threshold, PIECE
    try:
        for number, length in enumerate(MIXED):
            (prompt,) = random_prompts(1, vocabulary, seed=100 + number, length=length)
            engine.add_request(f"mixed-{number}", prompt, params)
            for _ in range(3):
                engine.step()
        while engine.has_unfinished_requests():
            engine.step()
    finally:
        config.long_prefill_token_threshold = before


def decode_ms(llm: Any, spec: dict[str, Any], batch: int) -> list[float]:
    """Milliseconds of each timed step: `batch` requests decode together from the first step on."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    wanted = WARMUP + spec["steps"] + 2
    params = SamplingParams(max_tokens=wanted, ignore_eos=True, detokenize=False, **TIMED)
    engine = llm.llm_engine
    for number, prompt in enumerate(random_prompts(batch, spec["vocabulary"], seed=1000 + batch)):
        engine.add_request(f"{batch}-{number}", prompt, params)
    times = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - begin) * 1e3)
    if len(times) > wanted + 3:
        raise RuntimeError(f"{wanted} tokens took {len(times)} steps: a step is not one forward pass of all requests")
    return times[WARMUP : WARMUP + spec["steps"]]


def prefill_ms(llm: Any, spec: dict[str, Any], length: int) -> list[float]:
    """Milliseconds from a prompt of so many tokens to its first token, several times."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False, **TIMED)
    times = []
    for number in range(PREFILLS):
        llm.reset_prefix_cache()
        (prompt,) = random_prompts(1, spec["vocabulary"], seed=2000 + number, length=length)
        begin = time.perf_counter()
        llm.generate([prompt], params, use_tqdm=False)
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def in_turns(
    bursts: dict[str, Callable[[], list[float]]], turns: int
) -> tuple[dict[str, dict[str, list[float]]], Any]:
    """Median milliseconds of each burst, with the patches and without, which of them first by turns.

    And the report of the last turn with the patches.
    """
    import vllm_gems

    report = None

    times: dict[str, dict[str, list[float]]] = {name: {"ours": [], "stock": []} for name in bursts}
    for burst in bursts.values():  # the first is slower
        burst()
    for turn in range(turns):
        for side in ("ours", "stock") if turn % 2 else ("stock", "ours"):
            if side == "ours":
                vllm_gems.apply_gems_patches_to_vllm()
            else:
                vllm_gems.remove_gems_patches_from_vllm()
            for name, burst in bursts.items():
                times[name][side].append(round(statistics.median(burst()), 3))
            if side == "ours":
                report = own_report()  # rows leave it when the patches are removed
    for name, found in times.items():
        print(f"{name}: {found}", flush=True)
    return times, report


def attention_backend(llm: Any) -> str:
    (modules,) = llm.apply_model(lambda model: list(model.modules()))
    backends = [module.attn_backend for module in modules if hasattr(module, "attn_backend")]
    return str(backends[0].get_name()) if backends else ""


def child(spec: dict[str, Any]) -> None:
    """What one process measures: written as JSON beside the logits."""
    llm = start_engine(spec)
    startup = time.time() - spec["started"]
    print(f"engine started after {startup:.1f} s", flush=True)
    result: dict[str, Any] = {"startup": startup, "attention": attention_backend(llm), "verified": {}, "ms": {}}
    for case in spec["verify"]:
        result["verified"][case] = verify(llm, spec, case)
        print(f"{case} decoded for comparison", flush=True)
    for batch in spec["batches"] if spec["timed"] else ():
        result["ms"][batch] = decode_ms(llm, spec, batch)
        print(f"batch {batch}: {statistics.median(result['ms'][batch]):.2f} ms per step", flush=True)
    found = own_report()
    bursts: dict[str, Callable[[], list[float]]] = {}
    bursts |= {f"batch {batch}": functools.partial(decode_ms, llm, spec, batch) for batch in spec["batches"]}
    bursts |= {f"prefill {length}": functools.partial(prefill_ms, llm, spec, length) for length in spec["prefill"]}
    result["turns"], found = in_turns(bursts, spec["turns"]) if spec.get("turns") else ({}, found)
    result["report"] = found.to_json() if found else None
    (Path(spec["out"]) / f"{spec['name']}.json").write_text(json.dumps(result))


# In the process that compares


def distance(ours: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """How far logits [steps and requests, vocabulary] are from others."""
    square, norm, worst, cosine, same = 0.0, 0.0, 0.0, 1.0, 0
    for left, right in zip(ours.split(32), reference.split(32), strict=True):
        a, b = left.double(), right.double()
        square += float((a - b).square().sum())
        norm += float(b.square().sum())
        worst = max(worst, float((a - b).abs().max()))
        cosine = min(cosine, float(torch.cosine_similarity(a, b, dim=-1).min()))
        same += int((a.argmax(dim=-1) == b.argmax(dim=-1)).sum())
    return {
        "relative_frobenius": (square / norm) ** 0.5,
        "max_abs": worst,
        "min_cosine": cosine,
        "same_argmax": same / ours.shape[0],
    }


def agreement(ours: Iterable[Sequence[int]], others: Iterable[Sequence[int]]) -> dict[str, float]:
    """How much of freely decoded sequences is equal: whole sequences, and tokens before the first that differs."""
    pairs = list(zip(ours, others, strict=True))
    common = [next((at for at, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x)) for x, y in pairs]
    return {
        "equal_sequences": sum(list(x) == list(y) for x, y in pairs) / len(pairs),
        "equal_tokens": sum(common) / sum(len(x) for x, _ in pairs),
    }


def compare(out: Path, mode: str, case: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Logits and tokens of ours, stock and float32 in one case."""
    stock, ours = (f"{side.name}-0" for side in sides_of(mode))
    reference = REFERENCE.name if REFERENCE.name in results else None
    logits = {name: torch.load(out / f"{name}-{case}.pt") for name in (stock, ours, reference) if name}
    tokens = {name: results[name]["verified"][case].get("tokens", []) for name in logits}
    found: dict[str, Any] = {
        "mode": mode,
        "case": case,
        "rows": logits[stock].shape[0],
        "ours_to_stock": distance(logits[ours], logits[stock]),
    }
    if tokens[ours]:
        found["tokens_ours_to_stock"] = agreement(tokens[ours], tokens[stock])
    if reference:
        found["ours_to_float32"] = distance(logits[ours], logits[reference])
        found["stock_to_float32"] = distance(logits[stock], logits[reference])
        if tokens[ours]:
            found["tokens_stock_to_float32"] = agreement(tokens[stock], tokens[reference])
        errors = [found[f"{side}_to_float32"]["relative_frobenius"] for side in ("ours", "stock")]
        found["error_ratio"] = errors[0] / errors[1]
        found["within_bf16_rounding"] = found["error_ratio"] <= LIMIT
    return found


class ChildError(Exception):
    """A process came to no result."""


def run_child(side: Side, name: str, spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """One process; its output goes to a log, its result comes back."""
    spec = {**spec, "side": dataclasses.asdict(side), "name": name, "out": str(out), "started": time.time()}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(spec)]
    log = out / f"{name}.log"
    settings: dict[str, Any] = {"env": environment(side), "stderr": subprocess.STDOUT, "timeout": LONGEST_S}
    try:
        with log.open("w") as sink:
            subprocess.run(command, stdout=sink, check=True, **settings)
        result: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    except (subprocess.SubprocessError, OSError) as error:
        raise ChildError(f"{name}: {type(error).__name__}; the end of its log:\n{log.read_text()[-4000:]}") from error
    steps = ", ".join(f"batch {batch} {statistics.median(ms):.2f} ms" for batch, ms in result["ms"].items())
    seconds = time.time() - spec["started"]
    print(f"{name}: started in {result['startup']:.1f} s, {seconds:.0f} s in all  {steps}", flush=True)
    return result


def run_all(args: argparse.Namespace, model: Model, out: Path) -> dict[str, dict[str, Any]]:
    """Results by process: first those that only decode for comparison, side by side, then those that are timed."""
    folder = out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    verify_at = [*(str(batch) for batch in COMPARED if batch <= max(args.batches)), "long", "mixed"]
    if not args.logits:
        verify_at = []
    spec = {
        "model": str(folder),
        "vocabulary": model.config["vocab_size"],
        "batches": args.batches,
        "steps": args.steps,
        "prefill": args.prefill,
        "kv_cache_bytes": (8 if args.times else 1) << 30,
    }
    results: dict[str, dict[str, Any]] = {}

    def run(side: Side, name: str, **more: Any) -> None:
        each = {**spec, "timed": False, "verify": verify_at, "turns": 0, **more}
        results[name] = run_child(side, name, each, out)

    def compare_with_reference() -> None:
        try:
            run(REFERENCE, REFERENCE.name, batches=list(COMPARED), prefill=[])
        except ChildError as error:  # what was timed is worth keeping; the record says what is missing
            print(error, flush=True)

    # What only decodes for comparison runs beside others of its kind, what is timed runs alone.
    beside: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    alone: list[tuple[Side, str, dict[str, Any]]] = []
    for turn in range(args.rounds if args.times else 1):
        for mode in args.modes:
            for side in sides_of(mode):
                name, verify = f"{side.name}-{turn}", verify_at if turn == 0 else []
                by_turns = mode == "eager" and args.turns > 0
                if args.times and (side.gems or not by_turns):
                    turns = args.turns if by_turns and turn == 0 else 0
                    alone.append((side, name, {"timed": not by_turns, "verify": verify, "turns": turns}))
                elif verify:
                    beside.append((run, (side, name)))
    if args.reference and verify_at:
        beside.append((compare_with_reference, ()))
    if args.against_compiled and args.times:
        side = sides_of("compiled")[0]
        alone.append((side, f"{side.name}-0", {"timed": True, "verify": []}))
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(function, *arguments) for function, arguments in beside]:
            future.result()
    for side, name, more in alone:
        run(side, name, **more)
    return results


def medians(results: dict[str, dict[str, Any]], side: Side, batch: int) -> list[float]:
    """Of every process of one side, in the order in which they ran."""
    of_side = [result for name, result in results.items() if name.rpartition("-")[0] == side.name]
    return [round(statistics.median(result["ms"][str(batch)]), 3) for result in of_side]


def rows_of(
    model: Model, modes: Sequence[str], batches: Sequence[int], results: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for mode in modes:
        for batch in batches:
            turns = results[f"{sides_of(mode)[1].name}-0"]["turns"].get(f"batch {batch}")
            if turns:
                stock, ours = turns["stock"], turns["ours"]
            else:
                stock, ours = (medians(results, side, batch) for side in sides_of(mode))
            against = {"stock": round(statistics.median(stock), 3)}
            compiled = medians(results, sides_of("compiled")[0], batch)
            if mode == "eager" and compiled:
                against["stock_compiled"] = round(statistics.median(compiled), 3)
            rows.append(
                {
                    "case": {"model": model.title, "mode": mode, "batch": batch},
                    "unit": "ms/step",
                    "ours": round(statistics.median(ours), 3),
                    "against": against,
                    "turns": {"ours": ours, "stock": stock},
                }
            )
        for name, turns in results[f"{sides_of(mode)[1].name}-0"]["turns"].items():
            if not name.startswith("prefill"):
                continue
            rows.append(
                {
                    "case": {"model": model.title, "mode": mode, "batch": 1, "prefill": int(name.split()[1])},
                    "unit": "ms",
                    "ours": round(statistics.median(turns["ours"]), 3),
                    "against": {"stock": round(statistics.median(turns["stock"]), 3)},
                    "turns": turns,
                }
            )
    return rows


def hits_of(results: dict[str, dict[str, Any]], mode: str) -> dict[str, dict[str, Any]]:
    """Steps and hits, by case."""
    verified = results[f"{sides_of(mode)[1].name}-0"]["verified"]
    return {case: {"steps": each["steps"], "hits": each["hits"]} for case, each in verified.items()}


def wrong_hits(model: Model, found: dict[str, dict[str, Any]]) -> list[str]:
    """Patches that did not answer exactly as often as the model has layers for them, in batches of known make-up."""
    return [
        f"case {case}: {patch} answered {each['hits'].get(patch, 0)} times in {each['steps']} steps, expected {count}"
        for case, each in found.items()
        if case != "mixed"
        for patch, count in model.expected(each["steps"] - 1, model.decoder in each["hits"]).items()
        if each["hits"].get(patch, 0) != count
    ]


def wrong_logits(accuracy: list[dict[str, Any]]) -> list[str]:
    """Batch sizes at which more than bfloat16's rounding separates us from float32."""
    return [
        f"{each['mode']}, {each['case']}: our logits' error is {each['error_ratio']:.3f} times stock's"
        for each in accuracy
        if not each.get("within_bf16_rounding", True)
    ]


def startups(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds from the start of the process to a ready engine, the least of each side."""
    found: dict[str, list[float]] = {}
    for name, result in results.items():
        found.setdefault(name.rpartition("-")[0] or name, []).append(result["startup"])
    return {side: round(min(seconds), 1) for side, seconds in found.items()}


def report_of(results: dict[str, dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """The plugin's rows of one process, but for patches that are off or wait."""
    rows = results[f"{sides_of(mode)[1].name}-0"]["report"]["rows"]
    keys = ("patch", "state", "where", "hits", "declined", "errors", "why")
    return [{key: row[key] for key in keys} for row in rows if row["state"] not in ("off", "waiting")]


def tell(rows: list[dict[str, Any]], accuracy: list[dict[str, Any]]) -> None:
    for row in rows:
        ratio = row["ours"] / row["against"]["stock"]
        case = ", ".join(str(value) for value in row["case"].values())
        print(f"{case}: {row['ours']:.2f} {row['unit']}, {row['against']}, ratio {ratio:.3f}")
    for each in accuracy:
        keys = ("ours_to_stock", "ours_to_float32", "stock_to_float32")
        told = {key: each[key]["relative_frobenius"] for key in keys if key in each}
        errors = ", ".join(f"{key} {value:.2e}" for key, value in told.items())
        ratio = f"; ratio {each['error_ratio']:.3f}, limit {LIMIT}" if "error_ratio" in each else ""
        print(f"{each['mode']}, {each['case']}: relative Frobenius error of the logits {errors}{ratio}")


def main() -> int:
    args = parse()
    if args.child:
        child(json.loads(args.child))
        return 0
    # Stopped by `timeout`, this ends like an exception, and takes the engine with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = MODELS[args.model].with_layers(args.layers)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)  # logits are large, and of no use afterwards
        try:
            results = run_all(args, model, out)
        except ChildError as error:
            sys.exit(str(error))
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "serve-processes.json").write_text(json.dumps(results))
        verified = list(next(iter(results.values()))["verified"])
        accuracy = [compare(out, mode, case, results) for mode in args.modes for case in verified]
    rows = rows_of(model, args.modes, args.batches, results) if args.times else []
    hits = {mode: hits_of(results, mode) for mode in args.modes}
    problems = wrong_hits(model, hits["eager"]) if "eager" in args.modes else []
    problems += wrong_logits(accuracy)
    if args.reference and args.logits and REFERENCE.name not in results:
        problems.append("the float32 engine came to no result, so the logits were compared with stock's only")
    tell(rows, accuracy)
    more: dict[str, Any] = {
        "setting": {
            "prompt": PROMPT, "sampling": TIMED, "steps": args.steps, "warmup": WARMUP, "rounds": args.rounds,
            "turns": args.turns,
            "attention": {name: result["attention"] for name, result in results.items()},
            "weights": "random, the same in every process",
        },
        "startup_seconds": startups(results),
        "hits": hits,
        "logits": accuracy,
        "problems": problems,
        "report": {mode: report_of(results, mode) for mode in args.modes},
        "environment": {name: value for name, value in os.environ.items() if name.startswith("VLLM_GEMS")},
    }  # fmt: skip
    if args.record:
        path = measure.record(args.record, rows, commit=args.commit, **more)
        print(f"recorded {path}")
        if args.out:
            shutil.copy(path, args.out)
    elif args.out:
        measure.record("serve", rows, folder=args.out, commit=args.commit, **more)
    print("\n".join(problems) or "hits as expected, logits within bfloat16's rounding")
    return 1 if problems else 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _modes(text: str) -> list[str]:
    modes = text.split(",")
    for mode in modes:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"{mode!r} is not one of {', '.join(MODES)}")
    return modes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--batches", type=_numbers, default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=32, help="timed steps per process and batch size")
    parser.add_argument("--modes", type=_modes, default=["eager"], help=f"of {', '.join(MODES)}")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side")
    parser.add_argument("--turns", type=int, default=8, help="bursts of each side in eager mode; 0: none")
    parser.add_argument("--against-compiled", action="store_true", help="stock vLLM in its default mode, too")
    parser.add_argument("--prefill", type=_numbers, default=[], help="time prefills of prompts of so many tokens, too")
    parser.add_argument("--no-logits", dest="logits", action="store_false", help="no comparison of logits; times only")
    parser.add_argument("--no-times", dest="times", action="store_false", help="nothing is timed; logits only")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="no comparison with float32")
    parser.add_argument("--out", type=Path, help="a folder for what every process found")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/<gpu>/NAME.json, a copy to --out")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
