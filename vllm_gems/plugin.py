"""`register`: what vLLM calls, through its entry-point group `vllm.general_plugins`, in each of its processes.

Only the standard library is imported here until it is called. It never raises, because vLLM would not start; it does
not touch CUDA, because vLLM may fork after it; called again it does nothing new.
"""

from __future__ import annotations

import atexit
import logging
import os

logger = logging.getLogger("vllm_gems")

_armed_in = 0  # the process whose end will write a report


def register() -> None:
    """Bind the patches that the environment asks for."""
    try:
        _register()
    except Exception:
        logger.exception("vllm-gems could not be loaded; vLLM runs without it")


def _register() -> None:
    from .policy import Policy

    policy = Policy.from_env()
    if not policy.enabled:
        return
    from . import api

    api.salt(policy)
    api.patcher().apply(policy)
    for error in api.patcher().strangers(policy).values():
        logger.warning("VLLM_GEMS_INCLUDE or VLLM_GEMS_EXCLUDE: %s", error)
    if policy.verbose or policy.report_dir:
        _arm()


def _arm() -> None:
    """Have this process tell what it did when it ends, and each process forked from it likewise.

    `atexit` does not run in children of multiprocessing, which end by `os._exit`; its finalizers do.
    """
    global _armed_in
    if _armed_in == os.getpid():
        return
    from multiprocessing import util

    first = _armed_in == 0
    _armed_in = os.getpid()
    util.Finalize(None, _tell, exitpriority=100)
    if first:
        atexit.register(_tell)
        util.register_after_fork(logger, _forked)


def _forked(_: object) -> None:
    from . import api

    api.reset_counts()
    _arm()


def _tell() -> None:
    """Write and print the report, once for this process."""
    global _armed_in
    if _armed_in != os.getpid():
        return
    _armed_in = -1
    try:
        from . import api

        found = api.report()
        policy = api.patcher().policy
        if policy.report_dir:
            found.write(policy.report_dir)
        if policy.verbose and any(row.hits for row in found.rows):
            print(found.text(everything=False), flush=True)
    except Exception:
        logger.exception("the report of process %d could not be written", os.getpid())
