"""Claiming through the ready queues of a lane.

A claim gives work to its caller or to nobody. The lease id is the client's, so a claim call whose reply is lost is made
again under the same one; and what the server may have granted to a caller that has gone is given back.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

from ff_fast import keys
from ff_fast._core import ops, ready
from ff_fast._core.ready import Head, Offer, listed
from ff_fast._core.steps import Command, Pause, Step, Steps, checked, command, is_foreign
from ff_fast.errors import Corruption, ExecutionNotClaimable, FFError, Outcome

if TYPE_CHECKING:
    from ff_fast._core.deployment import Deployment
    from ff_fast.types import CapabilitySet, Handle

SWEEP_EVERY_S = 5.0
"""Interval of a waiting worker's sweeps over all partitions; one costs 256 small reads in one round trip."""

LOOK_EVERY_S = 1.0
"""Longest time for which a waiting claim relies on hints alone."""

SETTLE_S = 0.5
"""Longest time, in seconds, to wait until work that nobody will get is given back."""

SETTLE_LOOK_S = 0.002

_SWEEP_IMMEDIATE_S = 1.0
_FOREIGN_PAUSE_S = 0.05
# Another connection's bytes may reach the server before those of one that was closed.
_GIVE_BACK_AGAIN_S = (0.01, 0.1)
_NEWS_MS = b"60000"
# A registry's scores are times in ms; what is beyond the last exact integer is foreign.
_NEWEST = b"9007199254740991"


class ClaimRequest(NamedTuple):
    """Checked arguments of a claim."""

    lane: str
    worker_id: str
    worker_instance_id: str
    lease_ttl_ms: int
    capabilities: CapabilitySet
    max_wait_s: float | None


class Claim:
    """One claim over all its tries: what may be in effect on the server, and is not with the caller yet.

    Attributes:
        lease: Partition and lease id of a claim call that was sent; None again once its reply has shown that it granted
            nothing, or the caller has the handle.
        hint_taken: A hint was popped, or may have been, and nothing has come of it yet.
        blocked: The server holds back its reply until there is a hint.
        abandoned: Nobody waits for the result any more.
        call: The claim call under the lease, and the hint that led to it.
    """

    __slots__ = ("_deadline", "abandoned", "blocked", "call", "hint_taken", "lease", "request")

    def __init__(self, request: ClaimRequest) -> None:
        self.request = request
        self.lease: tuple[int, str] | None = None
        self.hint_taken = False
        self.blocked = False
        self.abandoned = False
        self.call: tuple[ops.Op[ops.Claimed], Head] | None = None
        self._deadline: float | None = None

    @property
    def waits(self) -> bool:
        """Whether the claim may block on the server."""
        return self.request.max_wait_s is not None

    @property
    def unsettled(self) -> bool:
        """Whether :func:`give_back` has something to do."""
        return self.lease is not None or self.hint_taken

    def left(self) -> float:
        """Return the seconds until the wait ends; it begins with the first try."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + (self.request.max_wait_s or 0.0)
        return self._deadline - now


def claim(on: Deployment, state: Claim) -> Steps[Handle | None]:
    """Claim the best execution that the worker's capabilities cover; None if the wait ends without one.

    A claim takes 2 or 3 round trips: a hint is popped from the lane, the execution is claimed in its partition, and a
    hint goes back if more work stays there. Lane and partition are in different slots, so no single call can do it.
    """
    offer = on.offer(state.request.lane, state.request.capabilities.tokens)
    # An earlier try may have been cut off while the server held back its reply.
    state.blocked = False
    handle = None
    if state.call is not None and state.lease is not None:
        # The reply of an earlier try was lost.
        handle = yield from _make(state, *state.call)
    if handle is None:
        handle = yield from _claim(on, state, offer)
    if state.abandoned:
        yield from give_back(on, state)
        return None
    offer.idle = handle is None
    return handle


def _claim(on: Deployment, state: Claim, offer: Offer) -> Steps[Handle | None]:
    waits = state.waits
    key = (offer.lane, offer.tokens)
    state.left()
    if on.sweep_overdue(key):
        yield from ready.sweep(offer, on.partitions)
    while not state.abandoned:
        # A claim that found nothing is often followed by one that finds nothing: it asks for all in one round trip.
        found, records = yield from _pop(state, offer, with_records=offer.idle and not waits)
        if found is None:
            every = SWEEP_EVERY_S if waits else _SWEEP_IMMEDIATE_S
            if on.sweep_due(key, every) and (yield from ready.sweep(offer, on.partitions)):
                continue
            if (left := state.left()) > 0:
                found = yield from _wait(state, offer, min(left, LOOK_EVERY_S))
        if found is not None:
            handle = yield from _claim_partition(state, found)
            if handle is not None:
                return handle
            # The hint was stale; the pop has removed it.
            continue
        # Somebody else may have taken a hint and not claimed yet.
        for head in (yield from ready.hinted_heads(offer, records or (yield from _records(offer)))):
            handle = yield from _claim_partition(state, head)
            if handle is not None:
                return handle
        if state.left() <= 0:
            return None
    return None


def _records(offer: Offer) -> Steps[list[tuple[str, object]]]:
    required = list(offer.needs)
    replies = yield Step(ready.hinted_records(offer.lane, required))
    return list(zip(required, replies, strict=True))


def _pop(
    state: Claim, offer: Offer, *, with_records: bool
) -> Steps[tuple[Head | None, list[tuple[str, object]] | None]]:
    """Pop the best hint; with it come the records of the hinted partitions, if they are asked for."""
    lane, required = offer.lane, list(offer.needs)
    asked = ready.hinted_records(lane, required) if with_records else []
    if offer.tokens:
        news = command(
            b"ZRANGEBYSCORE", keys.lane_needs(lane), b"(%d" % offer.seen, _NEWEST, b"WITHSCORES"
        )
        heads = [
            command(b"ZRANGE", keys.ready(lane, needs), b"0", b"0", b"WITHSCORES")
            for needs in required
        ]
        told, *replies = yield Step([news, *heads, *asked])
        if offer.read(listed(told)):
            return (yield from _pop(state, offer, with_records=with_records))
        best = [
            (float(head[1]), needs)
            for needs, head in zip(required, map(listed, replies), strict=False)
            if head
        ]
        records = replies[len(required) :]
        found = (yield from _pop_from(state, lane, min(best)[1])) if best else None
    else:
        state.hint_taken = True
        popped, *records = yield Step([_pop_command(lane, ""), *asked])
        found = _head_of(state, "", listed(popped))
        if found is None and state.hint_taken:
            found = yield from _pop_from(state, lane, "")
    return found, list(zip(required, records, strict=True)) if with_records else None


def _pop_command(lane: str, needs: str) -> Command:
    return command(b"ZPOPMIN", keys.ready(lane, needs))


def _pop_from(state: Claim, lane: str, needs: str) -> Steps[Head | None]:
    found = None
    state.hint_taken = True
    while found is None and state.hint_taken:
        found = _head_of(state, needs, listed(*(yield Step((_pop_command(lane, needs),)))))
    return found


def _head_of(state: Claim, needs: str, popped: list[bytes]) -> Head | None:
    """Return a hint that was popped; None, and no hint is taken, where the queue was empty."""
    if not popped:
        state.hint_taken = False
        return None
    partition = ready.partition_of(popped[0])
    # The pop has removed a foreign record.
    return None if partition is None else Head(float(popped[1]), needs, partition)


def _wait(state: Claim, offer: Offer, block_s: float) -> Steps[Head | None]:
    """Wait for a hint; None where none came, or new requirements are to be read."""
    # What another thread learns meanwhile is news.
    lane, seen = offer.lane, offer.seen
    queues = {keys.ready(lane, needs): needs for needs in offer.needs}
    watched = [*queues, keys.lane_news(lane, seen)] if offer.tokens else [*queues]
    state.hint_taken = state.blocked = True
    (reply,) = yield Step((command(b"BZPOPMIN", *watched, b"%.3f" % block_s),), block_s)
    state.blocked = False
    if is_foreign(reply):
        # One of the queues is a key of another type, which blocks nobody.
        state.hint_taken = False
        yield Pause(min(block_s, _FOREIGN_PAUSE_S))
        return None
    popped = checked(reply)
    if popped and popped[0] not in queues:
        state.hint_taken = False
        # For the next one who waits; this one will watch another key.
        yield Step(
            [command(b"ZADD", popped[0], b"0", b"news"), command(b"PEXPIRE", popped[0], _NEWS_MS)]
        )
        return None
    return _head_of(state, queues[popped[0]] if popped else "", popped[1:])


def _claim_partition(state: Claim, head: Head) -> Steps[Handle | None]:
    """Claim the best execution of a partition; None if there is none any more."""
    if state.abandoned:
        return None
    request = state.request
    lease_id = keys.new_uuid()
    op = ops.claim(
        head.partition,
        lane=request.lane,
        needs=head.needs,
        worker_id=request.worker_id,
        worker_instance_id=request.worker_instance_id,
        lease_id=lease_id,
        lease_ttl_ms=request.lease_ttl_ms,
        attempt_id=keys.new_uuid(),
    )
    state.call = op, head
    state.lease = head.partition, lease_id
    return (yield from _make(state, op, head))


def _make(state: Claim, op: ops.Op[ops.Claimed], head: Head) -> Steps[Handle | None]:
    """Make a claim call; publish a hint again if work stays in the partition."""
    lane = state.request.lane
    try:
        while True:
            (reply,) = yield Step((op.command(),))
            try:
                answer = op.answer(reply)
            except Corruption:
                if isinstance(reply, list) and reply[0] == 1:
                    # A success that cannot be read: there may be a lease.
                    raise
                # A key of the partition is foreign data: no work can be claimed there.
                answer = ops.Claimed(None, None)
                break
            if answer.handle is not None or answer.next_score is None:
                break
    except FFError as error:
        if error.outcome is not Outcome.UNKNOWN:
            state.lease = None
            with contextlib.suppress(FFError):
                yield from ready.publish_heads(lane, [head])
                state.hint_taken = False
        raise
    if answer.handle is None:
        state.lease = None
    elif answer.next_score is not None:
        # The handle counts, whatever becomes of the hint.
        with contextlib.suppress(FFError):
            yield Step((ready.requeue(lane, head.needs, answer.next_score, head.partition),))
    state.hint_taken = False
    return answer.handle


def take_over(
    on: Deployment,
    state: Claim,
    op: ops.Op[tuple[Handle | None, ops.Hints]],
    execution_id: str,
    lease_id: str,
) -> Steps[Handle]:
    """Claim one execution by its id."""
    partition = keys.partition_index(execution_id)
    state.lease = partition, lease_id
    try:
        handle, hints = yield from ops.call(op)
        if handle is None:
            yield from ready.publish_hints(hints, partition)
            raise ExecutionNotClaimable
    except FFError as error:
        if error.outcome is not Outcome.UNKNOWN:
            state.lease = None
        raise
    if state.abandoned:
        yield from give_back(on, state)
    return handle


def give_back(on: Deployment, state: Claim) -> Steps[None]:
    """Give back what a claim has taken for a caller that has gone: its execution, and its hint."""
    if state.lease is not None:
        partition, lease_id = state.lease
        op = ops.give_back(partition, lease_id)
        hints: ops.Hints = []
        for pause in (0.0, *_GIVE_BACK_AGAIN_S):
            if pause:
                yield Pause(pause)
            (reply,) = yield Step((op.command(),))
            given, hints = op.answer(reply)
            if given:
                break
        try:
            yield from ready.publish_hints(hints, partition)
        except FFError:
            state.hint_taken = True
            raise
        finally:
            state.lease = None
    if state.hint_taken:
        offer = on.offer(state.request.lane, state.request.capabilities.tokens)
        heads = yield from ready.hinted_heads(offer, (yield from _records(offer)))
        yield from ready.publish_heads(offer.lane, heads)
        state.hint_taken = False
