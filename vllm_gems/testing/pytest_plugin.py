"""`pytest -p vllm_gems.testing.pytest_plugin`: somebody else's vLLM tests, with the patches in and a report at the end.

vLLM's own tests load no plugins, and a pass without hits proves nothing. So this loads vLLM's plugins as an engine
would, and prints the report, hits included, when the tests are over. With `VLLM_GEMS=0` vLLM stays as it is, for the
comparison. Under pytest-xdist the workers are patched and their reports are merged; `VLLM_GEMS_REPORT` gets one file
per process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from ..policy import Policy
from ..reports import Report, merge

_KEY = "vllm_gems_report"
_REPORTS = pytest.StashKey[list[Report]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORTS] = []
    if not _only_distributes(config):
        _load()


def _only_distributes(config: pytest.Config) -> bool:
    """Whether this process runs no test itself: under xdist, all but the workers."""
    return bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")


def _load() -> None:
    try:
        from vllm.plugins import load_general_plugins
    except ImportError as error:
        raise pytest.UsageError(f"vLLM cannot be imported ({error}); install it, or leave this plugin out") from error
    load_general_plugins()


def _own() -> Report | None:
    """The report of this process; None if the plugin is off. Asking must not be what loads it."""
    return sys.modules["vllm_gems.api"].report() if "vllm_gems.api" in sys.modules else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = _own()
    if found is None:
        return
    if folder := Policy.from_env().report_dir:
        found.write(folder)
    to_controller: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if to_controller is None:
        session.config.stash[_REPORTS].append(found)
    else:
        to_controller[_KEY] = json.dumps(found.to_json())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """xdist: a worker has ended. One that crashed has left nothing."""
    told = getattr(node, "workeroutput", {}).get(_KEY)
    if told is not None:
        node.config.stash[_REPORTS].append(Report.from_json(json.loads(told)))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = config.stash[_REPORTS]
    terminalreporter.section("vllm-gems")
    if reports:
        terminalreporter.write_line(merge(reports).text(everything=False))
    else:
        terminalreporter.write_line("no report: switched off by VLLM_GEMS=0 or VLLM_PLUGINS, or every process crashed")
