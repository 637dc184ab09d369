"""Readers without I/O: a live tail, and pages of a range.

Both streams of an attempt are read, and merged by sequence up to a *horizon*: the id up to which
both are known completely. A stream that was not read to its end is known up to the last entry
received. Frames appended later have higher ids in either stream. So a sequence that is missing below
the horizon is missing for good: a gap.

An answer holds at most about :data:`_REPLY_BYTES`, or one entry that is larger. Two requests share the work:

- `ff_read_range` reads both streams and the state of the attempt atomically, and counts bytes: at the start of a tail,
  whenever the reader is behind, and whenever something may have been missed.
- XRANGE reads on where the state says that only small entries follow. An entry costs the server a sixth as much by it,
  but its only bound is a number of entries.

A tail that has read all takes what is pushed (:class:`ff_fast._hot.feed.Inbox`) as long as it follows in sequence. A
push is never the truth: a hole, a contradiction or a doubt about the subscription leads to a read. Frames may be pushed
a moment before they are stored, so a place may be ahead of storage, and a hole may be filled later.
"""

from __future__ import annotations

import random
from math import inf
from time import monotonic

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.steps import Command, Pause, Step, Steps
from ff_fast._hot.feed import Inbox
from ff_fast._hot.frames import StreamFrame, assemble, decode_entries, weigh_entries
from ff_fast._hot.resp import pack_command
from ff_fast.errors import MAX_INT, FFError, InvalidInput, ProtocolError, from_server_error
from ff_fast.types import (
    End,
    EndReason,
    Gap,
    GapReason,
    TailVisibility,
    make_cursor,
    parse_cursor,
)

MAX_COUNT = 10_000

# Most bytes of one answer. Decoding it occupies an event loop for a few milliseconds.
_REPLY_BYTES = 1 << 20
_REPLY_FRAMES = 4_096
# Frames that `ff_read_range` answers: of a first look, and of a reader that is behind.
_FIRST_FRAMES = 64
_RANGE_FRAMES = 512
_LARGEST_LOOK = 256
# XRANGE COUNT for log and live window: first value, upper bound. The largest small entries (lua/prelude.lua) make
# _REPLY_BYTES together; a run of the live window may hold a thousand frames.
_FIRST_COUNTS = (512, 16)
_LARGEST_COUNTS = (1024, 64)

LONGEST_S = 60.0
"""Longest wait of a reader that nothing is pushed to, in seconds."""

# Times in seconds.
# How long the first read waits for the subscription, and how often storage is asked without one.
_SUBSCRIBE_S = 0.5
_UNSUBSCRIBED_S = 1.0
# Pauses between reads while frames are missing that may be on their way to storage: first and largest. What is queued
# behind a hole is dropped after the time.
_HOLE_S = 0.03
_LONGEST_HOLE_S = 0.5
_GIVE_UP_S = 2.0
# How long frames that storage lacks may be on their way there, at most and while the lease is held: those of a cursor that
# were only pushed, and those that a failover has lost, which their writer stores again. It finds out within the time limit
# of its backend, 5 s unless configured, and may lose the same again on its way to the next server. More of them begin the
# time anew.
_AHEAD_S = 15.0

Item = StreamFrame | Gap | End
Id = tuple[int, int]

_LOG, _LIVE = 0, 1


class _Rewritten(Exception):  # noqa: N818 - an event inside this module
    """Entries after the last frame begin before it by their sequence."""


def _text(ms: int, sequence: int) -> str:
    return f"{ms}-{sequence}"


def jittered(longest: float) -> float:
    """Return *longest* less a random share, so that readers that began together look one by one."""
    return longest * (1 - random.random() / 4)  # noqa: S311 - no secret


def longest_wait() -> float:
    """Return how long a reader waits that nothing is pushed to, in seconds."""
    return jittered(LONGEST_S)


def _id(raw: object) -> Id:
    if isinstance(raw, bytes):
        ms, _, sequence = raw.partition(b"-")
        if ms.isdigit() and sequence.isdigit():
            return int(ms), int(sequence)
    raise ProtocolError


class TailCore(Inbox):
    """A live reader of one attempt: makes requests, and items from the replies and from what is pushed.

    A shell asks for the next `step` and passes the reply to `receive`; where there is none, it waits until `on_wake` is
    called or `wake_at` has come, and calls `take`, then `step` again. `offer`, `doubt` and `failed` may be called on
    another thread than everything else.

    Args:
        execution_id: Id of the execution.
        attempt_index: Attempt, from 0; the reader waits for one that is not claimed yet.
        after: Cursor, exclusive: of an item, a page or a summary, the id of a frame, or None for the start.
        visibility: Whether best-effort frames are delivered.
        count: Number of frames in a page; None for a tail.
        max_bytes: Bytes of payload in a page.

    Attributes:
        channel: Where what happens to the attempt is published.
        end_reason: Why the attempt ended; None until the end was delivered.
        start: Cursor of the beginning.
        execution_id, visibility: As given.
        read_to: For each stream, the id up to which its entries were read.
        held: For each stream, the entries read beyond the horizon; one of the two is always empty.
    """

    __slots__ = (
        "_ahead_of", "_ahead_since", "_asked", "_behind", "_behind_frames", "_count", "_counts", "_error", "_exact",
        "_failure",
        "_half_bytes",
        "_hole_s", "_hole_since", "_keys", "_look_frames", "_looked", "_more", "_pages", "_range_frames", "_ranged",
        "_reason", "_small_to", "channel", "execution_id", "held", "read_to", "start", "visibility",
    )  # fmt: skip

    def __init__(
        self,
        execution_id: str,
        attempt_index: int,
        after: object,
        visibility: TailVisibility,
        count: int | None = None,
        max_bytes: int = _REPLY_BYTES,
    ) -> None:
        if not isinstance(visibility, TailVisibility):
            raise InvalidInput("visibility must be TailVisibility.ALL or EXCLUDE_BEST_EFFORT.")
        self.execution_id = eid = keys.canonical_execution_id(execution_id)
        self.attempt_index = keys.attempt_index(attempt_index)
        self.visibility = visibility
        self.exclude = visibility is TailVisibility.EXCLUDE_BEST_EFFORT
        self.stored = MAX_INT
        self._move(after)
        self.channel = keys.attempt_channel(eid, attempt_index)
        self._keys = (keys.stream(eid, attempt_index), keys.live(eid, attempt_index))
        self.start = self.cursor
        small = count is not None and count <= _LARGEST_LOOK
        # A small page is read by `ff_read_range` alone, which does not read past it.
        self._exact = small or max_bytes < _REPLY_BYTES
        self._pages = count is not None
        self._look_frames = count if count is not None and small else _FIRST_FRAMES
        self._behind_frames = self._look_frames if small else _RANGE_FRAMES
        self._half_bytes = max(min(max_bytes, _REPLY_BYTES) // 2, 1)
        self._reason: GapReason = "trimmed"
        # Of the end entry that was read last.
        self._error: str | None = None
        self._counts = list(_FIRST_COUNTS)
        self.restart()
        self.due = self._pages
        self.look_at = monotonic() + _SUBSCRIBE_S

    @property
    def part(self) -> TailCore:
        """The listener of the channel that is read: this reader reads one attempt."""
        return self

    # -- place -------------------------------------------------------------------------------------

    @property
    def cursor(self) -> str:
        """Cursor of the last frame that was delivered or reported missing."""
        return make_cursor(self.attempt_index, self.ms, self.sequence)

    @property
    def ended(self) -> bool:
        """Whether the end was delivered."""
        return self.end_reason is not None

    @property
    def ahead(self) -> bool:
        """Whether the place is ahead of storage, and the frames up to there may come."""
        return self._ahead_since is not None

    def _move(self, cursor: object) -> None:
        """Continue after the frame of *cursor*."""
        self.ms, self.sequence = parse_cursor(cursor, self.attempt_index)
        self.stored = min(self.stored, self.sequence)
        self._ahead_since: float | None = None
        self._ahead_of = 0
        self._forget()

    def _here(self) -> bytes:
        return b"%d-%d" % (self.ms, self.sequence)

    def _rewind(self) -> None:
        """Read both streams again from the last frame that was delivered."""
        here = self._here()
        self.read_to = [here, here]
        self.held: list[list[list[object]]] = [[], []]

    def _fall_back(self, horizon: Id) -> None:
        """Read again what was read beyond *horizon*; drop what is held."""
        self.read_to = [min(_text(*horizon).encode(), to, key=_id) for to in self.read_to]
        self.held = [[], []]

    def _go_back(self, place: Id, reason: GapReason = "rewritten") -> Gap:
        """Continue after *place*, since the last frame is not in this stream; return the gap that says so."""
        gap = self._go_on(place, reason)
        self._rewind()
        return gap

    def _go_on(self, place: Id, reason: GapReason) -> Gap:
        """Continue after *place*; return the gap from the last frame to there."""
        first_missing = self.sequence + 1
        self.ms, self.sequence = place
        self.stored = self.sequence
        self._forget()
        return Gap(first_missing, self.sequence + 1, reason, self.cursor)

    def restart(self, cursor: str | None = None) -> None:
        """Read the state again, since the connection was lost or the server may be another one.

        Args:
            cursor: Place to continue from if items behind it were not delivered.
        """
        if cursor is not None:
            self._move(cursor)
            self.end_reason = None
        self._rewind()
        self._ranged: ops.Op[ops.Range] | None = None
        self._range_frames = self._look_frames
        self._asked: tuple[int, ...] = ()
        self._count = 0
        # Whether entries may be left that were stored before the last answer, and the id up to which all are small.
        self._behind = False
        self._small_to: bytes | None = None
        self._more = [False, False]
        self._hole_since: float | None = None
        self._hole_s = _HOLE_S
        self._looked = False
        self._failure: FFError | None = None
        self.reading = False
        self.due = True

    # -- requests ----------------------------------------------------------------------------------

    def step(self) -> Step | None:
        """Return the next request; None if there is nothing to ask before something is pushed or `wake_at` has come.

        Raises:
            FFError: The subscription has failed; the next call goes on without it.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        self._ranged = None
        if self._small_to is not None:
            self.reading = True
            return self._small_step(self._small_to)
        if not (self.due or self._behind or monotonic() >= self.wake_at):
            return None
        self._begin_reading()
        if not self._behind:
            self._rewind()
        self._ranged = ops.read_range(
            self.execution_id,
            self.attempt_index,
            log_after=self.read_to[_LOG],
            live_after=self.read_to[_LIVE],
            count=self._range_frames,
            max_bytes=self._half_bytes,
            visibility=self.visibility.wire_str(),
            cursor=self._here(),
        )
        return Step((self._ranged.command(),), large=True)

    def _small_step(self, to: bytes) -> Step:
        """Return the request for the next small entries of one stream."""
        # Frames can be delivered only up to the shorter stream; read that one next.
        stream = _LIVE if self.held[_LOG] or not self._more[_LOG] else _LOG
        self._asked = (stream,)
        self._count = self._counts[stream]
        request = pack_command(
            b"XRANGE", self._keys[stream], b"(" + self.read_to[stream], to, b"COUNT", b"%d" % self._count
        )  # fmt: skip
        return Step((Command(self._keys[_LOG], request),), large=True)

    def caught_up(self) -> bool:
        """Return whether every stored frame was read, and nothing is due.

        After XRANGEs it is False once more, so that the state is read: only the state shows a lapsed lease, and frames
        that are missing at the end.
        """
        return not (self._behind or self.due or self.reading)

    # -- replies -----------------------------------------------------------------------------------

    def receive(self, reply: object) -> list[Item]:
        """Take the reply to the last step, and return its items.

        Raises:
            FFError: The server refused the request.
        """
        self.reading = False
        try:
            items = self._read(reply)
        except _Rewritten:
            # The server was replaced under the connection. Its state tells where to continue.
            self.restart()
            return []
        if self.tally is not None:
            self.tally.took(items)
        return items

    def _read(self, reply: object) -> list[Item]:
        if self._ranged is not None:
            return self._read_range(self._ranged.answer(reply))
        if isinstance(reply, Exception):
            raise from_server_error(str(reply))
        if not isinstance(reply, list) or self._small_to is None:
            raise ProtocolError
        return self._read_small(reply, self._small_to)

    def _read_range(self, page: ops.Range) -> list[Item]:
        if self.ms == 0 and 0 < self.sequence == page.last_sequence:
            # The cursor had no time; the newest frame is the one that it names, and need not be looked for again.
            self.ms = page.last_ms
        if page.place is None and self.sequence > page.last_sequence and self._may_follow(page):
            self._behind = False
            self._caught_up(page.lease_left_ms)
            return []
        self._counts[_LIVE] = self._next_count(_LIVE, page.live)
        try:
            items, ended = self._take_range(page)
        except _Rewritten:
            # Entries of another program hide the place from the server.
            gap = self._go_back((0, 0))
            self.restart()
            return [gap]
        if ended is not None:
            return self._end(items, ended)
        self._behind = page.log_more or page.live_more
        self._small_to = None
        if self._behind:
            # Entries of another program count as frames until they are decoded, and must not take a call each.
            more = min(2 * self._range_frames, _RANGE_FRAMES)
            self._range_frames = self._behind_frames if items else more
            if page.small and not self._exact:
                self._begin_small(page)
        else:
            self._range_frames = self._look_frames
            self._caught_up(page.lease_left_ms)
        return items

    def _begin_small(self, page: ops.Range) -> None:
        to = page.last_ms, page.last_sequence
        small_to = _text(*to).encode()
        if not page.log_more:
            # It has nothing more up to there. Where the log was cut, the live window was not looked at behind the cut.
            self.read_to[_LOG] = max(self.read_to[_LOG], small_to, key=_id)
        self._more = [_id(read) < to for read in self.read_to]
        if any(self._more):
            self._small_to = small_to

    def _caught_up(self, lease_left_ms: int | None) -> None:
        """Note that everything stored so far was read, and when to look again."""
        self._reason = "fell_behind"
        self._looked = True
        now = monotonic()
        longest = longest_wait()
        left = longest if lease_left_ms is None else (lease_left_ms + 1) / 1000
        # A lapsing lease writes no end entry; read the state again just after it lapses.
        self.lease_at = now + min(max(left, 0.001), longest)
        self.look_at = inf
        if self.doubted or self._ahead_since is not None:
            self.look_at = now + self.pause_s()
        elif not self.confirmed:
            self.look_at = now + _UNSUBSCRIBED_S
        elif self.asked_at < self.settled_at and lease_left_ms is not None and not self.exclude:
            # Frames may have been on their way to storage that were pushed before the subscription.
            self.look_at = self.settled_at

    def _read_small(self, entries: list[list[object]], to: bytes) -> list[Item]:
        (stream,) = self._asked
        if entries:
            self._counts[stream] = self._next_count(stream, entries)
            self.read_to[stream] = entries[-1][0]  # type: ignore[call-overload]
            self.held[stream] = entries
        self._more[stream] = len(entries) >= self._count
        if not self._more[stream]:
            self.read_to[stream] = max(self.read_to[stream], to, key=_id)
        horizon = min(_id(known) for known in self.read_to)
        items, ended = self._merge(self.held[_LOG], self.held[_LIVE], horizon)
        if ended is not None:
            return self._end(items, ended)
        if items:
            self.stored = self.sequence
        if not any(self._more):
            # Only the state shows a lapsed lease, and frames that are missing at the end.
            self._small_to = None
            self._behind = False
            self._reason = "fell_behind"
            self.due = True
        return items

    def _take_range(self, page: ops.Range) -> tuple[list[Item], EndReason | None]:
        """Return the items of a range read and, if everything was read, the reason why the attempt ended."""
        if page.place is not None:
            # The frame of the cursor is not in this stream. Go on where the server did.
            gap = self._go_back(page.place)
            items, ended = self._take_range(page._replace(place=None))
            return [gap, *items], ended
        newest_frame = page.last_ms, page.last_sequence
        ahead = self.sequence > page.last_sequence
        self._ahead_since = None
        if self.doubted:
            self.doubted = False
            if self.due:
                # The subscription was lost or made meanwhile. In this order, since the hub may be on another thread.
                self.doubted = True
            else:
                self._hole_filled()
        # The end entry has the sequence after the last frame, so a cursor behind the end is not ahead.
        end = page.last_sequence + bool(page.closed_reason)
        if ahead and (self.sequence > end or self.stored < self.sequence):
            gap = self._go_back(newest_frame, "cursor_ahead")
            return [gap], page.closed_reason
        cut = [
            _id(to)
            for to, more in ((page.log_to, page.log_more), (page.live_to, page.live_more))
            if more
        ]
        horizon = min(cut) if cut else None
        items, ended = self._merge(page.log, page.live, horizon, newest_frame)
        # A stream that was read to its end has nothing more up to the newest id of both streams:
        # entries appended later have higher ids.
        newest_id = _text(*newest_frame).encode()
        self.read_to = [max(to, newest_id, key=_id) for to in (page.log_to, page.live_to)]
        if horizon is not None:
            # Entries past the horizon are dropped and read again.
            self._fall_back(horizon)
        if horizon is None and ended is None:
            newest = page.visible_sequence if self.exclude else page.last_sequence
            wanted = newest > self.sequence
            if page.last_sequence > self.sequence:
                gap = self._go_on(newest_frame, "expired")
                if wanted:
                    items.append(gap)
            ended = page.closed_reason
        self.stored = self.sequence
        return items, ended

    def _may_follow(self, page: ops.Range) -> bool:
        """Return whether the place, which is ahead of storage, may be that of frames on their way there."""
        if page.closed_reason or page.lease_left_ms is None:
            # Nobody can store them any more.
            return False
        if self.stored < self.sequence and self.stored <= page.last_sequence:
            return True
        if self.ms == 0:
            # Such a place may be that of any frame.
            return False
        now = monotonic()
        if self._ahead_since is None or page.last_sequence > self._ahead_of:
            self._ahead_since = now
        self._ahead_of = page.last_sequence
        return now - self._ahead_since < _AHEAD_S

    def _merge(
        self,
        log: list[list[object]],
        live: list[list[object]],
        horizon: Id | None,
        newest: Id | None = None,
    ) -> tuple[list[Item], EndReason | None]:
        """Return the items up to *horizon* and, if it was reached, the reason of the end; hold later entries.

        *newest* is the id of the newest frame, if it is known: what stands behind it is not ours.

        Raises:
            _Rewritten: The entries belong to another stream than the last frame.
        """
        decoded = []
        for stream, entries in enumerate((log, live)):
            some = decode_entries(
                entries,
                self.sequence,
                horizon,
                self.exclude,
                live=stream == _LIVE,
                after_ms=self.ms,
                newest=newest,
                attempt_index=self.attempt_index,
            )
            if some.rewound:
                raise _Rewritten
            self.held[stream] = entries[some.taken :]
            decoded.append(some)
        items: list[Item] = []
        items, self.ms, self.sequence, ended = assemble(  # type: ignore[assignment]
            decoded[_LOG],
            decoded[_LIVE],
            self.ms,
            self.sequence,
            self.exclude,
            self._reason,
            self.attempt_index,
        )
        self._error = decoded[_LOG].end_error
        return items, ended

    def _next_count(self, stream: int, entries: list[list[object]]) -> int:
        """Return the next XRANGE COUNT of a stream, from the size of its last entries."""
        if not entries:
            return self._counts[stream]
        frames, size = weigh_entries(entries)
        most = min(
            len(entries) * _REPLY_FRAMES // max(frames, 1),
            len(entries) * _REPLY_BYTES // max(size, 1),
            2 * self._counts[stream],
            _LARGEST_COUNTS[stream],
        )
        return max(most, 1)

    def _end(self, items: list[Item], reason: EndReason) -> list[Item]:
        self.end_reason = reason
        self._drop_pushes()
        return [*items, End(reason=reason, cursor=self.cursor, error=self._error)]

    # -- pushes ------------------------------------------------------------------------------------

    def failed(self, error: FFError) -> None:
        """Note that there is no subscription to be had; the next step raises *error*."""
        self._failure = error
        self.due = True
        self.doubt(False)

    def _wait_for_hole(self) -> None:
        """Read what is missing before the pushes that are queued: at once, then after growing pauses."""
        now = monotonic()
        if self._hole_since is None:
            self._hole_since = now
            self._looked = False
            self.due = True
        elif now - self._hole_since > _GIVE_UP_S:
            self._drop_pushes()
            self._hole_filled()
            self.due = True
        elif self._looked:
            self._looked = False
            self.look_at = min(self.look_at, now + self.pause_s())

    def pause_s(self) -> float:
        """Return the pause before the next read of what storage does not have yet."""
        pause, self._hole_s = self._hole_s, min(2 * self._hole_s, _LONGEST_HOLE_S)
        return pause

    def _hole_filled(self) -> None:
        self._hole_since = None
        self._hole_s = _HOLE_S


class StreamPage(tuple[StreamFrame, ...]):  # noqa: SLOT001 - no room for slots in a tuple
    """Frames of one attempt, in sequence order.

    Attributes:
        cursor: ``after`` of the next page.
        gaps: Frames that are missing within the page.
        end_reason: Why the attempt ended, if the page reaches its end; else None.
    """

    cursor: str
    gaps: tuple[Gap, ...]
    end_reason: EndReason | None

    def __repr__(self) -> str:
        return (
            f"StreamPage(<{len(self)} frames>, cursor={self.cursor!r},"
            f" end_reason={self.end_reason!r})"
        )


def read_page(core: TailCore, count: int, max_bytes: int) -> Steps[StreamPage]:
    """Read up to *count* frames, until they have *max_bytes* of payload.

    Raises:
        ExecutionNotFound, AttemptNotFound: There is no such attempt.
    """
    frames: list[StreamFrame] = []
    gaps: list[Gap] = []
    size = 0
    while True:
        # Held until the next reply has come: were its lists freed before, those of the next would start a collection.
        step = core.step()
        assert step is not None
        (reply,) = yield step
        items = core.receive(reply)
        if core.ahead:
            # The frame of the cursor may be on its way to storage.
            yield Pause(core.pause_s())
            core.due = True
            continue
        some = [item for item in items if isinstance(item, StreamFrame)]
        room = count - len(frames)
        more = sum([len(frame.payload) for frame in some])
        if size + more >= max_bytes:
            room = min(room, _how_many(some, max_bytes - size))
        if len(some) >= room:
            # Frames read beyond the page, also those of a run, are read again for the next page.
            last = some[room - 1]
            frames += some[:room]
            cut = next(at for at, item in enumerate(items) if item is last)
            gaps += [item for item in items[:cut] if isinstance(item, Gap)]
            whole = last is (items[-2] if core.ended else items[-1])
            return _page(frames, gaps, last.cursor, core.end_reason if whole else None)
        frames += some
        gaps += [item for item in items if isinstance(item, Gap)]
        size += more
        if core.ended or core.caught_up():
            return _page(frames, gaps, core.cursor, core.end_reason)


def _how_many(frames: list[StreamFrame], size: int) -> int:
    """Return how many of *frames* have *size* bytes of payload together."""
    for index, frame in enumerate(frames, 1):
        size -= len(frame.payload)
        if size <= 0:
            return index
    return len(frames)


def _page(
    frames: list[StreamFrame], gaps: list[Gap], cursor: str, end_reason: EndReason | None
) -> StreamPage:
    page = StreamPage(frames)
    page.cursor = cursor
    page.gaps = tuple(gaps)
    page.end_reason = end_reason
    return page
