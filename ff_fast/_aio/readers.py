"""Readers, which share the connection of the hub."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import weakref
from math import inf
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from ff_fast import _transport
from ff_fast._core import readers
from ff_fast._core.follow import Ended
from ff_fast._core.follow import Item as FollowItem
from ff_fast._core.tail import Item
from ff_fast._hot.feed import Bell, Inbox
from ff_fast._hot.items import AsyncItems
from ff_fast.errors import FFError
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._aio.hub import Read, RoutedRead
    from ff_fast._aio.pool import Pool

T = TypeVar("T", bound=readers.HasCursor)


class Readable(readers.ReaderState[T], AsyncItems[T]):
    """What all readers have: one task at a time reads, by iterating or by :meth:`next_batch`.

    The object holds all state of a read, so the read after a cancelled one continues it.
    """

    _pool: Pool
    _reading = False

    if TYPE_CHECKING:

        async def _advance(self, until: float | None) -> bool:
            """Take, ask or wait; return whether *until* has not passed."""

        def _let_go(self) -> None:
            """Give back what the hub or the pool holds for this reader."""

        async def aclose(self) -> None:
            """Stop reading."""

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
        if not self._reading:
            ready = self._take_ready()
            if ready:
                if self.ended:
                    self._let_go()
                return ready
        while self._empty:
            if not await self._read(deadline):
                return []
        rest = self._rest
        del self._rest
        return rest

    async def _read(self, until: float | None) -> bool:
        """Read the next items; return whether there are any, in time and before the end."""
        self._pool._check_loop()
        if self._reading:
            raise readers.busy_error()
        if not self._empty:
            # Another task has read them before this one began.
            return True
        self._reading = True
        try:
            while not (self._rest or self._source.ended):
                try:
                    if not await self._advance(until):
                        break
                except FFError as error:
                    self._let_go()
                    self._failed(error, _transport.closed_error() if self._pool.closed else None)
            if self._source.ended:
                self._let_go()
        except (asyncio.CancelledError, FFError):
            raise
        except BaseException:
            # An interrupt broke off a read, so items read by it may not have been delivered.
            if not (self._rest or self.ended):
                self._let_go()
                self._restart(self.cursor)
            raise
        finally:
            self._reading = False
        return not self._empty

    async def _next_item(self) -> T:
        if not await self._read(None):
            raise StopAsyncIteration
        return self._pop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class PushReader(readers.PushState[T], Readable[T]):
    """Base of the readers that take what is pushed: an asynchronous iterator and context manager."""

    def __init__(self, pool: Pool, source: readers.PushSource[T]) -> None:
        super().__init__(source, pool.config.retry)
        self._pool = pool
        self._hub = pool._hub
        self._loop = pool._loop
        # The hub knows the bell, and not the reader, so a reader that was left can go.
        self._ring = Bell(pool._loop)
        self._sent: Read | RoutedRead | None = None
        # Rings the bell at `_looks_at`.
        self._look: asyncio.TimerHandle | None = None

    async def _advance(self, until: float | None) -> bool:
        """Take what has come, or ask, or wait; return False where *until* has passed."""
        if self.closed:
            raise readers.closed_error()
        self._pool._check()
        read = self._sent
        if read is not None:
            if not read.done:
                return await self._wait(until)
            self._sent = None
            if read.final:
                self._retries.give_up()
            replies = read.take()
            if isinstance(self._attached, Inbox):
                # It may have waited for its turn.
                self._attached.asked_at = read.sent_at
            self._put_received(replies)
            self._attach_part()
            return True
        if self._resume_at > time.monotonic():
            return await self._wait(until, self._resume_at)
        if self._library_missing:
            await self._pool._load_library()
            self._library_missing = False
        self._attach_part()
        if self._put_pushed():
            self._attach_part()
            return True
        step = self._next_step()
        if step is None:
            return await self._wait(until, self._source.wake_at)
        self._sent = self._hub.read(step, self._ring)
        return True

    async def _wait(self, until: float | None, look_at: float = inf) -> bool:
        """Wait until the bell rings, or *look_at* has come; return False where *until* has passed."""
        if until is not None and time.monotonic() >= until:
            return False
        if until is not None and until < look_at:
            look_at = until
        self._look_by(look_at)
        await self._ring
        return True

    def _look_by(self, look_at: float) -> None:
        """See to it that the bell rings at *look_at*, in monotonic time, or before."""
        if self._looks_at <= look_at != inf:
            return
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._looks_at = look_at
        if look_at != inf:
            left = max(look_at - time.monotonic(), 0.0)
            self._look = self._loop.call_later(left, _ring, weakref.ref(self))

    def _attach_part(self) -> None:
        """Let the hub know what this reader listens with."""
        part = self._source.part
        if part is self._attached:
            return
        self._leave()
        if isinstance(part, Inbox):
            # Iteration takes its pushes in C.
            self._attach(part, self._ring)
        else:
            part.on_wake = self._ring
        self._attached = part
        self._hub.attach(part)
        self._opened()

    def _leave(self) -> None:
        attached, self._attached = self._attached, None
        self._listening = None
        if attached is not None:
            self._detach()
            self._hub.detach(attached)

    def _let_go(self) -> None:
        """Listen no more, and take no answer to the read under way."""
        self._sent = None
        self._leave()

    async def aclose(self) -> None:
        """Stop reading. A waiting read raises an error."""
        self._closed = True
        self._leave()
        self._look_by(inf)
        if self._sent is not None:
            self._sent.drop()
        self._ring()

    def __del__(self) -> None:
        # A loop over the reader was left in the middle. The collector may run on any thread.
        attached = self._attached
        if attached is not None and self._pool._pid == os.getpid():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._hub.detach, attached)


def _ring(reader: weakref.ref[PushReader[Any]]) -> None:
    found = reader()
    if found is not None:
        found._look = None
        found._looks_at = inf
        found._ring()


class Tail(PushReader[Item]):
    __doc__ = readers.TAIL


class Follow(PushReader[FollowItem]):
    __doc__ = readers.FOLLOW


class PatientReader(PushReader[T]):
    """Base of the readers whose first read may go on beyond its time."""

    async def _advance(self, until: float | None) -> bool:
        return await super()._advance(cast("readers.Patient", self._source).patience(until))


class Waiting(PatientReader[Ended]):
    """Waits for the end of an execution."""


class Completions(PatientReader[CompletionPayload]):
    __doc__ = readers.COMPLETIONS
