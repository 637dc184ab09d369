"""Readers: tails and subscriptions, each on a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ff_fast._core import readers
from ff_fast._core.steps import Retries, Source, Step, Steps
from ff_fast._core.tail import Item
from ff_fast._hot.items import AsyncItems
from ff_fast._transport import closed_error
from ff_fast.errors import FFError, FunctionMissing
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._aio.connection import Connection, Replies
    from ff_fast._aio.pool import Pool

T = TypeVar("T", bound=readers.HasCursor)

PARK_S = 1.0
"""How long a reader whose read was cancelled keeps its connection for the next one."""


class Reader(readers.ReaderState[T], AsyncItems[T]):
    """What tails and subscriptions have in common. An asynchronous iterator and context manager.

    One task at a time reads. Between two reads at most one answer of the server is on its way. All state of a read
    stands here, so a cancelled one goes on with the next.
    """

    def __init__(self, pool: Pool, source: Source[T]) -> None:
        super().__init__(source)
        self._pool = pool
        self._loop = pool._loop
        self._connection: Connection | None = None
        # Connecting goes on in a task where a read is cancelled or out of time.
        self._connecting: asyncio.Task[Connection] | None = None
        self._steps: Steps[list[T]] | None = None
        self._replies: Replies | None = None
        self._retries = Retries(pool.config.retry, retry_timeouts=True)
        self._resume_at = 0.0
        self._library_missing = False
        self._reading = False
        self._parking: asyncio.TimerHandle | None = None

    async def next_batch(self, timeout: float | timedelta | None = None) -> list[T]:
        """Return all items of the server's next answer, or those that are left of the last one.

        Args:
            timeout: How long to wait, in seconds or as a ``timedelta``; None waits until there are items.

        Returns:
            The items; none where nothing came in time, and behind the end.

        Raises:
            FFError: As iterating raises.
        """
        deadline = readers.deadline(timeout)
        while self._empty:
            if not await self._read(deadline):
                return []
        rest = self._rest
        del self._rest
        return rest

    async def _next_item(self) -> T:
        if not await self._read(None):
            raise StopAsyncIteration
        return self._pop()

    async def _read(self, until: float | None) -> bool:
        """Read the next items; return whether there are any, in time and before the end."""
        self._pool._check_loop()
        if self._reading:
            raise readers.busy_error()
        if not self._empty:
            # Another task has read them before this one began.
            return True
        self._reading = True
        if self._parking is not None:
            self._parking.cancel()
            self._parking = None
        try:
            while not self._source.ended:
                try:
                    if not await self._wait(until):
                        return False
                    items = await self._advance(until)
                except FFError as error:
                    self._let_go()
                    self._source.restart()
                    if self.closed:
                        raise readers.closed_error() from None
                    pause = None if self._pool.closed else self._retries.pause(error)
                    if pause is None:
                        raise
                    self._library_missing = isinstance(error, FunctionMissing)
                    self._resume_at = time.monotonic() + pause
                    continue
                if items is None:
                    return False
                self._retries.reset()
                if items:
                    if self._source.ended:
                        self._let_go()
                    self._put(items)
                    return True
            self._let_go()
        except asyncio.CancelledError:
            self._parking = self._loop.call_later(PARK_S, _park, weakref.ref(self))
            raise
        except FFError:
            raise
        except BaseException:
            # An interrupt in the middle of a read: items may have been read that nobody took.
            if not self._rest and not self.ended:
                self._let_go()
                self._source.restart(self.cursor)
            raise
        finally:
            self._reading = False
        return False

    async def _wait(self, until: float | None) -> bool:
        """Wait until the server may be asked again; return whether that is before *until*."""
        pause = self._resume_at - time.monotonic()
        if pause <= 0:
            return True
        left = pause if until is None else until - time.monotonic()
        await asyncio.sleep(max(min(pause, left), 0.0))
        return pause <= left

    async def _advance(self, until: float | None) -> list[T] | None:
        """Take one read of the source to its end; None if that is not reached by *until*: it goes on later."""
        if self.closed:
            raise readers.closed_error()
        self._pool._check()
        connection = self._connection
        if connection is None:
            connection = await self._connect(until)
            if connection is None:
                return None
        if self._steps is None:
            self._steps = self._source.read()
            self._replies = self._post(connection, next(self._steps))
        while True:
            assert self._replies is not None
            if not await self._replies.wait(until):
                return None
            replies = self._replies.take()
            try:
                step = self._steps.send(replies)
            except StopIteration as stop:
                self._steps = self._replies = None
                items: list[T] = stop.value
                return items
            self._replies = self._post(connection, step)

    async def _connect(self, until: float | None) -> Connection | None:
        """Return the connection of this reader from now on; None if there is none by *until*: it goes on later."""
        # A new connection is prepared, and so loads the library where it is missing.
        connection = None if self._library_missing else self._pool._take_idle()
        if connection is None:
            if self._connecting is None:
                self._connecting = self._pool._spawn(self._pool._connect())
            task = self._connecting
            left = None if until is None else max(until - time.monotonic(), 0.0)
            done, _ = await asyncio.wait({task}, timeout=left)
            if not done:
                return None
            self._connecting = None
            if task.cancelled():
                raise readers.closed_error() if self.closed else closed_error()
            connection = task.result()
        self._library_missing = False
        self._connection = connection
        return connection

    def _post(self, connection: Connection, step: object) -> Replies:
        assert isinstance(step, Step)
        return connection.post(step, self._pool._timeout_s)

    def _let_go(self) -> None:
        """Give the connection back, or drop it where a reply is still to come."""
        self._steps = self._replies = None
        connection, self._connection = self._connection, None
        connecting, self._connecting = self._connecting, None
        _give_back(self._pool, connection, connecting)

    def _park(self) -> None:
        """Nobody went on after a cancellation: give up the answer that is on its way, and its connection."""
        if not self._reading and (self._connection or self._connecting):
            self._let_go()
            self._source.restart()

    async def aclose(self) -> None:
        """Stop reading, and give the connection back. A read that waits ends with an error."""
        self._closed = True
        if not self._reading:
            self._let_go()
        elif self._connection is not None:
            self._connection.abort()
        elif self._connecting is not None:
            self._connecting.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A loop over the reader was left in the middle. The collector may run on any thread.
        connection, connecting = map(self.__dict__.get, ("_connection", "_connecting"))
        if connection is not None or connecting is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_give_back, self._pool, connection, connecting)


def _give_back(
    pool: Pool, connection: Connection | None, connecting: asyncio.Task[Connection] | None
) -> None:
    if connection is not None:
        pool._release(connection)
    if connecting is None or connecting.cancel() or connecting.cancelled():
        return
    if connecting.exception() is None:
        pool._release(connecting.result())


def _park(reader: weakref.ref[Reader[Any]]) -> None:
    found = reader()
    if found is not None:
        found._park()


class Tail(Reader[Item]):
    __doc__ = readers.TAIL


class Completions(Reader[CompletionPayload]):
    __doc__ = readers.COMPLETIONS
