"""Entry of every child process: `python -m dynamo_lite.process SPEC.json`. The supervisor starts it so."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from dynamo_lite.config import ProcessSpec
from dynamo_lite.status import Status

# By name, since dynamo_lite must not import workers, and a frontend must not import an engine.
ENTRIES = {"frontend": "dynamo_lite.frontend.app"}
WORKER_ENTRY = "workers.worker"


def main(arguments: list[str]) -> None:
    (file,) = arguments
    spec = ProcessSpec.model_validate_json(Path(file).read_bytes())
    try:
        entry = importlib.import_module(ENTRIES.get(spec.role, WORKER_ENTRY))
    except Exception as error:  # whatever a library's import raises must reach the user as one sentence
        traceback.print_exc()
        Status().phase("failed", f"cannot be loaded: {error}")
        sys.exit(1)
    entry.run(spec)


if __name__ == "__main__":
    main(sys.argv[1:])
