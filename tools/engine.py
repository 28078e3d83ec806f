"""Run models in a real vLLM engine, in this fresh process, and write down what they generated.

    python tools/engine.py SPEC.json RESULT.json

SPEC is `{"jobs": [JOB, ...], "watch": false}`; the fields of a job are those of `Job`. RESULT is
`{"jobs": {name: {"tokens", "texts", "scores", "hits", "seconds"}}, "report", "modules", "changed"}`.

This program never mentions the plugin to vLLM: that vLLM finds it by its entry point is part of what is tried. Whether
it is switched on, how many processes vLLM starts and where reports go is for the caller to say in the environment;
what a CPU needs there besides is set here (`prepare`).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """One model in one engine, or in transformers, which is the referee where vLLM's own CPU kernels are wrong."""

    name: str
    model: str
    dtype: str
    runner: str = "vllm"  # or "transformers": eager attention, no cache, no tricks
    # Prompts as token ids; or as text, which goes through the model's chat template if there is one.
    prompts: tuple[Any, ...] = ()
    max_tokens: int = 16
    # Sequences of token ids: what was the logarithm of the probability of each, given those before it?
    score: tuple[Any, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more arguments of vllm.LLM


def has_gpu() -> bool:
    """Whether the NVIDIA driver answers; CUDA itself must stay untouched until vLLM has started its processes."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def prepare(ranks: int) -> None:
    """Set what vLLM reads from the environment, before it is imported; what the caller has set stays."""
    defaults = {
        "HF_HUB_OFFLINE": "1",  # every model is a folder here
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the report of this process is then the whole report
        "TOKENIZERS_PARALLELISM": "false",
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
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def say(text: str) -> None:
    """One line of progress."""
    print(f"  {text}", flush=True)


def _hits() -> dict[str, int]:
    """Calls that each patch has answered so far in this process; none if vLLM has not loaded the plugin."""
    if "vllm_gems.plugin" not in sys.modules:
        return {}
    import vllm_gems

    hits: dict[str, int] = {}
    for row in vllm_gems.report().rows:
        hits[row.patch] = hits.get(row.patch, 0) + row.hits
    return hits


def _with_template(tokenizer: Any, prompt: Any) -> Any:
    """A prompt as vLLM takes it: token ids as they are, text as a user's turn if the model knows about turns."""
    if not isinstance(prompt, str):
        return {"prompt_token_ids": prompt}
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def run_vllm(job: Job) -> dict[str, Any]:
    """Generate greedily and score in a vLLM engine."""
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    options = {"max_model_len": 512, "enforce_eager": True, "enable_prefix_caching": False, **job.options}
    llm = LLM(job.model, dtype=job.dtype, seed=0, **options)
    say(f"{job.name}: engine started in {time.monotonic() - started:.0f} s")
    tokens: list[list[int]] = []
    texts: list[str] = []
    greedy = SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True)
    for prompt in job.prompts:
        began = time.monotonic()
        (output,) = llm.generate([_with_template(llm.get_tokenizer(), prompt)], greedy, use_tqdm=False)
        tokens.append(list(output.outputs[0].token_ids))
        texts.append(output.outputs[0].text)
        say(f"{job.name}: {len(tokens[-1])} tokens in {time.monotonic() - began:.1f} s: {texts[-1]!r}")
    scores: list[list[float]] = []
    if job.score:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        for output in llm.generate([{"prompt_token_ids": ids} for ids in job.score], params, use_tqdm=False):
            pairs = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))
            scores.append([found[token].logprob for token, found in pairs[1:]])
        say(f"{job.name}: {len(scores)} sequences scored")
    llm.llm_engine.engine_core.shutdown()
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


def methods_of_vllm() -> dict[str, object]:
    """Every function in every class of vLLM that can be replaced layer-wise, as it is now."""
    import vllm.model_executor.layers.activation
    import vllm.model_executor.layers.layernorm
    import vllm.model_executor.layers.rotary_embedding
    from vllm.model_executor.custom_op import op_registry

    classes = {base for cls in op_registry.values() for base in cls.__mro__ if base.__module__.startswith("vllm.")}
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
    jobs = [Job(**fields) for fields in spec["jobs"]]
    prepare(max(job.options.get("tensor_parallel_size", 1) for job in jobs))
    before = methods_of_vllm() if spec.get("watch") else {}
    results: dict[str, Any] = {}
    for job in jobs:
        started, hits = time.monotonic(), _hits()
        results[job.name] = RUNNERS[job.runner](job)
        gc.collect()  # the engine's memory, before the next one asks how much there is
        results[job.name]["hits"] = {name: count - hits.get(name, 0) for name, count in _hits().items()}
        results[job.name]["seconds"] = round(time.monotonic() - started, 1)
    after = methods_of_vllm() if before else {}
    result: dict[str, Any] = {
        "jobs": results,
        "report": None,
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "vllm_gems"),
        "changed": sorted(name for name, value in before.items() if after.get(name) is not value),
    }
    if "vllm_gems.plugin" in sys.modules:
        import vllm_gems

        result["report"] = vllm_gems.report().to_json()
        result["table"] = str(vllm_gems.report())
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
