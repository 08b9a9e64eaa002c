"""What one request reads from the tiers, and who still reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dynamo_lite.telemetry import AttributeValue, record_span
from kvbm.events import Tier
from kvbm.policy import Forecast
from kvbm.tiers.slots import Stored
from workers.connector.protocol import ONBOARD, REQUEST_ID, Onboarded

SPAN = "kv.onboard"


@dataclass(slots=True)
class Onboarding:
    """What one request is to read from the tiers."""

    request_id: str
    first: int  # index in the prompt of the first block
    blocks: list[Stored]
    tiers: dict[Tier, int]  # how many of them were found where
    forecast: Forecast
    traceparent: str
    check_s: float = 0.0  # what proving that they are right took, waiting for tiers beneath included
    ends: dict[int, Onboarded] = field(default_factory=dict)  # by rank
    waited: bool = False  # for a tier beneath host memory
    over: bool = False  # the ranks were told that nobody wants it

    @property
    def end(self) -> int:
        """Index in the prompt of the block after the last."""
        return self.first + len(self.blocks)

    @property
    def slots(self) -> list[int]:
        return [block.slot for block in self.blocks]

    @property
    def params(self) -> dict[str, Any]:
        """What the engine's connectors are to know of it."""
        return {REQUEST_ID: self.request_id, ONBOARD: (self.first, self.slots)}

    def record(self) -> tuple[int, int, float]:
        """The span, once every rank has ended. Returns blocks and bytes on the device now, and the seconds it took."""
        ends = list(self.ends.values())
        blocks, size = min(end.blocks for end in ends), sum(end.bytes for end in ends)
        started, ended = min(end.started_ns for end in ends), max(end.ended_ns for end in ends)
        seconds = self.check_s + (ended - started) / 1e9
        if self.traceparent and blocks:
            attributes = attributes_of(self.tiers, self.forecast) | {
                "blocks": blocks,
                "bytes": size,
                "seconds": seconds,
                "cause": next((end.cause for end in ends if end.cause), ""),
            }
            record_span(SPAN, self.traceparent, started, ended, attributes)
        return blocks, size, seconds


def attributes_of(tiers: dict[Tier, int], forecast: Forecast) -> dict[str, AttributeValue]:
    """Where the blocks were found, and what was predicted."""
    attributes: dict[str, AttributeValue] = {"tier": ",".join(tier.value for tier in tiers)}
    for tier, count in tiers.items():
        attributes[f"{tier.value}_blocks"] = count
    if forecast.onboard_s is not None:
        attributes["predicted_onboard_s"] = forecast.onboard_s
    if forecast.compute_s is not None:
        attributes["predicted_compute_s"] = forecast.compute_s
    return attributes
