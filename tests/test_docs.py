"""What the documents say is so: tables come from records, files and patches that they name exist."""

from __future__ import annotations

import re

from test_rules import ROOT

from tools import tables
from vllm_gems.catalog import catalog


def test_tables_are_those_of_the_records() -> None:
    texts = [document.read_text() for document in tables.DOCUMENTS]
    assert set(re.findall(r"<!-- table:(\w+) -->", "".join(texts))) == set(tables.TABLES)
    for text in texts:
        assert tables.updated(text) == text, "run python tools/tables.py"


def test_the_reports_speedups_are_those_of_the_records() -> None:
    for gpu in tables.gpus():
        assert (tables.MEASURED / f"{gpu}.json").read_text() == tables.speedups(gpu)


def test_what_decides_between_us_and_vllm_is_that_of_the_records() -> None:
    for gpu in tables.gpus():
        shipped = {path.stem: path.read_text() for path in (tables.TUNED / gpu).glob("*.*.json")}
        assert shipped == tables.decisions(gpu), "run python tools/tables.py"


def test_files_named_in_the_documents_exist() -> None:
    for document in tables.DOCUMENTS:
        text = document.read_text()
        for path in re.findall(r"`(?:python )?((?:vllm_gems|tests|tools|benchmarks|docs)/[\w/]*\.\w+)", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_every_patch_is_in_the_readme() -> None:
    names = re.findall(r"`([a-z]+\.[\w*]+)`", (ROOT / "README.md").read_text())
    for patch in catalog().patches:
        assert any(re.fullmatch(name.replace(".", r"\.").replace("*", ".*"), patch) for name in names), patch


def test_every_file_of_the_package_is_in_the_design() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    for path in (ROOT / "vllm_gems").iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if not name.startswith("__") and name != "py.typed":
            assert name in text, name
