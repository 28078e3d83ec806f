"""Launches recorded once and made again in one C call.

What a settled layer does on the host is the same at every step but for a few addresses. So its launches are made once
with numbers that remember where they come from (`At`): nothing runs, and what would be launched is written down, with
each argument either as it is or as "this address and so many bytes". From then on a step sets those and launches
everything in `replay.c`, without Python in between. This is what a CUDA graph does, for the host's half alone: the
GPU's is as in eager mode, every kernel a launch of its own on the current stream, and nothing is captured or replayed
there. Memory that launches need among themselves is laid out while they are recorded, in one arena of the stream.

Without a C compiler or a driver that tells a kernel's parameters, the same launches are made one by one, from Python;
and so they are where the driver refuses the first: a thread may have no context yet, which Triton makes.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import launch as launching
from .launch import CPU, Native
from .scratch import arena

# Recordings of one binding that are kept; the oldest goes.
MOST = 512

_STREAM, _ARENA = 0, 1  # slots of every recording, before the caller's
_ALIGNMENT = 256
# While recording, where memory seems to be; nothing is read or written then.
_NOWHERE = 1 << 40
_ARGUMENTS = 16  # of a library's function


class At(int):
    """A number that may be another one at the next run: that of a slot and an offset. Anything that cannot be put so
    raises, since what is made of such a number would be recorded as it is this time; its lowest bits are an exception,
    which are the same at every run of a recording."""

    slot: int
    offset: int

    def __new__(cls, value: int, slot: int, offset: int = 0) -> At:
        made = super().__new__(cls, value)
        made.slot, made.offset = slot, offset
        return made

    def __add__(self, other: int) -> At:
        if isinstance(other, At):
            raise TypeError("a sum of two addresses")
        return At(int(self) + other, self.slot, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: int) -> At:
        return self + -other

    def _changes(self, *_: object) -> Any:
        raise TypeError("an address that is to be recorded can be added to, and nothing else")

    __mul__ = __rmul__ = __floordiv__ = __rfloordiv__ = __truediv__ = __mod__ = __rmod__ = _changes
    __rsub__ = __neg__ = __lshift__ = __rshift__ = __invert__ = __xor__ = _changes


class _Entry(NamedTuple):
    """One launch, or one call of a library's function."""

    by: Callable[..., Any]  # by(grid, *args) launches it; of a function by(*args) calls it
    native: Native | None
    grid: int
    args: tuple[Any, ...]
    function: int = 0  # the address of a library's function


class _Memory:
    """In place of a tensor that nobody reads in Python: where it is."""

    __slots__ = ("_at",)

    def __init__(self, at: At) -> None:
        self._at = at

    def data_ptr(self) -> At:
        return self._at


class Tape:
    """What a thread launches while it records."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.held: list[Any] = []
        self.bytes = 0

    def launch(self, by: Callable[..., None], native: Native | None, grid: int, args: tuple[Any, ...]) -> None:
        if isinstance(grid, At):
            raise TypeError("a grid that depends on an address")
        self.entries.append(_Entry(by, native, grid, args))

    def call(self, by: Any, *args: Any) -> None:
        """`by` is a ctypes function of up to 16 integers and addresses, which returns 0 if all is well."""
        address = int(ctypes.cast(by, ctypes.c_void_p).value or 0)
        self.entries.append(_Entry(by, None, 0, args, address))

    def stream(self) -> At:
        return At(0, _STREAM)

    def memory(self, nbytes: int) -> _Memory:
        """For this recording's launches alone, which may leave anything in it."""
        start = self.bytes
        self.bytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return _Memory(At(_NOWHERE + start, _ARENA, start))

    def hold(self, something: Any) -> None:
        """Keep what the launches need for as long as they may be made again."""
        self.held.append(something)


class _Recording(NamedTuple):
    entries: tuple[_Entry, ...]
    held: tuple[Any, ...]
    bytes: int
    program: Any  # of replay.c, or None


def _cells_of(entry: _Entry) -> list[Any] | None:
    """An entry's arguments, one for a cell, as the kernel or the function reads them; None if that is not known."""
    if entry.function:
        if len(entry.args) > _ARGUMENTS:
            return None
        return [0 if arg is None else arg for arg in entry.args] + [0] * (_ARGUMENTS - len(entry.args))
    known = launching.layout(entry.native) if entry.native is not None else None
    if known is None:
        return None
    letters, parameters = known
    found: list[Any] = []
    for letter, arg in zip(letters, entry.args, strict=True):
        if letter in _FLOATS:
            found.append(int.from_bytes(struct.pack(_FLOATS[letter], arg), "little"))
        elif letter != " ":
            found.append(arg)
    return found + [0] * (parameters - len(found))


_FLOATS = {"f": "<f", "d": "<d"}


def _module() -> Any:
    """`replay.c`, or None where launches are made one by one."""
    return launching.in_c("replay") if launching.driver() is not None else None


def _program(entries: list[_Entry], slots: int) -> Any:
    """All entries in one, or None if one of them cannot be made natively."""
    driver, module = launching.driver(), _module()
    if driver is None or module is None:
        return None
    cells, launches, patches = array("Q"), bytearray(), bytearray()
    for entry in entries:
        args = _cells_of(entry)
        if args is None:
            return None
        kernel, threads, shared = (entry.function, 0, 0)
        if entry.native is not None:
            kernel, threads, shared = entry.native.kernel, entry.native.threads, entry.native.shared
        launches += struct.pack("<QIIIIII", kernel, entry.grid, threads, shared, len(cells), len(args), 0)
        for arg in args:
            if isinstance(arg, At):
                patches += struct.pack("<IIq", len(cells), arg.slot, arg.offset)
            cells.append(int(arg) & (1 << 64) - 1)
    return module.make(driver.launch, slots, cells.tobytes(), bytes(launches), bytes(patches))


def _one_by_one(entries: tuple[_Entry, ...], values: tuple[int, ...]) -> None:
    for entry in entries:
        args = [values[arg.slot] + arg.offset if isinstance(arg, At) else arg for arg in entry.args]
        if not entry.function:
            entry.by(entry.grid, *args)
        elif status := entry.by(*args):
            raise RuntimeError(f"{getattr(entry.by, '__name__', 'a function')} returned status {status}")


def _capturing(device: int) -> Callable[[], bool]:
    """Whether a CUDA graph is being captured on the current stream."""
    if device == CPU:
        return lambda: False
    found: Callable[[], bool] = torch._C._cuda_isCurrentStreamCapturing
    return found


def bind(
    device: int, launches: Callable[..., None], most: int = MOST
) -> Callable[[tuple[Any, ...], tuple[int, ...]], None]:
    """run(facts, addresses), which makes what `launches(memory, *facts, *addresses)` launches on the current stream.

    launches: what it launches may depend on facts, which are hashable, and on the lowest four bits of addresses; it is
    called once for each combination, and must do nothing but launch kernels (by what `launch.launcher` gave), and
    library functions that know of `recording()`. memory(nbytes) -> the address of so many bytes, aligned to 256, that
    stay its own until the last of its launches.

    While a CUDA graph is being captured they are made from Python, in memory of the graph's own: the arena may be
    another one when that is replayed.

    What makes launches in C is compiled now, if it never was. run raises what `launches` raises; then nothing was
    launched.
    """
    _module()
    capturing, empty = _capturing(device), launching.allocator(device, torch.uint8)
    raw_stream = launching.raw_streams(device)
    ready = launching.readiness(device)
    recordings: dict[Any, _Recording] = {}
    replay: Callable[..., bool] | None = None

    def record(key: Any, facts: tuple[Any, ...], addresses: tuple[int, ...]) -> _Recording:
        nonlocal replay
        tape, slots = Tape(), _ARENA + 1 + len(addresses)
        with launching.recording_on(tape):
            launches(
                lambda nbytes: tape.memory(nbytes).data_ptr(),
                *facts,
                *(At(address, _ARENA + 1 + index) for index, address in enumerate(addresses)),
            )
        program = _program(tape.entries, slots)
        if program is not None:
            replay = _module().run
        while len(recordings) >= most:
            recordings.pop(next(iter(recordings)), None)
        recordings[key] = found = _Recording(tuple(tape.entries), tuple(tape.held), tape.bytes, program)
        return found

    def run(facts: tuple[Any, ...], addresses: tuple[int, ...]) -> None:
        if capturing():
            launches(launching.holding(empty), *facts, *addresses)
            return
        stream = raw_stream(device)
        bits = 0
        for address in addresses:
            bits |= address
        key: Any = (stream, facts)
        if bits & 15:
            key = (stream, facts, tuple(address & 15 for address in addresses))
        recording = recordings.get(key) or record(key, facts, addresses)
        at = arena(device, stream, recording.bytes)
        native = recording.program is not None and ready()
        if not native or not replay(recording.program, stream, at, *addresses):  # type: ignore[misc]
            _one_by_one(recording.entries, (stream, at, *addresses))

    return run
