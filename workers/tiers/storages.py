"""The tiers beneath host memory, as the configuration has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from dynamo_lite import config
from kvbm.manager import BlockManager
from kvbm.policy import OnboardCost
from kvbm.storage import Storage, StoragePolicy
from kvbm.tiers.base import StorageTier
from kvbm.tiers.disk import DiskSettings, DiskTier
from kvbm.tiers.host import HostMemory, HostRecords
from kvbm.tiers.object import ObjectTier
from workers.tiers import metrics
from workers.tiers.files import TierFiles
from workers.tiers.objects import object_blobs
from workers.tiers.place import Place


def storages_of(
    settings: config.KvTiers, place: Place, memory: HostMemory, records: HostRecords, manager: BlockManager,
    cost: OnboardCost, changed: Callable[[], None],
) -> list[Storage]:  # fmt: skip
    """Nearest first. Nothing is opened or contacted. Raises TierRefused."""
    found = []
    for chosen, tier, release in _tiers(settings, place, memory, records):
        policy, observe = _policy(chosen, manager.slots), partial(metrics.observe, tier.tier)
        found.append(Storage(tier, policy, manager, records, cost, changed, observe, release))
    return found


def _tiers(
    settings: config.KvTiers, place: Place, memory: HostMemory, records: HostRecords
) -> Iterator[tuple[config.StorageTier, StorageTier, Callable[[], None]]]:
    """With what is to be called once the tier is closed; that may wait for a second."""
    layout = records.layout
    if settings.disk is not None:
        timeout_s = settings.disk.timeout_ms / 1000
        files = TierFiles(memory, layout.stride, timeout_s)
        folder = settings.disk.path / place.deployment / place.worker
        disk = DiskSettings(
            folder, settings.disk.size, layout.stride, place.namespace, settings.disk.eviction, timeout_s
        )
        yield settings.disk, DiskTier(disk, files.open), files.close
    if settings.object is not None:
        blobs = object_blobs(settings.object, memory, layout)
        objects = ObjectTier(blobs, layout, place.namespace, place.description, settings.object.refresh_s)
        yield settings.object, objects, lambda: None


def _policy(settings: config.StorageTier, slots: int) -> StoragePolicy:
    """`slots`: of host memory."""
    return StoragePolicy(
        flush_interval_s=settings.flush_interval_ms / 1000,
        watermark=max(1, int(settings.watermark * slots)),
        second_use=settings.admission == "second_use",
        timeout_s=settings.timeout_ms / 1000,
    )
