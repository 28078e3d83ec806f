"""One file per stem: device function, public op, reference, refusals, declaration. Nothing here imports vLLM."""
