"""State, documentation and rules that the readers of both shells share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ff_fast.errors import Unavailable
from ff_fast.types import seconds

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._core.steps import Source


class HasCursor(Protocol):
    """An item with the cursor from which reading continues after it."""

    @property
    def cursor(self) -> str | None: ...


T = TypeVar("T", bound=HasCursor)

TAIL = """Reads one attempt, live. Made by ``backend.tail``; see there for the items.

    Iterate it, or take all items of one answer at a time with :meth:`next_batch`. A timeout or a cancellation loses
    nothing: the next read continues. The tail releases its connection at its end, when it is closed, and when it is
    garbage-collected.
    """

COMPLETIONS = """Reads executions that end. Made by ``backend.subscribe_completions``; it never ends by itself.

    Iterate it, or take all items of one answer at a time with :meth:`next_batch`. A timeout or a cancellation loses
    nothing: the next read continues.
    """

ONE_AT_A_TIME = "This reader is being read already; make one reader for each thread or task."


class ReaderState(Generic[T]):
    """Position of a reader; :class:`ff_fast._hot.items.Items` holds the items that were read ahead."""

    if TYPE_CHECKING:
        # Attributes of Items, the other base class of both shells' readers.
        last: T | None
        _empty: bool

    def __init__(self, source: Source[T]) -> None:
        self._source = source
        self._closed = False

    @property
    def cursor(self) -> str | None:
        """The ``after`` of a reader that continues here: after the last item taken, or the start.

        None for a subscription that began without a cursor and has not read yet.
        """
        return self._source.start if self.last is None else self.last.cursor

    @property
    def ended(self) -> bool:
        """Whether the last item was taken; no other follows."""
        return self._source.ended and self._empty

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def __repr__(self) -> str:
        return f"{type(self).__name__}(cursor={self.cursor!r}, ended={self.ended})"


def deadline(timeout: float | timedelta | None) -> float | None:
    """Return the monotonic time at which a wait of *timeout* (seconds or a ``timedelta``) ends; None has no limit.

    Raises:
        InvalidInput: *timeout* is negative, not a number, or longer than a year.
    """
    return None if timeout is None else time.monotonic() + seconds("timeout", timeout, zero=True)


def closed_error() -> Unavailable:
    """Return the error that a closed reader raises."""
    return Unavailable("The reader is closed; open another one from its cursor.")
