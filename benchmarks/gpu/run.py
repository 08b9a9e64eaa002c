"""Everything that is measured on GPUs, in one run: our deployment, stock vLLM's connector, the host tier.

    python -m benchmarks.gpu.run --json FILE [--only ours safety stock tiers unequal] [--mps] [--quick]

By hand, on a host with one or two GPUs of 80 GB; never in CI. Where there are two, prefill is on one and decode on the
other, so `--mps` is for one; `unequal` needs two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu import ours, safety, stock, tiers, unequal
from benchmarks.report import machine


@contextmanager
def sharing(folder: Path, wanted: bool) -> Iterator[None]:
    """Processes started inside run their kernels side by side. MPS does not survive the death of one of them for sure.

    Without it a GPU gives its processes turns of some milliseconds.
    """
    if not wanted:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["CUDA_MPS_PIPE_DIRECTORY"] = os.environ["CUDA_MPS_LOG_DIRECTORY"] = str(folder)
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=True, timeout=60)
        del os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.environ["CUDA_MPS_LOG_DIRECTORY"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["ours", "safety", "stock"])
    parser.add_argument("--quick", action="store_true", help="few rounds of the shorter prompts")
    parser.add_argument("--mps", action="store_true", help="share the GPU by NVIDIA's MPS in our timings")
    parser.add_argument("--logs", type=Path, help="keep the deployment's folder here")
    chosen = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        stages: dict[str, Callable[[], dict[str, Any]]] = {
            "ours": lambda: ours.main(folder, chosen.quick),
            "safety": lambda: safety.main(folder),
            "stock": lambda: stock.main(folder, chosen.quick),
            "tiers": lambda: tiers.main(folder),
            "unequal": lambda: unequal.main(folder),
        }
        for name in chosen.only:
            try:
                with sharing(folder / "mps", chosen.mps and name == "ours"):
                    results[name] = stages[name]()
            except Exception:  # the other stages' results are worth keeping
                results[name] = {"failed": traceback.format_exc()}
                print(results[name]["failed"], flush=True)
            chosen.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
