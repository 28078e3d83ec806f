"""The documents' tables of measured results, the report's speed-ups and what decides between us and vLLM, from records.

`python tools/tables.py` reads those under benchmarks/results and rewrites what stands between `<!-- table:NAME -->` and
`<!-- end -->` in the documents, `vllm_gems/measured/<gpu>.json`, and of each patch in a record `patches`
`vllm_gems/tuned/<gpu>/<patch>.json`; with `--check` it exits with 1 if that would change something. A number that no
record has cannot get in this way.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm_gems import faster
from vllm_gems.catalog import catalog
from vllm_gems.tuned import gpu_slug

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = ROOT / "vllm_gems" / "measured"
TUNED = ROOT / "vllm_gems" / "tuned"

Record = dict[str, Any]


def gpus() -> list[str]:
    """The folders of records of GPUs; what is counted on a CPU says nothing of speed."""
    return sorted(path.name for path in RESULTS.glob("*") if path.is_dir() and path.name != "cpu")


# Tables of several records, one for each model: patterns of their names.
_MODELS = tuple(f"serve_modes_{model}" for model in ("qwen2_5_7b", "llama_3_1_8b", "qwen3_8b", "deepseek_v2_lite", "*"))
GATHERED = {"serve_modes": _MODELS, "eager_prefills": _MODELS, "serving": ("serving_*",)}


def load(name: str) -> list[dict[str, Record]]:
    """The records of the table called `name`, by their own names, for every GPU that has any."""
    patterns = GATHERED.get(name, (name,))
    found = [
        [path for pattern in patterns for path in sorted((RESULTS / gpu).glob(f"{pattern}.json"))] for gpu in gpus()
    ]
    return [{path.stem: json.loads(path.read_text()) for path in paths} for paths in found if paths]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def by(rows: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    found: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        found.setdefault(tuple(row["case"].get(key) for key in keys), []).append(row)
    return found


def kernels_gpu(record: Record) -> str:
    """GPU time against vLLM's own op, over models and token counts; bandwidth against a copy at the most tokens."""
    rows = []
    for (op,), group in by(record["rows"], "op").items():
        ratios = [row["ours"] / row["against"]["stock"] for row in group]
        most = max(row["case"]["num_tokens"] for row in group)
        full = [row["against"]["copy"] / row["ours"] for row in group if row["case"]["num_tokens"] == most]
        rows.append((f"`{op}`", f"{geometric_mean(ratios):.2f}", f"{max(ratios):.2f}", f"{min(full):.0%}"))
    every = [row["ours"] / row["against"]["stock"] for row in record["rows"]]
    rows.append(("all", f"**{geometric_mean(every):.2f}**", f"{max(every):.2f}", ""))
    return markdown(("op", "GPU time / vLLM's, geometric mean", "worst", "of a copy's bandwidth at 8192 tokens"), rows)


def host_per_call(record: Record) -> str:
    """Host time through vLLM's layer, patched and not."""
    rows = [
        (
            f"`{row['case']['op']}`",
            str(row["case"]["path"]),
            f"{row['against']['stock']:.1f}",
            f"{row['ours']:.1f}",
            f"{row['ours'] / row['against']['stock']:.2f}",
        )
        for row in record["rows"]
        if "stock" in row["against"]
    ]
    return markdown(("op", "through", "vLLM, us", "with vllm-gems, us", "ratio"), rows)


def serve_eager(record: Record) -> str:
    """Milliseconds of one decode step, and how the turns of one process compare: their spread is the host's noise."""
    compiled = any("stock_compiled" in row["against"] for row in record["rows"])
    rows = []
    for row in record["rows"]:
        case, against = row["case"], row["against"]
        turns = row.get("turns") or {"ours": [row["ours"]], "stock": [against["stock"]]}
        ratios = [ours / stock for ours, stock in zip(turns["ours"], turns["stock"], strict=True)]
        default = f"{against['stock_compiled']:.1f}" if "stock_compiled" in against else ""
        decode = f"decode, batch {case['batch']}" + (f", context {case['context']}" if "context" in case else "")
        rows.append(
            (
                str(case["model"]),
                f"prefill of {case['prefill']} tokens" if "prefill" in case else decode,
                f"{against['stock']:.1f}",
                *((default,) if compiled else ()),
                f"{row['ours']:.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                *((f"{row['ours'] / against['stock_compiled']:.2f}" if default else "",) if compiled else ()),
            )
        )
    mode, ratio = (("vLLM compiled, ms",), ("ratio to compiled",)) if compiled else ((), ())
    head = ("model", "step", "vLLM, ms", *mode, "with vllm-gems, ms", "ratio of a turn, median (range)", *ratio)
    return markdown(head, rows)


def mla_decode(record: Record) -> str:
    """GPU time of DeepSeek's attention against FlashMLA and vLLM's Triton kernel, and the errors against float64."""
    rows = []
    for row in record["rows"]:
        case, against, errors = row["case"], row["against"], row["errors"]
        times = (f"{time:.1f}" for time in (against["flash_mla"], against["triton_mla"], row["ours"]))
        ratios = (f"{row['ours'] / against[peer]:.2f}" for peer in ("flash_mla", "triton_mla"))
        error = f"{errors['ours'] / errors['flash_mla']:.2f}"
        rows.append((str(case["heads"]), str(case["requests"]), str(case["tokens"]), *times, *ratios, error))
    return markdown(
        (
            "heads", "requests", "tokens of each", "FlashMLA, us", "vLLM's Triton, us", "ours, us",
            "ratio to FlashMLA", "ratio to vLLM's Triton", "error / FlashMLA's",
        ),
        rows,
    )  # fmt: skip


def linear(record: Record) -> str:
    """GPU and host time of linear layers against cuBLAS."""
    rows = []
    for (model, layer), group in by(record["rows"], "model", "layer").items():
        for (num_tokens,), units in by(group, "num_tokens").items():
            gpu, host = ({row["unit"]: row for row in units}[unit] for unit in ("us", "us of host time"))
            times = [f"{side:.1f}" for row in (gpu, host) for side in (row["against"]["cublas"], row["ours"])]
            ratio = f"{gpu['ours'] / gpu['against']['cublas']:.2f}"
            rows.append((model, layer, str(num_tokens), *times[:2], ratio, f"{gpu['tb_per_s']:.2f}", *times[2:]))
    head = ("model", "layer", "rows", "cuBLAS, GPU us", "ours", "ratio", "TB/s", "cuBLAS, host us", "ours")
    return markdown(head, rows)


def moe_experts(record: Record) -> str:
    """GPU time and error of experts against vLLM's Triton kernel."""
    rows = []
    for row in record["rows"]:
        ours, stock = row["ours"], row["against"]["vllm_triton"]
        errors = [f"{row['errors'][side]:.1e}" for side in ("vllm_triton", "ours")]
        rows.append(
            (row["case"]["model"], str(row["case"]["num_tokens"]), f"{stock:.1f}", f"{ours:.1f}", f"{ours / stock:.2f}",
             *errors)
        )  # fmt: skip
    return markdown(("model", "tokens", "vLLM, us", "ours, us", "ratio", "vLLM's error", "ours"), rows)


def block_fp8(record: Record) -> str:
    """GPU time of layers with weights in block-wise float8 over vLLM's, by the number of rows, and the errors."""
    rows, counts = [], sorted({row["case"]["rows"] for row in record["rows"]})
    for (op, layer), found in by(record["rows"], "op", "layer").items():
        (stock,) = found[0]["against"]
        pairs = [(row["against"][stock], row["ours"]) for row in found]
        times = [f"{theirs:.1f} → {ours:.1f} ({ours / theirs:.2f})" for theirs, ours in pairs]
        worst = max(row["errors"]["ours"] / row["errors"][stock] for row in found)
        rows.append((f"`{op}`", layer, stock.removeprefix("vllm_"), *times, f"{worst:.2f}"))
    head = ("op", "layer", "vLLM's", *(f"{count} rows, us" for count in counts), "error over vLLM's, worst")
    return markdown(head, rows)


def standalone_host(record: Record) -> str:
    """Host time of the functions that stand beside PyTorch's operations, over PyTorch's."""
    rows = [
        (f"`{row['case']['function']}`", f"{row['against']['aten']:.1f}", f"{row['ours']:.1f}",
         f"{row['ours'] / row['against']['aten']:.2f}", f"{row['by_name']['ours'] / row['by_name']['aten']:.2f}")
        for row in record["rows"]
    ]  # fmt: skip
    return markdown(("function", "PyTorch, us", "ours, us", "ratio", "ratio with arguments by name"), rows)


def eager_budget(record: Record) -> str:
    """Microseconds of a step by part: vLLM's and ours at each batch size."""
    sides = "vLLM", "vllm-gems"
    value = {
        (row["case"]["part"], row["case"]["batch"], side): us
        for row in record["rows"]
        for side, us in zip(sides, (row["against"]["stock"], row["ours"]), strict=True)
    }
    gpu = "GPU at work"
    parts = [part for part in dict.fromkeys(part for part, _, _ in value) if part != gpu]
    columns = list(dict.fromkeys((batch, side) for _, batch, side in value))

    def line(name: str, *summed: str, shown: str = "{:.0f}") -> tuple[str, ...]:
        return name, *(shown.format(sum(value.get((part, *column), 0.0) for part in summed)) for column in columns)

    rows = [line(part, part) for part in parts]
    rows += [line("**the host, in all**", *parts, shown="**{:.0f}**"), line(f"the {gpu}", gpu)]
    return markdown(("part", *(f"{side}, batch {batch}" for batch, side in columns)), rows)


def vllm_suite(record: Record) -> str:
    """vLLM's own tests: passed without and with the plugin."""
    rows = [
        (f"`{row['case']['file']}`", row["case"]["variant"], f"{row['against']['stock']:g}", f"{row['ours']:g}")
        for row in record["rows"]
        if row["unit"] == "tests passed"
    ]
    return markdown(("vLLM's test file", "as", "passed without", "passed with vllm-gems"), rows)


def serve_compiled(record: Record) -> str:
    """Milliseconds of one decode step of the compiled engine against vLLM's attention backends."""
    backends = {"stock": "TRITON_MLA"}
    for row in record["rows"]:
        backends |= {name: name.removeprefix("stock_compiled_").upper() for name in row["against"] if name != "stock"}
    rows = []
    for row in record["rows"]:
        case, against = row["case"], row["against"]
        ratio = f"{row['ours'] / min(against.values()):.3f}"
        times = (f"{against[name]:.2f}" for name in backends)
        step = f"decode, batch {case['batch']}, context {case['context']}"
        rows.append((str(case["model"]), step, *times, f"{row['ours']:.2f}", ratio))
    head = ("model", "step", *(f"vLLM, {name}, ms" for name in backends.values()), "with vllm-gems on TRITON_MLA, ms")
    return markdown((*head, "ratio to the fastest"), rows)


def serve_modes(record: Record) -> str:
    """Tokens per second of decode steps in each of vLLM's modes."""
    modes = ("eager", "compiled")
    rows = []
    decodes = [row for row in record["rows"] if "prefill" not in row["case"]]
    for (model, batch), group in by(decodes, "model", "batch").items():
        cells = []
        for mode in modes:
            found = [row for row in group if row["case"]["mode"] == mode]
            cells += [cell for row in found for cell in _speeds(row)] or [""] * 3
        rows.append((str(model), str(batch), *cells))
    head = [f"{_MODES[mode]}{what}" for mode in modes for what in (": vLLM", ", with vllm-gems", ", gain")]
    return markdown(("model", "requests", *head), rows)


def eager_prefills(record: Record) -> str:
    """Milliseconds of prefills of single prompts in eager mode."""
    rows = [row for row in record["rows"] if "prefill" in row["case"] and row["case"]["mode"] == "eager"]
    return serve_eager({"rows": rows})


def _speeds(row: Record) -> tuple[str, str, str]:
    """Tokens per second of both sides, and the median of the turns' gains."""
    turns = row["turns"]
    gain = statistics.median(stock / ours for ours, stock in zip(turns["ours"], turns["stock"], strict=True))
    stock, ours = (f"{row['tokens_per_s'][side]:.0f}" for side in ("stock", "ours"))
    return stock, ours, f"{gain:.2f}"


_MODES = {"compiled": "default", "eager": "eager"}


def serving(record: Record) -> str:
    """What vLLM's own client measures of `vllm serve`, without and with the plugin."""
    rows = []
    for row in record["rows"]:
        case, stock = row["case"], row["against"]["stock"]
        ratio = row["ours"] / stock
        values = (f"{stock:.{row['digits']}f}", f"{row['ours']:.{row['digits']}f}")
        rows.append((str(case["model"]), _MODES[case["mode"]], str(case["measured"]), *values, f"{ratio:.3f}"))
    return markdown(("model", "mode", "measured", "vLLM", "with vllm-gems", "ratio"), rows)


def default_overrides(record: Record) -> str:
    """The overloads that `enable()` takes here: host and GPU time of both sides at each number of tokens."""
    measured = json.loads(speedups(gpu_slug(record["gpu"])))["speedup"]
    chosen = {name for name, speedup in measured.items() if speedup >= 1}
    counts = sorted({row["case"]["num_tokens"] for row in record["rows"]})
    rows = []
    for (op,), group in sorted(by(record["rows"], "op").items()):
        if op not in chosen:
            continue
        cells = []
        for count in counts:
            (row,) = (each for each in group if each["case"]["num_tokens"] == count)
            host, gpu = (f"{row[name]['aten']:.1f} → {row[name]['ours']:.1f}" for name in ("host", "gpu"))
            cells += [host, gpu, f"{row['ours'] / row['against']['aten']:.2f}"]
        rows.append((f"`{op.removeprefix('aten.')}`", str(group[0]["case"]["dtype"]), *cells))
    head = [f"{count} tokens, {what}" for count in counts for what in ("host us", "GPU us", "ratio of the sums")]
    return markdown(("overload", "dtype", *head), rows)


def model_accuracy(record: Record) -> str:
    """How far results are from the reference without overrides and with them."""
    rows = []
    for row in record["rows"]:
        tokens = {True: "equal", False: "differ", None: ""}[row["tokens_equal"]]
        cells = (f"{row['against']['stock']:.1e}", f"{row['ours']:.1e}", f"{row['cosine']:.6f}", tokens)
        rows.append((row["case"]["model"], row["case"]["dtype"], *cells, str(sum(row["hits"].values()))))
    head = ("model", "dtype", "PyTorch, greatest difference", "with overrides", "least cosine", "tokens", "our calls")
    return markdown(head, rows)


def pretune(record: Record) -> str:
    """What the best configurations gain over the defaults, by kernel."""
    rows = []
    for (kernel,), group in by(record["rows"], "kernel").items():
        gains = [row["against"]["default"] / row["ours"] for row in group]
        cells = (str(len(group)), str(sum(row["candidates"] for row in group)), f"{geometric_mean(gains):.2f}")
        rows.append((f"`{kernel}`", *cells, f"{min(gains):.2f}", f"{max(gains):.2f}"))
    head = ("kernel", "shapes", "right candidates", "default's time / best's, geometric mean", "least", "most")
    return markdown(head, rows)


def patches(record: Record) -> str:
    """Our time over vLLM's own in both modes, over shapes and numbers of tokens, and where vLLM's own runs."""
    rows = []
    for (patch,), group in by(record["rows"], "patch").items():
        points = [(int(tokens), faster.Times(*each)) for row in group for tokens, each in row["times"].items()]
        cells = [f"`{patch}`", str(len(group)), str(len(points))]
        for mode in (faster.EAGER, faster.GRAPH):
            ratios = [times.ratio(mode) for _, times in points]
            own = sum(times.slower(tokens, mode) is not None for tokens, times in points)
            cells += [f"{geometric_mean(ratios):.2f}", f"{max(ratios):.2f}", str(own)]
        rows.append(cells)
    modes, told = (faster.EAGER, faster.GRAPH), ("geometric mean", "worst", "left to vLLM")
    head = [f"{mode}, {what}" for mode in modes for what in told]
    return markdown(("patch", "shapes", "points", *head), rows)


TABLES: dict[str, Callable[[Record], str]] = {
    "kernels_gpu": kernels_gpu,
    "host_per_call": host_per_call,
    "serve_eager_dense": serve_eager,
    "serve_eager_recorded": serve_eager,
    "serve_eager_qwen3_moe": serve_eager,
    "serve_eager_deepseek": serve_eager,
    "serve_eager_deepseek_v3": serve_eager,
    "serve_eager_deepseek_v3_fp8": serve_eager,
    "serve_compiled_deepseek_v3": serve_compiled,
    "serve_modes": serve_modes,
    "eager_prefills": eager_prefills,
    "serving": serving,
    "aten": default_overrides,
    "standalone_host": standalone_host,
    "block_fp8": block_fp8,
    "model_accuracy": model_accuracy,
    "pretune": pretune,
    "patches": patches,
    "linear": linear,
    "mla_decode": mla_decode,
    "moe_experts": moe_experts,
    "eager_budget": eager_budget,
    "deepseek_budget": eager_budget,
    "vllm_suite": vllm_suite,
}


def rendered(name: str) -> str:
    """The tables of every record called `name`, each under a line that says where it comes from."""
    parts = []
    for records in load(name):
        first, *_ = records.values()
        versions = first["versions"]
        if any(each["versions"] != versions for each in records.values()):
            raise ValueError(f"the records of {name} were made with different versions")
        where = f"{first['gpu']}, vLLM {versions['vllm']}, PyTorch {versions['torch']}, Triton {versions['triton']}"
        source = "; ".join(f"`{stem}.json`, {_made(each)}" for stem, each in records.items())
        whole = {**first, "rows": [row for each in records.values() for row in each["rows"]]}
        parts.append(f"{where} ({source}):\n\n{TABLES[name](whole)}")
    return "\n\n".join(parts) or "Not measured yet."


def _made(record: Record) -> str:
    switches = (f", `{name}={value}`" for name, value in record.get("environment", {}).items())
    return f"{record['date']}, commit {record['commit'][:10]}{''.join(switches)}"


def updated(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{rendered(match[2])}\n<!-- end -->"

    return re.sub(r"(<!-- table:(\w+) -->).*?<!-- end -->", replace, text, flags=re.DOTALL)


def speedups(gpu: str) -> str:
    """What `vllm_gems/measured/<gpu>.json` holds: patch -> vLLM's time over ours, the geometric mean over its kernels.

    Host time through the layer for patches of layers, GPU time over all shapes for patches of ops. Of PyTorch's
    operations the least over the shapes and over all runs (records called aten and something), host and GPU time
    together, because one that is slower anywhere is no default.
    """
    rows: dict[str, list[Record]] = {}
    for name in ("host_per_call", "kernels_gpu", "aten"):
        for path in sorted((RESULTS / gpu).glob(f"{name}*.json")):
            rows.setdefault(name, []).extend(json.loads(path.read_text())["rows"])
    layers = by((row for row in rows.get("host_per_call", ()) if row["case"]["path"] == "layer"), "op")
    ops = by(rows.get("kernels_gpu", ()), "op")
    found = {}
    for patch in catalog().patches.values():
        measured = ops if patch.name.startswith("op.") else layers
        group = [row for name in patch.kernels for row in measured.get((name,), ()) if patch.seam in _MEASURED_SEAMS]
        if group:
            found[patch.name] = round(geometric_mean([row["against"]["stock"] / row["ours"] for row in group]), 2)
    for (name,), group in sorted(by(rows.get("aten", ()), "op").items()):
        found[name] = math.floor(100 * min(row["against"]["aten"] / row["ours"] for row in group)) / 100
    return json.dumps({"speedup": found}, indent=1) + "\n"


def decisions(gpu: str) -> dict[str, str]:
    """Of each patch that was measured against vLLM on this GPU: what `vllm_gems/tuned/<gpu>/<patch>.json` holds.

    Raises ValueError for shapes of one patch that were measured with different kernels.
    """
    path = RESULTS / gpu / "patches.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    found = {}
    for (patch,), group in by(record["rows"], "patch").items():
        sources = {row["source"] for row in group}
        if len(sources) > 1:
            raise ValueError(f"{path}: {patch} was measured with several kernels")
        configurations = ",\n  ".join(f"{json.dumps(row['case']['key'])}: {json.dumps(row['times'])}" for row in group)
        head = json.dumps({"gpu": record["gpu"], "versions": record["modules"], "source": sources.pop()}, indent=1)
        found[patch] = f'{head[:-2]},\n "configurations": {{\n  {configurations}\n }}\n}}\n'
    return found


# The layers that benchmarks/kernels.py times; others share kernels with them, but not vLLM's side.
_MEASURED_SEAMS = {
    "layer.rms_norm", "layer.rotary_embedding", "layer.silu_and_mul",
    "op.rms_norm", "op.fused_add_rms_norm", "op.rotary_embedding", "op.silu_and_mul",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something would")
    args = parser.parse_args()
    wanted = {document: updated(document.read_text()) for document in DOCUMENTS}
    for gpu in gpus():
        wanted[MEASURED / f"{gpu}.json"] = speedups(gpu)
        wanted |= {TUNED / gpu / f"{patch}.json": text for patch, text in decisions(gpu).items()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if not args.check:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
