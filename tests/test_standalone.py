"""Ops that stand alone: they pass opcheck, have PyTorch's gradients and results, and go to it where we decline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from aten_calls import DEVICE
from test_kernels import KERNELS, results_of, widened
from tolerances import absolute, assert_close

import vllm_gems
from vllm_gems import launch, ops, standalone
from vllm_gems.catalog import catalog
from vllm_gems.errors import LateCompileError, Refused
from vllm_gems.nouns import Case, Kernel

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


def randn(*shape: int, positive: bool = False) -> torch.Tensor:
    values = torch.rand(shape, device=DEVICE) + 0.5 if positive else torch.randn(shape, device=DEVICE)
    return values.requires_grad_()


def randint(*shape: int) -> torch.Tensor:
    return torch.randint(0, 3, shape, device=DEVICE)


def arguments(name: str) -> tuple[Any, ...]:
    """What an op is called with; operands broadcast, and floats require gradients."""
    special: dict[str, tuple[Any, ...]] = {
        "where": (torch.rand(3, 5, device=DEVICE) < 0.5, randn(3, 5), randn(5)),
        "clamp": (randn(3, 5), -0.5, 0.5),
        "log": (randn(3, 5, positive=True),),
        "sqrt": (randn(3, 5, positive=True),),
        "rsqrt": (randn(3, 5, positive=True),),
        "sum_dim": (randn(3, 5), [1]),
        "mean_dim": (randn(3, 5), [0], True),
        "amax": (randn(3, 5), [1]),
        "amin": (randn(3, 5), [1]),
        "argmax": (randn(3, 5), 1),
        "softmax": (randn(3, 5), -1),
        "log_softmax": (randn(3, 5), 0),
        "cumsum": (randn(3, 5), 1),
        "layer_norm": (randn(3, 5), [5], randn(5), randn(5), 1e-5),
        "embedding": (randn(7, 5), randint(3, 2)),
        "index_select": (randn(7, 5), 0, randint(4)),
        "gather": (randn(7, 5), 0, randint(3, 5)),
        "mm": (randn(3, 4), randn(4, 5)),
        "bmm": (randn(2, 3, 4), randn(2, 4, 5)),
        "addmm": (randn(5), randn(3, 4), randn(4, 5)),
        "baddbmm": (randn(5), randn(2, 3, 4), randn(2, 4, 5)),
    }
    operands = len([each for each in standalone.TABLE[name]()._schema.arguments if each.name in ("self", "other")])
    return special.get(name) or (randn(3, 1, 5), randn(4, 1))[:operands]


def first(results: Any) -> torch.Tensor:
    return results if isinstance(results, torch.Tensor) else results[0]


@pytest.mark.parametrize("name", standalone.TABLE)
def test_opcheck(name: str) -> None:
    """Its schema, registrations and fake, and ahead-of-time compilation with fixed sizes and with others."""
    op = getattr(torch.ops.vllm_gems, name).default
    before = ops.CALLS[name]
    torch.library.opcheck(op, arguments(name), test_utils=CHECKS)
    assert ops.CALLS[name] > before
    assert ops.FALLBACKS[name] == 0


@pytest.mark.parametrize("name", standalone.TABLE)
def test_results_and_gradients_are_pytorchs(name: str) -> None:
    torch.manual_seed(1)
    op, args = standalone.TABLE[name], arguments(name)
    got, expected = first(standalone.function(name)(*args)), first(op()(*args, *op.rest))
    torch.testing.assert_close(got, expected)
    assert got.requires_grad == expected.requires_grad
    if expected.requires_grad:
        wanted = [each for each in args if isinstance(each, torch.Tensor) and each.requires_grad]
        weight = torch.randn_like(expected)
        mine, others = (torch.autograd.grad(result, wanted, weight, allow_unused=True) for result in (got, expected))
        for one, other in zip(mine, others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["mul_tensor", "softmax", "mm", "layer_norm"])
def test_fullgraph(name: str) -> None:
    args, op = arguments(name), standalone.function(name)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    before = ops.CALLS[name]
    torch.testing.assert_close(first(compiled(*args)), first(op(*args)))
    assert ops.CALLS[name] == before + 2


@pytest.mark.parametrize("name", ["mul_tensor", "softmax", "mm", "layer_norm"])
def test_gradients_of_gradients_are_pytorchs(name: str) -> None:
    """Beside another way to the same inputs, and with an input that was computed from another."""
    torch.manual_seed(1)
    op, args = standalone.TABLE[name], arguments(name)
    wanted = [each for each in args if isinstance(each, torch.Tensor) and each.requires_grad]

    def second(call: Any) -> Any:
        result = first(call(*(each * 2 if isinstance(each, torch.Tensor) else each for each in args)))
        loss = (result**2).sum() + sum((each**3).sum() for each in wanted)
        slopes = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum((each**2).sum() for each in slopes), wanted)

    for mine, other in zip(second(standalone.function(name)), second(lambda *args: op()(*args, *op.rest)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_an_input_computed_from_another_has_its_own_gradient() -> None:
    for mul in (vllm_gems.mul_tensor, torch.mul):
        x = torch.full((3,), 2.0, device=DEVICE, requires_grad=True)
        y = mul(x, x)
        (slope,) = torch.autograd.grad(mul(x, y).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        assert slope.tolist() == [12.0] * 3
        assert curvature.tolist() == [12.0] * 3


def test_gradients_of_what_we_decline_are_pytorchs() -> None:
    before = ops.FALLBACKS["mul_tensor"]
    x = torch.randn(3, dtype=torch.complex64, device=DEVICE, requires_grad=True)
    (mine,), (other,) = (torch.autograd.grad(mul(x, x).abs().sum(), x) for mul in (vllm_gems.mul_tensor, torch.mul))
    torch.testing.assert_close(mine, other)
    ops.FALLBACKS["mul_tensor"] = before


def test_statistics_of_a_norm_have_no_gradient() -> None:
    results = vllm_gems.layer_norm(*arguments("layer_norm"))
    assert [each.requires_grad for each in results] == [True, False, False]


def test_the_dispatcher_is_left_out_only_where_it_would_do_nothing() -> None:
    x, y = torch.randn(3, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    lazy = torch._neg_view(x)
    assert lazy.is_neg()
    torch.testing.assert_close(vllm_gems.add_tensor(lazy, y), y - x)
    weight = torch.ones(4, device=DEVICE)
    torch.testing.assert_close(vllm_gems.rms_norm(lazy, weight, epsilon=1e-6), -vllm_gems.rms_norm(x, weight, 1e-6))
    torch.testing.assert_close(torch.vmap(vllm_gems.add_tensor)(x, y), x + y)
    torch.testing.assert_close(vllm_gems.add_tensor(x, y, alpha=2), x + 2 * y)
    assert vllm_gems.add_tensor(x.requires_grad_(), y).requires_grad
    with torch._subclasses.FakeTensorMode() as mode:
        assert isinstance(
            vllm_gems.mm(mode.from_tensor(x), torch.ones(4, 2, device=DEVICE)), torch._subclasses.FakeTensor
        )
    with torch.inference_mode():
        assert not vllm_gems.add_tensor(x, y).requires_grad


@pytest.fixture
def by_attempts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(function) -> context in which it does what an attempt does, and nothing else: whatever goes further fails."""

    def further(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no attempt did it")

    @contextmanager
    def watching(function: Any) -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setitem(function.__globals__, "g_direct", further)
            yield

    return watching


LOOKS: dict[str, Any] = {
    "as before": lambda x: x.clone(),
    "another shape": lambda x: torch.randn(4, 3, device=DEVICE),
    "other strides": lambda x: torch.randn(4, 3, device=DEVICE).T,
    "another dtype": lambda x: x.double(),
    "another memory format": lambda x: torch.randn(3, 8, device=DEVICE)[:, ::2],
    "misaligned": lambda x: torch.randn(13, device=DEVICE)[1:].view(3, 4),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "negated": torch._neg_view,
    "empty": lambda x: torch.randn(0, 4, device=DEVICE),
    "a number": lambda x: x[0, 0],
}


@pytest.mark.parametrize("name", ["add_tensor", "softmax", "sum_dim", "exp", "where"])
def test_calls_of_any_look_one_after_the_other(name: str, by_attempts: Any) -> None:
    """Attempts for those that were there before must not take others."""
    function, op = standalone.function(name), standalone.TABLE[name]
    x = torch.randn(3, 4, device=DEVICE)

    def args_of(look: torch.Tensor) -> tuple[Any, ...]:
        rest = {"add_tensor": (look,), "softmax": (-1,), "sum_dim": ([-1],), "where": (look, look)}.get(name, ())
        return (look > 0, *rest) if name == "where" else (look, *rest)

    for label, look in LOOKS.items():
        for value in (look(x), x):
            args = args_of(value)
            torch.testing.assert_close(function(*args), op()(*args, *op.rest), msg=label)
        for value in (x,) if label == "negated" else (look(x), x):
            args = args_of(value)
            with by_attempts(function):
                torch.testing.assert_close(function(*args), op()(*args, *op.rest), msg=label)


def test_attempts_leave_to_the_dispatcher_what_is_its_own(by_attempts: Any) -> None:
    """They see when a tensor of the same shape is wanted a gradient of, is mapped, traced or of another class."""
    x, y = torch.randn(3, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    add = vllm_gems.add_tensor
    expected = x + y
    add(x, y)
    with by_attempts(add):
        assert torch.equal(add(x, y), expected)
    needing = x.clone().requires_grad_()
    for _ in range(2):
        assert add(needing, y).requires_grad
        with torch.no_grad():
            assert not add(needing, y).requires_grad
        assert torch.equal(torch.vmap(add)(x, y), expected)
        with torch.inference_mode():
            assert add(x, y).is_inference()
        assert not add(x, y).is_inference()
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(add(x, y), torch._subclasses.FakeTensor)
        seen: list[str] = []

        class Mode(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(str(func))  # noqa: B023
                return func(*args, **(kwargs or {}))

        with Mode():
            add(x, y)
        assert seen == ["vllm_gems.add_tensor.default"]
    with by_attempts(add), torch.no_grad():
        assert torch.equal(add(needing, y), expected)
    with by_attempts(add), torch.inference_mode():
        assert torch.equal(add(x, y), expected)


def test_numbers_are_those_of_each_call() -> None:
    """A plan is for numbers of a type, whatever they are."""
    x, y = torch.randn(3, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    for number in (1, 2, 0.5, 3):
        torch.testing.assert_close(vllm_gems.add_tensor(x, y, alpha=number), torch.add(x, y, alpha=number))
        assert torch.equal(vllm_gems.clamp(x, -number / 4, number / 8), torch.clamp(x, -number / 4, number / 8))
        mine = vllm_gems.addmm(x[:, :3], x, x.T @ x[:, :3], beta=number, alpha=2 * number)
        wanted = torch.addmm(x[:, :3], x, x.T @ x[:, :3], beta=number, alpha=2 * number)
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
        got = vllm_gems.layer_norm(x, [4], None, None, float(number))
        torch.testing.assert_close(got, torch.native_layer_norm(x, [4], None, None, float(number)))


def test_dimensions_are_compared_as_they_were(by_attempts: Any) -> None:
    """A caller may change its list afterwards."""
    x, dims = torch.randn(3, 4, 5, device=DEVICE), [0]
    torch.testing.assert_close(vllm_gems.amax(x, dims), x.amax(0))
    dims[0] = 1
    torch.testing.assert_close(vllm_gems.amax(x, dims), x.amax(1))
    with by_attempts(vllm_gems.amax):
        torch.testing.assert_close(vllm_gems.amax(x, [0]), x.amax(0))
        torch.testing.assert_close(vllm_gems.amax(x, [1]), x.amax(1))
    torch.testing.assert_close(vllm_gems.amax(x, (0, 1), True), x.amax((0, 1), True))


def test_looks_that_change_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last of a shape are tried, of so many shapes, and new ones are made seldom."""
    from vllm_gems.aten import overloads

    attempts = overloads.Attempts(("Tensor", "number"))
    monkeypatch.setattr(overloads, "PLANS", 5)
    x = torch.randn(6, device=DEVICE)
    for number in (1, 2.0, True, None, "five", b"six"):
        attempts.add((x, number), lambda args: args)
    assert [attempt(x, b"six") for attempt in attempts.find(x.shape)] == [(x, b"six"), *[overloads.MISSED] * 3]
    for size in range(20):
        attempts.add((x[:size], 1), lambda args: args)
        assert len(attempts._found) <= 5
    attempts._found.clear()
    monkeypatch.setattr(overloads, "_EAGER", 0)
    for size in range(overloads._RARELY):
        attempts.add((x[:size], 1), lambda args: args)
    assert len(attempts._found) == 1


def test_without_guards_the_plans_are_found_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gems.aten import overloads

    monkeypatch.setattr(overloads, "_GUARDS", None)
    x = torch.randn(2, 3, 7, device=DEVICE)  # a shape of no other test
    before = ops.CALLS["exp"], ops.FALLBACKS["exp"]
    for _ in range(3):
        torch.testing.assert_close(vllm_gems.exp(x), standalone.TABLE["exp"]()(x))
    assert (ops.CALLS["exp"], ops.FALLBACKS["exp"]) == (before[0] + 3, before[1])
    assert not standalone.function("exp").__globals__["g_attempts"](x.shape)


def test_importing_it_defines_every_op() -> None:
    code = "import torch, vllm_gems.standalone as s; [getattr(torch.ops.vllm_gems, name) for name in s.names()]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_we_decline_is_done_by_pytorch_and_counted() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64, device=DEVICE)
    before = ops.FALLBACKS["mul_tensor"]
    try:
        assert torch.equal(vllm_gems.mul_tensor(x, x), x * x)
        assert ops.FALLBACKS["mul_tensor"] == before + 1
    finally:
        ops.FALLBACKS["mul_tensor"] = before


def test_forbidden_compilations_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first call that looks so, and where one was done before, of tensors that were aligned."""

    def forbid(**about: Any) -> None:
        raise RuntimeError("not now")

    memory = torch.randn(71, device=DEVICE)
    aligned, misaligned = memory[:70].view(2, 5, 7), memory[1:].view(2, 5, 7)
    vllm_gems.tanh(aligned)
    before = ops.FALLBACKS["tanh"]
    monkeypatch.setattr(launch, "_LAUNCHES", {})
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", forbid)
    monkeypatch.setattr(launch, "COMPILED", [])  # what is late here would be in every report from now on
    vllm_gems.tanh(aligned)
    for call in (
        lambda: vllm_gems.tanh(misaligned), lambda: vllm_gems.tanh(aligned.double()),
        lambda: torch.ops.vllm_gems.tanh(aligned.double()), lambda: vllm_gems.silu_and_mul(aligned[..., :6]),
        lambda: torch.ops.vllm_gems.silu_and_mul(aligned[..., :6]),
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises(LateCompileError, match="not now"):
                call()
    assert ops.FALLBACKS["tanh"] == before


def test_names_of_arguments() -> None:
    """Of a plain tensor they need no dispatcher, but what it would not take is an error still."""
    x, y = torch.randn(3, 4, device=DEVICE), torch.randn(4, device=DEVICE)
    before = ops.CALLS["add_tensor"], ops.CALLS["softmax"]
    assert torch.equal(vllm_gems.add_tensor(x, y, alpha=2), torch.add(x, y, alpha=2))
    assert torch.equal(vllm_gems.add_tensor(x, other=y), x + y)
    torch.testing.assert_close(vllm_gems.softmax(x, dim=0), x.softmax(0))
    assert (ops.CALLS["add_tensor"], ops.CALLS["softmax"]) == (before[0] + 2, before[1] + 1)
    for wrong in ({"beta": 2}, {"self": x}, {"other": y, "alpha": 2}):
        with pytest.raises((RuntimeError, TypeError)):
            vllm_gems.add_tensor(x, y, **wrong)


def test_errors_are_pytorchs() -> None:
    before = ops.FALLBACKS["mm"]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        vllm_gems.mm(torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE))
    ops.FALLBACKS["mm"] = before


def test_every_op_is_a_function_of_the_package() -> None:
    listed = dir(vllm_gems)
    for name in (*standalone.TABLE, *catalog().kernels):
        assert callable(getattr(vllm_gems, name))
        assert name in listed
    assert {"enable", "report", "device"} <= set(listed)
    assert vllm_gems.device.type == DEVICE
    x, weight = torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    torch.testing.assert_close(vllm_gems.rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))


def test_an_unknown_name_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'vllm_gems' has no attribute 'softmacks'"):
        _ = vllm_gems.softmacks
    assert not hasattr(vllm_gems, "_private")


def test_no_name_hides_a_module_or_a_verb() -> None:
    import pkgutil

    taken = {each.name for each in pkgutil.iter_modules(vllm_gems.__path__)} | set(vllm_gems.__all__)
    assert not taken & {*standalone.TABLE, *catalog().kernels, "device"}


TRANSFORMED = tuple(name for name in standalone.TABLE if name not in (*standalone._WITHOUT_GRADIENT, "layer_norm"))


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_are_pytorchs(name: str) -> None:
    """Derivatives forwards and backwards by torch.func, also where a call like it was done by the kernel before."""
    args = [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments(name)]
    at = next(index for index, each in enumerate(args) if isinstance(each, torch.Tensor) and each.is_floating_point())
    op = standalone.TABLE[name]
    ours, pytorchs = standalone.function(name), op()

    def along(call: Any, rest: tuple[Any, ...] = ()) -> Any:
        return lambda x: call(*args[:at], x, *args[at + 1 :], *rest)

    mine, others = along(ours), along(pytorchs, op.rest)
    mine(args[at])
    tangent = torch.randn_like(args[at])
    for got, want in zip(
        torch.func.jvp(mine, (args[at],), (tangent,)), torch.func.jvp(others, (args[at],), (tangent,)), strict=True
    ):
        torch.testing.assert_close(got, want)
    got, want = (torch.func.grad(lambda x, call=call: call(x).square().sum())(args[at]) for call in (mine, others))
    torch.testing.assert_close(got, want)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        along(getattr(torch.ops.vllm_gems, name))(torch.autograd.forward_ad.make_dual(args[at], tangent))


def test_kernels_have_no_tangents() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        vllm_gems.rms_norm(torch.autograd.forward_ad.make_dual(x, x), weight, 1e-6)


# The package's own kernels, as functions


def case_of(kernel: Kernel) -> Case:
    return next(case for case in kernel.cases if not case.bench)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_do_again_what_they_did_before(kernel: Kernel, by_attempts: Any) -> None:
    """With the tensors of each call, in memory of its own, and with nothing asked once more."""
    function = standalone.function(kernel.name)

    def check() -> None:
        inputs = kernel.inputs(case_of(kernel), "float32", DEVICE)
        expected = kernel.reference(**widened(inputs))
        atol = absolute(kernel.name, inputs, torch.float32)
        returned = function(**inputs)
        assert (returned is None) == (not any(where.startswith("return") for where in kernel.results))
        for got, want in zip(results_of(kernel, inputs, returned), expected, strict=True):
            if want is not None:
                assert_close(got, want, kernel.name, atol)

    before = ops.CALLS[kernel.name]
    check()
    with by_attempts(function):
        check()
        check()
    assert ops.CALLS[kernel.name] == before  # which counts what goes through PyTorch's dispatcher


def normalised(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, size: int | None = None) -> torch.Tensor:
    (found,) = catalog().kernels["rms_norm"].reference(x, weight, epsilon, size)
    assert isinstance(found, torch.Tensor)
    return found


def test_kernels_settle_values_and_looks(by_attempts: Any) -> None:
    """What was settled for some arguments is not done to others."""
    norm = vllm_gems.rms_norm
    x, weight = torch.randn(3, 8, device=DEVICE), torch.rand(8, device=DEVICE)
    looks = [
        (x, weight, 1e-6), (x, weight, 0.5), (x, None, 0.5), (x, weight, 0.5, 4), (x, weight.half(), 0.5),
        (torch.randn(8, 3, device=DEVICE).T.contiguous(), weight, 0.5), (x[1:], weight, 0.5),
        (torch.randn(3, 16, device=DEVICE)[:, :8], weight, 0.5),
        (torch.randn(25, device=DEVICE)[1:].view(3, 8), weight, 1), (x, x[0], 0.5), (x[0], x[0], 0.5),
    ]  # fmt: skip
    for args in looks:
        torch.testing.assert_close(norm(*args), normalised(*args))
    for args in reversed(looks[-4:]):  # as many of a shape are known
        with by_attempts(norm):
            torch.testing.assert_close(norm(*args), normalised(*args))
    out = torch.full_like(x, torch.nan)
    for _ in range(2):
        assert norm(x, weight, 0.5, out=out) is out
        torch.testing.assert_close(out, normalised(x, weight, 0.5))
        assert norm(x, weight, epsilon=0.5) is not out
        with pytest.raises(Refused, match="out is not a contiguous"):
            norm(x, weight, 0.5, None, out[:2])
        with pytest.raises(Refused, match="weight is"):
            norm(x, weight[:4], 0.5)
    with by_attempts(norm):
        assert norm(x, weight, 0.5, out=out) is out
    limits = [vllm_gems.silu_and_mul_with_clamp(10 * x, limit) for limit in (1.0, 2.0, 1.0)]
    assert torch.equal(limits[0], limits[2])
    assert not torch.equal(limits[0], limits[1])


def test_kernels_take_weights_that_want_gradients() -> None:
    """They have none, and give none, whatever is asked for."""
    x, weight = torch.randn(3, 8, device=DEVICE), torch.nn.Parameter(torch.rand(8, device=DEVICE))
    for _ in range(2):
        assert not vllm_gems.rms_norm(x, weight, 1e-6).requires_grad
        with torch.no_grad():
            assert not vllm_gems.rms_norm(x, weight, 1e-6).requires_grad


def test_kernels_leave_to_the_dispatcher_what_is_its_own() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.rand(8, device=DEVICE)
    expected = vllm_gems.rms_norm(x, weight, 1e-6)
    for _ in range(2):
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(vllm_gems.rms_norm(mode.from_tensor(x), weight, 1e-6), torch._subclasses.FakeTensor)
            with pytest.raises((RuntimeError, TypeError), match="argument"):
                vllm_gems.rms_norm(mode.from_tensor(x), weight, 1e-6, out=mode.from_tensor(x))
        before = ops.CALLS["rms_norm"]
        torch.testing.assert_close(vllm_gems.rms_norm(torch._neg_view(x), weight, 1e-6), -expected)
        assert ops.CALLS["rms_norm"] == before + 1


@pytest.mark.parametrize("name", ["rms_norm", "fused_add_rms_norm", "silu_and_mul", "rotary_embedding"])
def test_kernels_in_a_graph(name: str) -> None:
    """The functions trace as the ops do."""
    kernel = catalog().kernels[name]
    inputs = kernel.inputs(case_of(kernel), "float32", DEVICE)
    expected = kernel.reference(**widened(inputs))
    before, function = ops.CALLS[name], standalone.function(name)
    torch.compiler.reset()
    returned = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs.values())
    for got, want in zip(results_of(kernel, inputs, returned), expected, strict=True):
        assert_close(got, want, name, absolute(name, inputs, torch.float32))
    assert ops.CALLS[name] == before + 1


def test_kernels_of_any_signature() -> None:
    """Others may declare parameters that the schema calls otherwise, or as many as there are."""

    def op(*args: Any, **named: Any) -> Any:
        return catalog().kernels["rms_norm"].op(*args, **named)

    x, weight = torch.randn(3, 8, device=DEVICE), torch.rand(8, device=DEVICE)
    function = standalone._of_kernel(Kernel(**{**vars(catalog().kernels["rms_norm"]), "op": op, "settle": None}))
    for _ in range(2):
        torch.testing.assert_close(function(x, weight, epsilon=1e-6), normalised(x, weight, 1e-6))


def test_a_name_is_looked_up_once() -> None:
    """To find out whether a module is meant takes longer than most calls."""
    for name in ("mm", "rms_norm"):
        assert getattr(vllm_gems, name) is getattr(vllm_gems, name) is vars(vllm_gems)[name]
    assert "device" not in vars(vllm_gems)  # which may become another one
