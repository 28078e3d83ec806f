"""Overrides of PyTorch's operations against PyTorch: which are not slower, counting the host's time and the GPU's.

    python benchmarks/aten.py [--ops GLOBS] [--rounds N] [--record NAME] [--alone]

For every overload of the table (`vllm_gems/patches/aten.py`), on activations of 32 and of 2048 tokens by 4096, bfloat16
where we do that, else what we do: microseconds of the host per call through PyTorch's dispatcher, with the override and
without, in turn, plus microseconds of the GPU per call; and of the host by those that stand alone. Writes the record
`aten`, of which `tools/tables.py` makes the default set of `vllm_gems.enable()`: overloads that are not slower at any
of these shapes. Needs a GPU; about three minutes on an H100, half of them for compiling.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import vllm_gems
from benchmarks import measure
from vllm_gems import ops, standalone
from vllm_gems.aten.overloads import Overload, name_of, overloads_of
from vllm_gems.overrides import overrides
from vllm_gems.patches import aten
from vllm_gems.tuning.timing import gpu_us

TOKENS = (32, 2048)
HIDDEN = 4096
DTYPES = (torch.bfloat16, torch.float32, torch.int64, torch.int32, torch.bool)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def overridden(globs: str = "*") -> Iterator[tuple[str, Any, Any]]:
    """(patch, overload, row) of everything that can be overridden here."""
    chosen = set(overrides().choose(globs, None))
    for row in aten.ROWS:
        for overload in overloads_of(row.op):
            name = aten.PREFIX + name_of(overload).partition("::")[2]
            if name in chosen and row.reads(overload._schema):
                chosen.discard(name)
                yield name, overload, row


class Maker:
    """Tensors of one size, dtype and device."""

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, device: str) -> None:
        self.tokens, self.hidden, self.dtype, self.device = tokens, hidden, dtype, device
        # PyTorch's own is of no use any more after a CUDA graph that could not be captured.
        self.random = torch.Generator(device).manual_seed(0)

    def values(self, *shape: int) -> torch.Tensor:
        if self.dtype.is_floating_point:
            return torch.rand(shape, device=self.device, generator=self.random).add_(0.25).to(self.dtype)
        return torch.randint(1, 5, shape, device=self.device, generator=self.random).to(self.dtype)

    def index(self, *shape: int, below: int) -> torch.Tensor:
        return torch.rand(shape, device=self.device, generator=self.random).mul_(below).long().clamp_(max=below - 1)

    def of_op(self, op: str) -> dict[str, Any]:
        """Arguments that are no activations, by name."""
        tokens, hidden = self.tokens, self.hidden
        few = min(64, hidden)
        weight = self.values(hidden, hidden)
        special: dict[str, dict[str, Callable[[], Any]]] = {
            "embedding": {
                "weight": lambda: self.values(8 * few, hidden), "indices": lambda: self.index(tokens, below=8 * few),
            },
            "index_select": {"dim": lambda: 0, "index": lambda: self.index(tokens, below=tokens)},
            "gather": {"dim": lambda: 1, "index": lambda: self.index(tokens, few, below=hidden)},
            "scatter": {
                "dim": lambda: 1, "index": lambda: self.index(tokens, few, below=hidden),
                "src": lambda: self.values(tokens, few),
            },
            "scatter_add": {
                "dim": lambda: 1, "index": lambda: self.index(tokens, few, below=hidden),
                "src": lambda: self.values(tokens, few),
            },
            "index": {"indices": lambda: [self.index(tokens, below=tokens)]},
            "cat": {"tensors": lambda: [self.values(tokens, hidden) for _ in range(2)], "dim": lambda: 0},
            "topk": {"k": lambda: min(8, hidden)},
            "mm": {"mat2": lambda: weight},
            "mv": {"vec": lambda: self.values(hidden)},
            "addmv": {
                "self": lambda: self.values(tokens), "mat": lambda: self.values(tokens, hidden),
                "vec": lambda: self.values(hidden),
            },
            "addmm": {"mat2": lambda: weight},
            "bmm": {
                "self": lambda: self.values(few, tokens, few), "mat2": lambda: self.values(few, few, few),
            },
            "baddbmm": {
                "self": lambda: self.values(few, tokens, few), "batch1": lambda: self.values(few, tokens, few),
                "batch2": lambda: self.values(few, few, few),
            },
            "arange": {
                "start": lambda: 0, "end": lambda: tokens * hidden, "step": lambda: 1, "dtype": lambda: self.dtype,
                "device": lambda: torch.device(self.device),
            },
            "convolution": {  # patches of images, as of a vision model
                "input": lambda: self.values(max(tokens // 32, 1), 3, 14 * min(few, 24), 14 * min(few, 24)),
                "weight": lambda: self.values(hidden // 4, 3, 14, 14), "bias": lambda: self.values(hidden // 4),
                "stride": lambda: [14, 14], "padding": lambda: [0, 0], "dilation": lambda: [1, 1],
                "output_padding": lambda: [0, 0], "groups": lambda: 1,
            },
            "native_layer_norm": {
                "normalized_shape": lambda: [hidden], "weight": lambda: self.values(hidden),
                "bias": lambda: self.values(hidden),
            },
            "native_group_norm": {
                "input": lambda: self.values(tokens, hidden, 2), "weight": lambda: self.values(hidden),
                "bias": lambda: self.values(hidden), "N": lambda: tokens, "C": lambda: hidden, "HxW": lambda: 2,
                "group": lambda: 4,
            },
        }  # fmt: skip
        return {name: make() for name, make in special.get(op, {}).items()}

    def of_type(self, kind: str, each: Any) -> Any:
        """An argument by its type and name."""
        if "Tensor" in kind:
            if each.name == "value":  # on the host: PyTorch waits for the GPU to read one
                return self.values().cpu()
            found = self.values(self.tokens, self.hidden)
            return found > found.float().mean() if each.name in ("condition", "mask") else found
        if each.name in ("dim",):
            return [-1] if "List" in kind else -1
        if each.name == "input_dtype":
            return self.dtype
        if each.name == "out_dtype":
            return torch.float32
        if each.name == "rounding_mode":
            return "trunc"
        if each.name in ("alpha", "beta", "correction", "scale", "input_scale"):
            return 1
        if each.name == "decimals" or "float" in kind or "number" in kind:
            return 2 if not self.dtype.is_floating_point else 0.5
        return each.default_value if each.has_default_value() else False

    def arguments(self, overload: Any, row: Any) -> Arguments:
        """Of a call; what is written to has what PyTorch puts there."""
        special = self.of_op(row.op)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        outs: list[str] = []
        for each in overload._schema.arguments:
            if each.is_out:
                outs.append(each.name)
                continue
            value = special[each.name] if each.name in special else self.of_type(str(each.type), each)
            if each.kwarg_only:
                kwargs[each.name] = value
            else:
                args.append(value)
        if outs:
            kwargs.update(self._outs(overload, args, kwargs, outs))
        return tuple(args), kwargs

    def _outs(self, overload: Any, args: list[Any], kwargs: dict[str, Any], outs: list[str]) -> dict[str, Any]:
        kinds = (self.dtype, torch.bool, torch.int64, torch.float32)
        for first in kinds:
            for last in (first, torch.int64):  # of indices beside values
                made = {name: torch.empty(0, dtype=first, device=self.device) for name in outs}
                made[outs[-1]] = torch.empty(0, dtype=last, device=self.device)
                try:
                    overload(*args, **kwargs, **made)
                except RuntimeError:
                    continue
                return made
        raise ValueError(f"{overload} writes to no dtype of {kinds}")


def taken(overload: Any, row: Any, tokens: int, hidden: int, device: str) -> tuple[torch.dtype, Arguments, Overload]:
    """Arguments that PyTorch accepts and our kernel takes; raises ValueError, with why not, if there are none."""
    reasons = []
    for dtype in DTYPES:
        try:
            args, kwargs = Maker(tokens, hidden, dtype, device).arguments(overload, row)
            overload(*args, **kwargs)
            call = Overload(overload, row)
            call(args, kwargs)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # Refused is a ValueError
            reasons.append(f"{dtype}: {error}")
            continue
        return dtype, (args, kwargs), call
    raise ValueError(f"{overload}: {'; '.join(reasons)}")


def timed(name: str, overload: Any, row: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """A row of the record."""
    dtype, (args, kwargs), call = taken(overload, row, tokens, HIDDEN, "cuda")

    def through_pytorch() -> Any:
        return overload(*args, **kwargs)

    def turn(side: str) -> None:
        if side == "ours":
            vllm_gems.only_enable(name)
        else:
            vllm_gems.disable()

    host = measure.host_us(
        {"ours": through_pytorch, "aten": through_pytorch}, rounds=rounds, before=turn, pause=torch.cuda.synchronize
    )
    vllm_gems.disable()
    gpu = gpu_us({"ours": lambda: call(args, kwargs), "aten": through_pytorch}, [{}])
    total = {side: host[side] + gpu[side] for side in ("ours", "aten")}
    alone = next((each for each, op in standalone.TABLE.items() if op() is overload), None)
    more: dict[str, Any] = {}
    if alone:
        calls = dict(list(alone_calls(alone, args, kwargs).items())[:2])
        times = measure.host_us(calls, rounds=rounds, pause=torch.cuda.synchronize)
        more = {"alone": alone, "host_alone": {side: round(value, 2) for side, value in times.items()}}
    return {
        "case": {"op": name, "num_tokens": tokens, "hidden_size": HIDDEN, "dtype": str(dtype).removeprefix("torch.")},
        "unit": "us",
        "ours": round(total["ours"], 2),
        "against": {"aten": round(total["aten"], 2)},
        "host": {side: round(value, 2) for side, value in host.items()},
        "gpu": {side: round(value, 2) for side, value in gpu.items()},
        **more,
    }


def alone_calls(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Of an op that stands alone, as a function: a call of it and of PyTorch's, and both with arguments by name."""
    op, function = standalone.TABLE[name], standalone.function(name)
    overload, own = op(), args[: len(args) - len(op.rest)]
    names = [each.name for each in overload._schema.arguments]
    ours, others = ({**dict(zip(names[1:], each[1:], strict=False)), **kwargs} for each in (own, args))
    return {
        "ours": lambda: function(*own, **kwargs),
        "aten": lambda: overload(*args, **kwargs),
        "ours by name": lambda: function(own[0], **ours),
        "aten by name": lambda: overload(args[0], **others),
    }


def stand_alone(rounds: int) -> list[dict[str, Any]]:
    """Rows of the host's time of the functions that stand alone, at the smaller shape, which are printed, too."""
    rows: list[dict[str, Any]] = []
    print(f"{'us of the host':14} {'ours':>7} {'aten':>7} {'ratio':>6}   {'by name':>7} {'aten':>7} {'ratio':>6}")
    for name, op in standalone.TABLE.items():
        overload = op()
        row = next(row for row in aten.ROWS if row.op == overload._opname and row.reads(overload._schema))
        _, (args, kwargs), _ = taken(overload, row, TOKENS[0], HIDDEN, "cuda")
        before = ops.FALLBACKS[name]
        times = measure.host_us(alone_calls(name, args, kwargs), rounds=rounds, pause=torch.cuda.synchronize)
        ours, others, ours_named, others_named = times.values()
        rows.append(
            {
                "case": {"function": name, "num_tokens": TOKENS[0], "hidden_size": HIDDEN},
                "unit": "us of the host",
                "ours": round(ours, 2),
                "against": {"aten": round(others, 2)},
                "by_name": {"ours": round(ours_named, 2), "aten": round(others_named, 2)},
            }
        )
        done = "" if ops.FALLBACKS[name] == before else "  done by PyTorch"
        print(
            f"{name:14} {ours:7.2f} {others:7.2f} {ours / others:6.2f}   "
            f"{ours_named:7.2f} {others_named:7.2f} {ours_named / others_named:6.2f}{done}"
        )
    slower = sum(row["ours"] > row["against"]["aten"] for row in rows)
    print(f"{slower} of {len(standalone.TABLE)} take the host longer than PyTorch's")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="*", help="names or globs, as of enable()")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--record", default="aten", help="the record's name")
    parser.add_argument("--out", type=pathlib.Path, help="its folder")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    parser.add_argument("--alone", action="store_true", help="only the host's time of functions: `standalone_host`")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here", file=sys.stderr)
        return 1
    if args.alone:
        path = measure.record("standalone_host", stand_alone(args.rounds), folder=args.out, commit=args.commit)
        print(f"recorded {path}")
        return 0
    rows, failed = [], []
    try:
        for name, overload, row in overridden(args.ops):
            for tokens in TOKENS:
                try:
                    rows.append(timed(name, overload, row, tokens, args.rounds))
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    failed.append(f"{name}, {tokens} tokens: {error}")
    except KeyboardInterrupt:  # what was measured is not lost
        failed.append("interrupted: the overloads after the last row were not measured")
    path = measure.record(args.record, rows, folder=args.out, commit=args.commit, failed=failed)
    ratios: dict[str, float] = {}
    for each in rows:
        ratio = each["ours"] / each["against"]["aten"]
        ratios[each["case"]["op"]] = max(ratio, ratios.get(each["case"]["op"], 0.0))
    print(f"{path}: {len(ratios)} overloads at {len(TOKENS)} shapes, {len(failed)} not measured")
    for title, some in (("fastest", sorted(ratios, key=ratios.__getitem__)[:12]),
                        ("slowest", sorted(ratios, key=ratios.__getitem__)[-6:])):  # fmt: skip
        print(f"{title}: " + ", ".join(f"{name.removeprefix(aten.PREFIX)} {ratios[name]:.2f}" for name in some))
    alone = {each["alone"]: each["host_alone"]["ours"] / each["host_alone"]["aten"] for each in rows if "alone" in each}
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in sorted(alone.items(), key=lambda each: each[1]))
    print(f"host time of ops that stand alone over PyTorch's: {told}")
    print(f"not slower than PyTorch at any shape: {sum(ratio <= 1 for ratio in ratios.values())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
