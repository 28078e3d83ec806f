"""Serving with and without the plugin: ms per decode step of a real vLLM engine, one run, one GPU.

    python benchmarks/serve.py --model qwen2.5-7b --against-compiled --record serve_eager_dense

Every engine is in a process of its own in which vLLM loads the plugin by its entry point, or not (`VLLM_GEMS=0`), off
and on, `--rounds` times over. The models are the public configurations with random weights, written to a folder with no
tokenizer: nothing is downloaded. bfloat16, prompts of 64 random tokens.

Timed are calls of `LLMEngine.step` while every request decodes: one forward pass, temperature 0.8 and top_p 0.95
sampled; the prefill and the first steps are left out. In eager mode both sides are timed in one process, in `--turns`
turns of a burst with the patches and a burst after `remove_gems_patches_from_vllm()`, which leaves vLLM's own objects:
host time on a shared machine drifts by more, from one process to the next, than what is to be measured. A burst counts
by its median, a side by the median of its bursts. Compiled code cannot change sides: there each side has a process,
they take turns too, and start beside each other as far as the GPU's memory goes.

Before anything is timed, the first round decodes a fixed sequence of tokens, the same in every process, and keeps the
logits of every step: at batch 1, 32 and 72; at batch 1 for 200 steps, of a prompt whose prefix is cached ("long"); and
of prompts that come one after the other and are prefilled in pieces beside the decoding of others ("mixed"). Ours and
stock's are compared with each other and with those of an engine in float32 with the same weights (matrix products and
attention in full float32). What counts is the relative Frobenius error against float32: ours may be at most 1.1 times
stock's, so that what separates us from stock is bfloat16's rounding and nothing else. Hits are counted there too, and
compared with what the model's layers should give. Tokens decoded greedily and freely are compared as well, for
information: random weights put the best two tokens so close that rounding decides.

So it is with experts: where two are about equally good for a token, rounding chooses, and a row that has chosen another
expert is far from float32's, on either side: one of them is most of the Frobenius error of 150. What counts there is
therefore the median over the rows, which of fewer than a hundred may be twice stock's, and how many rows are far, five
times stock's median or more: no more than stock has, and what chance may add. In float32 vLLM has no kernel for latent
attention as it is decoded, so that the reference computes keys and values of every head.

--attention names vLLM's attention backend for both sides. --context times decode steps at longer contexts: every
request has a prompt of its own, which is prefilled once and then found in the prefix cache, so that each reads blocks
that no other reads. 256 requests of 4096 tokens take 33 GB of cache in DeepSeek-V2-Lite.

    python benchmarks/serve.py --model deepseek-v2-lite --attention TRITON_MLA --context 64,4096 --few-graphs \
        --against-compiled auto,TRITON_MLA --no-logits --turns 4
    python benchmarks/serve.py --model deepseek-v2-lite --attention TRITON_MLA --layers 9 --no-times

--prefill times prefills of single prompts in eager mode, in the same turns. `VLLM_GEMS_INCLUDE=default,mla.*` adds what
is off by default.

The exit status is 1 if logits or hits are not as they should be. Start-up is from the start of the process to an
engine that is ready, beside others that start; the first processes of a run fill caches for later ones, so the least of
each side counts.

On a CPU, `--model tiny --batches 1,4` tries this program out, on vLLM's FlashAttention backend (tools/flash_on_cpu.py),
and `--model tiny-deepseek --batches 1,4 --no-reference` on its Triton MLA backend: stock vLLM rotates these queries
wrongly on a CPU, in float32 too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import itertools
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this file is in no package

from benchmarks import measure
from benchmarks.models import MIXTURE, MODELS, Model
from vllm_gems.patches.decode_steps import MAX_MIXED

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
# And that of the median row this many, with experts, where fewer rows are compared than these.
FEW_ROWS_LIMIT = 2.0
MANY_ROWS = 100
# A row that is so many times stock's median away from float32 has chosen another expert, or is wrong.
FAR = 5.0
# A process that takes longer than this has gone wrong.
LONGEST_S = 400 if shutil.which("nvidia-smi") else 1500
# Weights that are drawn in one piece; more than any parameter of a dense model has.
_DRAWN_AT_ONCE = 1 << 30
# Columns of a weight in float8 that share a scale, and of what size weights are before it; the largest number is 448.
_FLOAT8_BLOCK, _FLOAT8_SIZE = 128, 112.0
# Tokens of a block of the KV cache, at most: so many of a request's may be empty.
_BLOCK = 64
# Engines that only decode for comparison run beside each other if their weights fit into this.
_BESIDE_BYTES = 66 << 30
# What an engine that is timed takes beside weights and KV cache, and how much of the memory all may take together.
_BESIDE_WEIGHTS = 7 << 29
OF_THE_MEMORY = 0.97

# What the engine is told in each mode.
MODES: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}, "compiled": {}}


@dataclass(frozen=True)
class Side:
    """One of the engines that are compared."""

    name: str
    mode: str
    gems: bool
    dtype: str = "bfloat16"
    attention: str = ""  # vLLM's backend; what it chooses itself if empty

    @property
    def absorbed(self) -> bool:
        """Whether latent attention is decoded over latents; no backend of vLLM's does that in float32 on a GPU."""
        return self.dtype != "float32"


def sides_of(mode: str, attention: str = "") -> tuple[Side, Side]:
    stock, ours = (Side(f"{side}-{mode}", mode, side == "ours", attention=attention) for side in ("stock", "ours"))
    return stock, ours


def compiled_side(attention: str) -> Side:
    """Stock vLLM in its default mode with this backend, "auto" for its own choice."""
    return Side(f"compiled-{attention}", "compiled", False, attention="" if attention == "auto" else attention)


def label(batch: int, context: int) -> str:
    """How a timed point is called."""
    return f"batch {batch}" + (f", context {context}" if context != PROMPT else "")


REFERENCE = Side("float32", "eager", False, "float32")


# In the process that is measured


def has_gpu() -> bool:
    """By the driver's tool, because vLLM must be the first to touch CUDA."""
    return shutil.which("nvidia-smi") is not None


def choose_sampler() -> None:
    """vLLM's own, unless the caller has said otherwise: FlashInfer's compiles itself with a CUDA toolkit."""
    os.environ.setdefault(measure.SAMPLER, "0")


def environment(side: Side) -> dict[str, str]:
    """What vLLM, Triton and the plugin read from the environment; what the caller has set besides stays."""
    settings = {
        "VLLM_GEMS": str(int(side.gems)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine, and so the counters, in this process
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if side.dtype == "float32":
        settings["TRITON_F32_DEFAULT"] = "ieee"  # else attention in float32 multiplies in TF32
    if not side.absorbed:
        settings["VLLM_MLA_DISABLE"] = "1"
    if not has_gpu():
        settings |= {
            "TRITON_INTERPRET": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return {**os.environ, **settings}


def weights_by_name(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters; what latent attention holds in one, and attention by heads in two, as the two."""
    for name, weight in model.named_parameters():
        if "fused_qkv_a_proj" in name:
            rank = model.config.q_lora_rank // (_FLOAT8_BLOCK if "weight_scale_inv" in name else 1)
            yield name.replace("fused_qkv_a_proj", "q_a_proj"), weight[:rank]
            yield name.replace("fused_qkv_a_proj", "kv_a_proj_with_mqa"), weight[rank:]
        else:
            yield name, weight


@torch.no_grad()
def seed_weights(model: Any, float8: bool = False) -> None:
    """Random weights that depend on a parameter's name alone, of a size that keeps activations near one.

    vLLM's dummy weights lie within 0.001 of zero, those of norms too, and leave logits that rounding decides. Values
    are rounded to bfloat16 whatever the model's dtype, so that a float32 model has exactly the same weights. Weights in
    float8 fill its range, as those of checkpoints do, and their blocks' scales, all different, make them as small.

    float8: of a model without quantisation, what the quantised one has in float8, times its scales.
    """
    for name, weight in weights_by_name(model):
        generator = _generator(name, weight.device)
        twin = float8 and weight.dim() > 1 and not any(each in name for each in _NEVER_FLOAT8)
        scales = _scales_of(name, weight) if twin else None
        # The experts of a layer are one parameter, of which float32 copies would not fit beside it.
        rows = max(1, _DRAWN_AT_ONCE * weight.shape[0] // max(1, weight.numel()))
        for first, part in zip(range(0, weight.shape[0], rows), weight.split(rows), strict=True):
            value = torch.randn(part.shape, generator=generator, device=part.device, dtype=torch.float32)
            if "weight_scale_inv" in name:
                part.copy_(_as_scales(value))
            elif weight.dtype is torch.float8_e4m3fn:
                part.copy_(_as_float8(value))
            elif scales is not None:
                part.copy_(_as_float8(value).float() * _for_elements(scales, weight, first, len(part)))
            elif weight.dim() > 1:
                part.copy_((value * (1.0 if "embed" in name else weight.shape[-1] ** -0.5)).bfloat16())
            else:
                part.copy_((value * 0.1 + ("norm" in name)).bfloat16())


# Weights that vLLM leaves as they are in a quantised model.
_NEVER_FLOAT8 = "embed", "lm_head", "mlp.gate."


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def _as_float8(normal: torch.Tensor) -> torch.Tensor:
    return normal.mul_(_FLOAT8_SIZE).clamp_(-448, 448).to(torch.float8_e4m3fn)


def _as_scales(normal: torch.Tensor) -> torch.Tensor:
    return (1 + 0.2 * normal.clamp(-3, 3)) * (normal.shape[-1] * _FLOAT8_BLOCK) ** -0.5 / _FLOAT8_SIZE


def _scales_of(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The quantised model's scales of a weight that has none."""
    shape = (*weight.shape[:-2], *(-(-size // _FLOAT8_BLOCK) for size in weight.shape[-2:]))
    generator = _generator(f"{name}_scale_inv", weight.device)
    return _as_scales(torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32))


def _for_elements(scales: torch.Tensor, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Of `count` rows of a weight, or as many experts."""
    some = slice(first, first + count)
    if weight.dim() > 2:
        scales, some = scales[some], slice(None)
    rows, columns = weight.shape[-2:]
    whole = scales.repeat_interleave(_FLOAT8_BLOCK, dim=-2)[..., :rows, :]
    return whole.repeat_interleave(_FLOAT8_BLOCK, dim=-1)[..., :columns][some]


def register_loader(float8: bool = False) -> None:
    """Have vLLM know `seed_weights` as a format to load weights from, as it knows "dummy"; float8: as there."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class SeededLoader(DummyModelLoader):
        def load_weights(self, model: Any, model_config: object) -> None:
            seed_weights(model, float8)

    register_model_loader("seeded")(SeededLoader)


def random_prompts(count: int, vocabulary: int, seed: int, length: int = PROMPT) -> list[dict[str, list[int]]]:
    numbers = random.Random(seed)
    return [{"prompt_token_ids": [numbers.randrange(vocabulary) for _ in range(length)]} for _ in range(count)]


def start_engine(spec: dict[str, Any]) -> Any:
    if not has_gpu():
        sys.path.insert(0, str(measure.ROOT.parent / "tools"))
        importlib.import_module("flash_on_cpu").install()
    from vllm import LLM

    register_loader(spec["float8"])
    most = max(spec["batches"])
    longest = max(
        max(spec["contexts"]) + WARMUP + spec["steps"], PROMPT + max(LONG, GREEDY), max(MIXED) + MIXED_TOKENS,
        *spec["prefill"],
    )  # fmt: skip
    side = spec["side"]
    options: dict[str, Any] = dict(MODES[side["mode"]])
    if has_gpu() and side["attention"]:
        options["attention_backend"] = side["attention"]
    elif not has_gpu() and spec["latent"]:
        options["attention_backend"] = "CPU_MLA"  # every CPU has it, and flash_on_cpu puts Triton MLA into it
    if not spec["latent"]:  # whose backends want blocks of different sizes
        options["block_size"] = 16
    if side["mode"] == "compiled" and spec["few_graphs"]:
        options["cudagraph_capture_sizes"] = sorted(spec["batches"])
    return LLM(
        spec["model"],
        dtype=side["dtype"],
        load_format="seeded",
        skip_tokenizer_init=True,
        seed=0,
        max_model_len=longest + 8,
        max_num_seqs=max(most, len(MIXED)),
        max_num_batched_tokens=max(most * PROMPT, longest + 8),  # every prefill in one step
        enable_prefix_caching=True,
        # Room for what is run here; without it vLLM measures how much there is, which takes time and varies. The
        # fraction is only what must be free for it to start.
        **({"kv_cache_memory_bytes": spec["kv_cache_bytes"], "gpu_memory_utilization": 0.05} if has_gpu() else {}),
        **options,
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
    sizes = [each.shape[0] for each in kept.kept]
    return {"steps": len(sizes), "rows": sizes, "hits": {patch: count for patch, count in hits.items() if count}}


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


@functools.cache
def long_prompts(most: int, vocabulary: int, context: int) -> list[dict[str, list[int]]]:
    return random_prompts(most, vocabulary, seed=context, length=context)


def decode_ms(llm: Any, spec: dict[str, Any], batch: int, context: int = PROMPT) -> list[float]:
    """Milliseconds of each timed step: `batch` requests decode together from the first step on."""
    from vllm import SamplingParams

    if spec["contexts"] == [PROMPT]:
        llm.reset_prefix_cache()
    if context == PROMPT:
        prompts = random_prompts(batch, spec["vocabulary"], seed=1000 + batch)
    else:
        prompts = long_prompts(max(spec["batches"]), spec["vocabulary"], context)[:batch]
        # Prefilled the first time, and found in the cache from then on.
        llm.generate(prompts, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    wanted = WARMUP + spec["steps"] + 2
    params = SamplingParams(max_tokens=wanted, ignore_eos=True, detokenize=False, **TIMED)
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
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


def in_turns(bursts: dict[str, Callable[[], list[float]]], turns: int) -> tuple[dict[str, dict[str, list[float]]], Any]:
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
    bursts: dict[str, Callable[[], list[float]]] = {
        label(batch, context): functools.partial(decode_ms, llm, spec, batch, context)
        for context in spec["contexts"]
        for batch in spec["batches"]
    }
    for burst in bursts.values() if spec["timed"] else ():  # the first is slower
        burst()
    asked = Connection(spec["asked"])
    asked.send("ready")
    for name in iter(asked.recv, ""):  # one burst at a time, while every other process waits
        result["ms"].setdefault(name, []).append(round(statistics.median(bursts[name]()), 3))
        print(f"{name}: {result['ms'][name][-1]} ms per step", flush=True)
        asked.send(name)
    found = own_report()
    bursts |= {f"prefill {length}": functools.partial(prefill_ms, llm, spec, length) for length in spec["prefill"]}
    result["turns"], found = in_turns(bursts, spec["turns"]) if spec.get("turns") else ({}, found)
    result["report"] = found.to_json() if found else None
    (Path(spec["out"]) / f"{spec['name']}.json").write_text(json.dumps(result))


# In the process that compares


def row_errors(ours: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """The relative error of each row."""
    pairs = zip(ours.split(32), reference.split(32), strict=True)
    parts = [((a.double() - b).norm(dim=-1) / b.double().norm(dim=-1)).tolist() for a, b in pairs]
    return [error for part in parts for error in part]


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
        "median_row": statistics.median(row_errors(ours, reference)),
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


def order_like(stock: torch.Tensor, reference: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Which row of stock's logits is the same request's as each of the reference's; sizes: rows of each step.

    Backends may put a batch's decoding requests first. The logits of two requests are far from each other, so that the
    nearest row is the right one; where that names a row twice, the order stays. Ours runs on stock's backend, and must
    have its order.
    """
    found, first = [], 0
    for size in sizes:
        step = slice(first, first + size)
        nearest = torch.cdist(reference[step].float(), stock[step].float()).argmin(dim=1)
        if len(nearest.unique()) < size:
            nearest = torch.arange(size)
        found.append(first + nearest)
        first += size
    return torch.cat(found)


def far_rows(ours: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor) -> dict[str, int]:
    """Rows of either side that are far from the reference, or not even a number; and how many ours may be.

    Both choose another expert equally often, so that the counts are of one rate: three of their deviations apart, and
    two rows where there is next to nothing to count.
    """
    errors = {"ours": row_errors(ours, reference), "stock": row_errors(stock, reference)}
    far = FAR * statistics.median(errors["stock"])
    found = {side: sum(not error <= far for error in each) for side, each in errors.items()}
    return {**found, "allowed": found["stock"] + int(3 * (found["stock"] + 1) ** 0.5) + 2}


def compare(out: Path, mode: str, case: str, results: dict[str, dict[str, Any]], routed: bool) -> dict[str, Any]:
    """Logits and tokens of ours, stock and float32 in one case; routed: of a model with experts."""
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
        order = order_like(logits[stock], logits[reference], results[reference]["verified"][case]["rows"])
        logits |= {name: logits[name][order] for name in (stock, ours)}
        found["ours_to_float32"] = distance(logits[ours], logits[reference])
        found["stock_to_float32"] = distance(logits[stock], logits[reference])
        if tokens[ours]:
            found["tokens_stock_to_float32"] = agreement(tokens[stock], tokens[reference])
        ours_is, stocks_is = found["ours_to_float32"], found["stock_to_float32"]
        ratios = {key: ours_is[key] / stocks_is[key] for key in ("relative_frobenius", "median_row")}
        found["error_ratio"], found["median_ratio"] = ratios["relative_frobenius"], ratios["median_row"]
        if routed:
            far = found["far_rows"] = far_rows(logits[ours], logits[stock], logits[reference])
            limit = LIMIT if found["rows"] >= MANY_ROWS else FEW_ROWS_LIMIT
            found["within_bf16_rounding"] = found["median_ratio"] <= limit and far["ours"] <= far["allowed"]
        else:
            found["within_bf16_rounding"] = found["error_ratio"] <= LIMIT
    return found


class ChildError(Exception):
    """A process came to no result."""


class Child:
    """A process with an engine in it. Its output goes to a log; it does what it is asked, and its result comes back.

    Raises ChildError where it came to no result. As a context it is at an end when that is left.
    """

    def __init__(self, side: Side, name: str, spec: dict[str, Any], out: Path) -> None:
        self.name, self.spec, self.side, self.out = name, spec, side, out
        self._log, self._started = out / f"{name}.log", time.time()
        self._asked, theirs = Pipe()
        told = {
            **spec, "side": dataclasses.asdict(side), "name": name, "out": str(out), "started": self._started,
            "asked": theirs.fileno(),
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(told)]
        with self._log.open("w") as sink, theirs:
            self._process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env=environment(side), pass_fds=(theirs.fileno(),)
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._asked.close()

    def _wait(self, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except (subprocess.SubprocessError, OSError, EOFError) as error:
            end = self._log.read_text(errors="replace")[-4000:]
            raise ChildError(f"{self.name}: {type(error).__name__}; the end of its log:\n{end}") from error

    def answered(self) -> None:
        """Wait until its engine has started, or it has done what it was asked."""

        def answer() -> None:
            if not self._asked.poll(LONGEST_S):
                raise TimeoutError
            self._asked.recv()

        self._wait(answer)

    def burst(self, point: str) -> None:
        self._wait(lambda: self._asked.send(point))
        self.answered()

    def result(self) -> dict[str, Any]:
        """Have it do the rest, if there is any, and end."""

        def finished() -> str:
            self._asked.send("")
            if status := self._process.wait(LONGEST_S):
                raise subprocess.CalledProcessError(status, self.name)
            return (self.out / f"{self.name}.json").read_text()

        result: dict[str, Any] = json.loads(self._wait(finished))
        steps = ", ".join(f"{point} {statistics.median(ms):.2f} ms" for point, ms in result["ms"].items())
        seconds = time.time() - self._started
        print(f"{self.name}: started in {result['startup']:.1f} s, {seconds:.0f} s in all  {steps}", flush=True)
        return result


# (what is compared, its name, what its process is told)
Told = tuple[Side, str, dict[str, Any]]


def measured(processes: Iterable[Told], out: Path, points: Sequence[str], turns: int) -> dict[str, dict[str, Any]]:
    """Results by process. They start beside each other; then one of them measures at a time, by turns."""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(*each, out)) for each in processes]
        for child in children:
            child.answered()
        timed = [child for child in children if child.spec["timed"]]
        for turn in range(turns):
            for child in timed if turn % 2 else timed[::-1]:
                for point in points:
                    child.burst(point)
        return {child.name: child.result() for child in children}


def cache_bytes(model: Model, side: Side, spec: dict[str, Any]) -> int:
    """Room for everything that an engine runs, the prompts that wait in the prefix cache among it."""
    itemsize = 4 if side.dtype == "float32" else 2
    timed = spec["timed"] or spec["turns"]
    tokens = (max(COMPARED) + 1) * (PROMPT + GREEDY + _BLOCK) + sum(MIXED) + len(MIXED) * (MIXED_TOKENS + _BLOCK) + LONG
    if timed:
        most, steps = max(spec["batches"]), WARMUP + spec["steps"] + 2
        waiting = sum(context for context in spec["contexts"] if context != PROMPT)
        # The least recently used blocks are taken first: those of three bursts come before those that wait.
        bursts = 3 if waiting else 1
        tokens = max(tokens, most * (waiting + bursts * (PROMPT + steps + _BLOCK)), *spec["prefill"])
    return max(1 << 30, int(1.03 * model.cache_bytes(tokens, itemsize, side.absorbed)))


def memory_bytes() -> int:
    """Of the first GPU, asked of the driver's tool, because vLLM must be the first to touch CUDA; or of the machine."""
    if not has_gpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def groups_of(needs: Sequence[int], room: int) -> list[list[int]]:
    """Indices in their order, as many of them together as there is room for."""
    found: list[list[int]] = []
    free = 0
    for index, need in enumerate(needs):
        if not found or need > free:
            found.append([])
            free = room
        found[-1].append(index)
        free -= need
    return found


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """A model of which there is nothing but its configuration; the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def run_all(args: argparse.Namespace, model: Model, out: Path) -> dict[str, dict[str, Any]]:
    """Results by process: first those that only decode for comparison, side by side, then those that are timed."""
    folder = write_config(out / "model", model.config)
    # vLLM has no float32 run of weights in float8, but of what they stand for.
    float8 = "quantization_config" in model.config
    wide = {key: value for key, value in model.config.items() if key != "quantization_config"}
    reference = {"model": write_config(out / "reference", wide), "float8": float8}
    verify_at = [*(str(batch) for batch in COMPARED if batch <= max(args.batches)), "long", "mixed"]
    if not args.logits:
        verify_at = []
    spec = {
        "model": folder,
        "vocabulary": model.config["vocab_size"],
        "batches": args.batches,
        "contexts": args.context,
        "steps": args.steps,
        "prefill": args.prefill,
        "few_graphs": args.few_graphs,
        "latent": model.latent,
        "float8": False,
    }
    results: dict[str, dict[str, Any]] = {}

    def told(side: Side, **more: Any) -> dict[str, Any]:
        each = {**spec, "timed": False, "verify": verify_at, "turns": 0, **more}
        return {**each, "kv_cache_bytes": cache_bytes(model, side, each)}

    def run(side: Side, name: str, **more: Any) -> None:
        results.update(measured([(side, name, told(side, **more))], out, (), 0))

    def compare_with_reference() -> None:
        try:
            run(REFERENCE, REFERENCE.name, batches=list(COMPARED), contexts=[PROMPT], prefill=[], **reference)
        except ChildError as error:  # what was timed is worth keeping; the record says what is missing
            print(error, flush=True)

    # What only decodes for comparison runs beside others of its kind, what is timed measures alone.
    beside: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    alone: list[Told] = []
    for turn in range(args.rounds if args.times else 1):
        for mode in args.modes:
            for side in sides_of(mode, args.attention):
                name, verify = f"{side.name}-{turn}", verify_at if turn == 0 else []
                by_turns = mode == "eager" and args.turns > 0
                if args.times and (side.gems or not by_turns):
                    turns = args.turns if by_turns and turn == 0 else 0
                    alone.append((side, name, told(side, timed=not by_turns, verify=verify, turns=turns)))
                elif verify:
                    beside.append((run, (side, name)))
    if args.reference and verify_at:
        beside.append((compare_with_reference, ()))
    for side in map(compiled_side, args.against_compiled if args.times else ()):
        alone.append((side, f"{side.name}-0", told(side, timed=True, verify=[])))
    # float32 counts twice.
    fit = has_gpu() and (len(beside) + 1) * model.weight_bytes(2) <= _BESIDE_BYTES
    with ThreadPoolExecutor(None if fit else 1) as pool:
        for future in [pool.submit(function, *arguments) for function, arguments in beside]:
            future.result()
    alone.sort(key=lambda process: process[0].mode == "eager")  # sides that take turns stay together
    needs = [model.weight_bytes(2) + each["kv_cache_bytes"] + _BESIDE_WEIGHTS for _, _, each in alone]
    points = [label(batch, context) for context in args.context for batch in args.batches]
    for group in groups_of(needs, int(OF_THE_MEMORY * memory_bytes())):
        print(f"beside each other: {', '.join(alone[index][1] for index in group)}", flush=True)
        results.update(measured([alone[index] for index in group], out, points, max(1, args.turns)))
    return results


def bursts_of(results: dict[str, dict[str, Any]], side: Side, point: str) -> list[float]:
    """Of every process of one side, in the order in which they ran: the median step of each burst."""
    of_side = [result for name, result in results.items() if name.rpartition("-")[0] == side.name]
    return [ms for result in of_side for ms in result["ms"][point]]


def rows_of(model: Model, args: argparse.Namespace, results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for mode, context, batch in itertools.product(args.modes, args.context, args.batches):
        point, sides = label(batch, context), sides_of(mode)
        turns = results[f"{sides[1].name}-0"]["turns"].get(point)
        stock, ours = (turns["stock"], turns["ours"]) if turns else (bursts_of(results, side, point) for side in sides)
        against = {"stock": round(statistics.median(stock), 3)}
        for attention in args.against_compiled:
            name = "stock_compiled" + ("" if attention == "auto" else f"_{attention.lower()}")
            against[name] = round(statistics.median(bursts_of(results, compiled_side(attention), point)), 3)
        case = {"model": model.title, "mode": mode, "batch": batch}
        if context != PROMPT:
            case["context"] = context
        rows.append(
            {
                "case": case,
                "unit": "ms/step",
                "ours": round(statistics.median(ours), 3),
                "against": against,
                "tokens_per_s": {
                    side: round(1e3 * batch / statistics.median(ms), 1)
                    for side, ms in (("ours", ours), ("stock", stock))
                },
                "turns": {"ours": ours, "stock": stock},
            }
        )
    for mode, length in itertools.product(args.modes, args.prefill):
        turns = results[f"{sides_of(mode)[1].name}-0"]["turns"].get(f"prefill {length}")
        if turns:
            rows.append(
                {
                    "case": {"model": model.title, "mode": mode, "batch": 1, "prefill": length},
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


def wrong_hits(model: Model, found: dict[str, dict[str, Any]], off: set[str]) -> list[str]:
    """Patches that did not answer exactly as often as the model has layers for them, in batches of known make-up.

    off: those that nobody asked for.
    """
    problems = []
    most = 0 if model.experts else MAX_MIXED
    for case, each in found.items():
        if case == "mixed":
            continue
        answering = (set(model.calls) - off) | ({*model.wholes, MIXTURE} & set(each["hits"]))
        prefilled = PROMPT * (1 if case == "long" else int(case))
        mixed = prefilled <= most
        for patch, count in model.expected(each["steps"] - 1, answering, mixed).items():
            got = each["hits"].get(patch, 0)
            if got != count:
                problems.append(f"case {case}: {patch} answered {got} times in {each['steps']} steps, expected {count}")
    return problems


def wrong_logits(accuracy: list[dict[str, Any]]) -> list[str]:
    """Batch sizes at which more than bfloat16's rounding separates us from float32."""
    return [
        f"{each['mode']}, {each['case']}: our logits' error is {each['error_ratio']:.3f} times stock's"
        f", the median row's {each['median_ratio']:.3f}"
        + (f"; far rows {each['far_rows']}" if "far_rows" in each else "")
        for each in accuracy
        if not each.get("within_bf16_rounding", True)
    ]


def startups(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds from the start of the process to a ready engine, the least of each side."""
    found: dict[str, list[float]] = {}
    for name, result in results.items():
        found.setdefault(name.rpartition("-")[0] or name, []).append(result["startup"])
    return {side: round(min(seconds), 1) for side, seconds in found.items()}


def patches_off(results: dict[str, dict[str, Any]]) -> set[str]:
    """That nobody asked for, in the eager engine with the plugin."""
    rows = results[f"{sides_of('eager')[1].name}-0"]["report"]["rows"]
    return {row["patch"] for row in rows if row["state"] == "off"}


def report_of(results: dict[str, dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """The plugin's rows of one process, but for patches that are off or wait."""
    rows = results[f"{sides_of(mode)[1].name}-0"]["report"]["rows"]
    keys = ("patch", "state", "where", "hits", "declined", "errors", "why")
    return [{key: row[key] for key in keys} for row in rows if row["state"] not in ("off", "waiting")]


def tell(rows: list[dict[str, Any]], accuracy: list[dict[str, Any]]) -> None:
    for row in rows:
        ratio = row["ours"] / row["against"]["stock"]
        case = ", ".join(str(value) for value in row["case"].values())
        turns = [ours / stock for ours, stock in zip(*(row["turns"][side] for side in ("ours", "stock")), strict=True)]
        median = statistics.median(turns)
        print(
            f"{case}: {row['ours']:.2f} {row['unit']}, {row['against']}, ratio {ratio:.3f},"
            f" of a turn {median:.3f} ({min(turns):.3f} to {max(turns):.3f})"
        )
    for each in accuracy:
        keys = ("ours_to_stock", "ours_to_float32", "stock_to_float32")
        told = {key: each[key]["relative_frobenius"] for key in keys if key in each}
        errors = ", ".join(f"{key} {value:.2e}" for key, value in told.items())
        ratio = ""
        if "error_ratio" in each:
            ratio = f"; ratio {each['error_ratio']:.3f}, the median row's {each['median_ratio']:.3f}"
        if "far_rows" in each:
            ratio += f"; far rows {each['far_rows']}"
        print(f"{each['mode']}, {each['case']}: relative Frobenius error of the logits {errors}{ratio}")


def main() -> int:
    args = parse()
    if args.child:
        child(json.loads(args.child))
        return 0
    choose_sampler()
    # Stopped by `timeout`, this ends like an exception, and takes the engine with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = MODELS[args.model].cut(args.layers, args.experts)
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
        accuracy = [compare(out, mode, case, results, model.experts > 0) for mode in args.modes for case in verified]
    rows = rows_of(model, args, results) if args.times else []
    hits = {mode: hits_of(results, mode) for mode in args.modes}
    problems = wrong_hits(model, hits["eager"], patches_off(results)) if "eager" in args.modes else []
    problems += wrong_logits(accuracy)
    if args.reference and args.logits and REFERENCE.name not in results:
        problems.append("the float32 engine came to no result, so the logits were compared with stock's only")
    tell(rows, accuracy)
    more: dict[str, Any] = {
        "setting": {
            "prompt": PROMPT, "sampling": TIMED, "steps": args.steps, "warmup": WARMUP, "rounds": args.rounds,
            "turns": args.turns, "graphs_of_timed_batches_only": args.few_graphs,
            "attention": {name: result["attention"] for name, result in results.items()},
            "weights": "random, the same in every process",
        },
        "startup_seconds": startups(results),
        "hits": hits,
        "logits": accuracy,
        "problems": problems,
        "report": {mode: report_of(results, mode) for mode in args.modes},
        "environment": measure.switches(),
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


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


def modes(text: str) -> list[str]:
    found = text.split(",")
    for mode in found:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"{mode!r} is not one of {', '.join(MODES)}")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--experts", type=int, help="cut the layers to this many routed experts")
    parser.add_argument("--attention", default="", help="vLLM's attention backend for both sides; default: its choice")
    parser.add_argument("--batches", type=numbers, default=[1, 32, 256])
    parser.add_argument("--context", type=numbers, default=[PROMPT], help="tokens of the prompts of timed steps")
    parser.add_argument("--steps", type=int, default=32, help="timed steps per process and batch size")
    parser.add_argument("--modes", type=modes, default=["eager"], help=f"of {', '.join(MODES)}")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side")
    parser.add_argument(
        "--turns", type=int, default=8,
        help="bursts of each side; 0: in eager mode, too, each side has a process, and one burst",
    )  # fmt: skip
    parser.add_argument(
        "--against-compiled", type=_names, nargs="?", default=[], const=["auto"], metavar="BACKEND,...",
        help="stock vLLM in its default mode, too, with each of these attention backends; auto: the one it chooses",
    )  # fmt: skip
    parser.add_argument("--few-graphs", action="store_true", help="compiled engines capture the timed batch sizes only")
    parser.add_argument("--prefill", type=numbers, default=[], help="time prefills of prompts of so many tokens, too")
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
