"""Writers without I/O: opening one, and its waits."""

from __future__ import annotations

import copy
import logging
import time
import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ff_fast import keys
from ff_fast._core import durability, ops
from ff_fast._core.durability import Ask, Level
from ff_fast._core.leases import is_lease_lost
from ff_fast._core.steps import Command, Pause, Retries, Step, applied_in_part
from ff_fast._core.summary import fold
from ff_fast._hot.writer import Home, Outbox, WriterCore
from ff_fast._log import say_seldom
from ff_fast.errors import (
    DeadlineExceeded,
    ForkedClient,
    NotReplicated,
    SequenceGap,
    StateLost,
    SummaryConflict,
    Unavailable,
    WriterClosed,
    WriterSuperseded,
)
from ff_fast.types import (
    DEFAULT_PAYLOAD_LIMIT,
    AppendFrameOutcome,
    Durability,
    Frame,
    FrameKind,
    StreamMode,
    seconds,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, MutableMapping
    from datetime import timedelta

    from ff_fast._core.leases import KeptLeases
    from ff_fast._core.places import Place, Places
    from ff_fast._core.steps import Steps
    from ff_fast._hot.writer import Batch
    from ff_fast.errors import FFError
    from ff_fast.types import BackendRetry

T = TypeVar("T")
W = TypeVar("W", bound="SharedWriter")

HIGH_WATER_BYTES = 1 << 20
"""`drain` waits while more than this many bytes are unacknowledged, or less than one frame of maximum size fits."""

MAX_UNACKNOWLEDGED_BYTES = 32 << 20
RETENTION_MAXLEN = 10_000

ROUND_BYTES = 4 << 20
"""Most bytes of calls in one send, give or take a call; more writers wait for the next send."""

OTHER_MS_S = 0.002
"""A wait after which the server's clock shows another millisecond."""

CALLS_IN_FLIGHT = 16
"""Most calls with frames that wait for an answer. Full ones alone do not wait for the one before."""


class Wait(NamedTuple, Generic[T]):
    """A wait for the progress of a writer.

    Attributes:
        done: Whether the wait is over; evaluated after every progress.
        value: Result of the wait, once it is over.
        timeout_s: Longest wait in seconds; None waits until the writer succeeds or fails.
        level: What the frames up to *last* have to reach then; None for no more.
        last: Their last sequence.
    """

    done: Callable[[], bool]
    value: Callable[[], T]
    timeout_s: float | None
    level: Level | None = None
    last: int = 0


def timeout_s(timeout: float | timedelta | None) -> float | None:
    """Return a timeout in seconds.

    Raises:
        InvalidInput: *timeout* is negative, not a number, or longer than a year.
    """
    return None if timeout is None else seconds("timeout", timeout, zero=True)


class WriterOptions(NamedTuple):
    """Checked options of a writer."""

    mode: StreamMode
    retention_maxlen: int = RETENTION_MAXLEN
    max_unacknowledged_bytes: int = MAX_UNACKNOWLEDGED_BYTES
    linger_ms: float = 0.0
    max_payload_bytes: int = DEFAULT_PAYLOAD_LIMIT
    level: Level = durability.STORED


class WriterState(NamedTuple):
    """Everything a writer core is constructed from."""

    attempt: ops.Attempt
    writer_id: bytes
    opened: ops.Opened
    document: bytes | None
    options: WriterOptions
    places: Places


def open_writer(
    attempt: ops.Attempt, options: WriterOptions, places: Places, *, complete: bool = False
) -> Steps[WriterState]:
    """Supersede the writer of the attempt, and read the summary that it continues.

    Args:
        attempt: The attempt.
        options: Options of the writer.
        places: What this backend knows to be stored.
        complete: Refuse a stream that has lost frames which this backend knows to be stored.

    Raises:
        UnsupportedServer: The server cannot confirm the level that the writer asks for.
        ExecutionNotFound, StaleOwner, StateLost, ExecutionSuspended, StreamClosed, LeaseExpired: The handle may not
            write.
        SequenceGap: The stream is not *complete*.
    """
    tag = keys.slot_tag_of(attempt.execution_id)
    yield from durability.can_reach(options.level.durability, tag)
    writer_id = ops.writer_id(attempt)
    opening = ops.open_writer(attempt, writer_id, options.max_payload_bytes)
    opened = yield from ops.call(opening)
    with applied_in_part():
        # The writer before is superseded.
        place = places.find(attempt.fields.lease_id)
        if place is not None and place.held is not None and opened.last_sequence < place.sequence:
            # The server has lost frames of the writer before.
            refused = yield from _replayed(attempt, place, writer_id, opened)
            opened = opened if refused is not None else (yield from ops.call(opening))
        if complete:
            known = places.open(attempt.fields.lease_id).sequence
            if opened.last_sequence < known:
                places.tell(attempt.fields.lease_id)
                raise SequenceGap(opened.last_sequence + 1, known + 1)
        return (yield from continue_writer(attempt, writer_id, opened, options, places))


def continue_writer(
    attempt: ops.Attempt,
    writer_id: bytes,
    opened: ops.Opened,
    options: WriterOptions,
    places: Places,
) -> Steps[WriterState]:
    """Return the state of an opened writer; read its summary if the attempt has one."""
    if opened.opening > 1:
        # The writer before may have pushed frames that are never stored, under ids of this very millisecond. None of
        # this writer's frames may have the same.
        yield Pause(OTHER_MS_S)
    document = None
    if opened.summary_version:
        read = ops.read_summary(attempt.execution_id, attempt.attempt_index)
        summary = fold((yield from ops.call(read)))
        version = 0 if summary is None else summary.version
        if summary is None or version != opened.summary_version:
            raise SummaryConflict(opened.summary_version, version)
        document = summary.document_json
    return WriterState(attempt, writer_id, opened, document, options, places)


_NO_TRIM = 1 << 40
_REPLAY_BATCHES = 4
"""Batches that are on their way at once while the frames of a writer that is gone are stored again."""

_SETTLE_S = 0.005
"""Time between two looks at a writer that stores frames again, by a call that waits for it."""


def _replayed(
    attempt: ops.Attempt, place: Place, writer_id: bytes, opened: ops.Opened | None = None
) -> Steps[FFError | None]:
    """Store again what the server lacks of the frames that were acknowledged under a lease, or that it is lost.

    Args:
        attempt: The attempt.
        place: What is known to be stored under the lease.
        writer_id: The writer that stores them.
        opened: What the server has, as it has said to this writer's opening; None asks.

    Returns:
        None once the server has all of them; an error where it cannot have them any more, since somebody else writes.
    """
    held = place.held
    assert held is not None
    number = held.opening if opened is None else opened.opening
    core = WriterCore(
        keys=attempt.stream_keys,
        writer=writer_id,
        mode=StreamMode.durable(),
        opened=(place.ms, place.sequence, place.sequence, b"", 0, number),
        retention_maxlen=_NO_TRIM,
        place=place,
        replays=True,
    )
    try:
        if opened is None:
            core._ask()
        else:
            core._reopened(opened.last_ms, opened.last_sequence, opened.opening)
        while core._failure is None:
            if core._opening_lost:
                again = yield from ops.call(ops.open_writer(attempt, writer_id))
                core._reopened(again.last_ms, again.last_sequence, again.opening)
            batches: list[Batch] = []
            while len(batches) < _REPLAY_BATCHES and (batch := core._next_batch()) is not None:
                batches.append(batch)
            if not batches:
                return None
            head = attempt.stream_keys[0]
            replies = yield Step([Command(head, batch.message) for batch in batches])
            error = None
            for batch, reply in zip(batches, replies, strict=True):
                error = error or core._acknowledge(batch, *_timed(reply))
            if error is not None:
                raise error
        return core._failure
    finally:
        # What is not stored is held again.
        core._fail(WriterClosed(), hand_back=False)


def _timed(reply: object) -> tuple[object, int]:
    """Return the answer to the one part of a call, and the server's time in ms."""
    if isinstance(reply, bytes):
        now, _, answer = reply.partition(b" ")
        if now.isdigit():
            return answer, int(now)
    return reply, 0


def stored_again(attempt: ops.Attempt, place: Place) -> Steps[bool]:
    """Store again what the server has lost of the frames that were acknowledged under a lease.

    An open writer does so itself. Where it is gone, its frames are sent under its name.

    Returns:
        Whether the server has all of them, or says of the others that they are lost; it cannot where somebody else
        writes.
    """
    if place.held is None or not place.held.writer:
        return False
    writer = place.writer
    if writer is not None:
        writer._ask()
        while not (writer._idle or writer._stopped):
            yield Pause(_SETTLE_S)
        if not writer._stopped:
            return True
    return (yield from _replayed(attempt, place, place.held.writer)) is None


class SlotHome(Home):
    """The writers of one slot, of all without a cluster: they register at the sender of its node, or wait.

    What a node answers to the calls of a slot concerns that slot: its writers wait and go again, with retries of their
    own, and the writers of others go on.

    Attributes:
        waiting: Takes the writers while nobody sends for them; tells the shell of the first one.
        retries: Those of the slot.
        recovering: Somebody looks for the node of the slot.
    """

    def __init__(self, slot: int | None, waiting: Outbox, retry: BackendRetry) -> None:
        self.waiting = waiting
        self.retries = Retries(retry, retry_timeouts=True)
        self.recovering = False
        super().__init__(slot, waiting)

    def hold(self) -> None:
        """Let the writers wait: also those that are ready already."""
        before, self.outbox = self.outbox, self.waiting
        before.withdraw(self)

    def lead_to(self, outbox: Outbox) -> None:
        """Let *outbox* send for the writers."""
        self.outbox = outbox
        self.waiting.hand_over()

    def fail(self, error: FFError) -> None:
        """End the writers that wait; the next one begins with all retries."""
        self.retries.reset()
        for writer in self.waiting.take_ready():
            writer._fail(copy.copy(error))


def warn_of_losses(writers: Iterable[SharedWriter]) -> None:
    """Warn once of the frames that are lost with *writers*, except with those whose error somebody has seen.

    After a lost lease nobody wants them.
    """
    losses = []
    for writer in writers:
        lost, why = writer._tell_losses(), writer._failure
        if lost and not (why is not None and is_lease_lost(why)):
            losses.append((lost, why, writer))
    if not losses:
        return
    total = sum(lost for lost, _, _ in losses)
    _, why, first = losses[0]
    cause = "" if why is None else f" ({why.code})"
    whose = f"attempt {first.attempt_index} of execution {first.execution_id}"
    if len(losses) > 1:
        whose = f"{len(losses)} writers, such as that of {whose},"
    warnings.warn(
        f"Frames of {whose} were not acknowledged{cause}: {total}; close a writer before its backend is closed or the"
        " program ends.",
        RuntimeWarning,
        stacklevel=3,
    )


class SharedWriter(WriterCore):
    """A writer core made from its state."""

    _reopening = False

    # When the lease lapses as far as this process knows, in monotonic time: set for writers behind `append_frame`.
    _lease_until = 0.0
    # The leases of the backend, where it keeps any.
    _kept: KeptLeases | None = None

    def __init__(self, state: WriterState, home: Home | None = None) -> None:
        self._places = state.places
        self._level = state.options.level
        # The newest frame that has reached a level with all before it, and the level. Frames that are stored again after
        # that have to reach it again.
        self._confirmed = (0, 0)
        self._confirmed_replays = 0
        self._reached = Durability.stored()
        self._lease_id = state.attempt.fields.lease_id
        self._attempt = state.attempt
        self._home_of_slot = home
        place = self._places.open(self._lease_id)
        place.attempt = state.attempt.execution_id, state.attempt.attempt_index
        super().__init__(
            keys=state.attempt.stream_keys,
            writer=state.writer_id,
            mode=state.options.mode,
            opened=tuple(state.opened),
            place=place,
            document=state.document,
            retention_maxlen=state.options.retention_maxlen,
            max_unacknowledged_bytes=state.options.max_unacknowledged_bytes,
            linger_ms=state.options.linger_ms,
            max_payload_bytes=state.options.max_payload_bytes,
            home=home,
            tally=state.places.tally,
        )
        if place.held is not None:
            place.held.owner = weakref.ref(self)
        self.execution_id = state.attempt.execution_id
        self.attempt_index = state.attempt.attempt_index
        # After drain() one frame of maximum size always fits.
        self._high_water_bytes = min(
            HIGH_WATER_BYTES,
            state.options.max_unacknowledged_bytes - state.options.max_payload_bytes,
        )

    def _open_again(self) -> Steps[None]:
        """Open the writer again, of which the server has lost the opening."""
        try:
            opened = yield from ops.call(
                ops.open_writer_of(
                    self.execution_id,
                    self.attempt_index,
                    self._lease_id,
                    self._writer_name,
                    self._max_payload,
                )
            )
        finally:
            self._reopening = False
        self._reopened(opened.last_ms, opened.last_sequence, opened.opening)

    def _tell(self) -> AppendFrameOutcome:
        if self._place is not None:
            self._place.tell_losses()
        return self.outcome()

    def _tell_confirmed(self) -> AppendFrameOutcome:
        if self._place is not None:
            self._place.tell_losses()
        return self._confirmed_outcome()

    def _end_closed(self) -> None:
        self._fail(WriterClosed())
        if self._place is not None:
            self._place.tell_losses()

    def _on_cancel_requested(self) -> None:
        if self._kept is not None:
            self._kept.ask_to_stop(self.execution_id, self.attempt_index)

    def _on_end(self, error: FFError) -> None:
        self._say_end(error)
        if isinstance(error, SequenceGap):
            self._places.tell(self._lease_id)
        # A writer may be superseded, or its opening lost, under a lease that is still held.
        if is_lease_lost(error) and not isinstance(error, (WriterSuperseded, StateLost)):
            self._places.forget(self._lease_id)

    def _say_end(self, error: FFError) -> None:
        """Say why the writer has stopped, where that is no ordinary end."""
        if isinstance(error, ForkedClient):
            return
        arguments: tuple[object, ...] = (error,)
        cause: object = (error.code, self.execution_id, self.attempt_index)
        if isinstance(error, WriterSuperseded):
            # Two that open it in turns would fill the log.
            level = logging.WARNING
            how, arguments = "was superseded: another one was opened under the same lease.", ()
        elif isinstance(error, SequenceGap):
            # A failover ends many writers.
            level, how, cause = logging.WARNING, "has stopped: %s", error.code
        elif not error.unstored or isinstance(error, WriterClosed) or is_lease_lost(error):
            # An ordinary end; or the lease is lost, and its keeper says so.
            level, how = logging.DEBUG, "has ended: %s"
        else:
            # One server's failure ends many writers.
            level, how, cause = logging.ERROR, "is given up: %s", error.code
        say_seldom(
            level,
            "writer",
            cause,
            f"The writer of attempt %d of execution %s {how} Frames that were not stored: %d.",
            self.attempt_index,
            self.execution_id,
            *arguments,
            len(error.unstored),
            execution_id=self.execution_id,
            attempt_index=self.attempt_index,
        )

    def outcome(self) -> AppendFrameOutcome:
        """The frames and patches stored so far."""
        return AppendFrameOutcome(
            stream_id=self.last_id,
            frame_count=self.last_sequence,
            summary_version=self.summary_version or None,
        )

    def _confirmed_outcome(self) -> AppendFrameOutcome:
        """The frames that have reached a level, with that."""
        ms, sequence = self._confirmed
        return AppendFrameOutcome(
            stream_id=f"{ms}-{sequence}",
            frame_count=sequence,
            summary_version=self.summary_version or None,
            durability=self._reached,
        )

    def _has(self, last: int) -> bool:
        """Whether the frames up to *last* are acknowledged."""
        return self.last_sequence >= last

    def _lacks(self, level: Level, last: int) -> bool:
        """Whether the frames up to *last* are not known to have reached a level."""
        if not level.asks or last == 0:
            return False
        return (
            self._confirmed[1] < last
            or self._confirmed_replays != self._replays
            or not self._reached.covers(level.durability)
        )

    def _question(self, level: Level, deadline: float | None) -> Ask:
        """Return the question whether all acknowledged frames have reached *level*, to be put until *deadline*."""
        replays = self._replays
        place = ops.entry_id(self.last_id)
        until = time.monotonic() + level.timeout_s
        if deadline is not None:
            until = min(until, deadline)
        evidence = durability.of_frames(self._attempt.stream_keys, self._writer_name, place)
        return Ask(evidence, level, until, replays)

    def _asks_again(self, ask: Ask, deadline: float | None) -> bool:
        """Return whether to put a question again, given how it has ended.

        Raises:
            NotReplicated: The time for the level is up.
            DeadlineExceeded: *deadline* has passed.
            FFError: The frames are lost, or nobody can tell.
        """
        if ask.reached is not None:
            # Threads may have asked at the same time; the newer answer says more.
            if ask.replays > self._confirmed_replays or (
                ask.replays == self._confirmed_replays
                and (ask.place >= self._confirmed or not self._reached.covers(ask.reached))
            ):
                self._confirmed, self._reached = ask.place, ask.reached
                self._confirmed_replays = ask.replays
            return False
        if self.error is not None:
            raise copy.copy(self.error)
        if isinstance(ask.failure, SequenceGap) and (self._check_soon() or not self._idle):
            # The writer meets the gap by itself, and ends with it or repairs it.
            ask.failure = Unavailable()
        try:
            return ask.again()
        except NotReplicated:
            if deadline is not None and ask.until >= deadline:
                raise DeadlineExceeded from None
            raise

    def __del__(self) -> None:
        warn_of_losses([self])

    def write_frame(self, frame: Frame) -> int | None:
        """Write a :class:`Frame`; return None if its ``seq`` is that of a frame this writer has written already.

        Raises:
            SequenceGap: ``frame.seq`` is beyond the next sequence, or before this writer's first.
        """
        if frame.seq is not None and frame.seq != self.next_sequence:
            if self._first_sequence <= frame.seq < self.next_sequence:
                return None
            raise SequenceGap(self.next_sequence, frame.seq)
        return self.write(
            frame.bytes,
            frame.frame_type or frame.kind.value,
            mode=frame.mode,
            correlation_id=frame.correlation_id,
            encoding="binary" if frame.kind is FrameKind.BLOB else "utf8",
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(execution_id={self.execution_id!r}, attempt_index={self.attempt_index}, "
            f"next_sequence={self.next_sequence}, unacknowledged_bytes={self.unacknowledged_bytes})"
        )


class FrameWriters(dict[str, W]):
    """Writers that `append_frame` opened, by lease id: this is their only reference.

    A writer is dropped when it fails, when a call of the backend releases its lease, and when the lease has lapsed as
    far as the backend knows. If the lease lives on, the next frame opens another writer.

    Args:
        open_writers: The open writers of the backend by lease id, also those that its users opened.
    """

    def __init__(self, open_writers: MutableMapping[str, W]) -> None:
        super().__init__()
        self._open_writers = open_writers
        self._look_at = 0.0

    def opened(self, writer: W, lease_s: float) -> None:
        """Keep a writer that was opened for a frame, under a lease of that length."""
        self.drop_lapsed()
        # Each frame is waited for.
        writer._holds_back = False
        writer._lease_until = time.monotonic() + lease_s
        self[writer._lease_id] = writer

    def failed(self, writer: W) -> None:
        """Drop a failed writer, so that the next frame opens another, or learns why it cannot."""
        if self.get(writer._lease_id) is writer:
            self.pop(writer._lease_id, None)
            self._open_writers.pop(writer._lease_id, None)

    def settle(self, released_lease: str | None, extended_lease: tuple[str, float] | None) -> None:
        """Note what a call did: the lease that it released, and the one that it extended, with its new length."""
        if not self:
            return
        if released_lease is not None:
            writer = self.pop(released_lease, None)
            if writer is not None:
                writer._fail(WriterClosed())
        if extended_lease is not None:
            lease_id, ttl_s = extended_lease
            writer = self.get(lease_id)
            if writer is not None:
                writer._lease_until = time.monotonic() + ttl_s
        self.drop_lapsed()

    def appended(self, writer: W) -> None:
        """Note that a frame of *writer* was stored: the answer says how long its lease lasts."""
        writer._lease_until = time.monotonic() + writer.lease_left

    def drop_lapsed(self) -> None:
        """Drop the writers whose lease has lapsed, and those that failed; looks at them once a second."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + 1.0
        # Other threads may change the table meanwhile.
        for lease_id in list(self):
            writer = self.get(lease_id)
            if writer is None:
                continue
            # Of a writer that waits for the server, the server's answer decides.
            if writer._failure is not None or (writer._idle and writer._lease_until < now):
                self.pop(lease_id, None)


# -- the waits of a writer, once for both shells ---------------------------------------------------------------------


def drain(writer: SharedWriter, timeout: float | timedelta | None = None) -> Wait[None]:
    """Wait until at most 1 MiB is unacknowledged and one more frame of maximum size fits.

    Args:
        timeout: How long to wait, in seconds or as a ``timedelta``; None waits until the writer succeeds or fails.

    Raises:
        DeadlineExceeded: *timeout* passed; the frames stay queued and are still sent.
        FFError: The writer failed.
    """
    limit = timeout_s(timeout)
    if writer.error is not None:
        raise copy.copy(writer.error)

    def done() -> bool:
        return writer.unacknowledged_bytes <= writer._high_water_bytes

    if not done():
        writer._seal_soon()

    return Wait(done, _nothing, limit)


def flush(
    writer: SharedWriter, timeout: float | timedelta | None = None
) -> Wait[AppendFrameOutcome]:
    """Wait until every frame written so far is stored, and has reached the durability of the writer.

    If all were acknowledged before, the server is asked once whether it still has them.

    Args:
        timeout: How long to wait, in seconds or as a ``timedelta``; None waits until the writer succeeds or fails.

    Returns:
        Id of the newest frame, number of frames of the attempt so far, version of its summary, and the durability that
        all of them have.

    Raises:
        DeadlineExceeded: *timeout* passed; the frames stay queued and are still sent.
        NotReplicated: The durability of the writer was not confirmed within its ``durability_timeout``. The frames are
            stored, and the writer goes on; the next `flush` asks again.
        FramesLost: The server has lost acknowledged frames in a failover, and the writer did not keep them any more.
            All frames that were written since are stored, and the writer goes on.
        SequenceGap: The server has lost acknowledged frames, and the backend keeps none.
        FFError: The writer failed; the error's ``unstored`` has the frames that were not stored.
    """
    return flush_to(writer, timeout_s(timeout), writer._level)


def flush_to(writer: SharedWriter, limit_s: float | None, level: Level) -> Wait[AppendFrameOutcome]:
    """Flush a writer up to another level than its own; at most *limit_s* seconds."""
    last = writer.next_sequence - 1
    if not level.asks or last == 0:
        wait = settle(writer, limit_s)
        return Wait(wait.done, writer._tell, limit_s)
    if writer._lacks(level, last):
        # What is asked for the level shows as well that the server has them.
        writer._seal_soon()
        done: Callable[[], bool] = partial(writer._has, last)
    else:
        done = settle(writer, limit_s).done
    return Wait(done, writer._tell_confirmed, limit_s, level, last)


def settle(writer: SharedWriter, limit: float | None) -> Wait[None]:
    """Wait as `flush` does, for a caller who is told of losses elsewhere."""
    last = writer.next_sequence - 1
    writer._seal_soon()
    checked = last if writer._check_soon() else 0
    return Wait(
        lambda: writer.last_sequence >= last and writer._checked_sequence >= checked,
        _nothing,
        limit,
    )


def close(writer: SharedWriter, timeout: float | timedelta | None = None) -> Wait[None]:
    """Flush, store the state that a later writer and late readers continue from, and stop. Closing again does nothing.

    If all frames were acknowledged before, the server is asked whether it still has them.

    Args:
        timeout: How long to wait, in seconds or as a ``timedelta``; None waits until the writer succeeds or fails.

    Raises:
        DeadlineExceeded: *timeout* passed; the frames stay queued and are still sent.
        NotReplicated: As of `flush`; closing again asks again.
        FramesLost: The server has lost acknowledged frames in a failover, and the writer did not keep them any more.
            All frames that were written since are stored, and the writer is closed.
        SequenceGap: The server has lost acknowledged frames, and the backend keeps none.
        FFError: The writer failed.
    """
    return close_to(writer, timeout_s(timeout), writer._level)


def store_and_close(writer: SharedWriter, limit_s: float | None) -> Wait[None]:
    """Close a writer whose frames reach their level by the call that follows; at most *limit_s* seconds."""
    return close_to(writer, limit_s, durability.STORED)


def close_to(writer: SharedWriter, limit_s: float | None, level: Level) -> Wait[None]:
    """Close a writer, at another level than its own; at most *limit_s* seconds."""
    # One look: another thread may close it meanwhile.
    failure = writer._failure
    if isinstance(failure, WriterClosed):
        return Wait(_true, _nothing, limit_s)
    if failure is not None:
        raise copy.copy(writer.error or failure)
    writer._seal_last()
    last = writer.next_sequence - 1
    return Wait(lambda: writer._idle, writer._end_closed, limit_s, level, last)


def _nothing() -> None:
    """Result of a wait without one."""


def _true() -> bool:
    return True
