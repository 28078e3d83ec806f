"""Finding configurations of kernels before serving: `vllm-gems pretune`. Nothing here is imported by a server."""
