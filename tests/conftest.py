"""Settings of every test."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("UCX_MODULES", "^efa")  # as workers have it: see dynamo_lite/transfer_plan.py

# Time limits are pytest's: on a busy machine a single example may take long.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
