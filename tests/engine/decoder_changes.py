"""What happens around a settled decoder layer, in one engine: warm-up, hooks, new weights, undo, a failure. And top-p.

    python decoder_changes.py MODEL FOUND.json

In a process of its own, which test_decoder.py starts with the plugin on.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import engine  # in tools/
import flash_on_cpu

PROMPTS = [[1, 20, 90, 33, 250], [1, 5]]
TOKENS = 5
PATCH = "decoder.qwen2"


def main() -> None:
    model, target = sys.argv[1], Path(sys.argv[2])
    engine.prepare(ranks=1)
    flash_on_cpu.install()
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer

    import vllm_gems
    from vllm_gems.kernels import decode_attention

    llm = LLM(
        model, dtype="float32", seed=0, enforce_eager=True, max_model_len=128, max_num_batched_tokens=128,
        max_num_seqs=4, enable_prefix_caching=False,
    )  # fmt: skip
    layers: list[Any] = llm.apply_model(lambda model: list(model.model.layers))[0]
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def row() -> Any:
        return next(row for row in vllm_gems.report().rows if row.patch == PATCH)

    def tried() -> dict[str, Any]:
        """Generate; what came out, hits of each layer, and why calls were declined."""
        before = row()
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        after = row()
        names = [layer.self_attn.attn.layer_name for layer in layers]
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "hits": [after.by_layer.get(name, 0) - before.by_layer.get(name, 0) for name in names],
            "declined": [why for why, times in after.declined.items() if times > before.declined.get(why, 0)],
            "settled_layers": sum("forward" in vars(layer) for layer in layers),
            "state": str(after.state),
            "why": after.why,
        }

    found: dict[str, Any] = {"ready": ready(llm)}
    found["plain"] = tried() | {"passes": TOKENS}

    found["top_p"] = top_p()

    hook = layers[0].mlp.down_proj.register_forward_hook(count)
    found["hooked"] = tried() | {"hook_calls": passes}
    hook.remove()
    found["unhooked"] = tried()

    weight = layers[0].mlp.down_proj.weight
    layers[0].mlp.down_proj.weight = torch.nn.Parameter(-2 * weight.data, requires_grad=False)
    found["replaced"] = tried()

    vllm_gems.remove_gems_patches_from_vllm()
    original = Qwen2DecoderLayer.forward
    vllm_gems.apply_gems_patches_to_vllm()
    wrapped = Qwen2DecoderLayer.forward.__wrapped__
    vllm_gems.remove_gems_patches_from_vllm()
    generated = llm.generate(
        [{"prompt_token_ids": ids} for ids in PROMPTS],
        SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True),
        use_tqdm=False,
    )
    found["removed"] = {
        "tokens": [list(output.outputs[0].token_ids) for output in generated],
        "hits": [0 for layer in layers],
        "settled_layers": sum("forward" in vars(layer) for layer in layers),
        "forward_is_the_original": Qwen2DecoderLayer.forward is original is wrapped,
    }

    def broken(*_: Any) -> int:
        raise RuntimeError("broken on purpose")

    decode_attention.splits = broken
    vllm_gems.apply_gems_patches_to_vllm()
    found["failed"] = tried()
    target.write_text(json.dumps(found, indent=1))


def ready(llm: Any) -> dict[str, Any]:
    """What is compiled while requests come and go, after a warm-up, with vLLM's JIT monitor as its workers have it."""
    import triton
    from vllm import SamplingParams
    from vllm.utils import jit_monitor

    import vllm_gems
    from vllm_gems import launch
    from vllm_gems.errors import LateCompileError

    # With this a worker warms up when it has its KV caches. A CPU's does not.
    llm.collective_rpc(lambda worker: worker.model_runner._dummy_run(4))
    before = len(launch.COMPILED)
    jit_monitor.HAS_TRITON = True  # vLLM does not know that there is an interpreter
    jit_monitor.activate(mode="error")
    numbers = random.Random(0)
    for count in (1, 6):  # of which four at a time, so that prompts come while others decode
        prompts = [{"prompt_token_ids": numbers.choices(range(500), k=numbers.randint(1, 9))} for _ in range(count)]
        params = [SamplingParams(temperature=0.0, max_tokens=numbers.randint(2, 4), ignore_eos=True) for _ in prompts]
        llm.generate(prompts, params, use_tqdm=False)
    found = {
        "at_start": before,
        "late": [each.name for each in launch.COMPILED[before:]],
        "hits": sum(row.hits for row in vllm_gems.report().rows if row.patch == PATCH),
    }
    try:
        launch.launcher(dataclasses.replace(next(iter(launch._LAUNCHES))[0], num_warps=16), launch.CPU)
    except LateCompileError as error:
        found["forbidden"] = str(error)
    found["report"] = vllm_gems.report().to_json()["compiled"]
    triton.knobs.runtime.jit_post_compile_hook = None
    return found


def top_p() -> dict[str, Any]:
    """What the sampler calls against vLLM's own for small batches: rows that differ, hits, what was declined."""
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu.sample import states

    import vllm_gems
    from vllm_gems import launch

    torch.manual_seed(0)
    logits = 4 * torch.randn(6, 9000)
    p = torch.tensor([0.05, 0.5, 0.8, 0.9, 0.95, 1.0])
    wanted = topk_topp_sampler.apply_top_k_top_p_pytorch(logits.clone(), None, p)
    wanted[p == 1.0] = logits[p == 1.0]  # vLLM drops what has no probability beside the others
    # By the name that the GPU's sampler has imported.
    got = states.apply_top_k_top_p(logits.clone(), None, p)
    states.apply_top_k_top_p(logits.clone(), torch.full((6,), 5), p)
    # vLLM's warm-up of a sampler has both, and what comes later may have p alone.
    wide = torch.randn(2, 9008)
    states.apply_top_k_top_p(wide.clone(), torch.full((2,), 5), p[:2])
    ready = len(launch.COMPILED)
    states.apply_top_k_top_p(wide, None, p[:2])
    row = next(row for row in vllm_gems.report().rows if row.patch == "sampler.top_p")
    return {
        "late": [each.name for each in launch.COMPILED[ready:]],
        "different": [index for index in range(6) if not torch.equal(got[index], wanted[index])],
        "hits": row.hits,
        "declined": dict(row.declined),
    }


if __name__ == "__main__":
    main()
