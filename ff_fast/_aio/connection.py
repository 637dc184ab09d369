"""One connection of the asyncio shell."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ff_fast import _transport
from ff_fast._aio.credentials import ask
from ff_fast._core.sentinel import ROLE, ask_another_first, check_role
from ff_fast._core.steps import AwaitHint, Pause, Step, Steps
from ff_fast._hot.resp import ReplyGuard, take_pushes, take_reply
from ff_fast.errors import DeadlineExceeded, FFError, OutcomeUnknown, ProtocolError, Unavailable

if TYPE_CHECKING:
    from ff_fast._core.contact import Contact
    from ff_fast.types import BackendConfig

T = TypeVar("T")

Receiver = Callable[[object], None]

LOST = object()
"""Passed to a receiver in place of a reply when the connection is lost."""

BROKEN = object()
"""Passed to a receiver in place of a reply that is no RESP, or announces more than any answer has."""


class Connection(asyncio.Protocol):
    """One connection: sends requests, and passes each reply to the next receiver in order."""

    def __init__(self) -> None:
        import hiredis

        self._reader = hiredis.Reader()
        self._guard = ReplyGuard()
        self._broken_reply = hiredis.ProtocolError
        self._pushed = hiredis.PushNotification
        self._transport: asyncio.Transport | None = None
        self._stream: asyncio.StreamWriter | None = None
        self._leaving = False
        self._closed_transport: asyncio.Future[None] | None = None
        # Set while the transport takes more, and after it is lost, so that no task waits for ever.
        self._can_write = asyncio.Event()
        self.receivers: deque[Receiver] = deque()
        # When the oldest wait without a byte began, and when the last bytes came, in monotonic time.
        self.silent_since = 0.0
        self.heard_at = time.monotonic()
        # Number of bytes that have come.
        self.received = 0
        # Set once it has answered the steps of connecting; checked: the library of its server was.
        self.ready = self.checked = False
        # Takes it back from its user, with the number of idle connections that are wanted; its server sets it.
        self.give_back: Callable[[Connection, int], None] | None = None
        # on_can_write: called when more may be sent. on_lost: each called once, when the connection is lost.
        # on_silent: called with the time since when nothing has come, before the connection is aborted for it.
        self.on_can_write: Callable[[], None] | None = None
        self.on_lost: list[Callable[[Connection], None]] = []
        self.on_silent: Callable[[float], None] | None = None
        # Hears of its loss, where that is a fault: it was in use, and nobody here has ended it.
        self.contact: Contact | None = None
        # Takes what the server sends unasked; None drops it.
        self.on_push: Callable[[list[Any]], None] | None = None
        # What takes the messages of each channel; `on_push` has the other pushes.
        self.routes: dict[bytes, Callable[[bytes], None]] | None = None
        # Host and port to which it leads.
        self.address = ("", 0)
        # When it logged in last, in monotonic time.
        self.authenticated_at = 0.0

    async def open(self, config: BackendConfig) -> None:
        """Connect as *config* says; redis-py opens the socket and shakes hands."""
        from redis.asyncio import connection as redis_connection
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        server = config.connection
        timeout_s = _transport.request_timeout_s(config)
        self.address = server.host, server.port
        self.authenticated_at = time.monotonic()
        provider = server.credential_provider
        login = None if provider is None else await ask(provider, timeout_s)
        kind: type[Any] = redis_connection.Connection
        if server.unix_path:
            kind = redis_connection.UnixDomainSocketConnection
        elif server.tls:
            kind = redis_connection.SSLConnection
        connection = kind(
            **_transport.connection_arguments(config, login),
            parser_class=_transport.guarded_parser(redis_connection),
            retry=Retry(NoBackoff(), 0),
        )
        if server.ssl_context is not None:
            _transport.use_context(connection, server.ssl_context)
        failure: FFError | None = None
        task = asyncio.current_task()
        cancelling = 0 if task is None else task.cancelling()
        try:
            await connection.connect()
            if task is not None and task.cancelling() > cancelling:
                # Python 3.11's wait_for(), by which redis-py sends, may drop a cancellation.
                raise asyncio.CancelledError
        except Exception as error:  # noqa: BLE001 - every failure becomes an error of connecting
            failure = _transport.connect_error(error, config)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        if failure is not None:
            await connection.disconnect(nowait=True)
            if server.sentinel_service is not None:
                ask_another_first(server)
            raise failure
        # The handshake has read all its replies, so another protocol object can take over here.
        self._stream = _transport.take_stream(connection)
        # No check by isinstance: the transports of uvloop are of no class of asyncio.
        transport = cast("asyncio.Transport", self._stream.transport)
        transport.set_protocol(self)
        self._transport = transport
        self._closed_transport = asyncio.get_running_loop().create_future()
        self._can_write.set()
        if server.sentinel_service is not None:
            try:
                (reply,) = await self.request(ROLE, timeout_s)
                check_role(reply, server)
            except BaseException:
                self.abort()
                raise

    @property
    def closed(self) -> bool:
        return self._transport is None

    @property
    def writable(self) -> bool:
        return self._transport is not None and self._can_write.is_set()

    async def wait_writable(self) -> None:
        """Wait until the transport takes more, or the connection is lost."""
        while self._transport is not None and not self._can_write.is_set():
            await self._can_write.wait()

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
        # A write that has failed closes the transport before `connection_lost`, and asyncio logs every further one.
        if not self._transport.is_closing():
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.silent_since = time.monotonic()
        self.received += len(data)
        if not self._guard.accepts(data):
            self._abort_broken()
            return
        reader = self._reader
        reader.feed(data)
        pushed, on_push, routes = self._pushed, self.on_push, self.routes
        skipped = pushed if on_push is None else None
        while self._transport is not None:
            try:
                reply = (
                    take_reply(reader.gets, skipped)
                    if routes is None
                    else take_pushes(reader.gets, pushed, routes)
                )
            except self._broken_reply:
                self._abort_broken()
                return
            if reply is False:
                break
            if on_push is not None and type(reply) is pushed:
                on_push(reply)
                continue
            if not self.receivers:
                # A reply without a request: replies can no longer be matched to requests.
                self.abort()
                return
            self.receivers.popleft()(reply)
        if self._leaving and not self.receivers:
            self.abort()
        if self.on_can_write is not None:
            self.on_can_write()

    def eof_received(self) -> None:
        # asyncio would first flush the write buffer, which may never finish.
        self._say_lost(OutcomeUnknown())
        self.abort()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()
        if self.on_can_write is not None:
            self.on_can_write()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        if self._closed_transport is not None and not self._closed_transport.done():
            self._closed_transport.set_result(None)
        self._stream = None
        if self._transport is not None:
            self._say_lost(OutcomeUnknown())
        self._fail_receivers()

    def _say_lost(self, failure: FFError) -> None:
        if self.contact is not None and (self.receivers or self.on_push is not None):
            self.contact.lost(failure, idle_s=self.silent_since - self.heard_at)

    def abort(self) -> None:
        """Close the connection at once; every receiver gets `LOST`."""
        if self._transport is not None:
            self._transport.abort()
            self._fail_receivers()

    def leave(self) -> None:
        """Close the connection once it owes no reply."""
        self._leaving = True
        if not self.receivers:
            self.abort()

    def _abort_broken(self) -> None:
        """Abort the connection; the receiver of the broken reply gets `BROKEN`, those after it `LOST`."""
        self._say_lost(ProtocolError())
        if self._transport is not None and self.receivers:
            self.receivers.popleft()(BROKEN)
        self.abort()

    def abort_silent(self, since: float) -> None:
        """Abort the connection, over which nothing has come since then although replies were owed."""
        if self._transport is not None:
            self._say_lost(DeadlineExceeded())
            if self.on_silent is not None:
                self.on_silent(since)
        self.abort()

    def late(self, sent_at: float) -> DeadlineExceeded:
        """Return the error of a request whose deadline has passed; abort the connection if nothing came meanwhile."""
        error = DeadlineExceeded()
        if self.heard_at <= sent_at:
            error.silent = self.ready
            self.abort_silent(sent_at)
        return error

    def _fail_receivers(self) -> None:
        self._transport = None
        self._can_write.set()
        receivers, self.receivers = self.receivers, deque()
        for receiver in receivers:
            receiver(LOST)
        listeners, self.on_lost = self.on_lost, []
        for lost in listeners:
            lost(self)

    async def wait_closed(self) -> None:
        """Wait until the socket of an aborted connection is closed."""
        if self._closed_transport is not None:
            await asyncio.wait({self._closed_transport})

    def post(self, step: Step, timeout: float) -> Replies:
        """Send the commands of *step*, and return the object that receives their replies.

        Args:
            step: The step.
            timeout: Longest time for the replies in seconds, without the step's block time; of large ones, the longest
                silence.

        Raises:
            Unavailable: The connection was lost before; nothing was sent.
        """
        silence = timeout if step.large else None
        replies = Replies(self, len(step.commands), _transport.wait_s(timeout, step), silence)
        self.send(step.request, [replies] * len(step.commands))
        return replies

    async def request(self, step: Step, timeout: float) -> list[object]:
        """Send the commands of *step* and return their replies, in order.

        Raises:
            Unavailable: The connection was lost before; nothing was sent.
            OutcomeUnknown: The connection was lost before all replies had arrived.
            DeadlineExceeded: The replies took longer than *timeout* seconds and the step's block time.
        """
        replies = self.post(step, timeout)
        await replies.wait()
        return replies.take()


class Replies:
    """The replies of one step. A wait for them may be cancelled, and another one started later."""

    __slots__ = (
        "_connection", "_due", "_failure", "_missing", "_replies", "_sent_at", "_silence", "_waiter",
    )  # fmt: skip

    def __init__(
        self, connection: Connection, count: int, timeout: float, silence: float | None = None
    ) -> None:
        self._connection = connection
        # Large replies are due when nothing has come for so long; the others have no such extension.
        self._silence = silence
        self._replies: list[object] = []
        self._missing = count
        self._sent_at = time.monotonic()
        self._due = self._sent_at + timeout
        self._failure: FFError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __call__(self, reply: object) -> None:
        """Receive one reply."""
        if self._failure is not None:
            return
        if reply is BROKEN:
            self._failure = ProtocolError()
            self._missing = 0
        elif reply is LOST:
            # A silent connection is aborted when its oldest request is due, perhaps just before that one's own timer.
            late = time.monotonic() >= self._due
            self._failure = self._connection.late(self._sent_at) if late else OutcomeUnknown()
            self._missing = 0
        else:
            self._replies.append(reply)
            self._missing -= 1
        if self._missing <= 0:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, until: float | None = None) -> bool:
        """Wait for all replies; return whether they have arrived by *until*, in monotonic time.

        Raises:
            DeadlineExceeded: The deadline of the step passed.
        """
        loop = asyncio.get_running_loop()
        while self._missing > 0:
            due = self._due if until is None else min(self._due, until)
            self._waiter = loop.create_future()
            timer = loop.call_later(max(due - time.monotonic(), 0.0), self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
            if self._missing <= 0:
                break
            # Only the timer can have woken it.
            if due != self._due:
                return False
            extended = due if self._silence is None else self._connection.heard_at + self._silence
            if extended <= due:
                raise self._connection.late(self._sent_at)
            self._due = extended
        return True

    def take(self) -> list[object]:
        """Return the replies, in order.

        Raises:
            OutcomeUnknown: The connection was lost before all had arrived.
            DeadlineExceeded: It was lost when they were due already.
        """
        if self._failure is not None:
            raise self._failure
        return self._replies


async def run_steps(
    steps: Steps[T],
    request: Callable[[Step], Awaitable[list[object]]],
    wait: Callable[[AwaitHint], Awaitable[None]] | None = None,
    alone: Callable[[Step], Awaitable[list[object]]] | None = None,
) -> T:
    """Run the steps of an operation, and return its value.

    Args:
        steps: The steps.
        request: Sends a step and returns its replies.
        wait: Waits for a hint, in the steps of a claim.
        alone: Sends a step on a connection of its own; None where *request* does so.
    """
    try:
        step = next(steps)
        while True:
            try:
                replies: list[object] = []
                if isinstance(step, Step):
                    send = alone if step.alone and alone is not None else request
                    replies = await send(step)
                elif isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                else:
                    assert wait is not None
                    await wait(step)
            except FFError as error:
                step = steps.throw(error)
            else:
                step = steps.send(replies)
    except StopIteration as stop:
        value: T = stop.value
        return value
