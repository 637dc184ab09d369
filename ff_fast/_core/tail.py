"""Readers without I/O: a live tail, and pages of a range.

Both streams of an attempt are read, and merged by sequence up to a *horizon*: the id up to which
both are known completely. A stream that was not read to its end is known up to the last entry
received. Frames appended later have higher ids in either stream. So a sequence that is missing below
the horizon is missing for good: a gap.

`ff_read_range` reads both streams and the state of the attempt atomically, at the start of a tail
and whenever a block time passes without an entry. XREAD reads and waits in between; an entry costs
the server a sixth as much by XREAD.
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
# Target size of one answer: decoding it occupies an event loop for a few milliseconds.
_REPLY_BYTES = 1 << 20
_REPLY_FRAMES = 4_096
_FIRST_FRAMES = 64
_LARGEST_LOOK = 256
# XREAD COUNT for log and live window: first value, upper bound. XREAD has no limit in bytes, and
# entries differ in size: one of the live window may be a run of a thousand frames.
_FIRST_COUNTS = (512, 16)
_LARGEST_COUNTS = (1024, 64)

Item = StreamFrame | Gap | End
Id = tuple[int, int]

_LOG, _LIVE = 0, 1


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

    def range_op(self, count: int, max_bytes: int) -> ops.Op[ops.Range]:
        return ops.read_range(
            self.execution_id,
            self.attempt_index,
            log_after=self.read[_LOG],
            live_after=self.read[_LIVE],
            count=count,
            max_bytes=max_bytes,
            visibility=self.visibility.wire_str(),
        )

    def merge(
        self,
        log: list[list[object]],
        live: list[list[object]],
        horizon: Id | None,
        reason: GapReason,
    ) -> tuple[list[Item], EndReason | None]:
        """Return the items up to *horizon* and, if it was reached, the reason of the end; hold later entries."""
        decoded = []
        for stream, entries in enumerate((log, live)):
            some = decode_entries(
                entries, self.sequence, horizon, self.exclude, live=stream == _LIVE
            )
            self.held[stream] = entries[some.taken :]
            decoded.append(some)
        items: list[Item] = []
        items, self.ms, self.sequence, ended = assemble(  # type: ignore[assignment]
            decoded[_LOG], decoded[_LIVE], self.ms, self.sequence, self.exclude, reason
        )
        return items, ended

    def take_range(self, page: ops.Range, reason: GapReason) -> tuple[list[Item], EndReason | None]:
        """Return the items of a range read and, if everything was read, the reason why the attempt ended."""
        # The end entry has the sequence after the last frame, so a cursor behind the end is not ahead.
        end = page.last_sequence + bool(page.closed_reason)
        if self.sequence > end:
            first_missing = self.sequence + 1
            self.ms, self.sequence = page.last_ms, page.last_sequence
            self.rewind()
            gap = Gap(
                first_missing=first_missing,
                next_sequence=page.last_sequence + 1,
                reason="cursor_ahead",
                cursor=self.cursor,
            )
            return [gap], page.closed_reason or None
        cut = [
            _id(to)
            for to, more in ((page.log_to, page.log_more), (page.live_to, page.live_more))
            if more
        ]
        horizon = min(cut) if cut else None
        items, ended = self.merge(page.log, page.live, horizon, reason)
        # A stream that was read to its end has nothing more up to the newest id of both streams:
        # entries appended later have higher ids.
        newest_id = _text(page.last_ms, page.last_sequence).encode()
        self.read = [max(to, newest_id, key=_id) for to in (page.log_to, page.live_to)]
        if horizon is not None:
            # Entries past the horizon are dropped and read again; a reply is bounded anyway.
            for stream, more in enumerate((page.log_more, page.live_more)):
                if more or self.held[stream]:
                    self.read[stream] = _text(*horizon).encode()
            self.held = [[], []]
            return items, ended
        if ended is not None:
            return items, ended
        newest = page.visible_sequence if self.exclude else page.last_sequence
        first_missing = self.sequence + 1
        if page.last_sequence > self.sequence:
            self.ms, self.sequence = page.last_ms, page.last_sequence
        if newest >= first_missing:
            items.append(
                Gap(
                    first_missing=first_missing,
                    next_sequence=page.last_sequence + 1,
                    reason="expired",
                    cursor=self.cursor,
                )
            )
        return items, page.closed_reason or None


class TailCore:
    """A live reader of one attempt: makes requests, and items from the replies.

    Args:
        execution_id: Id of the execution.
        attempt_index: Attempt, from 0; the reader waits for one that is not claimed yet.
        after: Cursor, exclusive: an id of a frame, the cursor of a summary, or None for the start.
        visibility: Whether best-effort frames are delivered.
        count: Number of frames in a page; None for a tail. ``ff_read_range`` alone reads a small page, XREAD the frames
            of a larger one.

    Attributes:
        end_reason: Why the attempt ended; None until the end was delivered.
        start: Cursor of the beginning.
    """

    __slots__ = (
        "_asked", "_block_ms", "_count", "_counts", "_first_frames", "_keys", "_more", "_paced",
        "_position", "_ranged", "_reason", "_unwanted", "end_reason", "start",
    )  # fmt: skip

    def __init__(
        self,
        execution_id: str,
        attempt_index: int,
        after: object,
        visibility: TailVisibility,
        count: int | None = None,
    ) -> None:
        small = count is not None and count <= _LARGEST_LOOK
        self._first_frames = count if count is not None and small else _FIRST_FRAMES
        self._position = _Position(execution_id, attempt_index, after, visibility)
        eid = self._position.execution_id
        self._keys = (keys.stream(eid, attempt_index), keys.live(eid, attempt_index))
        self.start = self._position.cursor
        self._reason: GapReason = "trimmed"
        self._counts = list(_FIRST_COUNTS)
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
        self._asked: tuple[int, ...] = ()
        self._count = 0
        self._more = [False, False]
        self._block_ms = 0
        self._paced = False
        self._unwanted = False

    def step(self) -> Step:
        """Return the next request."""
        held = self._position.held
        block: int | None = None
        if held[_LOG] or held[_LIVE]:
            # Frames can be delivered only up to the shorter stream; read that one next.
            self._asked = (_LIVE,) if held[_LOG] else (_LOG,)
        elif self._more[_LOG] or self._more[_LIVE]:
            # The reader is behind: read one stream at a time, so that one answer stays bounded.
            self._asked = (_LOG,) if self._more[_LOG] else (_LIVE,)
        elif self._block_ms == 0:
            self._ranged = self._position.range_op(self._first_frames, _REPLY_BYTES)
            return Step((self._ranged.command(),))
        elif self._paced:
            # The last answer held only best-effort frames, which this reader excludes. Wait on the log
            # alone for a moment, so that they cause few wake-ups; durable frames and the end still do.
            self._asked = (_LOG,)
            block = _PACE_MS
        else:
            self._asked = (_LOG, _LIVE)
            block = self._block_ms
        self._ranged = None
        self._count = min(self._counts[stream] for stream in self._asked)
        request = pack_command(
            b"XREAD",
            *(b"COUNT", b"%d" % self._count),
            *(() if block is None else (b"BLOCK", b"%d" % block)),
            b"STREAMS",
            *(self._keys[stream] for stream in self._asked),
            *(self._position.read[stream] for stream in self._asked),
        )
        return Step((Command(self._keys[_LOG], request),), (block or 0) / 1000)

    @property
    def ended(self) -> bool:
        """Whether the end was delivered."""
        return self.end_reason is not None

    def caught_up(self) -> bool:
        """Return whether every stored frame was read.

        After XREADs it is False once more, so that the state is read: only the state shows a lapsed lease, and frames
        that are missing at the end.
        """
        held = self._position.held
        if held[_LOG] or held[_LIVE] or any(self._more):
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
        if self._ranged is not None:
            return self._take_range(self._ranged.answer(reply))
        if isinstance(reply, Exception):
            raise from_server_error(str(reply))
        if reply is not None and not isinstance(reply, list):
            raise ProtocolError
        held = self._position.held
        if reply is None and not (held[_LOG] or held[_LIVE] or any(self._more)):
            if self._paced:
                self._paced = False
            else:
                self._block_ms = 0
            return []
        return self._take_streams(reply or [])

    def _take_range(self, page: ops.Range) -> list[Item]:
        self._counts[_LIVE] = self._next_count(_LIVE, page.live)
        items, ended = self._position.take_range(page, self._reason)
        if ended is not None:
            return self._end(items, ended)
        self._more = [page.log_more, page.live_more]
        if not any(self._more):
            self._reason = "fell_behind"
        # A lapsing lease writes no end entry; read the state again just after it lapses.
        left = BLOCK_MS if page.lease_left_ms is None else page.lease_left_ms + 1
        self._block_ms = max(min(BLOCK_MS, left), 1)
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
            if stream in self._asked:
                self._more[stream] = found is not None and len(found) >= self._count
            if self._more[stream] or stream not in self._asked:
                known = _id(position.read[stream])
                horizon = known if horizon is None else min(horizon, known)
        items, ended = position.merge(
            position.held[_LOG], position.held[_LIVE], horizon, self._reason
        )
        if ended is not None:
            return self._end(items, ended)
        self._unwanted = not items and (self._unwanted or bool(fresh))
        if position.held[_LOG] or position.held[_LIVE] or any(self._more):
            return items
        self._reason = "fell_behind"
        self._paced = position.exclude and self._unwanted and not self._paced
        self._unwanted = False
        return items

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
    """Read up to *count* frames, and about *max_bytes* of payload.

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
        missing = [item for item in items if isinstance(item, Gap)]
        room = count - len(frames)
        if len(some) >= room:
            # Frames read beyond the page, also those of a run, are read again for the next page.
            last = some[room - 1]
            frames += some[:room]
            gaps += [gap for gap in missing if gap.first_missing < last.sequence]
            whole = last is (items[-2] if core.ended else items[-1])
            return _page(frames, gaps, last.stream_id, core.end_reason if whole else None)
        frames += some
        gaps += missing
        size += sum([len(frame.payload) for frame in some])
        if core.ended or size >= max_bytes or core.caught_up():
            return _page(frames, gaps, core.cursor, core.end_reason)


def _page(
    frames: list[StreamFrame], gaps: list[Gap], cursor: str, end_reason: EndReason | None
) -> StreamPage:
    page = StreamPage(frames)
    page.cursor = cursor
    page.gaps = tuple(gaps)
    page.end_reason = end_reason
    return page
