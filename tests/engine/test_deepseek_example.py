"""DeepSeek's example, on the tiny model that it falls back to without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engine_runs import LIMIT_S, ROOT, environment


def test_it_decodes_with_and_without_the_patches_and_is_content(tmp_path: Path) -> None:
    script = ROOT / "examples" / "deepseek.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--max-tokens", "3"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: 9 tokens with the patches, and the same tokens without" in done.stdout
    assert "mla.decode_step" in done.stdout
