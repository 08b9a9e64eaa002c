"""What simulated engines are made from in tests: a model folder without weights, and quick paces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dynamo_lite.config import Config, EtcdAddress, NatsAddress, ProcessSpec
from dynamo_lite.plane.wire import Role

VOCAB = 500
FAST = {"prefill_ms_per_token": 0, "decode_step_ms": 0, "transfer_ms_per_block": 0, "kv_blocks": 64}
# In a tier a block of the model below, of 16 tokens, takes two pages: one for its bytes, one for what names it.
STRIDE = 8192


def write_model(folder: Path) -> Path:
    """A model of one layer and one head of 64."""
    config = {"vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": [2, 3], "bos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sim_spec(
    model: Path, name: str, role: Role, sim: Mapping[str, object], kv_tiers: Mapping[str, object] | None = None
) -> ProcessSpec:
    config = Config.model_validate(
        {"engine": "sim", "model": "tiny", "sim": {**FAST, **sim}, "kv_tiers": kv_tiers or {}}
    )
    return ProcessSpec(
        config=config,
        role=role.value,
        name=name,
        model_path=model,
        nats=NatsAddress(url="nats://unused:1"),
        etcd=EtcdAddress(endpoints=("http://unused:1",)),
        state_dir=model,
    )
