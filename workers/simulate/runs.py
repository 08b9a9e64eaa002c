"""Several simulations of one load: every policy with every split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from dynamo_lite.config import Config
from dynamo_lite.errors import ConfigError
from workers.simulate.figures import Figures
from workers.simulate.fleet import Load, simulate
from workers.simulate.settings import Split, gpus, in_blocks, variant


@dataclass(frozen=True, slots=True)
class Run:
    """One of them."""

    policy: str
    split: str
    gpus: int
    figures: Figures
    cpu_s: float  # what simulating it took

    @property
    def name(self) -> str:
        return f"{self.policy} {self.split}"

    @property
    def times_real(self) -> float:
        """Seconds simulated in each second of one core."""
        return self.figures.duration_s / max(self.cpu_s, 1e-9)

    def data(self) -> dict[str, Any]:
        """For JSON. All but `timing` is the same whenever the same is simulated."""
        return {
            "policy": self.policy, "split": self.split, "gpus": self.gpus, **asdict(self.figures),
            "timing": {"cpu_s": self.cpu_s, "times_real_time": self.times_real},
        }  # fmt: skip


def runs(
    config: Config, kv_bytes: int, load: Load, variants: Sequence[tuple[str, Split]], told: Callable[[int], None]
) -> Iterator[Run]:
    """One after another. `told`: how many requests have been simulated, of all runs together. Raises ConfigError."""
    whole = in_blocks(config, load.block)
    for number, (policy, split) in enumerate(variants):
        one, before = variant(whole, policy, split), number * len(load.requests)
        begun = time.process_time()
        figures = simulate(one, kv_bytes, load, lambda count, before=before: told(before + count))  # type: ignore[misc]
        cpu_s = time.process_time() - begun
        if not figures.requests:
            raise ConfigError(
                "every request of the trace is longer than what one worker has room for", key="sim.kv_blocks"
            )
        yield Run(policy, str(split), gpus(one.workers), figures, cpu_s)


def variants(policies: Sequence[str], splits: Sequence[Split]) -> list[tuple[str, Split]]:
    return list(dict.fromkeys(product(policies, splits)))
