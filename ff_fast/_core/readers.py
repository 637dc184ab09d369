"""State, documentation and rules that the readers of both shells share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ff_fast._core.steps import Retries
from ff_fast._hot.tally import Listening
from ff_fast.errors import FFError, FunctionMissing, InvalidInput, Unavailable
from ff_fast.types import End, seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from ff_fast._core.hub import Part
    from ff_fast._core.steps import Step
    from ff_fast._hot.tally import Tally
    from ff_fast.types import BackendRetry


SILENT_S = 1.0
"""How long a node may be silent to a partial step of a reader, in seconds, before the reader goes on without it."""


class HasCursor(Protocol):
    """An item with the cursor from which reading continues after it."""

    @property
    def cursor(self) -> str | None: ...


T = TypeVar("T", bound=HasCursor)

TAIL = """Reads one attempt, live. Made by ``backend.tail``; see there for the items.

    Iterate it, or take all items of one answer at a time with :meth:`next_batch`. A timeout or a cancellation loses
    nothing: the next read continues. The tail stops listening at its end, when it is closed, and when it is
    garbage-collected.
    """

FOLLOW = """Follows one execution across its attempts, live. Made by ``backend.follow``; see there for the items.

    Iterate it, or take all items of one answer at a time with :meth:`next_batch`. A timeout or a cancellation loses
    nothing: the next read continues. It stops listening at the end, when it is closed, and when it is
    garbage-collected.
    """

COMPLETIONS = """Reads executions that end. Made by ``backend.subscribe_completions``; it never ends by itself.

    Iterate it, or take all items of one answer at a time with :meth:`next_batch`. A timeout or a cancellation loses
    nothing: the next read continues.
    """


class Patient(Protocol):
    """A source whose first read may need more time than it has."""

    def patience(self, until: float | None, /) -> float | None:
        """Return until when a read waits whose time is up at *until*, in monotonic time."""


class Place(Protocol):
    """What every source of items knows about its place."""

    @property
    def ended(self) -> bool:
        """Whether the last item was read."""

    @property
    def start(self) -> str | None:
        """Cursor of the beginning; None until the server's time is known."""

    def restart(self, cursor: str | None = None) -> None:
        """Continue after *cursor*: items read after it were not delivered. None continues after the last read."""


class PushSource(Place, Protocol[T]):
    """A stream of items that takes what is pushed, and reads where something may have been missed.

    `take` and `step` may change `part`; a shell attaches what it is after each of them.
    """

    @property
    def part(self) -> Part:
        """What listens to a channel of the hub for this source."""

    @property
    def tally(self) -> Tally | None:
        """What counts its reader as open while it listens; None counts nothing."""

    @property
    def wake_at(self) -> float:
        """When there is something to ask although nothing was pushed, in monotonic time."""

    def take(self) -> list[T]:
        """Return the items of what was pushed."""

    def step(self) -> Step | None:
        """Return the next request; None if there is nothing to ask.

        Raises:
            FFError: There is no subscription to be had.
        """

    @property
    def receive(self) -> Callable[..., list[T]]:
        """Returns the items in the replies to the last step, each of them an argument.

        For a partial step an ``FFError`` stands for each reply of a node that has failed.
        """


class ReaderState(Generic[T]):
    """Position of a reader; :class:`ff_fast._hot.items.Items` holds the items that were read ahead."""

    if TYPE_CHECKING:
        # Attributes of Items, the other base class of both shells' readers.
        last: T | None
        _empty: bool

        def _put(self, items: list[T]) -> None: ...

    def __init__(self, source: Place, retry: BackendRetry) -> None:
        self._source = source
        self._retries = Retries(retry, retry_timeouts=True)
        self._closed = False
        # When the server may be asked again after a failure, in monotonic time.
        self._resume_at = 0.0
        self._library_missing = False

    def _failed(self, error: FFError, closed: FFError | None) -> None:
        """Decide what follows a failed read: raise the error, or note when and how the next one may begin.

        Args:
            error: What it failed with.
            closed: What a call raises where the backend is closed; None while it is open.
        """
        self._restart()
        if self._closed:
            raise closed_error() from None
        if closed is not None and error.retryable:
            # Closing has cut the read off, at whatever point it was.
            raise closed from None
        pause = self._retries.pause(error) if closed is None else None
        if pause is None:
            raise error
        self._library_missing = isinstance(error, FunctionMissing)
        self._resume_at = time.monotonic() + pause

    def _restart(self, cursor: str | None = None) -> None:
        """Give up the read that is under way; the next one goes on behind *cursor*, or behind the items read so far."""
        self._source.restart(cursor)

    @property
    def cursor(self) -> str | None:
        """The ``after`` of a reader that continues here: after the last item taken, or the start.

        None for a subscription that began without a cursor and has not read yet.
        """
        return self._source.start if self.last is None else self.last.cursor

    @property
    def ended(self) -> bool:
        """Whether the last item was taken; no other follows."""
        return isinstance(self.last, End)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def __repr__(self) -> str:
        return f"{type(self).__name__}(cursor={self.cursor!r}, ended={self.ended})"


class PushState(ReaderState[T]):
    """State of a reader that takes what is pushed."""

    _source: PushSource[T]
    # What the hub knows of this reader; None before the first read, and after the last.
    _attached: Part | None = None
    # Counts it as open while it is attached.
    _listening: Listening | None = None

    def _opened(self) -> None:
        """Note that the hub knows this reader."""
        tally = self._source.tally
        self._listening = None if tally is None else Listening(tally)

    def _put_received(self, replies: list[object]) -> None:
        """Put the items in the replies to the last step."""
        items = self._source.receive(*replies)
        self._retries.reset()
        self._put(items)

    def _put_pushed(self) -> bool:
        """Put the items of what was pushed; return whether there are any."""
        items = self._source.take()
        if items:
            self._put(items)
        return bool(items)

    def _next_step(self) -> Step | None:
        """Return the next request; None if there is nothing to ask."""
        try:
            return self._source.step()
        except FFError:
            # The hub has used up all retries.
            self._retries.give_up()
            raise


def deadline(timeout: float | timedelta | None) -> float | None:
    """Return the monotonic time at which a wait of *timeout* (seconds or a ``timedelta``) ends; None has no limit.

    Raises:
        InvalidInput: *timeout* is negative, not a number, or longer than a year.
    """
    return None if timeout is None else time.monotonic() + seconds("timeout", timeout, zero=True)


def busy_error() -> InvalidInput:
    """Return the error of a read while another one is under way."""
    return InvalidInput(
        "This reader is being read already; make one reader for each thread or task."
    )


def closed_error() -> Unavailable:
    """Return the error that a closed reader raises."""
    return Unavailable("The reader is closed; open another one from its cursor.")
