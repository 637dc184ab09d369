"""What both shells' readers share: their state, their words, and the rules of a read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ff_fast.errors import InvalidInput, Unavailable
from ff_fast.types import End, seconds

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._core.steps import Source


class HasCursor(Protocol):
    """An item that says where reading goes on behind it."""

    @property
    def cursor(self) -> str | None: ...


T = TypeVar("T", bound=HasCursor)

TAIL = """Reads one attempt, live. Made by ``backend.tail``; see there for the items.

    Iterate it, or take all items of one answer at a time with :meth:`next_batch`. A time-out or a cancellation loses
    nothing: the tail goes on with the next read. It gives its connection back when it has ended, when it is closed, and
    when nobody holds it any more.
    """

COMPLETIONS = """Reads executions that end. Made by ``backend.subscribe_completions``; it has no end of its own.

    Iterate it, or take all items of one answer at a time with :meth:`next_batch`. A time-out or a cancellation loses
    nothing: the subscription goes on with the next read.
    """


class ReaderState(Generic[T]):
    """Where a reader stands; the items themselves are in :class:`ff_fast._hot.items.Items`."""

    if TYPE_CHECKING:
        # Of Items, which both shells' readers are too.
        last: T | None
        _empty: bool

    def __init__(self, source: Source[T]) -> None:
        self._source = source
        self._closed = False

    @property
    def cursor(self) -> str | None:
        """Where a later reader goes on (its ``after``): behind the item that was taken last, or the start.

        None is a subscription that has not asked the server yet.
        """
        return self._source.start if self.last is None else self.last.cursor

    @property
    def ended(self) -> bool:
        """Whether the last item was taken: nothing follows."""
        return isinstance(self.last, End)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def __repr__(self) -> str:
        return f"{type(self).__name__}(cursor={self.cursor!r}, ended={self.ended})"


def deadline(timeout: float | timedelta | None) -> float | None:
    """Return when a wait of *timeout* (seconds or a ``timedelta``) is over, in monotonic time; None waits for ever.

    Raises:
        InvalidInput: It is negative, not a number, or longer than a year.
    """
    return None if timeout is None else time.monotonic() + seconds("timeout", timeout, zero=True)


def busy_error() -> InvalidInput:
    """Return the error of a read while another one goes on."""
    return InvalidInput("Somebody else is reading from this reader; make one reader for each.")


def closed_error() -> Unavailable:
    """Return the error of a read from a closed reader."""
    return Unavailable("The reader is closed; open another one from its cursor.")
