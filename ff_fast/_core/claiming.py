"""Claiming through the ready queues of a lane.

A claim gives work to its caller or to nobody. The lease id is the client's, so a claim call whose reply is lost is made
again under the same one; and what the server may have granted to a caller that has gone is given back.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from ff_fast import keys
from ff_fast._core import ops, ready
from ff_fast._core.line import Head, Waiter
from ff_fast._core.ready import Offer, listed
from ff_fast._core.steps import (
    AwaitHint,
    Command,
    Pause,
    Step,
    Steps,
    checked,
    command,
    is_foreign,
)
from ff_fast._hot.resp import pack_command
from ff_fast.errors import Corruption, ExecutionNotClaimable, FFError, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from ff_fast._core.deployment import Deployment
    from ff_fast._core.line import Line
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
# The server takes 0 for a wait without end.
_SHORTEST_BLOCK_S = 0.001
# Another connection's bytes may reach the server before those of one that was closed.
_GIVE_BACK_AGAIN_S = (0.01, 0.1)
_NEWS_MS = b"60000"
# A registry's scores are times in ms; what is beyond the last exact integer is foreign.
_NEWEST = b"9007199254740991"


class ClaimRequest(NamedTuple):
    """Checked arguments of a claim; *plain* is whether it takes executions that require nothing."""

    lane: str
    worker_id: str
    worker_instance_id: str
    lease_ttl_ms: int
    capabilities: CapabilitySet
    max_wait_s: float | None
    plain: bool = True

    @property
    def kind(self) -> tuple[str, tuple[str, ...], bool]:
        """What such a worker may take: lane, capabilities, and whether of executions that require nothing."""
        return self.lane, self.capabilities.tokens, self.plain


class Claim:
    """One claim over all its tries: what may be in effect on the server, and is not with the caller yet.

    Attributes:
        lease: Partition and lease id of a claim call that was sent; None again once its reply has shown that it granted
            nothing, or the caller has the handle.
        doubted: The lease of a claim call whose reply was lost.
        hint_taken: A hint was popped, or may have been, and nothing has come of it yet.
        blocked: The server holds back a reply until there is a hint.
        abandoned: Nobody waits for the result any more.
        call: The claim call under the lease, and the hint that led to it.
        given: A hint from the line in which the claim waits.
        failure: The error that ended the wait of the whole line.
        behind: What a hint led to was worse than the hint said, which is put right; another queue may have a better one.
        dismissed: The line has found nothing for the claim.
        shares: Claims of its shell that do not wait may ask together.
        left_line: The claim takes nothing from its line any more.
        wake: Wakes the caller, in the way of its shell. It may be called at any time, and from any thread.
        until: When the wait ends, in monotonic time; it begins with the first try.
        joined_at: When the claim joined its line, in monotonic time.
    """

    __slots__ = (
        "abandoned", "behind", "blocked", "call", "dismissed", "doubted", "failure", "given", "hint_taken", "joined_at",
        "lease", "left_line", "request", "shares", "until", "wake",
    )  # fmt: skip

    def __init__(self, request: ClaimRequest) -> None:
        self.request = request
        self.lease: tuple[int, str] | None = None
        self.doubted: tuple[int, str] | None = None
        self.hint_taken = False
        self.blocked = False
        self.abandoned = False
        self.call: tuple[ops.Op[ops.Claimed], Head] | None = None
        self.given: Head | None = None
        self.failure: FFError | None = None
        self.behind = False
        self.dismissed = False
        self.shares = False
        self.left_line = True
        self.wake: Callable[[], None] = _nobody
        self.until = 0.0
        self.joined_at = 0.0

    def refused(self, error: FFError) -> bool:
        """Note that a claim call has failed; return whether nothing is held under its lease.

        A refusal says nothing of an earlier try under the same lease whose reply was lost.
        """
        if self.lease is None:
            return True
        if error.outcome is Outcome.UNKNOWN:
            self.doubted = self.lease
        elif self.doubted != self.lease:
            self.lease = None
        return self.lease is None

    @property
    def waits(self) -> bool:
        """Whether the claim may wait for a hint."""
        return self.request.max_wait_s is not None

    @property
    def unsettled(self) -> bool:
        """Whether :func:`give_back` has something to do."""
        return self.lease is not None or self.hint_taken

    def left(self) -> float:
        """Return the seconds until the wait ends; it begins with the first try."""
        now = time.monotonic()
        if not self.until:
            self.until = now + (self.request.max_wait_s or 0.0)
        return self.until - now

    def joins(self) -> None:
        """Note that the claim joins its line."""
        self.joined_at = time.monotonic()
        self.given = self.failure = None
        self.left_line = self.dismissed = False

    @property
    def told(self) -> bool:
        """Whether the wait in the line is over, for whatever reason."""
        return (
            self.given is not None or self.failure is not None or self.dismissed or self.abandoned
        )


def _nobody() -> None:
    """Wake nobody: the claim does not wait."""


def claim(on: Deployment, state: Claim) -> Steps[Handle | None]:
    """Claim the best execution that the worker's capabilities cover; None if the wait ends without one.

    A claim takes 2 or 3 round trips: a hint is popped from the lane, the execution is claimed in its partition, and a
    hint goes back if more work stays there. Lane and partition are in different slots, so no single call can do it.
    """
    offer = on.offer(*state.request.kind)
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
    state.left()
    if on.sweep_overdue(offer.kind):
        yield from ready.sweep(offer, on.partitions)
    while not state.abandoned:
        popped, state.behind = True, False
        if state.left() > 0:
            yield AwaitHint(state, offer.line, partial(serve, on, offer), blocks=True)
            found, state.given = state.given, None
            if found is None:
                if state.left() <= 0 and offer.line.looked_at >= state.joined_at:
                    # The line has found nothing since the claim joined it.
                    return None
                continue
            heads = [found]
        elif state.shares and offer.asking:
            yield AwaitHint(state, offer.rush, partial(serve_at_once, on, offer), blocks=False)
            found, state.given = state.given, None
            if found is None:
                return None
            heads = [found]
        else:
            heads, popped = yield from _find(on, state, offer)
        for head in heads:
            handle = yield from _claim_partition(state, head, among_many=len(offer.needs) > 1)
            if handle is not None:
                return handle
            if state.behind:
                break
        if not (popped or state.behind):
            return None
        # The hint was stale; the pop has removed it.
    return None


def _find(on: Deployment, state: Claim, offer: Offer) -> Steps[tuple[list[Head], bool]]:
    """Pop the best hint, and return it; or look at hints that others have taken, and return those, and False."""
    every = SWEEP_EVERY_S if state.waits else _SWEEP_IMMEDIATE_S
    offer.asking += 1
    try:
        while True:
            # A claim that found nothing is often followed by one that finds nothing: it asks for all in one round trip.
            found, records = yield from _pop(state, offer, with_records=offer.idle or state.waits)
            if found is not None:
                return [found], True
            due = on.sweep_due(offer.kind, every)
            if due and (yield from ready.sweep(offer, on.partitions, patient=False)):
                continue
            # Somebody else may have taken a hint and not claimed yet.
            records = records or (yield from _records(offer))
            return (yield from ready.hinted_heads(offer, records)), False
    finally:
        offer.asking -= 1


def serve_at_once(on: Deployment, offer: Offer, _: Waiter | None = None) -> Steps[None]:
    """Ask once for all claims of *offer* that do not wait, and tell each of them what came, or that there is nothing."""
    line = offer.rush
    asking = list(line.waiting)
    if not asking:
        return
    count = len(asking)
    if offer.tokens:
        heads, records = yield from _pop_best(offer, count, with_records=offer.idle)
    else:
        asked = ready.hinted_records(offer.lane, [""]) if offer.idle else []
        reply, *found = yield Step([_pop_command(offer.lane, "", count), *asked])
        popped = listed(reply)
        heads, records = _heads("", popped), [("", each) for each in found]
        if len(popped) > 2 * len(heads):
            # There were foreign records among them.
            count = len(heads)
    yield from _hand_out(line, offer, heads)
    if len(heads) >= count:
        return
    due = on.sweep_due(offer.kind, _SWEEP_IMMEDIATE_S)
    if due and (yield from ready.sweep(offer, on.partitions, patient=False)):
        return
    # The claims that have a hint claim first: what they leave is what the look finds.
    yield Pause(0)
    heads = yield from ready.hinted_heads(offer, records or (yield from _records(offer)))
    for head in heads:
        if not line.give(head):
            break
    if heads:
        # A partition may have more than its best: who got nothing asks again.
        return
    for claim in asking:
        line.dismiss(claim)


def _hand_out(line: Line, offer: Offer, heads: list[Head]) -> Steps[None]:
    """Give popped hints to the claims in *line*; those for which there is no claim go back to their queues."""
    over = [head for head in heads if not line.give(head)]
    if over:
        yield Step([ready.requeue(offer.lane, head) for head in over])


def serve(on: Deployment, offer: Offer, leader: Waiter | None = None) -> Steps[None]:
    """Wait once for hints, at most :data:`LOOK_EVERY_S`, and hand them out to the claims in the line of *offer*.

    Args:
        on: The deployment.
        offer: Whose line it is.
        leader: The claim whose caller runs these steps; they last no longer than it waits.
    """
    line = offer.line
    if not line.waiting:
        return
    if on.sweep_due(offer.kind, SWEEP_EVERY_S):
        yield from ready.sweep(offer, on.partitions)
    if leader is not None:
        # An interrupt may strike before everything is handed out.
        leader.hint_taken = leader.blocked = True
    heads: list[Head] | None = []
    if offer.tokens:
        # A block takes from the first queue that has a hint; this takes the best of all.
        heads, _ = yield from _pop_best(offer, len(line.waiting))
    if not heads:
        until = line.until if leader is None else leader.until
        heads = yield from _block(offer, until)
    if heads:
        yield from _hand_out(line, offer, heads)
    elif heads is not None:
        # Somebody else may have taken a hint and not claimed yet.
        began = time.monotonic()
        records = yield from _records(offer)
        for head in (yield from ready.hinted_heads(offer, records, patient=True)):
            if not line.give(head):
                break
        line.looked_at = began
    if leader is not None:
        leader.blocked = False
        leader.hint_taken = leader.given is not None


def _block(offer: Offer, until: float) -> Steps[list[Head] | None]:
    """Let the server block until there are hints; None where something else has come than hints or the end."""
    line = offer.line
    waiting = line.waiting
    try:
        oldest = waiting[0].joined_at
    except IndexError:
        return None
    left = until - time.monotonic()
    if line.looked_at < oldest:
        # With a look in the middle of its wait, no claim has to look for itself at the end.
        left /= 2
    block_s = max(min(left, LOOK_EVERY_S), _SHORTEST_BLOCK_S)
    # What another thread learns meanwhile is news.
    lane, seen = offer.lane, offer.seen
    queues = {keys.ready(lane, needs): needs for needs in offer.needs}
    watched = [*queues, keys.lane_news(lane, seen)] if offer.tokens else [*queues]
    pop = pack_command(
        b"BZMPOP", b"%.3f" % block_s, b"%d" % len(watched), *watched, b"MIN", b"COUNT",
        b"%d" % max(len(waiting), 1),
    )  # fmt: skip
    (reply,) = yield Step((Command(watched[0], pop),), block_s)
    if is_foreign(reply):
        # One of the queues is a key of another type, which blocks nobody.
        yield Pause(min(block_s, _FOREIGN_PAUSE_S))
        return []
    popped = checked(reply)
    if not popped:
        return []
    queue, members = popped[0], cast("list[list[bytes]]", popped[1])
    if queue not in queues:
        # For the next one who waits; this one will watch another key.
        yield Step([command(b"ZADD", queue, b"0", b"news"), command(b"PEXPIRE", queue, _NEWS_MS)])
        return None
    return _heads(queues[queue], [each for member in members for each in member]) or None


def _records(offer: Offer) -> Steps[list[tuple[str, object]]]:
    required = list(offer.needs)
    if not required:
        return []
    replies = yield Step(ready.hinted_records(offer.lane, required))
    return list(zip(required, replies, strict=True))


def _pop(
    state: Claim, offer: Offer, *, with_records: bool
) -> Steps[tuple[Head | None, list[tuple[str, object]] | None]]:
    """Pop the best hint; with it come the records of the hinted partitions, if they are asked for."""
    state.hint_taken = True
    if offer.tokens:
        heads, records = yield from _pop_best(offer, 1, with_records=with_records)
    else:
        asked = ready.hinted_records(offer.lane, [""]) if with_records else []
        reply, *found = yield Step([_pop_command(offer.lane, ""), *asked])
        popped = listed(reply)
        while popped and not (heads := _heads("", popped)):
            popped = listed(*(yield Step((_pop_command(offer.lane, ""),))))
        heads = heads if popped else []
        records = [("", each) for each in found]
    state.hint_taken = bool(heads)
    return heads[0] if heads else None, records if with_records else None


def _pop_best(
    offer: Offer, count: int, *, with_records: bool = False
) -> Steps[tuple[list[Head], list[tuple[str, object]]]]:
    """Pop up to *count* of the best hints in all queues, best first."""
    lane = offer.lane
    while True:
        required = list(offer.needs)
        news = command(
            b"ZRANGEBYSCORE", keys.lane_needs(lane), b"(%d" % offer.seen, _NEWEST, b"WITHSCORES"
        )
        last = b"%d" % (count - 1)
        looks = [
            command(b"ZRANGE", keys.ready(lane, needs), b"0", last, b"WITHSCORES")
            for needs in required
        ]
        asked = ready.hinted_records(lane, required) if with_records else []
        told, *replies = yield Step([news, *looks, *asked])
        if offer.read(listed(told)):
            # Asked again with what is new.
            continue
        records = list(zip(required, replies[len(required) :], strict=False))
        scored = sorted(
            (float(score), needs)
            for needs, best in zip(required, map(listed, replies), strict=False)
            for score in best[1::2]
        )
        if not scored:
            return [], records
        counts = Counter(needs for _, needs in scored[:count])
        popped = yield Step([_pop_command(lane, needs, counts[needs]) for needs in counts])
        heads = sorted(
            head
            for needs, reply in zip(counts, popped, strict=True)
            for head in _heads(needs, listed(reply))
        )
        if heads:
            return heads, records


def _pop_command(lane: str, needs: str, count: int = 1) -> Command:
    return command(b"ZPOPMIN", keys.ready(lane, needs), *([b"%d" % count] if count > 1 else []))


def _heads(needs: str, popped: list[bytes]) -> list[Head]:
    """Return the hints among what was popped from a queue; the pop has removed the foreign records."""
    return [
        Head(float(score), needs, partition)
        for member, score in zip(popped[::2], popped[1::2], strict=True)
        if (partition := ready.partition_of(member)) is not None
    ]


def _claim_partition(state: Claim, head: Head, *, among_many: bool) -> Steps[Handle | None]:
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
        hint_score=b"%.0f" % head.score if among_many else b"",
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
            if answer.handle is not None or answer.next_score is None or answer.behind:
                break
    except FFError as error:
        if state.refused(error):
            with contextlib.suppress(FFError):
                yield from ready.publish_heads(lane, [head])
                state.hint_taken = False
        raise
    if answer.handle is None:
        state.lease, state.behind = None, answer.behind
    if answer.next_score is not None:
        # The handle counts, whatever becomes of the hint.
        with contextlib.suppress(FFError):
            yield Step((ready.requeue(lane, head, answer.next_score),))
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
        state.refused(error)
        raise
    if state.abandoned:
        yield from give_back(on, state)
    return handle


def produce(
    on: Deployment,
    state: Claim,
    op: ops.Op[ops.Produced | None],
    execution_id: str,
    lease_id: str,
) -> Steps[ops.Produced | None]:
    """Claim the execution of a named stream, unless somebody else produces it."""
    state.lease = keys.partition_index(execution_id), lease_id
    try:
        produced = yield from ops.call(op)
    except FFError as error:
        state.refused(error)
        raise
    if produced is None:
        state.lease = None
    elif state.abandoned:
        yield from give_back(on, state)
    return produced


def give_back(on: Deployment, state: Claim) -> Steps[None]:
    """Give back what a claim has taken for a caller that has gone: its execution, and its hint."""
    # Whoever leads may have taken hints that it has not handed out.
    head = None if state.blocked else state.given
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
        if hints:
            state.hint_taken = False
        elif state.call is not None:
            head = state.call[1]
    if state.hint_taken:
        lane = state.request.lane
        if head is not None:
            # Many claims may leave at once, and a look costs a read for each partition.
            yield Step((ready.requeue(lane, head),))
        else:
            offer = on.offer(*state.request.kind)
            heads = yield from ready.hinted_heads(offer, (yield from _records(offer)))
            yield from ready.publish_heads(lane, heads)
        state.given, state.hint_taken = None, False
