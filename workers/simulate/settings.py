"""What one simulation is of: a configuration, with another routing policy or other workers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from dynamo_lite.config import Config, Router, WorkerGroup, Workers
from dynamo_lite.errors import ConfigError

POLICIES: tuple[str, ...] = get_args(Router.model_fields["mode"].annotation)

_SPLIT = re.compile(r"(?:(\d+):)?(\d+)")


@dataclass(frozen=True, slots=True)
class Split:
    """How many workers of which role."""

    prefill: int = 0
    decode: int = 0
    both: int = 0

    @classmethod
    def parse(cls, text: str) -> Split:
        """`8`: so many aggregated workers; `2:6`: so many for prefill and for decode. Raises ConfigError."""
        found = _SPLIT.fullmatch(text.strip())
        prefill, decode = (int(number or 0) for number in found.groups()) if found else (0, 0)
        if not decode:
            raise ConfigError("write 8 for aggregated workers, 2:6 for prefill and decode", file=f"--split {text}")
        return cls(prefill, decode) if prefill else cls(both=decode)

    @classmethod
    def of(cls, workers: Workers) -> Split:
        counts = {name: group.count for name in ("prefill", "decode", "both") if (group := getattr(workers, name))}
        return cls(**counts)

    def __str__(self) -> str:
        apart = f"{self.prefill}:{self.decode}" if self.prefill or self.decode else ""
        return "+".join(filter(None, (apart, str(self.both) if self.both else "")))

    def workers(self, given: Workers) -> Workers:
        """So many, each as its role is configured; a role that is not, as another one."""
        model = given.decode or given.both or given.prefill or WorkerGroup()
        counts = {"prefill": self.prefill, "decode": self.decode, "both": self.both}
        groups = {
            name: (getattr(given, name) or model).model_copy(update={"count": count})
            for name, count in counts.items()
            if count
        }
        return Workers(**groups)


def gpus(workers: Workers) -> int:
    groups = (workers.prefill, workers.decode, workers.both)
    return sum(group.count * group.tensor_parallel for group in groups if group is not None)


def variant(config: Config, policy: str, split: Split) -> Config:
    """The same deployment, with that policy and these workers."""
    router = Router.model_validate(config.router.model_dump() | {"mode": policy})
    return config.model_copy(update={"router": router, "workers": split.workers(config.workers)})


def in_blocks(config: Config, block: int) -> Config:
    """The same deployment, with KV blocks of that many tokens: as much memory, and as long for each token.

    Raises ConfigError where fewer than two blocks of a worker's memory would be left.
    """
    sim = config.sim
    present = config.block_size or sim.block_size
    blocks, factor = sim.kv_blocks * present // block, block / present
    if blocks < 2:
        raise ConfigError(
            f"{sim.kv_blocks} blocks of {present} tokens do not hold two of the trace's, of {block}",
            key="sim.kv_blocks",
        )
    paces = ("transfer_ms_per_block", "host_ms_per_block", "disk_ms_per_block", "object_ms_per_block")
    update: dict[str, object] = {name: getattr(sim, name) * factor for name in paces}
    update |= {"block_size": block, "kv_blocks": blocks}
    return config.model_copy(update={"block_size": None, "sim": sim.model_copy(update=update)})
