"""Measured configurations, shipped as data: `tuned/<gpu>/<kernel>.json`, by the benchmark that measured them."""

from __future__ import annotations

import functools
import json
import sys
from importlib import resources
from typing import Any


def gpu_slug(name: str) -> str:
    """The folder of a GPU's measurements: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = name.lower().replace("nvidia", "").split()
    return words[0] if words else "cpu"


@functools.cache
def _table(kernel: str, slug: str) -> dict[str, dict[str, Any]]:
    file = resources.files(__package__).joinpath("tuned", slug, f"{kernel}.json")
    table: dict[str, dict[str, Any]] = json.loads(file.read_text())["configurations"] if file.is_file() else {}
    return table


def lookup(kernel: str, device: int, key: str) -> dict[str, Any] | None:
    """The measured configuration of `kernel` for `key` on this device (-1: a CPU), None if there is none."""
    return None if device < 0 else _table(kernel, gpu_slug(sys.modules["torch"].cuda.get_device_name(device))).get(key)
