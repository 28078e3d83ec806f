"""Every kernel compiles for every architecture within `budgets`, without a GPU.

Every configuration, which is all of a build but sizes and dtypes (warps, tiles, formula, alignment, what is absent),
once in float32 with the largest sizes that the cases have, and if aligned and with products once in bfloat16. For
sm_90, where kernels are tuned and timed, all that are aligned in bfloat16, and every different aligned `Build` of the
shapes of named models. The counts are printed as each architecture is done.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from budgets import DEVICES, REGISTERS, excesses
from gpu_targets import MODELS_ON, MUST_SPILL, made_for
from override_builds import FAMILIES

from vllm_gems.catalog import catalog

pytestmark = pytest.mark.compile

HERE = Path(__file__).resolve().parent
TIME_LIMIT = 900  # seconds for an architecture, four times what the longest takes on one core
KERNELS = [*catalog().kernels, *FAMILIES]


class Run(NamedTuple):
    """What `gpu_targets.py` said of one architecture."""

    builds: dict[str, int]  # that it meant to compile, by kernel
    lines: list[dict[str, Any]]
    end: str  # how it ended, if not well
    seconds: float

    def of(self, kernel: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if kernel in line["kernels"]]


class Compilation:
    """One process an architecture, as many at a time as there are cores."""

    def __init__(self, targets: list[str], folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        self.pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
        self.runs: dict[str, Future[Run]] = {target: self.pool.submit(self._compile, target) for target in targets}

    def _compile(self, target: str) -> Run:
        folder, began = self.folder / target, time.monotonic()
        folder.mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "TRITON_CACHE_DIR": str(folder / "cache"),
            "TRITON_INTERPRET": "0",
        }
        # Files, not pipes: what was said before the process was stopped is not lost.
        with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_targets.py"), target],
                stdout=out, stderr=err, env=environment, text=True, start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
            try:
                status = process.wait(TIME_LIMIT)
                end = f"it ended with status {status}" if status else ""
            except subprocess.TimeoutExpired:
                self._stop(process)
                end = f"it was stopped after {TIME_LIMIT} s"
            out.seek(0)
            err.seek(0)
            first, *lines = [json.loads(line) for line in out if line.endswith("\n")] or [{"builds": {}}]
            return Run(first["builds"], lines, end and f"{end}\n{err.read()[-4000:]}", time.monotonic() - began)

    @staticmethod
    def _stop(process: subprocess.Popen[str]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its assembler too
            process.wait()

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            self._stop(process)


@pytest.fixture(scope="session")
def compilation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilation]:
    """Started for the architectures that the selected tests ask for."""
    asking = [item for item in request.session.items if "compilation" in getattr(item, "fixturenames", ())]
    wanted = {item.callspec.params["target"] for item in asking}  # type: ignore[attr-defined]
    longest_first = sorted(wanted, key=lambda target: (target != MODELS_ON, target))
    found = Compilation(longest_first, tmp_path_factory.mktemp("compiled"))
    yield found
    found.stop()


@pytest.fixture(scope="session")
def run(compilation: Compilation, target: str, request: pytest.FixtureRequest) -> Run:
    found = compilation.runs[target].result()
    count = sum(1 for line in found.lines if "used" in line)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{target}: {count} builds compiled in {found.seconds:.0f} s")
    return found


def problem(target: str, line: dict[str, Any]) -> str:
    """What is wrong with one build, or nothing."""
    over = [line["error"]] if "error" in line else list(excesses(target, line["function"], line["used"]))
    return f"{'/'.join(line['kernels'])}, {line['label']}: {'; '.join(over)}" if over else ""


@pytest.mark.parametrize(
    ("kernel", "target"),
    [(kernel, target) for kernel in KERNELS for target in DEVICES if made_for(kernel, target)],
    scope="session",
)
def test_every_build_is_within_the_budget(kernel: str, target: str, run: Run) -> None:
    lines = run.of(kernel)
    problems = [text for line in lines if (text := problem(target, line))]
    assert not problems, "\n".join([f"{len(problems)} of {len(lines)} builds on {target}:", *problems])
    last = f"{run.lines[-1]['kernels']}, {run.lines[-1]['label']}" if run.lines else "nothing"
    assert 0 < len(lines) == run.builds.get(kernel), f"{target}: {run.end}\nThe last that it compiled: {last}"


@pytest.mark.parametrize("target", DEVICES, scope="session")
def test_a_spill_is_seen(target: str, run: Run) -> None:
    """What the budget relies on: that the numbers read from the machine code mean what they are taken for."""
    assert run.of(MUST_SPILL), f"{target}: {run.end}"
    (line,) = run.of(MUST_SPILL)
    name = "stack bytes" if DEVICES[target].backend == "cuda" else "spilled vector registers"
    assert line.get("used", {}).get(name, 0) > 0, line


FITS = {"registers": 32, "stack bytes": 0, "local bytes": 0, "shared": 8192}


@pytest.mark.parametrize("function", REGISTERS)
def test_budget_accepts_what_fits(function: str) -> None:
    assert not list(excesses("sm_80", function, FITS))


@pytest.mark.parametrize(
    ("function", "name", "amount", "words"),
    [
        ("_activation_kernel", "registers", 65, "65 registers, budget 64"),
        ("_unheard_of", "registers", 1, "no line in budgets.REGISTERS"),
        ("_activation_kernel", "stack bytes", 8, "8 stack bytes, budget 0"),
        ("_activation_kernel", "spilled vector registers", 1, "1 spilled vector registers, budget 0"),
        ("_activation_kernel", "shared", 163 * 1024 + 1, "166913 bytes of shared memory"),
    ],
)
def test_budget_names_what_does_not_fit(function: str, name: str, amount: int, words: str) -> None:
    (sentence,) = excesses("sm_80", function, {**FITS, name: amount})
    assert words in sentence
