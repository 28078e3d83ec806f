"""A toy in vLLM's shape, small enough to try every order of events on: a package with a CustomOp layer and a function,
and a catalog of patches for it."""

from __future__ import annotations

import pathlib
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import pluggy

from vllm_gems import hookspecs
from vllm_gems.catalog import Catalog
from vllm_gems.errors import Refused, Unsettled
from vllm_gems.hookspecs import hookimpl
from vllm_gems.nouns import Kernel, Patch, Place, Seam
from vllm_gems.patcher import Patcher
from vllm_gems.sites import layer_method, module_forward

SOURCE = '''
class CustomOp:
    """Chooses its method at birth, as vLLM's does."""

    def __init__(self):
        self._forward_method = self.forward_cpu

    def __call__(self, *args):
        return self.forward(*args)

    def forward(self, *args, **kwargs):
        return self._forward_method(*args, **kwargs)

    def forward_native(self, x):
        return ("native", x)

    def forward_cpu(self, *args, **kwargs):
        return self.forward_native(*args, **kwargs)


class Layer(CustomOp):
    def forward_cpu(self, x, scale=1):
        return ("stock", x * scale)


class Child(Layer):
    pass


class Busy(Layer):
    def forward(self, *args, **kwargs):
        return ("busy", self._forward_method(*args, **kwargs))


class Inheriting(CustomOp):
    pass


class Block:
    """Has a forward and no choice, as the modules of a model."""

    refuse = ""

    def __call__(self, *args):
        return self.forward(*args)

    def forward(self, x):
        return ("stock", x)


class Proud(Block):
    def forward(self, x):
        return ("proud", super().forward(x))


class Model:
    do_not_compile = True


def function(x, flag=False):
    return ("stock", x)
'''


def write_package(folder: pathlib.Path) -> None:
    """Make `toy_vllm.layers` importable."""
    package = folder / "toy_vllm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text(textwrap.dedent(SOURCE))
    sys.path.insert(0, str(folder))


def adapt_layer(original: Any, site: Any) -> Any:
    def bind(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return lambda x, scale=1: ("ours", x * scale)

    return layer_method(original, site, bind, bind)


def adapt_module(original: Any, site: Any) -> Any:
    def settle(module: Any, *args: Any) -> Any:
        if module.refuse:
            raise Refused(module.refuse)

        def call(x: Any) -> Any:
            if x < 0:
                raise Refused("negative")
            if x == 0:
                raise Unsettled("zero")
            return ("ours", x)

        return call

    return module_forward(original, site, settle)


def adapt_function(original: Any, site: Any) -> Any:
    def function(x: Any, flag: bool = False) -> Any:
        site.hits += 1
        return ("ours", x)

    return function


def place(name: str, *expects: str, kind: str = "attribute", **more: Any) -> Place:
    return Place(kind, "toy_vllm.layers", name, expects, **more)


SEAMS = (
    Seam("layer", (place("Layer.forward_cpu", "(self, x, scale=1)"),), layer="toy_vllm.layers:Layer"),
    Seam("module", (place("Block.forward", "(self, x)"),), layer="toy_vllm.layers:Block", eager_only=True),
    Seam("inheriting", (place("Inheriting.forward_cpu", "(self, *args, **kwargs)"),)),
    Seam("function", (place("function", "(x, flag=False)"),)),
    Seam("moved", (place("gone", "(x)"), place("function", "(x, flag=False)"))),
    Seam("gone", (place("Layer.forward_gone", "(self, x)"),)),
    Seam("drifted", (place("function", "(x, flag=False, more=None)"),)),
    Seam("rewritten", (place("function", "(x, flag=False)", sources=frozenset({"0123456789abcdef"})),)),
)


class ToyPlugin:
    def __init__(self, patches: Iterable[Patch]) -> None:
        self.patches = tuple(patches)

    @hookimpl
    def vllm_gems_kernels(self) -> Iterable[Kernel]:
        return ()

    @hookimpl
    def vllm_gems_seams(self) -> Iterable[Seam]:
        return SEAMS

    @hookimpl
    def vllm_gems_patches(self) -> Iterable[Patch]:
        return self.patches


def patch(name: str, seam: str, adapt: Any = adapt_layer, **more: Any) -> Patch:
    return Patch(name, seam, (), adapt, "a toy", **more)


PATCHES = (patch("toy.layer", "layer"), patch("toy.function", "function", adapt_function))


def catalog(*patches: Patch, plugins: Iterable[Any] = ()) -> Catalog:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(ToyPlugin(patches or PATCHES))
    for plugin in plugins:
        manager.register(plugin)
    return Catalog(manager, manager.hook.vllm_gems_seams(), manager.hook.vllm_gems_patches())


def patcher(*patches: Patch, plugins: Iterable[Any] = ()) -> Patcher:
    return Patcher(catalog(*patches, plugins=plugins))
