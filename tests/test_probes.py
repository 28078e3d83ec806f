"""A probe of an installed vLLM and of a recorded one must say the same: both ways to each string, side by side."""

from __future__ import annotations

import ast
import contextlib
import enum
import functools
import inspect
import queue
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from recorded_world import VERSIONS, RecordedWorld

from vllm_gems import probes
from vllm_gems.seams import SEAMS

LAYERNORM = "vllm.model_executor.layers.layernorm"
CUSTOM_OP = "vllm.model_executor.custom_op"


class Color(enum.Enum):
    RED = "red"


class Sample:
    """What vLLM's classes have, in small."""

    def plain(self, x: int, residual: list[int] | None = None) -> None:
        """Documented."""

    def kinds(self, a, /, b, *rest, c, d=-1, **options):
        return a, b, rest, c, d, options

    def literals(self, a=1e-6, b="it's", c=(1, [2], {"k": None}), d=4096 * 32, e=128**-0.5, f=True):
        return a, b, c, d, e, f

    def opaque(self, a=Color.RED, b=float("inf"), *, c=print):
        return a, b, c

    def text(self):
        return """
    lines that are
part of the value
"""

    @staticmethod
    def static(x, y=None):
        return x, y

    @classmethod
    def made(cls, name, *, strict=False):
        return cls, name, strict

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def cached(self, x=2):
        return x

    @contextlib.contextmanager
    def managed(self, depth=0):
        yield depth

    async def waited(self, x):
        return x


def definitions(module: ModuleType) -> Iterator[tuple[probes.FunctionNode, Callable[..., Any]]]:
    """Each function and method that a module defines: as the syntax tree has it, and live."""
    for owner, body in [
        (module, (tree := ast.parse(inspect.getsource(module))).body),
        *((getattr(module, node.name), node.body) for node in tree.body if isinstance(node, ast.ClassDef)),
    ]:
        for node in body:
            if isinstance(node, probes.FunctionNode):
                yield node, getattr(owner, node.name)


def parsed(source: str) -> probes.FunctionNode:
    node = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(node, probes.FunctionNode)
    return node


@pytest.mark.parametrize("module", [sys.modules[__name__], queue, probes], ids=lambda module: module.__name__)
def test_live_and_syntax_tree_agree(module: ModuleType) -> None:
    found = list(definitions(module))
    assert len(found) > 5
    for node, live in found:
        assert probes.signature_of(live) == probes.signature_from_ast(node), node.name
        assert probes.hash_of(live) == probes.hash_from_ast(node), node.name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "(self, x, residual=None)"),
        ("kinds", "(self, a, /, b, *rest, c, d=-1, **options)"),
        (
            "literals",
            "(self, a=1e-06, b=\"it's\", c=(1, [2], {'k': None}), d=131072, e=0.08838834764831845, f=True)",
        ),
        ("opaque", "(self, a=..., b=..., *, c=...)"),
        ("static", "(x, y=None)"),
        ("made", "(name, *, strict=False)"),
        ("cached", "(self, x=2)"),
        ("waited", "(self, x)"),
    ],
)
def test_signature(name: str, expected: str) -> None:
    assert probes.signature_of(getattr(Sample, name)) == expected


def test_hash_ignores_what_does_not_run() -> None:
    bare = parsed("def f(x):\n return x + 1")
    dressed = parsed('def f( x ):  # why\n    """What."""\n\n    return (x\n        + 1)\n')
    assert probes.hash_from_ast(bare) == probes.hash_from_ast(dressed)
    assert ast.get_docstring(dressed) == "What."  # the tree of the caller is left as it was


@pytest.mark.parametrize(
    "other",
    [
        "def f(x):\n return x + 2",
        "def f(x=0):\n return x + 1",
        "@cache\ndef f(x):\n return x + 1",
        "async def f(x):\n return x + 1",
    ],
)
def test_hash_sees_what_runs(other: str) -> None:
    assert probes.hash_from_ast(parsed("def f(x):\n return x + 1")) != probes.hash_from_ast(parsed(other))


@pytest.mark.parametrize("thing", [len, str.join, Sample, lambda: 1])
def test_no_def_no_hash(thing: Callable[..., Any]) -> None:
    with pytest.raises((OSError, TypeError)):
        probes.hash_of(thing)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (
            "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
            "(Tensor!, Tensor, Tensor?, float) -> ()",
        ),
        (
            "_C::rms_norm(Tensor(a!) out, Tensor input, Tensor? weight, float epsilon) -> ()",
            "(Tensor!, Tensor, Tensor?, float) -> ()",
        ),
        # how the dispatcher prints a stable-ABI schema
        ("_C::f(Tensor($0! -> ) out, Tensor($1! -> )? key, int($2! -> )? n) -> ()", "(Tensor!, Tensor!?, int!?) -> ()"),
        ("f(Tensor !out, Tensor!? key, Tensor(b) view) -> Tensor(b)", "(Tensor!, Tensor!?, Tensor) -> Tensor"),
        ("f(SymInt n=0, bool a=false, bool b = True) -> ()", "(int=0, bool=False, bool=True) -> ()"),
        ("f(float limit=7., float alpha=1, float eps=1e-5) -> ()", "(float=7.0, float=1.0, float=1e-05) -> ()"),
        ("f(int[]? shape=None, (int,int)? group=None) -> ()", "(int[]?=None, (int,int)?=None) -> ()"),
        ("f((int, int)? group, int[2] stride=[1, 1]) -> ()", "((int,int)?, int[2]=[1, 1]) -> ()"),
        ("f(str kind=\"a, b\", str other='c') -> ()", "(str='a, b', str='c') -> ()"),
        ("f( Tensor a,\n   Tensor b ) -> (Tensor, Tensor)", "(Tensor, Tensor) -> (Tensor, Tensor)"),
        ("f() -> (Tensor(a!) out, int[] sizes)", "() -> (Tensor!, int[])"),
        ("f() -> (Tensor)", "() -> Tensor"),
        (
            "aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor",
            "(Tensor, Tensor, *, Scalar=1) -> Tensor",
        ),
        (
            "aten::clone(Tensor self, MemoryFormat? memory_format=contiguous_format) -> Tensor",
            "(Tensor, MemoryFormat?=contiguous_format) -> Tensor",
        ),
    ],
)
def test_normalise_schema(schema: str, expected: str) -> None:
    assert probes.normalise_schema(schema) == expected
    assert probes.normalise_schema(expected) == expected


@pytest.fixture(params=VERSIONS)
def world(request: pytest.FixtureRequest) -> RecordedWorld:
    return RecordedWorld.load(request.param)


def test_versions_are_in_order() -> None:
    assert {"0.17.1", "0.26.0", "0.33.0"} <= set(VERSIONS)
    assert VERSIONS.index("0.17.1") < VERSIONS.index("0.26.0") < VERSIONS.index("0.33.0")


def test_own_method(world: RecordedWorld) -> None:
    assert world.has_module(LAYERNORM)
    assert world.signature(LAYERNORM, "RMSNorm.forward_cuda") == "(self, x, residual=None)"
    assert len(world.source_hash(LAYERNORM, "RMSNorm.forward_cuda") or "") == 16


def test_inherited_method(world: RecordedWorld) -> None:
    inherited = world.signature(LAYERNORM, "GemmaRMSNorm.forward_cpu")
    assert inherited == world.signature(CUSTOM_OP, "CustomOp.forward_cpu") == "(self, *args, **kwargs)"
    own = world.source_hash(LAYERNORM, "GemmaRMSNorm.forward_cuda")
    assert own != world.source_hash(CUSTOM_OP, "CustomOp.forward_cuda")


@pytest.mark.parametrize(
    ("module", "qualname"),
    [
        ("vllm.nowhere", "f"),
        ("vllm.nowhere", "Class.method"),
        (LAYERNORM, "nothing"),
        (LAYERNORM, "Nothing.forward"),
        (LAYERNORM, "RMSNorm.nothing"),
        (LAYERNORM, "RMSNorm"),
    ],
)
def test_absent(world: RecordedWorld, module: str, qualname: str) -> None:
    assert world.signature(module, qualname) is None
    assert world.source_hash(module, qualname) is None


def test_absent_module_and_op(world: RecordedWorld) -> None:
    assert not world.has_module("vllm.nowhere")
    assert world.schemas("_C::nothing") == ()


def test_property_is_no_callable() -> None:
    modules = {
        "m": {
            "functions": {},
            "classes": {
                "Base": {"bases": [], "methods": {"size": "def (self) 0", "run": "def (self, x) 1"}},
                "Derived": {"bases": ["m:Base"], "methods": {"size": "property (self) 2"}},
            },
        }
    }
    world = RecordedWorld("0", modules, {})
    assert world.signature("m", "Derived.size") is None  # it hides the method of the base
    assert world.signature("m", "Derived.run") == "(self, x)"


def test_every_seam_is_recorded(world: RecordedWorld) -> None:
    """A place added without recording again would look absent from every release."""
    places = [place for seam in SEAMS.values() for place in seam.places]
    asked = {place.module for place in places} | {place.name for place in places if place.kind == "op"}
    assert {name for name in asked if not world.knows(name)} == set()
