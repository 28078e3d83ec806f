# `make demo` and `make test` are all that a bare machine needs: Python 3.11 or newer, make, a C++ compiler, a registry.
PYTHON ?= python3
PY := .venv/bin/python
# Without a GPU the kernels run in Triton's interpreter, which it must know before it is first imported.
GPU := $(shell nvidia-smi -L 2>/dev/null)
export TRITON_INTERPRET ?= $(if $(GPU),0,1)
# Each of vLLM's processes imports for half the time if the bytecode of the last one is there.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check env clean

demo: env  ## a small real model in a real vLLM engine, plugin off and on; DEMO="--max-tokens 4" passes options
	$(PY) examples/compare_tokens.py $(DEMO)

# Engines and compilers are processes of their own, two at a time. Everything else shares the cores by files, whose
# fixtures are made once.
test: check  ## everything; TESTS="tests/engine -k tokens" passes options to pytest
ifdef TESTS
	$(PY) -m pytest $(TESTS)
else
	$(PY) -m pytest -m "engine or compile"
	$(PY) -m pytest -m "not engine and not compile" -n auto --maxprocesses 4 --dist loadfile
endif

check: env  ## style and types
	$(PY) -m ruff check .
	$(PY) -m mypy

env:  ## .venv with vLLM and this project in it
	$(PYTHON) tools/setup_env.py

clean:
	rm -rf .venv .venv-setup.log models build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
