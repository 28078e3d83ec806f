"""Pre-tuning without a GPU: shapes, jobs, the search, and the store, with times and verdicts that the tests make up."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch
from made_up import Toy
from test_rules import ROOT, loaded_by

from tools import ship_tuned
from vllm_gems import cli, tuned
from vllm_gems.kernels.linear import Shape, default_tiling, key_of
from vllm_gems.tuning import run
from vllm_gems.tuning import search as searching
from vllm_gems.tuning.linear import LINEAR
from vllm_gems.tuning.models import PRESETS, linears
from vllm_gems.tuning.search import (
    Job,
    Scope,
    Tunable,
    best_of_all,
    compiled,
    generalise,
    keep,
    pending,
    search,
    trial,
)

QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "attention_bias": False, "mlp_bias": False, "vocab_size": 128256,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "attention_bias": False,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16,
    "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1408, "n_shared_experts": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tp", "expected"),
    [
        (QWEN2, 1, {(3584, 4608, True, False), (3584, 3584, False, False), (3584, 18944, False, True),
                    (18944, 3584, False, False)}),
        (QWEN2, 2, {(3584, 2304, True, False), (1792, 3584, False, False), (3584, 9472, False, True),
                    (9472, 3584, False, False)}),
        (LLAMA, 1, {(4096, 6144, False, False), (4096, 4096, False, False), (4096, 14336, False, True),
                    (14336, 4096, False, False)}),
        (LLAMA, 2, {(4096, 3072, False, False), (2048, 4096, False, False), (4096, 7168, False, True),
                    (7168, 4096, False, False)}),
        # Keys and values of eight heads are on two ranks each.
        (LLAMA, 16, {(4096, 512, False, False), (256, 4096, False, False), (4096, 896, False, True),
                     (896, 4096, False, False)}),
        (QWEN3, 2, {(4096, 3072, False, False), (2048, 4096, False, False), (4096, 6144, False, True),
                    (6144, 4096, False, False)}),
        ({**LLAMA, "num_key_value_heads": None}, 1, {(4096, 12288, False, False), (4096, 4096, False, False),
                                                     (4096, 14336, False, True), (14336, 4096, False, False)}),
        (QWEN3, 1, {(4096, 6144, False, False), (4096, 4096, False, False), (4096, 12288, False, True),
                    (12288, 4096, False, False)}),
        ({"text_config": QWEN3}, 1, {(4096, 6144, False, False), (4096, 4096, False, False),
                                     (4096, 12288, False, True), (12288, 4096, False, False)}),
        (DEEPSEEK, 1, {(2048, 3072, False, False), (2048, 576, False, False), (2048, 2048, False, False),
                       (2048, 10944, False, True), (10944, 2048, False, False), (2048, 2816, False, True),
                       (2816, 2048, False, False)}),
        # What leads to the latent is on every rank.
        (DEEPSEEK, 2, {(2048, 1536, False, False), (2048, 576, False, False), (1024, 2048, False, False),
                       (2048, 5472, False, True), (5472, 2048, False, False), (2048, 1408, False, True),
                       (1408, 2048, False, False)}),
        (PRESETS["deepseek"][1], 8, {(7168, 2112, False, False), (1536, 3072, False, False),
                                     (2048, 7168, False, False), (7168, 256, False, False), (7168, 2304, False, True),
                                     (2304, 7168, False, False), (7168, 256, False, True), (256, 7168, False, False)}),
    ],
)  # fmt: skip
def test_layers_are_those_that_vllm_makes_of_a_configuration(config: Any, tp: int, expected: set[Any]) -> None:
    assert set(linears(config, tp)) == {Shape(*each) for each in expected}


def scope(config: Any, tp: int = 1, max_tokens: int = 16384, max_reqs: int = 1024, dtype: str = "bfloat16") -> Scope:
    return Scope(config, tp, max_tokens, max_reqs, dtype)


def test_what_is_no_decoder_or_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="has no 'intermediate_size'"):
        linears({"hidden_size": 64, "num_attention_heads": 4}, 1)
    with pytest.raises(ValueError, match="has no 'qk_nope_head_dim'"):
        linears({key: value for key, value in DEEPSEEK.items() if key != "qk_nope_head_dim"}, 1)
    with pytest.raises(ValueError, match="--tp 3 does not divide num_attention_heads = 28"):
        linears(QWEN2, 3)
    with pytest.raises(ValueError, match="--tp 14 does not divide num_key_value_heads = 4"):
        linears(QWEN2, 14)


def test_jobs_of_few_requests_are_fewer() -> None:
    assert {job.about.rows for job in LINEAR.jobs(scope(QWEN2))} == {16, 32, 64}
    assert {job.about.rows for job in LINEAR.jobs(scope(QWEN2, max_reqs=40))} == {16, 32}
    assert {job.about.rows for job in LINEAR.jobs(scope(QWEN2, max_tokens=8))} == {16}
    job = next(iter(LINEAR.jobs(scope(QWEN2))))
    shape = Shape(3584, 4608, True, False)
    assert (job.key, job.about.shape) == (key_of(shape, 16, torch.bfloat16), shape)
    assert LINEAR.candidates(job)[0] == default_tiling(shape, 16, 2)
    assert len(set(LINEAR.candidates(job))) == len(LINEAR.candidates(job)) > 10


def toy(
    us: Callable[[Toy], float] = lambda candidate: float(candidate.size),
    error: Callable[[Toy], float] = lambda candidate: 0.0,
) -> Tunable:
    return Tunable(
        ops=("toy",),
        kernel="toy",
        source=lambda: "the source",
        jobs=lambda scope: [],
        candidates=lambda job: [Toy(size) for size in (1, 2, 3, 4)],
        compile=lambda job, candidate, arch: None,
        prepare=lambda job, device: None,
        error=lambda job, candidate, context: error(candidate),
        tolerance=1e-3,
        us=lambda job, candidate, context: us(candidate),
        general=lambda times: {"any": best_of_all(times.values())},
    )


def toy_job(key: str) -> Job:
    return Job(key, 0, "toy")


ALL = [Toy(size) for size in (1, 2, 3, 4)]


def searched(tunable: Tunable, job: Job, candidates: list[Toy] = ALL) -> searching.Outcome:
    return search(job, candidates, lambda candidate: trial(tunable, job, candidate, "cpu"))


def test_a_wrong_candidate_is_never_chosen_and_one_that_raises_does_not_end_the_search() -> None:
    def us(candidate: Toy) -> float:
        if candidate.size == 2:
            raise MemoryError("too large")
        return float(candidate.size)

    outcome = searched(toy(us, lambda candidate: {1: 1.0, 4: float("nan")}.get(candidate.size, 0.0)), toy_job("a"))
    assert (outcome.best, outcome.us, outcome.times) == (Toy(3), 3.0, {Toy(3): 3.0})
    assert outcome.lost == {Toy(1): "off by 1.0e+00", Toy(2): "MemoryError: too large", Toy(4): "off by nan"}
    with pytest.raises(searching.NothingFoundError, match="no configuration gives the right result: off by 1"):
        searched(toy(error=lambda candidate: 1.0), toy_job("a"))
    with pytest.raises(searching.NothingFoundError, match="none compiles"):
        searched(toy(), toy_job("a"), [])


def test_a_compiler_that_crashes_costs_one_candidate() -> None:
    work = [(Job("a", number, "made_up"), candidate) for number in (0, 1) for candidate in made_up.CANDIDATES]
    done: list[int] = []
    found = compiled(made_up.KERNEL, work, 90, lambda: done.append(1))
    right = {0: (1, 4, 5, 6, 7), 1: (1, 3, 4, 5, 6, 7)}
    assert found == [(Job("a", number, "made_up"), Toy(size)) for number, sizes in right.items() for size in sizes]
    assert len(done) == 14


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_GEMS_TUNED", str(tmp_path))
    monkeypatch.setattr(tuned, "_TABLES", {})
    return tmp_path


def test_what_is_done_is_not_done_again_unless_the_source_or_a_version_changed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [toy_job("a 16"), toy_job("b 16")]
    assert pending(toy(), "gpu", jobs) == jobs
    keep(toy(), "gpu", jobs[0], searched(toy(), jobs[0]))
    assert pending(toy(), "gpu", jobs) == jobs[1:]
    with monkeypatch.context() as patched:
        patched.setattr(tuned, "versions", lambda: {"torch": "2.11.0", "triton": "99"})
        assert pending(toy(), "gpu", jobs) == jobs
        table = tuned.Table("toy", "gpu", "the source")
        assert (table.configurations, list(table.stale.values())) == ({}, [["a 16"]])
        assert next(iter(table.stale)).startswith("measured with torch")
    assert tuned.Table("toy", "gpu", "another").stale == {"of another source": ["a 16"]}
    assert tuned.Table("toy", "gpu", "the source").configurations == {"a 16": {"size": 1}}


def test_what_was_not_measured_takes_what_is_best_for_all(store: Path) -> None:
    for key, times in (("a", {1: 1.0, 2: 2.0, 3: 1.5}), ("b", {1: 9.0, 2: 1.0, 3: 1.2})):
        job = toy_job(key)
        keep(toy(), "gpu", job, searched(toy(lambda each, t=times: t[each.size]), job, ALL[:3]))  # type: ignore[misc]
    generalise(toy(), "gpu")
    found = tuned.Table("toy", "gpu", "the source").configurations
    assert found == {"a": {"size": 1}, "b": {"size": 2}, "any": {"size": 3}}


def test_lookup_is_of_a_users_first_and_is_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    key = key_of(Shape(3584, 18944, False, True), 16, torch.bfloat16)
    shipped = tuned.lookup("linear", 0, key, LINEAR.source())
    assert shipped is not None
    tuned._TABLES.clear()
    job = toy_job(key)
    keep(LINEAR, "NVIDIA H100 80GB HBM3", job, searching.Outcome(Shape(1, 2, False, False), 1.0, {}, {}))
    assert tuned.lookup("linear", 0, key, LINEAR.source()) == Shape(1, 2, False, False)._asdict()
    assert tuned.lookup("linear", 0, f"float16{key.removeprefix('bfloat16')}", LINEAR.source()) is not None
    assert tuned.lookup("linear", 0, "1x1 16", LINEAR.source()) is None
    assert tuned.lookup("linear", -1, key, LINEAR.source()) is None
    state = tuned.states()["linear"]
    assert (state["missing"], state["stale"]) == (["1x1 16"], {})
    assert state["found"] > 1
    tuned._TABLES.clear()
    assert tuned.lookup("linear", 0, "any 16", "a changed kernel") is None
    assert set(tuned.states()["linear"]["stale"]) == {"shipped, of another source", "of another source"}


@pytest.mark.parametrize(
    ("gpu", "triton", "told"),
    [
        ("NVIDIA H100 80GB HBM3", "3.6.0", None),
        ("NVIDIA H100 80GB HBM3", "3.9.0", "triton 3.6.0"),
        ("NVIDIA H100 PCIe", "3.6.0", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H100 PCIe", "3.9.0", "NVIDIA H100 80GB HBM3, triton 3.6.0"),
    ],
)
def test_what_is_shipped_is_used_elsewhere_and_that_is_told(
    gpu: str, triton: str, told: str | None, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "versions", lambda: {"torch": "2.11.0+cu130", "triton": triton})
    table = tuned.Table("linear", gpu, LINEAR.source())
    count = table.found
    assert count > 1
    assert table.borrowed == ({told: count} if told else {})
    key = next(iter(table.configurations))
    keep(LINEAR, gpu, toy_job(key), searching.Outcome(Shape(1, 2, False, False), 1.0, {}, {}))
    assert tuned.Table("linear", gpu, LINEAR.source()).borrowed == ({told: count - 1} if told else {})


def test_what_was_measured_can_be_shipped(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = "NVIDIA Made-up 1"
    with pytest.raises(ValueError, match="has no results for this kernel's source"):
        ship_tuned.shipped(toy(), gpu, {})
    keep(toy(), gpu, toy_job("a 16"), searched(toy(), toy_job("a 16")))
    first = ship_tuned.shipped(toy(), gpu, {})
    assert first == {
        "gpu": gpu,
        "versions": tuned.versions(),
        "source": "the source",
        "configurations": {"a 16": {"size": 1}},
    }
    # Beside what was shipped, unless that is of another kernel or compiler.
    for before, others in (({}, {"b 16"}), ({"source": "another"}, set()), ({"versions": {"triton": "0"}}, set())):
        present = {**first, "configurations": {"a 16": {"size": 9}, "b 16": {"size": 2}}, **before}
        found = ship_tuned.shipped(toy(), gpu, present)["configurations"]
        assert found.keys() == {"a 16", *others}
        assert found["a 16"] == {"size": 1}
    monkeypatch.setattr(tuned, "versions", lambda: {"torch": "2.11.0", "triton": "99"})
    keep(toy(), gpu, toy_job("b 16"), searched(toy(), toy_job("b 16")))
    with pytest.raises(ValueError, match="results of several versions"):
        ship_tuned.shipped(toy(), gpu, {})


def test_kernels_that_were_measured_are_shipped(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ship_tuned, "tunables", lambda: [toy(), made_up.KERNEL])
    monkeypatch.setattr(ship_tuned, "SHIPPED", store / "shipped")
    monkeypatch.setattr(sys, "argv", ["ship_tuned.py", "--gpu", "NVIDIA Made-up 1"])
    assert ship_tuned.main() == 1
    assert "nothing was measured" in capsys.readouterr().err
    keep(toy(), "NVIDIA Made-up 1", toy_job("a 16"), searched(toy(), toy_job("a 16")))
    for _ in range(2):  # what is there already stays
        assert ship_tuned.main() == 0
        (path,) = (store / "shipped").rglob("*.json")
        assert path == store / "shipped" / "made-up" / "toy.json"
        assert json.loads(path.read_text())["configurations"] == {"a 16": {"size": 1}}


def test_what_is_no_configuration_is_counted_and_breaks_nothing(store: Path) -> None:
    job = toy_job("a 16")
    keep(toy(), "gpu", job, searched(toy(), job))
    folder = tuned.folder_of("toy", "gpu")
    (folder / "empty.json").write_text("")
    (folder / "list.json").write_text("[1]")
    (folder / "half.json").write_text('{"key": "b 16", "source": "the source", "versions": {}}')
    table = tuned.Table("toy", "gpu", "the source")
    assert (table.configurations, table.stale) == ({"a 16": {"size": 1}}, {"not readable": ["?"] * 3})
    assert pending(toy(), "gpu", [job, toy_job("b 16")]) == [toy_job("b 16")]
    generalise(toy(), "gpu")
    assert set(tuned.Table("toy", "gpu", "the source").configurations) == {"a 16", "any"}


def test_a_configuration_is_for_the_gpu_it_was_measured_on(store: Path) -> None:
    """Where a home folder is shared by machines, cards of one make have configurations of their own."""
    small, large = "NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090"
    job = toy_job("a 16")
    keep(toy(), small, job, searched(toy(), job))
    assert pending(toy(), large, [job]) == [job]
    keep(toy(), large, job, searched(toy(), job, ALL[1:]))
    for gpu, size in ((small, 1), (large, 2)):
        assert tuned.Table("toy", gpu, "the source").configurations == {"a 16": {"size": size}}


WRITER = """
import json, sys, threading
from vllm_gems import tuned

versions = json.loads(sys.argv[2])  # asked for, they would import torch in every process

def write(number):
    for key in ("shared", f"own {number}"):
        for size in range(20):
            configuration = {"size": size, "by": number}
            entry = {"key": key, "configuration": configuration, "source": "s", "versions": versions}
            tuned.write("toy", "gpu", entry)

first = 4 * int(sys.argv[1])
threads = [threading.Thread(target=write, args=(number,)) for number in range(first, first + 4)]
failed = []
threading.excepthook = failed.append
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(len(failed))
"""


def test_64_writers_at_once_lose_and_break_nothing(store: Path) -> None:
    """Four threads in each of sixteen processes, all of which write one key and one of their own."""
    command = [sys.executable, "-c", WRITER]
    writers = [
        subprocess.Popen([*command, str(number), json.dumps(tuned.versions())], cwd=ROOT, env=_environ(store))
        for number in range(16)
    ]
    while any(writer.poll() is None for writer in writers):
        for path in tuned.folder_of("toy", "gpu").glob("*.json"):
            json.loads(path.read_text())  # whole at any moment
    assert [writer.wait() for writer in writers] == [0] * 16
    found = tuned.Table("toy", "gpu", "s").configurations
    assert set(found) == {"shared", *(f"own {number}" for number in range(64))}
    assert all(found[f"own {number}"] == {"size": 19, "by": number} for number in range(64))
    assert found["shared"]["size"] == 19
    assert not list(tuned.folder_of("toy", "gpu").glob("*.part"))


def made_up_gpu() -> tuple[str, int]:
    return "NVIDIA Made-up 1", 90


def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and a kernel that are made up; compilation, trials and the store are as on a real one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(searching, "tunables", lambda: [made_up.KERNEL])
    monkeypatch.setattr(run, "_gpu", made_up_gpu)


def a_model(folder: Path, jobs: int) -> str:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"jobs": jobs}))
    return str(folder / "model")


def test_a_run_ends_with_the_best_of_what_is_right(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the first job's candidates one does not compile, one takes the compiler down, two are wrong, the faster one
    among all, one takes the process on the GPU down, and one raises; another job has none that is right."""
    patched(monkeypatch)
    command = ["pretune", "--model", a_model(store, 2)]
    assert cli.main(command) == cli.PROBLEM
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "made_up job 0 9.0 us, the best of 1, the default takes 9.0",
        "made_up job 1 5.0 us, the best of 3, the default takes 9.0",
        "made_up none right failed: no configuration gives the right result: off by 1.0e+00",
        "3 jobs, 1 without a result",
    ]
    assert "made_up: 100%" in printed.err
    table = tuned.Table("made_up", "NVIDIA Made-up 1", "the source")
    assert table.configurations == {"job 0": {"size": 1}, "job 1": {"size": 5}, "any": {"size": 1}}
    # What was found is not looked for again. A run that was stopped before the general one was written writes it.
    for entry in tuned.folder_of("made_up", "NVIDIA Made-up 1").glob("*.json"):
        if json.loads(entry.read_text())["key"] == "any":
            entry.unlink()
    assert cli.main([*command, "--json"]) == cli.PROBLEM
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    assert [job for job in jobs if "known" in job] == [
        {"kernel": "made_up", "key": f"job {number}", "known": True} for number in range(2)
    ]
    assert tuned.Table("made_up", "NVIDIA Made-up 1", "the source").configurations == table.configurations


def test_a_kernel_that_is_not_for_a_gpu_is_not_measured_there(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patched(monkeypatch)
    elsewhere = dataclasses.replace(made_up.KERNEL, refuses=made_up.refuses)
    monkeypatch.setattr(searching, "tunables", lambda: [elsewhere])
    assert cli.main(["pretune", "--model", a_model(store, 1)]) == cli.OK
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["made_up job 0 skipped: not for GPU 0", "made_up none right skipped: not for GPU 0", "2 jobs"]
    assert not list(tuned.folder_of("made_up", "NVIDIA Made-up 1").glob("*.json"))


KILLED = """
if __name__ == "__main__":  # which it is not to the processes that it starts
    import sys
    sys.path.insert(0, "tests")
    import pytest
    from test_tuning import patched
    from vllm_gems import cli
    with pytest.MonkeyPatch.context() as monkeypatch:
        patched(monkeypatch)
        sys.exit(cli.main(["pretune", "--json", "--model", sys.argv[1]]))
"""


def test_a_run_that_was_killed_goes_on_where_it_was(store: Path) -> None:
    """`vllm-gems pretune`, killed outright as soon as there are results."""
    script = store / "killed.py"  # a file, because processes that are spawned look at it
    script.write_text(KILLED)
    command = [sys.executable, str(script), a_model(store, 8)]
    environ = {**_environ(store), "SECONDS_OF_A_TRIAL": "0.2"}

    def done() -> set[str]:
        return {entry["key"] for entry in tuned.entries("made_up", "NVIDIA Made-up 1")}

    first = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(done()) < 3:
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    first.kill()
    first.wait()
    before = done()
    assert 3 <= len(before) < 8
    second = subprocess.run(command, cwd=ROOT, env=_environ(store), capture_output=True, text=True)
    assert second.returncode == cli.PROBLEM, second.stderr
    jobs = json.loads(second.stdout)["jobs"]
    assert {job["key"] for job in jobs if "known" in job} == before
    assert {job["key"] for job in jobs if "us" in job} == {f"job {number}" for number in range(8)} - before
    assert done() == {"any", *(f"job {number}" for number in range(8))}


def test_a_store_that_cannot_be_written_is_told_before_anything_is_measured(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patched(monkeypatch)
    (store / "file").write_text("")
    monkeypatch.setenv("VLLM_GEMS_TUNED", str(store / "file"))
    monkeypatch.setattr(run, "compiled", lambda *args: pytest.fail("it began"))
    assert cli.main(["pretune", "--model", a_model(store, 1)]) == cli.USAGE
    assert "VLLM_GEMS_TUNED names another folder" in capsys.readouterr().err


def _environ(store: Path) -> dict[str, str]:
    return {**os.environ, "VLLM_GEMS_TUNED": str(store), "PYTHONPATH": f"{ROOT}"}


def test_dry_run_says_what_would_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("is_available", "_lazy_init"):  # what every use of a GPU begins with
        monkeypatch.setattr(torch.cuda, name, lambda: pytest.fail("it asks for a GPU"))
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    command = ["pretune", "--model", str(tmp_path), "--dry-run"]
    assert cli.main([*command, "--json", "--tp", "2", "--ops", "linear"]) == cli.OK
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    assert [job["key"] for job in jobs if job["key"].endswith(" 16")] == [
        "bfloat16 4096x3072 16", "bfloat16 2048x4096 16", "bfloat16 6144x4096 16",
    ]  # fmt: skip
    assert all(job["candidates"] > 10 for job in jobs)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        assert cli.main(command) == cli.USAGE
        assert "config.json is no configuration" in capsys.readouterr().err


def test_a_models_name_is_looked_up_by_transformers(tmp_path: Path) -> None:
    """Here among the models that its cache has, without the network and without weights."""
    pytest.importorskip("transformers")
    repository = tmp_path / "models--some--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(LLAMA))
    command = [sys.executable, "-m", "vllm_gems", "pretune", "--model", "some/llama", "--dry-run", "--json"]
    environ = {**_environ(tmp_path), "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == cli.OK, done.stderr
    keys = {job["key"] for job in json.loads(done.stdout)["jobs"]}
    sizes = ("4096x6144", "4096x4096", "4096x14336 gated", "14336x4096")
    assert {f"bfloat16 {size} 16" for size in sizes} <= keys


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "qwen", "--ops", "mv"], "--ops mv: nothing to tune there; kernels with configurations are linear"),
        (["--model", "qwen", "--tp", "0", "--dry-run"], "--tp 0: expected at least 1"),
        (["--model", "qwen", "--tp", "5", "--dry-run"], "--tp 5 does not divide num_attention_heads"),
        (["--model", "no/such/folder", "--dry-run"], "--model no/such/folder: not one of llama, qwen, deepseek"),
        (["--model", "qwen"], "there is no NVIDIA GPU here to measure on; --dry-run says"),
    ],
)
def test_errors_name_the_option(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["pretune", *arguments]) == cli.USAGE
    assert words in capsys.readouterr().err


def test_a_server_never_imports_the_tuner() -> None:
    code = "import vllm_gems.kernels.linear, vllm_gems.plugin, vllm_gems.reports; import json; "
    script = f"{code} import sys; sys.exit(any(name.startswith('vllm_gems.tuning') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
    assert "tqdm" not in loaded_by("import vllm_gems.plugin")
