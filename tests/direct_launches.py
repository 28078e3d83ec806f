"""The direct launcher on the stand-in driver, against Triton's own launches; run by `test_launch.py`, never by itself.

The machine code, the C launcher and the arguments are Triton's; only what is below and beside them is made up.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from standin import Launch, Standin, install

from vllm_gems import launch, replay
from vllm_gems.catalog import catalog
from vllm_gems.errors import LateCompileError, Refused
from vllm_gems.launch import Build, launcher

# Before anything asks Triton for its driver, which it keeps.
STANDIN = install()


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """Nothing launched yet, device 0 current, no capture."""
    monkeypatch.setattr(launch, "_LAUNCHES", {})
    yield STANDIN
    STANDIN.set_device(0)
    STANDIN.capturing = False


def of_every_kind() -> Iterator[Any]:
    """A build of every signature that the kernels have in bfloat16: tensors absent or not, aligned or not."""
    seen = set()
    for kernel in catalog().kernels.values():
        for case in kernel.cases:
            for build in kernel.builds(case, "bfloat16"):
                kind = build.function.__name__, build.types, build.aligned
                if kind not in seen:
                    seen.add(kind)
                    name = f"{kernel.name}-{case.name}-{'aligned' if build.aligned else 'misaligned'}"
                    yield pytest.param(build, id=name.replace(" ", "_"))


BUILDS = list(of_every_kind())
ONE: Build = BUILDS[0].values[0]


def arguments(build: Build) -> list[Any]:
    """What Triton's own launch takes: tensors, None, and numbers that are all different.

    Triton compiles for the values that it sees, so they must be of the kind that the build promises, and none may be 1.
    """
    found: list[Any] = []
    for index, kind in enumerate(build.types):
        if kind is None:
            found.append(None)
        elif kind.startswith("*"):
            found.append(torch.zeros(64, dtype=launch._DTYPES[kind[1:]])[0 if build.aligned else 1 :])
        elif kind == "fp32":
            found.append(1e-6)
        else:
            found.append(16 * (index + 2) if build.aligned and kind.endswith("/16") else 100 * index + 7)
    return found


def addresses(args: list[Any]) -> list[Any]:
    """The same for a launcher of ours."""
    return [0 if a is None else a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]


def by_triton(build: Build, grid: int, args: list[Any]) -> Launch:
    with STANDIN.launches() as found:
        build.function[(grid,)](*args, **dict(build.constexprs), **build.options())
    return found[0]


def by(function: launch.Launch, grid: int, args: list[Any]) -> Launch:
    with STANDIN.launches() as found:
        function(grid, *addresses(args))
    return found[0]


@pytest.fixture
def triton_launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The grids that go through `kernel[grid]` of `ONE` from now on."""
    grids = []
    subscript = type(ONE.function).__getitem__

    def note(function: Any, grid: tuple[int]) -> Any:
        grids.append(grid[0])
        return subscript(function, grid)

    monkeypatch.setattr(type(ONE.function), "__getitem__", note)
    return grids


def test_this_triton_is_launched_directly(standin: Standin, triton_launches: list[int]) -> None:
    """Else everything below would compare Triton with itself."""
    assert launch.direct_refuses() is None
    by(launcher(ONE, 0), 3, arguments(ONE))
    assert triton_launches == []


@pytest.mark.parametrize("build", BUILDS)
def test_the_same_reaches_the_driver(build: Build, standin: Standin) -> None:
    """Machine code, grid, block, shared memory, stream and every byte of the parameters."""
    args = arguments(build)
    expected = by_triton(build, 3, args)
    assert expected.grid == (3, 1, 1)
    assert expected.block == (32 * build.num_warps, 1, 1)
    assert by(launcher(build, 0), 3, args) == expected
    assert by(launch._by_subscript(build), 3, args) == expected


def test_kernels_stay_loaded(standin: Standin) -> None:
    """Triton unloads the machine code of a compiled kernel that nobody holds any more."""
    direct = launcher(ONE, 0)
    gc.collect()
    args = arguments(ONE)
    assert by(direct, 3, args).parameters == by_triton(ONE, 3, args).parameters


def test_absent_pointers_are_not_passed(standin: Standin) -> None:
    """Whatever stands in their place, the kernel has no such parameter."""
    build = next(param.values[0] for param in BUILDS if None in param.values[0].types)
    args = arguments(build)
    direct = launcher(build, 0)
    expected = by(direct, 3, args)
    instead = [12345 if a is None else a for a in args]
    assert by(direct, 3, instead) == expected


def test_empty_grid_launches_nothing(standin: Standin) -> None:
    direct = launcher(ONE, 0)
    with standin.launches() as found:
        direct(0, *addresses(arguments(ONE)))
    assert found == []


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called(name: str, standin: Standin, triton_launches: list[int]) -> None:
    """A profiler's hooks are told of every launch while they are set, and cost nothing afterwards."""
    hook, told = getattr(triton.knobs.runtime, name), []
    direct, args = launcher(ONE, 0), arguments(ONE)
    expected = by(direct, 3, args)

    def note(metadata: Any) -> None:
        told.append(metadata.get()["name"])

    hook.add(note)
    try:
        assert by(direct, 3, args) == expected
    finally:
        hook.remove(note)
    assert told == [ONE.function.__name__]
    assert triton_launches == [3]
    assert by(direct, 3, args) == expected
    assert len(told) == len(triton_launches) == 1


def test_another_current_device(standin: Standin, triton_launches: list[int]) -> None:
    """The kernel runs where it was loaded, and the caller's device is current again afterwards."""
    direct, args = launcher(ONE, 0), arguments(ONE)
    standin.set_device(1)
    found = by(direct, 3, args)
    assert (found.device, found.stream) == (0, standin.stream(0))
    assert triton_launches == [3]
    assert standin.device == 1


def test_launcher_for_a_device_that_is_not_current(standin: Standin, triton_launches: list[int]) -> None:
    direct, args = launcher(ONE, 1), arguments(ONE)
    assert standin.device == 0
    standin.set_device(1)
    found = by(direct, 3, args)
    assert (found.device, found.stream) == (1, standin.stream(1))
    assert triton_launches == []


def test_every_device_has_a_launcher_of_its_own(standin: Standin) -> None:
    args = arguments(ONE)
    for device in (0, 1):
        standin.set_device(device)
        assert by(launcher(ONE, device), 3, args).device == device


def _unknown_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "99.0.0")


def _debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)


@pytest.mark.parametrize("change", [_unknown_release, _debugging])
def test_what_cannot_be_direct_is_launched_by_triton(
    change: Any, standin: Standin, triton_launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(ONE)
    direct = by(launcher(ONE, 0), 3, args)
    launch._LAUNCHES.clear()
    change(monkeypatch)
    assert launch.direct_refuses() is not None
    assert by(launcher(ONE, 0), 3, args)._replace(code=direct.code) == direct
    assert triton_launches == [3]


def test_nothing_is_compiled_during_a_capture(standin: Standin) -> None:
    args = arguments(ONE)
    standin.capturing = True
    before = standin.loaded
    with pytest.raises(Refused, match="is not compiled yet and a CUDA graph is being captured"):
        launcher(ONE, 0)
    assert standin.loaded == before

    standin.capturing = False
    expected = by(launcher(ONE, 0), 3, args)
    standin.capturing = True
    before = standin.loaded
    assert by(launcher(ONE, 0), 3, args) == expected
    assert standin.loaded == before


def test_compilations_are_noted_and_told_as_tritons_own_are(
    standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "COMPILED", [])
    launcher(ONE, 0)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: told.append(about))
    launcher(ONE, 0)
    assert (len(launch.COMPILED), told) == (1, [])
    ONE.function.device_caches.clear()  # of what other tests had Triton compile
    by_triton(ONE, 3, arguments(ONE))
    launcher(ONE, 1)
    early, late = launch.COMPILED
    assert (early.late, late.late, early.name, late.name) == (False, True, *2 * [ONE.function.__name__])
    assert early.at <= late.at
    tritons, ours = told[-2:]
    assert set(ours) == set(tritons)
    assert (ours["fn"].name.split(".")[-1], ours["fn"].module) == (ONE.function.__name__, tritons["fn"].module)


def test_whoever_forbids_compilations_stops_them(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(**about: Any) -> None:
        raise RuntimeError(f"{about['fn'].name} during inference")

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", forbid)
    with pytest.raises(LateCompileError, match=f"{ONE.function.__name__} during inference"):
        launcher(ONE, 0)
    with pytest.raises(LateCompileError):
        launcher(ONE, 0)


def test_threads_share_one_compilation(standin: Standin) -> None:
    before, found = standin.loaded, []
    together = threading.Barrier(8)

    def ask() -> None:
        together.wait()
        found.append(launcher(ONE, 0))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert standin.loaded == before + 1


@triton.jit
def strided_copy_kernel(x_ptr, y_ptr, numel, stride, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at * stride, mask=at < numel) * scale, mask=at < numel)


def test_numbers_in_the_machine_code_are_not_passed(standin: Standin) -> None:
    """As Triton does it with a stride of 1; and with any number, if the build says so."""
    types = ("*fp32", "*fp32", *launch.integers((4096, 1), "i32"), "fp32")
    assert types[2:4] == ("i32/16", "=1")
    build = Build(strided_copy_kernel, types, (("BLOCK", 32),))
    args = [torch.zeros(4096), torch.zeros(4096), 4096, 1, 0.5]
    expected = by_triton(build, 3, args)
    assert by(launcher(build, 0), 3, args) == expected
    args[3] = 12345
    assert by(launcher(build, 0), 3, args) == expected


@triton.jit
def needs_scratch_kernel(x_ptr, BLOCK: tl.constexpr):
    """Writes a descriptor into memory that whoever launches must provide."""
    x = tl.make_tensor_descriptor(x_ptr, shape=[BLOCK, BLOCK], strides=[BLOCK, 1], block_shape=[BLOCK, BLOCK])
    x.store([0, 0], x.load([0, 0]))


def test_kernels_that_need_scratch_memory_get_it(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the allocator that the user gave Triton: the direct launcher has none."""
    scratch = torch.zeros(4096, dtype=torch.int8)
    asked = []

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        asked.append(size)
        return scratch

    triton.set_allocator(allocate)
    build = Build(needs_scratch_kernel, ("*bf16",), (("BLOCK", 32),))
    args = [torch.zeros(1024, dtype=torch.bfloat16)]
    found = by(launcher(build, 0), 3, args)
    assert len(asked) == 1
    assert scratch.data_ptr().to_bytes(8, "little") in found.parameters
    assert found == by_triton(build, 3, args)


# Launches by launch.c: what is settled once and passed no more


@pytest.fixture(params=["in C", "by Triton's launcher"])
def either(request: pytest.FixtureRequest, standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    """With launch.c, and as where there is no compiler for it."""
    if request.param != "in C":
        monkeypatch.setattr(launch, "in_c", lambda name: None)


def is_in_c(function: Any) -> bool:
    return hasattr(function, "settle")


def test_kernels_are_launched_in_c(standin: Standin) -> None:
    """Else the tests above would have looked at Triton's launcher."""
    assert all(is_in_c(launcher(param.values[0], 0)) for param in BUILDS)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("build", BUILDS[::5])
def test_what_is_settled_reaches_the_driver(build: Build) -> None:
    """Addresses are passed and numbers settled, and the other way round."""
    args = arguments(build)
    whole = launcher(build, 0)
    expected = by(whole, 3, args)
    assert expected == by_triton(build, 3, args)
    flat = addresses(args)
    kinds = ["" if kind is None else kind for kind in build.types]
    for holes in ([kind.startswith("*") for kind in kinds], [not kind.startswith("*") for kind in kinds]):
        template = tuple(... if hole else arg for hole, arg in zip(holes, flat, strict=True))
        settled = launch.settled(whole, 3, template)
        with STANDIN.launches() as found:
            settled(*(arg for hole, arg in zip(holes, flat, strict=True) if hole))
        assert found == [expected]


@pytest.mark.usefixtures("either")
def test_doubles_and_long_integers(standin: Standin) -> None:
    types = ("*fp32", "*fp32", "i64", "i64", "fp64")
    build = Build(strided_copy_kernel, types, (("BLOCK", 32),), aligned=False)
    args = [0, 16, -(1 << 40), 1 << 40, 1 / 3]
    with standin.launches() as found:
        launcher(build, 0)(3, *args)
    assert found[0].parameters[:40] == struct.pack("<QQqqd", *args)


@pytest.mark.usefixtures("either")
def test_settled_launches_obey_what_others_obey(triton_launches: list[int]) -> None:
    """A hook, another current device, a recording."""
    args = addresses(arguments(ONE))
    whole = launcher(ONE, 0)
    settled = launch.settled(whole, 3, (..., *args[1:]))
    hook, told = triton.knobs.runtime.launch_enter_hook, []
    hook.add(told.append)
    try:
        settled(args[0])
    finally:
        hook.remove(told.append)
    STANDIN.set_device(1)
    with STANDIN.launches() as found:
        settled(args[0])
    assert (len(told), triton_launches) == (1, [3, 3])
    assert (found[0].device, found[0].stream, STANDIN.device) == (0, STANDIN.stream(0), 1)

    STANDIN.set_device(0)
    tape = replay.Tape()
    with launch.recording_on(tape), STANDIN.launches() as found:
        settled(replay.At(64, slot=2))
    assert found == []
    ((by, native, grid, (first, *others), _),) = tape.entries
    assert (by, grid, first.slot, others) == (whole, 3, 2, args[1:])
    assert native is not None


def test_an_argument_that_does_not_fit_is_an_error(standin: Standin) -> None:
    build = Build(strided_copy_kernel, ("*fp32", "*fp32", "i32", "i32", "fp32"), (("BLOCK", 32),), aligned=False)
    direct = launcher(build, 0)
    args = [16, 32, 5, 6, 0.5]
    with standin.launches() as found:
        for index, value, error in (
            (0, -1, OverflowError), (0, 1 << 64, OverflowError), (0, 0.5, TypeError), (2, 1 << 31, OverflowError),
            (3, "6", TypeError), (4, "0.5", TypeError),
        ):  # fmt: skip
            with pytest.raises(error):
                direct(3, *args[:index], value, *args[index + 1 :])
        with pytest.raises(TypeError, match="a launch of 6 arguments was given 5"):
            direct(3, *args[:-1])
        with pytest.raises(TypeError):
            direct(3, *args[:-1], scale=0.5)
        for grid, template in ((-1, args), (3, args[:-1]), (3, [*args[:-1], "0.5"])):
            with pytest.raises((TypeError, ValueError)):
                direct.settle(grid, tuple(template), print)
        settled = direct.settle(3, (..., *args[1:]), print)
        with pytest.raises(ValueError, match="settled once"):
            settled.settle(3, (16,), print)
    assert found == []


def test_what_the_driver_refuses_triton_does_or_explains(standin: Standin, triton_launches: list[int]) -> None:
    """A thread may have no context yet, which Triton makes; what is wrong still is told in Triton's words."""
    direct, args = launcher(ONE, 0), arguments(ONE)
    expected = by(direct, 3, args)
    standin.library.standin_fail(1)
    assert by(direct, 3, args) == expected
    assert triton_launches == [3]
    standin.library.standin_fail(2)
    with pytest.raises(RuntimeError, match=r"Triton Error \[CUDA\]"):
        direct(3, *addresses(args))


def test_launches_go_when_nobody_holds_them(standin: Standin) -> None:
    """And with the last one the kernel, not before."""
    build = Build(strided_copy_kernel, ("*fp32", "*fp32", "i32", "i32", "fp32"), (("BLOCK", 64),), aligned=False)
    settled = launch.settled(launcher(build, 0), 3, (..., ..., 5, 6, 0.5))
    kind = type(settled)

    def left() -> int:
        gc.collect()
        return sum(type(each) is kind for each in gc.get_objects())

    before = left()
    launch._LAUNCHES.clear()
    assert left() == before  # what is settled asks the other, where it is not to launch
    with standin.launches() as found:
        settled(16, 32)
    assert len(found) == 1
    del settled
    assert left() == before - 2


# Recordings, made again in C


@pytest.fixture
def in_c(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is recorded must be launched by replay.c, with memory that seems to be at ARENA."""

    def fail(*_: Any) -> None:
        raise AssertionError("launched one by one")

    monkeypatch.setattr(replay, "_one_by_one", fail)
    monkeypatch.setattr(replay, "arena", lambda device, stream, nbytes: ARENA)


ARENA = 0x7000_0000


def replayed(run: Any, facts: tuple[Any, ...], addresses: tuple[int, ...]) -> list[Launch]:
    with STANDIN.launches() as found:
        run(facts, addresses)
    return found


@pytest.mark.parametrize("build", BUILDS)
def test_a_recording_is_the_same_launch(build: Build, in_c: None) -> None:
    """With the addresses of the first time, and with others; numbers that are no addresses are recorded as they are."""
    direct, args = launcher(build, 0), addresses(arguments(build))
    pointers = [index for index, kind in enumerate(build.types) if kind is not None and kind.startswith("*")]

    def launches(memory: Any, *at: int) -> None:
        now = list(args)
        for index, address in zip(pointers, at, strict=True):
            now[index] = address
        direct(3, *now)

    run = replay.bind(0, launches)
    for shift in (0, 1 << 33):
        for index in pointers:
            args[index] += shift
        with STANDIN.launches() as expected:
            direct(3, *args)
        assert replayed(run, (), tuple(args[index] for index in pointers)) == expected


def test_launches_of_a_recording_keep_their_order_and_their_memory(in_c: None) -> None:
    """Two launches and a function in between, which share an address that the recording laid out."""
    direct, args = launcher(ONE, 0), addresses(arguments(ONE))
    called: list[tuple[int, ...]] = []

    def function(*args: int) -> int:
        called.append(args)
        return 0

    by = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_uint64,) * 16)(function)

    def launches(memory: Any, first: int, second: int) -> None:
        between = memory(100), memory(300), memory(1)
        direct(2, between[0], *args[1:])
        launch.recording().call(by, 5, second, between[1], None, launch.recording().stream())
        direct(4, between[2] + 16, *args[1:])

    run = replay.bind(0, launches)
    for _ in range(2):
        one, other = replayed(run, (), (64, 80))
        assert (one.grid, other.grid) == ((2, 1, 1), (4, 1, 1))
        assert one.parameters[:8] == ARENA.to_bytes(8, "little")
        assert other.parameters[:8] == (ARENA + 256 + 512 + 16).to_bytes(8, "little")
    assert called == [(5, 80, ARENA + 256, 0, STANDIN.stream(0), *(0,) * 11)] * 2


def test_while_a_graph_is_captured_nothing_is_replayed_and_memory_is_pytorchs(
    standin: Standin, in_c: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the graph keeps both the launches and the memory."""
    direct, args = launcher(ONE, 0), addresses(arguments(ONE))
    given: list[torch.Tensor] = []

    def allocator(device: int, dtype: torch.dtype) -> Any:
        def empty(rows: int, width: int) -> torch.Tensor:
            given.append(torch.empty(rows, width, dtype=dtype))
            return given[-1]

        return empty

    def launches(memory: Any, x: int) -> None:
        direct(2, memory(100), *args[1:])
        direct(3, x, *args[1:])

    monkeypatch.setattr(launch, "allocator", allocator)
    run = replay.bind(0, launches)
    for captured in (True, False, True):
        standin.capturing = captured
        first, second = replayed(run, (), (64,))
        assert (first.grid[0], second.grid[0]) == (2, 3)
        where = given[-1].data_ptr() if captured else ARENA
        assert first.parameters[:8] == where.to_bytes(8, "little")
    assert [each.numel() for each in given] == [100, 100]


def test_a_status_of_a_recorded_function_is_an_error(in_c: None) -> None:
    by = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_uint64,) * 16)(lambda *_: 7)
    direct, args = launcher(ONE, 0), addresses(arguments(ONE))

    def launches(memory: Any) -> None:
        direct(1, *args)
        launch.recording().call(by)
        direct(1, *args)

    with STANDIN.launches() as found, pytest.raises(RuntimeError, match="launch 2 of 3 returned status 7"):
        replay.bind(0, launches)((), ())
    assert len(found) == 1


def test_a_recording_whose_first_launch_is_refused_is_launched_one_by_one(
    standin: Standin, triton_launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread may have no context yet, which Triton makes; what is wrong still is told in Triton's words."""
    monkeypatch.setattr(replay, "arena", lambda device, stream, nbytes: ARENA)
    direct, args = launcher(ONE, 0), addresses(arguments(ONE))

    def launches(memory: Any, x: int) -> None:
        direct(0, x, *args[1:])
        direct(3, memory(100), *args[1:])
        direct(4, x, *args[1:])

    run = replay.bind(0, launches)
    expected = replayed(run, (), (args[0],))
    assert [each.grid[0] for each in expected] == [3, 4]
    standin.library.standin_fail(1)
    assert replayed(run, (), (args[0],)) == expected
    assert triton_launches == []  # a launch by itself was not refused any more
    standin.library.standin_fail(2)
    assert replayed(run, (), (args[0],)) == expected
    assert triton_launches == [3]
    standin.library.standin_fail(3)
    with STANDIN.launches() as found, pytest.raises(RuntimeError, match=r"Triton Error \[CUDA\]"):
        run((), (args[0],))
    assert found == []


def test_a_recording_that_has_begun_is_not_begun_again(in_c: None) -> None:
    """What is refused after other launches, or after a function, which may have launched some, is an error."""

    @ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_uint64,) * 16)
    def refuses_the_next(*_: int) -> int:
        STANDIN.library.standin_fail(1)
        return 0

    direct, args = launcher(ONE, 0), addresses(arguments(ONE))

    def launches(memory: Any, before: bool) -> None:
        if before:
            direct(1, *args)
        launch.recording().call(refuses_the_next)
        direct(1, *args)

    for before in (False, True):
        message = f"launch {2 + before} of {2 + before} returned status"
        with STANDIN.launches() as found, pytest.raises(RuntimeError, match=message):
            replay.bind(0, launches)((before,), ())
        assert len(found) == before


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_told_of_recorded_launches(name: str, standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "arena", lambda device, stream, nbytes: ARENA)
    hook, told = getattr(triton.knobs.runtime, name), []
    direct, args = launcher(ONE, 0), addresses(arguments(ONE))
    run = replay.bind(0, lambda memory, x: direct(3, x, *args[1:]))
    expected = replayed(run, (), (args[0],))

    def note(metadata: Any) -> None:
        told.append(metadata.get()["name"])

    hook.add(note)
    try:
        assert replayed(run, (), (args[0],)) == expected
    finally:
        hook.remove(note)
    assert told == [ONE.function.__name__]
    assert replayed(run, (), (args[0],)) == expected
    assert len(told) == 1


def test_an_empty_grid_of_a_recording_launches_nothing(in_c: None) -> None:
    direct, args = launcher(ONE, 0), addresses(arguments(ONE))
    assert replayed(replay.bind(0, lambda memory: direct(0, *args)), (), ()) == []


def test_programs_that_do_not_fit_together_are_refused() -> None:
    driver, module = launch.driver(), launch.in_c("replay")
    assert driver is not None
    launched = (1).to_bytes(8, "little") + b"".join(number.to_bytes(4, "little") for number in (1, 32, 0, 1, 2, 0))
    for cells, launches, patches in ((16, launched, b""), (8, b"", bytes((9,)) + bytes(15))):
        with pytest.raises(ValueError, match="do not fit"):
            module.make(driver.launch, 2, bytes(cells), launches, patches)
    program = module.make(driver.launch, 2, b"", b"", b"")
    with pytest.raises(TypeError, match="1 values for a program of 2"):
        module.run(program, 0)
    with pytest.raises(OverflowError):
        module.run(program, 0, -1)
