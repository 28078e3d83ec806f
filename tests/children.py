"""Run a piece of a test in a forked child: what it imports and patches dies with it."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a child process; returns what it returns, raises AssertionError with its traceback."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(write, "wb") as out:
            out.write(pickle.dumps(answer))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as source:
        data = source.read()
    os.waitpid(pid, 0)
    assert data, "the child died without an answer"
    done, value = pickle.loads(data)
    assert done, value
    return value
