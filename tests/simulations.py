"""What simulations are made from in tests: small blocks, paces that are easily added up, requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamo_lite.config import Config
from workers.simulate.figures import Figures, Slo
from workers.simulate.fleet import Load, simulate
from workers.simulate.trace import Request

BLOCK = 4  # tokens
PACES = {"prefill_ms_per_token": 10.0, "decode_step_ms": 5.0, "transfer_ms_per_block": 2.0}
KV_BYTES = 256  # of a token
SLO = Slo(0.1, 0.02)


def config(
    workers: Mapping[str, int],
    sim: Mapping[str, object] | None = None,
    router: Mapping[str, object] | None = None,
    **more: object,
) -> Config:
    """`workers`: how many of each role."""
    return Config.model_validate(
        {
            "engine": "sim",
            "model": "tiny",
            "workers": {role: {"count": count} for role, count in workers.items()},
            "sim": {"block_size": BLOCK, "kv_blocks": 64, **PACES, **(sim or {})},
            "router": {"remote_prefill": "always", **(router or {})},
            "kv_transfer": {"min_remote_tokens": 1},
            **more,
        }
    )


def request(at_s: float, ids: Sequence[int], answer: int = 3, cut: int = 0) -> Request:
    """`cut`: tokens that its last block lacks."""
    return Request(at_s, len(ids) * BLOCK - cut, answer, tuple(ids))


def run(settings: Config, requests: Sequence[Request], speed: float = 1.0) -> Figures:
    return simulate(settings, KV_BYTES, Load(requests, BLOCK, SLO, speed))
