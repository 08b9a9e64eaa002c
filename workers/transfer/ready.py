"""When blocks may be read: CUDA runs behind the CPU, so a planned step is not yet a computed one."""

from __future__ import annotations

import torch


class Ready:
    """A point in the engine's work after which the blocks it computed may be read."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    @property
    def passed(self) -> bool:
        return self._event is None or self._event.query()

    def before(self, stream: torch.cuda.Stream) -> None:
        """What is put on `stream` from now on happens after this point."""
        if self._event is not None:
            stream.wait_event(self._event)
