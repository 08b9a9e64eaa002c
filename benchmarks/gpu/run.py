"""Everything that is measured on one GPU, in one run: our deployment, stock vLLM's connector, the raw transfer.

    python -m benchmarks.gpu.run --json FILE [--only ours stock] [--quick] [--verify]

By hand, on a host with one GPU of 80 GB; never in CI.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import ours, stock
from benchmarks.report import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["ours", "stock"])
    parser.add_argument("--quick", action="store_true", help="few rounds of the shorter prompts")
    parser.add_argument("--verify", action="store_true", help="checksum every piece, end to end")
    parser.add_argument("--logs", type=Path, help="keep the deployment's folder here")
    chosen = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        stages: dict[str, Callable[[], dict[str, Any]]] = {
            "ours": lambda: ours.main(folder, chosen.quick, chosen.verify),
            "stock": lambda: stock.main(folder, chosen.quick),
        }
        for name in chosen.only:
            try:
                results[name] = stages[name]()
            except Exception:  # the other stages' results are worth keeping
                results[name] = {"failed": traceback.format_exc()}
                print(results[name]["failed"], flush=True)
            chosen.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
