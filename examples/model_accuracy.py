"""BERT, LLaMA and LLaVA of transformers with PyTorch's operations replaced by ours: what changes in their results?

    python examples/model_accuracy.py [--model bert|llama|llava] [--path FOLDER] [--include GLOBS] [--tiny]

Every model runs in float32 as PyTorch has it, which is the reference, and then in each dtype without ("stock") and with
("ours") `vllm_gems.use_gems`. Compared are the last hidden states of BERT and the logits of the others, at every token
that is not padding. In float32 the results must agree within 1e-3, absolute and relative; in half precision within
1e-3, or by a cosine of at least 0.99 at the worst token. Where PyTorch's own result differs from the reference, ours
may differ by four times as much: in half precision, and with `--reference float64` in float32, too. LLaMA generates
besides, with --beams and up to --max-length tokens, with and without: in float32 the tokens must be the same; in
half precision two right kernels may round apart, and it is only said.

Without --path the weights are random, in the public shapes (bert-base, LLaMA-2-7B, LLaVA-1.5-7B), or tiny with --tiny.
Without a GPU the kernels run in Triton's interpreter, which is for --tiny and --max-length 18.
Exits with 1 if anything is not as it should be, and that is also so if nothing of ours ran or a kernel failed. --record
writes benchmarks/results/<gpu>/model_accuracy.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import hf_models
from hf_models import Subject

import vllm_gems
from vllm_gems.nouns import State
from vllm_gems.reports import Report

DTYPES = ("float32", "float16", "bfloat16")
CLOSE = 1e-3
COSINE = 0.99
# Ours and PyTorch's round the same sums, in other orders: the greatest of many errors is nearly the same.
WORSE = 4.0
Overrides = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Row:
    """A model in a dtype: how far its results are from the reference, and what ran of ours."""

    model: str
    dtype: str
    stock: float  # the greatest absolute difference, without overrides
    ours: float  # and with them
    cosine: float  # ours, at the worst token
    close: bool  # ours, within CLOSE
    tokens: bool | None  # whether the same ones were generated; None if none are
    hits: Mapping[str, int]  # overload -> calls that our kernel did
    declined: int  # calls that were left to PyTorch
    failed: tuple[str, ...]  # what the report says of kernels that raised, or could not be used

    def complaints(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        where = f"{self.model}, {self.dtype}"
        found = [f"{where}: {text}" for text in self.failed]
        if not self.hits:
            found.append(f"{where}: none of our kernels ran")
        if not self.close and (self.dtype == "float32" or not self.cosine >= COSINE):
            found.append(f"{where}: differs from the reference by {self.ours:.3g}, cosine {self.cosine:.6f}")
        if self.stock and not self.ours <= WORSE * self.stock:
            found.append(f"{where}: differs {self.ours / self.stock:.3g} times as much as PyTorch's own")
        if self.dtype == "float32" and self.tokens is False:
            found.append(f"{where}: other tokens are generated")
        return found

    def record(self) -> dict[str, Any]:
        return {
            "case": {"model": self.model, "dtype": self.dtype},
            "unit": "greatest absolute difference from the reference",
            "ours": self.ours,
            "against": {"stock": self.stock},
            "cosine": self.cosine,
            "allclose": self.close,
            "tokens_equal": self.tokens,
            "hits": dict(self.hits),
            "declined": self.declined,
        }


@torch.inference_mode()
def outputs(subject: Subject, model: Any) -> torch.Tensor:
    """The results that are compared, as the model leaves them."""
    return model(**subject.inputs_for(model.dtype))[subject.result]


def judged(subject: Subject, found: torch.Tensor) -> torch.Tensor:
    """Results in float64, one row for each token that is not padding. To be called where nothing is overridden."""
    return found[subject.inputs["attention_mask"].bool()].double()


@torch.inference_mode()
def generated(subject: Subject, model: Any, max_length: int, beams: int) -> torch.Tensor | None:
    """The tokens of beam search."""
    if not subject.generates:
        return None
    return model.generate(**subject.inputs_for(model.dtype), max_length=max_length, num_beams=beams, do_sample=False)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in `dtype`, as one that is loaded so: what it computed beforehand is as it was.

    Its weights never exist twice in float32, which would be too much for a GPU.
    """
    if dtype is model.dtype:
        return model
    done = {id(each): torch.nn.Parameter(each.detach().to(dtype), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, done)


def worst_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())


def overridden() -> Report:
    """What the report says of PyTorch's operations that our kernels have done, or have not."""
    report = vllm_gems.report()
    rows = [row for row in report.rows if row.patch.startswith("aten.") and row.state is not State.OFF]
    return dataclasses.replace(
        report, rows=tuple(row for row in rows if row.hits or row.declined or row.errors or not row.ok)
    )


def compare(
    subject: Subject,
    overrides: Overrides,
    dtypes: Iterable[str] = DTYPES,
    max_length: int = 100,
    beams: int = 5,
    reference: str = "float32",
) -> tuple[list[Row], Report | None]:
    """A row for each dtype, and the report as it was under the last one's overrides.

    `reference` is the dtype of the results that all others are compared with.
    """
    exact = judged(subject, outputs(subject, in_dtype(subject.model, getattr(torch, reference))))
    rows: list[Row] = []
    report = None
    for name in dtypes:
        model = in_dtype(subject.model, getattr(torch, name))
        stock = judged(subject, outputs(subject, model))
        wanted = generated(subject, model, max_length, beams)
        with overrides():
            ours = outputs(subject, model)
            got = generated(subject, model, max_length, beams)
            report = overridden()
        ours = judged(subject, ours)
        # Of hundreds that are refused, it is for the same reason.
        failed = {f"{row.patch} failed {row.errors} times: {row.why}" for row in report.rows if row.errors}
        failed |= {row.why for row in report.rows if not row.ok and not row.errors}
        rows.append(
            Row(
                subject.name,
                name,
                stock=float((stock - exact).abs().max()),
                ours=float((ours - exact).abs().max()),
                cosine=worst_cosine(ours, exact),
                close=torch.allclose(ours, exact, rtol=CLOSE, atol=CLOSE),
                tokens=None if wanted is None or got is None else torch.equal(wanted, got),
                hits={row.patch: row.hits for row in report.rows if row.hits},
                declined=sum(sum(row.declined.values()) for row in report.rows),
                failed=tuple(sorted(failed)),
            )
        )
        del model
    return rows, report


def told(rows: Iterable[Row]) -> str:
    """The table that is printed."""
    lines = [f"{'model':8}{'dtype':10}{'stock':>10}{'ours':>10}{'cosine':>10}  {'tokens':8}{'hits':>9}{'declined':>10}"]
    for row in rows:
        tokens = {True: "equal", False: "differ", None: "-"}[row.tokens]
        numbers = f"{row.stock:>10.2e}{row.ours:>10.2e}{row.cosine:>10.6f}"
        counts = f"{sum(row.hits.values()):>9}{row.declined:>10}"
        lines.append(f"{row.model:8}{row.dtype:10}{numbers}  {tokens:8}{counts}")
    return "\n".join(lines)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=names, default=list(hf_models.SUBJECTS), help="one or more, with commas; default: all"
    )
    parser.add_argument("--path", type=Path, help="a folder with real weights of the one --model")
    parser.add_argument("--include", type=names, default=["*"], help="names or globs of what is replaced; default: all")
    parser.add_argument("--exclude", type=names, help="names or globs of what is not")
    parser.add_argument("--dtype", type=names, default=list(DTYPES), help="with commas; default: all")
    parser.add_argument("--reference", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    parser.add_argument(
        "--max-length", type=int, default=100, help="tokens of LLaMA, the prompt's counted (%(default)s)"
    )
    parser.add_argument("--beams", type=int, default=5, help="of LLaMA's search, 1 for none (%(default)s)")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="transformers' (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small random models")
    parser.add_argument("--record", action="store_true", help="write model_accuracy.json")
    parser.add_argument("--record-to", metavar="DIR", type=Path, help="write it to DIR instead")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args(arguments)
    if unknown := {*args.model} - {*hf_models.SUBJECTS} | {*args.dtype} - {*DTYPES}:
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    if args.path and len(args.model) != 1:
        parser.error("--path is the folder of one --model")
    return args


@hf_models.exact_float32()
def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    rows: list[Row] = []
    for name in args.model:
        print(f"{name} on {args.device} ...", flush=True)
        subject = hf_models.make(name, args.path, tiny=args.tiny, device=args.device, attention=args.attention)
        found, report = compare(
            subject,
            lambda: vllm_gems.use_gems(include=args.include, exclude=args.exclude),
            args.dtype,
            args.max_length,
            args.beams,
            args.reference,
        )
        rows += found
        if any(row.hits for row in found):
            print(f"\n{report}\n", flush=True)
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
            commit=args.commit,
            command=measure.told(["python", "examples/model_accuracy.py", *arguments]),
            weights=args.path.name if args.path else f"random, {'tiny' if args.tiny else 'public shapes'}",
            reference=args.reference,
        )
        print(f"recorded {path}")
    complaints = [text for row in rows for text in row.complaints()]
    for text in complaints:
        print(f"FAILED: {text}")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
