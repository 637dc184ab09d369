"""The asyncio shell: the same names as :mod:`ff_fast`, awaited. `Writer.write` stays a plain call.

Everything of one backend happens on the loop that connected it. Calls and writers share one connection, which one
protocol object alone reads and writes: cancelling a caller detaches that caller and disturbs nobody else. Tails and
blocking claims have connections of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Mapping,
    Sequence,
)
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from ff_fast import _arguments, _lifecycle, _tail, _transport, _writing, keys, ops
from ff_fast._aio_worker import Handler, LeaseKeeper, Task, WorkerLoop
from ff_fast._steps import Flow, Pause, Retries, Step
from ff_fast._summary import fold
from ff_fast._tail import Item, StreamPage, TailCore
from ff_fast._writing import SharedWriter
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    ForkedClient,
    FunctionMissing,
    NotPrimary,
    OutcomeUnknown,
    Unavailable,
    WriterClosed,
    WrongLoop,
    check_int,
)
from ff_fast.types import (
    AppendFrameOutcome,
    BackendConfig,
    CancelFlowOutcome,
    CancelFlowPolicy,
    CancelFlowWait,
    CancelOutcome,
    CapabilitySet,
    ClaimPolicy,
    CompletionPayload,
    ExecutionDescription,
    FailOutcome,
    FailureClass,
    FailureReason,
    FlowDescription,
    Frame,
    Handle,
    LeaseRenewal,
    PendingWaitpoint,
    ReclaimToken,
    ReportUsageResult,
    ResumeCondition,
    ResumeSignal,
    RetryPolicy,
    ScannerFilter,
    SignalOutcome,
    StreamDescription,
    StreamMode,
    SummaryDocument,
    SuspendOutcome,
    TailVisibility,
    TimeoutBehavior,
    UsageDimensions,
    WaitpointSpec,
)

if TYPE_CHECKING:
    from datetime import timedelta
    from types import TracebackType

    from ff_fast._hot.writer import Batch
    from ff_fast.embedded import EmbeddedServer

T = TypeVar("T")


class _Source(Protocol):
    """What is read step by step until it has ended, and goes on from where it stood after a lost connection."""

    @property
    def ended(self) -> bool: ...

    def restart(self) -> None: ...


# More calls than this wait their turn on one connection: the batches of the writers behind them grow meanwhile.
_CALLS_IN_FLIGHT = 256
_ROUND_BYTES = 4 << 20

Receiver = Callable[[object], None]

_LOST = object()
"""What a receiver gets in place of a reply that will not come."""


class _Connection(asyncio.Protocol):
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
        self.on_lost: Callable[[_Connection], None] | None = None

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
                reply = reader.gets()
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
            receiver(_LOST)
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
            if not answered.done() and (len(replies) == step.replies or reply is _LOST):
                answered.set_result(None)

        self.send(step.request, [receive] * step.replies)
        try:
            async with asyncio.timeout(_transport.wait_s(timeout, step)):
                await answered
        except TimeoutError:
            raise DeadlineExceeded from None
        if _LOST in replies:
            raise OutcomeUnknown
        return replies


class _Link:
    """The connection that calls and writers share."""

    def __init__(self, backend: ValkeyBackend) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Writer] = deque()
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._recovering: asyncio.Task[None] | None = None
        self._retries = Retries(backend.config.retry, patient=True)
        self._turn = asyncio.Semaphore(_CALLS_IN_FLIGHT)
        self._pump_scheduled = False
        self._watch: asyncio.TimerHandle | None = None
        self._closing = False
        self.writers: weakref.WeakSet[Writer] = weakref.WeakSet()

    # -- writers ------------------------------------------------------------------------------------------------

    def enqueue(self, writer: Writer) -> None:
        self._queue.append(writer)
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def linger(self, writer: Writer) -> None:
        self._loop.call_later(writer.linger_us / 1e6, writer.hurry)

    def _pump(self) -> None:
        """Send what the waiting writers have, as one write."""
        self._pump_scheduled = False
        queue = self._queue
        if not queue or self._closing or self._recovering is not None:
            return
        connection = self._connection
        if connection is None or connection.closed:
            self._recover_soon(None)
            return
        if not connection.writable:
            return
        messages: list[bytes] = []
        receivers: list[Receiver] = []
        size = 0
        room = _CALLS_IN_FLIGHT - len(connection.receivers)
        while queue and len(receivers) < room and size < _ROUND_BYTES:
            writer = queue.popleft()
            batch = writer.next_batch()
            if batch is not None:
                messages.append(batch.message)
                size += len(batch.message)
                receivers.append(_BatchReceiver(self, writer, batch))
        if messages:
            connection.send(messages[0] if len(messages) == 1 else b"".join(messages), receivers)
            self._watch_soon()

    def answered(self, writer: Writer, batch: Batch, reply: object) -> None:
        if reply is _LOST:
            writer.disconnected()
            return
        error = writer.acknowledge(batch, reply)
        if error is not None:
            self._recover_soon(error)
        elif type(reply) is bytes:
            self._retries.reset()

    def _recover_soon(self, error: FFError | None) -> None:
        if self._recovering is None and not self._closing:
            self._recovering = self._backend._spawn(self._recover(error))

    async def _recover(self, error: FFError | None) -> None:
        """After a failure: give the server a moment, and what it lacks, until the writers can go on; or give up."""
        try:
            while True:
                if error is not None:
                    pause = self._retries.pause(error)
                    if pause is None:
                        self._give_up(error)
                        return
                    if isinstance(error, NotPrimary) and self._connection is not None:
                        # The name may lead to another server by now.
                        self._connection.abort()
                    await asyncio.sleep(pause)
                try:
                    if isinstance(error, FunctionMissing):
                        await self.run(_transport.ensure_library())
                    else:
                        await self._connected()
                except FFError as failure:
                    error = failure
                else:
                    return
        finally:
            self._recovering = None
            self._pump()

    def _give_up(self, error: FFError) -> None:
        # The next writer begins with all its retries.
        self._retries.reset()
        waiting, self._queue = self._queue, deque()
        for writer in waiting:
            writer.fail(copy.copy(error))

    def _on_room(self) -> None:
        if self._queue and not self._pump_scheduled:
            self._pump()

    # -- the connection -----------------------------------------------------------------------------------------

    def _watch_soon(self) -> None:
        if self._watch is None:
            self._watch = self._loop.call_later(self._backend._timeout_s, self._watch_now)

    def _watch_now(self) -> None:
        """A server that is silent while it owes replies is taken for lost."""
        self._watch = None
        connection = self._connection
        if connection is None or not connection.receivers:
            return
        if time.monotonic() - connection.silent_since >= self._backend._timeout_s:
            connection.abort()
        else:
            self._watch_soon()

    def _lost(self, connection: _Connection) -> None:
        if self._connection is connection:
            self._connection = None
            if self._queue:
                self._recover_soon(OutcomeUnknown())

    async def _connected(self) -> _Connection:
        """The connection, made again where it was lost: once, for all who wait for it."""
        if self._connection is not None and not self._connection.closed:
            return self._connection
        if self._closing:
            raise _transport.closed_error()
        if self._connecting is None:
            self._connecting = self._backend._spawn(self._connect())
        task = self._connecting
        # Not awaited itself: a caller that is cancelled would take it along.
        await asyncio.wait({task})
        if task.cancelled():
            raise _transport.closed_error()
        error = task.exception()
        if error is not None:
            raise copy.copy(error)
        return task.result()

    async def _connect(self) -> _Connection:
        try:
            connection = await self._backend._connect()
        finally:
            self._connecting = None
        if connection.closed:
            raise Unavailable
        connection.on_room = self._on_room
        lost = connection.on_lost

        def both(gone: _Connection) -> None:
            if lost is not None:
                lost(gone)
            self._lost(gone)

        connection.on_lost = both
        self._connection = connection
        self._on_room()
        return connection

    async def run(self, flow: Flow[T]) -> T:
        """Drive an operation of several steps to its value, on the shared connection."""
        return await _drive(flow, self._ask)

    async def _ask(self, step: Step) -> list[object]:
        connection = await self._connected()
        try:
            async with asyncio.timeout(self._backend._timeout_s) as waiting, self._turn:
                await connection.room()
                # From here on the deadline is that of the reply.
                waiting.reschedule(None)
                self._watch_soon()
                return await connection.ask(step, self._backend._timeout_s)
        except TimeoutError:
            raise _transport.not_sent_in_time() from None

    def stop(self) -> None:
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        if self._connection is not None:
            self._connection.abort()
        for writer in list(self.writers):
            writer.fail(WriterClosed())


class _BatchReceiver:
    """Takes the reply to one batch."""

    __slots__ = ("batch", "link", "writer")

    def __init__(self, link: _Link, writer: Writer, batch: Batch) -> None:
        self.link = link
        self.writer = writer
        self.batch = batch

    def __call__(self, reply: object) -> None:
        self.link.answered(self.writer, self.batch, reply)


async def _drive(flow: Flow[T], ask: Callable[[Step], Awaitable[list[object]]]) -> T:
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


class Writer(SharedWriter):
    """A stream of frames into one attempt. Made by :meth:`ValkeyBackend.open_writer`.

    :meth:`write` is a plain call that never waits; it is made on the backend's loop.
    """

    def __init__(self, state: _writing.WriterState, backend: ValkeyBackend) -> None:
        self._backend = backend
        self._link = backend._link
        self._waiters: list[asyncio.Future[None]] = []
        super().__init__(state)
        self._link.writers.add(self)

    def _on_ready(self) -> None:
        self._backend._check_thread()
        self._link.enqueue(self)

    def _on_linger(self) -> None:
        self._backend._check_thread()
        self._link.linger(self)

    def _forked(self) -> None:
        """The frames are the parent's, which stores them."""
        self._waiters.clear()
        error = ForkedClient()
        self.fail(error)
        error.unstored = ()

    def _on_progress(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self, done: Callable[[], bool], timeout: float | None) -> None:
        self._backend._check_loop()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                while not done():
                    if self.error is not None:
                        raise copy.copy(self.error)
                    waiter: asyncio.Future[None] = loop.create_future()
                    self._waiters.append(waiter)
                    self.waiting = True
                    try:
                        await waiter
                    finally:
                        self._waiters.remove(waiter)
                        self.waiting = bool(self._waiters)
        except TimeoutError:
            raise DeadlineExceeded from None

    async def drain(self, timeout: float | None = None) -> None:
        """Wait while much is unacknowledged; see :meth:`ff_fast.Writer.drain`."""
        self._backend._check_loop()
        if self.error is not None:
            raise copy.copy(self.error)
        if self.unacknowledged_bytes > self.high_water_bytes:
            await self._wait(lambda: self.unacknowledged_bytes <= self.high_water_bytes, timeout)

    async def flush(self, timeout: float | None = None) -> AppendFrameOutcome:
        """Wait until every frame written so far is stored; see :meth:`ff_fast.Writer.flush`."""
        self._backend._check_loop()
        last = self.next_sequence - 1
        self.hurry()
        await self._wait(lambda: self.last_sequence >= last, timeout)
        return self.outcome()

    async def close(self, timeout: float | None = None) -> None:
        """Flush, store what a later writer and late readers continue from, and stop."""
        self._backend._check_loop()
        if self.error is None:
            self.finish()
            await self._wait(lambda: self.idle, timeout)
            self.fail(WriterClosed())
        elif not isinstance(self.error, WriterClosed):
            raise copy.copy(self.error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.close()
            return
        # The error of the block says what went wrong first; `error` keeps what was not stored.
        with contextlib.suppress(FFError):
            # Not for long: whoever interrupts the block wants to get away.
            await self.close(self._backend._timeout_s)


class _WriterOpening:
    """What :meth:`ValkeyBackend.open_writer` returns: awaited, or entered with ``async with``, it is the writer."""

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, Writer]]) -> None:
        self._opening = opening
        self._writer: Writer | None = None

    def __await__(self) -> Generator[Any, None, Writer]:
        return self._opening().__await__()

    async def __aenter__(self) -> Writer:
        self._writer = await self
        return self._writer

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            await self._writer.__aexit__(kind, error, where)


class _Connecting:
    """What :meth:`ValkeyBackend.connect` returns: awaited, or entered with ``async with``, it is the backend."""

    def __init__(self, connecting: Callable[[], Coroutine[Any, Any, ValkeyBackend]]) -> None:
        self._connecting = connecting
        self._backend: ValkeyBackend | None = None

    def __await__(self) -> Generator[Any, None, ValkeyBackend]:
        return self._connecting().__await__()

    async def __aenter__(self) -> ValkeyBackend:
        self._backend = await self
        return self._backend

    async def __aexit__(self, *_: object) -> None:
        if self._backend is not None:
            await self._backend.close()


class ValkeyBackend:
    """Executions and their streams on one Valkey server; see :class:`ff_fast.ValkeyBackend` for every method.

    Made by :meth:`connect` or :meth:`embedded`, on the loop that it then belongs to.
    """

    def __init__(self, config: BackendConfig, server: EmbeddedServer | None = None) -> None:
        self.config = config
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._closed = False
        self._timeout_s = _transport.request_timeout_s(config)
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._own: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._writers: weakref.WeakValueDictionary[str, Writer] = weakref.WeakValueDictionary()
        # Those that `append_frame` opened: nobody else holds them.
        self._implicit: dict[str, Writer] = {}
        self._sweeper = _lifecycle.Sweeper(keys.DEFAULT_PARTITIONS)
        self._link = _Link(self)
        _transport.watch_fork(self)

    @classmethod
    def connect(cls, target: str | BackendConfig) -> _Connecting:
        """Connect to a server: ``async with ValkeyBackend.connect(url) as backend``, or ``await`` it.

        Arguments and errors are those of :meth:`ff_fast.ValkeyBackend.connect`.
        """
        config = _transport.config_of(target)

        async def connecting() -> ValkeyBackend:
            backend = cls(config)
            try:
                await backend._link._connected()
            except BaseException:
                await backend.close()
                raise
            return backend

        return _Connecting(connecting)

    @classmethod
    def embedded(cls, **options: Any) -> _Connecting:
        """Start a private server that is gone when the backend is closed (extra ``embedded``)."""

        async def connecting() -> ValkeyBackend:
            from ff_fast.embedded import EmbeddedServer

            server = await asyncio.to_thread(EmbeddedServer, **options)
            try:
                backend = await cls.connect(server.url)
            except BaseException:
                server.stop()
                raise
            backend._server = server
            # An embedded server has nobody else to look after it.
            _ = backend._spawn(backend.supervise())
            return backend

        return _Connecting(connecting)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    async def close(self) -> None:
        """Close every connection; what waits for a reply there ends with an error.

        Frames that were not flushed are lost: close writers first. Calling it again does nothing.
        """
        self._closed = True
        if self._pid != os.getpid():
            # The sockets and the loop's selector are shared with the parent, which goes on using them.
            return
        self._check_loop()
        # All that matters happens before the first wait, in which a caller may be cancelled.
        tasks, connections = list(self._tasks), list(self._own)
        self._link.stop()
        self._implicit.clear()
        for task in tasks:
            task.cancel()
        for connection in connections:
            connection.abort()
        if tasks:
            await asyncio.wait(tasks)
        for connection in connections:
            await connection.gone()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)

    def _forked(self) -> None:
        """Called in a forked child."""
        for writer in list(self._link.writers):
            writer._forked()

    def __repr__(self) -> str:
        return f"ValkeyBackend({self.config.connection!r})"

    def __reduce__(self) -> Any:
        raise TypeError(
            "A backend holds connections and cannot be pickled; connect again from its config."
        )

    # -- connections --------------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever waits for it sees the error too; they may all have been cancelled.
            error = task.exception()
            if error is not None and not isinstance(error, FFError):
                self._loop.call_exception_handler(
                    {"message": "A task of ff_fast failed.", "exception": error, "task": task}
                )

    def _check_loop(self) -> None:
        if self._pid != os.getpid():
            raise ForkedClient
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WrongLoop from None
        if loop is not self._loop:
            raise WrongLoop

    def _check_thread(self) -> None:
        """Of `write`: another thread or loop would not wake ours; a loop that stands still finds it when it goes on."""
        if self._thread != threading.get_ident() or self._loop.is_closed():
            raise WrongLoop
        if asyncio._get_running_loop() not in (self._loop, None):
            raise WrongLoop

    def _check(self) -> None:
        self._check_loop()
        if self._closed:
            raise _transport.closed_error()

    async def _connect(self) -> _Connection:
        connection = _Connection()
        await connection.open(self.config)
        self._own.add(connection)
        connection.on_lost = self._own.discard
        failure: FFError
        try:
            await _drive(
                _transport.ensure_library(), lambda step: connection.ask(step, self._timeout_s)
            )
        except FFError as error:
            failure = _transport.connect_error(error, self.config)
        except BaseException:
            connection.abort()
            raise
        else:
            return connection
        connection.abort()
        raise failure

    async def _acquire(self) -> _Connection:
        self._check()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return await self._connect()

    def _release(self, connection: _Connection) -> None:
        """Give back a connection that owes no reply; one that does is dropped."""
        if connection.closed or connection.receivers or self._closed:
            connection.abort()
        else:
            self._idle.append(connection)

    async def _run_apart(self, flow: Flow[T]) -> T:
        connection = await self._acquire()
        try:
            return await _drive(flow, lambda step: connection.ask(step, self._timeout_s))
        finally:
            self._release(connection)

    async def _run(
        self, make: Callable[[], Flow[T]], *, repeatable: bool = True, own_connection: bool = False
    ) -> T:
        """Run an operation, again where it may be repeated, until the retries of the configuration are used up."""
        retries = Retries(self.config.retry, repeatable=repeatable)
        while True:
            self._check()
            if not repeatable:
                # Two turns of the loop: an end of the idle connection that the kernel knows of is then known here.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            flow = _transport.with_library(make)
            try:
                return await (self._run_apart(flow) if own_connection else self._link.run(flow))
            except FFError as error:
                pause = None if self._closed else retries.pause(error)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _do(self, call: _arguments.Call[T]) -> T:
        return await self._run(call.flow, repeatable=call.repeatable)

    async def _call(self, op: ops.Op[T]) -> T:
        return await self._run(lambda: ops.call(op), repeatable=op.repeatable)

    # -- executions ---------------------------------------------------------------------------------------------

    async def create_execution(
        self,
        *,
        lane: str = "default",
        payload: bytes | str = b"",
        execution_id: str | None = None,
        priority: int = 0,
        required_capabilities: CapabilitySet | None = None,
        namespace: str = "default",
        tags: Mapping[str, str] | None = None,
        retention_ms: int = _arguments.DEFAULT_RETENTION_MS,
        retry: RetryPolicy | None = None,
        delay: float | timedelta | None = None,
        deadline: float | timedelta | None = None,
        attempt_timeout: float | timedelta | None = None,
        flow_id: str | None = None,
        parent_id: str | None = None,
        budgets: Sequence[str] = (),
    ) -> str:
        """Create an execution; see :meth:`ff_fast.ValkeyBackend.create_execution`."""
        call = _arguments.create(
            lane=lane,
            payload=payload,
            execution_id=execution_id,
            priority=priority,
            required_capabilities=required_capabilities,
            namespace=namespace,
            tags=tags,
            retention_ms=retention_ms,
            retry=retry,
            delay=delay,
            deadline=deadline,
            attempt_timeout=attempt_timeout,
            flow_id=flow_id,
            parent_id=parent_id,
            budgets=budgets,
            partitions=self._sweeper.partitions,
        )
        return await self._do(call)

    async def describe(self, execution_id: str) -> ExecutionDescription:
        """Return the fields of an execution; see :meth:`ff_fast.ValkeyBackend.describe`."""
        return await self._call(ops.describe_execution(keys.canonical_execution_id(execution_id)))

    async def claim(
        self,
        *,
        lane: str = "default",
        worker_id: str,
        worker_instance_id: str,
        lease_ttl_ms: int = 30_000,
        capabilities: CapabilitySet | None = None,
        policy: ClaimPolicy | None = None,
    ) -> Handle | None:
        """Claim the best execution of *lane*; see :meth:`ff_fast.ValkeyBackend.claim`."""
        request = _arguments.claim(
            lane=lane,
            worker_id=worker_id,
            worker_instance_id=worker_instance_id,
            lease_ttl_ms=lease_ttl_ms,
            capabilities=capabilities,
            policy=policy,
        )
        return await self._run(
            lambda: _lifecycle.claim(request, self._sweeper),
            repeatable=False,
            own_connection=request.max_wait_s is not None,
        )

    async def read_payload(self, handle: Handle) -> bytes:
        """Return the payload that the execution of *handle* was created with."""
        return await self._call(ops.read_payload(_arguments.attempt(handle).execution_id))

    async def renew(self, handle: Handle, lease_ttl_ms: int | None = None) -> LeaseRenewal:
        """Extend the lease; see :meth:`ff_fast.ValkeyBackend.renew`."""
        return await self._call(_arguments.renew(handle, lease_ttl_ms))

    async def complete(self, handle: Handle, payload: bytes | str = b"") -> None:
        """End the execution as completed; see :meth:`ff_fast.ValkeyBackend.complete`."""
        await self._do(_arguments.complete(handle, payload))
        self._ended(handle)

    async def fail(
        self,
        handle: Handle,
        reason: FailureReason | str,
        failure_class: FailureClass = FailureClass.PERMANENT,
    ) -> FailOutcome:
        """End the execution as failed; see :meth:`ff_fast.ValkeyBackend.fail`."""
        outcome = await self._do(_arguments.fail(handle, reason, failure_class))
        self._ended(handle)
        return outcome

    def _ended(self, handle: Handle) -> None:
        writer = self._implicit.pop(_arguments.attempt(handle).fields.lease_id, None)
        if writer is not None:
            writer.fail(WriterClosed())

    async def cancel(
        self,
        target: Handle | str,
        *,
        reason: str = "cancelled",
        grace: float | timedelta | None = None,
    ) -> CancelOutcome:
        """See :meth:`ff_fast.ValkeyBackend.cancel`."""
        return await self._do(_arguments.cancel(target, reason, grace))

    async def progress(self, handle: Handle, percent: int | None = None, message: str = "") -> None:
        """See :meth:`ff_fast.ValkeyBackend.progress`."""
        await self._do(_arguments.progress(handle, percent, message))

    async def delay(self, handle: Handle, delay: float | timedelta) -> int:
        """See :meth:`ff_fast.ValkeyBackend.delay`."""
        outcome = await self._do(_arguments.delay(handle, delay))
        self._ended(handle)
        return outcome

    async def wait_children(self, handle: Handle) -> None:
        """See :meth:`ff_fast.ValkeyBackend.wait_children`."""
        await self._do(_arguments.wait_children(handle))
        self._ended(handle)

    async def find_reclaimable(self, limit: int = 100) -> list[ReclaimToken]:
        """See :meth:`ff_fast.ValkeyBackend.find_reclaimable`."""
        return await self._do(_arguments.find_reclaimable(self._sweeper.partitions, limit))

    async def claim_from_reclaim(
        self,
        token: ReclaimToken,
        *,
        worker_id: str,
        worker_instance_id: str,
        lease_ttl_ms: int = 30_000,
        capabilities: CapabilitySet | None = None,
    ) -> Handle:
        """See :meth:`ff_fast.ValkeyBackend.claim_from_reclaim`."""
        return await self._do(
            _arguments.claim_from_reclaim(
                token,
                worker_id=worker_id,
                worker_instance_id=worker_instance_id,
                lease_ttl_ms=lease_ttl_ms,
                capabilities=capabilities,
            )
        )

    async def create_waitpoint(
        self,
        handle: Handle,
        *,
        waitpoint_id: str | None = None,
        expires: float | timedelta = 3600.0,
    ) -> PendingWaitpoint:
        """See :meth:`ff_fast.ValkeyBackend.create_waitpoint`."""
        return await self._do(_arguments.create_waitpoint(handle, waitpoint_id, expires))

    async def suspend(
        self,
        handle: Handle,
        condition: ResumeCondition | WaitpointSpec | Sequence[WaitpointSpec],
        *,
        timeout: float | timedelta | None = None,
        on_timeout: TimeoutBehavior = TimeoutBehavior.FAIL,
        reason: str = "waiting_for_signal",
    ) -> SuspendOutcome:
        """See :meth:`ff_fast.ValkeyBackend.suspend`."""
        outcome = await self._do(_arguments.suspend(handle, condition, timeout, on_timeout, reason))
        if not outcome.already_satisfied:
            self._ended(handle)
        return outcome

    async def deliver_signal(
        self,
        execution_id: str,
        waitpoint: PendingWaitpoint,
        signal_name: str,
        *,
        payload: bytes | str | None = None,
        signal_id: str | None = None,
        idempotency_key: str = "",
        correlation_id: str = "",
        category: str = "",
        source_type: str = "",
        source_identity: str = "",
    ) -> SignalOutcome:
        """See :meth:`ff_fast.ValkeyBackend.deliver_signal`."""
        return await self._do(
            _arguments.deliver_signal(
                execution_id,
                waitpoint,
                signal_name,
                payload=payload,
                signal_id=signal_id,
                idempotency_key=idempotency_key,
                correlation_id=correlation_id,
                category=category,
                source_type=source_type,
                source_identity=source_identity,
            )
        )

    async def report_usage(self, handle: Handle, usage: UsageDimensions) -> ReportUsageResult:
        """See :meth:`ff_fast.ValkeyBackend.report_usage`."""
        return await self._do(_arguments.report_usage(handle, usage))

    async def create_budget(
        self,
        budget_id: str,
        *,
        hard: Mapping[str, int] | None = None,
        soft: Mapping[str, int] | None = None,
    ) -> None:
        """See :meth:`ff_fast.ValkeyBackend.create_budget`."""
        await self._do(_arguments.create_budget(budget_id, hard, soft))

    async def create_flow(self, flow_id: str | None = None, *, namespace: str = "default") -> str:
        """See :meth:`ff_fast.ValkeyBackend.create_flow`."""
        return await self._do(_arguments.create_flow(flow_id, namespace, self._sweeper.partitions))

    async def cancel_flow(
        self,
        flow_id: str,
        policy: CancelFlowPolicy = CancelFlowPolicy.CANCEL_ALL,
        wait: CancelFlowWait = CancelFlowWait.WAIT_INDEFINITE,
        *,
        reason: str = "flow cancelled",
    ) -> CancelFlowOutcome:
        """See :meth:`ff_fast.ValkeyBackend.cancel_flow`."""
        return await self._do(
            _arguments.cancel_flow(flow_id, policy, wait, reason, self._sweeper.partitions)
        )

    async def set_tags(self, execution_id: str, tags: Mapping[str, str]) -> int:
        """See :meth:`ff_fast.ValkeyBackend.set_tags`."""
        return await self._do(_arguments.set_tags(execution_id, tags))

    async def rotate_waitpoint_secret(
        self, kid: str, secret: bytes, *, grace: float | timedelta = 3600.0
    ) -> None:
        """See :meth:`ff_fast.ValkeyBackend.rotate_waitpoint_secret`."""
        await self._do(
            _arguments.rotate_waitpoint_secret(kid, secret, grace, self._sweeper.partitions)
        )

    async def observe_signals(self, handle: Handle) -> tuple[ResumeSignal, ...]:
        """See :meth:`ff_fast.ValkeyBackend.observe_signals`."""
        return await self._call(ops.observe_signals(_arguments.attempt(handle)))

    async def describe_stream(self, execution_id: str, attempt_index: int = 0) -> StreamDescription:
        """See :meth:`ff_fast.ValkeyBackend.describe_stream`."""
        return await self._call(
            ops.describe_attempt(
                keys.canonical_execution_id(execution_id), keys.attempt_index(attempt_index)
            )
        )

    async def describe_flow(self, flow_id: str) -> FlowDescription:
        """See :meth:`ff_fast.ValkeyBackend.describe_flow`."""
        return await self._call(
            ops.describe_flow(
                keys.canonical_uuid("flow_id", flow_id),
                keys.flow_tag(flow_id, self._sweeper.partitions),
            )
        )

    async def get_tags(self, execution_id: str) -> dict[str, str]:
        """See :meth:`ff_fast.ValkeyBackend.get_tags`."""
        return await self._call(ops.read_tags(keys.canonical_execution_id(execution_id)))

    async def read_result(self, execution_id: str) -> bytes:
        """See :meth:`ff_fast.ValkeyBackend.read_result`."""
        return await self._call(ops.read_result(keys.canonical_execution_id(execution_id)))

    # -- streams ------------------------------------------------------------------------------------------------

    def open_writer(
        self,
        handle: Handle,
        *,
        mode: StreamMode | None = None,
        retention_maxlen: int = _writing.RETENTION_MAXLEN,
        max_unacknowledged_bytes: int = _writing.MAX_UNACKNOWLEDGED_BYTES,
        linger_ms: float = 0.0,
    ) -> _WriterOpening:
        """Open the writer of the attempt: ``async with backend.open_writer(handle) as writer``, or ``await`` it.

        Arguments and errors are those of :meth:`ff_fast.ValkeyBackend.open_writer`.
        """
        attempt = _arguments.attempt(handle)
        options = _arguments.writer(
            mode,
            retention_maxlen=retention_maxlen,
            max_unacknowledged_bytes=max_unacknowledged_bytes,
            linger_ms=linger_ms,
        )

        async def opening() -> Writer:
            state = await self._run(lambda: _writing.open_writer(attempt, options))
            self._check()
            writer = Writer(state, self)
            self._writers[attempt.fields.lease_id] = writer
            self._implicit.pop(attempt.fields.lease_id, None)
            return writer

        return _WriterOpening(opening)

    async def append_frame(
        self, handle: Handle, frame: Frame, timeout: float | None = None
    ) -> AppendFrameOutcome:
        """Append one frame and wait until it is stored; see :meth:`ff_fast.ValkeyBackend.append_frame`."""
        _arguments.frame(frame)
        lease_id = _arguments.attempt(handle).fields.lease_id
        self._check()
        async with self._opening:
            # Two callers that opened one each would supersede each other.
            writer = self._writers.get(lease_id)
            if writer is None or isinstance(writer.error, WriterClosed):
                writer = await self.open_writer(handle)
                self._implicit[lease_id] = writer
        writer.write_frame(frame)
        return await writer.flush(timeout)

    async def read_stream(
        self,
        execution_id: str,
        attempt_index: int = 0,
        *,
        after: str | None = None,
        count: int = 100,
        max_bytes: int = 8 << 20,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> StreamPage:
        """Return the frames of one attempt after a cursor; see :meth:`ff_fast.ValkeyBackend.read_stream`."""
        return await self._run(
            lambda: _tail.read_page(
                execution_id,
                attempt_index,
                after=after,
                count=count,
                max_bytes=max_bytes,
                visibility=visibility,
            )
        )

    async def read_summary(
        self, execution_id: str, attempt_index: int = 0
    ) -> SummaryDocument | None:
        """Return the summary of an attempt; see :meth:`ff_fast.ValkeyBackend.read_summary`."""
        eid = keys.canonical_execution_id(execution_id)
        return fold(await self._call(ops.read_summary(eid, keys.attempt_index(attempt_index))))

    def tail(
        self,
        execution_id: str,
        attempt_index: int = 0,
        *,
        after: str | None = None,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> AsyncGenerator[Item, None]:
        """Yield what one attempt streams, live; see :meth:`ff_fast.ValkeyBackend.tail`."""
        core = TailCore(execution_id, attempt_index, after, visibility)
        return self._follow(core, lambda: _transport.read_on(core))

    async def _follow(
        self, core: _Source, read: Callable[[], Flow[list[T]]]
    ) -> AsyncGenerator[T, None]:
        """Yield what *core* reads, on a connection of its own, until it has ended."""
        connection: _Connection | None = None
        retries = Retries(self.config.retry, patient=True)
        try:
            while not core.ended:
                try:
                    if connection is None:
                        connection = await self._acquire()
                    ask = partial(connection.ask, timeout=self._timeout_s)
                    items = await _drive(_transport.with_library(read), ask)
                except FFError as error:
                    pause = retries.pause(error)
                    if pause is None or self._closed:
                        raise
                    if connection is not None:
                        connection.abort()
                        connection = None
                else:
                    retries.reset()
                    for item in items:
                        yield item
                    continue
                core.restart()
                await asyncio.sleep(pause)
        finally:
            if connection is not None:
                self._release(connection)

    def subscribe_completions(
        self, scope: ScannerFilter | None = None, *, after: str | None = None
    ) -> AsyncGenerator[CompletionPayload, None]:
        """Yield every execution that ends; see :meth:`ff_fast.ValkeyBackend.subscribe_completions`."""
        core = _lifecycle.CompletionCore(self._sweeper.partitions, after, _arguments.scope(scope))
        return self._follow(core, core.read)

    # -- work -------------------------------------------------------------------------------------------------------

    async def supervise(
        self,
        scope: ScannerFilter | None = None,
        *,
        interval: float = 0.25,
        stop: asyncio.Event | None = None,
    ) -> None:
        """Fire what is due, until *stop* is set or it is cancelled; see :meth:`ff_fast.ValkeyBackend.supervise`."""
        ended = asyncio.Event() if stop is None else stop
        supervision = _lifecycle.Supervision(self._sweeper.partitions, _arguments.scope(scope))
        while not (ended.is_set() or self._closed):
            try:
                await self._run(supervision.round, own_connection=True)
            except FFError as error:
                # Work waits for the next round; a server that refuses for good is the operator's to hear of.
                if not error.retryable and not self._closed:
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await ended.wait()

    def keep_lease(
        self, handle: Handle, on_lost: Callable[[FFError], None] | None = None
    ) -> LeaseKeeper:
        """Renew a lease in a task until the keeper is stopped: ``async with backend.keep_lease(handle)``.

        Args:
            handle: The lease.
            on_lost: Called with the error when the lease is gone, or could not be renewed before it lapsed. The writers
                of the handle fail with it before.
        """
        self._check()
        lease_id = _arguments.attempt(handle).fields.lease_id

        def lost(error: FFError) -> None:
            writer = self._writers.get(lease_id)
            if writer is not None:
                writer.fail(copy.copy(error))
            if on_lost is not None:
                on_lost(error)

        keeper = LeaseKeeper(
            handle.fields().lease_ttl_ms, lambda: self.renew(handle), lost, lambda: self._closed
        )
        keeper.start(self._spawn)
        return keeper

    async def run_worker(
        self,
        handler: Handler,
        *,
        lane: str = "default",
        worker_id: str = "worker",
        worker_instance_id: str | None = None,
        capabilities: CapabilitySet | None = None,
        lease_ttl_ms: int = 30_000,
        mode: StreamMode | None = None,
        concurrency: int = 1,
        stop: asyncio.Event | None = None,
    ) -> None:
        """Claim executions of a lane and await *handler* for each; see :meth:`ff_fast.ValkeyBackend.run_worker`.

        Cancelling it cancels the handlers that run: what they wrote is stored, and their executions go to other workers
        as from lost ones, within about two seconds. An execution that was being claimed just then comes back when its
        lease lapses.
        """
        check_int("concurrency", concurrency, 1, 10_000)
        await WorkerLoop(
            self,
            handler,
            lane=lane,
            worker_id=worker_id,
            worker_instance_id=worker_instance_id,
            capabilities=capabilities,
            lease_ttl_ms=lease_ttl_ms,
            mode=mode,
            concurrency=concurrency,
            stop=stop,
        ).run()


__all__ = ["LeaseKeeper", "Task", "ValkeyBackend", "Writer"]
