"""DeepSeek in vLLM's eager mode on its TRITON_MLA backend, with every patch there is for it and then without any.

    python examples/deepseek.py [--model FOLDER] [--layers N] [--max-tokens N]

FOLDER is a DeepSeek-V2 or -V3 checkpoint, DeepSeek-V2-Lite's for example, which fits on one GPU. Without it the model
has DeepSeek-V2-Lite's shapes and random weights; without a GPU it is a tiny DeepSeek, in float32, with the kernels in
Triton's interpreter and vLLM's Triton MLA backend on the CPU (tools/flash_on_cpu.py).

Prints the tokens of both and the report. Exits with 1 if attention's decode steps were not ours, if a kernel failed, or
if tokens differ although the arithmetic is float32; in bfloat16 two right kernels may round apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Run as a script, this file is in no package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import engine
import flash_on_cpu
from setup_env import has_gpu

PROMPTS = ("The capital of France is", "def fibonacci(n):", "The three primary colours are")
# Decode steps of whole layers are on by default. Of a layer that has parts which are not for us (experts on a CPU) the
# other blocks are done, which are off by default.
PATCHES = ("default", "mla.*", "moe.*")
NEEDED = ("decoder.deepseek_v2", "mla.decode_step")


def with_gems() -> None:
    """All that a user has to write."""
    import vllm_gems

    vllm_gems.apply_gems_patches_to_vllm(include=PATCHES)
    if hasattr(vllm_gems, "enable"):
        vllm_gems.enable()


def without_gems() -> None:
    import vllm_gems

    vllm_gems.remove_gems_patches_from_vllm()
    if hasattr(vllm_gems, "disable"):
        vllm_gems.disable()
    if not has_gpu():
        # vLLM's own rotation of these queries is wrong on a CPU, so that this one patch stays.
        vllm_gems.apply_gems_patches_to_vllm(include="rotary.deepseek_scaling,rotary.rotary_embedding")


def model_of(args: argparse.Namespace, scratch: Path) -> tuple[Path, dict[str, Any], list[Any]]:
    """A folder, arguments of `vllm.LLM` that only it needs, and prompts."""
    if args.model:
        return args.model, {}, list(PROMPTS)
    if not has_gpu():
        import tiny_models

        return tiny_models.make("deepseek_v3", scratch), {"max_num_batched_tokens": 512}, list(PROMPTS)
    from benchmarks.models import MODELS
    from benchmarks.serve import random_prompts, register_loader

    register_loader()
    model = MODELS["deepseek-v2-lite"].cut(args.layers)
    (scratch / "config.json").write_text(json.dumps(model.config))
    prompts = random_prompts(len(PROMPTS), model.config["vocab_size"], seed=0)
    return scratch, {"load_format": "seeded", "skip_tokenizer_init": True}, prompts


def generate(llm: Any, prompts: list[Any], max_tokens: int) -> tuple[list[list[int]], list[str]]:
    """Tokens and, where there is a tokenizer, text of greedy decoding."""
    from vllm import SamplingParams

    known = isinstance(prompts[0], str)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=known)
    outputs = [each.outputs[0] for each in llm.generate(prompts, params, use_tqdm=False)]
    return [list(each.token_ids) for each in outputs], [each.text for each in outputs]


def timed(llm: Any, prompts: list[Any], max_tokens: int) -> str:
    """How long a decode step took, prefill and warm-up left out: the difference of two lengths."""
    seconds = []
    for length in (max_tokens, 2 * max_tokens):
        began = time.perf_counter()
        generate(llm, prompts, length)
        seconds.append(time.perf_counter() - began)
    return f"{(seconds[1] - seconds[0]) / max_tokens * 1e3:.1f} ms per decode step of {len(prompts)} requests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a DeepSeek checkpoint")
    parser.add_argument("--layers", type=int, help="of the model with random weights (default: all 27)")
    parser.add_argument("--max-tokens", type=int, help="to generate for each prompt (default: 32, on a CPU 6)")
    args = parser.parse_args()
    gpu = has_gpu()
    max_tokens = args.max_tokens or (32 if gpu else 6)
    os.environ["VLLM_GEMS"] = "1"
    engine.prepare(ranks=1)
    if not gpu:
        flash_on_cpu.install()
    with_gems()

    import vllm

    import vllm_gems

    with tempfile.TemporaryDirectory() as scratch:
        model, options, prompts = model_of(args, Path(scratch))
        llm = vllm.LLM(
            str(model),
            dtype="bfloat16" if gpu else "float32",
            attention_backend="TRITON_MLA" if gpu else "CPU_MLA",  # into which flash_on_cpu has put Triton's
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=4,
            enable_prefix_caching=False,
            seed=0,
            **options,
        )
        ours, our_texts = generate(llm, prompts, max_tokens)
        speed = timed(llm, prompts, max_tokens) if gpu else ""
        report = vllm_gems.report()
        without_gems()
        stock, stock_texts = generate(llm, prompts, max_tokens)
        stock_speed = timed(llm, prompts, max_tokens) if gpu else ""

    used = tuple(row for row in report.rows if row.hits or row.declined or row.errors)
    print(f"\n{dataclasses.replace(report, rows=used)}\n")
    for at, prompt in enumerate(prompts):
        print(prompt if isinstance(prompt, str) else f"prompt {at + 1}, of {len(prompt['prompt_token_ids'])} tokens")
        for name, tokens, texts in (("without", stock, stock_texts), ("with", ours, our_texts)):
            print(f"  {name:8} {tokens[at]} {texts[at]!r}")
    if gpu:
        print(f"without: {stock_speed}\nwith:    {speed}")
    wrong = [f"{row.patch}: the kernel failed {row.errors} times: {row.why}" for row in report.rows if row.errors]
    if not sum(row.hits for row in report.rows if row.patch in NEEDED):
        wrong.append(f"no decode step of attention went through {' or '.join(NEEDED)}; the report says why")
    if not gpu and ours != stock:
        wrong.append("the tokens differ")
    if wrong:
        sys.exit("FAILED: " + "\nFAILED: ".join(wrong))
    same = "the same tokens" if ours == stock else "tokens that rounding tells apart"
    print(f"OK: {sum(map(len, ours))} tokens with the patches, and {same} without")


if __name__ == "__main__":
    main()
