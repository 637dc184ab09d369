from asyncio import AbstractEventLoop
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, final

from typing_extensions import disjoint_base

from ff_fast._hot.frames import Pushed, StreamFrame
from ff_fast._hot.tally import Tally
from ff_fast.errors import FFError
from ff_fast.types import End, EndReason, Gap

@final
class Bell:
    """Wakes one asyncio task that waits for a reader, any number of times.

    It is what a task awaits, in place of a future for each wait: a task asks only for the methods
    below. A feed refers to it, and it refers to no reader but by a task that waits.
    """

    def __init__(self, loop: AbstractEventLoop) -> None: ...
    def __call__(self) -> None:
        """Wake the task that waits, if one does."""

    def __await__(self) -> Generator[Any]:
        """Wait for the next ring. One task at a time may wait."""

    @property
    def waiting(self) -> bool:
        """Whether a task waits."""
    _asyncio_future_blocking: bool
    def get_loop(self) -> AbstractEventLoop:
        """Return the loop of the tasks that wait."""

    def add_done_callback(
        self, callback: Callable[[Bell], object], *, context: Context | None = None
    ) -> None:
        """Call *callback* at the ring."""

    def cancel(self, msg: object = None) -> bool:
        """End the wait of a task that was cancelled."""

    def result(self) -> None:
        """Return None, or raise ``CancelledError`` where the wait was cancelled."""

@final
class Ringer:
    """Resumes the tasks whose bells were rung, all of them in one call of the loop."""

    def __init__(self, loop: AbstractEventLoop) -> None: ...
    def __call__(self, *args: object, **kwargs: object) -> None: ...

@disjoint_base
class Inbox:
    """Place of a reader in an attempt, and the pushes that it has not taken yet.

    A push is taken if its frames follow the place, by their ids: what overlaps must have the ids
    that the reader knows. Everything else makes a read due. The queue has a bound; beyond it all is
    dropped, and a read is due.

    Attributes:
        ms, sequence: Id of the last frame that was delivered or reported missing.
        stored: Sequence up to which what the reader got is known to be stored.
        due: A read must be made, since something may have been missed.
        reading: A read is under way; no push is taken meanwhile.
        doubted: The place may not be in storage; no push is taken until a read has found it there.
        confirmed: The server has confirmed the subscription, and it was not lost since.
        settled_at: Monotonic time from which storage has the frames that were pushed before the
            subscription.
        asked_at: Monotonic time of the last request, at the earliest.
        reads_end: A push that tells of the end makes a read due, which delivers it.
        end_reason: Why the attempt ended; None until the end was delivered.
        lease_at, look_at: Monotonic times at which a read is due although nothing was pushed.
        on_wake: Called, on the thread of the feed, when there may be something to take or to ask.
        tally: Counts the frames that are taken; None counts none.
    """

    attempt_index: int
    ms: int
    sequence: int
    stored: int
    exclude: bool
    due: bool
    reading: bool
    doubted: bool
    confirmed: bool
    settled_at: float
    asked_at: float
    reads_end: bool
    end_reason: EndReason | None
    lease_at: float
    look_at: float
    on_wake: Callable[[], object] | None
    tally: Tally | None
    def __new__(cls, *_: object, **__: object) -> Inbox: ...
    @property
    def wake_at(self) -> float:
        """Monotonic time at which a read is due although nothing was pushed."""

    def offer(self, pushed: Pushed) -> None:
        """Queue what was pushed, from the thread of the feed."""

    def doubt(self, subscribed: bool) -> None:
        """Note that the subscription was confirmed, or is lost: pushes may have been missed."""

    def take(self) -> list[StreamFrame | Gap | End]:
        """Return the items of the pushes that follow the place, in order."""

    def _begin_reading(self) -> None: ...
    def _forget(self) -> None: ...
    def _drop_pushes(self) -> None: ...
    def _wait_for_hole(self) -> None: ...
    def _hole_filled(self) -> None: ...

@final
class Feed:
    """The channel of one attempt, and the readers that listen to it. It is a listener of the hub.

    Attributes:
        channel: Name of the channel.
    """

    @property
    def channel(self) -> bytes: ...
    def __init__(self, channel: bytes) -> None: ...
    def add(self, reader: Inbox) -> None:
        """Let *reader* hear what is pushed from here on."""

    def remove(self, reader: Inbox) -> bool:
        """Let *reader* go; return whether none is left."""

    def told(self, message: bytes) -> None:
        """Hand a message to every reader."""

    def doubt(self, subscribed: bool) -> None:
        """Tell every reader that the subscription was confirmed, or lost."""

    def failed(self, error: FFError) -> None:
        """Tell every reader that there is no subscription to be had."""
