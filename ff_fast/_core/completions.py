"""Subscriptions to ended executions, without I/O.

The records of a partition are a stream. Its ids begin with a time, but nothing compares it with a clock: a subscription
begins behind the last record of each partition, wherever the server's clock has been meanwhile.

A push says that a partition has a new record, and nothing else: records are read. A subscription looks at the streams
of whose channels it may have missed a push, and at all of them now and then.
"""

from __future__ import annotations

import re
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.steps import Command, Step, Steps, checked, is_foreign
from ff_fast._core.tail import LONGEST_S, jittered
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    Corruption,
    ExecutionNotFound,
    FFError,
    InvalidCursor,
    ProtocolError,
    from_server_error,
)
from ff_fast.types import CompletionPayload, ScannerFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ff_fast.types import CompletionOutcome

T = TypeVar("T")

# Partitions that are looked at and read at once, and records of one answer of them together; a record has at most some
# 900 bytes.
_LOOKS_AT_ONCE = 256
_READS_AT_ONCE = 64
_REPLY_RECORDS = 1_024
# Bytes of results that are asked for at once, but for a single larger one, and executions of which something is.
_RESULT_BYTES = 1 << 20
_GROUP = 64

# How often a partition is looked at that is not subscribed to, in seconds.
_UNSUBSCRIBED_S = 1.0
# How often all partitions are looked at, in seconds: at least, and for each of them. A look costs the server about a
# microsecond a partition.
_LOOK_S = 5.0
_LOOK_S_EACH = 0.02
# How long a read goes on beyond its time to find where a subscription begins, in seconds.
_FIRST_LOOK_S = 1.0

_LAST_ID = (2**64 - 1, 2**64 - 1)
_OUTCOMES = frozenset({"success", "failed", "cancelled", "expired"})
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_CURSOR = re.compile(
    r"(\d{1,16})-(\d{1,16})((?:~[0-9a-z]{1,4}\.[0-9a-z]{1,13}(?:-[0-9a-z]{1,13})?\.[0-9a-z]{0,13})*)",
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
        return f"~{_base36(index)}.{_base36(self.ms)}{sequence}.{stored}"


class _Record(NamedTuple):
    partition: int
    identity: bytes
    fields: list[bytes]


class _Partition:
    """Listens to the completions of one partition."""

    __slots__ = ("_index", "_watch")

    def __init__(self, watch: CompletionWatch, index: int) -> None:
        self._watch = watch
        self._index = index

    def told(self, message: bytes, /) -> None:  # noqa: ARG002 - there is one kind
        self._watch.told[self._index] = None
        self._watch.wake()

    def doubt(self, subscribed: bool, /) -> None:
        watch = self._watch
        if subscribed:
            watch.doubted[self._index] = None
            watch.deaf.pop(self._index, None)
        else:
            watch.deaf[self._index] = None
        watch.wake()

    def failed(self, error: FFError, /) -> None:
        self.doubt(False)
        self._watch.failure = error
        self._watch.wake()


class CompletionWatch:
    """What listens for a subscription, on the thread of the hub; the thread that reads takes what it notes.

    No lock is needed: they share dicts, of which each uses single operations.

    Attributes:
        on_wake: Called when there may be something to ask.
        listeners: One for the channel of each partition.
        told: Partitions that have new records.
        doubted: Partitions that may have, since their subscription was confirmed.
        deaf: Partitions whose subscription is not confirmed.
        failure: Why there is no subscription to be had.
    """

    __slots__ = ("deaf", "doubted", "failure", "listeners", "on_wake", "told")

    def __init__(self, partitions: int) -> None:
        self.on_wake: Callable[[], object] | None = None
        self.told: dict[int, None] = {}
        self.doubted: dict[int, None] = {}
        self.deaf: dict[int, None] = dict.fromkeys(range(partitions))
        self.failure: FFError | None = None
        self.listeners = [
            (keys.completions_channel(keys.slot_tag(index)), _Partition(self, index))
            for index in range(partitions)
        ]

    def wake(self) -> None:
        if self.on_wake is not None:
            self.on_wake()


def _take(noted: dict[int, None], most: int | None = None) -> list[int]:
    """Take the first of what was noted; what is noted again meanwhile stays."""
    taken = list(noted)[:most]
    for index in taken:
        noted.pop(index, None)
    return taken


class CompletionCore:
    """A subscription to ended executions: makes requests, and completions from the replies.

    The cursor has the place in each partition that has had completions, and an id for all others; it has about 16 bytes
    a partition.

    Args:
        partitions: Number of partitions of the deployment.
        after: Cursor of an earlier subscription; None begins now, ``start`` with the oldest completion kept.
        scope: Filter of the executions.

    Attributes:
        part: What listens.
    """

    __slots__ = (
        "_base", "_begun", "_first", "_first_look_until", "_foreign", "_from", "_look_at", "_looked_at", "_partitions",
        "_places", "_records", "_refusing", "_scope", "_silent", "_step", "_steps", "_texts", "part",
    )  # fmt: skip

    ended = False
    tally = None

    def __init__(self, partitions: int, after: str | None, scope: ScannerFilter) -> None:
        self._partitions = partitions
        self._scope = scope
        self._base = _Place(0, 0, 0)
        self._places: dict[int, _Place] = {}
        self._texts: dict[int, str] = {}
        # Records that were read and not passed yet; the partitions without a stream, those whose node has not answered,
        # and those whose node has said that it cannot for the time being.
        self._records: deque[_Record] = deque()
        self._foreign: set[int] = set()
        self._silent: dict[int, None] = {}
        self._refusing: dict[int, None] = {}
        # The read under way, and what it asks for.
        self._steps: Steps[list[CompletionPayload]] | None = None
        self._step: Step | None = None
        # Whether all partitions were looked at; when they are again, and when that was, in monotonic time.
        self._begun = False
        self._look_at = self._looked_at = 0.0
        # None before the first read.
        self._first_look_until: float | None = None
        self.part = CompletionWatch(partitions)
        # Where the first look begins: "now", "start" or at a cursor.
        self._from = "now" if after is None else "start" if after == "start" else "cursor"
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
        for part in found[3].split("~")[1:]:
            index, identity, stored = part.split(".")
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
        self._silent.clear()
        self._refusing.clear()
        self._steps = self._step = None
        self._look_at = 0.0
        self.part = CompletionWatch(self._partitions)

    # -- for the shell -------------------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float:
        """When to ask for a step although nothing was pushed, in monotonic time."""
        if self._watched():
            return min(self._look_at, self._looked_at + _UNSUBSCRIBED_S)
        return self._look_at

    def patience(self, until: float | None) -> float | None:
        """Return until when to wait: also a read that has no time finds where the subscription begins."""
        if until is None or self._begun:
            return until
        if self._first_look_until is None:
            self._first_look_until = monotonic() + _FIRST_LOOK_S
        return max(until, self._first_look_until)

    def take(self) -> list[CompletionPayload]:
        """Return completions that were read before, if nothing is to be asked about them."""
        if self._steps is None and self._records:
            return self._run(self._pass_on())
        return []

    def step(self) -> Step | None:
        """Return the next request; None if there is nothing to ask.

        Raises:
            FFError: There is no subscription to be had.
        """
        failure, self.part.failure = self.part.failure, None
        if failure is not None:
            raise failure
        if self._steps is None:
            doubted = self._doubted(monotonic())
            if doubted or self.part.told:
                self._run(self._read(doubted))
        return self._step

    def receive(self, *replies: object) -> list[CompletionPayload]:
        """Return completions, each with the cursor after it, if the last step was the last one of a read.

        Args:
            replies: To the last step. An ``FFError`` stands for that of a partition whose node has failed.

        Raises:
            FFError: The server refused the request, or no partition has answered.
        """
        assert self._steps is not None
        return self._run(self._steps, list(replies))

    def _doubted(self, now: float) -> Sequence[int]:
        """Return the partitions that have to be looked at.

        One that has not answered is left alone while it is deaf: its node is gone or silent, and each look at it would
        keep the others waiting. It is looked at once it is subscribed to again.
        """
        watch = self.part
        if now >= self._look_at:
            watch.doubted.clear()
            self._looked_at = now
            longest = min(max(_LOOK_S, _LOOK_S_EACH * self._partitions), LONGEST_S)
            self._look_at = now + jittered(longest)
            left_alone = watch.deaf.keys() & self._silent.keys() if self._begun else ()
            return [index for index in range(self._partitions) if index not in left_alone]
        if now >= self._looked_at + _UNSUBSCRIBED_S:
            self._looked_at = now
            watch.doubted |= dict.fromkeys(self._watched())
        return _take(watch.doubted)

    def _watched(self) -> set[int]:
        """Return the partitions that are looked at often."""
        return self.part.deaf.keys() - self._silent.keys() | self._refusing.keys()

    def _run(
        self, steps: Steps[list[CompletionPayload]], replies: list[object] | None = None
    ) -> list[CompletionPayload]:
        """Go on with a read up to its next step; return its completions where it is over."""
        self._steps, self._step = steps, None
        try:
            step = next(steps) if replies is None else steps.send(replies)
        except StopIteration as stop:
            self._steps = None
            found: list[CompletionPayload] = stop.value
            return found
        assert isinstance(step, Step)
        self._step = step
        return []

    def _read(self, doubted: Sequence[int]) -> Steps[list[CompletionPayload]]:
        """Look at partitions, and read some of those that have new records."""
        for at in range(0, len(doubted), _LOOKS_AT_ONCE):
            yield from self._look(doubted[at : at + _LOOKS_AT_ONCE])
        if doubted and not self._begun:
            self._begun = True
            self._from = "cursor"
            if self._first is None:
                self._first = self._cursor
        if len(self._foreign) == self._partitions:
            raise Corruption(
                "The completions of every partition are a key of another type; look for what wrote them."
            )
        yield from self._fetch()
        return (yield from self._pass_on())

    def _answered(self, replies: Iterable[tuple[int, object]]) -> list[tuple[int, object]]:
        """Return what partitions have answered, without those that cannot for the time being: they are looked at again.

        Raises:
            FFError: None of all partitions can, or it is not known yet where the subscription begins.
        """
        answered: list[tuple[int, object]] = []
        failure: FFError | None = None
        for index, reply in replies:
            self._foreign.discard(index)
            self._silent.pop(index, None)
            self._refusing.pop(index, None)
            error = reply
            if isinstance(reply, Exception) and not isinstance(reply, FFError):
                error = from_server_error(str(reply))
            if is_foreign(reply):
                self._foreign.add(index)
            elif isinstance(error, FFError) and error.retryable:
                unheard = isinstance(reply, FFError)
                (self._silent if unheard else self._refusing)[index] = None
                failure = failure or error
            else:
                answered.append((index, reply))
        if failure is not None and (
            not self._begun or len(self._silent) + len(self._refusing) == self._partitions
        ):
            raise failure
        return answered

    # -- where it stands -----------------------------------------------------------------------------------------------

    def _look(self, indexes: Sequence[int]) -> Steps[None]:
        """Look at the streams of partitions: where each ends, and whether records behind the cursor were trimmed.

        Raises:
            InvalidCursor: They may have been.
        """
        names = [keys.completions(keys.slot_tag(index)) for index in indexes]
        infos = [Command(name, pack_command(b"XINFO", b"STREAM", name)) for name in names]
        passed = [
            (index, name, place.identity)
            for index, name in zip(indexes, names, strict=True)
            if (place := self._places.get(index)) is not None and place.ms
        ]
        records = [
            Command(name, pack_command(b"XRANGE", name, identity, identity))
            for _, name, identity in passed
        ]
        replies = yield Step(infos + records, large=True, partial=True)
        abouts: dict[int, _Stream] = {}
        for index, reply in self._answered(zip(indexes, replies, strict=False)):
            if isinstance(reply, Exception) and "no such key" not in str(reply):
                checked(reply)
            abouts[index] = _Stream.of(reply)
        there = {
            index
            for (index, _, _), reply in zip(passed, replies[len(infos) :], strict=True)
            if index in abouts and not is_foreign(reply) and checked(reply)
        }
        places = {
            index: self._place(index, about, there=index in there)
            for index, about in abouts.items()
        }
        for index, place in places.items():
            if place is not None:
                self._go(index, place)
            if (place or self._places.get(index) or self._base)[:2] < abouts[index].last:
                self.part.told[index] = None

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
        """Read new records of some of the partitions that have any."""
        indexes = _take(self.part.told, _READS_AT_ONCE)
        if not indexes:
            return
        count = max(_REPLY_RECORDS // len(indexes), 1)
        commands: list[Command] = []
        for index in indexes:
            name = keys.completions(keys.slot_tag(index))
            place = self._places.get(index, self._base)
            # Behind the last id there is none.
            after = b"(" + place.identity if place[:2] < _LAST_ID else place.identity
            request = pack_command(b"XRANGE", name, after, b"+", b"COUNT", b"%d" % count)
            commands.append(Command(name, request))
        replies = yield Step(commands, large=True, partial=True)
        for index, reply in self._answered(zip(indexes, replies, strict=True)):
            entries = cast("list[tuple[bytes, list[bytes]]]", checked(reply))
            self._records.extend(_Record(index, identity, fields) for identity, fields in entries)
            # In turn with all, so that one with a long backlog keeps nobody waiting.
            if len(entries) >= count:
                self.part.told[index] = None

    def _pass_on(self) -> Steps[list[CompletionPayload]]:
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
    def of(cls, reply: object) -> _Stream:
        """Return what a reply tells, in RESP2 or RESP3; there is no stream in an error."""
        if isinstance(reply, Exception):
            return cls((0, 0), (0, 0), (0, 0), 0, 0)
        try:
            about: Any = reply
            if not isinstance(about, dict):
                about = dict(zip(about[::2], about[1::2], strict=True))
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
    replies = yield Step([op.command() for op in asked], large=True, partial=True)
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
            # It may be cut within a letter.
            error=fields.get(b"error", b"").decode("utf-8", "ignore") or None,
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
