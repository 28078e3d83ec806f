"""Finding configurations of kernels before serving: `vllm-gems pretune`. Nothing here is imported by a server."""

# What `--ops` may name: those of all `search.tunables`, without their kernels.
OPS = (
    "linear", "silu_gated_linear", "mm", "addmm", "mm_logits", "bmm", "index", "moe_experts",
    "block_fp8_linear", "silu_gated_block_fp8_linear", "block_fp8_experts", "head_linear",
)  # fmt: skip
