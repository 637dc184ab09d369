"""Readers: tails and subscriptions, each on a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ff_fast._core import readers
from ff_fast._core.tail import Item
from ff_fast._hot.items import AsyncItems
from ff_fast.errors import FFError, InvalidInput
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._aio.connection import Connection, Replies
    from ff_fast._aio.pool import Pool
    from ff_fast._core.steps import Source

T = TypeVar("T", bound=readers.HasCursor)

PARK_S = 1.0
"""Time, in seconds, that a reader keeps its connection for the next read after a cancelled one."""


class Reader(readers.ReaderState[T], AsyncItems[T]):
    """Base of tails and subscriptions: an asynchronous iterator and context manager.

    One task at a time reads. Between two reads at most one request is in flight. The reader holds all state of a read,
    so the next read continues a cancelled one.
    """

    def __init__(self, pool: Pool, source: Source[T]) -> None:
        super().__init__(source, pool.config.retry)
        self._pool = pool
        self._loop = pool._loop
        self._connection: Connection | None = None
        # Replies to the step in flight.
        self._replies: Replies | None = None
        self._reading = False
        self._parking: asyncio.TimerHandle | None = None

    async def next_batch(self, timeout: float | timedelta | None = None) -> list[T]:
        """Return all items of the server's next answer, or the items left of the last one.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None waits until there are items.

        Returns:
            The items; an empty list if none arrived in time, and after the end.

        Raises:
            FFError: The same errors as iterating.
        """
        deadline = readers.deadline(timeout)
        return self._take_all() or (self._take_all() if await self._read(deadline) else [])

    async def _next_item(self) -> T:
        if not await self._read(None):
            raise StopAsyncIteration
        return self._pop()

    async def _read(self, until: float | None) -> bool:
        """Read the next items; return whether there are any, in time and before the end."""
        self._pool._check_loop()
        if self._reading:
            raise InvalidInput(readers.ONE_AT_A_TIME)
        self._reading = True
        if self._parking is not None:
            self._parking.cancel()
            self._parking = None
        try:
            while self._empty and not self._source.ended:
                try:
                    if not await self._advance(until):
                        break
                except FFError as error:
                    self._drop_connection()
                    self._failed(error, closed=self._pool.closed)
            if self._source.ended:
                self._drop_connection()
        except asyncio.CancelledError:
            self._parking = self._loop.call_later(PARK_S, _park, weakref.ref(self))
            raise
        finally:
            self._reading = False
        return not self._empty

    async def _wait(self, until: float | None) -> bool:
        """Wait for the end of a retry's pause; return whether it ends before *until*."""
        pause = self._resume_at - time.monotonic()
        if pause <= 0:
            return True
        left = pause if until is None else until - time.monotonic()
        await asyncio.sleep(max(min(pause, left), 0.0))
        return pause <= left

    async def _advance(self, until: float | None) -> bool:
        """Send a step, or take the replies to the one in flight; return whether they came by *until*."""
        if self.closed:
            raise readers.closed_error()
        if not await self._wait(until):
            return False
        connection = self._connection
        if connection is None:
            connection = self._connection = await self._pool._acquire()
        if self._library_missing:
            await self._pool._prepare(connection)
            self._library_missing = False
        if self._steps is None:
            self._replies = connection.post(self._begin(), self._pool._timeout_s)
        assert self._replies is not None
        if not await self._replies.wait(until):
            return False
        step = self._answered(self._replies.take())
        if step is not None:
            self._replies = connection.post(step, self._pool._timeout_s)
        return True

    def _drop_connection(self) -> None:
        """Give the connection back, or abort it if a reply is owed."""
        self._replies = None
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._release(connection)

    def _park(self) -> None:
        """Release the connection if no read has followed a cancelled one; the answer in flight is read again later."""
        if not self._reading and self._connection is not None:
            self._drop_connection()
            self._restart()

    async def aclose(self) -> None:
        """Stop reading, and release the connection. A waiting read raises an error."""
        self._closed = True
        if self._reading and self._connection is not None:
            self._connection.abort()
        else:
            self._drop_connection()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A loop over the reader may have been left early. The collector may run on any thread.
        connection = self.__dict__.get("_connection")
        if connection is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._pool._release, connection)


def _park(reader: weakref.ref[Reader[Any]]) -> None:
    found = reader()
    if found is not None:
        found._park()


class Tail(Reader[Item]):
    __doc__ = readers.TAIL


class Completions(Reader[CompletionPayload]):
    __doc__ = readers.COMPLETIONS
