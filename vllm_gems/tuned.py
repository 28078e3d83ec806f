"""Measured configurations of kernels: shipped as `tuned/<gpu>/<kernel>.json`, or a user's own, which come first.

A user's are one file for each, so that any number of processes can write at once: `<folder>/<gpu>/<kernel>/<key>.json`.
They are for the very GPU and the versions of PyTorch and Triton that they were measured with (and of what else they
name), and are ignored under others. Those that are shipped are used under any: measured with another compiler, or on
another model of this GPU, they are still a better guess than none. No configuration outlives a change of its kernel's
source. `states` says what was found, what of it is such a guess, and what was not used and why.

A key is a kernel's own: the dtype first, where it matters, and the class of shapes.

What patches were measured to be against vLLM's own code (`faster`) is kept in the same way, under a patch's name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import re
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from .policy import tuned_folder


def gpu_slug(name: str) -> str:
    """The folder of what is shipped for a GPU: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = name.lower().replace("nvidia", "").split()
    return words[0] if words else "cpu"


def speedups(device: str) -> dict[str, float]:
    """Patch -> vLLM's (or PyTorch's) time over ours on this GPU, as measured when this release was made.

    Host time through the layer for patches of layers, GPU time for patches of ops. Empty for other GPUs.
    """
    file = resources.files(__package__).joinpath("measured", f"{gpu_slug(device)}.json")
    found: dict[str, float] = json.loads(file.read_text())["speedup"] if file.is_file() else {}
    return found


def source_hash(*functions: Any) -> str:
    """Of the device functions of a kernel, by which its configurations are recognised."""
    text = "".join(inspect.getsource(getattr(function, "fn", function)) for function in functions)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """Of what decides machine code, as the modules say it: a distribution's own name and version may be others."""
    return {name: str(importlib.import_module(name).__version__) for name in ("torch", "triton")}


@functools.cache
def _version(name: str) -> str:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return ""


def version(name: str) -> str:
    """Of a module that something was measured with, "" if there is none here."""
    known = versions()
    return known[name] if name in known else _version(name)


# Keys that were asked for in vain and are remembered, for the report; those of attention's products never end.
MISSING = 1000


class Table:
    """The valid configurations of one kernel on one GPU, and what became of the others."""

    def __init__(self, kernel: str, gpu: str, source: str) -> None:
        self.configurations: dict[str, dict[str, Any]] = {}
        self.borrowed: Counter[str] = Counter()  # shipped ones, by what else they were measured with
        self.stale: dict[str, list[str]] = {}  # why -> keys
        self.missing: set[str] = set()
        shipped, others = _shipped(kernel, gpu, source)
        own = {}
        for entry in entries(kernel, gpu):
            if reason := stale(entry, source):
                self.stale.setdefault(reason, []).append(entry.get("key", "?"))
            else:
                own[entry["key"]] = entry["configuration"]
        if others == _ANOTHER_SOURCE:
            self.stale[f"shipped, {others}"] = sorted(shipped)
        else:
            self.configurations.update(shipped)
            if others and shipped.keys() - own.keys():
                self.borrowed[others] = len(shipped.keys() - own.keys())
        self.configurations.update(own)
        self.measured = dict(self.configurations)
        self.found = len(self.measured)
        # What was measured with bfloat16 is taken for float16: as many bytes, and as fast a product.
        for key, configuration in list(self.configurations.items()):
            if key.startswith("bfloat16 "):
                self.configurations.setdefault(key.removeprefix("b"), configuration)


_ANOTHER_SOURCE = "of another source"


def _shipped(kernel: str, gpu: str, source: str) -> tuple[dict[str, dict[str, Any]], str]:
    """(configurations, what they were measured with that is not here: `_ANOTHER_SOURCE`, another GPU or versions)."""
    file = resources.files(__package__).joinpath("tuned", gpu_slug(gpu), f"{kernel}.json")
    if not file.is_file():
        return {}, ""
    content = json.loads(file.read_text())
    if content["source"] != source:
        return content["configurations"], _ANOTHER_SOURCE
    differs = [] if content["gpu"] == gpu else [content["gpu"]]
    differs += [f"{name} {found}" for name, found in content["versions"].items() if found != version(name)]
    return content["configurations"], ", ".join(differs)


def folder_of(kernel: str, gpu: str) -> Path:
    """Where a user's configurations of a kernel are, on the GPU of this name."""
    return Path(tuned_folder()) / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") / kernel


# What a user's configuration has at least.
_FIELDS = {"key": str, "configuration": dict, "source": str, "versions": dict}


def entries(kernel: str, gpu: str) -> Iterator[dict[str, Any]]:
    """A user's, valid or not; {} for a file that is none. One that is being replaced is read before or after."""
    for path in sorted(folder_of(kernel, gpu).glob("*.json")):
        try:
            entry = json.loads(path.read_text())
            fits = all(isinstance(entry[name], kind) for name, kind in _FIELDS.items())
        except (OSError, ValueError, KeyError, TypeError):
            fits = False
        yield entry if fits else {}


def stale(entry: dict[str, Any], source: str) -> str | None:
    """Why a user's configuration is not used; None if it is."""
    if not entry:
        return "not readable"
    if entry["source"] != source:
        return _ANOTHER_SOURCE
    for name in {**versions(), **entry["versions"]}:
        if entry["versions"].get(name) != version(name):
            return f"measured with {name} {entry['versions'].get(name)}"
    return None


def write(kernel: str, gpu: str, entry: dict[str, Any]) -> Path:
    """Add or replace a user's configuration, whole or not at all; those who do so at once do not wait."""
    folder = folder_of(kernel, gpu)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(entry['key'].encode()).hexdigest()[:24]}.json"
    # Of no other writer, be it a thread of this process or a process of another host.
    partial = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        partial.write_text(json.dumps(entry, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


_TABLES: dict[tuple[str, str], Table] = {}


def lookup(kernel: str, device: int, key: str, source: str) -> dict[str, Any] | None:
    """The measured configuration of `kernel` for `key` on this device (-1: a CPU), None if there is none.

    source: `source_hash` of the kernel as it is now.
    """
    if device < 0:
        return None
    gpu = sys.modules["torch"].cuda.get_device_name(device)
    table = _TABLES.get((kernel, gpu))
    if table is None:
        table = _TABLES[kernel, gpu] = Table(kernel, gpu, source)
    found = table.configurations.get(key)
    if found is None and len(table.missing) < MISSING:
        table.missing.add(key)
    return found


def states() -> dict[str, dict[str, Any]]:
    """kernel -> how many configurations there are, how many of them are borrowed and from what, which keys had none,
    and the keys of those that were not used, by reason."""
    return {
        kernel: {
            "found": table.found,
            "borrowed": dict(table.borrowed),
            "missing": sorted(table.missing),
            "stale": {reason: sorted(keys) for reason, keys in table.stale.items()},
        }
        for (kernel, _), table in _TABLES.items()
    }
