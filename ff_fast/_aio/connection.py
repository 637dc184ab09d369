"""One connection of the asyncio shell."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ff_fast import _transport
from ff_fast._core.steps import Flow, Pause, Step
from ff_fast._hot.resp import take_reply
from ff_fast.errors import DeadlineExceeded, FFError, OutcomeUnknown, Unavailable

if TYPE_CHECKING:
    from ff_fast.types import BackendConfig

T = TypeVar("T")

Receiver = Callable[[object], None]

LOST = object()
"""What a receiver gets in place of a reply that will not come."""


class Channel(asyncio.Protocol):
    """One connection: bytes out; each reply to the receiver whose turn it is."""

    def __init__(self) -> None:
        import hiredis

        self._reader = hiredis.Reader()
        self._broken_reply = hiredis.ProtocolError
        self._transport: asyncio.Transport | None = None
        self._stream: asyncio.StreamWriter | None = None
        self._gone: asyncio.Future[None] | None = None
        # Set while the transport takes more, and when it is gone, so that nobody waits for it.
        self._room = asyncio.Event()
        self.receivers: deque[Receiver] = deque()
        self.silent_since = 0.0
        # Called when more may be sent, and once when the connection is lost.
        self.on_room: Callable[[], None] | None = None
        self.on_lost: Callable[[Channel], None] | None = None

    async def open(self, config: BackendConfig) -> None:
        """Connect as *config* says; redis-py opens the socket and shakes hands."""
        from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        server = config.connection
        kind: type[Any] = UnixDomainSocketConnection if server.unix_path else Connection
        if server.tls:
            kind = SSLConnection
        connection = kind(**_transport.connection_arguments(config), retry=Retry(NoBackoff(), 0))
        failure: FFError | None = None
        try:
            await connection.connect()
        except Exception as error:  # noqa: BLE001 - whatever it was, it was on the way to the server
            failure = _transport.connect_error(error, config)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        if failure is not None:
            await connection.disconnect(nowait=True)
            raise failure
        # From here on the transport is ours; the handshake has left no byte unread.
        self._stream = _transport.take_stream(connection)
        transport = self._stream.transport
        assert isinstance(transport, asyncio.Transport)
        transport.set_protocol(self)
        self._transport = transport
        self._gone = asyncio.get_running_loop().create_future()
        self._room.set()

    @property
    def closed(self) -> bool:
        return self._transport is None

    @property
    def writable(self) -> bool:
        return self._transport is not None and self._room.is_set()

    async def room(self) -> None:
        """Wait until the transport takes more, or the connection is lost."""
        while self._transport is not None and not self._room.is_set():
            await self._room.wait()

    def send(self, request: bytes, receivers: list[Receiver]) -> None:
        """Send *request*; its replies go to *receivers*, in order.

        Raises:
            Unavailable: The connection is lost; nothing was sent.
        """
        if self._transport is None:
            raise Unavailable
        if not self.receivers:
            self.silent_since = time.monotonic()
        self.receivers.extend(receivers)
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.silent_since = time.monotonic()
        reader = self._reader
        reader.feed(data)
        while self._transport is not None:
            try:
                reply = take_reply(reader.gets)
            except self._broken_reply:
                self.abort()
                return
            if reply is False:
                break
            if not self.receivers:
                # A reply that nobody asked for: nothing after it can be trusted.
                self.abort()
                return
            self.receivers.popleft()(reply)
        if self.on_room is not None:
            self.on_room()

    def eof_received(self) -> None:
        # By itself asyncio would first wait until all that is written has gone out, which may be never.
        self.abort()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()
        if self.on_room is not None:
            self.on_room()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)
        self._stream = None
        self._let_go()

    def abort(self) -> None:
        """Drop the connection: from here on it is closed, and whoever waits for a reply knows."""
        if self._transport is not None:
            self._transport.abort()
            self._let_go()

    def _let_go(self) -> None:
        self._transport = None
        self._room.set()
        receivers, self.receivers = self.receivers, deque()
        for receiver in receivers:
            receiver(LOST)
        lost, self.on_lost = self.on_lost, None
        if lost is not None:
            lost(self)

    async def gone(self) -> None:
        """Wait until an aborted connection has let go of its socket."""
        if self._gone is not None:
            await asyncio.wait({self._gone})

    async def ask(self, step: Step, timeout: float) -> list[object]:
        """Send *step* and return its replies.

        Raises:
            Unavailable: The connection was lost before; nothing was sent.
            OutcomeUnknown: The connection was lost before the replies had come.
            DeadlineExceeded: There were none within *timeout* seconds, beyond what the server may block.
        """
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        replies: list[object] = []

        def receive(reply: object) -> None:
            replies.append(reply)
            if not answered.done() and (len(replies) == step.replies or reply is LOST):
                answered.set_result(None)

        self.send(step.request, [receive] * step.replies)
        try:
            async with asyncio.timeout(_transport.wait_s(timeout, step)):
                await answered
        except TimeoutError:
            raise DeadlineExceeded from None
        if LOST in replies:
            raise OutcomeUnknown
        return replies


async def drive(flow: Flow[T], ask: Callable[[Step], Awaitable[list[object]]]) -> T:
    """Drive an operation of several steps to its value, each step on whatever *ask* sends it."""
    try:
        step = next(flow)
        while True:
            try:
                replies: list[object] = []
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                else:
                    replies = await ask(step)
            except FFError as error:
                step = flow.throw(error)
            else:
                step = flow.send(replies)
    except StopIteration as stop:
        value: T = stop.value
        return value
