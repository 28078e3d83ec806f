"""What was patched, where, and how often it ran: text for people, JSON for machines, merged over processes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__, seams
from . import tuned as configurations
from .nouns import Row, State
from .tuned import speedups


@dataclass(frozen=True)
class Report:
    """The rows of one process (or of several, merged), under a line that says whose they are.

    JSON keys are stable: "vllm_gems", "vllm", "torch", "triton", "device", "pid" (a list when merged), "rank", "mode",
    "rows", each row with the fields of `nouns.Row`, and "tuned": by kernel, how many measured configurations were
    "found", how many of these are "borrowed" (shipped, and measured with other versions or on another GPU of the kind),
    which keys were "missing", and those of what was "stale", by reason; and "compiled": how many kernels were made
    ready to launch ("number"), in how many "seconds", "last" at which time, and how often each that was "late", when
    vLLM had warmed up and its JIT monitor watched.
    """

    rows: tuple[Row, ...]
    versions: dict[str, str]
    device: str
    pid: tuple[int, ...]
    rank: str
    mode: str
    tuned: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    compiled: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_process(cls, rows: tuple[Row, ...], rank: str = "0") -> Report:
        names = ("vllm", "torch", "triton")
        device = _device()
        measured = speedups(device)
        return cls(
            rows=tuple(dataclasses.replace(row, speedup=measured.get(row.patch)) for row in rows),
            versions={"vllm_gems": __version__, **{name: _version(name) for name in names}},
            device=device,
            pid=(os.getpid(),),
            rank=rank,
            mode=_mode(rows),
            tuned=configurations.states(),
            compiled=_compiled(),
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """A report from a file that `write` made, or all of a folder's merged. Raises FileNotFoundError if none is."""
        where = pathlib.Path(path)
        files = sorted(where.glob("*.json")) if where.is_dir() else [where]
        reports = [cls.from_json(json.loads(file.read_text())) for file in files]
        if not reports:
            raise FileNotFoundError(
                f"no report in {where}; run vLLM with VLLM_GEMS_REPORT={where} and let its processes end"
            )
        return merge(reports)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        rows = tuple(Row(**{**row, "state": State(row["state"])}) for row in data["rows"])
        versions = {name: data[name] for name in ("vllm_gems", "vllm", "torch", "triton")}
        pid = data["pid"] if isinstance(data["pid"], list) else [data["pid"]]
        rest = data.get("tuned", {}), data.get("compiled", {})
        return cls(rows, versions, data["device"], tuple(pid), data["rank"], data["mode"], *rest)

    def to_json(self) -> dict[str, Any]:
        rows = [{**dataclasses.asdict(row), "state": str(row.state)} for row in self.rows]
        pid: int | list[int] = self.pid[0] if len(self.pid) == 1 else list(self.pid)
        return {
            **self.versions,
            "device": self.device,
            "pid": pid,
            "rank": self.rank,
            "mode": self.mode,
            "rows": rows,
            "tuned": {kernel: dict(state) for kernel, state in self.tuned.items()},
            "compiled": dict(self.compiled),
        }

    def write(self, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Write the report as <folder>/<pid>.json, whole or not at all."""
        path = pathlib.Path(folder) / f"{self.pid[0]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        partial.replace(path)
        return path

    def problems(self) -> list[str]:
        """What `vllm-gems check` objects to: asked for and not bound, failed, or bound and never hit; compiled late."""
        found = []
        ran = any(row.hits for row in self.rows)
        for row in self.rows:
            if row.state is State.FAILED:
                found.append(f"{row.patch} failed: {row.why}")
            elif row.wanted and row.state in (State.REFUSED, State.WAITING):
                found.append(f"{row.patch} was asked for and is {row.state}: {row.why}")
            elif row.wanted and ran and row.hits == 0:
                found.append(f"{row.patch} was asked for and never hit{': ' + row.why if row.why else ''}")
        return [*found, *_late(self.compiled)]

    def text(self, everything: bool = True) -> str:
        """The table; without `everything`, only patches that are in place or should be."""
        rows = [row for row in self.rows if everything or row.state not in (State.OFF, State.WAITING)]
        cells = [("patch", "state", "where", "hits", "vs vLLM", "why")]
        for row in rows:
            speedup = "" if row.speedup is None else f"{row.speedup:.1f}x"
            cells.append((row.patch, str(row.state), row.where, str(row.hits), speedup, _remarks(row)))
        ends = [*map(_configurations, self.tuned.items()), *_late(self.compiled)]
        return "\n".join([self._head(), *_columns(cells, right={3, 4}), *ends])

    def _head(self) -> str:
        versions = "  ".join(f"{name.replace('_', '-')} {value or '-'}" for name, value in self.versions.items())
        pids = ",".join(str(pid) for pid in self.pid)
        return f"{versions}  {self.device}  pid {pids}  rank {self.rank}  mode {self.mode}"

    def __str__(self) -> str:
        return self.text()


def merge(reports: Sequence[Report]) -> Report:
    """One report of several processes: counts added, the liveliest state of each patch kept."""
    if len(reports) == 1:
        return reports[0]
    liveliness = [State.FAILED, State.BOUND, State.ASLEEP, State.REFUSED, State.WAITING, State.OFF]
    by_patch: dict[str, list[Row]] = {}
    for report in reports:
        for row in report.rows:
            by_patch.setdefault(row.patch, []).append(row)
    rows = []
    for group in by_patch.values():
        best = min(group, key=lambda row: (liveliness.index(row.state), -row.hits))
        rows.append(
            dataclasses.replace(
                best,
                hits=sum(row.hits for row in group),
                errors=sum(row.errors for row in group),
                declined=_added(row.declined for row in group),
                by_layer=_added(row.by_layer for row in group),
            )
        )
    busiest = max(reports, key=lambda report: sum(row.hits for row in report.rows))
    ranks = sorted({report.rank for report in reports if any(row.hits for row in report.rows)})
    pids = tuple(pid for report in reports for pid in report.pid)
    return dataclasses.replace(
        busiest,
        rows=tuple(rows),
        pid=pids,
        rank=",".join(ranks) or "-",
        tuned=_tuned(reports),
        compiled=_together([report.compiled for report in reports if report.compiled]),
    )


def _tuned(reports: Iterable[Report]) -> dict[str, Mapping[str, Any]]:
    """All read the same configurations; what each asked for in vain is put together."""
    merged: dict[str, Mapping[str, Any]] = {}
    for report in reports:
        for kernel, state in report.tuned.items():
            before = merged[kernel]["missing"] if kernel in merged else []
            merged[kernel] = {**state, "missing": sorted({*before, *state["missing"]})}
    return merged


def _compiled() -> dict[str, Any]:
    """Of this process, if it has launched anything."""
    launch = sys.modules.get(f"{__package__}.launch")
    if launch is None or not launch.COMPILED:
        return {}
    every = launch.COMPILED
    late: dict[str, int] = {}
    for each in every:
        if each.late:
            late[each.name] = late.get(each.name, 0) + 1
    seconds = round(sum(each.seconds for each in every), 3)
    return {"number": len(every), "seconds": seconds, "last": every[-1].at, "late": late}


def _together(compiled: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not compiled:
        return {}
    return {
        "number": sum(each["number"] for each in compiled),
        "seconds": round(sum(each["seconds"] for each in compiled), 3),
        "last": max(each["last"] for each in compiled),
        "late": _added(each["late"] for each in compiled),
    }


def _late(compiled: Mapping[str, Any]) -> list[str]:
    """A line if something was compiled while vLLM served."""
    late = compiled.get("late", {})
    names = ", ".join(f"{name} {count}" for name, count in late.items())
    return [f"compiled after warm-up: {names}"] if late else []


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def _configurations(state: tuple[str, Mapping[str, Any]]) -> str:
    """One line on the measured configurations of a kernel."""
    kernel, known = state
    parts = [f"{kernel}: {known['found']} measured configurations"]
    parts += [f"{count} of them shipped, measured with {others}" for others, count in known["borrowed"].items()]
    if known["missing"]:
        parts.append(f"none for {_some(known['missing'])}, which take what was best for others, or the default")
    parts += [f"{len(keys)} not used, {reason}: {_some(keys)}" for reason, keys in known["stale"].items()]
    return "; ".join(parts)


def _some(names: Sequence[str], most: int = 8) -> str:
    """The first of them; JSON has all."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _remarks(row: Row) -> str:
    parts = [row.why] if row.why else []
    if row.by_layer:
        least, most = min(row.by_layer.values()), max(row.by_layer.values())
        each = str(least) if least == most else f"{least} to {most}"
        parts.append(f"{each} in each of {len(row.by_layer)} layers")
    parts += [f"declined {count}: {reason}" for reason, count in row.declined.items()]
    if row.errors:
        parts.append(f"errors {row.errors}")
    return "; ".join(parts)


def _columns(cells: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    right = set(right)
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _version(name: str) -> str:
    module = sys.modules.get(name)
    if found := getattr(module, "__version__", ""):
        return str(found)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _device() -> str:
    """The GPU's name, asked for only where CUDA is in use already: a report must not start it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return seams.platform() or "-"


def _mode(rows: Iterable[Row]) -> str:
    states = {row.state for row in rows}
    if State.ASLEEP in states:
        return "compiled"
    return "eager" if any(row.hits for row in rows) else "-"
