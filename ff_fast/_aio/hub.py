"""The connection over which all readers of a backend hear of pushes, and read."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from ff_fast import _transport
from ff_fast._aio.connection import BROKEN, LOST
from ff_fast._core import hub, readers
from ff_fast._core.hub import (
    HELLO,
    ONCE,
    PING,
    HubCore,
    HubsCore,
    Listener,
    Part,
)
from ff_fast._core.nodes import no_owner
from ff_fast._core.routing import refusal
from ff_fast._core.steps import Retries, Step
from ff_fast._core.topology import address_of
from ff_fast.errors import DeadlineExceeded, FFError, OutcomeUnknown, ProtocolError, Redirected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from ff_fast._aio.connection import Connection, Receiver
    from ff_fast._aio.nodes import Nodes
    from ff_fast._core.topology import Address
    from ff_fast.types import BackendRetry

READS_IN_FLIGHT = (8, 64)
"""Bounds of the reads in flight: of large answers, about 1 MiB each, and of small ones."""

_BYTES_IN_FLIGHT = 4 << 20
"""Bytes of the answers in flight, going by those before: pushes wait behind them, and the server counts them towards the
output that it holds for a subscriber."""


class Read:
    """One read of a reader. It goes on although nobody waits for it.

    Attributes:
        step: The commands.
        error: Why it failed; None as long as it has not.
        final: The error came after all retries.
        done: Whether the replies, or an error, are there.
        sent_at: Monotonic time at which it was sent, or is sent again, at the earliest.
    """

    __slots__ = (
        "_finished",
        "_hub",
        "_on_done",
        "_replies",
        "_sent",
        "done",
        "error",
        "final",
        "sent_at",
        "step",
    )

    def __init__(self, owner: Hub, step: Step, on_done: Callable[[], None]) -> None:
        self._hub = owner
        self._on_done = on_done
        self._replies: list[object] = []
        self._sent = False
        self.step = step
        self.error: FFError | None = None
        self.final = False
        self.done = False
        self.sent_at = 0.0

    def __call__(self, reply: object) -> None:
        """Receive one reply of the hub's connection."""
        if not self._sent:
            # One of several replies was lost before.
            return
        if reply is LOST:
            self._sent = False
            self._hub._lost_read(self)
        elif reply is BROKEN:
            self._sent = False
            self._hub._answered()
            self.fail(ProtocolError())
        else:
            self._replies.append(reply)
            if len(self._replies) == len(self.step.commands):
                self._sent = False
                self._hub._answered()
                self.finish(self._replies)

    def drop(self) -> None:
        """Forget a read whose answer nobody waits for."""
        queue = self._hub._queue
        if not self.done and not self._sent and self in queue:
            queue.remove(self)

    def finish(self, replies: list[object]) -> None:
        self._replies = replies
        self.done = True
        self._on_done()

    def fail(self, error: FFError) -> None:
        self.error = error
        self.done = True
        self._on_done()

    def take(self) -> list[object]:
        """Return the replies, in order.

        Raises:
            FFError: The read failed; it may be repeated if the error says so.
        """
        if self.error is not None:
            raise self.error
        return self._replies


class Hub:
    """All channels and reads of a backend's readers at one server, on one connection that speaks RESP3."""

    def __init__(
        self,
        connect: Callable[[str], Awaitable[Connection]],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        request: Callable[[Step], Awaitable[list[object]]],
        timeout_s: float,
        retry: BackendRetry,
        *,
        by_slot: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._connect_one = connect
        self._spawn = spawn
        # Sends a step on the connection of the calls.
        self._request = request
        self._timeout_s = timeout_s
        self._loop = loop or asyncio.get_running_loop()
        self._core = HubCore(by_slot=by_slot)
        self._retries = Retries(retry, retry_timeouts=True)
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._queue: deque[Read] = deque()
        self._in_flight = 0
        # Bytes of an answer, on average, and those that had come with the last one.
        self._answer_bytes = 0.0
        self._received = 0
        self._scheduled = False
        self._watch: asyncio.TimerHandle | None = None
        # Since when neither a channel nor a read needs the connection.
        self._idle_since: float | None = None
        # When the server was last asked for its role.
        self._pinged_at = 0.0
        self._failure: FFError | None = None
        self._closing = False

    # -- for readers ---------------------------------------------------------------------------------------------

    def listen(self, channel: bytes, listener: Listener) -> None:
        """Pass pushes of *channel* to *listener*, which hears first that the subscription is confirmed."""
        self._core.listen(channel, listener)
        self._soon()

    def unlisten(self, channel: bytes, listener: Listener) -> None:
        """Pass nothing more to *listener*."""
        self._core.unlisten(channel, listener, time.monotonic())

    def attach(self, part: Part) -> None:
        """Let *part* of a reader hear its channel."""
        self._core.attach(part, time.monotonic())
        self._soon()

    def detach(self, part: Part) -> None:
        """Let *part* go; does nothing if it is not attached."""
        self._core.detach(part, time.monotonic())

    def confirmed(self, channel: bytes) -> bool:
        """Return whether the server has confirmed the subscription on the connection that is open."""
        return self._core.confirmed(channel)

    def read(self, step: Step, on_done: Callable[[], None]) -> Read:
        """Send *step* in turn with other reads; *on_done* is called when the replies or an error are there."""
        read = Read(self, step, on_done)
        self._queue.append(read)
        self._soon()
        return read

    async def request(self, step: Step) -> list[object]:
        """Send *step* in turn with other reads, and return the replies, in order."""
        return await answer_to(self, step)

    def silent(self, since: float) -> bool:
        """Return whether the server owes a reply, or a connection, since then, and nothing has come for a while."""
        if self._connection is not None:
            since = max(since, self._connection.silent_since)
        return time.monotonic() - since >= readers.SILENT_S

    def stop(self) -> None:
        """Fail everything, without waiting; the connection is the pool's to abort."""
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        self._fail(_transport.closed_error())

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do with its server any more."""
        return self._connection is None and self._connecting is None and self._core.empty

    # -- the connection --------------------------------------------------------------------------------------------

    def _soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._go)

    def _go(self) -> None:
        """Send what is waiting; connect first where there is no connection."""
        self._scheduled = False
        if self._closing:
            self._fail(_transport.closed_error())
            return
        connection = self._connection
        if connection is None:
            if self._connecting is None and (self._queue or self._core.waiting):
                self._connecting = self._spawn(self._connect())
            return
        if not connection.writable:
            # It calls again when it takes more.
            return
        now = time.monotonic()
        for asked in self._core.requests(now):
            if asked is None:
                connection.send(PING, [self._ponged])
            else:
                connection.send(asked.request, [self._refused])
        if self._core.doubts_role or now - self._pinged_at >= self._timeout_s:
            self._core.doubts_role = False
            self._pinged_at = now
            connection.send(PING, [self._ponged])
        requests: list[bytes] = []
        receivers: list[Receiver] = []
        least, most = READS_IN_FLIGHT
        room = max(min(int(_BYTES_IN_FLIGHT / (self._answer_bytes + 1)), most), least)
        while self._queue and self._in_flight < room:
            read = self._queue.popleft()
            self._in_flight += 1
            read._sent = True
            read.sent_at = now
            requests += [command.request for command in read.step.commands]
            receivers += [read] * len(read.step.commands)
        if requests:
            connection.send(b"".join(requests), receivers)

    async def _connect(self) -> None:
        failure, self._failure = self._failure, None
        try:
            while not self._closing:
                pause = 0.0 if failure is None else self._retries.pause(failure)
                if pause is None:
                    assert failure is not None
                    self._retries.reset()
                    self._fail(failure)
                    return
                if failure is not None:
                    await asyncio.sleep(pause)
                if self._core.empty and not self._queue:
                    return
                try:
                    await self._open()
                except FFError as error:
                    failure = error
                else:
                    return
        finally:
            self._connecting = None
            # What came while it ended.
            self._soon()

    async def _open(self) -> None:
        connection = await self._connect_one("readers")
        try:
            (reply,) = await connection.request(HELLO, self._timeout_s)
            if (failure := self._core.opened(reply)) is not None:
                raise failure
            if connection.closed:
                raise OutcomeUnknown
        except BaseException:
            connection.abort()
            raise
        connection.on_push = self._pushed
        connection.routes = self._core.routes
        connection.on_can_write = self._go
        connection.on_lost.append(self._lost)
        self._connection = connection
        self._received = connection.received
        self._idle_since = None
        self._pinged_at = time.monotonic()
        self._tick()

    def _pushed(self, push: list[Any]) -> None:
        connection = self._connection
        due = (
            connection is not None
            and bool(connection.receivers)
            and connection.receivers[0] == self._refused
        )
        if self._core.received(push, due=due) is not None:
            self._retries.reset()
            if connection is not None and connection is self._connection:
                connection.receivers.popleft()
        elif push[0] == b"sunsubscribe":
            # The server has ended a subscription.
            self._soon()

    def _refused(self, reply: object) -> None:
        """Take what came in place of the pushes that answer a request: an error, or the loss of the connection."""
        if reply is LOST or reply is BROKEN:
            return
        failure = self._core.refused(reply) if isinstance(reply, Exception) else ProtocolError()
        if failure is not None:
            self._failure = failure
            if self._connection is not None:
                self._connection.abort()
        elif self._core.waiting:
            self._soon()

    def _answered(self) -> None:
        self._in_flight -= 1
        if self._connection is not None:
            size = self._connection.received - self._received
            self._received += size
            self._answer_bytes += (size - self._answer_bytes) / 4
        self._retries.reset()

    def _lost(self, connection: Connection) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._failure = self._failure or OutcomeUnknown()
        self._core.lost()
        if not self._closing:
            self._soon()

    def _lost_read(self, read: Read) -> None:
        """Repeat a read over the connection of the calls: its answer may be more than the server holds for a subscriber."""
        self._in_flight -= 1
        if self._closing:
            read.fail(_transport.closed_error())
        else:
            _ = self._spawn(self._elsewhere(read))

    async def _elsewhere(self, read: Read) -> None:
        try:
            replies = await self._request(read.step)
        except FFError as error:
            read.fail(error)
        except asyncio.CancelledError:
            read.fail(_transport.closed_error())
            raise
        else:
            read.finish(replies)

    def _fail(self, error: FFError) -> None:
        queue, self._queue = self._queue, deque()
        self._core.fail(error)
        for read in queue:
            read.final = True
            read.fail(copy.copy(error))

    def _tick(self) -> None:
        """Look for silence, subscriptions that end, and a connection that nobody needs."""
        connection = self._connection
        if connection is None:
            return
        now = time.monotonic()
        timeout_s = self._timeout_s
        if connection.receivers and now - connection.silent_since >= timeout_s:
            connection.abort_silent(connection.silent_since)
            return
        if self._core.listening or self._queue or self._in_flight:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= _transport.MAX_IDLE_S:
            connection.abort()
            return
        self._go()
        self._watch = self._loop.call_later(min(timeout_s / 2, hub.LINGER_S), self._tick)

    def _ponged(self, reply: object) -> None:
        """Take the answer to a PING."""
        if self._core.late(reply):
            if self._connection is not None:
                self._connection.receivers.appendleft(self._ponged)
            return
        failure = self._core.heard(reply)
        if failure is not None and self._connection is not None:
            self._failure = failure
            self._connection.abort()


class RoutedRead:
    """One read of a reader, whose commands go to the nodes of their slots. See :class:`Read` for the attributes."""

    __slots__ = (
        "_loop",
        "_on_done",
        "_open",
        "_replies",
        "_timer",
        "done",
        "error",
        "final",
        "parts",
        "sent_at",
        "step",
    )

    def __init__(
        self,
        step: Step,
        on_done: Callable[[], None],
        nodes: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._on_done = on_done
        self._open = nodes
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        if step.partial:
            self._look_later(readers.SILENT_S)
        self._replies: list[object] = [None] * len(step.commands)
        self.step = step
        self.parts: list[_PartOfRead] = []
        self.error: FFError | None = None
        self.final = False
        self.done = False
        self.sent_at = 0.0

    def drop(self) -> None:
        """Forget a read whose answer nobody waits for."""
        self._look_no_more()
        for part in self.parts:
            part.read.drop()

    def _look_later(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._look)

    def _look_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Wait no longer for nodes that are silent."""
        self._look_later(readers.SILENT_S / 4)
        for part in self.parts:
            part.leave_silent()

    def put(self, indexes: list[int], replies: list[object]) -> None:
        """Take what one node has answered."""
        for index, reply in zip(indexes, replies, strict=True):
            self._replies[index] = reply
        self._open -= 1
        if not self._open:
            self._look_no_more()
            self.done = True
            self._on_done()

    def fail(self, indexes: list[int], error: FFError) -> None:
        """Take the error of one node. In a partial step it stands for each of its replies."""
        if not self.step.partial:
            self.error = self.error or error
        self.put(indexes, [error] * len(indexes))

    def take(self) -> list[object]:
        """Return the replies, in order.

        Raises:
            FFError: The read failed; it may be repeated if the error says so.
        """
        if self.error is not None:
            raise self.error
        return self._replies


class _PartOfRead:
    """What one node is asked in a read."""

    __slots__ = ("_address", "_began", "_hubs", "_indexes", "_left", "_whole", "read")

    def __init__(self, hubs: Hubs, whole: RoutedRead, address: Address, indexes: list[int]) -> None:
        self._hubs = hubs
        self._whole = whole
        self._address = address
        self._indexes = indexes
        self._left = False
        self._began = time.monotonic()
        step = whole.step
        if len(indexes) < len(step.commands):
            step = step._replace(commands=[step.commands[index] for index in indexes])
        self.read = hubs._at(address).read(step, self)

    def leave_silent(self) -> None:
        """Wait no longer for the node if it is silent."""
        if not (self.read.done or self._left) and self._hubs._at(self._address).silent(self._began):
            self._left = True
            self.read.drop()
            self._whole.fail(self._indexes, DeadlineExceeded())

    def __call__(self) -> None:
        whole, read = self._whole, self.read
        if self._left:
            return
        whole.sent_at = max(whole.sent_at, read.sent_at)
        if read.error is not None:
            self._hubs._failed(self._address, read.error)
            whole.fail(self._indexes, read.error)
            return
        replies = read.take()
        for reply in replies:
            error = refusal(reply)
            if error is not None:
                self._hubs._failed(self._address, error)
        whole.put(self._indexes, replies)


class Hubs:
    """The hubs of a cluster, one a node, behind the face of one."""

    def __init__(self, nodes: Nodes, retry: BackendRetry) -> None:
        assert nodes.topology is not None
        self._nodes = nodes
        self._topology = nodes.topology
        self._loop = asyncio.get_running_loop()
        self._core = HubsCore(
            self._topology, retry, self._listen_at, self._unlisten_at, self._settle_soon
        )
        self._hubs: dict[Address, Hub] = {}
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None
        self._closing = False

    # -- for readers -------------------------------------------------------------------------------------------------

    def listen(self, channel: bytes, listener: Listener) -> None:
        """Pass pushes of *channel* to *listener*, which hears first that the subscription is confirmed."""
        self._core.listen(channel, listener, time.monotonic())

    def unlisten(self, channel: bytes, listener: Listener) -> None:
        """Pass nothing more to *listener*."""
        self._core.unlisten(channel, listener, time.monotonic())

    def attach(self, part: Part) -> None:
        """Let *part* of a reader hear its channels."""
        self._core.attach(part, time.monotonic())

    def detach(self, part: Part) -> None:
        """Let *part* go; does nothing if it is not attached."""
        self._core.detach(part, time.monotonic())

    def confirmed(self, channel: bytes) -> bool:
        """Return whether a node has confirmed the subscription on the connection that is open."""
        return self._core.confirmed(channel)

    def read(self, step: Step, on_done: Callable[[], None]) -> RoutedRead:
        """Send each command of *step* to the node of its slot; *on_done* is called when all replies or errors are there.

        What a node refuses is not sent again: the reader does that.
        """
        if self._core.changed:
            self._settle_soon()
        places: dict[Address | None, list[int]] = {}
        for index, command in enumerate(step.commands):
            slot = command.slot
            assert slot is not None
            places.setdefault(self._topology.primary(slot), []).append(index)
        read = RoutedRead(step, on_done, len(places), self._loop)
        for address, indexes in places.items():
            if address is not None:
                read.parts.append(_PartOfRead(self, read, address, indexes))
            else:
                _ = self._nodes.refresh_soon()
                read.fail(indexes, no_owner())
        return read

    async def request(self, step: Step) -> list[object]:
        """Send *step* in turn with other reads, and return the replies, in order."""
        return await answer_to(self, step)

    def stop(self) -> None:
        """Fail everything, without waiting; the connections are the nodes' to abort."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for each in self._hubs.values():
            each.stop()
        self._core.fail(_transport.closed_error())

    # -- the nodes ---------------------------------------------------------------------------------------------------

    def _at(self, address: Address) -> Hub:
        found = self._hubs.get(address)
        if found is None:
            nodes = self._nodes
            found = self._hubs[address] = Hub(
                lambda role: nodes.at(address).connect(role),
                nodes.spawn,
                lambda step: nodes.request(step, retries=Retries(ONCE)),
                nodes.timeout_s,
                ONCE,
                by_slot=True,
                loop=self._loop,
            )
        return found

    def _listen_at(self, address: Address, channel: bytes, listener: Listener) -> None:
        self._at(address).listen(channel, listener)

    def _unlisten_at(self, address: Address, channel: bytes, listener: Listener) -> None:
        self._at(address).unlisten(channel, listener)

    def _failed(self, address: Address, error: FFError) -> None:
        """Take note of what the error of a read tells: where a slot is, or that the topology is in doubt."""
        if isinstance(error, Redirected) and not error.ask:
            self._topology.moved(error.slot, address_of(error.address, address))
        if error.retryable and not self._closing:
            _ = self._nodes.refresh_soon()

    def _settle_soon(self) -> None:
        if not (self._scheduled or self._closing):
            self._scheduled = True
            self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        """Let every channel be listened to where its slot is; look at the topology where that is in doubt."""
        self._scheduled = False
        if self._closing:
            return
        now = time.monotonic()
        doubtful = self._core.doubtful(now)
        self._move(now)
        if doubtful and self._looking is None:
            self._looking = self._nodes.spawn(self._look())

    async def _look(self) -> None:
        try:
            await self._nodes.refresh()
        except FFError:
            # The channels that wait for it have retries of their own.
            pass
        finally:
            self._looking = None
        if not self._closing:
            self._move(time.monotonic())

    def _move(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        again_at = self._core.settle(now)
        if again_at is not None:
            self._timer = self._loop.call_later(max(again_at - now, 0.0), self._settle)
        idle = [address for address, each in self._hubs.items() if each.idle]
        for address in {*idle}.difference(self._topology.addresses if idle else ()):
            del self._hubs[address]


async def answer_to(hub: Hub | Hubs, step: Step) -> list[object]:
    """Send *step* in turn with the reads of readers, and return the replies, in order."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done() -> None:
        if not waiter.done():
            waiter.set_result(None)

    read = hub.read(step, done)
    try:
        await waiter
    except asyncio.CancelledError:
        read.drop()
        raise
    return read.take()
