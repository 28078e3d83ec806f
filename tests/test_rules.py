"""The rules that the code is built by, each as a check of the code itself."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

import vllm_gems
from vllm_gems import nouns

PACKAGE = pathlib.Path(vllm_gems.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOT = PACKAGE.parent


def stem(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if len(parts) > 1 or parts[0] != "__init__" else "package"


def imports(path: pathlib.Path) -> set[str]:
    """The modules of this package that a file imports, and the foreign top-level ones, wherever in the file."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(str(node.module).split(".")[0])
            elif node.level == depth or depth == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found |= {f".{str(name).split('.')[0]}" for name in names}
    return found


# module -> what of this package it may import. Verbs may import each other only downwards.
ALLOWED = {
    "nouns": set(),
    "errors": set(),
    "policy": set(),
    "probes": set(),
    "products": {".kernels", ".launch", ".overloads"},
    "seams": {".nouns"},
    "worlds": {".probes"},
    "interpreter": {".errors"},
    "launch": {".interpreter", ".policy", ".errors"},
    "scratch": {".launch"},
    "tuned": {".policy"},
    "faster": {".errors", ".tuned"},
    "tuning": {".kernels", ".launch", ".tuned"},
    "kernels": {".errors", ".launch", ".nouns", ".scratch", ".tuned"},
    "sites": {".errors"},
    "cublaslt": {".errors", ".launch"},
    "replay": {".launch", ".scratch"},
    "aten": {".errors", ".kernels", ".launch"},
    "patches": {
        ".aten", ".cublaslt", ".errors", ".faster", ".kernels", ".launch", ".nouns", ".policy", ".probes", ".replay",
        ".seams", ".sites", ".tuned",
    },
    "binders": {".probes", ".nouns", ".sites", ".worlds"},
    "ops": {".errors", ".nouns"},
    "standalone": {".aten", ".catalog", ".nouns", ".ops", ".patches"},
    "hookspecs": {".nouns"},
    "catalog": {".errors", ".hookspecs", ".kernels", ".nouns", ".patches", ".seams"},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: pathlib.Path) -> None:
    name = stem(path)
    if name in ALLOWED:
        ours = {module for module in imports(path) if module.startswith(".")}
        assert ours <= ALLOWED[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_testing_plugin_imports_vllm_by_name(path: pathlib.Path) -> None:
    if stem(path) not in ("testing",):
        assert "vllm" not in imports(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_environment_variables_are_read_in_policy_alone(path: pathlib.Path) -> None:
    if path.name != "policy.py":
        assert not re.search(r"os\.(environ|getenv)|from os import|knobs\.getenv", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_star_imports_and_no_asserts_on_input(path: pathlib.Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "seams.py"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_vllm_releases_are_named_in_seams_alone(path: pathlib.Path) -> None:
    """Comments and docstrings may speak of releases; code may not compare with them."""
    constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    release = re.compile(r"[<>=]*0\.[123][0-9](\.\d+)?.*")
    assert [text for text in constants if isinstance(text, str) and release.fullmatch(text)] == []


def test_nouns_are_frozen() -> None:
    found = [each for each in vars(nouns).values() if isinstance(each, type) and dataclasses.is_dataclass(each)]
    assert {each.__name__ for each in found} == {"Case", "Kernel", "Place", "Seam", "Patch", "Row"}
    for each in found:
        assert each.__dataclass_params__.frozen  # type: ignore[attr-defined]


def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_the_entry_point_imports_only_the_standard_library() -> None:
    extra = loaded_by("import vllm_gems.plugin") - loaded_by("pass") - {"vllm_gems"}
    assert extra <= sys.stdlib_module_names


def test_nouns_import_no_torch() -> None:
    light = "import vllm_gems.nouns, vllm_gems.policy, vllm_gems.seams, vllm_gems.probes, vllm_gems.errors"
    assert not {"torch", "triton", "vllm", "numpy"} & loaded_by(light)


def test_the_package_speaks_of_itself_alone() -> None:
    """No absolute paths of the machine it was written on, and no addresses."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = tracked.stdout.split() if tracked.returncode == 0 else [str(path) for path in FILES]
    banned = re.compile(r"(?<![\w.])/(opt|work|root|home)/\w|https?://(?!arxiv\.org|github\.com|docs\.)")
    for name in files:
        path = ROOT / name
        spoken = path.suffix in (".py", ".md", ".cfg", ".toml", ".sh", "") and path != pathlib.Path(__file__)
        if spoken and path.is_file():
            text = path.read_text(errors="ignore")
            found = banned.search(text)
            assert found is None or name == "LICENSE", f"{name}: {found[0]}"
