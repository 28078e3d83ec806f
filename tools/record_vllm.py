"""Record what vLLM releases look like at the places that our seams name: `python tools/record_vllm.py 0.26.0`.

The tests probe our seams against these records (`tests/recorded_world.py`), so that CI sees drift in many releases
without installing any of them. Sources are only parsed and binaries only searched: nothing of vLLM is imported or run.

A record is `{"version", "modules", "ops"}`. A module is null where the release does not have it, else
`{"functions": {name: entry}, "classes": {name: {"bases": ["module:Class"], "methods": {name: entry}}}}`, and an entry
one line, `kind signature hash`, so that a difference between two releases reads as one. A function that is defined
under an `if` or `try` is left out, because what it is depends on the machine. An op has the schemas found for it.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from vllm_gems import probes
from vllm_gems.seams import PARTS, SEAMS

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "recorded"

# Schema strings carry no namespace, but each namespace has kept to its own libraries through every change of ABI.
LIBRARIES = {
    "_C": ("_C", "_C_stable_libtorch"),
    "_C_cache_ops": ("_C", "_C_stable_libtorch"),
    "_moe_C": ("_moe_C", "_moe_C_stable_libtorch"),
    "_vllm_fa3_C": ("vllm_flash_attn/_vllm_fa3_C",),
}
PLATFORMS = ("manylinux1_x86_64", "manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")
PROPERTIES = {"property", "cached_property", "setter", "deleter"}

Root = Path | zipfile.Path  # the folder that has `vllm` in it
OpsOf = Callable[[str], dict[str, list[str]]]  # library -> op -> schemas


def download(version: str, folder: str) -> Path:
    """The wheel of a release for Linux, whatever this machine is; its dependencies are not wanted."""
    tags = [option for platform in PLATFORMS for option in ("--platform", platform)]
    target = ["--python-version", "3.12", "--implementation", "cp", *tags]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *target]
    subprocess.run([*command, "--dest", folder, f"vllm=={version}"], check=True)
    return next(Path(folder).glob(f"vllm-{version}*.whl"))


class Sources:
    """The Python sources of one release, as syntax trees."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.tree = cache(self._tree)
        self.imports = cache(self._imports)

    def _file(self, module: str) -> Root | None:
        path = module.replace(".", "/")
        candidates = (self.root / f"{path}.py", self.root / path / "__init__.py")
        return next((file for file in candidates if file.is_file()), None)

    def _tree(self, module: str) -> ast.Module | None:
        file = self._file(module)
        return ast.parse(file.read_text(encoding="utf-8")) if file else None

    def _imports(self, module: str) -> dict[str, str]:
        """What the names that a module imports stand for, as dotted paths; outer scopes win over inner ones."""
        file, tree = self._file(module), self.tree(module)
        package = module if file and file.name == "__init__.py" else module.rpartition(".")[0]
        names: dict[str, str] = {}
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.ImportFrom):
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                for item in node.names:
                    names.setdefault(item.asname or item.name, f"{origin}.{item.name}")
            elif isinstance(node, ast.Import):
                for item in node.names:
                    top = item.name.partition(".")[0]
                    names.setdefault(item.asname or top, item.name if item.asname else top)
        return names

    def locate(self, module: str, name: str) -> str:
        """Where the class that `module` calls `name` is defined, as "module:Class", through imports and re-exports."""
        head, dot, rest = name.partition(".")
        target = self.imports(module).get(head)
        if target is None:
            return f"builtins:{name}" if hasattr(builtins, name) else f"{module}:{name}"
        origin, _, attribute = (target + dot + rest).rpartition(".")
        return self.locate(origin, attribute) if self.tree(origin) else f"{origin}:{attribute}"

    def record(self, module: str) -> dict[str, Any] | None:
        """The functions and classes that a module defines; None if the release does not have it."""
        tree = self.tree(module)
        if tree is None:
            return None
        classes = {node.name: self._class(module, node) for node in tree.body if isinstance(node, ast.ClassDef)}
        return {"functions": functions(tree.body), "classes": classes}

    def _class(self, module: str, node: ast.ClassDef) -> dict[str, Any]:
        plain = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
        bases = [self.locate(module, ast.unparse(base)) for base in plain]
        return {"bases": bases, "methods": functions(node.body)}


def functions(body: Iterable[ast.stmt]) -> dict[str, str]:
    """The entries of the functions that a module or class defines; the last definition of a name stands."""
    return {node.name: entry(node) for node in body if isinstance(node, probes.FunctionNode)}


def entry(node: probes.FunctionNode) -> str:
    """One function in one line: its kind, its signature, the hash of its source."""
    decorators = probes.decorators_of(node)
    kind = "property" if decorators & PROPERTIES else "def"
    kind = next((name for name in ("staticmethod", "classmethod") if name in decorators), kind)
    return f"{kind} {probes.signature_from_ast(node)} {probes.hash_from_ast(node)}"


def record_modules(sources: Sources, wanted: Iterable[str]) -> dict[str, Any]:
    """The wanted modules, and those of the classes that their classes inherit from."""
    modules: dict[str, Any] = {}
    queue = list(wanted)
    while queue:
        module = queue.pop()
        if module not in modules:
            modules[module] = found = sources.record(module)
            bases = (base for item in (found or {"classes": {}})["classes"].values() for base in item["bases"])
            queue += [base.partition(":")[0] for base in bases if base.startswith("vllm.")]
    return modules


def ops_in_binary(root: Root, library: str) -> dict[str, list[str]]:
    """The schema strings in a library: text around "->" up to the zero bytes that end a C string on either side."""
    file = root / "vllm" / f"{library}.abi3.so"
    data = file.read_bytes() if file.is_file() else b""
    ops: dict[str, list[str]] = {}
    for arrow in re.finditer(b"->", data):
        start, end = data.rfind(b"\0", 0, arrow.start()) + 1, data.find(b"\0", arrow.end())
        schema = re.search(rb"([\w.]+)\([^\0]*\)\s*->[\w\s()\[\],!?]+\Z", data[start:end])
        if schema:
            ops.setdefault(schema[1].decode(), []).append(schema[0].decode())
    return ops


def ops_in_file(path: Path) -> OpsOf:
    """The same from a file `{"_C.abi3.so": {"ops": {name: [schema]}}}`, for sources that come without binaries."""
    libraries = json.loads(path.read_text())
    return lambda library: libraries.get(f"{library}.abi3.so", {"ops": {}})["ops"]


def record_ops(ops_of: OpsOf, wanted: Iterable[str]) -> dict[str, list[str]]:
    """The schemas of each wanted op; an empty list where the release does not have it."""
    ops = {}
    for op in wanted:
        namespace, _, name = op.partition("::")
        schemas = {schema for library in LIBRARIES[namespace] for schema in ops_of(library).get(name, ())}
        ops[op] = sorted(" ".join(schema.split()) for schema in schemas)
    return ops


def record(version: str, root: Root, schemas: Path | None) -> None:
    """Write the record of one release."""
    places = [place for seam in SEAMS.values() for place in seam.places]
    places += [place for alternatives in PARTS.values() for place in alternatives]
    ops_of = ops_in_file(schemas) if schemas else cache(lambda library: ops_in_binary(root, library))
    content = {
        "version": version,
        "modules": record_modules(Sources(root), {place.module for place in places}),
        "ops": record_ops(ops_of, {place.name for place in places if place.kind == "op"}),
    }
    path = RECORDED / f"vllm-{version}.json"
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    print(f"{path}: {len(content['modules'])} modules, {len(content['ops'])} ops, {path.stat().st_size} bytes")


def main() -> None:
    """Record the releases named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--source", type=Path, help="a folder that has the unpacked `vllm` of the one version given")
    parser.add_argument("--schemas", type=Path, help="its op schemas as JSON, if its binaries are not there")
    options = parser.parse_args()
    if (options.source or options.schemas) and len(options.versions) > 1:
        parser.error("--source and --schemas are for one version")
    for version in options.versions:
        if options.source:
            record(version, options.source, options.schemas)
            continue
        with tempfile.TemporaryDirectory() as folder:
            record(version, zipfile.Path(download(version, folder)), options.schemas)


if __name__ == "__main__":
    main()
