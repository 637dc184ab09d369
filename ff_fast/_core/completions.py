"""Subscriptions to ended executions, without I/O.

The records of a partition are a stream. Its ids begin with a time, but nothing compares it with a clock: a subscription
begins behind the last record of each partition, wherever the server's clock has been meanwhile.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.steps import Command, Step, Steps, checked, is_foreign
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    Corruption,
    ExecutionNotFound,
    FFError,
    InvalidCursor,
    ProtocolError,
)
from ff_fast.types import CompletionPayload, ScannerFilter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ff_fast.types import CompletionOutcome

T = TypeVar("T")

COMPLETION_BLOCK_MS = 5_000
"""Longest block of a subscription on the server, in ms."""

# Records of one answer, of all partitions together; a record has at most some 600 bytes.
_REPLY_RECORDS = 1_024
# Bytes of results that are asked for at once, but for a single larger one, and executions of which something is.
_RESULT_BYTES = 1 << 20
_GROUP = 64

_OUTCOMES = frozenset({"success", "failed", "cancelled", "expired"})
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_CURSOR = re.compile(
    r"(\d{1,16})-(\d{1,16})((?:,[0-9a-z]{1,4}:[0-9a-z]{1,13}(?:-[0-9a-z]{1,13})?:[0-9a-z]{0,13})*)",
    re.ASCII,
)


def _base36(number: int) -> str:
    text = ""
    while number >= 36:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
    return _DIGITS[number] + text


class _Place(NamedTuple):
    """Place in the completions of a partition: the id of the last record that was read, and how many were stored by then.

    *stored* tells whether records behind it were trimmed; None where it is not known.
    """

    ms: int
    sequence: int
    stored: int | None

    @property
    def identity(self) -> bytes:
        return b"%d-%d" % (self.ms, self.sequence)

    def text(self, index: int) -> str:
        """Return its part of a cursor, about 16 bytes."""
        sequence = f"-{_base36(self.sequence)}" if self.sequence else ""
        stored = "" if self.stored is None else _base36(self.stored)
        return f",{_base36(index)}:{_base36(self.ms)}{sequence}:{stored}"


class _Record(NamedTuple):
    partition: int
    identity: bytes
    fields: list[bytes]


class CompletionCore:
    """A subscription to ended executions: makes requests, and completions from the replies.

    One read covers the completion streams of all partitions. The cursor has the place in each partition that has had
    completions, and an id for all others; it has about 16 bytes a partition.

    Args:
        partitions: Number of partitions of the deployment.
        after: Cursor of an earlier subscription; None begins now, ``start`` with the oldest completion kept.
        scope: Filter of the executions.
    """

    __slots__ = (
        "_base", "_behind", "_first", "_foreign", "_from", "_look_due", "_partitions", "_places", "_records", "_scope",
        "_texts",
    )  # fmt: skip

    ended = False

    def __init__(self, partitions: int, after: str | None, scope: ScannerFilter) -> None:
        self._partitions = partitions
        self._scope = scope
        self._base = _Place(0, 0, 0)
        self._places: dict[int, _Place] = {}
        self._texts: dict[int, str] = {}
        # Records that were read and not passed yet; the partitions that may have more at once; those without a stream.
        self._records: deque[_Record] = deque()
        self._behind: list[int] = []
        self._foreign: set[int] = set()
        # Where the first look begins: "now", "start" or at a cursor.
        self._from = "now" if after is None else "start" if after == "start" else "cursor"
        self._look_due = True
        self._first: str | None = None
        if self._from == "cursor":
            self._move(after)
            self._first = self._cursor
        elif self._from == "start":
            self._first = "start"

    @property
    def _cursor(self) -> str:
        return "".join([f"{self._base.ms}-{self._base.sequence}", *self._texts.values()])

    def _move(self, cursor: object) -> None:
        if cursor == "start":
            self._from, self._places, self._texts = "start", {}, {}
            return
        found = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
        if found is None:
            raise InvalidCursor("after must be a cursor of a completion, 'start' or None.")
        self._from = "cursor"
        ms, sequence = int(found[1]), int(found[2])
        # Of an id that is no place of a partition the number is not known.
        self._base = _Place(ms, sequence, None if ms else 0)
        self._places, self._texts = {}, {}
        for part in found[3].split(",")[1:]:
            index, identity, stored = part.split(":")
            ms_text, _, sequence_text = identity.partition("-")
            place = _Place(
                int(ms_text, 36),
                int(sequence_text or "0", 36),
                int(stored, 36) if stored else None,
            )
            if max(place.ms, place.sequence) >= 1 << 64:
                raise InvalidCursor("after is no cursor of a completion.")
            if int(index, 36) >= self._partitions:
                raise InvalidCursor("after is a cursor of a deployment with more partitions.")
            self._go(int(index, 36), place)

    def _go(self, index: int, place: _Place) -> None:
        self._places[index] = place
        self._texts[index] = place.text(index)

    @property
    def start(self) -> str | None:
        """Cursor of the beginning; None until the last record of each partition is known."""
        return self._first

    def restart(self, cursor: str | None = None) -> None:
        """Continue after *cursor*, or after the last read; completions there may have been trimmed meanwhile."""
        if cursor is not None:
            self._move(cursor)
        self._records.clear()
        self._behind = []
        self._look_due = True

    def read(self) -> Steps[list[CompletionPayload]]:
        """Wait up to :data:`COMPLETION_BLOCK_MS`; return new completions, each with the cursor after it."""
        if self._look_due:
            yield from self._look()
        if not self._records:
            yield from self._fetch()
        return (yield from self._take())

    # -- where it stands -----------------------------------------------------------------------------------------------

    def _look(self) -> Steps[None]:
        """Look at the stream of each partition: where it ends, and whether records behind the cursor were trimmed.

        Raises:
            InvalidCursor: They may have been.
        """
        names = [keys.completions(keys.slot_tag(index)) for index in range(self._partitions)]
        infos = [Command(name, pack_command(b"XINFO", b"STREAM", name)) for name in names]
        passed = [
            (index, names[index], place.identity)
            for index, place in self._places.items()
            if place.ms
        ]
        records = [
            Command(name, pack_command(b"XRANGE", name, identity, identity))
            for _, name, identity in passed
        ]
        replies = yield Step(infos + records, large=True)
        there = {
            index
            for (index, _, _), found in zip(passed, replies[len(infos) :], strict=True)
            if not is_foreign(found) and checked(found)
        }
        foreign: set[int] = set()
        places: dict[int, _Place] = {}
        for index, reply in enumerate(replies[: len(infos)]):
            if is_foreign(reply):
                foreign.add(index)
                continue
            missing = isinstance(reply, Exception) and "no such key" in str(reply)
            about = _Stream.of([] if missing else checked(reply))
            place = self._place(index, about, there=index in there)
            if place is not None:
                places[index] = place
        for index, place in places.items():
            self._go(index, place)
        self._from = "cursor"
        if self._first is None:
            self._first = self._cursor
        self._foreign = foreign
        # Whether it has become a stream is seen by looking again.
        self._look_due = bool(foreign)

    def _place(self, index: int, about: _Stream, *, there: bool) -> _Place | None:
        """Return the place where this partition goes on; None if it is the one that is known.

        Args:
            index: The partition.
            about: Its stream.
            there: Whether the record of the place is in it.

        Raises:
            InvalidCursor: Records behind the cursor may have been trimmed, or the stream has lost that of the cursor.
        """
        if self._from == "now":
            return _Place(*about.last, about.added) if about.added else None
        if self._from == "start":
            return _Place(0, 0, about.added - about.length) if about.added else None
        place = self._places.get(index)
        here = place or self._base
        at = here[:2]
        if place is None and at != (0, 0) and about.last <= at:
            return _Place(*about.last, about.added) if about.added else None
        kept = about.length and about.first <= at and about.deleted < at
        lost = place is not None and (about.last < at or (kept and not there))
        missing = at < about.last and (not about.length or at < about.first)
        if here.stored is None:
            missing = missing and about.added > about.length
        else:
            missing = missing and about.added - here.stored > about.length
        if lost or missing:
            raise InvalidCursor(
                "Completions behind the cursor are not kept any more; begin with 'start' and compare with what you"
                " have."
            )
        return None

    # -- records -------------------------------------------------------------------------------------------------------

    def _fetch(self) -> Steps[None]:
        """Read records of all partitions, or more of those that had more."""
        behind, self._behind = self._behind, []
        indexes = behind or [i for i in range(self._partitions) if i not in self._foreign]
        if not indexes:
            raise Corruption(
                "The completions of every partition are a key of another type; look for what wrote them."
            )
        count = max(_REPLY_RECORDS // len(indexes), 1)
        names = [keys.completions(keys.slot_tag(index)) for index in indexes]
        block = () if behind else (b"BLOCK", b"%d" % COMPLETION_BLOCK_MS)
        places = [self._places.get(index, self._base).identity for index in indexes]
        request = pack_command(
            b"XREAD", b"COUNT", b"%d" % count, *block, b"STREAMS", *names, *places
        )
        block_s = 0 if behind else COMPLETION_BLOCK_MS / 1000
        (reply,) = yield Step((Command(names[0], request),), block_s, large=True)
        if is_foreign(reply):
            self._look_due = True
            return
        streams = cast("list[tuple[bytes, list[tuple[bytes, list[bytes]]]]]", checked(reply))
        for name, entries in streams:
            index = keys.index_of(name.decode())
            self._records.extend(_Record(index, identity, fields) for identity, fields in entries)
            # In turn with all, so that one with a long backlog keeps nobody waiting.
            if len(entries) >= count and not behind:
                self._behind.append(index)

    def _take(self) -> Steps[list[CompletionPayload]]:
        """Pass on records, as many as have their results in one answer."""
        taken: list[tuple[_Record, CompletionPayload | None, int]] = []
        tag = self._scope.instance_tag
        size = asked = 0
        for record in self._records:
            completion, result_bytes = _completion_of(record, self._scope)
            if completion and (tag or result_bytes):
                # The next read begins here, so that it has something to ask.
                if asked and (asked == _GROUP or size + result_bytes > _RESULT_BYTES):
                    break
                asked += 1
                size += result_bytes
            taken.append((record, completion, result_bytes))
        if tag is not None:
            tags = yield from _ask(
                ops.read_tags(completion.execution_id, tag[0])
                for _, completion, _ in taken
                if completion
            )
            matches = iter([found is not None and found.get(tag[0]) == tag[1] for found in tags])
            taken = [
                (record, completion if completion and next(matches) else None, result_bytes)
                for record, completion, result_bytes in taken
            ]
        results = yield from _ask(
            ops.read_result(completion.execution_id)
            for _, completion, result_bytes in taken
            if completion and result_bytes
        )
        found: list[CompletionPayload] = []
        kept = iter(results)
        for record, completion, result_bytes in taken:
            self._records.popleft()
            stored = self._places.get(record.partition, self._base).stored
            place = _Place(
                *ops.entry_id(record.identity.decode()), None if stored is None else stored + 1
            )
            self._go(record.partition, place)
            if completion is not None:
                result = next(kept) or None if result_bytes else None
                found.append(completion.replace(payload_bytes=result, cursor=self._cursor))
        return found


class _Stream(NamedTuple):
    """What XINFO STREAM tells: the first id that is kept, the last id ever and the last one that somebody deleted, how
    many records there are and have been."""

    first: tuple[int, int]
    last: tuple[int, int]
    deleted: tuple[int, int]
    length: int
    added: int

    @classmethod
    def of(cls, flat: list[Any]) -> _Stream:
        if not flat:
            return cls((0, 0), (0, 0), (0, 0), 0, 0)
        try:
            about = dict(zip(flat[::2], flat[1::2], strict=True))
            return cls(
                ops.entry_id(about[b"recorded-first-entry-id"].decode()),
                ops.entry_id(about[b"last-generated-id"].decode()),
                ops.entry_id(about[b"max-deleted-entry-id"].decode()),
                int(about[b"length"]),
                int(about[b"entries-added"]),
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ProtocolError from None


def _ask(calls: Iterable[ops.Op[T]]) -> Steps[list[T | None]]:
    """Make *calls* at once; a value is None where the execution is not kept any more, or a key of it is foreign."""
    asked = list(calls)
    if not asked:
        return []
    replies = yield Step([op.command() for op in asked], large=True)
    return [_kept(op, reply) for op, reply in zip(asked, replies, strict=True)]


def _kept(op: ops.Op[T], reply: object) -> T | None:
    if isinstance(reply, Exception) and "WRONGTYPE" in str(reply):
        return None
    try:
        return op.answer(reply)
    except ExecutionNotFound:
        return None


def _completion_of(record: _Record, scope: ScannerFilter) -> tuple[CompletionPayload | None, int]:
    """Return the completion of a record, without its result, and the size of the result.

    The completion is None if the filter excludes it, or if another program wrote the record.
    """
    flat = record.fields
    fields = dict(zip(flat[::2], flat[1::2], strict=False))
    try:
        execution_id = fields[b"execution_id"].decode()
        outcome = fields[b"outcome"].decode()
        flow_id = fields.get(b"flow_id")
        completion = CompletionPayload(
            execution_id=execution_id,
            outcome=cast("CompletionOutcome", outcome),
            produced_at_ms=int(fields[b"produced_at_ms"]),
            flow_id=None if flow_id is None else flow_id.decode(),
        )
        result_bytes = int(fields.get(b"payload_bytes", b"0"))
        namespace = fields[b"namespace"].decode()
        if (
            outcome not in _OUTCOMES
            or keys.index_of(completion.execution_id) != record.partition
            or result_bytes < 0
        ):
            return None, 0
    except (FFError, ValueError, LookupError):
        return None, 0
    if scope.namespace is not None and namespace != scope.namespace:
        return None, 0
    return completion, result_bytes
