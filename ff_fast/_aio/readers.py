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
from ff_fast.errors import FFError, FunctionMissing, InvalidInput
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._aio.connection import Connection, Replies
    from ff_fast._aio.pool import Pool

T = TypeVar("T", bound=readers.HasCursor)

PARK_S = 1.0
"""Time, in seconds, that a reader keeps its connection for the next read after a cancelled one."""


class Reader(readers.ReaderState[T], AsyncItems[T]):
    """Base of tails and subscriptions: an asynchronous iterator and context manager.

    One task at a time reads. Between two reads at most one request is in flight. The reader holds all state of a read,
    so the next read continues a cancelled one.
    """

    def __init__(self, pool: Pool, source: Source[T]) -> None:
        super().__init__(source)
        self._pool = pool
        self._loop = pool._loop
        self._connection: Connection | None = None
        self._steps: Steps[list[T]] | None = None
        self._replies: Replies | None = None
        self._retries = Retries(pool.config.retry, retry_timeouts=True)
        self._resume_at = 0.0
        self._library_missing = False
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
            while not self._source.ended:
                try:
                    if not await self._wait(until):
                        return False
                    items = await self._advance(until)
                except FFError as error:
                    self._drop_connection()
                    self._source.restart()
                    pause = None if self._pool.closed or self.closed else self._retries.pause(error)
                    if pause is None:
                        raise
                    self._library_missing = isinstance(error, FunctionMissing)
                    self._resume_at = time.monotonic() + pause
                    continue
                if items is None:
                    return False
                self._retries.reset()
                if items:
                    self._put(items)
                    return True
            self._drop_connection()
        except asyncio.CancelledError:
            self._parking = self._loop.call_later(PARK_S, _park, weakref.ref(self))
            raise
        finally:
            self._reading = False
        return False

    async def _wait(self, until: float | None) -> bool:
        """Wait for the end of a retry's pause; return whether it ends before *until*."""
        pause = self._resume_at - time.monotonic()
        if pause <= 0:
            return True
        left = pause if until is None else until - time.monotonic()
        await asyncio.sleep(max(min(pause, left), 0.0))
        return pause <= left

    async def _advance(self, until: float | None) -> list[T] | None:
        """Continue the read of the source; return its items, or None if it is not complete by *until*."""
        if self.closed:
            raise readers.closed_error()
        connection = self._connection
        if connection is None:
            connection = self._connection = await self._pool._acquire()
        if self._library_missing:
            await self._pool._prepare(connection)
            self._library_missing = False
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

    def _post(self, connection: Connection, step: object) -> Replies:
        assert isinstance(step, Step)
        return connection.post(step, self._pool._timeout_s)

    def _drop_connection(self) -> None:
        """Give the connection back, or abort it if a reply is owed."""
        self._steps = self._replies = None
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._release(connection)

    def _park(self) -> None:
        """Release the connection if no read has followed a cancelled one; the answer in flight is read again later."""
        if not self._reading and self._connection is not None:
            self._drop_connection()
            self._source.restart()

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
