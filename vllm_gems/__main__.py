"""`python -m vllm_gems`."""

from .cli import main

raise SystemExit(main())
