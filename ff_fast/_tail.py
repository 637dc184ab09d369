"""Readers without I/O: a live tail, and pages of a range.

Both streams of an attempt are read from one cursor at one moment: by `ff_read_range` at the start and whenever nothing
happened for a while, by one XREAD over both keys in between. Such a read is complete up to its *horizon* (where a
stream was cut by the count), so a sequence that is missing below it is missing for good: a gap.
"""

from __future__ import annotations

from ff_fast import keys, ops
from ff_fast._hot.frames import Entries, StreamFrame, assemble, decode_entries
from ff_fast._hot.resp import pack_command
from ff_fast._steps import Flow, Step
from ff_fast.errors import InvalidInput, ProtocolError, check_int, from_server_error
from ff_fast.types import End, Gap, StreamCursor, TailVisibility, parse_cursor

BLOCK_MS = 5_000
"""How long a tail blocks on the server at the most; then it asks whether the attempt still lives."""

_PACE_MS = 5
_FIRST_COUNT = 64
_LARGEST_COUNT = 2_048
_PAGE_BYTES = 1 << 20
_PAGE_FRAMES = 4_096
MAX_COUNT = 10_000

Item = StreamFrame | Gap | End

_NOTHING = decode_entries([], 0)


def _id(ms: int, sequence: int) -> str:
    return f"{ms}-{sequence}"


def _parse_id(raw: bytes) -> tuple[int, int]:
    ms, _, sequence = raw.partition(b"-")
    return int(ms), int(sequence)


class _Position:
    """Where a reader stands in an attempt, and what it passed on the way."""

    __slots__ = ("attempt_index", "exclude", "execution_id", "ms", "sequence", "visibility")

    def __init__(
        self, execution_id: str, attempt_index: int, after: object, visibility: TailVisibility
    ) -> None:
        if not isinstance(visibility, TailVisibility):
            raise InvalidInput("visibility must be TailVisibility.ALL or EXCLUDE_BEST_EFFORT.")
        self.execution_id = keys.canonical_execution_id(execution_id)
        self.attempt_index = keys.attempt_index(attempt_index)
        cursor: StreamCursor = parse_cursor(after)
        self.ms, self.sequence = cursor.ms, cursor.sequence
        self.visibility = visibility
        self.exclude = visibility is TailVisibility.EXCLUDE_BEST_EFFORT

    def range_op(self, count: int, max_bytes: int) -> ops.Op[ops.Range]:
        return ops.read_range(
            self.execution_id,
            self.attempt_index,
            after=_id(self.ms, self.sequence),
            count=count,
            max_bytes=max_bytes,
            visibility=self.visibility.wire_str(),
        )

    def merge(
        self, log: Entries, live: Entries, horizon: tuple[int, int], reason: str
    ) -> tuple[list[StreamFrame | Gap], str | None]:
        items, self.ms, self.sequence, ended = assemble(
            log, live, self.ms, self.sequence, *horizon, self.exclude, reason
        )
        return items, ended

    def take_range(self, page: ops.Range, reason: str) -> tuple[list[Item], str | None]:
        """Items of a range read; then why the attempt ended, where all of it was read and it has."""
        ahead = self.sequence > page.last_sequence and not page.log and not page.live
        # The end entry stands one behind the last frame, so a cursor behind the end is not ahead of it.
        if ahead and not (page.closed_reason and self.sequence == page.last_sequence + 1):
            gap = Gap(
                first_missing=self.sequence + 1,
                next_sequence=page.last_sequence + 1,
                reason="cursor_ahead",
            )
            self.ms, self.sequence = page.last_ms, page.last_sequence
            return [gap], page.closed_reason or None
        horizon = _parse_id(page.horizon) if page.horizon else (-1, -1)
        log = decode_entries(page.log, self.sequence)
        live = decode_entries(page.live, self.sequence)
        items: list[Item] = []
        merged, ended = self.merge(log, live, horizon, reason)
        items += merged
        if page.horizon or ended is not None:
            return items, ended
        newest = page.visible_sequence if self.exclude else page.last_sequence
        if newest > self.sequence:
            items.append(
                Gap(
                    first_missing=self.sequence + 1,
                    next_sequence=page.last_sequence + 1,
                    reason="expired",
                )
            )
        if page.last_sequence > self.sequence:
            self.ms, self.sequence = page.last_ms, page.last_sequence
        return items, page.closed_reason or None


class TailCore:
    """A live reader of one attempt: what to ask next, and what the answer brought.

    Args:
        execution_id: Id of the execution.
        attempt_index: Attempt, from 0; one that nobody has claimed yet is waited for.
        after: Cursor, exclusive: an id of a frame, the cursor of a summary, or None for the beginning.
        visibility: Whether best-effort frames are wanted.

    Attributes:
        ended: True once the end was delivered.
    """

    __slots__ = (
        "_block_ms", "_count", "_keys", "_live_id", "_log_id", "_paced", "_position", "_ranged", "_reason", "_request",
        "ended",
    )  # fmt: skip

    def __init__(
        self, execution_id: str, attempt_index: int, after: object, visibility: TailVisibility
    ) -> None:
        self._position = _Position(execution_id, attempt_index, after, visibility)
        eid = self._position.execution_id
        self._keys = (keys.stream(eid, attempt_index), keys.live(eid, attempt_index))
        self._reason = "trimmed"
        self._count = _FIRST_COUNT
        self.ended = False
        self.restart()

    def restart(self) -> None:
        """The connection was lost or the server changed: look at the state again before blocking."""
        self._ranged: ops.Op[ops.Range] | None = None
        self._request: bytes | None = None
        self._block_ms = 0
        self._paced = False

    def step(self) -> Step:
        """Return what to send now."""
        if self._block_ms == 0:
            self._ranged = self._position.range_op(_FIRST_COUNT, _PAGE_BYTES)
            return Step(self._ranged.request())
        self._ranged = None
        log, live = self._keys
        if self._paced:
            # Best-effort frames that are not wanted just came: for a moment only the log may wake this reader, so
            # they cost it few wake-ups; a durable frame and the end still wake it at once.
            streams: tuple[bytes, ...] = (log, self._log_id)
            block = _PACE_MS
        else:
            streams = (log, live, self._log_id, self._live_id)
            block = self._block_ms
        request = pack_command(
            b"XREAD", b"COUNT", b"%d" % self._count, b"BLOCK", b"%d" % block, b"STREAMS", *streams
        )
        return Step(request, block_s=block / 1000)

    def receive(self, reply: object) -> list[Item]:
        """Take the reply to the last step; return what the reader gets of it.

        Raises:
            FFError: The server refused.
        """
        if self._ranged is not None:
            return self._take_range(self._ranged.answer(reply))
        if isinstance(reply, Exception):
            raise from_server_error(str(reply))
        if reply is None:
            if self._paced:
                self._paced = False
            else:
                self._block_ms = 0
            return []
        if not isinstance(reply, list):
            raise ProtocolError()
        return self._take_streams(reply)

    def _take_range(self, page: ops.Range) -> list[Item]:
        items, ended = self._position.take_range(page, self._reason)
        self._reason = "fell_behind"
        if ended is not None:
            return self._end(items, ended)
        self._log_id = self._live_id = _id(self._position.ms, self._position.sequence).encode()
        # A lapsed lease writes no end entry by itself: wake up when it is due.
        left = BLOCK_MS if page.lease_left_ms is None else page.lease_left_ms + 1
        self._block_ms = max(min(BLOCK_MS, left), 1)
        return items

    def _take_streams(self, reply: list[list[object]]) -> list[Item]:
        found: dict[object, list[list[object]]] = {}
        for name, entries in reply:
            if not isinstance(entries, list):
                raise ProtocolError()
            found[name] = entries
        position = self._position
        log, live = (
            decode_entries(found[key], position.sequence) if key in found else _NOTHING
            for key in self._keys
        )
        if self._paced:
            # The live window was not read: nothing is complete beyond what it had.
            self._paced = False
            self._block_ms = 0
            return []
        cut = [
            (entries.last_sequence, entries.last_ms)
            for key, entries in zip(self._keys, (log, live), strict=True)
            if len(found.get(key, ())) >= self._count
        ]
        horizon = min(cut) if cut else (-1, -1)
        before = position.sequence
        items, ended = position.merge(log, live, (horizon[1], horizon[0]), self._reason)
        self._adapt(items, bool(cut))
        if ended is not None:
            return self._end(list(items), ended)
        cursor = (position.ms, position.sequence)
        self._log_id = self._live_id = _id(*cursor).encode()
        if not cut:
            # Entries that are not frames must not come again.
            self._log_id = _id(*max(cursor, (log.last_ms, log.last_sequence))).encode()
            self._live_id = _id(*max(cursor, (live.last_ms, live.last_sequence))).encode()
            self._paced = position.exclude and not items and position.sequence > before
        return list(items)

    def _adapt(self, items: list[StreamFrame | Gap], cut: bool) -> None:
        """Read more at once while behind, as long as a reply stays small."""
        if not cut:
            return
        size = sum(len(item.payload) for item in items if isinstance(item, StreamFrame))
        if size > _PAGE_BYTES or len(items) > _PAGE_FRAMES:
            self._count = max(self._count // 2, 1)
        elif size < _PAGE_BYTES // 4 and len(items) < _PAGE_FRAMES // 4:
            self._count = min(self._count * 2, _LARGEST_COUNT)

    def _end(self, items: list[Item], reason: str) -> list[Item]:
        self.ended = True
        return [*items, End(reason=reason)]


class StreamPage(tuple[StreamFrame, ...]):
    """Frames of one attempt, in sequence order.

    Attributes:
        cursor: Where to read on: the ``after`` of the next page.
        gaps: What is missing within the page.
        end_reason: Why the attempt ended, where the page reaches its end; else None.
    """

    cursor: str
    gaps: tuple[Gap, ...]
    end_reason: str | None

    def __repr__(self) -> str:
        return f"StreamPage(<{len(self)} frames>, cursor={self.cursor!r}, end_reason={self.end_reason!r})"


def read_page(
    execution_id: str,
    attempt_index: int,
    *,
    after: object,
    count: int,
    max_bytes: int,
    visibility: TailVisibility,
) -> Flow[StreamPage]:
    """Up to *count* frames after a cursor, and about *max_bytes* of payload.

    Raises:
        InvalidInput, InvalidCursor, InvalidId: An argument is not one of those that are accepted.
        ExecutionNotFound, AttemptNotFound: There is no such attempt.
    """
    check_int("count", count, 1, MAX_COUNT)
    check_int("max_bytes", max_bytes, 1, 64 << 20)
    position = _Position(execution_id, attempt_index, after, visibility)
    frames: list[StreamFrame] = []
    gaps: list[Gap] = []
    size = 0
    while True:
        op = position.range_op(count - len(frames), max_bytes - size)
        (reply,) = yield Step(op.request())
        answer = op.answer(reply)
        items, ended = position.take_range(answer, "trimmed")
        for item in items:
            if isinstance(item, Gap):
                gaps.append(item)
            elif isinstance(item, StreamFrame):
                frames.append(item)
                size += len(item.payload)
                if len(frames) == count:
                    # A run may reach beyond the page; the next one begins inside it.
                    return _page(frames, gaps, item.stream_id, ended if item is items[-1] else None)
        if ended is not None or not answer.horizon or size >= max_bytes:
            return _page(frames, gaps, _id(position.ms, position.sequence), ended)


def _page(
    frames: list[StreamFrame], gaps: list[Gap], cursor: str, end_reason: str | None
) -> StreamPage:
    page = StreamPage(frames)
    page.cursor = cursor
    page.gaps = tuple(gaps)
    page.end_reason = end_reason
    return page
