"""Readers: tails and subscriptions, each on a connection of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self, TypeVar

from ff_fast import _transport
from ff_fast._core import readers
from ff_fast._core.follow import Ended
from ff_fast._core.follow import Item as FollowItem
from ff_fast._core.tail import Item
from ff_fast._hot.items import BlockingItems, Turn
from ff_fast._sync.connection import PENDING
from ff_fast.errors import FFError, InvalidInput
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._core.steps import Source, Step
    from ff_fast._sync.connection import Connection
    from ff_fast._sync.pool import Pool

T = TypeVar("T", bound=readers.HasCursor)


class Reader(readers.ReaderState[T], BlockingItems[T]):
    """Base of tails and subscriptions: an iterator and a context manager.

    One thread at a time reads. Between two reads at most one answer of the server is in flight.
    """

    def __init__(self, pool: Pool, source: Source[T]) -> None:
        super().__init__(source, pool.config.retry)
        self._pool = pool
        self._connection: Connection | None = None
        # Replies to the step in flight so far, and the number of replies still owed.
        self._replies: list[object] = []
        self._missing = 0
        # Set while a read is under way; an interrupt leaves it set, and items may not have been delivered.
        self._torn = False
        self._turn = Turn(readers.busy_error)

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
        while self._empty:
            if not self._read(deadline):
                return []
        rest = self._rest
        del self._rest
        return rest

    def _fill(self) -> bool:
        return self._read(None)

    def _read(self, until: float | None) -> bool:
        """Read the next items; return whether there are any, in time and before the end."""
        with self._turn:
            if not self._empty:
                # Another thread has read them meanwhile.
                return True
            if self.ended:
                self._drop_connection()
                return False
            if self._torn:
                self._drop_connection()
                self._restart(self.cursor)
            self._torn = True
            try:
                self._read_on(until)
            except FFError:
                self._torn = False
                raise
            self._torn = False
            return not self._empty

    def _read_on(self, until: float | None) -> None:
        while self._empty and not self._source.ended:
            try:
                if not self._advance(until):
                    return
            except FFError as error:
                self._drop_connection()
                self._failed(error, closed=self._pool.closed)
        if self._source.ended:
            self._drop_connection()

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

    def _advance(self, until: float | None) -> bool:
        """Send a step, or take the replies to the one in flight; return whether they came by *until*."""
        # Also if there is a connection: a forked child must leave it alone.
        self._pool._check()
        if not self._wait(until):
            return False
        connection = self._connection
        if connection is None and not self.closed:
            connection = self._connection = self._pool._acquire()
        if connection is None or self.closed:
            raise readers.closed_error()
        if self._steps is None and not self._pool._trusts(connection):
            self._drop_connection()
            connection = self._connection = self._pool._acquire()
        if self._library_missing:
            self._pool._prepare(connection)
            self._library_missing = False
        if self._steps is None:
            self._send(connection, self._begin())
        while self._missing:
            reply = connection.receive(until)
            if reply is PENDING:
                return False
            self._replies.append(reply)
            self._missing -= 1
        step = self._answered(self._replies)
        if step is not None:
            self._send(connection, step)
        return True

    def _send(self, connection: Connection, step: Step) -> None:
        self._replies, self._missing = [], len(step.commands)
        connection.send(step)

    def _drop_connection(self) -> None:
        """Give the connection back, or close it if a reply is owed."""
        self._replies, self._missing = [], 0
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._release(connection, _transport.MAX_IDLE_OF_READERS)

    def close(self) -> None:
        """Stop reading, and release the connection. A waiting read raises an error."""
        self._closed = True
        try:
            with self._turn:
                self._drop_connection()
        except InvalidInput:
            connection = self._connection
            if connection is not None:
                connection.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop that was left in the middle.
        self._drop_connection()


class Tail(Reader[Item]):
    __doc__ = readers.TAIL


class Follow(Reader[FollowItem]):
    __doc__ = readers.FOLLOW


class Waiting(Reader[Ended]):
    """Waits for the end of an execution."""


class Completions(Reader[CompletionPayload]):
    __doc__ = readers.COMPLETIONS
