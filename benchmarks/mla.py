"""Attention to DeepSeek's latent cache in decode steps: ours against FlashMLA and vLLM's Triton kernel, in one run.

    python benchmarks/mla.py [--out DIR]

Writes the record `mla_decode`: GPU time of each, bfloat16, pages of 64 tokens, heads of 512 and 64 elements, the same
inputs for all three, which of our kernels it was, and the relative Frobenius error of each against float64.
FlashMLA's schedule is computed once, outside of what is timed, as vLLM computes it once a step; ours is part of its
kernel. Needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import measure
from vllm_gems.kernels.mla_decode import Latents, hopper_refuses, mla_decode, mla_decode_reference
from vllm_gems.kernels.paged import pages_for, random_pages
from vllm_gems.tuning.timing import gpu_us

LATENT, ROPE, PAGE = 512, 64, 64
EVEN = {16: ((1, 1024), (1, 8192), (1, 65536), (32, 1024), (32, 8192), (128, 1024), (128, 4096))}
EVEN[128] = EVEN[16]
# A few long requests among short ones, lengths that rise steadily, and one that is longer than all others together.
MIXED = {
    "4 of 8192, 28 of 256": (8192,) * 4 + (256,) * 28,
    "64 to 4096": tuple(range(64, 4097, 64)),
    "65536 and 31 of 512": (65536, *(512,) * 31),
}


def inputs_for(num_heads: int, seq_lens: tuple[int, ...]) -> dict[str, Any]:
    num_blocks = sum(pages_for(seq_lens, PAGE)) + 1
    block_table, _ = random_pages(seq_lens, PAGE, num_blocks, "cuda")
    width = LATENT + ROPE
    return {
        "query": torch.randn(len(seq_lens), num_heads, width, device="cuda").bfloat16(),
        "kv_cache": torch.randn(num_blocks, PAGE, width, device="cuda").bfloat16(),
        "block_table": block_table.clamp(max=num_blocks - 1).contiguous(),  # vLLM's, too, names pages that exist
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32, device="cuda"),
    }


def sides_for(num_heads: int, seq_lens: tuple[int, ...]) -> dict[str, Callable[..., torch.Tensor]]:
    """Each returns [num_reqs, num_heads, LATENT]."""
    from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata
    from vllm.v1.attention.backends.mla.triton_mla import _compute_num_kv_splits
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    scale, longest, num_reqs = (LATENT + ROPE) ** -0.5, max(seq_lens), len(seq_lens)
    schedule = get_mla_metadata()[0]
    splits = _compute_num_kv_splits(longest, torch.cuda.get_device_properties(0).multi_processor_count)
    lse = torch.empty((num_reqs, num_heads), dtype=torch.bfloat16, device="cuda")
    one = torch.ones((), device="cuda")
    partial = torch.empty((num_reqs, num_heads, splits, LATENT + 1), dtype=torch.float32, device="cuda")

    def ours(query: Any, kv_cache: Any, block_table: Any, seq_lens: Any) -> torch.Tensor:
        return mla_decode(query, kv_cache, block_table, seq_lens, scale, LATENT, longest)[0]

    def flash_mla(query: Any, kv_cache: Any, block_table: Any, seq_lens: Any) -> torch.Tensor:
        out: torch.Tensor = flash_mla_with_kvcache(
            query.unsqueeze(1), kv_cache.unsqueeze(2), block_table, seq_lens, LATENT, schedule, softmax_scale=scale,
            causal=True,
        )[0]  # fmt: skip
        return out.squeeze(1)

    def triton_mla(query: Any, kv_cache: Any, block_table: Any, seq_lens: Any) -> torch.Tensor:
        out = torch.empty((num_reqs, num_heads, LATENT), dtype=query.dtype, device=query.device)
        keys = kv_cache.unsqueeze(2)
        decode_attention_fwd(
            query, keys, keys[..., :LATENT], out, lse, block_table, seq_lens, partial, splits, scale, PAGE,
            k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip
        return out

    return {"ours": ours, "flash_mla": flash_mla, "triton_mla": triton_mla}


def compare(num_heads: int, title: str, seq_lens: tuple[int, ...]) -> dict[str, Any]:
    nbytes = sum(seq_lens) * (LATENT + ROPE) * 2
    sets = measure.input_sets(lambda: inputs_for(num_heads, seq_lens), nbytes)
    sides = sides_for(num_heads, seq_lens)
    first = sets[0]
    wide = {**first, "query": first["query"].double(), "kv_cache": first["kv_cache"].double()}
    want = mla_decode_reference(**wide, scale=(LATENT + ROPE) ** -0.5, latent=LATENT)[0]
    errors = {name: ((call(**first) - want).norm() / want.norm()).item() for name, call in sides.items()}
    del wide, want
    us = gpu_us(sides, sets, repeats=9)
    return {
        "case": {"heads": num_heads, "requests": len(seq_lens), "tokens": title},
        "unit": "us",
        "kernel": "portable" if hopper_refuses(Latents(num_heads, LATENT, ROPE, PAGE), torch.bfloat16, 0) else "hopper",
        "ours": round(us["ours"], 1),
        "against": {name: round(us[name], 1) for name in sides if name != "ours"},
        "tb_per_s": round(nbytes / us["ours"] / 1e6, 2),
        "errors": {name: float(f"{error:.2e}") for name, error in errors.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the record, instead of benchmarks/results/<gpu>")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    points = [(heads, str(tokens), (tokens,) * count) for heads, cases in EVEN.items() for count, tokens in cases]
    points += [(heads, title, seq_lens) for heads in EVEN for title, seq_lens in MIXED.items()]
    rows = []
    for point in points:
        row = compare(*point)
        rows.append(row)
        ratios = ", ".join(f"{name} {us:.1f} ({row['ours'] / us:.2f})" for name, us in row["against"].items())
        print(
            *row["case"].values(),
            f"ours ({row['kernel']}) {row['ours']:.1f} us, {ratios}",
            row["errors"],
            sep="; ",
            flush=True,
        )
    print(measure.record("mla_decode", rows, folder=args.out, commit=args.commit))


if __name__ == "__main__":
    main()
