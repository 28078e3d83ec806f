"""Patches against vLLM's own code: `vllm-gems bench`. Nothing here is imported by a server."""
