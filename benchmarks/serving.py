"""`vllm serve` with and without the plugin, measured by vLLM's own client: one GPU, random weights, nothing downloaded.

    python benchmarks/serving.py --model qwen2.5-7b --modes compiled,eager --record serving_qwen2_5_7b
    python benchmarks/serving.py --model qwen2.5-7b --sides ours --prompts 1000 --turns 1 --jit-monitor error

For each mode a server without the plugin (`VLLM_GEMS=0`) and one with it: vLLM's command line, with the weights of
benchmarks/serve.py and a tokenizer of one word for each token. They start beside each other as far as the GPU's memory
goes, and are measured by turns, one at a time while the others wait. What is not said here is vLLM's default.

Recorded are the seconds from the start of the process to an answer of /health (beside others that start, too); the
time to the first token of the first request of all, streamed alone, and of the few after it; then what
`vllm bench serve` says of `--prompts` requests with prompts and outputs of random lengths, `--concurrency` of them at a
time: other prompts in each turn, the same for both sides. At the end servers are told to stop, and the plugin's report
of each is read.

--jit-monitor passes vLLM's --jit-monitor-mode, with which it watches for compilations after its warm-up: "error" has a
server fail at one. What it says is in the record, of vLLM's own kernels too. Of ours, the report says whether any was
compiled: "late" by vLLM's monitor, and "after_first_request" by the clock.

The exit status is 1 if a request failed, or a kernel of ours raised or was compiled late.
On a CPU `--model tiny --prompts 8 --concurrency 4` tries this program out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import http.client
import importlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this file is in no package

from benchmarks import measure, serve
from benchmarks.models import MODELS, Model
from benchmarks.serve import Side

FIRST = {"prompt": 64, "max_tokens": 4}  # tokens of the first requests
AGAIN = 5
# Lengths are drawn evenly from this share around their means.
RANGE = 0.8
# What a server takes beside weights and KV cache.
BESIDE = 5 << 30
# Seconds that vLLM gives its processes to end, and so to write reports.
PATIENCE_S = 20
# In a server's log: vLLM's monitor complains of a compilation; the plugin gave up a kernel.
COMPLAINT, GIVEN_UP = "during inference", "raised; "
# Why a call was declined for want of a warm-up.
NOT_READY = "is not compiled yet"
# Key of vLLM's result -> (what the table calls it, unit, digits in the table).
MEASURES = {
    "output_throughput": ("output tokens/s", "tokens/s", 0),
    "total_token_throughput": ("tokens/s, prompts too", "tokens/s", 0),
    "mean_ttft_ms": ("mean time to first token, ms", "ms", 1),
    "median_ttft_ms": ("median time to first token, ms", "ms", 1),
    "p99_ttft_ms": ("99th percentile of it, ms", "ms", 1),
    "median_tpot_ms": ("median time per output token, ms", "ms", 2),
    "p99_tpot_ms": ("99th percentile of it, ms", "ms", 2),
    "median_itl_ms": ("median time between tokens, ms", "ms", 2),
    "p99_itl_ms": ("99th percentile of it, ms", "ms", 2),
}


# In the processes of a server


def install() -> None:
    """What vLLM must know before it starts: the format of our weights; on a CPU, its FlashAttention backend."""
    if not serve.has_gpu():
        sys.path.insert(0, str(measure.ROOT.parent / "tools"))
        importlib.import_module("flash_on_cpu").install()
    serve.register_loader()


def serve_forever(words: Sequence[str]) -> None:
    from vllm.entrypoints.cli.main import main as vllm

    install()
    sys.argv = ["vllm", "serve", *words]
    vllm()


# In the process that measures


def write_model(folder: Path, model: Model) -> None:
    """A configuration, and a tokenizer that has a word for each token: as many tokens as words, both ways.

    Apart, because transformers gives a folder with the configuration of a known model that model's kind of tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    serve.write_config(folder, model.config)
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(model.config["vocab_size"])}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tokenizer_of(folder))


def tokenizer_of(model: Path) -> Path:
    return model.with_name("tokenizer")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class ServerError(Exception):
    """A server did not start, or did not answer."""


class Server:
    """A process of `vllm serve`, and what it has been seen to do. As a context it is stopped at the end."""

    def __init__(self, side: Side, model: Path, out: Path, options: Sequence[str]) -> None:
        self.side, self.model, self.port = side, model, free_port()
        self.found: dict[str, Any] = {"runs": []}
        self._log, self._reports = out / f"{side.name}.log", out / f"{side.name}-reports"
        self._client_log = out / f"{side.name}-client.log"
        self._started = time.time()
        self._first_request = 0.0
        words = [str(model), "--tokenizer", str(tokenizer_of(model)), "--host", "127.0.0.1", "--port", str(self.port)]
        words += options
        words += ["--enforce-eager"] if side.mode == "eager" else []
        settings = serve.environment(side) | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_GEMS_REPORT": str(self._reports),
            "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": str(PATIENCE_S),
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps(words)]
        with self._log.open("w") as sink:
            self._process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env=settings, start_new_session=True
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its engine, too, if that outlived it
        self._process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _asked(
        self, method: str, path: str, body: str = "", wait_s: float = serve.LONGEST_S
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=wait_s)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def wait(self) -> None:
        """Until it answers; raises ServerError if it never does."""
        while time.time() < self._started + 2 * serve.LONGEST_S and self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._asked("GET", "/health", wait_s=5).status == http.HTTPStatus.OK:
                    self.found["startup_s"] = round(time.time() - self._started, 1)
                    print(f"{self.side.name}: ready after {self.found['startup_s']} s", flush=True)
                    return
            time.sleep(0.1)
        raise ServerError(f"{self.side.name} did not start; the end of its log:\n{self.log()[-4000:]}")

    def first_token_ms(self, number: int) -> float:
        """Of one streamed request; each number has another prompt."""
        prompt = " ".join(f"w{(17 * number + word) % 500}" for word in range(FIRST["prompt"]))
        asked = {
            "model": str(self.model), "prompt": prompt, "max_tokens": FIRST["max_tokens"], "stream": True,
            "ignore_eos": True, "temperature": 0.0,
        }  # fmt: skip
        self._first_request = self._first_request or time.time()
        begin = time.perf_counter()
        answer = self._asked("POST", "/v1/completions", json.dumps(asked))
        line = answer.readline()
        ms = 1e3 * (time.perf_counter() - begin)
        if answer.status != http.HTTPStatus.OK or not line.startswith(b"data:"):
            raise ServerError(
                f"{self.side.name} answered {answer.status} {line!r}; its log ends:\n{self.log()[-4000:]}"
            )
        answer.read()
        return round(ms, 2)

    def begin(self) -> None:
        """Its first requests."""
        first, *again = [self.first_token_ms(number) for number in range(1 + AGAIN)]
        self.found |= {"first_ttft_ms": first, "again_ttft_ms": again}
        print(f"{self.side.name}: first token of the first request after {first} ms, then {again}", flush=True)

    def run(self, prompts: int, concurrency: int, lengths: tuple[int, int], seed: int) -> None:
        """What vLLM's client measures."""
        with tempfile.TemporaryDirectory() as folder:
            words = [
                "--backend", "openai", "--host", "127.0.0.1", "--port", str(self.port), "--model", str(self.model),
                "--tokenizer", str(tokenizer_of(self.model)), "--random-range-ratio", str(RANGE),
                "--dataset-name", "random", "--seed", str(seed), "--random-input-len", str(lengths[0]),
                "--random-output-len", str(lengths[1]), "--num-prompts", str(prompts), "--max-concurrency",
                str(concurrency), "--temperature", "0.8", "--top-p", "0.95", "--percentile-metrics", "ttft,tpot,itl",
                "--metric-percentiles", "99", "--disable-tqdm", "--save-result", "--result-dir", folder,
                "--result-filename", "result.json",
            ]  # fmt: skip
            parser, client = benchmark_client()
            with self._client_log.open("a") as sink, contextlib.redirect_stdout(sink):
                client(parser.parse_args(words))
            result = json.loads((Path(folder) / "result.json").read_text())
        keys = ("completed", "failed", "duration", "total_input_tokens", "total_output_tokens", *MEASURES)
        self.found["runs"].append({key: result[key] for key in keys if key in result})
        print(f"{self.side.name}: {self.found['runs'][-1]}", flush=True)

    def interrupt(self) -> None:
        """Have it end as a user does."""
        self._process.send_signal(signal.SIGINT)

    def ended(self) -> None:
        """Wait until it has, and read what is left of it: its log, and what the plugin says."""
        try:
            self._process.wait(2 * PATIENCE_S)
        except subprocess.TimeoutExpired:
            print(f"{self.side.name} did not stop in {2 * PATIENCE_S} s", flush=True)
        for name, words in (("complaints", COMPLAINT), ("given_up", GIVEN_UP)):
            self.found[name] = sorted({line for line in self.log().splitlines() if words in line})[:20]
        if self.side.gems:
            try:
                self.found["report"] = self._report()
            except FileNotFoundError as error:
                self.found["given_up"].append(str(error))

    def _report(self) -> dict[str, Any]:
        from vllm_gems.nouns import State
        from vllm_gems.reports import Report

        whole = Report.read(self._reports)
        keys = ("patch", "state", "hits", "declined", "errors", "why")
        rows = [dataclasses.asdict(row) for row in whole.rows if row.state not in (State.OFF, State.WAITING)]
        after = max(0.0, whole.compiled.get("last", 0.0) - self._first_request)
        return {
            "rows": [{key: row[key] for key in keys} for row in rows],
            "compiled": {**whole.compiled, "after_first_request": after > 0},
            "problems": whole.problems(),
        }


@functools.cache
def benchmark_client() -> tuple[Any, Any]:
    """`vllm bench serve`: its parser and what it calls, imported once."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser, main


def options_of(args: argparse.Namespace, model: Model) -> tuple[list[str], int]:
    """What every server is told, and the bytes of its KV cache."""
    longest = int((1 + RANGE) * sum(args.lengths)) + 64
    cache = max(1 << 30, int(1.1 * model.cache_bytes(args.concurrency * (longest + 64), 2)))
    words = [
        "--dtype", "bfloat16", "--load-format", "seeded", "--seed", "0", "--max-model-len", str(longest),
        "--max-num-seqs", str(args.max_num_seqs), "--disable-uvicorn-access-log", "--shutdown-timeout", str(PATIENCE_S),
    ]  # fmt: skip
    if serve.has_gpu():
        # Room for what is run here; the fraction is only what must be free for it to start.
        words += ["--kv-cache-memory-bytes", str(cache), "--gpu-memory-utilization", "0.05"]
    elif model.latent:
        words += ["--attention-backend", "CPU_MLA"]
    else:
        words += ["--block-size", "16"]
    if args.attention and serve.has_gpu():
        words += ["--attention-backend", args.attention]
    if args.jit_monitor:
        words += ["--jit-monitor-mode", args.jit_monitor]
    return words, cache


def run_group(sides: Sequence[Side], folder: Path, out: Path, options: Sequence[str], args: Any) -> dict[str, Any]:
    """What was found of servers that start beside each other, by name."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(side, folder, out, options)) for side in sides]
        benchmark_client()  # imported while they start
        for server in servers:
            server.wait()
        for server in servers:
            server.begin()
        for turn in range(args.turns):
            for server in servers[::-1] if turn % 2 else servers:
                server.run(args.prompts, args.concurrency, args.lengths, seed=1 + turn)
        for server in servers:
            server.interrupt()
        for server in servers:
            server.ended()
    return {server.side.name: server.found for server in servers}


def problems_of(name: str, found: dict[str, Any]) -> list[str]:
    problems = []
    for run in found["runs"]:
        if run.get("failed"):
            problems.append(f"{name}: {run['failed']} of {run['failed'] + run['completed']} requests failed")
    problems += [f"{name}: {line}" for line in found["given_up"]]
    if report := found.get("report"):
        for row in report["rows"]:
            if row["errors"]:
                problems.append(f"{name}: {row['patch']} raised {row['errors']} times")
            problems += [f"{name}: {row['patch']} declined: {why}" for why in row["declined"] if NOT_READY in why]
        if report["compiled"].get("late"):
            problems.append(f"{name}: compiled after warm-up: {report['compiled']['late']}")
        elif report["compiled"]["after_first_request"] and serve.has_gpu():  # a CPU's worker does not warm up
            problems.append(f"{name}: a kernel was compiled after the first request")
    return problems


def rows_of(model: Model, modes: Sequence[str], found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Where both sides were measured."""
    rows = []
    for mode in modes:
        stock, ours = (side.name for side in serve.sides_of(mode))
        if stock not in found or ours not in found:
            continue
        sides = {"stock": found[stock], "ours": found[ours]}

        def row(measured: str, unit: str, digits: int, turns: dict[str, list[float]]) -> dict[str, Any]:
            return {
                "case": {"model": model.title, "mode": mode, "measured": measured},  # noqa: B023
                "unit": unit,
                "ours": statistics.median(turns["ours"]),
                "against": {"stock": statistics.median(turns["stock"])},
                "digits": digits,
                "turns": turns,
            }

        firsts = {side: [each["first_ttft_ms"]] for side, each in sides.items()}
        rows.append(row("time to first token of the first request, ms", "ms", 1, firsts))
        rows.append(row("of the next ones", "ms", 1, {side: each["again_ttft_ms"] for side, each in sides.items()}))
        for key, (name, unit, digits) in MEASURES.items():
            turns = {side: [round(run[key], 3) for run in each["runs"]] for side, each in sides.items()}
            rows.append(row(name, unit, digits, turns))
    return rows


def main() -> int:
    args = parse()
    if args.serve:
        serve_forever(json.loads(args.serve))
        return 0
    # Stopped by `timeout`, this ends like an exception, and takes the servers with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["HF_HUB_OFFLINE"] = "1"  # of the client
    serve.choose_sampler()
    model = MODELS[args.model].cut(args.layers, args.experts)
    options, cache = options_of(args, model)
    need = model.weight_bytes(2) + cache + BESIDE
    room = int(serve.OF_THE_MEMORY * serve.memory_bytes())
    pairs = [
        [side for side in serve.sides_of(mode, args.attention) if ("ours" if side.gems else "stock") in args.sides]
        for mode in args.modes
    ]
    if max(len(pair) for pair in pairs) * need > room:
        pairs = [[side] for pair in pairs for side in pair]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(folder, model)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        for group in serve.groups_of([len(pair) * need for pair in pairs], room):
            sides = list(itertools.chain.from_iterable(pairs[index] for index in group))
            print(f"beside each other: {', '.join(side.name for side in sides)}", flush=True)
            try:
                found |= run_group(sides, folder, args.out or Path(scratch), options, args)
            except ServerError as error:
                sys.exit(str(error))
    rows = rows_of(model, args.modes, found)
    for row in rows:
        case, stock = row["case"], row["against"]["stock"]
        print(f"{case['mode']}, {case['measured']}: {stock} without, {row['ours']} with, {row['ours'] / stock:.3f}")
    problems = [problem for name, each in found.items() for problem in problems_of(name, each)]
    for name, each in found.items():
        for complaint in each["complaints"]:
            print(f"{name}: {complaint}")
    more: dict[str, Any] = {
        "setting": {
            "prompts": args.prompts, "concurrency": args.concurrency, "mean_lengths": args.lengths, "range": RANGE,
            "turns": args.turns, "options": [word for word in options if not word.startswith(os.sep)],
            "first_request": FIRST, "weights": "random, the same for every server",
        },
        "servers": found,
        "problems": problems,
        "environment": measure.switches(),
    }  # fmt: skip
    if args.record:
        print(f"recorded {measure.record(args.record, rows, commit=args.commit, **more)}")
    if args.out:
        measure.record(args.record or "serving", rows, folder=args.out, commit=args.commit, **more)
    print("\n".join(problems) or "no problems")
    return 1 if problems else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--experts", type=int, help="cut the layers to this many routed experts")
    parser.add_argument("--attention", default="", help="vLLM's attention backend for both sides; default: its choice")
    parser.add_argument("--modes", type=serve.modes, default=["compiled"], help=f"of {', '.join(serve.MODES)}")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=["stock", "ours"])
    parser.add_argument("--prompts", type=int, default=256, help="requests of a run")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time")
    parser.add_argument("--lengths", type=serve.numbers, default=[256, 128], help="mean tokens of prompts, of outputs")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="requests that a server decodes together")
    parser.add_argument("--turns", type=int, default=2, help="runs of vLLM's client on each server")
    parser.add_argument(
        "--jit-monitor", choices=("warn", "error"), help="vLLM's --jit-monitor-mode; default: not passed"
    )
    parser.add_argument("--out", type=Path, help="a folder for logs and reports")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/<gpu>/NAME.json")
    parser.add_argument("--commit", default="", help="for the record, where there is no git")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
if __name__ == "__mp_main__":  # an engine's own process, where vLLM starts that anew
    install()
