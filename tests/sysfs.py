"""A made-up /sys/class/infiniband."""

from __future__ import annotations

from pathlib import Path


def add_port(
    sysfs: Path, device: str, *, port: int = 1, link_layer: str = "InfiniBand", state: str = "4: ACTIVE"
) -> None:
    folder = sysfs / device / "ports" / str(port)
    folder.mkdir(parents=True)
    (folder / "link_layer").write_text(f"{link_layer}\n")
    (folder / "state").write_text(f"{state}\n")
