"""Ops that stand alone from 32 threads on all GPUs there are: 100,000 calls, and not one wrong value."""

from __future__ import annotations

from benchmarks import stress


def test_no_wrong_value() -> None:
    _, complaints = stress.on_gpus()
    assert complaints == []
