"""Settings of every test."""

from __future__ import annotations

from hypothesis import settings

# Time limits are pytest's: on a busy machine a single example may take long.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
