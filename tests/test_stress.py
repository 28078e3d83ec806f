"""benchmarks/stress.py on the CPU with ops of PyTorch: it calls what it says, and sees what it is there to see."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import stress


def op(call: Callable[..., Any], name: str = "scale") -> stress.Op:
    first, second = ({"x": torch.randn(5, 8)[:, :7], "factor": 2.0} for _ in range(2))
    return stress.Op(name, call, (first, second))


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


def halves(x: torch.Tensor, factor: float) -> tuple[torch.Tensor, None, torch.Tensor]:
    return x * factor, None, x / factor


def run(*ops: stress.Op, threads: int = 4, calls: int = 1000, seconds: float = 60.0) -> list[stress.Found]:
    return stress.Stress(ops, ["cpu"]).run(threads, calls, seconds)


def test_right_ops_pass_and_are_counted() -> None:
    found = run(op(scaled), op(halves, "halves"))
    assert stress.complaints(found) == []
    rows = stress.rows_of(found, 4)
    assert [row["case"]["op"] for row in rows] == ["halves", "scale"]
    assert sum(row["ours"] for row in rows) == 1000
    assert {row["wrong"] for row in rows} == {0}


def test_one_wrong_element_is_seen() -> None:
    calls, lock = 0, threading.Lock()

    def once_wrong(x: torch.Tensor, factor: float) -> torch.Tensor:
        nonlocal calls
        with lock:
            calls += 1
            number = calls
        result = scaled(x, factor)
        if number == 500:
            result[2, 3] += 1.0
        return result

    found = run(op(scaled), op(once_wrong, "once wrong"))
    (text,) = stress.complaints(found)
    assert text.endswith("once wrong: 1 wrong elements")
    assert [row["wrong"] for row in stress.rows_of(found, 4)] == [1, 0]


def test_values_of_the_call_before_are_seen() -> None:
    """As a launch would read that does not wait for its inputs."""
    stale: dict[tuple[int, int], torch.Tensor] = {}
    calls = 0

    def late(x: torch.Tensor, factor: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls <= 2:  # what is right is found out before it begins
            return scaled(x, factor)
        previous = stale.get((threading.get_ident(), x.data_ptr()), x)
        stale[threading.get_ident(), x.data_ptr()] = x.clone()
        return scaled(previous, factor)

    assert stress.complaints(run(op(late)))


def test_results_on_another_device_are_seen() -> None:
    calls = 0

    def elsewhere(x: torch.Tensor, factor: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return scaled(x, factor) if calls <= 2 else torch.empty_like(x, device="meta")

    found = run(op(elsewhere), threads=1, calls=10)
    assert stress.complaints(found) == ["thread 0 on cpu: scale: 10 results on another device"]


def test_an_exception_ends_it() -> None:
    def fails(x: torch.Tensor, factor: float) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no")
        return scaled(x, factor)

    with pytest.raises(RuntimeError, match="no"):
        run(op(fails))


def test_an_op_that_ignores_its_values_is_refused() -> None:
    with pytest.raises(ValueError, match="does not depend"):
        run(op(lambda x, factor: torch.zeros_like(x)))


def test_time_limit() -> None:
    found = run(op(scaled), seconds=-1.0)
    assert sum(sum(each.calls.values()) for each in found) == 0


def test_kernels_that_are_called() -> None:
    """All that return what they compute, each as a function and through torch.ops; and the values matter to each."""
    ops = stress.kernel_ops()
    stress.Stress(ops, ["cuda:0" if torch.cuda.is_available() else "cpu"])
    names = {each.name for each in ops}
    for name in ("rms_norm bfloat16", "silu_and_mul float32"):
        assert {name, f"torch.ops.vllm_gems.{name}"} <= names
    assert not any(name == "fused_add_rms_norm bfloat16" for name in names)


def test_operations_that_are_called() -> None:
    """Some of PyTorch's that stand alone, by our kernels and not by PyTorch."""
    from vllm_gems import ops as counted

    before = dict(counted.FALLBACKS)
    ops = stress.standalone_ops()
    stress.Stress(ops, ["cuda:0" if torch.cuda.is_available() else "cpu"])
    assert {"mm float32", "torch.ops.vllm_gems.mm float32"} <= {each.name for each in ops}
    assert dict(counted.FALLBACKS) == before
