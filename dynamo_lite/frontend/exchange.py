"""One HTTP request and its reply, on raw ASGI."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, NoReturn

from dynamo_lite.errors import BodyTooLarge, DynamoError
from dynamo_lite.frontend.answer import error_body, error_event

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"
RETRY_AFTER_S = b"2"
LAST_WORDS_S = 5.0  # a client that does not read may hold up its error message for this long
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class ClientGone(Exception):  # an event, not a fault
    """The client closed the connection before its reply was complete."""


class Exchange:
    """Reads the body once, then writes one reply: whole (`reply`) or in parts (`write`, then `end`)."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._streaming = False
        self._complete = False
        self.status = 0  # of the reply, once it has begun
        given = self.header(b"x-request-id")
        self.request_id = given if given and REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        self.late_headers: Callable[[], Iterable[tuple[bytes, bytes]]] = tuple  # asked for when the reply begins
        self.extra_headers: list[tuple[bytes, bytes]] = [(b"x-request-id", self.request_id.encode())]

    def header(self, name: bytes) -> str:
        return self._headers.get(name, b"").decode("latin-1")

    async def body(self, limit: int) -> bytearray:
        """Raises BodyTooLarge as soon as that is known, ClientGone when the client leaves before the end."""
        declared = self.header(b"content-length")
        if declared.isdecimal() and int(declared) > limit:
            raise BodyTooLarge(limit)
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > limit:
                raise BodyTooLarge(limit)
            if not message.get("more_body", False):
                return body

    async def gone(self) -> NoReturn:
        """Watches the connection after the body was read; raises ClientGone."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                if self._complete:  # the server reports the end of every reply like this
                    await asyncio.Event().wait()
                raise ClientGone

    async def reply(self, status: int, body: bytes) -> None:
        await self._start(status, [(b"content-type", JSON), (b"content-length", b"%d" % len(body))])
        await self._finish(body)

    async def write(self, events: bytes) -> None:
        """Part of a stream of events; the first call sends the head."""
        if not self._streaming:
            self._streaming = True
            # The last header keeps nginx from collecting events before it passes them on.
            await self._start(
                200, [(b"content-type", EVENTS), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            )
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self, events: bytes) -> None:
        if not self._streaming:
            await self.write(b"")
        await self._finish(events)

    async def fail(self, error: DynamoError) -> None:
        """As a status where none was sent yet, else as the last event."""
        if self._complete:
            return
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                if self.status:
                    await self._finish(error_event(error) if self._streaming else b"")
                else:
                    if error.status == 503:
                        self.extra_headers.append((b"retry-after", RETRY_AFTER_S))
                    await self.reply(error.status, error_body(error))
        except TimeoutError:
            raise ClientGone from None

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers = [*headers, *self.extra_headers, *self.late_headers()]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _finish(self, body: bytes) -> None:
        self._complete = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
