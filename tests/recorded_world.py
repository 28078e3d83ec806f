"""vLLM releases as `tools/record_vllm.py` recorded them, asked the questions that a probe asks of an installed one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "recorded"
_KINDS = ("def", "staticmethod", "classmethod")  # a property is found where a method is, but nothing can call it


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


VERSIONS: tuple[str, ...] = tuple(
    sorted((path.stem.removeprefix("vllm-") for path in _FOLDER.glob("vllm-*.json")), key=_order)
)


class RecordedWorld:
    """One recorded release."""

    def __init__(self, version: str, modules: Mapping[str, Any], ops: Mapping[str, list[str]]) -> None:
        self.version = version
        self._modules = modules
        self._ops = ops

    @classmethod
    def load(cls, version: str) -> RecordedWorld:
        """The record of `version`, one of `VERSIONS`."""
        return cls(**json.loads((_FOLDER / f"vllm-{version}.json").read_text()))

    def knows(self, name: str) -> bool:
        """Whether the release was searched for this module or op at all; if not, "absent" would mean nothing."""
        return name in self._modules or name in self._ops

    def has_module(self, module: str) -> bool:
        """Whether the release has the module."""
        return self._modules.get(module) is not None

    def signature(self, module: str, qualname: str) -> str | None:
        """What `probes.signature_of` would say of "function" or "Class.method"; None if there is no such callable."""
        entry = self._entry(module, qualname)
        return entry[1] if entry else None

    def source_hash(self, module: str, qualname: str) -> str | None:
        """What `probes.hash_of` would say of the same."""
        entry = self._entry(module, qualname)
        return entry[2] if entry else None

    def schemas(self, op: str) -> tuple[str, ...]:
        """The schemas of "namespace::op" as its library spells them; more than one if two libraries have it."""
        return tuple(self._ops.get(op, ()))

    def _entry(self, module: str, qualname: str) -> tuple[str, str, str] | None:
        owner, _, name = qualname.rpartition(".")
        if owner:
            tables = (record["methods"] for record in self._ancestry(f"{module}:{owner}"))
        else:
            tables = (record["functions"] for record in (self._modules.get(module),) if record)
        line = next((table[name] for table in tables if name in table), "")
        kind, _, rest = line.partition(" ")
        signature, _, source_hash = rest.rpartition(" ")
        return (kind, signature, source_hash) if kind in _KINDS else None

    def _ancestry(self, address: str) -> Iterator[Mapping[str, Any]]:
        """A class and its recorded bases, depth first: enough as long as no two bases share a method by a diamond."""
        module, _, name = address.partition(":")
        record = (self._modules.get(module) or {"classes": {}})["classes"].get(name)
        if record:
            yield record
            for base in record["bases"]:
                yield from self._ancestry(base)
