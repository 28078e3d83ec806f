"""Help for testing vLLM with the patches in it: a pytest plugin."""
