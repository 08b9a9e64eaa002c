"""Simulated engines on a model folder that has no weights."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from dynamo_lite.config import Config, EtcdAddress, NatsAddress, ProcessSpec
from dynamo_lite.plane.wire import Incarnation, Role
from workers.sim_engine import SimEngine

VOCAB = 500
FAST = {"prefill_ms_per_token": 0, "decode_step_ms": 0, "transfer_ms_per_block": 0, "kv_blocks": 64}

MakeEngine = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": [2, 3], "bos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[MakeEngine]:
    """`await engine(role, kv_blocks=…)`: a started engine; keywords are `sim` settings. Closed after the test."""
    async with AsyncExitStack() as stack:
        number = 0

        async def make(role: Role = Role.DECODE, **sim: object) -> SimEngine:
            nonlocal number
            number += 1
            config = Config.model_validate({"engine": "sim", "model": "tiny", "sim": FAST | sim})
            spec = ProcessSpec(
                config=config,
                role=role.value,
                name=f"{role.value}-{number}",
                model_path=model,
                nats=NatsAddress(url="nats://unused:1"),
                etcd=EtcdAddress(endpoints=("http://unused:1",)),
                state_dir=model,
            )
            made = SimEngine(spec, role, Incarnation(f"engine{number}"), CollectorRegistry())
            made.prepare()
            await made.start()
            stack.push_async_callback(made.close)
            return made

        yield make
