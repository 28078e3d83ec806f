"""vLLM's own kernel tests as the judge: without the plugin, then with it; no test may move from pass to fail.

    python tools/vllm_suite.py fetch                      # once, where there is a package registry
    python tools/vllm_suite.py run --tests DIR --out DIR  # on the GPU

`fetch` takes vLLM's source distribution of exactly one release and keeps the test files of `SUITE` and what they
import. `run` needs that release of vLLM, a GPU and, to finish within minutes, pytest-xdist. It runs every test four
times:

- as vLLM ships the tests, where a default configuration has vLLM's layers run plain PyTorch, so that what is judged is
  the ops; and once more with `custom_ops=["all"]`, in which the layers run their kernels;
- each of the two without the plugin (`VLLM_GEMS=0`) and with it, loaded by `vllm_gems.testing.pytest_plugin`.

It writes logs and the record `vllm_suite` to --out, the latter to `benchmarks/results` too if every test ran on a
GPU, and exits with 1 if a test that passed without the plugin does not pass with it, or if a patch that these tests
reach was never hit.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `benchmarks`, which is no part of the package

VERSION = "0.26.0"
FOLDER = PurePosixPath("tests/kernels/core")
SUITE = ("test_layernorm.py", "test_activation.py", "test_pos_encoding.py", "test_rotary_embedding.py")

NO_LAYER = "test_fused_rms_norm_quant"

# What building the metadata of vLLM's source distribution imports, torch apart: of that it reads versions only.
BUILD_NEEDS = ("setuptools>=77,<81", "setuptools-scm", "setuptools-rust", "packaging", "jinja2", "wheel")
TORCH_STUB = {
    "torch/__init__.py": '__version__ = "2.11.0"\nfrom . import version\n',
    "torch/version.py": "cuda = hip = xpu = None\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "CUDA_HOME = ROCM_HOME = None\n",
}

# The patches that these tests could reach, by the names of their areas, and those of them that none of the tests does.
AREAS = ("layernorm.*", "activation.*", "rotary.*", "op.*")
OUT_OF_REACH = {
    "rotary.deepseek_scaling": "no test builds this layer",
    "rotary.mrope": "no test builds this layer",
}

# A conftest of ours beside the tests, where vLLM has none. It picks every n-th test, and goes without the collection of
# garbage after each, which takes several times as long as the test; vLLM has this fixture for that.
CONFTEST = """
import pytest
import torch


def pytest_collection_modifyitems(items):
    items[:] = items[::{every}]


@pytest.fixture
def should_do_global_cleanup_after_test():
    return False


@pytest.fixture(autouse=True)
def _memory_for_other_processes():
    yield
    torch.cuda.empty_cache()
"""
# vLLM's own fixture of this name, except that layers run their kernels.
CUSTOM_OPS = """

@pytest.fixture
def default_vllm_config():
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))
    with set_current_vllm_config(config):
        yield config
"""


@dataclass(frozen=True)
class Variant:
    """One way to run the suite."""

    name: str
    conftest: str
    files: tuple[str, ...]
    options: tuple[str, ...] = ()


VARIANTS = (
    Variant("as shipped", CONFTEST, SUITE),
    # The other tests have no layers, so they would be the same once more.
    Variant("custom ops on", CONFTEST + CUSTOM_OPS, SUITE[:3], ("--deselect", f"{FOLDER}/{SUITE[0]}::{NO_LAYER}")),
)


# Fetching


def download(version: str, work: Path) -> Path:
    """vLLM's source distribution. pip builds its metadata to check the name, so that needs an environment."""
    for name, text in TORCH_STUB.items():
        path = work / "stub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    venv.create(work / "venv", with_pip=True)
    pip = [str(work / "venv" / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", *BUILD_NEEDS], check=True)
    target = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(work / "sdist")]
    settings = {
        "PYTHONPATH": str(work / "stub"),
        "VLLM_TARGET_DEVICE": "empty",
        "VLLM_VERSION_OVERRIDE": version,  # else the metadata's version gets a suffix, and pip refuses it
    }
    command = [*pip, "download", "--quiet", *target, f"vllm=={version}"]
    subprocess.run(command, check=True, env={**os.environ, **settings})
    return next((work / "sdist").glob("vllm-*.tar.gz"))


def imports(path: PurePosixPath, source: str) -> Iterator[str]:
    """The modules of the package `tests` that a file mentions in imports, and names that might be modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            origin = importlib.util.resolve_name(relative, ".".join(path.parent.parts)) if node.level else relative
            found = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in found if name.partition(".")[0] == "tests")


def needed(files: dict[str, str]) -> set[str]:
    """Of the files of a source tree by path, those of the suite, what they import, and conftest files above them."""
    todo = [FOLDER / name for name in SUITE]
    kept: set[str] = set()
    while todo:
        path = todo.pop()
        if str(path) in kept or str(path) not in files:
            continue
        kept.add(str(path))
        for folder in path.parents[:-1]:
            todo += [folder / "__init__.py", folder / "conftest.py"]
        for module in imports(path, files[str(path)]):
            where = PurePosixPath(*module.split("."))
            todo += [where.with_suffix(".py"), where / "__init__.py"]
    return kept


def sources(sdist: Path) -> dict[str, str]:
    """The Python files of the tests, and pyproject.toml with pytest's settings, by path."""
    files = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            wanted = path.suffix == ".py" and path.parts[0] == "tests"
            content = archive.extractfile(member) if wanted or str(path) == "pyproject.toml" else None
            if content is not None:
                files[str(path)] = content.read().decode()
    return files


def fetch(version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        files = sources(download(version, Path(work)))
    shutil.rmtree(folder, ignore_errors=True)
    for name in sorted({*needed(files), "pyproject.toml"}):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[name])
    (folder / "VERSION").write_text(version + "\n")
    print(f"{len(list(folder.rglob('*.py')))} files of vLLM {version} in {folder}")


# Running


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    result: str  # "passed", "failed", "error" or "skipped"
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.result == "passed"


def read_junit(path: Path) -> dict[str, Outcome]:
    """Outcomes by test, "file::name". A test that fails and then fails to clean up is named twice; worst wins."""
    kinds = {"skipped": "skipped", "failure": "failed", "error": "error"}
    ranks = ["passed", "skipped", "error", "failed"]
    found: dict[str, Outcome] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name')}"
        outcomes = [Outcome("passed")]
        outcomes += [Outcome(kinds[child.tag], child.get("message", "")) for child in case if child.tag in kinds]
        outcomes += [found[name]] if name in found else []
        found[name] = max(outcomes, key=lambda outcome: ranks.index(outcome.result))
    return found


def has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None


def run_pytest(tree: Path, name: str, variant: Variant, gems: bool, out: Path, workers: int) -> dict[str, Outcome]:
    """One run of the suite in processes of its own. A failing test is a result; a run without results is an error."""
    junit, log, reports = out / f"{name}.xml", out / f"{name}.log", out / f"{name}.reports"
    shutil.rmtree(reports, ignore_errors=True)
    parallel = ["-n", str(workers)] if workers > 1 else []
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "vllm_gems.testing.pytest_plugin", *parallel]
    files = [str(FOLDER / file) for file in variant.files]
    settings = {"VLLM_GEMS": str(int(gems)), "VLLM_GEMS_REPORT": str(reports.resolve())}
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={junit.resolve()}", *variant.options, *files]
    junit.unlink(missing_ok=True)
    with log.open("w") as sink:
        done = subprocess.run(command, cwd=tree, env={**os.environ, **settings}, stdout=sink, stderr=sink)
    if done.returncode not in (0, 1) or not junit.exists():
        sys.exit(f"pytest ended with {done.returncode}; the end of {log}:\n{log.read_text()[-4000:]}")
    return read_junit(junit)


def read_hits(reports: Path) -> dict[str, int]:
    from vllm_gems.nouns import State
    from vllm_gems.reports import Report

    return {row.patch: row.hits for row in Report.read(reports).rows if row.state is not State.OFF}


def never_hit(hits: dict[str, int]) -> list[str]:
    """Patches that a test reaches and that did nothing: then its passing says nothing about them."""
    reached = [patch for patch in hits if any(fnmatchcase(patch, area) for area in AREAS)]
    return sorted(patch for patch in reached if not hits[patch] and patch not in OUT_OF_REACH)


def moved(stock: dict[str, Outcome], ours: dict[str, Outcome]) -> dict[str, str]:
    """Tests that pass without the plugin and not with it, and what they say."""
    gone = Outcome("missing", "was not run")
    now = {name: ours.get(name, gone) for name, outcome in stock.items() if outcome.passed}
    return {name: f"{outcome.result}: {outcome.message}" for name, outcome in now.items() if not outcome.passed}


def table(variant: Variant, stock: dict[str, Outcome], ours: dict[str, Outcome]) -> list[dict[str, Any]]:
    """A row per file for the record; the more tests pass, the better."""
    rows = []
    for file in variant.files:
        counts = [
            Counter(outcome.result for name, outcome in outcomes.items() if name.startswith(f"{file}::"))
            for outcomes in (stock, ours)
        ]
        rows.append(
            {
                "case": {"file": file, "variant": variant.name},
                "unit": "tests passed",
                "ours": counts[1]["passed"],
                "against": {"stock": counts[0]["passed"]},
                "outcomes": {"stock": dict(counts[0]), "ours": dict(counts[1])},
            }
        )
    return rows


def prepare(tests: Path, variant: Variant, every: int, work: Path) -> Path:
    """A copy of the tests with our conftest beside them; the fetched files stay as vLLM ships them."""
    tree = work / variant.name.replace(" ", "-")
    shutil.copytree(tests, tree)
    (tree / FOLDER / "conftest.py").write_text(variant.conftest.format(every=every))
    return tree


def run(tests: Path, out: Path, workers: int, every: int, commit: str) -> int:
    from benchmarks import measure

    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    all_moved: dict[str, dict[str, str]] = {}
    hits: Counter[str] = Counter()
    seconds = {}
    with tempfile.TemporaryDirectory() as work:
        for variant in VARIANTS:
            tree = prepare(tests, variant, every, Path(work))
            outcomes = {}
            for side in ("stock", "ours"):
                name = f"{side}-{tree.name}"
                began = time.monotonic()
                outcomes[side] = run_pytest(tree, name, variant, side == "ours", out, workers)
                seconds[name] = round(time.monotonic() - began)
                counts = Counter(outcome.result for outcome in outcomes[side].values())
                print(f"{name}: {dict(counts)} in {seconds[name]} s", flush=True)
            hits.update(read_hits(out / f"ours-{tree.name}.reports"))
            all_moved[variant.name] = moved(outcomes["stock"], outcomes["ours"])
            rows += table(variant, outcomes["stock"], outcomes["ours"])
    unhit = never_hit(dict(hits))
    more: dict[str, Any] = {
        "tests": f"vLLM {(tests / 'VERSION').read_text().strip()}, {FOLDER}",
        "selection": "every test" if every == 1 else f"every {every}th test, in the order of collection",
        "moved": {variant: sorted(names) for variant, names in all_moved.items()},
        "hits": {patch: count for patch, count in sorted(hits.items()) if count},
        "never_hit": unhit,
        "out_of_reach": OUT_OF_REACH,
        "seconds": seconds,
        "command": f"python tools/{Path(__file__).name} {' '.join(sys.argv[1:])}",
    }
    whole = every == 1 and measure.gpu_name() != "cpu"
    path = measure.record("vllm_suite", rows, folder=None if whole else out, commit=commit, **more)
    if path.parent != out:
        shutil.copy(path, out)
    (out / "moved.json").write_text(json.dumps(all_moved, indent=1))
    return conclude(path, all_moved, unhit, sum(row["ours"] for row in rows))


def conclude(path: Path, all_moved: dict[str, dict[str, str]], unhit: list[str], passed: int) -> int:
    """Say what was found; the exit status."""
    print(f"recorded {path}")
    for variant, names in all_moved.items():
        print(f"{variant}: {len(names)} tests moved from pass to fail")
        for name, message in list(names.items())[:10]:
            print(f"  {name}  {message.splitlines()[0] if message else ''}")
    if unhit:
        print(f"never hit: {', '.join(unhit)}")
    return 1 if unhit or not passed or any(all_moved.values()) else 0


def main() -> int:
    # Stopped by `timeout`, this ends like an exception, and takes pytest with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetching = verbs.add_parser("fetch", help="download vLLM's tests")
    fetching.add_argument("--version", default=VERSION)
    running = verbs.add_parser("run", help="run them without and with the plugin")
    for verb in (fetching, running):
        verb.add_argument("--tests", type=Path, default=ROOT / "build" / "vllm-tests", help="the tests' folder")
    running.add_argument("--out", type=Path, required=True, help="where logs and the record go")
    running.add_argument("-n", "--workers", type=int, default=8 if has_xdist() else 1, help="processes (pytest-xdist)")
    running.add_argument("--every", type=int, default=1, help="only every n-th test, in the order of collection")
    running.add_argument("--commit", default="", help="for the record, where there is no git")
    args = parser.parse_args()
    if args.verb == "fetch":
        fetch(args.version, args.tests)
        return 0
    if not (args.tests / "VERSION").exists():
        sys.exit(f"no tests in {args.tests}; `python {Path(__file__).name} fetch` gets them")
    return run(args.tests, args.out, args.workers, args.every, args.commit)


if __name__ == "__main__":
    sys.exit(main())
