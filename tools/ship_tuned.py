"""What `vllm-gems pretune` measured here, as files that are shipped.

    python tools/ship_tuned.py --gpu "NVIDIA H100 80GB HBM3"

Reads the user's results (`VLLM_GEMS_TUNED`, else the cache folder) for the GPU of this name, on any machine, and writes
`vllm_gems/tuned/<gpu>/<kernel>.json` for each kernel that has any. What is shipped already stays, if it was measured
with the same versions and kernel.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from vllm_gems import tuned
from vllm_gems.tuning.search import Tunable, tunables

SHIPPED = pathlib.Path(tuned.__file__).with_suffix("")


def shipped(tunable: Tunable, gpu: str, before: dict[str, Any]) -> dict[str, Any]:
    """The file's content, `before` being the present one, {} if there is none.

    Raises ValueError if there are no results for the kernel as it is now, or some of several versions.
    """
    source = tunable.source()
    found = [entry for entry in tuned.entries(tunable.kernel, gpu) if entry and entry["source"] == source]
    versions = {json.dumps(entry["versions"]) for entry in found}
    if not found:
        raise ValueError(f"{tuned.folder_of(tunable.kernel, gpu)} has no results for this kernel's source")
    if len(versions) > 1:
        raise ValueError(f"results of several versions, one of which can be shipped: {', '.join(sorted(versions))}")
    head = {"gpu": gpu, "versions": found[0]["versions"], "source": source}
    kept = before["configurations"] if before.items() >= head.items() else {}
    return {**head, "configurations": {**kept, **{entry["key"]: entry["configuration"] for entry in found}}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, help="its full name, as PyTorch says it")
    args = parser.parse_args()
    measured = [tunable for tunable in tunables() if any(tuned.entries(tunable.kernel, args.gpu))]
    if not measured:
        print(f"{args.gpu}: nothing was measured", file=sys.stderr)
        return 1
    for tunable in measured:
        path = SHIPPED / tuned.gpu_slug(args.gpu) / f"{tunable.kernel}.json"
        try:
            content = shipped(tunable, args.gpu, json.loads(path.read_text()) if path.is_file() else {})
        except ValueError as error:
            print(f"{tunable.kernel}: {error}", file=sys.stderr)
            return 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{path}: {len(content['configurations'])} configurations")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
