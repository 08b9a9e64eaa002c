"""Where a worker's blocks belong in tiers that outlive it or that others use: under what their meaning depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynamo_lite.plane.wire import Fingerprint

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each file with weights


@dataclass(frozen=True, slots=True)
class Place:
    """One worker, and the namespace of its blocks."""

    deployment: str  # the configuration's namespace
    worker: str  # e.g. "decode-0"
    namespace: bytes  # 32 bytes: equal for workers that may use each other's blocks, as they are
    description: bytes  # JSON, of what the namespace stands for

    @property
    def short(self) -> int:
        """64 bits of the namespace."""
        return int.from_bytes(self.namespace[:8], "big")


def place_of(deployment: str, worker: str, fingerprint: Fingerprint, model: Path) -> Place:
    """`model`: the folder it was loaded from. Raises OSError."""
    named = {
        "model": fingerprint.model,
        "revision": fingerprint.revision,
        "weights": weights_digest(model),
        "device": fingerprint.device,
        "layout": msgspec.to_builtins(fingerprint.layout),
    }
    description = json.dumps(named, sort_keys=True, indent=1).encode()
    return Place(deployment, worker, hashlib.sha256(description).digest(), description)


def weights_digest(model: Path) -> str:
    """Tells one set of weights from another: by the configuration, the files' names and sizes, and samples of them.

    A name and a revision do not: a folder may be trained further, and keep both. To read all would take minutes.
    """
    digest = hashlib.sha256()
    for file in _files(model):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            if file.suffix == ".json":
                digest.update(content.read())
                continue
            for number in range(_SAMPLES):
                content.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _files(model: Path) -> Iterable[Path]:
    yield from sorted(model.glob("config.json"))
    for pattern in _WEIGHTS:
        yield from sorted(model.glob(pattern))
