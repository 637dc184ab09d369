"""One Python function for each Lua function: it returns the request, and the reader of the answer, as data.

:meth:`Op.command` is the request; :meth:`Op.answer` takes the reply. Only this module knows the names, keys and
argument orders of the Lua functions.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

from ff_fast import keys
from ff_fast._core.attempts import attempts_of
from ff_fast._core.steps import Command, Step, Steps
from ff_fast._hot.resp import pack_fcall
from ff_fast.errors import MAX_INT, Corruption, FFError, ProtocolError, for_code, from_server_error
from ff_fast.types import (
    DEFAULT_PAYLOAD_LIMIT,
    CancelFlowPolicy,
    CancelOutcome,
    CapabilitySet,
    ExecutionDescription,
    ExecutionSummary,
    FailOutcome,
    FailureClass,
    FailureReason,
    Handle,
    HandleFields,
    HandleKind,
    LeaseRenewal,
    PendingWaitpoint,
    ReportUsageResult,
    ResumeCondition,
    ResumeSignal,
    RetryBackoff,
    RetryPolicy,
    ScannerFilter,
    SignalOutcome,
    StateTransition,
    StreamDescription,
    SuspensionDescription,
    TimeoutBehavior,
    UsageDimensions,
    UsageVerdict,
    WaitpointHmac,
    duration_ms,
)

if TYPE_CHECKING:
    from ff_fast.types import (
        CompletionOutcome,
        EndReason,
        ExecutionState,
        FlowState,
        SignalEffect,
    )

T = TypeVar("T")

Fields = Sequence[bytes]


NAMED_WORKER = b"open_stream"
"""The worker id of those who produce named streams."""


class Op(NamedTuple, Generic[T]):
    """One call of a Lua function.

    Attributes:
        function: Name of the function.
        keys: Its declared keys; all share one hash slot.
        argv: Its arguments.
        parse: Makes the caller's value from the status and the fields of a success.
        read_only: The function is ``no-writes``, so a replica may answer.
        large: The answer may be large (see `Step`).
    """

    function: bytes
    keys: tuple[bytes, ...]
    argv: tuple[bytes, ...]
    parse: Callable[[bytes, list[object]], T]
    read_only: bool = False
    large: bool = False

    def command(self) -> Command:
        """Return the call as one command, for the node of its keys."""
        request = pack_fcall(self.function, self.keys, self.argv, self.read_only)
        # A function that only reads, and meets a key on its way, is called again.
        return Command(self.keys[0], request, None if self.read_only else self._guarded)

    def _guarded(self) -> bytes:
        absent = keys.absent(self.keys[0])
        named = self.keys if absent is None else (*self.keys, absent)
        return pack_fcall(self.function, named, self.argv)

    def answer(self, reply: object) -> T:
        """Return the caller's value.

        Raises:
            FFError: The function refused, the server answered with an error, or the reply has another form
                (``ProtocolError``).
        """
        if isinstance(reply, FFError):
            raise reply
        if isinstance(reply, Exception):
            raise from_server_error(str(reply), self.function.decode())
        if isinstance(reply, list) and len(reply) >= 2 and isinstance(reply[1], bytes):
            word = reply[1]
            if reply[0] == 0:
                raise for_code(word.decode("ascii", "replace"), reply[2:])
            try:
                return self.parse(word, reply[2:])
            except (ValueError, LookupError, TypeError, AttributeError):
                # A value class may refuse a field of the answer; that is not the caller's mistake.
                pass
        raise ProtocolError


def number(value: int) -> bytes:
    return b"%d" % value


def _text(field: object) -> str:
    if not isinstance(field, bytes):
        raise Corruption("The server answered with a value of another type; check what wrote it.")
    return field.decode("utf-8", "replace")


def _bytes(field: object) -> bytes:
    if not isinstance(field, bytes):
        raise Corruption("The server answered with a value of another type; check what wrote it.")
    return field


def _int(field: object) -> int:
    return int(_text(field))


def entry_id(text: str) -> tuple[int, int]:
    """Return the ms and the sequence of an entry id; the pairs sort like the ids."""
    ms, _, sequence = text.partition("-")
    return int(ms), int(sequence)


class Attempt(NamedTuple):
    """The attempt of a handle: its keys and its fence, encoded for the server."""

    execution_id: str
    attempt_index: int
    fields: HandleFields

    @classmethod
    def of(cls, handle: Handle) -> Attempt:
        """Decode *handle*.

        Raises:
            InvalidHandle, HandleFromOtherBackend: The handle is damaged, or of another backend.
        """
        fields = handle.fields()
        return cls(fields.execution_id, fields.attempt_index, fields)

    @property
    def stream_keys(self) -> tuple[bytes, bytes, bytes, bytes]:
        """head, log, live, summary."""
        eid, index = self.execution_id, self.attempt_index
        return (
            keys.head(eid, index),
            keys.stream(eid, index),
            keys.live(eid, index),
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


class Version(NamedTuple):
    """The server's library, and what the deployment depends on.

    Attributes:
        contract: Contract number of the library.
        digest: Digest of its text.
        partitions: The stored partition count; None if there is none.
        eviction_policy: ``maxmemory-policy`` of the server; empty where its memory has no limit, or it is not told.
        engine: Name and version of the server; empty where it is not told, or the server is thrown away anyway.
        settings: Whether the settings of persistence may be asked for.
        rights: For each right that was asked for ``1`` where the caller has it, ``0`` where not, and ``?`` where the
            server does not know it.
    """

    contract: int
    digest: str
    partitions: int | None
    eviction_policy: str = ""
    engine: str = ""
    settings: bool = False
    rights: str = ""


def version(
    at: tuple[bytes, ...] = (keys.PARTITIONS_CONFIG, keys.CLUSTER_PROBE),
    rights: Sequence[str] = (),
) -> Op[Version]:
    """Read contract and digest of the server's library, the stored partition count, and what the server is.

    Args:
        at: The call's keys. The default ones are in different slots, so every node of a cluster refuses the call; with
            another key, which leads to one node, no count is read.
        rights: Commands with arguments, in words: whether the caller may run them.
    """

    def parse(_: bytes, fields: list[object]) -> Version:
        # A library of another contract may answer fewer fields; its contract must be readable nevertheless.
        contract, digest, *rest = map(_text, fields)
        partitions, eviction_policy, engine, settings, granted = [*rest, "", "", "", "", ""][:5]
        return Version(
            int(contract),
            digest,
            int(partitions) if partitions else None,
            eviction_policy,
            engine,
            settings == "1",
            granted,
        )

    return Op(b"ff_version", at, tuple(right.encode() for right in rights), parse, read_only=True)


Hints = list[tuple[str, str, bytes]]
"""Claimable work in the partition of the call: a lane, required capabilities, and the score of an execution."""


def _hints(fields: list[object], first: int) -> Hints:
    words = [_text(field) for field in fields[first:]]
    told = zip(words[::3], words[1::3], words[2::3], strict=True)
    return [(lane, needs, score.encode()) for lane, needs, score in told]


def create_execution(
    execution_id: str,
    *,
    namespace: str,
    lane: str,
    priority: int,
    required_capabilities: bytes,
    retention_ms: int,
    delay_ms: int,
    deadline_ms: int,
    attempt_timeout_ms: int,
    flow_id: str,
    parent_id: str,
    budget_ids: Sequence[str],
    retry: RetryPolicy,
    payload: bytes,
    tags: Mapping[str, str],
    traceparent: str | None = None,
) -> Op[tuple[None, Hints]]:
    """Create an execution, or find that it exists."""
    slot_tag = keys.slot_tag_of(execution_id)
    pairs = [part.encode() for pair in tags.items() for part in pair]
    if traceparent is not None:
        # No name of a tag is without a dot.
        pairs += [b"traceparent", traceparent.encode()]
    return Op(
        b"ff_create_execution",
        (
            keys.core(execution_id),
            keys.payload(execution_id),
            keys.tags(execution_id),
            keys.flow(slot_tag, flow_id),
        ),
        (
            execution_id.encode(),
            namespace.encode(),
            lane.encode(),
            number(priority),
            required_capabilities,
            number(retention_ms),
            number(delay_ms),
            number(deadline_ms),
            flow_id.encode(),
            parent_id.encode(),
            " ".join(budget_ids).encode(),
            number(retry.max_retries),
            retry.backoff.value.encode(),
            number(duration_ms("delay", retry.delay)),
            number(round(retry.multiplier * 100)),
            number(duration_ms("max_delay", retry.max_delay)),
            number(retry.jitter_percent),
            number(retry.max_reclaims),
            number(attempt_timeout_ms),
            payload,
            *pairs,
        ),
        lambda status, fields: (None, _hints(fields, 0)),
    )


class Claimed(NamedTuple):
    """Answer of a claim, and the score of what stays; without a handle, the next call may find it.

    *behind* is set where nothing was claimed because what waits has a worse score than its hint.
    """

    handle: Handle | None
    next_score: bytes | None
    behind: bool = False


def claim(
    partition: int,
    *,
    lane: str,
    needs: str,
    worker_id: str,
    worker_instance_id: str,
    lease_id: str,
    lease_ttl_ms: int,
    attempt_id: str,
    hint_score: bytes = b"",
) -> Op[Claimed]:
    """Claim the best execution of a lane in one partition among those that require *needs*.

    With *hint_score* nothing is claimed that has a worse score.
    """

    def parse(status: bytes, fields: list[object]) -> Claimed:
        if status in (b"NONE", b"BEHIND"):
            return Claimed(None, _text(fields[0]).encode() or None, status == b"BEHIND")
        handle = _claimed_handle(fields, lease_id, lease_ttl_ms, lane, worker_instance_id)
        return Claimed(handle, _text(fields[6]).encode() or None)

    slot_tag = keys.slot_tag(partition)
    return Op(
        b"ff_claim",
        (
            keys.eligible(slot_tag, lane, needs),
            keys.needs(slot_tag, lane),
            keys.leases(slot_tag),
            keys.timers(slot_tag),
        ),
        (
            worker_id.encode(),
            worker_instance_id.encode(),
            lease_id.encode(),
            number(lease_ttl_ms),
            attempt_id.encode(),
            needs.encode(),
            hint_score,
        ),
        parse,
    )


def give_back(partition: int, lease_id: str) -> Op[tuple[bool, Hints]]:
    """Undo a claim whose lease has reached no worker; answers whether it was held."""
    return Op(
        b"ff_give_back",
        (keys.leases(keys.slot_tag(partition)),),
        (lease_id.encode(),),
        lambda status, fields: (_text(fields[0]) == "1", _hints(fields, 1)),
    )


def hint(
    lane: str, needs: str, score: bytes, partition: int, mark: bytes, kept_ms: bytes
) -> Op[None]:
    """Publish a hint about executions that require *needs*, which are not empty; register these with the lane."""
    return Op(
        b"ff_hint",
        (keys.lane_needs(lane), keys.ready(lane, needs), keys.hinted(lane, needs)),
        (needs.encode(), score, number(partition), mark, kept_ms),
        lambda status, fields: None,
    )


def forget_hints(lane: str, needs: str, pairs: Sequence[bytes]) -> Op[None]:
    """Forget hinted partitions, given with their marks, in which there is no work."""
    return Op(
        b"ff_forget_hints", (keys.hinted(lane, needs),), tuple(pairs), lambda status, fields: None
    )


def renew_lease(attempt: Attempt, lease_ttl_ms: int) -> Op[LeaseRenewal]:
    """Extend a live lease to *lease_ttl_ms* from now, by the server's clock."""

    def parse(_: bytes, fields: list[object]) -> LeaseRenewal:
        return LeaseRenewal(
            expires_at_ms=_int(fields[0]),
            lease_epoch=_int(fields[1]),
            cancel_requested=_text(fields[2]) == "1",
        )

    return Op(
        b"ff_renew_lease",
        (keys.core(attempt.execution_id),),
        (*attempt.fence, number(lease_ttl_ms)),
        parse,
    )


def complete_execution(
    attempt: Attempt, payload: bytes, last_id: bytes = b""
) -> Op[tuple[None, Hints]]:
    """End the execution as completed, with *payload* as its result.

    *last_id* of this and other calls that release the lease: the last frame that the caller knows to be stored.
    """
    return Op(
        b"ff_complete_execution",
        (keys.core(attempt.execution_id),),
        (*attempt.fence, last_id, payload),
        lambda status, fields: (None, _hints(fields, 1)),
    )


def fail_execution(
    attempt: Attempt, reason: FailureReason, failure_class: FailureClass, last_id: bytes = b""
) -> Op[tuple[FailOutcome, Hints]]:
    """End the attempt as failed; the class and the retry policy decide whether the execution ends.

    *last_id* is as in `complete_execution`.
    """

    def parse(_: bytes, fields: list[object]) -> tuple[FailOutcome, Hints]:
        if _text(fields[1]) == "retry_scheduled":
            return FailOutcome.RETRY_SCHEDULED(_int(fields[2])), _hints(fields, 3)
        if fields[1] != b"terminal_failed":
            raise ValueError
        return FailOutcome.TERMINAL_FAILED, _hints(fields, 3)

    return Op(
        b"ff_fail_execution",
        (keys.core(attempt.execution_id),),
        (
            *attempt.fence,
            last_id,
            reason.message.encode(),
            failure_class.value.encode(),
            reason.detail or b"",
        ),
        parse,
    )


class Opened(NamedTuple):
    """State of the attempt from which a writer continues; *opening* counts the writers of the attempt, from 1."""

    last_ms: int
    last_sequence: int
    visible_sequence: int
    estimator: bytes
    summary_version: int
    opening: int = 0


def writer_id(attempt: Attempt) -> bytes:
    """Return a fresh id for a writer of the attempt: the fence, with the digest of its lease, and a text of its own.

    It is stored where readers read, so it must not hold the lease id.
    """
    return _writer_id(attempt.fence, writer_text())


def writer_text() -> str:
    """Return a fresh text for the id of a writer."""
    return keys.new_uuid()[:13]


def _writer_id(fence: tuple[bytes, bytes, bytes], text: str) -> bytes:
    index, lease_id, epoch = fence
    digest = hashlib.sha1(lease_id, usedforsecurity=False).hexdigest().encode()
    return b":".join((index, digest, epoch, text.encode()))


def open_writer(
    attempt: Attempt, writer: bytes, max_payload_bytes: int = DEFAULT_PAYLOAD_LIMIT
) -> Op[Opened]:
    """Make *writer*, which sends no larger payload, the writer of the attempt, in place of the one before it."""
    eid, index, fields = attempt
    return open_writer_of(eid, index, fields.lease_id, writer, max_payload_bytes)


def open_writer_of(
    execution_id: str, attempt_index: int, lease_id: str, writer: bytes, max_payload_bytes: int
) -> Op[Opened]:
    """The same for an attempt that is named by its parts."""

    names = (
        keys.core(execution_id),
        keys.head(execution_id, attempt_index),
        keys.summary(execution_id, attempt_index),
    )
    given = (writer, lease_id.encode(), number(max_payload_bytes))
    return Op(b"ff_open_writer", names, given, lambda status, fields: _opened(fields))


def _opened(fields: list[object]) -> Opened:
    last_id, visible, estimator, summary_version, opening = map(_text, fields)
    opened = Opened(
        *entry_id(last_id),
        int(visible),
        estimator.encode(),
        int(summary_version),
        int(opening),
    )
    # The writer counts on from these.
    if not all(0 <= number <= MAX_INT for number in opened if isinstance(number, int)):
        raise ValueError("no count")
    return opened


class Produced(NamedTuple):
    """A named stream that was opened to be produced: its lease, and the writer of its attempt."""

    handle: Handle
    writer_id: bytes
    opened: Opened


def open_stream(
    execution_id: str,
    *,
    namespace: str,
    retention_ms: int,
    takeover_ms: int,
    worker_instance_id: str,
    lease_id: str,
    lease_ttl_ms: int,
    attempt_id: str,
    writer_text: str,
    max_payload_bytes: int,
    payload: bytes,
    tags: Mapping[str, str],
) -> Op[Produced | None]:
    """Create an execution, put it under a lease and open its writer; None where somebody else produces it."""

    def parse(status: bytes, fields: list[object]) -> Produced | None:
        if status == b"CONSUMER":
            return None
        handle = _claimed_handle(fields, lease_id, lease_ttl_ms, "", worker_instance_id)
        return Produced(
            handle, _writer_id(Attempt.of(handle).fence, writer_text), _opened(fields[6:])
        )

    return Op(
        b"ff_open_stream",
        (keys.core(execution_id), keys.payload(execution_id), keys.tags(execution_id)),
        (
            execution_id.encode(),
            namespace.encode(),
            number(retention_ms),
            number(takeover_ms),
            NAMED_WORKER,
            worker_instance_id.encode(),
            lease_id.encode(),
            number(lease_ttl_ms),
            attempt_id.encode(),
            writer_text.encode(),
            number(max_payload_bytes),
            payload,
            *(part.encode() for pair in tags.items() for part in pair),
        ),
        parse,
    )


class Deleted(NamedTuple):
    """What one call has done: *cancelled* an execution that had not ended, or removed it or, with *more*, a part of it."""

    cancelled: bool
    more: bool


def delete_execution(execution_id: str, reason: str) -> Op[tuple[Deleted, Hints]]:
    """Remove an ended execution; cancel any other one."""
    return Op(
        b"ff_delete_execution",
        (keys.core(execution_id),),
        (reason.encode(),),
        lambda status, fields: (
            Deleted(status == b"CANCELLED", status == b"MORE"),
            _hints(fields, 0),
        ),
    )


# -- tasks ---------------------------------------------------------------------------------------------------------------


class TaskName(NamedTuple):
    """A task: the slot tag of its name, and the UUID that stands for it in keys."""

    slot_tag: str
    uuid: str

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """The documents, and the log of events."""
        return keys.task(*self), keys.task_events(*self)


def save_task(
    name: TaskName,
    owner: str,
    prev_version: int,
    kind: str,
    save_id: str,
    ttl_ms: int,
    document: bytes,
    event: bytes,
) -> Op[int | None]:
    """Store a document where the stored version is *prev_version*; return the new one, None where it is another."""
    return Op(
        b"ff_save_task",
        name.keys,
        (
            owner.encode(),
            number(prev_version),
            kind.encode(),
            save_id.encode(),
            number(ttl_ms),
            document,
            event,
        ),
        lambda status, fields: None if status == b"CONFLICT" else _int(fields[0]),
    )


class TaskRead(NamedTuple):
    """The document of an owner with its version, 0 where there is none, and events: id, version and text of each.

    *exists* is whether some owner has the task; *more*, whether more events may follow.
    """

    exists: bool
    version: int
    document: bytes
    more: bool
    events: list[tuple[str, int, bytes]]


def read_task(name: TaskName, owner: str = "", after: str = "0-0", count: int = 0) -> Op[TaskRead]:
    """Read the document of an owner, or events after an id."""

    def parse(_: bytes, fields: list[object]) -> TaskRead:
        exists, version, document, more, events = fields
        flat = cast("list[bytes]", events)
        return TaskRead(
            _text(exists) == "1",
            _int(version),
            _bytes(document),
            _text(more) == "1",
            [
                (_text(flat[i]), _int(flat[i + 1]), _bytes(flat[i + 2]))
                for i in range(0, len(flat), 3)
            ],
        )

    given = (owner.encode(), after.encode(), number(count))
    return Op(b"ff_read_task", name.keys, given, parse, read_only=True, large=True)


def delete_task(name: TaskName, owner: str) -> Op[bool]:
    """Remove the task of an owner; return whether there was one."""
    return Op(
        b"ff_delete_task",
        name.keys,
        (owner.encode(),),
        lambda status, fields: _text(fields[0]) == "1",
    )


def note_task(
    owner: str,
    task_id: str,
    version: int,
    time_us: int | None,
    state: str,
    context: str,
    ttl_ms: int,
) -> Op[bool]:
    """List a task among those of its owner; without a time, take it from there. Return whether that was done.

    Version 0 is that of a task about to be stored.
    """
    return Op(
        b"ff_note_task",
        (keys.task_order(owner), keys.task_due(owner), keys.task_facts(owner)),
        (
            task_id.encode(),
            number(version),
            b"" if time_us is None else number(time_us),
            state.encode(),
            context.encode(),
            number(ttl_ms),
        ),
        lambda status, fields: _text(fields[0]) == "1",
    )


class TaskPlace(NamedTuple):
    """A place in the list of an owner: the time of a status in microseconds, -1 for none, and the task."""

    time_us: int
    task_id: str


class TaskPage(NamedTuple):
    """Tasks of a list, the place where it goes on, None at its end, and how many have the least time at least."""

    found: list[TaskPlace]
    then: TaskPlace | None
    all: int


def list_tasks(
    owner: str, state: str, context: str, least_us: int, below: TaskPlace | None, count: int
) -> Op[TaskPage]:
    """Read a part of the list of an owner's tasks that have a state and a context, '' for any; the latest are first."""

    def parse(_: bytes, fields: list[object]) -> TaskPage:
        places = [
            TaskPlace(_int(time), _text(task_id))
            for task_id, time in zip(fields[3::2], fields[4::2], strict=True)
        ]
        time, task_id = _text(fields[0]), _text(fields[1])
        then = TaskPlace(int(time), task_id) if time else None
        return TaskPage(places, then, _int(fields[2]))

    return Op(
        b"ff_list_tasks",
        (keys.task_order(owner), keys.task_facts(owner)),
        (
            state.encode(),
            context.encode(),
            number(least_us),
            b"+inf" if below is None else number(below.time_us),
            b"" if below is None else below.task_id.encode(),
            number(count),
        ),
        parse,
        read_only=True,
    )


class Range(NamedTuple):
    """Both streams of an attempt, each after an id, read atomically (lua/read.lua, ``ff_read_range``).

    *place* is None unless another stream stands where the cursor was taken: then both were read after it. No payload of
    the writers so far is larger than *payload_limit*.
    """

    log: list[list[object]]
    log_to: bytes
    log_more: bool
    live: list[list[object]]
    live_to: bytes
    live_more: bool
    last_ms: int
    last_sequence: int
    visible_sequence: int
    closed_reason: EndReason | None
    lease_left_ms: int | None
    small: bool
    place: tuple[int, int] | None
    payload_limit: int


def read_range(
    execution_id: str,
    attempt_index: int,
    *,
    log_after: bytes,
    live_after: bytes,
    count: int,
    max_bytes: int,
    visibility: str,
    cursor: bytes = b"",
) -> Op[Range]:
    """Read both streams, each after an id of its own; *cursor* is the id of the frame that the reader had last."""

    def parse(_: bytes, fields: list[object]) -> Range:
        log, log_to, log_more, live, live_to, live_more, *rest = fields
        if not isinstance(log, list) or not isinstance(live, list):
            raise TypeError
        last_id, visible, reason, left, small, place, payload_limit = map(_text, rest)
        return Range(
            log,
            _text(log_to).encode(),
            _text(log_more) == "1",
            live,
            _text(live_to).encode(),
            _text(live_more) == "1",
            *entry_id(last_id),
            int(visible),
            cast("EndReason", reason) if reason else None,
            int(left) if left else None,
            small == "1",
            entry_id(place) if place else None,
            int(payload_limit),
        )

    return Op(
        b"ff_read_range",
        (
            keys.core(execution_id),
            keys.stream(execution_id, attempt_index),
            keys.live(execution_id, attempt_index),
            keys.head(execution_id, attempt_index),
        ),
        (
            number(attempt_index),
            log_after,
            live_after,
            number(count),
            number(max_bytes),
            visibility.encode(),
            cursor,
        ),
        parse,
        read_only=True,
    )


def read_summary(execution_id: str, attempt_index: int) -> Op[dict[bytes, bytes]]:
    """Read the summary hash as stored; :func:`ff_fast._core.summary.fold` makes the document."""

    def parse(_: bytes, fields: list[object]) -> dict[bytes, bytes]:
        return _pairs(fields[0])

    return Op(
        b"ff_read_summary",
        (keys.core(execution_id), keys.summary(execution_id, attempt_index)),
        (),
        parse,
        read_only=True,
        large=True,
    )


class State(NamedTuple):
    """Where an execution stands, for those who follow it (lua/read.lua, ``ff_read_state``).

    Attributes:
        state: Its state.
        attempt_index: Attempt that is open or comes next; of an ended execution, the one that ended with it.
        claimed: A worker has claimed that attempt.
        lapsed: Its lease has lapsed, and nobody has ended it yet.
        closed_reason: Why the stream of the attempt ended; None while the execution goes on, as the next three.
        outcome: How the execution ended.
        error: What ended it; None after a success as well.
        failure_class: Class of the failure that ended it; None for any other end.
    """

    state: ExecutionState
    attempt_index: int
    claimed: bool
    lapsed: bool
    closed_reason: EndReason | None
    outcome: CompletionOutcome | None
    error: str | None
    failure_class: FailureClass | None


def read_state(execution_id: str) -> Op[State]:
    """Read where an execution stands."""

    def parse(_: bytes, fields: list[object]) -> State:
        state, index, claimed, lapsed, reason, outcome, error, failure_class = map(_text, fields)
        if bool(reason) != bool(outcome):
            raise ValueError
        return State(
            cast("ExecutionState", state),
            keys.attempt_index(int(index)),
            claimed == "1",
            lapsed == "1",
            cast("EndReason", reason) if reason else None,
            cast("CompletionOutcome", outcome) if outcome else None,
            error or None,
            FailureClass(failure_class) if failure_class else None,
        )

    return Op(b"ff_read_state", (keys.core(execution_id),), (), parse, read_only=True)


def describe_execution(execution_id: str) -> Op[ExecutionDescription]:
    """Read the state of an execution; the server leaves lease ids out."""

    def parse(_: bytes, fields: list[object]) -> ExecutionDescription:
        core, tags, usage, due, suspension = (
            {_text(name): _text(value) for name, value in _pairs(flat).items()}
            for flat in (*fields[:3], *fields[4:6])
        )
        history = tuple(_transition(*_list(entry)) for entry in reversed(_list(fields[3])))
        detail = _pairs(fields[0]).get(b"failure_detail")
        state = cast("ExecutionState", core["state"])
        timeout_ms = int(core["attempt_timeout_ms"])

        def when(field: str | None) -> int | None:
            return int(field) if field else None

        return ExecutionDescription(
            execution_id=execution_id,
            state=state,
            lane=core["lane_id"],
            namespace=core["namespace"],
            priority=int(core["priority"]),
            required_capabilities=CapabilitySet(_listed(core["required_capabilities"])),
            flow_id=core.get("flow_id"),
            parent_id=core.get("parent_id"),
            traceparent=core.get("traceparent"),
            budget_ids=_listed(core.get("budget_ids", "")),
            tags=tags,
            created_at_ms=int(core["created_at"]),
            started_at_ms=when(core.get("started_at")),
            finished_at_ms=when(core.get("completed_at")),
            last_transition_at_ms=int(core["last_transition_at"]),
            delay_until_ms=when(due.get("delay")),
            deadline_at_ms=when(due.get("deadline")),
            attempt_deadline_at_ms=when(due.get("attempt")),
            lease_expires_at_ms=when(due.get("lease")),
            attempt_count=int(core["total_attempt_count"]),
            attempt_index=when(core.get("current_attempt_index")),
            worker_id=core.get("current_worker_id"),
            worker_instance_id=core.get("current_worker_instance_id"),
            lease_epoch=int(core["current_lease_epoch"]),
            retry=RetryPolicy(
                max_retries=int(core["retry_max"]),
                backoff=RetryBackoff(core["retry_backoff"]),
                delay=int(core["retry_delay_ms"]) / 1000,
                multiplier=int(core["retry_multiplier_percent"]) / 100,
                max_delay=int(core["retry_max_delay_ms"]) / 1000,
                jitter_percent=int(core["retry_jitter_percent"]),
                max_reclaims=int(core["max_reclaims"]),
            ),
            retry_count=int(core["retry_count"]),
            reclaim_count=int(core["reclaim_count"]),
            attempt_timeout=timeout_ms / 1000 if timeout_ms else None,
            retention=int(core["retention_ms"]) / 1000,
            outcome=cast("CompletionOutcome | None", core.get("outcome")),
            failure_reason=core.get("failure_reason") or None,
            failure_class=FailureClass(word) if (word := core.get("failure_class")) else None,
            failure_detail=detail or None,
            cancel_requested=core.get("cancel_requested") == "1",
            cancellation_reason=core.get("cancellation_reason") or None,
            cancelled_from=cast("ExecutionState | None", core.get("cancelled_from")),
            progress_percent=when(core.get("progress_percent")),
            progress_message=core.get("progress_message"),
            progress_at_ms=when(core.get("progress_updated_at")),
            suspension=_suspension(suspension, when(due.get("suspension")))
            if state == "suspended"
            else None,
            usage={name: int(amount) for name, amount in usage.items()},
            history=history,
            attempts=attempts_of(history),
        )

    return Op(
        b"ff_describe_execution",
        (
            keys.core(execution_id),
            keys.tags(execution_id),
            keys.usage(execution_id),
            keys.history(execution_id),
        ),
        (),
        parse,
        read_only=True,
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _suspension(fields: Mapping[str, str], timeout_at_ms: int | None) -> SuspensionDescription:
    return SuspensionDescription(
        fields["suspension_id"],
        int(fields["attempt_index"]),
        fields["reason"],
        int(fields["created_at"]),
        timeout_at_ms,
        TimeoutBehavior(fields["timeout_behavior"]),
        tuple(dict.fromkeys(fields["waitpoint_ids"].split())),
        _waits(fields),
        int(fields["needed"]),
        int(fields["received"]),
    )


def _transition(identity: object, flat: object) -> StateTransition:
    entry = {_text(name): _text(value) for name, value in _pairs(flat).items()}
    return StateTransition(
        int(_text(identity).partition("-")[0]),
        cast("ExecutionState", entry["from"]),
        cast("ExecutionState", entry["to"]),
        int(entry["attempt"]),
        entry.get("reason") or None,
        # It may be cut within a letter.
        _cut(entry.get("error", "")) or None,
        FailureClass(word) if (word := entry.get("class")) else None,
    )


def describe_attempt(execution_id: str, attempt_index: int) -> Op[StreamDescription]:
    """Read the state of the streams of one attempt."""

    def parse(_: bytes, fields: list[object]) -> StreamDescription:
        meta, attempt, streams = (
            {_text(name): _text(value) for name, value in _pairs(flat).items()}
            for flat in (fields[0], *fields[5:])
        )
        left = _text(fields[4])
        rate, *window = meta.get("estimator", "").split() or [""]
        ttl_ms, floor, ceiling = map(int, window) if len(window) == 3 else (None, None, None)
        live_first = streams.get("live_first")

        def when(text: str | None) -> int | None:
            return int(text) if text else None

        last_id = meta.get("last_id", "0-0")
        frame_count = entry_id(last_id)[1]
        return StreamDescription(
            last_id=last_id if frame_count else "0-0",
            frame_count=frame_count,
            log_entries=_int(fields[1]),
            live_entries=_int(fields[2]),
            summary_version=_int(fields[3]),
            closed_reason=cast("EndReason | None", meta.get("closed_reason")),
            lease_left=int(left) / 1000 if left else None,
            worker_id=attempt.get("worker_id"),
            worker_instance_id=attempt.get("worker_instance_id"),
            claimed_at_ms=when(attempt.get("started_at")),
            began_at_ms=when(meta.get("created_at")),
            ended_at_ms=when(meta.get("closed_at")),
            log_added=int(streams.get("log_added", 0)),
            log_first_id=streams.get("log_first"),
            lost_frames=int(meta.get("lost_frames", 0)),
            lost_entries=int(meta.get("lost_entries", 0)),
            live_first_sequence=entry_id(live_first)[1]
            - int(streams.get("live_first_frames", 1))
            + 1
            if live_first
            else None,
            live_ttl_ms=ttl_ms,
            live_floor=floor,
            live_ceiling=ceiling,
            live_rate_hz=float(rate) if rate else None,
        )

    return Op(
        b"ff_describe_attempt",
        (
            keys.core(execution_id),
            keys.stream(execution_id, attempt_index),
            keys.live(execution_id, attempt_index),
            keys.head(execution_id, attempt_index),
            keys.summary(execution_id, attempt_index),
            keys.attempt(execution_id, attempt_index),
        ),
        (number(attempt_index),),
        parse,
        read_only=True,
    )


class Filter(NamedTuple):
    """What is listed; None lets all pass."""

    states: tuple[str, ...]
    lane: str | None = None
    namespace: str | None = None
    tag: tuple[str, str] | None = None


class Listed(NamedTuple):
    """A part of the listing of one partition: places with executions, and the place where it continues, None at its end."""

    found: list[tuple[tuple[int, str], ExecutionSummary]]
    then: tuple[int, str] | None


def list_executions(
    partition: int, wanted: Filter, before: tuple[int, str] | None, count: int
) -> Op[Listed]:
    """List executions of a partition behind a place."""
    slot_tag = keys.slot_tag(partition)
    tag_name, tag_value = wanted.tag or ("", "")

    def parse(_: bytes, fields: list[object]) -> Listed:
        ms, identity = _text(fields[0]), _text(fields[1])
        found = []
        for flat in _list(fields[2]):
            told = {_text(name): _text(value) for name, value in _pairs(flat).items()}
            place = int(told["listed_at"]), told["id"]
            # A core with foreign data is passed over: it must not keep the others from being seen.
            with contextlib.suppress(ValueError, LookupError):
                found.append((place, _summary(told)))
        return Listed(found, (int(ms), identity) if ms else None)

    return Op(
        b"ff_list_executions",
        (keys.listed(slot_tag), keys.completions(slot_tag), keys.timers(slot_tag)),
        (
            " ".join(wanted.states).encode(),
            b"" if wanted.lane is None else f" {wanted.lane}".encode(),
            (wanted.namespace or "").encode(),
            tag_name.encode(),
            tag_value.encode(),
            b"" if before is None else number(before[0]),
            b"" if before is None else before[1].encode(),
            number(count),
        ),
        parse,
        read_only=True,
        large=True,
    )


def _summary(told: Mapping[str, str]) -> ExecutionSummary:
    state = cast("ExecutionState", told["state"])

    def when(field: str) -> int | None:
        return int(text) if (text := told.get(field)) else None

    error = told.get("cancellation_reason" if state == "cancelled" else "failure_reason")
    failure_class = told.get("failure_class")
    return ExecutionSummary(
        execution_id=told["id"],
        state=state,
        lane=told["lane_id"],
        namespace=told["namespace"],
        priority=int(told["priority"]),
        flow_id=told.get("flow_id"),
        created_at_ms=int(told["created_at"]),
        started_at_ms=when("started_at"),
        finished_at_ms=when("completed_at"),
        last_transition_at_ms=int(told["last_transition_at"]),
        due_at_ms=when("due"),
        attempt_count=int(told["total_attempt_count"]),
        attempt_index=when("current_attempt_index"),
        retry_count=int(told["retry_count"]),
        worker_id=told.get("current_worker_id"),
        worker_instance_id=told.get("current_worker_instance_id"),
        lease_expires_at_ms=when("lease"),
        error=None if state == "completed" or not error else _cut(error),
        failure_class=FailureClass(failure_class) if failure_class else None,
        progress_percent=when("progress_percent"),
        suspension_reason=_cut(told["reason"]) if "reason" in told else None,
        waiting_for=_waits(told),
    )


def _waits(told: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a suspension waits for, in the order of its condition."""
    return tuple(_cut(told[name]).rstrip() for name in told if name.startswith("waits:"))


def _cut(text: str) -> str:
    """Return a text of which the server has sent the beginning, perhaps up to the middle of a character."""
    return text.removesuffix("\ufffd")


class LanesPart(NamedTuple):
    """What is in the queues and lanes of one partition, a part of it.

    *queues* are lane and requirements as in the keys, with the number that waits and the time of the oldest; *counts*
    are a state, a lane and a number.
    """

    next_queue: str
    next_offset: str
    queues: list[tuple[str, int, int]]
    counts: list[tuple[str, str, int]]


def list_lanes(partition: int, queue_after: str, offset: str) -> Op[LanesPart]:
    """Read how many executions are in which state, in each lane of a partition."""
    slot_tag = keys.slot_tag(partition)

    def parse(_: bytes, fields: list[object]) -> LanesPart:
        queues = list(map(_text, _list(fields[2])))
        counts = list(map(_text, _list(fields[3])))
        return LanesPart(
            _text(fields[0]),
            _text(fields[1]),
            [
                (queue, int(waiting), int(oldest))
                for queue, waiting, oldest in zip(
                    queues[::3], queues[1::3], queues[2::3], strict=True
                )
            ],
            [
                (*name.partition(" ")[::2], int(amount))
                for name, amount in zip(counts[::2], counts[1::2], strict=True)
            ],
        )

    return Op(
        b"ff_list_lanes",
        (keys.listed(slot_tag), keys.queues(slot_tag), keys.timers(slot_tag)),
        (queue_after.encode(), offset.encode()),
        parse,
        read_only=True,
    )


def _list(field: object) -> list[object]:
    if not isinstance(field, list):
        raise TypeError
    return field


def _pairs(flat: object) -> dict[bytes, bytes]:
    if not isinstance(flat, list) or not all(isinstance(part, bytes) for part in flat):
        raise TypeError
    return dict(zip(flat[::2], flat[1::2], strict=True))


def call(op: Op[T]) -> Steps[T]:
    """Make one call, and return its answer."""
    (reply,) = yield Step((op.command(),), large=op.large)
    return op.answer(reply)


def read_payload(execution_id: str) -> Op[bytes]:
    """Read the payload of an execution."""
    return _read_bytes(execution_id, keys.payload(execution_id))


class Input(NamedTuple):
    """What an execution was created with: its payload, and the ``traceparent`` of whoever created it."""

    payload: bytes
    traceparent: str | None


def read_input(execution_id: str) -> Op[Input]:
    """Read the payload of an execution, and where it comes from."""
    op = read_payload(execution_id)

    def parse(status: bytes, fields: list[object]) -> Input:
        return Input(op.parse(status, fields), _text(fields[1]) if len(fields) > 1 else None)

    return op._replace(parse=parse)  # type: ignore[arg-type, return-value]


def read_result(execution_id: str) -> Op[bytes]:
    """Read the result of an execution; empty if it has none."""
    return _read_bytes(execution_id, keys.result(execution_id))


def _read_bytes(execution_id: str, key: bytes) -> Op[bytes]:
    def parse(_: bytes, fields: list[object]) -> bytes:
        payload = fields[0]
        if not isinstance(payload, bytes):
            raise TypeError
        return payload

    return Op(
        b"ff_read_payload", (keys.core(execution_id), key), (), parse, read_only=True, large=True
    )


def claim_execution(
    execution_id: str,
    *,
    lane: str,
    worker_id: str,
    worker_instance_id: str,
    lease_id: str,
    lease_ttl_ms: int,
    attempt_id: str,
    reclaim: bool,
    capabilities: tuple[str, ...],
) -> Op[tuple[Handle | None, Hints]]:
    """Claim one execution by its id; with *reclaim*, take it over from a worker whose lease has lapsed.

    Answers no handle where the lapse was one too many, which has ended the execution.
    """

    def parse(status: bytes, fields: list[object]) -> tuple[Handle | None, Hints]:
        if status == b"ENDED":
            return None, _hints(fields, 0)
        return _claimed_handle(fields, lease_id, lease_ttl_ms, lane, worker_instance_id), []

    return Op(
        b"ff_claim_execution",
        (keys.core(execution_id),),
        (
            worker_id.encode(),
            worker_instance_id.encode(),
            lease_id.encode(),
            number(lease_ttl_ms),
            attempt_id.encode(),
            b"1" if reclaim else b"0",
            *(token.encode() for token in capabilities),
        ),
        parse,
    )


def _claimed_handle(
    fields: list[object], lease_id: str, lease_ttl_ms: int, lane: str, worker_instance_id: str
) -> Handle:
    return Handle.encode(
        kind=HandleKind.RESUMED if _text(fields[5]) == "resumed" else HandleKind.FRESH,
        execution_id=_text(fields[0]),
        attempt_index=_int(fields[1]),
        attempt_id=_text(fields[2]),
        lease_id=lease_id,
        lease_epoch=_int(fields[3]),
        lease_ttl_ms=lease_ttl_ms,
        lane_id=lane,
        worker_instance_id=worker_instance_id,
    )


def report_progress(attempt: Attempt, percent: int | None, message: str) -> Op[None]:
    """Set progress; None and '' keep the stored value."""
    return Op(
        b"ff_report_progress",
        (keys.core(attempt.execution_id),),
        (*attempt.fence, b"" if percent is None else number(percent), message.encode()),
        lambda status, fields: None,
    )


def delay_execution(attempt: Attempt, delay_ms: int, last_id: bytes = b"") -> Op[int]:
    """Release the lease; the same attempt continues after *delay_ms*. Answers that time, in ms since the epoch."""
    return Op(
        b"ff_delay_execution",
        (keys.core(attempt.execution_id),),
        (*attempt.fence, last_id, number(delay_ms)),
        lambda status, fields: _int(fields[1]),
    )


def wait_children(attempt: Attempt, last_id: bytes = b"") -> Op[tuple[None, Hints]]:
    """Release the lease; the same attempt continues when the last child has ended."""
    return Op(
        b"ff_wait_children",
        (keys.core(attempt.execution_id),),
        (*attempt.fence, last_id),
        lambda status, fields: (None, _hints(fields, 1)),
    )


def cancel_execution(
    execution_id: str, reason: str, grace_ms: int, lease_id: str = ""
) -> Op[tuple[CancelOutcome, Hints]]:
    """Cancel an execution; with a grace, ask its worker first. The holder of its lease, which needs no push, names it."""

    def parse(status: bytes, fields: list[object]) -> tuple[CancelOutcome, Hints]:
        state = cast("ExecutionState", _text(fields[1]))
        outcome = CancelOutcome(cancelled=status == b"OK", previous_state=state)
        return outcome, _hints(fields, 2)

    return Op(
        b"ff_cancel_execution",
        (keys.core(execution_id),),
        (reason.encode(), number(grace_ms), lease_id.encode()),
        parse,
    )


def create_waitpoint(
    attempt: Attempt, waitpoint_id: str, expires_ms: int, kid: str, secret: str
) -> Op[PendingWaitpoint]:
    """Create a pending waitpoint. *kid* and *secret* become the signing key of a partition without one."""

    def parse(_: bytes, fields: list[object]) -> PendingWaitpoint:
        return PendingWaitpoint(waitpoint_id, WaitpointHmac(_text(fields[0])))

    return Op(
        b"ff_create_waitpoint",
        (keys.core(attempt.execution_id),),
        (
            *attempt.fence,
            waitpoint_id.encode(),
            number(expires_ms),
            kid.encode(),
            secret.encode(),
        ),
        parse,
    )


def rotate_waitpoint_secret(partition: int, kid: str, secret: str, grace_ms: int) -> Op[str]:
    """Sign with *secret* from now on in one partition; answers the previous kid, '' for none."""
    return Op(
        b"ff_rotate_waitpoint_secret",
        (keys.waitpoint_secrets(keys.slot_tag(partition)),),
        (kid.encode(), secret.encode(), number(grace_ms)),
        lambda status, fields: _text(fields[0]),
    )


def suspend_execution(
    attempt: Attempt,
    suspension_id: str,
    condition: ResumeCondition,
    timeout_ms: int,
    behavior: TimeoutBehavior,
    reason: str,
    last_id: bytes = b"",
) -> Op[tuple[bool | None, str]]:
    """Suspend on a condition; answers whether it was met already, and the id of the suspension.

    If the condition was met, the lease continues. A repeat answers the id of the first call. None says that there are
    more early signals than one call applies: send it again.
    """
    nodes: list[bytes] = []
    leaves: list[bytes] = []
    count = 0

    def add(node: ResumeCondition, parent: int) -> None:
        nonlocal count
        index = count
        count += 1
        nodes.extend((number(parent), number(node.needed), node.distinct.value.encode()))
        for member in node.members:
            if isinstance(member, ResumeCondition):
                add(member, index)
            else:
                leaves.extend(
                    (
                        number(index),
                        member.hmac_token.reveal().encode(),
                        member.kind.value.encode(),
                        member.matcher,
                    )
                )

    add(condition, -1)
    return Op(
        b"ff_suspend_execution",
        (keys.core(attempt.execution_id),),
        (
            *attempt.fence,
            last_id,
            suspension_id.encode(),
            number(timeout_ms),
            behavior.value.encode(),
            reason.encode(),
            number(count),
            *nodes,
            *leaves,
        ),
        lambda status, fields: (
            None if status == b"MORE" else status == b"ALREADY_SATISFIED",
            _text(fields[1]),
        ),
    )


def deliver_signal(
    execution_id: str,
    waitpoint: PendingWaitpoint,
    *,
    signal_id: str,
    signal_name: str,
    category: str,
    source_type: str,
    source_identity: str,
    correlation_id: str,
    idempotency_key: str,
    payload: bytes | None,
) -> Op[tuple[SignalOutcome, Hints]]:
    """Deliver a signal to a waitpoint."""

    def parse(status: bytes, fields: list[object]) -> tuple[SignalOutcome, Hints]:
        effect = cast("SignalEffect", _text(fields[1]))
        outcome = SignalOutcome(_text(fields[0]), effect, duplicate=status == b"DUPLICATE")
        return outcome, _hints(fields, 2)

    return Op(
        b"ff_deliver_signal",
        (keys.core(execution_id),),
        (
            waitpoint.waitpoint_id.encode(),
            waitpoint.hmac_token.reveal().encode(),
            signal_id.encode(),
            signal_name.encode(),
            category.encode(),
            source_type.encode(),
            source_identity.encode(),
            correlation_id.encode(),
            idempotency_key.encode(),
            b"0" if payload is None else b"1",
            payload or b"",
        ),
        parse,
    )


_SIGNAL_BYTES = 1 << 20


def observe_signals(
    attempt: Attempt, offset: int = 0
) -> Op[tuple[tuple[ResumeSignal, ...], int | None]]:
    """Read signals that ended the suspension before this lease; answers also the offset of the next page."""

    def parse(_: bytes, fields: list[object]) -> tuple[tuple[ResumeSignal, ...], int | None]:
        found = []
        for flat in _list(fields[0]):
            pairs = _pairs(flat)
            texts = {
                name: pairs[name.encode()].decode("utf-8", "replace")
                for name in (
                    "signal_id",
                    "signal_name",
                    "signal_category",
                    "source_type",
                    "source_identity",
                    "correlation_id",
                )
            }
            found.append(
                ResumeSignal(
                    **texts, accepted_at=int(pairs[b"accepted_at"]), payload=pairs.get(b"payload")
                )
            )
        following = _text(fields[1])
        return tuple(found), int(following) if following else None

    return Op(
        b"ff_observe_signals",
        (keys.core(attempt.execution_id),),
        (*attempt.fence, number(offset), number(_SIGNAL_BYTES)),
        parse,
        read_only=True,
        large=True,
    )


def further_signals(attempt: Attempt, offset: int | None) -> Steps[tuple[ResumeSignal, ...]]:
    """Read the pages of `observe_signals` from *offset* on; None is the end."""
    found: tuple[ResumeSignal, ...] = ()
    while offset is not None:
        some, offset = yield from call(observe_signals(attempt, offset))
        found += some
    return found


def _amounts(usage: UsageDimensions) -> list[bytes]:
    amounts = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
    if usage.wall_ms is not None:
        amounts["wall_ms"] = usage.wall_ms
    amounts |= usage.custom
    return [
        part
        for name, amount in amounts.items()
        if amount
        for part in (name.encode(), number(amount))
    ]


class UsageCheck(NamedTuple):
    """Answer of the execution's own ledger."""

    already_applied: bool
    budget_ids: tuple[str, ...]


def report_usage(
    attempt: Attempt, usage: UsageDimensions, report_id: str, *, apply: bool
) -> Op[UsageCheck]:
    """Check a report against the fence, or add it to the execution's ledger."""
    kind = b"keyed" if usage.dedup_key else b"once"

    def parse(status: bytes, fields: list[object]) -> UsageCheck:
        return UsageCheck(status == b"ALREADY_APPLIED", tuple(_text(fields[0]).split()))

    return Op(
        b"ff_report_usage",
        (keys.core(attempt.execution_id),),
        (
            *attempt.fence,
            b"apply" if apply else b"check",
            kind,
            report_id.encode(),
            *_amounts(usage),
        ),
        parse,
    )


def create_budget(budget_id: str, hard: Mapping[str, int], soft: Mapping[str, int]) -> Op[None]:
    """Create a budget, or replace its limits."""
    limits = [
        part
        for kind, given in (("hard", hard), ("soft", soft))
        for name, limit in given.items()
        for part in (f"{kind}:{name}".encode(), number(limit))
    ]
    return Op(
        b"ff_create_budget",
        (keys.budget_limits(budget_id), keys.budget_usage(budget_id)),
        tuple(limits),
        lambda status, fields: None,
    )


def charge_budget(
    budget_id: str, execution_id: str, report_id: str, usage: UsageDimensions, window_ms: int
) -> Op[ReportUsageResult]:
    """Add a report of an execution to a budget, completely or not at all, once for each *report_id*."""

    def parse(status: bytes, fields: list[object]) -> ReportUsageResult:
        verdict = UsageVerdict(status.decode().lower())
        if verdict in (UsageVerdict.OK, UsageVerdict.ALREADY_APPLIED):
            return ReportUsageResult(verdict)
        return ReportUsageResult(
            verdict, budget_id, _text(fields[0]), _int(fields[1]), _int(fields[2])
        )

    return Op(
        b"ff_charge_budget",
        _budget_keys(budget_id, execution_id),
        (report_id.encode(), number(window_ms), *_amounts(usage)),
        parse,
    )


def release_charge(budget_id: str, execution_id: str, report_id: str) -> Op[None]:
    """Release what a report of an execution has charged."""
    return Op(
        b"ff_release_charge",
        _budget_keys(budget_id, execution_id),
        (report_id.encode(),),
        lambda status, fields: None,
    )


def _budget_keys(budget_id: str, execution_id: str) -> tuple[bytes, ...]:
    return (
        keys.budget_limits(budget_id),
        keys.budget_usage(budget_id),
        keys.budget_charges(budget_id, execution_id),
    )


def create_flow(flow_id: str, slot_tag: str, namespace: str) -> Op[str]:
    """Create a flow, or find that it exists; answers its state."""
    return Op(
        b"ff_create_flow",
        (keys.flow(slot_tag, flow_id),),
        (flow_id.encode(), namespace.encode()),
        lambda status, fields: _text(fields[0]),
    )


def cancel_flow(
    flow_id: str, slot_tag: str, reason: str, policy: CancelFlowPolicy, backlog_ms: int
) -> Op[tuple[CancelFlowPolicy, int]]:
    """Cancel the flow itself: no member is claimed afterwards. Answers the policy and the number of open members."""
    return Op(
        b"ff_cancel_flow",
        (
            keys.flow(slot_tag, flow_id),
            keys.flow_members(slot_tag, flow_id),
            keys.flow_open(slot_tag, flow_id),
            keys.timers(slot_tag),
        ),
        (reason.encode(), policy.value.encode(), number(backlog_ms)),
        lambda status, fields: (CancelFlowPolicy(_text(fields[0])), _int(fields[1])),
    )


def cancel_members(flow_id: str, slot_tag: str, count: int) -> Op[tuple[tuple[int, int], Hints]]:
    """Cancel members of a cancelled flow; answers how many, and whether more are left."""
    return Op(
        b"ff_cancel_members",
        (keys.flow(slot_tag, flow_id), keys.flow_open(slot_tag, flow_id), keys.timers(slot_tag)),
        (number(count),),
        lambda status, fields: ((_int(fields[0]), _int(fields[1])), _hints(fields, 2)),
    )


class FlowCounts(NamedTuple):
    """State of a flow, and its numbers of members."""

    state: FlowState
    member_count: int
    open_count: int


def describe_flow(flow_id: str, slot_tag: str) -> Op[FlowCounts]:
    """Read the state of a flow, and how many members it has."""

    def parse(_: bytes, fields: list[object]) -> FlowCounts:
        state = cast("FlowState", _text(fields[0]))
        return FlowCounts(state, _int(fields[1]), _int(fields[2]))

    return Op(
        b"ff_describe_flow",
        (
            keys.flow(slot_tag, flow_id),
            keys.flow_members(slot_tag, flow_id),
            keys.flow_open(slot_tag, flow_id),
        ),
        (),
        parse,
        read_only=True,
    )


def scan_page(page: Sequence[object]) -> tuple[bytes, list[str]]:
    """Return the next cursor and the members of an answer to SSCAN.

    Raises:
        ProtocolError: It has another form.
    """
    if len(page) == 2 and isinstance(page[0], bytes) and isinstance(page[1], list):
        return page[0], texts(page[1])
    raise ProtocolError


def texts(page: Sequence[object]) -> list[str]:
    """Return the members in the answer to a plain command."""
    return [_text(member) for member in page]


def set_tags(execution_id: str, tags: Mapping[str, str]) -> Op[int]:
    """Set tags; answers the number of tags of the execution."""
    return Op(
        b"ff_set_tags",
        (keys.core(execution_id), keys.tags(execution_id)),
        tuple(part.encode() for pair in tags.items() for part in pair),
        lambda status, fields: _int(fields[0]),
    )


def read_tags(execution_id: str, name: str = "") -> Op[dict[str, str]]:
    """Read the tags of an execution, or the one of that *name*."""

    def parse(_: bytes, fields: list[object]) -> dict[str, str]:
        return {_text(name): _text(value) for name, value in _pairs(fields[0]).items()}

    return Op(
        b"ff_read_tags",
        (keys.core(execution_id), keys.tags(execution_id)),
        (name.encode(),),
        parse,
        read_only=True,
    )


def fire_timer(
    slot_tag: str, member: bytes, kind: str, execution_id: str, scope: ScannerFilter
) -> Op[tuple[str, Hints]]:
    """Fire one due timer; answers ``done``, ``later``, ``skipped`` or ``deferred``."""
    tag_name, tag_value = scope.instance_tag or ("", "")
    return Op(
        b"ff_fire_timer",
        (keys.timers(slot_tag), keys.core(execution_id)),
        (
            member,
            kind.encode(),
            (scope.namespace or "").encode(),
            tag_name.encode(),
            tag_value.encode(),
        ),
        lambda status, fields: (_text(fields[0]), _hints(fields, 1)),
    )
