"""`vllm-gems`, as a user types it. Where vLLM is installed it is asked for real."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_reports import ROWS, report

from vllm_gems import cli
from vllm_gems.nouns import State

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


def commands(*lines: list[str], **env: str) -> list[tuple[int, str]]:
    """(exit code, output) of several commands, in one process because importing vLLM takes its time."""
    script = f"""
import contextlib, io, json
from vllm_gems import cli
done = []
for line in {list(lines)!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(line)
    done.append((code, out.getvalue()))
print(json.dumps(done))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "VLLM_LOGGING_LEVEL": "ERROR", **env},
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return [(code, out) for code, out in json.loads(run.stdout.splitlines()[-1])]


def test_report_and_check_of_a_file(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(report().write(tmp_path))
    assert cli.main(["report", path]) == cli.OK
    printed = capsys.readouterr().out
    assert "layernorm.rms_norm" in printed
    assert "ir.rms_norm" not in printed
    assert cli.main(["report", path, "--all"]) == cli.OK
    assert "ir.rms_norm" in capsys.readouterr().out
    assert cli.main(["report", path, "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["rows"][0]["hits"] == 57344
    assert cli.main(["check", path]) == cli.PROBLEM
    assert "1 patches bound, 57344 hits, 1 problems" in capsys.readouterr().out
    fine = str(report(ROWS[0], ROWS[3]).write(tmp_path / "fine"))
    assert cli.main(["check", fine, "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_wrong_usage(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "none.json")]) == cli.USAGE
    assert cli.main(["report", str(tmp_path)]) == cli.USAGE
    assert cli.main(["explain", "layernorm.rmsnorm"]) == cli.USAGE
    assert "did you mean layernorm.rms_norm" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["nothing"])
    assert stopped.value.code == cli.USAGE


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_GEMS_EXCLUDE", "op.*")
    assert cli.main(["env"]) == cli.OK
    printed = capsys.readouterr().out
    assert "VLLM_GEMS_EXCLUDE    'op.*'" in printed
    assert "VLLM_GEMS            '1' (default)" in printed
    assert cli.main(["env", "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["variables"]["VLLM_GEMS_EXCLUDE"] == "op.*"


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report"]) == cli.NO_VLLM
    assert "vLLM cannot be imported here" in capsys.readouterr().err


@needs_vllm
def test_report_and_explain_here() -> None:
    (code, printed), (explained, text), (_, measured) = commands(
        ["report", "--json"], ["explain", "layernorm.rms_norm"],
        ["explain", "layernorm.rms_norm", "--json", "--gpu", "NVIDIA Made Up"],
    )  # fmt: skip
    assert code == explained == cli.OK
    assert json.loads(measured)["measured"] == {"gpu": "NVIDIA Made Up", "rows": [], "borrowed": {}, "stale": {}}
    assert "\nmeasured " in text
    rows = {row["patch"]: row for row in json.loads(printed)["rows"]}
    assert rows["layernorm.rms_norm"]["state"] == "bound"
    assert rows["rotary.rotary_embedding"]["state"] == "bound"
    assert rows["ir.rms_norm"]["state"] == "off"
    for row in rows.values():
        assert row["state"] in ("bound", "off") or "registered" in row["why"], row
    assert "vllm.model_executor.layers.layernorm:RMSNorm.forward_cuda  [attribute, cuda, vLLM 0.17.1-0.33]" in text
    assert "expects (self, x, residual=None)" in text
    assert f"here     {State.BOUND}" in text


@needs_vllm
def test_check_here_fails_for_a_patch_that_cannot_be() -> None:
    """Without a GPU and without the interpreter nothing can be bound, and what was asked for by name is a problem."""
    ((code, printed),) = commands(["check"], TRITON_INTERPRET="0", VLLM_GEMS_INCLUDE="layernorm.rms_norm")
    assert code == cli.PROBLEM
    assert "layernorm.rms_norm was asked for and is refused: there is no GPU" in printed


def test_report_lists_what_can_be_enabled() -> None:
    (code, printed), (_, text) = commands(["report", "--aten", "--json"], ["report", "--aten"])
    assert code == cli.OK
    told = {each["overload"]: each for each in json.loads(printed)}
    assert {"operation", "default", "speedup"} < set(told["add_.Tensor"])
    assert told["add_.Tensor"]["operation"] == "add"
    *lines, last = text.splitlines()
    assert [line.split()[0] for line in lines] == list(told)
    assert last.startswith(f"{len(told)} overloads of ")
    if not any(each["speedup"] for each in told.values()):
        assert last.endswith("0 in the default set, because nothing was measured on this GPU")
