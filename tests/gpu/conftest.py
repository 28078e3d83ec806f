"""Tests that need an NVIDIA GPU. `pytest tests/test_kernels.py tests/gpu --record` writes down which passed, and where.

The option is known when this folder, or a file in it, is named on the command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_cases
import pytest
import torch

from vllm_gems import launch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<gpu>/gpu_tests.json")
    parser.addoption("--record-to", metavar="DIR", help="write gpu_tests.json to DIR instead")
    parser.addoption("--record-commit", default="", help="for the record, where there is no git")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines, which take a minute or two each, first and not in a row: pytest-xdist deals out pairs."""
    engines = [item for item in items if item.path.name in ("test_gpu_decoder.py", "test_gpu_mla_step.py")]
    others = [item for item in items if item not in engines]
    for index, engine in enumerate(engines):
        others.insert(2 * index, engine)
    items[:] = others


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        pytest.skip("there is no NVIDIA GPU here")
    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set, so no kernel would run on the GPU")


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """Several of these processes share a GPU, and PyTorch gives nothing back by itself."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A function after which no kernel is compiled, as in a process that has just begun."""

    def forget() -> None:
        monkeypatch.setattr(launch, "_LAUNCHES", {})
        gpu_cases.forget_compiled()

    yield forget
    gpu_cases.forget_compiled()  # what was settled meanwhile may be what a test broke on purpose


def pytest_runtest_logreport(report: Any) -> None:
    """Say at once what failed: a run on a GPU may be cut off before its summary."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        print(f"\nFAILED {report.nodeid}: {crash.message[:300] if crash else report.longrepr}", flush=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    folder = config.getoption("record_to", None)
    if not folder and not config.getoption("record", False):
        return
    if not torch.cuda.is_available():
        terminalreporter.write_line("nothing recorded: there is no GPU here")
        return
    from benchmarks import measure

    path = measure.record(
        "gpu_tests",
        _rows(terminalreporter.stats),
        folder=Path(folder) if folder else None,
        commit=config.getoption("record_commit", ""),
        command=measure.told(["python", "-m", "pytest", *map(str, config.invocation_params.args)]),
        launch=launch.direct_refuses() or "direct",
    )
    terminalreporter.write_line(f"recorded {path}")


def _rows(stats: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """A row per file: how many of its tests passed, and what became of the others."""
    files: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in stats.get(outcome, ()):
            files.setdefault(report.nodeid.split("::")[0], Counter())[outcome] += 1
    unit = {"unit": "tests passed"}
    return [
        {"case": {"file": file}, **unit, "ours": counts["passed"], "against": {}, "outcomes": dict(counts)}
        for file, counts in sorted(files.items())
    ]
