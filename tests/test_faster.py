"""Only where faster: what was measured decides who does a call, costs nothing where it is ours, and is told."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Any

import pytest
import torch
import toy
from children import in_child

from benchmarks.patches import rows_of
from tools import tables
from vllm_gems import cli, faster, seams, tuned
from vllm_gems.errors import Refused, Slower
from vllm_gems.kernels import activation
from vllm_gems.policy import Policy
from vllm_gems.reports import Report
from vllm_gems.sites import Site

GPU = "NVIDIA Made Up"  # for which nothing is shipped
MODULE = activation.__name__
# (host, gpu, vLLM's host, vLLM's gpu): slower by the sum alone, by the GPU alone, by neither
BY_HOST, BY_GPU, FASTER = (30.0, 1.0, 20.0, 2.0), (1.0, 30.0, 40.0, 20.0), (5.0, 1.0, 10.0, 2.0)
MEASURED = {"1": FASTER, "2": BY_HOST, "8": BY_GPU, "16": FASTER}
EAGER_2 = "measured slower: 1.41 of vLLM's at 2 tokens, eager"
GRAPH_8 = "measured slower: 1.50 of vLLM's at 8 tokens, graph"


@pytest.fixture(autouse=True)
def _store(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of this name, whose results are in a folder of the test's own."""
    monkeypatch.setenv("VLLM_GEMS_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = dict(tuned._TABLES)
    tuned._TABLES.clear()
    yield
    tuned._TABLES.clear()
    tuned._TABLES.update(before)


def write(patch: str, key: str, measured: Any, **other: Any) -> None:
    entry = {"key": key, "configuration": measured, "versions": tuned.versions(), "source": faster.source(MODULE)}
    tuned.write(patch, GPU, {**entry, **other})


def call(x: torch.Tensor) -> str:
    return "ours"


call.__module__ = MODULE  # as if it were a kernel's of this file


def decided(patch: str, width: int) -> bool:
    """Whether anything of bfloat16 rows of this width is left to vLLM."""
    key = faster.key_of(torch.bfloat16, "silu_and_mul", width)
    return faster.where_faster(patch, key, 0, call, lambda x: x.shape[0]) is not call


def refusal(known: faster.Reasons, tokens: int) -> str | None:
    try:
        faster.check(known, tokens)
    except Slower as slower:
        return str(slower)
    return None


def test_a_number_of_tokens_counts_as_the_next_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    known = faster.reasons(MEASURED)
    assert [refusal(known, tokens) for tokens in (0, 1, 2, 3, 8, 9, 16, 17, 1 << 20)] == [
        None, None, EAGER_2, None, None, None, None, None, None,
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [refusal(known, tokens) for tokens in (1, 2, 3, 5, 8, 9)] == [None, None, GRAPH_8, GRAPH_8, GRAPH_8, None]


def test_only_what_is_slower_by_more_than_the_margin_counts() -> None:
    edge = 10 * faster.MARGIN
    assert faster.reasons({"1": (0.0, edge, 0.0, 10.0), "4": FASTER}) == ()
    assert faster.reasons({"1": (0.0, edge + 0.1, 0.0, 10.0)}) != ()
    assert faster.reasons({}) == ()


def test_calls_are_settled_by_shape() -> None:
    write("activation.silu_and_mul", "bfloat16 silu_and_mul 64", MEASURED)
    write("activation.silu_and_mul", "bfloat16 silu_and_mul 128", {"1": FASTER, "8192": FASTER})

    def settled(dtype: torch.dtype, width: int, device: int = 0) -> Any:
        key = faster.key_of(dtype, "silu_and_mul", width)
        return faster.where_faster("activation.silu_and_mul", key, device, call, lambda x: x.shape[0])

    for dtype, width, device in ((torch.bfloat16, 128, 0), (torch.bfloat16, 96, 0), (torch.bfloat16, 64, -1)):
        assert settled(dtype, width, device) is call, "nothing is put before what is ours"
    for dtype in (torch.bfloat16, torch.float16):  # which is taken to be as fast
        checked = settled(dtype, 64)
        assert checked(torch.empty(1, 64)) == checked(x=torch.empty(1, 64)) == "ours"
        with pytest.raises(Slower, match="at 2 tokens, eager"):
            checked(torch.empty(2, 64))
    settled(torch.float32, 64)
    state = tuned.states()["activation.silu_and_mul"]
    assert (state["found"], state["missing"]) == (2, ["bfloat16 silu_and_mul 96", "float32 silu_and_mul 64"])
    last = Report.of_process(()).text().splitlines()[-1]
    assert last == (
        "activation.silu_and_mul: 2 shapes measured against vLLM; 2 others not, where ours runs: "
        "bfloat16 silu_and_mul 96, float32 silu_and_mul 64"
    )


def test_what_was_measured_with_something_else_decides_nothing() -> None:
    """Entries name vLLM's version too; that of another module stands for it, which is imported faster."""
    write("activation.silu_and_mul", "bfloat16 silu_and_mul 64", MEASURED, source="another")
    of_old = {**tuned.versions(), "pluggy": "0.0.1"}
    write("activation.silu_and_mul", "bfloat16 silu_and_mul 128", MEASURED, versions=of_old)
    assert not any(decided("activation.silu_and_mul", width) for width in (64, 128))
    stale = {
        "of another source": ["bfloat16 silu_and_mul 64"],
        "measured with pluggy 0.0.1": ["bfloat16 silu_and_mul 128"],
    }
    assert tuned.states()["activation.silu_and_mul"]["stale"] == stale
    assert faster.told("activation.silu_and_mul", GPU, MODULE) == {
        "gpu": GPU, "rows": [], "borrowed": {}, "stale": stale,
    }  # fmt: skip


def test_measuring_is_not_decided_by_what_was_measured() -> None:
    write("op.silu_and_mul", "bfloat16 silu_and_mul 64", MEASURED)
    with faster.undecided() as asked:
        assert not decided("op.silu_and_mul", 64)
        assert asked == {"bfloat16 silu_and_mul 64"}
    assert decided("op.silu_and_mul", 64)


def test_an_op_of_vllms_runs_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real patch on a kernel of the dispatcher that is made up, in the interpreter."""
    write("op.silu_and_mul", "float32 silu_and_mul 8", MEASURED)
    lookup = tuned.lookup
    monkeypatch.setattr(tuned, "lookup", lambda patch, device, key, source: lookup(patch, 0, key, source))
    ran = []

    class Original:
        def call_boxed(self, keyset: Any, *args: Any) -> None:
            ran.append(args[1].shape[0])

    patch = next(patch for patch in importlib.import_module("vllm_gems.patches.activation").PATCHES
                 if patch.name == "op.silu_and_mul")  # fmt: skip
    site = Site(patch.name, patch.kernels)
    kernel = patch.adapt(Original(), site)
    for tokens in (1, 2, 3, 2):
        x = torch.randn(tokens, 8)
        out = torch.full((tokens, 4), float("nan"))
        kernel(None, out, x)
        assert out.isnan().all() == (tokens == 2)
    assert (ran, site.hits, site.declined, site.errors) == ([2, 2], 2, {EAGER_2: 2}, 0)


def test_a_layer_stays_settled(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    toy.write_package(tmp_path)
    monkeypatch.setattr(seams, "platform", lambda: "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    known = faster.reasons(MEASURED)

    def adapt(original: Any, site: Any) -> Any:
        def bind(layer: Any, x: int, scale: int = 1) -> Any:
            def call(x: int, scale: int = 1) -> Any:
                faster.check(known, x)
                if x < 0:
                    raise Refused("negative")
                return ("ours", x)

            return call

        return toy.layer_method(original, site, bind, bind)

    def check() -> None:
        module = importlib.import_module("toy_vllm.layers")
        patcher = toy.patcher(toy.patch("toy.layer", "layer", adapt))
        patcher.apply(Policy())
        layer = module.Layer()
        assert layer(1) == ("ours", 1)
        settled = vars(layer)["forward"]
        assert [layer(2), layer(2), layer(16)] == [("stock", 2), ("stock", 2), ("ours", 16)]
        assert vars(layer)["forward"] is settled, "nothing is settled anew for a number of tokens"
        assert layer(-1) == ("stock", -1)
        assert "forward" not in vars(layer)
        (row,) = patcher.rows()
        assert (row.hits, row.declined, row.errors) == (2, {EAGER_2: 2, "negative": 1}, 0)

    in_child(check)


def test_what_was_measured_is_told() -> None:
    write("activation.silu_and_mul", "bfloat16 silu_and_mul 64", MEASURED)
    told = faster.told("activation.silu_and_mul", GPU, MODULE)
    assert told["rows"][1] == {
        "key": "bfloat16 silu_and_mul 64", "tokens": 2, "host": 30.0, "gpu": 1.0, "vllm_host": 20.0, "vllm_gpu": 2.0,
        "eager": 1.409, "graph": 0.5, "original": ["eager"],
    }  # fmt: skip
    lines = cli._lines(told)
    assert lines[0] == f"measured against vLLM on {GPU}"
    assert lines[3].split() == [
        "bfloat16", "silu_and_mul", "64", "2", "20.0", "+", "2.0", "30.0", "+", "1.0", "1.41", "0.50",
        "vLLM's", "own", "runs:", "eager",
    ]  # fmt: skip
    assert len(lines) == 2 + len(MEASURED)
    nothing = cli._lines(faster.told("op.silu_and_mul", GPU, MODULE))
    assert nothing == [f"measured nothing against vLLM on {GPU}"]


def test_a_record_is_shipped_and_decides(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/patches.py -> tools/tables.py -> the package."""
    key, times = "bfloat16 silu_and_mul 64", {tokens: list(each) for tokens, each in MEASURED.items()}
    table = {"patch": "op.silu_and_mul", "key": key, "tokens": [1, 2], "times": times, "source": faster.source(MODULE)}
    rows = rows_of([table, {"patch": "op.silu_and_mul", "key": "another", "tokens": [1], "failed": "boom"}])
    record = {"gpu": GPU, "modules": {**tuned.versions(), "triton": "0.1"}, "rows": rows}
    folder = tmp_path / "results" / "made"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tables, "RESULTS", folder.parent)
    assert tables.decisions("made") == {}
    (folder / "patches.json").write_text(json.dumps(record))
    ((name, text),) = tables.decisions("made").items()
    shipped = tmp_path / "package" / "tuned" / "made"
    shipped.mkdir(parents=True)
    (shipped / f"{name}.json").write_text(text)
    monkeypatch.setattr(tuned.resources, "files", lambda package: tmp_path / "package")
    assert decided("op.silu_and_mul", 64)
    assert tuned.states()["op.silu_and_mul"]["borrowed"] == {"triton 0.1": 1}
    # In the documents: four points, of which one is left to vLLM in each mode.
    assert tables.patches(record).splitlines()[2].split(" | ")[1:] == [
        "1", "4", "0.65", "1.41", "1", "0.66", "1.50", "1 |",
    ]  # fmt: skip
    (folder / "patches.json").write_text(json.dumps({**record, "rows": [*rows, {**rows[0], "source": "another"}]}))
    with pytest.raises(ValueError, match="several kernels"):
        tables.decisions("made")


def test_where_nothing_was_measured_a_patch_may_take_few_tokens_only() -> None:
    write("sampler.top_p", "float32 top_p 500", {"8": FASTER})

    def settled(vocab_size: int) -> Any:
        key = faster.key_of(torch.float32, "top_p", vocab_size)
        return faster.where_faster("sampler.top_p", key, 0, call, lambda x: x.shape[0], 4)

    assert settled(500) is call
    limited = settled(640)
    assert limited(torch.empty(4, 640)) == "ours"
    with pytest.raises(Slower, match=r"not measured on this GPU.* more than 4 tokens"):
        limited(torch.empty(5, 640))
    with faster.undecided():
        assert settled(640) is call, "who measures asks for all"
