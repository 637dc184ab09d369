"""Readers without I/O: a live tail, and pages of a range.

Both streams of an attempt are read, and merged by sequence up to a *horizon*: the id up to which
both are known completely. A stream that was not read to its end is known up to the last entry
received. Frames appended later have higher ids in either stream. So a sequence that is missing below
the horizon is missing for good: a gap.

An answer holds at most about :data:`_REPLY_BYTES`, or one entry that is larger. Three requests share the work:

- `ff_read_range` reads both streams and the state of the attempt atomically, and counts bytes: at the start of a tail,
  whenever the reader is behind, and whenever a block time passes without an entry.
- XRANGE reads on where the state says that only small entries follow. An entry costs the server a sixth as much by it,
  but its only bound is a number of entries.
- XREAD waits for a few entries, once all are read.
"""

from __future__ import annotations

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.steps import Command, Step, Steps
from ff_fast._hot.frames import StreamFrame, assemble, decode_entries, weigh_entries
from ff_fast._hot.resp import pack_command
from ff_fast.errors import InvalidInput, ProtocolError, from_server_error
from ff_fast.types import End, EndReason, Gap, GapReason, TailVisibility, parse_cursor

BLOCK_MS = 5_000
"""Longest block of a tail on the server, in ms; after it the tail reads the state of the attempt."""

MAX_COUNT = 10_000

_PACE_MS = 5
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
# XREAD COUNT of a reader that waits: as many entries of either stream as make _REPLY_BYTES together if all are as large
# as the writer may make them, within these bounds. A reader that gets as many is behind.
_WAKE_COUNTS = (2, 8)

Item = StreamFrame | Gap | End
Id = tuple[int, int]

_LOG, _LIVE = 0, 1


class _Rewritten(Exception):  # noqa: N818 - an event inside this module
    """Entries after the last frame begin before it by their sequence."""


def _text(ms: int, sequence: int) -> str:
    return f"{ms}-{sequence}"


def _id(raw: object) -> Id:
    if isinstance(raw, bytes):
        ms, _, sequence = raw.partition(b"-")
        if ms.isdigit() and sequence.isdigit():
            return int(ms), int(sequence)
    raise ProtocolError


class _Position:
    """Position of a reader in an attempt.

    Attributes:
        ms, sequence: Id of the last frame that was delivered or reported missing.
        read: For each stream, the id up to which its entries were read.
        held: For each stream, the entries read beyond the horizon; one of the two is always empty.
    """

    __slots__ = (
        "attempt_index", "exclude", "execution_id", "held", "ms", "read", "sequence", "visibility",
    )  # fmt: skip

    def __init__(
        self, execution_id: str, attempt_index: int, after: object, visibility: TailVisibility
    ) -> None:
        if not isinstance(visibility, TailVisibility):
            raise InvalidInput("visibility must be TailVisibility.ALL or EXCLUDE_BEST_EFFORT.")
        self.execution_id = keys.canonical_execution_id(execution_id)
        self.attempt_index = keys.attempt_index(attempt_index)
        self.move(after)
        self.visibility = visibility
        self.exclude = visibility is TailVisibility.EXCLUDE_BEST_EFFORT
        self.rewind()

    @property
    def cursor(self) -> str:
        """Id of the last frame that was delivered or reported missing."""
        return _text(self.ms, self.sequence)

    def move(self, cursor: object) -> None:
        """Continue after the frame of *cursor*."""
        self.ms, self.sequence = parse_cursor(cursor)

    def rewind(self) -> None:
        """Read both streams again from the last frame that was delivered."""
        here = self.cursor.encode()
        self.read = [here, here]
        self.held: list[list[list[object]]] = [[], []]

    def fall_back(self, horizon: Id) -> None:
        """Read again what was read beyond *horizon*; drop what is held."""
        self.read = [min(_text(*horizon).encode(), to, key=_id) for to in self.read]
        self.held = [[], []]

    def range_op(self, count: int, max_bytes: int) -> ops.Op[ops.Range]:
        return ops.read_range(
            self.execution_id,
            self.attempt_index,
            log_after=self.read[_LOG],
            live_after=self.read[_LIVE],
            count=count,
            max_bytes=max_bytes,
            visibility=self.visibility.wire_str(),
            cursor=self.cursor.encode(),
        )

    def merge(
        self,
        log: list[list[object]],
        live: list[list[object]],
        horizon: Id | None,
        reason: GapReason,
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
            )
            if some.rewound:
                raise _Rewritten
            self.held[stream] = entries[some.taken :]
            decoded.append(some)
        items: list[Item] = []
        items, self.ms, self.sequence, ended = assemble(  # type: ignore[assignment]
            decoded[_LOG], decoded[_LIVE], self.ms, self.sequence, self.exclude, reason
        )
        return items, ended

    def go_back(self, place: Id, reason: GapReason = "rewritten") -> Gap:
        """Continue after *place*, since the last frame is not in this stream; return the gap that says so."""
        gap = self._go_on(place, reason)
        self.rewind()
        return gap

    def _go_on(self, place: Id, reason: GapReason) -> Gap:
        """Continue after *place*; return the gap from the last frame to there."""
        first_missing = self.sequence + 1
        self.ms, self.sequence = place
        return Gap(first_missing, self.sequence + 1, reason, self.cursor)

    def take_range(self, page: ops.Range, reason: GapReason) -> tuple[list[Item], EndReason | None]:
        """Return the items of a range read and, if everything was read, the reason why the attempt ended."""
        if page.place is not None:
            # The frame of the cursor is not in this stream. Go on where the server did.
            gap = self.go_back(page.place)
            items, ended = self.take_range(page._replace(place=None), reason)
            return [gap, *items], ended
        # The end entry has the sequence after the last frame, so a cursor behind the end is not ahead.
        end = page.last_sequence + bool(page.closed_reason)
        if self.sequence > end:
            gap = self.go_back((page.last_ms, page.last_sequence), "cursor_ahead")
            return [gap], page.closed_reason
        cut = [
            _id(to)
            for to, more in ((page.log_to, page.log_more), (page.live_to, page.live_more))
            if more
        ]
        horizon = min(cut) if cut else None
        newest_frame = page.last_ms, page.last_sequence
        items, ended = self.merge(page.log, page.live, horizon, reason, newest_frame)
        # A stream that was read to its end has nothing more up to the newest id of both streams:
        # entries appended later have higher ids.
        newest_id = _text(*newest_frame).encode()
        self.read = [max(to, newest_id, key=_id) for to in (page.log_to, page.live_to)]
        if horizon is not None:
            # Entries past the horizon are dropped and read again.
            self.fall_back(horizon)
            return items, ended
        if ended is not None:
            return items, ended
        newest = page.visible_sequence if self.exclude else page.last_sequence
        wanted = newest > self.sequence
        if page.last_sequence > self.sequence:
            gap = self._go_on(newest_frame, "expired")
            if wanted:
                items.append(gap)
        return items, page.closed_reason


class TailCore:
    """A live reader of one attempt: makes requests, and items from the replies.

    Args:
        execution_id: Id of the execution.
        attempt_index: Attempt, from 0; the reader waits for one that is not claimed yet.
        after: Cursor, exclusive: an id of a frame, the cursor of a summary, or None for the start.
        visibility: Whether best-effort frames are delivered.
        count: Number of frames in a page; None for a tail.
        max_bytes: Bytes of payload in a page.

    Attributes:
        end_reason: Why the attempt ended; None until the end was delivered.
        start: Cursor of the beginning.
    """

    __slots__ = (
        "_asked", "_behind", "_behind_frames", "_block_ms", "_count", "_counts", "_exact", "_half_bytes", "_keys",
        "_look_frames", "_more", "_paced", "_position", "_range_frames", "_ranged", "_reason", "_small_to",
        "_unwanted", "_wake_count", "end_reason", "start",
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
        small = count is not None and count <= _LARGEST_LOOK
        # A small page is read by `ff_read_range` alone, which does not read past it.
        self._exact = small or max_bytes < _REPLY_BYTES
        self._look_frames = count if count is not None and small else _FIRST_FRAMES
        self._behind_frames = self._look_frames if small else _RANGE_FRAMES
        self._half_bytes = max(min(max_bytes, _REPLY_BYTES) // 2, 1)
        self._position = _Position(execution_id, attempt_index, after, visibility)
        eid = self._position.execution_id
        self._keys = (keys.stream(eid, attempt_index), keys.live(eid, attempt_index))
        self.start = self._position.cursor
        self._reason: GapReason = "trimmed"
        self._counts = list(_FIRST_COUNTS)
        self._wake_count = _WAKE_COUNTS[0]
        self.end_reason: EndReason | None = None
        self.restart()

    def restart(self, cursor: str | None = None) -> None:
        """Read the state again before blocking, since the connection was lost or the server may be another one.

        Args:
            cursor: Position to continue from if items read after it were not delivered.
        """
        if cursor is not None:
            self._position.move(cursor)
            self.end_reason = None
        self._position.rewind()
        self._ranged: ops.Op[ops.Range] | None = None
        self._range_frames = self._look_frames
        self._asked: tuple[int, ...] = ()
        self._count = 0
        # Whether entries may be left that were stored before the last answer, and the id up to which all are small.
        self._behind = False
        self._small_to: bytes | None = None
        self._more = [False, False]
        self._block_ms = 0
        self._paced = False
        self._unwanted = False

    def step(self) -> Step:
        """Return the next request."""
        self._ranged = None
        if self._small_to is not None:
            return self._small_step(self._small_to)
        if self._behind or self._block_ms == 0:
            position = self._position
            self._ranged = position.range_op(self._range_frames, self._half_bytes)
            return Step((self._ranged.command(),), large=True)
        # A reader that excludes best-effort frames and got only these waits on the log alone for a moment, so that they
        # cause few wake-ups; durable frames and the end still do.
        self._asked = (_LOG,) if self._paced else (_LOG, _LIVE)
        block = _PACE_MS if self._paced else self._block_ms
        self._count = min(self._wake_count, *(self._counts[stream] for stream in self._asked))
        request = pack_command(
            b"XREAD",
            *(b"COUNT", b"%d" % self._count),
            *(b"BLOCK", b"%d" % block),
            b"STREAMS",
            *(self._keys[stream] for stream in self._asked),
            *(self._position.read[stream] for stream in self._asked),
        )
        return Step((Command(self._keys[_LOG], request),), block / 1000, large=True)

    def _small_step(self, to: bytes) -> Step:
        """Return the request for the next small entries of one stream."""
        held = self._position.held
        # Frames can be delivered only up to the shorter stream; read that one next.
        stream = _LIVE if held[_LOG] or not self._more[_LOG] else _LOG
        self._asked = (stream,)
        self._count = self._counts[stream]
        request = pack_command(
            b"XRANGE", self._keys[stream], b"(" + self._position.read[stream], to, b"COUNT", b"%d" % self._count
        )  # fmt: skip
        return Step((Command(self._keys[_LOG], request),), large=True)

    @property
    def ended(self) -> bool:
        """Whether the end was delivered."""
        return self.end_reason is not None

    def caught_up(self) -> bool:
        """Return whether every stored frame was read.

        After XREADs it is False once more, so that the state is read: only the state shows a lapsed lease, and frames
        that are missing at the end.
        """
        if self._behind:
            return False
        if self._ranged is None:
            self._block_ms = 0
            return False
        return True

    @property
    def cursor(self) -> str:
        """Id of the last frame that was delivered or reported missing."""
        return self._position.cursor

    def read(self) -> Steps[list[Item]]:
        """Send one request; return the items of its answer."""
        (reply,) = yield self.step()
        return self.receive(reply)

    def receive(self, reply: object) -> list[Item]:
        """Take the reply to the last step, and return its items.

        Raises:
            FFError: The server refused the request.
        """
        try:
            return self._take(reply)
        except _Rewritten:
            # The server was replaced under the connection. Its state tells where to continue.
            self.restart()
            return []

    def _take(self, reply: object) -> list[Item]:
        if self._ranged is not None:
            return self._take_range(self._ranged.answer(reply))
        if isinstance(reply, Exception):
            raise from_server_error(str(reply))
        if reply is not None and not isinstance(reply, list):
            raise ProtocolError
        if self._small_to is not None:
            return self._take_small(reply or [], self._small_to)
        if not reply:
            if self._paced:
                self._paced = False
            else:
                self._block_ms = 0
            return []
        return self._take_streams(reply)

    def _take_range(self, page: ops.Range) -> list[Item]:
        self._counts[_LIVE] = self._next_count(_LIVE, page.live)
        least, most = _WAKE_COUNTS
        self._wake_count = max(min(_REPLY_BYTES // 2 // max(page.payload_limit, 1), most), least)
        try:
            items, ended = self._position.take_range(page, self._reason)
        except _Rewritten:
            # Entries of another program hide the place from the server.
            gap = self._position.go_back((0, 0))
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
            self._caught_up(items)
        # A lapsing lease writes no end entry; read the state again just after it lapses.
        left = BLOCK_MS if page.lease_left_ms is None else page.lease_left_ms + 1
        self._block_ms = max(min(BLOCK_MS, left), 1)
        return items

    def _begin_small(self, page: ops.Range) -> None:
        to = page.last_ms, page.last_sequence
        small_to = _text(*to).encode()
        if not page.log_more:
            # It has nothing more up to there. Where the log was cut, the live window was not looked at behind the cut.
            self._position.read[_LOG] = max(self._position.read[_LOG], small_to, key=_id)
        self._more = [_id(read) < to for read in self._position.read]
        if any(self._more):
            self._small_to = small_to

    def _caught_up(self, items: list[Item]) -> None:
        """Note that everything stored so far was read; *items* came last."""
        self._behind = False
        self._reason = "fell_behind"
        self._paced = self._position.exclude and self._unwanted and not items and not self._paced
        self._unwanted = False

    def _take_small(self, entries: list[list[object]], to: bytes) -> list[Item]:
        (stream,) = self._asked
        position = self._position
        if entries:
            self._counts[stream] = self._next_count(stream, entries)
            position.read[stream] = entries[-1][0]  # type: ignore[call-overload]
            position.held[stream] = entries
        self._more[stream] = len(entries) >= self._count
        if not self._more[stream]:
            position.read[stream] = max(position.read[stream], to, key=_id)
        items, ended = self._merge(min(_id(known) for known in position.read))
        if ended is not None:
            return self._end(items, ended)
        if not any(self._more):
            self._small_to = None
            self._caught_up(items)
        return items

    def _take_streams(self, reply: list[object]) -> list[Item]:
        fresh: dict[object, list[list[object]]] = {}
        for part in reply:
            if not isinstance(part, list) or len(part) != 2 or not isinstance(part[1], list):
                raise ProtocolError
            fresh[part[0]] = part[1]
        position = self._position
        horizon: Id | None = None
        for stream, key in enumerate(self._keys):
            found = fresh.get(key)
            if found:
                self._counts[stream] = self._next_count(stream, found)
                position.read[stream] = found[-1][0]  # type: ignore[call-overload]
                position.held[stream] = found
            if stream not in self._asked or (found is not None and len(found) >= self._count):
                known = _id(position.read[stream])
                horizon = known if horizon is None else min(horizon, known)
        items, ended = self._merge(horizon)
        if ended is not None:
            return self._end(items, ended)
        self._unwanted = not items and (self._unwanted or bool(fresh))
        if horizon is None:
            self._caught_up(items)
        else:
            position.fall_back(horizon)
            self._behind = True
        return items

    def _merge(self, horizon: Id | None) -> tuple[list[Item], EndReason | None]:
        held = self._position.held
        return self._position.merge(held[_LOG], held[_LIVE], horizon, self._reason)

    def _next_count(self, stream: int, entries: list[list[object]]) -> int:
        """Return the next XREAD COUNT of a stream, from the size of its last entries."""
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
        return [*items, End(reason=reason, cursor=self.cursor)]


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
        (reply,) = yield core.step()
        items = core.receive(reply)
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
            return _page(frames, gaps, last.stream_id, core.end_reason if whole else None)
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
