"""Recordings of launches: what may be recorded, what decides which is taken, and that it computes the same again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_kernels import DEVICE

from vllm_gems import launch, replay, scratch
from vllm_gems.errors import Refused
from vllm_gems.kernels.linear import Shape, Tiling, bind_linear
from vllm_gems.kernels.rms_norm import bind_norm_rows
from vllm_gems.replay import At

INDEX = torch.empty(0, device=DEVICE).get_device()


def test_numbers_remember_where_they_come_from() -> None:
    at = At(4096, slot=3) + 16
    further = 32 + at - 8
    assert (further, further.slot, further.offset) == (4136, 3, 40)
    assert (at | 1) == 4113
    assert type(at & 15) is int


@pytest.mark.parametrize(
    "change",
    [
        lambda at: at * 2, lambda at: 2 * at, lambda at: at // 2, lambda at: 5000 - at, lambda at: at << 1,
        lambda at: at + at, lambda at: -at, lambda at: at % 16,
    ],
)  # fmt: skip
def test_what_cannot_be_done_again_is_an_error(change: Callable[[At], Any]) -> None:
    with pytest.raises(TypeError):
        change(At(64, slot=2))


def test_every_combination_of_facts_and_low_bits_is_recorded_once() -> None:
    seen: list[tuple[Any, ...]] = []
    run = replay.bind(INDEX, lambda memory, *args: seen.append(tuple(int(arg) for arg in args)))
    for _ in range(2):
        run((3,), (16, 32))
        run((3,), (48, 64))  # other addresses, as aligned
        run((4,), (16, 32))
        run((3,), (18, 32))
        run((3,), (34, 64))
        run((3,), (16, 34))
    assert seen == [(3, 16, 32), (4, 16, 32), (3, 18, 32), (3, 16, 34)]


def test_the_oldest_recording_goes() -> None:
    seen: list[int] = []
    run = replay.bind(INDEX, lambda memory, fact: seen.append(fact), most=2)
    for fact in (1, 2, 3, 2, 3, 1):
        run((fact,), ())
    assert seen == [1, 2, 3, 1]


def test_memory_of_a_recording_does_not_overlap() -> None:
    asked = (1, 256, 1000, 3)
    found: list[int] = []

    def launches(memory: Callable[[int], int]) -> None:
        found.extend(int(memory(nbytes)) for nbytes in asked)

    replay.bind(INDEX, launches)((), ())
    for start, nbytes, after in zip(found, asked, [*found[1:], found[-1] + 256], strict=True):
        assert start % 256 == 0
        assert start + nbytes <= after


def test_nothing_is_kept_of_a_recording_that_failed() -> None:
    attempts: list[int] = []

    def launches(memory: Callable[[int], int]) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise Refused("not this time")

    run = replay.bind(INDEX, launches)
    with pytest.raises(Refused, match="not this time"):
        run((), ())
    assert launch.recording() is None
    run((), ())
    run((), ())
    assert len(attempts) == 2


def test_a_recording_within_a_recording_is_an_error() -> None:
    inner = replay.bind(INDEX, lambda memory: None)
    with pytest.raises(RuntimeError, match="within a recording"):
        replay.bind(INDEX, lambda memory: inner((), ()))((), ())


def norm_and_product(features: int, out_features: int) -> Callable[..., None]:
    """A norm, and a product that is split along its sum: memory, counters, and one kernel's result for the next."""
    norm = bind_norm_rows(torch.float32, torch.float32, features, 1e-6, False, False, INDEX)
    shape = Shape(features, out_features)
    split = Tiling(cols=16, depth=16, split=4, swapped=False, num_warps=4, num_stages=1)
    project = bind_linear(shape, torch.float32, INDEX, split)

    def launches(
        memory: Callable[[int], int], rows: int, weight_at: int, projection_at: int, x_at: int, out_at: int
    ) -> None:
        normed_at = memory(rows * features * 4)
        norm(x_at, 0, weight_at, normed_at, 0, rows)
        project(normed_at, features, projection_at, 0, out_at, rows)

    return launches


def test_a_recording_computes_for_whatever_is_at_its_addresses() -> None:
    rows, features, out_features = 3, 192, 24
    weight = torch.rand(features, device=DEVICE) + 0.5
    projection = torch.randn(out_features, features, device=DEVICE) * features**-0.5
    recorded: list[int] = []
    launches = norm_and_product(features, out_features)

    def noted(*args: Any) -> None:
        recorded.append(1)
        launches(*args)

    run = replay.bind(INDEX, noted)
    for _ in range(3):
        x = torch.randn(rows, features, device=DEVICE)
        out = torch.full((rows, out_features), torch.nan, device=DEVICE)
        run((rows, weight.data_ptr(), projection.data_ptr()), (x.data_ptr(), out.data_ptr()))
        normed = torch.nn.functional.rms_norm(x.double(), (features,), weight.double(), 1e-6)
        torch.testing.assert_close(out.double(), normed @ projection.double().T, rtol=1e-4, atol=1e-4)
    assert len(recorded) == 1


def test_counters_of_a_recording_outlive_their_successors() -> None:
    """A kernel's counters are recorded by address; another kernel may have them replaced by more."""
    rows, features, out_features = 2, 64, 16
    weight, projection = torch.ones(features, device=DEVICE), torch.randn(out_features, features, device=DEVICE)
    run = replay.bind(INDEX, norm_and_product(features, out_features))
    x = torch.randn(rows, features, device=DEVICE)
    results = []
    for _ in range(2):
        out = torch.full((rows, out_features), torch.nan, device=DEVICE)
        run((rows, weight.data_ptr(), projection.data_ptr()), (x.data_ptr(), out.data_ptr()))
        results.append(out)
        grown = scratch.counters(INDEX, 2 * scratch.counters(INDEX, 1).numel())
        torch.full_like(grown, 7)  # memory that was given back would be this one's
    assert torch.equal(*results)


def test_threads_have_an_arena_each() -> None:
    found: dict[int, int] = {}

    def ask() -> None:
        found[threading.get_ident()] = scratch.arena(INDEX, 0, 100)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    ask()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found.values())) == len(found)
    assert all(address % 256 == 0 for address in found.values())
    here = found[threading.get_ident()]
    assert scratch.arena(INDEX, 0, 1 << 20) == here
    assert scratch.arena(INDEX, 0, (1 << 20) + 1) == scratch.arena(INDEX, 0, 1) != here
