"""The message bus: NATS. The only file that imports nats.

Handlers run inline, in the very call that parsed the message off the socket: no queue, no task, no extra turn
of the event loop between a token's arrival and its handler. So a handler must not block and cannot await.

A reply that is an error, or one part of a long reply, says so in a header; all other messages have none.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn

from dynamo_lite.config import NatsAddress
from dynamo_lite.errors import DeadlineExceeded, DynamoError, NoResponders, PlaneError, ProtocolMismatch
from dynamo_lite.plane.wire import Empty, WireError, decode, encode
from dynamo_lite.tasks import background

# nats-py imports aiohttp where it finds it, for web sockets, which are not used here: 0.15 s of every process's start.
_found = sys.modules.setdefault("aiohttp", None)  # type: ignore[arg-type]  # how one says that there is none
try:
    from nats.aio.client import Client
    from nats.errors import Error as NatsError
finally:
    if _found is None:
        del sys.modules["aiohttp"]

CONNECT_DEADLINE_S = 10.0
RECONNECT_WAIT_S = 0.2
SETTLE_S = 1.0  # after a reconnect the other processes may need this long to be back too
PART_BYTES = 512 * 1024  # of a long reply; small enough not to hold up token deltas behind it
_ERROR, _PART = "Dl-Error", "Dl-Part"
_PING = encode(Empty())

log = logging.getLogger(__name__)


class Message:
    """A received message. `no_responders`: the server says that nobody listens to what was published."""

    __slots__ = ("_headers", "data", "reply", "subject")

    def __init__(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> None:
        self.subject, self.data, self.reply, self._headers = subject, data, reply, headers

    @property
    def no_responders(self) -> bool:
        return self._headers is not None and self._headers.get("Status") == "503"

    def header(self, name: str) -> str | None:
        return None if self._headers is None else self._headers.get(name)


Handler = Callable[[Message], None]
Answer = asyncio.Future[bytes]
Watch = Callable[[Answer], Awaitable[None]]


class _Inline:
    """Stands in for the future that nats-py resolves with a message: calling the handler there is inline."""

    __slots__ = ("handler",)

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def cancelled(self) -> bool:
        return False

    def set_result(self, message: Any) -> None:
        try:
            self.handler(Message(message.subject, message.data, message.reply, message.headers))
        except Exception as error:  # raised further it would end nats-py's reading loop
            context = {"message": f"handler of {message.subject} failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)


class Subscription:
    """Interest in a subject until `close()`."""

    def __init__(self, bus: Bus, subject: str, handler: Handler) -> None:
        self.subject, self.handler = subject, handler
        self._bus = bus
        self.raw: Any = None  # nats-py's, of the present connection

    async def close(self) -> None:
        """No message is handled after this returns. Closing twice is harmless."""
        await self._bus._unsubscribe(self)


class Bus:
    """One connection to NATS. Open it with `Bus.connect`."""

    def __init__(self, address: NatsAddress, name: str) -> None:
        self._address, self._name = address, name
        self._client: Any = None
        self._closed = asyncio.Event()  # nats-py gave this connection up
        self._subscriptions: dict[Subscription, None] = {}  # in order: the inbox, which attaching needs, is first
        self._inbox = f"_INBOX.{uuid.uuid4().hex}"
        self._tokens = itertools.count()
        self._waiting: dict[str, Handler] = {}  # by the last token of the inbox subject
        self._settled_at = float("-inf")
        self._ending = False
        self.reconnects = 0

    @classmethod
    @asynccontextmanager
    async def connect(cls, address: NatsAddress, name: str) -> AsyncIterator[Bus]:
        """A connected bus that reconnects for ever. PlaneError when the first connection fails."""
        bus = cls(address, name)
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await bus._open()
        except TimeoutError:
            raise PlaneError(f"NATS at {address.url} does not answer") from None
        try:
            await bus.subscribe(f"{bus._inbox}.*", bus._dispatch)
            async with background(bus._reopen()):
                yield bus
        finally:
            bus._ending = True
            await bus._client.close()

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def settling(self) -> bool:
        """Just reconnected, or not connected: "no responders" may mean a peer that is not back yet."""
        return asyncio.get_running_loop().time() < self._settled_at

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Send and forget. While disconnected up to 2 MiB wait for the connection; more is a PlaneError."""
        try:
            await self._client.publish(subject, data, reply)
        except NatsError as error:
            raise PlaneError(f"cannot publish on {subject}: {error}") from error

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """`handler` is called inline, in order of arrival; wildcards allowed."""
        subscription = Subscription(self, subject, handler)
        self._subscriptions[subscription] = None
        await self._attach(subscription)
        return subscription

    async def serve(
        self, subject: str, handler: Callable[[bytes], Awaitable[bytes]], group: asyncio.TaskGroup
    ) -> Subscription:
        """Answer requests, each in a task of `group`.

        A DynamoError becomes the caller's error. Any other exception is a bug: the caller gets an internal
        error and the exception goes on to `group`.
        """

        def start(message: Message) -> None:
            if not message.reply:
                log.warning("a request without a reply subject on %s", message.subject)
                return
            answer = self._answer(message, handler)
            try:
                group.create_task(answer)
            except RuntimeError:  # the group is ending; the caller runs into its deadline or sees us vanish
                answer.close()

        return await self.subscribe(subject, start)

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """One request, one reply. NoResponders, DeadlineExceeded, or the error the other side raised."""
        return await self._ask(subject, data, timeout_s)

    async def call(
        self,
        subject: str,
        data: bytes,
        *,
        timeout_s: float,
        probe: str,
        silence_s: float,
        interval_s: float = 0.2,
    ) -> bytes:
        """Like request, for answers that may take long: meanwhile the peer is pinged on `probe`.

        NoResponders at once when the peer is gone; DeadlineExceeded when no pong came for `silence_s` or when
        the connection was lost and the answer, possibly lost with it, is not here `silence_s` later.
        """

        async def probing(answer: Answer) -> None:
            await self._probe(answer, probe, silence_s, interval_s)

        return await self._ask(subject, data, timeout_s, probing)

    async def watch_alive(
        self, probe: str, *, pong: Callable[[bytes], None], check: Callable[[float], None], interval_s: float = 0.1
    ) -> NoReturn:
        """Ping `probe` until the peer is gone (NoResponders), or until `check` raises.

        `pong` is given each answer. `check` is called after every ping, with the seconds that it comes too late: those
        were this loop's own doing, and not the peer's silence.
        """
        loop, gone = asyncio.get_running_loop(), asyncio.Event()

        def hear(message: Message) -> None:
            if not message.no_responders:
                pong(message.data)
            elif not self.settling:
                gone.set()

        with self._receive(hear) as reply:
            while True:
                await self.publish(probe, _PING, reply)
                due = loop.time() + interval_s
                try:
                    async with asyncio.timeout_at(due):
                        await gone.wait()
                    raise NoResponders(probe)
                except TimeoutError:
                    check(max(0.0, loop.time() - due))

    # -- waiting for answers

    async def _ask(self, subject: str, data: bytes, timeout_s: float, watch: Watch | None = None) -> bytes:
        """Publish, `watch`, return the answer. Asks again while a peer may only be slow to reconnect."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        with self._expect(subject) as (reply, answer):
                            await self.publish(subject, data, reply)
                            if watch is not None:
                                await watch(answer)
                            return await answer
                    except NoResponders as error:
                        if not self.settling or error.subject != subject:
                            raise
                    await asyncio.sleep(RECONNECT_WAIT_S)
        except TimeoutError:
            raise DeadlineExceeded(subject, timeout_s) from None

    @contextmanager
    def _receive(self, handler: Handler) -> Iterator[str]:
        """A reply subject whose messages go to `handler` while the body runs."""
        token = str(next(self._tokens))
        self._waiting[token] = handler
        try:
            yield f"{self._inbox}.{token}"
        finally:
            del self._waiting[token]

    def _dispatch(self, message: Message) -> None:
        handler = self._waiting.get(message.subject.rpartition(".")[2])
        if handler is not None:  # else: an answer nobody waits for any more
            handler(message)

    @contextmanager
    def _expect(self, subject: str) -> Iterator[tuple[str, Answer]]:
        """A reply subject and the future of the joined reply."""
        answer: Answer = asyncio.get_running_loop().create_future()
        parts: list[bytes] = []

        def receive(message: Message) -> None:
            if answer.done():
                return
            part = message.header(_PART)
            if message.no_responders:
                answer.set_exception(NoResponders(subject))
            elif message.header(_ERROR) is not None:
                try:
                    answer.set_exception(decode(message.data, WireError).exception())
                except ProtocolMismatch as error:
                    answer.set_exception(error)
            elif part is None:
                answer.set_result(message.data)
            else:
                index, _, count = part.partition("/")
                if int(index) != len(parts):
                    answer.set_exception(PlaneError(f"part {len(parts)} of the answer of {subject} was lost"))
                    return
                parts.append(message.data)
                if len(parts) == int(count):
                    answer.set_result(b"".join(parts))

        with self._receive(receive) as reply:
            try:
                yield reply, answer
            finally:
                if answer.done() and not answer.cancelled():
                    answer.exception()  # seen, also when the body left for another reason
                answer.cancel()

    async def _probe(
        self,
        answer: Answer,
        probe: str,
        silence_s: float,
        interval_s: float,
    ) -> None:
        """Returns when `answer` is done; sets it to NoResponders itself when the pinged peer is gone."""
        loop = asyncio.get_running_loop()
        heard, connections = loop.time(), self.reconnects
        lost_at: float | None = None

        def pong(message: Message) -> None:
            nonlocal heard
            if not message.no_responders:
                heard = loop.time()
            elif not self.settling and not answer.done():
                answer.set_exception(NoResponders(probe))

        with self._receive(pong) as reply:
            while not answer.done():
                await self.publish(probe, _PING, reply)
                due = loop.time() + interval_s
                await asyncio.wait((answer,), timeout=interval_s)
                now = loop.time()
                heard += max(0.0, now - due)  # time this loop was blocked itself is not the peer's silence
                if self.reconnects != connections and lost_at is None:
                    lost_at = now
                silent_since = heard if lost_at is None else min(heard, lost_at)
                if not answer.done() and now - silent_since > silence_s:
                    raise DeadlineExceeded(probe, silence_s)

    # -- answering

    async def _answer(self, message: Message, handler: Callable[[bytes], Awaitable[bytes]]) -> None:
        try:
            reply = await handler(message.data)
        except DynamoError as error:
            await self._send_error(message.reply, error)
        except Exception as error:
            await self._send_error(message.reply, error)
            raise
        else:
            await self._send_reply(message.reply, reply)

    async def _send_error(self, subject: str, error: Exception) -> None:
        await self._publish_marked(subject, encode(WireError.of(error)), {_ERROR: "1"})

    async def _send_reply(self, subject: str, data: bytes) -> None:
        size = min(PART_BYTES, self._client.max_payload - 1024)  # room for the header
        if len(data) <= size:
            await self.publish(subject, data)
            return
        count = -(-len(data) // size)
        for index in range(count):
            part = data[index * size : (index + 1) * size]
            await self._publish_marked(subject, part, {_PART: f"{index}/{count}"})

    async def _publish_marked(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        try:
            await self._client.publish(subject, data, headers=headers)
        except NatsError as error:
            raise PlaneError(f"cannot answer on {subject}: {error}") from error

    # -- the connection

    async def _open(self) -> None:
        """A new nats-py client with every subscription attached."""
        self._client, self._closed, self._ending = Client(), asyncio.Event(), False
        closed = self._closed

        async def on_error(error: Exception) -> None:
            log.debug("nats: %r", error)
            if "authorization" in str(error).lower() and not self._client.stats["reconnects"]:
                raise PlaneError(f"NATS at {self._address.url} refuses the credentials") from error

        async def on_closed() -> None:
            closed.set()

        async def on_disconnected() -> None:
            self._settled_at = float("inf")
            if not self._ending:
                log.warning("NATS connection lost")

        async def on_reconnected() -> None:
            self._note_reconnect()

        try:
            await self._client.connect(
                self._address.url,
                name=self._name,
                user=self._address.user,
                password=self._address.password,
                token=self._address.token,
                error_cb=on_error,
                closed_cb=on_closed,
                disconnected_cb=on_disconnected,
                reconnected_cb=on_reconnected,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT_S,
                ping_interval=5,  # with two outstanding pings a hung server is noticed in 15 s
                skip_subject_validation=True,  # ours come from wire.Subjects; saves a microsecond a message
            )
        except BaseException as error:
            self._ending = True
            await self._client.close()
            if isinstance(error, (NatsError, OSError)):
                raise PlaneError(f"cannot connect to NATS at {self._address.url}: {error}") from error
            raise
        for subscription in list(self._subscriptions):
            await self._attach(subscription)

    async def _reopen(self) -> NoReturn:
        """nats-py closes for good on some protocol errors; a bus does not."""
        while True:
            await self._closed.wait()
            log.error("NATS connection closed: %s; opening a new one", self._client.last_error)
            while True:
                try:
                    async with asyncio.timeout(CONNECT_DEADLINE_S):
                        await self._open()
                    break
                except (PlaneError, TimeoutError) as error:
                    log.error("%s", error)
                    await asyncio.sleep(RECONNECT_WAIT_S)
            self._note_reconnect()

    def _note_reconnect(self) -> None:
        self.reconnects += 1
        self._settled_at = asyncio.get_running_loop().time() + SETTLE_S
        log.warning("NATS connection is back")

    async def _attach(self, subscription: Subscription) -> None:
        """Returns once the server knows of the interest: who is told after never meets "no responders"."""
        try:
            inline = _Inline(subscription.handler)
            subscription.raw = await self._client.subscribe(subscription.subject, future=inline)
        except NatsError as error:
            if not self.connected:
                return  # attached again with the next connection
            raise PlaneError(f"cannot subscribe to {subscription.subject}: {error}") from error
        if self.connected:
            await self._round_trip()

    async def _round_trip(self) -> None:
        """Everything sent before has reached the server. (nats-py's flush overtakes its own buffer.)"""
        back = asyncio.Event()
        with self._receive(lambda _: back.set()) as reply:
            await self.publish(reply, b"")
            try:
                async with asyncio.timeout(CONNECT_DEADLINE_S):
                    await back.wait()
            except TimeoutError:
                if self.connected:
                    raise PlaneError(f"NATS at {self._address.url} does not answer") from None

    async def _unsubscribe(self, subscription: Subscription) -> None:
        if subscription not in self._subscriptions:
            return
        del self._subscriptions[subscription]
        try:
            await subscription.raw.unsubscribe()
        except NatsError as error:  # the connection is closed: no interest is left either way
            log.debug("unsubscribe %s: %r", subscription.subject, error)
