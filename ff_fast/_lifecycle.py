"""Operations of several steps, without I/O: creating with a hint, and claiming through the ready queue.

A lane's ready queue is a sorted set of hints: which partitions have work, scored by their best execution. The work
itself is in the partitions' eligible sets, so a hint that is lost delays work until the next sweep over the
partitions, and a stale one costs one empty claim.
"""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple, TypeVar, cast

from ff_fast import keys, ops
from ff_fast._hot.resp import pack_command
from ff_fast._steps import Flow, Pause, Step
from ff_fast.errors import (
    DeadlineExceeded,
    ExecutionNotFound,
    FFError,
    InternalFunctionError,
    InvalidCursor,
    Outcome,
    ProtocolError,
    from_server_error,
)
from ff_fast.types import (
    CancelFlowOutcome,
    CancelFlowPolicy,
    CapabilitySet,
    CompletionPayload,
    Handle,
    ReclaimGrant,
    ReclaimToken,
    ReportUsageResult,
    ScannerFilter,
    UsageDimensions,
    UsageVerdict,
)

T = TypeVar("T")

SWEEP_EVERY_S = 5.0
"""How often one worker looks at all partitions while it finds no hint: 256 small reads in one round trip."""

_SWEEP_IMMEDIATE_S = 1.0
_SWEEP_BUSY_S = 30.0
_MISFIT_PAUSE_S = 0.05


class Sweeper:
    """When a backend looked at all partitions of a lane last."""

    __slots__ = ("_at", "_seen", "partitions")

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self._at: dict[str, float] = {}
        self._seen: dict[str, float] = {}

    def due(self, lane: str, every_s: float) -> bool:
        """Whether a look is due, which then counts as taken; the first one always is."""
        now = time.monotonic()
        if now - self._at.get(lane, float("-inf")) < every_s:
            return False
        self._at[lane] = now
        return True

    def overdue(self, lane: str) -> bool:
        """Whether a lane that never ran dry has had no look for long; the time counts from its first claim."""
        if lane not in self._seen:
            self._seen[lane] = time.monotonic()
        return time.monotonic() - self._seen[lane] >= _SWEEP_BUSY_S and self.due(
            lane, _SWEEP_BUSY_S
        )


class ClaimRequest(NamedTuple):
    """What a worker asks for, checked."""

    lane: str
    worker_id: str
    worker_instance_id: str
    lease_ttl_ms: int
    capabilities: CapabilitySet
    max_wait_s: float | None


def hint(lane: str, partition: int, score: bytes) -> bytes:
    """Return the command that tells a lane of work: the best score of a partition wins."""
    return pack_command(b"ZADD", keys.ready(lane), b"LT", score, b"%d" % partition)


def hinted(op: ops.Op[tuple[T, ops.Hints]], partition: int) -> Flow[T]:
    """One call on a partition, after which its executions may wait for workers: their lanes are told."""
    (reply,) = yield Step(op.request())
    value, hints = op.answer(reply)
    yield from _tell(hints, partition)
    return value


def _tell(hints: ops.Hints, partition: int) -> Flow[None]:
    if hints:
        commands = [hint(lane, partition, score) for lane, score in hints]
        for reply in (yield Step(b"".join(commands), replies=len(commands))):
            checked(reply)


def create(op: ops.Op[tuple[None, ops.Hints]], execution_id: str) -> Flow[str]:
    """Create an execution, then tell its lane; a repeat tells it again."""
    yield from hinted(op, keys.partition_index(execution_id))
    return execution_id


def claim(request: ClaimRequest, sweeper: Sweeper) -> Flow[Handle | None]:
    """Claim the best execution that a hint leads to; None where there is none within the wait."""
    lane = request.lane
    ready = keys.ready(lane)
    deadline = time.monotonic() + (request.max_wait_s or 0.0)
    if sweeper.overdue(lane):
        # A lane that never runs dry would else never find a hint that was lost.
        yield from _sweep(lane, sweeper.partitions)
    while True:
        misfits: set[int] = set()
        popped = yield from _checked(Step(pack_command(b"ZPOPMIN", ready)))
        left = deadline - time.monotonic()
        if not popped:
            every = _SWEEP_IMMEDIATE_S if request.max_wait_s is None else SWEEP_EVERY_S
            if sweeper.due(lane, every):
                if (yield from _sweep(lane, sweeper.partitions)):
                    continue
            elif left > 0:
                block = min(left, SWEEP_EVERY_S)
                popped = yield from _checked(
                    Step(pack_command(b"BZPOPMIN", ready, b"%.3f" % block), block_s=block)
                )
                # BZPOPMIN names the key first.
                popped = popped[1:] if popped else popped
        if popped:
            partition = int(popped[0])
            claimed = yield from _claim_partition(request, partition)
            if claimed.handle is None and claimed.next_score is None:
                # A stale hint; it is gone now.
                continue
            if claimed.handle is None:
                # Somebody else may be able to do what is there; look for other work before the next wait.
                misfits.add(partition)
                claimed = yield from _claim_elsewhere(request, misfits)
            if claimed.handle is not None:
                return claimed.handle
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        if misfits:
            yield Pause(min(left, _MISFIT_PAUSE_S))


def _claim_elsewhere(request: ClaimRequest, misfits: set[int]) -> Flow[ops.Claimed]:
    """Try the hints of the partitions that are not among *misfits*, which those without fitting work join."""
    ready = keys.ready(request.lane)
    claimed = ops.Claimed(None, None, None)
    for other in (yield from _checked(Step(pack_command(b"ZRANGE", ready, b"0", b"-1")))):
        if int(other) in misfits:
            continue
        misfits.add(int(other))
        # Taken as by a pop, so that a stale hint behind one that nobody can use goes too.
        (taken,) = yield Step(pack_command(b"ZREM", ready, other))
        checked(taken)
        if taken:
            claimed = yield from _claim_partition(request, int(other))
            if claimed.handle is not None:
                break
    return claimed


def _claim_partition(request: ClaimRequest, partition: int) -> Flow[ops.Claimed]:
    """One claim on a partition; a hint of what stays there goes back to the ready queue."""
    offset = 0
    while True:
        op = ops.claim(
            partition,
            lane=request.lane,
            worker_id=request.worker_id,
            worker_instance_id=request.worker_instance_id,
            lease_id=keys.new_uuid(),
            lease_ttl_ms=request.lease_ttl_ms,
            attempt_id=keys.new_uuid(),
            capabilities=request.capabilities.tokens,
            offset=offset,
        )
        (reply,) = yield Step(op.request())
        answer = op.answer(reply)
        if answer.handle is not None or answer.next_offset is None:
            break
        offset = answer.next_offset
    if answer.next_score is not None:
        yield from _checked(Step(hint(request.lane, partition, answer.next_score)))
    return answer


def _sweep(lane: str, partitions: int) -> Flow[bool]:
    """Look at the head of every partition and put the hints that are missing; True where there is work."""
    request = b"".join(
        pack_command(b"ZRANGE", keys.eligible(keys.tag_of(index), lane), b"0", b"0", b"WITHSCORES")
        for index in range(partitions)
    )
    heads = yield Step(request, replies=partitions)
    hints = []
    for index, head in enumerate(heads):
        best = checked(head)
        if best:
            hints.append(hint(lane, index, best[1]))
    if hints:
        yield Step(b"".join(hints), replies=len(hints))
    return bool(hints)


def _checked(step: Step) -> Flow[list[bytes]]:
    (reply,) = yield step
    return checked(reply)


def _server_ms() -> Flow[int]:
    """Ask for the server's time, in ms since the epoch."""
    (reply,) = yield Step(pack_command(b"TIME"))
    seconds, micros = checked(reply)
    return int(seconds) * 1000 + int(micros) // 1000


def checked(reply: object) -> list[bytes]:
    """Return the list that a plain command answered, empty for a number or nothing.

    Raises:
        FFError: The server refused the command, or the reply is something else.
    """
    if isinstance(reply, Exception):
        raise from_server_error(str(reply))
    if reply is None or isinstance(reply, int):
        return []
    if not isinstance(reply, list):
        raise ProtocolError
    return reply


def report_usage(attempt: ops.Attempt, usage: UsageDimensions) -> Flow[ReportUsageResult]:
    """Charge every budget of the execution, then its own ledger; a hard limit takes back what was charged before it.

    The budgets live in slots of their own, so this is several calls; each applies once for the report's key, so
    repeating the report after a lost reply completes it.
    """
    dedup_key = usage.dedup_key or ""
    check = ops.report_usage(attempt, usage, dedup_key, apply=False)
    (reply,) = yield Step(check.request())
    known = check.answer(reply)
    if known.already_applied:
        return ReportUsageResult(UsageVerdict.ALREADY_APPLIED)
    result = ReportUsageResult(UsageVerdict.OK)
    charge_key = f"{attempt.execution_id}:{dedup_key}"
    charged: list[str] = []
    try:
        for budget_id in known.budget_ids:
            charge = ops.charge_budget(budget_id, charge_key, usage, _DEDUP_TTL_MS)
            (reply,) = yield Step(charge.request())
            answer = charge.answer(reply)
            if answer.verdict is UsageVerdict.HARD_BREACH:
                yield from _release(charged, charge_key)
                return answer
            charged.append(budget_id)
            if answer.verdict is UsageVerdict.SOFT_BREACH and result.verdict is UsageVerdict.OK:
                result = answer
        apply = ops.report_usage(attempt, usage, dedup_key, apply=True)
        (reply,) = yield Step(apply.request())
        apply.answer(reply)
    except FFError as error:
        # A call whose fate is unknown is repeated by the caller, which completes what it began.
        if error.outcome is Outcome.NOT_APPLIED and not error.retryable:
            yield from _release(charged, charge_key)
        raise
    return result


def _release(budget_ids: list[str], charge_key: str) -> Flow[None]:
    """Take back what one report has charged to these budgets."""
    for budget_id in budget_ids:
        yield from ops.call(ops.release_charge(budget_id, charge_key))


_DEDUP_TTL_MS = 86_400_000
_MEMBERS_A_CALL = 100
# A supervisor takes over the cancellation of members that its caller has not finished by then.
_BACKLOG_MS = 2_000


def cancel_flow(
    flow_id: str, tag: str, reason: str, policy: CancelFlowPolicy, wait_s: float | None
) -> Flow[CancelFlowOutcome]:
    """Cancel a flow; then, for up to *wait_s*, cancel its members and wait until those it concerns have ended.

    Raises:
        DeadlineExceeded: Members had not ended in time; a supervisor goes on.
    """
    cancel = ops.cancel_flow(flow_id, tag, reason, policy, _BACKLOG_MS)
    (reply,) = yield Step(cancel.request())
    held, still_open = cancel.answer(reply)
    cancelled = 0
    if wait_s is None or held is CancelFlowPolicy.FLOW_ONLY:
        return CancelFlowOutcome(held, 0, still_open)
    deadline = time.monotonic() + wait_s
    while True:
        count, left = yield from hinted(
            ops.cancel_members(flow_id, tag, _MEMBERS_A_CALL), keys.index_of(tag)
        )
        cancelled += count
        if left == 0:
            break
        if time.monotonic() >= deadline:
            raise DeadlineExceeded
    describe = ops.describe_flow(flow_id, tag)
    (reply,) = yield Step(describe.request())
    return CancelFlowOutcome(held, cancelled, len(describe.answer(reply).open_members))


class Supervision:
    """What a supervisor does in one round: it reads what is due in every partition, and fires it.

    Args:
        partitions: How many partitions there are.
        scope: Which executions it looks after.
    """

    __slots__ = ("_partitions", "_scope")

    def __init__(self, partitions: int, scope: ScannerFilter) -> None:
        self._partitions = partitions
        self._scope = scope

    def round(self) -> Flow[int]:
        """Fire every timer that is due; returns how many had something to do."""
        now = b"%d" % (yield from _server_ms())
        offsets = dict.fromkeys(range(self._partitions), 0)
        fired = 0
        while offsets:
            request = b"".join(
                pack_command(
                    b"ZRANGEBYSCORE", keys.timers(keys.tag_of(index)), b"-inf", now,
                    b"LIMIT", b"%d" % offset, b"%d" % _DUE_A_CALL,
                )
                for index, offset in offsets.items()
            )  # fmt: skip
            pages = yield Step(request, replies=len(offsets))
            following: dict[int, int] = {}
            for (index, offset), page in zip(offsets.items(), pages, strict=True):
                members = checked(page)
                if members:
                    stayed, done = yield from self._fire(index, members)
                    fired += done
                    if len(members) == _DUE_A_CALL:
                        # What is another supervisor's, or not due yet, stays where it is: go on behind it.
                        following[index] = offset + stayed
            offsets = following
        return fired

    def _fire(self, partition: int, members: list[bytes]) -> Flow[tuple[int, int]]:
        tag = keys.tag_of(partition)
        stayed = done = 0
        hints: ops.Hints = []
        timers = []
        for member in members:
            kind, _, rest = member.decode("utf-8", "replace").partition(":")
            if kind == "flow" and re.fullmatch(r"[0-9a-f-]{36}", rest):
                try:
                    left = yield from self._cancel_members(rest, partition)
                except InternalFunctionError:
                    left = None
                stayed += left != 0
                done += left is not None
                continue
            found = re.fullmatch(r"(\{fp:\d+\}:[0-9a-f-]{36})(?::(.*))?", rest)
            # What names nothing of this partition is dropped by the call.
            execution_id, more = f"{tag}:", ""
            if found and found[1].startswith(f"{tag}:"):
                execution_id, more = found[1], found[2] or ""
            timers.append(ops.fire_timer(tag, member, kind, execution_id, more, self._scope))
        replies: list[object] = []
        if timers:
            replies = yield Step(b"".join(op.request() for op in timers), replies=len(timers))
        for op, reply in zip(timers, replies, strict=True):
            try:
                what, told = op.answer(reply)
            except InternalFunctionError:
                # Foreign data in its keys: it stays where it is, and those behind it are fired.
                stayed += 1
                continue
            hints += told
            stayed += what == "skipped" or what == "later"
            done += what == "done"
        yield from _tell(hints, partition)
        return stayed, done

    def _cancel_members(self, flow_id: str, partition: int) -> Flow[int | None]:
        """Cancel some members of a cancelled flow; 0 where none is left, None for another supervisor's flow."""
        tag = keys.tag_of(partition)
        if self._scope.namespace is not None:
            (reply,) = yield Step(pack_command(b"HGET", keys.flow(tag, flow_id), b"namespace"))
            if isinstance(reply, bytes) and reply != self._scope.namespace.encode():
                return None
        _, left = yield from hinted(ops.cancel_members(flow_id, tag, _MEMBERS_A_CALL), partition)
        return left


_DUE_A_CALL = 100


_START = "0-0"
_LAST_OF_A_MS = 10**16 - 1

COMPLETION_BLOCK_MS = 5_000
"""How long a subscription blocks on the server at the most."""


class CompletionCore:
    """A subscriber to the executions that end, without I/O: what to ask next, and what the answer brought.

    One read goes over the completion streams of all partitions. The cursor is where it began, by the server's clock,
    and the newest id of every partition that has brought something since.

    Args:
        partitions: How many partitions there are.
        after: Cursor of an earlier subscription; None begins now, ``start`` with everything that is kept.
        scope: Which executions are wanted.
    """

    __slots__ = ("_base", "_ids", "_partitions", "_scope", "_unsure")

    ended = False

    def __init__(self, partitions: int, after: str | None, scope: ScannerFilter) -> None:
        self._partitions = partitions
        self._scope = scope
        self._ids: dict[int, str] = {}
        self._base: str | None = None
        # Whether what comes next may have been trimmed since the cursor was made.
        self._unsure = after is not None
        if after == "start":
            self._base = _START
        elif after is not None:
            found = None
            if isinstance(after, str):
                found = re.fullmatch(
                    r"(\d{1,16}-\d{1,16})((?:,\d{1,5}:\d{1,16}-\d{1,16})*)", after, re.ASCII
                )
            if found is None:
                raise InvalidCursor("after must be a cursor of a completion, 'start' or None.")
            self._base = found[1]
            for part in found[2].split(",")[1:]:
                index, _, identity = part.partition(":")
                if int(index) >= partitions:
                    raise InvalidCursor("after is a cursor of a deployment with more partitions.")
                self._ids[int(index)] = identity

    def restart(self) -> None:
        """The connection was lost: what was not delivered was not passed either, but may be gone by now."""
        self._unsure = True

    def read(self) -> Flow[list[CompletionPayload]]:
        """Wait for up to :data:`COMPLETION_BLOCK_MS`; returns what ended since, each with the cursor behind it."""
        if self._base is None:
            now = yield from _server_ms()
            # Below every id from now on: the first of this millisecond may be still to come.
            self._base = f"{now - 1}-{_LAST_OF_A_MS}"
        indexes = range(self._partitions)
        if self._unsure:
            yield from self._check_kept(self._base)
            self._unsure = False
        request = pack_command(
            b"XREAD", b"COUNT", b"100", b"BLOCK", b"%d" % COMPLETION_BLOCK_MS, b"STREAMS",
            *(keys.completions(keys.tag_of(index)) for index in indexes),
            *(self._ids.get(index, self._base).encode() for index in indexes),
        )  # fmt: skip
        (reply,) = yield Step(request, block_s=COMPLETION_BLOCK_MS / 1000)
        streams = cast("list[tuple[bytes, list[tuple[bytes, list[bytes]]]]]", checked(reply))
        ids = dict(self._ids)
        found: list[CompletionPayload] = []
        for name, entries in streams:
            index = keys.index_of(name.decode())
            for identity, flat in entries:
                ids[index] = identity.decode()
                cursor = ",".join([self._base, *(f"{at}:{place}" for at, place in ids.items())])
                fields = {
                    key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)
                }
                completion = yield from _completion_of(fields, cursor, self._scope)
                if completion is not None:
                    found.append(completion)
        self._ids = ids
        return found

    def _check_kept(self, base: str) -> Flow[None]:
        """Raise ``InvalidCursor`` where what comes next may have been trimmed."""
        names = [keys.completions(keys.tag_of(index)) for index in range(self._partitions)]
        request = b"".join(pack_command(b"XINFO", b"STREAM", name) for name in names)
        for index, reply in enumerate((yield Step(request, replies=len(names)))):
            if isinstance(reply, Exception) and "no such key" in str(reply):
                continue
            flat = cast("list[Any]", checked(reply))
            about = dict(zip(flat[::2], flat[1::2], strict=True))
            first = about[b"recorded-first-entry-id"].decode()
            # The server does not say what was trimmed last; of thousands that may be, the one before the first.
            trimmed = about[b"entries-added"] > about[b"length"]
            here = self._ids.get(index, base)
            if trimmed and here != _START and ops.entry_id(here) < ops.entry_id(first):
                raise InvalidCursor(
                    "Completions behind the cursor are not kept any more; begin with 'start' and"
                    " compare with what you have."
                )


def _completion_of(
    fields: dict[str, bytes], cursor: str, scope: ScannerFilter
) -> Flow[CompletionPayload | None]:
    """Make the value of a record; None where the filter leaves it out. A large result is read from the execution."""
    execution_id = fields["execution_id"].decode()
    if scope.namespace is not None and fields["namespace"].decode() != scope.namespace:
        return None
    try:
        if scope.instance_tag is not None:
            tags = yield from ops.call(ops.read_tags(execution_id))
            if tags.get(scope.instance_tag[0]) != scope.instance_tag[1]:
                return None
        payload = fields.get("payload")
        if "payload_bytes" in fields and payload is None:
            payload = yield from ops.call(ops.read_result(execution_id))
    except ExecutionNotFound:
        # Its retention is over: what the record says is all there is, and a filter by tag cannot be answered.
        if scope.instance_tag is not None:
            return None
        payload = None
    flow_id = fields.get("flow_id")
    return CompletionPayload(
        execution_id=execution_id,
        outcome=fields["outcome"].decode(),
        payload_bytes=payload,
        produced_at_ms=int(fields["produced_at_ms"]),
        flow_id=None if flow_id is None else flow_id.decode(),
        cursor=cursor,
    )


def find_reclaimable(partitions: int, limit: int) -> Flow[list[ReclaimToken]]:
    """Find active executions whose lease has lapsed, over all partitions, at most *limit*."""
    now = yield from _server_ms()
    tokens: list[ReclaimToken] = []
    indexes, offset = list(range(partitions)), 0
    while indexes:
        request = b"".join(
            pack_command(
                b"ZRANGEBYSCORE", keys.timers(keys.tag_of(index)), b"-inf", b"%d" % now,
                b"LIMIT", b"%d" % offset, b"%d" % _DUE_A_CALL,
            )
            for index in indexes
        )  # fmt: skip
        pages = [checked(page) for page in (yield Step(request, replies=len(indexes)))]
        for member in [member for page in pages for member in page]:
            kind, _, execution_id = member.decode("utf-8", "replace").partition(":")
            if kind != "lease":
                continue
            try:
                found = yield from ops.call(ops.describe_execution(execution_id))
                attempt = int(found.fields.get("current_attempt_index") or 0)
                stream = yield from ops.call(ops.describe_attempt(execution_id, attempt))
            except ExecutionNotFound:
                continue
            if found.state == "active" and stream.lease_left_ms == 0:
                tokens.append(reclaim_token(execution_id, found.fields["lane_id"], now))
                if len(tokens) == limit:
                    return tokens
        # Timers of other kinds stand among them.
        indexes = [
            index for index, page in zip(indexes, pages, strict=True) if page[_DUE_A_CALL - 1 :]
        ]
        offset += _DUE_A_CALL
    return tokens


def reclaim_token(execution_id: str, lane: str, now_ms: int) -> ReclaimToken:
    """Return the token that names an execution to be taken over; the claim itself checks that it may be."""
    grant = ReclaimGrant(
        execution_id=execution_id,
        partition_key=keys.partition_tag(execution_id),
        grant_key=keys.core(execution_id).decode(),
        expires_at_ms=now_ms + _GRANT_MS,
        lane_id=lane,
    )
    return ReclaimToken(grant)


_GRANT_MS = 60_000


def rotate_waitpoint_secret(kid: str, secret: str, grace_ms: int, partitions: int) -> Flow[None]:
    """Let a key sign from now on in every partition; repeating it completes one that was interrupted."""
    calls = [
        ops.rotate_waitpoint_secret(index, kid, secret, grace_ms) for index in range(partitions)
    ]
    replies = yield Step(b"".join(op.request() for op in calls), replies=len(calls))
    for op, reply in zip(calls, replies, strict=True):
        op.answer(reply)
