"""The blocking shell: sockets and threads. What is sent, and what an answer means, is decided below it."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ff_fast import _arguments, _lifecycle, _tail, _transport, _writing, keys, ops
from ff_fast._hot.writer import Batch
from ff_fast._steps import Flow, Pause, backoff
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
    ProtocolError,
    Unavailable,
    WriterClosed,
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
_ROUND_BYTES = 4 << 20


class _Channel:
    """One connection: bytes out, replies in, used by one thread at a time."""

    def __init__(self, config: BackendConfig) -> None:
        import hiredis
        from redis.backoff import NoBackoff
        from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
        from redis.retry import Retry

        server = config.connection
        kind: type[Any] = UnixDomainSocketConnection if server.unix_path else Connection
        if server.tls:
            kind = SSLConnection
        self._timeout = _transport.request_timeout_s(config)
        self._connection = kind(
            **_transport.connection_arguments(config), retry=Retry(NoBackoff(), 0)
        )
        try:
            self._connection.connect()
        except Exception as error:
            self._connection.disconnect()
            raise _transport.connect_error(error) from None
        self._socket = self._connection._sock
        self._reader = hiredis.Reader()

    def send(self, request: bytes) -> None:
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(request)
        except TimeoutError:
            self.close()
            raise DeadlineExceeded() from None
        except OSError:
            # Part of the request may have gone out.
            self.close()
            raise OutcomeUnknown() from None
        except BaseException:
            self.close()
            raise

    def receive(self, block_s: float = 0.0) -> object:
        import hiredis

        try:
            while True:
                reply = self._reader.gets()
                if reply is not False:
                    return reply
                self._socket.settimeout(self._timeout + (block_s + _MARGIN_S if block_s else 0.0))
                data = self._socket.recv(1 << 18)
                if not data:
                    raise OSError
                self._reader.feed(data)
        except TimeoutError:
            self.close()
            raise DeadlineExceeded() from None
        except OSError:
            self.close()
            raise OutcomeUnknown() from None
        except hiredis.ProtocolError:
            self.close()
            raise ProtocolError() from None
        except BaseException:
            # An interrupt left a reply unread: the next user of the connection would take it for its own.
            self.close()
            raise

    def run(self, flow: Flow[T]) -> T:
        """Drive an operation of several steps to its value."""
        try:
            step = next(flow)
            while True:
                try:
                    replies: list[object] = []
                    if isinstance(step, Pause):
                        time.sleep(step.seconds)
                    else:
                        self.send(step.request)
                        replies = [self.receive(step.block_s) for _ in range(step.replies)]
                except FFError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(replies)
        except StopIteration as stop:
            value: T = stop.value
            return value

    @property
    def closed(self) -> bool:
        return self._socket is None

    def abort(self) -> None:
        """Wake the thread that waits on the connection; called from another thread."""
        import socket

        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except (OSError, AttributeError):
            pass

    def close(self) -> None:
        self._socket = None
        self._connection.disconnect()


class _Link:
    """The connection of all writers, and the thread that alone touches it.

    In rounds: one request for each writer that has something to send, then their replies. While a round is on its way
    the open batches fill.
    """

    def __init__(self, backend: ValkeyBackend) -> None:
        self._backend = backend
        self._queue: deque[Writer] = deque()
        self._lingering: deque[tuple[float, Writer]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._channel: _Channel | None = None
        self._thread = threading.Thread(target=self._main, name="ff_fast writers", daemon=True)
        self._thread.start()

    def enqueue(self, writer: Writer) -> None:
        self._queue.append(writer)
        self._wake.set()

    def linger(self, writer: Writer) -> None:
        self._lingering.append((time.monotonic() + writer.linger_us / 1e6, writer))
        self._wake.set()

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _main(self) -> None:
        try:
            while not self._closing:
                self._wake.wait(self._until_linger())
                self._wake.clear()
                while self._lingering and self._lingering[0][0] <= time.monotonic():
                    self._lingering.popleft()[1].hurry()
                while self._queue and not self._closing:
                    self._round()
        finally:
            if self._channel is not None:
                self._channel.close()

    def _until_linger(self) -> float | None:
        if not self._lingering:
            return None
        # Lingers of different lengths share the queue, so a short one may wait behind a longer one for that long.
        return max(self._lingering[0][0] - time.monotonic(), 0.0)

    def _round(self) -> None:
        sent: list[tuple[Writer, Batch]] = []
        channel = self._connected()
        if channel is None:
            return
        size = 0
        while self._queue and size < _ROUND_BYTES:
            writer = self._queue.popleft()
            batch = writer.next_batch()
            if batch is not None:
                sent.append((writer, batch))
                size += len(batch.message)
        if not sent:
            return
        again: FFError | None = None
        try:
            channel.send(b"".join([batch.message for _, batch in sent]))
            for writer, batch in sent:
                again = writer.acknowledge(batch, channel.receive()) or again
        except FFError:
            self._channel = None
            for writer in {writer for writer, _ in sent}:
                writer.disconnected()
            return
        if again is not None:
            self._repair(channel, again)

    def _repair(self, channel: _Channel, error: FFError) -> None:
        """A retryable refusal: load the library where it is missing, else give the server a moment."""
        if isinstance(error, FunctionMissing):
            try:
                channel.run(_transport.ensure_library())
            except FFError:
                self._drop()
        else:
            time.sleep(0.05)

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _connected(self) -> _Channel | None:
        """The channel, connected again where it was lost; without one, every waiting writer fails."""
        if self._channel is not None:
            return self._channel
        pauses = backoff(self._backend.config.retry)
        while not self._closing:
            try:
                self._channel = self._backend._connect()
                return self._channel
            except FFError as error:
                pause = next(pauses, None) if error.retryable else None
                if pause is None:
                    while self._queue:
                        self._queue.popleft().fail(copy.copy(error))
                    return None
                time.sleep(pause)
        return None


class Writer(SharedWriter):
    """A stream of frames into one attempt. Made by :meth:`ValkeyBackend.open_writer`.

    :meth:`write` may be called from any thread and never waits; a thread of the backend sends.
    """

    def __init__(self, state: _writing.WriterState, backend: ValkeyBackend) -> None:
        self._backend = backend
        self._link = backend._link
        self._changed = threading.Condition()
        self._waiters = 0
        super().__init__(state)

    def _on_ready(self) -> None:
        self._link.enqueue(self)

    def _on_linger(self) -> None:
        self._link.linger(self)

    def _on_progress(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool], timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._waiters += 1
            self.waiting = True
            try:
                while not done():
                    if self.error is not None:
                        raise self.error.with_traceback(None)
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise DeadlineExceeded()
                    self._changed.wait(left)
            finally:
                self._waiters -= 1
                self.waiting = self._waiters > 0

    def drain(self, timeout: float | None = None) -> None:
        """Wait while more than 1 MiB of payload is unacknowledged.

        Args:
            timeout: Seconds to wait at the most; None waits as long as the writer tries.

        Raises:
            DeadlineExceeded: *timeout* passed; the frames stay on their way.
            FFError: The writer failed.
        """
        if self.unacknowledged_bytes > _writing.HIGH_WATER_BYTES or self.error is not None:
            self._wait(lambda: self.unacknowledged_bytes <= _writing.HIGH_WATER_BYTES, timeout)

    def flush(self, timeout: float | None = None) -> AppendFrameOutcome:
        """Wait until every frame written so far is stored.

        Returns:
            Id of the newest frame, how many frames the attempt has had, and the version of its summary.

        Raises:
            DeadlineExceeded: *timeout* (seconds) passed; the frames stay on their way.
            FFError: The writer failed; the error's ``unstored`` has the frames that were not stored.
        """
        last = self.next_sequence - 1
        self.hurry()
        self._wait(lambda: self.last_sequence >= last, timeout)
        return self.outcome()

    def close(self, timeout: float | None = None) -> None:
        """Flush, store what a later writer and late readers continue from, and stop.

        Raises:
            DeadlineExceeded: *timeout* (seconds) passed.
            FFError: The writer failed.
        """
        if self.error is None:
            self.finish()
            self._wait(lambda: self.idle, timeout)
            self.fail(WriterClosed())
        elif not isinstance(self.error, WriterClosed):
            raise self.error.with_traceback(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.close()
        except FFError:
            # The error of the block says what went wrong first; `error` keeps what was not stored.
            if kind is None:
                raise


class ValkeyBackend:
    """Executions and their streams on one Valkey server. Made by :meth:`connect` or :meth:`embedded`.

    Thread-safe. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(self, config: BackendConfig, server: EmbeddedServer | None = None) -> None:
        self.config = config
        self._server = server
        self._pid = os.getpid()
        self._closed = False
        self._idle: deque[_Channel] = deque()
        self._lock = threading.Lock()
        self._link_started: _Link | None = None
        self._writers: dict[str, Writer] = {}
        self._sweeper = _lifecycle.Sweeper(keys.DEFAULT_PARTITIONS)

    @classmethod
    def connect(cls, target: str | BackendConfig) -> Self:
        """Connect to a server, and load the function library where it is missing or older.

        Args:
            target: URL (``valkey://user:password@host:port/db``, ``valkeys://``, ``redis://``, ``rediss://``,
                ``unix:///path``) or a :class:`BackendConfig`.

        Raises:
            InvalidInput: The URL is not one of these.
            Unavailable, AuthenticationFailed, TlsFailed, PermissionDenied, LibraryMismatch: No usable server.
        """
        backend = cls(_transport.config_of(target))
        try:
            backend._release(backend._connect())
        except BaseException:
            backend.close()
            raise
        return backend

    @classmethod
    def embedded(cls, **options: Any) -> Self:
        """Start a private server that is gone when the backend is closed (extra ``embedded``).

        Args:
            **options: As :class:`ff_fast.embedded.EmbeddedServer` takes them.

        Raises:
            MissingDependency: The extra is not installed.
        """
        from ff_fast.embedded import EmbeddedServer

        server = EmbeddedServer(**options)
        try:
            backend = cls.connect(server.url)
        except BaseException:
            server.stop()
            raise
        backend._server = server
        return backend

    def close(self) -> None:
        """Close every connection. Frames that were not flushed are lost: close writers first."""
        self._closed = True
        if self._link_started is not None and self._pid == os.getpid():
            self._link_started.close()
        while self._idle:
            self._idle.popleft().close()
        for writer in list(self._writers.values()):
            writer.fail(WriterClosed())
        self._writers.clear()
        if self._server is not None:
            self._server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ValkeyBackend({self.config.connection!r})"

    def __reduce__(self) -> Any:
        raise TypeError("A backend holds connections and cannot be pickled; connect again from its config.")

    # -- connections --------------------------------------------------------------------------------------------

    @property
    def _link(self) -> _Link:
        with self._lock:
            if self._link_started is None:
                self._link_started = _Link(self)
            return self._link_started

    def _connect(self) -> _Channel:
        channel = _Channel(self.config)
        try:
            channel.run(_transport.ensure_library())
        except BaseException:
            channel.close()
            raise
        return channel

    def _acquire(self) -> _Channel:
        if self._pid != os.getpid():
            raise ForkedClient()
        if self._closed:
            raise Unavailable("The backend is closed; connect again.")
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def _release(self, channel: _Channel) -> None:
        if channel.closed:
            return
        if self._closed:
            channel.close()
        else:
            self._idle.append(channel)

    def _run(self, flow: Callable[[], Flow[T]], *, repeatable: bool = True) -> T:
        """Run an operation, again where it may be repeated, until the retries of the configuration are used up."""
        pauses = backoff(self.config.retry)
        while True:
            try:
                channel = self._acquire()
                try:
                    return channel.run(flow())
                except FunctionMissing:
                    channel.run(_transport.ensure_library())
                    raise
                finally:
                    self._release(channel)
            except FFError as error:
                if not error.retryable or (error.outcome is Outcome.UNKNOWN and not repeatable):
                    raise
                pause = next(pauses, None)
                if pause is None or isinstance(error, DeadlineExceeded):
                    raise
            time.sleep(pause)

    def _call(self, op: ops.Op[T]) -> T:
        return self._run(lambda: ops.call(op), repeatable=op.repeatable)

    # -- executions ---------------------------------------------------------------------------------------------

    def create_execution(
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
        """Create an execution that a worker of *lane* can claim, and return its id.

        Args:
            lane: 1 to 64 printable ASCII characters.
            payload: What the worker gets, at most 16 MiB.
            execution_id: Its id, as an earlier call or ``keys.new_execution_id`` made it; the same id again changes
                nothing. None makes one, so this call is repeated safely by itself.
            priority: 0 to 9000; the highest is claimed first, then the oldest.
            required_capabilities: What a worker must offer to claim it.
            namespace: Tenant, free text.
            tags: ``namespace.name`` to text.
            retention_ms: How long everything of it is kept after its end, in ms.

        Raises:
            InvalidInput: An argument is not one of those that are accepted.
        """
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
        return self._run(lambda: _lifecycle.create(op, lane, eid))

    def describe(self, execution_id: str) -> dict[str, str]:
        """Return the fields of an execution as the server holds them; the id of its lease is left out.

        Raises:
            ExecutionNotFound: There is none.
        """
        return self._call(ops.describe_execution(keys.canonical_execution_id(execution_id)))

    def claim(
        self,
        *,
        lane: str = "default",
        worker_id: str,
        worker_instance_id: str,
        lease_ttl_ms: int = 30_000,
        capabilities: CapabilitySet | None = None,
        policy: ClaimPolicy | None = None,
    ) -> Handle | None:
        """Claim the best execution of *lane* that *capabilities* cover, under a lease.

        Args:
            lane: Lane to take work from.
            worker_id: Which worker this is, free text.
            worker_instance_id: Which process of it, free text.
            lease_ttl_ms: Length of the lease in ms; renew it before it lapses.
            capabilities: What this worker can do.
            policy: How long to wait for work; the server wakes the worker. None answers at once.

        Returns:
            The handle, or None where there is no work.

        Raises:
            InvalidInput: An argument is not one of those that are accepted.
            OutcomeUnknown: The reply was lost. Calling again is safe: an execution that was claimed without an owner
                comes back when its lease lapses.
        """
        request = _arguments.claim(
            lane=lane,
            worker_id=worker_id,
            worker_instance_id=worker_instance_id,
            lease_ttl_ms=lease_ttl_ms,
            capabilities=capabilities,
            policy=policy,
        )
        return self._run(lambda: _lifecycle.claim(request, self._sweeper), repeatable=False)

    def read_payload(self, handle: Handle) -> bytes:
        """Return the payload that the execution of *handle* was created with."""
        return self._call(ops.read_payload(_arguments.attempt(handle)))

    def renew(self, handle: Handle, lease_ttl_ms: int | None = None) -> LeaseRenewal:
        """Extend the lease to *lease_ttl_ms* (ms; that of the claim where None) from now.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        return self._call(_arguments.renew(handle, lease_ttl_ms))

    def complete(self, handle: Handle, payload: bytes | str = b"") -> None:
        """End the execution as completed, with *payload* as its result; its stream ends with it.

        Calling it again is safe. Flush or close writers first: frames that are still on their way are refused.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        self._call(_arguments.complete(handle, payload))

    def fail(
        self,
        handle: Handle,
        reason: FailureReason | str,
        failure_class: FailureClass = FailureClass.PERMANENT,
    ) -> FailOutcome:
        """End the execution as failed; its stream ends with it. Calling it again is safe.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        return self._call(_arguments.fail(handle, reason, failure_class))

    # -- streams ------------------------------------------------------------------------------------------------

    def open_writer(
        self,
        handle: Handle,
        *,
        mode: StreamMode | None = None,
        retention_maxlen: int = _writing.RETENTION_MAXLEN,
        max_unacknowledged_bytes: int = _writing.MAX_UNACKNOWLEDGED_BYTES,
        linger_ms: float = 0.0,
    ) -> Writer:
        """Open the writer of the attempt; one that was open before is superseded.

        Args:
            handle: From :meth:`claim`.
            mode: Mode of frames that name none; durable where None.
            retention_maxlen: Least number of durable frames that stay readable.
            max_unacknowledged_bytes: Past this many bytes, ``write`` raises ``Overloaded``.
            linger_ms: How long a batch may wait for more frames, 0 to 1000 ms.

        Raises:
            ExecutionNotFound, StaleOwner, ExecutionSuspended, StreamClosed, LeaseExpired: The handle may not write.
        """
        attempt = _arguments.attempt(handle)
        options = _arguments.writer(
            mode,
            retention_maxlen=retention_maxlen,
            max_unacknowledged_bytes=max_unacknowledged_bytes,
            linger_ms=linger_ms,
        )
        state = self._run(lambda: _writing.open_writer(attempt, options))
        writer = Writer(state, self)
        self._writers[attempt.fields.lease_id] = writer
        return writer

    def append_frame(self, handle: Handle, frame: Frame, timeout: float | None = None) -> AppendFrameOutcome:
        """Append one frame and wait until it is stored.

        The writer that is open for the handle is used, or one is opened. With ``frame.seq`` the call is idempotent:
        a frame that this writer has written is not written again.

        Raises:
            SequenceGap: ``frame.seq`` is not the next sequence.
            FFError: As `Writer.write` and `Writer.flush`.
        """
        _arguments.frame(frame)
        writer = self._writers.get(_arguments.attempt(handle).fields.lease_id)
        if writer is None or isinstance(writer.error, WriterClosed):
            writer = self.open_writer(handle)
        writer.write_frame(frame)
        return writer.flush(timeout)

    def read_stream(
        self,
        execution_id: str,
        attempt_index: int = 0,
        *,
        after: str | None = None,
        count: int = 100,
        max_bytes: int = 8 << 20,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> StreamPage:
        """Return the frames of one attempt after a cursor, without waiting.

        Args:
            execution_id: Id of the execution.
            attempt_index: Attempt, from 0.
            after: Id of a frame or a cursor, exclusive; None is the beginning.
            count: 1 to 10,000 frames.
            max_bytes: About how many bytes of payload, 1 to 64 MiB.
            visibility: Whether best-effort frames are wanted.

        Raises:
            ExecutionNotFound, AttemptNotFound: There is no such attempt.
            InvalidInput: An argument is not one of those that are accepted.
        """
        return self._run(
            lambda: _tail.read_page(
                execution_id,
                attempt_index,
                after=after,
                count=count,
                max_bytes=max_bytes,
                visibility=visibility,
            )
        )

    def read_summary(self, execution_id: str, attempt_index: int = 0) -> SummaryDocument | None:
        """Return the summary of an attempt with the cursor that continues it; None where it has none.

        Raises:
            ExecutionNotFound: There is no such execution.
        """
        eid = keys.canonical_execution_id(execution_id)
        return fold(self._call(ops.read_summary(eid, keys.attempt_index(attempt_index))))

    def tail(
        self,
        execution_id: str,
        attempt_index: int = 0,
        *,
        after: str | None = None,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> Iterator[Item]:
        """Yield what one attempt streams, live, on a connection of its own.

        Yields:
            ``StreamFrame`` in sequence order; a ``Gap`` wherever frames are missing; at last one ``End``.

        Args:
            execution_id: Id of the execution.
            attempt_index: Attempt, from 0; one that is not claimed yet is waited for.
            after: Id of a frame or the cursor of a summary, exclusive; None is the beginning.
            visibility: Whether best-effort frames are wanted.

        Raises:
            ExecutionNotFound, AttemptNotFound: There is no such attempt.
            InvalidInput: An argument is not one of those that are accepted.
            Unavailable: The server cannot be reached; the tail reconnected as often as the configuration allows.
        """
        core = TailCore(execution_id, attempt_index, after, visibility)
        return self._tail(core)

    def _tail(self, core: TailCore) -> Iterator[Item]:
        channel: _Channel | None = None
        pauses = backoff(self.config.retry)
        try:
            while not core.ended:
                try:
                    if channel is None:
                        channel = self._acquire()
                    step = core.step()
                    channel.send(step.request)
                    items = core.receive(channel.receive(step.block_s))
                except FFError as error:
                    if channel is not None and isinstance(error, FunctionMissing):
                        channel.run(_transport.ensure_library())
                    elif channel is not None:
                        channel.close()
                        channel = None
                    pause = next(pauses, None) if error.retryable else None
                    if pause is None or self._closed:
                        raise
                    core.restart()
                    time.sleep(pause)
                    continue
                if items:
                    pauses = backoff(self.config.retry)
                    yield from items
        finally:
            if channel is not None:
                # Between two steps nothing is outstanding, so the connection is as good as new.
                self._release(channel)
