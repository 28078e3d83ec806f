"""Variants of the Gluon kernel on a GPU: errors against float64, and times. Each in a process of its own."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VARIANTS: dict[str, dict[str, int]] = {
    "base": {},
    "no opaque": {"OPAQUE": 0},
    "noload": {"ABLATE": 1},
    "nocompute": {"ABLATE": 2},
}


def points() -> list[tuple[int, str, tuple[int, ...]]]:
    from benchmarks.mla import EVEN, MIXED

    found = [(128, f"{count}x{tokens}", (tokens,) * count) for count, tokens in EVEN[128]]
    found += [(128, title, lens) for title, lens in MIXED.items()]
    return [*found, (64, "64h 32x8192", (8192,) * 32), (64, "64h 128x1024", (1024,) * 128)]


def binder(num_heads: int, dtype: Any, options: dict[str, int], device: int = 0) -> Any:
    import torch
    import triton

    from vllm_gems.kernels import mla_decode as portable
    from vllm_gems.kernels.mla_decode_hopper import mla_decode_hopper_kernel
    from vllm_gems.launch import Build, launcher, pointer

    latents = portable.Latents(num_heads, 512, 64, 64)
    settings = {"CONSUMER_REGS": 224, "PRODUCER_REGS": 56, "OPAQUE": 1, "ABLATE": 0, **options}

    def build(split: bool) -> Build:
        x = pointer(dtype)
        types = (
            x, x, x, "*i32", "*i32", x, "*fp32", *(("*fp32", "*fp32", "*i32") if split else (None,) * 3),
            *("i32/16",) * 5, "i32", "i32/16", "i32", "i32", "fp32",
        )  # fmt: skip
        constexprs = (("HEADS", num_heads), ("BLOCK_SIZE", 64), ("SPLIT", split), ("REQS", 256), *settings.items())
        return Build(mla_decode_hopper_kernel, types, constexprs)

    split, whole = launcher(build(True), device), launcher(build(False), device)
    merges = {wide: launcher(portable._merge_build(latents, dtype, wide), device) for wide in (True, False)}
    head_tiles = num_heads // 64
    shares = torch.cuda.get_device_properties(device).multi_processor_count // head_tiles

    def attend(query: Any, kv_cache: Any, block_table: Any, seq_lens: Any, one_share: bool = False) -> Any:
        num_reqs = query.shape[0]
        out = torch.empty((num_reqs, num_heads, 512), dtype=dtype, device="cuda")
        lse = torch.empty((num_reqs, num_heads), dtype=torch.float32, device="cuda")
        rows = 2 * shares * num_heads
        scratch = torch.empty(rows * 513 + 2 * num_reqs, dtype=torch.float32, device="cuda")
        at = scratch.data_ptr()
        head = (
            query.data_ptr(), query.data_ptr() + 1024, kv_cache.data_ptr(), block_table.data_ptr(), seq_lens.data_ptr(),
            out.data_ptr(), lse.data_ptr(),
        )  # fmt: skip
        strides = (*query.stride()[:2], *query.stride()[:2], kv_cache.stride(0), block_table.stride(0), out.stride(0))
        if one_share:
            whole(num_reqs * head_tiles, *head, 0, 0, 0, *strides, num_reqs, 1, 576**-0.5)
            return out, lse
        pieces = at + rows * 513 * 4
        split(
            shares * head_tiles, *head, at, at + rows * 2048, pieces, *strides, num_reqs, shares, 576**-0.5
        )
        wide = num_reqs * num_heads < portable._MERGE_MANY
        block = (portable._MERGE_WIDE if wide else portable._MERGE_NARROW)[1]
        merges[wide](
            num_reqs * num_heads * (512 // block), at, at + rows * 2048, pieces, out.data_ptr(), lse.data_ptr(),
            out.stride(0), shares,
        )  # fmt: skip
        return out, lse

    assert triton.__version__
    return attend


def check(options: dict[str, int]) -> list[str]:
    import torch

    from vllm_gems.kernels.mla_decode import mla_decode_reference
    from vllm_gems.kernels.paged import pages_for, random_pages

    torch.manual_seed(0)
    said = []
    for heads, dtype, lens, one_share in (
        (64, torch.bfloat16, (64,), True),
        (64, torch.bfloat16, (128,), True),
        (64, torch.bfloat16, (640,), True),
        (64, torch.bfloat16, (37,), True),
        (128, torch.bfloat16, (1, 0, 200, 129), True),
        (128, torch.bfloat16, (1, 0, 200, 129), False),
        (128, torch.float16, (1000, 64, 65, 0, 0, 8191, 127, 128, 3), False),
        (64, torch.bfloat16, tuple(range(0, 600, 2)), False),
        (128, torch.bfloat16, (70000, 5, 300), False),
        (128, torch.bfloat16, (4096,) * 70, False),
    ):
        attend = binder(heads, dtype, options)
        num_blocks = sum(pages_for(lens, 64)) + 3
        table, unused = random_pages(lens, 64, num_blocks, "cuda")
        cache = torch.randn(num_blocks, 64, 576, device="cuda").to(dtype)
        cache[unused] = float("inf")
        query = torch.randn(heads, len(lens), 608, device="cuda").to(dtype).transpose(0, 1)[..., :576]
        inputs = {"query": query, "kv_cache": cache, "block_table": table,
                  "seq_lens": torch.tensor(lens, dtype=torch.int32, device="cuda")}  # fmt: skip
        out, lse = attend(**inputs, one_share=one_share)
        again, _ = attend(**inputs, one_share=one_share)
        torch.cuda.synchronize()
        wide = {**inputs, "query": query.double(), "kv_cache": cache.double()}
        want, logs = mla_decode_reference(**wide, scale=576**-0.5, latent=512)
        error = ((out - want).norm() / want.norm()).item()
        live = logs > float("-inf")
        off = (lse - logs)[live].abs().max().item()
        empty = bool((out[~live] == 0).all()) and bool((lse[~live] == float("-inf")).all())
        same = torch.equal(out, again)
        ok = error < 6e-3 and off < 1e-3 and empty and same
        said.append(f"{'ok' if ok else 'BAD'} {heads} {str(dtype)[6:]} {str(lens)[:30]} {one_share} {error:.1e} {off:.1e} {empty} {same}")
    return said


def times(call_for: Any) -> dict[str, float]:
    import torch

    from benchmarks import measure
    from benchmarks.mla import inputs_for
    from vllm_gems.tuning.timing import gpu_us

    torch.manual_seed(1)
    found = {}
    for heads, title, lens in points():
        sets = measure.input_sets(lambda h=heads, n=lens: inputs_for(h, n), sum(lens) * 1152)
        found[title] = round(gpu_us({"it": call_for(heads, lens)}, sets, repeats=5)["it"], 1)
    return found


def one(name: str) -> None:
    import torch

    if name == "flash_mla":
        from benchmarks.mla import sides_for

        print("TIMES " + json.dumps(times(lambda heads, lens: sides_for(heads, lens)["flash_mla"])), flush=True)
        return
    options = VARIANTS[name]
    if not options.get("ABLATE"):
        for line in check(options):
            print("CHECK " + line, flush=True)
    bound = {heads: binder(heads, torch.bfloat16, options) for heads in (64, 128)}
    print("TIMES " + json.dumps(times(lambda heads, lens: bound[heads])), flush=True)


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        one(sys.argv[2])
        return
    names = sys.argv[1:] or ["flash_mla", *VARIANTS]
    results: dict[str, dict[str, float]] = {}
    for name in names:
        begin = time.time()
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=75, cwd=ROOT
            )
            out, err = done.stdout, done.stderr
        except subprocess.TimeoutExpired as stuck:
            out = (stuck.stdout or b"").decode() if isinstance(stuck.stdout, bytes) else stuck.stdout or ""
            err = "TIMEOUT"
        lines = out.splitlines()
        checks = [line[6:] for line in lines if line.startswith("CHECK ")]
        bad = [line for line in checks if not line.startswith("ok")]
        for line in lines:
            if line.startswith("TIMES "):
                results[name] = json.loads(line[6:])
        print(f"== {name}: {len(checks) - len(bad)} ok, {len(bad)} bad, {time.time() - begin:.0f} s", flush=True)
        for line in bad[:6] or checks[-1:]:
            print("  ", line)
        if name not in results:
            print("   ", err.strip()[-700:].replace("\n", "\n    "))
    print("point".ljust(24), *(name.rjust(12) for name in results))
    for _, title, _ in points():
        print(title.ljust(24), *(str(found.get(title, "-")).rjust(12) for found in results.values()), flush=True)


if __name__ == "__main__":
    main()
