"""BERT, LLaMA and LLaVA of transformers with PyTorch's operations replaced by ours: what changes in their results?

    python examples/model_accuracy.py --model bert|llama|llava[,...] [--path FOLDER] [--include GLOBS] [--tiny]

Every model runs in float32 as PyTorch has it, which is the reference, and then in each dtype without ("stock") and with
("ours") `vllm_gems.use_gems`. Compared are the last hidden states of BERT and the logits of the others, at every token
that is not padding. In float32 the results must agree within 1e-3, absolute and relative; in half precision within
1e-3, or by a cosine of at least 0.99 at the worst token. LLaMA generates besides, with five beams and up to
--max-length tokens, with and without: in float32 the tokens must be the same; in half precision two right kernels may
round apart, and it is only said.

Without --path the weights are random, in the public shapes (bert-base, LLaMA-2-7B, LLaVA-1.5-7B), or tiny with --tiny.
Exits with 1 if anything is not as it should be, and that is also so if nothing of ours ran or a kernel failed. --record
writes benchmarks/results/<gpu>/model_accuracy.json.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import hf_models
from hf_models import Subject

import vllm_gems

DTYPES = ("float32", "float16", "bfloat16")
CLOSE = 1e-3
COSINE = 0.99
Overrides = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Row:
    """A model in a dtype: how far its results are from float32's, and what ran of ours."""

    model: str
    dtype: str
    stock: float  # the greatest absolute difference, without overrides
    ours: float  # and with them
    cosine: float  # ours, at the worst token
    close: bool  # ours, within CLOSE
    tokens: bool | None  # whether the same ones were generated; None if none are
    hits: int
    failed: tuple[str, ...]  # what the report says of kernels that raised

    def complaints(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [f"{self.model}, {self.dtype}: {text}" for text in self.failed]
        where = f"{self.model}, {self.dtype}"
        if not self.hits:
            found.append(f"{where}: none of our kernels ran")
        if not self.close and (self.dtype == "float32" or not self.cosine >= COSINE):
            found.append(f"{where}: differs from float32 by {self.ours:.3g}, cosine {self.cosine:.6f}")
        if self.dtype == "float32" and self.tokens is False:
            found.append(f"{where}: other tokens are generated")
        return found

    def record(self) -> dict[str, Any]:
        return {
            "case": {"model": self.model, "dtype": self.dtype},
            "unit": "greatest absolute difference from float32",
            "ours": self.ours,
            "against": {"stock": self.stock},
            "cosine": self.cosine,
            "allclose": self.close,
            "tokens_equal": self.tokens,
            "hits": self.hits,
        }


@torch.inference_mode()
def outputs(subject: Subject, model: Any) -> torch.Tensor:
    """The results that are compared, in float64, one row for each token that is not padding."""
    found = model(**subject.inputs_for(model.dtype))[subject.result]
    return found[subject.inputs["attention_mask"].bool()].double()


@torch.inference_mode()
def generated(subject: Subject, model: Any, max_length: int) -> torch.Tensor | None:
    """The tokens of beam search."""
    if not subject.generates:
        return None
    return model.generate(**subject.inputs_for(model.dtype), max_length=max_length, num_beams=5, do_sample=False)


def worst_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())


def counted() -> tuple[int, list[str]]:
    """Calls that our kernels have answered in this process so far, and what became of those that failed."""
    rows = vllm_gems.report().rows
    failed = [f"{row.patch} failed {row.errors} times: {row.why}" for row in rows if row.errors]
    return sum(row.hits for row in rows), failed


def compare(
    subject: Subject, overrides: Overrides, dtypes: Iterable[str] = DTYPES, max_length: int = 100
) -> tuple[list[Row], str]:
    """A row for each dtype, and the report's table as it was under the last one's overrides."""
    reference = outputs(subject, subject.model)
    rows, table = [], ""
    for name in dtypes:
        dtype = getattr(torch, name)
        model = subject.model if dtype is torch.float32 else copy.deepcopy(subject.model).to(dtype)
        stock = outputs(subject, model)
        wanted = generated(subject, model, max_length)
        before, _ = counted()
        with overrides():
            ours = outputs(subject, model)
            got = generated(subject, model, max_length)
            hits, failed = counted()
            table = vllm_gems.report().text(everything=False)
        rows.append(
            Row(
                subject.name,
                name,
                stock=float((stock - reference).abs().max()),
                ours=float((ours - reference).abs().max()),
                cosine=worst_cosine(ours, reference),
                close=torch.allclose(ours, reference, rtol=CLOSE, atol=CLOSE),
                tokens=None if wanted is None or got is None else torch.equal(wanted, got),
                hits=hits - before,
                failed=tuple(failed),
            )
        )
        del model
    return rows, table


def told(rows: Iterable[Row]) -> str:
    """The table that is printed."""
    lines = [f"{'model':8}{'dtype':10}{'stock':>10}{'ours':>10}{'cosine':>10}  {'tokens':8}{'hits':>9}"]
    for row in rows:
        tokens = {True: "equal", False: "differ", None: "-"}[row.tokens]
        numbers = f"{row.stock:>10.2e}{row.ours:>10.2e}{row.cosine:>10.6f}"
        lines.append(f"{row.model:8}{row.dtype:10}{numbers}  {tokens:8}{row.hits:>9}")
    return "\n".join(lines)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=names, default=list(hf_models.SUBJECTS), help="default: all, one after the other"
    )
    parser.add_argument("--path", type=Path, help="a folder with real weights of the one --model")
    parser.add_argument("--include", type=names, help="names or globs of what is replaced; default: the default set")
    parser.add_argument("--exclude", type=names, help="names or globs of what is not")
    parser.add_argument("--dtype", type=names, default=list(DTYPES), help="default: %(default)s")
    parser.add_argument(
        "--max-length", type=int, default=100, help="tokens of LLaMA, the prompt's counted (%(default)s)"
    )
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="transformers' (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small random models")
    parser.add_argument("--record", action="store_true", help="write model_accuracy.json")
    parser.add_argument("--record-to", metavar="DIR", type=Path, help="write it to DIR instead")
    args = parser.parse_args()
    if unknown := {*args.model} - {*hf_models.SUBJECTS} | {*args.dtype} - {*DTYPES}:
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    if args.path and len(args.model) != 1:
        parser.error("--path is the folder of one --model")
    return args


def main() -> int:
    args = parse()
    hf_models.exact_float32()
    rows: list[Row] = []
    for name in args.model:
        print(f"{name} on {args.device} ...", flush=True)
        subject = hf_models.make(name, args.path, tiny=args.tiny, device=args.device, attention=args.attention)
        found, table = compare(
            subject,
            lambda: vllm_gems.use_gems(include=args.include, exclude=args.exclude),
            args.dtype,
            args.max_length,
        )
        rows += found
        print(f"\n{table}\n", flush=True)
        del subject
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print(told(rows))
    if args.record or args.record_to:
        from benchmarks import measure

        path = measure.record(
            "model_accuracy",
            [row.record() for row in rows],
            folder=args.record_to,
            command=" ".join(["python", "examples/model_accuracy.py", *sys.argv[1:]]),
            weights=str(args.path.name) if args.path else f"random, {'tiny' if args.tiny else 'public shapes'}",
        )
        print(f"recorded {path}")
    found = [text for row in rows for text in row.complaints()]
    for text in found:
        print(f"FAILED: {text}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
