"""Claiming through the ready queue of a lane."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.ready import ready_hint, sweep
from ff_fast._core.steps import Pause, Step, Steps, checked, command, send_one
from ff_fast.errors import FunctionMissing

if TYPE_CHECKING:
    from ff_fast._core.deployment import Deployment
    from ff_fast.types import CapabilitySet, Handle

SWEEP_EVERY_S = 5.0
"""Interval of a waiting worker's sweeps over all partitions; one costs 256 small reads in one round trip."""

_SWEEP_IMMEDIATE_S = 1.0
_MISFIT_PAUSE_S = 0.05


class ClaimRequest(NamedTuple):
    """Checked arguments of a claim."""

    lane: str
    worker_id: str
    worker_instance_id: str
    lease_ttl_ms: int
    capabilities: CapabilitySet
    max_wait_s: float | None


def claim(on: Deployment, request: ClaimRequest) -> Steps[Handle | None]:
    """Claim the best execution of a hinted partition; None if the wait ends without one.

    A claim takes 2 or 3 round trips: the hint is popped from the lane, the execution is claimed in its partition, and a
    hint goes back if more work stays there. Lane and partition are in different slots, so no single call can do it.
    """
    lane = request.lane
    ready = keys.ready(lane)
    deadline = time.monotonic() + (request.max_wait_s or 0.0)
    if on.sweep_overdue(lane):
        yield from sweep(lane, on.partitions)
    while True:
        misfits: set[int] = set()
        popped = yield from send_one(command(b"ZPOPMIN", ready))
        left = deadline - time.monotonic()
        if not popped:
            every = _SWEEP_IMMEDIATE_S if request.max_wait_s is None else SWEEP_EVERY_S
            if on.sweep_due(lane, every):
                if (yield from sweep(lane, on.partitions)):
                    continue
            elif left > 0:
                block = min(left, SWEEP_EVERY_S)
                popped = yield from send_one(command(b"BZPOPMIN", ready, b"%.3f" % block), block)
                # BZPOPMIN answers the key first.
                popped = popped[1:] if popped else popped
        if popped:
            partition = int(popped[0])
            try:
                claimed = yield from _claim_partition(request, partition)
            except FunctionMissing:
                # The library is loaded and the claim repeated at once; the repeat finds the hint again.
                yield from send_one(ready_hint(lane, partition, popped[1]))
                raise
            if claimed.handle is None and claimed.next_score is None:
                # The hint was stale; the pop has removed it.
                continue
            if claimed.handle is None:
                # The work there needs other capabilities; try the other partitions before the next wait.
                misfits.add(partition)
                claimed = yield from _claim_elsewhere(request, misfits)
            if claimed.handle is not None:
                return claimed.handle
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        if misfits:
            yield Pause(min(left, _MISFIT_PAUSE_S))


def _claim_elsewhere(request: ClaimRequest, misfits: set[int]) -> Steps[ops.Claimed]:
    """Try all hinted partitions except *misfits*; add those without fitting work to *misfits*."""
    ready = keys.ready(request.lane)
    claimed = ops.Claimed(None, None, None)
    for other in (yield from send_one(command(b"ZRANGE", ready, b"0", b"-1"))):
        if int(other) in misfits:
            continue
        misfits.add(int(other))
        # ZREM, like a pop, so stale hints queued behind an unusable one are removed too.
        (taken,) = yield Step((command(b"ZREM", ready, other),))
        checked(taken)
        if taken:
            claimed = yield from _claim_partition(request, int(other))
            if claimed.handle is not None:
                break
    return claimed


def _claim_partition(request: ClaimRequest, partition: int) -> Steps[ops.Claimed]:
    """Claim in one partition; publish a hint again if work stays there."""
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
        (reply,) = yield Step((op.command(),))
        answer = op.answer(reply)
        if answer.handle is not None or answer.next_offset is None:
            break
        offset = answer.next_offset
    if answer.next_score is not None:
        yield from send_one(ready_hint(request.lane, partition, answer.next_score))
    return answer
