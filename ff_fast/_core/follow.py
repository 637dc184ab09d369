"""Readers of an execution without I/O: one that follows it across its attempts, and one that waits for its end.

The state of the execution leads. While an attempt streams, a :class:`~ff_fast._core.tail.TailCore` reads it; between
attempts the state is read whenever it may have changed. An attempt is left behind when its tail has ended and the state
says that another one was claimed, or that the execution has ended: neither a lapsed lease nor an end entry alone says
so.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.steps import Step
from ff_fast._core.summary import fold
from ff_fast._core.tail import Item as TailItem
from ff_fast._core.tail import TailCore, longest_wait
from ff_fast._hot.feed import Inbox
from ff_fast.errors import (
    AttemptNotFound,
    ExecutionCancelled,
    ExecutionExpired,
    ExecutionFailed,
    InvalidCursor,
)
from ff_fast.types import (
    AttemptStarted,
    End,
    Gap,
    Snapshot,
    StreamCursor,
    SummaryDocument,
    TailVisibility,
    make_cursor,
    parse_cursor,
    split_cursor,
)

if TYPE_CHECKING:
    from ff_fast._hot.tally import Tally
    from ff_fast.errors import FFError

T = TypeVar("T")

_UNSUBSCRIBED_S = 1.0
# How long the first look at an execution may take whose end somebody waits for, whatever the time of the wait.
_FIRST_LOOK_S = 1.0

Item = TailItem | Snapshot | AttemptStarted

_START = "start"
_BEGINNING = StreamCursor(0, 0)


def follow_place(after: object) -> tuple[int, StreamCursor] | None:
    """Return the attempt and the place that the cursor *after* names; None for the beginning.

    Raises:
        InvalidCursor: It names neither.
    """
    attempt, place = split_cursor(after)
    if attempt is not None:
        return attempt, place
    if place != _BEGINNING:
        raise InvalidCursor("The id of a frame names no attempt; pass the cursor of the item.")
    return None


class Watch(Inbox, Generic[T]):
    """Reads something whenever it may have changed: a reader of its channel.

    Attributes:
        channel: Where the server tells of changes.
        op: Reads it.
    """

    __slots__ = ("_failure", "channel", "op")

    def __init__(self, channel: bytes, op: ops.Op[T]) -> None:
        self._failure: FFError | None = None
        self.channel = channel
        self.op = op
        self.look()

    def look(self) -> None:
        """Read it with the next step."""
        self.reading = False
        self.due = True

    def failed(self, error: FFError) -> None:
        """Note that there is no subscription to be had; the next step raises *error*."""
        self._failure = error
        self.doubt(False)

    def step(self) -> Step | None:
        """Return the request; None if it need not be read yet."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        now = monotonic()
        if not self.due and now < self.wake_at:
            return None
        # A push from here on may tell of what this answer does not know.
        self._begin_reading()
        self.look_at = now + (longest_wait() if self.confirmed else _UNSUBSCRIBED_S)
        return Step((self.op.command(),), large=self.op.large)

    def receive(self, reply: object) -> T:
        """Return what the reply to the last step says."""
        self.reading = False
        return self.op.answer(reply)


class StateWatch(Watch[ops.State]):
    """Reads the state of an execution whenever it may have changed."""

    __slots__ = ()

    def __init__(self, execution_id: str) -> None:
        super().__init__(keys.execution_channel(execution_id), ops.read_state(execution_id))


class FollowCore:
    """A live reader of an execution, across its attempts.

    Args:
        execution_id: Id of the execution.
        after: Cursor of an item, exclusive; None begins with the first attempt, or with the newest if *snapshot*.
        snapshot: Begin with the summary document of the attempt, if it has one.
        visibility: Whether best-effort frames are delivered.

    Attributes:
        start: Cursor of the beginning.
        part: What listens: to the execution between attempts, to the attempt while it streams.
        ended: Whether the end was delivered.
        tally: Counts what is read; None counts nothing.
    """

    __slots__ = (
        "_attempt", "_execution_id", "_final", "_missing", "_over", "_place", "_snapshot", "_snapshot_due",
        "_snapshot_op", "_started", "_sure", "_tail", "_visibility", "_watch", "ended", "part", "start",
        "tally",
    )  # fmt: skip

    def __init__(
        self,
        execution_id: str,
        after: object,
        *,
        snapshot: bool = False,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> None:
        self._execution_id = keys.canonical_execution_id(execution_id)
        self._visibility = visibility
        self._snapshot = snapshot
        self.tally: Tally | None = None
        self._tail: TailCore | None = None
        place = follow_place(after)
        self.start = _START if place is None else make_cursor(place[0], *place[1])
        self._move(self.start)
        self.restart()

    def _move(self, cursor: str) -> None:
        """Go on after *cursor*."""
        place = follow_place(cursor)
        self._snapshot_due = self._snapshot and cursor == self.start
        if place is not None:
            self._go_to(*place, started=True)
        elif self._snapshot:
            self._go_to(None)
        else:
            self._go_to(0)
        self.ended = False

    def _go_to(
        self, attempt: int | None, place: StreamCursor = _BEGINNING, *, started: bool = False
    ) -> None:
        # None is the newest attempt, which the state tells. Nothing is known about attempts after this one.
        self._attempt = attempt
        self._place = place
        # Whether the reader was told of the attempt.
        self._started = started
        # Whether the tail of the attempt has ended, and whether that was after the attempt had: a lapsed lease is an
        # end that a claim which is given back takes back.
        self._over = False
        self._sure = False
        # Whether the server did not know the attempt when it was read last.
        self._missing = False

    def restart(self, cursor: str | None = None) -> None:
        """Continue after *cursor*, or after the last read; items after it were not delivered."""
        if cursor is not None:
            self._move(cursor)
        elif self._tail is not None:
            self._place = parse_cursor(self._tail.cursor)
        self._tail = None
        self._final: ops.State | None = None
        self._snapshot_op: ops.Op[dict[bytes, bytes]] | None = None
        self._look()
        if self._started and not self._over:
            self._read_attempt()

    def _look(self) -> None:
        """Read the state of the execution with the next step, and whenever it moves."""
        self._watch = StateWatch(self._execution_id)
        self.part: StateWatch | TailCore = self._watch

    @property
    def wake_at(self) -> float:
        """When to ask for a step although nothing was pushed, in monotonic time."""
        return (self._tail or self._watch).wake_at

    def step(self) -> Step | None:
        """Return the next request; None if there is nothing to be asked."""
        if self._tail is not None:
            return self._tail.step()
        if self._snapshot_op is not None:
            return Step((self._snapshot_op.command(),), large=True)
        return self._watch.step()

    def receive(self, reply: object) -> list[Item]:
        """Take the reply to the last step, and return its items.

        Raises:
            FFError: The server refused the request.
        """
        if self._tail is not None:
            try:
                found = self._tail.receive(reply)
            except AttemptNotFound:
                if self._missing:
                    raise
                self._leave()
                self._missing = True
                return []
            self._missing = False
            lost = any(map(_says_other_stream, found))
            items = self._tailed(found)
            if lost:
                # The server has lost frames, and maybe the attempt with them.
                self._leave()
            return items
        if self._snapshot_op is not None:
            return self._begin(fold(self._snapshot_op.answer(reply), self._attempt or 0))
        return self._decide(self._watch.receive(reply))

    def take(self) -> list[Item]:
        """Return the items of pushes that follow what was delivered."""
        # A watch has none, and is woken again only after it was asked.
        return self._tailed(self.part.take())

    # -- the attempt that is read --------------------------------------------------------------------------------------

    def _read_attempt(self, *, closed: bool = False) -> None:
        """Read the attempt from where this stands; first its document where that is due.

        Args:
            closed: It has ended, so nothing more will be published about it.
        """
        assert self._attempt is not None
        self._sure = closed
        if self._snapshot_due:
            self._snapshot_op = ops.read_summary(self._execution_id, self._attempt)
            # So that the reader is asked for its next step.
            self._watch.look()
        else:
            tail = TailCore(self._execution_id, self._attempt, self._place, self._visibility)
            tail.tally = self.tally
            # What follows the end of an attempt is decided here.
            tail.reads_end = True
            # What has ended is read at once; else the subscription comes first.
            tail.due = closed
            self._tail = self.part = tail
            # The next look at the state has a watch of its own; readers are many.
            del self._watch

    def _begin(self, document: SummaryDocument | None) -> list[Item]:
        """Take the document of the attempt, which the reader begins with."""
        assert self._attempt is not None
        self._snapshot_due = False
        self._snapshot_op = None
        items: list[Item] = []
        if document is not None:
            # No patch stands between the document and a cursor behind it.
            self._place = max(parse_cursor(document.cursor), self._place)
            items = [
                Snapshot(document.document_json, document.version, self._attempt, self._cursor)
            ]
        elif not self._started:
            items = [AttemptStarted(self._attempt, self._cursor)]
        self._started = True
        self._read_attempt(closed=self._final is not None)
        return items

    def _tailed(self, found: list[TailItem]) -> list[Item]:
        """Pass on items of the tail; where it ends, the state says what follows."""
        last = found[-1] if found else None
        if not isinstance(last, End):
            return cast("list[Item]", found)
        self._leave()
        self._over = True
        self._sure = self._sure or last.reason != "producer_lost"
        items: list[Item] = [*found[:-1]]
        if self._final is not None:
            items += self._decide(self._final)
        return items

    def _leave(self) -> None:
        """Read the attempt no further, and look at the state."""
        if self._tail is not None:
            self._place = parse_cursor(self._tail.cursor)
            self._tail = None
        self._look()

    @property
    def _cursor(self) -> str:
        return make_cursor(self._attempt or 0, *self._place)

    # -- the execution -------------------------------------------------------------------------------------------------

    def _decide(self, state: ops.State) -> list[Item]:
        """Compare where this stands with where the execution stands; return what the reader is to hear of that."""
        items: list[Item] = []
        if state.outcome is not None:
            self._final = state
        index = state.attempt_index
        if self._attempt is None:
            # Where the last attempt was never claimed, the document of the one before is the newest.
            unclaimed = state.outcome is not None and not state.claimed
            self._go_to(max(index - 1, 0) if unclaimed else index)
        assert self._attempt is not None
        if index < self._attempt:
            # The server has lost later attempts.
            self._go_to(index)
        while True:
            claimed = self._attempt < index or state.claimed
            closed = self._attempt < index or state.outcome is not None
            if not claimed:
                self._missing = False
                return items + self._wait(state)
            if not self._started:
                if not self._snapshot_due:
                    items.append(AttemptStarted(self._attempt, self._cursor))
                    self._started = True
                self._read_attempt(closed=closed)
                return items
            if self._missing and closed:
                items.append(self._expired())
            # Behind the lapse of a lease there may be frames of the same attempt, where its claim was given back.
            goes_on = not self._sure and (closed or not state.lapsed)
            if not self._over or goes_on:
                self._over = False
                self._read_attempt(closed=closed)
                return items
            if self._attempt == index:
                return items + self._wait(state)
            if self._attempt + 1 == index and not state.claimed:
                return items + self._wait(state)
            self._go_to(self._attempt + 1)

    def _wait(self, state: ops.State) -> list[Item]:
        """Return the end of the execution; nothing while it goes on."""
        if state.outcome is None or state.closed_reason is None:
            return []
        self.ended = True
        return [End(state.closed_reason, self._cursor, state.outcome, state.error)]

    def _expired(self) -> Gap:
        """Return what stands for the frames of an attempt that are not kept any more."""
        self._missing = False
        self._over = self._sure = True
        if self.tally is not None:
            self.tally.missed("expired")
        return Gap(self._place.sequence + 1, 1, "expired", self._cursor)


def _says_other_stream(item: object) -> bool:
    return isinstance(item, Gap) and item.reason in ("cursor_ahead", "rewritten")


class Ended(NamedTuple):
    """The end of an execution that somebody waited for.

    Attributes:
        state: Where it stands.
        result: Its result; empty unless it has completed with one.
    """

    state: ops.State
    result: bytes

    @property
    def cursor(self) -> None:
        """There is nothing to go on after."""

    def value(self) -> bytes:
        """Return the result.

        Raises:
            ExecutionFailed, ExecutionCancelled, ExecutionExpired: It has ended without one.
        """
        _, _, _, _, _, outcome, error, failure_class = self.state
        if outcome == "success":
            return self.result
        if outcome == "cancelled":
            raise ExecutionCancelled(error)
        if outcome == "expired":
            raise ExecutionExpired(error)
        raise ExecutionFailed(error, None if failure_class is None else failure_class.value)


class WaitCore:
    """A reader of the end of an execution, which is its only item.

    Args:
        execution_id: Id of the execution.

    Attributes:
        part: What listens to the execution.
        ended: Whether the end was delivered.
    """

    __slots__ = ("_ended_as", "_first_look_until", "_result_op", "ended", "part")

    start = None
    tally = None

    def __init__(self, execution_id: str) -> None:
        eid = keys.canonical_execution_id(execution_id)
        # None once the execution was seen to go on.
        self._first_look_until: float | None = monotonic() + _FIRST_LOOK_S
        self.part = StateWatch(eid)
        self._result_op = ops.read_result(eid)
        self.restart()

    def restart(self, cursor: str | None = None) -> None:  # noqa: ARG002 - there is one place
        """Read the state again."""
        self._ended_as: ops.State | None = None
        self.ended = False
        self.part.look()

    def patience(self, until: float | None) -> float | None:
        """Return until when to wait: what has ended already is found also by a wait that has no time."""
        if until is None or self._first_look_until is None:
            return until
        return max(until, self._first_look_until)

    @property
    def wake_at(self) -> float:
        """When to ask for a step although nothing was pushed, in monotonic time."""
        return self.part.wake_at

    def step(self) -> Step | None:
        """Return the next request; None if there is nothing to be asked."""
        if self._ended_as is not None:
            return Step((self._result_op.command(),), large=True)
        return self.part.step()

    def receive(self, reply: object) -> list[Ended]:
        """Take the reply to the last step; return the end if it is there.

        Raises:
            FFError: The server refused the request.
        """
        state, result = self._ended_as, b""
        if state is not None:
            result = self._result_op.answer(reply)
        else:
            state = self.part.receive(reply)
            if state.outcome is None:
                self._first_look_until = None
                return []
            if state.outcome == "success":
                self._ended_as = state
                # So that the reader is asked for its next step.
                self.part.look()
                return []
        self.ended = True
        return [Ended(state, result)]

    def take(self) -> list[Ended]:
        """Return nothing: what is pushed says only that there is something to be read."""
        self.part.take()
        return []
