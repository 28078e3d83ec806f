"""Which kernel `mla_decode` takes and how it launches the one for Hopper; and how that divides its work: the kernel's
own lines, run on arrays."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_gems.kernels import mla_decode, mla_decode_hopper
from vllm_gems.kernels.mla_decode import Latents, bind_mla_decode, hopper_refuses, shares

LATENTS, GPU = Latents(128, 512, 64, 64), 0
MULTIPROCESSORS = 132


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As on the one machine that the kernel is for."""

    def forget() -> None:
        for cached in (hopper_refuses, bind_mla_decode):
            cached.cache_clear()

    monkeypatch.setattr(mla_decode, "INTERPRETED", False)
    monkeypatch.setattr(mla_decode, "triton_release", lambda: (3, 6))
    monkeypatch.setattr(mla_decode, "_multiprocessors", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    forget()
    yield monkeypatch
    forget()


@pytest.mark.parametrize("heads", [64, 128, 192])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("hopper")
def test_it_is_taken(heads: int, page: int, dtype: torch.dtype) -> None:
    assert hopper_refuses(Latents(heads, 512, 64, page), dtype, GPU) is None


@pytest.mark.parametrize(
    ("changed", "dtype", "words"),
    [
        ({"num_heads": 16}, torch.bfloat16, "16 heads, not a multiple of 64"),
        ({"num_heads": 96}, torch.bfloat16, "96 heads, not a multiple of 64"),
        ({"latent": 256}, torch.bfloat16, "256 and 64 elements, not 512 and 64"),
        ({"block_size": 48}, torch.bfloat16, "pages of 48 tokens"),
        ({"block_size": 96}, torch.bfloat16, "pages of 96 tokens"),
        ({}, torch.float32, "dtype torch.float32"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_shapes_that_it_is_not_for(changed: dict[str, int], dtype: torch.dtype, words: str) -> None:
    assert words in str(hopper_refuses(LATENTS._replace(**changed), dtype, GPU))


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_gpus(hopper: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert "no Hopper" in str(hopper_refuses(LATENTS, torch.bfloat16, GPU))


@pytest.mark.parametrize("release", [(3, 5), (3, 7), (3, 9), (4, 0)])
def test_other_releases_of_triton(hopper: pytest.MonkeyPatch, release: tuple[int, int]) -> None:
    hopper.setattr(mla_decode, "triton_release", lambda: release)
    assert "Gluon" in str(hopper_refuses(LATENTS, torch.bfloat16, GPU))


class Launches:
    """What `bind_mla_decode` launches: of which kernel, how many programs, with which arguments by name."""

    def __init__(self, hopper: pytest.MonkeyPatch, latents: Latents) -> None:
        self.made: list[tuple[str, int, dict[str, Any]]] = []
        self.scratch = torch.empty(0)
        hopper.setattr(mla_decode, "launcher", self._launcher)
        hopper.setattr(mla_decode, "allocator", lambda device, dtype: self._empty)
        self.attend = bind_mla_decode(latents, torch.bfloat16, GPU)
        self.latents = latents

    def _empty(self, rows: int, size: int) -> torch.Tensor:
        self.scratch = torch.empty((rows, size))
        return self.scratch

    def _launcher(self, build: Any, device: int) -> Any:
        names = build.function.arg_names[: len(build.types)]

        def launch(programs: int, *args: Any) -> None:
            # As Triton takes it: what the build says is a multiple of 16 is one, and what it says is absent is null.
            for name, kind, value in zip(names, build.types, args, strict=True):
                assert (kind is None) == (value == 0 and name in ("partial_ptr", "partial_lse_ptr", "pieces_ptr")), name
                if build.aligned and kind and (kind.startswith("*") or kind.endswith("/16")):
                    assert value % 16 == 0 or name == "pieces_ptr", name
            self.made.append((build.function.__name__, programs, dict(zip(names, args, strict=True))))

        return launch

    def __call__(self, num_reqs: int, count: int, **changed: int) -> None:
        heads = self.latents.num_heads
        args = {
            "query_at": 1 << 20, "query_stride": heads * 512, "query_head_stride": 512, "rope_at": 2 << 20,
            "rope_stride": heads * 192, "rope_head_stride": 192, "cache_at": 3 << 20, "cache_block_stride": 64 * 576,
            "block_table_at": 4 << 20, "block_table_stride": 1001, "seq_lens_at": 5 << 20, "out_at": 6 << 20,
            "out_stride": heads * 512, "lse_at": 7 << 20,
        }  # fmt: skip
        self.attend(**args | changed, num_reqs=num_reqs, shares=count, scale=0.5)


@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize(("num_reqs", "longest"), [(1, 33), (1, 1024), (1, 65536), (7, 100), (32, 8192), (256, 4096)])
def test_a_program_for_every_multiprocessor(
    hopper: pytest.MonkeyPatch, heads: int, num_reqs: int, longest: int
) -> None:
    launches = Launches(hopper, LATENTS._replace(num_heads=heads))
    launches(num_reqs, shares(num_reqs, heads, longest, GPU))
    (name, programs, args), (merge, merges, pieces) = launches.made
    assert (name, merge) == ("mla_decode_hopper_kernel", "_mla_merge_kernel")
    assert programs == args["shares"] * heads // 64 <= MULTIPROCESSORS
    pairs = num_reqs * -(-longest // 128)
    assert programs == MULTIPROCESSORS or args["shares"] >= pairs  # the GPU is filled, or nothing is left to share
    assert merges % (num_reqs * heads) == 0
    for each in ("partial_ptr", "partial_lse_ptr", "pieces_ptr", "shares", "out_ptr", "lse_ptr", "out_stride"):
        assert pieces[each] == args[each]
    # Results, logarithms and pieces lie one behind the other in what was allocated.
    begin, rows = launches.scratch.data_ptr(), 2 * args["shares"] * heads
    assert args["partial_ptr"] == begin
    assert args["partial_lse_ptr"] == begin + rows * 512 * 4
    assert args["pieces_ptr"] == begin + rows * 513 * 4
    assert begin + launches.scratch.nbytes >= args["pieces_ptr"] + num_reqs * 8


def test_a_request_a_program(hopper: pytest.MonkeyPatch) -> None:
    launches = Launches(hopper, LATENTS)
    launches(3, 1)
    ((name, programs, args),) = launches.made
    assert (name, programs) == ("mla_decode_hopper_kernel", 3 * 2)
    assert (args["query_head_stride"], args["query_rope_head_stride"], args["scale"]) == (512, 192, 0.5)


@pytest.mark.parametrize("name", ["query_at", "cache_at", "rope_head_stride", "cache_block_stride", "out_stride"])
def test_what_is_not_aligned_takes_the_portable_one(hopper: pytest.MonkeyPatch, name: str) -> None:
    launches = Launches(hopper, LATENTS)
    for count in (1, 33):
        launches(2, count, **{name: 8 + (1 << 20)})
    assert [kernel for kernel, _, _ in launches.made] == ["_mla_decode_kernel"] * 2 + ["_mla_merge_kernel"]


class Lengths:
    """A pointer to an array."""

    def __init__(self, values: np.ndarray, at: Any = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, by: Any) -> Lengths:
        return Lengths(self.values, self.at + by)

    def load(self, mask: np.ndarray, other: int) -> np.ndarray:
        return np.where(mask, self.values[np.minimum(self.at, len(self.values) - 1)], other)


class Tensor(np.ndarray):
    """An array that converts as Gluon's tensors do."""

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)


ARRAYS = SimpleNamespace(
    arange=lambda start, stop, layout: np.arange(start, stop),
    load=lambda pointer, mask, other: pointer.load(mask, other),
    where=lambda *args: np.where(*args).view(Tensor),
    maximum=np.maximum,
    minimum=np.minimum,
    max=np.max,
    sum=lambda values, axis: values.sum(axis=axis),
    associative_scan=lambda values, axis, combine: values.cumsum(axis=axis).view(Tensor),
    int32=np.int32,
    constexpr=Any,
)


@pytest.fixture
def share_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """share_of(seq_lens, num_reqs, shares, index, REQS), by the kernel's own source."""
    monkeypatch.setattr(mla_decode_hopper, "gl", ARRAYS)
    monkeypatch.setattr(mla_decode_hopper, "_pairs_of", mla_decode_hopper._pairs_of.fn)
    return mla_decode_hopper._share.fn


@pytest.mark.parametrize("reqs", [4, 256])
@pytest.mark.parametrize(
    "lengths",
    [
        (1,), (0,), (0, 0, 0), (128, 129, 127), (5000, 0, 1, 1, 1, 0), (1, 1, 1, 5000), tuple(range(0, 1300, 100)),
        (256,) * 40,
    ],
)  # fmt: skip
@pytest.mark.parametrize("count", [2, 3, 13, 66, 132])
def test_every_pair_is_of_one_program_and_every_piece_is_found(
    share_of: Any, lengths: tuple[int, ...], count: int, reqs: int
) -> None:
    """Programs walk on from where their share begins, as `_consume` does; then every request is what its pieces are."""
    line = [(request, pair) for request, length in enumerate(lengths) for pair in range(max(1, -(-length // 128)))]
    done: list[tuple[int, int]] = []
    placed: dict[int, list[tuple[int, int]]] = {}
    found: dict[int, tuple[int, int]] = {}
    for index in range(count):
        share, request, position, todo = map(
            int, share_of(Lengths(np.array(lengths)), len(lengths), count, index, reqs)
        )
        at = index * share
        while todo > 0:
            pairs = max(1, -(-lengths[request] // 128))
            stop = min(pairs, position + todo)
            piece = [(request, pair) for pair in range(position, stop)]
            done += piece
            whole = position == 0 and stop == pairs
            if position == 0:
                found[request] = index + 1, int(mla_decode_hopper._pieces.fn(whole, at, pairs, share, index))
            if not whole:
                place = int(mla_decode_hopper._place.fn(position, index, count))
                assert place not in placed
                assert place < 2 * count
                placed[place] = piece
            at += stop - position
            todo, position, request = todo - (stop - position), 0, request + 1
    assert done == line
    for request, (first, pieces) in found.items():
        # As `_mla_merge_kernel` looks for them.
        full, merged = pieces // 2, []
        for each in range(full + pieces % 2):
            merged += placed.pop((each if each < full else count) + first)
        assert sorted(merged) == [pair for pair in line if pair[0] == request and pieces]
    assert not placed
    assert set(found) == set(range(len(lengths)))
