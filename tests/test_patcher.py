"""Import, patch and unpatch in every order; drift; failures. On the toy of toy.py, each in a process of its own."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import pathlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy
from children import in_child

from vllm_gems import seams, sites
from vllm_gems.errors import DriftError, LateCompileError, NotBoundError, Refused, UnknownNameError
from vllm_gems.nouns import State
from vllm_gems.patcher import Patcher
from vllm_gems.policy import Policy
from vllm_gems.sites import function

MODULE = "toy_vllm.layers"


@pytest.fixture(autouse=True)
def _package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    toy.write_package(tmp_path)
    monkeypatch.setattr(seams, "platform", lambda: "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def states(patcher: Patcher) -> dict[str, str]:
    return {row.patch: str(row.state) for row in patcher.rows()}


ORDERS = sorted({"".join(order) for order in itertools.permutations("IPPUU")} | {"IPUPU", "PIUPU", "PIPUPU"})


def run_order(order: str) -> None:
    """I imports, P patches, U unpatches; after each the world is what the letters so far say."""
    patcher = toy.patcher()
    module: Any = None
    originals: dict[str, Any] = {}
    patched = False
    for letter in order:
        if letter == "I":
            module = importlib.import_module(MODULE)
        elif letter == "P":
            patcher.apply(Policy())
            patched = True
        else:
            patcher.undo()
            patched = False
        if module is None:
            continue
        own = vars(module.Layer)["forward_cpu"]
        if not patched:
            originals.setdefault("method", own)
            originals.setdefault("function", module.function)
            assert own is originals["method"], "the identical method is back"
            assert module.function is originals["function"]
            assert module.Layer()(2) == ("stock", 2)
            assert module.function(1) == ("stock", 1)
        else:
            assert module.Layer()(2) == ("ours", 2)
            assert module.Child()(3) == ("ours", 3)
            assert module.function(1) == ("ours", 1)
            wrapped = own.__wrapped__
            assert not hasattr(wrapped, "__wrapped__"), "patched once, however often asked"
            assert states(patcher) == {"toy.layer": "bound", "toy.function": "bound"}
    patcher.undo()
    assert not any(type(finder).__name__ == "_Watcher" for finder in sys.meta_path)
    if module is not None and "method" in originals:
        assert vars(module.Layer)["forward_cpu"] is originals["method"]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order(order: str) -> None:
    in_child(run_order, order)


def test_importing_while_patched_gives_back_the_module_untouched() -> None:
    def check() -> None:
        patcher = toy.patcher()
        patcher.apply(Policy())
        assert states(patcher) == {"toy.layer": "waiting", "toy.function": "waiting"}
        module = importlib.import_module(MODULE)
        assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
        assert module.__loader__ is module.__spec__.loader
        assert "def function" in __import__("inspect").getsource(module.function)

    in_child(check)


def test_instances_made_before_and_after_follow() -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        before, child = module.Layer(), module.Child()
        patcher = toy.patcher()
        patcher.apply(Policy())
        after = module.Layer()
        assert [before(1), child(1), after(1)] == [("ours", 1)] * 3
        assert before(1) == ("ours", 1), "the settled call, too"
        assert patcher.rows()[0].hits == 4
        patcher.undo()
        assert [before(1), child(1), after(1)] == [("stock", 1)] * 3
        assert before._forward_method.__func__ is vars(module.Layer)["forward_cpu"]

    in_child(check)


def test_a_forward_that_does_more_is_kept() -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher()
        patcher.apply(Policy())
        plain, busy = module.Layer(), module.Busy()
        assert [plain(1), plain(2)] == [("ours", 1), ("ours", 2)]
        assert [busy(1), busy(2)] == [("busy", ("ours", 1)), ("busy", ("ours", 2))]
        assert "forward" in vars(plain)
        assert "forward" not in vars(busy)
        patcher.undo()
        assert set(vars(plain)) == {"_forward_method"}
        assert [plain(1), busy(1)] == [("stock", 1), ("busy", ("stock", 1))]

    in_child(check)


def test_frozen_instances_follow() -> None:
    """vLLM freezes the heap of a warm worker."""

    def check() -> None:
        module = importlib.import_module(MODULE)
        layer = module.Layer()
        gc.freeze()
        patcher = toy.patcher()
        patcher.apply(Policy())
        assert gc.get_freeze_count() > 0
        assert layer(1) == ("ours", 1)
        patcher.undo()
        assert layer(1) == ("stock", 1)

    in_child(check)


def test_a_copy_of_a_settled_layer_is_settled_anew() -> None:
    def adapt(original: Any, site: Any) -> Any:
        def bind(layer: Any, x: Any, scale: int = 1) -> Any:
            return lambda x, scale=1: (id(layer), x)

        return toy.layer_method(original, site, bind, bind)

    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.layer", "layer", adapt))
        patcher.apply(Policy())
        layer = module.Layer()
        assert layer(1) == (id(layer), 1)
        twin, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for each in (twin, pickled, layer):
            assert [each(1), each(2)] == [(id(each), 1), (id(each), 2)]
        patcher.undo()
        assert [each(1) for each in (twin, pickled, layer)] == [("stock", 1)] * 3

    in_child(check)


def test_an_inherited_method_is_taken_off_again() -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.inheriting", "inheriting"))
        patcher.apply(Policy())
        assert module.Inheriting()(1) == ("ours", 1)
        assert module.Layer()(1) == ("stock", 1), "its siblings keep theirs"
        patcher.undo()
        assert "forward_cpu" not in vars(module.Inheriting)
        assert module.Inheriting()(1) == ("native", 1)

    in_child(check)


@pytest.mark.parametrize(
    ("seam", "words"),
    [
        ("gone", "Layer.forward_gone is not there"),
        ("drifted", "function is now (x, flag=False), not (x, flag=False, more=None)"),
        ("rewritten", "none of those that the replacement was written against"),
    ],
)
def test_drift_is_refused_and_nothing_is_created(seam: str, words: str) -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        before = dict(vars(module)), dict(vars(module.Layer))
        patcher = toy.patcher(toy.patch("toy.x", seam))
        patcher.apply(Policy())
        (row,) = patcher.rows()
        assert row.state is State.REFUSED
        assert words in row.why
        assert (dict(vars(module)), dict(vars(module.Layer))) == before

    in_child(check)


def test_the_first_place_that_fits_is_taken() -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.moved", "moved", toy.adapt_function))
        patcher.apply(Policy())
        assert module.function(1) == ("ours", 1)
        assert patcher.rows()[0].where == "function"

    in_child(check)


def test_policy_and_veto_leave_their_reasons() -> None:
    class Veto:
        told: list[Any] = []  # noqa: RUF012

        @toy.hookimpl
        def vllm_gems_refuses(self, patch: Any) -> str | None:
            return "not today" if patch.name == "toy.layer" else None

        @toy.hookimpl
        def vllm_gems_bound(self, row: Any) -> None:
            self.told.append((row.patch, str(row.state)))

    def check() -> None:
        importlib.import_module(MODULE)
        patcher = toy.patcher(*toy.PATCHES, toy.patch("toy.off", "layer", default=False), plugins=[Veto()])
        patcher.apply(Policy(exclude=("*.function",)))
        why = {row.patch: (str(row.state), row.why) for row in patcher.rows()}
        assert why["toy.layer"] == ("refused", "not today")
        assert why["toy.function"] == ("off", "excluded by '*.function'")
        assert why["toy.off"] == ("off", "off by default; VLLM_GEMS_INCLUDE=default,toy.off adds it")
        assert sorted(Veto.told) == [("toy.function", "off"), ("toy.layer", "refused"), ("toy.off", "off")]

    in_child(check)


def test_applying_again_adds_what_is_new() -> None:
    def check() -> None:
        importlib.import_module(MODULE)
        patcher = toy.patcher()
        assert patcher.apply(Policy(include=("toy.function",))) == ("toy.function",)
        assert patcher.apply(Policy()) == ("toy.layer",)
        assert patcher.apply(Policy()) == ()
        patcher.undo(["toy.layer"])
        assert states(patcher) == {"toy.function": "bound"}

    in_child(check)


def test_what_waits_is_not_forgotten_by_who_asks_for_less() -> None:
    """As a caller's patches, when vLLM loads the plugin, which asks for what the environment says."""

    def check() -> None:
        patcher = toy.patcher(*toy.PATCHES, toy.patch("toy.module", "module", toy.adapt_module, default=False))
        patcher.apply(Policy(include=("toy.module",)))
        patcher.apply(Policy(exclude=("toy.function",)))
        assert states(patcher) == {"toy.layer": "waiting", "toy.function": "off", "toy.module": "waiting"}
        importlib.import_module(MODULE)
        assert states(patcher) == {"toy.layer": "bound", "toy.function": "off", "toy.module": "bound"}

    in_child(check)


def test_what_waits_only_for_a_while_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        from vllm_gems import api

        patcher = toy.patcher()
        monkeypatch.setattr(api, "patcher", lambda: patcher)
        api.apply_gems_patches_to_vllm(include="toy.layer")
        with api.gems_patches(include="toy.*"):
            assert states(patcher) == {"toy.layer": "waiting", "toy.function": "waiting"}
        importlib.import_module(MODULE)
        assert states(patcher) == {"toy.layer": "bound"}

    in_child(check)


def test_strict_raises_for_what_was_asked_by_name() -> None:
    def check() -> None:
        importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.x", "gone"))
        with pytest.raises(NotBoundError, match=r"toy\.x was asked for .* is not there"):
            patcher.apply(Policy(include=("toy.x",), strict=True))
        patcher.apply(Policy(strict=True))  # asked for by nobody: refused in silence
        assert states(patcher) == {"toy.x": "refused"}

    in_child(check)


def test_somebody_elses_patch_on_top_is_reported_and_left_alone() -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher()
        patcher.apply(Policy())
        theirs = module.function = lambda x, flag=False: ("theirs", x)
        with pytest.raises(RuntimeError, match="function was patched again by someone else"):
            patcher.undo()
        assert module.function is theirs
        assert module.Layer()(1) == ("stock", 1), "the rest is undone"

    in_child(check)


def failing(error: Exception, when: str) -> Callable[..., Any]:
    """An adapter whose kernel raises `error` when it is bound or called."""

    def adapt(original: Any, site: Any) -> Any:
        def bind(layer: Any, x: Any, scale: int = 1) -> Any:
            if when == "bind":
                raise error

            def call(x: Any, scale: int = 1) -> Any:
                raise error

            return call

        return toy.layer_method(original, site, bind, bind)

    return adapt


@pytest.mark.parametrize("when", ["bind", "call"])
def test_a_kernel_that_raises_is_replaced_by_the_original(when: str, caplog: pytest.LogCaptureFixture) -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        method = vars(module.Layer)["forward_cpu"]
        layer = module.Layer()
        patcher = toy.patcher(toy.patch("toy.layer", "layer", failing(ValueError("boom"), when)))
        patcher.apply(Policy())
        assert [layer(1), layer(2), module.Layer()(3)] == [("stock", 1), ("stock", 2), ("stock", 3)]
        (row,) = patcher.rows()
        assert (row.state, row.errors, row.hits, row.why) == (State.FAILED, 1, 0, "ValueError: boom")
        assert vars(module.Layer)["forward_cpu"] is method
        messages = [record.message for record in caplog.records]
        assert messages == ["toy.layer raised; vLLM's own code runs in its place from now on"]

    in_child(check)


def test_strict_out_of_memory_and_forbidden_compilations_pass_through() -> None:
    def check(error: Exception, strict: bool) -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.layer", "layer", failing(error, "call")))
        patcher.apply(Policy(strict=strict))
        with pytest.raises(type(error)):
            module.Layer()(1)
        assert states(patcher) == {"toy.layer": "bound"}

    in_child(check, ValueError("boom"), True)
    in_child(check, torch.OutOfMemoryError("full"), False)
    in_child(check, LateCompileError("kernel", "not now."), False)


def test_a_refused_call_goes_to_the_original_with_its_reason() -> None:
    def adapt(original: Any, site: Any) -> Any:
        def bind(layer: Any, x: Any, scale: int = 1) -> Any:
            if x == 0:
                raise Refused("nothing to do")

            def call(x: Any, scale: int = 1) -> Any:
                if x < 0:
                    raise Refused("negative")
                return ("ours", x)

            return call

        return toy.layer_method(original, site, bind, bind)

    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.layer", "layer", adapt))
        patcher.apply(Policy())
        layer = module.Layer()
        got = [layer(x)[0] for x in (0, 1, -1, -2, 2, 3)]
        assert got == ["stock", "ours", "stock", "stock", "ours", "ours"]
        (row,) = patcher.rows()
        assert (row.state, row.hits, row.errors) == (State.BOUND, 3, 0)
        assert row.declined == {"nothing to do": 1, "negative": 2}

    in_child(check)


def test_a_failing_adapter_refuses_the_patch() -> None:
    def adapt(original: Any, site: Any) -> Any:
        raise DriftError("here", "it is not what it was")

    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.layer", "layer", adapt))
        patcher.apply(Policy())
        (row,) = patcher.rows()
        assert row.state is State.REFUSED
        assert "it is not what it was" in row.why
        assert module.Layer()(1) == ("stock", 1)

    in_child(check)


def test_layers_that_chose_native_are_asleep() -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher()
        patcher.apply(Policy())
        layers = [module.Layer() for _ in range(3)]
        for layer in layers:
            layer._forward_method = layer.forward_native
        row = patcher.rows()[0]
        assert row.state is State.ASLEEP
        assert row.why == 'all 3 layers run forward_native; custom_ops=["+Layer"] wakes it'

    in_child(check)


def test_what_dynamo_passes_by_is_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement for eager mode says so where vLLM compiles a model, until it was called all the same."""

    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.module", "module", toy.adapt_module))
        patcher.apply(Policy())
        model = module.Model()
        assert states(patcher) == {"toy.module": "bound"}
        model.do_not_compile = False
        (row,) = patcher.rows()
        assert row.state is State.ASLEEP
        assert row.why == "vLLM compiles Model; enforce_eager=True wakes it"
        assert module.Block()(1) == ("ours", 1)
        assert states(patcher) == {"toy.module": "bound"}
        del model

    monkeypatch.setattr(seams, "COMPILED_MODEL", f"{MODULE}:Model")
    in_child(check)


def test_modules_are_settled_once_and_given_back() -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.module", "module", toy.adapt_module))
        block, proud, refused = module.Block(), module.Proud(), module.Block()
        refused.refuse = "not for us"
        patcher.apply(Policy())
        site = patcher._order[0].site
        assert site is not None
        assert [block(1), block(2)] == [("ours", 1), ("ours", 2)]
        assert site.hits == 2
        # Declined for this call only, for ever, and because a subclass comes first.
        assert block(-1) == ("stock", -1)
        assert [refused(1), refused(2)] == [("stock", 1), ("stock", 2)]
        assert proud(1) == ("proud", ("stock", 1))
        assert site.declined == {
            "negative": 1,
            "not for us": 2,
            "Proud has a forward of its own, and calls this one": 1,
        }
        # What no longer holds is settled anew, by the call after the next.
        settled = vars(block)["forward"]
        assert block(0) == ("stock", 0)
        assert "forward" not in vars(block)
        assert block(3) == ("ours", 3)
        assert vars(block)["forward"] is not settled
        # A copy brings the call of its original along.
        twin = copy.deepcopy(block)
        assert twin(4) == ("ours", 4)
        assert vars(twin)["forward"].__self__ is twin
        patcher.undo()
        assert not any("forward" in vars(each) for each in (block, twin, refused, proud))
        assert block(1) == ("stock", 1)

    in_child(check)


def test_a_module_whose_call_raises_is_done_by_the_original() -> None:
    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.module", "module", toy.adapt_module))
        patcher.apply(Policy())
        block = module.Block()
        assert block(1) == ("ours", 1)
        assert block("x") == ("stock", "x")
        assert states(patcher) == {"toy.module": "failed"}
        assert "forward" not in vars(block)
        assert [block(1), module.Block()(2)] == [("stock", 1), ("stock", 2)]

    in_child(check)


def test_a_function_declines_and_fails_and_copies_of_it_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapt(original: Any, site: Any) -> Any:
        def call(x: Any, flag: bool = False) -> Any:
            if x < 0:
                raise Refused("negative")
            return ("ours", x)

        original.note = "of torch.compile"
        return function(original, site, call)

    def check() -> None:
        module = importlib.import_module(MODULE)
        original = module.function
        patcher = toy.patcher(toy.patch("toy.function", "function", adapt))
        patcher.apply(Policy())
        copied = module.function
        assert "note" not in vars(copied)
        assert [copied(1), copied(-1), copied(x=2, flag=True)] == [("ours", 1), ("stock", -1), ("ours", 2)]
        monkeypatch.setattr(sites, "is_tracing", lambda: True)
        assert copied(1) == ("stock", 1)
        monkeypatch.setattr(sites, "is_tracing", lambda: False)
        (row,) = patcher.rows()
        assert (row.hits, row.declined, row.errors) == (2, {"negative": 1}, 0)
        assert copied("x") == ("stock", "x")
        assert module.function is original
        assert copied(1) == ("stock", 1), "the original, after a failure"
        (row,) = patcher.rows()
        assert (row.state, row.hits, row.errors) == (State.FAILED, 2, 1)

    in_child(check)


def test_a_copy_of_a_function_follows_undo_and_the_next_apply() -> None:
    def adapt(original: Any, site: Any) -> Any:
        return function(original, site, lambda x: ("ours", x))

    def check() -> None:
        module = importlib.import_module(MODULE)
        patcher = toy.patcher(toy.patch("toy.function", "function", adapt))
        patcher.apply(Policy())
        copied = module.function
        patcher.undo()
        assert copied(1) == ("stock", 1)
        patcher.apply(Policy())
        assert module.function is copied
        assert copied(1) == ("ours", 1)
        (row,) = patcher.rows()
        assert row.hits == 1

    in_child(check)


def test_batch_invariance_and_a_missing_gpu_refuse_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(word: str) -> None:
        importlib.import_module(MODULE)
        patcher = toy.patcher()
        patcher.apply(Policy())
        for row in patcher.rows():
            assert row.state is State.REFUSED
            assert word in row.why

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    in_child(check, "VLLM_BATCH_INVARIANT")
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    monkeypatch.delenv("TRITON_INTERPRET")
    in_child(check, "there is no GPU")
    monkeypatch.setattr(seams, "platform", lambda: "tpu")
    in_child(check, "'tpu'")


def test_names_that_no_patch_has_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        from vllm_gems import api
        from vllm_gems.reports import Report

        importlib.import_module(MODULE)
        patcher = toy.patcher()
        monkeypatch.setattr(api, "patcher", lambda: patcher)
        for named in ({"include": "toy.layr"}, {"exclude": "toy.layr"}):
            with pytest.raises(UnknownNameError, match=r"'toy\.layr'; did you mean toy\.layer"):
                api.apply_gems_patches_to_vllm(**named)
            with pytest.raises(UnknownNameError), api.gems_patches(**named):
                pass
        assert states(patcher) == {}
        # In the environment, where a typing error must not stop vLLM.
        patcher.apply(Policy(include=("toy.layer", "toy.layr")))
        assert states(patcher) == {"toy.layer": "bound", "toy.function": "off", "toy.layr": "refused"}
        (problem,) = Report.of_process(patcher.rows()).problems()
        assert problem.startswith("toy.layr was asked for and is refused: no patch is called 'toy.layr'")
        with pytest.raises(NotBoundError, match=r"toy\.layr was asked for"):
            patcher.apply(Policy(include=("toy.layr",), strict=True))

    in_child(check)
