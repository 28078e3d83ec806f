"""What a compiled kernel may use of each GPU: one table, each line with its reason.

Everywhere: no spilling, because memory that the compiler adds is memory that the kernel was tuned without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Device(NamedTuple):
    """An architecture that kernels are compiled for."""

    backend: str  # of Triton's GPUTarget
    arch: int | str
    warp_size: int
    shared_memory: int  # bytes that one program may have


# NVIDIA: the opt-in maximum of a block, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
# AMD: the local data share of a workgroup, 64 KiB on all of CDNA 1 to 3.
DEVICES: dict[str, Device] = {
    "sm_80": Device("cuda", 80, 32, 163 * 1024),
    "sm_90": Device("cuda", 90, 32, 227 * 1024),
    "sm_100": Device("cuda", 100, 32, 227 * 1024),
    "sm_120": Device("cuda", 120, 32, 99 * 1024),
    "gfx90a": Device("hip", "gfx90a", 64, 64 * 1024),
    "gfx942": Device("hip", "gfx942", 64, 64 * 1024),
}


class Registers(NamedTuple):
    """The most 32-bit registers that a thread may take, by Triton's name of the backend."""

    cuda: int
    hip: int


# Device function -> ceiling. These kernels wait for memory, and only other warps fill the wait: an SM has 65536
# registers (64 a thread leave 32 warps in flight, 128 leave 16), a SIMD of CDNA 512 a lane (128 leave 4 waves).
REGISTERS: dict[str, Registers] = {}


def excesses(target: str, function: str, used: dict[str, int]) -> Iterator[str]:
    """What of `used` is over the budget of `function` on `target`, in words.

    used: registers, shared, and every kind of spilled or stack memory under a name of its own.
    """
    device, ceilings = DEVICES[target], REGISTERS.get(function)
    for name, amount in used.items():
        if name == "registers":
            if ceilings is None:
                yield f"{function} has no ceiling in budgets.REGISTERS; it takes {amount}"
            elif amount > getattr(ceilings, device.backend):
                yield f"registers {amount} > {getattr(ceilings, device.backend)}"
        elif name == "shared":
            if amount > device.shared_memory:
                yield f"shared memory {amount} > {device.shared_memory} bytes"
        elif amount:
            yield f"{name} {amount}"


def as_used(measured: dict[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in measured.items()}
