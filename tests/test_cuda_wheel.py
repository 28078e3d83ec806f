"""The recorded op schemas of vLLM's CUDA build against what our seams declare and our adapters take.

`tools/cuda_wheel.py` makes the record, and tries much more where that build is installed on a machine without a GPU.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_world import VERSIONS, RecordedWorld
from tolerances import absolute, assert_close

from tools import cuda_wheel
from vllm_gems import probes
from vllm_gems.binders import BINDERS
from vllm_gems.catalog import catalog
from vllm_gems.nouns import Kernel, Patch, Place
from vllm_gems.sites import Site

ROOT = Path(__file__).resolve().parent.parent
DEVICE, KEY = ("cuda", "CUDA") if torch.cuda.is_available() else ("cpu", "CPU")
RECORDS = [json.loads(path.read_text()) for path in sorted(cuda_wheel.RECORDED.glob("schemas-cuda-*.json"))]
PATCHES = [patch for patch in catalog().patches.values() if cuda_wheel.place_of(patch).kind == "op"]
EACH = [
    pytest.param(record["ops"], patch, id=f"{record['version']}-{patch.name}")
    for record in RECORDS
    for patch in PATCHES
]

Ops = dict[str, dict[str, list[str]]]


@pytest.fixture(params=RECORDS, ids=lambda record: record["version"])
def record(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_release_that_runs_on_the_gpu_machine_is_recorded() -> None:
    assert "0.26.0" in [record["version"] for record in RECORDS]


def test_every_namespace_is_recorded(record: Any) -> None:
    assert {op.partition("::")[0] for op in record["ops"]} == set(cuda_wheel.NAMESPACES)


def test_every_op_that_a_seam_names_is_as_declared(record: Any) -> None:
    assert cuda_wheel.disagreements(record["ops"]) == []


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_an_op_that_is_gone_or_takes_more_or_has_no_kernel_is_found_out(patch: Patch, record: Any) -> None:
    """That the comparison above can fail, for each op."""
    name = cuda_wheel.place_of(patch).name
    gone, longer, empty = (copy.deepcopy(record["ops"]) for _ in range(3))
    del gone[name]
    longer[name]["schemas"] = [
        schema.replace(") -> ()", ", bool new=False) -> ()") for schema in longer[name]["schemas"]
    ]
    empty[name]["keys"] = []
    for changed, complaint in ((gone, "no op"), (longer, "bool=False"), (empty, "no CUDA kernel")):
        found = cuda_wheel.disagreements(changed)
        assert any(complaint in line for line in found)
        assert all(line.startswith(f"{cuda_wheel.place_of(patch)}: ") for line in found)


def test_the_normalised_schemas_are_those_of_the_probe(record: Any) -> None:
    """The record shows both; a change of the normalisation must be recorded too."""
    for op in record["ops"].values():
        assert op["normalised"] == [probes.normalise_schema(schema) for schema in op["schemas"]]


def test_strings_in_the_binary_and_schemas_that_it_registers_say_the_same(record: Any) -> None:
    """`tools/record_vllm.py` reads releases that nobody can load; where one is loaded, it must have read it right."""
    assert record["version"] in VERSIONS
    world = RecordedWorld.load(record["version"])
    for patch in PATCHES:
        name = cuda_wheel.place_of(patch).name
        searched = {probes.normalise_schema(schema) for schema in world.schemas(name)}
        assert searched == set(record["ops"][name]["normalised"])


# The adapters, called by the dispatcher with the recorded schemas


def definable(ops: Ops, op: str) -> str:
    """The schema of an op as PyTorch's parser takes it: libraries of the stable ABI print "Tensor($0! -> )"."""
    schema = next(schema for schema in ops[op]["schemas"] if "." not in schema.partition("(")[0])
    return re.sub(r"\(\$(\d+)! -> \)", r"(a\1!)", schema.partition("::")[2])


def arguments_of(ops: Ops, patch: Patch) -> list[Any]:
    """The arguments of the op that a patch is for."""
    return list(torch._C.parse_schema(definable(ops, cuda_wheel.place_of(patch).name)).arguments)


class Adapted:
    """An op of the recorded schema in a namespace of the tests', our adapter over a kernel that must not be reached."""

    NAMESPACE = "vllm_gems_test_cuda_wheel"

    def __init__(self, ops: Ops, patch: Patch) -> None:
        name = cuda_wheel.place_of(patch).name.partition("::")[2]
        schema = definable(ops, cuda_wheel.place_of(patch).name)
        self.reached = 0
        self.library = torch.library.Library(self.NAMESPACE, "FRAGMENT")
        self.library.define(schema)
        self.library.m.impl(name, KEY, self._original)  # Library.impl would not let Python override Python
        self.site = Site(patch.name, patch.kernels, strict=True)
        place = Place("op", __name__, f"{self.NAMESPACE}::{name}", ())
        self.bound = BINDERS["op"].bind(place, lambda original: patch.adapt(original, self.site), KEY.lower())
        self.op = getattr(getattr(torch.ops, self.NAMESPACE), name).default

    def _original(self, *arguments: Any) -> None:
        self.reached += 1

    def close(self) -> None:
        self.bound.undo()
        self.library._destroy()


@pytest.fixture
def adapted(ops: Ops, patch: Patch) -> Iterator[Adapted]:
    made = Adapted(ops, patch)
    yield made
    made.close()


def kernel_of(patch: Patch) -> Kernel:
    """The kernel that stands beside the patch's op."""
    op = cuda_wheel.place_of(patch).name
    return next(kernel for kernel in catalog().kernels.values() if kernel.stock == op)


def call(kernel: Kernel, op: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What `op` computes for copies of `inputs`, called as the kernel says that vLLM's op is."""
    inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    assert kernel.stock_call is not None
    returned = kernel.stock_call(op, **inputs)
    return tuple(returned if where == "return" else inputs[where] for where in kernel.results)


def inputs_of(kernel: Kernel) -> dict[str, Any]:
    torch.manual_seed(3)
    return kernel.inputs(next(case for case in kernel.cases if not case.bench), "float32", DEVICE)


def same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(("ops", "patch"), EACH)
def test_an_adapter_takes_all_arguments_of_the_schema(adapted: Adapted, ops: Ops, patch: Patch) -> None:
    kernel = kernel_of(patch)
    inputs = inputs_of(kernel)
    given: list[Any] = []

    def through(*arguments: Any) -> None:
        given.extend(arguments)
        adapted.op(*arguments)

    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    expected = kernel.reference(**wide)
    atol = absolute(kernel.name, inputs, torch.float32)
    for got, want in zip(call(kernel, through, inputs), expected, strict=True):
        assert_close(got, want, patch.name, atol)
    assert len(given) == len(arguments_of(ops, patch))
    assert (adapted.site.hits, adapted.reached) == (1, 0)


DEFAULTED = [each for each in EACH if any(argument.has_default_value() for argument in arguments_of(*each.values))]


def test_the_ops_with_defaults_are_known() -> None:
    """That there is something to compare below."""
    expected = {"op.rotary_embedding", "op.swigluoai_and_mul", "op.silu_and_mul_with_clamp"}
    assert {each.values[1].name for each in DEFAULTED} == expected


@pytest.mark.parametrize(("ops", "patch"), DEFAULTED)
def test_an_adapter_has_the_defaults_of_the_schema(adapted: Adapted, ops: Ops, patch: Patch) -> None:
    """The dispatcher leaves out trailing arguments that equal the schema's defaults, so an adapter has its own."""
    kernel = kernel_of(patch)
    inputs = inputs_of(kernel)
    arguments = arguments_of(ops, patch)
    defaults = [argument.default_value for argument in arguments if argument.has_default_value()]
    required = len(arguments) - len(defaults)
    ours = patch.adapt(None, adapted.site)

    def result(of: Any, count: int) -> tuple[Any, ...]:
        return call(kernel, lambda *given: of(*(*given[:required], *defaults)[:count]), inputs)

    explicit = result(functools.partial(ours, None), len(arguments))
    for count in range(required, len(arguments)):
        assert same(result(functools.partial(ours, None), count), explicit)
        assert same(result(adapted.op, count), explicit)


@pytest.mark.parametrize(("ops", "patch"), EACH)
def test_an_adapter_invents_no_defaults(adapted: Adapted, ops: Ops, patch: Patch) -> None:
    """What the schema demands, the adapter demands."""
    kernel = kernel_of(patch)
    required = sum(not argument.has_default_value() for argument in arguments_of(ops, patch))
    ours = patch.adapt(None, adapted.site)
    with pytest.raises(TypeError):
        call(kernel, lambda *given: ours(None, *given[: required - 1]), inputs_of(kernel))


# The real thing


@pytest.mark.skipif(cuda_wheel.unavailable() is not None, reason=str(cuda_wheel.unavailable()))
def test_everything_binds_runs_and_goes_in_the_cuda_build() -> None:
    command = [sys.executable, str(ROOT / "tools" / "cuda_wheel.py"), "check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
