"""What a compiled kernel may use of each GPU: one table, each line with its reason.

No kernel may spill on any: memory that the compiler adds is traffic that nobody planned, in kernels that wait for
memory already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Device(NamedTuple):
    """An architecture that kernels are compiled for."""

    backend: str  # of Triton's GPUTarget, as the two that follow
    arch: int | str
    warp_size: int
    shared_memory: int  # bytes that one program may have


# NVIDIA: the most that a block can opt in to, CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". AMD: the local data share of a workgroup, CDNA 2 and CDNA 3 ISA references.
DEVICES: dict[str, Device] = {
    "sm_80": Device("cuda", 80, 32, 163 * 1024),
    "sm_90": Device("cuda", 90, 32, 227 * 1024),
    "sm_100": Device("cuda", 100, 32, 227 * 1024),
    "sm_120": Device("cuda", 120, 32, 99 * 1024),
    "gfx90a": Device("hip", "gfx90a", 64, 64 * 1024),
    "gfx942": Device("hip", "gfx942", 64, 64 * 1024),
}


class Registers(NamedTuple):
    """The most 32-bit registers that a thread may take, by backend."""

    cuda: int
    hip: int


# Device function -> ceiling. What waits for memory is hidden by other warps, whose number the registers limit: an SM
# has 65536, which is 32 warps of 64 a thread; a SIMD of CDNA has 512 a lane, which is 8 waves of 64.
REGISTERS: dict[str, Registers] = {
    # A row stays in registers between its sum and its result, up to 64 elements a thread with their residual on their
    # way: 10 warps, two programs of four. AMD: 256, beyond which values move through accumulation registers.
    "_rms_norm_kernel": Registers(200, 256),
    # Up to 16 pairs a thread, each with its cosine, its sine and addresses of both halves: 18 warps, 5 waves.
    "_rotary_embedding_kernel": Registers(112, 96),
    # A tile of sums and one operand on its way from shared memory, which is what limits how many programs an SM has.
    "_linear_kernel": Registers(168, 256),
    # Up to 128 sums a thread of eight warps, the only program of an SM: nobody else needs its registers.
    "_matmul_kernel": Registers(255, 512),
    # The same, and the place of each element that is on its way.
    "_convolution_kernel": Registers(255, 512),
    # As of a linear layer, with the pairs of an expert beside them.
    "_moe_experts_kernel": Registers(168, 256),
    # As of a linear layer. The first product of experts has tiles twice as wide, and an SM to itself.
    "_block_fp8_linear_kernel": Registers(168, 0),
    "_block_fp8_experts_kernel": Registers(255, 0),
    # Eight elements a thread, and a scale.
    "_group_quantise_kernel": Registers(48, 0),
    # Eight ids a thread and their ranks: few programs.
    "_moe_list_kernel": Registers(96, 96),
    # Eight elements a thread, as many loads on their way as there are experts to a token.
    "_moe_sum_kernel": Registers(128, 128),
    # Up to 16 sums a thread, beside operands on their way from shared memory: 16 warps, four programs; 4 waves.
    "_head_linear_kernel": Registers(128, 128),
    # Eight elements a thread, with addresses of 64 bits each of three tensors of five dimensions: 12 warps. Formulas on
    # what is one walk through memory take 65 at most.
    "_pointwise_kernel": Registers(168, 168),
    # Eight elements a thread, the place of each and the best so far, with 64-bit addresses: 16 warps.
    "_reduce_kernel": Registers(128, 128),
    "_arg_kernel": Registers(128, 128),
    # Rows of 1024 elements on four warps are 8 a thread, read again for the result; columns the same with addresses.
    "_softmax_kernel": Registers(128, 128),
    "_softmax_gradient_kernel": Registers(128, 128),
    "_scan_kernel": Registers(128, 128),
    "_norm_kernel": Registers(96, 96),
    # Eight words of 64 bits a thread, each beside the one that it is compared with: a program of sixteen warps.
    "_sort_kernel": Registers(128, 128),
    # Up to 8 elements a thread, which is one access of 16 bytes: 32 warps, 8 waves.
    "_activation_kernel": Registers(64, 64),
    # Eight elements a thread: places in five tensors of five dimensions, three of them of indices, in 64 bits where
    # they reach that far. In 32 bits it takes half.
    "_indexed_copy_kernel": Registers(168, 96),
    # Eight numbers a thread, in 64 bits.
    "_arange_kernel": Registers(64, 64),
    # A group's query heads and their accumulator, and the addresses of two tiles: 12 warps, which are the three
    # programs whose tiles are in shared memory. AMD: 256, as its tiles are on their way in registers too.
    "_decode_attention_kernel": Registers(168, 256),
    # Two accesses of 16 bytes a thread, with their angles and weights in float32, in programs of one warp: as many as
    # an SM takes, which is 32 of 64 registers, on sm_120 24 of 80. AMD: 8 waves.
    "_rope_and_cache_kernel": Registers(80, 64),
    # As the one before: a latent of 16 elements a thread with its weights, and then 8 pairs a thread, in one warp.
    "_mla_rope_and_cache_kernel": Registers(80, 64),
    # Sums of 16 heads of 512 elements on four warps are 64, beside operands on their way from shared memory: two
    # programs an SM, whose tiles are what it needs on its way. AMD: all that four waves have, whose tiles are in them.
    "_mla_decode_kernel": Registers(240, 512),
    # What an SM has, by the twelve warps of its only program: each group of four then takes more or fewer, as it needs.
    "mla_decode_hopper_kernel": Registers(168, 0),
    # Four pieces of a head on one warp, 64 elements a thread, with their addresses: 20 warps. AMD: 8 waves.
    "_mla_merge_kernel": Registers(96, 64),
    # Sixteen ranges of four logits a thread are 64 sums, of which what goes is compared: two programs of eight warps.
    "_top_p_digit_kernel": Registers(128, 128),
    # 32 logits a thread, their order and their rank: two programs of eight warps.
    "_top_p_mask_kernel": Registers(128, 128),
    # Up to 16 experts a thread, each with its score and its number, in programs of one warp: 25 of 80 registers, more
    # than are needed to hide the wait for one load. AMD: half as many a thread.
    "_grouped_topk_kernel": Registers(80, 64),
}


def excesses(target: str, function: str, used: Mapping[str, int]) -> Iterator[str]:
    """What of `used` is over the budget of `function` on `target`, a phrase each.

    used: "registers" of a thread, "shared" bytes of a program; all other names are spills of some kind.
    """
    device = DEVICES[target]
    for name, amount in used.items():
        if name == "registers":
            if function not in REGISTERS:
                yield f"takes {amount} registers and has no line in budgets.REGISTERS"
            elif amount > (ceiling := getattr(REGISTERS[function], device.backend)):
                yield f"{amount} registers, budget {ceiling}"
        elif name == "shared":
            if amount > device.shared_memory:
                yield f"{amount} bytes of shared memory, {target} has {device.shared_memory}"
        elif amount:
            yield f"{amount} {name}, budget 0"
