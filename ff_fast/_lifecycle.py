"""Operations of several steps, without I/O: creating with a hint, and claiming through the ready queue.

A lane's ready queue is a sorted set of hints: which partitions have work, scored by their best execution. The work
itself is in the partitions' eligible sets, so a hint that is lost delays work until the next sweep over the
partitions, and a stale one costs one empty claim.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from ff_fast import keys, ops
from ff_fast._hot.resp import pack_command
from ff_fast._steps import Flow, Pause, Step
from ff_fast.errors import ProtocolError, from_server_error

if TYPE_CHECKING:
    from collections.abc import Generator

    from ff_fast.types import CapabilitySet, Handle

SWEEP_EVERY_S = 5.0
"""How often one worker looks at all partitions while it finds no hint: 256 small reads in one round trip."""

_SWEEP_IMMEDIATE_S = 1.0
_MISFIT_PAUSE_S = 0.05


class Sweeper:
    """When a backend looked at all partitions of a lane last."""

    __slots__ = ("_at", "partitions")

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self._at: dict[str, float] = {}

    def due(self, lane: str, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._at.get(lane, float("-inf")) < every_s:
            return False
        self._at[lane] = now
        return True


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


def create(op: ops.Op[bytes], lane: str, execution_id: str) -> Flow[str]:
    """Create an execution, then tell its lane; a repeat tells it again."""
    (reply,) = yield Step(op.request())
    score = op.answer(reply)
    yield from _checked(Step(hint(lane, keys.partition_index(execution_id), score)))
    return execution_id


def claim(request: ClaimRequest, sweeper: Sweeper) -> Flow[Handle | None]:
    """Claim the best execution that a hint leads to; None where there is none within the wait."""
    lane = request.lane
    ready = keys.ready(lane)
    deadline = time.monotonic() + (request.max_wait_s or 0.0)
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
            if claimed is None:
                # Somebody else may be able to do what is there; look for other work before the next wait.
                misfits.add(partition)
                for other in (
                    yield from _checked(Step(pack_command(b"ZRANGE", ready, b"0", b"-1")))
                ):
                    if claimed is None and int(other) not in misfits:
                        misfits.add(int(other))
                        # Taken as by a pop, so that a stale hint behind one that nobody can use goes too.
                        (taken,) = yield Step(pack_command(b"ZREM", ready, other))
                        if isinstance(taken, Exception):
                            raise from_server_error(str(taken))
                        if taken:
                            claimed = yield from _claim_partition(request, int(other))
            if claimed is not None:
                return claimed
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        if misfits:
            yield Pause(min(left, _MISFIT_PAUSE_S))


def _claim_partition(request: ClaimRequest, partition: int) -> Flow[Handle | None]:
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
    return answer.handle


def _sweep(lane: str, partitions: int) -> Flow[bool]:
    """Look at the head of every partition and put the hints that are missing; True where there is work."""
    request = b"".join(
        pack_command(b"ZRANGE", keys.eligible(keys.tag_of(index), lane), b"0", b"0", b"WITHSCORES")
        for index in range(partitions)
    )
    heads = yield Step(request, replies=partitions)
    hints = []
    for index, head in enumerate(heads):
        if isinstance(head, Exception):
            raise from_server_error(str(head))
        if isinstance(head, list) and len(head) == 2:
            hints.append(hint(lane, index, head[1]))
    if hints:
        yield Step(b"".join(hints), replies=len(hints))
    return bool(hints)


def _checked(step: Step) -> Generator[Step | Pause, list[object], list[bytes]]:
    """One plain command: its list reply, or its refusal as an error."""
    (reply,) = yield step
    if isinstance(reply, Exception):
        raise from_server_error(str(reply))
    if reply is None or isinstance(reply, int):
        return []
    if not isinstance(reply, list):
        raise ProtocolError
    return reply
