"""Installing the package moves nothing that is there."""

from __future__ import annotations

import configparser
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_core_dependencies_have_lower_bounds_only() -> None:
    wanted = config()["options"]["install_requires"].split()
    assert wanted
    for requirement in wanted:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement), requirement
        assert not requirement.startswith(("vllm", "torch", "triton"))


def test_a_dry_run_into_this_environment_changes_nothing(tmp_path: pathlib.Path) -> None:
    """pip would install this package and nothing else, without a look at a registry."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation"]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*pip, "--dry-run", "--report", str(report), str(ROOT)], capture_output=True, text=True, timeout=300
    )
    if "No module named" in done.stderr:
        pytest.skip(f"pip cannot build here without isolation: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    planned = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
    assert [name.replace("_", "-") for name in planned] == ["vllm-gems"]


def test_entry_points() -> None:
    points = config()["options.entry_points"]
    assert points["vllm.general_plugins"].split() == ["vllm_gems", "=", "vllm_gems.plugin:register"]
    assert points["console_scripts"].split() == ["vllm-gems", "=", "vllm_gems.cli:main"]
    assert not re.search(r"^\[project\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
