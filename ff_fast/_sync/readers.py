"""Readers, which hear of pushes over the hub."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Self, TypeVar

from ff_fast import _transport
from ff_fast._core import readers
from ff_fast._core.follow import Ended, WaitCore
from ff_fast._core.follow import Item as FollowItem
from ff_fast._core.tail import Item
from ff_fast._hot.items import BlockingItems, Turn
from ff_fast._sync.connection import PENDING
from ff_fast.errors import FFError, InvalidInput
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._sync.connection import Connection
    from ff_fast._sync.pool import Pool

T = TypeVar("T", bound=readers.HasCursor)


class Readable(readers.ReaderState[T], BlockingItems[T]):
    """What all readers have: an iterator and a context manager, read by one thread at a time."""

    _pool: Pool
    _turn: Turn
    # Set while a read is under way; an interrupt leaves it set, and items may not have been delivered.
    _torn = False

    if TYPE_CHECKING:

        def _advance(self, until: float | None) -> bool:
            """Take, ask or wait; return whether *until* has not passed."""

        def _let_go(self) -> None:
            """Give back what the server or the pool holds for this reader."""

        def close(self) -> None:
            """Stop reading."""

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
                self._let_go()
                return False
            if self._torn:
                self._let_go()
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
                self._let_go()
                self._failed(error, closed=self._pool.closed)
        if self._source.ended:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PushReader(readers.PushState[T], Readable[T]):
    """Base of the readers that take what is pushed.

    The thread of the hub queues pushes and rings the bell. Everything else is done by the thread that reads, which
    sends its reads on a connection of the pool.
    """

    # On which a reply is owed. Of the class, since an interrupt may strike before the object is complete.
    _connection: Connection | None = None

    def __init__(self, pool: Pool, source: readers.PushSource[T]) -> None:
        super().__init__(source, pool.config.retry)
        self._pool = pool
        # Replies to the step in flight so far, and the number of replies still owed.
        self._replies: list[object] = []
        self._missing = 0
        # The hub knows the bell, and not the reader, so a reader that was left can go.
        self._bell = _Bell()
        self._turn = Turn(readers.busy_error)

    def _advance(self, until: float | None) -> bool:
        # Also if there is a connection: a forked child must leave it alone.
        self._pool._check()
        if self.closed:
            raise readers.closed_error()
        if self._resume_at > time.monotonic():
            return self._wait(until, self._resume_at)
        if self._connection is None:
            self._attach_part()
            if self._put_pushed():
                self._attach_part()
                return True
            step = self._next_step()
            if step is None:
                return self._wait(until, self._source.wake_at)
            self._connection = self._pool._acquire()
            if self._library_missing:
                self._pool._prepare(self._connection)
                self._library_missing = False
            self._replies, self._missing = [], len(step.commands)
            self._connection.send(step)
        connection = self._connection
        while self._missing:
            reply = connection.receive(until)
            if reply is PENDING:
                return False
            self._replies.append(reply)
            self._missing -= 1
        self._connection = None
        self._pool._release(connection, _transport.MAX_IDLE_OF_READERS)
        self._put_received(self._replies)
        self._attach_part()
        return True

    def _wait(self, until: float | None, look_at: float) -> bool:
        """Wait until the bell rings, or *look_at* has come; return False where *until* has passed."""
        now = time.monotonic()
        if until is not None:
            if now >= until:
                return False
            look_at = min(look_at, until)
        self._bell.wait(look_at - now)
        return True

    def _attach_part(self) -> None:
        """Let the hub know what this reader listens with."""
        part = self._source.part
        if part is self._attached:
            return
        self._leave()
        part.on_wake = self._bell
        self._attached = part
        self._pool._hub.attach(part)

    def _leave(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            self._pool._hub.detach(attached)

    def _let_go(self) -> None:
        """Listen no more, and close the connection if a reply is owed."""
        self._leave()
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._release(connection, _transport.MAX_IDLE_OF_READERS)

    def close(self) -> None:
        """Stop reading. A waiting read raises an error."""
        self._closed = True
        try:
            with self._turn:
                self._let_go()
        except InvalidInput:
            self._bell()
            connection = self._connection
            if connection is not None:
                connection.abort()

    def __del__(self) -> None:
        # A loop that was left in the middle.
        self._let_go()


class _Bell:
    """Wakes the thread that waits for a reader."""

    def __init__(self) -> None:
        # A lock, not a Condition: an interrupt could leave a Condition locked for ever.
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._lock.release()

    def wait(self, seconds: float) -> None:
        """Wait until it rings, at once if it has rung since the last wait."""
        if seconds > 0:
            self._lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


class Tail(PushReader[Item]):
    __doc__ = readers.TAIL


class Follow(PushReader[FollowItem]):
    __doc__ = readers.FOLLOW


class Waiting(PushReader[Ended]):
    """Waits for the end of an execution."""

    _source: WaitCore

    def _advance(self, until: float | None) -> bool:
        return super()._advance(self._source.patience(until))


class Completions(PushReader[CompletionPayload]):
    __doc__ = readers.COMPLETIONS
