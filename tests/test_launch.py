"""The launcher: what it decides, here; what reaches the driver, in a process with a driver that remembers.

`direct_launches.py` is run once by pytest in a process of its own, because Triton must be imported without its
interpreter and find the stand-in driver, and because a wrong launch may end that process. Each of its tests is reported
here under its name.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
import triton

from vllm_gems import launch
from vllm_gems.catalog import catalog
from vllm_gems.errors import NoDeviceError, Refused
from vllm_gems.launch import CPU, Build, aligned, allocator, launcher, pointer

DIRECT = Path(__file__).with_name("direct_launches.py")
TIME_LIMIT = 600  # seconds, for what takes 20 on one core


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By test of `direct_launches.py` and its parameters: what went wrong, or nothing."""
    if reason := standin.refuses():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("standin")
    report = folder / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(DIRECT)],
        env=standin.environment(folder), capture_output=True, text=True, timeout=TIME_LIMIT,
    )  # fmt: skip
    assert report.exists(), f"status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ET.parse(report).iter("testcase"):
        name, _, params = case.attrib["name"].partition("[")
        found[name][params.rstrip("]")] = "\n".join(part.text or part.attrib["message"] for part in case)
    return found


@pytest.mark.parametrize("name", re.findall(r"^def (test_\w+)", DIRECT.read_text(), re.MULTILINE))
def test_on_the_stand_in_driver(name: str, outcomes: dict[str, dict[str, str]]) -> None:
    assert outcomes[name], f"{name} did not run"
    wrong = [f"{name}[{params}]\n{text}" for params, text in outcomes[name].items() if text]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(outcomes[name])} failed:", *wrong])


class Function:
    """A kernel that remembers how it was launched."""

    __name__ = "remembering_kernel"
    arg_names = ("x_ptr", "weight_ptr", "rows", "stride", "epsilon", "WIDTH", "GEMMA")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **keywords: self.calls.append((grid, args, keywords))


def build_of(function: Any, **changes: Any) -> Build:
    types = ("*bf16", None, "i32", "i32/16", "fp32")
    return Build(function, types, (("WIDTH", 64), ("GEMMA", False)), **changes)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton compiled kernels, for NVIDIA, whatever it does in this process."""
    monkeypatch.setattr(launch, "_LAUNCHES", {})
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(triton.knobs.runtime, "debug", False)


def test_direct_launches_of_known_triton_are_not_refused(compiling: None) -> None:
    assert launch.direct_refuses() is None


@pytest.mark.parametrize(
    ("of", "name", "value", "words"),
    [
        (launch, "INTERPRETED", True, "TRITON_INTERPRET"),
        (torch.version, "hip", "7.1", "NVIDIA's backend only"),
        (triton, "__version__", "3.5.1", "knows Triton 3.6, .*this is 3.5.1"),
        (triton, "__version__", "99.0.0+git1234", r"this is 99.0.0\+git1234"),
        (triton.knobs.runtime, "debug", True, "TRITON_DEBUG"),
    ],
)
def test_direct_launches_are_refused_in_words(
    of: Any, name: str, value: Any, words: str, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of, name, value)
    assert re.search(words, str(launch.direct_refuses()))


@pytest.mark.parametrize(
    ("interpreted", "options"), [(True, {}), (False, {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True})]
)
def test_triton_is_given_tensors_and_names(
    interpreted: bool, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes no options of the compiler's."""
    monkeypatch.setattr(launch, "_LAUNCHES", {})
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    function = Function()
    make = launcher if interpreted else lambda build, device: launch._by_subscript(build)
    make(build_of(function, num_warps=8), CPU)(5, 0x1230, 0, 7, 64, 1e-6)
    ((grid, (x, weight, *numbers), keywords),) = function.calls
    assert grid == (5,)
    assert (x.data_ptr(), x.dtype) == (0x1230, torch.bfloat16)
    assert weight is None
    assert numbers == [7, 64, 1e-6]
    assert keywords == {"WIDTH": 64, "GEMMA": False, **options}


def test_wrong_number_of_arguments_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument"):
        launch._by_subscript(build_of(Function()))(5, 0x1230, 0, 7, 64)


def test_cpu_tensors_need_the_interpreter(compiling: None) -> None:
    with pytest.raises(NoDeviceError, match=r"'cpu'.* set TRITON_INTERPRET=1 before"):
        launcher(build_of(Function()), CPU)


def test_nothing_is_compiled_during_a_capture(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Refused, match="remembering_kernel is not compiled yet and a CUDA graph is being captured"):
        launcher(build_of(Function()), 0)
    assert not launch._LAUNCHES


def test_launchers_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By however many threads; a build of the same meaning is the same build."""
    made = []

    def make(build: Build, device: int) -> Callable[..., None]:
        made.append(device)
        time.sleep(0.05)  # longer than the others need to come and ask
        return lambda *args: None

    monkeypatch.setattr(launch, "_LAUNCHES", {})
    monkeypatch.setattr(launch, "_make", make)
    function, found = Function(), []
    threads = [threading.Thread(target=lambda: found.append(launcher(build_of(function), 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [0]
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert launcher(build_of(function), 1) is not found[0]
    assert launcher(build_of(function, aligned=False), 0) is not found[0]
    assert made == [0, 1, 0]


def test_a_failed_launcher_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture refuses is compiled after it."""
    answers = iter([Refused("not now"), None])

    def make(build: Build, device: int) -> Callable[..., None]:
        if (error := next(answers)) is not None:
            raise error
        return print

    monkeypatch.setattr(launch, "_LAUNCHES", {})
    monkeypatch.setattr(launch, "_make", make)
    build = build_of(Function())
    with pytest.raises(Refused, match="not now"):
        launcher(build, 0)
    assert launcher(build, 0) is print


@pytest.mark.parametrize("is_aligned", [True, False])
def test_source_of_a_build(is_aligned: bool) -> None:
    """16 is promised of pointers and of "/16" integers, in aligned builds alone."""
    source = build_of(Function(), aligned=is_aligned).source()
    assert source.signature == {
        "x_ptr": "*bf16",
        "weight_ptr": "constexpr",
        "rows": "i32",
        "stride": "i32",
        "epsilon": "fp32",
        "WIDTH": "constexpr",
        "GEMMA": "constexpr",
    }
    assert source.constants == {(1,): None, (5,): 64, (6,): False}
    promise = [["tt.divisibility", 16]]
    assert source.attrs == ({(0,): promise, (3,): promise} if is_aligned else {})


def test_source_rejects_constexprs_of_other_names() -> None:
    build = Build(Function(), ("*bf16", None, "i32", "i32/16", "fp32"), (("GEMMA", False), ("WIDTH", 64)))
    with pytest.raises(TypeError, match="remembering_kernel: parameter 5 is 'WIDTH', not 'GEMMA'"):
        build.source()


def test_every_parameter_of_every_build_is_given() -> None:
    """A missing one would be found by Triton only when it compiles, as an unknown name in the kernel's body."""
    count = 0
    for kernel in catalog().kernels.values():
        for case in kernel.cases:
            for build in kernel.builds(case, kernel.dtypes[0]):
                assert list(build.source().signature) == list(build.function.arg_names), kernel.name
                count += 1
    assert count > 0


def test_pointer_names_the_dtypes_it_knows() -> None:
    assert pointer(torch.bfloat16) == "*bf16"
    with pytest.raises(Refused, match=r"dtype torch\.complex64 is not one of float16, bfloat16, float32, float64"):
        pointer(torch.complex64)


@pytest.mark.parametrize(
    ("addresses", "expected"), [((), True), ((32, 64), True), ((32, 8), False), ((33,), False), ((0, 16), True)]
)
def test_aligned(addresses: tuple[int, ...], expected: bool) -> None:
    assert aligned(*addresses) is expected


def test_allocator_on_the_cpu() -> None:
    found = allocator(CPU, torch.float16)(3, 5)
    assert (found.shape, found.dtype, found.device.type) == ((3, 5), torch.float16, "cpu")
    assert found.is_contiguous()


class Guards:
    """`torch._C._dynamo.guards`, of a release with the short way or without."""


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Allocations on two GPUs that are not there, of which 0 is current; only asked for, never made."""
    asked: list[tuple[Any, ...]] = []

    def shortest(*args: Any) -> None:
        asked.append(("shortest", *args))

    def empty(shape: Any, *, dtype: torch.dtype, device: torch.device) -> None:
        asked.append(("empty", shape, dtype, device))

    guards = Guards()
    guards._empty_strided_cuda = shortest  # type: ignore[attr-defined]
    monkeypatch.setattr(torch._C._dynamo, "guards", guards)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch, "empty", empty)
    return asked


def test_allocator_takes_the_shortest_way(allocations: list[tuple[Any, ...]]) -> None:
    allocator(0, torch.bfloat16)(3, 5)
    assert allocations == [("shortest", (3, 5), (5, 1), torch.bfloat16)]


def test_allocator_of_another_device_names_it(allocations: list[tuple[Any, ...]]) -> None:
    """The short way has no device but the current one."""
    allocator(1, torch.bfloat16)(3, 5)
    assert allocations == [("empty", (3, 5), torch.bfloat16, torch.device("cuda", 1))]


def test_allocator_without_the_short_way(allocations: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C._dynamo, "guards", Guards())
    allocator(0, torch.bfloat16)(3, 5)
    assert allocations == [("empty", (3, 5), torch.bfloat16, torch.device("cuda", 0))]
