"""A process that writes blocks to an object tier, one batch after another, until it is killed."""

from __future__ import annotations

import asyncio
import sys

from dynamo_lite.config import ObjectTier
from kvbm.tiers.record import Records
from tests.object_tier import SLOTS, Worker
from workers.tiers.objects import object_blobs

RECORDS = Records(2**20, 7)


async def write(settings: ObjectTier, namespace: bytes) -> None:
    """A line a batch, once it is stored."""
    worker = Worker(lambda memory, records: object_blobs(settings, memory, records), namespace, RECORDS)
    await worker.tier.open()
    number = 0
    while True:
        await worker.write(range(number, number + SLOTS))
        print(number, flush=True)
        number += SLOTS


if __name__ == "__main__":
    asyncio.run(write(ObjectTier.model_validate_json(sys.argv[1]), bytes.fromhex(sys.argv[2])))
