"""vLLM's default mode with decode steps of our whole layers, in one engine: tokens, hits, and vLLM's own tokens.

    python captured_graphs.py MODEL FOUND.json

In a process of its own, which test_decoder.py starts with the plugin on. A CPU captures no graphs; what is tried is the
way around the compiled model, by which they would be captured, at every step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine  # in tools/
import flash_on_cpu

PROMPTS = [[1, 20, 90, 33, 250], [1, 5]]
TOKENS = 5


def main() -> None:
    model, target = sys.argv[1], Path(sys.argv[2])
    engine.prepare(ranks=1)
    flash_on_cpu.install()
    from vllm import LLM, SamplingParams
    from vllm.config import CUDAGraphMode

    import vllm_gems
    from vllm_gems.patches import graphs

    modes = [SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode)) for mode in CUDAGraphMode]
    apart = [model.compilation_config.cudagraph_mode.name for model in modes if graphs._full_graphs(model)]
    graphs._full_graphs = lambda model: True
    graphs._not_measured = lambda layer: None
    llm = LLM(
        model, dtype="float32", seed=0, max_model_len=128, max_num_batched_tokens=128, max_num_seqs=4,
        enable_prefix_caching=False, block_size=16,
    )  # fmt: skip

    def tokens() -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    found: dict[str, Any] = {"apart": apart, "ours": tokens()}
    rows = {row.patch: row for row in vllm_gems.report().rows}
    found["rows"] = {name: [rows[name].hits, rows[name].errors] for name in ("graphs.qwen2", "decoder.qwen2")}
    vllm_gems.remove_gems_patches_from_vllm()
    found["stock"] = tokens()
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
