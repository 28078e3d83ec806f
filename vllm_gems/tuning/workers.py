"""Processes for what may crash: machine code of candidates is compiled and tried in them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")


class Crashed(Exception):
    """A call took its process down."""


class Worker:
    """A process of its own for calls, one after the other, replaced when one takes it down.

    It is started by the first call, as a new interpreter: a CUDA context does not survive a fork. Functions, arguments
    and results pickle.
    """

    def __init__(self) -> None:
        self._pool = _pool()

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """function(*args). Raises what it raises, and Crashed if it ends the process."""
        try:
            return self._pool.submit(function, *args).result()
        except BrokenProcessPool:
            self.close()
            self._pool = _pool()
            raise Crashed("it took its process down") from None

    def close(self) -> None:
        self._pool.shutdown()


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A run that is killed outright leaves no processes behind that wait for it."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
