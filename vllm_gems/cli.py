"""`vllm-gems`: what is patched, why not, and what this machine is.

Exit codes: 0 all is well; 1 `check`, `pretune` or `bench` found a problem; 2 wrong usage, an unknown name; 3 no vLLM.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform as machine
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .errors import UnknownNameError
from .nouns import State
from .tuning import OPS

OK, PROBLEM, USAGE, NO_VLLM = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except UnknownNameError as error:
        print(error, file=sys.stderr)
        return USAGE
    except (FileNotFoundError, json.JSONDecodeError) as error:
        print(f"{args.path}: {error}", file=sys.stderr)
        return USAGE
    except _NoVllmError as error:
        print(f"vLLM cannot be imported here: {error}", file=sys.stderr)
        return NO_VLLM
    return code


class _NoVllmError(Exception):
    pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vllm-gems", description=__doc__.splitlines()[0], epilog=__doc__.splitlines()[2])
    parser.add_argument("--version", action="version", version=f"vllm-gems {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="command")
    path = "a report, or the folder of VLLM_GEMS_REPORT; without it, the patches are bound here to see what happens"

    def verb(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=about, description=about)
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    report = verb("report", _report, "what is patched, where, and how often it ran")
    report.add_argument("path", nargs="?", help=path)
    report.add_argument("--all", action="store_true", help="the patches that are off, too")
    report.add_argument("--aten", action="store_true", help="which of PyTorch's operations `enable()` can replace here")
    check = verb("check", _check, "exit 1 if a patch asked for is not bound, was bound and never hit, or failed")
    check.add_argument("path", nargs="?", help=path)
    explain = verb("explain", _explain, "where a patch goes, what it gains, and its state here")
    explain.add_argument("patch")
    explain.add_argument("--gpu", help="whose measurements to print, by its full name; default: this machine's")
    pretune = verb("pretune", _pretune, "measure kernels' configurations for a model's shapes here, and keep the best")
    dtypes = "default: %(default)s, which float16 takes too where it has no results of its own"
    models = "llama, qwen, deepseek, a folder with config.json, or a model's name"
    pretune.add_argument("--model", required=True, help=models)
    pretune.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help=dtypes)
    pretune.add_argument("--max-tokens", type=int, default=16384, help="of one step")
    pretune.add_argument("--max-reqs", type=int, default=1024, help="of one step")
    pretune.add_argument("--tp", type=int, default=1, help="ranks of tensor parallelism")
    pretune.add_argument("--ops", help=f"comma-separated, of {', '.join(OPS)}; default: all")
    pretune.add_argument("--dry-run", action="store_true", help="say what would be measured, and touch no GPU")
    bench = verb("bench", _bench, "measure patches against vLLM's own code here; where that is faster, it will run")
    bench.add_argument("--model", default="llama,qwen,deepseek", help=f"{models}; with commas; default: %(default)s")
    bench.add_argument("--patches", help="names or globs, comma-separated; default: those that the models come to")
    bench.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help=dtypes)
    bench.add_argument("--max-tokens", type=int, default=8192, help="of one step")
    bench.add_argument("--tp", type=int, default=1, help="ranks of tensor parallelism")
    bench.add_argument("--dry-run", action="store_true", help="say what would be measured, and touch no GPU")
    verb("env", _env, "versions, devices and the variables that this program reads")
    return parser


def _found(path: str | None) -> Any:
    from .reports import Report

    return Report.read(path) if path else _bind_here()


def _bind_here() -> Any:
    """The report of this process after every module that a patch waits for has been imported."""
    from . import api
    from .catalog import catalog

    try:
        importlib.import_module("vllm")
        for seam in catalog().seams.values():
            for place in seam.places:
                try:
                    importlib.import_module(place.module)
                except ModuleNotFoundError as error:
                    if not str(error.name).startswith("vllm"):
                        raise
    except Exception as error:
        raise _NoVllmError(f"{type(error).__name__}: {error}") from error
    with api.gems_patches() as found:
        return found


def _report(args: argparse.Namespace) -> int:
    if args.aten:
        return _aten(args)
    found = _found(args.path)
    print(json.dumps(found.to_json(), indent=1) if args.json else found.text(everything=args.all))
    return OK


def _aten(args: argparse.Namespace) -> int:
    """Every overload that can be overridden, whether it is by default, and what was measured."""
    from .overrides import overrides

    told = overrides().told()
    if args.json:
        print(json.dumps(told, indent=1))
        return OK
    for each in told:
        measured = "not measured" if each["speedup"] is None else f"{each['speedup']:.2f}x PyTorch's speed"
        print(f"{each['overload']:36} {'default' if each['default'] else '-':8} {measured}")
    defaults = sum(each["default"] for each in told)
    operations = len({each["operation"] for each in told})
    why = "" if any(each["speedup"] for each in told) else ", because nothing was measured on this GPU"
    print(f"{len(told)} overloads of {operations} operations; {defaults} in the default set{why}")
    return OK


def _check(args: argparse.Namespace) -> int:
    found = _found(args.path)
    problems = found.problems()
    if args.json:
        print(json.dumps({"problems": problems, **found.to_json()}, indent=1))
    else:
        bound = sum(row.state is State.BOUND for row in found.rows)
        hits = sum(row.hits for row in found.rows)
        print("\n".join([*problems, f"{bound} patches bound, {hits} hits, {len(problems)} problems"]))
    return PROBLEM if problems else OK


def _explain(args: argparse.Namespace) -> int:
    from .catalog import catalog, lookup

    patch = lookup("patch", catalog().patches, args.patch)
    seam = catalog().seams[patch.seam]
    told: dict[str, Any] = {
        "patch": patch.name,
        "why": patch.why,
        "default": patch.default,
        "kernels": list(patch.kernels),
        "distribution": patch.distribution,
        "places": [
            {
                "kind": place.kind,
                "where": f"{place.module}:{place.name}" if place.kind == "attribute" else str(place),
                "platform": place.platform,
                "vllm": place.versions,
                "expects": list(place.expects),
                "sources": sorted(place.sources),
            }
            for place in seam.places
        ],
    }
    try:
        row = next(row for row in _bind_here().rows if row.patch == patch.name)
        told["here"] = {"state": str(row.state), "where": row.where, "why": row.why, "replaced": row.replaced}
    except _NoVllmError as error:
        told["here"] = {"state": "no vLLM", "where": "", "why": str(error), "replaced": ""}
    told["measured"] = measured = _measured(patch, args.gpu)
    if args.json:
        print(json.dumps(told, indent=1))
        return OK
    print(f"{patch.name}: {patch.why}")
    print(f"kernels  {', '.join(patch.kernels) or 'none'} ({patch.distribution})")
    print(f"default  {'on' if patch.default else 'off'}")
    for place in told["places"]:
        print(f"place    {place['where']}  [{place['kind']}, {place['platform']}, vLLM {place['vllm']}]")
        for expected in place["expects"]:
            print(f"         expects {expected}")
        if place["sources"]:
            print(f"         written against the sources {', '.join(place['sources'])}")
    here = told["here"]
    print(f"here     {here['state']}  {here['where']}{'  ' + here['why'] if here['why'] else ''}")
    if here["replaced"]:
        print(f"replaced {here['replaced']}")
    print("\n".join(_lines(measured)))
    return OK


def _measured(patch: Any, gpu: str | None) -> dict[str, Any]:
    """What `vllm-gems bench` found on the GPU of this name, or on this machine's."""
    from . import faster
    from .catalog import catalog

    torch = importlib.import_module("torch")
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    if gpu is None or not patch.kernels:
        return {"gpu": gpu or "", "rows": [], "borrowed": {}, "stale": {}}
    return faster.told(patch.name, gpu, catalog().kernels[patch.kernels[0]].op.__module__)


def _lines(measured: dict[str, Any]) -> list[str]:
    """`_measured` for people."""
    from .faster import text

    where = f" on {measured['gpu']}" if measured["gpu"] else ": there is no GPU here, and --gpu names none"
    notes = [f"; {count} shapes shipped, with {others}" for others, count in measured["borrowed"].items()]
    notes += [f"; {len(keys)} not used, {reason}" for reason, keys in measured["stale"].items()]
    what = "against vLLM" if measured["rows"] else "nothing against vLLM"
    return [f"measured {what}{where}{''.join(notes)}", *text(measured["rows"])]


def _bench(args: argparse.Namespace) -> int:
    try:
        from .bench.run import bench

        told = bench(
            [name.strip() for name in args.model.split(",")], patches=args.patches, dtype=args.dtype, tp=args.tp,
            max_tokens=args.max_tokens, dry_run=args.dry_run,
            tell=lambda line: None if args.json else print(line, flush=True),
        )  # fmt: skip
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    except ImportError as error:
        raise _NoVllmError(error) from error
    if args.json:
        print(json.dumps(told, indent=1))
    return PROBLEM if any("failed" in table for table in told["tables"]) else OK


def _env(args: argparse.Namespace) -> int:
    from .policy import VARIABLES, Policy, read_variables
    from .reports import _version

    names = ("vllm", "torch", "triton", "pluggy", "ml_dtypes")
    told = {
        "vllm_gems": __version__,
        "python": machine.python_version(),
        "platform": machine.platform(),
        **{name: _version(name) for name in names},
        "launch": _launch(),
        "variables": read_variables(),
        "policy": repr(Policy.from_env()),
    }
    if args.json:
        print(json.dumps(told, indent=1))
        return OK
    for name, value in told.items():
        if name != "variables":
            print(f"{name:20} {value or '-'}")
    for name, (default, meaning) in VARIABLES.items():
        value = read_variables()[name]
        shown = repr(value) if value != default else f"{default!r} (default)"
        print(f"{name:20} {shown}  {meaning}")
    return OK


def _pretune(args: argparse.Namespace) -> int:
    from .tuning.run import pretune

    try:
        told = pretune(
            args.model, dtype=args.dtype, tp=args.tp, max_tokens=args.max_tokens, max_reqs=args.max_reqs,
            ops=args.ops, dry_run=args.dry_run,
        )  # fmt: skip
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    print(json.dumps(told, indent=1) if args.json else "\n".join(told["lines"]))
    return PROBLEM if any("failed" in job for job in told["jobs"]) else OK


def _launch() -> str:
    """How kernels are launched in a process like this one."""
    try:
        from .launch import direct_refuses
    except ImportError as error:
        return f"not at all: {error}"
    return direct_refuses() or "directly, through the compiled kernels' C launcher"
