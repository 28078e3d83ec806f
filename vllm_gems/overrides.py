"""Overrides of PyTorch's own operations: which are wanted by whom, on a patcher of their own."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .catalog import Catalog, aten_catalog
from .errors import UnknownNameError
from .nouns import Row, State
from .patcher import Patcher
from .patches.aten import PREFIX, measured, torch_platform
from .policy import Policy

# Names or globs, in a list or in one string with commas; or a YAML file of these.
Names = str | os.PathLike[str] | Iterable[str] | None


class Overrides:
    """Counts who wants which overload: it is overridden as long as somebody does."""

    def __init__(self, catalog: Catalog, measured: Mapping[str, float] | None = None) -> None:
        self.catalog = catalog
        self.measured = measured or {}
        self.patcher = Patcher(catalog, platform=torch_platform)
        self._wanted: Counter[str] = Counter()
        self._past: dict[str, Row] = {}  # what became of those that were disabled
        self._lock = threading.RLock()

    def rows(self) -> tuple[Row, ...]:
        """Of what is overridden or was refused, and of what was called when it last was. Others have none.

        Counts begin anew when an overload is overridden again.
        """
        with self._lock:
            rows = {**self._past, **{row.patch: row for row in self.patcher.rows()}}
            return tuple(rows[name] for name in sorted(rows))

    def reset_counts(self) -> None:
        """Forget the hits until now, of a parent in a forked child too."""
        with self._lock:
            self._past.clear()
            self.patcher.reset_counts()

    def enable(self, include: Names = None, exclude: Names = None) -> tuple[str, ...]:
        """Override what is chosen, until `disable`; returns the names of what this call overrode."""
        with self._lock:
            chosen = self.choose(include, exclude)
            self._wanted.update(chosen)
            return self._bind(chosen)

    def only_enable(self, include: Names) -> tuple[str, ...]:
        """Override what is chosen and nothing else."""
        with self._lock:
            chosen = self.choose(include, None)
            self.disable(set(self._wanted) - set(chosen))
            self._wanted = Counter(chosen)
            return self._bind(chosen)

    def disable(self, names: Iterable[str] | None = None) -> None:
        """Give PyTorch its kernels back, whoever wanted them overridden."""
        with self._lock:
            gone = set(self._wanted) if names is None else set(names)
            for row in self.patcher.rows():
                if row.patch in gone and (row.hits or row.declined or row.errors):
                    self._past[row.patch] = dataclasses.replace(row, state=State.OFF, why=row.why or "disabled")
            for name in gone:
                del self._wanted[name]
            self.patcher.undo(gone)

    @contextmanager
    def using(self, include: Names = None, exclude: Names = None) -> Iterator[None]:
        """`enable` for a while. At the end goes what nobody else wants, threads that are inside too."""
        with self._lock:
            chosen = self.choose(include, exclude)
            self._wanted.update(chosen)
            self._bind(chosen)
        try:
            yield
        finally:
            with self._lock:
                # What somebody has disabled in between is nobody's any more.
                mine = [name for name in chosen if self._wanted[name] > 0]
                self._wanted.subtract(mine)
                self.disable([name for name in mine if self._wanted[name] == 0])

    def told(self) -> list[dict[str, Any]]:
        """Of every overload: its name and operation, whether it is a default, PyTorch's measured time over ours."""
        measured = self.measured
        return [
            {
                "overload": name.removeprefix(PREFIX),
                "operation": _operation(name),
                "default": patch.default,
                "speedup": measured.get(name),
            }
            for name, patch in self.catalog.patches.items()
        ]

    def choose(self, include: Names, exclude: Names) -> tuple[str, ...]:
        """The names of the overloads that are meant, sorted. Raises UnknownNameError for one that means none."""
        include, exclude = read(include, exclude)
        patches = self.catalog.patches
        without = {name for glob in exclude or () for name in self._matches(glob)}
        if include is None:
            return tuple(name for name, patch in patches.items() if patch.default and name not in without)
        named = {name for glob in include for name in self._matches(glob)}
        return tuple(name for name in patches if name in named - without)

    def _matches(self, glob: str) -> list[str]:
        """An overload's name, its operation's (all overloads of it, in place too), or a glob of these.

        The overload without a name, which is called as its operation, is `<operation>.default`, as in PyTorch.
        """
        pattern = glob.removeprefix(PREFIX)
        found = [
            name
            for name in self.catalog.patches
            if any(fnmatchcase(each, pattern) for each in _names_of(name))
        ]
        if not found:
            near = difflib.get_close_matches(pattern, {_operation(name) for name in self.catalog.patches})
            raise UnknownNameError("operation", glob, near)
        return found

    def _bind(self, names: Iterable[str]) -> tuple[str, ...]:
        return self.patcher.apply(Policy(), names)


def _names_of(name: str) -> tuple[str, str, str]:
    """By which an overload is found: "mul_.Tensor", "mul_", "mul"."""
    short = name.removeprefix(PREFIX)
    return short if "." in short else f"{short}.default", short.partition(".")[0], _operation(name)


def _operation(name: str) -> str:
    return name.removeprefix(PREFIX).partition(".")[0].rstrip("_")


def read(include: Names, exclude: Names) -> tuple[list[str] | None, list[str] | None]:
    """Lists of what is said; a file has a list, which is to be included, or a mapping with `include` and `exclude`.

    Raises ValueError for a file with anything else in it.
    """
    if isinstance(include, os.PathLike) or (isinstance(include, str) and include.endswith((".yaml", ".yml"))):
        import yaml

        told = yaml.safe_load(Path(include).read_text())
        if isinstance(told, list):
            told = {"include": told}
        if not isinstance(told, Mapping) or not set(told) <= {"include", "exclude"}:
            raise ValueError(f"{include} has neither a list of names nor `include` and `exclude`")
        return _list(told.get("include")), [*(_list(exclude) or []), *(_list(told.get("exclude")) or [])]
    return _list(include), _list(exclude)


def _list(names: Any) -> list[str] | None:
    if names is None:
        return None
    parts = names.split(",") if isinstance(names, str) else names
    return [part.strip() for part in parts if part.strip()]


@functools.cache
def overrides() -> Overrides:
    """Those of this process."""
    return Overrides(aten_catalog(), measured(torch_platform()))
