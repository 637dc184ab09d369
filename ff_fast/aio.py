"""The asyncio shell: the same names as :mod:`ff_fast`, awaited. `Writer.write` stays a plain call.

Everything of one backend happens on the loop that connected it. Calls and writers share one connection, which one
protocol object alone reads and writes: cancelling a caller detaches that caller and disturbs nobody else. Tails and
blocking claims have connections of their own.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ff_fast import _arguments, _lifecycle, _tail, _transport, _writing, keys, ops
from ff_fast._hot.writer import Batch
from ff_fast._steps import Flow, Pause, Step, backoff
from ff_fast._summary import fold
from ff_fast._tail import Item, StreamPage, TailCore
from ff_fast._writing import SharedWriter
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    ForkedClient,
    FunctionMissing,
    Outcome,
    OutcomeUnknown,
    Unavailable,
    WriterClosed,
    WrongLoop,
)
from ff_fast.types import (
    AppendFrameOutcome,
    BackendConfig,
    CapabilitySet,
    ClaimPolicy,
    FailOutcome,
    FailureClass,
    FailureReason,
    Frame,
    Handle,
    LeaseRenewal,
    StreamMode,
    SummaryDocument,
    TailVisibility,
)

if TYPE_CHECKING:
    from ff_fast.embedded import EmbeddedServer

T = TypeVar("T")

_MARGIN_S = 2.0
# More calls than this wait their turn on one connection: the batches of the writers behind them grow meanwhile.
_CALLS_IN_FLIGHT = 256
_ROUND_BYTES = 4 << 20

Receiver = Callable[[object], None]


class _Connection(asyncio.Protocol):
    """One connection: bytes out; each reply to the receiver whose turn it is."""

    def __init__(self, lost: Callable[[], None] | None = None) -> None:
        import hiredis

        self._reader = hiredis.Reader()
        self._broken_reply = hiredis.ProtocolError
        self._lost = lost
        self._gone = asyncio.get_running_loop().create_future()
        self._paused: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._connection: Any = None
        self.receivers: deque[Receiver] = deque()
        self.heard_at = 0.0
        self.after_data: Callable[[], None] | None = None

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
        try:
            await connection.connect()
        except Exception as error:
            await connection.disconnect(nowait=True)
            raise _transport.connect_error(error) from None
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        # From here on the transport is ours; the handshake has left no byte unread.
        self._connection = connection
        transport: asyncio.Transport = connection._writer.transport
        transport.set_protocol(self)
        self._transport = transport
        transport.resume_reading()
        self.heard_at = time.monotonic()

    @property
    def closed(self) -> bool:
        return self._transport is None

    @property
    def writable(self) -> bool:
        return self._transport is not None and self._paused is None

    def send(self, request: bytes) -> None:
        if self._transport is None:
            raise Unavailable()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        reader, receivers = self._reader, self.receivers
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                receivers.popleft()(reply)
        except (self._broken_reply, IndexError):
            # Bytes that are no reply, or a reply that nobody asked for: nothing after it can be trusted.
            self.abort()
        if self.after_data is not None:
            self.after_data()

    def pause_writing(self) -> None:
        self._paused = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._paused is not None:
            self._paused.set_result(None)
            self._paused = None
        if self.after_data is not None:
            self.after_data()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        # redis-py's own objects think that they still own the transport; let them go without a word.
        self._connection._writer = None
        self._connection._reader = None
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
        if not self._gone.done():
            self._gone.set_result(None)
        receivers, self.receivers = self.receivers, deque()
        for receiver in receivers:
            receiver(_LOST)
        if self._lost is not None:
            self._lost()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Close and wait until the connection is gone."""
        if self._transport is not None:
            self._transport.abort()
            await asyncio.shield(self._gone)

    async def ask(self, step: Step, timeout: float) -> list[object]:
        """Send *step* and return its replies.

        Raises:
            OutcomeUnknown: The connection was lost first.
            DeadlineExceeded: No reply came within *timeout* seconds, beyond what the server may block.
        """
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[list[object]] = loop.create_future()
        replies: list[object] = []

        def receive(reply: object) -> None:
            replies.append(reply)
            if not answered.done() and (len(replies) == step.replies or reply is _LOST):
                answered.set_result(replies)

        self.send(step.request)
        self.receivers.extend([receive] * step.replies)
        try:
            async with asyncio.timeout(timeout + (step.block_s + _MARGIN_S if step.block_s else 0)):
                await answered
        except TimeoutError:
            raise DeadlineExceeded() from None
        if _LOST in replies:
            raise OutcomeUnknown()
        return replies


_LOST = object()


class _Link:
    """The connection that calls and writers share."""

    def __init__(self, backend: ValkeyBackend) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Writer] = deque()
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._pump_scheduled = False
        self._repair: FFError | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._closing = False

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
        connection = self._connection
        if connection is None or connection.closed:
            if self._queue and not self._closing:
                self._connect_soon()
            return
        if self._repair is not None or not connection.writable:
            return
        queue, receivers = self._queue, connection.receivers
        messages: list[bytes] = []
        size = 0
        while queue and len(receivers) < _CALLS_IN_FLIGHT and size < _ROUND_BYTES:
            writer = queue.popleft()
            batch = writer.next_batch()
            if batch is not None:
                messages.append(batch.message)
                size += len(batch.message)
                receivers.append(_BatchReceiver(self, writer, batch))
        if messages:
            connection.send(messages[0] if len(messages) == 1 else b"".join(messages))
            self._watch_soon()

    def answered(self, writer: Writer, batch: Batch, reply: object) -> None:
        if reply is _LOST:
            writer.disconnected()
            return
        error = writer.acknowledge(batch, reply)
        if error is not None and self._repair is None:
            self._repair = error
            self._backend._spawn(self._repaired(error))

    async def _repaired(self, error: FFError) -> None:
        """A retryable refusal: load the library where it is missing, else give the server a moment."""
        try:
            if isinstance(error, FunctionMissing):
                await self.run(_transport.ensure_library())
            else:
                await asyncio.sleep(0.05)
        except FFError:
            if self._connection is not None:
                self._connection.abort()
        finally:
            self._repair = None
            self._after_data()

    def _after_data(self) -> None:
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
        if time.monotonic() - connection.heard_at > self._backend._timeout_s:
            connection.abort()
        else:
            self._watch_soon()

    def _lost(self) -> None:
        self._connection = None
        if self._queue and not self._closing:
            self._connect_soon()

    def _connect_soon(self) -> None:
        if self._connecting is None:
            self._connecting = self._backend._spawn(self._reconnect())

    async def _reconnect(self) -> None:
        """Connect for the writers that wait; when it cannot be done, they fail."""
        try:
            await self._connected()
        except FFError as error:
            while self._queue:
                self._queue.popleft().fail(copy.copy(error))
        finally:
            self._connecting = None
        self._after_data()

    async def _connected(self) -> _Connection:
        pauses = backoff(self._backend.config.retry)
        while True:
            try:
                return await self._connect_once()
            except FFError as error:
                pause = next(pauses, None) if error.retryable else None
                if pause is None or self._closing:
                    raise
            await asyncio.sleep(pause)

    async def _connect_once(self) -> _Connection:
        if self._connection is not None and not self._connection.closed:
            return self._connection
        async with self._backend._connect_lock:
            if self._connection is not None and not self._connection.closed:
                return self._connection
            connection = await self._backend._connect(self._lost)
            connection.after_data = self._after_data
            self._connection = connection
        self._after_data()
        return connection

    async def run(self, flow: Flow[T]) -> T:
        """Drive an operation of several steps to its value, on the shared connection."""
        return await _drive(flow, self._ask)

    async def _ask(self, step: Step) -> list[object]:
        connection = await self._connect_once()
        self._watch_soon()
        return await connection.ask(step, self._backend._timeout_s)

    async def close(self) -> None:
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        if self._connection is not None:
            await self._connection.close()


class _BatchReceiver:
    """Takes the reply to one batch."""

    __slots__ = ("batch", "link", "writer")

    def __init__(self, link: _Link, writer: Writer, batch: Batch) -> None:
        self.link = link
        self.writer = writer
        self.batch = batch

    def __call__(self, reply: object) -> None:
        self.link.answered(self.writer, self.batch, reply)


async def _drive(flow: Flow[T], ask: Callable[[Step], Any]) -> T:
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

    def _on_ready(self) -> None:
        self._link.enqueue(self)

    def _on_linger(self) -> None:
        self._link.linger(self)

    def _on_progress(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self, done: Callable[[], bool], timeout: float | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                while not done():
                    if self.error is not None:
                        raise self.error.with_traceback(None)
                    waiter: asyncio.Future[None] = loop.create_future()
                    self._waiters.append(waiter)
                    self.waiting = True
                    try:
                        await waiter
                    finally:
                        self._waiters.remove(waiter)
                        self.waiting = bool(self._waiters)
        except TimeoutError:
            raise DeadlineExceeded() from None

    async def drain(self, timeout: float | None = None) -> None:
        """Wait while more than 1 MiB of payload is unacknowledged; see :meth:`ff_fast.Writer.drain`."""
        if self.unacknowledged_bytes > _writing.HIGH_WATER_BYTES or self.error is not None:
            await self._wait(lambda: self.unacknowledged_bytes <= _writing.HIGH_WATER_BYTES, timeout)

    async def flush(self, timeout: float | None = None) -> AppendFrameOutcome:
        """Wait until every frame written so far is stored; see :meth:`ff_fast.Writer.flush`."""
        last = self.next_sequence - 1
        self.hurry()
        await self._wait(lambda: self.last_sequence >= last, timeout)
        return self.outcome()

    async def close(self, timeout: float | None = None) -> None:
        """Flush, store what a later writer and late readers continue from, and stop."""
        if self.error is None:
            self.finish()
            await self._wait(lambda: self.idle, timeout)
            self.fail(WriterClosed())
        elif not isinstance(self.error, WriterClosed):
            raise self.error.with_traceback(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except FFError:
            # The error of the block says what went wrong first; `error` keeps what was not stored.
            if kind is None:
                raise


class _WriterOpening:
    """What :meth:`ValkeyBackend.open_writer` returns: awaited, or entered with ``async with``, it is the writer."""

    def __init__(self, opening: Callable[[], Any]) -> None:
        self._opening = opening
        self._writer: Writer | None = None

    def __await__(self) -> Any:
        return self._opening().__await__()

    async def __aenter__(self) -> Writer:
        self._writer = await self
        return self._writer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._writer is not None:
            await self._writer.__aexit__(kind, error, where)


class _Connecting:
    """What :meth:`ValkeyBackend.connect` returns: awaited, or entered with ``async with``, it is the backend."""

    def __init__(self, connecting: Callable[[], Any]) -> None:
        self._connecting = connecting
        self._backend: ValkeyBackend | None = None

    def __await__(self) -> Any:
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
        self._closed = False
        self._timeout_s = _transport.request_timeout_s(config)
        self._connect_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._own: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._writers: dict[str, Writer] = {}
        self._sweeper = _lifecycle.Sweeper(keys.DEFAULT_PARTITIONS)
        self._link = _Link(self)

    @classmethod
    def connect(cls, target: str | BackendConfig) -> _Connecting:
        """Connect to a server: ``async with ValkeyBackend.connect(url) as backend``, or ``await`` it.

        Arguments and errors are those of :meth:`ff_fast.ValkeyBackend.connect`.
        """
        config = _transport.config_of(target)

        async def connecting() -> ValkeyBackend:
            backend = cls(config)
            try:
                await backend._link._connect_once()
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
            return backend

        return _Connecting(connecting)

    async def close(self) -> None:
        """Close every connection. Frames that were not flushed are lost: close writers first."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._link.close()
        for connection in list(self._own):
            await connection.close()
        for writer in list(self._writers.values()):
            writer.fail(WriterClosed())
        self._writers.clear()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)

    def __repr__(self) -> str:
        return f"ValkeyBackend({self.config.connection!r})"

    def __reduce__(self) -> Any:
        raise TypeError("A backend holds connections and cannot be pickled; connect again from its config.")

    # -- connections --------------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedClient()
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoop()
        if self._closed:
            raise Unavailable("The backend is closed; connect again.")

    async def _connect(self, lost: Callable[[], None] | None = None) -> _Connection:
        connection = _Connection(lost)
        try:
            await connection.open(self.config)
            self._own.add(connection)
            await _drive(
                _transport.ensure_library(), lambda step: connection.ask(step, self._timeout_s)
            )
        except BaseException:
            self._own.discard(connection)
            await connection.close()
            raise
        return connection

    async def _acquire(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return await self._connect()

    def _release(self, connection: _Connection) -> None:
        """Give back a connection that owes no reply; one that does is dropped."""
        if connection.closed or connection.receivers or self._closed:
            connection.abort()
            self._own.discard(connection)
        else:
            self._idle.append(connection)

    async def _run(
        self, flow: Callable[[], Flow[T]], *, repeatable: bool = True, own_connection: bool = False
    ) -> T:
        """Run an operation, again where it may be repeated, until the retries of the configuration are used up."""
        self._check()
        pauses = backoff(self.config.retry)
        while True:
            try:
                try:
                    if not own_connection:
                        return await self._link.run(flow())
                    connection = await self._acquire()
                    try:
                        return await _drive(
                            flow(), lambda step: connection.ask(step, self._timeout_s)
                        )
                    finally:
                        self._release(connection)
                except FunctionMissing:
                    await self._link.run(_transport.ensure_library())
                    raise
            except FFError as error:
                if not error.retryable or (error.outcome is Outcome.UNKNOWN and not repeatable):
                    raise
                pause = next(pauses, None)
                if pause is None or self._closed or isinstance(error, DeadlineExceeded):
                    raise
            await asyncio.sleep(pause)

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
    ) -> str:
        """Create an execution; see :meth:`ff_fast.ValkeyBackend.create_execution`."""
        op = _arguments.create(
            lane=lane,
            payload=payload,
            execution_id=execution_id,
            priority=priority,
            required_capabilities=required_capabilities,
            namespace=namespace,
            tags=tags,
            retention_ms=retention_ms,
            partitions=self._sweeper.partitions,
        )
        eid = op.argv[0].decode()
        return await self._run(lambda: _lifecycle.create(op, lane, eid))

    async def describe(self, execution_id: str) -> dict[str, str]:
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
        return await self._call(ops.read_payload(_arguments.attempt(handle)))

    async def renew(self, handle: Handle, lease_ttl_ms: int | None = None) -> LeaseRenewal:
        """Extend the lease; see :meth:`ff_fast.ValkeyBackend.renew`."""
        return await self._call(_arguments.renew(handle, lease_ttl_ms))

    async def complete(self, handle: Handle, payload: bytes | str = b"") -> None:
        """End the execution as completed; see :meth:`ff_fast.ValkeyBackend.complete`."""
        await self._call(_arguments.complete(handle, payload))

    async def fail(
        self,
        handle: Handle,
        reason: FailureReason | str,
        failure_class: FailureClass = FailureClass.PERMANENT,
    ) -> FailOutcome:
        """End the execution as failed; see :meth:`ff_fast.ValkeyBackend.fail`."""
        return await self._call(_arguments.fail(handle, reason, failure_class))

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
            writer = Writer(state, self)
            self._writers[attempt.fields.lease_id] = writer
            return writer

        return _WriterOpening(opening)

    async def append_frame(
        self, handle: Handle, frame: Frame, timeout: float | None = None
    ) -> AppendFrameOutcome:
        """Append one frame and wait until it is stored; see :meth:`ff_fast.ValkeyBackend.append_frame`."""
        _arguments.frame(frame)
        writer = self._writers.get(_arguments.attempt(handle).fields.lease_id)
        if writer is None or isinstance(writer.error, WriterClosed):
            writer = await self.open_writer(handle)
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
        return self._tail(TailCore(execution_id, attempt_index, after, visibility))

    async def _tail(self, core: TailCore) -> AsyncGenerator[Item, None]:
        self._check()
        connection: _Connection | None = None
        pauses = backoff(self.config.retry)
        try:
            while not core.ended:
                try:
                    if connection is None:
                        connection = await self._acquire()
                    step = core.step()
                    (reply,) = await connection.ask(step, self._timeout_s)
                    items = core.receive(reply)
                except FFError as error:
                    if connection is not None:
                        connection.abort()
                        self._own.discard(connection)
                        connection = None
                    pause = next(pauses, None) if error.retryable else None
                    if pause is None or self._closed:
                        raise
                    core.restart()
                    await asyncio.sleep(pause)
                    continue
                if items:
                    pauses = backoff(self.config.retry)
                for item in items:
                    yield item
        finally:
            if connection is not None:
                self._release(connection)


__all__ = ["ValkeyBackend", "Writer"]
