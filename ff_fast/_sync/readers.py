"""Readers: tails and subscriptions, each on a connection of its own."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self, TypeVar

from ff_fast._core import readers
from ff_fast._core.steps import Retries, Source, Step, Steps
from ff_fast._core.tail import Item
from ff_fast._hot.items import BlockingItems
from ff_fast._sync.connection import PENDING
from ff_fast.errors import FFError, FunctionMissing, InvalidInput
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._sync.connection import Connection
    from ff_fast._sync.pool import Pool

T = TypeVar("T", bound=readers.HasCursor)


class Reader(readers.ReaderState[T], BlockingItems[T]):
    """Base of tails and subscriptions: an iterator and a context manager.

    One thread at a time reads. Between two reads at most one request is in flight.
    """

    def __init__(self, pool: Pool, source: Source[T]) -> None:
        super().__init__(source)
        self._pool = pool
        self._connection: Connection | None = None
        self._steps: Steps[list[T]] | None = None
        # Replies to the step in flight so far, and the number of replies still owed.
        self._replies: list[object] = []
        self._missing = 0
        self._retries = Retries(pool.config.retry, retry_timeouts=True)
        self._resume_at = 0.0
        self._library_missing = False
        self._torn = False
        self._reading = threading.Lock()

    def next_batch(self, timeout: float | timedelta | None = None) -> list[T]:
        """Return all items of the server's next answer, or the items left of the last one.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None waits until there are items.

        Returns:
            The items; an empty list if none arrived in time, and after the end.

        Raises:
            FFError: The same errors as iterating.
        """
        deadline = readers.deadline(timeout)
        return self._take_all() or (self._take_all() if self._read(deadline) else [])

    def _fill(self) -> bool:
        return self._read(None)

    def _read(self, until: float | None) -> bool:
        """Read the next items; return whether there are any, in time and before the end."""
        if not self._reading.acquire(blocking=False):
            raise InvalidInput(readers.ONE_AT_A_TIME)
        try:
            if self._torn:
                # An interrupt broke off a read, so items read by it may not have been delivered.
                self._restart(self.cursor)
            self._torn = True
            found = self._read_on(until)
            self._torn = False
        except FFError:
            self._torn = False
            raise
        finally:
            self._reading.release()
        return found

    def _read_on(self, until: float | None) -> bool:
        while not self._source.ended:
            try:
                if not self._wait(until):
                    return False
                items = self._advance(until)
            except FFError as error:
                self._restart()
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
        return False

    def _wait(self, until: float | None) -> bool:
        """Wait for the end of a retry's pause; return whether it ends before *until*."""
        pause = self._resume_at - time.monotonic()
        if pause <= 0:
            return True
        if until is None:
            time.sleep(pause)
            return True
        left = until - time.monotonic()
        time.sleep(max(min(pause, left), 0.0))
        return pause <= left

    def _advance(self, until: float | None) -> list[T] | None:
        """Continue the read of the source; return its items, or None if it is not complete by *until*."""
        if self.closed:
            raise readers.closed_error()
        connection = self._connection
        if connection is None:
            connection = self._connection = self._pool._acquire()
        if self._library_missing:
            self._pool._prepare(connection)
            self._library_missing = False
        if self._steps is None:
            self._steps = self._source.read()
            self._send(connection, next(self._steps))
        while True:
            while self._missing:
                reply = connection.receive(until)
                if reply is PENDING:
                    return None
                self._replies.append(reply)
                self._missing -= 1
            try:
                step = self._steps.send(self._replies)
            except StopIteration as stop:
                self._steps = None
                items: list[T] = stop.value
                return items
            self._send(connection, step)

    def _send(self, connection: Connection, step: object) -> None:
        assert isinstance(step, Step)
        self._replies, self._missing = [], len(step.commands)
        connection.send(step)

    def _restart(self, cursor: str | None = None) -> None:
        self._drop_connection()
        self._source.restart(cursor)

    def _drop_connection(self) -> None:
        """Give the connection back, or close it if a reply is owed."""
        self._steps, self._replies, self._missing = None, [], 0
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._release(connection)

    def close(self) -> None:
        """Stop reading, and release the connection. A waiting read raises an error."""
        self._closed = True
        connection = self._connection
        if self._reading.acquire(blocking=False):
            try:
                self._drop_connection()
            finally:
                self._reading.release()
        elif connection is not None:
            connection.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop over the reader may have been left early.
        self._drop_connection()


class Tail(Reader[Item]):
    __doc__ = readers.TAIL


class Completions(Reader[CompletionPayload]):
    __doc__ = readers.COMPLETIONS
