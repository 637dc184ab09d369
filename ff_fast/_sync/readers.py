"""Readers: tails and subscriptions, each on a connection of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self, TypeVar

from ff_fast._core import readers
from ff_fast._core.steps import Retries, Source, Step, Steps
from ff_fast._core.tail import Item
from ff_fast._hot.items import BlockingItems, Turn
from ff_fast._sync.connection import PENDING
from ff_fast.errors import FFError, FunctionMissing, InvalidInput
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._sync.connection import Connection
    from ff_fast._sync.pool import Pool

T = TypeVar("T", bound=readers.HasCursor)


class Reader(readers.ReaderState[T], BlockingItems[T]):
    """What tails and subscriptions have in common. An iterator and a context manager.

    One thread at a time reads. Between two reads at most one answer of the server is on its way.
    """

    def __init__(self, pool: Pool, source: Source[T]) -> None:
        super().__init__(source)
        self._pool = pool
        self._connection: Connection | None = None
        self._steps: Steps[list[T]] | None = None
        # Replies of the step that is under way, and how many are still to come.
        self._replies: list[object] = []
        self._missing = 0
        self._retries = Retries(pool.config.retry, retry_timeouts=True)
        self._resume_at = 0.0
        self._library_missing = False
        self._torn = False
        self._turn = Turn(readers.busy_error)

    def next_batch(self, timeout: float | timedelta | None = None) -> list[T]:
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
                self._let_go()
                return False
            if self._torn:
                # An interrupt came in the middle of a read: items may have been read that nobody took.
                self._restart(self.cursor)
            self._torn = True
            try:
                found = self._read_on(until)
            except FFError:
                self._torn = False
                raise
            self._torn = False
            return found

    def _read_on(self, until: float | None) -> bool:
        while not self._source.ended:
            try:
                if not self._wait(until):
                    return False
                items = self._advance(until)
            except FFError as error:
                self._restart()
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
        return False

    def _wait(self, until: float | None) -> bool:
        """Wait until the server may be asked again; return whether that is before *until*."""
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
        """Take one read of the source to its end; None if that is not reached by *until*: it goes on later."""
        # Also of a connection that it has: a forked child must leave it alone.
        self._pool._check()
        connection = self._connection
        if connection is None and not self.closed:
            connection = self._connection = self._pool._acquire()
        if connection is None or self.closed:
            raise readers.closed_error()
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
        self._let_go()
        self._source.restart(cursor)

    def _let_go(self) -> None:
        """Give the connection back, or close it where a reply is still to come."""
        self._steps, self._replies, self._missing = None, [], 0
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._release(connection)

    def close(self) -> None:
        """Stop reading, and give the connection back. A read that waits ends with an error."""
        self._closed = True
        try:
            with self._turn:
                self._let_go()
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
        self._let_go()


class Tail(Reader[Item]):
    __doc__ = readers.TAIL


class Completions(Reader[CompletionPayload]):
    __doc__ = readers.COMPLETIONS
