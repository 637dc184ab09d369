"""Iterators of bytes over an execution, for any framework: asynchronous and blocking.

Reading, pacing, heartbeats and farewells are the same for all of them; a response of a framework only passes the chunks on.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
import signal
import time
import weakref
from math import ceil, inf
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ff_fast import _process, keys
from ff_fast._core.follow import follow_place
from ff_fast._hot.feed import Bell
from ff_fast.errors import FFError, InvalidType
from ff_fast.types import End, TailVisibility, seconds
from ff_fast.web.framing import EventFraming, Framing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta

    import ff_fast
    from ff_fast import aio

HEARTBEAT_S = 15.0
"""How long a response is silent before it shows that it lives, in seconds."""

FAREWELL_S = 0.5
"""How long a client has to take the last bytes of a server that shuts down, in seconds."""

# How long the first read may take before the execution is asked for by itself: one that nobody has claimed has nothing to
# be read, and its client shall get an answer.
_FIRST_READ_S = 0.05
# How often open responses are looked after.
_LOOK_S = 0.2
# When clients come again that a shutdown has sent away: not all at once.
_RETRY_MS = (200, 2_000)
# Responses that pause are woken together, so often.
_TICK_S = 0.005
# Most chunks that one loop sends in a second without being asked to: more readers get larger ones. And the longest pause
# that comes of it.
_CHUNKS_PER_S = 5_000
_LONGEST_PACE_S = 0.2


def resume_place(framing: Framing, after: str | None) -> str | None:
    """Return the cursor that a client means by *after*; None for the beginning, which ``""`` and ``-1`` mean too.

    Raises:
        InvalidCursor: It is none.
    """
    if after is None or after in ("", "-1"):
        return None
    cursor = framing.place(after)
    return None if follow_place(cursor) is None else cursor


def check_backend(backend: object, *, blocking: bool = False) -> None:
    """Raise ``InvalidType`` unless *backend* is an open one of the shell that is needed."""
    describe = getattr(backend, "describe", None)
    if describe is None or inspect.iscoroutinefunction(describe) is blocking:
        raise InvalidType(
            "backend must be an open ff_fast.ValkeyBackend; web.events and responses take one of ff_fast.aio."
            if blocking
            else "backend must be an open ff_fast.aio.ValkeyBackend; web.iter_events takes a blocking one."
        )


class _Reading:
    """What both kinds of iterators have checked before they read."""

    __slots__ = (
        "after", "cursor", "execution_id", "framing", "heartbeat_s", "pace_s", "visibility",
    )  # fmt: skip

    def __init__(
        self,
        execution_id: str,
        after: str | None,
        framing: Framing | None,
        visibility: TailVisibility,
        heartbeat: float | timedelta,
        pace: float | timedelta | None,
    ) -> None:
        self.execution_id = keys.canonical_execution_id(execution_id)
        self.framing = EventFraming() if framing is None else framing
        if not isinstance(self.framing, Framing):
            raise InvalidType(f"framing must be a Framing, not {type(framing).__name__}.")
        self.cursor = resume_place(self.framing, after)
        self.after = None if self.cursor is None else after
        self.visibility = visibility
        self.heartbeat_s = seconds("heartbeat", heartbeat, zero=False)
        self.pace_s = None if pace is None else seconds("pace", pace)

    def _holds_end(
        self, first: list[Any] | None, reader: aio.Follow | ff_fast.Follow | None
    ) -> bool:
        """Whether the *first* items are an end that the client named as what it has got last."""
        return (
            self.framing.ids
            and self.cursor is not None
            and first is not None
            and len(first) == 1
            and reader is not None
            and reader.ended
            and first[0].cursor == self.cursor
        )

    def anew(self) -> dict[str, Any]:
        """Return the arguments of ``follow`` for a reader that begins with the document."""
        return {"snapshot": True, "visibility": self.visibility}

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``follow``."""
        return {
            "after": self.cursor,
            "snapshot": self.framing.snapshot and self.cursor is None,
            "visibility": self.visibility,
        }


class Chunks(_Reading):
    """The chunks of a response, as bytes; an asynchronous iterator. Made by :func:`events`.

    Attributes:
        finished: The end of the execution was among the chunks.
        sending_since: When the client was given what it has not taken yet, in monotonic time; None if it has taken all.
            For whoever sends the chunks, so that a client that takes nothing is noticed.
        send_timeout: How long that may be, in seconds.
        on_stuck: Called when it was longer, behind :meth:`abandon`.
        stuck: It was.
    """

    __slots__ = (
        "__weakref__", "_backend", "_begun", "_bell", "_items", "_last", "_next_at", "_over", "_reader", "_sent_at", "_stopping", "_watch",
        "finished", "on_stuck", "send_timeout", "sending_since", "stuck",
    )  # fmt: skip

    def __init__(self, backend: aio.ValkeyBackend, *args: Any) -> None:
        check_backend(backend)
        super().__init__(*args)
        self._backend = backend
        self._reader: aio.Follow | None = None
        self._items: list[Any] | None = None
        self._last = b""
        self._begun = False
        self._over = False
        self._stopping = False
        # When the client may get the next chunk, and could have got the one after the last; in monotonic time.
        self._next_at = 0.0
        self._sent_at = inf
        self.finished = False
        self.sending_since: float | None = None
        self.send_timeout = inf
        self.stuck = False
        self.on_stuck: Callable[[], object] | None = None

    async def open(self) -> None:
        """Begin to read, so that what cannot be read is known before anything is sent.

        Raises:
            FFError: It cannot be read.
        """
        if self._reader is not None:
            return
        loop = asyncio.get_running_loop()
        self._bell = Bell(loop)
        self._watch = _Watch.of_loop(loop)
        self._reader = reader = self._backend.follow(self.execution_id, **self.options())
        self._watch.add(self)
        try:
            self._items = await reader.next_batch(_FIRST_READ_S)
            if not self._items:
                await self._backend.describe(self.execution_id)
            self._sent_at = monotonic()
        except BaseException:
            await self.aclose()
            raise

    @property
    def has_nothing_new(self) -> bool:
        """Whether the client had got the end already, by the first read: an answer 204 stops its ``EventSource``."""
        return self._holds_end(self._items, self._reader)

    def stop(self) -> None:
        """End the chunks with a farewell: the server shuts down."""
        self._stopping = True
        self._wake()

    def abandon(self, _: object = None) -> None:
        """End the chunks without a word: the client has gone."""
        if self._reader is not None:
            self._watch.remove(self)
        self._over = True
        self._last = b""
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None:
            _close_now(self._reader)
            self._bell()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while True:
            chunk = self.ready()
            if chunk:
                return chunk
            if self._over:
                break
            try:
                await self.wait()
            except BaseException:
                # Frameworks cancel the task that waits, and close generators alone.
                self.abandon()
                raise
        await self.aclose()
        raise StopAsyncIteration

    @property
    def over(self) -> bool:
        """Whether the last chunk was taken."""
        return self._over and not self._last

    @property
    def stopping(self) -> bool:
        """Whether the server shuts down."""
        return self._stopping

    def ready(self) -> bytes:
        """Return the next chunk if there is one without waiting; empty if there is none."""
        if self._last:
            last, self._last = self._last, b""
            return last
        reader = self._reader
        if reader is None or self._over:
            return b""
        items = self._items
        if items is None:
            now = monotonic()
            if now < self._next_at or self._stopping:
                return b""
            items = reader._take_ready()
            if not items:
                return b""
            self._next_at = now + (self._watch.pace if self.pace_s is None else self.pace_s)
        else:
            self._items = None
        framing = self.framing
        if not self._begun:
            self._begun = True
            chunk = framing.begin(self.after) + (self._framed(items) if items else b"")
        elif items:
            chunk = self._framed(items)
            if not (chunk or self.finished) and self._next_at - self._sent_at > self.heartbeat_s:
                # The framing leaves out what comes, and the client hears nothing.
                chunk = framing.heartbeat()
        else:
            chunk = framing.heartbeat()
        if chunk:
            self._sent_at = self._next_at
        return chunk

    async def wait(self) -> None:
        """Wait until there may be a chunk."""
        reader = self._reader
        if reader is None:
            await self.open()
            return
        if self._over:
            return
        if monotonic() < self._next_at and not self._stopping:
            self._watch.ring(self._bell, self._next_at)
            await self._bell
            return
        try:
            self._items = await reader.next_batch(self.heartbeat_s)
            self._next_at = monotonic() + (self._watch.pace if self.pace_s is None else self.pace_s)
        except FFError as error:
            if self._over:
                return
            await self._close()
            if self._stopping:
                self._last = self.framing.shutdown(random.randint(*_RETRY_MS))  # noqa: S311 - no secret
            else:
                self._last = self.framing.failed(error)

    def _framed(self, items: list[Any]) -> bytes:
        if isinstance(items[-1], End):
            self._over = self.finished = True
        framing = self.framing
        chunk = framing.items(items)
        if framing.over:
            self._over = True
        elif framing.rejoin:
            framing.rejoin = self._over = self.finished = False
            if self._reader is not None:
                _close_now(self._reader)
            self._reader = self._backend.follow(self.execution_id, **self.anew())
        return chunk

    async def _close(self) -> None:
        self._over = True
        self._items = None
        if self._reader is not None:
            self._watch.remove(self)
            await self._reader.aclose()

    def close(self) -> None:
        """Stop reading, from any thread: for frameworks that close a response without a loop."""
        if self._reader is not None:
            with contextlib.suppress(RuntimeError):
                self._bell.get_loop().call_soon_threadsafe(self.abandon)

    async def aclose(self) -> None:
        """Stop reading, and let the reader go."""
        self._last = b""
        await self._close()


def _close_now(reader: aio.Follow) -> None:
    """Close *reader*, so that a waiting read ends with an error."""
    closing = reader.aclose()
    try:
        closing.send(None)
    except StopIteration:
        return


def events(
    backend: aio.ValkeyBackend,
    execution_id: str,
    *,
    after: str | None = None,
    framing: Framing | None = None,
    visibility: TailVisibility = TailVisibility.ALL,
    heartbeat: float | timedelta = HEARTBEAT_S,
    pace: float | timedelta | None = None,
) -> Chunks:
    """Return the chunks of a response that streams an execution: an asynchronous iterator of bytes, for any framework.

    Arguments are checked at once. Whether the execution exists is known with ``await chunks.open()``, or with the first
    chunk: what fails before it is raised, what fails after it ends the chunks as the framing says. When the client has gone,
    close it with ``aclose()``, or cancel the task that waits for a chunk, which ends it as it ends a generator.

    Args:
        backend: The backend of the asyncio shell.
        execution_id: Id of the execution.
        after: What the client has sent as ``Last-Event-ID``: None, ``""`` and ``-1`` are the beginning.
        framing: What the chunks look like; None is ``EventFraming()``. It serves one response.
        visibility: Whether best-effort frames are delivered.
        heartbeat: How long nothing may come before a heartbeat does, in seconds or as a ``timedelta``.
        pace: The shortest time between two chunks, in seconds or as a ``timedelta``; frames that come meanwhile share the
            next one. None is almost nothing for a few open responses, and 0.2 s for a thousand in this process.

    Raises:
        InvalidId: *execution_id* is not one.
        InvalidCursor: *after* is not one.
        InvalidInput: Another argument is not accepted.
    """
    return Chunks(backend, execution_id, after, framing, visibility, heartbeat, pace)


def iter_events(
    backend: ff_fast.ValkeyBackend,
    execution_id: str,
    *,
    after: str | None = None,
    framing: Framing | None = None,
    visibility: TailVisibility = TailVisibility.ALL,
    heartbeat: float | timedelta = HEARTBEAT_S,
    pace: float | timedelta = 0.0,
) -> BlockingChunks:
    """Return the chunks of a response as an iterator of bytes that blocks: for WSGI, Flask, and Django without ASGI.

    As :func:`events`, with a backend of the blocking shell. A server of WSGI calls ``close()`` when the client has gone, which
    it notices when it sends the next heartbeat. Each open response occupies a thread.
    """
    return BlockingChunks(backend, execution_id, after, framing, visibility, heartbeat, pace)


class BlockingChunks(_Reading):
    """The chunks of a response, as bytes; an iterator. Made by :func:`iter_events`.

    Attributes:
        finished: The end of the execution was among the chunks.
    """

    def __init__(self, backend: ff_fast.ValkeyBackend, *args: Any) -> None:
        check_backend(backend, blocking=True)
        super().__init__(*args)
        self._backend = backend
        self._chunks: Iterator[bytes] | None = None
        self._reader: ff_fast.Follow | None = None
        self._first: list[Any] = []
        self.finished = False

    def open(self) -> None:
        """Begin to read, so that what cannot be read is known before anything is sent.

        Raises:
            FFError: It cannot be read.
        """
        if self._chunks is not None:
            return
        self._reader = reader = self._backend.follow(self.execution_id, **self.options())
        try:
            self._first = reader.next_batch(_FIRST_READ_S)
            if not self._first:
                self._backend.describe(self.execution_id)
        except BaseException:
            reader.close()
            raise
        self._chunks = self._read(reader)

    @property
    def has_nothing_new(self) -> bool:
        """Whether the client had got the end already, by the first read: an answer 204 stops its ``EventSource``."""
        return self._holds_end(self._first, self._reader)

    def _read(self, reader: ff_fast.Follow) -> Iterator[bytes]:
        framing = self.framing
        chunk = framing.begin(self.after)
        items, self._first = self._first, []
        # A server of WSGI sends the head of the response with its first chunk.
        sent_at = -inf
        try:
            while True:
                if items:
                    chunk += framing.items(items)
                    if framing.rejoin and not framing.over:
                        framing.rejoin = False
                        reader.close()
                        self._reader = reader = self._backend.follow(
                            self.execution_id, **self.anew()
                        )
                if reader.ended:
                    self.finished = True
                elif not chunk and monotonic() - sent_at >= self.heartbeat_s:
                    chunk = framing.heartbeat()
                if chunk:
                    yield chunk
                    sent_at = monotonic()
                if reader.ended or framing.over:
                    return
                if self.pace_s:
                    time.sleep(self.pace_s)
                chunk = b""
                try:
                    items = reader.next_batch(max(sent_at + self.heartbeat_s - monotonic(), 0.0))
                except FFError as error:
                    yield framing.failed(error)
                    return
        finally:
            reader.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        self.open()
        assert self._chunks is not None
        return next(self._chunks)

    def close(self) -> None:
        """Stop reading, and let the reader go."""
        if self._reader is not None:
            self._reader.close()
        self._chunks = iter(())


class _Watch:
    """Looks after the open responses of one loop, with one timer for all.

    A timer for each pause and for each chunk that is sent would cost as much as the chunk.

    Attributes:
        pace: The shortest time between two chunks of a response that names none.
    """

    _of_loop: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        # What was left without being closed must be able to go.
        self._open: weakref.WeakSet[Chunks] = weakref.WeakSet()
        self._timer: asyncio.TimerHandle | None = None
        # What is to be woken, by the tick at which it is.
        self._pausing: dict[int, list[Bell]] = {}
        self.pace = 0.0

    @classmethod
    def of_loop(cls, loop: asyncio.AbstractEventLoop) -> _Watch:
        found = cls._of_loop.get(loop)
        if found is None:
            found = cls._of_loop[loop] = cls(loop)
        return found

    def add(self, chunks: Chunks) -> None:
        self._open.add(chunks)
        self._count()
        if self._timer is None:
            self._wait()

    def remove(self, chunks: Chunks) -> None:
        self._open.discard(chunks)
        self._count()
        if not self._open and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _count(self) -> None:
        self.pace = min(len(self._open) / _CHUNKS_PER_S, _LONGEST_PACE_S)

    def ring(self, bell: Bell, at: float) -> None:
        """Ring *bell* at *at*, in monotonic time, or a tick later."""
        tick = ceil(at / _TICK_S)
        waiting = self._pausing.get(tick)
        if waiting is None:
            waiting = self._pausing[tick] = []
            loop = self._loop()
            if loop is not None:
                loop.call_later(tick * _TICK_S - monotonic(), self._tick, tick)
        waiting.append(bell)

    def _tick(self, tick: int) -> None:
        for bell in self._pausing.pop(tick):
            bell()

    def _wait(self) -> None:
        loop = self._loop()
        if loop is not None:
            self._timer = loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        stops = server_stops()
        if stops:
            self.stop()
        now = monotonic()
        for chunks in list(self._open):
            since = chunks.sending_since
            longest = min(chunks.send_timeout, FAREWELL_S) if stops else chunks.send_timeout
            if since is not None and now - since > longest:
                chunks.sending_since = None
                chunks.stuck = True
                chunks.abandon()
                if chunks.on_stuck is not None:
                    chunks.on_stuck()
        if self._open and self._timer is None:
            self._wait()

    def stop(self) -> None:
        for chunks in list(self._open):
            chunks.stop()


def server_stops() -> bool:
    """Whether the server of this process was told to shut down, as far as that can be seen.

    uvicorn waits for open responses and tells them nothing; but the handler of its signals is a method of the server.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        server = getattr(_process.handler_of(number), "__self__", None)
        if getattr(server, "should_exit", False) is True:
            return True
    return False


def end_responses() -> None:
    """End all open responses of the running loop with a farewell, so that their clients come again elsewhere.

    For servers other than uvicorn, which is noticed by itself: call it where the process learns that it is to end.
    """
    _Watch.of_loop(asyncio.get_running_loop()).stop()
