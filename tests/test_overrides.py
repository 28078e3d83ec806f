"""enable, only_enable, disable, use_gems: who wants what, in what order it goes, and that PyTorch is as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton
from aten_calls import DEVICE

import vllm_gems
from vllm_gems import launch
from vllm_gems.aten import overloads
from vllm_gems.catalog import aten_catalog
from vllm_gems.errors import LateCompileError, UnknownNameError
from vllm_gems.nouns import State
from vllm_gems.overrides import overrides

X = torch.arange(6.0, device=DEVICE)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    vllm_gems.disable()
    assert bound() == set()


def bound() -> set[str]:
    return {row.patch for row in vllm_gems.report().rows if row.state is State.BOUND and row.patch.startswith("aten.")}


def everything_dispatched() -> dict[str, str]:
    """What PyTorch's dispatcher has for every operation of the table."""
    names = [patch.why.split(" ")[0] for patch in aten_catalog().patches.values()]
    return {name: torch._C._dispatch_dump(name) for name in names}


def test_an_operation_is_all_its_overloads() -> None:
    vllm_gems.enable("mul")
    assert {"aten.mul.Tensor", "aten.mul_.Tensor", "aten.mul.out"} <= bound()
    assert all(name.startswith(("aten.mul.", "aten.mul_.")) for name in bound())


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("mul.Tensor", None, {"aten.mul.Tensor"}),
        (["aten.mul.Tensor", "silu"], "silu.out, silu_", {"aten.mul.Tensor", "aten.silu"}),
        ("isi*", "*.out", {"aten.isinf"}),
    ],
)
def test_names_and_globs(include: object, exclude: object, expected: set[str]) -> None:
    vllm_gems.enable(include, exclude)
    assert bound() == expected


def test_all_are_more_than_flaggems_registers() -> None:
    vllm_gems.enable("*")
    assert len(bound()) >= 430
    assert len(bound()) == len(aten_catalog().patches)


def test_the_default_set_is_what_was_measured() -> None:
    """Nothing is on a CPU, where there is nothing to gain."""
    vllm_gems.enable()
    assert bound() == {name for name, patch in aten_catalog().patches.items() if patch.default}
    if DEVICE == "cpu":
        assert bound() == set()


@pytest.mark.parametrize(
    "text", ["[mul.Tensor, silu_]", "include: [mul.Tensor, silu*]\nexclude: [silu.default, silu.out, silu_b*]"]
)
def test_a_file_says_which(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ops.yaml"
    file.write_text(text)
    for path in (file, str(file)):
        vllm_gems.only_enable(path)
        assert bound() == {"aten.mul.Tensor", "aten.silu_"}


def test_a_file_with_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ops.yml"
    file.write_text("includes: [mul]")
    with pytest.raises(ValueError, match=r"ops\.yml has neither a list of names nor `include` and `exclude`"):
        vllm_gems.enable(file)


def test_an_unknown_name_is_an_error_and_changes_nothing() -> None:
    with pytest.raises(UnknownNameError, match="no operation is called 'sofmax'; did you mean"):
        vllm_gems.enable("mul,sofmax")
    assert bound() == set()


def test_only_enable_takes_the_others_away() -> None:
    vllm_gems.enable("mul,add")
    vllm_gems.only_enable("mul.Tensor,silu")
    assert bound() == {"aten.mul.Tensor", "aten.silu", "aten.silu_", "aten.silu.out"}


def test_contexts_nest_and_end_after_an_exception() -> None:
    vllm_gems.enable("silu")
    before = bound()

    def interrupted() -> None:
        with vllm_gems.use_gems("mul.Tensor,silu"):
            with vllm_gems.use_gems("mul"):
                assert "aten.mul.out" in bound()
            assert bound() == {*before, "aten.mul.Tensor"}
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert bound() == before


def test_disabled_inside_is_disabled() -> None:
    with vllm_gems.use_gems("mul"):
        vllm_gems.disable()
        assert bound() == set()
        vllm_gems.enable("silu_")
    assert bound() == {"aten.silu_"}


def test_threads_share_what_they_use() -> None:
    """What one of them still uses is not taken away when another one ends, whatever their order."""
    inside, leave = threading.Barrier(3), threading.Event()
    seen: list[set[str]] = []

    def short() -> None:
        with vllm_gems.use_gems("mul.Tensor"):
            inside.wait()
        seen.append(bound())

    def long() -> None:
        with vllm_gems.use_gems("mul.Tensor"):
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=short), threading.Thread(target=long)]
    for thread in threads:
        thread.start()
    inside.wait()
    threads[0].join()
    leave.set()
    threads[1].join()
    assert seen == [{"aten.mul.Tensor"}]
    assert bound() == set()


def test_pytorch_is_as_it_was() -> None:
    before = everything_dispatched()
    with vllm_gems.use_gems("*"):
        assert everything_dispatched() != before
        X * 2
    assert everything_dispatched() == before


def test_the_report_counts_after_the_end_too() -> None:
    """And begins anew with the next time; what nests goes on."""
    for count in (2, 3):
        with vllm_gems.use_gems("mul"):
            X * 2
            with vllm_gems.use_gems("mul"):
                for _ in range(count - 1):
                    X * 2
        (row,) = (row for row in vllm_gems.report().rows if row.patch == "aten.mul.Tensor")
        assert row.state is State.OFF
        assert row.hits == count
    assert "aten.mul.Tensor" in vllm_gems.report().text()


def test_what_is_declined_is_pytorchs_and_says_why() -> None:
    with vllm_gems.use_gems("mul"):
        assert torch.equal(X.to(torch.complex64) * 2, (X * 2).to(torch.complex64))
        (row,) = (row for row in vllm_gems.report().rows if row.patch == "aten.mul.Tensor")
    assert "it is computed in torch.complex64" in row.declined


@pytest.mark.parametrize("number", [2, 2.5, True, 2 + 1j], ids=repr)
def test_a_number_is_a_number_to_pytorch_too(number: complex) -> None:
    """PyTorch unwraps it on the way to us: given back as a tensor it would decide the dtype of the result."""
    for dtype in (torch.int32, torch.float16, torch.complex64):
        for x in (torch.ones(3, dtype=dtype, device=DEVICE), torch.ones((), dtype=dtype, device=DEVICE)):
            expected = x + number
            with vllm_gems.use_gems("add"):
                got = x + number
            assert got.dtype is expected.dtype
            assert torch.equal(got.to(torch.complex64), expected.to(torch.complex64))


def test_a_kernel_that_raises_leaves_the_call_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gems.aten import elementwise

    def broken(*args: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(elementwise, "pointwise_build", broken)
    x = torch.ones(3, 1, 5, device=DEVICE)  # a shape that nobody has planned
    with vllm_gems.use_gems("mul"):
        assert torch.equal(x * 3, torch.full_like(x, 3))
        (row,) = (row for row in vllm_gems.report().rows if row.patch == "aten.mul.Tensor")
    assert row.state is State.FAILED
    assert "RuntimeError: no" in row.why


def test_forbidden_compilations_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first call that looks so, and where one was done before, of tensors that were aligned."""

    def forbid(**about: object) -> None:
        raise RuntimeError("not now")

    memory = torch.randn(51, device=DEVICE)
    with vllm_gems.use_gems("erf"):
        torch.erf(memory[:50].view(2, 25))
        monkeypatch.setattr(launch, "_LAUNCHES", {})
        monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", forbid)
        monkeypatch.setattr(launch, "COMPILED", [])  # what is late here would be in every report from now on
        torch.erf(memory[:50].view(2, 25))
        for x in (memory[1:].view(2, 25), memory.double()):
            for _ in range(2):
                with pytest.raises(LateCompileError, match="not now"):
                    torch.erf(x)
        (row,) = (row for row in vllm_gems.report().rows if row.patch == "aten.erf")
    assert (row.state, row.hits, row.errors) == (State.BOUND, 2, 0)


def test_writing_to_what_is_read_elsewhere_is_pytorchs() -> None:
    """Element for element it is ours; shifted, PyTorch decides."""
    x = torch.arange(8.0, device=DEVICE)
    with vllm_gems.use_gems("add,mul"):
        x.mul_(x)
        assert torch.equal(x, torch.arange(8.0, device=DEVICE) ** 2)
        with pytest.raises(RuntimeError, match=r"overlap|memory location"):
            torch.add(x[:-1], 1, out=x[1:])
        with pytest.raises(RuntimeError, match="memory location"):
            x[:1].expand(4).add_(1)


def test_what_is_written_is_compared_at_every_call() -> None:
    """Tensors that look alike may lie elsewhere."""
    memory, x = torch.arange(16.0, device=DEVICE), torch.ones(4, device=DEVICE)
    with vllm_gems.use_gems("add.out"):
        for _ in range(2):
            torch.add(memory[0:4], x, out=memory[8:12])
            torch.add(memory[0:4], x, out=memory[0:4])
            with pytest.raises(RuntimeError, match=r"overlap|memory location"):
                torch.add(memory[0:4], x, out=memory[2:6])
            with pytest.raises(RuntimeError, match=r"overlap|memory location"):
                torch.add(memory[2:6], x, out=memory[0:4])
        (row,) = (row for row in vllm_gems.report().rows if row.patch == "aten.add.out")
    assert (row.hits, sum(row.declined.values())) == (4, 4)
    assert memory[:4].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert memory[8:12].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_numbers_are_those_of_each_call() -> None:
    """A plan is for numbers of a type, whatever they are."""
    x = torch.randn(3, 8, device=DEVICE)

    def calls() -> list[torch.Tensor]:
        return [
            found
            for number in (1, 2, 0, 0.5)
            for found in (
                x * number, torch.var(x, dim=1, correction=number), torch.std(x, correction=number),
                *torch.var_mean(x, dim=0, correction=number), torch.full_like(x, 7).fill_(number),
                torch.nn.functional.group_norm(x, 2, eps=number + 0.1), torch.arange(number, 9, 2, device=DEVICE),
                x.scatter(1, torch.zeros(3, 1, dtype=torch.int64, device=DEVICE), number),
            )
        ]  # fmt: skip

    expected = calls()
    with vllm_gems.use_gems("*"):
        for got, wanted in zip(calls(), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_gradients_flow_through() -> None:
    x = torch.linspace(-1, 1, 7, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad((torch.nn.functional.silu(x) * 3).sum(), x)
    with vllm_gems.use_gems("*"):
        (got,) = torch.autograd.grad((torch.nn.functional.silu(x) * 3).sum(), x)
    torch.testing.assert_close(got, expected)


def test_numbers_that_do_not_fit_are_pytorchs() -> None:
    x = torch.ones(3, dtype=torch.uint8, device=DEVICE)
    with vllm_gems.use_gems("add,fill"):
        for call in (lambda: x + 300, lambda: torch.zeros(2, dtype=torch.uint8, device=DEVICE).fill_(-1)):
            mine = _result(call)
            vllm_gems.disable()
            assert str(mine) == str(_result(call))
            vllm_gems.enable("add,fill")


def _result(call: object) -> object:
    try:
        return call()  # type: ignore[operator]
    except RuntimeError as error:
        return error


LISTS: dict[str, Callable[..., torch.Tensor]] = {
    "another": lambda x, y, i: torch.cat([x, y]),
    "the same twice": lambda x, y, i: torch.cat([x, y, x]),
    "beside itself": lambda x, y, i: torch.cat([x, x, y]),
    "another dimension": lambda x, y, i: torch.cat([x, y], 1),
    "a tuple": lambda x, y, i: torch.cat((y, x)),
    "one": lambda x, y, i: torch.cat([x]),
    "given": lambda x, y, i: torch.cat([x, y], out=torch.empty(8, 4, device=DEVICE)),
    "other strides": lambda x, y, i: torch.cat([x, y.T]),
    "picked": lambda x, y, i: x[i],
    "picked elsewhere": lambda x, y, i: x[:, i],
    "picked by two": lambda x, y, i: x[i, i - 1],
    "picked by one twice": lambda x, y, i: x[i, i],
    "picked by others": lambda x, y, i: y[i.int()],
}


def test_lists_of_tensors_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was planned for one is not done to another; and is found without a key when it comes again."""

    def check(*names: str) -> None:
        for name in names:
            args = torch.randn(4, 4, device=DEVICE), torch.randn(4, 4, device=DEVICE), torch.arange(3, device=DEVICE)
            vllm_gems.disable()
            expected = LISTS[name](*args)
            vllm_gems.enable("cat,index")
            assert torch.equal(LISTS[name](*args), expected), name

    def further(*args: object) -> None:
        raise AssertionError("no attempt did it")

    for _ in range(2):
        check(*LISTS)
    for at in range(0, len(LISTS), 4):  # as many of a shape are remembered
        some = list(LISTS)[at : at + 4]
        check(*some)
        with monkeypatch.context() as patched:
            patched.setattr(overloads.Overload, "__call__", further)
            check(*some)
            assert sum(row.errors for row in vllm_gems.report().rows) == 0


def test_long_lists_and_those_of_nothing_are_found_by_key() -> None:
    x = torch.randn(2, 3, device=DEVICE)
    with vllm_gems.use_gems("cat"):
        for count in (1, 40, 40):
            assert torch.equal(torch.cat([x] * count), x.repeat(count, 1))
        with pytest.raises((RuntimeError, ValueError), match="non-empty"):
            torch.cat([])


def test_plans_are_dropped_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gems.aten import overloads

    monkeypatch.setattr(overloads, "PLANS", 3)
    with vllm_gems.use_gems("neg"):
        for size in range(1, 9):
            assert torch.equal(torch.neg(torch.ones(size, device=DEVICE)), -torch.ones(size, device=DEVICE))


def test_the_process_has_one_of_them() -> None:
    assert overrides() is overrides()
