"""One function for each Lua function: what to send, and how to read the answer, as data.

A shell sends :meth:`Op.request` and gives the reply to :meth:`Op.answer`; nothing else of it knows a function's name,
its keys or the order of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from ff_fast import keys
from ff_fast._hot.resp import pack_fcall
from ff_fast._steps import Flow, Step
from ff_fast.errors import Corruption, FFError, ProtocolError, for_code, from_server_error
from ff_fast.types import (
    FailOutcome,
    FailureClass,
    FailureReason,
    Handle,
    HandleFields,
    HandleKind,
    LeaseRenewal,
)

T = TypeVar("T")

Fields = Sequence[bytes]


class Op(NamedTuple, Generic[T]):
    """One call of a Lua function.

    Attributes:
        function: Name of the function.
        keys: Keys that it is told of; all share one hash slot.
        argv: Its arguments.
        parse: From the status and the fields of a success to the caller's value.
        read_only: The function is ``no-writes``, so a replica may answer.
        repeatable: Sending it again after a lost reply gives the same outcome.
    """

    function: bytes
    keys: tuple[bytes, ...]
    argv: tuple[bytes, ...]
    parse: Callable[[bytes, list[object]], T]
    read_only: bool = False
    repeatable: bool = True

    def request(self) -> bytes:
        """Return the call as it goes on the wire."""
        return pack_fcall(self.function, self.keys, self.argv, self.read_only)

    def answer(self, reply: object) -> T:
        """Return the caller's value.

        Raises:
            FFError: The function refused, the server answered with an error, or the reply is not one of the
                function's (``ProtocolError``).
        """
        if isinstance(reply, Exception):
            raise from_server_error(str(reply))
        if isinstance(reply, list) and len(reply) >= 2 and isinstance(reply[1], bytes):
            word = reply[1]
            if reply[0] == 0:
                raise for_code(word.decode("ascii", "replace"), reply[2:])
            try:
                return self.parse(word, reply[2:])
            except FFError:
                raise
            except (ValueError, IndexError, TypeError, AttributeError):
                pass
        raise ProtocolError


def number(value: int) -> bytes:
    return b"%d" % value


def _text(field: object) -> str:
    if not isinstance(field, bytes):
        raise Corruption("The server answered with a value of another type; check what wrote it.")
    return field.decode("utf-8", "replace")


def _int(field: object) -> int:
    return int(_text(field))


class Attempt(NamedTuple):
    """The attempt that a handle stands for: its keys and its fence, as they go to the server."""

    execution_id: str
    attempt_index: int
    fields: HandleFields

    @classmethod
    def of(cls, handle: Handle) -> Attempt:
        """Decode *handle*.

        Raises:
            InvalidHandle, HandleFromOtherBackend: The handle is not one of ours.
        """
        fields = handle.fields()
        return cls(fields.execution_id, fields.attempt_index, fields)

    @property
    def stream_keys(self) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        """core, log, live, meta, summary."""
        eid, index = self.execution_id, self.attempt_index
        return (
            keys.core(eid),
            keys.stream(eid, index),
            keys.live(eid, index),
            keys.meta(eid, index),
            keys.summary(eid, index),
        )

    @property
    def fence(self) -> tuple[bytes, bytes, bytes]:
        """attempt index, lease id, lease epoch."""
        return (
            number(self.attempt_index),
            self.fields.lease_id.encode(),
            number(self.fields.lease_epoch),
        )


def version() -> Op[tuple[int, str]]:
    """Contract number and digest of the library that the server holds."""

    def parse(_: bytes, fields: list[object]) -> tuple[int, str]:
        return _int(fields[0]), _text(fields[1])

    return Op(b"ff_version", (), (), parse, read_only=True)


def create_execution(
    execution_id: str,
    *,
    namespace: str,
    lane: str,
    priority: int,
    required_capabilities: bytes,
    retention_ms: int,
    payload: bytes,
    tags: dict[str, str],
) -> Op[bytes]:
    """Create an execution, or find that it exists; answers its score in the eligible set."""

    def parse(_: bytes, fields: list[object]) -> bytes:
        return _text(fields[0]).encode()

    pairs = [part.encode() for pair in tags.items() for part in pair]
    return Op(
        b"ff_create_execution",
        (
            keys.core(execution_id),
            keys.payload(execution_id),
            keys.tags(execution_id),
            keys.eligible(keys.partition_tag(execution_id), lane),
        ),
        (
            execution_id.encode(),
            namespace.encode(),
            lane.encode(),
            number(priority),
            required_capabilities,
            number(retention_ms),
            payload,
            *pairs,
        ),
        parse,
    )


class Claimed(NamedTuple):
    """Answer of a claim. ``handle`` is None where nothing matched; ``next_offset`` then says where to go on."""

    handle: Handle | None
    next_offset: int | None
    next_score: bytes | None


def claim(
    partition: int,
    *,
    lane: str,
    worker_id: str,
    worker_instance_id: str,
    lease_id: str,
    lease_ttl_ms: int,
    attempt_id: str,
    capabilities: tuple[str, ...],
    offset: int = 0,
) -> Op[Claimed]:
    """Claim the best execution of a lane in one partition that *capabilities* cover."""

    def parse(status: bytes, fields: list[object]) -> Claimed:
        if status == b"NONE":
            offset, score = _text(fields[0]), _text(fields[1])
            return Claimed(None, int(offset) if offset else None, score.encode() or None)
        handle = Handle.encode(
            kind=HandleKind.FRESH,
            execution_id=_text(fields[0]),
            attempt_index=_int(fields[1]),
            attempt_id=attempt_id,
            lease_id=lease_id,
            lease_epoch=_int(fields[2]),
            lease_ttl_ms=lease_ttl_ms,
            lane_id=lane,
            worker_instance_id=worker_instance_id,
        )
        return Claimed(handle, None, _text(fields[4]).encode() or None)

    tag = keys.tag_of(partition)
    return Op(
        b"ff_claim",
        (keys.eligible(tag, lane),),
        (
            *keys.execution_prefixes(tag),
            worker_id.encode(),
            worker_instance_id.encode(),
            lease_id.encode(),
            number(lease_ttl_ms),
            attempt_id.encode(),
            number(offset),
            *(token.encode() for token in capabilities),
        ),
        parse,
        # A repeat would claim a second execution; the first one comes back when its lease lapses.
        repeatable=False,
    )


def renew_lease(attempt: Attempt, lease_ttl_ms: int) -> Op[LeaseRenewal]:
    """Extend a live lease to *lease_ttl_ms* from now, by the server's clock."""

    def parse(_: bytes, fields: list[object]) -> LeaseRenewal:
        return LeaseRenewal(expires_at_ms=_int(fields[0]), lease_epoch=_int(fields[1]))

    return Op(
        b"ff_renew_lease",
        (keys.core(attempt.execution_id),),
        (*attempt.fence, number(lease_ttl_ms)),
        parse,
    )


def _finish_keys(attempt: Attempt) -> tuple[bytes, ...]:
    eid = attempt.execution_id
    return (
        *attempt.stream_keys,
        keys.attempt(eid, attempt.attempt_index),
        keys.payload(eid),
        keys.tags(eid),
    )


def complete_execution(attempt: Attempt, payload: bytes) -> Op[None]:
    """End the execution as completed, with *payload* as its result."""
    return Op(
        b"ff_complete_execution",
        (*_finish_keys(attempt), keys.result(attempt.execution_id)),
        (*attempt.fence, payload),
        lambda status, fields: None,
    )


def fail_execution(
    attempt: Attempt, reason: FailureReason, failure_class: FailureClass
) -> Op[FailOutcome]:
    """End the execution as failed."""
    return Op(
        b"ff_fail_execution",
        _finish_keys(attempt),
        (
            *attempt.fence,
            reason.message.encode(),
            failure_class.value.encode(),
            reason.detail or b"",
        ),
        lambda status, fields: FailOutcome.TERMINAL_FAILED,
    )


class Opened(NamedTuple):
    """What a writer continues from."""

    last_sequence: int
    last_ms: int
    visible_sequence: int
    estimator: bytes
    summary_version: int


def open_writer(attempt: Attempt, writer_id: str) -> Op[Opened]:
    """Make *writer_id* the writer of the attempt; the one before it is superseded."""

    def parse(_: bytes, fields: list[object]) -> Opened:
        last_sequence, last_ms, visible, estimator, summary_version = map(_text, fields)
        return Opened(
            int(last_sequence), int(last_ms), int(visible), estimator.encode(), int(summary_version)
        )

    core, _, _, meta, summary = attempt.stream_keys
    return Op(
        b"ff_open_writer",
        (core, meta, summary),
        (*attempt.fence, writer_id.encode()),
        parse,
    )


class Range(NamedTuple):
    """Both streams of an attempt, each after an id, at one moment (lua/read.lua, ``ff_read_range``)."""

    log: list[list[object]]
    log_to: bytes
    log_more: bool
    live: list[list[object]]
    live_to: bytes
    live_more: bool
    last_sequence: int
    last_ms: int
    visible_sequence: int
    closed_reason: str
    lease_left_ms: int | None


def read_range(
    execution_id: str,
    attempt_index: int,
    *,
    log_after: bytes,
    live_after: bytes,
    count: int,
    max_bytes: int,
    visibility: str,
) -> Op[Range]:
    """Entries of both streams after an id of each."""

    def parse(_: bytes, fields: list[object]) -> Range:
        log, log_to, log_more, live, live_to, live_more, *rest = fields
        if not isinstance(log, list) or not isinstance(live, list):
            raise TypeError
        last_sequence, last_ms, visible, reason, left = map(_text, rest)
        return Range(
            log,
            _text(log_to).encode(),
            _text(log_more) == "1",
            live,
            _text(live_to).encode(),
            _text(live_more) == "1",
            int(last_sequence),
            int(last_ms),
            int(visible),
            reason,
            int(left) if left else None,
        )

    return Op(
        b"ff_read_range",
        (
            keys.core(execution_id),
            keys.stream(execution_id, attempt_index),
            keys.live(execution_id, attempt_index),
            keys.meta(execution_id, attempt_index),
        ),
        (
            number(attempt_index),
            log_after,
            live_after,
            number(count),
            number(max_bytes),
            visibility.encode(),
        ),
        parse,
        read_only=True,
    )


def read_summary(execution_id: str, attempt_index: int) -> Op[dict[bytes, bytes]]:
    """The summary hash as stored; ``_summary.fold`` makes the document of it."""

    def parse(_: bytes, fields: list[object]) -> dict[bytes, bytes]:
        return _pairs(fields[0])

    return Op(
        b"ff_read_summary",
        (keys.core(execution_id), keys.summary(execution_id, attempt_index)),
        (),
        parse,
        read_only=True,
    )


def describe_execution(execution_id: str) -> Op[dict[str, str]]:
    """The fields of the execution's core."""

    def parse(_: bytes, fields: list[object]) -> dict[str, str]:
        return {
            _text(name): _text(value)
            for name, value in _pairs(fields).items()
            if name != b"current_lease_id"
        }

    return Op(b"ff_describe_execution", (keys.core(execution_id),), (), parse, read_only=True)


def _pairs(flat: object) -> dict[bytes, bytes]:
    if not isinstance(flat, list) or not all(isinstance(part, bytes) for part in flat):
        raise TypeError
    return dict(zip(flat[::2], flat[1::2], strict=True))


def call(op: Op[T]) -> Flow[T]:
    """The flow of a single call."""
    (reply,) = yield Step(op.request())
    return op.answer(reply)


def read_payload(attempt: Attempt) -> Op[bytes]:
    """The payload that the execution was created with."""

    def parse(_: bytes, fields: list[object]) -> bytes:
        payload = fields[0]
        if not isinstance(payload, bytes):
            raise TypeError
        return payload

    eid = attempt.execution_id
    return Op(b"ff_read_payload", (keys.core(eid), keys.payload(eid)), (), parse, read_only=True)
