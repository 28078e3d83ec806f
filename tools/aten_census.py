"""Which operations of PyTorch do six models dispatch? Their overloads, counts, dtypes and shapes, as a record.

    python tools/aten_census.py [--model NAME,...] [--tiny] [--record-to DIR]

BERT, LLaMA and LLaVA in transformers (one forward pass each, with PyTorch's fused attention and without, and a beam
search of LLaMA), and Qwen2.5, Qwen3 and DeepSeek-V2 in an eager vLLM engine with the plugin off (prefill, decode, and
sampling both greedy and with top-k, top-p, min-p and penalties). Counted is what reaches the dispatcher below autograd,
where an override would be called: composite operations are taken apart by then. On a GPU the models have their public
shapes in half precision, elsewhere they are tiny ones in float32. Every model is in a process of its own.

Writes benchmarks/results/<gpu or cpu>/aten_census.json. A row is an overload of a model: "kind" is "view" for what only
looks at memory differently, "inplace", "out", or "functional"; "dtypes" are calls by the dtypes of the tensor arguments
and "shapes" the commonest of their shapes, both with numbers of calls. `overloads` reads it for others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # run as a script, this file is in no package

RESULTS = ROOT / "benchmarks" / "results"
SHAPES_KEPT = 4
# In transformers, by the names that hf_models has; and in vLLM: (benchmarks/models.py, tools/tiny_models.py).
TRANSFORMERS = ("bert", "llama", "llava")
VLLM = {
    "qwen2.5": ("qwen2.5-7b", "qwen2"),
    "qwen3": ("qwen3-8b", "qwen3"),
    "deepseek-v2": ("deepseek-v2-lite", "deepseek_v2"),
}
MODELS = (*TRANSFORMERS, *VLLM)


@dataclass
class Seen:
    """Calls of one overload."""

    kind: str
    calls: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)

    def row(self, model: str, name: str) -> dict[str, Any]:
        return {
            "case": {"model": model, "op": name},
            "unit": "calls",
            "ours": self.calls,
            "against": {},
            "kind": self.kind,
            "dtypes": dict(self.dtypes.most_common()),
            "shapes": dict(self.shapes.most_common(SHAPES_KEPT)),
        }


def kind(overload: Any) -> str:
    """What its schema says that an overload does with memory."""
    schema = overload._schema
    if any(each.is_out for each in schema.arguments):
        return "out"
    if schema.is_mutable:
        return "inplace"
    return "view" if any(each.alias_info is not None for each in schema.returns) else "functional"


class Census(TorchDispatchMode):
    """While it is entered, counts the calls of this thread that reach PyTorch's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Seen] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            name = str(func).removeprefix("aten.")
            if name not in self.seen:
                self.seen[name] = Seen(kind(func))
            seen = self.seen[name]
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            seen.calls += 1
            seen.dtypes[", ".join(str(each.dtype).removeprefix("torch.") for each in tensors)] += 1
            seen.shapes[", ".join("x".join(map(str, each.shape)) or "scalar" for each in tensors)] += 1
        return func(*args, **kwargs)


def of_transformers(census: Census, name: str, tiny: bool) -> None:
    """Call a model of transformers."""
    import hf_models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for attention in ("sdpa", "eager"):
        subject = hf_models.make(name, tiny=tiny, device=device, attention=attention)
        model = subject.model if tiny else subject.model.half()
        inputs = subject.inputs_for(model.dtype)
        # As they are called by those who do not know inference mode; below autograd there is no difference.
        with torch.no_grad(), census:
            model(**inputs)
            if subject.generates:
                model.generate(**inputs, max_length=inputs["input_ids"].shape[1] + 8, num_beams=5, do_sample=False)
        del model, subject


def of_vllm(census: Census, name: str, tiny: bool, folder: Path) -> None:
    """Serve a model with vLLM in this process."""
    public, small = VLLM[name]
    if tiny:
        import tiny_models

        path = tiny_models.make(small, folder)
    else:
        from benchmarks.models import MODELS as PUBLIC

        path = folder
        (path / "config.json").write_text(json.dumps(PUBLIC[public].config))
    from vllm import LLM, SamplingParams

    gpu = torch.cuda.is_available()
    # The one for latent attention that every CPU has; another, of newer CPUs, does not know float32.
    attention = {} if gpu or name != "deepseek-v2" else {"attention_backend": "CPU_MLA"}
    llm = LLM(
        str(path),
        dtype="bfloat16" if gpu else "float32",
        **attention,
        load_format="auto" if tiny else "dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        seed=0,
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=512,
    )
    prompts = [{"prompt_token_ids": list(range(10, 10 + length))} for length in (40, 7, 3)]
    common = {"max_tokens": 4, "ignore_eos": True, "detokenize": False}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    samplings = (
        SamplingParams(temperature=0.0, **common),
        SamplingParams(temperature=0.8, top_p=0.95, **common),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, **penalties, **common),
        SamplingParams(temperature=0.8, seed=1, logprobs=2, **common),
    )
    with census:
        for sampling in samplings:
            llm.generate(prompts, sampling, use_tqdm=False)


def child(name: str, tiny: bool, answer: Path) -> None:
    """Count one model's operations in this process."""
    census = Census()
    if name in TRANSFORMERS:
        of_transformers(census, name, tiny)
    else:
        with tempfile.TemporaryDirectory() as folder:
            of_vllm(census, name, tiny, Path(folder))
    rows = [seen.row(name, op) for op, seen in sorted(census.seen.items())]
    answer.write_text(json.dumps(rows))


def environment() -> dict[str, str]:
    """For the models' processes: the plugin off, and the engine in the process that counts."""
    import engine

    own = dict(os.environ)
    try:
        os.environ.update(VLLM_GEMS="0", VLLM_ENABLE_V1_MULTIPROCESSING="0")
        engine.prepare(ranks=1)
        return dict(os.environ)
    finally:
        os.environ.clear()
        os.environ.update(own)


def take(names: Iterable[str], tiny: bool) -> list[dict[str, Any]]:
    """The rows of these models. Raises CalledProcessError if a model's process fails."""
    rows = []
    for name in names:
        print(f"{name} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "rows.json"
            command = [sys.executable, "-W", "ignore", __file__, "--child", name, str(answer), *["--tiny"] * tiny]
            subprocess.run(command, env=environment(), check=True)
            found = json.loads(answer.read_text())
        print(f"{name}: {len(found)} overloads, {sum(row['ours'] for row in found)} calls", flush=True)
        rows += found
    return rows


def overloads(path: Path | None = None, wanted: Callable[[dict[str, Any]], bool] = lambda row: True) -> set[str]:
    """The names of a record's overloads, "add.Tensor"; of all records that are here if no path is given.

    wanted: of which rows, for instance `lambda row: row["kind"] != "view"`.
    """
    paths = [path] if path else sorted(RESULTS.glob("*/aten_census.json"))
    rows = [row for each in paths for row in json.loads(each.read_text())["rows"]]
    return {row["case"]["op"] for row in rows if wanted(row)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=lambda text: text.split(","), default=MODELS, help="default: all six")
    parser.add_argument("--tiny", action="store_true", help="small models; always so without a GPU")
    parser.add_argument("--record-to", metavar="DIR", type=Path, help="write to DIR")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.tiny, Path(args.child[1]))
        return
    if unknown := {*args.model} - {*MODELS}:
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    from benchmarks import measure

    tiny = args.tiny or not torch.cuda.is_available()
    rows = take(args.model, tiny)
    path = measure.record(
        "aten_census", rows, folder=args.record_to, command=" ".join(["python", "tools/aten_census.py", *sys.argv[1:]]),
        shapes="tiny" if tiny else "public",
    )  # fmt: skip
    names = {row["case"]["op"] for row in rows}
    views = {row["case"]["op"] for row in rows if row["kind"] == "view"}
    print(f"{len(names)} overloads, {len(views)} of them views; recorded {path}")


if __name__ == "__main__":
    main()
