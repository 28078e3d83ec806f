"""Ops that stand alone, called from many threads at once: right device, right stream, and no wrong value?

    python benchmarks/stress.py [--threads 32] [--calls 100000] [--seconds 120] [--record]

Threads take turns on all GPUs there are, each with a stream of its own. Every second thread of a GPU leaves another GPU
current, if there is one, so that a kernel must find its device by its tensors. Before each call the thread's stream
gets, behind a delay, one of two sets of values for the same inputs: a launch on any other stream or too early computes
with the other set. Results must equal, bit for bit, what a call gave on that GPU for these values while nothing else
ran; that this is right, tests/test_kernels.py says. Called are all kernels that return what they compute, and some of
PyTorch's operations that stand alone, as functions and through torch.ops.vllm_gems.

Exits with 1 for a wrong value, a result on another device, an op that its reference had to do, or an exception.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # run as a script, this file is in no package

from vllm_gems.nouns import Case, Kernel

THREADS = 32
CALLS = 100_000
BURST = 50  # calls behind one delay
DELAY = 500_000  # cycles, about a quarter of a millisecond
DTYPES = ("bfloat16", "float16", "float32")

Call = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """Something to call, and two sets of values of its arguments on the CPU."""

    name: str
    call: Call
    values: tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Found:
    """What became of a thread's calls."""

    device: str
    calls: Counter[str]
    wrong: Counter[str]  # elements that differ, by op
    elsewhere: Counter[str]  # results that were on another device, by op


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of what an op returned."""
    return [each for each in ((result,) if isinstance(result, torch.Tensor) else result) if each is not None]


def moved(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The same arguments on a device, with the strides that they had."""

    def move(x: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device, copy=True)
        return storage.as_strided(x.shape, x.stride(), x.storage_offset())

    return {name: move(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _small(kernel: Kernel) -> Case:
    return next(case for case in kernel.cases if not case.bench and case.name not in ("empty", "one row"))


def kernel_ops() -> list[Op]:
    """Every kernel that returns what it computes, in each of its dtypes, as a function and as an op."""
    from vllm_gems import ops
    from vllm_gems.catalog import catalog

    kernels = [each for each in catalog().kernels.values() if all(where.startswith("return") for where in each.results)]
    ops.define(kernels)
    found = []
    for kernel, dtype in itertools.product(kernels, DTYPES):
        if dtype not in kernel.dtypes:
            continue
        first, second = (kernel.inputs(_small(kernel), dtype, "cpu") for _ in range(2))
        # Only values of floating point differ: indices and lengths decide where a kernel reads.
        mixed = {
            name: value if isinstance(value, torch.Tensor) and value.is_floating_point() else first[name]
            for name, value in second.items()
        }
        op = getattr(torch.ops.vllm_gems, kernel.name)
        found.append(Op(f"{kernel.name} {dtype}", kernel.op, (first, mixed)))
        found.append(Op(f"torch.ops.vllm_gems.{kernel.name} {dtype}", op, (first, mixed)))
    return found


# Arguments of some of PyTorch's operations that stand alone: shapes of tensors, or what they are.
_STANDALONE: Mapping[str, Mapping[str, Any]] = {
    "add_tensor": {"self": torch.Size([33, 65]), "other": torch.Size([65])},
    "mul_tensor": {"self": torch.Size([33, 65]), "other": torch.Size([33, 1])},
    "gelu": {"self": torch.Size([17, 129])},
    "sum_dim": {"self": torch.Size([33, 65]), "dim": [1]},
    "softmax": {"self": torch.Size([33, 65]), "dim": -1},
    "cumsum": {"self": torch.Size([33, 65]), "dim": 1},
    "layer_norm": {
        "input": torch.Size([33, 64]),
        "normalized_shape": [64],
        "weight": torch.Size([64]),
        "bias": torch.Size([64]),
        "eps": 1e-5,
    },
    "embedding": {"weight": torch.Size([9, 65]), "indices": torch.tensor([[1, 8], [0, 3]])},
    "mm": {"self": torch.Size([33, 48]), "mat2": torch.Size([48, 40])},
    "addmm": {"self": torch.Size([40]), "mat1": torch.Size([33, 48]), "mat2": torch.Size([48, 40])},
    "bmm": {"self": torch.Size([3, 17, 48]), "mat2": torch.Size([3, 48, 40])},
}


def standalone_ops() -> list[Op]:
    """PyTorch's operations by our kernels, as functions of the package and as ops."""
    import vllm_gems.standalone

    found = []
    for name, dtype in itertools.product(_STANDALONE, DTYPES):
        first, second = (
            {
                each: torch.randn(value).to(getattr(torch, dtype)) if isinstance(value, torch.Size) else value
                for each, value in _STANDALONE[name].items()
            }
            for _ in range(2)
        )
        op, function = getattr(torch.ops.vllm_gems, name), vllm_gems.standalone.function(name)
        found.append(Op(f"torch.ops.vllm_gems.{name} {dtype}", op, (first, second)))
        found.append(Op(f"{name} {dtype}", _by_position(function), (first, second)))
    return found


def _by_position(function: Call) -> Call:
    return lambda **arguments: function(*arguments.values())


@contextlib.contextmanager
def _own_stream(device: str, current: str) -> Iterator[None]:
    """A stream of this thread's on `device`, while `current` is the thread's current device."""
    if device == "cpu":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)), torch.cuda.device(current):
        yield


class Stress:
    """The expected results on every device, and the threads' loop."""

    def __init__(self, ops: Sequence[Op], devices: Sequence[str]) -> None:
        self.ops = ops
        self.devices = devices
        # (device, op, which values) -> results of a call while nothing else runs.
        self.wanted = {
            (device, op.name, which): tensors(op.call(**moved(values, device)))
            for device in devices
            for op in ops
            for which, values in enumerate(op.values)
        }
        for device in devices:
            for op in ops:
                both = zip(self.wanted[device, op.name, 0], self.wanted[device, op.name, 1], strict=True)
                if all(torch.equal(a, b) for a, b in both):
                    raise ValueError(f"{op.name} does not depend on its values; a launch too early would not be seen")
        self._synchronize()

    def _synchronize(self) -> None:
        for device in self.devices:
            if device != "cpu":
                torch.cuda.synchronize(device)

    def run(self, threads: int, calls: int, seconds: float) -> list[Found]:
        """So many calls by so many threads that begin together; fewer if they take longer than `seconds`."""
        together = threading.Barrier(threads)
        last = time.monotonic() + seconds
        each = -(-calls // threads)
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(self._thread, index, each, together, last) for index in range(threads)]
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error  # what went wrong first, not what became of those that waited for it
        return [future.result() for future in futures]

    def _thread(self, index: int, calls: int, together: threading.Barrier, last: float) -> Found:
        device = self.devices[index % len(self.devices)]
        turn = index // len(self.devices)  # of the threads of this device
        current = self.devices[(index + turn % 2) % len(self.devices)]
        with _own_stream(device, current):
            try:
                sources = {op.name: [moved(values, device) for values in op.values] for op in self.ops}
                static = {op.name: moved(op.values[0], device) for op in self.ops}
                wrong = {op.name: torch.zeros((), dtype=torch.int64, device=device) for op in self.ops}
            except BaseException:
                together.abort()  # or the others would wait for ever
                raise
            done: Counter[str] = Counter()
            elsewhere: Counter[str] = Counter()
            together.wait()
            for number in range(calls):
                if number % BURST == 0:
                    if time.monotonic() > last:
                        break
                    self._delay(device)
                op = self.ops[(index + number) % len(self.ops)]
                which = number // len(self.ops) % 2
                for name, value in sources[op.name][which].items():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        static[op.name][name].copy_(value)
                results = tensors(op.call(**static[op.name]))
                done[op.name] += 1
                for got, want in zip(results, self.wanted[device, op.name, which], strict=True):
                    if got.device != want.device:
                        elsewhere[op.name] += 1
                    else:
                        wrong[op.name] += (got != want).sum()
            return Found(device, done, +Counter({name: int(count) for name, count in wrong.items()}), elsewhere)

    @staticmethod
    def _delay(device: str) -> None:
        """Hold up the current stream of a device, whichever device is current."""
        if device != "cpu":
            with torch.cuda.device(device):
                torch.cuda._sleep(DELAY)


def complaints(found: Sequence[Found]) -> list[str]:
    """Everything that went wrong, in words."""
    texts = []
    for index, each in enumerate(found):
        where = f"thread {index} on {each.device}"
        texts += [f"{where}: {name}: {count} wrong elements" for name, count in each.wrong.items()]
        texts += [f"{where}: {name}: {count} results on another device" for name, count in each.elsewhere.items()]
    return texts


def rows_of(found: Sequence[Found], threads: int) -> list[dict[str, Any]]:
    """A row for each op: calls, and those of its elements that were wrong."""
    calls: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for each in found:
        calls += each.calls
        wrong += each.wrong + each.elsewhere
    gpus = len({each.device for each in found})
    return [
        {
            "case": {"op": name, "threads": threads, "gpus": gpus},
            "unit": "calls",
            "ours": count,
            "against": {},
            "wrong": wrong[name],
        }
        for name, count in sorted(calls.items())
    ]


def on_gpus(threads: int = THREADS, calls: int = CALLS, seconds: float = 120.0) -> tuple[list[Found], list[str]]:
    """The ops on every GPU; what was found, and what is wrong with it in words."""
    from vllm_gems import ops

    torch.manual_seed(0)
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    before = Counter(ops.FALLBACKS)
    found = Stress([*kernel_ops(), *standalone_ops()], devices).run(threads, calls, seconds)
    texts = complaints(found)
    texts += [f"{name}: its reference did {count} calls" for name, count in (ops.FALLBACKS - before).items()]
    done = sum(sum(each.calls.values()) for each in found)
    if done < calls:
        texts.append(f"only {done} of {calls} calls in {seconds:.0f} s")
    return found, texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--calls", type=int, default=CALLS, help="in all (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most (%(default)s)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/<gpu>/stress.json")
    parser.add_argument("--record-to", metavar="DIR", type=Path, help="write it to DIR instead")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    began = time.monotonic()
    found, texts = on_gpus(args.threads, args.calls, args.seconds)
    rows = rows_of(found, args.threads)
    print(f"{sum(row['ours'] for row in rows)} calls of {len(rows)} ops in {time.monotonic() - began:.0f} s")
    if args.record or args.record_to:
        from benchmarks import measure

        print(f"recorded {measure.record('stress', rows, folder=args.record_to, commit=args.commit, complaints=texts)}")
    for text in texts:
        print(f"FAILED: {text}")
    return int(bool(texts))


if __name__ == "__main__":
    sys.exit(main())
