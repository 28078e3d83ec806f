"""Which models, dtypes and situations the engine tests run, and how one process with an engine in it is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("qwen2", "qwen3", "gemma3", "deepseek_v2", "deepseek_v3")
# Stock vLLM rotates the 3-D queries of these models wrongly on a CPU, so that transformers is the referee.
REFEREED = ("deepseek_v2", "deepseek_v3")
DTYPES = ("float32", "bfloat16")
# Dense models whose decoder layers are replaced as a whole, in a process where vLLM's FlashAttention backend runs on
# the CPU (tools/flash_on_cpu.py); these patches are asked for by name.
DENSE = ("qwen2", "qwen3", "llama")
# Models with latent attention run vLLM's Triton MLA backend there.
DECODER = {"VLLM_GEMS_INCLUDE": "decoder.*,attention.*,mla.*,sampler.*,layernorm.*,rotary.*,activation.*"}
# Prefills in pieces, so that they share batches with decoding requests, and prompts that find their prefix cached.
CHUNKED = {"max_num_batched_tokens": 16, "enable_prefix_caching": True, "block_size": 16}
# Two at a time, of which the first is at the model's limit after two tokens: the third's prompt is in a pass with the
# second's third token, between passes that only decode.
MIXED_PROMPTS = [[1, *range(100, 121)], [1, *range(200, 211)], [1, 5, 9, 30, 4]]
MIXED_TOKENS = 4
MIXED = {"max_model_len": 24, "max_num_batched_tokens": 64, "max_num_seqs": 2}
PROMPTS = [[1, 20, 90, 33, 250, 300, 7, 8], [1, *range(100, 120)], [1, 5]]
TOKENS = 8
# Any tokens do, as long as they are the same ones: what is compared is the probability that each run gives them.
SEQUENCES = [[1, *((37 * i + 101 * k) % 500 + 4 for i in range(47))] for k in range(4)]
# vLLM's default mode compiles these layers itself and calls no replacement; this asks for the layers' own kernels.
COMPILED = {
    "enforce_eager": False,
    "compilation_config": {"custom_ops": ["none", "+rms_norm", "+silu_and_mul", "+rotary_embedding"]},
}
CAN_COMPILE = any(map(shutil.which, ("g++", "clang++")))
LIMIT_S = 1200


@dataclass(frozen=True)
class Run:
    """What one process left behind: the file that tools/engine.py wrote, and a report of each process of vLLM's."""

    result: dict[str, Any]
    reports: tuple[dict[str, Any], ...]

    def job(self, name: str) -> dict[str, Any]:
        return self.result["jobs"][name]


def environment(cache: Path, **variables: str) -> dict[str, str]:
    """This process's environment without what a user's shell says to vLLM, and with vLLM's caches in `cache`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return {**kept, "VLLM_CACHE_ROOT": str(cache), **variables}


def checked(command: list[str], log: Path, environ: dict[str, str]) -> None:
    """Run to the end; a failure shows the end of what the process said."""
    with log.open("w") as output:
        try:
            subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environ, timeout=LIMIT_S, check=True)
        except subprocess.SubprocessError as error:
            raise RuntimeError(f"{error}\n{log.read_text(errors='replace')[-3000:]}") from None


def jobs_of_all_models(tiny: Path) -> Iterator[dict[str, Any]]:
    """Each model in each dtype, and one in compiled mode."""
    for model in MODELS:
        for dtype in DTYPES:
            yield {
                "name": f"{model} {dtype}",
                "model": str(tiny / model),
                "dtype": dtype,
                "prompts": PROMPTS if dtype == "float32" else [],
                "max_tokens": TOKENS,
                "score": SEQUENCES,
            }
    if CAN_COMPILE:
        yield one_job(tiny, "compiled", **COMPILED)


def referee_jobs(tiny: Path) -> Iterator[dict[str, Any]]:
    for model in REFEREED:
        yield {
            "name": f"{model} transformers",
            "model": str(tiny / model),
            "dtype": "float32",
            "runner": "transformers",
            "prompts": PROMPTS,
            "max_tokens": TOKENS,
            "score": SEQUENCES,
        }
    yield {
        "name": "mixed transformers",
        "model": str(tiny / "deepseek_v2"),
        "dtype": "float32",
        "runner": "transformers",
        "prompts": MIXED_PROMPTS,
        "max_tokens": MIXED_TOKENS,
    }


def llama_job(tiny: Path) -> dict[str, Any]:
    """What is right for the dense model that no other test has."""
    return {**one_job(tiny, "llama float32"), "model": str(tiny / "llama")}


def decoder_jobs(tiny: Path) -> Iterator[dict[str, Any]]:
    """Each dense model with whole prompts, one with prompts in pieces, and those with latent attention the same way."""
    for model in DENSE:
        yield {**one_job(tiny, model), "model": str(tiny / model)}
    yield {**one_job(tiny, "chunked", **CHUNKED), "model": str(tiny / "qwen3")}
    for model in REFEREED:
        yield {**one_job(tiny, model), "model": str(tiny / model)}
    mixed = {"model": str(tiny / "deepseek_v2"), "prompts": MIXED_PROMPTS, "max_tokens": MIXED_TOKENS}
    yield {**one_job(tiny, "mixed", **MIXED), **mixed}


def one_job(tiny: Path, name: str, **options: Any) -> dict[str, Any]:
    """The smallest model, tokens only."""
    model = str(tiny / "qwen2")
    return {"name": name, "model": model, "dtype": "float32", "prompts": PROMPTS, "max_tokens": TOKENS} | {
        "options": options
    }


def run_engine(
    here: Path, jobs: list[dict[str, Any]], watch: bool, environ: dict[str, str], flash: bool = False
) -> Run:
    """Run tools/engine.py in a fresh process, with what it reads and writes in the folder `here`.

    The caches are shared with the other runs, as a user's are: what is compiled with the plugin off must not be loaded
    with it on.
    """
    here.mkdir()
    (here / "spec.json").write_text(json.dumps({"jobs": jobs, "watch": watch, "flash": flash}))
    engine = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "engine.py")]
    variables = environment(here.parent / "cache", VLLM_GEMS_REPORT=str(here / "reports"), **environ)
    checked([*engine, str(here / "spec.json"), str(here / "result.json")], here / "log", variables)
    return Run(
        json.loads((here / "result.json").read_text()),
        tuple(json.loads(report.read_text()) for report in sorted((here / "reports").glob("*.json"))),
    )
