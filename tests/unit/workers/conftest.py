"""Simulated engines on a model folder that has no weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from dynamo_lite.plane.wire import Incarnation, Role
from tests.sim_engines import sim_spec, write_model
from workers.sim_engine import SimEngine

MakeEngine = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[MakeEngine]:
    """`await engine(role, kv_blocks=…)`: a started engine; keywords are `sim` settings. Closed after the test."""
    async with AsyncExitStack() as stack:
        number = 0

        async def make(role: Role = Role.DECODE, **sim: object) -> SimEngine:
            nonlocal number
            number += 1
            spec = sim_spec(model, f"{role.value}-{number}", role, sim)
            made = SimEngine(spec, role, Incarnation(f"engine{number}"), CollectorRegistry())
            made.prepare()
            await made.start()
            stack.push_async_callback(made.close)
            return made

        yield make
