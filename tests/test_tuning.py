"""Pre-tuning without a GPU: shapes, jobs, the search, and the store, with times and verdicts that the tests make up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_rules import ROOT, loaded_by

from vllm_gems import cli, tuned
from vllm_gems.kernels.linear import Shape, default_tiling, key_of
from vllm_gems.tuning import search as searching
from vllm_gems.tuning.linear import LINEAR
from vllm_gems.tuning.models import PRESETS, Linear, linears
from vllm_gems.tuning.search import Job, Tunable, best_of_all, compiled, generalise, keep, pending, search

QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
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
        (QWEN3, 1, {(4096, 6144, False, False), (4096, 4096, False, False), (4096, 12288, False, True),
                    (12288, 4096, False, False)}),
        ({"text_config": QWEN3}, 1, {(4096, 6144, False, False), (4096, 4096, False, False),
                                     (4096, 12288, False, True), (12288, 4096, False, False)}),
        (DEEPSEEK, 1, {(2048, 3072, False, False), (2048, 576, False, False), (2048, 2048, False, False),
                       (2048, 10944, False, True), (10944, 2048, False, False), (2048, 2816, False, True),
                       (2816, 2048, False, False)}),
        (PRESETS["deepseek"][1], 8, {(7168, 2112, False, False), (1536, 3072, False, False),
                                     (2048, 7168, False, False), (7168, 2304, False, True),
                                     (2304, 7168, False, False), (7168, 256, False, True), (256, 7168, False, False)}),
    ],
)  # fmt: skip
def test_layers_are_those_that_vllm_makes_of_a_configuration(config: Any, tp: int, expected: set[Any]) -> None:
    assert set(linears(config, tp)) == {Linear(*each) for each in expected}


def test_what_is_no_decoder_or_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="has no 'intermediate_size'"):
        linears({"hidden_size": 64, "num_attention_heads": 4})
    with pytest.raises(ValueError, match="--tp 3 does not divide num_attention_heads = 28"):
        linears(QWEN2, 3)


def test_jobs_of_few_requests_are_fewer() -> None:
    assert {job.about.rows for job in LINEAR.jobs(QWEN2, 1, 16384, 1024)} == {16, 32, 64}
    assert {job.about.rows for job in LINEAR.jobs(QWEN2, 1, 16384, 40)} == {16, 32}
    assert {job.about.rows for job in LINEAR.jobs(QWEN2, 1, 8, 1024)} == {16}
    job = next(iter(LINEAR.jobs(QWEN2, 1, 16384, 1024)))
    shape = Shape(3584, 4608, True, False)
    assert (job.key, job.about.shape) == (key_of(shape, 16), shape)
    assert LINEAR.candidates(job)[0] == default_tiling(shape, 16, 2)
    assert len(set(LINEAR.candidates(job))) == len(LINEAR.candidates(job)) > 10


class Toy(NamedTuple):
    size: int


def toy(
    us: Callable[[Toy], float] = lambda candidate: float(candidate.size),
    error: Callable[[Toy], float] = lambda candidate: 0.0,
) -> Tunable:
    return Tunable(
        ops=("toy",),
        kernel="toy",
        dtype="float32",
        source=lambda: "the source",
        jobs=lambda config, tp, max_tokens, max_reqs: [],
        candidates=lambda job: [Toy(size) for size in (1, 2, 3, 4)],
        compile=lambda job, candidate, arch: None,
        prepare=lambda job, device: None,
        error=lambda job, candidate, context: error(candidate),
        tolerance=1e-3,
        us=lambda job, candidate, context: us(candidate),
        general=lambda times: {"any": best_of_all(times.values())},
    )


ALL = [Toy(size) for size in (1, 2, 3, 4)]


def test_a_wrong_candidate_is_never_chosen_and_one_that_raises_does_not_end_the_run() -> None:
    def us(candidate: Toy) -> float:
        if candidate.size == 2:
            raise MemoryError("too large")
        return float(candidate.size)

    outcome = search(toy(us, lambda candidate: {1: 1.0, 4: float("nan")}.get(candidate.size, 0.0)), Job("a", 0), ALL, 0)
    assert (outcome.best, outcome.us, outcome.times) == (Toy(3), 3.0, {Toy(3): 3.0})
    assert outcome.lost == {Toy(1): "off by 1.0e+00", Toy(2): "MemoryError: too large", Toy(4): "off by nan"}
    with pytest.raises(RuntimeError, match="a: no configuration gives the right result"):
        search(toy(error=lambda candidate: 1.0), Job("a", 0), ALL, 0)


def compile_toy(job: Job, candidate: Toy, arch: int) -> None:
    """Called in processes of their own. One candidate does not compile, one takes its process down."""
    if candidate.size == 2:
        raise ValueError(f"not for {arch}")
    if candidate.size == 3:
        os._exit(1)


def no_jobs(*args: Any) -> list[Job]:
    return []


def test_a_compiler_that_crashes_costs_one_candidate() -> None:
    plain = dict.fromkeys(("source", "jobs", "candidates", "prepare", "error", "us", "general"), no_jobs)
    tunable = Tunable(ops=("toy",), kernel="toy", dtype="float32", compile=compile_toy, tolerance=0, **plain)  # type: ignore[arg-type]
    work = [(Job(key, 0), candidate) for key in ("a", "b") for candidate in ALL]
    done: list[int] = []
    found = compiled(tunable, work, 90, lambda: done.append(1))
    assert found == [(Job(key, 0), Toy(size)) for key in ("a", "b") for size in (1, 4)]
    assert len(done) == 8


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_GEMS_TUNED", str(tmp_path))
    monkeypatch.setattr(tuned, "_TABLES", {})
    return tmp_path


def test_what_is_done_is_not_done_again_unless_the_source_or_a_version_changed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job("a 16", 0), Job("b 16", 0)]
    assert pending(toy(), "gpu", jobs) == jobs
    keep(toy(), "gpu", jobs[0], search(toy(), jobs[0], ALL, 0))
    assert pending(toy(), "gpu", jobs) == jobs[1:]
    with monkeypatch.context() as patched:
        patched.setattr(tuned, "versions", lambda: {"torch": "2.11.0", "triton": "99"})
        assert pending(toy(), "gpu", jobs) == jobs
        table = tuned.Table("toy", "gpu", "the source")
        assert (table.configurations, sum(table.stale.values())) == ({}, 1)
        assert next(iter(table.stale)).startswith("measured with torch")
    assert dict(tuned.Table("toy", "gpu", "another").stale) == {"of another source": 1}
    assert tuned.Table("toy", "gpu", "the source").configurations == {"a 16": {"size": 1}}


def test_what_was_not_measured_takes_what_is_best_for_all(store: Path) -> None:
    for key, times in (("a", {1: 1.0, 2: 2.0, 3: 1.5}), ("b", {1: 9.0, 2: 1.0, 3: 1.2})):
        job = Job(key, 0)
        keep(toy(), "gpu", job, search(toy(lambda each, t=times: t[each.size]), job, ALL[:3], 0))  # type: ignore[misc]
    generalise(toy(), "gpu")
    found = tuned.Table("toy", "gpu", "the source").configurations
    assert found == {"a": {"size": 1}, "b": {"size": 2}, "any": {"size": 3}}


def test_lookup_is_of_a_users_first_and_is_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    key = key_of(Shape(3584, 18944, False, True), 16)
    shipped = tuned.lookup("linear", 0, key, LINEAR.source())
    assert shipped is not None
    tuned._TABLES.clear()
    job = Job(key, 0)
    keep(LINEAR, "NVIDIA H100 80GB HBM3", job, searching.Outcome(Shape(1, 2, False, False), 1.0, {}, {}))
    assert tuned.lookup("linear", 0, key, LINEAR.source()) == Shape(1, 2, False, False)._asdict()
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
    count = len(table.configurations)
    assert count > 1
    assert table.borrowed == ({told: count} if told else {})
    key = next(iter(table.configurations))
    keep(LINEAR, gpu, Job(key, 0), searching.Outcome(Shape(1, 2, False, False), 1.0, {}, {}))
    assert tuned.Table("linear", gpu, LINEAR.source()).borrowed == ({told: count - 1} if told else {})


def test_what_is_no_configuration_is_counted_and_breaks_nothing(store: Path) -> None:
    job = Job("a 16", 0)
    keep(toy(), "gpu", job, search(toy(), job, ALL, 0))
    folder = tuned.folder_of("toy", "gpu")
    (folder / "empty.json").write_text("")
    (folder / "list.json").write_text("[1]")
    (folder / "half.json").write_text('{"key": "b 16", "source": "the source", "versions": {}}')
    table = tuned.Table("toy", "gpu", "the source")
    assert (table.configurations, table.stale) == ({"a 16": {"size": 1}}, {"not readable": 3})
    assert pending(toy(), "gpu", [job, Job("b 16", 0)]) == [Job("b 16", 0)]
    generalise(toy(), "gpu")
    assert set(tuned.Table("toy", "gpu", "the source").configurations) == {"a 16", "any"}


def test_a_configuration_is_for_the_gpu_it_was_measured_on(store: Path) -> None:
    """Where a home folder is shared by machines, cards of one make have configurations of their own."""
    small, large = "NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090"
    job = Job("a 16", 0)
    keep(toy(), small, job, search(toy(), job, ALL, 0))
    assert pending(toy(), large, [job]) == [job]
    keep(toy(), large, job, search(toy(), job, ALL[1:], 0))
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


KILLED = """
import sys, time
sys.path.insert(0, "tests")
from test_tuning import ALL, toy
from vllm_gems.tuning.search import Job, keep, pending, search

def slow(candidate):
    time.sleep(0.05)
    return float(candidate.size)

for job in pending(toy(), "gpu", [Job(f"job {number}", 0) for number in range(12)]):
    print(job.key, flush=True)
    keep(toy(), "gpu", job, search(toy(slow), job, ALL, 0))
"""


def test_a_run_that_was_killed_goes_on_where_it_was(store: Path) -> None:
    command = [sys.executable, "-c", KILLED]
    first = subprocess.Popen(command, cwd=ROOT, env=_environ(store), stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    began = [first.stdout.readline().strip() for _ in range(5)]
    first.kill()
    first.wait()
    done = {entry["key"] for entry in tuned.entries("toy", "gpu")}
    assert set(began[:4]) <= done
    assert len(done) < 12
    second = subprocess.run(command, cwd=ROOT, env=_environ(store), capture_output=True, text=True, check=True)
    again = set(second.stdout.split("\n")) - {""}
    assert again.isdisjoint(done)
    assert again | done == {f"job {number}" for number in range(12)}


def _environ(store: Path) -> dict[str, str]:
    return {**os.environ, "VLLM_GEMS_TUNED": str(store), "PYTHONPATH": f"{ROOT}"}


def test_dry_run_says_what_would_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert cli.main(["pretune", "--model", str(tmp_path), "--dry-run", "--json", "--tp", "2"]) == cli.OK
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    assert [job["key"] for job in jobs if job["key"].endswith(" 16")] == [
        "4096x3072 16", "2048x4096 16", "4096x6144 gated 16", "6144x4096 16",
    ]  # fmt: skip
    assert all(job["candidates"] > 10 for job in jobs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "qwen", "--ops", "mm"], "--ops mm: nothing to tune there; kernels with configurations are linear"),
        (["--model", "qwen", "--tp", "0", "--dry-run"], "--tp 0: expected at least 1"),
        (["--model", "qwen", "--tp", "5", "--dry-run"], "--tp 5 does not divide num_attention_heads"),
        (["--model", "no/such/folder", "--dry-run"], "--model no/such/folder: not one of llama, qwen, deepseek"),
        (["--model", "qwen"], "there is no NVIDIA GPU here to measure on; --dry-run says"),
    ],
)
def test_errors_name_the_option(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["pretune", *arguments]) == cli.USAGE
    assert words in capsys.readouterr().err


def test_a_server_never_imports_the_tuner() -> None:
    code = "import vllm_gems.kernels.linear, vllm_gems.plugin, vllm_gems.reports; import json; "
    script = f"{code} import sys; sys.exit(any(name.startswith('vllm_gems.tuning') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
    assert "tqdm" not in loaded_by("import vllm_gems.plugin")
