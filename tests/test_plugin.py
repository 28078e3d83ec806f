"""`register` in the processes of vLLM: it never raises, touches no CUDA, and tells of each process at its end."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    script = "import sys; sys.path.insert(0, 'tests')\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", **env},
        timeout=300,
    )


def test_the_entry_point_is_installed() -> None:
    (found,) = (each for each in entry_points(group="vllm.general_plugins") if each.name == "vllm_gems")
    assert found.value == "vllm_gems.plugin:register"
    assert callable(found.load())


def test_register_never_raises() -> None:
    broken = """
        import vllm_gems.catalog as catalog
        catalog.catalog = lambda: 1 / 0
        from vllm_gems.plugin import register
        register()
        print("alive")
    """
    done = run(broken)
    assert done.stdout == "alive\n", done.stderr
    assert "vLLM runs without it" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_register_imports_no_vllm_and_is_idempotent() -> None:
    done = run("""
        from vllm_gems.plugin import register
        import sys
        register()
        finders = list(sys.meta_path)
        register()
        assert sys.meta_path == finders
        print(sorted({"vllm", "triton"} & set(sys.modules)))
    """)
    assert done.stdout == "[]\n", done.stderr


def test_a_name_that_no_patch_has_is_told_and_stops_nothing() -> None:
    done = run("""
        from vllm_gems.plugin import register
        register()
        import vllm_gems
        print({row.patch: row.why for row in vllm_gems.report().rows}["op.rmsnorm"])
    """, VLLM_GEMS_INCLUDE="default,op.rmsnorm")  # fmt: skip
    told = "no patch is called 'op.rmsnorm'; did you mean op.rms_norm"
    assert done.stdout.startswith(told), done.stderr
    assert f"VLLM_GEMS_INCLUDE or VLLM_GEMS_EXCLUDE: {told}" in done.stderr


def test_off_changes_nothing() -> None:
    done = run(
        """
        import sys
        before = list(sys.meta_path)
        from vllm_gems.plugin import register
        register()
        assert sys.meta_path == before
        assert not {"torch", "pluggy"} & set(sys.modules)
        print("same")
        """,
        VLLM_GEMS="0",
    )
    assert done.stdout == "same\n", done.stderr


CHILDREN = """
    import multiprocessing, pathlib, tempfile
    import toy
    from vllm_gems import api, seams
    from vllm_gems.policy import Policy

    # Spawned children import this file again, and must find the package.
    FOLDER = pathlib.Path({folder!r})
    sys.path.insert(0, str(FOLDER))

    def work(times):
        import toy_vllm.layers
        layer = toy_vllm.layers.Layer()
        for _ in range(times):
            assert layer(1) == ("ours", 1)

    def main():
        from vllm_gems import plugin
        seams.platform = lambda: "cpu"
        api.patcher = lambda patcher=toy.patcher(): patcher
        plugin.register()
        work(2)
        children = [multiprocessing.get_context("fork").Process(target=work, args=(n,)) for n in (3, 5)]
        for child in children:
            child.start()
            child.join()
            assert child.exitcode == 0

    main()
"""


def test_every_process_writes_what_it_did(tmp_path: pathlib.Path) -> None:
    """A forked child starts from zero, whatever its parent had counted."""
    import toy

    toy.write_package(tmp_path)
    sys.path.remove(str(tmp_path))
    reports = tmp_path / "reports"
    done = run(CHILDREN.format(folder=str(tmp_path)), VLLM_GEMS_REPORT=str(reports))
    assert done.returncode == 0, done.stderr
    hits = []
    for file in reports.glob("*.json"):
        data = json.loads(file.read_text())
        assert data["pid"] == int(file.stem)
        hits += [row["hits"] for row in data["rows"] if row["patch"] == "toy.layer"]
    assert sorted(hits) == [2, 3, 5]

    from vllm_gems.reports import Report

    merged = Report.read(reports)
    assert {row.patch: row.hits for row in merged.rows}["toy.layer"] == 10
    assert len(merged.pid) == 3


def test_verbose_prints_the_table_of_a_process_with_hits(tmp_path: pathlib.Path) -> None:
    import toy

    toy.write_package(tmp_path)
    sys.path.remove(str(tmp_path))
    done = run(CHILDREN.format(folder=str(tmp_path)), VLLM_GEMS_VERBOSE="1")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^toy.layer +bound +Layer.forward_cpu +[235]$", done.stdout, re.MULTILINE)) == 3
    assert "vllm-gems 0.1.0" in done.stdout


@pytest.mark.parametrize("code", ["import vllm_gems.plugin", "import vllm_gems"])
def test_importing_is_light(code: str) -> None:
    heavy = "{'torch', 'triton', 'vllm', 'pluggy', 'numpy'}"
    done = run(f"{code}\nimport sys\nprint(sorted({heavy} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr
