"""Entry of every child process: `python -m dynamo_lite.process SPEC.json`. The supervisor starts it so."""

from __future__ import annotations

import gc
import importlib
import sys
import traceback
from pathlib import Path

from dynamo_lite.config import ProcessSpec
from dynamo_lite.status import Status

# By name, since dynamo_lite must not import workers, and a frontend must not import an engine.
ENTRIES = {"frontend": "dynamo_lite.frontend.app"}
WORKER_ENTRY = "workers.worker"


# Nearly all that a request makes is freed when the last reference goes. Looking for cycles after every 700 new objects
# took 5 % of a frontend's time.
GC_THRESHOLDS = (20_000, 20, 50)


def main(arguments: list[str]) -> None:
    (file,) = arguments
    spec = ProcessSpec.model_validate_json(Path(file).read_bytes())
    gc.disable()
    try:
        entry = importlib.import_module(ENTRIES.get(spec.role, WORKER_ENTRY))
    except Exception as error:  # whatever a library's import raises must reach the user as one sentence
        traceback.print_exc()
        Status().phase("failed", f"cannot be loaded: {error}")
        sys.exit(1)
    gc.freeze()  # modules stay, so that no collection need look at them
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()
    entry.run(spec)


if __name__ == "__main__":
    main(sys.argv[1:])
