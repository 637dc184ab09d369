"""The store of assistant-ui's resumable streams, over named streams (extra ``assistant-ui``).

::

    store = ValkeyResumableStreamStore(backend)
    context = create_resumable_stream_context(store=store)

    @app.post("/chat/{turn}")
    async def chat(turn: str, request: Request):
        return await create_resumable_assistant_stream_response(
            context=context, stream_id=turn, callback=run
        )

Every process of the application has such a store over the same deployment, and any of them resumes what another one
produces.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ff_fast._core import ops
from ff_fast._core.operations import Call
from ff_fast._hot.frames import StreamFrame
from ff_fast.errors import (
    AttemptNotFound,
    ExecutionNotFound,
    FFError,
    InvalidCursor,
    LeaseExpired,
    MissingDependency,
    StaleOwner,
    WriterSuperseded,
    check_int,
)
from ff_fast.types import End, Gap, split_cursor

try:
    from assistant_stream.resumable import (
        DEFAULT_TTL_MS,
        ResumableStreamEntry,
        ResumableStreamError,
        validate_stream_id,
    )
except ImportError as error:
    raise MissingDependency(
        "ff_fast.adapters.assistant_ui needs assistant-stream; run: pip install 'ff_fast[assistant-ui]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from assistant_stream.resumable import (
        CancellationSignal,
        ResumableStreamRole,
        ResumableStreamStatus,
    )

    from ff_fast import aio
    from ff_fast.types import Durability

NAMESPACE = "assistant-ui"

# A chunk that no frame can hold is split: all parts but the last one have this type.
_PART, _CHUNK = "part", "chunk"
# Chunks are never trimmed while the stream is kept.
_RETENTION = 2**40
_ERROR_LIMIT = 16_384

_DELETED = "deleted by its store"
_IDLE = "nothing was appended within its ttl"
_ERRORED = "Stream errored"
_ABANDONED = "the task that appended to the stream was cancelled"
_PRODUCER_LOST = "The producer of the stream is lost"
_INCOMPLETE = "Chunks of the stream are not kept any more"


class _Production:
    """A stream that this store produces.

    Attributes:
        appending: Held while the frames of a chunk are written, which nothing may come between.
    """

    def __init__(
        self,
        stream: aio.OpenedStream,
        ttl_s: float,
        on_idle: Callable[[_Production], None],
        on_abandoned: Callable[[_Production], None],
    ) -> None:
        self.stream = stream
        self.appending = asyncio.Lock()
        self._ttl_s = ttl_s
        self._on_idle = on_idle
        self._on_abandoned = on_abandoned
        self._appender: asyncio.Task[Any] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self.renew()

    def renew(self) -> None:
        """Let the time begin anew after which the stream is idle."""
        if self._expiry is not None:
            self._expiry.cancel()
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(self._ttl_s, self._on_idle, self)

    def appended_by(self, task: asyncio.Task[Any] | None) -> None:
        """Note the task that appends; where it is cancelled, the stream is abandoned."""
        if task is self._appender:
            return
        if self._appender is not None:
            self._appender.remove_done_callback(self._appender_ended)
        self._appender = task
        if task is not None:
            task.add_done_callback(self._appender_ended)

    def _appender_ended(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self._on_abandoned(self)

    def stop(self) -> None:
        """Watch neither the time nor a task any more."""
        if self._expiry is not None:
            self._expiry.cancel()
        self.appended_by(None)


class ValkeyResumableStreamStore:
    """A ``ResumableStreamStore`` of assistant-ui: each stream is a named stream, each chunk a durable frame.

    What differs from the stores of assistant-ui:

    - A reader is pushed what is appended, and does not poll. `append` is one call of the server, shared by all streams
      of the backend, and returns when the chunk is stored.
    - A producer holds a lease. One that dies is found when its lease lapses: its readers get a ``RuntimeError``, the status
      is ``error``, and the next `acquire` makes a producer that begins anew. What the lost one appends is refused.
    - A task that is cancelled after it has appended ends its stream with an error.

    A stream that this store has acquired and that nothing is appended to is removed after its ``ttl_ms``, as is one that
    was finalized.

    Args:
        backend: Where the streams are.
        namespace: Namespace of the streams. Stores with the same one share them.
        default_ttl_ms: Time that a stream is kept after the last call that appended to it or finalized it, in ms, where
            `acquire` names none.
        lease_ttl_ms: Length of a producer's lease in ms: so long readers wait for one that has died.
        max_chunk_bytes: Largest chunk; None has no limit.
        durability: Level that a chunk has reached when `append` returns; None is ``Durability.stored()``.
    """

    def __init__(
        self,
        backend: aio.ValkeyBackend,
        *,
        namespace: str = NAMESPACE,
        default_ttl_ms: int = DEFAULT_TTL_MS,
        lease_ttl_ms: int = 30_000,
        max_chunk_bytes: int | None = None,
        durability: Durability | None = None,
    ) -> None:
        self._backend = backend
        self._namespace = namespace
        self._default_ttl_ms = check_int("default_ttl_ms", default_ttl_ms, 1, 2**48)
        self._lease_ttl_ms = lease_ttl_ms
        self._max_chunk_bytes = max_chunk_bytes
        self._durability = durability
        self._productions: dict[str, _Production] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, stream_id: str, *, ttl_ms: int | None = None) -> ResumableStreamRole:
        """Return ``producer`` to the first who asks for the stream, until it is removed; ``consumer`` to everybody else.

        Args:
            stream_id: 1 to 256 of ``A-Z a-z 0-9 _ . : -``.
            ttl_ms: Time that the stream is kept after the last append, in ms; None is the default.

        Raises:
            ResumableStreamError: The id is not such a text (``invalid-id``).
        """
        validate_stream_id(stream_id)
        ttl_ms = self._default_ttl_ms if ttl_ms is None else check_int("ttl_ms", ttl_ms, 1, 2**48)
        stream = await self._open(stream_id, ttl_ms)
        if stream.role == "consumer":
            state = await self._state(stream_id)
            if state is None or _is_deleted(state):
                # Its readers are about to learn that it is removed, which frees the id.
                await self._remove(stream_id, _DELETED)
                stream = await self._open(stream_id, ttl_ms)
        if stream.role == "producer":
            # What is left of an earlier production of this store has lost its lease.
            self._drop(stream_id)
            self._productions[stream_id] = _Production(
                stream,
                ttl_ms / 1000,
                partial(self._expire, stream_id),
                partial(self._abandon, stream_id),
            )
        return stream.role

    async def append(self, stream_id: str, chunk: bytes) -> None:
        """Append a chunk to a stream that this store has acquired as its producer; return when it is stored.

        Raises:
            ResumableStreamError: The id is invalid (``invalid-id``), or the stream has ended (``finalized``).
            RuntimeError: There is no such stream, somebody else produces it, or the chunk is too large.
            FFError: The server cannot be reached.
        """
        validate_stream_id(stream_id)
        if self._max_chunk_bytes is not None and len(chunk) > self._max_chunk_bytes:
            raise RuntimeError(
                f"Chunk exceeds maxChunkBytes: {len(chunk)} > {self._max_chunk_bytes}"
            )
        production = self._productions.get(stream_id)
        if production is None:
            raise _refusal(stream_id, await self.status(stream_id))
        production.renew()
        production.appended_by(asyncio.current_task())
        stream = production.stream
        largest = self._backend.config.max_payload_bytes
        try:
            async with production.appending:
                while len(chunk) > largest:
                    stream.write(chunk[:largest], _PART)
                    chunk = chunk[largest:]
                    await stream.drain()
                stream.write(chunk, _CHUNK)
            await stream.flush()
        except FFError as error:
            # The write may be refused before the keeper of the lease has heard of it.
            lost = stream.cancelled or isinstance(
                error, (StaleOwner, LeaseExpired, WriterSuperseded)
            )
            if error.retryable and not lost:
                raise
            status = await self.status(stream_id)
            if status == "streaming" and not lost:
                raise
            self._drop(stream_id, production)
            raise _refusal(stream_id, status) from error

    async def finalize(
        self, stream_id: str, status: Literal["done", "error"], error: str | None = None
    ) -> None:
        """End a stream that this store has acquired as its producer; a stream that has ended stays as it is.

        Raises:
            ResumableStreamError: The id is invalid (``invalid-id``).
            RuntimeError: There is no such stream, or somebody else produces it.
            FFError: The server cannot be reached, or has lost chunks.
        """
        validate_stream_id(stream_id)
        production = self._productions.get(stream_id)
        if production is None:
            await self._check_ended(stream_id)
            return
        try:
            if status == "error":
                await production.stream.fail(_reason(error))
            else:
                await production.stream.complete()
        except FFError as refused:
            if refused.retryable and not production.stream.cancelled:
                raise
            await self._check_ended(stream_id, refused)
        self._drop(stream_id, production)

    async def read(
        self, stream_id: str, cursor: str, signal: CancellationSignal
    ) -> AsyncIterator[ResumableStreamEntry]:
        """Yield the chunks after *cursor*, and those that are appended, until the stream ends or is removed.

        Args:
            stream_id: Id of the stream.
            cursor: That of an entry; empty for the beginning.
            signal: Ends the iterator when it is set.

        Raises:
            ResumableStreamError: The id is invalid (``invalid-id``).
            RuntimeError: There is no such stream; or, after the last chunk, it was finalized with an error, was cancelled,
                or has lost its producer.
            InvalidCursor: *cursor* is not that of an entry.
        """
        validate_stream_id(stream_id)
        state = await self._state(stream_id)
        attempt = None if state is None or _is_deleted(state) else _attempt_of(state)
        if attempt is None:
            raise RuntimeError(f"Stream not found: {stream_id}")
        if signal.is_set():
            return
        after = cursor or None
        asked, _ = split_cursor(after)
        if asked is not None and asked != attempt:
            if asked > attempt:
                raise InvalidCursor
            # Another producer has begun anew since.
            raise RuntimeError(_PRODUCER_LOST)
        tail = self._backend.tail(self._id(stream_id), attempt_index=attempt, after=after)
        stopping = asyncio.create_task(_stop(tail, signal))
        parts: list[bytes] = []
        try:
            while True:
                for item in await tail.next_batch():
                    match item:
                        case StreamFrame(frame_type=kind, payload=payload):
                            parts.append(payload)
                            if kind == _PART:
                                continue
                            yield ResumableStreamEntry(item.cursor, b"".join(parts))
                            parts.clear()
                            if signal.is_set():
                                return
                        case Gap():
                            raise RuntimeError(_INCOMPLETE)
                        case End():
                            await self._ended(stream_id, item)
                            return
        except ExecutionNotFound:
            return
        except AttemptNotFound:
            raise RuntimeError(_INCOMPLETE) from None
        except FFError:
            if not signal.is_set():
                raise
        finally:
            stopping.cancel()
            await tail.aclose()

    async def status(self, stream_id: str) -> ResumableStreamStatus:
        """Return ``streaming``, ``done``, ``error`` or, where there is no such stream, ``missing``.

        Raises:
            ResumableStreamError: The id is invalid (``invalid-id``).
        """
        validate_stream_id(stream_id)
        state = await self._state(stream_id)
        if state is None or _attempt_of(state) is None or _is_deleted(state):
            return "missing"
        if state.state == "completed":
            return "done"
        return "streaming" if state.state == "active" and not state.lapsed else "error"

    async def delete(self, stream_id: str) -> None:
        """Remove a stream; its readers end, and its id is free again. Nothing happens where there is none.

        Raises:
            ResumableStreamError: The id is invalid (``invalid-id``).
        """
        validate_stream_id(stream_id)
        self._drop(stream_id)
        await self._remove(stream_id, _DELETED)

    # -- what this store produces --------------------------------------------------------------------------------------

    def _expire(self, stream_id: str, production: _Production) -> None:
        self._end(stream_id, production, lambda: self._remove(stream_id, _IDLE))

    def _abandon(self, stream_id: str, production: _Production) -> None:
        self._end(stream_id, production, lambda: production.stream.fail(_ABANDONED))

    def _end(
        self,
        stream_id: str,
        production: _Production,
        ending: Callable[[], Coroutine[Any, Any, object]],
    ) -> None:
        async def end() -> None:
            # What cannot be ended is lost when its lease lapses.
            with contextlib.suppress(FFError):
                await ending()

        if self._productions.get(stream_id) is production:
            self._drop(stream_id, production)
            if not self._backend.closed:
                task = asyncio.get_running_loop().create_task(end())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _drop(self, stream_id: str, production: _Production | None = None) -> None:
        """Forget what is produced under an id, or that production alone."""
        found = self._productions.get(stream_id)
        if found is None or (production is not None and found is not production):
            return
        del self._productions[stream_id]
        found.stop()

    async def _remove(self, stream_id: str, reason: str) -> None:
        with contextlib.suppress(ExecutionNotFound):
            await self._backend.delete_execution(self._id(stream_id), reason=reason)

    async def _open(self, stream_id: str, ttl_ms: int) -> aio.OpenedStream:
        return await self._backend.open_stream(
            # The text of a client may look like the id of another execution.
            self._id(stream_id),
            namespace=self._namespace,
            ttl=ttl_ms / 1000,
            lease_ttl_ms=self._lease_ttl_ms,
            retention_maxlen=_RETENTION,
            durability=self._durability,
        )

    # -- what is stored ------------------------------------------------------------------------------------------------

    def _id(self, stream_id: str) -> str:
        return self._backend.execution_id_for(stream_id, namespace=self._namespace)

    async def _state(self, stream_id: str) -> ops.State | None:
        op = ops.read_state(self._id(stream_id))
        try:
            return await self._backend._do(Call(lambda: ops.call(op), writes=False))
        except ExecutionNotFound:
            return None

    async def _check_ended(self, stream_id: str, cause: FFError | None = None) -> None:
        """Pass over a stream that has ended.

        Raises:
            RuntimeError: There is none, or it goes on.
        """
        status = await self.status(stream_id)
        if status in ("missing", "streaming"):
            raise _refusal(stream_id, status) from cause

    async def _ended(self, stream_id: str, end: End) -> None:
        """Return where the stream has ended well, or was removed.

        Raises:
            RuntimeError: It has not.
        """
        if end.reason == "attempt_success":
            return
        if end.reason == "producer_lost":
            raise RuntimeError(_PRODUCER_LOST)
        state = await self._state(stream_id)
        if state is not None and not _is_deleted(state):
            raise RuntimeError(state.error or _ERRORED)


def _refusal(stream_id: str, status: ResumableStreamStatus) -> Exception:
    """Return why a stream that this store does not produce takes nothing."""
    if status == "missing":
        return RuntimeError(f"Stream not found: {stream_id}")
    if status == "streaming":
        return RuntimeError(f"Stream is produced by somebody else: {stream_id}")
    refused: Exception = ResumableStreamError("finalized", f"Stream already finalized: {stream_id}")
    return refused


def _attempt_of(state: ops.State) -> int | None:
    """Return the newest attempt that was begun; None where nobody has begun to produce the stream."""
    if state.claimed:
        return state.attempt_index
    return state.attempt_index - 1 if state.attempt_index else None


def _is_deleted(state: ops.State) -> bool:
    return state.state == "cancelled" and state.error in (_DELETED, _IDLE)


def _reason(error: str | None) -> str:
    """Return *error* as the reason of a failure has to be."""
    return (error or _ERRORED).encode("utf-8", "replace")[:_ERROR_LIMIT].decode("utf-8", "ignore")


async def _stop(tail: aio.Tail, signal: CancellationSignal) -> None:
    """Stop the reader once *signal* is set."""
    await signal.wait()
    await tail.aclose()
