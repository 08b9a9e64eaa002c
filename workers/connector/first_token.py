"""First tokens chosen by prefill workers: clients have them before the KV is here, and vLLM is to go on from them."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from workers.connector.protocol import FirstToken

if TYPE_CHECKING:
    from vllm.v1.request import Request

_log = logging.getLogger(__name__)
# The ranks end a receive only after they were told, and the scheduler is told before them: it is a matter of threads.
_PATIENCE_S = 2.0


class FirstTokens:
    """Those of one engine's requests, by our request ids. Thread-safe."""

    def __init__(self) -> None:
        self._tokens: dict[str, FirstToken | None] = {}  # None: not told yet
        self._changed = threading.Condition()

    def expect(self, request_id: str) -> None:
        with self._changed:
            self._tokens[request_id] = None

    def told(self, told: FirstToken) -> None:
        """Of a request that is not expected (any more), it is of no use."""
        with self._changed:
            if told.request_id in self._tokens:
                self._tokens[told.request_id] = told
                self._changed.notify_all()

    def take(self, request_id: str) -> int | None:
        """None where there is no such token."""
        with self._changed:
            if request_id not in self._tokens:
                return None
            if not self._changed.wait_for(lambda: self._tokens[request_id] is not None, _PATIENCE_S):
                _log.error("%s: its receive ended before its first token was known", request_id)
            told = self._tokens.pop(request_id)
        return None if told is None else told.token_id

    def forget(self, request_id: str) -> None:
        with self._changed:
            self._tokens.pop(request_id, None)


def go_on_with(request: Request, token_id: int) -> None:
    """Make the first token the prompt's last: vLLM computes it, and chooses the second."""
    request.prompt_token_ids.append(token_id)
    request._all_token_ids.append(token_id)
    request.num_prompt_tokens += 1
    request.max_tokens -= 1
    if request.sampling_params.min_tokens:
        request.sampling_params.min_tokens -= 1
    request.update_block_hashes()
