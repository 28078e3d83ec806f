"""Run models in a real vLLM engine, in this fresh process, and write down what they generated.

    python tools/engine.py SPEC.json RESULT.json

SPEC is `{"jobs": [JOB, ...], "watch": false, "flash": false}`; the fields of a job are those of `Job`, and "flash" asks
for vLLM's FlashAttention backend on a CPU (`flash_on_cpu`). RESULT has, for each job by its
name, "dtype", "tokens", "texts", "scores", "hits" (by patch) and "seconds"; and of the process at its end the plugin's
"report" and the same as a "table" (null and empty if it is off), the "modules" of the plugin that were imported, the
keys of what is in vLLM's cache of "compiled" code, and if SPEC asks to "watch", which methods of vLLM's layers have
"changed".

This program never mentions the plugin to vLLM: that vLLM finds it by its entry point is part of what is tried. Whether
it is switched on, how many processes vLLM starts and where reports go is for the caller to say in the environment;
what a CPU needs there besides is set here (`prepare`).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flash_on_cpu
from setup_env import has_gpu  # a neighbour of this file; by the driver's tool, since vLLM must be first to touch CUDA

# vLLM kills processes that do not end within 5 seconds, and a report is the last thing that a process writes.
PATIENCE_S = 60


@dataclasses.dataclass(frozen=True)
class Job:
    """One model in one engine, or in transformers, which is the referee where vLLM's own CPU kernels are wrong."""

    name: str
    model: str
    dtype: str = ""  # "float32" on a CPU and "bfloat16" on a GPU unless the job says
    runner: str = "vllm"  # or "transformers": eager attention, no cache, no tricks
    # Prompts as token ids; or as text, which goes through the model's chat template if there is one.
    prompts: tuple[Any, ...] = ()
    max_tokens: int = 16
    # Sequences of token ids: what was the logarithm of the probability of each, given those before it?
    score: tuple[Any, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more arguments of vllm.LLM


def prepare(ranks: int) -> None:
    """Set what vLLM reads from the environment, before it is imported; what the caller has set stays."""
    defaults = {
        "HF_HUB_OFFLINE": "1",  # every model is a folder here
        "VLLM_NO_USAGE_STATS": "1",
        # On a CPU vLLM warns dozens of times of what a CPU does not have.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the report of this process is then the whole report
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": str(PATIENCE_S),
    }
    if has_gpu():
        defaults["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # it would compile itself with a CUDA toolkit
    else:
        # Triton's CPU is its interpreter, and it must know before it is first imported.
        defaults["TRITON_INTERPRET"] = "1"
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; vLLM would take half of the machine's memory
        # vLLM wants a NUMA node for each rank and a core for itself; a small machine has neither.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if ranks > 1:
            defaults["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        # "Disabling Triton": true of vLLM's own kernels, and misleading about ours.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def say(text: str) -> None:
    """One line of progress."""
    print(f"  {text}", flush=True)


def _report() -> Any:
    """The plugin's report, or None if it is off or vLLM has not loaded it; asking must not be what loads it."""
    if "vllm_gems.api" not in sys.modules:
        return None
    import vllm_gems

    return vllm_gems.report()


def _hits() -> dict[str, int]:
    """Calls that each patch has answered so far in this process."""
    hits: dict[str, int] = {}
    for row in report.rows if (report := _report()) else ():
        hits[row.patch] = hits.get(row.patch, 0) + row.hits
    return hits


def _is_text(prompts: tuple[Any, ...]) -> bool:
    return all(isinstance(prompt, str) for prompt in prompts)


def _with_template(tokenizer: Any, prompt: Any) -> Any:
    """A prompt as vLLM takes it: token ids as they are, text as a user's turn if the model knows about turns."""
    if not isinstance(prompt, str):
        return {"prompt_token_ids": prompt}
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _known(model: str) -> None:
    """Spare vLLM the process of 20 seconds in which it looks at an architecture that it meets for the first time."""
    from vllm import ModelRegistry

    for name in json.loads((Path(model) / "config.json").read_text())["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _portable_attention(model: str) -> dict[str, Any]:
    """The backend that every CPU has, for a model with latent attention: the one for AMX does no float32."""
    if has_gpu() or "kv_lora_rank" not in json.loads((Path(model) / "config.json").read_text()):
        return {}
    return {"attention_backend": "CPU_MLA"}


def run_vllm(job: Job) -> dict[str, Any]:
    """Generate greedily and score in a vLLM engine."""
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    # vLLM warms up with as many tokens as it may meet at once, which takes minutes in Triton's interpreter.
    small = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 4, "enable_prefix_caching": False}
    quiet = {"use_tqdm_on_load": False, "disable_log_stats": True}
    options = {"enforce_eager": True, **small, **quiet, **_portable_attention(job.model), **job.options}
    llm = LLM(job.model, dtype=job.dtype, seed=0, **options)
    say(f"{job.name}: engine started in {time.monotonic() - started:.0f} s")
    tokens: list[list[int]] = []
    texts: list[str] = []
    if job.prompts:
        say(f"{job.name}: generating {len(job.prompts)} x {job.max_tokens} tokens ...")
        began = time.monotonic()
        # Prompts of token ids are there to be compared: as many tokens as were asked for, whatever they are.
        params = SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=not _is_text(job.prompts))
        prompts = [_with_template(llm.get_tokenizer(), prompt) for prompt in job.prompts]
        for output in llm.generate(prompts, params, use_tqdm=False):
            tokens.append(list(output.outputs[0].token_ids))
            texts.append(output.outputs[0].text)
        say(f"{job.name}: {sum(map(len, tokens))} tokens in {time.monotonic() - began:.1f} s")
    scores: list[list[float]] = []
    if job.score:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        for output in llm.generate([{"prompt_token_ids": ids} for ids in job.score], params, use_tqdm=False):
            pairs = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))
            scores.append([found[token].logprob for token, found in pairs[1:]])
        say(f"{job.name}: {len(scores)} sequences scored")
    llm.llm_engine.engine_core.shutdown(timeout=PATIENCE_S)
    return {"tokens": tokens, "texts": texts, "scores": scores}


def run_transformers(job: Job) -> dict[str, Any]:
    """The same in transformers, the whole sequence anew for each token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation="eager", **job.options
    ).eval()

    def log_probabilities(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)

    tokens: list[list[int]] = []
    for prompt in job.prompts:
        ids = list(prompt)
        for _ in range(job.max_tokens):
            ids.append(int(log_probabilities(ids)[-1].argmax()))
        tokens.append(ids[len(prompt) :])
    scores = []
    for ids in job.score:
        table = log_probabilities(list(ids))
        scores.append([float(table[position, token]) for position, token in enumerate(ids[1:])])
    say(f"{job.name}: generated and scored by transformers")
    return {"tokens": tokens, "texts": [], "scores": scores}


RUNNERS = {"vllm": run_vllm, "transformers": run_transformers}


def layers_of_vllm() -> set[type]:
    """The classes that vLLM's models are built of and plugins may replace, and what they inherit from."""
    import vllm.model_executor.layers.activation
    import vllm.model_executor.layers.layernorm
    import vllm.model_executor.layers.rotary_embedding  # noqa: F401  (they register their classes)
    from vllm.model_executor.custom_op import op_registry

    return {base for cls in op_registry.values() for base in cls.__mro__ if base.__module__.startswith("vllm.")}


def methods(classes: set[type]) -> dict[str, object]:
    """Everything that can be called on these classes, as it is now."""
    return {
        f"{cls.__module__}:{cls.__qualname__}.{name}": value
        for cls in classes
        for name, value in vars(cls).items()
        if callable(value) or isinstance(value, (staticmethod, classmethod))
    }


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    spec = json.loads(Path(sys.argv[1]).read_text())
    dtype = "bfloat16" if has_gpu() else "float32"
    jobs = [Job(**{"dtype": dtype, **fields}) for fields in spec["jobs"]]
    prepare(max(job.options.get("tensor_parallel_size", 1) for job in jobs))
    if spec.get("flash"):
        flash_on_cpu.install()
    watched = layers_of_vllm() if spec.get("watch") else set()
    before = methods(watched)
    results: dict[str, Any] = {}
    for number, job in enumerate(jobs):
        started, hits = time.monotonic(), _hits()
        if number:  # the first goes the way that every user's engine goes
            _known(job.model)
        answer = RUNNERS[job.runner](job)
        gc.collect()  # the engine's memory, before the next one asks how much there is
        answer["hits"] = {name: count - hits.get(name, 0) for name, count in _hits().items()}
        results[job.name] = {"dtype": job.dtype, "seconds": round(time.monotonic() - started, 1), **answer}
    from vllm import envs

    compiled = Path(envs.VLLM_CACHE_ROOT, "torch_compile_cache")
    after, report = methods(watched), _report()
    result: dict[str, Any] = {
        "jobs": results,
        "report": report.to_json() if report else None,
        "table": str(report) if report else "",
        "compiled": sorted(path.name for path in compiled.glob("*/*")),
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "vllm_gems"),
        "changed": sorted(name for name in {*before, *after} if after.get(name) is not before.get(name)),
    }
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
